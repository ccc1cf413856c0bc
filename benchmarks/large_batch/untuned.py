"""Optimizers with nothing tuned, beside ours: rows of their own, and a table.

    taskset -c 1 python benchmarks/large_batch/untuned.py --workload=autoencoder
    python benchmarks/large_batch/untuned.py --table

They are Optax's, with its defaults (`workloads.DEFAULTS`), each with a constant rate
and with a cosine decay from the first step on, by the three test seeds alone. Every run
is a line of `results/untuned.jsonl`, and what is there is not run again. The table,
`results/untuned.md`, has `nlcg by curvature` and the best tuned peer from the rows of
the sweep.
"""

import argparse
import pathlib
import statistics
from collections.abc import Iterable
from typing import Any

import figures
import protocol
import report
import sweep
from workloads import DEFAULTS, WORKLOADS, Workload, untuned

RESULTS = sweep.RESULTS / "untuned.jsonl"
OURS = "nlcg by curvature"
Rows = list[dict[str, Any]]


def schedules_of(optimizer: str, workload: Workload) -> Iterable[str]:
    """The names of its schedules: a schedule-free one has no decay."""
    names = list(workload.schedules)
    return names[:1] if optimizer.startswith("schedule-free") else names


def run(
    name: str,
    workload: Workload,
    groups: Iterable[tuple[str, int]],
    path: pathlib.Path = RESULTS,
) -> None:
    """Adds the rows that are not there of these optimizers and batch sizes."""
    workload = untuned(workload)
    fields = ("workload", "optimizer", "batch_size", *protocol.Cell._fields)
    done = {tuple(row[field] for field in fields) for row in protocol.read(path)}
    trainer, where = None, protocol.environment()
    for optimizer, size in groups:
        rate = workload.optimizers[optimizer][1]
        for schedule in schedules_of(optimizer, workload):
            for seed in workload.test_seeds:
                cell = protocol.Cell("test", rate, schedule, seed)
                if (name, optimizer, size, *cell) in done:
                    continue
                trainer = trainer or sweep.Trainer(workload)
                row = {"workload": name, **trainer.run(optimizer, size, cell), **where}
                protocol.append(path, row)
                print(sweep.line(row, 1, 1, 0.0), flush=True)


def settings(rows: Rows, workload: str, size: int) -> dict[str, Rows]:
    """The rows of a cell by what a user would choose: an optimizer and its schedule."""
    found: dict[str, Rows] = {}
    for row in rows:
        if (row["workload"], row["batch_size"]) == (workload, size):
            name = f"{row['optimizer']}, {row['schedule']}"
            found.setdefault(name, []).append(row)
    return found


def ends(rows: Rows) -> list[float] | None:
    """The losses at the end, of held-out examples if any; None if one diverged."""
    if not rows or any(row["diverged"] for row in rows):
        return None
    return [row["loss"] for row in rows]


def shown(rows: Rows) -> str:
    """Loss, and accuracy in percent where there is one, with standard errors."""
    losses = ends(rows)
    if not losses:
        failed = sum(row["diverged"] for row in rows)
        return f"{failed} of {len(rows)} diverged" if failed else "not run"
    mean, error = report.mean_and_error(losses)
    text = f"{mean:.4g}{figures.spread(error, '.1g')}"
    if rows[0]["accuracy"] is not None:
        mean, error = report.mean_and_error([100 * row["accuracy"] for row in rows])
        text += f"; {mean:.1f}%{figures.spread(error, '.1f')}"
    return text


def best(found: dict[str, Rows]) -> str | None:
    """The setting of the lowest mean loss, of those that always came to an end."""
    means = {
        name: statistics.mean(losses)
        for name, rows in found.items()
        if (losses := ends(rows))
    }
    return min(means, key=means.__getitem__, default=None)


def tables(rows: Rows, results: pathlib.Path) -> str:
    """The Markdown: the best of a cell beside ours and the best tuned, then all."""
    cells = list(dict.fromkeys((row["workload"], row["batch_size"]) for row in rows))
    cells.sort(key=lambda cell: (list(WORKLOADS).index(cell[0]), cell[1]))
    sweeps = {
        name: report.tested(protocol.read(results / f"{name}.jsonl"))
        for name, _ in cells
    }
    summary, whole = [], []
    for name, size in cells:
        label = f"`{name}`, {size:,}"
        found = settings(rows, name, size)
        tuned: dict[str, Rows] = {}
        for row in sweeps[name]:
            if row["batch_size"] == size:
                tuned.setdefault(row["optimizer"], []).append(row)
        peers = {peer: tuned[peer] for peer in report.PEERS if peer in tuned}
        line = [label, shown(tuned.get(OURS, []))]
        for group in (found, peers):
            first = best(group)
            line.append(f"{shown(group[first])} ({first})" if first else "–")
        summary.append(line)
        whole += [
            [label, setting, shown(of_setting)]
            for setting, of_setting in sorted(found.items())
        ]
    missing = [name for name in DEFAULTS if all(r["optimizer"] != name for r in rows)]
    lines = [
        "# Optimizers with nothing tuned",
        "",
        "Loss at the end (of held-out examples, where there are any; and test "
        "accuracy), mean ± standard error of the test seeds; "
        "the best of what was run of each kind, in brackets which. `nlcg by curvature` "
        "and the tuned peers are rows of the sweep.",
        "",
        "<!-- untuned -->",
        "",
        *report.table(
            ["batches", OURS, "best untuned other", "best tuned peer"], summary
        ),
        "",
        "<!-- end -->",
        "",
        "All that was run:",
        "",
        *report.table(["batches", "optimizer, schedule", "loss"], whole),
        "",
        *([f"Not run: {', '.join(missing)}.", ""] if missing else []),
        f"`python benchmarks/large_batch/untuned.py`; {len(rows)} runs; "
        f"{report.environments(rows)}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=WORKLOADS)
    parser.add_argument("--batch_sizes", help="such as 64,256; all by default")
    parser.add_argument("--optimizers", help="some of them, split by semicolons")
    parser.add_argument("--data_dir", help="the folder of a workload that needs one")
    parser.add_argument("--table", action="store_true", help="write untuned.md")
    flags = parser.parse_args()
    if flags.table:
        text = tables(protocol.read(RESULTS), RESULTS.parent)
        RESULTS.with_suffix(".md").write_text(text)
        return
    if not flags.workload:
        parser.error("--workload or --table?")
    workload = WORKLOADS[flags.workload](flags.data_dir)
    sizes = sweep.sizes_of(workload, flags.batch_sizes)
    names = flags.optimizers.split(";") if flags.optimizers else list(DEFAULTS)
    if unknown := set(names) - set(DEFAULTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; {', '.join(DEFAULTS)}")
    groups = [(optimizer, size) for size in sizes for optimizer in names]
    run(flags.workload, workload, groups)


if __name__ == "__main__":
    main()

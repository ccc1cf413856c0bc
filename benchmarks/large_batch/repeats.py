"""How often a run fails: cells of the sweep by ten seeds, ours and the best tuned peer.

    taskset -c 1 python benchmarks/large_batch/repeats.py --workload=autoencoder
    python benchmarks/large_batch/repeats.py --table

The peer is the one of the lowest loss at the end, at the rate and schedule that its
tuning chose. The first three seeds are those of the sweep. Runs are lines of
`results/repeats.jsonl`; what is there is not run again. `--table` writes
`results/repeats.md`.
"""

import argparse
import statistics
from typing import Any

import figures
import protocol
import report
import starts
import sweep
import untuned
from workloads import WORKLOADS, Workload

RESULTS = sweep.RESULTS / "repeats.jsonl"
OURS = untuned.OURS
SEEDS = range(10)
# Where a run takes less than a minute.
CELLS = {
    "autoencoder": (128, 512, 1024, 1797),
    "autoencoder_cifar": (1024, 4096),
    "burgers": (1,),
    "digits": (512,),
    "two_digits": (64, 1024),
}


def best_peer(name: str, size: int) -> dict[str, Any]:
    """A row of the tuned peer that ends lowest."""
    rows = report.tested(protocol.read(sweep.RESULTS / f"{name}.jsonl"))
    peers: dict[str, list[dict]] = {}
    for row in rows:
        if row["batch_size"] == size and row["optimizer"] in report.PEERS:
            peers.setdefault(row["optimizer"], []).append(row)
    first = untuned.best(peers)
    if first is None:
        raise SystemExit(f"no tuned peer of {name} came to its end at {size}")
    return peers[first][0]


def run(name: str, workload: Workload, sizes: tuple[int, ...]) -> None:
    """Adds the rows that are not there."""
    done = {
        (row["workload"], row["optimizer"], row["batch_size"], row["seed"])
        for row in protocol.read(RESULTS)
    }
    trainer, where = None, protocol.environment()
    for size in sizes:
        peer = best_peer(name, size)
        settings = {
            OURS: (1.0, next(iter(workload.schedules))),
            peer["optimizer"]: (peer["learning_rate"], peer["schedule"]),
        }
        for optimizer, (rate, schedule) in settings.items():
            for seed in SEEDS:
                if (name, optimizer, size, seed) in done:
                    continue
                trainer = trainer or sweep.Trainer(workload)
                cell = protocol.Cell("test", rate, schedule, seed)
                row = {"workload": name, **trainer.run(optimizer, size, cell), **where}
                protocol.append(RESULTS, row)
                print(sweep.line(row, 1, 1, 0.0), flush=True)


def table(rows: list[dict]) -> str:
    """The Markdown."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        key = row["workload"], row["batch_size"], row["optimizer"]
        groups.setdefault(key, []).append(row)
    cells, totals = [], {True: [0] * 4, False: [0] * 4}
    for (name, size, optimizer), group in sorted(groups.items(), key=order):
        losses = [row["loss"] for row in group if row["loss"] is not None]
        told = [row["steps_back"] for row in group if "steps_back" in row]
        counts = [
            len(group),
            sum(row["diverged"] for row in group),
            len(starts.badly(group)),
            sum(back > 0 for back in told),
        ]
        kind = totals[optimizer == OURS]
        kind[:] = [a + b for a, b in zip(kind, counts, strict=True)]
        spread = "–"
        if losses:
            low, high = min(losses), max(losses)
            spread = f"{statistics.median(losses):.4g} ({low:.4g} to {high:.4g})"
        shown = [str(count) for count in counts]
        if not told:
            shown[-1] = "–"
        who = figures.SHOWN.get(optimizer, optimizer)
        cells.append([f"`{name}`, {size:,}", who, spread, *shown])
    for ours, counts in totals.items():
        who = "**ours, all**" if ours else "**tuned peers, all**"
        shown = [f"**{count}**" for count in counts]
        if not ours:
            shown[-1] = "–"
        cells.append([who, "", "", *shown])
    header = ["batches", "optimizer", "loss: median, range", "runs", "diverged"]
    header += ["more than 5% above the median", "took a step back"]
    lines = [
        "# How often a run fails",
        "",
        f"Ten seeds (0 to {SEEDS[-1]}) of every cell, ours with nothing tuned beside "
        "the tuned peer of the lowest loss, at the rate and schedule of its tuning. A "
        "step back is one that was taken back, or a return to the average.",
        "",
        "<!-- repeats -->",
        "",
        *report.table(header, cells),
        "",
        "<!-- end -->",
        "",
        f"`python benchmarks/large_batch/repeats.py`; {len(rows)} runs; "
        f"{report.environments(rows)}.",
    ]
    return "\n".join(lines) + "\n"


def order(item: tuple[tuple, Any]) -> tuple:
    name, size, optimizer = item[0]
    return list(WORKLOADS).index(name), size, optimizer != OURS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=CELLS)
    parser.add_argument("--batch_sizes", help="such as 64,256; all by default")
    parser.add_argument("--data_dir", help="the folder of a workload that needs one")
    parser.add_argument("--table", action="store_true", help="write repeats.md")
    flags = parser.parse_args()
    if flags.table:
        RESULTS.with_suffix(".md").write_text(table(protocol.read(RESULTS)))
    elif flags.workload:
        workload = WORKLOADS[flags.workload](flags.data_dir)
        sizes = CELLS[flags.workload]
        if flags.batch_sizes:
            sizes = sweep.sizes_of(workload, flags.batch_sizes)
        run(flags.workload, workload, sizes)
    else:
        parser.error("--workload or --table?")


if __name__ == "__main__":
    main()

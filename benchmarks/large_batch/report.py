"""Tables and plots of what the sweep measured: results/tables.md, and PNGs beside it.

python benchmarks/large_batch/report.py
"""

import argparse
import math
import pathlib
import statistics
import textwrap
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import protocol
import targets
from workloads import OPTIMIZERS, UNTUNED, WORKLOADS, Workload

# With what NLCG is compared; in an ablation, all others are variants of it.
PEERS = [name for name in OPTIMIZERS if not name.startswith("nlcg")]
HERE = pathlib.Path(__file__).resolve().parent
Rows = list[dict[str, Any]]
Best = dict[tuple[str, int], targets.Reached | None]  # by optimizer and batch size


def group(rows: Rows, workload: Workload) -> dict[tuple[str, int], Rows]:
    """Rows by optimizer and batch size, each run once, in the workload's order."""
    names = list(workload.optimizers)
    groups: dict[tuple[str, int], dict] = {}
    for row in rows:
        cell = (row["phase"], row["learning_rate"], row["schedule"], row["seed"])
        of_group = groups.setdefault((row["optimizer"], row["batch_size"]), {})
        of_group.setdefault(cell, row)

    def order(key: tuple[str, int]) -> tuple:
        known = key[0] in names
        return not known, names.index(key[0]) if known else 0, key

    return {key: list(groups[key].values()) for key in sorted(groups, key=order)}


def tested(rows: Rows) -> Rows:
    return [row for row in rows if row["phase"] == "test"]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def accuracy(rows: Rows) -> tuple[float, float] | None:
    """Mean test accuracy and standard error, if every test run came to an end."""
    rows = tested(rows)
    if not rows or any(row["diverged"] for row in rows):
        return None
    return mean_and_error([row["accuracy"] for row in rows])


def curve(rows: Rows) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps and loss, the mean over seeds, of the tested setting."""
    rows = tested(rows)
    if not rows or any(row["diverged"] for row in rows):
        return None
    ends, losses = zip(*map(targets.trajectory, rows), strict=True)
    return ends[0], np.mean(losses, axis=0)


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def by_batch_size(groups: dict[tuple[str, int], Rows], cell: Any) -> list[str]:
    """A table: optimizers down, batch sizes across."""
    sizes = sorted({size for _, size in groups})
    names = list(dict.fromkeys(name for name, _ in groups))
    return table(
        ["optimizer", *(f"batch {size:,}" for size in sizes)],
        [
            [name, *(cell(groups.get((name, size), []), size) for size in sizes)]
            for name in names
        ],
    )


def section(name: str, rows: Rows) -> list[str]:
    """The Markdown of a workload."""
    workload = WORKLOADS[name](None)
    command = f"python benchmarks/large_batch/sweep.py --workload={name}"
    if workload.program:
        command = f"python benchmarks/large_batch/{workload.program}"
    elif workload.config.dataset.name == "folder" or name == "tinyshakespeare":
        command += " --data_dir=FOLDER"
    lines = [f"## {name}", ""]
    if not rows:
        return [*lines, f"Not measured; `{command}` does.", ""]
    groups = group(rows, workload)
    if workload.steps:
        lines += growth(name, groups, workload)
        return [*lines, *footer(command, rows, workload)]
    curves = {key: curve(of_group) for key, of_group in groups.items()}

    def target(size: int) -> float | None:
        """The lowest loss that one of the others than NLCG ends with."""
        losses = [
            found[1][-1]
            for (name, s), found in curves.items()
            if found and s == size and name in PEERS
        ]
        return min(losses, default=None)

    def accuracy_cell(of_group: Rows, size: int) -> str:
        if any(row["diverged"] for row in tested(of_group)):
            return "diverged"
        found = accuracy(of_group)
        if found is None:
            return "not run"
        error = "(one seed)" if math.isnan(found[1]) else f"± {100 * found[1]:.2f}"
        return f"{100 * found[0]:.2f} {error}"

    def setting_cell(of_group: Rows, size: int) -> str:
        chosen = tested(of_group)[:1]
        if chosen and chosen[0]["optimizer"] in UNTUNED:
            return "nothing to tune"
        return (
            "".join(f"{r['learning_rate']:.3g}; {r['schedule']}" for r in chosen) or "–"
        )

    def loss_cell(of_group: Rows, size: int) -> str:
        found = curve(of_group)
        return f"{found[1][-1]:.4g}" if found else "–"

    def steps_cell(of_group: Rows, size: int) -> str:
        found, wanted = curve(of_group), target(size)
        if found is None or wanted is None:
            return "–"
        reached = np.flatnonzero(found[1] <= wanted)
        if not len(reached):
            return "not reached"
        return f"{found[0][reached[0]] / found[0][-1]:.2f}"

    def tuning_cell(of_group: Rows, size: int) -> str:
        runs = [row for row in of_group if row["phase"] == "tuning"]
        failed = sum(row["diverged"] for row in runs)
        return (
            f"{len(runs)}" + (f" ({failed} diverged)" if failed else "")
            if runs
            else "–"
        )

    seeds = {row["seed"] for row in tested(rows)}
    parts = [
        (
            f"Test accuracy in percent, mean ± standard error of {len(seeds)} seeds "
            "(a batch larger than the training set is the whole of it):",
            accuracy_cell,
        ),
        ("Learning rate and schedule that were chosen:", setting_cell),
        ("Training loss (with the L2 penalty) at the end:", loss_cell),
        (
            "Steps to the lowest training loss that an optimizer other than NLCG ends "
            "with, as a fraction of the budget:",
            steps_cell,
        ),
        ("Tuning runs:", tuning_cell),
    ]
    if compares_batch_sizes(workload):
        for title, cell in parts:
            lines += [title, "", *by_batch_size(groups, cell), ""]
        lines += [
            f"![Accuracy against batch size](accuracy_{name}.png)",
            f"![Loss against step](loss_{name}.png)",
            "",
        ]
    else:
        header = [
            "",
            "accuracy (1)",
            "setting (2)",
            "loss (3)",
            "steps (4)",
            "runs (5)",
        ]
        cells = [cell for _, cell in parts]
        lines += table(
            header,
            [
                [key[0], *(c(rows, key[1]) for c in cells)]
                for key, rows in groups.items()
            ],
        )
        lines += ["", *(f"{i}. {title[:-1]}." for i, (title, _) in enumerate(parts, 1))]
        lines += [""]
    if gone := {name for name, _ in groups} - set(workload.optimizers):
        lines += [
            f"No longer in the sweep (README.md says why): {', '.join(sorted(gone))}.",
            "",
        ]
    if compares_batch_sizes(workload):
        lines += growth(name, groups, workload)
    return [*lines, *footer(command, rows, workload)]


def footer(command: str, rows: Rows, workload: Workload) -> list[str]:
    hours = sum(row["seconds"] for row in rows) / 3600
    found = {row["optimizer"] for row in rows}
    missing = [name for name in workload.optimizers if name not in found]
    return [
        *([f"Not run at any batch size: {', '.join(missing)}.", ""] if missing else []),
        f"`{command}`; {len(rows)} runs, {hours:.1f} hours of training; "
        f"{environments(rows)}.",
        "",
    ]


def target_size(groups: targets.Groups, workload: Workload) -> int | None:
    """The batch size at which the target is set: the smallest with all peers tested.

    (All that have been run at all.) The largest, where batches have the same epochs.
    """
    peers = {name for name, _ in groups if name in PEERS}
    sizes = [
        size
        for size in {size for _, size in groups}
        if all(tested(groups.get((name, size), [])) for name in peers)
    ]
    if not sizes or not peers:
        return None
    return min(sizes) if workload.steps else max(sizes)


def second_target(
    groups: targets.Groups, workload: Workload
) -> tuple[float, str] | None:
    """Where budgets grow: the lowest loss of a peer at the largest batch, and whose."""
    if not workload.steps or len(workload.batch_sizes) == 1:
        return None
    losses = targets.ranked(groups, PEERS, workload.batch_sizes[-1])
    return losses[0] if losses else None


def growth(name: str, groups: targets.Groups, workload: Workload) -> list[str]:
    """How far the batch can grow: steps and seconds to a target, by batch size."""
    sizes = workload.batch_sizes
    set_at = target_size(groups, workload)
    found = None if set_at is None else targets.target(groups, PEERS, set_at)
    wanted, peer = found or (-math.inf, "")
    names = [
        n for n in workload.optimizers if any((n, size) in groups for size in sizes)
    ]

    def reached(loss: float) -> Best:
        return {key: targets.reached(rows, loss) for key, rows in groups.items()}

    best = reached(wanted)

    def rows_of(make: Any) -> list[list[str]]:
        return [[n, *(make(n, size) for size in sizes)] for n in names]

    def complete(n: str, size: int) -> bool:
        return bool(tested(groups.get((n, size), [])))

    def steps_cell(n: str, size: int, best: Best) -> str:
        rows = groups.get((n, size), [])
        if not rows:
            return "not run"
        mark = "" if complete(n, size) else " (tuning not complete)"
        at = best[n, size]
        # Tuning runs are shorter where they train on fewer examples.
        most = (tested(rows) or rows)[0]["steps"]
        return (f"{at.steps:,.0f}" if at else f"> {most:,}") + mark

    def critical(n: str, best: Best) -> str:
        found = {size: best[n, size] for size in sizes if complete(n, size)}
        return targets.critical_batch_size(
            {size: at.steps if at else None for size, at in found.items()}
        )

    def loss_cell(n: str, size: int) -> str:
        rows = tested(groups.get((n, size), []))
        if not rows:
            return "not run"
        if any(row["diverged"] for row in rows):
            return "diverged"
        mean, error = mean_and_error(
            [float(targets.trajectory(row)[1][-1]) for row in rows]
        )
        return f"{mean:.4g} " + (
            "(one seed)" if math.isnan(error) else f"± {error:.2g}"
        )

    def setting_cell(n: str, size: int) -> str:
        rows = groups.get((n, size), [])
        chosen = tested(rows)[:1]
        if not chosen:
            return "–"
        if n in UNTUNED:
            return "nothing to tune"
        rates = {r["learning_rate"] for r in rows if r["phase"] == "tuning"}
        rate = chosen[0]["learning_rate"]
        edge = len(rates) > 1 and rate in (min(rates), max(rates))
        tried = len([r for r in rows if r["phase"] == "tuning"])
        return (
            f"{rate:.3g}{' (edge)' if edge else ''}; {chosen[0]['schedule']}; "
            f"{tried} runs"
        )

    def seconds_cell(n: str, size: int) -> str:
        at, seconds = (
            best.get((n, size)),
            targets.step_seconds(groups.get((n, size), [])),
        )
        if seconds is None:
            return "not measured"
        plain = [
            x
            for peer in ("sgd", "momentum")
            if (x := targets.step_seconds(groups.get((peer, size), []))) is not None
        ]
        share = f", {max(1 - min(plain) / seconds, 0):.0%}" if plain else ""
        total = f"{at.seconds:.3g} s" if at and at.seconds else "not reached"
        milliseconds = 1000 * seconds
        digits = ",.0f" if milliseconds >= 100 else ".3g"
        return f"{total} ({milliseconds:{digits}} ms{share})"

    def basin_cell(n: str, size: int) -> str:
        width = None
        if n not in UNTUNED:
            width = targets.basin(groups.get((n, size), []))
        return "–" if width is None else f"{width:.2f}"

    what = workload.measured if workload.steps else "training loss"
    labels = [f"batch {size:,}" if size > 1 else "all points" for size in sizes]
    header = ["optimizer", *labels]
    lines = []
    if workload.steps:
        lines += [
            f"The {what} at the end, mean ± standard error of the test seeds; steps of "
            "a run: "
            + ", ".join(
                f"{steps:,} at {label}"
                for label, steps in zip(labels, workload.steps.values(), strict=True)
            )
            + ":",
            "",
            *table(header, rows_of(loss_cell)),
            "",
            "Learning rate and schedule that were chosen, and tuning runs:",
            "",
            *table(header, rows_of(setting_cell)),
            "",
        ]
    if set_at is None or found is None:
        text = "No target: there is no batch size yet at which all peers are tested."
        return [*lines, text, ""]
    lines += [
        f"Steps to a {what} of {wanted:.4g}, which is what the median of the tuned "
        f"peers ({peer}) ends with at {labels[sizes.index(set_at)]}:",
        "",
        *table(header, rows_of(lambda n, size: steps_cell(n, size, best))),
        "",
    ]
    if len(sizes) > 1:
        lines += [
            "Critical batch size: the sizes between which a doubling begins to save "
            "less than a factor of 1.6 of these steps (cells not run left out):",
            "",
            *table(
                ["optimizer", "critical batch size"],
                [[n, critical(n, best)] for n in names],
            ),
            "",
        ]
    if second := second_target(groups, workload):
        lowest, lowest_peer = second
        late = reached(lowest)
        lines += [
            f"Another target, not fixed beforehand: steps to a {what} of {lowest:.4g}, "
            f"the lowest that a tuned peer ({lowest_peer}) ends with at {labels[-1]}; "
            "and the critical batch size by these steps:",
            "",
            *table(
                [*header, "critical batch size"],
                [
                    [
                        n,
                        *(steps_cell(n, size, late) for size in sizes),
                        critical(n, late),
                    ]
                    for n in names
                ],
            ),
            "",
            f"![Steps to that target against batch size](steps_{name}_second.png)",
            "",
        ]
    if any("step_seconds" in row for rows in groups.values() for row in rows):
        lines += [
            f"Seconds of a core to the loss of {wanted:.4g}, and in brackets "
            "milliseconds a step and the share of them that plain SGD or momentum does "
            "not need:",
            "",
            *table(header, rows_of(seconds_cell)),
            "",
            "Width of the range of learning rates, the highest over the lowest, with a "
            "loss within 1% of the best (of those tried with the first schedule):",
            "",
            *table(header, rows_of(basin_cell)),
            "",
        ]
    if len({size for _, size in groups}) > 1:
        lines += [f"![Steps to the target against batch size](steps_{name}.png)", ""]
    return [*lines, f"![Loss against learning rate](sensitivity_{name}.png)", ""]


def draws(results: pathlib.Path) -> list[str]:
    """How far another draw of training images, and of their split, moves the result."""
    names = ["cifar10_jpeg", *(n for n in WORKLOADS if "_draw_" in n)]
    size = WORKLOADS[names[-1]](None).batch_sizes[-1]
    found: dict[str, list[str]] = {}
    means: dict[str, list[float]] = {}
    for name in names:
        rows = protocol.read(results / f"{name}.jsonl")
        groups = group(rows, WORKLOADS[name](None))
        for optimizer in WORKLOADS[names[-1]](None).optimizers:
            of_group = groups.get((optimizer, size), [])
            cells, value = found.setdefault(optimizer, []), accuracy(of_group)
            if value is None:
                cells.append("not run")
                continue
            row = tested(of_group)[0]
            setting = f"{row['learning_rate']:.3g}; {row['schedule']}"
            cells.append(f"{100 * value[0]:.2f} ({setting})")
            means.setdefault(optimizer, []).append(100 * value[0])
    spread = {
        optimizer: f"{statistics.mean(x):.2f} ± {statistics.stdev(x):.2f}"
        for optimizer, x in means.items()
        if len(x) > 1
    }
    return [
        "Of three draws of the training images and of their validation split, batch "
        f"{size:,}: test accuracy (the mean of the three test seeds) and what was "
        "chosen, and the mean of the draws with their standard deviation:",
        "",
        *table(
            ["optimizer", "draw 0", "draw 1", "draw 2", "all"],
            [[n, *cells, spread.get(n, "–")] for n, cells in found.items()],
        ),
        "",
    ]


def compares_batch_sizes(workload: Workload) -> bool:
    """Whether there is something to plot against the batch size."""
    return len(workload.batch_sizes) > 1


def environments(rows: Rows) -> str:
    """Versions, device and cores; all of them where they differ."""
    found = {
        ", ".join(f"{k} {v}" for k, v in row["versions"].items())
        + f", device: {row['device']}, {row['cores']} core(s) a process"
        for row in rows
    }
    return "; ".join(sorted(found))


WARM = {
    "nlcg": "red",
    "nlcg_paper": "orange",
    "nlcg β=0.9": "darkred",
    "nlcg by curvature": "deeppink",
    "nlcg by full curvature": "purple",
}
COOL = (
    "tab:blue tab:green tab:purple tab:brown tab:gray tab:olive tab:cyan tab:pink "
    "black navy teal goldenrod indigo"
).split()


def style(name: str, index: int) -> dict[str, Any]:
    """NLCG in thick warm colours, the others thin; a colour and a marker for each."""
    if name.startswith("nlcg"):
        # Below the others, which it would hide.
        return dict(color=WARM[name], linewidth=3, zorder=1.5, marker="o")
    place = (PEERS.index(name) if name in PEERS else index) % len(COOL)
    return dict(
        color=COOL[place],
        linewidth=1.2,
        marker="svD^P*X<>hpd8"[place],
        markersize=5,
    )


def plot(name: str, rows: Rows, folder: pathlib.Path) -> None:
    """Accuracy against batch size, and loss against step at the largest batch."""
    groups = group(rows, WORKLOADS[name](None))
    sizes = sorted({size for _, size in groups})
    names = list(dict.fromkeys(optimizer for optimizer, _ in groups))
    # An opaque white page is readable wherever it is shown.
    options = dict(figsize=(7, 4.5), layout="constrained", facecolor="white")

    figure, axes = plt.subplots(**options)
    for i, optimizer in enumerate(names):
        found = [(s, accuracy(groups.get((optimizer, s), []))) for s in sizes]
        points = [(s, 100 * a[0], 100 * a[1]) for s, a in found if a]
        if points:
            x, y, error = zip(*points, strict=True)
            error = np.nan_to_num(error)
            axes.errorbar(
                x, y, error, label=optimizer, capsize=3, **style(optimizer, i)
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    title = WORKLOADS[name](None).title
    axes.set(xlabel="batch size", ylabel="test accuracy (%)", title=title)
    finish(figure, axes, folder / f"accuracy_{name}.png")

    figure, axes = plt.subplots(**options)
    for i, optimizer in enumerate(names):
        found = curve(groups.get((optimizer, sizes[-1]), []))
        if found:
            axes.plot(*found, label=optimizer, **style(optimizer, i) | {"marker": ""})
    axes.set_yscale("log")
    title = f"{title}, batch {sizes[-1]:,}"
    axes.set(xlabel="step", ylabel="training loss", title=title)
    finish(figure, axes, folder / f"loss_{name}.png")


def plot_growth(name: str, rows: Rows, folder: pathlib.Path) -> None:
    """Steps to the target against batch size, and loss against rate at the largest."""
    workload = WORKLOADS[name](None)
    groups = group(rows, workload)
    set_at = target_size(groups, workload)
    found = None if set_at is None else targets.target(groups, PEERS, set_at)
    if found is None:
        return
    names = [n for n in workload.optimizers if any(key[0] == n for key in groups)]
    options = dict(figsize=(7, 4.5), layout="constrained", facecolor="white")
    sizes = sorted({size for _, size in groups})

    wanted_by_file = {f"steps_{name}.png": found[0]} if len(sizes) > 1 else {}
    if second := second_target(groups, workload):
        wanted_by_file[f"steps_{name}_second.png"] = second[0]
    for file, wanted in wanted_by_file.items():
        figure, axes = plt.subplots(**options)
        first = []
        for i, optimizer in enumerate(names):
            points = []
            for size in sizes:
                of_group = groups.get((optimizer, size), [])
                at = targets.reached(of_group, wanted) if tested(of_group) else None
                if at:
                    points.append((size, at.steps))
            if points:
                axes.plot(
                    *zip(*points, strict=True), label=optimizer, **style(optimizer, i)
                )
                first.append(points[0])
        if first:
            # Half the steps with twice the batch, from the best at the smallest.
            size, steps = min(first)
            ideal = [steps * size / x for x in sizes]
            axes.plot(sizes, ideal, "k--", linewidth=1, label="perfect scaling")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        title = f"{workload.title}: steps to a loss of {wanted:.4g}"
        axes.set(xlabel="batch size", ylabel="steps", title=title)
        finish(figure, axes, folder / file)

    figure, axes = plt.subplots(**options)
    for i, optimizer in enumerate(names):
        by_rate = targets.sensitivity(groups.get((optimizer, sizes[-1]), []))
        points = sorted((r, x) for r, x in by_rate.items() if math.isfinite(x))
        if points and optimizer not in UNTUNED:
            best = min(points, key=lambda point: point[1])[0]
            x, y = zip(*((rate / best, loss) for rate, loss in points), strict=True)
            axes.plot(x, y, label=optimizer, **style(optimizer, i))
        elif optimizer in UNTUNED:
            loss = targets.final_loss(groups.get((optimizer, sizes[-1]), []))
            if loss is not None:
                look = style(optimizer, i) | {"marker": "", "linestyle": ":"}
                axes.axhline(loss, label=f"{optimizer} (no rate)", **look)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    title = f"{workload.title}, "
    title += f"batch {sizes[-1]:,}" if sizes[-1] > 1 else "all points"
    axes.set(xlabel="rate / best rate", ylabel="loss at the end", title=title)
    finish(figure, axes, folder / f"sensitivity_{name}.png")


def finish(figure: Any, axes: Any, path: pathlib.Path) -> None:
    title = axes.get_title()
    axes.set_title("")
    axes.set_title(textwrap.fill(title, 52), loc="left")  # clear of the legend
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(results: pathlib.Path, folder: pathlib.Path) -> str:
    """Writes tables.md and the plots; returns the Markdown."""
    lines = [
        "# Accuracy by batch size",
        "",
        "[README.md](../README.md) has the protocol.",
        "",
    ]
    for name in WORKLOADS:
        rows = protocol.read(results / f"{name}.jsonl")
        lines += section(name, rows)
        if name == "cifar10_jpeg_draw_2":
            lines += draws(results)
        workload = WORKLOADS[name](None)
        if rows and compares_batch_sizes(workload) and not workload.steps:
            plot(name, rows, folder)
        if rows and (compares_batch_sizes(workload) or workload.steps):
            plot_growth(name, rows, folder)
    text = "\n".join(lines).rstrip() + "\n"
    (folder / "tables.md").write_text(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, default=HERE / "results")
    parser.add_argument("--output", type=pathlib.Path, default=HERE / "results")
    flags = parser.parse_args()
    print(report(flags.results, flags.output))


if __name__ == "__main__":
    main()

"""The picture that says it all: our loss at the end over the best tuned peer's.

    python benchmarks/large_batch/relative.py

Of each workload and batch size of the sweep: `nlcg_auto`, for which nothing is tuned,
and the best of what `untuned.py` ran, both over the tuned peer of the lowest loss.
Writes `results/relative.md` and `results/relative.png` from the recorded rows.
"""

import math
import pathlib
from typing import NamedTuple

import figures
import matplotlib.pyplot as plt
import protocol
import report
import untuned
from workloads import WORKLOADS

# What other questions are asked of.
LEFT_OUT = ("_ablation", "_draw_1", "_draw_2", "_gpu")
# A ratio so many of its standard errors from 1 is a difference; if it is none, and the
# error larger than this part, nothing can be said.
ERRORS, KNOWN = 2, 0.05
OURS = untuned.OURS
# Whose largest batch is all of the data.
WHOLE = {name for name, *_ in figures.WHOLE}
COLOURS = {
    "below": "#0072B2",
    "level": "#767676",
    "above": "#D55E00",
    "open": "#CCBB44",
}


class Ratio(NamedTuple):
    """Two mean losses at the end.

    Attributes:
      value: the first over the second.
      error: its standard error.
    """

    value: float
    error: float

    @property
    def verdict(self) -> str:
        if abs(self.value - 1) <= ERRORS * self.error:
            return "level" if self.error <= KNOWN * self.value else "open"
        return "below" if self.value < 1 else "above"


class Cell(NamedTuple):
    """A workload at a batch size.

    Attributes:
      workload: its name.
      size: of the batch.
      whole: whether each step has all the data.
      peer: the tuned one of the lowest loss.
      ours: over its loss.
      untuned: the best of what else has nothing tuned, over its loss; None if not run.
      other: its name, and the schedule.
    """

    workload: str
    size: int
    whole: bool
    peer: str
    ours: Ratio
    untuned: Ratio | None
    other: str | None


def ratio(ours: list[float], peers: list[float]) -> Ratio:
    """With the error that both means have."""
    (a, da), (b, db) = map(report.mean_and_error, (ours, peers))
    parts = [x / y for x, y in ((da, a), (db, b)) if not math.isnan(x)]
    return Ratio(a / b, a / b * math.hypot(*parts))


def cells(folder: pathlib.Path) -> list[Cell]:
    """All of which there are rows."""
    without = protocol.read(folder / "untuned.jsonl")
    found = []
    for name, make in WORKLOADS.items():
        if name.endswith(LEFT_OUT):
            continue
        workload = make(None)
        rows = protocol.read(folder / f"{name}.jsonl")
        groups = report.group(rows, workload)
        for size in workload.batch_sizes:
            tested = {
                who: report.tested(groups.get((who, size), [])) for who in report.PEERS
            }
            ours = untuned.ends(report.tested(groups.get((OURS, size), [])))
            peer = untuned.best(tested)
            if not ours or peer is None:
                continue
            least = untuned.ends(tested[peer])
            settings = untuned.settings(without, name, size)
            other = untuned.best(settings)
            others = untuned.ends(settings[other]) if other else None
            assert least is not None  # or it were not the best
            found.append(
                Cell(
                    name,
                    size,
                    size == workload.batch_sizes[-1] and name in WHOLE,
                    peer,
                    ratio(ours, least),
                    ratio(others, least) if others else None,
                    other,
                )
            )
    return found


def shown(found: Ratio) -> str:
    return f"{found.value:.3f}{figures.spread(found.error, '.3f')}"


def label(cell: Cell) -> str:
    if cell.workload == "burgers":
        return "burgers, all"
    return f"{cell.workload}, {cell.size:,}" + (" (all)" if cell.whole else "")


def counts(found: list[Cell]) -> dict[str, int]:
    """How many are below the best tuned peer, level with it, above, and open."""
    verdicts = [cell.ours.verdict for cell in found]
    return {verdict: verdicts.count(verdict) for verdict in COLOURS}


def table(found: list[Cell], where: str) -> str:
    """The Markdown."""
    rows = []
    for cell in found:
        peer = figures.SHOWN.get(cell.peer, cell.peer)
        other = f"{shown(cell.untuned)} ({cell.other})" if cell.untuned else "not run"
        rows.append([label(cell), peer, shown(cell.ours), cell.ours.verdict, other])
    number = counts(found)
    compared = [cell for cell in found if cell.untuned]
    lower = sum(cell.ours.value < cell.untuned.value for cell in compared)
    lines = [
        "# The loss at the end over the best tuned peer's",
        "",
        "Of held-out examples, where there are any (of `autoencoder` and `burgers` of "
        "the training); ± is the standard error of the test seeds. Below 1 is better. "
        f"A cell is level where 1 is within {ERRORS} of these errors, and open where "
        f"the error is also above {100 * KNOWN:.0f}%. The peer was chosen among all by "
        "this very loss, which favours it.",
        "",
        "<!-- relative -->",
        "",
        f"`nlcg_auto` ends below the best tuned peer in {number['below']} of "
        f"{len(found)} cells, is level with it in {number['level']}, and above it in "
        f"{number['above']}; {number['open']} are open, for seeds differ too much. It "
        f"ends below the best of what else has nothing tuned in {lower} of "
        f"{len(compared)}.",
        "",
        "<!-- end -->",
        "",
        *report.table(
            [
                "batches",
                "best tuned peer",
                "`nlcg_auto` over it",
                "",
                "best untuned other over it",
            ],
            rows,
        ),
        "",
        f"`python benchmarks/large_batch/relative.py`, of the recorded rows; {where}.",
    ]
    return "\n".join(lines) + "\n"


def plot(found: list[Cell], path: pathlib.Path) -> None:
    """A line for each cell: left of 1 is better than the best tuned peer."""
    height = 1.1 + 0.19 * len(found)
    figure, axes = plt.subplots(figsize=(6, height), layout="constrained")
    for y, cell in enumerate(found):
        colour = COLOURS[cell.ours.verdict]
        if cell.untuned:
            axes.plot(cell.untuned.value, y, "o", mfc="none", mec="#A0A0A0", ms=5)
        axes.errorbar(
            cell.ours.value,
            y,
            xerr=cell.ours.error,
            fmt="o",
            color=colour,
            ms=5,
            capsize=2,
        )
        last = y + 1 == len(found)
        if not last and found[y + 1].workload != cell.workload:
            axes.axhline(y + 0.5, color="k", lw=0.3, alpha=0.3)
    axes.axvline(1, color="k", lw=1)
    axes.set_yticks(range(len(found)), [label(cell) for cell in found], fontsize=8)
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xscale("log")
    ticks = (0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3)
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("loss at the end / that of the best tuned peer (left is better)")
    points = [
        axes.plot([], [], "o", color=colour, label=f"nlcg_auto, {verdict}")[0]
        for verdict, colour in COLOURS.items()
    ]
    points += axes.plot(
        [], [], "o", mfc="none", mec="#A0A0A0", label="best untuned other"
    )
    figure.legend(
        handles=points, loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


def main() -> None:
    folder = pathlib.Path(__file__).resolve().parent / "results"
    found = cells(folder)
    rows = [
        row
        for name in dict.fromkeys(cell.workload for cell in found)
        for row in protocol.read(folder / f"{name}.jsonl")
    ]
    (folder / "relative.md").write_text(table(found, report.environments(rows)))
    plot(found, folder / "relative.png")


if __name__ == "__main__":
    main()

"""The picture that a run leaves behind: its curves, and those of others beside it."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from nlcg_optax.training.comparison import OtherRun, early_and_end, evaluated

# Okabe and Ito's, which colour-blind readers tell apart: this run's, then the others'.
_COLOURS = ("#0072B2", "#D55E00", "#333333", "#009E73", "#CC79A7")
# What is not wrong in one of so many images is drawn there.
_LEAST_ERROR = 5e-4
_PERCENT = (0, 50, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9)


def plot_curves(
    rows: list[dict[str, Any]],
    path: pathlib.Path,
    title: str,
    label: str = "this run",
    others: Sequence[OtherRun] = (),
) -> None:
    """Draws cross-entropy, accuracy, step size and β against the step, as a PNG.

    The cross-entropy has no L2 penalty in it, and so compares with that of evaluations
    and other runs. Where the curvature chose the steps, their coefficients and λ take
    the place of the learning rate and of β.

    Args:
      rows: of ``metrics.jsonl``.
      path: the PNG.
      title: of the figure.
      label: what this run is called beside the others.
      others: runs that are drawn beside it.
    """
    # Figure and not pyplot: no window system, no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    def series(split: str, name: str) -> tuple[list[int], list[Any]]:
        points = [
            (r["step"], r[name]) for r in rows if r["split"] == split and name in r
        ]
        return [p[0] for p in points], [p[1] for p in points]

    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize="medium")
    loss, accuracy, *lower = figure.subplots(2, 2, sharex=True).flat
    runs = [OtherRun(label, {}, rows), *others]
    others = others if rows else ()
    if others:
        _compare_losses(loss, runs)
        _compare_accuracies(accuracy, runs)
        loss.set_xscale("log")
        loss.xaxis.set_major_formatter("{x:,.0f}")
    else:
        splits = sorted({r["split"] for r in rows}, key=lambda s: (s != "train", s))
        names = {split: "training" if split == "train" else split for split in splits}
        curves = {names[split]: _losses(rows, split) for split in splits}
        _draw(loss, "cross-entropy, without the L2 penalty", curves)
        _log_scale(loss, [y for _, ys in curves.values() for y in ys])
        _tell_curves(loss)
        curves = {names[split]: series(split, "accuracy") for split in splits}
        _draw(accuracy, "accuracy", curves)
        _tell_curves(accuracy)
    by_curvature = bool(series("train", "damping")[0])
    panels = _BY_CURVATURE if by_curvature else _BY_RATE
    for axis, (name, wanted) in zip(lower, panels.items(), strict=True):
        curves = {key: series("train", words) for key, words in wanted.items()}
        _draw(axis, name, {key: xy for key, xy in curves.items() if xy[0]})
        _tell_curves(axis)
        axis.set_xlabel("step")
        if not others:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=120)


def _losses(rows: Sequence[dict[str, Any]], split: str) -> tuple[list[int], list[Any]]:
    """Steps and cross-entropies; of a run from before it was kept, with the penalty."""
    rows = [row for row in rows if row["split"] == split]
    return [row["step"] for row in rows], [
        row.get("cross_entropy", row["loss"]) for row in rows
    ]


def _log_scale(axis: Any, values: Sequence[float]) -> None:
    """Where they allow it."""
    finite = [value for value in values if math.isfinite(value)]
    if finite and min(finite) > 0:
        axis.set_yscale("log")


def _compare_losses(axis: Any, runs: Sequence[OtherRun]) -> None:
    """The training loss of each run."""
    axis.set_title("cross-entropy of the training images, without the L2 penalty")
    values: list[float] = []
    for run, colour in zip(runs, _COLOURS, strict=False):
        x, y = _losses(run.rows, "train")
        axis.plot(x, y, color=colour, linewidth=2 if run is runs[0] else 1.2)
        values += y
    _log_scale(axis, values)
    axis.grid(alpha=0.3)


def _compare_accuracies(axis: Any, runs: Sequence[OtherRun]) -> None:
    """The accuracy of each run, and in words what it was early and at the end.

    Equal distances are equal factors of the images that are wrong.
    """
    split, _ = evaluated(runs[0].rows)
    axis.set_title(f"{split} images that are right, in percent")
    for run, colour in zip(runs, _COLOURS, strict=False):
        _, points = evaluated(run.rows)
        wrong = [max(1 - row["accuracy"], _LEAST_ERROR) for row in points.values()]
        width = 2 if run is runs[0] else 1.2
        axis.plot(
            *([*points], wrong),
            *("o-",),
            **{"color": colour, "linewidth": width, "markersize": 3},
            label=run.label,
        )
    axis.set_yscale("log")
    axis.invert_yaxis()
    axis.set_ylim(bottom=2.5 * axis.get_ylim()[0])  # below them is what is said
    low, high = sorted(axis.get_ylim())
    shown = [percent for percent in _PERCENT if low <= 1 - percent / 100 <= high]
    axis.set_yticks([1 - percent / 100 for percent in shown], map(str, shown))
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left", frameon=False)
    for step in early_and_end(runs[0].rows, runs[1:]):
        ours, *theirs = [
            f"{100 * evaluated(run.rows)[1][step]['accuracy']:.1f}%" for run in runs
        ]
        axis.axvline(step, color="0.6", linewidth=0.8, linestyle=":")
        axis.annotate(
            f"{step:,} steps: {ours}\nagainst {' and '.join(theirs)}",
            (step, 0.03),
            xycoords=("data", "axes fraction"),
            **{"ha": "right", "fontsize": "small", "xytext": (-4, 0)},
            textcoords="offset points",
        )


# The lower panels of the curves: names in the legend, and those of the metrics.
_BY_RATE = {
    "learning rate, and what the base step makes of it": {
        "learning rate": "learning_rate",
        "times the base step": "step_size",
    },
    "share of the last direction (β), and angle to the gradient": {
        "β": "beta",
        "cosine of direction and -gradient": "cosine",
    },
}
_BY_CURVATURE = {
    "coefficients of the step": {
        "a, of the gradient": "coefficient_gradient",
        "of the first residual": "coefficient_residual_1",
        "b, of the last step": "coefficient_past_1",
    },
    "damping, signal and conjugacy": {
        "λ": "damping",
        "share of signal": "signal",
        "conjugacy": "conjugacy",
    },
}


def _draw(axis: Any, name: str, curves: Mapping[str, Any]) -> None:
    """Draws the curves of a panel."""
    # Between title and plot, where it covers no curve, is the legend.
    axis.set_title(name, fontsize="medium", pad=24)
    axis.grid(alpha=0.3)
    for label, (x, y) in curves.items():
        wide = label == "learning rate"  # to be seen below the other
        axis.plot(
            *(x, y),
            marker="." if len(x) < 200 and not wide else "",
            markersize=4,
            linewidth=5.0 if wide else 1.0,
            alpha=0.4 if wide else 1,
            label=label,
        )


def _tell_curves(axis: Any) -> None:
    """The legend of a panel, or that nothing is in it."""
    if not axis.lines:
        axis.text(0.5, 0.5, "not used", ha="center", transform=axis.transAxes)
        return
    axis.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=4,
        fontsize="x-small",
        frameon=False,
        columnspacing=1.2,
        handlelength=1.6,
    )

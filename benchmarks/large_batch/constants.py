"""What is left to choose: the loss at the end by each constant of the optimizer.

    taskset -c 1 python benchmarks/large_batch/constants.py --data_dir=FOLDER
    python benchmarks/large_batch/constants.py --table

Nobody is asked to choose them; if the loss hardly depends on them, nobody needs to. One
at a time is changed, in two of the tasks of `starts.py` and in one with all data in
every step. FOLDER has tinyshakespeare.txt. Runs are lines of `results/constants.jsonl`;
what is there is not run again. `--table` writes `results/constants.md` and
`constants.png`.
"""

import argparse
import contextlib
import functools
import math
import re
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import figures
import jax
import matplotlib.pyplot as plt
import protocol
import report
import starts
import sweep
import workloads

import nlcg_optax
from nlcg_optax.curvature import noise, transform
from nlcg_optax.step_sizes import noise_balance

RESULTS = sweep.RESULTS / "constants.jsonl"
PLOT = RESULTS.with_suffix(".png")
SEEDS = (0, 1, 2)
FLAT = 0.02  # what counts as no difference

TASKS: dict[str, Callable[[str | None], starts.Start]] = {
    "autoencoder, 512": starts.TASKS["autoencoder, 512"],
    "gru": starts.TASKS["gru"],
    "autoencoder, all": lambda _: starts.of_workload("autoencoder", 1797, None, None),
}
COLOURS = ("#0072B2", "#D55E00", "#009E73")


class Constant(NamedTuple):
    """One of them.

    Attributes:
      usual: what it is.
      others: what it is tried as.
      changed: from a task and a value to a context in which it is that, and the task.
    """

    usual: float
    others: tuple[float, ...]
    changed: Callable[[starts.Start, float], tuple[Any, starts.Start]]


def of_module(module: Any, name: str, *others: float) -> Constant:
    def changed(start: starts.Start, value: float) -> tuple[Any, starts.Start]:
        return mock.patch.object(module, name, value), start

    return Constant(getattr(module, name), others, changed)


def of_model(name: str, *others: float) -> Constant:
    """An argument of `scale_by_quadratic_model` that `nlcg_auto` leaves alone."""
    usual: Any = nlcg_optax.scale_by_quadratic_model.__kwdefaults__

    def changed(start: starts.Start, value: float) -> tuple[Any, starts.Start]:
        return mock.patch.dict(usual, {name: value}), start

    return Constant(usual[name], others, changed)


def residuals(start: starts.Start, value: float) -> tuple[Any, starts.Start]:
    words, rate = workloads.OPTIMIZERS["nlcg by curvature"]
    words = [*words, f"optimizer.nlcg_auto.residuals={value}"]
    made = {"nlcg by curvature": (words, rate)}
    return mock.patch.dict(workloads.OPTIMIZERS, made), start


def fewest(start: starts.Start, value: float) -> tuple[Any, starts.Start]:
    task, *rest = start
    task = task._replace(fewest=round(value * task.fewest))
    return contextlib.nullcontext(), (task, *rest)


CONSTANTS = {
    "history": of_model("history", 1, 2, 6),
    "residual directions": Constant(2, (1, 3, 5), residuals),
    "examples of the curvature, times": Constant(1.0, (0.5, 2.0), fewest),
    "damping": of_model("damping", 0.001, 0.1),
    "damping under noise": of_model("noise_damping", 0.01, 1.0),
    "first damping": of_model("first_damping", 0.3, 30.0),
    "growth of a step, at most": of_model("max_growth", 1.5, 6.0),
    "noise rules below a signal of": of_module(noise, "_RULED_BY_NOISE", 0.2, 0.8),
    "balance: cost over gain": of_module(transform, "_TARGET", 0.25, 0.5, 2.0, 4.0),
    "balance: delay": of_module(transform, "_DELAY", 2.0, 10.0, 20.0),
    "balance: speed": of_module(noise_balance, "_SPEED", 0.7, 2.8),
    "balance: pace of a steep descent": of_module(noise_balance, "_PACE", 0.05, 0.2),
    "balance: memory of losses": of_module(noise_balance, "_NOW", 4.0, 16.0),
    "average: part of the run": of_module(noise_balance, "_PART", 0.05, 0.2),
    "part that is steered": of_module(noise_balance, "_STEERED", 0.4, 0.7),
    "fall of the newest part": of_module(noise, "_FALL", 2.75, 11.0),
}


# What matters once noise rules, which it never does in one of the tasks.
OF_NOISE = {
    name
    for name in CONSTANTS
    if re.match("noise rules|balance|average|part|fall", name)
}
WITHOUT_NOISE = "autoencoder, all"


def run(data_dir: str | None, only: str | None = None) -> None:
    """Adds the rows that are not there, of one task or all."""
    done = {
        (row["task"], row["constant"], row["value"], row["seed"])
        for row in protocol.read(RESULTS)
    }
    where = protocol.environment()
    for task, make in TASKS.items():
        if only not in (None, task):
            continue
        found = functools.cache(make)
        for name, constant in CONSTANTS.items():
            if task == WITHOUT_NOISE and name in OF_NOISE:
                continue
            for value in constant.others:
                add(done, task, found, name, value, constant, data_dir, where)
        usual = Constant(1.0, (), lambda start, _: (contextlib.nullcontext(), start))
        add(done, task, found, "none", 1.0, usual, data_dir, where)


def add(
    done: set,
    task: str,
    make: Callable[[str | None], starts.Start],
    name: str,
    value: float,
    constant: Constant,
    data_dir: str | None,
    where: dict,
) -> None:
    left = [seed for seed in SEEDS if (task, name, value, seed) not in done]
    if not left:
        return
    context, start = constant.changed(make(data_dir), value)
    jax.clear_caches()  # what was traced by another constant is not to be used
    with context:
        programs = starts.make(start)
        for seed in left:
            row = starts.run(start, programs, seed)
            row = {"task": task, "constant": name, "value": value, **row}
            protocol.append(RESULTS, row | where)
            print({k: row[k] for k in ("task", "constant", "value", "loss")})


# The table, and the plot.


def means(rows: list[dict], task: str, name: str) -> dict[float, float]:
    """The mean loss at the end by value; infinite where one diverged."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if (row["task"], row["constant"]) == (task, name):
            loss = math.inf if row["diverged"] else row["loss"]
            found.setdefault(row["value"], []).append(loss)
    return {value: statistics.mean(losses) for value, losses in found.items()}


def error(rows: list[dict], task: str) -> float:
    """The standard error of the usual mean, in parts of it."""
    losses = [r["loss"] for r in rows if (r["task"], r["constant"]) == (task, "none")]
    mean, found = report.mean_and_error(losses)
    return found / mean


def table(rows: list[dict]) -> str:
    """The Markdown: by how many percent the loss changes."""
    tasks = [task for task in TASKS if means(rows, task, "none")]
    cells = []
    for name, constant in CONSTANTS.items():
        by_task = {task: means(rows, task, name) for task in tasks}
        for value in constant.others:
            line = [name, f"{constant.usual:g}", f"{value:g}"]
            for task in tasks:
                usual = means(rows, task, "none")[1.0]
                loss = by_task[task].get(value)
                if loss is None:
                    never = task == WITHOUT_NOISE and name in OF_NOISE
                    line.append("–" if never else "not run")
                elif not math.isfinite(loss):
                    line.append("diverged")
                else:
                    line.append(figures.change(loss / usual))
            cells.append(line)
    usual = [
        f"{means(rows, task, 'none')[1.0]:.4g} ± {100 * error(rows, task):.1f}%"
        for task in tasks
    ]
    cells.insert(0, ["**none**", "", "", *usual])
    lines = [
        "# What is left to choose",
        "",
        "By how much the loss at the end changes (of held-out examples, if any), where "
        "one constant of `nlcg_auto` is another: means of seeds "
        f"{', '.join(map(str, SEEDS))}. The first line has the loss as it is, and its "
        "standard error. In `autoencoder, all` noise never rules.",
        "",
        *report.table(["constant", "it is", "tried", *tasks], cells),
        "",
        f"`python benchmarks/large_batch/constants.py`; {len(rows)} runs; "
        f"{report.environments(rows)}.",
    ]
    return "\n".join(lines) + "\n"


def plot(rows: list[dict]) -> None:
    """A panel for each constant: flat is good."""
    columns = 5
    figure, axes = plt.subplots(
        -(-len(CONSTANTS) // columns),
        columns,
        figsize=(11, 7),
        sharey=True,
        layout="constrained",
    )
    for panel, (name, constant) in zip(axes.flat, CONSTANTS.items(), strict=False):
        for task, colour in zip(TASKS, COLOURS, strict=True):
            usual = means(rows, task, "none").get(1.0)
            if usual is None:
                continue
            points = means(rows, task, name)
            if not points:
                continue
            points[constant.usual] = usual
            x, y = zip(*sorted(points.items()), strict=True)
            y = [100 * (loss / usual - 1) for loss in y]
            panel.plot(x, y, "o-", ms=3, lw=1.2, color=colour, label=task)
        panel.axvline(constant.usual, color="k", lw=0.6, ls=":")
        panel.axhspan(-100 * FLAT, 100 * FLAT, color="k", alpha=0.06, lw=0)
        panel.set_xscale("log")
        values = sorted((constant.usual, *constant.others))
        panel.set_xticks(values, [f"{value:g}" for value in values])
        panel.minorticks_off()
        panel.set_title(name, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.set_ylim(-30, 60)
    for panel in list(axes.flat)[len(CONSTANTS) :]:
        panel.set_visible(False)
    for panel in axes[:, 0]:
        panel.set_ylabel("change of the loss, %", fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(TASKS))
    figure.savefig(PLOT, dpi=130, facecolor="white")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", help="the folder of tinyshakespeare.txt")
    parser.add_argument("--task", choices=TASKS, help="all without it")
    parser.add_argument("--table", action="store_true", help="write table and plot")
    flags = parser.parse_args()
    if flags.table:
        rows = protocol.read(RESULTS)
        RESULTS.with_suffix(".md").write_text(table(rows))
        plot(rows)
    else:
        run(flags.data_dir, flags.task)


if __name__ == "__main__":
    main()

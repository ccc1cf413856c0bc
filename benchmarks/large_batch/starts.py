"""A hundred starts of `nlcg_auto`, and first rates that are ten times off.

    taskset -c 1 python benchmarks/large_batch/starts.py --data_dir=FOLDER
    taskset -c 1 python benchmarks/large_batch/starts.py --first_rates --images=IMAGES
    python benchmarks/large_batch/starts.py --table

The starts are ten tasks by ten seeds: those of `noise_tasks.py`, the small autoencoder
by two batch sizes, Burgers' equation, a noisy quadratic, and two classifiers of digits,
each cut to some hundred steps. FOLDER has tinyshakespeare.txt, IMAGES is the folder of
`autoencoder_cifar`. Where noise begins to rule the curvature has made a first rate;
with `--first_rates` it is multiplied by 10 and by 0.1, and the run goes on to its end.
Runs are lines of `results/starts.jsonl` and `results/first_rates.jsonl`; what is there
is not run again. `--table` writes `results/starts.md` of both.
"""

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import figures
import jax
import jax.numpy as jnp
import noise_tasks
import numpy as np
import optax
import protocol
import report
import sweep
import training_tasks
import workloads
from running import train
from sklearn.datasets import load_digits

import nlcg_optax
from nlcg_optax.curvature.state import QuadraticModelState
from nlcg_optax.training.config import base_config

STARTS = sweep.RESULTS / "starts.jsonl"
FIRST_RATES = sweep.RESULTS / "first_rates.jsonl"
TABLE = sweep.RESULTS / "starts.md"
SEEDS = range(10)
FACTORS = (1.0, 10.0, 0.1)
# Above the median of its task by so much, a start counts as one that ended badly.
BADLY = 0.05


# Tasks that nobody tuned on.


def noisy_quadratic() -> training_tasks.FunctionTask:
    """A hundred curvatures from 1 to 1/1,000, and noise of standard deviation 1."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(9216, 100)).astype(np.float32)
    scale = np.geomspace(1, 1e-3, 100).astype(np.float32) ** 0.5

    def init(seed: Any) -> Any:
        return {"x": 3 * jax.random.normal(jax.random.key(seed), (100,))}

    return training_tasks.FunctionTask(
        init,
        lambda params, noise: scale * (params["x"] - noise),
        lambda outputs, noise: 0.5 * jnp.mean(jnp.sum(outputs**2, -1)),
        noise[:8192],
        noise[8192:],
        base_config(),
    )


def digits_by(widths: tuple[int, ...], wrong: float) -> training_tasks.FunctionTask:
    """Handwritten digits by an MLP, with a part of the labels of training wrong."""
    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(labels))
    x, y = np.float32(images[order] / 16), labels[order].astype(np.int32)
    cut = 1400
    noisy = np.where(rng.uniform(size=cut) < wrong, rng.integers(10, size=cut), y[:cut])

    def loss(logits: jax.Array, examples: Any) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, examples[1])
        return jnp.mean(losses)

    return training_tasks.FunctionTask(
        functools.partial(training_tasks.mlp_init, widths),
        lambda params, examples: training_tasks.mlp(params, examples[0], jax.nn.relu),
        loss,
        (x[:cut], noisy.astype(np.int32)),
        (x[cut:], y[cut:]),
        base_config(),
    )


Start = tuple[training_tasks.FunctionTask, int, int]  # with batch size and steps


def of_noise_tasks(name: str, data_dir: str | None) -> Start:
    task, size, _ = noise_tasks.TASKS[name](data_dir)
    return task._replace(labels=None), size, 300


def of_workload(name: str, size: int, steps: int | None, images: str | None) -> Start:
    """A cell of the sweep, cut to so many steps; all of them for None."""
    workload = workloads.WORKLOADS[name](images)
    task: Any = workload.task(workload.config)
    return task, size, steps or workload.num_steps(size, task.num_train)


TASKS: dict[str, Callable[[str | None], Start]] = {
    **{
        name: functools.partial(of_noise_tasks, name)
        for name in ("words", "outliers", "vit", "gru")
    },
    "autoencoder, 32": lambda _: of_workload("autoencoder", 32, 300, None),
    "autoencoder, 512": lambda _: of_workload("autoencoder", 512, 200, None),
    "burgers": lambda _: of_workload("burgers", 1, 100, None),
    "quadratic": lambda _: (noisy_quadratic(), 16, 300),
    "logistic": lambda _: (digits_by((64, 10), 0.1), 32, 300),
    "classifier": lambda _: (digits_by((64, 128, 128, 10), 0.1), 32, 300),
}
CELLS = (
    ("autoencoder", 32),
    ("autoencoder", 128),
    ("autoencoder", 512),
    ("autoencoder_cifar", 1024),
)


# Runs.


def is_model(node: Any) -> bool:
    return isinstance(node, QuadraticModelState)


def with_first_rate(before: Any, after: Any, factor: jax.typing.ArrayLike) -> Any:
    """The state after a step, its first rate multiplied if noise begins to rule now."""

    def change(old: Any, new: Any) -> Any:
        if not is_model(new) or new.noise.balance is None:
            return new
        begins = ~old.noise.handed_over & new.noise.handed_over
        state = new.noise.balance
        rate = state.balance.rate * jnp.where(begins, factor, 1)
        state = state._replace(balance=state.balance._replace(rate=rate))
        return new._replace(noise=new.noise._replace(balance=state))

    return jax.tree.map(change, before, after, is_leaf=is_model)


def make(start: Start) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """From a seed to a state, and a step; the rate of `running.train` is the factor."""
    task, size, steps = start
    words = workloads.OPTIMIZERS["nlcg by curvature"][0]
    init, train_step = task.make(words, size, steps)

    def step(state: Any, indices: Any, arrays: Any, factor: Any, seed: Any) -> Any:
        new, loss = train_step(state, indices, arrays, factor, seed)
        opt_state = with_first_rate(state.opt_state, new.opt_state, factor)
        return new._replace(opt_state=opt_state), loss

    return jax.jit(init), jax.jit(step, donate_argnums=0)


def run(start: Start, programs: Any, seed: int, factor: float = 1.0) -> dict:
    """A run to its end; its row."""
    task, size, steps = start
    init, step = programs
    clock = time.process_time()
    arrays, (kept, evaluate, _) = jax.device_put(task.data), task.phase("test")
    state = init(np.int32(seed))
    first = evaluate(state)["loss"]
    factors = np.full(steps, factor, np.float32)
    state, losses = train(step, state, arrays, kept, size, factors, seed)
    told = {
        k: np.asarray(v) for k, v in nlcg_optax.diagnostics(state.opt_state).items()
    }
    since = [
        int(node.noise.since)
        for node in jax.tree.leaves(state.opt_state, is_leaf=is_model)
        if is_model(node)
    ]
    last = evaluate(state)["loss"]
    finished = len(losses) == steps and all(map(math.isfinite, losses))
    return {
        "batch_size": size,
        "steps": steps,
        "seed": seed,
        "factor": factor,
        "first_loss": protocol.rounded(first),
        "loss": protocol.rounded(last) if math.isfinite(last) else None,
        "diverged": not (finished and math.isfinite(last) and last < first),
        "since": since[0],
        "returns": int(told.get("noise_returns", 0)),
        "nonfinite": int(told.get("noise_nonfinite", 0)),
        "seconds": round(time.process_time() - clock, 1),
    }


def record(
    path: Any, name: str, start: Callable[[], Start], runs: Iterable[tuple[int, float]]
) -> None:
    """Adds the rows that are not there, of seeds and factors."""
    done = {(r["task"], r["seed"], r["factor"]) for r in protocol.read(path)}
    left = [(s, f) for s, f in runs if (name, s, f) not in done]
    if not left:
        return
    found, where = start(), protocol.environment()
    programs = make(found)
    for seed, factor in left:
        row = {"task": name, **run(found, programs, seed, factor), **where}
        protocol.append(path, row)
        shown = {k: v for k, v in row.items() if k not in where}
        print(shown, flush=True)


# Tables.


def by_task(rows: list[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["task"], []).append(row)
    return found


def badly(rows: list[dict]) -> list[dict]:
    """Those that end more than 5% above the median of their task."""
    ended = [row["loss"] for row in rows if row["loss"] is not None]
    limit = (1 + BADLY) * statistics.median(ended) if ended else math.inf
    return [row for row in rows if row["loss"] is None or row["loss"] > limit]


def table_of_starts(rows: list[dict]) -> list[str]:
    cells = []
    for task, group in by_task(rows).items():
        losses = [row["loss"] for row in group if row["loss"] is not None]
        since = [row["since"] for row in group]
        cells.append(
            [
                f"{task} ({group[0]['batch_size']:,}; {group[0]['steps']:,} steps)",
                str(len(group)),
                f"{statistics.median(losses):.4g} ({min(losses):.4g} to "
                f"{max(losses):.4g})",
                f"{min(since)} to {max(since)}"
                if min(since) >= 0
                else "never, in some",
                str(sum(row["diverged"] for row in group)),
                str(len(badly(group))),
                str(sum(row["returns"] > 0 for row in group)),
            ]
        )
    total = len(rows)
    worse = sum(len(badly(group)) for group in by_task(rows).values())
    cells.append(
        [
            "**all**",
            str(total),
            "",
            "",
            f"**{sum(row['diverged'] for row in rows)}**",
            f"**{worse}**",
            f"**{sum(row['returns'] > 0 for row in rows)}**",
        ]
    )
    header = ["task (batch)", "starts", "loss: median, range", "noise rules from step"]
    header += ["diverged", "more than 5% above the median", "went back to the average"]
    return report.table(header, cells)


def table_of_rates(rows: list[dict]) -> list[str]:
    cells = []
    for task, group in by_task(rows).items():
        by_factor = {f: [r for r in group if r["factor"] == f] for f in FACTORS}
        line, usual = [task], None
        for factor, runs in by_factor.items():
            if not runs or any(r["diverged"] for r in runs):
                line.append("diverged" if runs else "not run")
                continue
            mean, error = report.mean_and_error([r["loss"] for r in runs])
            text = f"{mean:.4g}{figures.spread(error, '.1g')}"
            if factor == 1:
                usual = mean
            elif usual:
                text += f" ({mean / usual - 1:+.1%})"
            line.append(text)
        cells.append(line)
    header = ["batches", "first rate as it is", "times 10", "times 0.1"]
    return report.table(header, cells)


def tables(starts: list[dict], rates: list[dict]) -> str:
    lines = ["# Starts, and first rates", ""]
    if starts:
        lines += [
            "`nlcg_auto(num_steps)`, ten seeds a task; a run counts as diverged if a "
            "loss is no number, or the last one is above the first (of held-out "
            "examples, where there are some).",
            "",
            *table_of_starts(starts),
            "",
        ]
    if rates:
        lines += [
            "The loss at the end, where the first rate of the noise stage is what it "
            "is, ten times as high, and a tenth of it; seeds "
            f"{', '.join(map(str, sorted({r['seed'] for r in rates})))}.",
            "",
            *table_of_rates(rates),
            "",
        ]
    lines.append(
        "`python benchmarks/large_batch/starts.py`, with and without `--first_rates`; "
        f"{report.environments(starts + rates)}."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", help="the folder of tinyshakespeare.txt")
    parser.add_argument("--images", help="the folder of `autoencoder_cifar`")
    parser.add_argument("--first_rates", action="store_true")
    parser.add_argument("--only", help="some of the tasks, split by semicolons")
    parser.add_argument("--table", action="store_true", help="write starts.md")
    flags = parser.parse_args()
    if flags.table:
        text = tables(protocol.read(STARTS), protocol.read(FIRST_RATES))
        TABLE.write_text(text)
        return
    only = flags.only.split(";") if flags.only else None
    if flags.first_rates:
        for name, size in CELLS:
            label = f"{name}, {size}"
            if only is None or label in only:
                images = flags.images if name == "autoencoder_cifar" else None
                cell = functools.partial(of_workload, name, size, None, images)
                runs = [(seed, f) for seed in protocol.TEST_SEEDS for f in FACTORS]
                record(FIRST_RATES, label, cell, runs)
        return
    for name, task in TASKS.items():
        if only is None or name in only:
            start = functools.partial(task, flags.data_dir)
            record(STARTS, name, start, [(seed, 1.0) for seed in SEEDS])


if __name__ == "__main__":
    main()

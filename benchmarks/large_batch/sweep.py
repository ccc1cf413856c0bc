"""Optimizers by batch size: learning rate and schedule tuned, then tested.

    taskset -c 0 python benchmarks/large_batch/sweep.py --workload=digits --part=0/2
    taskset -c 1 python benchmarks/large_batch/sweep.py --workload=digits --part=1/2

Every run is a line of `results/<workload>.jsonl`; what is there is not run again, so
the same command goes on with a sweep that was stopped. With `--time` the line of each
optimizer and batch size is the time of its step alone, for what was trained elsewhere.
README.md has the protocol.
"""

import argparse
import functools
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peers
import tqdm
from protocol import (
    TIMING,
    Cell,
    append,
    environment,
    expected_cells,
    plan,
    read,
    rounded,
)
from running import outcome, train
from workloads import UNTUNED, WORKLOADS, Workload

import nlcg_optax
from nlcg_optax.training import data, optimizers

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
EVALUATIONS = 20  # during a run, where they are cheap


# Training.


def now() -> float:
    """Seconds to measure by: those of the processor, which other programs do not slow.

    Where a GPU computes they would be the host's alone, so there the clock counts.
    """
    on_cpu = jax.default_backend() == "cpu"
    return time.process_time() if on_cpu else time.monotonic()


class Trainer:
    """Trains the cells of a workload; what they share is loaded and compiled once."""

    def __init__(self, workload: Workload):
        self.workload = workload
        self.task = workload.task(workload.config)
        self.arrays = jax.device_put(self.task.data)
        self.phase = functools.cache(self.task.phase)

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def compiled(self, optimizer: str, size: int, total_steps: int) -> tuple:
        """Programs that make a state from a seed, and train it for a step.

        Learning rate, seed and data are their arguments: all cells share them. The
        size is that of a batch that is no larger than the examples.
        """
        words = self.workload.optimizers[optimizer][0]
        init, train_step = self.task.make(words, size, total_steps)
        zeros = np.float32(0), np.int32(0)  # learning rate and seed
        start = now()
        on_cpu = jax.default_backend() == "cpu"
        # It is run a few times only: see `steps.create_state`.
        options = {"xla_backend_optimization_level": 0} if on_cpu else None
        init = jax.jit(init, compiler_options=options).lower(zeros[1]).compile()
        indices = np.zeros(size, np.int32)
        train_step = (
            jax.jit(train_step, donate_argnums=0)
            .lower(init(zeros[1]), indices, self.arrays, *zeros)
            .compile()
        )
        return init, train_step, now() - start

    def time(self, optimizer: str, batch_size: int, steps: int = 5) -> dict:
        """A row of phase "timing": the median of so many steps, after a first one."""
        kept = self.phase("test").kept
        size = min(batch_size, len(kept))
        total_steps = self.workload.num_steps(batch_size, len(kept))
        init, train_step, compile_seconds = self.compiled(optimizer, size, total_steps)
        zero = np.int32(0)
        state, seconds = init(zero), []
        indices = kept[data.batch_indices(0, size, len(kept), 0)].astype(np.int32)
        rate = np.float32(1e-3)  # a small one, for a time that no divergence makes
        for _ in range(steps + 1):
            clock = now()
            state, _ = train_step(state, indices, self.arrays, rate, zero)
            jax.block_until_ready(state)
            seconds.append(now() - clock)
        return {
            "optimizer": optimizer,
            "batch_size": batch_size,
            **Cell(TIMING, 0.0, "", 0)._asdict(),
            "steps": total_steps,
            "diverged": False,
            "accuracy": None,
            "loss": None,
            "curve": [],
            "seconds": round(sum(seconds), 1),
            "step_seconds": rounded(statistics.median(seconds[1:])),
            "compile_seconds": round(compile_seconds, 1),
            "overrides": self.workload.optimizers[optimizer][0],
        }

    def run(self, optimizer: str, batch_size: int, cell: Cell) -> dict:
        """Trains one cell; its row."""
        workload = self.workload
        kept, evaluate, during = self.phase(cell.phase)
        size = min(batch_size, len(kept))
        num_steps = workload.num_steps(batch_size, len(kept))
        init, train_step, compile_seconds = self.compiled(optimizer, size, num_steps)
        words, rates = words_and_rates(
            workload, optimizer, cell.learning_rate, cell.schedule, num_steps
        )
        due = set(np.linspace(0, num_steps, EVALUATIONS + 1).round()[1:].astype(int))

        start = now()
        state = init(np.int32(cell.seed))
        evaluations, spent = [], 0.0
        jax.block_until_ready(state)
        clock = now()

        def after(count: int, state: Any) -> None:
            nonlocal spent, clock
            if during and count in due:
                jax.block_until_ready(state)
                spent += now() - clock
                value = rounded(evaluate(state)["loss"])
                if math.isfinite(value):
                    evaluations.append([count, value])
                clock = now()

        state, losses = train(
            train_step, state, self.arrays, kept, size, rates, cell.seed, after
        )
        spent += now() - clock
        row = {
            "optimizer": optimizer,
            "batch_size": batch_size,
            **outcome(cell, num_steps, losses, lambda: evaluate(state)),
            "seconds": round(now() - start, 1),
            "step_seconds": rounded(spent / len(losses)),
            "compile_seconds": round(compile_seconds, 1),
            "overrides": words,
        }
        if during:
            row["evaluations"] = evaluations
        if optimizer in UNTUNED:
            row["steps_back"] = steps_back(state.opt_state)
        return row


def steps_back(opt_state: Any) -> int:
    """Steps of ours that were taken back, and returns to the average."""
    told = nlcg_optax.diagnostics(opt_state)
    return int(told["rejected_steps"]) + int(told.get("noise_returns", 0))


def words_and_rates(
    workload: Workload, optimizer: str, rate: float, schedule: str, num_steps: int
) -> tuple[list[str], np.ndarray]:
    """What the config is changed by, and the learning rate of each step."""
    words = [
        *workload.optimizers[optimizer][0],
        *workload.schedules_of(optimizer)[schedule],
    ]
    config = peers.configured(workload.config, words)
    config.optimizer.learning_rate = rate
    per_epoch = num_steps / config.num_epochs
    made = optimizers.create_schedule(peers.checked(config), per_epoch)
    return words, np.asarray(jax.vmap(made)(jnp.arange(num_steps)), np.float32)


def sizes_of(workload: Workload, chosen: str | None) -> tuple[int, ...]:
    """The batch sizes that a flag names, such as 64,256; all without it."""
    if not chosen:
        return workload.batch_sizes
    return tuple(int(size) for size in chosen.split(","))


def sweep(
    name: str,
    workload: Workload,
    path: pathlib.Path,
    groups: list[tuple[str, int]],
    minutes: float = math.inf,
) -> None:
    """Runs what is missing of these optimizers and batch sizes.

    After so many minutes it starts nothing more; nor does it start a run that would
    end later, going by the longest of that optimizer and batch size.
    """
    rows, next_cells = progress(name, workload, path, groups)

    def left() -> int:
        return sum(
            expected_cells(
                next_cells(g), workload.schedules_of(g[0]), workload.test_seeds
            )
            for g in groups
        )

    trainer, where = None, environment()
    interactive = sys.stderr.isatty()
    start, finished, total = time.monotonic(), 0, left()
    with tqdm.tqdm(total=total, unit="run", disable=not interactive) as bar:
        for group in groups:
            optimizer, batch_size = group
            longest = 0.0
            while cells := next_cells(group):
                for cell in cells:
                    began = time.monotonic()
                    if began + longest - start > 60 * minutes:
                        print(f"Time is up; {left()} runs are left at least.")
                        return
                    bar.set_description(f"{optimizer}, batch {batch_size}")
                    trainer = trainer or Trainer(workload)
                    row = trainer.run(optimizer, batch_size, cell)
                    row = {"workload": name, **row, **where}
                    append(path, row)
                    rows[group].append(row)
                    longest = max(longest, time.monotonic() - began)
                    finished += 1
                    bar.total = finished + left()
                    bar.update()
                    if not interactive:
                        print(line(row, finished, bar.total, start), flush=True)


def measure_times(
    name: str, workload: Workload, path: pathlib.Path, groups: list[tuple[str, int]]
) -> None:
    """Adds the row of phase "timing" of every one of these that has none."""
    rows, _ = progress(name, workload, path, groups)
    trainer, where = None, environment()
    for group in groups:
        if any(row["phase"] == TIMING for row in rows[group]):
            continue
        trainer = trainer or Trainer(workload)
        row = {"workload": name, **trainer.time(*group), **where}
        append(path, row)
        print(f"{group[0]}, batch {group[1]}: {row['step_seconds']} s a step")


def progress(
    name: str, workload: Workload, path: pathlib.Path, groups: list[tuple[str, int]]
) -> tuple[dict[tuple[str, int], list[dict]], Callable[[tuple[str, int]], list[Cell]]]:
    """The finished rows of each group, and the function to the runs that come next."""
    rows: dict[tuple[str, int], list[dict]] = {group: [] for group in groups}
    for row in read(path):
        group = (row["optimizer"], row["batch_size"])
        if row["workload"] == name and group in rows:
            overrides = workload.optimizers[row["optimizer"]][0]
            if row["overrides"][: len(overrides)] != overrides:
                sys.exit(
                    f"{path} has runs of {row['optimizer']!r} with "
                    f"{row['overrides']}, now it is {overrides}: give it another name, "
                    "or remove those lines."
                )
            rows[group].append(row)

    def next_cells(group: tuple[str, int]) -> list[Cell]:
        optimizer = group[0]
        return plan(
            rows[group],
            workload.optimizers[optimizer][1],
            workload.schedules_of(optimizer),
            test_seeds=workload.test_seeds,
            tuned=optimizer not in UNTUNED,
            num_rates=workload.num_rates,
        )

    return rows, next_cells


def print_missing(
    name: str, workload: Workload, path: pathlib.Path, groups: list[tuple[str, int]]
) -> None:
    """One line for each optimizer and batch size that is not complete."""
    rows, next_cells = progress(name, workload, path, groups)
    for group in groups:
        if cells := next_cells(group):
            schedules = workload.schedules_of(group[0])
            count = expected_cells(cells, schedules, workload.test_seeds)
            done = f"{len(rows[group])} done" if rows[group] else "not begun"
            print(f"{name}: {group[0]}, batch {group[1]:,}: {count} runs left ({done})")


def line(row: dict, finished: int, total: int, start: float) -> str:
    seconds = (time.monotonic() - start) / finished * (total - finished)
    result = "diverged" if row["diverged"] else f"loss {row['loss']:.5g}"
    if row["accuracy"] is not None:
        result += f", accuracy {row['accuracy']:.4f}"
    unit = "s of processor" if row["device"] == "cpu" else "s"
    return (
        f"[{finished}/{total}, {tqdm.tqdm.format_interval(seconds)} left] "
        f"{row['optimizer']}, batch {row['batch_size']}, {row['phase']}, "
        f"rate {row['learning_rate']:g}, {row['schedule']}, seed {row['seed']}: "
        f"{result} ({row['steps']} steps, {row['seconds']:.0f} {unit})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--optimizers", help="some of the workload's: a,b")
    parser.add_argument("--batch_sizes", help="such as 64,256")
    parser.add_argument("--part", default="0/1", help="i/n: of n processes, this is i")
    parser.add_argument("--data_dir", help="the folder of a workload that needs one")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="start no run that ends later"
    )
    parser.add_argument(
        "--missing", action="store_true", help="print what is not run yet, and end"
    )
    parser.add_argument(
        "--time", action="store_true", help="time a step of each, and end"
    )
    parser.add_argument("--results", type=pathlib.Path, help="a JSON-lines file")
    flags = parser.parse_args()
    workload = WORKLOADS[flags.workload](flags.data_dir)
    if workload.program:
        parser.error(f"{flags.workload} is run by {workload.program}")
    chosen = flags.optimizers.split(",") if flags.optimizers else workload.optimizers
    if unknown := set(chosen) - set(workload.optimizers):
        parser.error(
            f"unknown optimizers: {', '.join(sorted(unknown))}; {flags.workload} has "
            f"{', '.join(workload.optimizers)}"
        )
    sizes = sizes_of(workload, flags.batch_sizes)
    part, parts = map(int, flags.part.split("/"))
    groups = [(optimizer, size) for size in sizes for optimizer in chosen]
    path = flags.results or RESULTS / f"{flags.workload}.jsonl"
    groups = groups[part::parts]
    if flags.missing:
        print_missing(flags.workload, workload, path, groups)
    elif flags.time:
        measure_times(flags.workload, workload, path, groups)
    else:
        sweep(flags.workload, workload, path, groups, flags.minutes)


if __name__ == "__main__":
    main()

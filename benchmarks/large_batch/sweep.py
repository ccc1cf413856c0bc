"""Optimizers by batch size: learning rate and schedule tuned, then tested.

    taskset -c 0 python benchmarks/large_batch/sweep.py --workload=digits --part=0/2
    taskset -c 1 python benchmarks/large_batch/sweep.py --workload=digits --part=1/2

Every run is a line of `results/<workload>.jsonl`; what is there is not run again, so
the same command goes on with a sweep that was stopped. README.md has the protocol.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import pathlib
import platform
import sys
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax
import tqdm
from sklearn import model_selection
from workloads import (
    EARLIER,
    FACTOR,
    MAX_EXTENSIONS,
    NUM_RATES,
    UNTUNED,
    WORKLOADS,
    Workload,
)

import nlcg_optax
from nlcg_optax.training import data, loop, models, optimizers, steps
from nlcg_optax.training.config import apply_overrides
from nlcg_optax.training.mesh import create_mesh

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
VALIDATION_FRACTION = 0.2
TUNING_SEEDS = (100,)
TEST_SEEDS = (0, 1, 2)
CURVE_POINTS = 200


class Cell(NamedTuple):
    """A run of one optimizer at one batch size; the fields are columns of its row."""

    phase: str  # tuning, test
    learning_rate: float
    schedule: str
    seed: int


# The protocol.


def rates_to_try(centre: float, scores: dict[int, tuple]) -> list[float]:
    """The grid, extended while the best of its finished rates is at its edge.

    Args:
      centre: rate number 0; number k is ``centre * FACTOR**k``.
      scores: by the number of the rate, larger is better; empty for a failure.
    """
    low, high = -(NUM_RATES // 2), NUM_RATES // 2
    for _ in range(MAX_EXTENSIONS):
        if not all(k in scores for k in range(low, high + 1)):
            break
        best = max(range(low, high + 1), key=lambda k: scores[k])
        if not scores[best] or best == low:  # where all fail, a lower one may not
            low -= 1
        elif best == high:
            high += 1
        else:
            break
    return [centre * FACTOR**k for k in range(low, high + 1)]


def score(rows: Iterable[dict]) -> tuple:
    """Larger is better: accuracy, then loss; empty if any of the runs diverged."""
    rows = list(rows)
    if any(row["diverged"] for row in rows):
        return ()
    return (
        float(np.mean([row["accuracy"] for row in rows])),
        -float(np.mean([row["loss"] for row in rows])),
    )


def plan(
    rows: Iterable[dict],
    centre: float,
    schedules: Iterable[str],
    tuning_seeds: Iterable[int] = TUNING_SEEDS,
    test_seeds: Iterable[int] = TEST_SEEDS,
    *,
    tuned: bool = True,
) -> list[Cell]:
    """The runs that come next for an optimizer at a batch size; none when it is done.

    Stage 1 finds the learning rate with the first schedule, stage 2 the schedule at
    that rate, and stage 3 tests both. A stage starts when the one before is complete.

    Args:
      rows: finished runs of that optimizer and batch size.
      centre: the learning rate in the middle of the grid.
      schedules: names, the default first.
      tuning_seeds: of the runs on the training set less its validation split.
      test_seeds: of the runs on the whole training set.
      tuned: whether there is something to tune; if not, only stage 3 is left.
    """
    done = {Cell(*(row[name] for name in Cell._fields)): row for row in rows}
    tuning_seeds, (default, *others) = list(tuning_seeds), schedules

    def tuning(rate: float, schedule: str) -> list[Cell]:
        return [Cell("tuning", rate, schedule, seed) for seed in tuning_seeds]

    def score_of(cells: list[Cell]) -> tuple:
        return score(done[cell] for cell in cells)

    def missing(cells: Iterable[Cell]) -> list[Cell]:
        return [cell for cell in cells if cell not in done]

    if not tuned:
        return missing(Cell("test", centre, default, seed) for seed in test_seeds)
    scores = {}
    for cell in done:
        cells = tuning(cell.learning_rate, default)
        if cell in cells and not missing(cells):
            number = round(math.log(cell.learning_rate / centre, FACTOR))
            scores[number] = score_of(cells)
    rates = rates_to_try(centre, scores)
    if stage := missing(cell for rate in rates for cell in tuning(rate, default)):
        return stage
    rate = max(rates, key=lambda rate: score_of(tuning(rate, default)))
    if not score_of(tuning(rate, default)):
        return []  # every rate diverged
    if stage := missing(cell for other in others for cell in tuning(rate, other)):
        return stage
    schedule = max([default, *others], key=lambda name: score_of(tuning(rate, name)))
    return missing(Cell("test", rate, schedule, seed) for seed in test_seeds)


def expected_cells(rows: list[dict], next_cells: list[Cell], workload: Workload) -> int:
    """How many runs are still to come, if no learning rate more is needed."""
    tuning = (NUM_RATES + len(workload.schedules) - 1) * len(TUNING_SEEDS)
    if not next_cells:
        return 0
    if next_cells[0].phase == "test":
        return len(next_cells)
    later = next_cells[0].schedule == next(iter(workload.schedules))
    tuned = len(next_cells) + later * (tuning - NUM_RATES * len(TUNING_SEEDS))
    return tuned + len(TEST_SEEDS)


# Training.


class Phase(NamedTuple):
    """Which images are trained on, and the evaluation of a state on others."""

    kept: np.ndarray
    evaluate: Any


class Trainer:
    """Trains the cells of a workload; what they share is loaded and compiled once."""

    def __init__(self, workload: Workload):
        self.workload = workload
        self.mesh = create_mesh(workload.config, jax.devices()[:1])
        self.dataset = loop.load_dataset(workload.config)
        self.model = loop.create_model(workload.config, self.dataset.num_classes)
        train = self.dataset.train
        self.images, self.labels = jax.device_put((train.images, train.labels))

    @functools.cache  # noqa: B019
    def phase(self, name: str) -> Phase:
        dataset, train = self.dataset, self.dataset.train
        kept = np.arange(len(train))
        if name == "tuning":
            kept, held_out = model_selection.train_test_split(
                kept,
                test_size=VALIDATION_FRACTION,
                stratify=train.labels,
                random_state=self.workload.config.dataset.split_seed,
            )
            splits = {"train": kept, "test": held_out}
            dataset = dataclasses.replace(
                dataset,
                **{
                    split: data.Split.from_arrays(train.images[i], train.labels[i])
                    for split, i in splits.items()
                },
            )
        config = self.workload.config.copy_and_resolve_references()
        # BatchNorm by the statistics of the whole training set under the last weights:
        # running averages lag, which would be no property of the optimizer.
        config.batch_size = len(kept)
        config.precise_batch_norm_batches = 1
        evaluate = loop.make_evaluation(config, dataset, self.model, self.mesh)
        return Phase(kept, lambda state: evaluate(state)["test"])

    def create_optimizer(
        self, optimizer: str, config: Any, rate: Any, total_steps: int
    ) -> Any:
        """The optimizer of that name in the workload, with this learning rate."""
        del optimizer  # the config says it all
        return optimizers.create_optimizer(
            config, lambda _: rate, models.l2_mask, total_steps
        )

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def compiled(self, optimizer: str, batch_size: int, total_steps: int) -> tuple:
        """Programs that make a state from a seed, and train it for a step.

        Learning rate, seed and data are their arguments: all cells share them.
        """
        config = self.workload.config.copy_and_resolve_references()
        apply_overrides(config, self.workload.optimizers[optimizer][0])
        config.batch_size = batch_size

        def create_optimizer(rate: Any) -> Any:
            return self.create_optimizer(optimizer, config, rate, total_steps)

        def train_step(state, indices, images, labels, rate, seed):
            step = steps.make_train_step(
                self.model,
                create_optimizer(rate),
                lambda _: rate,
                config,
                self.mesh,
                augment=True,
                seed=seed,
            )
            batch = {"image": images[indices][None], "label": labels[indices][None]}
            state, metrics = step(state, batch)
            # The loss may be finite where its gradient is not.
            finite = jnp.isfinite(metrics["grad_norm"])
            return state, jnp.where(finite, metrics["loss"], jnp.nan)

        init = steps.make_init(
            self.model, create_optimizer(0.0), config, self.dataset.image_shape
        )
        zeros = np.float32(0), np.int32(0)  # learning rate and seed
        start = time.monotonic()
        on_cpu = jax.default_backend() == "cpu"
        # It is run a few times only: see `steps.create_state`.
        options = {"xla_backend_optimization_level": 0} if on_cpu else None
        init = jax.jit(init, compiler_options=options).lower(zeros[1]).compile()
        train_step = (
            jax.jit(train_step, donate_argnums=0)
            .lower(
                init(zeros[1]),
                np.zeros(batch_size, np.int32),
                self.images,
                self.labels,
                *zeros,
            )
            .compile()
        )
        return config, init, train_step, time.monotonic() - start

    def run(self, optimizer: str, batch_size: int, cell: Cell) -> dict:
        """Trains one cell; its row."""
        kept, evaluate = self.phase(cell.phase)
        capped = min(batch_size, len(kept))
        steps_per_epoch = len(kept) / capped
        num_steps = round(self.workload.config.num_epochs * steps_per_epoch)
        compiled = self.compiled(optimizer, capped, num_steps)
        config, init, train_step, compile_seconds = compiled
        start = time.monotonic()
        config = config.copy_and_resolve_references()
        apply_overrides(config, self.workload.schedules[cell.schedule])
        config.optimizer.learning_rate = cell.learning_rate
        schedule = optimizers.create_schedule(config, steps_per_epoch)
        rates = np.asarray(jax.vmap(schedule)(jnp.arange(num_steps)), np.float32)

        state = init(np.int32(cell.seed))
        losses: list[Any] = []
        for step in range(num_steps):
            places = data.batch_indices(step, config.batch_size, len(kept), cell.seed)
            indices = kept[places].astype(np.int32)
            state, loss = train_step(
                state,
                indices,
                self.images,
                self.labels,
                rates[step],
                np.int32(cell.seed),
            )
            losses.append(loss)
            # That of the step before, so that the device need not wait.
            if step and not math.isfinite(losses[-2]):
                break
        losses = [float(loss) for loss in losses]
        finite = [loss for loss in losses if math.isfinite(loss)]
        scores = evaluate(state) if len(finite) == num_steps else {}
        diverged = not math.isfinite(scores.get("loss", math.nan))
        return {
            "optimizer": optimizer,
            "batch_size": batch_size,
            **cell._asdict(),
            "steps": num_steps,
            "diverged": diverged,
            "accuracy": None if diverged else scores["accuracy"],
            "loss": None if diverged else scores["loss"],
            "curve": thin(finite),
            "seconds": round(time.monotonic() - start, 1),
            "compile_seconds": round(compile_seconds, 1),
            "overrides": [
                *self.workload.optimizers[optimizer][0],
                *self.workload.schedules[cell.schedule],
            ],
        }


def thin(losses: list[float]) -> list[float]:
    """Means over at most `CURVE_POINTS` bins, to four digits."""
    if not losses:
        return []
    bins = np.array_split(losses, min(CURVE_POINTS, len(losses)))
    return [float(f"{np.mean(part):.4g}") for part in bins]


# Results.


def read(path: pathlib.Path) -> list[dict]:
    """The rows of a file; a line that was cut off is run again."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            print(f"{path}: skipped a broken line", file=sys.stderr)
    return rows


def append(path: pathlib.Path, row: dict) -> None:
    """Adds a line in one write: several processes may share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line)
    finally:
        os.close(file)


def environment() -> dict:
    return {
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "optax": optax.__version__,
            "nlcg_optax": nlcg_optax.__version__,
        },
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
    }


def sweep(
    name: str,
    workload: Workload,
    path: pathlib.Path,
    groups: list[tuple[str, int]],
) -> None:
    """Runs what is missing of these optimizers and batch sizes."""
    rows: dict[tuple[str, int], list[dict]] = {group: [] for group in groups}
    for row in read(path):
        group = (row["optimizer"], row["batch_size"])
        if row["workload"] == name and group in rows:
            overrides = workload.optimizers[row["optimizer"]][0]
            known = overrides, EARLIER.get(row["optimizer"], overrides)
            if not any(row["overrides"][: len(words)] == words for words in known):
                sys.exit(
                    f"{path} has runs of {row['optimizer']!r} with "
                    f"{row['overrides']}, now it is {overrides}: give it another name, "
                    "or remove those lines."
                )
            rows[group].append(row)

    def next_cells(group: tuple[str, int]) -> list[Cell]:
        centre = workload.optimizers[group[0]][1]
        tuned = group[0] not in UNTUNED
        return plan(rows[group], centre, workload.schedules, tuned=tuned)

    def left() -> int:
        return sum(expected_cells(rows[g], next_cells(g), workload) for g in groups)

    trainer = None
    interactive = sys.stderr.isatty()
    start, finished, total = time.monotonic(), 0, left()
    with tqdm.tqdm(total=total, unit="run", disable=not interactive) as bar:
        for group in groups:
            optimizer, batch_size = group
            while cells := next_cells(group):
                for cell in cells:
                    bar.set_description(f"{optimizer}, batch {batch_size}")
                    trainer = trainer or Trainer(workload)
                    row = trainer.run(optimizer, batch_size, cell)
                    row = {"workload": name, **row, **environment()}
                    append(path, row)
                    rows[group].append(row)
                    finished += 1
                    bar.total = finished + left()
                    bar.update()
                    if not interactive:
                        print(line(row, finished, bar.total, start), flush=True)


def line(row: dict, finished: int, total: int, start: float) -> str:
    seconds = (time.monotonic() - start) / finished * (total - finished)
    result = "diverged" if row["diverged"] else f"accuracy {row['accuracy']:.4f}"
    return (
        f"[{finished}/{total}, {tqdm.tqdm.format_interval(seconds)} left] "
        f"{row['optimizer']}, batch {row['batch_size']}, {row['phase']}, "
        f"rate {row['learning_rate']:g}, {row['schedule']}, seed {row['seed']}: "
        f"{result} ({row['steps']} steps, {row['seconds']:.0f} s)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--optimizers", help="some of the workload's: a,b")
    parser.add_argument("--batch_sizes", help="such as 64,256")
    parser.add_argument("--part", default="0/1", help="i/n: of n processes, this is i")
    parser.add_argument("--data_dir", help="the folder of a workload that needs one")
    parser.add_argument("--results", type=pathlib.Path, help="a JSON-lines file")
    flags = parser.parse_args()
    workload = WORKLOADS[flags.workload](flags.data_dir)
    chosen = flags.optimizers.split(",") if flags.optimizers else workload.optimizers
    if unknown := set(chosen) - set(workload.optimizers):
        parser.error(
            f"unknown optimizers: {', '.join(sorted(unknown))}; {flags.workload} has "
            f"{', '.join(workload.optimizers)}"
        )
    sizes = workload.batch_sizes
    if flags.batch_sizes:
        sizes = tuple(int(size) for size in flags.batch_sizes.split(","))
    part, parts = map(int, flags.part.split("/"))
    groups = [(optimizer, size) for size in sizes for optimizer in chosen]
    path = flags.results or RESULTS / f"{flags.workload}.jsonl"
    sweep(flags.workload, workload, path, groups[part::parts])


if __name__ == "__main__":
    main()

"""The protocol of the comparison, and its results: files of one line a run.

Nothing here trains, and JAX is all that it needs: `sweep.py` and `gpu.py` share it.
"""

import json
import math
import os
import pathlib
import platform
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jaxlib
import numpy as np
import optax

import nlcg_optax

TUNING_SEEDS = (100,)
TEST_SEEDS = (0, 1, 2)
CURVE_POINTS = 200
TIMING = "timing"  # the phase of a row that tells the time of a step alone

FACTOR = 2.0  # between two learning rates
NUM_RATES = 5  # to begin with
MAX_EXTENSIONS = 3  # more of them, as long as the best is at the edge


class Cell(NamedTuple):
    """A run of one optimizer at one batch size; the fields are columns of its row."""

    phase: str  # tuning, test, timing
    learning_rate: float
    schedule: str
    seed: int


def rates_to_try(
    centre: float, scores: dict[int, tuple], num_rates: int = NUM_RATES
) -> list[float]:
    """The grid, extended while the best of its finished rates is at its edge.

    What was tried next to it belongs to the grid, whyever it was tried.

    Args:
      centre: rate number 0; number k is ``centre * FACTOR**k``.
      scores: by the number of the rate, larger is better; empty for a failure.
      num_rates: how many rates the grid has to begin with.
    """
    low, high = -(num_rates // 2), num_rates // 2
    most = high - low + MAX_EXTENSIONS
    while low - 1 in scores:
        low -= 1
    while high + 1 in scores:
        high += 1
    while high - low < most and all(k in scores for k in range(low, high + 1)):
        best = max(range(low, high + 1), key=lambda k: scores[k])
        if not scores[best] or best == low:  # where all fail, a lower one may not
            low -= 1
        elif best == high:
            high += 1
        else:
            break
    return [centre * FACTOR**k for k in range(low, high + 1)]


def score(rows: Iterable[dict]) -> tuple:
    """Larger is better: accuracy (of classifiers), then loss; empty if any diverged."""
    rows = list(rows)
    if any(row["diverged"] for row in rows):
        return ()
    loss = -float(np.mean([row["loss"] for row in rows]))
    if any(row["accuracy"] is None for row in rows):
        return (loss,)
    return float(np.mean([row["accuracy"] for row in rows])), loss


def plan(
    rows: Iterable[dict],
    centre: float,
    schedules: Iterable[str],
    tuning_seeds: Iterable[int] = TUNING_SEEDS,
    test_seeds: Iterable[int] = TEST_SEEDS,
    *,
    tuned: bool = True,
    num_rates: int = NUM_RATES,
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
      num_rates: how many learning rates the grid has to begin with.
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
    rates = rates_to_try(centre, scores, num_rates)
    if stage := missing(cell for rate in rates for cell in tuning(rate, default)):
        return stage
    rate = max(rates, key=lambda rate: score_of(tuning(rate, default)))
    if not score_of(tuning(rate, default)):
        return []  # every rate diverged
    if stage := missing(cell for other in others for cell in tuning(rate, other)):
        return stage
    schedule = max([default, *others], key=lambda name: score_of(tuning(rate, name)))
    return missing(Cell("test", rate, schedule, seed) for seed in test_seeds)


def expected_cells(
    next_cells: list[Cell], schedules: Iterable[str], test_seeds: Sequence[int]
) -> int:
    """How many runs are still to come, if no learning rate more is needed."""
    if not next_cells:
        return 0
    if next_cells[0].phase == "test":
        return len(next_cells)
    default, *others = schedules
    later = len(others) * len(TUNING_SEEDS) * (next_cells[0].schedule == default)
    return len(next_cells) + later + len(test_seeds)


# Results.


def rounded(x: float) -> float:
    return float(f"{x:.5g}")


def thin(losses: list[float]) -> list[float]:
    """Means over at most `CURVE_POINTS` bins, to four digits."""
    if not losses:
        return []
    bins = np.array_split(losses, min(CURVE_POINTS, len(losses)))
    return [float(f"{np.mean(part):.4g}") for part in bins]


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

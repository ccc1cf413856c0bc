"""How far the batch can grow: steps and seconds to a target, by batch size.

The form of Shallue et al. (arXiv:1811.03600). All functions take the rows of one
workload, by optimizer and batch size; nothing is interpolated between batch sizes.
"""

import itertools
import math
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from protocol import TIMING

Rows = list[dict[str, Any]]
Groups = dict[tuple[str, int], Rows]

# A doubling of the batch that saves less than this factor of the steps does not pay.
WORTHWHILE = 1.6


class Reached(NamedTuple):
    """How an optimizer reaches the target at a batch size.

    Attributes:
      steps: mean over the seeds of the setting that needs the fewest.
      seconds: of a processor, in all of these steps; compilation and evaluation apart.
      seeds: runs of that setting.
      learning_rate: of that setting.
      schedule: of that setting.
    """

    steps: float
    seconds: float | None
    seeds: int
    learning_rate: float
    schedule: str


def trajectory(row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and the loss of held-out examples; of the training where there are none.

    The latter is the mean over the last twentieth of the run, for it is noisy.
    """
    if row.get("evaluations"):
        steps, losses = np.transpose(row["evaluations"])
        return steps, losses
    losses = np.array(row["curve"])
    points = len(losses)
    # The last step of each of the sweep's bins.
    ends = np.cumsum([len(p) for p in np.array_split(np.arange(row["steps"]), points)])
    window = max(points // 20, 1)
    trailing = [losses[max(i - window + 1, 0) : i + 1].mean() for i in range(points)]
    return ends, np.array(trailing)


def steps_to(row: dict[str, Any], target: float) -> float | None:
    """Steps until the loss is first at the target, None if it never is.

    Between two evaluations of a run the logarithm of the loss counts as linear.

    Example:
      >>> row = {"evaluations": [[10, 4.0], [20, 1.0]], "steps": 20}
      >>> steps_to(row, 2.0), steps_to(row, 0.5), steps_to(row, 4.0)
      (15.0, None, 10.0)
    """
    if row["diverged"]:
        return None
    steps, losses = trajectory(row)
    below = np.flatnonzero(losses <= target)
    if not len(below):
        return None
    last = below[0]
    if last == 0:
        return float(steps[0])
    before, after = np.log(losses[last - 1 : last + 1])
    share = (before - math.log(target)) / (before - after)
    return float(steps[last - 1] + share * (steps[last] - steps[last - 1]))


def settings(rows: Rows) -> dict[tuple[float, str], Rows]:
    """Runs by learning rate and schedule, whatever their seed."""
    found: dict[tuple[float, str], Rows] = {}
    for row in rows:
        found.setdefault((row["learning_rate"], row["schedule"]), []).append(row)
    return found


def reached(rows: Rows, target: float) -> Reached | None:
    """The setting that needs the fewest steps, of those that always reach the target.

    Every run counts, those of the tuning too, so that a setting is chosen for this
    target from as many as the optimizer's budget has. (Where there are no evaluations
    during a run, the tests alone: tuning trains on fewer examples there.)
    """
    best = None
    comparable = [r for r in rows if "evaluations" in r or r["phase"] == "test"]
    for (rate, schedule), runs in settings(comparable).items():
        steps = [steps_to(row, target) for row in runs]
        if None in steps:
            continue
        mean = statistics.mean(s for s in steps if s is not None)
        seconds = step_seconds(rows)
        if best is None or mean < best.steps:
            in_all = None if seconds is None else mean * seconds
            best = Reached(mean, in_all, len(runs), rate, schedule)
    return best


def step_seconds(rows: Rows) -> float | None:
    """Of a processor, the median over runs; None where it was not measured.

    What was timed alone goes before the tests, and these before the tuning, whose
    steps are shorter where a batch is all of the training set but what is held out.
    Runs on a GPU share it with others: of these only what was timed alone counts.
    """
    measured = [row for row in rows if "step_seconds" in row]
    alone = [row for row in measured if row["phase"] == TIMING]
    shared = [row for row in measured if row.get("device", "cpu") == "cpu"]
    of_tests = [row for row in shared if row["phase"] == "test"]
    seconds = [row["step_seconds"] for row in alone or of_tests or shared]
    return statistics.median(seconds) if seconds else None


def final_loss(rows: Rows) -> float | None:
    """Mean over the test runs of the loss at the end, None if one diverged."""
    runs = [row for row in rows if row["phase"] == "test"]
    if not runs or any(row["diverged"] for row in runs):
        return None
    return statistics.mean(float(trajectory(row)[1][-1]) for row in runs)


def ranked(groups: Groups, peers: Iterable[str], size: int) -> list[tuple[float, str]]:
    """What each of the peers that are tested at a size ends with, the lowest first."""
    losses = [
        (loss, name)
        for name in peers
        if (loss := final_loss(groups.get((name, size), []))) is not None
    ]
    return sorted(losses, key=lambda pair: pair[0])


def target(groups: Groups, peers: Iterable[str], size: int) -> tuple[float, str] | None:
    """The loss to be reached: what the median of the peers tuned at a size ends with.

    At the smallest batch, for then it was known before any larger one was looked at.
    (Where all batches have the same epochs, at the largest: no other gets as far.)
    """
    losses = ranked(groups, peers, size)
    return losses[(len(losses) - 1) // 2] if losses else None


def critical_batch_size(steps: dict[int, float | None]) -> str:
    """Up to which batch size a doubling saves a factor of 1.6 of the steps.

    Args:
      steps: to the target, by batch size; None where it was not reached.

    Returns:
      A range, for all that is known is at which measured sizes it still paid.

    Example:
      >>> critical_batch_size({64: 800.0, 256: 220.0, 1024: 150.0})
      '256 to 1,024'
      >>> critical_batch_size({64: 800.0, 256: 220.0})
      'above 256'
    """
    sizes = sorted(steps)
    if not sizes or steps[sizes[0]] is None:
        return "–"
    if len(sizes) == 1:
        return "–"
    for small, large in itertools.pairwise(sizes):
        before, after = steps[small], steps[large]
        assert before is not None
        doublings = math.log2(large / small)
        if after is None or (before / after) ** (1 / doublings) < WORTHWHILE:
            return f"{small:,} to {large:,}"
    return f"above {sizes[-1]:,}"


def basin(rows: Rows, tolerance: float = 0.01) -> float | None:
    """The highest over the lowest rate at which the loss is within 1% of the best.

    Of the tuning runs with the first schedule. Between two rates the loss counts as
    linear in the logarithm of the rate.
    """
    by_rate = sensitivity(rows)
    if len(by_rate) < 3:
        return None
    rates, losses = map(np.array, zip(*sorted(by_rate.items()), strict=True))
    best = int(np.argmin(losses))
    limit = losses[best] + tolerance * abs(losses[best])

    def edge(step: int) -> float:
        """The logarithm of the rate at which the limit is crossed, or the grid ends."""
        inner = best
        while 0 <= inner + step < len(rates) and losses[inner + step] <= limit:
            inner += step
        outer = inner + step
        if not 0 <= outer < len(rates) or not math.isfinite(losses[outer]):
            return math.log(rates[inner])
        share = (limit - losses[inner]) / (losses[outer] - losses[inner])
        return math.log(rates[inner]) + share * math.log(rates[outer] / rates[inner])

    return math.exp(edge(1) - edge(-1))


def sensitivity(rows: Rows) -> dict[float, float]:
    """Loss at the end by learning rate, of the tuning with the first schedule."""
    tuning = [row for row in rows if row["phase"] == "tuning"]
    if not tuning:
        return {}
    first = tuning[0]["schedule"]
    found: dict[float, list[float]] = {}
    for row in tuning:
        if row["schedule"] == first:
            loss = math.inf if row["diverged"] else float(trajectory(row)[1][-1])
            found.setdefault(row["learning_rate"], []).append(loss)
    return {rate: statistics.mean(losses) for rate, losses in found.items()}

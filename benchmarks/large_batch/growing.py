"""A batch that grows from 32 examples to all of them: should the curvature come back?

    taskset -c 1 python benchmarks/large_batch/growing.py

The small autoencoder makes 600 steps by 32 images and 200 by all 1,797, three seeds:
with the state that it has, where noise has come to rule (no products any more), with a
new state at the change, whose steps the curvature chooses, and by the 200 alone.
"""

import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import protocol
import starts
import workloads
from running import train

SMALL, ALL = (32, 600), (1797, 200)  # examples, steps
OURS = workloads.OPTIMIZERS["nlcg by curvature"][0]


def ends(task: Any) -> Callable[[int], dict[str, float]]:
    """From a seed to the loss at the end of each way."""
    both = SMALL[1] + ALL[1]
    init, few = map(jax.jit, task.make(OURS, SMALL[0], both))
    _, all_of_them = map(jax.jit, task.make(OURS, ALL[0], both))
    anew, by_curvature = map(jax.jit, task.make(OURS, *ALL))
    arrays, (kept, evaluate, _) = jax.device_put(task.data), task.phase("test")

    def go_on(state: Any, step: Any, part: tuple[int, int], seed: int) -> Any:
        size, steps = part
        factors = np.ones(steps, np.float32)
        return train(step, state, arrays, kept, size, factors, seed)[0]

    def of(seed: int) -> dict[str, float]:
        start = go_on(init(np.int32(seed)), few, SMALL, seed)
        fresh = anew(np.int32(seed))
        found = {
            "at the change": start,
            "with the state that it has": go_on(start, all_of_them, ALL, seed),
            "with a new state": go_on(
                fresh._replace(params=start.params), by_curvature, ALL, seed
            ),
            "200 steps alone": go_on(fresh, by_curvature, ALL, seed),
        }
        return {name: evaluate(state)["loss"] for name, state in found.items()}

    return of


def main() -> None:
    task, _, _ = starts.of_workload("autoencoder", SMALL[0], None, None)
    of = ends(task)
    runs = [of(seed) for seed in protocol.TEST_SEEDS]
    for name in runs[0]:
        found = [run[name] for run in runs]
        each = ", ".join(f"{x:.3f}" for x in found)
        print(f"{name}: {statistics.mean(found):.3f} ({each})")


if __name__ == "__main__":
    main()

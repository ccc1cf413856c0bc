"""A run of a cell, as `sweep.py` and `gpu.py` make it: its steps, and its row."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import protocol

from nlcg_optax.training import data


def train(
    step: Callable[..., tuple],
    state: Any,
    arrays: Any,
    kept: np.ndarray,
    size: int,
    rates: np.ndarray,
    seed: int,
    after: Callable[[int, Any], None] = lambda count, state: None,
) -> tuple[Any, list[float]]:
    """The state after a step at each of the rates, and the losses.

    It ends early after a loss that is not finite.

    Args:
      step: from state, indices, arrays, rate and seed to state and loss.
      state: to begin with; a step may consume it.
      arrays: what the indices are of.
      kept: those of the examples that are trained on.
      size: of a batch.
      rates: one for each step.
      seed: of the order of examples, and of what a step draws.
      after: called after each step with how many there were, and with the state.
    """
    losses: list[Any] = []
    for i, rate in enumerate(rates):
        places = data.batch_indices(i, size, len(kept), seed)
        indices = kept[places].astype(np.int32)
        state, loss = step(state, indices, arrays, rate, np.int32(seed))
        losses.append(loss)
        # That of the step before, so that the device need not wait.
        if i and not math.isfinite(losses[-2]):
            break
        after(i + 1, state)
    jax.block_until_ready(state)
    return state, [float(loss) for loss in losses]


def outcome(
    cell: protocol.Cell,
    num_steps: int,
    losses: list[float],
    evaluate: Callable[[], dict],
) -> dict:
    """What a row says of a run, which is judged if it came through all its steps."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    scores = evaluate() if len(finite) == num_steps else {}
    diverged = not math.isfinite(scores.get("loss", math.nan))
    return {
        **cell._asdict(),
        "steps": num_steps,
        "diverged": diverged,
        "accuracy": None if diverged else scores.get("accuracy"),
        "loss": None if diverged else scores["loss"],
        "curve": protocol.thin(finite),
    }

r"""Whether a step did what its model promised: pure functions of a few numbers.

The loss after a step is seen with the next gradient, at no cost. It says how far to
trust the next model, by Levenberg and Marquardt's λ, and whether to keep the step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# After other steps λ comes back to what it was at first, by halves.
_SHRINK, _MAX_DAMPING = 0.5, 1e3
# After a step that is taken back λ is this much, or four times what it was.
_DAMPING_OF_REJECTED, _GROW_OF_REJECTED = 0.4, 4.0
# A step is taken back if the loss rose by more than what it was to fall, and by more
# than four times what the model is usually wrong by.
_TOLERATED_DECREASES, _TOLERATED_ERRORS = 1.0, 4.0
# Part of a new error in their average, which it exceeds three times at most.
_ERROR_WEIGHT, _ERROR_BOUND = 0.2, 3.0


class Verdict(NamedTuple):
    """What is thought of the last step.

    Attributes:
      pending: whether there was a step to judge.
      rejected: whether it is to be taken back.
      actual: how far the loss fell.
      damping: λ of the next step.
      model_error: average distance between the loss and its prediction.
    """

    pending: jax.Array
    rejected: jax.Array
    actual: jax.Array
    damping: jax.Array
    model_error: jax.Array


def judge(
    loss: jax.Array,
    prev_value: jax.Array,
    predicted: jax.Array,
    damping: jax.Array,
    model_error: jax.Array,
    base_damping: jax.Array,
) -> Verdict:
    """Judges the last step by the loss after it.

    Args:
      loss: what it is now.
      prev_value: what it was before the step.
      predicted: how far it should have fallen; 0 where there was no step.
      damping: λ of the step.
      model_error: the average error before it; 0 where there is none yet.
      base_damping: λ where all goes well.
    """
    pending = predicted > 0
    actual = prev_value - loss
    # Of two nearly equal losses little but rounding is seen.
    rounding = 8 * jnp.finfo(loss.dtype).eps * jnp.abs(prev_value)
    tolerated = jnp.maximum(
        _TOLERATED_DECREASES * predicted, _TOLERATED_ERRORS * model_error
    )
    # Not "fell by less": a loss that is no number is no success either.
    rejected = pending & ~(-actual <= jnp.maximum(tolerated, rounding))
    judged = pending & ~rejected

    lowered = jnp.maximum(_SHRINK * damping, base_damping)
    raised = jnp.maximum(_GROW_OF_REJECTED * damping, _DAMPING_OF_REJECTED)
    adapted = jnp.where(judged, lowered, damping)
    adapted = jnp.where(rejected, jnp.minimum(raised, _MAX_DAMPING), adapted)

    error = jnp.abs(predicted - actual)
    first = model_error == 0
    bounded = jnp.minimum(error, _ERROR_BOUND * model_error)
    average = model_error + _ERROR_WEIGHT * (bounded - model_error)
    new_error = jnp.where(judged, jnp.where(first, error, average), model_error)
    return Verdict(pending, rejected, actual, adapted, new_error)

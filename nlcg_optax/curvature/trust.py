r"""Whether a step did what its model promised: pure functions of a few numbers.

The loss after a step is seen with the next gradient, at no cost. It says whether to
keep the step, and how far to trust the next model: by a damping λ after Levenberg and
Marquardt.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# A step that is taken back adds four times λ to it, which then fades.
_GROW, _FADE = 4.0, 0.25
_MIN_DAMPING, _MAX_DAMPING = 0.1, 1e3
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
      extra_damping: what λ is to be beyond what it always is.
      model_error: average distance between the loss and its prediction.
    """

    pending: jax.Array
    rejected: jax.Array
    actual: jax.Array
    extra_damping: jax.Array
    model_error: jax.Array


def judge(
    loss: jax.Array,
    finite: jax.Array,
    prev_value: jax.Array,
    predicted: jax.Array,
    extra_damping: jax.Array,
    model_error: jax.Array,
    damping: jax.Array,
) -> Verdict:
    """Judges the last step by the loss after it.

    Args:
      loss: what it is now.
      finite: whether the gradient is.
      prev_value: what the loss was before the step.
      predicted: how far it should have fallen; 0 where there was no step.
      extra_damping: what λ of the step was beyond what it always is.
      model_error: the average error before it; 0 where there is none yet.
      damping: what λ always is.
    """
    pending = predicted > 0
    actual = prev_value - loss
    # Of two nearly equal losses little but rounding is seen.
    rounding = 8 * jnp.finfo(loss.dtype).eps * jnp.abs(prev_value)
    tolerated = jnp.maximum(
        _TOLERATED_DECREASES * predicted, _TOLERATED_ERRORS * model_error
    )
    # Not "fell by less": a loss that is no number is no success either.
    held = finite & (-actual <= jnp.maximum(tolerated, rounding))
    rejected, judged = pending & ~held, pending & held

    raised = jnp.maximum(jnp.maximum(extra_damping, damping), _MIN_DAMPING)
    raised = jnp.minimum(_GROW * raised, _MAX_DAMPING)
    faded = jnp.where(judged, _FADE * extra_damping, extra_damping)

    error = jnp.abs(predicted - actual)
    first = model_error == 0
    bounded = jnp.minimum(error, _ERROR_BOUND * model_error)
    average = model_error + _ERROR_WEIGHT * (bounded - model_error)
    new_error = jnp.where(judged, jnp.where(first, error, average), model_error)
    return Verdict(
        pending, rejected, actual, jnp.where(rejected, raised, faded), new_error
    )

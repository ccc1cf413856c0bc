r"""Whether a step did what its model promised: pure functions of a few numbers.

The loss after a step is seen with the next gradient, at no cost. It says whether to
keep the step, and how far to trust the next model: by a damping λ after Levenberg and
Marquardt.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nlcg_optax.curvature import subspace
from nlcg_optax.curvature.state import LastStep, Trust

# A step that is taken back keeps this part of its length.
BACKTRACK = 0.25
# No step is to take more off a positive loss than this many times what there is.
MAX_DECREASE = 2.0
# A step that is taken back adds four times λ to it, which then fades.
_GROW, _FADE = 4.0, 0.25
_MIN_DAMPING, _MAX_DAMPING = 0.1, 1e3
# A step is taken back if the loss rose by more than what it was to fall, and by more
# than four times what the model is usually wrong by.
_TOLERATED_DECREASES, _TOLERATED_ERRORS = 1.0, 4.0
# Part of a new error in their average, which it exceeds three times at most.
_ERROR_WEIGHT, _ERROR_BOUND = 0.2, 3.0


# The curvature's own loss is the gradient's to so much, where both are of one batch,
# and to such a factor where it is of a part.
SAME_LOSS, LIKE_LOSS = 0.02, 10.0
# Predictions that are wrong by one factor: by how much, how steadily (as a part of its
# logarithm), and from which step on that is said.
_WRONG_FACTOR, _STEADY, _SEEN = 1.7, 0.3, 6
# Part of a new logarithm in their average, the largest that is taken, and how many
# times what rounding may do a prediction has to be.
_RATIO_WEIGHT, _LARGEST_LOG, _BEYOND_ROUNDING = 0.2, 7.0, 100.0


class Verdict(NamedTuple):
    """What is thought of the last step.

    Attributes:
      rejected: whether it is to be taken back.
      trust: what becomes of the trust, but for λ.
    """

    rejected: jax.Array
    trust: Trust


def judge(
    loss: jax.Array,
    finite: jax.Array,
    last: LastStep,
    trust: Trust,
    damping: jax.Array,
    count: jax.typing.ArrayLike,
) -> Verdict:
    """Judges the last step by the loss after it.

    Args:
      loss: what it is now.
      finite: whether the slopes along all directions are.
      last: the step; of length zero where there was none.
      trust: how far its model was believed.
      damping: what λ always is.
      count: steps so far.
    """
    predicted, model_error = last.predicted_decrease, trust.model_error
    pending = predicted > 0
    actual = last.prev_value - loss
    # Of two nearly equal losses little but rounding is seen.
    rounding = 8 * jnp.finfo(loss.dtype).eps * jnp.abs(last.prev_value)
    tolerated = jnp.maximum(
        _TOLERATED_DECREASES * predicted, _TOLERATED_ERRORS * model_error
    )
    # Not "fell by less": a loss that is no number is no success either.
    held = finite & (-actual <= jnp.maximum(tolerated, rounding))
    rejected, judged = pending & ~held, pending & held

    raised = jnp.maximum(jnp.maximum(trust.extra_damping, damping), _MIN_DAMPING)
    raised = jnp.minimum(_GROW * raised, _MAX_DAMPING)
    faded = jnp.where(judged, _FADE * trust.extra_damping, trust.extra_damping)

    error = jnp.abs(predicted - actual)
    bounded = jnp.minimum(error, _ERROR_BOUND * model_error)
    average = model_error + _ERROR_WEIGHT * (bounded - model_error)
    new_error = jnp.where(model_error == 0, error, average)
    # What is beyond rounding tells whether predictions are wrong by one factor.
    seen = pending & (predicted > _BEYOND_ROUNDING * rounding)
    log_ratio, spread = _ratio(actual, predicted, trust, count)
    return Verdict(
        rejected,
        trust._replace(
            extra_damping=jnp.where(rejected, raised, faded),
            actual_decrease=jnp.where(pending, actual, trust.actual_decrease),
            model_error=jnp.where(judged, new_error, model_error),
            log_ratio=jnp.where(seen, log_ratio, trust.log_ratio),
            log_ratio_spread=jnp.where(seen, spread, trust.log_ratio_spread),
        ),
    )


def _ratio(
    actual: jax.Array, predicted: jax.Array, trust: Trust, count: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Average logarithm of the actual decrease over the predicted, and its spread."""
    fell = (actual > 0) & (predicted > 0)
    ratio = jnp.where(fell, actual, 1) / jnp.where(fell, predicted, 1)
    log = jnp.clip(jnp.log(ratio), -_LARGEST_LOG, _LARGEST_LOG)
    # A loss that rose has no such logarithm: it is far from any.
    log = jnp.where(fell, log, trust.log_ratio)
    # Of the first step there is nothing to see, so the second has all the weight.
    weight = 1 / jnp.maximum(jnp.asarray(count), 1).astype(log.dtype)
    weight = jnp.maximum(weight, _RATIO_WEIGHT)
    average = trust.log_ratio + weight * (log - trust.log_ratio)
    spread = trust.log_ratio_spread
    distance = jnp.where(fell, jnp.abs(log - average), _LARGEST_LOG)
    return average, spread + weight * (distance - spread)


def mismatch(
    loss: jax.Array,
    own_loss: jax.Array,
    fraction: float | None,
    flat: jax.Array,
    trust: Trust,
    count: jax.typing.ArrayLike,
) -> jax.Array:
    """Whether loss, gradient and curvature do not fit together.

    Args:
      loss: what `update` was given.
      own_loss: what the curvature makes of its own batch.
      fraction: the part of the loss's batch that this is; None for unknown.
      flat: whether there is no curvature along the gradient, though there is a slope.
      trust: what became of earlier predictions.
      count: steps so far.
    """
    if fraction == 1:
        largest = jnp.maximum(jnp.abs(loss), jnp.abs(own_loss))
        differs = jnp.abs(loss - own_loss) > SAME_LOSS * largest
    else:
        small, large = jnp.minimum(loss, own_loss), jnp.maximum(loss, own_loss)
        differs = (small > 0) & (large > LIKE_LOSS * small)
    size = jnp.abs(trust.log_ratio)
    wrong = (size > jnp.log(_WRONG_FACTOR)) & (trust.log_ratio_spread < _STEADY * size)
    return differs | flat | (wrong & (jnp.asarray(count) >= _SEEN))


def shorten(
    norm: jax.Array,
    longest: jax.Array,
    slope: jax.Array,
    curved: jax.Array,
    loss: jax.Array,
    model_rules: jax.Array | None,
) -> jax.Array:
    """The part of a step that is taken: 1, or less where it is too long.

    Args:
      norm: its length.
      longest: the length allowed; 0 for any.
      slope: by how far the loss falls by its slope along the step.
      curved: the curvature along it.
      loss: what there is to fall.
      model_rules: whether the model is asked how far a loss falls that is never below
        zero; None where it may be.
    """
    too_long = (longest > 0) & (norm > longest)
    ratio = jnp.where(too_long, longest / jnp.where(too_long, norm, 1), 1)
    if model_rules is None:
        return ratio
    part = subspace.part_that_falls(slope, curved, MAX_DECREASE * loss)
    doubted = model_rules & (loss > 0)
    return jnp.where(doubted, jnp.minimum(ratio, part), ratio)

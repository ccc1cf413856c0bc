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

# A step that is taken back keeps this part of its length, and nothing the second time.
# What the loss is then is no fault of the step.
BACKTRACK, MOST_REJECTIONS = 0.25, 2
# No step is to take more off a positive loss than this many times what there is.
MAX_DECREASE = 2.0
# A step that is taken back adds four times λ to it, which then fades.
_GROW, _FADE = 4.0, 0.25
_MIN_DAMPING, _MAX_DAMPING = 0.1, 1e3
# A step is taken back if the loss rose by more than what it was to fall, and by more
# than four times what the model is usually wrong by: from the lowest loss so far, where
# all are of the same data, and what is beyond that is no usual error. (By a tolerance
# that grows with each rise a loss could climb without end.)
_TOLERATED_DECREASES, _TOLERATED_ERRORS = 1.0, 4.0
# Part of a new error in their average, which it exceeds three times at most.
_ERROR_WEIGHT, _ERROR_BOUND = 0.2, 3.0
# Part of the last sign in their average, and from where on a loss climbs: no rise is
# tolerated then. It takes four in a row, or six after falls; of losses that noise alone
# moves, every other one falls.
_TREND_WEIGHT, _CLIMBS = 0.3, -0.7
# There is as good as no curvature along the gradient if there is a hundred times less
# than usually, if the loss would fall by ten times the most that is believed, or if a
# model that was nearly a straight line did not hold. Once there was none the next model
# is asked only if by it the loss falls by no more than itself, or steps along lines and
# of models would take turns, and undo each other.
_FLAT, _DOUBTED, _ASKED_AGAIN = 100.0, 10.0, 0.5
_CURVATURE_WEIGHT = 0.2
# Then steps are judged by the loss: it has to fall by half of what the slope promises
# for the next to be longer, and by a quarter for it not to be shorter. A model of this
# part of curvature is a straight line, by whose promise no loss may rise. Of a promise
# that rounding hides nothing is seen.
_LONGER, _SHORTER, _STRAIGHT = 0.5, 0.25, 0.3
# The first has this part of the length of the parameters, and this root mean square.
_FIRST_PART, _FIRST_RMS = 0.01, 1e-4


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
      kept: the part of it that stays then.
      new_level: whether the loss stayed up though the step was wholly taken back.
      unseen: whether the step was to change the loss by less than rounding does.
      trust: what becomes of the trust, but for λ.
    """

    rejected: jax.Array
    kept: jax.Array
    new_level: jax.Array
    unseen: jax.Array
    trust: Trust


def judge(
    loss: jax.Array,
    finite: jax.Array,
    last: LastStep,
    trust: Trust,
    damping: jax.Array,
    count: jax.typing.ArrayLike,
    same_data: bool,
) -> Verdict:
    """Judges the last step by the loss after it, whatever its model promised.

    Args:
      loss: what it is now.
      finite: whether the slopes along all directions are.
      last: the step; of length zero where there was none.
      trust: how far its model was believed.
      damping: what λ always is.
      count: steps so far.
      same_data: whether each loss is of the same data.
    """
    predicted, model_error = last.predicted_decrease, trust.model_error
    pending = (last.prev_slope != 0) | (last.prev_curvature != 0)
    rejections = jnp.asarray(trust.rejections)
    taken_back = rejections >= MOST_REJECTIONS
    actual = last.prev_value - loss
    # Of two nearly equal losses little but rounding is seen.
    rounding = 8 * jnp.finfo(loss.dtype).eps * jnp.abs(last.prev_value)
    # A straight line promises more the farther it goes.
    straight = jnp.abs(last.prev_curvature) < _STRAIGHT * last.prev_slope
    promise = jnp.where(straight, 0, _TOLERATED_DECREASES * predicted)
    tolerated = jnp.maximum(promise, _TOLERATED_ERRORS * model_error)
    climbs = trust.trend < _CLIMBS
    climb = jnp.maximum(trust.climb - actual, 0) if same_data else trust.climb
    high = climb > jnp.maximum(tolerated, rounding)
    tolerated = jnp.where(climbs | high, 0, tolerated)
    # Not "fell by less": a loss that is no number is no success either.
    held = finite & (-actual <= jnp.maximum(tolerated, rounding))
    rejected, judged = pending & ~held, pending & held
    new_level = taken_back & ~held & finite & jnp.isfinite(loss)

    raised = jnp.maximum(jnp.maximum(trust.extra_damping, damping), _MIN_DAMPING)
    raised = jnp.minimum(_GROW * raised, _MAX_DAMPING)
    extra_damping = jnp.where(rejected, raised, trust.extra_damping)
    extra_damping = jnp.where(judged, _FADE * extra_damping, extra_damping)
    # It was not the step.
    extra_damping = jnp.where(
        new_level, extra_damping / _GROW**MOST_REJECTIONS, extra_damping
    )

    error = jnp.abs(predicted - actual)
    # What a line promised too much is no noise of the loss. Nor is what any model did
    # where the loss is above its lowest.
    error = jnp.where(
        straight | (trust.climb > 0), jnp.minimum(error, jnp.abs(actual)), error
    )
    bounded = jnp.minimum(error, _ERROR_BOUND * model_error)
    # A level that is new says at once by how much a loss moves by itself.
    bounded = jnp.where(new_level, error, bounded)
    average = model_error + _ERROR_WEIGHT * (bounded - model_error)
    new_error = jnp.where(model_error == 0, error, average)
    # Of losses that jump up and down by turns some are rejected, until that is known.
    learned = (rejected & (model_error > 0)) | new_level
    learned = judged | (learned & jnp.isfinite(error))
    learned &= ~high | new_level
    fell = jnp.where(jnp.abs(actual) <= rounding, 0, jnp.sign(actual))
    trend = trust.trend + _TREND_WEIGHT * (fell - trust.trend)
    # What is beyond rounding tells whether predictions are wrong by one factor.
    seen = pending & (predicted > _BEYOND_ROUNDING * rounding)
    log_ratio, spread = _ratio(actual, predicted, trust, count)
    unseen = pending & (last.prev_slope <= rounding)
    # Of what the slope promises as much as comes of predictions.
    part = jnp.minimum(jnp.exp(trust.log_ratio), 1)
    promised = jnp.where(_is_steady(trust, count), part, 1) * last.prev_slope
    return Verdict(
        rejected,
        jnp.where(rejections + 1 < MOST_REJECTIONS, BACKTRACK, 0).astype(loss.dtype),
        new_level,
        unseen,
        trust._replace(
            extra_damping=extra_damping,
            actual_decrease=jnp.where(pending, actual, trust.actual_decrease),
            model_error=jnp.where(learned, new_error, model_error),
            log_ratio=jnp.where(seen, log_ratio, trust.log_ratio),
            log_ratio_spread=jnp.where(seen, spread, trust.log_ratio_spread),
            rejections=jnp.where(rejected, rejections + 1, 0),
            trend=jnp.where(new_level, 0, jnp.where(judged, trend, trust.trend)),
            climb=jnp.where(new_level, 0, jnp.where(judged, climb, trust.climb)),
            length_factor=jnp.where(
                judged & straight & seen, _length_factor(actual, promised), 1
            ),
        ),
    )


def _length_factor(actual: jax.Array, promised: jax.Array) -> jax.Array:
    """How much longer the next step is to be, after one along a straight line."""
    longer = jnp.where(actual > _LONGER * promised, 2, 1)
    return jnp.where(actual < _SHORTER * promised, 0.5, longer).astype(actual.dtype)


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


def told(
    trust: Trust,
    loss: jax.Array,
    own_loss: jax.Array,
    way: jax.Array,
    by_model: jax.Array,
    count: jax.typing.ArrayLike,
) -> Trust:
    """The trust, with what a step tells of the loss and of the multiplier.

    Args:
      trust: before.
      loss: what `update` was given.
      own_loss: what the curvature makes of its own batch.
      way: the part of the way to the minimum of the model that the step goes.
      by_model: whether the model made the step.
      count: steps so far.
    """
    weight = 1 / (1 + jnp.asarray(count).astype(loss.dtype))
    weight = jnp.maximum(weight, _RATIO_WEIGHT)
    comparable = (loss > 0) & (own_loss > 0)
    ratio = jnp.where(comparable, own_loss, 1) / jnp.where(comparable, loss, 1)
    log = jnp.clip(jnp.log(ratio), -_LARGEST_LOG, _LARGEST_LOG) - trust.log_loss_ratio
    log = jnp.where(comparable & by_model, log, 0)
    way = jnp.where(by_model, way - trust.way, 0)
    return trust._replace(
        log_loss_ratio=trust.log_loss_ratio + weight * log,
        way=trust.way + weight * way,
    )


def mismatch(
    loss: jax.Array,
    own_loss: jax.Array,
    fraction: float | None,
    trust: Trust,
    count: jax.typing.ArrayLike,
) -> jax.Array:
    """Whether loss, gradient and curvature do not fit together.

    Args:
      loss: what `update` was given.
      own_loss: what the curvature makes of its own batch.
      fraction: the part of the loss's batch that this is; None for unknown.
      trust: what became of earlier predictions.
      count: steps so far.
    """
    if fraction == 1:
        largest = jnp.maximum(jnp.abs(loss), jnp.abs(own_loss))
        differs = jnp.abs(loss - own_loss) > SAME_LOSS * largest
    else:
        small, large = jnp.minimum(loss, own_loss), jnp.maximum(loss, own_loss)
        differs = (small > 0) & (large > LIKE_LOSS * small)
    return differs | _is_steady(trust, count)


def _is_steady(trust: Trust, count: jax.typing.ArrayLike) -> jax.Array:
    """Whether predictions are wrong by one factor, after so many steps."""
    size = jnp.abs(trust.log_ratio)
    wrong = (size > jnp.log(_WRONG_FACTOR)) & (trust.log_ratio_spread < _STEADY * size)
    return wrong & (jnp.asarray(count) >= _SEEN)


def lacks_curvature(
    slope: jax.Array,
    curved: jax.Array,
    square: jax.Array,
    usual: jax.Array,
    most: jax.Array | None,
    length_factor: jax.Array,
    after_flat: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Whether there is as good as no curvature along z, and how much there usually is.

    Args:
      slope: along z.
      curved: the curvature along it.
      square: the square of its length.
      usual: the curvature for a length of 1, the geometric average; 0 for unknown.
      most: what a loss that is never below zero may fall by; None for any other.
      length_factor: below 1 where the last model was a straight line and did not hold.
      after_flat: whether the last step was along the gradient alone.
    """
    curved = jnp.abs(curved)
    here = curved / jnp.where(square > 0, square, 1)
    flat = (curved == 0) | (_FLAT * here < usual) | (length_factor < 1)
    if most is not None:
        # By quotients: the squares of huge losses' slopes are out of range.
        part = curved / jnp.where(slope > 0, slope, 1)
        doubted = jnp.where(after_flat, _ASKED_AGAIN, _DOUBTED).astype(part.dtype)
        flat |= (most > 0) & (0.5 * slope > doubted * most * part)
    known = jnp.where(usual > 0, usual, here)
    logs = [jnp.log(jnp.where(here > 0, x, 1)) for x in (known, here)]
    average = jnp.exp(logs[0] + _CURVATURE_WEIGHT * (logs[1] - logs[0]))
    return flat & (slope > 0), jnp.where(here > 0, average, usual)


def first_length(norm: jax.Array, size: int) -> jax.Array:
    """Of a step without curvature, where there was none before.

    Args:
      norm: the length of the parameters.
      size: how many they are.
    """
    return _FIRST_PART * norm + _FIRST_RMS * size**0.5


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

r"""When noise rules, and what a step does then.

The best step for one batch is too short for the average over many (Wu et al., 2018,
arXiv:1803.02021). So once most of the slope along a step turns out to be noise, another
direction takes over, whose rate follows what noise costs
(:mod:`nlcg_optax.step_sizes.noise_balance`). That begins with the mean of the best
lengths along z until then.
"""

import jax
import jax.numpy as jnp

from nlcg_optax.curvature.state import LastStep, Noise

# Noise rules once the share of signal is below this.
_RULED_BY_NOISE = 0.4
# Before noise may rule the signal was measured so often, and after it there is time for
# so many steps: five times the memory of β = 0.9.
_MEASUREMENTS, _STEPS_LEFT = 8, 50
# What the curvature may cost: in parts of the run's examples, and in parts of its
# gradients, of which the products of a step with four directions and two residual ones
# cost about six on as many examples.
_PART, _GRADIENTS = 0.2, 6.0
# The last measurement's part in an average, once there are ten.
_WEIGHT = 0.1
# A smaller share of signal counts as this much.
_LEAST_SHARE = 0.05
# The last step's part in the average slopes, and what they begin with: how far steps
# overshoot, in parts of their slope.
_NEWEST, _OVERSHOOT = 0.05, 0.5
# By how much the logarithm of the newest gradient's part in a direction falls with the
# overshoot, and the least that it has.
_FALL, _LEAST_PART = 5.5, 0.01
# A gradient so many times as large as usual is left out.
_OUTLIER = 30.0


def mean(old: jax.Array, new: jax.Array, count: jax.typing.ArrayLike) -> jax.Array:
    """The mean of so many numbers, with one more."""
    return old + (new - old) / (1 + jnp.asarray(count).astype(old.dtype))


def average(old: jax.Array, new: jax.Array, count: jax.typing.ArrayLike) -> jax.Array:
    """The average with one more number: at first of all that were, then of about ten.

    Args:
      old: the average of so many numbers before, and of where it started.
      new: the number.
      count: how many there were before.
    """
    weight = 1 / (1 + jnp.asarray(count).astype(old.dtype))
    return old + jnp.maximum(weight, _WEIGHT) * (new - old)


def share_of_signal(
    slope: jax.Array, prev_slope: jax.Array, prev_curvature: jax.Array
) -> jax.Array:
    r"""Which share of the slope along the last step was no noise.

    Without noise the slope along the last step :math:`-u` is now
    :math:`u^\top g - u^\top C u`. Of a noisy gradient the noise that had made it seem
    steeper is gone then.

    Args:
      slope: :math:`u^\top g` with the gradient after the step.
      prev_slope: the same with the gradient before it, positive.
      prev_curvature: :math:`u^\top C u`.
    """
    return jnp.clip((slope + prev_curvature) / prev_slope, 0, 1)


def ratio(share: jax.Array) -> jax.Array:
    """Noise over signal, from the share of signal: 19 at most."""
    return (1 - share) / jnp.maximum(share, _LEAST_SHARE)


def measure(
    signal: jax.Array,
    last: LastStep,
    slope: jax.Array,
    curved: jax.Array,
    stored: jax.typing.ArrayLike,
) -> jax.Array:
    """The average share of signal, with what the new gradient tells of the last step.

    Args:
      signal: the average before.
      last: the step.
      slope: of the new gradient along it.
      curved: the curvature along it.
      stored: steps taken.
    """
    measured = last.prev_slope > 0
    steep = jnp.where(measured, last.prev_slope, 1)
    share = share_of_signal(slope, steep, curved)
    return jnp.where(measured, average(signal, share, stored), signal)


def best_length(
    log_length: jax.Array,
    slope: jax.Array,
    curved: jax.Array,
    stored: jax.typing.ArrayLike,
) -> jax.Array:
    """The mean logarithm of the best lengths along z, with that of this step.

    Args:
      log_length: the mean before.
      slope: along the preconditioned gradient z.
      curved: the curvature along it.
      stored: steps taken.
    """
    steep = (curved > 0) & (slope > 0)  # elsewhere there is none
    length = jnp.log(jnp.where(steep, slope / jnp.where(steep, curved, 1), 1))
    return jnp.where(steep, mean(log_length, length, stored), log_length)


def contradicts(last: LastStep, slope: jax.Array, curved: jax.Array) -> jax.Array:
    r"""Whether the next batch says that the last step rose by more than it was to fall.

    By that batch the loss rose along the step u by
    :math:`-u^\top g - \tfrac{1}{2} u^\top C u`, with its gradient after the step.

    Args:
      last: the step.
      slope: of the new gradient along it, :math:`u^\top g`.
      curved: the new curvature along it, :math:`u^\top C u`.
    """
    pending = last.predicted_decrease > 0
    return pending & (-slope - 0.5 * curved > last.predicted_decrease)


def rules(
    signal: jax.Array,
    measurements: jax.typing.ArrayLike,
    contradicted: jax.Array,
    examples: jax.Array,
    count: jax.typing.ArrayLike,
    horizon: jax.typing.ArrayLike,
) -> jax.Array:
    """Whether noise rules from the next step on.

    It does where little is signal, which takes eight measurements, or a step that the
    next batch contradicts; or where products have cost a fifth of what the gradients of
    the run cost; but for a remainder that is too short, unless the curvature was taken
    on a fifth of the run's examples.

    Args:
      signal: the average share of signal, by the next batch.
      measurements: how often it was measured.
      contradicted: whether the next batch contradicts the last step.
      examples: on how many the curvature was taken, in batches.
      count: steps so far.
      horizon: steps in all; infinite where that is not known.
    """
    dtype = signal.dtype
    horizon = jnp.asarray(horizon).astype(dtype)
    known = contradicted | (jnp.asarray(measurements) >= _MEASUREMENTS)
    most = _PART * horizon * (1 - 1e-4)  # whatever rounding does
    spent = _GRADIENTS * examples >= most
    time_left = jnp.asarray(count).astype(dtype) + _STEPS_LEFT <= horizon
    ruled = (known & (signal < _RULED_BY_NOISE)) | spent
    return (ruled & time_left) | (examples >= most)


def slopes(known: Noise, last_slope: jax.Array, next_slope: jax.Array) -> Noise:
    """With the average slopes along a step, by its own gradient and by the next one.

    Args:
      known: with those before.
      last_slope: along the last step by its own gradient; 0 where there was no step.
      next_slope: along that step by the gradient of now.
    """
    first = known.slope == 0
    before = (
        jnp.where(first, last_slope, known.slope),
        jnp.where(first, -_OVERSHOOT * last_slope, known.next_slope),
    )
    after = [
        old + _NEWEST * (new - old)
        for old, new in zip(before, (last_slope, next_slope), strict=True)
    ]
    measured = (last_slope != 0) & jnp.isfinite(next_slope) & jnp.isfinite(last_slope)
    outlier = is_outlier(known, next_slope)
    measured &= ~outlier
    # The next one of that size is none: the loss may have another scale from now on.
    usual = jnp.where(outlier, known.slope, 1)
    scale = jnp.where(outlier, jnp.abs(next_slope), 1) / usual
    return known._replace(
        slope=scale * jnp.where(measured, after[0], known.slope),
        next_slope=scale * jnp.where(measured, after[1], known.next_slope),
    )


def is_outlier(known: Noise, next_slope: jax.Array) -> jax.Array:
    """Whether a gradient is far larger than those before it, along the last step.

    Averages of its squares would make steps short for hundreds of steps.

    Args:
      known: with the average slopes before.
      next_slope: along the last step by the gradient of now.
    """
    larger = jnp.abs(next_slope) > _OUTLIER * known.slope
    return (known.slope > 0) & larger & jnp.isfinite(next_slope)


def mean_weight(known: Noise) -> jax.Array:
    r"""The averaged gradient's part in a direction; the newest one has the rest.

    Where steps overshoot, the newest gradient mostly points back, and the average has
    what leads along the valley. Where they do not, the newest one knows best what is
    still to gain. With the overshoot :math:`o` that is

    .. math::
        k = 1 - e^{-5.5\, o}, \quad
        o = -\frac{\text{slope along the last step by the new gradient}}
            {\text{slope along it by its own}}

    (both averaged over some twenty steps): 0 where steps end short of the minimum of
    the new batch along them, 0.42 at o = 0.1, 0.94 at 0.5, and 0.99 at most.

    Args:
      known: with these slopes.
    """
    # Where the last steps climbed they tell nothing.
    overshoot = jnp.where(known.slope > 0, known.overshoot, _OVERSHOOT)
    part = jnp.exp(-_FALL * jnp.maximum(overshoot, 0))
    return 1 - jnp.maximum(part, _LEAST_PART)

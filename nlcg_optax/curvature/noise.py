r"""What a step does where noise rules: pure functions of a few numbers.

The best step for one batch is too short for the average over many (Wu et al., 2018,
arXiv:1803.02021). So once most of the slope along a step turns out to be noise, NLCG's
own direction takes over,

.. math::
    d_t = z_t + \beta_t d_{t-1}, \qquad u_t = \alpha_t (z_t + \beta_t d_t), \qquad
    \beta_t = \min(g_t^\top z_t / g_{t-1}^\top z_{t-1},\, 0.9)

(:func:`scale_by_conjugate_direction`). Its rate is at first the average of the best
lengths along z until then: of all of them, for the nearer the loss comes to where noise
holds it, the shorter they get.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nlcg_optax import _tree
from nlcg_optax.curvature.state import LastStep, Noise
from nlcg_optax.directions.conjugate import (
    ConjugateDirectionState,
    scale_by_conjugate_direction,
)

# Noise rules once the share of signal is below this.
_RULED_BY_NOISE = 0.4
# Before noise may rule the signal was measured so often, and after it there is time for
# so many steps: five times the memory of β = 0.9.
_MEASUREMENTS, _STEPS_LEFT = 8, 50
_BETA_BOUNDS = (0.0, 0.9)
# The last measurement's part in an average, once there are ten.
_WEIGHT = 0.1
# A smaller share of signal counts as this much.
_LEAST_SHARE = 0.05


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
    noise: Noise, last: LastStep, slope: jax.Array, stored: jax.typing.ArrayLike
) -> jax.Array:
    """The average share of signal, with what the new gradient tells of the last step.

    Args:
      noise: what was known before.
      last: the step.
      slope: of the new gradient along it.
      stored: steps taken.
    """
    measured = ~noise.handed_over & (last.prev_slope > 0)
    steep = jnp.where(measured, last.prev_slope, 1)
    share = share_of_signal(slope, steep, last.prev_curvature)
    return jnp.where(measured, average(noise.signal, share, stored), noise.signal)


def best_length(
    noise: Noise, slope: jax.Array, curved: jax.Array, stored: jax.typing.ArrayLike
) -> jax.Array:
    """The mean logarithm of the best lengths along z, with that of this step.

    Args:
      noise: what was known before.
      slope: along the preconditioned gradient z.
      curved: the curvature along it.
      stored: steps taken.
    """
    steep = (curved > 0) & (slope > 0)  # elsewhere there is none
    length = jnp.log(jnp.where(steep, slope / jnp.where(steep, curved, 1), 1))
    length = mean(noise.log_length, length, stored)
    return jnp.where(noise.handed_over | ~steep, noise.log_length, length)


class Stage(NamedTuple):
    """What follows the hand-over.

    Attributes:
      active: whether noise rules.
      starts: whether it does so from this step on.
      rate: α before it decays; 0 while noise does not rule.
      since: the count at the hand-over.
      size: α now.
    """

    active: jax.Array
    starts: jax.Array
    rate: jax.Array
    since: jax.typing.ArrayLike
    size: jax.Array


def hand_over(
    noise: Noise,
    signal: jax.Array,
    log_length: jax.Array,
    measurements: jax.typing.ArrayLike,
    count: jax.typing.ArrayLike,
    horizon: jax.typing.ArrayLike | None,
) -> Stage:
    """Decides whether noise rules, and how long the steps then are.

    Args:
      noise: what was known before this step.
      signal: the average share of signal.
      log_length: mean logarithm of the best length along z.
      measurements: how often the signal was measured.
      count: steps before this one.
      horizon: steps in all; None where noise never rules.
    """
    horizon = 0 if horizon is None else horizon
    starts = ~noise.handed_over & (signal < _RULED_BY_NOISE)
    starts &= jnp.asarray(measurements) >= _MEASUREMENTS
    starts &= jnp.asarray(count) + _STEPS_LEFT <= horizon
    rate = jnp.where(starts, jnp.exp(log_length), noise.rate)
    since = jnp.where(starts, count, noise.rate_since)
    done = (count - since).astype(rate.dtype)
    done = jnp.clip(done / jnp.maximum(horizon - since, 1).astype(rate.dtype), 0, 1)
    size = 0.5 * rate * (1 + jnp.cos(jnp.pi * done))
    return Stage(noise.handed_over | starts, starts, rate, since, size)


class Direction(NamedTuple):
    """NLCG's own direction.

    Attributes:
      look_ahead: what the step goes along, z + β d.
      direction: d itself.
      beta: β.
    """

    look_ahead: Any
    direction: Any
    beta: jax.Array


def direction(
    noise: Noise,
    starts: jax.Array,
    grad: Any,
    preconditioned: Any,
    prev_direction: Any,
    axis_name: _tree.AxisName | None,
) -> Direction:
    """The next direction of NLCG, over a preconditioned gradient that is known.

    Args:
      noise: what was known before this step.
      starts: whether the direction starts anew.
      grad: g.
      preconditioned: z.
      prev_direction: the last direction.
      axis_name: as in `scale_by_quadratic_model`.
    """
    known = optax.stateless(lambda updates, params=None: preconditioned)
    nlcg = scale_by_conjugate_direction(
        "fletcher_reeves",
        known,
        beta_bounds=_BETA_BOUNDS,
        nesterov=True,
        epsilon=0.0,
        track_cosine=False,
        axis_name=axis_name,
    )
    zero = jnp.zeros_like(noise.prev_g_z)
    state: Any = ConjugateDirectionState(
        count=jnp.where(starts, 0, 1),
        preconditioner_state=optax.EmptyState(),
        prev_update=prev_direction,
        prev_preconditioned=None,
        prev_grad=None,
        prev_g_z=noise.prev_g_z,
        prev_g_d=zero,
        prev_d_d=zero,
        beta=zero,
        cosine=zero,
        restarts=jnp.zeros([], jnp.int32),
    )
    look_ahead, state = nlcg.update(jax.tree.map(_tree.lift, grad), state)
    return Direction(look_ahead, state.prev_update, state.beta)

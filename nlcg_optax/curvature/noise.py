r"""What a step does where noise rules: pure functions of a few numbers.

The best step for one batch is too short for the average over many (Wu et al., 2018,
arXiv:1803.02021). So once most of the slope along a step turns out to be noise, NLCG's
own direction takes over,

.. math::
    d_t = z_t + \beta_t d_{t-1}, \qquad u_t = \alpha_t (z_t + \beta_t d_t), \qquad
    \beta_t = \min(g_t^\top z_t / g_{t-1}^\top z_{t-1},\, 0.9) ,

whose rate is at first the average of the best lengths along z until then: of all of
them, for the nearer the loss comes to where noise holds it, the shorter they get.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Noise rules once the share of signal is below this.
_RULED_BY_NOISE = 0.4
# Before noise may rule the signal was measured so often, and after it there is time for
# so many steps: five times the memory of β = 0.9.
_MEASUREMENTS, _STEPS_LEFT = 8, 50
_MAX_BETA = 0.9
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


class Course(NamedTuple):
    """How NLCG's own direction goes on.

    Attributes:
      active: whether it rules.
      rate: α before it decays; 0 while it does not rule.
      since: the count when it took over.
      gradient: the coefficient of the preconditioned gradient z in the step.
      direction: that of the last direction.
      beta: what the new direction has of the last one.
    """

    active: jax.Array
    rate: jax.Array
    since: jax.Array
    gradient: jax.Array
    direction: jax.Array
    beta: jax.Array


def set_course(
    signal: jax.Array,
    rate: jax.Array,
    since: jax.typing.ArrayLike,
    log_length: jax.Array,
    measurements: jax.typing.ArrayLike,
    g_z: jax.Array,
    prev_g_z: jax.Array,
    count: jax.typing.ArrayLike,
    horizon: jax.typing.ArrayLike,
) -> Course:
    """Decides whether NLCG's own direction rules, and how the step is made of it.

    Args:
      signal: the average share of signal.
      rate: of a course that rules already; otherwise 0.
      since: the count when it took over.
      log_length: mean logarithm of the best length along z.
      measurements: how often the signal was measured.
      g_z: gᵀz.
      prev_g_z: gᵀz of the last step.
      count: steps before this one.
      horizon: steps in all; 0 for a direction that never takes over.
    """
    ruled = rate > 0
    starts = ~ruled & (signal < _RULED_BY_NOISE)
    starts &= jnp.asarray(measurements) >= _MEASUREMENTS
    starts &= jnp.asarray(count) + _STEPS_LEFT <= horizon
    rate = jnp.where(starts, jnp.exp(log_length), rate)
    since = jnp.where(starts, count, since)
    done = (count - since).astype(rate.dtype)
    done = jnp.clip(done / jnp.maximum(horizon - since, 1).astype(rate.dtype), 0, 1)
    size = 0.5 * rate * (1 + jnp.cos(jnp.pi * done))
    known = prev_g_z > 0
    beta = jnp.clip(g_z / jnp.where(known, prev_g_z, 1), 0, _MAX_BETA)
    beta = jnp.where(starts | ~known, 0, beta)
    return Course(
        active=ruled | starts,
        rate=rate,
        since=since,
        gradient=size * (1 + beta),
        direction=size * beta**2,
        beta=beta,
    )

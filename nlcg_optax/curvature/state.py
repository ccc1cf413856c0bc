"""What the quadratic model remembers from step to step, in small parts."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nlcg_optax import _tree
from nlcg_optax.step_sizes.noise_balance import NoiseBalanceState


class LastStep(NamedTuple):
    """The last step, as its model saw it.

    Attributes:
      prev_value: the loss where it began.
      prev_slope: how far the loss would have fallen by its slope along the step.
      prev_curvature: the curvature along it.
      coefficients: of each preconditioned gradient, then of each past step, the newest
        first, then of each residual direction.
      conjugacy: cosine to the step before in the metric of the curvature.
    """

    prev_value: jax.Array
    prev_slope: jax.Array
    prev_curvature: jax.Array
    coefficients: jax.Array
    conjugacy: jax.Array

    @property
    def predicted_decrease(self) -> jax.Array:
        """How far the model said that the loss would fall."""
        return self.prev_slope - 0.5 * self.prev_curvature


class Trust(NamedTuple):
    """How far the model is believed.

    Attributes:
      damping: λ of the last step.
      extra_damping: what the first step or a rejected one added to it.
      actual_decrease: how far the loss fell in the step before the last, which is seen
        one step later.
      model_error: average distance of the loss from the model's prediction.
      log_ratio: average logarithm of the actual decrease over the predicted one.
      log_ratio_spread: average distance of that logarithm from its average.
      rejections: how often the last step was taken back, int32.
      trend: average of 1 for a loss that fell and of -1 for one that rose.
      climb: how far the loss is above its lowest since it began or came to a new level;
        0 where losses are of sampled batches.
      curvature: geometric average of the curvature along the preconditioned gradient,
        for a length of 1; 0 where there was none yet.
      length_factor: how much longer than the last step one is to be for which there is
        no curvature.
      log_loss_ratio: average logarithm of the curvature's own loss over the value.
      way: average part of the way to the damped minimum of the model that a step goes.
    """

    damping: jax.Array
    extra_damping: jax.Array
    actual_decrease: jax.Array
    model_error: jax.Array
    log_ratio: jax.Array
    log_ratio_spread: jax.Array
    rejections: jax.typing.ArrayLike
    trend: jax.Array
    climb: jax.Array
    curvature: jax.Array
    length_factor: jax.Array
    log_loss_ratio: jax.Array
    way: jax.Array


class Noise(NamedTuple):
    """How much of the gradient is noise, and what is done once it rules.

    Attributes:
      signal: average share of the slope along a step that is no noise, by the curvature
        of the batch that made the step.
      fresh_signal: the same by the curvature of the batch after it; what decides
        whether noise rules.
      log_length: mean logarithm of the best length along the preconditioned gradient
        alone.
      examples: on how many the curvature was taken so far, in batches.
      since: the count at the hand-over; -1 before.
      slope: average slope along a step by the gradient that made it, since then.
      next_slope: the same by the gradient after it.
      direction_state: of what makes the directions after it; None without a horizon.
      balance: what gives their rate, and the average of the parameters; None too.
    """

    signal: jax.Array
    fresh_signal: jax.Array
    log_length: jax.Array
    examples: jax.Array
    since: jax.typing.ArrayLike
    slope: jax.Array
    next_slope: jax.Array
    direction_state: Any
    balance: NoiseBalanceState | None

    @property
    def handed_over(self) -> jax.Array:
        """Whether noise rules."""
        return jnp.asarray(self.since) >= 0

    @property
    def rate(self) -> jax.Array:
        """That of the steps since the hand-over, before it decays; 0 before."""
        if self.balance is None:
            return jnp.zeros_like(self.signal)
        return jnp.where(self.handed_over, self.balance.balance.rate, 0)

    @property
    def overshoot(self) -> jax.Array:
        """How far steps go beyond the next batch's minimum, in parts of their slope."""
        known = self.slope > 0
        return jnp.where(known, -self.next_slope / jnp.where(known, self.slope, 1), 0)


class Memory(NamedTuple):
    """The last steps.

    Attributes:
      stored: steps taken, neither left out nor of length zero, int32 scalar.
      prev_updates: the steps, with their sign turned, stacked along a leading axis of
        slots, the newest in slot ``(stored - 1) % slots``.
      prev_norms: the lengths of the last steps, the newest in slot
        ``(stored - 1) % slots``.
    """

    stored: jax.typing.ArrayLike
    prev_updates: optax.Updates
    prev_norms: jax.Array


class Counts(NamedTuple):
    """What happened so far, int32 scalars.

    Attributes:
      count: steps taken, or taken back.
      bounded: steps that were shortened.
      rejected: steps that were taken back, in part or wholly.
      new_level: losses that stayed up when a step was wholly taken back.
      flat: steps for whose length there was no curvature.
      nonfinite: steps left out for a number that was not finite.
      loss_mismatch: steps taken in which loss, gradient and curvature did not fit
        together.
    """

    count: jax.typing.ArrayLike
    bounded: jax.typing.ArrayLike
    rejected: jax.typing.ArrayLike
    new_level: jax.typing.ArrayLike
    flat: jax.typing.ArrayLike
    nonfinite: jax.typing.ArrayLike
    loss_mismatch: jax.typing.ArrayLike


class QuadraticModelState(NamedTuple):
    """State of :func:`scale_by_quadratic_model`.

    Attributes:
      preconditioner_states: states of the nested preconditioners, a tuple.
      last: the last step, a ``LastStep``.
      trust: how far the model is believed, ``Trust``.
      noise: how much of the gradient is noise, ``Noise``.
      memory: the last steps, ``Memory``.
      counts: what happened so far, ``Counts``.
    """

    preconditioner_states: tuple[optax.OptState, ...]
    last: LastStep
    trust: Trust
    noise: Noise
    memory: Memory
    counts: Counts

    def report(self) -> dict[str, jax.typing.ArrayLike]:
        """What :func:`nlcg_optax.diagnostics` tells of it."""
        return {
            "coefficients": self.last.coefficients,
            "damping": self.trust.damping,
            "predicted_decrease": self.last.predicted_decrease,
            "actual_decrease": self.trust.actual_decrease,
            "conjugacy": self.last.conjugacy,
            "signal": self.noise.signal,
            "rate": self.noise.rate,
            "overshoot": self.noise.overshoot,
            "noise_since": self.noise.since,
            "bounded_steps": self.counts.bounded,
            "rejected_steps": self.counts.rejected,
            "new_levels": self.counts.new_level,
            "flat_steps": self.counts.flat,
            "nonfinite_products": self.counts.nonfinite,
            "loss_mismatch": self.counts.loss_mismatch,
            "decrease_ratio": jnp.exp(self.trust.log_ratio),
            "loss_ratio": jnp.exp(self.trust.log_loss_ratio),
            "way": self.trust.way,
        }


def initial(
    params: optax.Params,
    preconditioner_states: tuple[optax.OptState, ...],
    direction_state: Any,
    balance: NoiseBalanceState | None,
    *,
    slots: int,
    directions: int,
    damping: jax.typing.ArrayLike,
    first_damping: jax.typing.ArrayLike,
    state_dtype: Any,
) -> QuadraticModelState:
    """The state before the first step.

    Args:
      params: the parameters.
      preconditioner_states: the first states of the preconditioners.
      direction_state: that of what makes the directions once noise rules.
      balance: that of what gives their rate.
      slots: steps that are remembered.
      directions: of all kinds.
      damping: λ without noise.
      first_damping: what the first step adds to it.
      state_dtype: dtype of the past steps.
    """
    dtype = _tree.scalar_dtype(params)

    def number(value: float = 0.0) -> jax.Array:
        return jnp.asarray(value, dtype)

    def counter() -> jax.Array:
        return jnp.zeros([], jnp.int32)

    return QuadraticModelState(
        preconditioner_states=preconditioner_states,
        last=LastStep(
            prev_value=number(),
            prev_slope=number(),
            prev_curvature=number(),
            coefficients=jnp.zeros([directions], dtype),
            conjugacy=number(),
        ),
        trust=Trust(
            damping=_tree.real_scalar(damping, dtype),
            extra_damping=_tree.real_scalar(first_damping, dtype),
            actual_decrease=number(),
            model_error=number(),
            log_ratio=number(),
            log_ratio_spread=number(),
            rejections=counter(),
            trend=number(),
            climb=number(),
            curvature=number(),
            length_factor=number(1.0),
            log_loss_ratio=number(),
            way=number(1.0),
        ),
        noise=Noise(
            signal=number(1.0),
            fresh_signal=number(1.0),
            log_length=number(),
            examples=number(),
            since=jnp.full([], -1, jnp.int32),
            slope=number(),
            next_slope=number(),
            direction_state=direction_state,
            balance=balance,
        ),
        memory=Memory(
            stored=counter(),
            prev_updates=jax.tree.map(
                lambda x: _tree.slots(x, slots), _tree.zeros_like(params, state_dtype)
            ),
            prev_norms=jnp.zeros([slots], dtype),
        ),
        counts=Counts(*(counter() for _ in Counts._fields)),
    )

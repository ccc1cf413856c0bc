"""The paper's step size: a base step that follows the loss."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nlcg_optax import _check, _transformations, _tree, _xla

# What follows a rise of the loss by more than a fraction (times the threshold): the
# factor of the base step, and how much of the previous direction is taken back.
_RISE = (0.15, 0.125, 0.10, 0.075, 0.05, 0.025, 0.01)
_SHRINK = (0.5, 0.7, 0.8, 0.9, 0.95, 0.975, 1.0)
_TAKE_BACK = (0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.1)

_MIN_STEP, _MAX_STEP = 1e-4, 1.0
_AVERAGE_DECAY = 0.7
_GROWTH = {"step": 1.05, "online": 1.02}

_MISSING = (
    "the step size follows the loss. Call `update(grads, state, params, value=loss)` "
    "with the loss averaged over the global batch, or switch this piece off "
    "(`nlcg(..., step_rule=None)`). The TrainState of Flax drops it: its "
    "`apply_gradients` does not pass `value` on, so call `state.tx.update` yourself."
)


class LossFeedbackState(NamedTuple):
    """State of :func:`scale_by_loss_feedback`.

    Attributes:
      count: finite losses seen, int32 scalar.
      base_step: the factor b of the last step.
      loss_average: moving average m of the loss.
      prev_loss_average: the average at the last comparison.
      prev_update: the last input, the direction with its sign turned.
      nonfinite: losses seen that were not finite, int32 scalar.
    """

    count: jax.Array
    base_step: jax.Array
    loss_average: jax.Array
    prev_loss_average: jax.Array
    prev_update: optax.Updates
    nonfinite: jax.Array

    def report(self) -> dict[str, jax.Array]:
        """What :func:`nlcg_optax.diagnostics` tells."""
        return {"base_step": self.base_step, "nonfinite_losses": self.nonfinite}


def scale_by_loss_feedback(
    rule: str = "step",
    period: int = 5,
    threshold: float = 1.0,
    *,
    state_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales directions by a base step that follows the loss (arXiv:1812.02886).

    The base step :math:`b \in [10^{-4}, 1]` starts at 1. It grows while the loss falls,
    and shrinks where it rises; then part of the previous direction is taken back too.
    With the average :math:`m_t = 0.7\, m_{t-1} + 0.3\, f_t` of the losses
    (:math:`m_0 = f_0`),

    - ``"step"`` acts when :math:`t > 0` is a multiple of the period, on
      :math:`\mathrm{new} = m_t` against the average at the last comparison;
    - ``"online"`` acts at every :math:`t \ge 1`, on :math:`\mathrm{new} = f_t` against
      :math:`m_t`.

    With the relative rise :math:`r = (\mathrm{new} - \mathrm{old}) / |\mathrm{old}|`
    and the threshold τ: if :math:`r < 0.01 τ` then b grows by 1.05 (``"step"``) or 1.02
    (``"online"``), to 1 at most. Otherwise, by the first column that r exceeds, b
    shrinks and the update is
    :math:`b\,((1 - ω)\, d_t - ω (b_\mathrm{old} / b)\, d_{t-1})` in place of
    :math:`b\, d_t`:

    ============ ===== ===== ===== ===== ===== ===== =====
    r exceeds τ×  0.15 0.125  0.10 0.075  0.05 0.025  0.01
    ============ ===== ===== ===== ===== ===== ===== =====
    shrink        0.5   0.7   0.8   0.9   0.95 0.975  1.0
    ω             0.9   0.7   0.5   0.3   0.2   0.1   0.1
    ============ ===== ===== ===== ===== ===== ===== =====

    Deviation from the published implementation: the rise is taken relative to
    :math:`|\mathrm{old}|`, so that negative losses work.

    A loss that is not finite leaves b and the averages alone and is counted; its
    direction is the previous one of the next step all the same. Under
    ``optax.MultiSteps`` the loss seen is that of the last mini-batch.

    Args:
      rule: ``"step"`` or ``"online"``.
      period: steps between two comparisons of the ``"step"`` rule, at least 1.
      threshold: τ, positive; larger values tolerate larger rises.
      state_dtype: dtype of the stored direction (kept complex for complex leaves); None
        for each parameter's own.

    Returns:
      A transformation whose `update` needs the keyword argument ``value``, the loss
      averaged over the global batch: a real scalar of any floating dtype.

    Raises:
      ValueError: when built, for an unknown rule or an argument out of range; in
        `update`, if ``value`` is missing or no real scalar, or if the gradients do not
        match the parameters.

    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> tx = nlcg_optax.scale_by_loss_feedback("online")
    >>> state = tx.init(jnp.array([0.0, 0.0]))
    >>> update, state = tx.update(jnp.array([1.0, 2.0]), state, value=1.0)
    >>> update, state = tx.update(jnp.array([1.0, 1.0]), state, value=2.0)
    >>> print(state.base_step)  # the loss rose by more than 15% of the average
    0.5
    >>> print([f"{x:.2f}" for x in update])  # 0.5·0.1·d_t - 0.9·1·d_{t-1}
    ['-0.85', '-1.75']
    """
    _check.one_of("rule", rule, _GROWTH)
    _check.number("period", period, minimum=1, integer=True)
    _check.number("threshold", threshold, minimum=0, exclusive=True, finite=True)
    _check.floating_dtype("state_dtype", state_dtype)

    def init_fn(params: optax.Params) -> LossFeedbackState:
        dtype = _tree.scalar_dtype(params)
        return LossFeedbackState(
            count=jnp.zeros([], jnp.int32),
            base_step=jnp.ones([], dtype),
            loss_average=jnp.zeros([], dtype),
            prev_loss_average=jnp.zeros([], dtype),
            prev_update=_tree.zeros_like(params, state_dtype),
            nonfinite=jnp.zeros([], jnp.int32),
        )

    def update_fn(
        updates: optax.Updates,
        state: LossFeedbackState,
        params: optax.Params | None = None,
        *,
        value: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LossFeedbackState]:
        del params, extra_args
        dtype = state.base_step.dtype
        loss = _check.loss(value, _MISSING).astype(dtype)
        _tree.check_match(updates, state.prev_update, "the optimizer's state")

        finite = jnp.isfinite(loss)
        first = state.count == 0
        average = _AVERAGE_DECAY * state.loss_average + (1 - _AVERAGE_DECAY) * loss
        average = jnp.where(first, loss, average)
        if rule == "step":
            # `optax.inject_hyperparams` makes a float of few bits of it.
            every = jnp.asarray(period).astype(state.count.dtype)
            act = state.count % every == 0
            new, old = average, state.prev_loss_average
        else:
            act = jnp.ones([], bool)
            new, old = loss, average
        act &= finite & ~first
        rise = new - old
        relative = jnp.where(
            old == 0,
            jnp.where(rise > 0, jnp.inf, -jnp.inf),
            rise / jnp.abs(jnp.where(old == 0, 1, old)),
        )
        relative = jnp.where(rise == 0, 0, relative)  # even where the old loss is 0

        tau = _tree.real_scalar(threshold, dtype)
        exceeded = relative > tau * jnp.asarray(_RISE, dtype)
        row = jnp.argmax(exceeded)
        rises = act & jnp.any(exceeded)
        shrink = jnp.where(rises, jnp.asarray(_SHRINK, dtype)[row], 1)
        omega = jnp.where(rises, jnp.asarray(_TAKE_BACK, dtype)[row], 0)
        grows = act & (relative < tau * _RISE[-1])

        old_step = state.base_step
        base_step = jnp.where(
            grows,
            jnp.minimum(old_step * _GROWTH[rule], _MAX_STEP),
            jnp.maximum(old_step * shrink, _MIN_STEP),
        )

        omega, base_step = _xla.compute_once(omega), _xla.compute_once(base_step)

        def scale(u, prev_u):
            x, prev = _tree.lift(u), _tree.lift(prev_u)
            b, w, b_old = (
                _tree.scalar_like(v, x) for v in (base_step, omega, old_step)
            )
            taken_back = b * (1 - w) * x - w * b_old * prev.astype(x.dtype)
            return jnp.where(w > 0, taken_back, b * x).astype(u.dtype)

        scaled = jax.tree.map(scale, updates, state.prev_update)
        kept = _tree.cast_like(updates, state.prev_update)
        compared = first | act
        new_state = LossFeedbackState(
            count=_transformations.increment(state.count),
            base_step=base_step,
            loss_average=average,
            prev_loss_average=jnp.where(compared, average, state.prev_loss_average),
            prev_update=kept,
            nonfinite=state.nonfinite,
        )
        unchanged = state._replace(
            prev_update=kept, nonfinite=_transformations.increment(state.nonfinite)
        )
        return scaled, _tree.where(finite, new_state, unchanged)

    return _transformations.make(init_fn, update_fn)

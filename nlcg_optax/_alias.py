"""The ready optimizer."""

from typing import Any

import optax

from nlcg_optax import _beta, _check, _direction, _preconditioner, _step_size, _tree


def nlcg(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta_rule: str | _beta.BetaRule = "fletcher_reeves",
    preconditioner: str | optax.GradientTransformation | None = "diagonal_bfgs",
    step_rule: str | optax.GradientTransformation | None = "step",
    beta_bounds: tuple[float, float] = (0.0, 1.0),
    restart_on_ascent: bool = False,
    restart_every: int | None = None,
    period: int = 5,
    threshold: float = 1.0,
    epsilon: float = 1e-8,
    state_dtype: Any | None = None,
    axis_name: _tree.AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic preconditioned nonlinear conjugate gradient (arXiv:1812.02886).

    The chain of :func:`~nlcg_optax.scale_by_conjugate_direction` over
    :func:`~nlcg_optax.scale_by_diagonal_bfgs`,
    :func:`~nlcg_optax.scale_by_loss_feedback`, and the learning rate:

    .. math::
        d_t = -M_t^{-1} g_t + \beta_t d_{t-1}, \qquad
        x_{t+1} = x_t + \alpha_t b_t \tilde d_t .

    The defaults are the paper's configuration.

    Args:
      learning_rate: α, a number or a schedule.
      beta_rule: see :func:`~nlcg_optax.scale_by_conjugate_direction`.
      preconditioner: ``"diagonal_bfgs"``, any gradient transformation, or None.
      step_rule: ``"step"`` or ``"online"``, see
        :func:`~nlcg_optax.scale_by_loss_feedback`; None for none. A gradient
        transformation is placed last, where it is given the descent direction times the
        learning rate, as line searches expect it.
      beta_bounds: β is clipped to this closed interval.
      restart_on_ascent: restart where the direction does not descend.
      restart_every: restart every so many steps; None for never.
      period: steps between two comparisons of the ``"step"`` rule.
      threshold: rises of the loss that are tolerated.
      epsilon: ε of the direction and of the diagonal of BFGS.
      state_dtype: dtype of the stored directions; None for each parameter's own.
      axis_name: the mapped axis (or axes) of a `shard_map` or `pmap` over which the
        trees are sharded; None where they are whole, as they are under `jit`. In a
        `shard_map` that checks types (``check_vma=True``, its default) some leaves may
        be replicated; elsewhere *every* leaf counts as sharded.

    Returns:
      An optimizer. Its `update` needs `params` for the diagonal of BFGS, and the
      keyword argument ``value``, the loss averaged over the global batch, for the step
      rules.

    Raises:
      ValueError: for an unknown name or an argument out of range.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> def loss_fn(x):
    ...     return (x[0] - 1.0) ** 2 + 10.0 * (x[1] + 2.0) ** 2
    >>> tx = nlcg_optax.nlcg(learning_rate=0.02)
    >>> x = jnp.zeros(2)
    >>> state = tx.init(x)
    >>> for _ in range(100):
    ...     loss, grads = jax.value_and_grad(loss_fn)(x)
    ...     updates, state = tx.update(grads, state, x, value=loss)
    ...     x = x + updates
    >>> print(x.round(2))
    [ 1. -2.]
    """
    if not callable(learning_rate):
        _check.number("learning_rate", learning_rate)
    if isinstance(preconditioner, str):
        _check.one_of(
            "preconditioner",
            preconditioner,
            ("diagonal_bfgs",),
            ", a gradient transformation, or None",
        )
        preconditioner = _preconditioner.scale_by_diagonal_bfgs(
            epsilon, axis_name=axis_name
        )
    direction = _direction.scale_by_conjugate_direction(
        beta_rule,
        preconditioner,
        beta_bounds=beta_bounds,
        restart_on_ascent=restart_on_ascent,
        restart_every=restart_every,
        epsilon=epsilon,
        state_dtype=state_dtype,
        axis_name=axis_name,
    )
    scale = optax.scale_by_learning_rate(learning_rate)
    if step_rule is None:
        return optax.chain(direction, scale)
    if isinstance(step_rule, optax.GradientTransformation):
        return optax.chain(direction, scale, step_rule)
    _check.one_of(
        "step_rule",
        step_rule,
        ("step", "online"),
        ", a gradient transformation, or None",
    )
    feedback = _step_size.scale_by_loss_feedback(
        step_rule, period, threshold, state_dtype=state_dtype
    )
    return optax.chain(direction, feedback, scale)

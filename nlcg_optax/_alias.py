"""The ready optimizer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nlcg_optax import (
    _beta,
    _check,
    _direction,
    _orthogonalization,
    _preconditioner,
    _step_size,
    _tree,
)


def nlcg(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta_rule: str | _beta.BetaRule = "fletcher_reeves",
    preconditioner: str | optax.GradientTransformation | None = "orthogonalization",
    step_rule: str | optax.GradientTransformation | None = "step",
    beta_bounds: tuple[float, float] = (0.0, 0.9),
    restart_on_ascent: bool = False,
    restart_every: int | None = None,
    nesterov: bool | None = None,
    period: int = 5,
    threshold: float = 1.0,
    epsilon: float = 1e-8,
    displacement: str = "params",
    track_cosine: bool = True,
    state_dtype: Any | None = None,
    axis_name: _tree.AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic preconditioned nonlinear conjugate gradient, for large batches.

    The chain of :func:`~nlcg_optax.scale_by_conjugate_direction` over
    :func:`~nlcg_optax.scale_by_orthogonalization`,
    :func:`~nlcg_optax.scale_by_loss_feedback`, and the learning rate:

    .. math::
        d_t = -z_t + \beta_t d_{t-1}, \qquad z_t = M_t^{-1} g_t, \qquad
        x_{t+1} = x_t + \alpha_t b_t (-z_t + \beta_t d_t) .

    The method is that of arXiv:1812.02886. Three defaults are not, because with them it
    trains as well on small batches and better on large ones
    (``benchmarks/large_batch``): the preconditioner orthogonalizes each matrix of the
    gradient, where the paper's is the diagonal of BFGS; β is clipped to 0.9 rather than
    1; and the step looks ahead along the direction by one more β (``nesterov``).
    :func:`~nlcg_optax.nlcg_paper` is the paper's configuration, exactly.

    One step moves a matrix of full rank by a root mean square of
    :math:`0.2 \alpha`, and up to ten times that where directions agree (β = 0.9); 0.04
    is a learning rate to try first, and a factor of 2 to either side.

    As parts of one optimizer they share the previous direction, of which the chain of
    the three has two copies. (So after a loss that is not finite, part of the direction
    taken then may be taken back, not of the one before.)

    Args:
      learning_rate: α, a number or a schedule.
      beta_rule: see :func:`~nlcg_optax.scale_by_conjugate_direction`.
      preconditioner: ``"orthogonalization"``, ``"diagonal_bfgs"``, any gradient
        transformation, or None.
      step_rule: ``"step"`` or ``"online"``, see
        :func:`~nlcg_optax.scale_by_loss_feedback`; None for none. A gradient
        transformation is placed last, where it is given the descent direction times the
        learning rate, as line searches expect it.
      beta_bounds: β is clipped to this closed interval.
      restart_on_ascent: restart where the direction does not descend.
      restart_every: restart every so many steps; None for never.
      nesterov: whether the step goes along :math:`-z_t + \beta_t d_t`; None: yes,
        unless a line search follows, or ``displacement="direction"``, which need the
        directions themselves.
      period: steps between two comparisons of the ``"step"`` rule.
      threshold: rises of the loss that are tolerated.
      epsilon: ε of the direction and of the preconditioner.
      displacement: where the diagonal of BFGS takes the displacement s from:
        ``"params"``, of which it keeps a copy, or ``"direction"``, which saves the copy
        and a third of the memory traffic. Then s is what this optimizer made of the
        last direction: nothing must follow it that changes the update, and no curvature
        is learned from a step that took part of the previous direction back.
      track_cosine: see :func:`~nlcg_optax.scale_by_conjugate_direction`.
      state_dtype: dtype of the history (directions and gradients; B and the copy of the
        parameters keep their own); None for each parameter's own.
      axis_name: the mapped axis (or axes) of a `shard_map` or `pmap` over which the
        trees are sharded; None where they are whole, as they are under `jit`. In a
        `shard_map` that checks types (``check_vma=True``, its default) some leaves may
        be replicated; elsewhere *every* leaf counts as sharded. Orthogonalization needs
        whole matrices: over an axis it refuses sharded ones.

    Returns:
      An optimizer. Its `update` needs `params` for the diagonal of BFGS, and the
      keyword argument ``value``, the loss averaged over the global batch, for the step
      rules.

    Raises:
      ValueError: for an unknown name or an argument out of range.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> import optax
    >>> target = jnp.array([[1.0, -2.0], [0.5, 3.0]])
    >>> def loss_fn(w):
    ...     return jnp.sum((w - target) ** 2 * jnp.array([1.0, 10.0]))
    >>> tx = nlcg_optax.nlcg(optax.cosine_decay_schedule(0.4, 100))
    >>> w = jnp.zeros((2, 2))
    >>> state = tx.init(w)
    >>> for _ in range(100):
    ...     loss, grads = jax.value_and_grad(loss_fn)(w)
    ...     updates, state = tx.update(grads, state, w, value=loss)
    ...     w = w + updates
    >>> print(w.round(2))
    [[ 1.  -2. ]
     [ 0.5  3. ]]
    """
    if not callable(learning_rate):
        _check.number("learning_rate", learning_rate)
    _check.one_of("displacement", displacement, ("params", "direction"))
    if displacement != "params" and preconditioner != "diagonal_bfgs":
        raise ValueError(
            f"displacement={displacement!r} is not valid: only the preconditioner "
            "'diagonal_bfgs' takes one."
        )
    if isinstance(preconditioner, str):
        _check.one_of(
            "preconditioner",
            preconditioner,
            ("diagonal_bfgs", "orthogonalization"),
            ", a gradient transformation, or None",
        )
        if preconditioner == "orthogonalization":
            preconditioner = _orthogonalization.scale_by_orthogonalization(
                epsilon=epsilon, axis_name=axis_name
            )
        else:
            preconditioner = _preconditioner.scale_by_diagonal_bfgs(
                epsilon,
                displacement="params" if displacement == "params" else "given",
                state_dtype=state_dtype,
                axis_name=axis_name,
            )
    line_search = isinstance(step_rule, optax.GradientTransformation)
    if nesterov is None:
        nesterov = not line_search and displacement == "params"
    elif nesterov and displacement != "params":
        raise ValueError(
            f"displacement={displacement!r} is not valid with nesterov=True: the last "
            "step was not along the direction."
        )
    direction = _direction.scale_by_conjugate_direction(
        beta_rule,
        preconditioner,
        beta_bounds=beta_bounds,
        restart_on_ascent=restart_on_ascent,
        restart_every=restart_every,
        nesterov=nesterov,
        epsilon=epsilon,
        track_cosine=track_cosine,
        state_dtype=state_dtype,
        axis_name=axis_name,
    )
    scale = optax.scale_by_learning_rate(learning_rate)
    if line_search:
        if displacement != "params":
            raise ValueError(
                f"displacement={displacement!r} is not valid with a transformation as "
                "the step rule: what it makes of the direction is not known."
            )
        return optax.chain(direction, scale, step_rule)
    if step_rule is None:
        pieces = (scale,)
    else:
        _check.one_of(
            "step_rule",
            step_rule,
            ("step", "online"),
            ", a gradient transformation, or None",
        )
        feedback = _step_size.scale_by_loss_feedback(
            step_rule, period, threshold, keep_prev_update=False
        )
        pieces = (feedback, scale)
    return _share(direction, optax.chain(*pieces), displacement == "direction")


def nlcg_paper(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta_rule: str | _beta.BetaRule = "fletcher_reeves",
    preconditioner: str | optax.GradientTransformation | None = "diagonal_bfgs",
    step_rule: str | optax.GradientTransformation | None = "step",
    beta_bounds: tuple[float, float] = (0.0, 1.0),
    restart_on_ascent: bool = False,
    restart_every: int | None = None,
    nesterov: bool | None = False,
    period: int = 5,
    threshold: float = 1.0,
    epsilon: float = 1e-8,
    displacement: str = "params",
    track_cosine: bool = True,
    state_dtype: Any | None = None,
    axis_name: _tree.AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The configuration of arXiv:1812.02886, exactly.

    :func:`~nlcg_optax.nlcg`, which explains the arguments, with the paper's
    preconditioner and clip of β. The tests replay recorded trajectories of the
    published code with it.

    Raises:
      ValueError: for an unknown name or an argument out of range.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> def loss_fn(x):
    ...     return (x[0] - 1.0) ** 2 + 10.0 * (x[1] + 2.0) ** 2
    >>> tx = nlcg_optax.nlcg_paper(learning_rate=0.02)
    >>> x = jnp.zeros(2)
    >>> state = tx.init(x)
    >>> for _ in range(100):
    ...     loss, grads = jax.value_and_grad(loss_fn)(x)
    ...     updates, state = tx.update(grads, state, x, value=loss)
    ...     x = x + updates
    >>> print(x.round(2))
    [ 1. -2.]
    """
    return nlcg(
        learning_rate,
        beta_rule=beta_rule,
        preconditioner=preconditioner,
        step_rule=step_rule,
        beta_bounds=beta_bounds,
        restart_on_ascent=restart_on_ascent,
        restart_every=restart_every,
        nesterov=nesterov,
        period=period,
        threshold=threshold,
        epsilon=epsilon,
        displacement=displacement,
        track_cosine=track_cosine,
        state_dtype=state_dtype,
        axis_name=axis_name,
    )


class DisplacementState(NamedTuple):
    """What :func:`nlcg` adds to the state to know the last displacement.

    Attributes:
      scale: the last displacement as a multiple of the last direction (with the sign of
        the gradient); 0 where it was no multiple of it.
    """

    scale: jax.Array


def _share(
    direction: optax.GradientTransformationExtraArgs,
    rest: optax.GradientTransformation,
    displacement: bool,
) -> optax.GradientTransformationExtraArgs:
    """Chains the direction with what scales it, which is shown the previous direction.

    Args:
      direction: the conjugate direction.
      rest: a chain of what follows; linear, the same for all leaves.
      displacement: whether the preconditioner is to be told the last displacement.
    """
    # Typed as anything: the states of optax are.
    following: Any = optax.with_extra_args_support(rest)

    def init_fn(params: optax.Params) -> Any:
        states = (direction.init(params), *following.init(params))
        if not displacement:
            return states
        zero = jnp.zeros([], _tree.scalar_dtype(params))
        return (*states, DisplacementState(zero))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        direction_state, *rest_state = state
        last = rest_state.pop() if displacement else None
        prev_update = direction_state.prev_update
        told = {}
        if last is not None:
            told["prev_displacement"] = _preconditioner.Displacement(
                last.scale, prev_update
            )
        updates, direction_state = direction.update(
            updates, direction_state, params, **told, **extra_args
        )
        if last is None:
            updates, rest_state = following.update(
                updates,
                tuple(rest_state),
                params,
                prev_update=prev_update,
                **extra_args,
            )
            return updates, (direction_state, *rest_state)
        # Two numbers go the way of the leaves, and come out as the coefficients of this
        # direction and of the previous one.
        one, zero = jnp.ones_like(last.scale), jnp.zeros_like(last.scale)
        (updates, this, previous), rest_state = following.update(
            (updates, one, zero),
            tuple(rest_state),
            params,
            prev_update=(prev_update, zero, one),
            **extra_args,
        )
        known = DisplacementState(jnp.where(previous == 0, this, 0))
        return updates, (direction_state, *rest_state, known)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

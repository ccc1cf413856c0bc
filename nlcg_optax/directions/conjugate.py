"""Conjugate directions over any preconditioner."""

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from nlcg_optax import _check, _transformations, _tree, _xla
from nlcg_optax.directions import beta as beta_rules


class ConjugateDirectionState(NamedTuple):
    """State of :func:`scale_by_conjugate_direction`.

    Attributes:
      count: steps taken, int32 scalar.
      preconditioner_state: state of the nested preconditioner.
      prev_update: the last direction d, with its sign turned.
      prev_preconditioned: the last preconditioned gradient z; None for rules that do
        not need it.
      prev_grad: the last gradient g; None for rules that do not need it.
      prev_g_z: gᵀz of the last step.
      prev_g_d: gᵀd of the last step, its slope; None where nothing needs it.
      prev_d_d: dᵀMd of the last step, in the metric M of the preconditioner; None where
        nothing needs it.
      beta: β of the last step, after clipping and restarts.
      cosine: cosine between d and −g in the last step; negative on an ascent step, and
        None where it is not tracked.
      restarts: restarts so far, int32 scalar.
      prev_exponent: of two, int32 scalar: the three products above are to be multiplied
        by it. 0 unless they are out of the range of their dtype.
    """

    count: jax.Array
    preconditioner_state: optax.OptState
    prev_update: optax.Updates
    prev_preconditioned: optax.Updates | None
    prev_grad: optax.Updates | None
    prev_g_z: jax.Array
    prev_g_d: jax.Array | None
    prev_d_d: jax.Array | None
    beta: jax.Array
    cosine: jax.Array | None
    restarts: jax.Array
    prev_exponent: jax.typing.ArrayLike = 0

    def report(self) -> dict[str, jax.Array]:
        """What :func:`nlcg_optax.diagnostics` tells."""
        told = {"beta": self.beta, "cosine": self.cosine, "restarts": self.restarts}
        return {name: value for name, value in told.items() if value is not None}


def scale_by_conjugate_direction(
    beta_rule: str | beta_rules.BetaFunction = "fletcher_reeves",
    preconditioner: optax.GradientTransformation | None = None,
    *,
    beta_bounds: tuple[float, float] = (0.0, 1.0),
    restart_on_ascent: bool = False,
    restart_every: int | None = None,
    restart_nonorthogonal: float | None = None,
    nesterov: bool = False,
    epsilon: float = 1e-8,
    track_cosine: bool = True,
    state_dtype: Any | None = None,
    axis_name: _tree.AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Turns gradients into preconditioned conjugate directions.

    .. math::
        z_t = M_t^{-1} g_t, \qquad d_0 = -z_0, \qquad d_t = -z_t + \beta_t d_{t-1},

    with β from a rule (:mod:`nlcg_optax.beta`) and clipped to ``beta_bounds``. As
    everywhere in Optax the updates keep the gradient's sign until the final negative
    scaling: the output is :math:`-d_t`.

    The preconditioner is nested, not chained before, because β needs the gradient and
    the preconditioned gradient together. A stochastic direction need not descend; the
    paper takes such steps (the default here). With ``restart_on_ascent`` the direction
    falls back to :math:`-z_t` wherever :math:`g_t^\top d_t \ge 0`.

    With ``nesterov`` the output is :math:`z_t - \beta_t d_t`: the step looks ahead by
    one more β, as Nesterov's momentum does, while the directions stay what they are.
    That suits given learning rates, not line searches.

    Args:
      beta_rule: ``"fletcher_reeves"``, ``"polak_ribiere"``, ``"hestenes_stiefel"``,
        ``"dai_yuan"``, ``"hybrid_hs_dy"``, ``"liu_storey"``, ``"hager_zhang"``,
        ``"dai_kou"``, or a function of
        :class:`nlcg_optax.beta.InnerProducts` and ε that returns β, or such a function
        and what it needs, a :class:`nlcg_optax.beta.BetaRule`.
      preconditioner: any gradient transformation, such as
        :func:`nlcg_optax.scale_by_diagonal_bfgs`, ``optax.scale_by_rms()`` or a chain;
        None for the plain gradient. It is given `params` and all extra arguments.
      beta_bounds: β is clipped to this closed interval. The paper clips to [0, 1];
        ``(0, math.inf)`` suits line searches, and ``(-math.inf, math.inf)`` the rules
        of Hager & Zhang and of Dai & Kou, which bound β from below themselves.
      restart_on_ascent: restart where the direction does not descend.
      restart_every: restart every so many steps; None for never.
      restart_nonorthogonal: Powell's restart (1977), where successive gradients are far
        from orthogonal: :math:`|g_t^\top z_{t-1}| \ge \nu\, g_t^\top z_t` with this ν
        (usually 0.2); None for never.
      nesterov: whether the step looks ahead.
      epsilon: ε of the denominators. The paper's absolute value makes β depend (by a
        relative :math:`\epsilon / \rho_{t-1}`) on the scale of the loss; with 0 it does
        not, and a zero denominator gives β = 0.
      track_cosine: whether the state tells the cosine between the direction and the
        negative gradient. It takes up to five inner products that the first two rules
        do without.
      state_dtype: dtype of the history (kept complex for complex leaves); None for each
        parameter's own.
      axis_name: the mapped axis (or axes) over which the trees are sharded, see
        :func:`~nlcg_optax.nlcg`; None where they are whole, as they are under `jit`.

    Returns:
      A transformation. Updates keep the gradient's dtype; inner products are taken in
      float32 or wider.

    Raises:
      ValueError: when built, for an unknown rule or an argument out of range; in
        `update`, if the gradients do not match the parameters.

    On a quadratic with exact steps two conjugate directions reach the minimum:

    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> hessian = jnp.array([[2.0, 1.0], [1.0, 3.0]])
    >>> tx = nlcg_optax.scale_by_conjugate_direction("hestenes_stiefel")
    >>> x = jnp.array([1.0, -2.0])
    >>> state = tx.init(x)
    >>> for _ in range(2):
    ...     gradient = hessian @ x
    ...     update, state = tx.update(gradient, state)
    ...     x = x - (gradient @ update) / (update @ hessian @ update) * update
    >>> print(f"{state.beta:.4f}", bool(abs(x).max() < 1e-6))
    0.1111 True
    """
    rule = beta_rules.resolve(beta_rule)
    bounds = _check_bounds(beta_bounds)
    if restart_every is not None:
        _check.number("restart_every", restart_every, minimum=1, integer=True)
    if restart_nonorthogonal is not None:
        _check.number("restart_nonorthogonal", restart_nonorthogonal, minimum=0)
    for name, value in (
        ("nesterov", nesterov),
        ("restart_on_ascent", restart_on_ascent),
        ("track_cosine", track_cosine),
    ):
        _check.flag(name, value)
    keeps_grad = "y_w" in rule.needs
    keeps_z = keeps_grad or "g_w" in rule.needs or restart_nonorthogonal is not None
    needs_slope = restart_on_ascent or track_cosine
    needs_slope |= not rule.needs.isdisjoint(("g_d", "prev_g_d", "prev_d_d"))
    _check.axis_name(axis_name)
    _check.number("epsilon", epsilon, minimum=0, finite=True)
    _check.floating_dtype("state_dtype", state_dtype)
    inner = _transformations.preconditioner(preconditioner)

    def init_fn(params: optax.Params) -> ConjugateDirectionState:
        zeros = functools.partial(_tree.zeros_like, params, state_dtype)
        scalar = functools.partial(jnp.zeros, [], _tree.scalar_dtype(params))
        return ConjugateDirectionState(
            count=jnp.zeros([], jnp.int32),
            preconditioner_state=inner.init(params),
            prev_update=zeros(),
            prev_preconditioned=zeros() if keeps_z else None,
            prev_grad=zeros() if keeps_grad else None,
            prev_g_z=scalar(),
            prev_g_d=scalar() if needs_slope else None,
            prev_d_d=scalar() if needs_slope else None,
            beta=scalar(),
            cosine=scalar() if track_cosine else None,
            restarts=jnp.zeros([], jnp.int32),
            prev_exponent=jnp.zeros([], jnp.int32),
        )

    def restarts(count: Any, p: beta_rules.InnerProducts, beta: jax.Array) -> Any:
        """Whether the direction starts anew, but for the first one."""
        restart = jnp.zeros([], bool)
        if restart_every is not None:
            restart |= count % jnp.asarray(restart_every).astype(count.dtype) == 0
        if restart_on_ascent:
            restart |= (-p.g_z + beta * p.g_d >= 0) & (beta != 0)
        if restart_nonorthogonal is not None:
            restart |= jnp.abs(p.g_z - p.g_w) >= restart_nonorthogonal * p.g_z
        return restart

    def update_fn(
        updates: optax.Updates,
        state: ConjugateDirectionState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ConjugateDirectionState]:
        _tree.check_match(updates, state.prev_update, "the optimizer's state")
        grad, dtype = updates, state.beta.dtype
        with jax.named_scope("nlcg_preconditioner"):
            z, preconditioner_state = inner.update(
                grad, state.preconditioner_state, params, **extra_args
            )
        prev_z, prev_grad = state.prev_preconditioned, state.prev_grad
        trees = [grad, z, state.prev_update]
        trees += [tree for tree in (prev_z, prev_grad) if tree is not None]

        def vectors(g, *others):
            z, u, *history = (a.astype(g.dtype) for a in others)
            found = [g, z, u]
            if keeps_z:
                found.append(z - history[0])
            if keeps_grad:
                found.append(g - history[1])
            return found

        # What is like the gradient has one scale, what is like a step another.
        groups = [0, 1, 1, 1, 0][: len(trees)]
        g, z_, u, w, y = range(5)
        pairs = [(g, z_)]
        if needs_slope:
            pairs.append((g, u))
        if track_cosine:
            pairs += [(g, g), (z_, z_), (z_, u), (u, u)]
        if keeps_z:
            pairs.append((g, w))
        if keeps_grad:
            pairs.append((y, w))
        sums, (of_grad, of_step) = _tree.inner_products(
            vectors, pairs, *trees, groups=groups, dtype=dtype, axis_name=axis_name
        )
        exponent = of_grad + of_step

        # Of NumPy: an operation that gives NaN raises under `jax_debug_nans`.
        nan: Any = np.asarray(np.nan, dtype)
        largest = float(jnp.finfo(dtype).max)

        def rescaled(x: jax.Array | None) -> Any:
            """A product of the last step, in the unit of those of this one."""
            if x is None:
                return nan
            change = jnp.asarray(state.prev_exponent) - exponent
            return jnp.clip(_tree.times_power_of_two(x, change), -largest, largest)

        rest = iter(sums)
        g_z = next(rest)
        g_u = next(rest) if needs_slope else nan
        g_g, z_z, z_u, u_u = (next(rest) if track_cosine else nan for _ in range(4))
        products = beta_rules.InnerProducts(
            g_z=g_z,
            prev_g_z=rescaled(state.prev_g_z),
            g_d=-g_u,
            prev_g_d=rescaled(state.prev_g_d),
            g_w=next(rest, nan),
            y_w=next(rest, nan),
            prev_d_d=rescaled(state.prev_d_d),
        )

        first = state.count == 0
        absolute = _tree.real_scalar(epsilon, dtype)
        absolute = _tree.times_power_of_two(absolute, -exponent)
        beta = jnp.asarray(rule(products, absolute)).astype(dtype)
        # Bounds of a wider dtype, such as NumPy's, would widen β and the state.
        beta = jnp.clip(beta, *(_tree.real_scalar(end, dtype) for end in bounds))
        restart = restarts(state.count, products, beta) & ~first
        beta = jnp.where(first | restart, 0, beta)
        # Whatever is read of the history is read before the direction replaces it.
        beta = _xla.compute_once(_xla.after(state.count < 0, beta, *sums))

        direction = functools.partial(_direction, beta)
        turned = jax.tree.map(direction, z, state.prev_update)
        output = jax.tree.map(direction, z, turned) if nesterov else turned
        slope, cosine, d_d = -(g_z + beta * g_u), None, None
        if track_cosine:
            # ‖d‖ from what is known of z and the last d: no pass over the direction.
            norm_sq = jnp.maximum(z_z + 2 * beta * z_u + jnp.square(beta) * u_u, 0)
            norms = _tree.square_root(g_g) * _tree.square_root(norm_sq)
            cosine = jnp.where(norms == 0, 0, -slope / jnp.where(norms == 0, 1, norms))
        if needs_slope:
            # dᵀMd from M z = g, without a product with M.
            d_d = g_z + 2 * beta * g_u + jnp.square(beta) * products.prev_d_d

        return _tree.cast_like(output, grad), ConjugateDirectionState(
            count=_transformations.increment(state.count),
            preconditioner_state=preconditioner_state,
            prev_update=_tree.cast_like(turned, state.prev_update),
            prev_preconditioned=None if prev_z is None else _tree.cast_like(z, prev_z),
            prev_grad=None if prev_grad is None else _tree.cast_like(grad, prev_grad),
            prev_g_z=g_z,
            prev_g_d=slope if needs_slope else None,
            prev_d_d=d_d,
            beta=beta,
            cosine=cosine,
            restarts=state.restarts + restart.astype(jnp.int32),
            prev_exponent=exponent,
        )

    return _transformations.make(init_fn, update_fn)


def _direction(beta: jax.Array, z: jax.Array, u: jax.Array) -> jax.Array:
    """A leaf of z + β u."""
    z, u = _tree.lift(z), _tree.lift(u)
    return z + _tree.scalar_like(beta, z) * u.astype(z.dtype)


def _check_bounds(beta_bounds: Any) -> tuple[Any, Any]:
    """Raises unless `beta_bounds` is an interval; returns its two ends."""
    with contextlib.suppress(TypeError, ValueError):  # said below
        lower, upper = beta_bounds
        for end in (lower, upper):
            _check.number("beta_bounds", end)
        # Traced arrays have no values to compare.
        traced = isinstance(lower, Tracer) or isinstance(upper, Tracer)
        if isinstance(beta_bounds, tuple | list) and (traced or lower <= upper):
            return lower, upper
    raise ValueError(
        f"beta_bounds={beta_bounds!r} is not valid: expected two numbers, lower and "
        "upper, with lower <= upper."
    )

"""Preconditioners: the diagonal of BFGS, and limited-memory BFGS."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nlcg_optax import _check, _tree


class DiagonalBfgsState(NamedTuple):
    """State of :func:`scale_by_diagonal_bfgs`.

    Attributes:
      count: steps taken, int32 scalar.
      diagonal: B, the diagonal of the Hessian's approximation; real leaves, float32 or
        wider.
      prev_params: the parameters of the previous step; None where the displacement is
        given.
      prev_preconditioned: the last output z, which with B also tells the last gradient.
      skipped: how often the curvature update was skipped, int32 scalar.
    """

    count: jax.typing.ArrayLike
    diagonal: optax.Params
    prev_params: optax.Params | None
    prev_preconditioned: optax.Updates
    skipped: jax.Array


class Displacement(NamedTuple):
    """What was added to the parameters by the last step, as a multiple of a tree.

    Attributes:
      scale: a real scalar; 0 where the displacement is not known, and nothing is to be
        learned from it.
      tree: a tree like the parameters.
    """

    scale: jax.typing.ArrayLike
    tree: optax.Updates


def scale_by_diagonal_bfgs(
    epsilon: float = 1e-8,
    *,
    displacement: str = "params",
    state_dtype: Any | None = None,
    axis_name: _tree.AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Preconditions by the inverse of the diagonal of BFGS's Hessian approximation.

    With :math:`s = x_t - x_{t-1}` (what the parameters really did, whatever the rest of
    the chain made of the update) and :math:`y = g_t - g_{t-1}`, the vector :math:`B`,
    which starts at 1, becomes

    .. math::
        B \leftarrow \left| B
            - \frac{(B \circ s)^2 + \epsilon}{s^\top (B \circ s) + \epsilon}
            + \frac{y^2 + \epsilon}{y^\top s + \epsilon} \right|
        \quad\text{if } y^\top s \ge \epsilon \text{ and } s^\top (B \circ s)
        \ge \epsilon,

    and stays otherwise, which is counted. The output is :math:`g / (B + \epsilon)`, and
    exactly :math:`g` at the first step. For complex leaves squares are squared moduli
    and inner products are real, :math:`\mathrm{Re}\langle a, b \rangle`.

    With :math:`\epsilon = 0` this is the diagonal of the dense BFGS update of
    :math:`\mathrm{diag}(B)` (Nocedal & Wright, *Numerical Optimization*, eq. 6.19). The
    absolute :math:`\epsilon` and :math:`B_0 = 1` are the paper's: both make the result
    depend on the scale of the loss, and with :math:`\epsilon > 0` no curvature is
    learned from steps so short that :math:`y^\top s < \epsilon`.

    The last gradient is not stored, but found again as :math:`z_{t-1} \circ (B +
    \epsilon)` from the last output z, to the rounding of a product.

    Args:
      epsilon: ε, at least 0.
      displacement: ``"params"`` takes s from the parameters, of which a copy is kept;
        with ``"given"`` there is none, and `update` needs the keyword argument
        ``prev_displacement``, a :class:`nlcg_optax.Displacement` that says what the
        last step added.
      state_dtype: dtype of the last output in the state (kept complex for complex
        leaves); None for float32 or wider. B, and the copy of the parameters, always
        keep their precision: both are differences of large numbers.
      axis_name: the mapped axis (or axes) of a `shard_map` or `pmap` over which the
        trees are sharded; None where they are whole, as they are under `jit`. In a
        `shard_map` that checks types (``check_vma=True``, its default) some leaves may
        be replicated; elsewhere *every* leaf counts as sharded.

    Returns:
      A transformation whose `update` needs `params`. Updates keep the gradient's dtype;
      inner products are taken in float32 or wider.

    Raises:
      ValueError: when built, for an argument out of range; in `update`, if `params` or
        ``prev_displacement`` is missing or the gradients do not match it.

    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> curvature = jnp.array([1.0, 2.0, 4.0])  # of the loss x·(curvature ∘ x) / 2
    >>> tx = nlcg_optax.scale_by_diagonal_bfgs(epsilon=0.0)
    >>> x = jnp.array([1.0, 1.0, 1.0])
    >>> state = tx.init(x)
    >>> updates, state = tx.update(curvature * x, state, x)
    >>> print(updates)
    [1. 2. 4.]
    >>> x = x - 0.5 * updates
    >>> updates, state = tx.update(curvature * x, state, x)
    >>> print(state.diagonal.round(4))  # 1 - s²/sᵀs + y²/yᵀs
    [0.9661 1.0287 3.7449]
    """
    _check.number("epsilon", epsilon, minimum=0)
    _check.one_of("displacement", displacement, ("params", "given"))
    given = displacement == "given"

    def init_fn(params: optax.Params) -> Any:
        def ones(x: jax.Array) -> jax.Array:
            return jnp.ones_like(x, dtype=_tree.scalar_dtype(x))

        return DiagonalBfgsState(
            count=jnp.zeros([], jnp.int32),
            diagonal=jax.tree.map(ones, params),
            prev_params=None if given else _tree.zeros_like(params),
            prev_preconditioned=_tree.zeros_like(
                jax.tree.map(_tree.lift, params) if state_dtype is None else params,
                state_dtype,
            ),
            skipped=jnp.zeros([], jnp.int32),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        prev_displacement: Displacement | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        _tree.check_match(updates, state.diagonal, "the optimizer's state")
        if given:
            moves = (_check_displacement(prev_displacement, updates).tree,)
        else:
            _tree.check_params(updates, params, "the diagonal of BFGS")
            moves = (params, state.prev_params)

        dtype = _tree.scalar_dtype(state.diagonal)
        eps = _tree.real_scalar(epsilon, dtype)
        first = state.count == 0
        never = state.count < 0
        # The first output was the gradient itself.
        prev_eps = jnp.where(state.count == 1, 0, eps)

        def differences(b, prev_z, g, *moves):
            """The displacement, up to a scalar factor, and the gradient's change."""
            b, prev_z, g, *moves = map(_tree.lift, (b, prev_z, g, *moves))
            metric = b + _tree.scalar_like(prev_eps, b)
            y = g - prev_z.astype(g.dtype) * metric.astype(g.dtype)
            return (moves[0] if given else moves[0] - moves[1]), y

        def curvature(b, prev_z, g, *moves):
            s, y = differences(b, prev_z, g, *moves)
            # Not b · |s|²: XLA would store |s|² for the new diagonal.
            return _tree.real_inner(y, s), _tree.real_inner(b.astype(s.dtype) * s, s)

        arguments = (state.diagonal, state.prev_preconditioned, updates, *moves)
        y_s, s_b_s = _tree.reduce_products(
            curvature, *arguments, dtype=dtype, axis_name=axis_name
        )
        if prev_displacement is not None and given:
            scale = _tree.real_scalar(prev_displacement.scale, dtype)
            y_s, s_b_s = scale * y_s, jnp.square(scale) * s_b_s
        else:
            scale = jnp.ones([], dtype)
        # Positive as well as at least ε: with ε = 0, zero curvature is no curvature.
        usable = ~first & (y_s >= eps) & (s_b_s >= eps) & (y_s > 0) & (s_b_s > 0)
        y_s, s_b_s = (jnp.where(usable, x, 1) for x in (y_s, s_b_s))

        def new_diagonal(b, prev_z, g, *moves):
            s, y = differences(b, prev_z, g, *moves)
            e, ys, sbs, c = (_tree.scalar_like(v, b) for v in (eps, y_s, s_b_s, scale))
            b_s_sq = jnp.square(b) * _tree.abs_sq(s)
            if given:
                b_s_sq *= jnp.square(c)
            update = jnp.abs(
                b - (b_s_sq + e) / (sbs + e) + (_tree.abs_sq(y) + e) / (ys + e)
            )
            return jnp.where(usable, update, b)

        diagonal = jax.tree.map(new_diagonal, *arguments)

        def precondition(g, b, *prev_params):
            lifted = _tree.lift(g)
            scaled = lifted / (b + _tree.scalar_like(eps, b)).astype(lifted.dtype)
            # After what was read has been put away: `params` are overwritten next.
            return _tree.after(never, jnp.where(first, lifted, scaled), *prev_params)

        def keep(x, prev_x, b):
            # After the last use of those that are stored until now.
            return _tree.after(never, x, b).astype(prev_x.dtype)

        kept = None
        if not given:
            kept = jax.tree.map(keep, params, state.prev_params, diagonal)
        trees = (updates, diagonal) if kept is None else (updates, diagonal, kept)
        preconditioned = jax.tree.map(precondition, *trees)
        return _tree.cast_like(preconditioned, updates), DiagonalBfgsState(
            count=optax.safe_increment(state.count),
            diagonal=diagonal,
            prev_params=kept,
            prev_preconditioned=_tree.cast_like(
                preconditioned, state.prev_preconditioned
            ),
            skipped=state.skipped + (~first & ~usable).astype(jnp.int32),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_displacement(displacement: Any, updates: optax.Updates) -> Displacement:
    """Returns the displacement, or says how to pass it."""
    if not isinstance(displacement, Displacement):
        raise ValueError(
            f"prev_displacement={displacement!r} is not valid: with "
            "displacement='given' the diagonal of BFGS needs an "
            "nlcg_optax.Displacement. Call `update(grads, state, params, "
            "prev_displacement=...)`, or use `nlcg`, which does."
        )
    _tree.check_match(updates, displacement.tree, "the displacement")
    return displacement


class LimitedMemoryBfgsState(NamedTuple):
    """State of :func:`scale_by_limited_memory_bfgs`.

    Attributes:
      count: steps taken, int32 scalar.
      pairs: pairs of differences learned from, int32 scalar.
      prev_params: the parameters of the previous step.
      prev_grad: the gradient of the previous step.
      params_differences: the last differences s of the parameters, stacked along a
        leading axis, the newest at ``(pairs - 1) % memory_size``.
      grad_differences: the differences y of the gradients that go with them.
      weights: 1 / sᵀy of each pair; 0 where there is none yet.
      scale: γ, the scale of the matrix that the pairs correct.
      skipped: pairs skipped for want of positive curvature, int32 scalar.
    """

    count: jax.typing.ArrayLike
    pairs: jax.typing.ArrayLike
    prev_params: optax.Params
    prev_grad: optax.Updates
    params_differences: optax.Params
    grad_differences: optax.Updates
    weights: jax.Array
    scale: jax.Array
    skipped: jax.Array


def scale_by_limited_memory_bfgs(
    memory_size: int = 10, *, axis_name: _tree.AxisName | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Preconditions by limited-memory BFGS, for smooth functions without noise.

    With the last pairs :math:`s_i = x_{i+1} - x_i`, :math:`y_i = g_{i+1} - g_i` and
    :math:`\rho_i = 1 / y_i^\top s_i` the output is :math:`H g` by the two-loop
    recursion (Nocedal & Wright, *Numerical Optimization*, algorithm 7.4) for

    .. math::
        H \leftarrow (I - \rho_i s_i y_i^\top) H (I - \rho_i y_i s_i^\top)
            + \rho_i s_i s_i^\top, \qquad
        H_0 = \gamma I, \quad \gamma = y^\top s / y^\top y \text{ of the last pair}.

    At the first step it is :math:`g / \max(1, \lVert g \rVert)`. A pair with
    :math:`y^\top s \le \epsilon \lVert y \rVert \lVert s \rVert`, ε the precision, is
    skipped, which is counted. ``optax.scale_by_lbfgs`` takes such pairs in, and is
    neither made for trees of mixed dtypes nor for sharded leaves in a `shard_map`;
    otherwise the two agree.

    Args:
      memory_size: pairs kept.
      axis_name: the mapped axis (or axes) of a `shard_map` or `pmap` over which the
        trees are sharded; None where they are whole, as they are under `jit`. In a
        `shard_map` that checks types (``check_vma=True``, its default) some leaves may
        be replicated; elsewhere *every* leaf counts as sharded.

    Returns:
      A transformation whose `update` needs `params`. Updates keep the gradient's dtype;
      inner products are taken in float32 or wider.

    Raises:
      ValueError: when built, for an argument out of range; in `update`, if `params` is
        missing or the gradients do not match it.

    Two exact steps reach the minimum of a quadratic of two variables:

    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> hessian = jnp.array([[2.0, 1.0], [1.0, 3.0]])
    >>> tx = nlcg_optax.scale_by_limited_memory_bfgs(memory_size=2)
    >>> x = jnp.array([1.0, -2.0])
    >>> state = tx.init(x)
    >>> for _ in range(2):
    ...     gradient = hessian @ x
    ...     update, state = tx.update(gradient, state, x)
    ...     exact = (gradient @ update) / (update @ hessian @ update)
    ...     x = x - exact * update
    >>> print([f"{u:.4f}" for u in update], bool(abs(x).max() < 1e-6))
    ['0.5000', '-0.1667'] True
    """
    _check.number("memory_size", memory_size, minimum=1, integer=True)

    def init_fn(params: optax.Params) -> LimitedMemoryBfgsState:
        def memory(x: jax.Array) -> jax.Array:
            # Like x, and not merely of its shape: sharded in a `shard_map` if x is.
            return jnp.zeros_like(x, shape=(memory_size, *jnp.shape(x)))

        dtype = _tree.scalar_dtype(params)
        return LimitedMemoryBfgsState(
            count=jnp.zeros([], jnp.int32),
            pairs=jnp.zeros([], jnp.int32),
            prev_params=_tree.zeros_like(params),
            prev_grad=_tree.zeros_like(params),
            params_differences=jax.tree.map(memory, params),
            grad_differences=jax.tree.map(memory, params),
            weights=jnp.zeros([memory_size], dtype),
            scale=jnp.ones([], dtype),
            skipped=jnp.zeros([], jnp.int32),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        _tree.check_params(updates, params, "limited-memory BFGS")
        _tree.check_match(updates, state.prev_grad, "the optimizer's state")
        dtype = state.scale.dtype

        def reduce(integrand, *trees):
            return _tree.reduce_products(
                integrand, *trees, dtype=dtype, axis_name=axis_name
            )

        def inner(a, b):
            return reduce(lambda a, b: [_tree.real_inner(a, b)], a, b)[0]

        def difference(new, old):
            return jax.tree.map(lambda a, b: a - b.astype(a.dtype), new, old)

        s = difference(params, state.prev_params)
        y = difference(updates, state.prev_grad)
        y_s, s_s, y_y, g_g = reduce(
            lambda s, y, g: [
                _tree.real_inner(y, s),
                _tree.abs_sq(s),
                _tree.abs_sq(y),
                _tree.abs_sq(g),
            ],
            s,
            y,
            updates,
        )
        first = state.count == 0
        curved = y_s > jnp.finfo(dtype).eps * jnp.sqrt(s_s) * jnp.sqrt(y_y)
        usable = ~first & curved & jnp.isfinite(y_y)
        slot = state.pairs % memory_size

        def store(memory, x):
            memory = jnp.asarray(memory)  # a restored state may be NumPy's
            kept = memory[slot]
            return memory.at[slot].set(jnp.where(usable, x.astype(kept.dtype), kept))

        params_differences = jax.tree.map(store, state.params_differences, s)
        grad_differences = jax.tree.map(store, state.grad_differences, y)
        weights = store(state.weights, 1 / jnp.where(usable, y_s, 1))
        pairs = state.pairs + usable.astype(jnp.int32)
        scale = jnp.where(usable, y_s / jnp.where(usable, y_y, 1), state.scale)
        # Before there is a pair, a step of length 1 at most.
        short = 1 / jnp.maximum(1, jnp.sqrt(g_g))
        gamma = jnp.where(pairs == 0, short, scale)

        def add(x, factor, other):
            return jax.tree.map(
                lambda a, b: a + _tree.scalar_like(factor, a) * _tree.lift(b), x, other
            )

        def pair(index):
            at = jax.tree.map(
                lambda x: x[index], (params_differences, grad_differences)
            )
            return *at, weights[index]

        def backwards(k, carry):  # from the newest pair to the oldest
            q, coefficients = carry
            index = (pairs - 1 - k) % memory_size
            s, y, weight = pair(index)
            coefficient = weight * inner(s, q)
            return add(q, -coefficient, y), coefficients.at[index].set(coefficient)

        def forwards(k, q):
            index = (pairs - kept + k) % memory_size
            s, y, weight = pair(index)
            return add(q, coefficients[index] - weight * inner(y, q), s)

        # Only over the pairs that are there: the first steps cost little.
        zero = jnp.zeros([], jnp.int32)
        kept = jnp.minimum(pairs, memory_size)
        q, coefficients = jax.lax.fori_loop(
            zero,
            kept,
            backwards,
            (jax.tree.map(_tree.lift, updates), jnp.zeros_like(weights)),
        )
        q = jax.tree.map(lambda x: _tree.scalar_like(gamma, x) * x, q)
        q = jax.lax.fori_loop(zero, kept, forwards, q)

        return _tree.cast_like(q, updates), LimitedMemoryBfgsState(
            count=optax.safe_increment(state.count),
            pairs=pairs,
            prev_params=_tree.cast_like(params, state.prev_params),
            prev_grad=_tree.cast_like(updates, state.prev_grad),
            params_differences=params_differences,
            grad_differences=grad_differences,
            weights=weights,
            scale=scale,
            skipped=state.skipped + (~first & ~usable).astype(jnp.int32),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

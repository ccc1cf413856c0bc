"""Limited-memory BFGS as a preconditioner, for smooth functions without noise."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nlcg_optax import _check, _transformations, _tree
from nlcg_optax.preconditioners import _two_loop


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

    count: jax.Array
    pairs: jax.Array
    prev_params: optax.Params
    prev_grad: optax.Updates
    params_differences: optax.Params
    grad_differences: optax.Updates
    weights: jax.Array
    scale: jax.Array
    skipped: jax.Array

    def report(self) -> dict[str, jax.Array]:
        """What :func:`nlcg_optax.diagnostics` tells."""
        return {"skipped_curvature": self.skipped}


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
      axis_name: the mapped axis (or axes) over which the trees are sharded, see
        :func:`~nlcg_optax.nlcg`; None where they are whole, as they are under `jit`.

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
    _check.axis_name(axis_name)
    _check.static_counts(memory_size=(memory_size, 1))

    def init_fn(params: optax.Params) -> LimitedMemoryBfgsState:
        memory = functools.partial(_tree.slots, count=memory_size)

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
        state: LimitedMemoryBfgsState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LimitedMemoryBfgsState]:
        del extra_args
        _tree.check_params(updates, params, "limited-memory BFGS")
        _tree.check_match(updates, state.prev_grad, "the optimizer's state")
        params = jax.tree.map(jnp.asarray, params)  # a leaf may be a Python number
        dtype = state.scale.dtype

        reduce = functools.partial(
            _tree.reduce_products, dtype=dtype, axis_name=axis_name
        )

        def inner(a, b):
            # Of a step and a gradient, which is as large as what the value changes by.
            return reduce(lambda a, b: [_tree.real_inner(a, b)], a, b)[0]

        def difference(new, old):
            return jax.tree.map(lambda a, b: a - b.astype(a.dtype), new, old)

        s = difference(params, state.prev_params)
        y = difference(updates, state.prev_grad)
        (y_s, s_s, y_y, g_g), (of_s, of_y, of_g) = _tree.inner_products(
            lambda s, y, g: [s, y, g],
            [(1, 0), (0, 0), (1, 1), (2, 2)],
            s,
            y,
            updates,
            groups=[0, 1, 2],
            dtype=dtype,
            axis_name=axis_name,
        )
        first = state.count == 0
        lengths = _tree.square_root(s_s) * _tree.square_root(y_y)
        # Nor is a pair of use whose 1 / sᵀy is out of range.
        product = _tree.times_power_of_two(y_s, of_s + of_y)
        curved = (y_s > jnp.finfo(dtype).eps * lengths) & (1 / product < jnp.inf)
        usable = ~first & curved & jnp.isfinite(product) & jnp.isfinite(y_y)
        slot = state.pairs % memory_size

        def store(memory, x):
            memory = jnp.asarray(memory)  # a restored state may be NumPy's
            kept = memory[slot]
            return memory.at[slot].set(jnp.where(usable, x.astype(kept.dtype), kept))

        params_differences = jax.tree.map(store, state.params_differences, s)
        grad_differences = jax.tree.map(store, state.grad_differences, y)
        weights = store(state.weights, 1 / jnp.where(usable, product, 1))
        pairs = state.pairs + usable.astype(jnp.int32)
        ratio = y_s / jnp.where(usable, y_y, 1)
        ratio = _tree.times_power_of_two(ratio, of_s - of_y)
        scale = jnp.where(usable, ratio, state.scale)
        # Before there is a pair, a step of length 1 at most.
        length = _tree.times_power_of_two(_tree.square_root(g_g), of_g)
        short = 1 / jnp.maximum(1, length)
        gamma = jnp.where(pairs == 0, short, scale)

        def pair(age):
            """The pair of that age (0: the newest), and its weight."""
            index = (pairs - 1 - age) % memory_size
            differences = (params_differences, grad_differences)
            return *jax.tree.map(lambda x: x[index], differences), weights[index]

        q = _two_loop.two_loop_recursion(
            jax.tree.map(_tree.lift, updates),
            pair,
            memory_size,
            gamma,
            inner,
        )
        return _tree.cast_like(q, updates), LimitedMemoryBfgsState(
            count=_transformations.increment(state.count),
            pairs=pairs,
            prev_params=_tree.cast_like(params, state.prev_params),
            prev_grad=_tree.cast_like(updates, state.prev_grad),
            params_differences=params_differences,
            grad_differences=grad_differences,
            weights=weights,
            scale=scale,
            skipped=state.skipped + (~first & ~usable).astype(jnp.int32),
        )

    return _transformations.make(init_fn, update_fn)

"""Preconditioners: the diagonal of BFGS."""

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
      prev_params: the parameters of the previous step.
      prev_grad: the gradient of the previous step.
      skipped: how often the curvature update was skipped, int32 scalar.
    """

    count: jax.typing.ArrayLike
    diagonal: optax.Params
    prev_params: optax.Params
    prev_grad: optax.Updates
    skipped: jax.Array


def scale_by_diagonal_bfgs(
    epsilon: float = 1e-8, *, axis_name: _tree.AxisName | None = None
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

    Args:
      epsilon: ε, at least 0.
      axis_name: the mapped axis (or axes) of a `shard_map` or `pmap` over which every
        leaf is sharded; None where the trees are whole, as they are under `jit`.

    Returns:
      A transformation whose `update` needs `params`. Updates keep the gradient's dtype;
      inner products are taken in float32 or wider.

    Raises:
      ValueError: when built, for a negative ε; in `update`, if `params` is missing or
        the gradients do not match it.

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

    def init_fn(params: optax.Params) -> DiagonalBfgsState:
        def ones(x: jax.Array) -> jax.Array:
            return jnp.ones_like(x, dtype=_tree.scalar_dtype(x))

        return DiagonalBfgsState(
            count=jnp.zeros([], jnp.int32),
            diagonal=jax.tree.map(ones, params),
            prev_params=_tree.zeros_like(params),
            prev_grad=_tree.zeros_like(params),
            skipped=jnp.zeros([], jnp.int32),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        if params is None:
            raise ValueError(
                "params=None: the diagonal of BFGS needs the parameters. Call "
                "`update(grads, state, params)`."
            )
        _tree.check_match(updates, params, "the parameters")
        _tree.check_match(updates, state.prev_grad, "the optimizer's state")

        first = state.count == 0

        def curvature(b, x, prev_x, g, prev_g):
            s, y = x - prev_x, g - prev_g
            return _tree.real_inner(y, s), b * _tree.abs_sq(s)

        y_s, s_b_s = _tree.reduce_products(
            curvature,
            state.diagonal,
            params,
            state.prev_params,
            updates,
            state.prev_grad,
            dtype=_tree.scalar_dtype(params),
            axis_name=axis_name,
        )
        eps = _tree.real_scalar(epsilon, y_s.dtype)
        # Positive as well as at least ε: with ε = 0, zero curvature is no curvature.
        usable = ~first & (y_s >= eps) & (s_b_s >= eps) & (y_s > 0) & (s_b_s > 0)
        y_s, s_b_s = (jnp.where(usable, x, 1) for x in (y_s, s_b_s))

        def new_diagonal(b, x, prev_x, g, prev_g):
            s, y = (
                _tree.lift(a) - _tree.lift(c) for a, c in ((x, prev_x), (g, prev_g))
            )
            e, ys, sbs = (_tree.scalar_like(v, b) for v in (eps, y_s, s_b_s))
            update = jnp.abs(
                b
                - (jnp.square(b) * _tree.abs_sq(s) + e) / (sbs + e)
                + (_tree.abs_sq(y) + e) / (ys + e)
            )
            return jnp.where(usable, update, b)

        diagonal = jax.tree.map(
            new_diagonal,
            state.diagonal,
            params,
            state.prev_params,
            updates,
            state.prev_grad,
        )

        def precondition(g, b):
            lifted = _tree.lift(g)
            scaled = lifted / (b + _tree.scalar_like(eps, b)).astype(lifted.dtype)
            return jnp.where(first, g, scaled.astype(g.dtype))

        return jax.tree.map(precondition, updates, diagonal), DiagonalBfgsState(
            count=optax.safe_increment(state.count),
            diagonal=diagonal,
            prev_params=_tree.cast_like(params, state.prev_params),
            prev_grad=_tree.cast_like(updates, state.prev_grad),
            skipped=state.skipped + (~first & ~usable).astype(jnp.int32),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

"""The paper's preconditioner: the diagonal of BFGS."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nlcg_optax import _check, _transformations, _tree, _xla


class DiagonalBfgsState(NamedTuple):
    """State of :func:`scale_by_diagonal_bfgs`.

    Attributes:
      count: steps taken, int32 scalar.
      diagonal: B, the diagonal of the Hessian's approximation; real leaves, float32 or
        wider.
      prev_params: the parameters of the previous step.
      prev_preconditioned: the last output z, which with B also tells the last gradient.
      skipped: how often the curvature update was skipped, int32 scalar.
    """

    count: jax.Array
    diagonal: optax.Params
    prev_params: optax.Params
    prev_preconditioned: optax.Updates
    skipped: jax.Array

    def report(self) -> dict[str, jax.Array]:
        """What :func:`nlcg_optax.diagnostics` tells."""
        return {"skipped_curvature": self.skipped}


def scale_by_diagonal_bfgs(
    epsilon: float = 1e-8,
    *,
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
      state_dtype: dtype of the last output in the state (kept complex for complex
        leaves); None for float32 or wider. B, and the copy of the parameters, always
        keep their precision: both are differences of large numbers.
      axis_name: the mapped axis (or axes) over which the trees are sharded, see
        :func:`~nlcg_optax.nlcg`; None where they are whole, as they are under `jit`.

    Returns:
      A transformation whose `update` needs `params`. Updates keep the gradient's dtype;
      inner products are taken in float32 or wider.

    Raises:
      ValueError: when built, for an argument out of range; in `update`, if `params` is
        missing or the gradients do not match it.

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
    _check.axis_name(axis_name)
    _check.number("epsilon", epsilon, minimum=0, finite=True)
    _check.floating_dtype("state_dtype", state_dtype)

    def init_fn(params: optax.Params) -> DiagonalBfgsState:
        def ones(x: jax.Array) -> jax.Array:
            return jnp.ones_like(x, dtype=_tree.scalar_dtype(x))

        def wide_zeros(x: jax.Array) -> jax.Array:
            return jnp.zeros_like(x, dtype=_tree.compute_dtype(jnp.result_type(x)))

        return DiagonalBfgsState(
            count=jnp.zeros([], jnp.int32),
            diagonal=jax.tree.map(ones, params),
            prev_params=_tree.zeros_like(params),
            prev_preconditioned=jax.tree.map(wide_zeros, params)
            if state_dtype is None
            else _tree.zeros_like(params, state_dtype),
            skipped=jnp.zeros([], jnp.int32),
        )

    def update_fn(
        updates: optax.Updates,
        state: DiagonalBfgsState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DiagonalBfgsState]:
        del extra_args
        _tree.check_match(updates, state.diagonal, "the optimizer's state")
        _tree.check_params(updates, params, "the diagonal of BFGS")

        params = jax.tree.map(jnp.asarray, params)  # a leaf may be a Python number
        dtype = _tree.scalar_dtype(state.diagonal)
        eps = _tree.real_scalar(epsilon, dtype)
        first = state.count == 0
        never = state.count < 0
        # The first output was the gradient itself.
        prev_eps = jnp.where(state.count == 1, 0, eps)

        def differences(b, prev_z, g, x, prev_x):
            """The displacement, and the gradient's change."""
            b, prev_z, g, x, prev_x = map(_tree.lift, (b, prev_z, g, x, prev_x))
            metric = b + _tree.scalar_like(prev_eps, b)
            y = g - prev_z.astype(g.dtype) * metric.astype(g.dtype)
            return x - prev_x, y

        def vectors(b, prev_z, g, x, prev_x):
            s, y = differences(b, prev_z, g, x, prev_x)
            # Not b · |s|²: XLA would store |s|² for the new diagonal.
            return [y, s, b.astype(s.dtype) * s]

        arguments = (
            state.diagonal,
            state.prev_preconditioned,
            updates,
            params,
            state.prev_params,
        )
        (y_s, s_b_s), (of_y, of_s, of_b_s) = _tree.inner_products(
            vectors,
            [(0, 1), (2, 1)],
            *arguments,
            groups=[0, 1, 2],
            dtype=dtype,
            axis_name=axis_name,
        )

        def unit(*exponents):
            """A power of two, and ε in units of the product of these."""
            return _tree.times_power_of_two(eps, jnp.negative(sum(exponents)))

        e_y_s, e_b_s = unit(of_y, of_s), unit(of_b_s, of_s)
        # Positive as well as at least ε: with ε = 0, zero curvature is no curvature.
        usable = ~first & (y_s >= e_y_s) & (s_b_s >= e_b_s) & (y_s > 0) & (s_b_s > 0)
        y_s, s_b_s = (jnp.where(usable, x, 1) for x in (y_s, s_b_s))
        # What all are multiplied by that are squared, and by what their quotients.
        scales = [_tree.power_of_two(-k, dtype) for k in (of_y, of_s, of_b_s)]
        epsilons = [e_y_s, e_b_s, unit(of_y, of_y), unit(of_b_s, of_b_s)]
        units = [_tree.power_of_two(k - of_s, dtype) for k in (of_y, of_b_s)]
        numbers = [y_s, s_b_s, *scales, *epsilons, *units]

        def new_diagonal(b, prev_z, g, x, prev_x):
            s, y = differences(b, prev_z, g, x, prev_x)
            found = [_tree.scalar_like(v, b) for v in numbers]
            ys, sbs, a_y, a_s, a_b_s, e_ys, e_bs, e_y, e_b, of_y_s, of_b = found
            y, s = a_y.astype(y.dtype) * y, a_s.astype(s.dtype) * s
            b_s_sq = jnp.square(b * (a_b_s / a_s)) * _tree.abs_sq(s)
            old = of_b * ((b_s_sq + e_b) / (sbs + e_bs))
            new = of_y_s * ((_tree.abs_sq(y) + e_y) / (ys + e_ys))
            return jnp.where(usable, jnp.abs(b - old + new), b)

        diagonal = jax.tree.map(new_diagonal, *arguments)

        def precondition(g, b, prev_x):
            lifted = _tree.lift(g)
            scaled = lifted / (b + _tree.scalar_like(eps, b)).astype(lifted.dtype)
            # After what was read has been put away: `params` are overwritten next.
            return _xla.after(never, jnp.where(first, lifted, scaled), prev_x)

        def keep(x, prev_x, b):
            # After the last use of those that are stored until now.
            return _xla.after(never, x, b).astype(prev_x.dtype)

        kept = jax.tree.map(keep, params, state.prev_params, diagonal)
        preconditioned = jax.tree.map(precondition, updates, diagonal, kept)
        return _tree.cast_like(preconditioned, updates), DiagonalBfgsState(
            count=_transformations.increment(state.count),
            diagonal=diagonal,
            prev_params=kept,
            prev_preconditioned=_tree.cast_like(
                preconditioned, state.prev_preconditioned
            ),
            skipped=state.skipped + (~first & ~usable).astype(jnp.int32),
        )

    return _transformations.make(init_fn, update_fn)

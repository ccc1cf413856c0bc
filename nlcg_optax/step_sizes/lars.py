"""Layerwise scaling of the gradient by the norm of its parameters (LARS)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from nlcg_optax import _check, _tree


def scale_by_lars(
    coefficient: float = 0.001,
    *,
    damping: float = 0.1,
    axis_name: _tree.AxisName | None = None,
) -> optax.GradientTransformation:
    r"""Scales the gradient of every leaf by the norm of its parameters.

    .. math::
        g \leftarrow g\, \frac{c \lVert w \rVert}
            {\lVert g \rVert + 0.1\, c \lVert w \rVert}

    with the coefficient c: layerwise scaling after LARS (arXiv:1708.03888) in the form
    that the published implementation of arXiv:1812.02886 applies *before* NLCG. The
    result has at most ``1 / damping`` times the gradient's norm.

    A leaf whose parameters or gradient are all zero keeps its gradient, as in
    ``optax.scale_by_trust_ratio``: scaled, a bias that starts at zero would never move.

    Args:
      coefficient: c, positive.
      damping: the factor 0.1, at least 0.
      axis_name: the mapped axis (or axes) over which the trees are sharded, see
        :func:`~nlcg_optax.nlcg`; None where they are whole, as they are under `jit`.

    Returns:
      A stateless transformation whose `update` needs `params`.

    Raises:
      ValueError: when built, for an argument out of range; in `update`, if `params` is
        missing or the gradients do not match it.

    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> tx = nlcg_optax.scale_by_lars(0.5)
    >>> params = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.0])}
    >>> grads = {"w": jnp.array([0.0, 2.0]), "b": jnp.array([7.0])}
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> print(updates["w"].round(4), updates["b"])  # 0.5·5 / (2 + 0.1·0.5·5)
    [0.     2.2222] [7.]
    """
    _check.number("coefficient", coefficient, minimum=0, exclusive=True, finite=True)
    _check.axis_name(axis_name)
    _check.number("damping", damping, minimum=0, finite=True)

    def init_fn(params: optax.Params) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, Any]:
        _tree.check_params(updates, params, "layerwise scaling")

        def scale(g, w):
            dtype = _tree.scalar_dtype(w)
            g_norm, w_norm = (
                _tree.norm(x, dtype=dtype, axis_name=axis_name) for x in (g, w)
            )
            scaled_norm = _tree.real_scalar(coefficient, dtype) * w_norm
            damped = _tree.real_scalar(damping, dtype) * scaled_norm
            denominator = g_norm + damped
            zero = (g_norm == 0) | (w_norm == 0)
            factor = jnp.where(zero, 1, scaled_norm / jnp.where(zero, 1, denominator))
            lifted = _tree.lift(g)
            return (lifted * _tree.scalar_like(factor, lifted)).astype(g.dtype)

        return jax.tree.map(scale, updates, params), state

    return optax.GradientTransformation(init_fn, update_fn)

"""How well a least-squares fit is determined."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree


def fit_covariance(
    residuals_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    absolute_sigma: bool = False,
) -> jax.Array:
    r"""The covariance of the parameters of a least-squares fit.

    With the residuals :math:`r` of m data, n parameters, and the Jacobian
    :math:`J = \partial r / \partial x` at the fit,

    .. math::
        C = s^2 (J^\top J)^{-1}, \qquad s^2 = \frac{r^\top r}{m - n},

    the Gauss–Newton approximation: it is exact where the residuals are linear in the
    parameters, and good where they are small or the model is nearly linear over a
    standard error. It is what ``scipy.optimize.curve_fit`` returns as ``pcov``.

    Args:
      residuals_fn: maps the parameters and `args` to the residuals, a tree of real
        arrays: the model minus the data, each divided by its standard deviation if
        that is known.
      params: the fit, such as the `params` of a :class:`MinimizeResult`: a tree of
        real arrays.
      *args: further arguments of `residuals_fn`.
      absolute_sigma: whether residuals are in units of known standard deviations, so
        that :math:`s^2 = 1`.

    Returns:
      The matrix, of shape [n, n], over the elements of the parameters in the order of
      their leaves. The root of its diagonal holds the standard errors;
      ``jax.flatten_util.ravel_pytree(params)[1]`` makes a tree of them. All of it is
      infinite where the data do not determine the parameters: where the columns of J
      depend on each other, or m ≤ n and s is not known. Parameters that a bound holds
      are to be left out of `params`, for they are not free.

    A line through four points, whose slope and level are known to 0.09 and 0.17:

    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> t, y = jnp.arange(4.0), jnp.array([1.1, 2.9, 5.2, 6.8])
    >>> def residuals(p, t, y):
    ...     return p[0] * t + p[1] - y
    >>> def loss(p, t, y):
    ...     return jnp.sum(residuals(p, t, y) ** 2)
    >>> fit = nlcg_optax.minimize(loss, jnp.zeros(2), t, y).params
    >>> covariance = nlcg_optax.fit_covariance(residuals, fit, t, y)
    >>> errors = jnp.sqrt(jnp.diag(covariance))
    >>> print([f"{x:.2f} ± {e:.2f}" for x, e in zip(fit, errors)])
    ['1.94 ± 0.09', '1.09 ± 0.17']
    """
    flat, unravel = ravel_pytree(params)

    def residuals(flat: jax.Array) -> jax.Array:
        return ravel_pytree(residuals_fn(unravel(flat), *args))[0]

    found = residuals(flat)
    jacobian = jax.jacfwd(residuals)(flat)
    _, sizes, rows = jnp.linalg.svd(jacobian, full_matrices=False)
    eps = jnp.finfo(sizes.dtype).eps
    determined = jnp.all(sizes > eps * max(jacobian.shape) * sizes[0])
    scaled = rows.T / jnp.where(determined, sizes, 1)
    covariance = scaled @ scaled.T
    freedom = found.size - flat.size
    if freedom < 0 or (freedom == 0 and not absolute_sigma):
        determined = False
    if not absolute_sigma:
        covariance *= jnp.sum(found**2) / max(freedom, 1)
    return jnp.where(determined, covariance, jnp.inf)

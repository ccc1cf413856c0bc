r"""The minimum of a quadratic model over a few directions: pure functions.

The model along :math:`\delta = -\sum_i c_i d_i` is

.. math:: m(c) = -s^\top c + \tfrac{1}{2}\, c^\top K c ,

with the slopes :math:`s_i = g^\top d_i` and the curvature
:math:`K_{ij} = d_i^\top C d_j`.
"""

import jax
import jax.numpy as jnp


def minimize(
    slopes: jax.Array, curvature: jax.Array, damping: jax.typing.ArrayLike = 0.0
) -> jax.Array:
    r"""The coefficients of the minimum, damped as by Levenberg and Marquardt.

    .. math:: (|K| + \lambda\, \mathrm{diag} |K|)\, c = s

    The system is scaled to a unit diagonal first, so that neither the lengths of the
    directions nor a factor in the loss matters; :math:`|\cdot|` takes the absolute
    value of the eigenvalues of what results, by which a direction of negative curvature
    is followed downhill (as in saddle-free Newton, Dauphin et al., 2014). Eigenvalues
    below the precision of the sums count as that precision, so that directions which
    are nearly the same share one step between them. A direction without curvature,
    such as zero, has the coefficient 0.

    Args:
      slopes: s, of shape [k].
      curvature: K, symmetric, of shape [k, k].
      damping: λ, a scalar.

    Returns:
      c, of shape [k].
    """
    scale = jnp.sqrt(jnp.abs(jnp.diagonal(curvature)))
    usable = scale > 0
    inverse = jnp.where(usable, 1 / jnp.where(usable, scale, 1), 0)
    unit = curvature * inverse[:, None] * inverse[None, :]
    # What is unused must not look like a level direction of the rest.
    unit = unit + jnp.diag((~usable).astype(unit.dtype))
    values, vectors = jnp.linalg.eigh(unit)
    values = jnp.maximum(jnp.abs(values), smallest_eigenvalue(unit.dtype))
    values = values + jnp.asarray(damping, values.dtype)
    # Sums rather than products of matrices, which accelerators round to half precision.
    along = jnp.sum(vectors * (slopes * inverse)[:, None], axis=0) / values
    return inverse * jnp.sum(vectors * along[None, :], axis=1)


def smallest_eigenvalue(dtype: jnp.dtype) -> float:
    """What an eigenvalue of a matrix of unit diagonal is known to: 1e-6 in float32."""
    return 8 * float(jnp.finfo(dtype).eps)


def decrease(
    coefficients: jax.Array, slopes: jax.Array, curvature: jax.Array
) -> jax.Array:
    r"""How far the model falls along a step: :math:`s^\top c - c^\top K c / 2`."""
    return jnp.sum(slopes * coefficients) - 0.5 * inner(
        coefficients, curvature, coefficients
    )


def part_that_falls(slope: jax.Array, curved: jax.Array, most: jax.Array) -> jax.Array:
    r"""The part t of a step by which the model falls by no more than a number.

    .. math:: t\, s^\top c - \tfrac{1}{2} t^2\, c^\top K c \le \text{most}

    Args:
      slope: :math:`s^\top c`.
      curved: :math:`c^\top K c`.
      most: a positive number.

    Returns:
      t, at most 1.
    """
    beyond = slope - 0.5 * curved > most
    # The smaller root, in the form that does not cancel.
    root = jnp.sqrt(jnp.maximum(slope**2 - 2 * curved * most, 0))
    return jnp.where(beyond, 2 * most / jnp.where(beyond, slope + root, 1), 1)


def inner(a: jax.Array, matrix: jax.Array, b: jax.Array) -> jax.Array:
    r""":math:`a^\top K b`."""
    return jnp.sum(a[:, None] * matrix * b[None, :])

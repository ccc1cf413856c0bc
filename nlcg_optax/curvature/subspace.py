r"""The minimum of a quadratic model over a few directions.

The model along :math:`\delta = -\sum_i c_i d_i` is

.. math:: m(c) = -s^\top c + \tfrac{1}{2}\, c^\top K c ,

with the slopes :math:`s_i = g^\top d_i` and the curvature
:math:`K_{ij} = d_i^\top C d_j`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nlcg_optax import _tree, _xla
from nlcg_optax.curvature.products import Curvature, Images, combine, join, stack


class Model(NamedTuple):
    """The quadratic model over the directions: new ones, past ones, residual ones.

    Attributes:
      slopes: of the gradient along each direction.
      products: the inner products of the directions in the curvature.
      coefficients: of the directions, at the minimum.
      residual_directions: those that are not known from outside.
      own_loss: what the curvature makes of its batch.
    """

    slopes: jax.Array
    products: jax.Array
    coefficients: jax.Array
    residual_directions: list[Any]
    own_loss: jax.Array


def build(
    curvature: Curvature,
    params: Any,
    grad: Any,
    loss: jax.Array,
    directions: Any,
    order: jax.Array,
    slopes: jax.Array,
    damping: jax.Array,
    residuals: int,
    precondition: Callable[[Any], Any],
    axis_name: _tree.AxisName | None,
) -> Model:
    """Minimizes over the directions, and over so many residual ones after them.

    Args:
      curvature: of the loss.
      params: where the step starts.
      grad: the gradient.
      loss: the value.
      directions: that are known, stacked.
      order: in which they are in the model (and the other way round).
      slopes: along them, and along steps that are remembered but are no directions, in
        the order of the model.
      damping: λ.
      residuals: directions to add.
      precondition: makes a direction of the gradient of the model at its minimum.
      axis_name: as in `scale_by_quadratic_model`.
    """
    dtype = slopes.dtype
    known, size = len(order), len(slopes)
    directions = jax.tree.map(
        lambda d, x: d.astype(jnp.result_type(x)), directions, params
    )
    linear = curvature.linearize(params, transposed=residuals > 0)
    images = linear.push(directions)
    products = _products(curvature, params, images, images, loss).astype(dtype)
    products = (0.5 * (products + products.T))[order][:, order]
    # Zeros for what is remembered but no direction, and for what is not made yet: what
    # is compiled for one size serves all the systems.
    products = jnp.pad(products, (0, size + residuals - known))
    slopes = jnp.pad(slopes, (0, residuals))
    solve = _xla.compiled_once(minimize)
    coefficients = solve(slopes, products, damping)
    made = []
    for at in range(size, size + residuals):
        # The gradient of the model at its minimum, preconditioned.
        used = [coefficients[:known][order], coefficients[size:at]]
        step = combine(images, jnp.concatenate(used))
        residual = jax.tree.map(_difference, grad, linear.pull(step))
        z = precondition(residual)
        image = linear.push(stack(params, [z]))
        images = join(images, image)
        column = _products(curvature, params, images, image, loss).astype(dtype)[:, 0]
        zeros = [jnp.zeros([size - known], dtype), jnp.zeros([residuals], dtype)]
        row = [column[:known][order], zeros[0], column[known:], zeros[1]]
        row = jnp.concatenate(row)[: size + residuals]
        products = products.at[at].set(row).at[:, at].set(row)
        (slope,) = slopes_along(grad, image.directions[0], dtype, axis_name)
        slopes = slopes.at[at].set(slope)
        coefficients = solve(slopes, products, damping)
        made.append(z)
    own_loss = curvature.value(params, images).astype(dtype)
    return Model(slopes, products, coefficients, made, own_loss)


def without_products(
    grad: Any, loss: jax.Array, slopes: jax.Array, residuals: int
) -> Model:
    """Of the shapes that `build` gives, for steps that need no model."""
    size = len(slopes) + residuals
    # Split as it is along explicit axes of a mesh, which `zeros_like` forgets here.
    zeros = jax.tree.map(lambda x: jnp.where(jnp.array(False), x, 0), grad)
    return Model(
        jnp.pad(slopes, (0, residuals)),
        jnp.zeros([size, size], slopes.dtype),
        jnp.zeros([size], slopes.dtype),
        [zeros] * residuals,
        loss,
    )


def slopes_along(
    grad: Any, stacked: Any, dtype: jnp.dtype, axis_name: Any
) -> jax.Array:
    """The inner products of the gradient with each of a stack of trees, [k]."""

    def integrands(g: jax.Array, d: jax.Array) -> list[jax.Array]:
        return [_tree.real_inner(g[None], d.astype(g.dtype))]

    (slopes,) = _tree.reduce_products(
        integrands, grad, stacked, dtype=dtype, axis_name=axis_name, stacked=True
    )
    return slopes


def cosine(coefficients: jax.Array, matrix: jax.Array, newest: int) -> jax.Array:
    """Cosine between the new step and the last one in the metric of the curvature."""
    other = jnp.zeros_like(coefficients).at[newest].set(1)
    product = inner(coefficients, matrix, other)
    lengths = [inner(coefficients, matrix, coefficients), matrix[newest, newest]]
    first, second = (_tree.square_root(jnp.maximum(x, 0)) for x in lengths)
    defined = (first > 0) & (second > 0)
    ratio = product / jnp.where(defined, first, 1) / jnp.where(defined, second, 1)
    return jnp.where(defined, ratio, 0)


def _difference(grad: jax.Array, product: jax.Array) -> jax.Array:
    lifted = _tree.lift(grad)
    return (lifted - _tree.lift(product).astype(lifted.dtype)).astype(grad.dtype)


def _products(
    curvature: Curvature, params: Any, a: Images, b: Images, loss: jax.Array
) -> jax.Array:
    """The inner products, the same on all devices where the loss is."""
    matrix = curvature.inner(params, a, b)
    local = _tree.varying_axes(matrix) - _tree.varying_axes(loss)
    if local:
        axes = ", ".join(sorted(map(repr, local)))
        raise ValueError(
            f"The curvature is each device's own along the axis {axes}: name it, "
            "`nlcg_optax.gauss_newton(..., axis_name=...)`, to take the mean."
        )
    return matrix


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
    scale = _tree.square_root(jnp.abs(jnp.diagonal(curvature)))
    usable = scale > 0
    inverse = jnp.where(usable, 1 / jnp.where(usable, scale, 1), 0)
    unit = curvature * inverse[:, None] * inverse[None, :]
    # What is unused must not look like a level direction of the rest.
    unit = unit + jnp.diag((~usable).astype(unit.dtype))
    damping = jnp.asarray(damping, unit.dtype)
    return inverse * _solve(unit, slopes * inverse, damping)


@jax.custom_jvp
def _solve(matrix: jax.Array, right: jax.Array, damping: jax.Array) -> jax.Array:
    """(|A| + λ)⁻¹ b, for a symmetric A."""
    values, vectors = jnp.linalg.eigh(matrix)
    return _divided(values, vectors, right, damping)


def _divided(
    values: jax.Array, vectors: jax.Array, right: jax.Array, damping: jax.Array
) -> jax.Array:
    values = jnp.maximum(jnp.abs(values), smallest_eigenvalue(values.dtype)) + damping
    # Sums rather than products of matrices, which accelerators round to half precision.
    along = jnp.sum(vectors * right[:, None], axis=0) / values
    return jnp.sum(vectors * along[None, :], axis=1)


@_solve.defjvp
def _solve_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """By divided differences: `eigh` has no derivative where eigenvalues are equal."""
    matrix, right, damping = primals
    matrix_dot, right_dot, damping_dot = tangents
    values, vectors = jnp.linalg.eigh(matrix)
    sizes, least = jnp.abs(values), smallest_eigenvalue(values.dtype)
    inverse = 1 / (jnp.maximum(sizes, least) + damping)
    slope = jnp.where(sizes > least, -jnp.sign(values) * inverse**2, 0)
    apart = values[:, None] - values[None, :]
    equal = jnp.abs(apart) <= jnp.sqrt(least) * (sizes[:, None] + sizes[None, :])
    ratios = (inverse[:, None] - inverse[None, :]) / jnp.where(equal, 1, apart)
    ratios = jnp.where(equal, 0.5 * (slope[:, None] + slope[None, :]), ratios)
    turn = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    inner = turn(vectors.T, turn(matrix_dot, vectors)) * ratios
    along = turn(vectors.T, right)
    found = turn(vectors, turn(inner, along) - damping_dot * inverse**2 * along)
    solution = _divided(values, vectors, right, damping)
    return solution, found + _divided(values, vectors, right_dot, damping)


def smallest_eigenvalue(dtype: jnp.dtype) -> float:
    """What an eigenvalue of a matrix of unit diagonal is known to: 1e-6 in float32."""
    return 8 * float(jnp.finfo(dtype).eps)


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
    # In units in which none of them is squared out of range.
    exponent = _tree.exponent_of(
        jnp.maximum(jnp.abs(slope), jnp.abs(most)), slope.dtype
    )
    unit = _tree.power_of_two(-exponent, slope.dtype)
    slope, curved, most = slope * unit, curved * unit, most * unit
    root = _tree.square_root(jnp.maximum(slope**2 - 2 * curved * most, 0))
    return jnp.where(beyond, 2 * most / jnp.where(beyond, slope + root, 1), 1)


def inner(a: jax.Array, matrix: jax.Array, b: jax.Array) -> jax.Array:
    r""":math:`a^\top K b`."""
    return jnp.sum(a[:, None] * matrix * b[None, :])

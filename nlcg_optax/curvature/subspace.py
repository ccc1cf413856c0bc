r"""The minimum of a quadratic model over a few directions.

The model along :math:`\delta = -\sum_i c_i d_i` is

.. math:: m(c) = -s^\top c + \tfrac{1}{2}\, c^\top K c ,

with the slopes :math:`s_i = g^\top d_i` and the curvature
:math:`K_{ij} = d_i^\top C d_j`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nlcg_optax import _tree
from nlcg_optax.curvature.products import Curvature, Images, combine, stack


class Model(NamedTuple):
    """The quadratic model over the directions: new ones, past ones, residual ones.

    Attributes:
      slopes: of the gradient along each direction.
      products: the inner products of the directions in the curvature.
      coefficients: of the directions, at the minimum.
      residual_directions: those that are not known from outside, stacked.
      own_loss: what the curvature makes of its batch.
    """

    slopes: jax.Array
    products: jax.Array
    coefficients: jax.Array
    residual_directions: Any
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

    All that has an entry for each direction has room for the residual ones from the
    beginning, so that one loop makes all of them: what a model takes to be compiled
    counts once.

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
    in_stack = jnp.concatenate([order, known + jnp.arange(residuals, dtype=jnp.int32)])
    directions = _cast(directions, params)
    linear = curvature.linearize(params, transposed=residuals > 0)
    images = linear.push(directions)
    products = _products(curvature, params, images, images, loss).astype(dtype)
    products = (0.5 * (products + products.T))[order][:, order]
    # What is remembered but no direction has zeros, as what is not yet made.
    products = jnp.pad(products, (0, size + residuals - known))
    slopes = jnp.pad(slopes, (0, residuals))
    own_loss = curvature.value(params, images).astype(dtype)
    zeros = jax.tree.map(lambda d: _zeros(d, residuals), directions)
    model = Model(
        slopes, products, minimize(slopes, products, damping), zeros, own_loss
    )
    if not residuals:
        return model
    # Where the directions of the stack are in the model.
    place = jnp.concatenate([jnp.arange(known, dtype=jnp.int32), size + jnp.arange(residuals, dtype=jnp.int32)])

    def add(number: jax.Array, carried: tuple[Any, Model]) -> tuple[Any, Model]:
        tangents, model = carried
        every = _concatenate(directions, model.residual_directions)
        images_so_far = Images(images.outputs, tangents, every)
        # The gradient of the model at its minimum, preconditioned.
        step = combine(images_so_far, model.coefficients[place][in_stack])
        residual = jax.tree.map(_difference, grad, linear.pull(step))
        z = precondition(residual)
        image = linear.push(stack(params, [z]))
        tangents = _put(tangents, image.tangents, known + number)
        made = _put(model.residual_directions, image.directions, number)
        images_so_far = Images(images.outputs, tangents, _concatenate(directions, made))
        (row,) = _products(curvature, params, image, images_so_far, loss).astype(dtype)
        row = jnp.zeros_like(model.slopes).at[place].set(row[in_stack])
        at = size + number
        products = model.products.at[at].set(row).at[:, at].set(row)
        (slope,) = slopes_along(grad, image.directions, dtype, axis_name)
        slopes = model.slopes.at[at].set(slope)
        coefficients = minimize(slopes, products, damping)
        return tangents, Model(slopes, products, coefficients, made, own_loss)

    tangents = _concatenate(
        images.tangents,
        jax.tree.map(lambda t: _zeros(t, residuals), images.tangents),
    )
    carried = _tree.carried(lambda carried: add(jnp.int32(0), carried), (tangents, model))
    _, model = jax.lax.fori_loop(0, residuals, add, carried)
    return model


def without_products(
    directions: Any, loss: jax.Array, slopes: jax.Array, params: Any, residuals: int
) -> Model:
    """Of the shapes that `build` gives, for steps that need no model."""
    size = len(slopes) + residuals
    return Model(
        jnp.pad(slopes, (0, residuals)),
        jnp.zeros([size, size], slopes.dtype),
        jnp.zeros([size], slopes.dtype),
        jax.tree.map(lambda d: _zeros(d, residuals), _cast(directions, params)),
        loss,
    )


def _cast(directions: Any, params: Any) -> Any:
    return jax.tree.map(lambda d, x: d.astype(jnp.result_type(x)), directions, params)


def _zeros(stacked: jax.Array, count: int) -> jax.Array:
    """Of so many more of what is stacked."""
    return jnp.zeros_like(stacked, shape=(count, *stacked.shape[1:]))


def _concatenate(a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), a, b)


def _put(stacked: Any, one: Any, index: jax.Array) -> Any:
    """The stack with the one entry of another in a place of it."""
    return jax.tree.map(
        lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, index, 0), stacked, one
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
    squares = inner(coefficients, matrix, coefficients) * matrix[newest, newest]
    defined = squares > 0
    return jnp.where(defined, product / jnp.sqrt(jnp.where(defined, squares, 1)), 0)


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

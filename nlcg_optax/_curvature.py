"""Curvature along a few directions, from forward-mode products alone."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nlcg_optax import _check, _tree


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Curvature:
    r"""The curvature of a loss, seen along a few directions at a time.

    :func:`gauss_newton` and :func:`hessian` make one; any function of the same kind
    may be wrapped as well. It is a constant to `jax.jit`, so that a step may be jitted
    that takes one as an argument.

    Attributes:
      products: maps the parameters and a sequence of k trees like them to the real,
        symmetric matrix of inner products :math:`d_i^\top C d_j`, of shape [k, k].

    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> matrix = jnp.array([[2.0, 1.0], [1.0, 3.0]])
    >>> def products(params, directions):
    ...     stacked = jnp.stack(directions)
    ...     return stacked @ matrix @ stacked.T
    >>> curvature = nlcg_optax.Curvature(products)
    >>> d, e = jnp.array([1.0, 0.0]), jnp.array([1.0, -1.0])
    >>> print(curvature(jnp.zeros(2), [d, e]))
    [[2. 1.]
     [1. 3.]]
    """

    products: Callable[[Any, Sequence[Any]], jax.Array]

    def __call__(self, params: Any, directions: Sequence[Any]) -> jax.Array:
        """The matrix of inner products of some directions, as `products` has it."""
        return self.products(params, directions)


def gauss_newton(
    outputs_fn: Callable[..., Any],
    loss_fn: Callable[..., jax.typing.ArrayLike],
    *,
    microbatches: Any | None = None,
    l2: float = 0.0,
    l2_mask: Any | None = None,
    has_aux: bool = False,
    params: Any | None = None,
    axis_name: _tree.AxisName | None = None,
) -> Curvature:
    r"""The generalized Gauss–Newton matrix of a loss of a model's outputs.

    With the outputs :math:`y(x)`, their Jacobian :math:`J`, and the second derivative
    :math:`H_L` of the loss with respect to them,

    .. math::
        d_i^\top G\, d_j = (J d_i)^\top H_L (J d_j) + \lambda\, d_i^\top d_j

    (Schraudolph, 2002, doi:10.1162/08997660260028683, section 3; Martens, 2010). No
    matrix is formed. The model is run forward once, and all directions are pushed
    through it side by side (`jax.jvp`): that costs about as much as one forward pass
    for each direction, and no backward pass. :math:`G` is positive semidefinite
    wherever the loss is convex in the outputs, as squared error, cross-entropy with
    logits, and the likelihoods of exponential families are.

    What the function closes over is the caller's choice: the whole batch or part of it.
    A quarter is usually enough, for these are a few numbers rather than a gradient.

    Args:
      outputs_fn: maps the parameters to the model's outputs: an array or a tree of
        them, of real or complex floating-point numbers.
      loss_fn: maps the outputs to the mean loss over the batch, a real scalar; twice
        differentiable. Terms of the parameters themselves, such as a penalty, enter if
        `outputs_fn` returns the parameters among its outputs.
      microbatches: a tree of arrays with a leading axis of microbatches. Both functions
        then take one microbatch (without that axis) as their second argument, one after
        the other, and the products are their mean. None for all at once.
      l2: λ of a penalty :math:`\tfrac{\lambda}{2} \lVert x \rVert^2` in the loss.
      l2_mask: tree of booleans (or a function from the parameters to it): the leaves
        that the penalty applies to. None for all.
      has_aux: whether `outputs_fn` returns a pair of outputs and something else, such
        as running statistics, that is ignored.
      params: the whole parameters, where the optimizer is shown part of them only
        (``optax.masked``, ``optax.partition``). The rest counts as fixed.
      axis_name: the mapped axis (or axes) of a `shard_map` or `pmap` over which the
        batch is split: the products are then the mean over its devices, taken in one
        all-reduce of k² numbers. Sharded parameters are for `outputs_fn` to gather
        (see :func:`pmean_value_and_grad`). Under `jit` name no axis.

    Returns:
      A :class:`Curvature`; its matrix is float32, or wider if the parameters are.

    Raises:
      ValueError: when called, if the loss is no scalar or a direction does not match
        the parameters.
      TypeError: when called, for outputs that are no floating-point numbers.
      NameError: when called where nothing maps the axis.

    Poisson regression, whose second derivative is diagonal:

    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
    >>> counts = jnp.array([1.0, 0.0, 4.0])
    >>> curvature = nlcg_optax.gauss_newton(
    ...     lambda w: x @ w,
    ...     lambda log_rate: jnp.mean(jnp.exp(log_rate) - counts * log_rate),
    ... )
    >>> w = jnp.log(jnp.array([2.0, 3.0]))  # rates of 2, 6 and 18
    >>> d, e = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
    >>> print(3 * curvature(w, [d, e]))
    [[26. 42.]
     [42. 78.]]
    """
    _check.number("l2", l2, minimum=0)

    def products(complete: Any, params: Any, stacked: Any, inputs: Any) -> jax.Array:
        def push(direction: Any) -> Any:
            outputs, tangent = jax.jvp(
                lambda params: outputs_fn(complete(params), *inputs),
                (params,),
                (direction,),
                has_aux=has_aux,
            )[:2]
            _check_outputs(outputs)
            return outputs, tangent

        # The outputs do not depend on the direction: they are computed once.
        outputs, tangents = jax.vmap(push, out_axes=(None, 0))(stacked)
        # Every device differentiates its own loss by its own outputs, even where types
        # know that they are the same everywhere: else gradients would be summed here.
        outputs, tangents = _vary((outputs, tangents), axis_name)

        def loss(outputs: Any) -> jax.Array:
            value = _check_loss(loss_fn(outputs, *inputs), "loss_fn", _GAUSS_NEWTON)
            return _vary(value, axis_name)

        def curve(tangent: Any) -> Any:
            return jax.jvp(jax.grad(loss), (outputs,), (tangent,))[1]

        # For complex outputs the conjugate, as `jax.grad` has it.
        curved = jax.vmap(curve)(tangents)
        dtype = _tree.scalar_dtype(params)
        dots = [
            _inner(u, h, dtype)
            for u, h in zip(
                jax.tree.leaves(tangents), jax.tree.leaves(curved), strict=True
            )
        ]
        return sum(dots[1:], start=dots[0])

    def penalty(complete: Any, params: Any, stacked: Any) -> jax.Array:
        whole = complete(params)
        mask = l2_mask(whole) if callable(l2_mask) else l2_mask
        mask = jax.tree.map(
            lambda keep, part: jax.tree.map(lambda _: bool(keep), part),
            True if mask is None else mask,
            whole,
        )
        penalized = jax.tree.map(
            lambda d, keep: d if not _is_masked(d) and keep else None,
            stacked,
            mask,
            is_leaf=_is_masked,
        )
        leaves, dtype = jax.tree.leaves(penalized), _tree.scalar_dtype(params)
        count = len(jax.tree.leaves(stacked)[0])
        # A leaf that is split over devices is summed over them, not averaged.
        dots = [_inner(jnp.conj(d), d, dtype) * _shards(d, axis_name) for d in leaves]
        return jnp.asarray(l2, dtype) * sum(dots, start=jnp.zeros([count] * 2, dtype))

    # Where there is no penalty no inner product of parameters is taken.
    penalized = not isinstance(l2, int | float) or l2 > 0
    return _curvature(
        products, penalty if penalized else None, microbatches, params, axis_name
    )


def hessian(
    value_fn: Callable[..., jax.typing.ArrayLike],
    *,
    microbatches: Any | None = None,
    params: Any | None = None,
    axis_name: _tree.AxisName | None = None,
) -> Curvature:
    r"""The second derivative of a function along a few directions.

    .. math::
        d_i^\top H d_j = \frac{\partial^2}{\partial s\, \partial t}
            f(x + s\, d_i + t\, d_j) \Big|_{s = t = 0}

    by forward mode over forward mode: there is no backward pass, and on several devices
    no gradient to sum. It costs about :math:`(k + 1)^2` forward passes. Unlike
    :func:`gauss_newton` it may be indefinite, which
    :func:`scale_by_quadratic_model` makes up for.

    Args:
      value_fn: maps the parameters to a real scalar, the mean over the batch.
      microbatches: a tree of arrays with a leading axis of microbatches, each of which
        (without that axis) is the second argument of `value_fn` in turn; the products
        are their mean. None for all at once.
      params: the whole parameters, where the optimizer is shown part of them only
        (``optax.masked``, ``optax.partition``). The rest counts as fixed.
      axis_name: as for :func:`gauss_newton`.

    Returns:
      A :class:`Curvature`; its matrix is float32, or wider if the parameters are.

    Raises:
      ValueError: when called, if the value is no real scalar or a direction does not
        match the parameters.
      NameError: when called where nothing maps the axis.

    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> curvature = nlcg_optax.hessian(lambda x: x[0] ** 3 + x[0] * x[1] ** 2)
    >>> d, e = jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0])
    >>> print(curvature(jnp.array([1.0, 2.0]), [d, e]))  # of [[6, 4], [4, 2]]
    [[ 6. 10.]
     [10. 16.]]
    """

    def products(complete: Any, params: Any, stacked: Any, inputs: Any) -> jax.Array:
        def value(params: Any) -> jax.Array:
            value = value_fn(complete(params), *inputs)
            return _check_loss(value, "value_fn", _HESSIAN)

        def second(d: Any, e: Any) -> jax.Array:
            def slope(params: Any) -> jax.Array:
                return jax.jvp(value, (params,), (d,))[1]

            return jax.jvp(slope, (params,), (e,))[1]

        rows = jax.vmap(second, (None, 0))
        matrix = jax.vmap(rows, (0, None))(stacked, stacked)
        return matrix.astype(_tree.scalar_dtype(params))

    return _curvature(products, None, microbatches, params, axis_name)


_GAUSS_NEWTON = (
    "`nlcg_optax.gauss_newton(lambda params: model(params, x), lambda outputs: "
    "loss(outputs, y).mean())`"
)
_HESSIAN = "`nlcg_optax.hessian(lambda params: loss(model(params, x), y).mean())`"


def _curvature(
    products: Callable[..., jax.Array],
    penalty: Callable[..., jax.Array] | None,
    microbatches: Any | None,
    whole: Any | None,
    axis_name: _tree.AxisName | None,
) -> Curvature:
    """What both kinds have in common: checks, microbatches, and the mean over devices.

    Args:
      products: maps a function that completes parameters, parameters, stacked
        directions, and a tuple of further inputs to a matrix.
      penalty: the same without inputs, for what depends on the parameters alone.
      microbatches: as in `gauss_newton`.
      whole: as `params` in `gauss_newton`.
      axis_name: as in `gauss_newton`.
    """

    def complete(part: Any) -> Any:
        """Fills the places that `optax.masked` emptied."""
        return jax.tree.map(
            lambda x, other: other if _is_masked(x) else x,
            part,
            part if whole is None else whole,
            is_leaf=_is_masked,
        )

    def matrix(params: Any, directions: Sequence[Any]) -> jax.Array:
        leaves = jax.tree.leaves(params, is_leaf=_is_masked)
        if whole is None and any(_is_masked(leaf) for leaf in leaves):
            raise ValueError(
                "The optimizer is shown part of the parameters only (optax.masked or "
                "optax.partition), but the model needs all: pass them as "
                "`gauss_newton(..., params=params)` or `hessian(..., params=params)`."
            )
        dtype = _tree.scalar_dtype(params)
        if not jax.tree.leaves(params):  # an empty group of `optax.partition`
            return jnp.zeros([len(directions)] * 2, dtype)
        params = jax.tree.map(jnp.asarray, params)
        tangents = [_tangent(i, params, d) for i, d in enumerate(directions)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tangents)
        if microbatches is None:
            total = products(complete, params, stacked, ())
        else:
            rows = jax.lax.map(
                lambda part: products(complete, params, stacked, (part,)), microbatches
            )
            total = jnp.mean(rows, axis=0)
        if penalty is not None:
            total = total + penalty(complete, params, stacked)
        if axis_name is not None:
            total = jax.lax.pmean(_vary(total, axis_name), _tree.bound_axes(axis_name))
        return 0.5 * (total + total.T)

    return Curvature(matrix)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _vary(tree: Any, axis_name: _tree.AxisName | None) -> Any:
    """The tree with types that may vary along all of the axes."""
    if axis_name is None:
        return tree
    axes = _tree.bound_axes(axis_name)
    tracked = _tree.tracked_axes(axes)

    def vary(x: jax.Array) -> jax.Array:
        constant = tracked - _tree.varying_axes(x)
        return _tree.vary(x, [axis for axis in axes if axis in constant])

    return jax.tree.map(vary, tree)


def _tangent(index: int, params: Any, direction: Any) -> Any:
    """A direction in the dtypes of the parameters, or an error that says which."""
    if jax.tree.structure(direction) != jax.tree.structure(params):
        raise ValueError(
            f"Direction {index} does not match the parameters: its tree is "
            f"{jax.tree.structure(direction)}, expected {jax.tree.structure(params)}."
        )

    def cast(path: Any, x: Any, d: Any) -> jax.Array:
        if jnp.shape(x) != jnp.shape(d):
            raise ValueError(
                f"Direction {index} does not match the parameters: leaf "
                f"'{jax.tree_util.keystr(path)}' has shape {jnp.shape(d)}, expected "
                f"{jnp.shape(x)}."
            )
        return jnp.asarray(d).astype(jnp.result_type(x))

    return jax.tree_util.tree_map_with_path(cast, params, direction)


def _check_outputs(outputs: Any) -> None:
    """Raises unless there are outputs, and all are floating-point numbers."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(outputs)
    if not leaves:
        raise ValueError(f"outputs_fn returned nothing. Call {_GAUSS_NEWTON}.")
    for path, leaf in leaves:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise TypeError(
                f"outputs_fn returned '{jax.tree_util.keystr(path)}' of dtype "
                f"{jnp.result_type(leaf)}: expected what the loss is computed from "
                "(logits, not classes) as floating-point numbers. Whatever else it "
                "returns goes into a second place, with has_aux=True. Call "
                f"{_GAUSS_NEWTON}."
            )


def _check_loss(value: jax.typing.ArrayLike, name: str, call: str) -> jax.Array:
    """The loss as an array, or an error that says what it should be."""
    value = jnp.asarray(value)
    real = jnp.issubdtype(value.dtype, jnp.floating)
    if value.ndim or not real:
        raise ValueError(
            f"{name} returned shape {value.shape} and dtype {value.dtype}: expected "
            f"the mean loss over the batch, a real scalar. Call {call}."
        )
    return value


def _inner(a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The real inner products Σ Re(a_i b_j) of two stacks of arrays."""

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        axes = tuple(range(1, a.ndim))
        return jax.lax.dot_general(
            a,
            b,
            ((axes, axes), ((), ())),
            # Accelerators multiply float32 in half precision otherwise.
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=_tree.compute_dtype(a.dtype),
        )

    if not jnp.iscomplexobj(a):
        return dot(a, b).astype(dtype)
    product = dot(jnp.real(a), jnp.real(b)) - dot(jnp.imag(a), jnp.imag(b))
    return product.astype(dtype)


def _shards(leaf: jax.Array, axis_name: _tree.AxisName | None) -> int:
    """Over how many devices a parameter is split, as its type has it."""
    if axis_name is None:
        return 1
    axes = _tree.bound_axes(axis_name)
    split = _tree.tracked_axes(axes) & _tree.varying_axes(leaf)
    return math.prod(jax.lax.axis_size(axis) for axis in split)

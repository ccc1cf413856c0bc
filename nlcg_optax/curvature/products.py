"""Curvature along a few directions, from forward-mode products alone."""

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nlcg_optax import _check, _parallel, _tree


class Images(NamedTuple):
    """What becomes of some directions in the model; all but the first stacked.

    Attributes:
      outputs: the model's outputs, the same for all directions.
      tangents: how the outputs change along each direction.
      directions: the directions.
    """

    outputs: Any
    tangents: Any
    directions: Any


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Curvature:
    r"""The curvature of a loss, seen along a few directions at a time.

    Made by :func:`gauss_newton` or :func:`hessian`, and passed to `update` as the
    keyword argument ``curvature``. Called with the parameters and a sequence of k trees
    like them it gives the matrix of their inner products :math:`d_i^\top C d_j`, real,
    symmetric, of shape [k, k]. To `jax.jit` it is a constant.

    Attributes:
      push: maps the parameters and stacked directions to their ``Images``.
      inner: maps the parameters and the images of two stacks of directions to the
        matrix of inner products between them.
      pull: maps the parameters and the image of one direction (still stacked) to the
        tree :math:`C d`.
      nonnegative: whether the loss is taken for one that is never below zero, as an
        error or a cross-entropy of outputs is: no step will then be believed to take
        much more off it than there is.
    """

    push: Callable[[Any, Any], Images]
    inner: Callable[[Any, Images, Images], jax.Array]
    pull: Callable[[Any, Images], Any]
    nonnegative: bool = False

    def __call__(self, params: Any, directions: Sequence[Any]) -> jax.Array:
        """The matrix of inner products of some directions."""
        if not jax.tree.leaves(params):  # an empty group of `optax.partition`
            return jnp.zeros([len(directions)] * 2)
        images = self.push(params, stack(params, directions))
        matrix = self.inner(params, images, images)
        return 0.5 * (matrix + matrix.T)

    def times(self, params: Any, direction: Any) -> Any:
        r"""The product :math:`C d` with one direction, a tree like it.

        It takes a backward pass, and on several devices an all-reduce of its size.
        """
        return self.pull(params, self.push(params, stack(params, [direction])))


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
    in_turn: bool = False,
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
      in_turn: whether the directions are pushed through the model one after the other,
        instead of side by side. Set it where a batch is split over devices under `jit`
        and the model has convolutions: side by side these take the directions as more
        examples, for which XLA would gather the batch onto every device.

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
    run = _on_whole(outputs_fn, params)

    def push(params: Any, stacked: Any, *inputs: Any) -> Images:
        def along(direction: Any) -> Any:
            outputs, tangent = jax.jvp(
                lambda params: run(params, *inputs),
                (params,),
                (direction,),
                has_aux=has_aux,
            )[:2]
            _check_outputs(outputs)
            return outputs, tangent

        # The outputs do not depend on the direction: they are computed once.
        if in_turn:
            outputs, push_one = jax.linearize(
                lambda params: run(params, *inputs), params, has_aux=has_aux
            )[:2]
            _check_outputs(outputs)
            pushed = [
                push_one(jax.tree.map(operator.itemgetter(i), stacked))
                for i in range(len(jax.tree.leaves(stacked)[0]))
            ]
            tangents = jax.tree.map(lambda *each: jnp.stack(each), *pushed)
        else:
            outputs, tangents = jax.vmap(along, out_axes=(None, 0))(stacked)
        # Every device differentiates its own loss by its own outputs, even where types
        # know that they are the same everywhere: else gradients would be summed here.
        outputs, tangents = _vary((outputs, tangents), axis_name)
        return Images(outputs, tangents, stacked)

    def curved(images: Images, *inputs: Any) -> Any:
        """H J d, its conjugate for complex outputs (as `jax.grad` has it)."""

        def loss(outputs: Any) -> jax.Array:
            value = _check_loss(loss_fn(outputs, *inputs), "loss_fn", _GAUSS_NEWTON)
            return _vary(value, axis_name)

        def along(tangent: Any) -> Any:
            return jax.jvp(jax.grad(loss), (images.outputs,), (tangent,))[1]

        return jax.vmap(along)(images.tangents)

    def inner(params: Any, a: Images, b: Images, *inputs: Any) -> jax.Array:
        dtype = _tree.scalar_dtype(params)
        pairs = zip(
            jax.tree.leaves(a.tangents),
            jax.tree.leaves(curved(b, *inputs)),
            strict=True,
        )
        dots = [_inner(u, h, dtype) for u, h in pairs]
        return sum(dots[1:], start=dots[0])

    def weighed(params: Any, image: Images, *inputs: Any) -> jax.Array:
        """The sum of the outputs, each times its H J d: its gradient is Jᵀ H J d."""
        outputs = run(params, *inputs)
        outputs = outputs[0] if has_aux else outputs
        weights = curved(image, *inputs)
        products = jax.tree.map(
            lambda y, h: jnp.sum(jnp.real(h[0] * y)), outputs, weights
        )
        dtype = _tree.scalar_dtype(params)
        return sum(
            (x.astype(dtype) for x in jax.tree.leaves(products)), jnp.zeros([], dtype)
        )

    def penalized(stacked: Any, part: Any) -> Any:
        """The directions, but None where there is no penalty."""
        mask = _on_whole(l2_mask, params)(part) if callable(l2_mask) else l2_mask
        mask = jax.tree.map(
            lambda keep, leaves: jax.tree.map(lambda _: bool(keep), leaves),
            True if mask is None else mask,
            part if params is None else params,
        )
        return jax.tree.map(
            lambda d, keep: d if not _is_masked(d) and keep else None,
            stacked,
            mask,
            is_leaf=_is_masked,
        )

    # Where there is no penalty no inner product of parameters is taken.
    none = isinstance(l2, int | float) and l2 == 0
    penalty = None if none else (l2, penalized)
    curvature = _curvature(push, inner, weighed, penalty, microbatches, axis_name)
    return dataclasses.replace(curvature, nonnegative=True)


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
    run = _on_whole(value_fn, params)

    def value(params: Any, *inputs: Any) -> jax.Array:
        return _check_loss(run(params, *inputs), "value_fn", _HESSIAN)

    def push(params: Any, stacked: Any, *inputs: Any) -> Images:
        del params, inputs
        return Images((), (), stacked)

    def inner(params: Any, a: Images, b: Images, *inputs: Any) -> jax.Array:
        def second(d: Any, e: Any) -> jax.Array:
            def slope(params: Any) -> jax.Array:
                return jax.jvp(lambda x: value(x, *inputs), (params,), (d,))[1]

            return jax.jvp(slope, (params,), (e,))[1]

        rows = jax.vmap(second, (None, 0))
        matrix = jax.vmap(rows, (0, None))(a.directions, b.directions)
        return matrix.astype(_tree.scalar_dtype(params))

    def slope(params: Any, image: Images, *inputs: Any) -> jax.Array:
        """The derivative along the direction: its gradient is H d."""
        direction = jax.tree.map(lambda x: x[0], image.directions)
        return jax.jvp(lambda x: value(x, *inputs), (params,), (direction,))[1]

    return _curvature(push, inner, slope, None, microbatches, axis_name)


_GAUSS_NEWTON = (
    "`nlcg_optax.gauss_newton(lambda params: model(params, x), lambda outputs: "
    "loss(outputs, y).mean())`"
)
_HESSIAN = "`nlcg_optax.hessian(lambda params: loss(model(params, x), y).mean())`"


def _curvature(
    push: Callable[..., Images],
    inner: Callable[..., jax.Array],
    scalar: Callable[..., jax.Array],
    penalty: tuple[Any, Callable[[Any, Any], Any]] | None,
    microbatches: Any | None,
    axis_name: _tree.AxisName | None,
) -> Curvature:
    """What both kinds have in common: microbatches, a penalty, the mean over devices.

    Args:
      push: as in `Curvature`, with a microbatch as a further argument, if there is one.
      inner: the same, on one device.
      scalar: maps the arguments of `pull` to the number whose gradient is C d.
      penalty: its coefficient, and what picks the leaves that it applies to.
      microbatches: as in `gauss_newton`.
      axis_name: as in `gauss_newton`.
    """

    def switch(tangents: Any) -> Any:
        """Exchanges the axes of the directions and of the microbatches."""
        return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tangents)

    def pushed(params: Any, stacked: Any) -> Images:
        if microbatches is None:
            return push(params, stacked)

        def one(part: Any) -> Any:
            return push(params, stacked, part)[:2]

        outputs, tangents = jax.lax.map(one, microbatches)
        return Images(outputs, switch(tangents), stacked)

    def matrix(params: Any, a: Images, b: Images) -> jax.Array:
        if microbatches is None:
            total = inner(params, a, b)
        else:

            def one(inputs: Any) -> jax.Array:
                part, outputs, u, v = inputs
                us, vs = (
                    Images(outputs, u, a.directions),
                    Images(outputs, v, b.directions),
                )
                return inner(params, us, vs, part)

            parts = (microbatches, a.outputs, switch(a.tangents), switch(b.tangents))
            total = jnp.mean(jax.lax.map(one, parts), axis=0)
        if penalty is not None:
            factor, penalized = penalty
            dots = [
                # A leaf that is split over devices is summed over them, not averaged.
                _inner(jnp.conj(d), e, total.dtype) * _shards(d, axis_name)
                for d, e in zip(
                    jax.tree.leaves(penalized(a.directions, params)),
                    jax.tree.leaves(penalized(b.directions, params)),
                    strict=True,
                )
            ]
            total += jnp.asarray(factor, total.dtype) * sum(dots, jnp.zeros_like(total))
        if axis_name is not None:
            axes = _tree.bound_axes(axis_name)
            total = jax.lax.pmean(_vary(total, axis_name), axes)
        return total

    def pull(params: Any, image: Images) -> Any:
        def whole(params: Any) -> jax.Array:
            if microbatches is None:
                return scalar(params, image)

            # Each microbatch runs forward again, rather than keep all of them.
            @jax.checkpoint
            def add(total: jax.Array, inputs: Any) -> Any:
                part, outputs, u = inputs
                one = scalar(params, Images(outputs, u, image.directions), part)
                return total + _vary(one, axis_name), None

            zero = _vary(jnp.zeros([], _tree.scalar_dtype(params)), axis_name)
            parts = (microbatches, image.outputs, switch(image.tangents))
            total, _ = jax.lax.scan(add, zero, parts)
            return total / len(jax.tree.leaves(microbatches)[0])

        if axis_name is None:
            product = jax.grad(whole)(params)
        else:
            _, product = _parallel.pmean_value_and_grad(whole, axis_name)(params)
        product = jax.tree.map(jnp.conj, product)
        if penalty is None:
            return product
        factor, penalized = penalty

        def add_penalty(p: jax.Array, d: jax.Array | None) -> jax.Array:
            return p if d is None else p + _tree.real_scalar(factor, p.dtype) * d[0]

        return jax.tree.map(
            add_penalty,
            product,
            penalized(image.directions, params),
            is_leaf=_is_masked,
        )

    return Curvature(pushed, matrix, pull)


def stack(params: Any, directions: Sequence[Any]) -> Any:
    """Stacks directions, in the dtypes of the parameters.

    Raises:
      ValueError: if one does not match the parameters.
    """
    tangents = [_tangent(i, params, d) for i, d in enumerate(directions)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *tangents)


def join(a: Images, b: Images) -> Images:
    """The images of two stacks of directions as those of one."""

    def concatenate(x: Any, y: Any) -> Any:
        return jax.tree.map(lambda u, v: jnp.concatenate([u, v]), x, y)

    return Images(
        a.outputs,
        concatenate(a.tangents, b.tangents),
        concatenate(a.directions, b.directions),
    )


def combine(images: Images, coefficients: jax.Array) -> Images:
    """The image of a linear combination of directions."""

    def total(x: jax.Array) -> jax.Array:
        lifted = _tree.lift(x)
        weights = _tree.scalar_like(coefficients, lifted)
        weights = jnp.reshape(weights, (-1,) + (1,) * (x.ndim - 1))
        return jnp.sum(weights * lifted, axis=0, keepdims=True).astype(x.dtype)

    return Images(
        images.outputs,
        jax.tree.map(total, images.tangents),
        jax.tree.map(total, images.directions),
    )


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


def _on_whole(fun: Callable[..., Any], whole: Any | None) -> Callable[..., Any]:
    """`fun` of parameters with places that `optax.masked` emptied, filled again."""

    def on_whole(part: Any, *inputs: Any) -> Any:
        masked = map(_is_masked, jax.tree.leaves(part, is_leaf=_is_masked))
        if whole is None:
            if not any(masked):
                return fun(part, *inputs)
            raise ValueError(
                "The optimizer is shown part of the parameters only (optax.masked or "
                "optax.partition), but the model needs all: pass them as "
                "`gauss_newton(..., params=params)` or `hessian(..., params=params)`."
            )
        filled = jax.tree.map(
            lambda x, other: other if _is_masked(x) else x,
            part,
            whole,
            is_leaf=_is_masked,
        )
        return fun(filled, *inputs)

    return on_whole


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
    a, b = _tree.lift(a)[:, None], _tree.lift(b)[None, :]
    # Summed within one kernel: XLA's CPU compiler takes a sixth of what it takes for
    # the product of matrices, and no accelerator rounds the factors first.
    if jnp.iscomplexobj(a):
        products = jnp.real(a) * jnp.real(b) - jnp.imag(a) * jnp.imag(b)
    else:
        products = a * b
    return jnp.sum(products, axis=tuple(range(2, products.ndim))).astype(dtype)


def _shards(leaf: jax.Array, axis_name: _tree.AxisName | None) -> int:
    """Over how many devices a parameter is split, as its type has it."""
    if axis_name is None:
        return 1
    axes = _tree.bound_axes(axis_name)
    split = _tree.tracked_axes(axes) & _tree.varying_axes(leaf)
    return math.prod(jax.lax.axis_size(axis) for axis in split)

"""Loss, gradient and curvature of one model and one batch."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nlcg_optax import _check, _parallel, _tree, _xla
from nlcg_optax.curvature.products import (
    Curvature,
    check_fraction,
    check_loss,
    gauss_newton,
)


def value_grad_and_curvature(
    outputs_fn: Callable[..., Any],
    loss_fn: Callable[[Any, Any], jax.typing.ArrayLike],
    *,
    fraction: float = 0.05,
    min_examples: int = 250,
    has_aux: bool = False,
    l2: float = 0.0,
    l2_mask: Any | None = None,
    microbatches: int = 1,
    shards: int = 1,
    axis_name: _tree.AxisName | None = None,
    reverse_mode: bool = False,
) -> Callable[..., tuple[Any, Any, Curvature]]:
    r"""`jax.value_and_grad` for optimizers that take the curvature too.

    The loss is written once, as a model and what is computed of its outputs,

    .. math::
        f(x) = L(y(x, b), b) + \tfrac{\lambda}{2} \lVert x \rVert^2 ,

    and all three are of this loss: the value and the gradient on the whole batch b, the
    curvature (:func:`gauss_newton`) on evenly spaced examples of it.

    Args:
      outputs_fn: maps parameters, a batch, and whatever else the returned function is
        given, to the model's outputs y: an array or a tree of them, floating-point.
      loss_fn: maps outputs and the batch to the mean loss over the batch, a real
        scalar; twice differentiable.
      fraction: the part of the batch that the curvature is taken on. It gives a few
        numbers, not a gradient, for which a twentieth of thousands is enough.
      min_examples: of at least so many examples, or of all of a smaller batch.
      has_aux: whether `outputs_fn` returns a pair, of outputs and of something else,
        such as BatchNorm's running statistics.
      l2: λ of the penalty.
      l2_mask: the leaves that it applies to: a tree of booleans, or a function from the
        parameters to it; None for all.
      microbatches: parts of the batch that are worked through one after the other, to
        save memory. Each is given a random key of its own, made of the one that the
        returned function is given.
      shards: devices over which the batch is split under `jit`. The examples of the
        curvature are then chosen on each of them, where they are.
      axis_name: the mapped axis (or axes) of a `shard_map` or `pmap` over which the
        batch is split. Value, gradient and curvature are then the means over its
        devices, as :func:`pmean_value_and_grad` takes them.
      reverse_mode: whether the curvature needs no derivative in forward mode, for
        functions of `jax.custom_vjp`, as for :func:`gauss_newton`.

    Returns:
      A function of parameters, a batch (a tree of arrays whose leading axes are of
      one length, that of the examples) and whatever else `outputs_fn` takes, such as a
      key for dropout (the same for the gradient and the curvature) or running
      statistics. It returns the value, the gradient, and the :class:`Curvature`; with
      ``has_aux`` the value is a pair, with the second part of what `outputs_fn`
      returned: of the whole batch, or the mean over microbatches where it is numbers.

    Raises:
      ValueError: when built, for an argument out of range; when called, for a batch
        whose examples cannot be counted or divided.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> def model(w, batch):
    ...     return batch["x"] @ w
    >>> def loss(outputs, batch):
    ...     return 0.5 * jnp.mean((outputs - batch["y"]) ** 2)
    >>> evaluate = nlcg_optax.value_grad_and_curvature(model, loss, l2=0.5)
    >>> batch = {"x": jnp.array([[1.0, 0.0], [1.0, 2.0]]), "y": jnp.array([3.0, -1.0])}
    >>> w = jnp.array([1.0, 1.0])
    >>> value, grad, curvature = evaluate(w, batch)
    >>> print(value, grad)  # (4 + 16) / 4 + 0.25·2
    5.5 [1.5 4.5]
    >>> print(curvature(w, [jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])]))
    [[1.5 1. ]
     [1.  2.5]]
    """
    _check.axis_name(axis_name, none="if all devices have the same batch")
    check_fraction(fraction)
    _check.static_counts(
        min_examples=(min_examples, 1),
        microbatches=(microbatches, 1),
        shards=(shards, 1),
    )
    _check.number("l2", l2, minimum=0)

    # One pair of functions for all steps: nothing is compiled anew for them.
    def outputs_of(params: Any, given: Any) -> Any:
        batch, rest = given
        return outputs_fn(params, batch, *rest)

    def loss_of(outputs: Any, given: Any) -> Any:
        return loss_fn(outputs, given[0])

    def part_of_value(params: Any, given: Any) -> Any:
        found = outputs_of(params, given)
        outputs, aux = found if has_aux else (found, None)
        return check_loss(loss_of(outputs, given), "loss_fn"), aux

    options: Any = {
        "l2": l2,
        "l2_mask": l2_mask,
        "has_aux": has_aux,
        "axis_name": axis_name,
        "in_turn": shards > 1,
        "reverse_mode": reverse_mode,
    }
    value_and_grad = jax.value_and_grad(part_of_value, has_aux=True)
    if axis_name is not None:
        value_and_grad = _parallel.pmean_value_and_grad(
            part_of_value, axis_name, has_aux=True
        )

    def evaluate(params: Any, batch: Any, *rest: Any) -> tuple[Any, Any, Curvature]:
        parts = _split(batch, microbatches, shards)
        stride = _stride(parts, fraction, min_examples, axis_name)
        few = jax.tree.map(lambda x: x[:, :, ::stride], parts)
        part = _examples(few) / _examples(parts)
        if microbatches == 1:
            given = (_joined(few, 0), rest)
            curvature = gauss_newton(
                outputs_of, loss_of, given, fraction=part, **options
            )
            (value, aux), grads = value_and_grad(params, (batch, rest))
        else:
            keys = _each_its_key(rest, microbatches)
            curvature = gauss_newton(
                outputs_of,
                loss_of,
                microbatches=(_joined(few, 1), keys),
                fraction=part,
                **options,
            )
            (value, aux), grads = _mean_in_turn(
                value_and_grad, params, (_joined(parts, 1), keys)
            )
        value = value + curvature.penalty(params)
        grads = curvature.add_decay(grads, params)
        return ((value, aux) if has_aux else value), grads, curvature

    return evaluate


def _split(batch: Any, microbatches: int, shards: int) -> Any:
    """The batch as [microbatches, shards, examples, ...]: none changes its device."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(batch)
    if not leaves:
        raise ValueError("The batch has no arrays: pass a tree of them.")
    sizes = {
        jax.tree_util.keystr(path): jnp.shape(x)[0] if jnp.ndim(x) else None
        for path, x in leaves
    }
    first = next(iter(sizes.values()))
    if first is None or set(sizes.values()) != {first}:
        raise ValueError(
            "The examples of the batch cannot be counted: the leading axes of its "
            f"arrays are {sizes}, expected one length. What has no examples goes "
            "beside the batch, as a further argument."
        )
    if first % (microbatches * shards):
        raise ValueError(
            f"A batch of {first} examples cannot be divided into microbatches="
            f"{microbatches} on each of shards={shards}."
        )

    def split(x: Any) -> jax.Array:
        x = jnp.reshape(x, (shards, microbatches, -1, *jnp.shape(x)[1:]))
        return jnp.swapaxes(x, 0, 1)

    return jax.tree.map(split, batch)


def _joined(parts: Any, axis: int) -> Any:
    """Without the axis of shards; with 0, without that of the microbatches too."""
    return jax.tree.map(
        lambda x: jnp.reshape(x, (*x.shape[:axis], -1, *x.shape[3:])), parts
    )


def _examples(parts: Any) -> int:
    return math.prod(jax.tree.leaves(parts)[0].shape[:3])


def _stride(parts: Any, fraction: float, fewest: int, axis_name: Any) -> int:
    """One example of so many tells the curvature."""
    rows = _examples(parts)
    if axis_name is not None:
        axes = _tree.bound_axes(axis_name)
        rows *= math.prod(jax.lax.axis_size(axis) for axis in axes)
    return max(rows // max(round(rows * fraction), fewest), 1)


def _each_its_key(rest: Any, count: int) -> Any:
    """What all microbatches are given, with an axis for them; keys differ."""

    def repeat(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.vmap(jax.random.fold_in, (None, 0))(x, jnp.arange(count))
        return jnp.broadcast_to(x, (count, *x.shape))

    return jax.tree.map(repeat, rest)


def _mean_in_turn(value_and_grad: Callable[..., Any], params: Any, parts: Any) -> Any:
    """The means of values, gradients and what else comes with them."""
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(value_and_grad, params, first)
    (value, _), grads = shapes

    def add(total: Any, part: Any) -> Any:
        (value, aux), grads = _xla.canonical(value_and_grad)(params, part)
        return jax.tree.map(jnp.add, total, (value, grads)), aux

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (value, grads))
    zeros = jax.tree.map(_tree.vary_like, zeros, (value, grads))
    (value, grads), aux = jax.lax.scan(add, zeros, parts)
    count = len(jax.tree.leaves(parts)[0])

    def mean(x: jax.Array) -> jax.Array:
        return jnp.mean(x, 0) if jnp.issubdtype(x.dtype, jnp.inexact) else x[-1]

    value, grads = jax.tree.map(lambda x: x / count, (value, grads))
    return (value, jax.tree.map(mean, aux)), grads

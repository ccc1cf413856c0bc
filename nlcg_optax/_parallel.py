"""Means over devices, for steps that communicate by themselves."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from nlcg_optax import _check, _tree


def pmean_value_and_grad(
    fun: Callable[..., Any],
    axis_name: _tree.AxisName,
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
) -> Callable[..., Any]:
    r"""`jax.value_and_grad` of the mean over the devices of a mapped axis.

    Inside a `shard_map` or `pmap` every device computes the loss :math:`f_i` of its
    share of the global batch. The result is, on each of the n devices,

    .. math::
        f = \frac{1}{n} \sum_i f_i \quad\text{and}\quad
        \nabla f = \frac{1}{n} \sum_i \nabla f_i .

    With :math:`f_i` a mean over shares of *equal* size (what `shard_map` and `pmap`
    make), both are those of the global batch: what step rules that follow the loss
    need, beside a gradient and parameters that are the same everywhere.

    In a `shard_map` that checks types (``check_vma=True``, its default) parameters may
    be sharded over the axis; `fun` then gathers them (`jax.lax.all_gather`), and each
    device is given the gradient of its shard. Elsewhere (``check_vma=False``, `pmap`)
    sharded and replicated parameters cannot be told apart, and all count as replicated:
    gather sharded ones first, and take the gradient of the whole.

    Args:
      fun: a function whose value is a real scalar, the mean over the device's share. It
        may communicate over the axis itself, as cross-device batch normalization does;
        a value that it averaged already stays as it is.
      axis_name: the mapped axis, or a tuple of several, over which the batch is split.
      argnums: as in `jax.value_and_grad`.
      has_aux: as in `jax.value_and_grad`; the auxiliary output is each device's own,
        not averaged.

    Returns:
      A function of the arguments of `fun` that returns ``(value, gradient)``, or
      ``((value, aux), gradient)``; where types are checked, the value and the gradient
      of replicated parameters are known to be the same on every device.

    Raises:
      NameError: when called where nothing maps the axis.

    With as many devices as there are:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jax.sharding import AxisType
    >>> from jax.sharding import PartitionSpec as P
    >>> import nlcg_optax
    >>> def loss_fn(w, x):
    ...     return jnp.mean((w * x) ** 2)
    >>> mesh = jax.make_mesh((jax.device_count(),), ("data",), (AxisType.Auto,))
    >>> @jax.jit
    ... @jax.shard_map(mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    ... def step(w, x):
    ...     return nlcg_optax.pmean_value_and_grad(loss_fn, "data")(w, x)
    >>> value, gradient = step(3.0, jnp.arange(24.0))
    >>> print(value, gradient)  # 9·4324/24 and 2·3·4324/24
    1621.5 1081.0
    """
    _check.axis_name(axis_name, none="for no mean")

    @functools.wraps(fun)
    def value_and_grad(*args: Any, **kwargs: Any) -> Any:
        axes = _tree.bound_axes(axis_name)
        tracked = _tree.tracked_axes(axes)
        untracked = tuple(axis for axis in axes if axis not in tracked)

        def copied_along(x: jax.typing.ArrayLike) -> tuple[_tree.AxisName, ...]:
            varying = _tree.varying_axes(x)
            return tuple(axis for axis in axes if axis in tracked - varying)

        # The gradient of a parameter known to be the same everywhere would come out
        # summed already. A copy that may differ has each device's own gradient.
        several = isinstance(argnums, Sequence)
        named = tuple(argnums) if isinstance(argnums, Sequence) else (argnums,)
        numbers = [n + len(args) if n < 0 else n for n in named]
        copies = {
            n: jax.tree.map(lambda x: _tree.vary(x, copied_along(x)), arg)
            for n, arg in enumerate(args)
            if n in numbers
        }
        result, grads = jax.value_and_grad(fun, argnums, has_aux)(
            *(copies.get(n, arg) for n, arg in enumerate(args)), **kwargs
        )
        value, aux = result if has_aux else (result, None)

        # What does not vary, `fun` has averaged: its gradient has the factor 1/n.
        averaged = copied_along(value)
        count = 1
        for axis in axes:
            count *= 1 if axis in averaged else jax.lax.axis_size(axis)

        def mean(grad: jax.Array, parameter: jax.typing.ArrayLike) -> jax.Array:
            summed = (*copied_along(parameter), *untracked)
            return (jax.lax.psum(grad, summed) if summed else grad) / count

        parameters = tuple(args[n] for n in numbers)
        grads = jax.tree.map(mean, grads, parameters if several else parameters[0])
        over = tuple(axis for axis in axes if axis not in averaged)
        value = jax.lax.pmean(value, over) if over else value
        return ((value, aux) if has_aux else value), grads

    return value_and_grad

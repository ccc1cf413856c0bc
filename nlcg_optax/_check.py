"""Checks of arguments, made when a transformation is built."""

import math
import numbers
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def number(
    name: str,
    value: Any,
    *,
    minimum: float = -math.inf,
    exclusive: bool = False,
    integer: bool = False,
    finite: bool = False,
) -> None:
    """Raises unless `value` is a number (an integer) from `minimum` on.

    Scalar arrays pass unseen: `optax.inject_hyperparams` turns numbers into arrays,
    which have no value while they are traced.
    """
    if getattr(value, "ndim", 0):
        raise ValueError(
            f"{name} is an array of shape {value.shape}: expected one number."
        )
    if hasattr(value, "dtype") and not isinstance(value, numbers.Number | str):
        return
    kind = numbers.Integral if integer else numbers.Real
    valid = False
    if isinstance(value, kind) and not isinstance(value, bool):
        valid = float(value) > minimum if exclusive else float(value) >= minimum
        valid &= math.isfinite(value) or not finite
    if not valid:
        what = "an integer" if integer else "a number"
        bound = ""
        if minimum > -math.inf:
            bound = f" {'greater than' if exclusive else 'of at least'} {minimum:g}"
        bound += ", and finite" if finite else ""
        raise ValueError(f"{name}={value!r} is not valid: expected {what}{bound}.")


def flag(name: str, value: Any) -> None:
    """Raises unless `value` is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}={value!r} is not valid: expected True or False.")


def static_counts(refused: type = Tracer, /, **counts: tuple[Any, int]) -> None:
    """Raises unless all are integers from a minimum on that are known when compiling.

    `optax.inject_hyperparams` traces the numbers that it is not told to leave alone.

    Args:
      refused: the arrays that will not do: those that are traced, or all.
      counts: by name a value, and the least that it may be.
    """
    for name, (value, minimum) in counts.items():
        if isinstance(value, refused):
            array = "a traced array" if isinstance(value, Tracer) else "an array"
            raise ValueError(
                f"{name} is {array}, but what is compiled follows from it. Call "
                f"`optax.inject_hyperparams(..., static_args={tuple(counts)})`."
            )
        number(name, value, minimum=minimum, integer=True)


def floating_dtype(name: str, value: Any) -> None:
    """Raises unless `value` is a real or complex floating-point dtype, or None."""
    try:
        valid = value is None or jnp.issubdtype(jnp.dtype(value), jnp.inexact)
    except TypeError:  # no dtype at all
        valid = False
    if not valid:
        raise ValueError(
            f"{name}={value!r} is not valid: expected a floating-point dtype, such as "
            "jnp.bfloat16, or None."
        )


def axis_name(value: Any, *, none: str = "") -> None:
    """Raises unless this is the name of a mapped axis, or a tuple of names, or None.

    Args:
      value: what was given.
      none: what an empty tuple means; it is none of these where that is nothing.
    """
    names = value if isinstance(value, tuple) else (value,)
    known = all(isinstance(name, str) for name in names)
    if value is None or (known and (names or none)):
        return
    raise ValueError(
        f"axis_name={value!r} is not valid: expected the name of an axis that a "
        "`shard_map` or `pmap` maps, such as 'data', a tuple of such names, "
        f"{f'an empty one {none}, ' if none else ''}or None for no such axis."
    )


def is_function(value: Any) -> bool:
    """Whether this is to be called for what is wanted, rather than be it.

    A tree that can be called, such as a module of booleans in the place of its
    parameters, is the tree. (`jax.tree_util.Partial` is a function all the same.)
    """
    if isinstance(value, jax.tree_util.Partial):
        return True
    return callable(value) and jax.tree_util.all_leaves([value])


def is_schedule(value: Any) -> bool:
    """Whether this is a function of the count of steps, in the place of a number.

    Unlike a tree a number cannot be called: a module that can be is a schedule.
    """
    return callable(value) and not isinstance(value, type)


def mask(name: str, value: Any) -> None:
    """Raises unless this can say of the leaves of a tree whether they are meant.

    Args:
      name: of the argument.
      value: a tree of booleans, a function from parameters to one, or None for all.
    """
    if value is None or is_function(value):
        return
    expected = (
        "expected a tree of booleans like the parameters, a function from parameters "
        "to one, or None for all of them."
    )
    leaves = jax.tree.leaves(value)
    for leaf in leaves:
        if isinstance(leaf, str | numbers.Number) and not isinstance(leaf, bool):
            raise ValueError(f"{name} has {leaf!r} in it: {expected}")
    if isinstance(value, bool) or any(isinstance(x, jax.Array) for x in leaves):
        what = repr(value) if isinstance(value, bool) else "an array"
        raise ValueError(
            f"{name} is {what}: {expected} Was it a function? "
            "`optax.inject_hyperparams` calls it with the count of steps, as a "
            "schedule, unless it is named: "
            f"`optax.inject_hyperparams(..., static_args=({name!r},))`."
        )


def one_of(name: str, value: Any, known: Iterable[str], otherwise: str = "") -> None:
    """Raises unless `value` is one of the known names."""
    known = sorted(known)
    if not isinstance(value, str) or value not in known:
        names = ", ".join(repr(key) for key in known)
        raise ValueError(
            f"{name}={value!r} is unknown: expected one of {names}{otherwise}."
        )


def loss(
    value: Any,
    missing: str,
    name: str = "value",
    expected: str = "the loss, a real scalar.",
) -> jax.Array:
    """The loss as an array, or an error that says what it should be.

    Args:
      value: what was given.
      missing: why it is needed and how to pass it, for where it is None.
      name: what it is called.
      expected: what it should have been.
    """
    if value is None:
        raise ValueError(f"{name}=None: {missing}")
    value = jnp.asarray(value)
    if value.ndim or jnp.iscomplexobj(value):
        raise ValueError(
            f"{name} of shape {value.shape} and dtype {value.dtype} is not valid: "
            f"expected {expected}"
        )
    return value

"""Checks of arguments, made when a transformation is built."""

import math
import numbers
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer


def number(
    name: str,
    value: Any,
    *,
    minimum: float = -math.inf,
    exclusive: bool = False,
    integer: bool = False,
) -> None:
    """Raises unless `value` is a number (an integer) from `minimum` on.

    Arrays pass unseen: `optax.inject_hyperparams` turns numbers into arrays, which
    have no value while they are traced.
    """
    if hasattr(value, "dtype") and not isinstance(value, numbers.Number | str):
        return
    kind = numbers.Integral if integer else numbers.Real
    valid = False
    if isinstance(value, kind) and not isinstance(value, bool):
        valid = float(value) > minimum if exclusive else float(value) >= minimum
    if not valid:
        what = "an integer" if integer else "a number"
        bound = ""
        if minimum > -math.inf:
            bound = f" {'greater than' if exclusive else 'of at least'} {minimum:g}"
        raise ValueError(f"{name}={value!r} is not valid: expected {what}{bound}.")


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

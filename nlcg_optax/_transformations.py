"""What every piece does with transformations: makes one, and takes others in."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax


def make(
    init: Callable[..., Any], update: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
    """A transformation of functions that name their own state's type.

    Optax types the state of each as any tree, which no function of one type takes.
    """
    return optax.GradientTransformationExtraArgs(init, update)


def increment(count: jax.Array) -> jax.Array:
    """One more; the largest integer stays."""
    return jnp.asarray(optax.safe_increment(count))


def several(given: Any) -> tuple[Any, ...]:
    """One preconditioner (or name, or None), or a sequence of them, as a tuple."""
    # A transformation is a (named) tuple itself.
    one = isinstance(given, str | optax.GradientTransformation)
    return tuple(given) if isinstance(given, Sequence) and not one else (given,)


def preconditioner(
    given: Any, name: str = "preconditioner"
) -> optax.GradientTransformationExtraArgs:
    """A preconditioner that takes extra arguments; None is the plain gradient."""
    if given is None:
        return optax.with_extra_args_support(optax.identity())
    if not isinstance(given, optax.GradientTransformation):
        raise ValueError(
            f"{name}={given!r} is not valid: expected an "
            "optax.GradientTransformation or None."
        )
    return optax.with_extra_args_support(given)

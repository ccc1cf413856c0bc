"""Where a function of one variable has its minimum, from two points of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Point(NamedTuple):
    """A point on the line: its step, value and slope."""

    step: jax.Array
    value: jax.Array
    slope: jax.Array


def secant(a: Point, b: Point) -> jax.Array:
    """Where the slope is zero by the line through two slopes; NaN if it is level."""
    rise = b.slope - a.slope
    level = rise == 0
    zero = a.step - a.slope * (b.step - a.step) / jnp.where(level, 1, rise)
    return jnp.where(level, jnp.nan, zero)


def cubic(a: Point, b: Point) -> jax.Array:
    """The minimum of the cubic through two values and slopes; NaN if it has none."""
    h = b.step - a.step
    c = a.slope + b.slope - 3 * (b.value - a.value) / h
    discriminant = jnp.square(c) - a.slope * b.slope
    root = jnp.sqrt(jnp.maximum(discriminant, 0))
    denominator = b.slope - a.slope + 2 * root
    exists = (discriminant >= 0) & (denominator != 0)
    step = b.step - h * (b.slope + root - c) / jnp.where(exists, denominator, 1)
    return jnp.where(exists, step, jnp.nan)

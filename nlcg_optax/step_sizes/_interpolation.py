"""Where a function of one variable has its minimum, from two points of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nlcg_optax import _tree


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
    secant_slope = 3 * (b.value - a.value) / h
    # Slopes of ordinary size: they are squared.
    steepest = jnp.maximum(jnp.abs(a.slope), jnp.abs(b.slope))
    exponent = _tree.exponent_of(
        jnp.maximum(steepest, jnp.abs(secant_slope)), steepest.dtype
    )
    unit = _tree.power_of_two(-exponent, steepest.dtype)
    before, after = a.slope * unit, b.slope * unit
    c = before + after - secant_slope * unit
    discriminant = jnp.square(c) - before * after
    root = _tree.square_root(jnp.maximum(discriminant, 0))
    denominator = after - before + 2 * root
    exists = (discriminant >= 0) & (denominator != 0)
    step = b.step - h * (after + root - c) / jnp.where(exists, denominator, 1)
    return jnp.where(exists, step, jnp.nan)

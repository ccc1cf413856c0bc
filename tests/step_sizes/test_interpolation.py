"""Minima of a line and of a cubic through two points."""

import jax.numpy as jnp
import numpy as np
import pytest

from nlcg_optax.step_sizes._interpolation import Point, cubic, secant


def points(f, df, *steps):
    return [Point(*(jnp.float64(v) for v in (x, f(x), df(x)))) for x in steps]


def test_the_secant_is_exact_where_the_slope_is_a_line(x64):
    a, b = points(lambda x: (x - 3) ** 2, lambda x: 2 * (x - 3), 0.5, 1.25)
    np.testing.assert_allclose(secant(a, b), 3, rtol=1e-14)
    np.testing.assert_allclose(secant(b, a), 3, rtol=1e-14)


def test_the_cubic_is_exact_where_the_function_is_one(x64):
    # Minimum at 2, maximum at -1: the slope is 6(x - 2)(x + 1).
    a, b = points(
        lambda x: 2 * x**3 - 3 * x**2 - 12 * x, lambda x: 6 * (x - 2) * (x + 1), 0, 3
    )
    np.testing.assert_allclose(cubic(a, b), 2, rtol=1e-14)


@pytest.mark.parametrize("interpolate", [secant, cubic])
def test_nothing_to_find_is_nan(x64, interpolate):
    a, b = points(lambda x: -x, lambda x: -1.0, 0, 1)
    assert np.isnan(interpolate(a, b))

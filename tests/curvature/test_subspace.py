"""The minimum over a few directions, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlcg_optax.curvature import subspace

RNG = np.random.default_rng(0)
FACTOR = RNG.normal(size=(4, 4))
MATRIX = FACTOR @ FACTOR.T
SLOPES = RNG.normal(size=4)


def minimize(slopes, matrix, damping=0.0):
    return np.asarray(subspace.minimize(*map(jnp.asarray, (slopes, matrix)), damping))


def test_it_is_the_minimum(x64):
    expected = np.linalg.solve(MATRIX, SLOPES)
    got = minimize(SLOPES, MATRIX)
    np.testing.assert_allclose(got, expected, rtol=1e-10)
    curved = subspace.inner(*map(jnp.asarray, (got, MATRIX, got)))
    np.testing.assert_allclose(curved, SLOPES @ expected, rtol=1e-12)


def test_the_part_of_a_step_by_which_the_model_falls_so_far(x64):
    slope, curved = 3.0, 2.0  # the model falls by 3 t - t², and by 2 with all of it
    for most in (2.5, 2.0, 1.25, 1e-9):
        t = float(subspace.part_that_falls(*map(jnp.asarray, (slope, curved, most))))
        assert slope * t - 0.5 * curved * t**2 == pytest.approx(min(most, 2.0))
        assert 0 < t <= 1
    flat = subspace.part_that_falls(*map(jnp.asarray, (4.0, 0.0, 1.0)))
    assert flat == 0.25


def test_damping_is_relative_to_the_diagonal(x64):
    damped = MATRIX + 0.3 * np.diag(np.diag(MATRIX))
    expected = np.linalg.solve(damped, SLOPES)
    np.testing.assert_allclose(minimize(SLOPES, MATRIX, 0.3), expected, rtol=1e-10)


def test_neither_lengths_nor_a_factor_matter(x64):
    expected = minimize(SLOPES, MATRIX, 0.1)
    lengths = np.array([1e-8, 1.0, 3.0, 1e6])
    got = minimize(SLOPES * lengths, MATRIX * np.outer(lengths, lengths), 0.1)
    np.testing.assert_allclose(got * lengths, expected, rtol=1e-10)
    # Powers of two round nothing.
    for factor in (2.0**-60, 2.0**60):
        np.testing.assert_array_equal(
            minimize(factor * SLOPES, factor * MATRIX, 0.1), expected
        )


def test_a_direction_without_curvature_has_no_part():
    """Zero, which is what the history holds at first."""
    matrix, slopes = MATRIX.copy(), SLOPES.copy()
    matrix[2] = matrix[:, 2] = slopes[2] = 0
    got = minimize(np.float32(slopes), np.float32(matrix))
    rest = [0, 1, 3]
    expected = np.linalg.solve(matrix[np.ix_(rest, rest)], slopes[rest])
    assert got[2] == 0
    np.testing.assert_allclose(got[rest], expected, rtol=1e-4)
    np.testing.assert_array_equal(minimize(0 * SLOPES, 0 * MATRIX), np.zeros(4))
    # A slope without curvature leads nowhere either.
    np.testing.assert_array_equal(minimize(SLOPES, 0 * MATRIX), np.zeros(4))


@pytest.mark.parametrize("difference", [0.0, 1e-7, 1e-5, 1e-3])
def test_nearly_parallel_directions_share_one_step(difference):
    """In float32 their products cancel; the step along both is what one alone has."""
    one = np.array([1.0, 2.0, -1.0])
    other = one + difference * np.array([2.0, -1.0, 0.5])
    gradient, hessian = np.array([0.3, 1.0, 0.2]), np.diag([1.0, 2.0, 5.0])
    directions = np.stack([one, other])
    got = minimize(
        np.float32(directions @ gradient),
        np.float32(directions @ hessian @ directions.T),
    )
    assert np.all(np.isfinite(got))
    slope, curvature = one @ gradient, one @ hessian @ one
    step = got @ directions
    decrease = step @ gradient - 0.5 * step @ hessian @ step
    # At least nearly as good as one alone, for rounding is not read as curvature.
    assert decrease > 0.99 * 0.5 * slope**2 / curvature
    assert np.linalg.norm(got) < 1e3


def test_negative_curvature_is_followed_downhill(x64):
    np.testing.assert_allclose(minimize([2.0], [[-4.0]]), [0.5])
    # Of a saddle: each of its axes by the absolute value of its curvature.
    turn = np.array([[0.8, -0.6], [0.6, 0.8]])
    scaled = turn @ np.diag([1.5, -0.5]) @ turn.T  # has a diagonal of both signs
    absolute = np.abs(np.sqrt(np.abs(np.diag(scaled))))
    unit = scaled / np.outer(absolute, absolute)
    values, vectors = np.linalg.eigh(unit)
    inverse = vectors @ np.diag(1 / np.abs(values)) @ vectors.T
    slopes = np.array([1.0, -2.0])
    expected = inverse @ (slopes / absolute) / absolute
    got = minimize(slopes, scaled)
    np.testing.assert_allclose(got, expected, rtol=1e-10)
    assert slopes @ got > 0


@pytest.mark.parametrize("place", ["slopes", "matrix"])
def test_what_is_not_finite_shows(place):
    slopes, matrix = SLOPES.copy(), MATRIX.copy()
    (slopes if place == "slopes" else matrix)[..., 1] = np.nan
    assert not np.all(np.isfinite(minimize(slopes, matrix)))


def test_under_vmap_and_jit():
    slopes = np.float32(np.stack([SLOPES, -2 * SLOPES]))
    matrices = np.float32(np.stack([MATRIX, 3 * MATRIX]))
    got = jax.jit(jax.vmap(subspace.minimize))(slopes, matrices)
    for row, s, m in zip(got, slopes, matrices, strict=True):
        np.testing.assert_allclose(row, minimize(s, m), rtol=1e-4)

"""The Newton–Schulz iteration, as pure functions of arrays."""

import jax.numpy as jnp
import numpy as np
import pytest

from nlcg_optax.preconditioners._newton_schulz import (
    COEFFICIENTS,
    newton_schulz,
    polar_factor,
)


def literal(x, iterations):
    """Muon's iteration on the matrix itself, not on its Gram matrix."""
    a, b, c = COEFFICIENTS
    x = x / np.linalg.norm(x)
    for _ in range(iterations):
        gram = x @ x.conj().T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (4, 4)])
@pytest.mark.parametrize("iterations", [1, 5])
def test_it_is_the_iteration_on_the_matrix(x64, shape, iterations):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape) + 1j * rng.normal(size=shape)
    got = polar_factor(jnp.asarray(x), iterations, scale=3.0)
    np.testing.assert_allclose(got, 3 * literal(x, iterations), rtol=1e-10, atol=1e-10)


def test_singular_values_end_near_one_and_vectors_stay(x64):
    rng = np.random.default_rng(1)
    u, _, vt = np.linalg.svd(rng.normal(size=(6, 9)), full_matrices=False)
    values = np.geomspace(1, 1e-2, 6)
    got = polar_factor(jnp.asarray(u * values @ vt), 5)
    # In the same singular vectors: U·f(Σ)·Vᵀ with f(Σ) between the known bounds.
    inner = u.T @ np.asarray(got) @ vt.T
    np.testing.assert_allclose(inner, np.diag(np.diag(inner)), atol=1e-12)
    assert np.diag(inner).min() > 0.67 and np.diag(inner).max() < 1.22


def test_the_factor_multiplies_the_matrix(x64):
    x = np.random.default_rng(2).normal(size=(2, 3, 5))
    x /= np.linalg.norm(x, axis=(-2, -1), keepdims=True)
    factor = newton_schulz(jnp.asarray(x @ x.swapaxes(-2, -1)), 4)
    expected = np.stack([literal(a, 4) for a in x])
    np.testing.assert_allclose(factor @ x, expected, rtol=1e-10, atol=1e-12)


def test_zero_stays_zero_and_the_scale_of_the_matrix_is_nothing(x64):
    np.testing.assert_array_equal(polar_factor(jnp.zeros((2, 3)), 5), np.zeros((2, 3)))
    x = jnp.asarray(np.random.default_rng(3).normal(size=(3, 3)))
    for factor in (1e-200, 1e200):
        np.testing.assert_allclose(
            polar_factor(factor * x, 5), polar_factor(x, 5), rtol=1e-12
        )

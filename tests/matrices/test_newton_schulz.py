"""The Newton–Schulz iteration, as pure functions of arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrices.coefficients import best_quintic, polar_express

from nlcg_optax.matrices import newton_schulz as module
from nlcg_optax.matrices.newton_schulz import (
    MUON,
    POLAR_EXPRESS,
    POLAR_EXPRESS_IN_FOUR,
    SAFETY,
    Method,
    coefficients_of,
    newton_schulz,
    polar_factors,
)

NORMS = {"muon": 2, "polar_express": 8}


def polar_factor(x, iterations, name="muon", precision="highest"):
    """That of one matrix, or of a stack, with the longer side in either place."""
    (y,) = polar_factors(
        [x if x.shape[-2] <= x.shape[-1] else x.mT],
        Method.of(name, iterations, precision),
    )
    return y if y.shape == x.shape else y.mT


def literal(x, steps, norm=8):
    """The iteration on the matrix itself, not on its Gram matrix."""
    x = x / np.sum(np.linalg.svd(x, compute_uv=False) ** norm) ** (1 / norm)
    for a, b, c in steps:
        gram = x @ x.conj().T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (4, 4), (12, 20)])
@pytest.mark.parametrize("name", ["muon", "polar_express"])
@pytest.mark.parametrize("iterations", [1, 4, 5])
def test_it_is_the_iteration_on_the_matrix(x64, monkeypatch, shape, name, iterations):
    # So that products of stacks of the largest of them are taken apart.
    monkeypatch.setattr(module, "HERMITIAN_BLOCK", 6)
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape) + 1j * rng.normal(size=shape)
    got = polar_factor(jnp.asarray(x), iterations, name)
    stacked = polar_factor(jnp.asarray(x)[None], iterations, name)[0]
    np.testing.assert_allclose(stacked, got, rtol=1e-10, atol=1e-10)
    expected = literal(x, coefficients_of(name, iterations), NORMS[name])
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-10)


def test_the_coefficients_are_the_best(x64):
    np.testing.assert_allclose(polar_express(5, 0.002), POLAR_EXPRESS[:5], rtol=1e-9)
    in_four = polar_express(4, 0.01)
    np.testing.assert_allclose(in_four, POLAR_EXPRESS_IN_FOUR, rtol=1e-9)
    # The last step has no safety factor.
    powers = SAFETY ** np.array([1, 3, 5])
    used = coefficients_of("polar_express", 4)
    np.testing.assert_allclose(used[:3], np.array(in_four[:3]) / powers, rtol=1e-9)
    np.testing.assert_allclose(used[3], in_four[3], rtol=1e-9)
    # Those of the paper, for other steps and another interval (its published code).
    published = polar_express(2, 1e-3, 0.02407327424182761)
    expected = [
        [8.28721201814563, -23.595886519098837, 17.300387312530933],
        [4.107059111542203, -2.9478499167379106, 0.5448431082926601],
    ]
    np.testing.assert_allclose(published, expected, rtol=1e-9)
    # No quintic is nearer to 1: the error alternates four times at its largest.
    a, b, c = best_quintic(0.1, 1.0)
    x = np.linspace(0.1, 1.0, 100_001)
    error = a * x + b * x**3 + c * x**5 - 1
    extrema = [error[0], error[:50_000].max(), error[10_000:].min(), error[-1]]
    signs = np.sign(extrema) * np.array([-1, 1, -1, 1])
    np.testing.assert_allclose(np.abs(extrema), extrema[-1], rtol=1e-6)
    assert (signs == 1).all()


def test_it_comes_nearer_than_muons_by_no_more_products(x64):
    rng = np.random.default_rng(1)
    u, _, vt = np.linalg.svd(rng.normal(size=(40, 60)), full_matrices=False)
    x = jnp.asarray(u * np.geomspace(1, 1e-2, 40) @ vt)
    errors = {}
    for name, steps in (("muon", 5), ("polar_express", 5), ("polar_express", 4)):
        got = np.asarray(polar_factor(x, steps, name))
        # In the same singular vectors: U·f(Σ)·Vᵀ.
        inner = u.T @ got @ vt.T
        np.testing.assert_allclose(inner, np.diag(np.diag(inner)), atol=1e-11)
        errors[name, steps] = np.sqrt(np.mean((np.diag(inner) - 1) ** 2))
    for steps in (4, 5):
        assert errors["polar_express", steps] < errors["muon", 5] / 5
        assert errors["polar_express", steps] < 0.03


def test_the_factor_multiplies_the_matrix(x64):
    x = np.random.default_rng(2).normal(size=(2, 3, 5))
    factor, root = newton_schulz(jnp.asarray(x @ x.swapaxes(-2, -1)), MUON * 4)
    expected = np.stack([literal(a, MUON * 4) for a in x])
    np.testing.assert_allclose(factor @ x / root, expected, rtol=1e-10, atol=1e-12)


def test_operations_are_those_of_the_products():
    five = Method(coefficients_of("muon", 5))
    # 17 products of the Gram matrix; it is made, and the matrix multiplied.
    assert five.operations(100, 300) == (17 * 2e6, 2 * 2 * 100**2 * 300)
    # Of 512 rows products of symmetric result are made by 5/8.
    inner, outer = five.operations(512, 1024)
    assert inner == 17 * 2 * 512**3 * 5 / 8
    assert outer == (5 / 8 + 1) * 2 * 512**2 * 1024
    # In half precision the Gram matrix is made, and squared, for every step.
    half = five._replace(precision="float16")
    assert half.operations(100, 300) == (5 * 2e6, 5 * 2 * 2 * 100**2 * 300)


@pytest.mark.parametrize(
    ("name", "steps", "most"),
    [("muon", 5, 1.22), ("polar_express", 5, 1.1), ("polar_express", 4, 1.1)],
)
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_does_not_blow_up(precision, name, steps, most):
    # With one Gram matrix for three steps one in some hundred of these did.
    rng = np.random.default_rng(0)
    found = []
    for _ in range(300):
        u, _, vt = np.linalg.svd(rng.normal(size=(27, 8)), full_matrices=False)
        found.append((u * np.sort(rng.uniform(size=8) ** 6)) @ vt)
    x = jnp.asarray(np.stack(found), jnp.float32)
    y = jax.jit(lambda x: polar_factor(x, steps, name, precision))(x)
    assert np.linalg.svd(y, compute_uv=False).max() < most


def test_zero_stays_zero_and_the_scale_of_the_matrix_is_nothing(x64):
    np.testing.assert_array_equal(polar_factor(jnp.zeros((2, 3)), 5), np.zeros((2, 3)))
    x = jnp.asarray(np.random.default_rng(3).normal(size=(3, 3)))
    for factor in (1e-200, 1e200):
        np.testing.assert_allclose(
            polar_factor(factor * x, 5), polar_factor(x, 5), rtol=1e-11
        )

"""Orthogonal iteration by products against the QR factorization of NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlcg_optax.matrices import eigenbasis


def psd(values, seed=0, dtype=np.float64):
    n = len(values)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, n))
    if np.issubdtype(dtype, np.complexfloating):
        x = x + 1j * rng.normal(size=(n, n))
    u = np.linalg.qr(x)[0]
    return ((u * values) @ u.conj().T).astype(dtype)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_it_is_the_orthogonal_factor(dtype):
    matrix, basis = psd(np.geomspace(1, 1e-4, 7), dtype=dtype), np.eye(7)
    got = jnp.asarray(basis.astype(dtype))
    for _ in range(4):
        got, good = eigenbasis.renew(jnp.asarray(matrix), got)
        basis, upper = np.linalg.qr(matrix @ basis)
        basis = basis * (np.diag(upper) / np.abs(np.diag(upper)))
        assert good
        np.testing.assert_allclose(got, basis, atol=1e-8)


@pytest.mark.parametrize(
    "values",
    [np.geomspace(1, 1e-12, 40), np.r_[np.ones(20), np.zeros(20)], np.eye(40)[0]],
    ids=["steep", "half rank", "rank one"],
)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_singular_matrices_in_float32(values, scale):
    """As near to eigenvectors as by NumPy's in float64, and as orthogonal as can be."""
    exact = psd(values)
    matrix, basis = jnp.asarray(scale * exact, jnp.float32), jnp.eye(40)
    expected = np.eye(40)
    for _ in range(10):
        basis, good = eigenbasis.renew(matrix, basis)
        expected = np.linalg.qr(exact @ expected)[0]
        assert good

    def off_diagonal(q):
        inner = q.T @ exact @ q
        return np.linalg.norm(inner - np.diag(np.diag(inner))) / np.linalg.norm(inner)

    got = np.asarray(basis, np.float64)
    np.testing.assert_allclose(got.T @ got, np.eye(40), atol=2e-6)
    assert off_diagonal(got) < 1.05 * off_diagonal(expected) + 1e-5


def test_what_is_zero_or_not_finite_keeps_its_basis():
    start = jnp.asarray(np.linalg.qr(psd(np.arange(1, 6.0)))[0], jnp.float32)
    bases = jnp.stack([start] * 3)
    stack = jnp.stack([jnp.zeros((5, 5)), jnp.full((5, 5), jnp.nan), jnp.eye(5)])
    got, good = jax.jit(eigenbasis.renew)(stack, bases)
    assert good.tolist() == [True, False, True]
    np.testing.assert_allclose(got, bases, atol=1e-6)

"""The tasks and peers of the large-batch benchmark that the trainer does not have."""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "large_batch"


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        names = ("sweep", "peers", "training_tasks", "workloads", "targets")
        yield {name: importlib.import_module(name) for name in names}


# SOAP.


def literal_soap(grads, b1, b2, eps, every):
    """Algorithm 3 of arXiv:2409.11321 on one matrix, line by line; its updates."""
    m, n = grads[0].shape
    moment, second, updates = np.zeros((m, n)), np.zeros((m, n)), []
    for t, g in enumerate(grads):
        if t == 0:  # as the authors' code: no step, only the eigenvectors
            left, right = g @ g.T, g.T @ g
            q_left = np.linalg.eigh(left)[1][:, ::-1]
            q_right = np.linalg.eigh(right)[1][:, ::-1]
            updates.append(np.zeros((m, n)))
            continue
        g_rotated = q_left.T @ g @ q_right
        moment = b1 * moment + (1 - b1) * g
        m_rotated = q_left.T @ moment @ q_right
        second = b2 * second + (1 - b2) * g_rotated**2
        m_hat, v_hat = m_rotated / (1 - b1**t), second / (1 - b2**t)
        updates.append(q_left @ (m_hat / (np.sqrt(v_hat) + eps)) @ q_right.T)
        left = b2 * left + (1 - b2) * g @ g.T
        right = b2 * right + (1 - b2) * g.T @ g
        if t % every == 0:
            q_left = np.linalg.qr(left @ q_left)[0]
            q_right = np.linalg.qr(right @ q_right)[0]
    return updates


@pytest.mark.parametrize("every", [1, 3])
def test_soap_is_its_literal_statement(modules, every):
    rng = np.random.default_rng(0)
    # Singular values apart: eigenvectors are then the same but for their signs,
    # which cancel.
    scale = np.linspace(1, 3, 4)[:, None] * np.linspace(1, 2, 3)
    grads = [np.float32(scale * rng.normal(size=(4, 3))) for _ in range(8)]
    tx = modules["peers"].scale_by_soap(0.9, 0.8, 1e-6, every)
    params = {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}
    state = tx.init(params)
    update = jax.jit(tx.update)
    expected = literal_soap([np.float64(g) for g in grads], 0.9, 0.8, 1e-6, every)
    for step, g in enumerate(grads):
        updates, state = update({"w": g, "b": g[0]}, state)
        np.testing.assert_allclose(updates["w"], expected[step], atol=2e-3)
    # A vector gets Adam, one step late.
    mu, nu = np.zeros(3), np.zeros(3)
    for g in grads[1:]:
        mu, nu = 0.9 * mu + 0.1 * g[0], 0.8 * nu + 0.2 * g[0] ** 2
    adam = mu / (1 - 0.9**7) / (np.sqrt(nu / (1 - 0.8**7)) + 1e-6)
    np.testing.assert_allclose(updates["b"], adam, rtol=1e-4)

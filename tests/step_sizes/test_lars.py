"""Layerwise scaling (LARS), against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracle import lars

import nlcg_optax
from nlcg_optax import scale_by_lars

pytestmark = pytest.mark.usefixtures("x64")


def test_lars_against_numpy():
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 4), "bias": (4,), "scalar": (), "one": (1, 1, 2)}
    params = {k: rng.normal(size=s) for k, s in shapes.items()}
    grads = {k: rng.normal(size=s) * 100 for k, s in shapes.items()}
    params["complex"] = rng.normal(size=3) + 1j * rng.normal(size=3)
    grads["complex"] = rng.normal(size=3) + 1j * rng.normal(size=3)
    for coefficient, damping in ((0.001, 0.1), (0.5, 0.0), (3.0, 1.0)):
        tx = scale_by_lars(coefficient, damping=damping)
        ours, _ = jax.jit(tx.update)(
            jax.tree.map(jnp.asarray, grads),
            tx.init(params),
            jax.tree.map(jnp.asarray, params),
        )
        for name, got in ours.items():
            expected = lars(grads[name], params[name], coefficient, damping)
            np.testing.assert_allclose(got, expected, rtol=1e-9)
            if damping:
                bound = np.linalg.norm(grads[name]) / damping
                assert np.linalg.norm(got) <= bound * (1 + 1e-9)


def test_lars_defaults_are_the_papers():
    g, w = np.array([3.0, 4.0]), np.array([6.0, 8.0])
    tx = scale_by_lars()
    out, _ = tx.update(jnp.asarray(g), tx.init(g), jnp.asarray(w))
    np.testing.assert_allclose(out, g * 0.001 * 10 / (5 + 0.1 * 0.001 * 10))


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("zero", ["gradient", "parameters", "both"])
def test_lars_keeps_the_gradient_where_a_norm_is_zero(zero, damping):
    g = jnp.array([1.0, 2.0]) * float(zero == "parameters")
    w = jnp.array([1.0, 2.0]) * float(zero == "gradient")
    tx = scale_by_lars(damping=damping)
    out, _ = tx.update(g, tx.init(w), w)
    np.testing.assert_array_equal(out, g)


def test_lars_goes_before_nlcg():
    tx = optax.chain(scale_by_lars(0.5), nlcg_optax.nlcg_paper(0.1))
    w, g = jnp.array([3.0, 4.0]), jnp.array([0.0, 2.0])
    out, _ = tx.update(g, tx.init(w), w, value=1.0)
    np.testing.assert_allclose(out, -0.1 * lars(np.asarray(g), np.asarray(w), 0.5))

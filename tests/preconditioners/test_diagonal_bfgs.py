"""The diagonal of BFGS."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracle import Oracle, dense_bfgs

import nlcg_optax
from nlcg_optax import scale_by_diagonal_bfgs

pytestmark = pytest.mark.usefixtures("x64")


def steps(tx, xs, gs):
    """Feeds parameters and gradients; yields update and state of each step."""
    state = tx.init(jnp.asarray(xs[0]))
    for x, g in zip(xs, gs, strict=True):
        update, state = tx.update(jnp.asarray(g), state, jnp.asarray(x))
        yield update, state


@pytest.mark.parametrize(("epsilon", "rtol"), [(0.0, 1e-11), (1e-13, 1e-6)])
def test_diagonal_of_the_dense_bfgs_update(epsilon, rtol):
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(5, 5))
    hessian = factor @ factor.T + np.eye(5)
    xs = rng.normal(size=(8, 5))
    gs = xs @ hessian
    diagonal = np.ones(5)
    tx = scale_by_diagonal_bfgs(epsilon)
    for t, (update, state) in enumerate(steps(tx, xs, gs)):
        if t:
            s, y = xs[t] - xs[t - 1], gs[t] - gs[t - 1]
            diagonal = np.diag(dense_bfgs(np.diag(diagonal), s, y))
        np.testing.assert_allclose(state.diagonal, diagonal, rtol=rtol)
        np.testing.assert_allclose(update, gs[t] / diagonal, rtol=rtol)
        assert state.skipped == 0
    assert np.ptp(diagonal) > 0.5


def test_first_step_is_the_gradient_exactly():
    g = jnp.array([0.1, 3e-7, 1e9])
    tx = scale_by_diagonal_bfgs(epsilon=1e-2)
    update, state = tx.update(g, tx.init(g), g)
    np.testing.assert_array_equal(update, g)
    np.testing.assert_array_equal(state.diagonal, 1)
    assert (state.count, state.skipped) == (1, 0)


@pytest.mark.parametrize("epsilon", [0.0, 1e-8, 1e-3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_diagonal_stays_positive(epsilon, dtype):
    rng = np.random.default_rng(1)
    # Scales from 1e-3 to 1e3, with gradients that have little to do with the steps.
    scales = 10.0 ** rng.uniform(-3, 3, size=(400, 6))
    xs = np.cumsum(rng.normal(size=(400, 6)) * 0.1, axis=0)
    gs = rng.normal(size=(400, 6)) * scales
    tx = scale_by_diagonal_bfgs(epsilon)

    def step(state, row):
        update, state = tx.update(row[1], state, row[0])
        return state, (update, state.diagonal)

    rows = jnp.asarray(xs, dtype), jnp.asarray(gs, dtype)
    state, (updates, diagonals) = jax.lax.scan(step, tx.init(rows[0][0]), rows)
    assert jnp.all(diagonals > 0)
    assert jnp.all(jnp.isfinite(updates)) and jnp.all(jnp.isfinite(diagonals))
    assert jnp.all(updates * rows[1] >= 0)  # M⁻¹ is positive definite
    assert 0 < state.skipped < 400


def test_the_absolute_value_keeps_the_diagonal_positive():
    # Where ε outweighs the curvature, the update by itself would turn negative.
    e = 1e-2
    xs = np.array([[0.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    gs = np.array([[0.0, 0.0], [0.0, 0.1], [10.0, 0.1]])
    _, (_, before), (_, state) = steps(scale_by_diagonal_bfgs(e), xs, gs)
    b = before.diagonal
    raw = b[1] - e / (0.01 * b[0] + e) + e / (1.0 + e)
    assert raw < -0.1
    np.testing.assert_allclose(state.diagonal[1], -raw, rtol=1e-9)


@pytest.mark.parametrize("epsilon", [0.0, 1e-8])
def test_skipped_curvature_is_counted_and_leaves_the_diagonal(epsilon):
    x = np.array([1.0, 2.0])
    g = np.array([3.0, 1.0])
    xs = [x, x, x + 1, x + 2, x + 3]
    # no displacement; negative curvature; no curvature; then good curvature
    gs = [g, g + 1, g - 1, g - 1, g + 1]
    rows = list(steps(scale_by_diagonal_bfgs(epsilon), xs, gs))
    assert [int(state.skipped) for _, state in rows] == [0, 1, 2, 3, 3]
    for update, state in rows[:4]:
        np.testing.assert_array_equal(state.diagonal, 1)
        assert jnp.all(jnp.isfinite(update))
    assert not np.array_equal(rows[4][1].diagonal, [1, 1])


def test_epsilon_bounds_the_curvature_that_is_learned():
    # yᵀs = 2e-6: enough for an ε of 1e-8, not for one of 1e-4.
    xs = np.array([[0.0, 0.0], [1e-3, 1e-3]])
    for epsilon, skipped in ((1e-8, 0), (1e-4, 1)):
        *_, (_, state) = steps(scale_by_diagonal_bfgs(epsilon), xs, xs)
        assert state.skipped == skipped


def test_the_scale_of_the_loss_is_a_documented_exception():
    # B₀ = 1 is absolute, so the diagonal does not just scale along, even with ε = 0.
    rng = np.random.default_rng(4)
    xs = rng.normal(size=(4, 3))
    gs = xs * [1.0, 2.0, 3.0]
    tx = scale_by_diagonal_bfgs(epsilon=0.0)
    *_, (_, plain) = steps(tx, xs, gs)
    *_, (_, scaled) = steps(tx, xs, 100 * gs)
    assert np.max(np.abs(scaled.diagonal / plain.diagonal / 100 - 1)) > 0.01


def test_complex_leaves_use_moduli_and_the_real_inner_product():
    rng = np.random.default_rng(5)
    xs = rng.normal(size=(6, 3)) + 1j * rng.normal(size=(6, 3))
    gs = 2 * xs + 0.3j * xs + 0.3 * rng.normal(size=(6, 3))
    b = np.ones(3)
    for t, (update, state) in enumerate(steps(scale_by_diagonal_bfgs(0.0), xs, gs)):
        if t:
            s, y = xs[t] - xs[t - 1], gs[t] - gs[t - 1]
            y_s = np.vdot(y, s).real
            assert y_s > 0
            b = np.abs(
                b
                - b**2 * np.abs(s) ** 2 / np.sum(b * np.abs(s) ** 2)
                + np.abs(y) ** 2 / y_s
            )
        assert not jnp.iscomplexobj(state.diagonal)
        np.testing.assert_allclose(state.diagonal, b, rtol=1e-9)
        np.testing.assert_allclose(update, gs[t] / b, rtol=1e-9)


def diagonal_bfgs_state(state):
    kind = nlcg_optax.DiagonalBfgsState
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    (found,) = (leaf for leaf in leaves if isinstance(leaf, kind))
    return found


REST_OF_THE_CHAIN = {
    "clips": lambda tx: optax.chain(tx, optax.clip(0.01)),
    "negates": lambda tx: optax.chain(tx, optax.scale(-0.5)),
    "decays": lambda tx: optax.chain(tx, optax.add_decayed_weights(-0.1)),
    "clips before": lambda tx: optax.chain(optax.clip_by_global_norm(0.5), tx),
    "projects": lambda tx: optax.chain(tx, optax.keep_params_nonnegative()),
}


@pytest.mark.parametrize("learning_rate", [0.1, optax.linear_schedule(0.3, 0.05, 8)])
@pytest.mark.parametrize("name", REST_OF_THE_CHAIN)
def test_displacement_is_what_the_parameters_really_did(name, learning_rate):
    tx = REST_OF_THE_CHAIN[name](nlcg_optax.nlcg_paper(learning_rate, step_rule=None))
    curvature = np.array([1.0, 2.0, 4.0])
    x = jnp.array([1.0, 0.5, 2.0])
    state = tx.init(x)
    oracle = Oracle()
    for t in range(8):
        g = curvature * np.asarray(x)
        update, state = tx.update(jnp.asarray(g), state, x)
        ours = diagonal_bfgs_state(state)
        if name == "clips before":
            g = g * min(1, 0.5 / np.linalg.norm(g))
        oracle.precondition(np.asarray(x), g)
        oracle.prev_x, oracle.prev_g, oracle.t = np.asarray(x), g, t + 1
        np.testing.assert_allclose(ours.diagonal, oracle.diagonal, rtol=1e-8)
        x = optax.apply_updates(x, update)
        x = x.at[0].add(0.01)  # someone else moves them too
    assert np.ptp(oracle.diagonal) > 0.1

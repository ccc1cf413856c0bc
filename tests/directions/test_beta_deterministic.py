"""β rules for line searches, against their formulas written with vectors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nlcg_optax
from nlcg_optax import beta as rules

UNBOUNDED = (-math.inf, math.inf)


def oracle(name, g, prev_g, d):
    """Slow and literal, without a preconditioner."""
    y = g - prev_g
    if name == "hager_zhang":
        beta = (y - 2 * d * (y @ y) / (d @ y)) @ g / (d @ y)
        return max(beta, 0.4 * (d @ prev_g) / (d @ d))
    if name == "dai_kou":
        beta = (g @ y) / (d @ y) - (y @ y) / (d @ y) * (g @ d) / (d @ y)
        return max(beta, 0.5 * (g @ d) / (d @ d))
    if name == "hybrid_hs_dy":
        return max(0.0, min((g @ y) / (d @ y), (g @ g) / (d @ y)))
    if name == "liu_storey":
        return -(g @ y) / (d @ prev_g)
    raise ValueError(name)


@pytest.mark.parametrize(
    "name", ["hager_zhang", "dai_kou", "hybrid_hs_dy", "liu_storey"]
)
@pytest.mark.parametrize("seed", range(8))
def test_rules_match_the_papers(x64, name, seed):
    rng = np.random.default_rng(seed)
    tx = nlcg_optax.scale_by_conjugate_direction(name, beta_bounds=UNBOUNDED, epsilon=0)
    state = tx.init(jnp.zeros(4))
    prev_g, d = None, None
    for _ in range(5):
        g = rng.normal(size=4)
        update, state = tx.update(jnp.asarray(g), state)
        if d is None:
            d = -g
        else:
            beta = oracle(name, g, prev_g, d)
            np.testing.assert_allclose(state.beta, beta, rtol=1e-9)
            d = -g + beta * d
        np.testing.assert_allclose(-update, d, rtol=1e-9)
        prev_g = g


def test_truncation_is_reached():
    """Both sides of the maximum occur, and neither depends on the loss's scale."""

    def products(factor, length):
        values = dict(g_z=5.0, prev_g_z=4.0, g_d=-1.0, prev_g_d=-4.0, g_w=-30.0, y_w=9)
        scaled = {k: jnp.asarray(v * factor**2) for k, v in values.items()}
        return rules.InnerProducts(**scaled, prev_d_d=jnp.asarray(length * factor**2))

    for rule, bound in ((rules.hager_zhang, -1.6), (rules.dai_kou, -0.5)):
        free = rule(products(1.0, math.nan))
        assert free < bound
        for factor in (1.0, 2.0**10):
            np.testing.assert_allclose(rule(products(factor, 1.0)), bound, rtol=1e-6)
            np.testing.assert_allclose(rule(products(factor, 1e-9)), free, rtol=1e-6)


def test_length_of_the_direction_is_kept_in_the_metric(x64):
    metric = jnp.array([2.0, 5.0, 0.5])
    tx = nlcg_optax.scale_by_conjugate_direction(
        "polak_ribiere",
        optax.stateless(lambda g, _: g / metric),
        beta_bounds=UNBOUNDED,
    )
    state = tx.init(jnp.zeros(3))
    for seed in range(4):
        g = jax.random.normal(jax.random.key(seed), [3], jnp.float64)
        d, state = tx.update(g, state)
        np.testing.assert_allclose(state.prev_d_d, d @ (metric * d), rtol=1e-12)


def test_powell_restart(x64):
    tx = nlcg_optax.scale_by_conjugate_direction(
        "fletcher_reeves", restart_nonorthogonal=0.2
    )
    state = tx.init(jnp.zeros(2))
    assert state.prev_preconditioned is not None
    _, state = tx.update(jnp.array([1.0, 0.0]), state)
    _, state = tx.update(jnp.array([0.19, 1.0]), state)  # 0.19 < 0.2 (1 + 0.19²)
    assert state.beta > 0 and state.restarts == 0
    update, state = tx.update(jnp.array([0.3, 0.9]), state)  # nearly parallel
    assert state.beta == 0 and state.restarts == 1
    np.testing.assert_array_equal(update, [0.3, 0.9])


def test_memory_is_kept_only_where_needed():
    for name, needs in {
        "fletcher_reeves": (False, False),
        "dai_yuan": (False, False),
        "hybrid_hs_dy": (True, False),
        "liu_storey": (True, False),
        "hager_zhang": (True, True),
        "dai_kou": (True, True),
    }.items():
        state = nlcg_optax.scale_by_conjugate_direction(name).init(jnp.zeros(2))
        kept = (state.prev_preconditioned is not None, state.prev_grad is not None)
        assert kept == needs, name

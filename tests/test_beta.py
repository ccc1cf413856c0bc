"""The β rules, as pure functions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import beta_value

from nlcg_optax import beta

pytestmark = pytest.mark.usefixtures("x64")


def products(g, z, prev_g, prev_z, prev_d):
    return beta.InnerProducts(
        *(
            jnp.asarray(value)
            for value in (
                g @ z,
                prev_g @ prev_z,
                g @ prev_d,
                prev_g @ prev_d,
                g @ (z - prev_z),
                (g - prev_g) @ (z - prev_z),
            )
        )
    )


def test_rules_are_known_by_name():
    assert set(beta.BETA_RULES) == {
        "fletcher_reeves",
        "polak_ribiere",
        "hestenes_stiefel",
        "dai_yuan",
        "hager_zhang",
    }
    for name, rule in beta.BETA_RULES.items():
        assert getattr(beta, name) is rule


@pytest.mark.parametrize("epsilon", [0.0, 1e-8, 0.3])
@pytest.mark.parametrize("name", beta.BETA_RULES)
def test_rule_is_the_textbook_formula(name, epsilon):
    rng = np.random.default_rng(0)
    signs = set()
    for _ in range(20):
        vectors = rng.normal(size=(5, 4))
        expected = beta_value(name, *vectors, epsilon)
        got = jax.jit(beta.BETA_RULES[name])(products(*vectors), epsilon)
        np.testing.assert_allclose(got, expected, rtol=1e-9)
        signs.add(math.copysign(1, expected))
    assert signs == {-1, 1}  # denominators of both signs were met


@pytest.mark.parametrize("name", beta.BETA_RULES)
def test_values_by_hand(name):
    # g·z = 6, its last value 3; g·d = 1, -3 before; so d·y = 4.
    p = beta.InnerProducts(*(jnp.asarray(x, float) for x in (6, 3, 1, -3, 5, 8)))
    expected = {
        "fletcher_reeves": 2.0,
        "polak_ribiere": 5 / 3,
        "hestenes_stiefel": 1.25,
        "dai_yuan": 1.5,
        "hager_zhang": 1.25 - 2 * (8 / 4) * (1 / 4),
    }[name]
    np.testing.assert_allclose(beta.BETA_RULES[name](p), expected, rtol=1e-12)


@pytest.mark.parametrize("name", beta.BETA_RULES)
def test_a_zero_denominator_gives_zero(name):
    p = beta.InnerProducts(*(jnp.asarray(x, float) for x in (6, 0, 2, 2, 5, 8)))
    rule = beta.BETA_RULES[name]
    assert rule(p) == 0
    # No NaN hides behind the selection.
    gradient = jax.grad(lambda q: rule(q))(p)
    assert all(jnp.isfinite(leaf) for leaf in gradient)


@pytest.mark.parametrize("name", beta.BETA_RULES)
@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
def test_without_epsilon_the_scale_of_the_loss_does_not_matter(name, scale):
    g, z, prev_g, prev_z, prev_d = np.random.default_rng(1).normal(size=(5, 4))
    plain = beta.BETA_RULES[name](products(g, z, prev_g, prev_z, prev_d))
    # A preconditioned gradient keeps its size where M scales with the loss.
    scaled = products(scale * g, z, scale * prev_g, prev_z, prev_d)
    np.testing.assert_allclose(beta.BETA_RULES[name](scaled), plain, rtol=1e-12)

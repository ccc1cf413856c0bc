"""The β rules, as pure functions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import beta_value

from nlcg_optax import beta

pytestmark = pytest.mark.usefixtures("x64")


def products(g, z, prev_g, prev_z, prev_d, prev_d_m_d):
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
                prev_d_m_d,
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
        "dai_kou",
        "hybrid_hs_dy",
        "liu_storey",
    }
    for name, rule in beta.BETA_RULES.items():
        assert getattr(beta, name) is rule


@pytest.mark.parametrize("name", beta.BETA_RULES)
def test_a_rule_needs_what_it_declares_and_nothing_else(name):
    rule = beta.BETA_RULES[name]
    rng = np.random.default_rng(0)
    read = set()
    for _ in range(40):
        # Bounds from below, and the smaller of two, are not always read.
        p = products(*rng.normal(size=(5, 4)), rng.uniform(0.1, 5.0))
        slopes = jax.grad(rule)(p, 0.1)
        read |= {field for field, x in slopes._asdict().items() if x != 0}
        known = {field: getattr(p, field) for field in rule.needs}
        others = dict.fromkeys(p._fields, jnp.nan) | known
        np.testing.assert_array_equal(rule(beta.InnerProducts(**others)), rule(p))
    assert read == rule.needs


def test_a_rule_is_equal_to_another_of_the_same_function_and_needs():
    def half(p, epsilon):
        return 0.5

    rules = {beta.BetaRule(half, {"g_z"}), beta.BetaRule(half, frozenset({"g_z"}))}
    assert len(rules) == 1
    assert beta.BetaRule(half).needs == set(beta.InnerProducts._fields)


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        ((abs, {"g_z", "g_v"}), ["needs='g_v'", "'g_w'", "'prev_d_d'"]),
        (("dai_yuan",), ["function='dai_yuan'", "a function of InnerProducts"]),
    ],
)
def test_a_rule_that_cannot_be(arguments, needles):
    with pytest.raises(ValueError) as error:
        beta.BetaRule(*arguments)
    for needle in needles:
        assert needle in str(error.value)


# Those with a bound from below that depends on the length of the last direction.
TRUNCATED = {"hager_zhang", "dai_kou"}


@pytest.mark.parametrize("epsilon", [0.0, 1e-8, 0.3])
@pytest.mark.parametrize("name", beta.BETA_RULES)
def test_rule_is_the_textbook_formula(name, epsilon):
    rng = np.random.default_rng(0)
    rule = jax.jit(beta.BETA_RULES[name])
    signs, denominators, truncated = set(), set(), set()
    for _ in range(20):
        vectors = rng.normal(size=(5, 4))
        length = rng.uniform(0.1, 5.0)
        expected = beta_value(name, *vectors, length, epsilon)
        got = rule(products(*vectors, length), epsilon)
        np.testing.assert_allclose(got, expected, rtol=1e-9)
        signs.add(np.sign(expected))
        g, _, prev_g, _, prev_d = vectors
        denominators.add(np.sign(prev_d @ (g - prev_g)))
        # A length that is not known truncates nothing.
        free = rule(products(*vectors, math.nan), epsilon)
        assert expected >= free or math.isclose(expected, free, rel_tol=1e-9)
        truncated.add(not math.isclose(expected, free, rel_tol=1e-9))
    assert signs == ({0, 1} if name == "hybrid_hs_dy" else {-1, 1})
    assert denominators == {-1, 1}
    assert truncated == ({True, False} if name in TRUNCATED else {False})


# g·z = 6 and its last value 3 throughout.
BY_HAND = {
    # g·d = 1, -3 before; so d·y = 4. No length: no truncation.
    (6, 3, 1, -3, 5, 8): {
        "fletcher_reeves": 2.0,
        "polak_ribiere": 5 / 3,
        "hestenes_stiefel": 1.25,
        "dai_yuan": 1.5,
        "hager_zhang": 1.25 - 2 * (8 / 4) * (1 / 4),
        "dai_kou": 1.25 - (8 / 4) * (1 / 4),
        "hybrid_hs_dy": 1.25,  # Hestenes and Stiefel's
        "liu_storey": 5 / 3,
    },
    # The same with g·w = 9.
    (6, 3, 1, -3, 9, 8): {
        "fletcher_reeves": 2.0,
        "polak_ribiere": 3.0,
        "hestenes_stiefel": 2.25,
        "dai_yuan": 1.5,
        "hager_zhang": 1.25,
        "dai_kou": 1.75,
        "hybrid_hs_dy": 1.5,  # Dai and Yuan's
        "liu_storey": 3.0,
    },
    # g·d = -1, -5 before; d·y = 4 again; the bounds are -2/dMd and -1/(2 dMd).
    **{
        (6, 3, -1, -5, -8, 4, length): {
            "fletcher_reeves": 2.0,
            "polak_ribiere": -8 / 3,
            "hestenes_stiefel": -2.0,
            "dai_yuan": 1.5,
            "hager_zhang": hager_zhang,
            "dai_kou": dai_kou,
            "hybrid_hs_dy": 0.0,
            "liu_storey": -8 / 5,
        }
        for length, hager_zhang, dai_kou in (
            (0.25, -1.5, -1.75),
            (1, -1.5, -0.5),
            (4, -0.5, -0.125),
        )
    },
    # g·d = -5, -1 before: d·y = -4, of the other sign.
    (6, 3, -5, -1, 8, 4, 2): {
        "fletcher_reeves": 2.0,
        "polak_ribiere": 8 / 3,
        "hestenes_stiefel": -2.0,
        "dai_yuan": -1.5,
        "hager_zhang": -2 - 2 * (4 / -4) * (-5 / -4),
        "dai_kou": -2 - (4 / -4) * (-5 / -4),
        "hybrid_hs_dy": 0.0,
        "liu_storey": 8.0,
    },
}


@pytest.mark.parametrize("values", BY_HAND, ids=repr)
@pytest.mark.parametrize("name", beta.BETA_RULES)
def test_values_by_hand(name, values):
    p = beta.InnerProducts(*(jnp.asarray(x, float) for x in values))
    expected = BY_HAND[values][name]
    np.testing.assert_allclose(beta.BETA_RULES[name](p), expected, rtol=1e-12)


@pytest.mark.parametrize("length", [0.0, 7.0, math.nan])
@pytest.mark.parametrize("slope", [0.0, 2.0])
@pytest.mark.parametrize("name", beta.BETA_RULES)
def test_a_zero_denominator_gives_zero(name, slope, length):
    values = (6, 0, slope, slope, 5, 8, length)
    p = beta.InnerProducts(*(jnp.asarray(x, float) for x in values))
    rule = beta.BETA_RULES[name]
    # Here the denominator is the slope itself, and here the bound from below is not 0.
    expected = 0.0
    if slope and name == "liu_storey":
        expected = -5 / 2
    elif slope and length == 7:
        expected = {"hager_zhang": 0.8 / 7, "dai_kou": 1 / 7}.get(name, 0.0)
    np.testing.assert_allclose(rule(p), expected, rtol=1e-12)
    # No NaN hides behind the selection.
    gradient = jax.grad(lambda q: rule(q))(p)
    assert all(jnp.isfinite(leaf) for leaf in gradient)


@pytest.mark.parametrize("name", beta.BETA_RULES)
@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
def test_without_epsilon_the_scale_of_the_loss_does_not_matter(name, scale):
    rng = np.random.default_rng(1)
    g, z, prev_g, prev_z, prev_d = rng.normal(size=(5, 4))
    for length in (0.05, 50.0):
        plain = beta.BETA_RULES[name](products(g, z, prev_g, prev_z, prev_d, length))
        # A preconditioned gradient keeps its size where M scales with the loss.
        scaled = products(scale * g, z, scale * prev_g, prev_z, prev_d, scale * length)
        np.testing.assert_allclose(beta.BETA_RULES[name](scaled), plain, rtol=1e-12)

"""Conjugate directions: mathematics, preconditioners, restarts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracle import beta_value, metric_length
from problems import quadratic

import nlcg_optax
from nlcg_optax import beta, scale_by_conjugate_direction

pytestmark = pytest.mark.usefixtures("x64")

UNBOUNDED = (-math.inf, math.inf)
WEIGHTS = jnp.array([1.0, 3.0, 0.2, 5.0, 0.7, 2.0])
PRECONDITIONERS = {
    "none": lambda: None,
    "fixed": lambda: optax.stateless(lambda g, _: g * WEIGHTS.astype(g.dtype)),
}


def minimize(beta_rule, preconditioner=None, steps=6, scale=1.0, **options):
    """Minimizes a quadratic with exact line search; returns what was seen."""
    hessian, b = (scale * jnp.asarray(a) for a in quadratic())
    tx = scale_by_conjugate_direction(
        beta_rule,
        preconditioner,
        **{"epsilon": 0.0, "beta_bounds": UNBOUNDED} | options,
    )

    def step(x, state):
        gradient = hessian @ x - b
        update, state = tx.update(gradient, state, x)
        length = (gradient @ update) / (update @ hessian @ update)
        return x - length * update, state, update

    x = jnp.zeros(6)
    state = tx.init(x)
    betas, directions = [], []
    for _ in range(steps):
        x, state, update = step(x, state)
        betas.append(state.beta)
        directions.append(-update)
    return x, np.array(betas), np.array(directions)


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize("rule", beta.BETA_RULES)
def test_exact_line_search_on_a_quadratic(rule, preconditioner):
    hessian, b = quadratic()
    make = PRECONDITIONERS[preconditioner]
    x, betas, directions = minimize(rule, make())

    # n steps reach the minimum ...
    np.testing.assert_allclose(x, np.linalg.solve(hessian, b), rtol=1e-8)
    # ... along conjugate directions ...
    gram = directions @ hessian @ directions.T
    norms = np.sqrt(np.diag(gram))
    np.testing.assert_allclose(gram / np.outer(norms, norms), np.eye(6), atol=1e-8)
    # ... with a β on which all rules agree, sign included.
    _, expected, _ = minimize("fletcher_reeves", make())
    assert betas[0] == 0
    assert np.all(betas[1:] > 1e-3)
    np.testing.assert_allclose(betas, expected, rtol=1e-6)


def test_a_fixed_preconditioner_changes_the_path():
    # Otherwise the test above would not have tested it.
    _, plain, _ = minimize("fletcher_reeves")
    _, preconditioned, _ = minimize("fletcher_reeves", PRECONDITIONERS["fixed"]())
    assert np.all(np.abs(plain[1:] / preconditioned[1:] - 1) > 1e-2)


@pytest.mark.parametrize("rule", beta.BETA_RULES)
def test_the_scale_of_the_loss_does_not_matter_without_epsilon(rule):
    _, betas, directions = minimize(rule)
    _, scaled_betas, scaled = minimize(rule, scale=2.0**-40)
    np.testing.assert_array_equal(scaled_betas, betas)
    np.testing.assert_array_equal(scaled, 2.0**-40 * directions)


def test_the_absolute_epsilon_is_a_documented_exception():
    _, betas, _ = minimize("fletcher_reeves", epsilon=1e-8)
    _, scaled, _ = minimize("fletcher_reeves", epsilon=1e-8, scale=2.0**-20)
    assert 0 < scaled[1] < 0.5 * betas[1]


def run(tx, gradients, params=None, **extra_args):
    params = jnp.zeros_like(gradients[0]) if params is None else params
    state = tx.init(params)
    rows = []
    for gradient in gradients:
        update, state = tx.update(gradient, state, params, **extra_args)
        rows.append((update, state))
    return rows


def test_output_keeps_the_sign_of_the_gradient():
    g = jnp.array([1.0, -2.0])
    ((update, state),) = run(scale_by_conjugate_direction(), [g])
    np.testing.assert_array_equal(update, g)
    np.testing.assert_allclose(state.cosine, 1)
    assert state.beta == 0


# d = -1, -2 and then -1 against a gradient of -1: uphill.
ASCENT = [jnp.array([g, 0.0]) for g in (1.0, 1.0, -1.0)]


def test_ascent_is_taken_by_default_and_seen():
    *_, (update, state) = run(scale_by_conjugate_direction(epsilon=0.0), ASCENT)
    np.testing.assert_allclose(update, [1.0, 0.0])
    assert state.restarts == 0
    assert state.beta == 1
    np.testing.assert_allclose(state.cosine, -1)


def test_restart_on_ascent_is_counted():
    tx = scale_by_conjugate_direction(epsilon=0.0, restart_on_ascent=True)
    *_, (before, kept), (update, state) = run(tx, ASCENT)
    np.testing.assert_allclose(before, [2.0, 0.0])
    assert kept.restarts == 0
    np.testing.assert_allclose(update, [-1.0, 0.0])
    assert (state.restarts, state.beta) == (1, 0)
    np.testing.assert_allclose(state.cosine, 1)


def test_restart_every():
    tx = scale_by_conjugate_direction(epsilon=0.0, restart_every=3)
    rows = run(tx, [jnp.ones(2)] * 8)
    betas = [float(state.beta) for _, state in rows]
    assert betas == [0, 1, 1, 0, 1, 1, 0, 1]
    assert [int(state.restarts) for _, state in rows] == [0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.2, 0.3), UNBOUNDED, (-1.0, 0.0)])
def test_beta_is_clipped_to_its_bounds(bounds):
    # Raw values: 4 by Fletcher and Reeves, -2 by Polak and Ribière.
    gradients = [jnp.array([1.0, 0.0]), jnp.array([2.0, 0.0])]
    for rule, raw in (("fletcher_reeves", 4), ("polak_ribiere", 2)):
        tx = scale_by_conjugate_direction(rule, beta_bounds=bounds, epsilon=0.0)
        (_, first), (update, state) = run(tx, gradients)
        assert first.beta == 0  # even where 0 is out of bounds
        expected = np.clip(raw, *bounds)
        np.testing.assert_allclose(state.beta, expected)
        np.testing.assert_allclose(update, [2 + expected, 0])


@pytest.mark.parametrize("epsilon", [0.0, 1e-8])
@pytest.mark.parametrize("rule", beta.BETA_RULES)
def test_zero_gradients_give_zero_updates(rule, epsilon):
    g = jnp.array([1.0, 2.0])
    tx = scale_by_conjugate_direction(
        rule, epsilon=epsilon, beta_bounds=UNBOUNDED, restart_on_ascent=True
    )
    rows = run(tx, [0 * g, 0 * g, g, 0 * g, 0 * g, g])
    for update, state in rows:
        assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(state))
        assert jnp.all(jnp.isfinite(update))
    for i in (0, 1, 4):
        np.testing.assert_array_equal(rows[i][0], [0.0, 0.0])
    np.testing.assert_allclose(rows[2][0], g)


GRADIENTS = list(np.random.default_rng(2).normal(size=(6, 5)))
OPTAX_PRECONDITIONERS = {
    "scale_by_rms": optax.scale_by_rms,
    "scale_by_adam": optax.scale_by_adam,
    "chain": lambda: optax.chain(optax.clip(0.7), optax.scale_by_rss()),
    "trust_ratio": optax.scale_by_trust_ratio,  # needs params
}


@pytest.mark.standard_promotion  # optax's Adam promotes
@pytest.mark.parametrize(
    ("rule", "bounds"),
    [("fletcher_reeves", (0, 1)), ("hager_zhang", (0, 1)), ("hager_zhang", UNBOUNDED)],
)
@pytest.mark.parametrize("name", OPTAX_PRECONDITIONERS)
def test_any_transformation_is_a_preconditioner(name, rule, bounds):
    preconditioner = OPTAX_PRECONDITIONERS[name]()
    tx = scale_by_conjugate_direction(
        rule, preconditioner, epsilon=0.0, beta_bounds=bounds
    )
    params = jnp.arange(1.0, 6.0)
    rows = run(tx, [jnp.asarray(g) for g in GRADIENTS], params)

    inner = preconditioner.init(params)
    prev_g = prev_z = prev_d = None
    length = 0.0
    for t, (g, (update, state)) in enumerate(zip(GRADIENTS, rows, strict=True)):
        z, inner = preconditioner.update(jnp.asarray(g), inner, params)
        z = np.asarray(z)
        b = 0.0
        if t:
            b = beta_value(rule, g, z, prev_g, prev_z, prev_d, length, 0.0)
            b = np.clip(b, *bounds)
        d = -z + (b * prev_d if t else 0)
        np.testing.assert_allclose(state.beta, b, rtol=1e-9)
        np.testing.assert_allclose(update, -d, rtol=1e-9)
        length = metric_length(b, g, z, prev_d, length)
        np.testing.assert_allclose(state.prev_d_d, length, rtol=1e-9)
        prev_g, prev_z, prev_d = g, z, d


def test_the_preconditioner_is_given_params_and_extra_arguments():
    seen = {}

    def update(updates, state, params=None, **extra_args):
        seen.update(extra_args, params=params)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    tx = scale_by_conjugate_direction(preconditioner=inner)
    x = jnp.ones(2)
    tx.update(x, tx.init(x), x, value=3.0, other="thing")
    assert seen["params"] is x
    assert (seen["value"], seen["other"]) == (3.0, "thing")


def test_a_callable_rule_is_given_every_inner_product():
    gradients = [jnp.asarray(g) for g in GRADIENTS]
    seen = []

    def rule(p, epsilon):
        seen.append((p, epsilon))
        return beta.hager_zhang(p, epsilon)

    tx = scale_by_conjugate_direction(rule, epsilon=0.25)
    state = tx.init(gradients[0])
    for g in gradients:
        update, state = tx.update(g, state)
    assert all(jnp.isfinite(jnp.stack(p)).all() for p, _ in seen)
    assert seen[-1][1] == 0.25
    named = scale_by_conjugate_direction("hager_zhang", epsilon=0.25)
    np.testing.assert_allclose(update, run(named, gradients)[-1][0])


@pytest.mark.parametrize("field", beta.InnerProducts._fields)
def test_a_rule_is_given_what_it_declares(field):
    def seen(**options):
        values = []

        def rule(p, epsilon):
            values.append(getattr(p, field))
            return beta.hager_zhang(p, epsilon) if not options else 0.1

        made = beta.BetaRule(rule, **options)
        # In the first two steps nothing depends on what β was.
        tx = scale_by_conjugate_direction(made, track_cosine=False)
        run(tx, [jnp.asarray(g) for g in GRADIENTS[:2]])
        return values[:2]

    np.testing.assert_array_equal(seen(needs={field}), seen())


def test_a_callable_may_return_a_plain_number():
    tx = scale_by_conjugate_direction(lambda p, epsilon: 0.5)
    (_, (update, state)) = run(tx, [jnp.ones(2)] * 2)
    np.testing.assert_allclose(update, [1.5, 1.5])
    assert state.beta == 0.5


@pytest.mark.parametrize(
    ("rule", "preconditioned", "grad"),
    [
        ("fletcher_reeves", False, False),
        ("dai_yuan", False, False),
        ("polak_ribiere", True, False),
        ("hestenes_stiefel", True, False),
        ("hybrid_hs_dy", True, False),
        ("liu_storey", True, False),
        ("hager_zhang", True, True),
        ("dai_kou", True, True),
        (lambda p, epsilon: 0.0, True, True),
        (beta.BetaRule(lambda p, epsilon: 0.0), True, True),
        (beta.BetaRule(lambda p, epsilon: 0.0, {"g_d", "prev_g_z"}), False, False),
        (beta.BetaRule(lambda p, epsilon: 0.0, {"g_w"}), True, False),
        (beta.BetaRule(lambda p, epsilon: 0.0, {"y_w"}), True, True),
    ],
)
def test_only_the_history_that_is_needed_is_kept(rule, preconditioned, grad):
    state = scale_by_conjugate_direction(rule).init(jnp.ones(2))
    assert (state.prev_preconditioned is not None) == preconditioned
    assert (state.prev_grad is not None) == grad


@pytest.mark.parametrize("state_dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_state_dtype(dtype, state_dtype):
    tx = nlcg_optax.nlcg_paper(0.1, beta_rule="hager_zhang", state_dtype=state_dtype)
    params = jnp.asarray(GRADIENTS[0], dtype)
    state = tx.init(params)
    for g in GRADIENTS:
        update, state = tx.update(jnp.asarray(g, dtype), state, params, value=1.0)
        params = params + update
        assert update.dtype == dtype
        direction, feedback, _ = state
        for kept in (
            feedback.prev_update,
            direction.prev_update,
            direction.prev_preconditioned,
            direction.prev_grad,
            direction.preconditioner_state.prev_preconditioned,
        ):
            assert kept.dtype == state_dtype


def test_wide_bounds_do_not_widen_the_state():
    bounds = np.float64(0.0), np.float64(0.5)
    tx = scale_by_conjugate_direction(beta_bounds=bounds)
    state = tx.init(jnp.ones(2, jnp.float32))
    with jax.numpy_dtype_promotion("standard"):  # where NumPy's numbers would promote
        update, new_state = tx.update(jnp.ones(2, jnp.float32), state)
    assert update.dtype == jnp.float32
    for before, after in zip(*map(jax.tree.leaves, (state, new_state)), strict=True):
        assert before.dtype == after.dtype


def test_bounds_may_be_traced():
    @jax.jit
    def last_beta(lower, upper):
        tx = scale_by_conjugate_direction(beta_bounds=(lower, upper), epsilon=0.0)
        return run(tx, [jnp.ones(2), 2 * jnp.ones(2)])[-1][1].beta

    assert last_beta(0.0, 0.5) == 0.5
    assert last_beta(0.0, 9.0) == 4.0
    with pytest.raises(ValueError, match="lower <= upper"):
        scale_by_conjugate_direction(beta_bounds=(jnp.ones([]), jnp.zeros([])))


@pytest.mark.parametrize("make", [nlcg_optax.nlcg, nlcg_optax.nlcg_paper])
def test_debug_nans_has_nothing_to_find(make):
    tx = make(0.1)
    params = jnp.ones((2, 2))
    state = tx.init(params)
    with jax.debug_nans(True):
        for _ in range(2):
            _, state = tx.update(params, state, params, value=1.0)


def test_complex_history_stays_complex():
    tx = nlcg_optax.nlcg_paper(0.1, state_dtype=jnp.bfloat16)
    x = jnp.array([1 + 2j, 3 - 1j], jnp.complex64)
    state = tx.init(x)
    update, state = tx.update(x, state, x, value=1.0)
    assert state[0].prev_update.dtype == jnp.complex64
    np.testing.assert_array_equal(state[0].prev_update, x)


@pytest.mark.parametrize("rule", beta.BETA_RULES)
def test_a_complex_leaf_is_two_real_ones(rule):
    # Re⟨a, b⟩ is the inner product of real and imaginary parts together.
    rng = np.random.default_rng(3)
    complex_rows = rng.normal(size=(6, 4)) + 1j * rng.normal(size=(6, 4))
    real_rows = np.concatenate([complex_rows.real, complex_rows.imag], axis=1)
    tx = scale_by_conjugate_direction(rule, beta_bounds=UNBOUNDED)
    for (z, state), (u, real_state) in zip(
        run(tx, [jnp.asarray(g) for g in complex_rows]),
        run(tx, [jnp.asarray(g) for g in real_rows]),
        strict=True,
    ):
        np.testing.assert_allclose(np.concatenate([z.real, z.imag]), u, rtol=1e-9)
        np.testing.assert_allclose(state.beta, real_state.beta, rtol=1e-9)
        np.testing.assert_allclose(state.cosine, real_state.cosine, rtol=1e-9)

"""When noise rules, and what a step does then."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nlcg_optax
from nlcg_optax import scale_by_quadratic_model
from nlcg_optax.curvature import noise
from nlcg_optax.curvature.state import LastStep


def last(slope, curved):
    numbers = (0.0, slope, curved, np.zeros(1), 0.0)
    return LastStep(*(jnp.asarray(x, jnp.float32) for x in numbers))


def test_a_step_is_contradicted_where_the_loss_rose_by_more_than_it_was_to_fall():
    # By its own batch 2 - 1/2 is gained.
    step = last(2.0, 1.0)
    # By the next one, from a slope of 2.0 with a curvature of 1: the same.
    assert not noise.contradicts(step, jnp.float32(1.0), jnp.float32(1.0))
    # All noise, and nothing lost but the curvature: rises by a half.
    assert not noise.contradicts(step, jnp.float32(-1.0), jnp.float32(1.0))
    # A slope of -1.1 before, and a curvature of 1: it rises by 1.6.
    assert noise.contradicts(step, jnp.float32(-2.1), jnp.float32(1.0))
    # The slope was as promised, but the curvature is 8: it rises by 2.
    assert noise.contradicts(step, jnp.float32(2 - 8.0), jnp.float32(8.0))
    # No step was made.
    assert not noise.contradicts(last(0.0, 0.0), jnp.float32(-9.0), jnp.float32(0.0))


@pytest.mark.parametrize(
    ("expected", "change"),
    [
        (False, {}),
        (True, {"signal": 0.39}),
        (False, {"signal": 0.39, "measurements": 7}),
        (True, {"signal": 0.39, "measurements": 2, "contradicted": True}),
        (False, {"signal": 0.41, "measurements": 2, "contradicted": True}),
        # A short remainder stays with the curvature,
        (False, {"signal": 0.39, "count": 951}),
        # whose products have cost a fifth of the run's gradients,
        (True, {"examples": 33.4}),
        (False, {"examples": 33.4, "count": 951}),
        # unless it is a fifth of the examples.
        (True, {"examples": 200.0, "count": 951}),
        (False, {"examples": 1e6, "horizon": math.inf}),
        (True, {"signal": 0.39, "horizon": math.inf}),
    ],
)
def test_when_noise_rules(expected, change):
    given = {
        "signal": 0.5,
        "measurements": 30,
        "contradicted": False,
        "examples": 30.0,
        "count": 30,
        "horizon": 1000,
        **change,
    }
    given["signal"] = jnp.float32(given["signal"])
    given["examples"] = jnp.float32(given["examples"])
    given["contradicted"] = jnp.asarray(given["contradicted"])
    assert bool(noise.rules(**given)) == expected


def test_the_newest_gradient_has_less_of_a_direction_the_more_steps_overshoot():
    known = scale_by_quadratic_model(horizon=100).init(np.ones(3)).noise

    def weight(own, after):
        slopes = {"slope": jnp.float32(own), "next_slope": jnp.float32(after)}
        return noise.mean_weight(known._replace(**slopes))

    np.testing.assert_allclose(weight(2.0, -0.2), 1 - np.exp(-0.55), rtol=1e-6)
    np.testing.assert_allclose(weight(2.0, -1.0), 1 - np.exp(-2.75), rtol=1e-6)
    np.testing.assert_allclose(weight(2.0, -4.0), 0.99, rtol=1e-6)
    assert weight(2.0, 0.0) == 0 and weight(2.0, 1.0) == 0  # the minimum is further on
    # Before anything is known, and where the last steps climbed.
    for unknown in (weight(0.0, 0.0), weight(-1.0, 3.0)):
        np.testing.assert_allclose(unknown, 1 - np.exp(-2.75), rtol=1e-6)


def test_slopes_are_averaged_from_an_overshoot_of_a_half():
    known = nlcg_optax.scale_by_quadratic_model(horizon=100).init(np.ones(3)).noise
    own, after = 4.0, -2.0
    for last_slope, next_slope in [(4.0, 1.0), (3.0, -3.0), (5.0, 0.0)]:
        own, after = 0.95 * own + 0.05 * last_slope, 0.95 * after + 0.05 * next_slope
        known = noise.slopes(known, jnp.float32(last_slope), jnp.float32(next_slope))
        slopes = known.slope, known.next_slope
        np.testing.assert_allclose(slopes, (own, after), rtol=1e-6)
    # Without a step, or with a gradient that is no number, they stay.
    for nothing in [(0.0, 3.0), (4.0, np.nan), (np.inf, 1.0)]:
        same = noise.slopes(known, *map(jnp.float32, nothing))
        slopes = same.slope, same.next_slope
        np.testing.assert_allclose(slopes, (own, after), rtol=1e-6)


def test_the_direction_is_told_how_far_the_last_step_overshot():
    given = []

    def update(grads, state, params=None, *, mean_weight, **extra):
        del params, extra
        jax.debug.callback(lambda x: given.append(float(x)), mean_weight)
        return grads, state

    direction = optax.GradientTransformationExtraArgs(lambda _: (), update)
    tx = scale_by_quadratic_model(horizon=200, history=1, noise_direction=direction)
    state = tx.init(PARAMS)
    noisy = state.noise._replace(since=jnp.int32(0))
    balance = noisy.balance
    balance = balance._replace(balance=balance.balance._replace(rate=jnp.float32(0.1)))
    state = state._replace(noise=noisy._replace(balance=balance))

    @jax.jit
    def step(params, state):
        value, grads, curvature = evaluate(params, batch_of(0))
        updates, state = tx.update(
            grads, state, params, value=value, curvature=curvature
        )
        return updates, state, grads

    own, after, params, last_step = 0.0, 0.0, PARAMS, None
    for count in range(3):
        updates, state, grads = step(params, state)
        jax.effects_barrier()
        if last_step is not None:
            turned = sum(np.sum(grads[k] * last_step[0][k]) for k in grads)
            if count == 1:
                own, after = last_step[1], -last_step[1] / 2
            own, after = 0.95 * own + 0.05 * last_step[1], 0.95 * after + 0.05 * turned
            expected = 1 - np.exp(5.5 * after / own)
            np.testing.assert_allclose(given[-1], expected, rtol=1e-4)
        slope = sum(np.sum(grads[k] * updates[k]) for k in grads)
        last_step = updates, slope
        params = jax.tree.map(lambda w, u: w - u, params, updates)
    assert len(given) == 3


# --- A whole run --------------------------------------------------------------------

RNG = np.random.default_rng(0)
X = np.float32(RNG.normal(size=(4096, 16)) * np.geomspace(1, 0.1, 16))
Y = np.float32(np.sin(X @ RNG.normal(size=(16, 4))) + 0.3 * RNG.normal(size=(4096, 4)))
PARAMS = {
    "a": np.float32(RNG.normal(size=(16, 8)) / 4),
    "b": np.float32(RNG.normal(size=(8, 4)) / 3),
}


def outputs(params, batch):
    return jnp.tanh(batch["x"] @ params["a"]) @ params["b"]


def loss(y, batch):
    return jnp.mean(jnp.sum(jnp.square(y - batch["y"]), -1))


def batch_of(t, size=16):
    places = jax.random.randint(
        jax.random.fold_in(jax.random.key(1), t), [size], 0, 4096
    )
    return {"x": jnp.asarray(X)[places], "y": jnp.asarray(Y)[places]}


evaluate = nlcg_optax.value_grad_and_curvature(outputs, loss, min_examples=16)


@functools.partial(jax.jit, static_argnames=("tx", "count", "bad"))
def run(tx, params, state, first, count, bad=-1):
    def step(carry, t):
        params, state = carry
        value, grads, curvature = evaluate(params, batch_of(t))
        value = jnp.where(t == bad, jnp.nan, value)
        grads = jax.tree.map(lambda g: jnp.where(t == bad, jnp.nan, g), grads)
        updates, state = tx.update(
            grads, state, params, value=value, curvature=curvature
        )
        return (optax.apply_updates(params, updates), state), state.noise.handed_over

    carry, over = jax.lax.scan(step, (params, state), first + jnp.arange(count))
    return *carry, over


def whole_loss(params):
    batch = {"x": X, "y": Y}
    return float(loss(outputs(params, batch), batch))


def model(steps, **options):
    return optax.with_extra_args_support(
        scale_by_quadratic_model(
            nlcg_optax.scale_by_orthogonalization(),
            horizon=steps,
            noise_direction=nlcg_optax.scale_by_soap(0.9),
            **options,
        )
    )


@functools.cache
def turned(steps=300):
    """The model, with its sign."""
    tx = model(steps)

    def update(updates, state, params=None, **extra):
        updates, state = tx.update(updates, state, params, **extra)
        return jax.tree.map(jnp.negative, updates), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def test_noise_rules_soon_and_the_rate_is_found():
    tx = turned()
    params, state, over = run(tx, PARAMS, tx.init(PARAMS), 0, 300)
    # The curvature is of every example here: its products are for 3% of the steps.
    assert 2 <= 300 - np.sum(over) <= 10
    told = nlcg_optax.diagnostics(state)
    assert told["noise_rate"] < 0.01 * told["rate"]  # it has fallen
    # Adam ends at 0.87, 1.20 and 1.51 from its best rate, three times it and a third.
    assert whole_loss(params) < 1.3 < 3 < whole_loss(PARAMS)


def test_a_loss_that_is_no_number_is_left_out_and_the_run_goes_on():
    tx = turned()
    params, state, _ = run(tx, PARAMS, tx.init(PARAMS), 0, 100)
    mean, rate = state.noise.balance.average, state.noise.balance.balance.rate
    params, state, _ = run(tx, params, state, 100, 1, bad=100)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        params,
        mean,
    )
    assert state.counts.nonfinite == state.noise.balance.nonfinite == 1
    np.testing.assert_allclose(state.noise.balance.balance.rate, rate / 4, rtol=1e-6)
    params, state, _ = run(tx, params, state, 101, 199)
    assert whole_loss(params) < 1.5


def test_a_run_resumes_bit_for_bit():
    tx = turned()
    expected = run(tx, PARAMS, tx.init(PARAMS), 0, 60)[0]
    params, state, over = run(tx, PARAMS, tx.init(PARAMS), 0, 30)
    assert over[-1]
    params, state = jax.tree.map(np.asarray, (params, state))
    got = run(tx, params, state, 30, 30)[0]
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_without_an_end_the_average_is_evaluated():
    tx = turned(math.inf)
    params, state, over = run(tx, PARAMS, tx.init(PARAMS), 0, 400)
    assert over[-1]
    mean = nlcg_optax.eval_params(state, params)
    assert whole_loss(mean) < 1.2
    assert whole_loss(mean) < whole_loss(params)
    # Before noise rules there is no average.
    state = tx.init(PARAMS)
    jax.tree.map(
        np.testing.assert_array_equal, nlcg_optax.eval_params(state, PARAMS), PARAMS
    )


def test_no_product_is_taken_once_noise_rules():
    tx = turned()
    calls = []

    def counted(params, given):
        # Once for each forward pass; a product runs it in forward mode.
        jax.debug.callback(lambda: calls.append(1))
        return outputs(params, given)

    @jax.jit
    def step(params, state, t):
        batch = batch_of(t)
        value, grads = jax.value_and_grad(lambda p: loss(outputs(p, batch), batch))(
            params
        )
        curvature = nlcg_optax.gauss_newton(counted, loss, batch, fraction=1)
        updates, state = tx.update(
            grads, state, params, value=value, curvature=curvature
        )
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    counts = []
    for t in range(16):
        calls.clear()
        params, state = step(params, state, t)
        jax.effects_barrier()
        counts.append(len(calls))
    over = int(state.noise.since)
    assert 0 < over < 14
    # From then on it is one forward pass, at the average.
    assert set(counts[over:]) == {1}
    assert min(counts[:over]) > 1

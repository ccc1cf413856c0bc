"""The rate that balances the cost of noise with the gain, against NumPy in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import nlcg_optax
from nlcg_optax import scale_by_noise_balance
from nlcg_optax.step_sizes import noise_balance


def noisy_losses(count, seed=0, jump=None, steep=0.0):
    rng = np.random.default_rng(seed)
    there = 3 * np.exp(-np.arange(count) / 20) + 1 / np.sqrt(1 + np.arange(count))
    there += 0.05 * rng.normal(size=count)
    losses = there + 0.1 * rng.uniform(size=count)
    losses -= steep * np.exp(-np.arange(count) / 20)
    if jump:
        losses[jump : jump + 5] += 30
    return losses, there


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("target", "jump", "steep"),
    [(1.0, None, 0.0), (0.5, None, 0.0), (1.0, 60, 0.0), (1.0, None, 0.8)],
)
def test_rates_are_those_of_the_formulas(target, jump, steep):
    losses, theres = noisy_losses(150, jump=jump, steep=steep)
    tx = scale_by_noise_balance(150, first_rate=0.01, target=target)
    x = jnp.zeros([1], jnp.float64)
    state, sizes = tx.init(x), []
    update = jax.jit(
        lambda state, loss, there: tx.update(
            jnp.ones_like(x), state, x, value=loss, value_fn=lambda _: there
        )
    )
    for loss, there in zip(losses, theres, strict=True):
        u, state = update(state, loss, there)
        sizes.append(float(u[0]))
    balance = oracle.NoiseBalance(0.01, 150, target, delay=20)
    expected = []
    for pair in zip(losses, theres, strict=True):
        balance.average(0.0)
        expected.append(balance.step(*pair) or 0.0)
    np.testing.assert_allclose(sizes, expected, rtol=1e-12)
    assert sizes[-1] < sizes[80] / 20
    assert state.returns == sum(size == 0 for size in expected)
    assert state.returns or not jump


def test_average_is_of_ten_steps_and_then_of_a_tenth():
    tx = scale_by_noise_balance()
    points = np.random.default_rng(1).normal(size=(300, 2)).astype(np.float32)
    state, mean = tx.init(jnp.array(points[0])), 0.0

    @jax.jit
    def update(state, x):
        return tx.update(x, state, x, value=0.0, value_fn=lambda _: 0.0)[1]

    for t, x in enumerate(points):
        state = update(state, x)
        mean += max(1 / (t + 1), min(0.1, 10 / (t + 1))) * (x - mean)
        if t == 9:
            np.testing.assert_allclose(mean, points[:10].mean(0), rtol=1e-5)
    np.testing.assert_allclose(state.average, mean, rtol=1e-4, atol=1e-6)


# A run on a noisy quadratic of condition 100, by NLCG's direction.
CURVATURES = jnp.logspace(-2, 0, 10)


def value_of(x, noise):
    return 0.5 * jnp.sum(CURVATURES * x**2) + x @ noise


@functools.partial(jax.jit, static_argnames=("tx", "count", "factor", "offset"))
def run(tx, state, x, first, count, factor=1.0, offset=0.0, bad=-1) -> Any:
    def step(carry, t):
        x, state = carry
        noise = 0.3 * jax.random.normal(jax.random.fold_in(jax.random.key(0), t), [10])

        def value_fn(x):
            return factor * value_of(x, noise) + offset

        value, grads = jax.value_and_grad(value_fn)(x)
        value = jnp.where(t == bad, jnp.nan, value)
        u, state = tx.update(grads, state, x, value=value, value_fn=value_fn)
        return (x - u, state), (x, value_of(x, jnp.zeros(10)))

    carry, (xs, losses) = jax.lax.scan(step, (x, state), first + jnp.arange(count))
    return *carry, xs, losses


def start(tx):
    x = jnp.ones(10)
    return tx.init(x), x


def balanced(rate, num_steps=400, direction=None):
    direction = direction or nlcg_optax.scale_by_conjugate_direction(
        preconditioner=nlcg_optax.scale_by_orthogonalization(epsilon=0.0),
        beta_bounds=(0.9, 0.9),
        epsilon=0.0,
    )
    return optax.chain(direction, scale_by_noise_balance(num_steps, first_rate=rate))


def test_units_of_the_loss_change_nothing():
    tx = balanced(0.01)
    expected = run(tx, *start(tx), 0, 100)[2]
    units = run(tx, *start(tx), 0, 100, factor=1024.0)[2]
    np.testing.assert_allclose(units, expected, rtol=2e-4, atol=1e-5)


def test_a_constant_of_a_loss_that_is_negative_changes_nothing():
    tx = balanced(0.01)
    expected = run(tx, *start(tx), 0, 100, offset=-4.0)[2]
    constant = run(tx, *start(tx), 0, 100, offset=-8.0)[2]
    np.testing.assert_allclose(constant, expected, rtol=2e-2, atol=2e-3)


def told(losses, excesses):
    """The balance after these losses, and by how much it is to change the rate."""
    balance = noise_balance.begin(jnp.zeros([1]), 0.01).balance
    for loss, excess in zip(losses, excesses, strict=True):
        balance = noise_balance.watch(balance, jnp.asarray(loss), jnp.asarray(excess))
    return balance, float(noise_balance.change(balance, 1.0, 5.0))


def test_a_loss_that_was_negative_once_may_be_so_again():
    losses = np.linspace(4, 1, 20, dtype=np.float32)
    balance, _ = told(losses, np.zeros(20))
    assert not balance.negative
    losses[3] = -1.0
    balance, _ = told(losses, np.zeros(20))
    assert balance.now > 0
    assert balance.negative


def test_the_rate_does_not_grow_in_a_steep_descent():
    """By a twentieth in each step, or by a five-thousandth."""
    steep, gentle = 4 * 0.95 ** np.arange(20.0), 4 * 0.9998 ** np.arange(20.0)
    for losses, grows in ((steep, False), (gentle, True), (steep - 5, True)):
        averages = [losses[max(0, t - 9) : t + 1].mean() for t in range(20)]
        excesses = np.float32(losses) - np.float32(averages)
        balance, change = told(np.float32(losses), excesses)
        assert balance.excess < 0
        assert (change > 0) == grows


def test_the_first_rate_hardly_matters():
    finals = []
    for rate in (0.001, 0.01, 0.1, 1.0):
        tx = balanced(rate)
        x = run(tx, *start(tx), 0, 400)[0]
        finals.append(float(value_of(x, jnp.zeros(10))))
    assert max(finals) < 0.06  # of 1.4 at the start
    assert max(finals[1:]) < 2 * min(finals[1:])


def test_a_rate_that_died_comes_back():
    tx = balanced(1e-7, num_steps=None)
    _, state, *_ = run(tx, *start(tx), 0, 400)
    # By a factor of e in 28 steps, and the loss shows nothing of it until it is large.
    assert nlcg_optax.diagnostics(state)["noise_rate"] > 1e-5
    _, state, _, losses = run(tx, state, jnp.ones(10), 400, 1000)
    assert nlcg_optax.diagnostics(state)["noise_rate"] > 1e-3
    assert losses[-1] < 0.3 * losses[0]


def test_a_loss_that_is_no_number_goes_back_to_the_average_and_cuts_the_rate():
    tx = balanced(0.01)
    x, state, *_ = run(tx, *start(tx), 0, 50)
    before = state[1]
    back, state, *_ = run(tx, state, x, 50, 1, bad=50)
    np.testing.assert_allclose(back, before.average, rtol=1e-6)
    after = state[1]
    assert (after.nonfinite, after.count) == (1, 51)
    np.testing.assert_allclose(after.balance.rate, before.balance.rate / 4, rtol=1e-6)
    jax.tree.map(
        np.testing.assert_array_equal,
        after.balance._replace(rate=0),
        before.balance._replace(rate=0),
    )
    x, state, *_ = run(tx, state, back, 51, 349)
    assert value_of(x, jnp.zeros(10)) < 0.06


def test_a_rate_that_is_far_too_large_goes_back_to_the_average():
    tx = balanced(0.01)
    x, state, *_ = run(tx, *start(tx), 0, 50)
    balance = state[1].balance
    state = (state[0], state[1]._replace(balance=balance._replace(rate=300.0)))
    x, after, _, losses = run(tx, state, x, 50, 30)
    assert losses[1] > 1e5 and losses[2] < losses[0]
    assert 3 < after[1].returns < 10 and after[1].nonfinite == 0
    assert losses[-1] < 1 and after[1].balance.rate < 1
    x, after, *_ = run(tx, after, x, 80, 320)
    assert value_of(x, jnp.zeros(10)) < 0.1


def test_a_first_loss_that_is_no_number_moves_nothing():
    tx = balanced(0.01)
    state, x = start(tx)
    # In a quadratic model the average is that of another time when noise comes to rule.
    state = (state[0], state[1]._replace(average=jnp.full(10, 7.0)))
    back, state, *_ = run(tx, state, x, 0, 1, bad=0)
    np.testing.assert_array_equal(back, x)
    np.testing.assert_array_equal(state[1].average, x)


def test_a_run_resumes_bit_for_bit():
    tx = balanced(0.01)
    whole = run(tx, *start(tx), 0, 60)[0]
    x, state, *_ = run(tx, *start(tx), 0, 30)
    x, state = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), (x, state))
    np.testing.assert_array_equal(run(tx, state, x, 30, 30)[0], whole)


def test_the_average_is_evaluated_until_the_rate_has_fallen_by_half():
    tx = balanced(1.0, num_steps=None)
    x, state, *_ = run(tx, *start(tx), 0, 100)
    mean = nlcg_optax.eval_params(state, x)
    np.testing.assert_array_equal(mean, state[1].average)
    still = jnp.zeros(10)
    assert value_of(mean, still) < 0.7 * value_of(x, still)
    # With an end the decay does that.
    tx = balanced(1.0, num_steps=100)
    x, state, *_ = run(tx, *start(tx), 0, 76)
    np.testing.assert_array_equal(nlcg_optax.eval_params(state, x), state[1].average)
    x, state, *_ = run(tx, state, x, 76, 4)
    np.testing.assert_array_equal(nlcg_optax.eval_params(state, x), x)


def test_eval_params_of_groups_and_of_other_optimizers():
    params = {"a": jnp.ones(2), "b": jnp.full(3, 2.0)}
    tx = optax.partition(
        {"noisy": scale_by_noise_balance(), "rest": optax.sgd(0.1)},
        {"a": "noisy", "b": "rest"},
    )
    state = tx.init(params)
    for value in (1.0, 3.0, 3.0):
        moved = jax.tree.map(lambda x, v=value: v * x, params)
        _, state = tx.update(
            params, state, moved, value=value, value_fn=lambda p: jnp.min(p["a"])
        )
    found = nlcg_optax.eval_params(state, params)
    np.testing.assert_allclose(found["a"], 7 / 3, rtol=1e-6)
    np.testing.assert_array_equal(found["b"], params["b"])
    assert nlcg_optax.eval_params(optax.sgd(0.1).init(params), params) is params


def test_low_precision_is_averaged_in_float32():
    x = jnp.ones(4, jnp.bfloat16)
    tx = scale_by_noise_balance(10)
    state = tx.init(x)
    assert state.average.dtype == jnp.float32
    u, new = tx.update(x, state, x, value=1.0, value_fn=lambda x: jnp.sum(x) / 4)
    assert (u.dtype, new.average.dtype) == (jnp.bfloat16, jnp.float32)
    jax.tree.map(lambda a, b: (a.dtype, a.shape) == (b.dtype, b.shape), state, new)


def test_curvature_stands_in_for_the_function():
    batch = jnp.array([[1.0, 2.0], [3.0, -1.0]])
    curvature = nlcg_optax.gauss_newton(
        lambda x: batch @ x, lambda y: jnp.mean(y**2), fraction=1
    )
    tx = scale_by_noise_balance(10)
    x, other = jnp.array([1.0, 0.5]), jnp.array([0.2, 0.1])
    states = []
    for given in (
        {"curvature": curvature},
        {"value_fn": lambda x: jnp.mean((batch @ x) ** 2)},
    ):
        state = tx.init(x)
        for point in (x, other):
            value = jnp.mean((batch @ point) ** 2)
            _, state = tx.update(x, state, point, value=value, **given)
        states.append(state)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), states[0], states[1]
    )


def test_what_is_missing_is_said():
    tx = scale_by_noise_balance(10)
    x = jnp.ones(2)
    state = tx.init(x)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(x, state)
    with pytest.raises(ValueError, match="value=None"):
        tx.update(x, state, x)
    with pytest.raises(ValueError, match="value_fn=None"):
        tx.update(x, state, x, value=1.0)
    options: Any
    for options in ({"first_rate": 0.0}, {"target": -1.0}, {"num_steps": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            scale_by_noise_balance(**options)


def test_numbers_of_a_first_step():
    """From the first loss alone nothing is known, and nothing is steered."""
    state = noise_balance.begin(jnp.ones(2), 0.5)
    numbers = jnp.float32(2.0), jnp.float32(0.0), None, 1.0, 5.0
    new, size, _ = noise_balance.follow(state, jnp.ones(2), state.average, *numbers)
    assert (size, new.balance.now, new.balance.past, new.balance.older) == (
        0.5,
        2,
        2,
        2,
    )
    assert new.balance.variance == 0


def test_what_did_not_go_back_to_the_average_is_not_sent_there_again():
    """Something changed the update: it would lead ever further away."""
    state = noise_balance.begin(jnp.zeros(2), 0.5)
    state = state._replace(balance=state.balance._replace(seen=jnp.int32(20)))
    x = jnp.full(2, 3.0)
    for loss in (jnp.nan, 9.0):
        given = jnp.float32(loss), jnp.float32(9.0), None, 1.0, 5.0
        once, _, taken = noise_balance.follow(state, x, x / 9, *given)
        assert not taken and once.size == 0
        np.testing.assert_array_equal(once.average, 0 * x)
        twice, _, taken = noise_balance.follow(once, x, x / 9, *given)
        assert not taken
        np.testing.assert_array_equal(twice.average, x)
        # What is no number is no place to be.
        broken = x.at[0].set(jnp.nan)
        other, _, _ = noise_balance.follow(once, broken, x / 9, *given)
        np.testing.assert_array_equal(other.average, [0.0, 3.0])

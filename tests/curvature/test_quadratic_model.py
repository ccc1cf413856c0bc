"""The step that curvature chooses, against conjugate gradient in NumPy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracle import NoiseBalance

import nlcg_optax
from nlcg_optax import scale_by_quadratic_model

N = 8
RNG = np.random.default_rng(0)
BASIS, _ = np.linalg.qr(RNG.normal(size=(N, N)))
MATRIX = (BASIS * np.geomspace(1.0, 20.0, N)) @ BASIS.T
OFFSET = RNG.normal(size=N)
START = RNG.normal(size=N)
INVERSE = 1 / np.diag(MATRIX) * RNG.uniform(0.5, 2.0, N)
MINIMUM = np.linalg.solve(MATRIX, OFFSET)

fixed = optax.stateless(lambda updates, params: updates * INVERSE)


def quadratic(x, factor=1.0):
    return factor * (0.5 * x @ (MATRIX @ x) - OFFSET @ x)


def conjugate_gradient(steps):
    """Preconditioned conjugate gradient, as in the textbooks."""
    x, points = START, []
    r = OFFSET - MATRIX @ x
    p = z = INVERSE * r
    for _ in range(steps):
        alpha = r @ z / (p @ MATRIX @ p)
        x = x + alpha * p
        points.append(x)
        new_r = r - alpha * MATRIX @ p
        new_z = INVERSE * new_r
        p = new_z + new_r @ new_z / (r @ z) * p
        r, z = new_r, new_z
    return np.array(points)


# Conjugate gradient itself: no damping, no bound.
PURE = {
    "damping": 0.0,
    "noise_damping": 0.0,
    "first_damping": 0.0,
    "max_growth": math.inf,
}


def run(tx, value_fn, x, steps, curvature=None):
    """Points and states of so many steps."""
    curvature = nlcg_optax.hessian(value_fn) if curvature is None else curvature

    @jax.jit
    def step(x, state):
        value, grad = jax.value_and_grad(value_fn)(x)
        updates, state = tx.update(grad, state, x, value=value, curvature=curvature)
        return optax.apply_updates(x, jax.tree.map(jnp.negative, updates)), state

    x = jax.tree.map(jnp.asarray, x)
    state, points, states = tx.init(x), [], []
    for _ in range(steps):
        x, state = step(x, state)
        points.append(x)
        states.append(state)
    return points, states


# --- Conjugate gradient -------------------------------------------------------------


@pytest.mark.parametrize("history", [1, 3])
def test_on_a_quadratic_it_is_conjugate_gradient(history, x64):
    tx = scale_by_quadratic_model(fixed, history=history, residuals=0, **PURE)
    points, states = run(tx, quadratic, START, N + 2)
    expected = conjugate_gradient(N)
    largest = np.abs(START - MINIMUM).max()
    for point, other in zip(points, expected, strict=False):
        np.testing.assert_allclose(point, other, rtol=0, atol=1e-10 * largest)
    # It ends in n steps, and then stays.
    for point in points[N - 1 :]:
        np.testing.assert_allclose(point, MINIMUM, rtol=0, atol=1e-9)
    # The model is the function: what it predicts is what happens.
    for before, after in zip(states[: N - 1], states[1:], strict=False):
        np.testing.assert_allclose(
            before.last.predicted_decrease, after.trust.actual_decrease, rtol=1e-8
        )
        assert abs(after.last.conjugacy) < 1e-8
    assert states[-1].counts.rejected == 0 and states[-1].counts.nonfinite == 0


def test_a_residual_direction_is_a_second_iteration(x64):
    for residuals in (1, 2, 3):
        tx = scale_by_quadratic_model(fixed, residuals=residuals, **PURE)
        points, _ = run(tx, quadratic, START, 1)
        expected = conjugate_gradient(1 + residuals)[-1]
        np.testing.assert_allclose(points[0], expected, rtol=1e-10)


def test_steepest_descent(x64):
    """With z = g and no history: exact steps along the gradient."""
    tx = scale_by_quadratic_model(history=0, residuals=0, **PURE)
    points, states = run(tx, quadratic, START, 5)
    x = START
    for point, state in zip(points, states, strict=True):
        g = MATRIX @ x - OFFSET
        alpha = g @ g / (g @ MATRIX @ g)
        np.testing.assert_allclose(state.last.coefficients, [alpha, 0], rtol=1e-10)
        np.testing.assert_allclose(
            state.last.predicted_decrease, quadratic(x) - quadratic(x - alpha * g), 1e-9
        )
        x = x - alpha * g
        np.testing.assert_allclose(point, x, rtol=1e-10)


def test_several_preconditioners_span_a_plane(x64):
    second = np.linspace(1.0, 3.0, N)
    other = optax.stateless(lambda updates, params: updates * second)
    tx = scale_by_quadratic_model([fixed, None, other], residuals=0, **PURE)
    points, states = run(tx, quadratic, START, 1)
    g = MATRIX @ START - OFFSET
    d = np.stack([INVERSE * g, g, second * g])
    c = np.linalg.solve(d @ MATRIX @ d.T, d @ g)
    np.testing.assert_allclose(states[0].last.coefficients, [*c, 0, 0, 0], rtol=1e-8)
    np.testing.assert_allclose(points[0], START - c @ d, rtol=1e-8)


# A small regression with a curved model, where steps are not exact.
X = RNG.normal(size=(20, 3))
Y = np.sin(X @ RNG.normal(size=(3, 2)))
NET = {"a": RNG.normal(size=(3, 4)), "b": RNG.normal(size=(4, 2))}


def net(params):
    return jnp.tanh(X @ params["a"]) @ params["b"]


def net_loss(params, factor=1.0):
    return factor * jnp.mean(jnp.sum((net(params) - Y) ** 2, -1))


def net_curvature(factor=1.0):
    return nlcg_optax.gauss_newton(
        net, lambda y: factor * jnp.mean(jnp.sum((y - Y) ** 2, -1))
    )


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
def test_a_factor_in_the_loss_changes_nothing(factor, x64):
    tx = scale_by_quadratic_model(damping=0.1)
    expected, states = run(tx, net_loss, NET, 10, net_curvature())
    got, others = run(tx, lambda p: net_loss(p, factor), NET, 10, net_curvature(factor))
    assert net_loss(got[-1]) < 0.5 * net_loss(NET)
    for point, other in zip(got, expected, strict=True):
        for a, b in zip(jax.tree.leaves(point), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9)
    for state, other in zip(states, others, strict=True):
        np.testing.assert_allclose(state.trust.damping, other.trust.damping)


def test_orthogonalization_trains_without_a_learning_rate():
    params = jax.tree.map(np.float32, NET)
    tx = scale_by_quadratic_model(nlcg_optax.scale_by_orthogonalization())

    def outputs(params):
        return jnp.tanh(np.float32(X) @ params["a"]) @ params["b"]

    def loss(y):
        return jnp.mean(jnp.sum((y - np.float32(Y)) ** 2, -1))

    curvature = nlcg_optax.gauss_newton(outputs, loss)
    points, _ = run(tx, lambda p: loss(outputs(p)), params, 40, curvature)
    assert loss(outputs(points[-1])) < 0.1 * loss(outputs(params))


# --- All of it, stated literally ----------------------------------------------------

STEPS = 80
NOISE = RNG.normal(size=(STEPS, N))


def noisy(x, t, noise):
    """Value and gradient of a tilted bowl."""
    slope = MATRIX @ x - OFFSET + noise * NOISE[t]
    value = quadratic(x) + noise * NOISE[t] @ x + 0.05 * np.sum(x**4) + 10
    return value, slope + 0.2 * x**3


def solve(products, slopes, damping):
    lengths = np.sqrt(np.diag(products))
    # A step that was wholly taken back is none, and has no share.
    lengths = np.where(lengths > 0, lengths, 1)
    unit = products / np.outer(lengths, lengths) + damping * np.eye(len(slopes))
    return np.linalg.solve(unit, slopes / lengths) / lengths


def oracle(x, noise, steps, horizon):
    """The step in NumPy, in the order of its description."""
    past, lengths, rows = [], [], []
    last = balance = None
    error = log_length = 0.0
    share, fresh, extra, measured = 1.0, 1.0, 3.0, 0
    rejections, trend, usual, factor, climb = 0, 0.0, 0.0, 1.0, 0.0
    d = 0 * x
    for t in range(steps):
        f, g = noisy(x, t, noise)
        row = {"rejected": False, "switched": balance is not None}
        rows.append(row)
        if balance is not None:
            z, beta = INVERSE * g, 0.9 if balance.n else 0.0
            d = z + beta * d
            mean = balance.average(x)
            # What the curvature's own function says of both, without the noise.
            there = f - (quadratic(x) - quadratic(mean))
            size = balance.step(f, there)
            x = x - size * 0.1 * (z + beta * d)
            row |= {"x": x, "share": share, "damping": rows[t - 1]["damping"]}
            continue
        known = contradicted = too_long = False
        if last is not None:
            predicted, actual = last["slope"] - last["curve"] / 2, last["f"] - f
            measured = t - sum(row["rejected"] for row in rows[:t])
            if last["slope"] > 0:
                curve = past[0] @ MATRIX @ past[0]
                contradicted = g @ past[0] - curve / 2 > predicted
                new = min(max((curve - g @ past[0]) / last["slope"], 0), 1) - fresh
                fresh += max(0.1, 1 / (measured + 1)) * new
            known = measured >= 8 or contradicted
            straight = abs(last["curve"]) < 0.3 * last["slope"]
            part = 0 if straight else 1
            tolerated = max(part * predicted, 4 * error)
            above = 0.0 if horizon else max(climb - actual, 0)  # the lowest loss
            high = above > tolerated
            tolerated = 0 if trend < -0.7 or high else tolerated
            new = abs(predicted - actual)
            new = min(new, abs(actual)) if straight or climb else new
            new = error + 0.2 * (min(new, 3 * error) - error) if error else new
            factor = 1.0
            if rejections == 2:  # nothing is left of that step
                too_long = -actual <= tolerated
                if -actual > tolerated:
                    extra, trend, climb = extra / 16, 0.0, 0.0
                    error += 0.2 * (abs(actual) - error)
                rejections = 0
            elif -actual > tolerated:
                rejections += 1
                kept = 0.25 if rejections == 1 else 0.0
                row |= {"rejected": True, "x": x - (1 - kept) * past[0]}
                extra = 4 * max(extra, 0.1)
                error = new if error and not high else error
            else:
                rejections, error, climb = 0, error if high else new, above
                trend += 0.3 * (np.sign(actual) - trend)
                extra *= 0.25
                if straight:
                    promised = last["slope"]
                    factor = 2.0 if actual > 0.5 * promised else 1.0
                    factor = 0.5 if actual < 0.25 * promised else factor
            if not row["rejected"] and last["slope"] > 0:
                new = (last["curve"] - g @ past[0]) / last["slope"]
                new = min(max(new, 0), 1) - share
                share += max(0.1, 1 / (measured + 1)) * new
        damping = 0.01 + 0.1 * (1 - share) / max(share, 0.05) + extra
        z = INVERSE * g
        directions = np.stack([z, *past])
        products = directions @ MATRIX @ directions.T
        length, here = z @ g / products[0, 0], products[0, 0] / (z @ z)
        flat = 100 * here < usual or factor < 1  # as good as no curvature
        if flat:
            length = factor * lengths[0] / np.linalg.norm(z)
        log_length += (math.log(length) - log_length) / (measured + 1)
        if row["rejected"]:
            x, past[0] = row["x"], kept * past[0]
            lengths[0] *= 0.25
            last["slope"], last["curve"] = kept * last["slope"], kept**2 * last["curve"]
            row |= {"share": share, "damping": damping}
        else:
            c = solve(products, directions @ g, damping)
            for _ in range(2):
                residual = g - MATRIX @ (c @ directions)
                directions = np.stack([*directions, INVERSE * residual])
                products = directions @ MATRIX @ directions.T
                slopes = directions @ g
                c = solve(products, slopes, damping)
            if flat:
                c = length * np.eye(len(c))[0]
            usual = usual**0.8 * here**0.2 if usual else here
            delta, slope, curve = -c @ directions, slopes @ c, c @ products @ c
            if past:
                longest = 3 * (lengths[0] if too_long else max(lengths))
                ratio = min(1, longest / np.linalg.norm(delta))
                delta, slope, curve = ratio * delta, ratio * slope, ratio**2 * curve
            last = {"f": f, "slope": slope, "curve": curve}
            x = x + delta
            past = [delta, *past][:3]
            lengths = [np.linalg.norm(delta), *lengths][:3]
            row |= {"x": x, "share": share, "damping": damping}
        left = 0 if horizon is None else horizon - (t + 1)
        if known and fresh < 0.4 and left >= 50:
            rate = math.exp(log_length) * (0.03 if contradicted else 0.3)
            balance = NoiseBalance(rate, left)
    return rows


CASES = {  # noise, steps, horizon
    "no noise": (0.0, 20, None),
    "much noise": (3.0, STEPS, None),
    "much noise, a horizon": (3.0, STEPS, STEPS),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_its_description_says(case, x64):
    noise, steps, horizon = CASES[case]
    tx = scale_by_quadratic_model(fixed, horizon=horizon)
    curvature = dataclasses.replace(nlcg_optax.hessian(quadratic), fraction=0.01)
    expected = oracle(START, noise, steps, horizon)

    @jax.jit
    def update(grad, state, x, value):
        return tx.update(grad, state, x, value=value, curvature=curvature)

    x = jnp.asarray(START)
    state = tx.init(x)
    for t, row in enumerate(expected):
        before = state
        value, grad = noisy(np.asarray(x), t, noise)
        updates, state = update(grad, state, x, value)
        x = x - updates
        np.testing.assert_allclose(x, row["x"], rtol=1e-8, atol=1e-9)
        assert (state.counts.rejected > before.counts.rejected) == row["rejected"]
        np.testing.assert_allclose(state.noise.signal, row["share"], rtol=1e-8)
        if not row["rejected"]:
            np.testing.assert_allclose(state.trust.damping, row["damping"], rtol=1e-8)
    # The case is about something.
    much = case.startswith("much noise")
    assert (state.counts.rejected > 0) == (state.counts.bounded > 0) == much
    # Without a horizon noise never rules.
    assert (state.noise.signal < 0.45) == much
    assert (state.noise.rate > 0) == (horizon is not None)
    assert state.counts.nonfinite == 0


# --- The multiplier -----------------------------------------------------------------


def test_the_multiplier_scales_the_step_and_its_prediction(x64):
    schedule = optax.linear_schedule(0.5, 0.1, 4)
    tx = scale_by_quadratic_model(fixed, residuals=0, multiplier=schedule, **PURE)
    points, states = run(tx, quadratic, START, 3)
    whole = conjugate_gradient(1)[0] - START
    np.testing.assert_allclose(points[0], START + 0.5 * whole, rtol=1e-10)
    values = [quadratic(x) for x in (START, *points)]
    for t in range(3):
        decrease = values[t] - values[t + 1]
        np.testing.assert_allclose(
            states[t].last.predicted_decrease, decrease, rtol=1e-8
        )


# --- Steps that go wrong ------------------------------------------------------------


def test_a_first_step_into_the_void_is_survived():
    """The model knows nothing of the wall behind which the loss is not finite."""

    def value_fn(x):
        return jnp.sum(jnp.log(jnp.cosh(x))) + 0 * jnp.sum(jnp.sqrt(6 - x**2))

    x = jnp.array([2.0, 1.5], jnp.float32)
    points, states = run(scale_by_quadratic_model(), value_fn, x, 30)
    assert not np.isfinite(value_fn(points[0]))
    assert states[1].counts.rejected == 1
    np.testing.assert_allclose(points[1], x + (points[0] - x) / 4, rtol=1e-5)
    np.testing.assert_allclose(points[-1], np.zeros(2), atol=1e-3)
    assert states[-1].counts.nonfinite == 0


def test_a_rejected_step_is_taken_back():
    """By hand: the loss that follows the first step is far above the prediction."""
    tx = scale_by_quadratic_model(history=2, residuals=0, **PURE)
    curvature = nlcg_optax.hessian(lambda x: 0.5 * jnp.sum(x**2 * jnp.array([1.0, 4])))
    x, g = jnp.array([1.0, 1.0]), jnp.array([1.0, 4.0])
    state = tx.init(x)

    @jax.jit
    def update(g, state, x, value):
        return tx.update(g, state, x, value=value, curvature=curvature)

    first, state = update(g, state, x, 3.0)
    alpha = 17 / 65
    np.testing.assert_allclose(first, alpha * g, rtol=1e-6)
    # Slope and curvature along the step, and what they promise.
    np.testing.assert_allclose(
        state.last.predicted_decrease, 0.5 * alpha * 17, rtol=1e-5
    )
    back, state = update(2 * g, state, x - first, jnp.nan)
    np.testing.assert_allclose(back, -0.75 * first, rtol=1e-6)
    assert (
        state.counts.rejected == 1
        and state.counts.count == 2
        and state.memory.stored == 1
    )
    np.testing.assert_allclose(state.trust.extra_damping, 0.4, rtol=1e-6)
    assert state.last.prev_value == 3.0
    cut = 0.25 * alpha * 17 - 0.5 * 0.25**2 * alpha * 17
    np.testing.assert_allclose(state.last.predicted_decrease, cut, rtol=1e-5)
    newest = jax.tree.map(lambda m: m[0], state.memory.prev_updates)
    np.testing.assert_allclose(newest, 0.25 * first, rtol=1e-6)
    # It goes on from there, with the shortened step in its memory.
    _, state = update(g, state, x - 0.25 * first, 2.5)
    assert state.counts.rejected == 1 and state.memory.stored == 2
    np.testing.assert_allclose(state.trust.damping, 0.1, rtol=1e-6)  # a quarter of it
    np.testing.assert_allclose(state.trust.actual_decrease, 0.5, rtol=1e-5)


def test_a_gradient_that_is_not_finite_is_the_steps_fault():
    tx = scale_by_quadratic_model()
    x = jnp.array([1.0, -2.0])
    curvature = nlcg_optax.hessian(lambda x: jnp.sum(x**2))
    given = {"value": 5.0, "curvature": curvature}
    update = jax.jit(tx.update)
    first, state = update(2 * x, tx.init(x), x, **given)
    back, state = update(jnp.nan * x, state, x - first, **given)
    np.testing.assert_allclose(back, -0.75 * first, rtol=1e-6)
    assert state.counts.rejected == 1 and state.counts.nonfinite == 0


def test_a_step_is_at_most_three_times_the_last_ones():
    """The curvature falls by a factor of 4 from one step to the next."""
    tx = scale_by_quadratic_model(residuals=0, **{**PURE, "max_growth": 3.0})
    x = jnp.ones(2)
    state, steps = tx.init(x), []
    for k in range(4):
        curvature = nlcg_optax.hessian(lambda x, k=k: 0.5 * 4.0**-k * jnp.sum(x**2))
        step, state = tx.update(x, state, x, value=-1e3 * k, curvature=curvature)
        steps.append(np.linalg.norm(step))
        np.testing.assert_allclose(
            state.last.predicted_decrease,
            np.sqrt(2) * steps[-1] - 0.5 * 4.0**-k * steps[-1] ** 2,
            rtol=1e-5,
        )
    np.testing.assert_allclose(steps, np.sqrt(2) * 3.0 ** np.arange(4), rtol=1e-5)
    assert state.counts.bounded == 3


def test_a_step_of_length_zero_is_none(x64):
    """The first of a warm-up from zero, and where the gradient is exactly zero."""

    def run_of(grads, rates):
        tx = scale_by_quadratic_model(fixed, multiplier=lambda t: jnp.array(rates)[t])
        curvature = nlcg_optax.hessian(quadratic)
        x = jnp.asarray(START)
        state = tx.init(x)

        @jax.jit
        def one(x, state, factor):
            grad = factor * (MATRIX @ x - OFFSET)
            given = {"value": quadratic(x), "curvature": curvature}
            step, state = tx.update(grad, state, x, **given)
            return x - step, state

        for factor in grads:
            x, state = one(x, state, factor)
        return x, state

    expected, found = run_of([1.0] * 3, [1.0] * 3)
    assert found.memory.stored == 3
    for grads, rates in (([1.0] * 4, [0.0, 1, 1, 1]), ([0.0, 1, 1, 1], [1.0] * 4)):
        x, state = run_of(grads, rates)
        np.testing.assert_allclose(x, expected, rtol=1e-10)
        assert (
            state.counts.count == 4
            and state.memory.stored == 3
            and state.counts.bounded == 0
        )
    # Nor does the average best length take it for one.
    np.testing.assert_allclose(
        state.noise.log_length, found.noise.log_length, rtol=1e-10
    )
    # As long as it likes.
    frozen, _ = run_of([0.0] * 5 + [1.0] * 20, [1.0] * 25)
    np.testing.assert_allclose(frozen, MINIMUM, rtol=1e-6)


def test_a_loss_cannot_fall_far_below_zero():
    """The curvature of the examples that it is taken of is next to nothing."""
    tx = scale_by_quadratic_model(residuals=0, **PURE)
    x = jnp.array([3.0, 4.0])
    curvature = nlcg_optax.gauss_newton(lambda x: x, lambda y: 0.5 * jnp.sum(y**2))
    part = 1 - np.sqrt(1 - 8 / 25)  # by which the model falls by 4
    for value, bounded in ((2.0, 1), (-2.0, 0), (1e9, 0)):
        step, state = tx.update(x, tx.init(x), x, value=value, curvature=curvature)
        # Without the bound it is g over the curvature of 1.
        assert state.counts.bounded == bounded
        if bounded:
            np.testing.assert_allclose(state.last.predicted_decrease, 4.0, rtol=1e-4)
            np.testing.assert_allclose(step, part * x, rtol=1e-4)
        else:
            np.testing.assert_allclose(step, x, rtol=1e-3)
    # A factor in the loss changes nothing.
    tenth = nlcg_optax.gauss_newton(lambda x: x, lambda y: 0.05 * jnp.sum(y**2))
    step, state = tx.update(0.1 * x, tx.init(x), x, value=0.2, curvature=tenth)
    np.testing.assert_allclose(step, part * x, rtol=1e-4)


@pytest.mark.parametrize("what", ["value", "gradient", "curvature"])
def test_what_is_not_finite_leaves_everything_as_it_was(what):
    tx = scale_by_quadratic_model(optax.scale_by_rms())
    factor = jnp.nan if what == "curvature" else 1.0
    x = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}

    def value_fn(x):
        return jnp.sum(x["w"] ** 2) + 3 * x["b"] ** 2

    g = jax.grad(value_fn)(x)
    state = tx.init(x)
    if what == "curvature":  # what else is not finite after a step is the step's fault
        curvature = nlcg_optax.hessian(value_fn)
        updates, state = tx.update(g, state, x, value=4.0, curvature=curvature)
        x = jax.tree.map(jnp.subtract, x, updates)
    bad = jax.tree.map(lambda v: v * jnp.nan, g) if what == "gradient" else g
    updates, new_state = tx.update(
        bad,
        state,
        x,
        value=jnp.inf if what == "value" else value_fn(x),
        curvature=nlcg_optax.hessian(lambda x: factor * value_fn(x)),
    )
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))
    assert new_state.counts.nonfinite == 1
    counts = state.counts._replace(nonfinite=jnp.int32(1))
    expected = jax.tree.leaves(state._replace(counts=counts))
    for leaf, other in zip(jax.tree.leaves(new_state), expected, strict=True):
        np.testing.assert_array_equal(leaf, other)


def test_at_the_minimum_it_stays():
    tx = scale_by_quadratic_model(optax.scale_by_rms())
    x = jnp.zeros(3)
    points, states = run(tx, lambda x: 1 + jnp.sum(x**2), x, 3)
    np.testing.assert_array_equal(points[-1], x)
    assert states[-1].counts.rejected == states[-1].counts.nonfinite == 0


# --- What the caller sees -----------------------------------------------------------


def test_diagnostics(x64):
    tx = optax.chain(scale_by_quadratic_model(fixed, history=1, damping=0.3))
    points, states = run(tx, quadratic, START, 3)
    report = nlcg_optax.diagnostics(states[-1])
    assert report["coefficients"].shape == (4,)
    np.testing.assert_allclose(report["damping"], 0.3 + 3 / 16, rtol=1e-6)
    np.testing.assert_allclose(report["signal"], 1)  # there is no noise
    values = [quadratic(x) for x in (START, *points)]
    np.testing.assert_allclose(report["predicted_decrease"], values[2] - values[3])
    np.testing.assert_allclose(report["actual_decrease"], values[1] - values[2])
    for counter in ("bounded_steps", "rejected_steps", "nonfinite_products"):
        assert report[counter] == 0
    d, e = points[2] - points[1], points[1] - points[0]
    cosine = d @ MATRIX @ e / np.sqrt((d @ MATRIX @ d) * (e @ MATRIX @ e))
    np.testing.assert_allclose(report["conjugacy"], cosine, atol=1e-10)


def check(error, *needles):
    for needle in needles:
        assert needle in str(error.value)


def test_arguments_that_are_none():
    for options, needles in (
        ({"history": -1}, ["history=-1", "at least 0"]),
        ({"history": 1.5}, ["history=1.5", "an integer"]),
        ({"residuals": -1}, ["residuals=-1", "at least 0"]),
        ({"damping": -0.1}, ["damping=-0.1", "at least 0"]),
        ({"first_damping": "1"}, ["first_damping='1'", "a number"]),
        ({"max_growth": 0}, ["max_growth=0", "greater than 0"]),
        ({"multiplier": "1"}, ["multiplier='1'", "a number"]),
        ({"preconditioner": "rms"}, ["preconditioner='rms'", "GradientTransformation"]),
        ({"preconditioner": []}, ["preconditioner=[]", "a sequence"]),
        ({"preconditioner": [optax.identity, None]}, ["GradientTransformation"]),
    ):
        with pytest.raises(ValueError) as error:
            scale_by_quadratic_model(**options)
        check(error, *needles)


@pytest.mark.parametrize("name", ["history", "residuals"])
def test_traced_counts_are_to_be_static(name):
    with pytest.raises(ValueError, match=f"{name} is a traced .*static_args=") as error:
        jax.jit(lambda n: scale_by_quadratic_model(**{name: n}).init(1.0))(2)
    assert f"'{name}'" in str(error.value)
    with pytest.raises(ValueError, match=f"{name} is an array, .*static_args="):
        scale_by_quadratic_model(**{name: jnp.int32(2)})  # which a jit would trace


def test_with_injected_hyperparams_the_steps_are_the_same():
    static = ("history", "residuals")
    injected = optax.inject_hyperparams(scale_by_quadratic_model, static_args=static)
    txs = scale_by_quadratic_model(max_growth=2.0), injected(max_growth=2.0)
    curvature = nlcg_optax.hessian(quadratic)
    x = jnp.ones(N)

    def two_steps(tx):
        state = tx.init(x)
        for g in (x, x[::-1]):
            given = {"value": quadratic(g), "curvature": curvature}
            updates, state = jax.jit(tx.update)(g, state, x, **given)
        return updates

    plain, same = map(two_steps, txs)
    np.testing.assert_allclose(same, plain, rtol=1e-6)


CALL = "curvature=nlcg_optax.gauss_newton("


@pytest.mark.parametrize(
    ("given", "needles"),
    [
        ({}, ["value=None", CALL]),
        ({"value": 1.0}, ["curvature=None", CALL]),
        ({"value": 1.0, "curvature": quadratic}, ["curvature=function", CALL]),
        ({"value": 1.0, "curvature": MATRIX}, ["curvature=ndarray", CALL]),
        ({"value": np.ones(2), "curvature": None}, ["(2,)", "a real scalar"]),
        ({"value": 1j, "curvature": None}, ["complex", "a real scalar"]),
    ],
)
def test_what_update_needs(given, needles):
    tx = scale_by_quadratic_model()
    x = jnp.ones(N)
    with pytest.raises(ValueError) as error:
        tx.update(x, tx.init(x), x, **given)
    check(error, *needles)


def test_update_needs_the_parameters_and_gradients_like_them():
    tx = scale_by_quadratic_model()
    x = jnp.ones(3)
    curvature = nlcg_optax.hessian(jnp.sum)
    with pytest.raises(ValueError) as error:
        tx.update(x, tx.init(x), value=1.0, curvature=curvature)
    check(error, "params=None", "update(grads, state, params")
    with pytest.raises(ValueError) as error:
        tx.update({"x": x}, tx.init(x), x, value=1.0, curvature=curvature)
    check(error, "gradients do not match", "expected")

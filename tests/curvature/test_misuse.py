"""What a loop may do to the curvature's step: nothing stops for long, or climbs."""

import functools

import fuzz
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from long_run import rest_long

import nlcg_optax
from nlcg_optax import gauss_newton, nlcg_auto

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 6))
Y = np.sin(X[:, :2]) + 0.1 * RNG.normal(size=(64, 2))
PARAMS = {
    "w": RNG.normal(size=(6, 12)) / 3,
    "b": np.zeros(12),
    "out": RNG.normal(size=(12, 2)) / 6,
}


def model(params):
    x = jnp.asarray(X, params["w"].dtype)
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["out"]


def targets(outputs):
    return jnp.asarray(Y, outputs.dtype)


def mse(outputs):
    return jnp.mean((outputs - targets(outputs)) ** 2)


def start(dtype=jnp.float32):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), PARAMS)


def train(tx, steps, loss=mse, outputs=model, grads_of=None, params=None, **options):
    """Losses, parameters and the state of a run."""

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(lambda p: loss(outputs(p)))(params)
        grads = grads if grads_of is None else grads_of(params, grads)
        given = {"value": value, "curvature": gauss_newton(outputs, loss, **options)}
        updates, state = tx.update(grads, state, params, **given)
        return optax.apply_updates(params, updates), state, value

    params = start() if params is None else params
    state, losses = tx.init(params), []
    for _ in range(steps):
        params, state, value = step(params, state)
        losses.append(float(value))
    return losses, params, state


# --- Jumps of the loss ----------------------------------------------------------------

JUMP, STEPS = 15, 40
USUAL = {
    **{"factor": 1.0, "sign": 1.0, "more": 0.0, "penalty": 0.0},
    # Of the absolute error in the loss; what gradient, value and the curvature's own
    # loss are multiplied by, and the gradient of one leaf.
    **{"flat": 0.0, "grad": 1.0, "value": 1.0, "own": 1.0, "out": 1.0},
}


def lasting(**changes):
    return lambda i: USUAL | (changes if i >= JUMP else {})


def clipped(params):
    return jax.tree.map(lambda x: jnp.clip(x, -0.1, 0.1), params)


def reset(params):
    return params | {"out": -params["out"]}


# What the loss is at a step, and what the loop does to the parameters once.
JUMPS = {
    "other labels": (lasting(sign=-1.0), None),
    "a constant term": (lasting(more=3.0), None),
    "a penalty": (lasting(penalty=0.5), None),
    "another weight": (lasting(factor=100.0), None),
    "a batch of low loss": (
        lambda i: USUAL | {"more": 0.3, "factor": 0.02 if i == JUMP else 1.0},
        None,
    ),
    "a batch of high loss": (lambda i: USUAL | {"more": 9.0 * (i == JUMP)}, None),
    "two tasks by turns": (lambda i: USUAL | {"more": 1.0 * (i % 2)}, None),
    "a curriculum": (lambda i: USUAL | {"more": 0.02 * max(i - JUMP, 0)}, None),
    "an annealed penalty": (
        lambda i: USUAL | {"penalty": 0.002 * max(i - JUMP, 0)},
        None,
    ),
    "parameters clipped": (lasting(), clipped),
    "parameters reset": (lasting(), reset),
}


@functools.cache
def jumping(dtype, horizon):
    """A step of which all of this is an argument, so that it is compiled once."""
    tx = nlcg_auto(horizon, preconditioner=None, residuals=1)

    def evaluate(how, outputs):
        errors = outputs - how["sign"] * targets(outputs)
        errors = jnp.where(how["flat"] > 0, how["flat"] * jnp.abs(errors), errors**2)
        penalty = how["penalty"] * jnp.mean(outputs**2)
        return how["factor"] * (jnp.mean(errors) + how["more"]) + penalty

    @jax.jit
    def step(params, state, how):
        loss = functools.partial(evaluate, how)
        value, grads = jax.value_and_grad(lambda p: loss(model(p)))(params)
        grads = jax.tree.map(lambda g: how["grad"] * g, grads)
        grads["out"] *= how["out"]
        curvature = gauss_newton(model, lambda y: how["own"] * loss(y))
        given = {"value": how["value"] * value, "curvature": curvature}
        updates, state = tx.update(grads, state, params, **given)
        return optax.apply_updates(params, updates), state, value

    return tx, step


def follow(dtype, horizon, hows, change=None, at=JUMP):
    """Losses, and the steps at which the last step was taken back."""
    tx, step = jumping(dtype, horizon)
    params = start(dtype)
    state, losses, back, before = tx.init(params), [], [], 0
    for i, how in enumerate(hows):
        if i == at and change is not None:
            params = change(params)
        how = {name: jnp.asarray(x, dtype) for name, x in how.items()}
        params, state, value = step(params, state, how)
        losses.append(float(value))
        after = int(nlcg_optax.diagnostics(state)["rejected_steps"])
        back.append(after > before)
        before = after
    return np.array(losses), np.array(back), nlcg_optax.diagnostics(state)


def longest_run(back):
    text = "".join(".x"[int(b)] for b in back)
    return max(map(len, text.split(".")))


@pytest.mark.parametrize("horizon", [None, 200])
@pytest.mark.parametrize("dtype", rest_long((jnp.float32, jnp.float64), (jnp.float64,)))
@pytest.mark.parametrize("name", JUMPS)
def test_no_jump_of_the_loss_stops_it(name, dtype, horizon, x64):
    how, change = JUMPS[name]
    losses, back, report = follow(dtype, horizon, map(how, range(STEPS)), change)
    assert longest_run(back) <= 2
    # It learns what there is to learn, of what is not constant.
    least = [how(i)["factor"] * how(i)["more"] for i in (JUMP, STEPS - 1)]
    gap = losses[JUMP] - least[0], losses[-1] - least[1]
    # Once noise rules (by the bound on products, here), the rate has to find its way.
    part = 0.7 if horizon is None else 0.9
    assert gap[1] < part * gap[0] or gap[1] < 0.1 * losses[0]
    # A level is a new one where nothing but the loss has changed.
    loss_alone = ("other labels", "a constant term", "a penalty", "another weight")
    if name in loss_alone and horizon is None:
        assert report["new_levels"] == 1


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_another_task_is_learned_from_where_nothing_was_left_to_fall(offset):
    """At a minimum steps are as short as rounding, and say nothing of the next task."""
    rng = np.random.default_rng(0)
    x, goal = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((32, 8), (8,)))
    tx = nlcg_auto()

    @jax.jit
    def step(params, state, goal):
        def loss(outputs):
            return offset + jnp.mean((outputs - x @ goal) ** 2)

        value, grad = jax.value_and_grad(lambda p: loss(x @ p))(params)
        curvature = gauss_newton(lambda p: x @ p, loss)
        given = {"value": value, "curvature": curvature}
        updates, state = tx.update(grad, state, params, **given)
        return params + updates, state

    params = jnp.zeros(8)
    state = tx.init(params)
    for count in range(75):
        params, state = step(params, state, goal if count < 60 else -goal)
        if count == 63:
            assert jnp.linalg.norm(params - goal) > 0.1
    assert jnp.linalg.norm(params + goal) < 0.1 * jnp.linalg.norm(goal)


@pytest.mark.parametrize(
    ("value", "grad", "part"), [(1 / 8, 1.0, 0.02), (1e-3, 1.0, 0.8), (1.0, 64.0, 0.02)]
)
def test_a_loss_that_falls_by_one_factor_less_than_predicted_falls_on(
    value, grad, part
):
    how = USUAL | {"value": value, "grad": grad}
    losses, _, report = follow(jnp.float32, None, [how] * 200)
    assert losses[-1] < part * losses[0]
    assert report["loss_mismatch"] > 100


@pytest.mark.parametrize("rise", [0.05, 1.0, 3.0])
def test_a_term_that_rises_step_after_step_stops_nothing(rise):
    """As the weight of a KL term, by more than what the rest of the loss is."""
    hows = [USUAL | {"more": rise * i} for i in range(120)]
    losses, back, _ = follow(jnp.float32, None, hows)
    rest = losses - rise * np.arange(120)
    assert rest[-1] < 0.05 * rest[0] and longest_run(back) <= 2


# A gradient is known to be large by its slope along the last step. One that is nearly
# perpendicular to that is noticed a step later; by 1e3 rounding decides, by machine.
SLIPS = pytest.mark.xfail(reason="it may pass for one step", strict=False)


@pytest.mark.parametrize("factor", [pytest.param(1e3, marks=SLIPS), 1e4, 1e6, 1e18])
def test_one_large_gradient_is_left_out_where_noise_rules(factor):
    hows = [USUAL | {"grad": factor if i == 60 else 1.0} for i in range(120)]
    losses, _, report = follow(jnp.float32, 120, hows)
    usual, _, _ = follow(jnp.float32, 120, [USUAL] * 120)
    assert report["noise_nonfinite"] == 1
    assert losses[-1] < 2 * usual[-1]


def test_after_one_large_gradient_the_loss_is_back_a_step_later():
    hows = [USUAL | {"grad": 1e3 if i == 60 else 1.0} for i in range(120)]
    losses, _, report = follow(jnp.float32, 120, hows)
    assert report["noise_nonfinite"] == 1
    assert np.all(losses[62:] < 2 * losses[59])


@pytest.mark.parametrize("seed", range(fuzz.cases(8)))
def test_whatever_the_loss_does_it_stops_for_two_steps_at_most(seed, x64):
    """Seeded: jumps of all kinds, at any step, in sequence."""
    rng = np.random.default_rng(seed)
    how, hows = dict(USUAL), []
    draws = {
        "factor": lambda: 10 ** rng.uniform(-2, 2),
        "sign": lambda: rng.choice([-1.0, 1.0]),
        "more": lambda: rng.uniform(0, 5),
        "penalty": lambda: rng.uniform(0, 1),
        "flat": lambda: rng.choice([0.0, 1.0]),
    }
    for _ in range(60):
        if rng.random() < 0.15:
            name = rng.choice([*draws])
            how[name] = draws[name]()
        hows.append(dict(how))
    change = [None, clipped, reset][seed % 3]
    at = rng.integers(60)
    losses, back, _ = follow(jnp.float32, [None, 200][seed % 2], hows, change, at)
    assert np.all(np.isfinite(losses)) and longest_run(back) <= 2
    assert losses[-1] < 10 * how["factor"] * (np.mean(Y**2) + how["more"] + 1)


@pytest.mark.parametrize("seed", range(fuzz.cases(8)))
def test_whatever_does_not_fit_together_nothing_climbs_or_stops(seed, x64):
    """Seeded: gradient, value and curvature of other scales, a leaf that is frozen,
    or whose gradient is uphill."""
    rng = np.random.default_rng(1000 + seed)
    how = dict(USUAL, flat=rng.choice([0.0, 1.0], p=[0.8, 0.2]))
    for name in rng.choice(["grad", "value", "own"], rng.integers(3), replace=False):
        how[name] = 10 ** rng.uniform(-3, 3)
    how["out"] = rng.choice([1.0, 0.0, -1.0, 1e-4])
    losses, back, report = follow(jnp.float32, [None, 200][seed % 2], [how] * 40)
    assert np.all(np.isfinite(losses)) and longest_run(back) <= 2, how
    assert np.mean(losses[-5:]) < 5 * losses[0], how


def test_a_loss_of_another_scale_is_none_of_an_outlier_for_long():
    hows = [USUAL | {"factor": 1e4 if i >= 60 else 1.0} for i in range(160)]
    losses, _, report = follow(jnp.float32, 160, hows)
    assert report["noise_nonfinite"] <= 2
    assert losses[-1] < losses[60]


# --- Losses that climb ----------------------------------------------------------------


def scaled_leaf(factor):
    return lambda params, grads: grads | {"out": factor * grads["out"]}


def of_another_loss(params, grads):
    return jax.grad(lambda p: jnp.mean((model(p) + targets(model(p))) ** 2))(params)


CLIMBS = {
    "a gradient uphill": {"grads_of": lambda p, g: jax.tree.map(jnp.negative, g)},
    "a gradient of another loss": {"grads_of": of_another_loss},
    "a leaf whose gradient is next to nothing": {"grads_of": scaled_leaf(1e-4)},
    "a leaf whose gradient is uphill": {"grads_of": scaled_leaf(-1.0)},
    "a gradient that is a sum": {
        "grads_of": lambda p, g: jax.tree.map(lambda x: 1e3 * x, g)
    },
    "a multiplier of 10": {"tx": nlcg_auto(multiplier=lambda count: jnp.float32(10))},
    "a multiplier of 2.1": {"tx": nlcg_auto(multiplier=lambda count: jnp.float32(2.1))},
    "a curvature of other outputs": {"of": lambda p: 1e-3 * model(p)},
}


@pytest.mark.parametrize("name", CLIMBS)
def test_a_loss_that_climbs_is_stopped_whatever_the_model_says(name):
    case = dict(CLIMBS[name])
    tx, of = case.pop("tx", nlcg_auto()), case.pop("of", None)
    if of is not None:

        @jax.jit
        def step(params, state):
            value, grads = jax.value_and_grad(lambda p: mse(model(p)))(params)
            curvature = gauss_newton(of, mse)
            updates, state = tx.update(
                grads, state, params, value=value, curvature=curvature
            )
            return optax.apply_updates(params, updates), state, value

        params = start()
        state, losses = tx.init(params), []
        for _ in range(40):
            params, state, value = step(params, state)
            losses.append(float(value))
    else:
        losses, _, _ = train(tx, 40, **case)
    assert np.all(np.isfinite(losses))
    assert np.mean(losses[-5:]) < 5 * losses[0]


@pytest.mark.parametrize("decay", [0.9, 0.99])
def test_a_gradient_averaged_before_lets_no_loss_climb(decay):
    """By rises that are tolerated, each a little larger than the last one."""
    losses, _, state = train(
        optax.chain(optax.ema(decay, debias=False), nlcg_auto()), 120
    )
    assert np.mean(losses[-10:]) < 2 * losses[0]
    assert "optax.ema" in " ".join(nlcg_optax.explain(state))


@pytest.mark.parametrize("where", ["before", "after"])
def test_what_is_uphill_stays_bounded_where_noise_rules_and_is_told(where):
    turned = [nlcg_auto(150, preconditioner=None), optax.scale(-1.0)]
    tx = optax.chain(*turned[:: -1 if where == "before" else 1])

    @jax.jit
    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, [16], 0, 64)

        def outputs(params):
            return model(params)[rows]

        def loss(y):
            return jnp.mean((y - targets(y)[rows]) ** 2)

        value, grads = jax.value_and_grad(lambda p: loss(outputs(p)))(params)
        given = {"value": value, "curvature": gauss_newton(outputs, loss)}
        updates, state = tx.update(grads, state, params, **given)
        return (optax.apply_updates(params, updates), state), value

    keys = jax.random.split(jax.random.key(0), 150)
    carry = start(), tx.init(start())
    (_, state), losses = jax.lax.scan(step, carry, keys)
    assert nlcg_optax.diagnostics(state)["noise_since"] > 0
    assert jnp.max(losses) < 100 * losses[0]
    assert "went downhill, and the loss does not" in " ".join(nlcg_optax.explain(state))


@pytest.mark.parametrize("multiplier", [1.01, 2, 10.0])
def test_a_multiplier_above_1_is_refused(multiplier):
    with pytest.raises(ValueError, match=f"multiplier={multiplier} .*at most 1"):
        nlcg_auto(multiplier=multiplier)


# --- Frozen leaves --------------------------------------------------------------------


def frozen_outputs(params):
    return model(params | {"out": jax.lax.stop_gradient(params["out"])})


FROZEN = {
    "zeroed gradients": {"grads_of": scaled_leaf(0.0)},
    "stop_gradient in the loss alone": {
        "grads_of": lambda params, grads: jax.grad(lambda p: mse(frozen_outputs(p)))(
            params
        )
    },
    "plain gradient": {"grads_of": scaled_leaf(0.0), "preconditioner": None},
    "a preconditioner with momentum": {
        "grads_of": scaled_leaf(0.0),
        "preconditioner": optax.trace(0.9),
    },
    "decay of other leaves": {
        "grads_of": scaled_leaf(0.0),
        "weight_decay": 1e-3,
        "weight_decay_mask": {"w": True, "b": False, "out": False},
    },
}


@pytest.mark.parametrize("name", FROZEN)
def test_a_leaf_whose_gradient_is_zero_stays(name):
    options = dict(FROZEN[name])
    grads_of = options.pop("grads_of")
    losses, params, _ = train(nlcg_auto(**options), 20, grads_of=grads_of)
    np.testing.assert_array_equal(params["out"], start()["out"])
    assert losses[-1] < 0.5 * losses[0] and max(losses) < 1.1 * losses[0]


@pytest.mark.parametrize("horizon", [None, 60])
def test_a_leaf_that_is_frozen_on_the_way_stays_from_then_on(horizon):
    """Its last steps are among the directions, and NLCG's own direction moves it."""
    tx = nlcg_auto(horizon, preconditioner=None, residuals=1)

    @jax.jit
    def step(params, state, frozen, key):
        value, grads = jax.value_and_grad(lambda p: mse(model(p)))(params)
        noise = jax.random.normal(key, grads["w"].shape)
        grads["w"] += 0.1 * (0 if horizon is None else 1) * noise
        grads["out"] = jnp.where(frozen, 0, grads["out"])
        given = {"value": value, "curvature": gauss_newton(model, mse)}
        updates, state = tx.update(grads, state, params, **given)
        return optax.apply_updates(params, updates), state

    params = start()
    state = tx.init(params)
    for i in range(30):
        params, state = step(params, state, jnp.array(i > 20), jax.random.key(i))
        before = params["out"] if i == 20 else None
        if i == 20:
            kept = before
        if i == 21:
            # What is taken back of the step before is no step.
            kept = params["out"]
    np.testing.assert_array_equal(params["out"], kept)


# --- Losses without curvature ---------------------------------------------------------


def huber(delta):
    return lambda y: jnp.mean(optax.huber_loss(y, targets(y), delta=delta))


FLAT = {
    "absolute error": lambda y: jnp.mean(jnp.abs(y - targets(y))),
    "hinge": lambda y: jnp.mean(optax.hinge_loss(y, jnp.sign(targets(y)))),
    "quantile": lambda y: jnp.mean(
        jnp.maximum(0.9 * (y - targets(y)), -0.1 * (y - targets(y)))
    ),
    "largest error": lambda y: jnp.max(jnp.abs(y - targets(y))),
    "policy gradient": lambda y: -jnp.mean(y * targets(y)),
    "around zero": lambda y: jnp.mean(jnp.abs(y - targets(y))) - 0.5,
    "Huber, 0.1": huber(0.1),
    "Huber, 0.01": huber(0.01),
    "Huber, 0.001": huber(1e-3),
    "power 1.1": lambda y: jnp.mean(jnp.abs(y - targets(y)) ** 1.1),
}


@pytest.mark.parametrize("name", FLAT)
def test_a_loss_without_curvature_falls(name):
    losses, _, state = train(nlcg_auto(), 30, FLAT[name])
    size = np.abs(losses[0]) + 0.1 * (name in ("around zero", "policy gradient"))
    assert np.median(losses[-5:]) < losses[0] - 0.1 * size
    assert max(losses) < losses[0] + 1.5 * size
    report = nlcg_optax.diagnostics(state)
    assert report["flat_steps"] + report["bounded_steps"] > 15
    said = " ".join(nlcg_optax.explain(state))
    assert ("flat_steps: in " in said) == bool(report["flat_steps"] > 15)
    assert "flat_steps" in said or "bounded_steps" in said


def with_constants(loss):
    """Losses of runs with constants added, and taken off again."""
    tx = nlcg_auto(preconditioner=None, residuals=1)

    @jax.jit
    def step(params, state, constant):
        def of(outputs):
            return loss(outputs) + constant

        value, grads = jax.value_and_grad(lambda p: of(model(p)))(params)
        given = {"value": value, "curvature": gauss_newton(model, of)}
        updates, state = tx.update(grads, state, params, **given)
        return optax.apply_updates(params, updates), state, value - constant

    for constant in (0.0, 100.0, -100.0):
        params, found = start(jnp.float64), []
        state = tx.init(params)
        for _ in range(30):
            params, state, value = step(params, state, constant)
            found.append(float(value))
        yield np.array(found)


@pytest.mark.parametrize("name", ["squares", "softmax", "absolute error"])
def test_a_constant_in_the_loss_changes_nothing(name, x64):
    def softmax(y):
        labels = jnp.argmax(targets(y), -1)
        return optax.softmax_cross_entropy_with_integer_labels(y, labels).mean()

    losses = {"squares": mse, "softmax": softmax} | FLAT
    plain, *others = with_constants(losses[name])
    for other in others:
        np.testing.assert_allclose(other[:20], plain[:20], rtol=1e-5, atol=1e-9)


def test_a_constant_in_a_loss_of_next_to_no_curvature_lets_nothing_climb(x64):
    for losses in with_constants(huber(0.05)):
        assert losses[-1] < 0.5 * losses[0] and max(losses) < 4 * losses[0]


def test_a_factor_in_a_loss_without_curvature_changes_nothing():
    tx = nlcg_auto(preconditioner=None)
    losses, _, _ = train(tx, 12, FLAT["absolute error"])
    scaled, _, _ = train(tx, 12, lambda y: 2.0**-30 * FLAT["absolute error"](y))
    np.testing.assert_allclose(2.0**30 * np.array(scaled), losses, rtol=1e-4)


def test_a_loss_that_is_its_own_output_is_told_and_falls():
    with pytest.warns(UserWarning, match="loss_fn returns that number"):
        losses, _, state = train(
            nlcg_auto(), 30, lambda value: value, lambda p: mse(model(p))
        )
    assert losses[-1] < 0.3 * losses[0]
    assert nlcg_optax.diagnostics(state)["flat_steps"] > 25


# --- What only slows it down ----------------------------------------------------------

SLOW = {
    "a gradient scaled": ("decrease_ratio", {"scale": 0.1}),
    "a value that is always 0": ("actual_decrease", {"value": 0.0}),
    "a value averaged twice": ("decrease_ratio", {"value": 1 / 8}),
    "a sum in the curvature": ("loss_ratio", {"own": lambda y: 128 * mse(y)}),
    "rows of padding": ("loss_ratio", {"own": lambda y: mse(y) + 5.0}),
    "a rate out of habit": ("way", {"tx": nlcg_auto(multiplier=1e-3)}),
    "updates scaled afterwards": (
        "decrease_ratio",
        {"tx": optax.chain(nlcg_auto(), optax.scale(0.01))},
    ),
    "a penalty in the gradient alone": ("_", {"penalty": 0.3}),
}


@pytest.mark.parametrize("name", SLOW)
def test_what_slows_it_down_is_told(name):
    which, case = SLOW[name]
    tx = case.get("tx", nlcg_auto())

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(lambda p: mse(model(p)))(params)
        grads = jax.tree.map(
            lambda g, w: case.get("scale", 1) * g + case.get("penalty", 0) * w,
            grads,
            params,
        )
        curvature = gauss_newton(model, case.get("own", mse))
        value = case.get("value", 1) * value
        updates, state = tx.update(
            grads, state, params, value=value, curvature=curvature
        )
        return optax.apply_updates(params, updates), state

    params = start()
    state = tx.init(params)
    for i in range(25):
        params, state = step(params, state)
        assert i > 7 or not nlcg_optax.explain(state)  # too early to say
    found = nlcg_optax.explain(state)
    assert any(which in sentence.split(":")[0] for sentence in found), found


def test_of_a_run_that_is_well_nothing_is_said():
    for tx in (nlcg_auto(), nlcg_auto(200), nlcg_auto(preconditioner=None)):
        _, _, state = train(tx, 25)
        assert nlcg_optax.explain(state) == []
    with pytest.raises(ValueError, match="no quadratic model"):
        nlcg_optax.explain(nlcg_optax.nlcg(0.1).init(start()))


# --- Functions without a derivative in forward mode -----------------------------------


@jax.custom_vjp
def reversed_tanh(x):
    return jnp.tanh(x)


reversed_tanh.defvjp(
    lambda x: (jnp.tanh(x), jnp.tanh(x)), lambda y, g: (g * (1 - y**2),)
)


def custom_model(params):
    x = jnp.asarray(X, params["w"].dtype)
    return reversed_tanh(x @ params["w"] + params["b"]) @ params["out"]


def custom_mse(outputs):
    return jnp.mean(reversed_tanh(outputs - targets(outputs)) ** 2)


def tanh_mse(outputs):
    return jnp.mean(jnp.tanh(outputs - targets(outputs)) ** 2)


@pytest.mark.parametrize(
    ("outputs", "loss"), [(custom_model, mse), (model, custom_mse)]
)
def test_what_has_no_derivative_in_forward_mode_is_told(outputs, loss):
    params = start()
    if outputs is custom_model:  # of the loss there is the gradient's derivative
        linear = gauss_newton(outputs, loss).linearize(params)  # outside of `jit`
        stacked = jax.tree.map(lambda x: x[None], params)
        for push in (gauss_newton(outputs, loss).push, lambda _, d: linear.push(d)):
            with pytest.raises(TypeError, match="jax.custom_vjp.*reverse_mode=True"):
                push(params, stacked)
    with pytest.raises(TypeError, match="jax.custom_vjp.*reverse_mode=True"):
        nlcg_optax.hessian(lambda p: loss(outputs(p)))(params, [params])
    losses, _, _ = train(nlcg_auto(), 10, loss, outputs, reverse_mode=True)
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(
    "kind",
    rest_long(
        ("gauss_newton", "in_turn", "hessian", "complex"),
        ("gauss_newton", "in_turn", "hessian"),
    ),
)
def test_reverse_mode_gives_the_same_products(kind, x64):
    params = start(jnp.float64)
    if kind == "complex":
        params = jax.tree.map(lambda x: x.astype(complex) * (1 + 0.5j), params)
    keys = jax.random.split(jax.random.key(0), 3)

    def direction(key):
        leaves, structure = jax.tree.flatten(params)
        found = [
            jax.random.normal(k, x.shape, x.dtype)
            for k, x in zip(jax.random.split(key, len(leaves)), leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, found)

    directions = [direction(key) for key in keys]

    def loss(y):
        return jnp.mean(jnp.abs(y - targets(y)) ** 2) + jnp.mean(jnp.real(y) ** 4)

    def make(reverse_mode, outputs, final):
        if kind == "hessian":
            return nlcg_optax.hessian(
                lambda p: final(outputs(p)), reverse_mode=reverse_mode
            )
        options = {"in_turn": kind == "in_turn", "l2": 0.1}
        return gauss_newton(outputs, final, reverse_mode=reverse_mode, **options)

    forward, reverse = (make(mode, model, loss) for mode in (False, True))
    expected = forward(params, directions)
    np.testing.assert_allclose(reverse(params, directions), expected, rtol=1e-10)
    products = forward.times(params, directions[0])
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12),
        reverse.times(params, directions[0]),
        products,
    )
    if kind != "complex":
        custom = make(True, custom_model, tanh_mse)
        plain = make(False, model, tanh_mse)
        np.testing.assert_allclose(
            custom(params, directions), plain(params, directions), rtol=1e-10
        )


# --- Devices --------------------------------------------------------------------------


def on_devices(kind, axis_name):
    """A step on two devices, each of which has a part of the batch."""
    tx = nlcg_auto(preconditioner=None, residuals=0)
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])

    def step(params, x):
        def outputs(params):
            return jnp.tanh(x @ params["w"]) @ params["out"]

        def loss(outputs):
            return jnp.mean(outputs**2)

        value, grads = nlcg_optax.pmean_value_and_grad(
            lambda p: loss(outputs(p)), "data"
        )(params)
        curvature = gauss_newton(outputs, loss, axis_name=axis_name)
        given = {"value": value, "curvature": curvature}
        return tx.update(grads, tx.init(params), params, **given)[0]

    x = jnp.asarray(X, jnp.float32)
    if kind == "pmap":
        mapped = jax.pmap(step, "data", in_axes=(None, 0), devices=jax.devices()[:2])
        return mapped(start(), x.reshape(2, -1, 6))
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False
    )
    return jax.jit(mapped)(start(), x)


@pytest.mark.parametrize("kind", ["pmap", "shard_map"])
def test_a_curvature_of_each_devices_own_is_refused(kind):
    with pytest.raises(ValueError, match="'data'.*axis_name='data'.*axis_name=()"):
        on_devices(kind, None)
    for axis_name in ("data", ()):
        jax.block_until_ready(on_devices(kind, axis_name))


@pytest.mark.parametrize("spec", [P(None, "x"), P("x"), P("x", None)])
@pytest.mark.parametrize("name", ["quadratic model", "limited-memory BFGS"])
def test_meshes_of_explicit_axes(name, spec):
    mesh = jax.make_mesh((2,), ("x",), (AxisType.Explicit,), devices=jax.devices()[:2])
    tx = {
        "quadratic model": nlcg_optax.scale_by_quadratic_model(
            nlcg_optax.scale_by_orthogonalization()
        ),
        "limited-memory BFGS": nlcg_optax.scale_by_limited_memory_bfgs(2),
    }[name]
    factors = np.linspace(1.0, 2.0, 32, dtype=np.float32).reshape(8, 4)

    def value_fn(x):
        return jnp.sum((x - 1) ** 2 * factors)

    def run(x):
        state = tx.init(x)

        @jax.jit
        def step(x, state):
            value, grad = jax.value_and_grad(value_fn)(x)
            given = {"value": value, "curvature": nlcg_optax.hessian(value_fn)}
            given = given if name == "quadratic model" else {}
            updates, state = tx.update(grad, state, x, **given)
            return x - 0.3 * updates, state

        kinds = jax.tree.map(jax.typeof, state)
        for _ in range(4):
            x, state = step(x, state)
        assert jax.tree.map(jax.typeof, state) == kinds
        return x

    start = jnp.asarray(np.sin(factors))
    expected = run(start)
    with jax.set_mesh(mesh):
        got = run(jax.device_put(start, jax.sharding.NamedSharding(mesh, spec)))
    np.testing.assert_allclose(np.asarray(got), expected, rtol=2e-3)

"""Loss, gradient and curvature from one pair of functions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nlcg_optax
from nlcg_optax import nlcg_auto, value_grad_and_curvature

RNG = np.random.default_rng(1)
BATCH = {"x": RNG.normal(size=(24, 3)), "y": RNG.normal(size=24)}
PARAMS = {"a": RNG.normal(size=(3, 4)), "b": RNG.normal(size=4)}
WEIGHTS = {"a": True, "b": False}

pytestmark = pytest.mark.usefixtures("x64")


def model(params, batch):
    return jnp.tanh(jnp.asarray(batch["x"]) @ params["a"]) @ params["b"]


def loss(outputs, batch):
    return jnp.mean((outputs - batch["y"]) ** 2)


def close(got, expected):
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    for x, y in pairs:
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)


def directions():
    rng = np.random.default_rng(2)
    return [jax.tree.map(lambda x: rng.normal(size=x.shape), PARAMS) for _ in range(2)]


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("shards", [1, 2])
def test_all_three_are_of_one_loss(microbatches, shards):
    evaluate = value_grad_and_curvature(
        model,
        loss,
        l2=0.3,
        l2_mask=WEIGHTS,
        microbatches=microbatches,
        shards=shards,
    )

    def whole(params):
        penalty = 0.5 * 0.3 * jnp.sum(params["a"] ** 2)
        return loss(model(params, BATCH), BATCH) + penalty

    value, grads, curvature = jax.jit(evaluate)(PARAMS, BATCH)
    close((value, grads), jax.value_and_grad(whole)(PARAMS))
    # Fewer than the least number of examples: all of them.
    assert curvature.fraction == 1
    close(curvature.loss(PARAMS), value)
    expected = nlcg_optax.gauss_newton(
        lambda p: model(p, BATCH), lambda y: loss(y, BATCH), l2=0.3, l2_mask=WEIGHTS
    )
    close(curvature(PARAMS, directions()), expected(PARAMS, directions()))
    product = expected.times(PARAMS, directions()[0])
    close(curvature.times(PARAMS, directions()[0]), product)


def test_the_curvature_is_of_evenly_spaced_examples():
    evaluate = value_grad_and_curvature(model, loss, fraction=0.25, min_examples=2)
    _, _, curvature = evaluate(PARAMS, BATCH)
    few = jax.tree.map(lambda x: x[::4], BATCH)
    assert curvature.fraction == 0.25
    close(curvature.loss(PARAMS), loss(model(PARAMS, few), few))
    # On each of two devices, in each of three microbatches.
    evaluate = value_grad_and_curvature(
        model, loss, fraction=0.5, min_examples=2, shards=2, microbatches=3
    )
    _, _, curvature = evaluate(PARAMS, BATCH)
    # A device has 12 examples, and a microbatch 4 of them: every other one.
    parts = [[0, 2, 12, 14], [4, 6, 16, 18], [8, 10, 20, 22]]
    rows = [{name: x[r] for name, x in BATCH.items()} for r in parts]
    expected = np.mean([loss(model(PARAMS, few), few) for few in rows])
    close(curvature.loss(PARAMS), expected)


def test_dropout_has_one_key_for_both():
    def dropping(params, batch, key):
        keep = jax.random.bernoulli(key, 0.5, batch["y"].shape)
        return jnp.where(keep, model(params, batch), 0)

    evaluate = value_grad_and_curvature(dropping, loss)
    for seed in range(3):
        key = jax.random.key(seed)
        value, _, curvature = evaluate(PARAMS, BATCH, key)
        close(value, loss(dropping(PARAMS, BATCH, key), BATCH))
        close(curvature.loss(PARAMS), value)
    # Each microbatch has a key of its own, the same for both again.
    evaluate = value_grad_and_curvature(dropping, loss, microbatches=2)
    value, _, curvature = evaluate(PARAMS, BATCH, key)
    close(curvature.loss(PARAMS), value)
    halves = [jax.tree.map(lambda x, i=i: x[12 * i :][:12], BATCH) for i in range(2)]
    expected = [
        loss(dropping(PARAMS, half, jax.random.fold_in(key, i)), half)
        for i, half in enumerate(halves)
    ]
    close(value, np.mean(expected))


def test_batch_norm_statistics_come_back():
    def normalized(params, batch, statistics):
        mean = jnp.mean(batch["x"], 0)
        new = {"mean": 0.9 * statistics["mean"] + 0.1 * mean, "steps": 3}
        return model(params, {"x": batch["x"] - mean}), new

    statistics = {"mean": jnp.ones(3), "steps": 2}
    for microbatches in (1, 2):
        evaluate = value_grad_and_curvature(
            normalized, loss, has_aux=True, microbatches=microbatches
        )
        (_, new), _, _ = evaluate(PARAMS, BATCH, statistics)
        close(new["mean"], 0.9 + 0.1 * jnp.mean(BATCH["x"], 0))
        assert new["steps"] == 3


def test_over_the_devices_of_a_shard_map():
    mesh = jax.make_mesh(
        (jax.device_count(),), ("data",), (jax.sharding.AxisType.Auto,)
    )
    spec = jax.sharding.PartitionSpec
    evaluate = value_grad_and_curvature(
        model, loss, l2=0.1, axis_name="data", microbatches=3
    )

    @jax.shard_map(
        mesh=mesh, in_specs=(spec(), spec("data")), out_specs=(spec(), spec(), spec())
    )
    def run(params, batch):
        value, grads, curvature = evaluate(params, batch)
        return value, grads, curvature(params, directions())

    plain = value_grad_and_curvature(model, loss, l2=0.1)
    value, grads, curvature = plain(PARAMS, BATCH)
    close(run(PARAMS, BATCH), (value, grads, curvature(PARAMS, directions())))


@pytest.mark.parametrize(
    ("options", "batch", "needles"),
    [
        ({"fraction": 0}, BATCH, ["fraction=0", "greater than 0"]),
        ({"fraction": 1.5}, BATCH, ["fraction=1.5", "at most"]),
        ({"min_examples": 0}, BATCH, ["min_examples=0", "at least 1"]),
        ({"microbatches": 5}, BATCH, ["24 examples", "microbatches=5"]),
        ({"l2": -1}, BATCH, ["l2=-1", "at least 0"]),
        ({}, {}, ["no arrays"]),
        ({}, {**BATCH, "scale": 2.0}, ["scale", ": None", "beside the batch"]),
        ({}, {**BATCH, "y": jnp.ones(3)}, ["y", ": 3", "one length"]),
    ],
)
def test_what_cannot_be_divided(options, batch, needles):
    with pytest.raises(ValueError) as error:
        value_grad_and_curvature(model, loss, **options)(PARAMS, batch)
    for needle in needles:
        assert needle in str(error.value)


# --- Through `jit` ------------------------------------------------------------------


def compilations(update, curvature_of, steps=6):
    """How often `update` is compiled in a loop that compiles it apart."""
    tx = nlcg_auto()
    traces = []

    def counted(grads, state, params, value, curvature):
        traces.append(1)
        return tx.update(grads, state, params, value=value, curvature=curvature)

    update = jax.jit(counted)
    params, state = PARAMS, tx.init(PARAMS)
    for i in range(steps):
        batch = jax.tree.map(lambda x, i=i: jnp.roll(x, i, 0), BATCH)
        value, grads, curvature = curvature_of(batch)(params)
        updates, state = update(grads, state, params, value, curvature)
        params = optax.apply_updates(params, updates)
    return len(traces)


def test_with_the_same_functions_nothing_is_compiled_anew():
    evaluate = jax.jit(value_grad_and_curvature(model, loss))
    assert compilations(None, lambda b: lambda p: evaluate(p, b)) == 1

    value_and_grad = jax.jit(jax.value_and_grad(lambda p, b: loss(model(p, b), b)))

    def apart(b, **options):
        return lambda p: (
            *value_and_grad(p, b),
            nlcg_optax.gauss_newton(model, loss, **options),
        )

    assert compilations(None, lambda b: apart(b, batch=b)) == 1
    halves = lambda b: jax.tree.map(lambda x: x.reshape(2, 12, *x.shape[1:]), b)  # noqa: E731
    assert compilations(None, lambda b: apart(b, microbatches=halves(b), l2=0.1)) == 1

    # A method is a new object each time, but the same function.
    class Net:
        def outputs(self, params, batch):
            return model(params, batch)

    net = Net()
    assert (
        compilations(
            None,
            lambda b: (
                lambda p: (
                    *value_and_grad(p, b),
                    nlcg_optax.gauss_newton(
                        net.outputs, loss, b, l2_mask=dict(WEIGHTS)
                    ),
                )
            ),
        )
        == 1
    )


def test_new_functions_in_each_step_are_told_at_the_third():
    value_and_grad = jax.jit(jax.value_and_grad(lambda p, b: loss(model(p, b), b)))

    def fresh(batch):
        return lambda p: (
            *value_and_grad(p, batch),
            nlcg_optax.gauss_newton(
                lambda params: model(params, batch), lambda y: loss(y, batch)
            ),
        )

    assert compilations(None, fresh, steps=2) == 2
    with pytest.warns(UserWarning, match="third time.*gauss_newton.outputs_fn") as told:
        assert compilations(None, fresh, steps=5) == 5
    assert len(told) == 1


def test_functions_made_inside_of_jit_are_no_mistake():
    tx = nlcg_auto()
    for size in range(8, 13):  # compiled for each size of the batch

        @jax.jit
        def step(params, state, batch):
            value, grads = jax.value_and_grad(lambda p: loss(model(p, batch), batch))(
                params
            )
            curvature = nlcg_optax.gauss_newton(
                lambda p: model(p, batch), lambda y: loss(y, batch)
            )
            return tx.update(grads, state, params, value=value, curvature=curvature)

        step(PARAMS, tx.init(PARAMS), jax.tree.map(lambda x, n=size: x[:n], BATCH))


# --- What does not fit together -----------------------------------------------------


def train(steps=12, tx=None, **wrong):
    """The state after some steps in which something may be wrong."""
    scale = wrong.get("scale", lambda g: g)
    seen = wrong.get("value", lambda v: v)
    own_loss = wrong.get("loss", loss)
    own_model = wrong.get("model", model)
    tx = nlcg_auto() if tx is None else tx

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(lambda p: loss(model(p, BATCH), BATCH))(
            params
        )
        curvature = nlcg_optax.gauss_newton(
            own_model, own_loss, BATCH, fraction=wrong.get("fraction")
        )
        updates, state = tx.update(
            scale(grads), state, params, value=seen(value), curvature=curvature
        )
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        params, state = step(params, state)
    return params, nlcg_optax.diagnostics(state)


def summed(outputs, batch):
    return jnp.sum((outputs - batch["y"]) ** 2)


WRONG = {
    "a sum for the curvature": {"loss": summed},
    "a mean of other data, said to be all": {
        "loss": lambda y, b: loss(y, {"y": b["y"] + 1}),
        "fraction": 1,
    },
    "a gradient scaled down": {"scale": lambda g: jax.tree.map(lambda x: 0.1 * x, g)},
}


def test_what_fits_together_is_not_counted():
    for fraction in (None, 1):
        _, report = train(30, fraction=fraction)
        assert report["loss_mismatch"] == 0
    assert 0.5 < report["decrease_ratio"] < 2


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_together_is_counted(case):
    _, report = train(16, **WRONG[case])
    assert report["loss_mismatch"] >= 5


def gradient(params):
    return jax.value_and_grad(lambda p: loss(model(p, BATCH), BATCH))(params)


def checked(params=PARAMS, tx=None, scale=None, **options):
    value, grads = gradient(params)
    grads = grads if scale is None else scale(grads)
    make = functools.partial(options.pop("make", nlcg_optax.gauss_newton))
    curvature = make(
        options.pop("model", model), options.pop("loss", loss), BATCH, **options
    )
    given = {"value": value, "curvature": curvature}
    return nlcg_optax.check(nlcg_auto() if tx is None else tx, grads, params, **given)


def test_a_check_finds_nothing_where_all_is_well():
    assert checked() == checked(fraction=1) == []
    value, grads, curvature = value_grad_and_curvature(model, loss, l2=0.1)(
        PARAMS, BATCH
    )
    given = {"value": value, "curvature": curvature}
    assert nlcg_optax.check(nlcg_auto(), grads, PARAMS, **given) == []


@pytest.mark.parametrize(
    ("options", "needles"),
    [
        ({"loss": summed}, ["24 times `value`", "sum over the batch"]),
        ({"l2": 1.0, "fraction": 1}, ["times `value`", "the same"]),
        (
            {
                "model": lambda p, b: loss(model(p, b), b),
                "loss": lambda y, b: 1.0 * y,
                "fraction": 1,
            },
            ["no curvature along the gradient", "linear in the outputs", "nlcg(0.04)"],
        ),
        (
            {"scale": lambda g: jax.tree.map(lambda x: x / 2, g), "fraction": 1},
            ["2 times as long as the gradient given", "cosine between them is 1.000"],
        ),
        (
            {"scale": lambda g: {**g, "b": 0 * g["b"]}},
            ["zero for ['b']", "stop_gradient"],
        ),
        (
            {"tx": optax.chain(nlcg_auto(), optax.scale(1e-3))},
            ["0.001 times as long as the step", "multiplier="],
        ),
    ],
)
def test_a_check_says_what_is_wrong(options, needles):
    found = checked(**options)
    assert found
    for needle in needles:
        assert needle in " ".join(found)


def test_a_check_needs_a_quadratic_model():
    with pytest.raises(ValueError, match="no quadratic model.*nlcg_auto"):
        checked(tx=optax.sgd(0.1))


# --- Weight decay -------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask",
    [None, pytest.param(WEIGHTS, marks=pytest.mark.long), lambda params: WEIGHTS],
)
def test_weight_decay_is_the_penalty(mask):
    tx = nlcg_auto(weight_decay=0.2, weight_decay_mask=mask)
    got, state = train(15, tx=tx)
    evaluate = value_grad_and_curvature(model, loss, l2=0.2, l2_mask=mask)
    plain = nlcg_auto()

    @jax.jit
    def step(params, state):
        value, grads, curvature = evaluate(params, BATCH)
        updates, state = plain.update(
            grads, state, params, value=value, curvature=curvature
        )
        return optax.apply_updates(params, updates), state

    params, other = PARAMS, plain.init(PARAMS)
    for _ in range(15):
        params, other = step(params, other)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    # The loss that steps are judged by has the penalty, too.
    for name in ("predicted_decrease", "actual_decrease"):
        expected = nlcg_optax.diagnostics(other)[name]
        np.testing.assert_allclose(state[name], expected, rtol=1e-5)
    # It matters.
    without, _ = train(15)
    assert jnp.sum(got["a"] ** 2) < 0.8 * jnp.sum(without["a"] ** 2)

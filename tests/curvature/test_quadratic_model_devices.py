"""The step that curvature chooses, on several devices: numbers, and communication."""

import functools

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from long_run import rest_long

import nlcg_optax

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(0)
ROWS, FEATURES, CLASSES, STEPS = 32, 8, 5, 6
BATCH = {
    "x": RNG.normal(size=(ROWS, FEATURES)),
    "y": RNG.integers(CLASSES, size=ROWS),
}
PARAMS = {
    "w": RNG.normal(size=(FEATURES, 16)),
    "b": np.zeros(16),
    "out": RNG.normal(size=(16, CLASSES)),
}
L2 = 0.01
AXES = ("data", "fsdp")
REPLICATED = {name: P() for name in PARAMS}
SHARDED = {"w": P("fsdp"), "b": P(), "out": P(AXES)}


def model(params, x):
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return hidden @ params["out"]


def cross_entropy(logits, batch):
    labels = batch["y"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def penalty(params):
    return 0.5 * L2 * (jnp.sum(params["w"] ** 2) + jnp.sum(params["out"] ** 2))


def gather(spec, x):
    for axis, name in enumerate(spec):
        if name is not None:
            x = jax.lax.all_gather(x, name, axis=axis, tiled=True)
    return x


def training(tx, kind, specs=None, axis=None, averaged=False, microbatches=None):
    """A run of the model; with an axis inside a `shard_map` or `pmap`."""

    def whole(params):
        return params if specs is None else jax.tree.map(gather, specs, params)

    def loss_of(logits, batch):
        loss = cross_entropy(logits, batch)
        return jax.lax.pmean(loss, axis) if averaged else loss

    def value_fn(params, batch):
        params = whole(params)
        return loss_of(model(params, batch["x"]), batch) + penalty(params)

    def curvature_of(batch):
        if microbatches:
            parts = jax.tree.map(
                lambda x: x.reshape(microbatches, -1, *x.shape[1:]), batch
            )
        options = {"axis_name": axis}
        if kind == "hessian":
            if microbatches:
                return nlcg_optax.hessian(value_fn, microbatches=parts, **options)
            return nlcg_optax.hessian(lambda params: value_fn(params, batch), **options)
        options |= {"l2": L2, "l2_mask": {"w": True, "b": False, "out": True}}
        if microbatches:
            return nlcg_optax.gauss_newton(
                lambda params, part: model(whole(params), part["x"]),
                loss_of,
                microbatches=parts,
                **options,
            )
        return nlcg_optax.gauss_newton(
            lambda params: model(whole(params), batch["x"]),
            lambda logits: loss_of(logits, batch),
            **options,
        )

    value_and_grad = jax.value_and_grad(value_fn)
    if axis is not None:
        value_and_grad = nlcg_optax.pmean_value_and_grad(value_fn, axis)

    def step(params, state, batch):
        loss, grads = value_and_grad(params, batch)
        updates, state = tx.update(
            grads, state, params, value=loss, curvature=curvature_of(batch)
        )
        updates = jax.tree.map(jnp.negative, updates)
        return optax.apply_updates(params, updates), state, loss

    def run(params, batch):
        def body(carry, _):
            params, state, loss = step(*carry, batch)
            return (params, state), loss

        carry = params, tx.init(params)
        (params, state), losses = jax.lax.scan(body, carry, length=STEPS)
        return params, {
            "losses": losses,
            "coefficients": state.last.coefficients,
            "damping": state.trust.damping,
            "conjugacy": state.last.conjugacy,
            "rate": state.noise.rate,
        }

    return run, step


def make(residuals=1, axis=None):
    """The model; with None residual directions noise rules after the first step."""
    return nlcg_optax.scale_by_quadratic_model(
        optax.scale_by_rms(),
        history=2,
        residuals=residuals or 0,
        horizon=5 if residuals is None else None,
        axis_name=axis,
    )


def make_mesh(sizes, names, kind=AxisType.Auto):
    return jax.make_mesh(sizes, names, (kind,) * len(sizes))


def put(mesh, specs, tree):
    return jax.tree.map(
        lambda spec, x: jax.device_put(x, NamedSharding(mesh, spec)), specs, tree
    )


def difference(got, expected):
    return max(
        float(np.max(np.abs(np.asarray(x) - np.asarray(y)) / (np.abs(y) + 1e-3)))
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    )


@functools.cache
def expected(kind, residuals):
    return jax.tree.map(
        np.asarray, jax.jit(training(make(residuals), kind)[0])(PARAMS, BATCH)
    )


def by_jit(kind, residuals, specs, mesh_kind=AxisType.Auto):
    mesh = make_mesh((2, 4), AXES, mesh_kind)
    rows = {"x": P(AXES), "y": P(AXES)}
    run, _ = training(make(residuals), kind)
    return jax.jit(run)(put(mesh, specs, PARAMS), put(mesh, rows, BATCH))


def by_shard_map(kind, residuals, specs, check_vma=True, **options):
    mesh = make_mesh((2, 4), AXES)
    rows = {"x": P(AXES), "y": P(AXES)}
    sharded = specs is SHARDED
    run, _ = training(
        make(residuals, AXES if sharded else None),
        kind,
        specs=specs if sharded else None,
        axis=AXES,
        **options,
    )
    run = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(specs, rows),
        out_specs=(specs, P()),
        check_vma=check_vma,
    )
    return jax.jit(run)(put(mesh, specs, PARAMS), put(mesh, rows, BATCH))


def by_pmap(kind, residuals):
    run, _ = training(make(residuals), kind, axis="data")
    batch = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), BATCH)
    out = jax.pmap(run, axis_name="data", in_axes=(None, 0))(PARAMS, batch)
    first = jax.tree.map(lambda x: np.asarray(x)[0], out)
    assert difference(jax.tree.map(lambda x: np.asarray(x)[7], out), first) == 0
    return first


def by_microbatches(kind, residuals):
    run, _ = training(make(residuals), kind, microbatches=4)
    return jax.jit(run)(PARAMS, BATCH)


WAYS = {
    "jit, replicated": lambda *args: by_jit(*args, REPLICATED),
    "jit, sharded": lambda *args: by_jit(*args, SHARDED),
    "shard_map, replicated": lambda *args: by_shard_map(*args, REPLICATED),
    "shard_map, sharded": lambda *args: by_shard_map(*args, SHARDED),
    "pmap, replicated": by_pmap,
    "microbatches": by_microbatches,
}
OTHERS = {
    "jit explicit, replicated": lambda *args: by_jit(
        *args, REPLICATED, AxisType.Explicit
    ),
    "shard_map unchecked, replicated": lambda *args: by_shard_map(
        *args, REPLICATED, check_vma=False
    ),
    "shard_map, averaged loss": lambda *args: by_shard_map(
        *args, REPLICATED, averaged=True
    ),
    "shard_map, sharded, microbatches": lambda *args: by_shard_map(
        *args, SHARDED, microbatches=2
    ),
}
LONG = [
    *[("gauss_newton", way) for way in OTHERS],
    *[("hessian", f"{door}, sharded") for door in ("jit", "shard_map")],
    ("hessian", "pmap, replicated"),
]


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        *[("gauss_newton", way) for way in WAYS],
        *[pytest.param(*case, marks=pytest.mark.long) for case in LONG],
    ],
)
def test_on_several_devices_the_numbers_are_those_of_one(kind, way):
    found = {**WAYS, **OTHERS}[way](kind, 1)
    assert difference(found, expected(kind, 1)) < 1e-8


@pytest.mark.parametrize("way", rest_long(WAYS, list(WAYS)[:2]))
def test_where_noise_rules_too(way):
    found = WAYS[way]("gauss_newton", None)
    assert found[1]["rate"] > 0
    assert difference(found, expected("gauss_newton", None)) < 1e-8


def test_a_lost_mean_is_noticed():
    """Without the mean over devices each has curvature of its own."""
    mesh = make_mesh((8,), ("data",))

    def step(params, batch):
        tx = make(0)
        loss, grads = nlcg_optax.pmean_value_and_grad(
            lambda params: cross_entropy(model(params, batch["x"]), batch), "data"
        )(params)
        curvature = nlcg_optax.gauss_newton(
            lambda params: model(params, batch["x"]),
            lambda logits: cross_entropy(logits, batch),
        )
        return tx.update(
            grads, tx.init(params), params, value=loss, curvature=curvature
        )[0]

    run = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=True
    )
    with pytest.raises(ValueError) as error:
        jax.jit(run)(PARAMS, BATCH)
    for needle in ("each device's own", "'data'", "axis_name="):
        assert needle in str(error.value)


def plain_step(params, state, batch, axis=None):
    """The loss and its gradient alone."""

    def loss_fn(params):
        return cross_entropy(model(params, batch["x"]), batch) + penalty(params)

    value_and_grad = jax.value_and_grad(loss_fn)
    if axis is not None:
        value_and_grad = nlcg_optax.pmean_value_and_grad(loss_fn, axis)
    loss, grads = value_and_grad(params)
    return grads, state, loss


GRADIENT = 8 * 16 + 16 + 16 * 5
PLAIN = [("all-reduce", GRADIENT + 1)]
# With the matrix of products travels what the curvature makes of the loss.
PRODUCTS = [("all-reduce", 9 + 1), *PLAIN]
RESIDUAL = [("all-reduce", 4 + 1), ("all-reduce", 9), ("all-reduce", GRADIENT), *PLAIN]


@pytest.mark.parametrize("door", ["jit", "shard_map"])
@pytest.mark.parametrize(
    ("residuals", "sent"), [(None, PLAIN), (0, PRODUCTS), (1, RESIDUAL)]
)
def test_no_second_all_reduce_of_a_gradient(door, residuals, sent):
    """Products are a matrix of three directions; a residual direction is a tree."""
    mesh = make_mesh((8,), ("data",))
    rows = {"x": P("data"), "y": P("data")}
    axis = "data" if door == "shard_map" else None
    tx = make(residuals or 0)
    state = jax.eval_shape(tx.init, PARAMS)
    step = training(tx, "gauss_newton", axis=axis)[1]
    if residuals is None:
        step = functools.partial(plain_step, axis=axis)
    if door == "shard_map":
        step = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), rows), out_specs=P())
    placed = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(
            np.shape(x), x.dtype, sharding=NamedSharding(mesh, spec)
        ),
        (PARAMS, state, BATCH),
        (REPLICATED, jax.tree.map(lambda _: P(), state), rows),
    )
    program = compiled.read(jax.jit(step).lower(*placed).compile())
    assert sorted((c.kind, c.elements) for c in program.collectives) == sent

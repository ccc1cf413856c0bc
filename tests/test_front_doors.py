"""On many devices, through each front door, the numbers are those of one.

And so is the communication: that of the gradient and the loss, and two small sums more
where parameters and state are sharded.
"""

import contextlib
import functools
import math
import pathlib
import re
import types
import unittest.mock

import compiled
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import paper

import nlcg_optax
from nlcg_optax import _parallel, _tree

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"

# In float64, of which the comparisons below need many digits.
on_eight_devices = pytest.mark.usefixtures("x64")

STEPS = 20
DEVICES = (1, 8)  # and axes of 2 and 4 devices, in the meshes of two axes
RNG = np.random.default_rng(0)


def make_mesh(sizes, names):
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, names, (AxisType.Auto,) * len(sizes), devices=devices)


def difference(got, expected):
    """The largest relative difference, of tiny numbers the absolute one by 1e-3."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    return max(
        float(np.max(np.abs(x - y) / (np.abs(y) + 1e-3)))
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    )


def put(mesh, specs, tree):
    return jax.tree.map(
        lambda spec, x: jax.device_put(x, NamedSharding(mesh, spec)), specs, tree
    )


def through_jit(run, mesh, in_specs, out_specs):
    def call(*args):
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), out_specs)
        return jax.jit(run, out_shardings=shardings)(*put(mesh, in_specs, args))

    return call


def through_explicit_jit(run, mesh, in_specs, out_specs):
    """With shardings in the types, where each operation follows its arguments'."""
    del out_specs
    explicit = jax.make_mesh(
        mesh.devices.shape, mesh.axis_names, (AxisType.Explicit,) * mesh.devices.ndim
    )

    def call(*args):
        return jax.jit(run)(*put(explicit, in_specs, args))

    return call


def through_shard_map(run, mesh, in_specs, out_specs, check_vma=True):
    run = jax.shard_map(
        run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma
    )

    def call(*args):
        return jax.jit(run)(*put(mesh, in_specs, args))

    return call


def through_pmap(run, mesh, in_specs, out_specs):
    """`specs` are split along "data"; what is not, is checked to agree everywhere."""

    def split(spec, x):
        if "data" not in spec:
            return np.stack([x] * mesh.size)
        return np.stack(np.split(x, mesh.size, axis=spec.index("data")))

    def join(spec, x):
        x = np.asarray(x)
        return np.concatenate(x, axis=spec.index("data")) if "data" in spec else x

    def call(*args):
        args = jax.tree.map(split, in_specs, args)
        out = jax.pmap(run, axis_name="data", devices=list(mesh.devices.flat))(*args)
        return jax.tree.map(join, out_specs, out)

    return call


# The optimizer alone: the gradient of every element depends on that element alone.

SHAPES = {"w": (3, 16), "b": (5,), "c": (8,)}
PARAMS = {name: RNG.normal(size=shape) for name, shape in SHAPES.items()}
PARAMS["c"] = PARAMS["c"] + 1j * RNG.normal(size=8)
# More noise leaves limited-memory BFGS pairs without curvature: rounding, amplified.
NOISE = {name: 0.1 * RNG.normal(size=(STEPS, *s)) for name, s in SHAPES.items()}
LOSSES = 1 + RNG.uniform(size=STEPS)
MIXED = {"w": P(None, "data"), "b": P(), "c": P("data")}
REPLICATED = {name: P() for name in SHAPES}
DIVISIBLE = ("w", "c")

OPTIMIZERS = {
    "nlcg": lambda axis: nlcg_optax.nlcg_paper(0.05, axis_name=axis),
    "nlcg-hager_zhang-online": lambda axis: paper(
        0.05,
        beta_rule="hager_zhang",  # it needs every inner product
        beta_bounds=(-2.0, 2.0),
        restart_on_ascent=True,
        step_rule="online",
        axis_name=axis,
    ),
    "nlcg-small": lambda axis: paper(0.05, track_cosine=False, axis_name=axis),
    "lars": lambda axis: optax.chain(
        nlcg_optax.scale_by_lars(0.5, axis_name=axis),
        nlcg_optax.nlcg_paper(0.05, preconditioner=None, axis_name=axis),
    ),
    "limited_memory_bfgs": lambda axis: optax.chain(
        nlcg_optax.scale_by_limited_memory_bfgs(3, axis_name=axis), optax.scale(-0.05)
    ),
}


# The default, whose matrices every device needs whole, but under `jit`.
ORTHOGONALIZING = "nlcg-orthogonalization"
OPTIMIZERS[ORTHOGONALIZING] = lambda axis: nlcg_optax.nlcg(0.05, axis_name=axis)


def alone(tx):
    """A run of the optimizer; also returns every scalar of its state."""
    tx = optax.with_extra_args_support(tx)

    def step(carry, inputs):
        params, state = carry
        noise, loss = inputs
        grads = jax.tree.map(lambda x, e: 2 * x + e.astype(x.dtype), params, noise)
        updates, state = tx.update(grads, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), None

    def run(params, noise, losses):
        carry, _ = jax.lax.scan(step, (params, tx.init(params)), (noise, losses))
        return carry[0], [x for x in jax.tree.leaves(carry[1]) if x.ndim == 0]

    return run


def specs_alone(params, run, arguments):
    """Specs of the arguments and the results of a run of the optimizer alone."""
    noise = {name: P(None, *spec) for name, spec in params.items()}
    scalars = jax.tree.map(lambda _: P(), jax.eval_shape(run, *arguments)[1])
    return (params, noise, P()), (params, scalars)


def select(names):
    """The arguments of a run with some of the leaves."""
    params, noise = ({name: t[name] for name in names} for t in (PARAMS, NOISE))
    return params, noise, LOSSES


@functools.cache
def expected_alone(name, leaves):
    return jax.tree.map(
        np.asarray, jax.jit(alone(OPTIMIZERS[name](None)))(*select(leaves))
    )


def compare_alone(name, door, layout, devices):
    leaves = tuple(SHAPES) if layout != "sharded" else DIVISIBLE
    arguments = select(leaves)
    specs = REPLICATED if layout == "replicated" else MIXED
    specs = {leaf: specs[leaf] for leaf in leaves}
    mesh = make_mesh((devices,), ("data",))
    whole = alone(OPTIMIZERS[name](None))
    in_specs, out_specs = specs_alone(specs, whole, arguments)
    if (
        door in (through_jit, through_explicit_jit)
        or layout == "replicated"
        and door is not through_shard_map
    ):
        run = whole
    else:  # replicated leaves count once in a shard_map, so there the axis may stay
        run = alone(OPTIMIZERS[name]("data"))
    out = door(run, mesh, in_specs, out_specs)(*arguments)
    return difference(*np_broadcast(out, expected_alone(name, leaves)))


def np_broadcast(got, expected):
    """Whatever every device of a pmap has is compared with what one device has."""
    got = jax.tree.map(np.asarray, got)
    return got, jax.tree.map(lambda x, y: np.broadcast_to(y, x.shape), got, expected)


UNCHECKED = functools.partial(through_shard_map, check_vma=False)
LAYOUTS = [  # pmap and an unchecked shard_map know no mixed trees
    ("jit", through_jit, "replicated"),
    ("jit", through_jit, "mixed"),
    ("shard_map", through_shard_map, "replicated"),
    ("shard_map", through_shard_map, "mixed"),
    ("pmap", through_pmap, "replicated"),
    ("pmap", through_pmap, "sharded"),
]
UNCHECKED_LAYOUTS = [
    ("shard_map unchecked", UNCHECKED, "replicated"),
    ("shard_map unchecked", UNCHECKED, "sharded"),
]


# Where all is replicated the optimizer does not communicate: once will do.
ALONE = [
    ("nlcg", *layout, devices)
    for layout in LAYOUTS
    for devices in (DEVICES if layout[2] != "replicated" else (8,))
]
ALONE += [("nlcg", *layout, 8) for layout in UNCHECKED_LAYOUTS]
ALONE.append(("nlcg", "jit explicit", through_explicit_jit, "mixed", 8))
for name in OPTIMIZERS:
    if name == ORTHOGONALIZING:
        whole = [layout for layout in LAYOUTS if layout[2] == "replicated"]
        ALONE += [(name, *layout, 8) for layout in (LAYOUTS[1], *whole)]
        ALONE.append((name, "jit explicit", through_explicit_jit, "mixed", 8))
    elif name != "nlcg":
        ALONE += [(name, *layout, 8) for layout in (LAYOUTS[1], LAYOUTS[5])]


def ids(cases):
    """Of cases with a front door, which has a name beside it."""
    return [", ".join(str(x) for x in case if not callable(x)) for case in cases]


@on_eight_devices
@pytest.mark.parametrize("case", ALONE, ids=ids(ALONE))
def test_the_optimizer_alone_has_the_numbers_of_one_device(case):
    name, _, door, layout, devices = case
    assert compare_alone(name, door, layout, devices) < 1e-12


@on_eight_devices
@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != ORTHOGONALIZING])
def test_leaves_sharded_over_one_axis_over_both_and_over_none(name):
    """In one mesh of 2×4."""
    mesh = make_mesh((2, 4), ("data", "fsdp"))
    specs = {"w": P(None, ("data", "fsdp")), "b": P(), "c": P("fsdp")}
    run = alone(OPTIMIZERS[name](("data", "fsdp")))
    in_specs, out_specs = specs_alone(
        specs, alone(OPTIMIZERS[name](None)), select(SHAPES)
    )
    out = through_shard_map(run, mesh, in_specs, out_specs)(*select(SHAPES))
    assert difference(*np_broadcast(out, expected_alone(name, tuple(SHAPES)))) < 1e-12


@on_eight_devices
def test_a_constant_product_of_a_sharded_leaf_counts_on_every_device():
    mesh = make_mesh((2, 4), ("data", "fsdp"))
    axes = ("data", "fsdp")

    def total(leaf, factor):
        return _tree.reduce_products(
            lambda _, factor: [factor * factor],
            [leaf],
            [factor],
            dtype=jnp.dtype(jnp.float64),
            axis_name=axes,
        )[0]

    run = jax.shard_map(total, mesh=mesh, in_specs=(P(axes), P("data")), out_specs=P())
    assert jax.jit(run)(jnp.zeros(8), jnp.arange(4.0)) == 4 * (0 + 1 + 4 + 9)


BOTH = ("data", "fsdp")


@on_eight_devices
@pytest.mark.parametrize("averaged", [(), ("fsdp",), BOTH])
@pytest.mark.parametrize(
    ("spec", "check_vma"),
    [(P(), True), (P(), False), *[(P(axes), True) for axes in ("fsdp", "data", BOTH)]],
)
def test_the_helper_averages_what_is_not_averaged_yet(averaged, spec, check_vma):
    """`pmean_value_and_grad` beside a loss averaged already, and sharded parameters."""
    mesh = make_mesh((2, 4), BOTH)
    params = {"w": PARAMS["w"].T, "b": PARAMS["b"][:3], "unused": PARAMS["b"]}
    x = NOISE["w"][:16].reshape(16, -1)[:, :16]

    def loss_fn(params, x):
        return jnp.mean(jnp.tanh(x @ params["w"] + params["b"]) ** 2)

    def local(params, x):
        loss = loss_fn({**params, "w": gather(spec, params["w"])}, x)
        return jax.lax.pmean(loss, averaged) if averaged else loss

    specs = {"w": spec, "b": P(), "unused": P()}
    run = through_shard_map(
        nlcg_optax.pmean_value_and_grad(local, BOTH),
        mesh,
        (specs, P(BOTH)),
        (P(), specs),
        check_vma,
    )
    expected = jax.tree.map(np.asarray, jax.value_and_grad(loss_fn)(params, x))
    assert difference(*np_broadcast(run(params, x), expected)) < 1e-12


# A model with batch normalization over all devices.

BATCH, FEATURES, CLASSES = 64, 16, 8
BATCHES = {
    "x": RNG.normal(size=(STEPS, BATCH, FEATURES)),
    "y": RNG.integers(CLASSES, size=(STEPS, BATCH)),
}
LEARNING_RATE = 0.2


class Model(nn.Module):
    axis_name: str | tuple[str, ...] | None = None

    @nn.compact
    def __call__(self, x):
        kinds = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        x = nn.Dense(24, use_bias=False, **kinds)(x)
        x = nn.BatchNorm(
            use_running_average=False,
            momentum=0.5,
            axis_name=self.axis_name,
            force_float32_reductions=False,  # would promote, and all is float64
            **kinds,
        )(x)
        return nn.Dense(CLASSES, use_bias=False, **kinds)(nn.relu(x))


@functools.cache
def initial():
    """The model's variables, as arrays of NumPy."""
    variables = Model().init(jax.random.key(0), BATCHES["x"][0])
    return jax.tree.map(np.asarray, variables)


def training(optimizer, axis_name=None, value_and_grad=jax.value_and_grad, specs=None):
    """A run of the model.

    With specs the parameters are sharded: gathered in the loss where the types are
    checked, and before it (their gradient is then sliced) where they are not.
    """
    model = Model(axis_name)

    def loss_fn(params, stats, batch):
        if specs is not None:
            params = jax.tree.map(gather, specs, params)
        logits, new = model.apply(
            {"params": params, "batch_stats": stats}, batch["x"], mutable="batch_stats"
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return loss.mean(), new["batch_stats"]

    def step(carry, batch):
        params, stats, state = carry
        (loss, stats), grads = value_and_grad(loss_fn, has_aux=True)(
            params, stats, batch
        )
        updates, state = optimizer.update(grads, state, params, value=loss)
        return (optax.apply_updates(params, updates), stats, state), loss

    def run(variables, batches):
        params, stats = variables["params"], variables["batch_stats"]
        carry, losses = jax.lax.scan(
            step, (params, stats, optimizer.init(params)), batches
        )
        return {"params": carry[0], "batch_stats": carry[1]}, losses

    return run


def gather(spec, x):
    for axis, name in enumerate(spec):
        if name is not None:
            x = jax.lax.all_gather(x, name, axis=axis, tiled=True)
    return x


def gathered_before(fun, has_aux):
    """For pmap, which takes gradients of whole parameters: those of its shards."""

    def value_and_grad(params, *args):
        whole = jax.tree.map(lambda x: gather(P("data"), x), params)
        value, grads = nlcg_optax.pmean_value_and_grad(fun, "data", has_aux=has_aux)(
            whole, *args
        )
        index = jax.lax.axis_index("data")

        def own(grad, x):
            return jax.lax.dynamic_slice_in_dim(grad, index * x.shape[0], x.shape[0])

        return value, jax.tree.map(own, grads, params)

    return value_and_grad


def nlcg(axis_name=None):
    return nlcg_optax.nlcg_paper(LEARNING_RATE, axis_name=axis_name)


@functools.cache
def expected_training():
    return jax.tree.map(np.asarray, jax.jit(training(nlcg()))(initial(), BATCHES))


def mixed_specs(name, everything=False):
    """Kernels sharded along their first axis, vectors not (unless everything is)."""

    def spec(x):
        return P(name) if everything or x.ndim > 1 else P()

    return jax.tree.map(spec, initial()["params"])


def specs_training(params, batch):
    variables = {
        "params": params,
        "batch_stats": jax.tree.map(lambda _: P(), initial()["batch_stats"]),
    }
    rows = jax.tree.map(lambda _: P(None, batch), BATCHES)
    return (variables, rows), (variables, P())


def train_through(door, layout, devices):
    mesh = make_mesh((devices,), ("data",))
    pmean = functools.partial(nlcg_optax.pmean_value_and_grad, axis_name="data")
    specs = jax.tree.map(lambda _: P(), initial()["params"])
    if layout != "replicated":
        specs = mixed_specs("data", everything=layout == "sharded")
    if door is through_jit:
        run = training(nlcg())
    elif layout == "replicated":
        run = training(nlcg(), "data", pmean)
    elif layout == "mixed":
        run = training(nlcg("data"), "data", pmean, specs)
    else:
        run = training(nlcg("data"), "data", gathered_before)
    return door(run, mesh, *specs_training(specs, "data"))(initial(), BATCHES)


TRAINING = [(*layout, 8) for layout in LAYOUTS + UNCHECKED_LAYOUTS]
TRAINING += [(*layout, 1) for layout in LAYOUTS if layout[2] != "replicated"]


@on_eight_devices
@pytest.mark.parametrize("case", TRAINING, ids=ids(TRAINING))
def test_a_model_with_batch_norm_has_the_numbers_of_one_device(case):
    _, door, layout, devices = case
    out = train_through(door, layout, devices)
    assert difference(*np_broadcast(out, expected_training())) < 1e-10


@on_eight_devices
@pytest.mark.parametrize("over", ["fsdp", BOTH])
def test_a_batch_over_both_axes_and_parameters_over_one(over):
    """Sums of the optimizer over the parameters' axis, or over both, are the same."""
    mesh = make_mesh((2, 4), BOTH)
    specs = mixed_specs("fsdp")
    pmean = functools.partial(nlcg_optax.pmean_value_and_grad, axis_name=BOTH)
    run = training(nlcg(over), BOTH, pmean, specs)
    out = through_shard_map(run, mesh, *specs_training(specs, BOTH))
    found = np_broadcast(out(initial(), BATCHES), expected_training())
    assert difference(*found) < 1e-10


# The same numbers must not come out when a sum over the devices is lost.


@contextlib.contextmanager
def lost(module, name):
    """Takes the communication out of a module's `jax.lax.psum` or `jax.lax.pmean`."""

    def psum(x, axes):
        size = math.prod(jax.lax.axis_size(axis) for axis in axes)
        return jax.tree.map(lambda x: x * size, x)  # its mean is the device's own

    own = {"psum": psum, "pmean": lambda x, axes: x}[name]
    lax = types.SimpleNamespace(**{**vars(jax.lax), name: own})
    shim = types.SimpleNamespace(**{**vars(jax), "lax": lax})
    with unittest.mock.patch.object(module, "jax", shim):
        yield


LOSABLE = {
    "inner products": (_tree, "psum"),
    "gradient": (_parallel, "psum"),
    "loss": (_parallel, "pmean"),
}


@on_eight_devices
@pytest.mark.parametrize("what", LOSABLE)
def test_a_lost_sum_is_noticed(what):
    expected = expected_training()
    with lost(*LOSABLE[what]):
        layout = "sharded" if what == "inner products" else "replicated"
        out = train_through(through_pmap, layout, 8)
        # Where types are checked it does not even compile: they say that the result
        # differs from device to device.
        layout = "mixed" if what == "inner products" else "replicated"
        with pytest.raises((TypeError, ValueError), match="{V:data}|varying"):
            train_through(through_shard_map, layout, 8)
    assert difference(*np_broadcast(out, expected)) > 1e-3


@on_eight_devices
def test_a_lost_sum_of_the_optimizer_alone_is_noticed():
    expected_alone("nlcg", DIVISIBLE)  # with all its sums
    with lost(_tree, "psum"):
        assert compare_alone("nlcg", UNCHECKED, "sharded", 8) > 1e-3


# What the compiled steps communicate.


def collectives(step, *arguments):
    """Of each kind in a compiled step: their number, their results' elements, and how
    many are small: of 32 elements at most.
    """
    program = compiled.read(step.lower(*arguments).compile())
    return {
        kind: (
            total.count,
            total.elements,
            sum(c.elements <= 32 for c in program.collectives if c.kind == kind),
        )
        for kind, total in program.by_kind().items()
    }


COUNTED = {
    "sgd": lambda axis: optax.sgd(0.1),
    "nlcg": lambda axis: nlcg_optax.nlcg_paper(0.1, axis_name=axis),
    "nlcg-hager_zhang": lambda axis: paper(
        0.1, beta_rule="hager_zhang", beta_bounds=(-2.0, 2.0), axis_name=axis
    ),
    "nlcg-online-restarts": lambda axis: paper(
        0.1,
        step_rule="online",
        restart_on_ascent=True,
        restart_every=10,
        axis_name=axis,
    ),
    "nlcg-rms": lambda axis: nlcg_optax.nlcg_paper(
        0.1, preconditioner=optax.scale_by_rms(), axis_name=axis
    ),
    "lars-nlcg": lambda axis: optax.chain(
        nlcg_optax.scale_by_lars(axis_name=axis),
        nlcg_optax.nlcg_paper(0.1, axis_name=axis),
    ),
    ORTHOGONALIZING: lambda axis: nlcg_optax.nlcg(0.1, axis_name=axis),
}
# Kernels sharded, biases replicated.
LAYERS = {
    "w1": ((64, 128), P("fsdp")),
    "b1": ((128,), P()),
    "w2": ((128, 16), P("fsdp")),
    "b2": ((16,), P()),
}


def mlp_loss(params, batch):
    hidden = jax.nn.relu(batch["x"] @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def state_specs(specs, state):
    by_shape = {LAYERS[name][0]: spec for name, spec in specs.items()}
    return jax.tree.map(lambda x: by_shape.get(x.shape, P()), state)


ABSTRACT = {
    name: jax.ShapeDtypeStruct(shape, jnp.float32)
    for name, (shape, _) in LAYERS.items()
}
EXAMPLES_OF_A_STEP = {
    "x": jax.ShapeDtypeStruct((64, 64), jnp.float32),
    "y": jax.ShapeDtypeStruct((64,), jnp.int32),
}
SCALAR = jax.ShapeDtypeStruct((), jnp.float32)


def update(tx, grads, state, params, loss):
    updates, state = tx.update(grads, state, params, value=loss)
    return optax.apply_updates(params, updates), state


def communicated(door, step, in_specs, out_specs, arguments):
    """By a step of a mesh of 2×4 devices, compiled for abstract arrays."""
    mesh = make_mesh((2, 4), BOTH)
    placed = jax.tree.map(
        lambda spec, x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        ),
        in_specs,
        arguments,
    )
    if door == "shard_map":
        step = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    out = jax.tree.map(lambda spec: NamedSharding(mesh, spec), out_specs)
    step = jax.jit(step, out_shardings=out, donate_argnums=(0, 1))
    return collectives(step, *placed)


def made(name, door, layout):
    """An optimizer, and the specs of parameters and state."""
    # The axis named is harmless where all is replicated: types know.
    axis = "fsdp" if door == "shard_map" else None
    tx = optax.with_extra_args_support(COUNTED[name](axis))
    sharded = layout == "sharded"
    specs = {name: spec if sharded else P() for name, (_, spec) in LAYERS.items()}
    state = jax.eval_shape(tx.init, ABSTRACT)
    return tx, specs, state, state_specs(specs, state)


def communication_of_update(name, door):
    """Of the optimizer alone, where parameters and state are sharded."""
    tx, specs, state, states = made(name, door, "sharded")
    return communicated(
        door,
        lambda params, state, grads, loss: update(tx, grads, state, params, loss),
        (specs, states, specs, P()),
        (specs, states),
        (ABSTRACT, state, ABSTRACT, SCALAR),
    )


@functools.cache
def communication_of_step(name, door, layout):
    """Of a whole step, with the gradient and the loss."""
    if door == "pmap":
        return communication_of_pmap(name)
    tx, specs, state, states = made(name, door, layout)
    manual = door == "shard_map"

    def whole(params, state, batch):
        def loss_fn(params, batch):
            if manual:
                params = jax.tree.map(gather, specs, params)
            return mlp_loss(params, batch)

        value_and_grad = jax.value_and_grad(loss_fn)
        if manual:
            value_and_grad = nlcg_optax.pmean_value_and_grad(loss_fn, BOTH)
        loss, grads = value_and_grad(params, batch)
        return *update(tx, grads, state, params, loss), loss

    rows = {"x": P(BOTH), "y": P(BOTH)}
    return communicated(
        door,
        whole,
        (specs, states, rows),
        (specs, states, P()),
        (ABSTRACT, state, EXAMPLES_OF_A_STEP),
    )


def communication_of_pmap(name):
    """Of a step with replicated trees."""
    tx = optax.with_extra_args_support(COUNTED[name](None))

    def step(params, state, batch):
        loss, grads = nlcg_optax.pmean_value_and_grad(mlp_loss, "data")(params, batch)
        return *update(tx, grads, state, params, loss), loss

    stacked = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((8, *x.shape), x.dtype),
        (ABSTRACT, jax.eval_shape(tx.init, ABSTRACT)),
    )
    shares = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((8, x.shape[0] // 8, *x.shape[1:]), x.dtype),
        EXAMPLES_OF_A_STEP,
    )
    return collectives(jax.pmap(step, axis_name="data"), *stacked, shares)


@on_eight_devices
@pytest.mark.parametrize("name", ["nlcg", "nlcg-orthogonalization"])
@pytest.mark.parametrize("door", ["jit", "shard_map", "pmap"])
def test_replicated_nlcg_communicates_as_sgd_does(door, name):
    # Kernels, biases and the loss: 64·128 + 128 + 128·16 + 16 + 1, in one all-reduce.
    for optimizer in ("sgd", name):
        sent = communication_of_step(optimizer, door, "replicated")
        assert sent == {"all-reduce": (1, 10385, 0)}, optimizer


# Sums in an update with sharded state, and the maxima by which what is summed is
# scaled: their number, and the scalars of each leaf.
UPDATES = {
    ("nlcg", "jit"): (4, 16),
    ("nlcg", "shard_map"): (4, 16),
    ("nlcg-hager_zhang", "jit"): (4, 18),
    ("nlcg-hager_zhang", "shard_map"): (4, 18),
    ("nlcg-online-restarts", "jit"): (4, 16),
    ("nlcg-online-restarts", "shard_map"): (4, 16),
    ("nlcg-rms", "jit"): (2, 10),
    ("nlcg-rms", "shard_map"): (2, 10),
    ("lars-nlcg", "jit"): (7, 20),
    ("lars-nlcg", "shard_map"): (6, 21),
}


@on_eight_devices
@pytest.mark.parametrize("name, door", UPDATES)
def test_sharded_update_communicates_a_few_scalars(name, door):
    sent = communication_of_update(name, door)
    assert set(sent) == {"all-reduce"}
    reductions, scalars = UPDATES[name, door]
    # By jit each of the two sharded leaves sends its own sums, together.
    if door == "jit":
        scalars *= 2
    count, elements, small = sent["all-reduce"]
    assert count == small <= reductions
    assert elements <= scalars


@on_eight_devices
@pytest.mark.parametrize(
    "door, added",
    [
        ("shard_map", [4, 16, 4]),
        # Four by jit, too; but XLA lets sᵀBs, which needs no gradient, travel with part
        # of the gradient's own all-reduce, which is then not combined with the rest.
        ("jit", [5, 32, 4]),
    ],
)
def test_sharded_nlcg_adds_two_sums_and_two_maxima_to_sgd(door, added):
    sgd, nlcg = (
        dict(communication_of_step(name, door, "sharded")) for name in ("sgd", "nlcg")
    )
    before, after = sgd.pop("all-reduce"), nlcg.pop("all-reduce")
    assert sgd == nlcg  # gathering the parameters, scattering the gradient
    assert sgd
    more = [b - a for a, b in zip(before, after, strict=True)]
    assert all(x <= y for x, y in zip(more, added, strict=True)), more


@pytest.fixture(scope="module")
def printed(run_on_devices):
    """A function that runs an example: the steps and losses it prints, by name."""

    def run(example, devices):
        out = run_on_devices(EXAMPLES / f"{example}.py", devices).stdout
        lines = re.findall(r"^(.*): step (\d+), loss ([\d.]+)$", out, re.MULTILINE)
        # At its end each tells what it shows.
        told = re.findall(r"^(.*): each of (\d+) devices holds (\d+)% of", out, re.M)
        assert len(lines) + len(told) == len(out.splitlines())
        for name, count, share in told:
            assert int(count) == devices
            split = {"jit": min(2, devices), "sharded": devices}.get(name, 1)
            assert 100 / split <= int(share) < 110 / split, (name, share)
        losses = {}
        for name, step, loss in lines:
            losses.setdefault(name, []).append((int(step), float(loss)))
        return losses

    return run


@pytest.fixture(scope="module")
def one_device(printed):
    (losses,) = printed("mesh_jit", 1).values()
    assert losses[-1][0] == 40
    assert losses[-1][1] < 0.2 < losses[0][1]
    return losses


@pytest.mark.parametrize(
    "example, runs",
    [
        ("mesh_jit", ["jit"]),
        ("mesh_shard_map", ["replicated", "sharded"]),
        pytest.param("mesh_pmap", ["pmap"], marks=pytest.mark.long),
    ],
)
def test_examples_print_the_losses_of_one_device(printed, one_device, example, runs):
    losses = printed(example, 4)
    assert list(losses) == runs
    for found in losses.values():
        assert [step for step, _ in found] == [step for step, _ in one_device]
        for (_, loss), (_, expected) in zip(found, one_device, strict=True):
            assert loss == pytest.approx(expected, rel=1e-4)

"""Orthogonalization on eight devices: the numbers of one, and what is sent."""

import functools
import math

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nlcg_optax
from nlcg_optax import Matrix, matrices
from nlcg_optax.matrices import plan
from nlcg_optax.matrices.layout import Leaf, Slots, Stack, group
from nlcg_optax.matrices.newton_schulz import Method, coefficients_of
from nlcg_optax.matrices.plan import choose, divide, join
from nlcg_optax.preconditioners.orthogonalization import work_of

# Ten matrices of one shape, on eight devices; a few of its transpose; convolutions; a
# single one that is long; and a bias.
SHAPES = {
    **{f"a{i}": (8, 24) for i in range(10)},
    **{f"b{i}": (24, 8) for i in range(3)},
    "conv0": (3, 3, 8, 16),
    "conv1": (3, 3, 8, 16),
    "embedding": (128, 8),
    "bias": (8,),
}
LAYERS = {"layers": (16, 8, 24), "more": (3, 8, 16), "bias": (3, 8)}
SINGLE = {"w": (16, 24)}
NONE = {"bias": (8,), "scale": ()}


def gradients(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def make_mesh(sizes, names, kind=AxisType.Auto):
    devices = jax.devices()[: math.prod(sizes)]
    return jax.make_mesh(sizes, names, (kind,) * len(sizes), devices=devices)


def first(axis):
    """Sharded along the first axis, that of inputs in a convolution's kernel."""
    return lambda shape: P(*[None] * (len(shape) - 2), axis) if shape[1:] else P()


def last(axis):
    """Sharded along the last axis."""
    return lambda shape: P(*[None] * (len(shape) - 1), axis) if shape else P()


def both(one, other):
    """Sharded along two axes."""
    return lambda s: P(*[None] * (len(s) - 2), one, other) if s[1:] else P()


def replicated(shape):
    del shape
    return P()


def difference(got, expected):
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return max(float(np.max(np.abs(np.asarray(x) - y), initial=0)) for x, y in pairs)


def specs_of(state, specs):
    """Of the state: moments are where their leaves are."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: P() if len(path) == 1 else specs[path[-1].key], state
    )


def compare(shapes, layout, mesh, door, check_vma=True, through=None, **options):
    """How far a step on the devices is from one on one device; and what is sent."""
    # Names like these say nothing.
    named = {} if "batch_axes" in options else {"matrices": matrices.last_axis}
    options = {"iterations": 2, **named, **options}
    grads = gradients(shapes)
    specs = {name: layout(shape) for name, shape in shapes.items()}
    plain = nlcg_optax.scale_by_orthogonalization(**options)
    state = plain.init(grads)
    expected = jax.tree.map(np.asarray, plain.update(grads, state))
    where = specs_of(state, specs)
    placed = {
        k: jax.device_put(g, NamedSharding(mesh, specs[k])) for k, g in grads.items()
    }
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), (specs, where))
    if door == "shard_map":
        tx = nlcg_optax.scale_by_orthogonalization(axis_name=through, **options)
        run = jax.jit(
            jax.shard_map(
                tx.update,
                mesh=mesh,
                in_specs=(specs, where),
                out_specs=(specs, where),
                check_vma=check_vma,
            )
        )
        arguments = (placed, tx.init(placed))
        compiled_run = run.lower(*arguments).compile()
    else:
        given = {"argument": {"mesh": mesh}}.get(door, {})
        tx = nlcg_optax.scale_by_orthogonalization(**given, **options)
        out = None if door == "explicit" else shardings
        run = jax.jit(tx.update, out_shardings=out)
        init = tx.init if out is None else jax.jit(tx.init, out_shardings=out[1])
        arguments = (placed, init(placed))
        if door == "set":
            with jax.set_mesh(mesh):
                compiled_run = run.lower(*arguments).compile()
        else:
            compiled_run = run.lower(*arguments).compile()
    got = compiled_run(*arguments)
    for x, sharding in zip(
        jax.tree.leaves(got), jax.tree.leaves(shardings), strict=True
    ):
        assert x.sharding.is_equivalent_to(sharding, x.ndim), (x.sharding, sharding)
    return difference(got, expected), compiled.read(compiled_run).counts()


ONE, TWO = ((8,), ("fsdp",)), ((2, 4), ("data", "fsdp"))
AXES = TWO[1]
LAYOUTS = {
    "first": (ONE, first("fsdp")),
    "last": (ONE, last("fsdp")),
    "replicated": (ONE, replicated),
    "one of two": (TWO, last("fsdp")),
    "both on one": (TWO, first(AXES)),
    "one each": (TWO, both(*AXES)),
}
LAYERED = {
    "layers": lambda s: P("fsdp"),
    "inside": lambda s: P(None, "fsdp") if len(s) > 2 else P(),
    "replicated": replicated,
}
NEAR = {"a": (30, 64), "b": (32, 80), "c": (32, 64)}
CASES = {
    **{
        f"{door}, {name}": (SHAPES, layout, where, door, {})
        for name, (where, layout) in LAYOUTS.items()
        for door in ("set", "argument", "explicit", "shard_map")
        if door != "argument" or name == "last"
    },
    "unchecked": (SHAPES, last("fsdp"), ONE, "shard_map", {"check_vma": False}),
    "nearly one side": (NEAR, last("fsdp"), ONE, "set", {}),
    "three devices": (SHAPES, replicated, ((3,), ("fsdp",)), "set", {}),
}
for door in ("set", "shard_map"):
    for name, layout in LAYERED.items():
        # Neither three layers nor a bias of three lie on eight devices.
        few = {"layers": LAYERS["layers"]} if name == "layers" else LAYERS
        CASES[f"{door}, layers, {name}"] = few, layout, ONE, door, {"batch_axes": 1}
    CASES[f"{door}, single"] = SINGLE, last("fsdp"), ONE, door, {}
    CASES[f"{door}, none"] = NONE, replicated, ONE, door, {}

# What is sent, where it follows from the shapes.
SENT = {
    # Two of each: (8, 24) with its transpose, the convolutions, the embedding. Both
    # shapes of the first kind are sharded along another axis of the same matrix.
    "shard_map, last": {"all-to-all": 8},
    "unchecked": {"all-to-all": 8},
    # The embedding stays: its Gram matrix is added up, and its largest element.
    "shard_map, first": {"all-to-all": 4, "all-reduce": 2},
    "shard_map, replicated": {"all-reduce": 1},
    # A gather of each of three stacks; beside them the embedding's two sums.
    "set, replicated": {"all-gather": 3, "all-reduce": 2},
    "explicit, replicated": {"all-gather": 3, "all-reduce": 2},
    "shard_map, layers, inside": {"all-to-all": 4},
    "shard_map, single": {"all-reduce": 2},
    "set, single": {"all-reduce": 2},
    # Nothing moves where layers lie on their devices, or there is no matrix.
    **{f"{door}, layers, layers": {} for door in ("set", "shard_map")},
    **{f"{door}, none": {} for door in ("set", "shard_map")},
}
assert len(CASES) == 32 and CASES.keys() >= SENT.keys()


@pytest.fixture
def free_messages(monkeypatch):
    """Matrices as small as these are worth a message if messages cost nothing."""
    monkeypatch.setattr(plan, "OPERATIONS_PER_BYTE", 0)
    monkeypatch.setattr(plan, "OPERATIONS_PER_COLLECTIVE", 0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_one_device_and_what_is_sent(case, free_messages):
    shapes, layout, (sizes, names), door, options = CASES[case]
    kind = AxisType.Explicit if door == "explicit" else AxisType.Auto
    mesh = make_mesh(sizes, names, kind)
    apart, sent = compare(shapes, layout, mesh, door, through=names, **options)
    assert apart < 1e-12
    assert case not in SENT or sent == SENT[case]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("door", ["set", "shard_map"])
def test_matrices_without_work_are_not_sent_to_one_device(door):
    mesh = make_mesh(*ONE)
    apart, sent = compare(SHAPES, last("fsdp"), mesh, door, through="fsdp")
    assert apart < 1e-12
    # Small ones are gathered as stacks where they are sharded, and stay there.
    assert door == "set" or sent.get("all-to-all", 0) == 0


@pytest.mark.usefixtures("x64")
def test_nlcg_needs_no_other_preconditioner_over_sharded_parameters():
    """Its steps over sharded parameters are those of one device."""
    mesh, layout = make_mesh((8,), ("fsdp",)), last("fsdp")
    params = gradients(SHAPES)
    specs = {name: layout(shape) for name, shape in SHAPES.items()}

    def step(tx, params, state, loss):
        grads = jax.tree.map(lambda x: x + jax.numpy.sin(3 * x), params)
        updates, state = tx.update(grads, state, params, value=loss)
        return jax.tree.map(lambda x, u: x + u, params, updates), state

    def run(one, params, state):
        one = jax.jit(one)
        for i in range(4):
            params, state = one(params, state, np.float64(1 / (1 + i)))
        return params

    def spec(path, x):
        name = getattr(path[-1], "key", None)
        return specs[name] if x.shape == SHAPES.get(name) else P()

    plain = nlcg_optax.scale_by_orthogonalization(matrices=matrices.last_axis)
    alone = nlcg_optax.nlcg(0.05, preconditioner=plain)
    expected = run(functools.partial(step, alone), params, alone.init(params))
    through = nlcg_optax.scale_by_orthogonalization(
        matrices=matrices.last_axis, axis_name="fsdp"
    )
    tx = nlcg_optax.nlcg(0.05, preconditioner=through, axis_name="fsdp")
    state = tx.init(params)
    where = jax.tree_util.tree_map_with_path(spec, state)
    sharded = jax.shard_map(
        functools.partial(step, tx),
        mesh=mesh,
        in_specs=(specs, where, P()),
        out_specs=(specs, where),
    )
    got = run(sharded, params, state)
    assert difference(got, jax.tree.map(np.asarray, expected)) < 1e-11


def test_parameters_that_lie_elsewhere_are_refused():
    """On a device that the mesh does not have."""
    mesh = make_mesh((2,), ("fsdp",))
    tx = nlcg_optax.scale_by_orthogonalization(mesh=mesh)
    elsewhere = jax.device_put(np.ones((4, 6), np.float32), jax.devices()[5])
    with pytest.raises(ValueError) as error:
        tx.init({"layer": {"w": elsewhere}})
    words = str(error.value)
    assert "'['layer']['w']' of shape (4, 6)" in words
    assert "5" in words and "(2 devices) does not have" in words


def test_matrices_of_nearly_one_side_share_an_iteration():
    work = work_of(Method(coefficients_of("muon", 5)))

    def joined(*shapes, dtypes=(jnp.float32, jnp.float32)):
        leaves = [
            Leaf(jax.ShapeDtypeStruct(shape, dtype), Matrix((0,), (1,)))
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        bundles = join(group(leaves), leaves, lambda b: divide(b, 8, work)[0])
        return [[one.stack.small for one in bundle] for bundle in bundles]

    # Of ResNet-50 the classifier and one convolution.
    assert joined((2048, 1000), (1024, 2048)) == [[1000, 1024]]
    assert joined((2048, 700), (1024, 2048)) == [[700], [1024]]
    other = jnp.float32, jnp.bfloat16
    assert joined((2048, 1000), (1024, 2048), dtypes=other) == [[1000], [1024]]


def test_as_few_slots_as_can_be():
    slots = Slots.fit([10, 3, 8, 5], 8)
    assert slots.full == (1, 0, 1, 0)
    # The rests of 2, 3 and 5 matrices: the first two share a row, with the last none.
    assert slots.row == (0, 0, None, 1)
    assert slots.offset == (0, 2, 0, 0)
    assert slots.rows == 4


def test_the_choice_follows_the_count():
    work = work_of(Method(coefficients_of("muon", 5)))
    small = [Stack(count=10, small=64, long=64)]
    assert choose(small, 8, work)[1] == ["each"]
    # The kernels of a transformer, and its embedding, of which there is one.
    large = [Stack(16, 768, 3072, sharded=True), Stack(1, 768, 50304, sharded=True)]
    assert choose(large, 8, work)[1] == ["spread", "split"]
    assert choose(large, 1, work)[1] == ["each", "each"]
    # Replicated matrices pay for a gather: only those that are worth it.
    for size, expected in ((64, "each"), (2048, "spread")):
        stack = Stack(32, size, size, sharded=False)
        assert choose([stack], 8, work)[1] == [expected]

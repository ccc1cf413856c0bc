"""SOAP on eight devices: the numbers of one, what is sent, and what is never sent."""

import contextlib

import compiled
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from long_run import rest_long
from test_placement import (
    LAYOUTS,
    ONE,
    difference,
    free_messages,  # noqa: F401 - a fixture
    gradients,
    last,
    make_mesh,
    replicated,
)

import nlcg_optax
from nlcg_optax import Matrix, matrices, scale_by_soap
from nlcg_optax.matrices.matrix import is_kept

pytestmark = pytest.mark.usefixtures("x64", "free_messages")

# Ten matrices of one shape, on eight devices; a few of its transpose; square ones and a
# convolution; a single one that is long; a bias. A side above 16 has no basis: of a few
# gradients the products of the longer side are singular, and null spaces are rounding.
SHAPES = {
    **{f"a{i}": (8, 24) for i in range(10)},
    **{f"b{i}": (24, 8) for i in range(3)},
    **{f"c{i}": (16, 16) for i in range(9)},
    **{f"d{i}": (8, 40) for i in range(2)},
    "kernel": (3, 3, 8, 16),
    "embedding": (128, 8),
    "bias": (8,),
}
LAYERS = {"layers": (16, 8, 24), "more": (3, 8, 24), "bias": (3, 8)}
FEW = {"layers": LAYERS["layers"]}
CASES = {
    f"{door}, {name}": (SHAPES, layout, where, door)
    for name, (where, layout) in LAYOUTS.items()
    for door in ("set", "argument", "explicit", "shard_map")
    if door != "argument" or name == "last"
}
CASES |= {
    "unchecked": (SHAPES, last("fsdp"), ONE, "unchecked"),
    "three devices": (SHAPES, replicated, ((3,), ("fsdp",)), "set"),
}
for door in ("set", "shard_map"):
    CASES |= {
        f"{door}, layers, layers": (FEW, lambda s: P("fsdp"), ONE, door),
        f"{door}, layers, inside": (
            LAYERS,
            lambda s: P(None, None, "fsdp") if s[2:] else P(),
            ONE,
            door,
        ),
        f"{door}, layers, replicated": (LAYERS, replicated, ONE, door),
    }
# What is sent in a `shard_map`, from and to the slots: matrices and nothing else.
SENT = {
    # One exchange there and one back for each of five shapes.
    "shard_map, last": {"all-to-all": 10},
    "unchecked": {"all-to-all": 10},
    # (8, 24) and its transpose are sharded along another axis of the same matrix.
    "shard_map, replicated": {"all-reduce": 1},
    "shard_map, layers, inside": {"all-to-all": 4},
    "shard_map, layers, replicated": {"all-reduce": 1},
    **{f"{door}, layers, layers": {} for door in ("set", "shard_map")},
}
QUICK = ("set, last", "argument, last", "explicit, last", "shard_map, first")
QUICK += ("set, replicated", "shard_map, one each", "three devices")
QUICK += ("set, layers, layers", "shard_map, layers, inside")
assert len(CASES) == 27 and CASES.keys() >= SENT.keys()


def conditioned(shapes, seed=0):
    """Gradients of which no square one has a small singular value."""
    found = gradients(shapes, seed)
    for name, x in found.items():
        if name[0] == "c":
            u, _, vh = np.linalg.svd(x)
            found[name] = u * np.linspace(2, 1, 16) @ vh
    return found


def compare(shapes, layout, mesh, names, door):
    """How far three steps are from those of one device; and what one of them sends."""

    def matrix(path, leaf):
        if shapes is SHAPES:
            return matrices.last_axis(path, leaf)
        return Matrix((1,), (2,), (0,)) if len(leaf.shape) > 2 else None

    # By this ε rounding is not magnified where an element is small by accident.
    options = {"eps": 0.01, "matrices": matrix, "b1": 0.5}
    options |= {"max_side": 16 if shapes is SHAPES else 8}
    steps = [conditioned(shapes, seed) for seed in range(3)]
    specs = {name: layout(shape) for name, shape in shapes.items()}
    put = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    placed = [jax.device_put(g, put) for g in steps]
    if door in ("shard_map", "unchecked"):
        tx = scale_by_soap(axis_name=names, **options)
        state = tx.init(placed[0])
        where = matrices.state_specs(state, placed[0], specs, names)
        there = jax.tree.map(lambda spec: NamedSharding(mesh, spec), where)
        state, specs = jax.device_put(state, there), (specs, where)
        update = jax.shard_map(
            tx.update,
            mesh=mesh,
            in_specs=specs,
            out_specs=specs,
            check_vma=door == "shard_map",
        )
        run = jax.jit(update).lower(placed[0], state).compile()
    elif door == "explicit":
        tx = scale_by_soap(**options)
        state = tx.init(placed[0])
        run = jax.jit(tx.update).lower(placed[0], state).compile()
    else:
        tx = scale_by_soap(mesh=mesh if door == "argument" else None, **options)
        here = contextlib.nullcontext() if door == "argument" else jax.set_mesh(mesh)
        with here:
            state = jax.jit(tx.init)(placed[0])
            out = put, jax.tree.map(lambda x: x.sharding, state)
            run = jax.jit(tx.update, out_shardings=out).lower(placed[0], state)
            run = run.compile()
    kept = [x for x in jax.tree.leaves(state) if x.ndim > 3]
    plain, worst = scale_by_soap(**options), 0.0
    expected, alone = plain.init(steps[0]), jax.jit(plain.update)
    for g, here in zip(steps, placed, strict=True):
        wanted, expected = alone(g, expected)
        got, after = run(here, state)
        for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
            assert x.ndim < 4 or x.sharding.is_equivalent_to(y.sharding, x.ndim)
        worst, state = max(worst, difference(got, wanted)), after
    return worst, compiled.read(run).counts(), kept


@pytest.mark.parametrize("case", rest_long(CASES, QUICK))
def test_numbers_are_those_of_one_device_and_what_is_sent(case):
    shapes, layout, (sizes, names), door = CASES[case]
    kind = AxisType.Explicit if door == "explicit" else AxisType.Auto
    mesh = make_mesh(sizes, names, kind)
    apart, sent, kept = compare(shapes, layout, mesh, names, door)
    assert apart < 1e-12
    assert case not in SENT or sent == SENT[case]
    # Each device has its own part of what is kept, but for a few that are split.
    spread = [x for x in kept if x.shape[1] > 1]
    assert spread and all(x.shape[1] == mesh.size for x in spread)
    for x in spread:
        (shard, *_) = x.addressable_shards
        assert shard.data.shape[1] == 1
    whole = sum(x.nbytes for x in kept if x.shape[1] == 1)
    assert whole <= 0.1 * sum(x.nbytes for x in kept)


def test_nlcg_goes_over_it_on_a_mesh():
    mesh, layout = make_mesh((8,), ("fsdp",)), last("fsdp")
    params = gradients(SHAPES)
    put = {k: NamedSharding(mesh, layout(s)) for k, s in SHAPES.items()}
    soap = scale_by_soap(max_side=16, matrices=matrices.last_axis)
    tx = nlcg_optax.nlcg(0.05, preconditioner=soap)

    def step(params, state, loss):
        grads = jax.tree.map(lambda x: x + jax.numpy.sin(3 * x), params)
        updates, state = tx.update(grads, state, params, value=loss)
        return jax.tree.map(lambda x, u: x + u, params, updates), state

    def run(params):
        state = jax.jit(tx.init)(params)
        for i in range(4):
            params, state = jax.jit(step)(params, state, np.float64(1 / (1 + i)))
        return params, state

    expected, _ = run(params)
    with jax.set_mesh(mesh):
        got, state = run(jax.device_put(params, put))
    assert difference(got, jax.tree.map(np.asarray, expected)) < 1e-11
    nodes = [n for n in jax.tree.leaves(state, is_leaf=is_kept) if is_kept(n)]
    assert any(node.left.shape[1] == 8 for node in nodes)


def test_a_state_for_another_number_of_devices():
    params = gradients({"a": (8, 8), "b": (8, 8)})
    options = {"axis_name": "fsdp", "matrices": matrices.last_axis}
    tx = scale_by_soap(**options)
    with pytest.raises(ValueError, match="how many devices the axis 'fsdp' has"):
        tx.init(params)
    with jax.set_mesh(make_mesh((4,), ("fsdp",))):
        state = jax.tree.map(np.asarray, tx.init(params))
    specs = jax.tree.map(lambda _: P("fsdp"), params)
    where = matrices.state_specs(state, params, specs, "fsdp")
    update = jax.shard_map(
        tx.update,
        mesh=make_mesh((8,), ("fsdp",)),
        in_specs=(specs, jax.tree.map(lambda _: P(), where)),
        out_specs=(specs, where),
    )
    with pytest.raises(ValueError, match="planned for 4 devices.* have 8.*for_devices"):
        update(params, state)


def test_a_state_goes_on_without_its_mesh():
    """It then says nothing of where things are, and its numbers are the same."""
    params = conditioned(SHAPES)
    tx = scale_by_soap(eps=0.01, max_side=16, matrices=matrices.last_axis)
    with jax.set_mesh(make_mesh((8,), ("fsdp",))):
        state = jax.jit(tx.init)(params)
    got, _ = jax.jit(tx.update)(params, jax.tree.map(np.asarray, state))
    expected, _ = tx.update(params, tx.init(params))
    assert difference(got, jax.tree.map(np.asarray, expected)) < 1e-12


def test_init_on_a_part_of_a_matrix():
    tx = scale_by_soap(axis_name="fsdp", matrices=matrices.last_axis)
    init = jax.shard_map(
        tx.init, mesh=make_mesh(*ONE), in_specs=P("fsdp"), out_specs=P()
    )
    with pytest.raises(ValueError, match="outside of the `shard_map`"):
        init({"w": np.ones((8, 4))})

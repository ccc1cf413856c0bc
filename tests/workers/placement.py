"""Run by `test_placement.py` in a process with eight devices; not a test by itself.

Prints, as JSON, how far orthogonalization on eight devices is from that on one, how the
work was placed, and what the compiled programs send and compute.
"""

import functools
import json
import math

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")

import compiled  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import AxisType, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402
from jax.tree_util import DictKey  # noqa: E402

import nlcg_optax  # noqa: E402
from nlcg_optax import Matrix, matrices  # noqa: E402
from nlcg_optax.matrices import devices, plan  # noqa: E402
from nlcg_optax.matrices.matrix import mask  # noqa: E402

RNG = np.random.default_rng(0)
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


def gradients(shapes):
    return {name: RNG.normal(size=shape) for name, shape in shapes.items()}


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
    """How far a step on the devices is from one on one device; and the collectives."""
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
    program = compiled.read(compiled_run)
    return {"difference": difference(got, expected), "collectives": program.counts()}


def everything():
    one, two = make_mesh((8,), ("fsdp",)), make_mesh((2, 4), ("data", "fsdp"))
    found = {}

    def add(name, *args, **options):
        found[name] = compare(*args, **options)

    for door in ("set", "shard_map"):
        name = f"{door}, counted"
        add(name, SHAPES, last("fsdp"), one, door, through="fsdp")
    # Matrices as small as these are not worth a message, unless messages cost nothing.
    plan.OPERATIONS_PER_BYTE = plan.OPERATIONS_PER_COLLECTIVE = 0
    axes = ("data", "fsdp")
    layouts = {
        "first": (one, first("fsdp")),
        "last": (one, last("fsdp")),
        "replicated": (one, replicated),
        "one of two": (two, last("fsdp")),
        "both on one": (two, first(axes)),
        "one each": (two, both(*axes)),
    }
    for name, (mesh, layout) in layouts.items():
        through = mesh.axis_names
        for door in ("set", "argument", "explicit", "shard_map"):
            if door == "argument" and name != "last":
                continue
            if door == "explicit":
                sizes = tuple(mesh.shape.values())
                mesh = make_mesh(sizes, mesh.axis_names, AxisType.Explicit)
            add(f"{door}, {name}", SHAPES, layout, mesh, door, through=through)
    add("unchecked", SHAPES, last("fsdp"), one, "shard_map", False, through="fsdp")
    near = {"a": (30, 64), "b": (32, 80), "c": (32, 64)}
    add("nearly one side", near, last("fsdp"), one, "set")
    three = make_mesh((3,), ("fsdp",))
    add("three devices", SHAPES, replicated, three, "set")
    for door in ("set", "shard_map"):
        for name, layout in {
            "layers": lambda s: P("fsdp"),
            "inside": lambda s: P(None, "fsdp") if len(s) > 2 else P(),
            "replicated": replicated,
        }.items():
            shapes = dict(LAYERS)
            if name == "layers":
                del shapes["more"]  # three layers do not lie on eight devices
                del shapes["bias"]
            add(
                f"{door}, layers, {name}",
                shapes,
                layout,
                one,
                door,
                through="fsdp",
                batch_axes=1,
            )
        add(f"{door}, single", SINGLE, last("fsdp"), one, door, through="fsdp")
        add(f"{door}, none", NONE, replicated, one, door, through="fsdp")
    return found


def norms():
    """Another work: matrices over the mean of their norms, halved from step to step.

    These means are kept where the matrices are worked on.
    """

    def function(stacks, share, kept):
        squares = [jnp.sum(x**2, (-2, -1), keepdims=True) for x in stacks]
        found = jnp.sqrt(share.total(share.slots.add(jnp.add, squares)))
        mean = found if kept is None else share.exchange.stay(kept / 2 + found)
        safe = jnp.where(mean == 0, 1, mean)  # slots that no matrix is in
        return [x / share.slots.pick(safe, i) for i, x in enumerate(stacks)], mean

    def operations(small, long, stacked):
        return 0.0, 2.0 * small * long

    return plan.Work(function, operations, ("spread",))


def another_work(layout, mesh, door):
    """How far two steps of it are from NumPy's; the collectives of one."""
    shapes = {name: shape for name, shape in SHAPES.items() if shape[1:]}
    shapes["layers"] = LAYERS["layers"]
    batch = {"layers": (0,)}
    work, axis = norms(), "fsdp" if door == "shard_map" else None
    specs = {name: layout(shape) for name, shape in shapes.items()}
    grads = [gradients(shapes) for _ in range(2)]

    def masked(values):
        found = []
        for name, shape in shapes.items():
            axes, layers = tuple(range(len(shape))), len(batch.get(name, ()))
            matrix = Matrix(axes[layers:-1], axes[-1:], axes[:layers])
            found.append(((DictKey(name),), values[name], mask(matrix, shape)))
        return found

    def start(values):
        leaves, used, axes = devices.locate(masked(values), None, axis)
        made = []
        for share in plan.shares(leaves, work, used, axes):
            stacks = jax.eval_shape(share.scatter, leaves)
            assert share.how == "spread"
            made.append(jnp.zeros((share.slots.rows, *stacks[0].shape[1:3], 1, 1)))
        return made

    def step(values, kept):
        arrays, kept = devices.apply(work, masked(values), None, axis, kept)
        return dict(zip(shapes, arrays, strict=True)), kept

    slots = P(None, "fsdp")
    if door == "shard_map":
        both = {"mesh": mesh, "in_specs": (specs,), "out_specs": slots}
        start = jax.shard_map(start, **both)
        both = {"in_specs": (specs, slots), "out_specs": (specs, slots)}
        step = jax.shard_map(step, mesh=mesh, **both)
    put = jax.tree.map(lambda spec: NamedSharding(mesh, spec), (specs, slots))
    placed = [jax.device_put(g, put[0]) for g in grads]
    with jax.set_mesh(make_mesh((8,), ("fsdp",))):
        kept = jax.jit(start)(grads[0])
    with jax.set_mesh(mesh):
        kept = jax.device_put(kept, put[1])
        run = jax.jit(step, out_shardings=put).lower(placed[0], kept).compile()
        worst, mean = 0.0, dict.fromkeys(shapes, 0.0)
        for g, here in zip(grads, placed, strict=True):
            got, kept = run(here, kept)
            for name, x in g.items():
                count = len(batch.get(name, ()))
                square = np.sum(x**2, tuple(range(count, x.ndim)), keepdims=True)
                mean[name] = mean[name] / 2 + np.sqrt(square)
                worst = max(worst, difference(got[name], x / mean[name]))
        forgetful = jax.jit(step, out_shardings=put).lower(placed[0], None).compile()
    return {
        "difference": worst,
        "collectives": compiled.read(run).counts(),
        "without state": compiled.read(forgetful).counts(),
    }


def another():
    """That of each layout and door."""
    found = {}
    for name, layout in {"last": last("fsdp"), "replicated": replicated}.items():
        for door in ("set", "explicit", "shard_map"):
            kind = AxisType.Explicit if door == "explicit" else AxisType.Auto
            mesh = make_mesh((8,), ("fsdp",), kind)
            found[f"{door}, {name}"] = another_work(layout, mesh, door)
    return found


def whole_optimizer():
    """How far some steps of `nlcg` over sharded parameters are from one device's."""
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
    return difference(got, jax.tree.map(np.asarray, expected))


def refused():
    """What is said of a parameter on a device that the mesh does not have."""
    mesh = make_mesh((2,), ("fsdp",))
    tx = nlcg_optax.scale_by_orthogonalization(mesh=mesh)
    elsewhere = jax.device_put(np.ones((4, 6)), jax.devices()[5])
    try:
        tx.init({"layer": {"w": elsewhere}})
    except ValueError as error:
        return str(error)


if __name__ == "__main__":
    found = {"cases": everything(), "another": another()}
    found |= {"nlcg": whole_optimizer(), "refused": refused()}
    print(json.dumps(found, indent=1))

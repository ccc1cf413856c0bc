"""Run by `test_quadratic_model.py` in a process with eight devices; no test by itself.

Prints, as JSON, how far each way to run the step on several devices is from one device,
and what the compiled steps communicate.
"""

import functools
import json
import pathlib
import sys

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

import compiled  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.sharding import AxisType, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import nlcg_optax  # noqa: E402

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
        }

    return run, step


def make(residuals=1, axis=None):
    return nlcg_optax.scale_by_quadratic_model(
        optax.scale_by_rms(), history=2, residuals=residuals, axis_name=axis
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


def numbers(more=False):
    ways = {
        "jit, replicated": lambda *args: by_jit(*args, REPLICATED),
        "jit, sharded": lambda *args: by_jit(*args, SHARDED),
        "shard_map, replicated": lambda *args: by_shard_map(*args, REPLICATED),
        "shard_map, sharded": lambda *args: by_shard_map(*args, SHARDED),
        "pmap, replicated": by_pmap,
        "microbatches": by_microbatches,
    }
    others = {
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
    few = {name: ways[name] for name in ("jit, sharded", "shard_map, sharded")}
    few["pmap, replicated"] = by_pmap
    cases = [("gauss_newton", 1, ways)]
    if more:
        cases = [("gauss_newton", 1, others), ("hessian", 1, few)]
    return {
        f"{kind}, {name}": difference(way(kind, residuals), expected(kind, residuals))
        for kind, residuals, some in cases
        for name, way in some.items()
    }


def lost_mean():
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
    try:
        jax.jit(run)(PARAMS, BATCH)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def communication():
    """Collectives of one step: their kinds, and how many numbers each carries."""
    mesh = make_mesh((8,), ("data",))
    rows = {"x": P("data"), "y": P("data")}
    found = {}
    for residuals in (None, 0, 1):
        tx = make(residuals or 0)
        state = jax.eval_shape(tx.init, PARAMS)
        if residuals is None:

            def step(params, state, batch, axis=None):
                def loss_fn(params):
                    logits = model(params, batch["x"])
                    return cross_entropy(logits, batch) + penalty(params)

                if axis is None:
                    loss, grads = jax.value_and_grad(loss_fn)(params)
                else:
                    loss, grads = nlcg_optax.pmean_value_and_grad(loss_fn, axis)(params)
                return grads, state, loss

            doors = {"jit": step, "shard_map": functools.partial(step, axis="data")}
        else:
            doors = {
                "jit": training(tx, "gauss_newton")[1],
                "shard_map": training(tx, "gauss_newton", axis="data")[1],
            }
        for door, step in doors.items():
            if door == "shard_map":
                step = jax.shard_map(
                    step, mesh=mesh, in_specs=(P(), P(), rows), out_specs=P()
                )
            arguments = (PARAMS, state, BATCH)
            placed = jax.tree.map(
                lambda x, spec: jax.ShapeDtypeStruct(
                    np.shape(x), x.dtype, sharding=NamedSharding(mesh, spec)
                ),
                arguments,
                (REPLICATED, jax.tree.map(lambda _: P(), state), rows),
            )
            program = compiled.read(jax.jit(step).lower(*placed).compile())
            found[f"{door}, {residuals}"] = sorted(
                (c.kind, c.elements) for c in program.collectives
            )
    return found


def main():
    if sys.argv[1:] == ["more"]:
        found = {"numbers": numbers(more=True)}
    else:
        parts = (numbers, lost_mean, communication)
        found = {part.__name__: part() for part in parts}
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""What work on matrices costs: on one device in time, on many by the program.

    python benchmarks/matrices/run.py --devices=8     # compiled, not run
    taskset -c 1 python benchmarks/matrices/run.py --times
    python benchmarks/matrices/run.py --device        # on a GPU

`--devices` compiles the optimizer's step (update and apply, donated) for so many forced
CPU devices, parameters of two and more axes split along their longest axis that the
devices divide, and reads operations, collectives and temporary memory off the program.
`--times` runs the step on the CPU, all optimizers in turn; SOAP's as after the first
ones, and with `every=10` the mean of ten, one of which renews the bases. `--device`
runs the update on the accelerator in each precision: milliseconds, and of
orthogonalization operations a second and the error to the exact polar factor of a
matrix with singular values from 1 to 0.01.

    python benchmarks/matrices/run.py --report        # results/tables.md

Every case is a line of `results/<part>.jsonl`, in place of what was there of it.
"""

import argparse
import json
import math
import os
import pathlib
import platform
import statistics
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "large_batch")]

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--devices", type=int, help="compile for so many")
parser.add_argument("--times", action="store_true")
parser.add_argument("--device", action="store_true")
parser.add_argument("--report", action="store_true", help="tables of all rows")
parser.add_argument("--trees", nargs="*", default=["resnet50", "gpt_124m"])
parser.add_argument("--optimizers", nargs="*", default=["adamw", "nlcg", "muon"])
parser.add_argument("--replicated", action="store_true", help="parameters not split")
parser.add_argument("--layers", type=int, help="of a GPT, in place of its own")
parser.add_argument("--rounds", type=int, default=5)
if __name__ == "__main__":
    args = parser.parse_args()
    if args.devices:  # before JAX starts
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 "
            f"--xla_force_host_platform_device_count={args.devices}"
        )

import compiled  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import peers  # noqa: E402
from jax.sharding import AxisType, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import nlcg_optax  # noqa: E402
from nlcg_optax.matrices import newton_schulz  # noqa: E402
from nlcg_optax.matrices.matrix import is_kept  # noqa: E402
from nlcg_optax.preconditioners.soap import Factors, SoapState  # noqa: E402
from nlcg_optax.training import models  # noqa: E402


def soap(**options):
    """With embeddings, as for orthogonalization."""
    return nlcg_optax.scale_by_soap(matrices=nlcg_optax.matrices.last_axis, **options)


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-4),
    # Embeddings too, which by default are no matrices.
    "nlcg": lambda: nlcg_optax.nlcg(
        1e-4,
        preconditioner=nlcg_optax.scale_by_orthogonalization(
            matrices=nlcg_optax.matrices.last_axis
        ),
    ),
    "nlcg, four steps": lambda: nlcg_optax.nlcg(
        1e-4,
        preconditioner=nlcg_optax.scale_by_orthogonalization(
            iterations=4,
            coefficients="polar_express",
            matrices=nlcg_optax.matrices.last_axis,
        ),
    ),
    "soap": lambda: nlcg_optax.nlcg(1e-4, preconditioner=soap()),
    "soap, every 10": lambda: nlcg_optax.nlcg(1e-4, preconditioner=soap(every=10)),
    "published soap": lambda: peers.soap(1e-4),
    "muon": lambda: optax.contrib.muon(
        1e-4, muon_weight_dimension_numbers=models.muon_matrices
    ),
}


def gpt(layers, width, vocabulary):
    block = {
        "qkv": (width, 3 * width),
        "out": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
        "norm": (width,),
    }
    return {
        "embedding": (vocabulary, width),
        **{f"block{i:02}": block for i in range(layers)},
    }


def resnet50(layers=None):
    del layers
    model = models.create_model("resnet50", 1000)
    variables = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)), train=False)
    )
    return jax.tree.map(lambda x: x.shape, variables["params"])


TREES = {
    "resnet50": resnet50,
    "gpt_64m": lambda layers: gpt(layers or 8, 768, 8192),
    "gpt_124m": lambda layers: gpt(layers or 12, 768, 50304),
    "gpt_1.3b": lambda layers: gpt(layers or 24, 2048, 50304),
    "tiny": lambda layers: gpt(layers or 1, 32, 64),
}


def shaped(function, tree):
    return jax.tree.map(function, tree, is_leaf=lambda x: isinstance(x, tuple))


def make_step(name):
    tx = optax.with_extra_args_support(OPTIMIZERS[name]())

    def step(params, state, grads, value):
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    return tx, step


def read_program(tree, name, devices):
    """A row of what the program for so many devices does, without running it."""
    mesh = jax.make_mesh((devices,), ("fsdp",), (AxisType.Auto,))

    def spec(shape):
        fits = [i for i, n in enumerate(shape) if n % devices == 0]
        if args.replicated or len(shape) < 2 or not fits:
            return P()
        axis = max(fits, key=lambda i: shape[i])
        return P(*[None] * axis, "fsdp")

    def place(x, where):
        where = NamedSharding(mesh, where)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    shapes = TREES[tree](args.layers)
    specs = shaped(spec, shapes)
    params = shaped(
        lambda s: place(jax.ShapeDtypeStruct(s, jnp.float32), spec(s)), shapes
    )
    tx, step = make_step(name)
    with jax.set_mesh(mesh):
        state = jax.eval_shape(tx.init, params)
        where = nlcg_optax.matrices.state_specs(state, params, specs, "fsdp")
        state = jax.tree.map(place, state, where)
        out = jax.tree.map(lambda x: x.sharding, (params, state))
        start = time.monotonic()
        jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=out)
        value = jax.ShapeDtypeStruct((), jnp.float32)
        program = compiled.read(jitted.lower(params, state, params, value).compile())
    return {
        "tree": tree,
        "layers": args.layers,
        "optimizer": name,
        "devices": devices,
        "split": not args.replicated,
        "gflop": program.product_flops / 1e9,
        "collectives": program.counts(),
        "result_mb": program.total().bytes / 1e6,
        "temporary_mb": program.temporary_bytes / 1e6,
        "state_mb": sum(
            x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))
            for x in jax.tree.leaves(state)
        )
        / 1e6,
        "compile_seconds": time.monotonic() - start,
    }


def settled(state, count):
    """A state of SOAP as after so many steps, without making them."""

    def follow(basis):
        if basis is None:
            return None
        identity = jnp.eye(basis.shape[-1], dtype=basis.dtype)
        return jnp.broadcast_to(identity, basis.shape)

    def one(node):
        if isinstance(node, SoapState):
            inner = jax.tree.map(one, node.factors, is_leaf=is_kept)
            return node._replace(count=jnp.int32(count), factors=inner)
        if not is_kept(node):
            return node
        return node._replace(
            left_basis=follow(node.left_basis),
            right_basis=follow(node.right_basis),
            seen=jnp.ones_like(node.seen),
        )

    known = SoapState, Factors
    return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, known))


def steps_of(name):
    """Counts to take a step at, and how often each of them occurs."""
    # With `every` the bases are renewed in the tenth step alone, once there were ten.
    return {10: 1, 11: 9} if name == "soap, every 10" else {10: 1}


def measure(tree, names):
    """Rows of the times of a step on this machine, in turn."""
    rng = np.random.default_rng(0)
    shapes = TREES[tree](args.layers)

    def random():
        return shaped(
            lambda s: jnp.asarray(1e-3 * rng.standard_normal(s, np.float32)), shapes
        )

    grads, value, subjects = random(), jnp.float32(1.0), {}
    for name in names:
        tx, step = make_step(name)
        params = random()
        state = tx.init(params)
        start = time.monotonic()
        run = jax.jit(step, donate_argnums=(0, 1))
        run = run.lower(params, state, grads, value).compile()
        subjects[name] = [run, params, state, time.monotonic() - start, []]
    for _ in range(args.rounds + 1):  # the first one is not counted, if there are two
        for name, subject in subjects.items():
            run, params, state, _, seconds = subject
            mean = 0.0
            for count, times in steps_of(name).items():
                state = settled(state, count)
                jax.block_until_ready(state)
                start = time.perf_counter()
                params, state = jax.block_until_ready(run(params, state, grads, value))
                mean += times * (time.perf_counter() - start)
            subject[1:3] = params, state
            seconds.append(mean / sum(steps_of(name).values()))
    for name, (*_, compile_seconds, seconds) in subjects.items():
        yield {
            "tree": tree,
            "layers": args.layers,
            "optimizer": name,
            "milliseconds": 1e3 * statistics.median(seconds[1:] or seconds),
            "compile_seconds": compile_seconds,
            "rounds": args.rounds,
        }


def operations(function, *arguments):
    """Of the products, by the program for a CPU: a GPU has calls of a library there."""
    cpu = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cpu), arguments
    )
    options = {"xla_backend_optimization_level": 0}
    lowered = jax.jit(function, compiler_options=options).lower(*abstract)
    return compiled.read(lowered.compile()).product_flops


def seconds_of(function, *arguments):
    """The median over the rounds, the first of which is not counted."""
    seconds = []
    for _ in range(args.rounds + 1):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def fastest(precision, size):
    """Operations a second of one large product, in this precision."""
    dtype = jnp.float32 if precision == "highest" else precision
    x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)

    @jax.jit
    def product(x):
        return jnp.matmul(x, x, precision="highest")

    return 2 * size**3 / seconds_of(product, x)


def on_device(tree):
    """Rows of the update alone in each precision, and its error."""
    rng = np.random.default_rng(0)
    shapes = TREES[tree](args.layers)
    grads = shaped(lambda s: jnp.asarray(rng.standard_normal(s, np.float32)), shapes)
    size = min(1024, max(x.shape[-1] for x in jax.tree.leaves(grads)))
    u, _, vh = np.linalg.svd(rng.standard_normal((size, size)), full_matrices=False)
    matrix = jnp.asarray(u * np.geomspace(1, 1e-2, size) @ vh, jnp.float32)
    for precision in ("highest", *newton_schulz.HALF):
        basis = soap(precision=precision)
        state = jax.jit(basis.init)(grads)
        seconds = seconds_of(jax.jit(basis.update), grads, state)
        yield {
            "tree": tree,
            "optimizer": "soap",
            "precision": precision,
            "milliseconds": 1e3 * seconds,
        }
        tx = nlcg_optax.scale_by_orthogonalization(precision=precision)
        state = tx.init(grads)
        seconds = seconds_of(jax.jit(tx.update), grads, state)
        rate = operations(tx.update, grads, state) / seconds
        method = newton_schulz.Method.of("muon", 5, precision)
        (factor,) = newton_schulz.polar_factors([matrix], method)
        yield {
            "tree": tree,
            "precision": precision,
            "milliseconds": 1e3 * seconds,
            "tflop_a_second": rate / 1e12,
            "share_of_one_product": rate / fastest(precision, 8 * size),
            "error": float(np.linalg.norm(factor - u @ vh) / size**0.5),
        }


def write(part, rows):
    path = HERE / "results" / f"{part}.jsonl"
    path.parent.mkdir(exist_ok=True)
    same = ("tree", "layers", "optimizer", "devices", "split", "precision", "platform")
    for row in rows:
        row |= {"jax": jax.__version__, "optax": optax.__version__}
        row |= {"platform": jax.default_backend(), "machine": platform.machine()}
        row["device_kind"] = jax.devices()[0].device_kind
        key = [row.get(field) for field in same]
        kept = [x for x in read(part) if [x.get(field) for field in same] != key]
        path.write_text("".join(json.dumps(x) + "\n" for x in [*kept, row]))
        print(json.dumps(row), flush=True)


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def read(part):
    path = HERE / "results" / f"{part}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def report():
    """Writes the tables of all rows that are there."""
    head = ["tree", "devices", "parameters", "optimizer", "GFLOP", "collectives"]
    head += ["MB of their results", "MB of temporaries", "MB of state"]
    programs = [
        [
            row["tree"],
            row["devices"],
            "split" if row["split"] else "replicated",
            f"`{row['optimizer']}`",
            f"{row['gflop']:,.1f}",
            ", ".join(f"{n} {kind}" for kind, n in sorted(row["collectives"].items())),
            f"{row['result_mb']:,.0f}",
            f"{row['temporary_mb']:,.0f}",
            f"{row['state_mb']:,.0f}" if "state_mb" in row else "–",
        ]
        for row in sorted(
            read("programs"), key=lambda r: (r["tree"], r["devices"], -r["split"])
        )
        if row["layers"] is None
    ]
    times = [
        [
            row["device_kind"],
            row["tree"],
            row["layers"] or "all",
            f"`{row['optimizer']}`",
            f"{row['milliseconds']:,.0f}",
            f"{row['compile_seconds']:.1f}" if row["compile_seconds"] else "–",
        ]
        for row in read("times")
    ]
    named = ["device", "tree", "layers", "optimizer", "ms a step", "s to compile"]
    precisions = [
        [
            row["device_kind"],
            row["tree"],
            row.get("optimizer", "orthogonalization"),
            row["precision"],
            f"{row['milliseconds']:.1f}",
            *(
                format(row[key], how) if key in row else "–"
                for key, how in (
                    ("tflop_a_second", ".0f"),
                    ("share_of_one_product", ".0%"),
                    ("error", ".4f"),
                )
            ),
        ]
        for row in read("device")
    ]
    columns = [
        "device",
        "tree",
        "preconditioner",
        "precision",
        "ms",
        "TFLOP/s",
        "of one product",
        "error",
    ]
    text = "# Of each device, by the compiled program\n\n" + table(head, programs)
    text += "\n# Times, medians\n\n" + table(named, times)
    text += "\n# The preconditioner alone, by precision\n\n" + table(
        columns, precisions
    )
    (HERE / "results" / "tables.md").write_text(text)
    print(text)


def main():
    if args.report:
        return report()
    for tree in args.trees:
        if args.devices:
            rows = (read_program(tree, name, args.devices) for name in args.optimizers)
            write("programs", rows)
        if args.times:
            write("times", measure(tree, args.optimizers))
        if args.device:
            write("device", on_device(tree))
            write("times", measure(tree, args.optimizers))


if __name__ == "__main__":
    main()

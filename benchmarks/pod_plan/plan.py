"""The ResNet-50 step at batch 65,536 on 256 devices, planned on one CPU.

    python benchmarks/pod_plan/plan.py            # all, 10 to 30 minutes on a core
    python benchmarks/pod_plan/plan.py --roofline # step times that follow from them

The real training step is compiled for a mesh of forced host devices with abstract
arrays: nothing is allocated, nothing runs. Every case is a line of
`results/rows.jsonl`; what is there already is not compiled again. `results/tables.md`
has the tables, `results/roofline.md` the step times. With `--one` a single config is
compiled and its line printed.

What is read off the compiled program, per device and step:

* memory, from `memory_analysis()`, and as a check what autodiff keeps for the backward
  pass (arrays with an axis of images), which no compiler has had a hand in;
* FLOPs and bytes accessed, from `cost_analysis()`. XLA counts the body of a loop once:
  they are multiplied by the microbatches, where these are worked through in a loop;
* collectives, from the text of the program, those in a loop times its trip count; bytes
  on the wire as a ring moves them.

A program compiled for CPUs is not the one for a TPU or GPU: XLA computes bfloat16
convolutions in float32 on CPUs, so that activations take up to twice the memory and
gradients twice the wire; layouts, padding and fusion differ; and CPUs get an all-reduce
and a slice where others get a reduce-scatter. LLVM's optimization is off, which leaves
all of these figures as they are (compared on ResNet-8: to the byte).
"""

import argparse
import collections
import datetime
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT, RESULTS = HERE.parents[1], HERE / "results"
sys.path.insert(0, str(HERE.parent))
import compiled  # noqa: E402

CONFIG = ROOT / "configs" / "imagenet_resnet50.py"
IMAGES = 1_281_167  # in ImageNet's training split
GB = 1e9

POD, NODE = 256, 8
MOMENTUM = ["optimizer.name=momentum"]
CURVATURE = [
    "optimizer.name=nlcg_auto",
    "optimizer.learning_rate=none",
    "schedule.name=none",
]
SOAP = ["optimizer.name=nlcg", "optimizer.nlcg.preconditioner=soap"]
SHARDED = ["mesh.fsdp=256"]
EXACT = ["batch_norm_statistics=batch"]
CASES = {
    # name: devices and overrides of the config
    "replicated": (POD, []),
    "replicated, momentum": (POD, MOMENTUM),
    "replicated, SOAP's basis": (POD, SOAP),
    "replicated, by curvature": (POD, CURVATURE),
    "fsdp 256": (POD, SHARDED),
    "fsdp 256, momentum": (POD, SHARDED + MOMENTUM),
    "4 microbatches": (POD, ["microbatches=4"]),
    "4 microbatches, the batch's statistics": (POD, ["microbatches=4", *EXACT]),
    "8 devices, 32 microbatches": (NODE, ["microbatches=32"]),
    "8 devices, the batch's statistics": (NODE, ["microbatches=32", *EXACT]),
    "8 devices, 1 microbatch": (NODE, []),
}


# ---- Reading a compiled program ------------------------------------------------------


def read_collectives(program: compiled.Program) -> list[dict]:
    """The collectives that a step executes, added up by kind, group and loop."""
    alike: dict[tuple, list[compiled.Collective]] = collections.defaultdict(list)
    for collective in program.collectives:
        if collective.group > 1:
            alike[collective.kind, collective.group, collective.times].append(
                collective
            )
    totals = {key: compiled.add_up(alike[key], executed=True) for key in alike}
    return [
        {
            "kind": kind,
            "group": group,
            "in_loop_of": times,
            "count": total.count,
            "bytes": total.whole_bytes,
            "wire_bytes": total.ring_bytes,
        }
        for (kind, group, times), total in sorted(totals.items())
    ]


# ---- One case ------------------------------------------------------------------------


def compile_one(args: argparse.Namespace, overrides: list[str]) -> dict:
    flag = f"--xla_force_host_platform_device_count={args.devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    os.environ["JAX_PLATFORMS"] = "cpu"

    import jax
    import jax.numpy as jnp
    import jaxlib
    import optax

    from nlcg_optax.training import loop, models, optimizers, steps
    from nlcg_optax.training.config import apply_overrides, load_config, typed
    from nlcg_optax.training.mesh import BatchLayout, create_mesh

    start = time.monotonic()
    config = load_config(args.config)
    apply_overrides(config, overrides)
    config = typed(config)
    parts = config.microbatches
    at_once = config.at_once
    mesh = create_mesh(config.mesh)
    remat = parts > 1 and at_once
    model = loop.create_model(config.model, args.classes, remat)
    schedule = optimizers.create_schedule(config, IMAGES / config.batch_size)
    tx = optimizers.create_optimizer(config, schedule, models.l2_mask)
    state = steps.abstract_state(model, tx, config, args.image_shape, mesh)
    layout = BatchLayout(mesh, config.batch_size, parts)

    def rows(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            (parts, layout.rows, *shape), dtype, sharding=layout.sharding
        )

    batch = {"image": rows(args.image_shape, "uint8"), "label": rows((), "int32")}
    augment = config.dataset.image_size is None
    step = steps.make_train_step(model, tx, schedule, config, mesh, augment=augment)
    executable = (
        jax.jit(step, donate_argnums=0)
        .lower(state, batch)
        .compile(compiler_options={"xla_backend_optimization_level": 0})
    )
    program = compiled.read(executable)
    if args.hlo:
        pathlib.Path(args.hlo).write_text(executable.as_text())

    # What autodiff keeps of the images that one device works on at a time.
    images = layout.rows // mesh.size * (parts if at_once else 1)

    def backward(params, batch_stats, x):
        def logits(params):
            variables = {"params": params, "batch_stats": batch_stats}
            return model.apply(variables, x, train=True, mutable=["batch_stats"])[0]

        return jax.vjp(logits, params)[1]

    x = jax.ShapeDtypeStruct((images, *args.image_shape), jnp.float32)
    kept = jax.tree.leaves(jax.eval_shape(backward, state.params, state.batch_stats, x))
    kept_bytes = sum(
        leaf.size * leaf.dtype.itemsize
        for leaf in kept
        if leaf.ndim and leaf.shape[0] == images
    )

    collectives = read_collectives(program)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    loops = 1 if at_once else parts
    return {
        "overrides": overrides,
        "model": config.model.name,
        "dtype": config.model.dtype,
        "optimizer": config.optimizer.name,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "batch_size": config.batch_size,
        "microbatches": parts,
        "batch_norm_statistics": config.batch_norm_statistics,
        "images_per_device_at_a_time": images,
        "parameters": parameters,
        "parameter_bytes": 4 * parameters,
        "state_bytes_whole": state_bytes,
        "memory": {
            "arguments": program.argument_bytes,
            "outputs": program.output_bytes,
            "aliased": program.aliased_bytes,
            "temporaries": program.temporary_bytes,
            # `peak_memory_in_bytes` leaves out the temporaries on CPUs.
            "all": program.memory_bytes,
        },
        "kept_by_autodiff": kept_bytes,
        "flops": program.flops * loops,
        "bytes_accessed": program.bytes_accessed * loops,
        "collectives": collectives,
        "wire_bytes": sum(c["wire_bytes"] for c in collectives),
        "seconds": round(time.monotonic() - start, 1),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "optax": optax.__version__,
        "host": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "date": datetime.date.today().isoformat(),
    }


def run_cases(names: list[str]) -> list[dict]:
    """Compiles what is not in `rows.jsonl`; each case in a process of its own."""
    path = RESULTS / "rows.jsonl"
    done = (
        {row["case"]: row for row in map(json.loads, path.read_text().splitlines())}
        if path.exists()
        else {}
    )
    for name in names:
        devices, overrides = CASES[name]
        if name in done:
            continue
        command = [sys.executable, __file__, "--one", f"--devices={devices}"]
        command += [f"--config.{override}" for override in overrides]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            )
        }
        result = subprocess.run(
            command, capture_output=True, text=True, env=environment
        )
        if result.returncode:
            raise SystemExit(f"{name}: failed\n{result.stderr}")
        row = {"case": name, **json.loads(result.stdout)}
        # The partitioner says on stderr where it copies an array whole to every device.
        row["full_rematerializations"] = result.stderr.count(
            "Involuntary full rematerialization"
        )
        done[name] = row
        with path.open("a") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(f"{name}: {row['seconds']} s", file=sys.stderr)
    return [done[name] for name in CASES if name in done]


# ---- Tables --------------------------------------------------------------------------


def describe(collectives: list[dict]) -> str:
    parts = [
        f"{c['count']:,} {c['kind']}, {c['bytes'] / 1e6:,.1f} MB"
        + (" (in a loop)" if c["in_loop_of"] > 1 else "")
        for c in collectives
    ]
    return "; ".join(parts) or "none"


def tables(rows: list[dict]) -> str:
    header = (
        "| case | images at a time | arrays of the state | arguments | aliased "
        "| temporaries | all | autodiff keeps | TFLOP | analytic TFLOP | wire, MB |"
    )
    lines = [
        "Per device and step; memory in GB (10⁹ bytes). The analytic count is 3 × 2 × "
        "4.1·10⁹ FLOP an image: 4.1·10⁹ multiply-adds forward, twice as many backward. "
        "Arrays of the state: its size over that of the parameters, which are one.",
        "",
        header,
        "|---" * 11 + "|",
    ]
    for row in rows:
        memory = row["memory"]
        analytic = 3 * 2 * 4.1e9 * row["batch_size"] / row["devices"]
        cells = [
            row["case"],
            f"{row['images_per_device_at_a_time']:,}",
            f"{row['state_bytes_whole'] / row['parameter_bytes']:.1f}",
            *(
                f"{memory[key] / GB:.2f}"
                for key in ("arguments", "aliased", "temporaries", "all")
            ),
            f"{row['kept_by_autodiff'] / GB:.2f}",
            f"{row['flops'] / 1e12:.2f}",
            f"{analytic / 1e12:.2f}",
            f"{row['wire_bytes'] / 1e6:,.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Collectives executed in a step, with the bytes of the arrays they work on:",
        "",
        "| case | collectives | copied whole by the partitioner |",
        "|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['case']} | {describe(row['collectives'])} "
            f"| {row['full_rematerializations']} |"
        )
    row = rows[-1]
    lines += [
        "",
        f"`python benchmarks/pod_plan/plan.py`; {row['date']}, {row['host']}, Python "
        f"{row['python']}, jax {row['jax']}, jaxlib {row['jaxlib']}, optax "
        f"{row['optax']}; compiled for CPU devices in "
        f"{sum(r['seconds'] for r in rows) / 60:.0f} minutes in all.",
    ]
    return "\n".join(lines) + "\n"


# ---- Roofline ------------------------------------------------------------------------

# Assumed to be reached of what the makers document; and the time of an all-reduce of a
# few numbers over the pod.
COMPUTE, HBM, LINK, SMALL_ALL_REDUCE = 0.4, 0.8, 0.7, 20e-6
# Peak bfloat16 FLOP/s (dense), HBM bytes and bytes/s, bytes/s that a device can send to
# its neighbours, and, where 8 devices make a node, to other nodes.
CHIPS = {
    "TPU v5p": (459e12, 95e9, 2765e9, 600e9, None),
    "TPU v6e": (918e12, 32e9, 1638e9, 400e9, None),
    "8 × H100, NDR 400 Gb/s each": (989e12, 80e9, 3350e9, 450e9, 50e9),
    "8 × H100, 100 Gb/s for all": (989e12, 80e9, 3350e9, 450e9, 100e9 / 8 / 8),
}

# Parameter-sized arrays read and written, each pass fused. NLCG needs sums over all
# parameters twice, the second after the first, so three passes: the curvature (the
# diagonal, parameters, gradient and the last two of those), the products with the
# direction (the same and the last direction), the update (the same, the step rule's
# direction and the average; all but the gradient written).
PASSES = {"nlcg": 5 + 6 + 8 + 7, "momentum": 1 + 4 + 3}


def all_reduce_seconds(chip: str, size: float, devices: int) -> float:
    """A ring over all; with nodes: scatter within, reduce across, gather within."""
    _, _, _, near, far = CHIPS[chip]
    if far is None:
        return compiled.ring_bytes("all-reduce", size, devices) / (LINK * near)
    within = compiled.ring_bytes("all-reduce", size, NODE) / (LINK * near)
    across = compiled.ring_bytes("all-reduce", size / NODE, devices // NODE)
    return within + across / (LINK * far)


def roofline(rows: list[dict]) -> str:
    row = next(row for row in rows if row["case"] == "replicated")
    devices, size = row["devices"], row["parameter_bytes"]
    flops = row["flops"] * devices / row["batch_size"]
    kept = row["kept_by_autodiff"] / row["images_per_device_at_a_time"]
    small = sum(c["count"] for c in row["collectives"])
    optimizers = {name: passes * size for name, passes in PASSES.items()}
    lines = [
        f"ResNet-50, {devices} devices, replicated: {flops / 1e9:.1f} GFLOP an image "
        f"(compiled), {size / 1e6:.1f} MB of float32 gradient, {small} all-reduces "
        "(BatchNorm's statistics, and the gradient's arrays joined to them). Assumed: "
        f"{COMPUTE:.0%} of the peak FLOP/s, {HBM:.0%} of the HBM's and {LINK:.0%} of "
        f"the links' bandwidth, {SMALL_ALL_REDUCE * 1e6:.0f} µs for an all-reduce of "
        "few numbers, two thirds of the time backward.",
        "",
        "Milliseconds at 256 images a device (batch 65,536), and the least batch with "
        "which the backward pass is as long as the gradient's all-reduce:",
        "",
        "| | compute | activations, HBM | NLCG, HBM | momentum, HBM "
        "| gradient all-reduce | BatchNorm's all-reduces | images a device | batch |",
        "|---" * 9 + "|",
    ]
    for chip, (peak, _, bandwidth, _, _) in CHIPS.items():
        image = flops / (COMPUTE * peak)
        reduce = all_reduce_seconds(chip, size, devices)
        least = math.ceil(reduce / (2 / 3 * image))
        cells = [
            256 * image,
            256 * 2 * kept / (HBM * bandwidth),
            optimizers["nlcg"] / (HBM * bandwidth),
            optimizers["momentum"] / (HBM * bandwidth),
            reduce,
            small * SMALL_ALL_REDUCE,
        ]
        lines.append(
            f"| {chip} | {' | '.join(f'{1e3 * x:.2f}' for x in cells)} | {least:,} "
            f"| {devices * least:,} |"
        )
    lines += [
        "",
        "Share of a step's time in which the devices compute, by global batch (what "
        "they compute over that and NLCG, BatchNorm's all-reduces and the part of the "
        "gradient's that the backward pass does not hide):",
        "",
    ]
    batches = (1024, 4096, 16384, 65536, 98304)
    lines += [f"| | {' | '.join(f'{b:,}' for b in batches)} |"]
    lines += ["|---" * (len(batches) + 1) + "|"]
    for chip, (peak, _, bandwidth, _, _) in CHIPS.items():
        cells = []
        for batch in batches:
            compute = batch / devices * flops / (COMPUTE * peak)
            exposed = all_reduce_seconds(chip, size, devices) - 2 / 3 * compute
            other = optimizers["nlcg"] / (HBM * bandwidth) + small * SMALL_ALL_REDUCE
            cells.append(compute / (compute + other + max(exposed, 0)))
        lines.append(f"| {chip} | {' | '.join(f'{x:.0%}' for x in cells)} |")
    lines += [
        "",
        f"Images that fit a device, by what autodiff keeps ({kept / 1e6:.0f} MB an "
        "image) beside the replicated state: "
        + "; ".join(
            f"{chip.split(',')[0]}: {(memory - row['state_bytes_whole']) / kept:,.0f}"
            for chip, (_, memory, *_) in list(CHIPS.items())[:3]
        )
        + ".",
        "",
        "`python benchmarks/pod_plan/plan.py --roofline`, from `rows.jsonl`.",
    ]
    return "\n".join(lines) + "\n"


def image_shape(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split("x"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--case",
        action="append",
        choices=CASES,
        metavar="NAME",
        help=f"only this one, can be repeated: {', '.join(CASES)}",
    )
    parser.add_argument(
        "--roofline",
        action="store_true",
        help="only the two tables, of what there is in rows.jsonl",
    )
    one = parser.add_argument_group("one config", "with any --config.FIELD=VALUE")
    one.add_argument("--one", action="store_true", help="compile it, print its line")
    one.add_argument("--config", default=str(CONFIG), metavar="FILE")
    one.add_argument("--devices", type=int, default=POD)
    one.add_argument("--image_shape", type=image_shape, default=(224, 224, 3))
    one.add_argument("--classes", type=int, default=1000)
    one.add_argument("--hlo", metavar="FILE", help="where to put the program's text")
    args, rest = parser.parse_known_args()
    if unknown := [text for text in rest if not text.startswith("--config.")]:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    if args.one:
        row = compile_one(args, [text.removeprefix("--config.") for text in rest])
        print(json.dumps(row, ensure_ascii=False))
        return
    rows = run_cases([] if args.roofline else args.case or list(CASES))
    for name, text in (("tables.md", tables(rows)), ("roofline.md", roofline(rows))):
        (RESULTS / name).write_text(text)
        print(text)


if __name__ == "__main__":
    main()

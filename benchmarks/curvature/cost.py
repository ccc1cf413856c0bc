"""What the curvature adds to a training step: time and memory.

    taskset -c 1 python benchmarks/curvature/cost.py          # about 20 minutes
    taskset -c 1 python benchmarks/curvature/cost.py --model resnet8 --cases 0,1
    python benchmarks/curvature/cost.py --report              # results/cost.md

The whole jitted step of `nlcg_optax.training` with `nlcg` at a given rate and with the
quadratic model, by the part of the batch that the products are taken on, the past steps
and the residual directions, side by side in one process: rounds of one step each, and
the median over the rounds of the ratio within one. Images are made up. Times are those
of the process, so that others on the machine do not count, and on a GPU those of a
clock. Adds to
`results/cost.jsonl`, where the newest row of a case counts.
"""

import argparse
import pathlib
import platform
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nlcg_optax
from nlcg_optax.training import loop, models, optimizers, steps
from nlcg_optax.training.config import apply_overrides, base_config, typed
from nlcg_optax.training.mesh import create_mesh

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import compiled  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "large_batch"))
import protocol  # noqa: E402

ROWS = pathlib.Path(__file__).resolve().parent / "results" / "cost.jsonl"
# Batch, filters, and size of the images: that of the sweep's `cifar10_jpeg`, and that
# of CIFAR-10.
WORKLOADS = {"resnet8": (5000, 8, 12), "resnet32": (1024, 16, 32)}
# Part of the batch, past steps, residual directions.
CASES = (
    (0.1, 3, 1),
    (0.1, 1, 0),
    (0.1, 3, 0),
    (0.1, 1, 1),
    (0.05, 3, 1),
    (0.05, 3, 2),
    (0.25, 3, 1),
    (0.25, 1, 0),
    (1.0, 3, 1),
    (1.0, 1, 0),
)


class Case:
    """One way to take a step, compiled."""

    def __init__(self, config, shape, mesh, tx, batch):
        model = loop.create_model(config.model, 10)
        schedule = optax.constant_schedule(0.01)
        self.state = steps.create_state(model, tx, config, shape, mesh)
        step = steps.make_train_step(model, tx, schedule, config, mesh, augment=True)
        start = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=0).lower(self.state, batch)
        self.step = lowered.compile()
        self.compile_seconds = time.perf_counter() - start
        self.program = compiled.read(self.step)
        self.seconds = []

    def run(self, batch):
        on_cpu = jax.default_backend() == "cpu"
        clock = time.process_time if on_cpu else time.perf_counter
        start = clock()
        self.state, _ = self.step(self.state, batch)
        jax.block_until_ready(self.state)
        self.seconds.append(clock() - start)


def measure(name, rounds, cases):
    """Times the cases beside the plain step; a row for each."""
    batch_size, filters, image_size = WORKLOADS[name]
    shape = (image_size, image_size, 3)
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(
            rng.integers(0, 256, (1, batch_size, *shape), dtype=np.uint8)
        ),
        "label": jnp.asarray(rng.integers(0, 10, (1, batch_size)), jnp.int32),
    }
    runs = {}
    for case in (None, *cases):
        config = base_config()
        overrides = [f"batch_size={batch_size}", f"model.name={name}"]
        overrides.append(f"model.filters={filters}")
        if case is not None:
            overrides.append("optimizer.name=nlcg_auto")
            overrides.append(f"optimizer.nlcg_auto.curvature_fraction={case[0]}")
            overrides.append("optimizer.nlcg_auto.curvature_min_examples=1")
            # As many as the optimizer below has: their coefficients are named.
            overrides.append(f"optimizer.nlcg_auto.residuals={case[2]}")
        apply_overrides(config, overrides)
        config = typed(config)
        mesh = create_mesh(config.mesh)
        if case is None:
            schedule = optax.constant_schedule(0.01)
            tx = optimizers.create_optimizer(config, schedule, models.l2_mask)
        else:
            piece = nlcg_optax.scale_by_quadratic_model(
                nlcg_optax.scale_by_orthogonalization(),
                history=case[1],
                residuals=case[2],
            )
            tx = optax.chain(piece, optax.scale(-1.0))
        runs[case] = Case(config, shape, mesh, tx, batch)
        print(f"{name}, {case}: {runs[case].compile_seconds:.0f} s", flush=True)
    for _ in range(rounds + 1):
        for run in runs.values():
            run.run(batch)
    plain = runs.pop(None)
    # Weights, their gradient: the same number of bytes.
    gradient = 4 * sum(x.size for x in jax.tree.leaves(plain.state.params))
    for case, run in runs.items():
        pairs = zip(run.seconds[1:], plain.seconds[1:], strict=True)
        ratios = [mine / other for mine, other in pairs]
        yield {
            "model": name,
            "batch_size": batch_size,
            "image_size": image_size,
            "fraction": case[0],
            "history": case[1],
            "residuals": case[2],
            "seconds": statistics.median(run.seconds[1:]),
            "plain_seconds": statistics.median(plain.seconds[1:]),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "temporary_bytes": run.program.temporary_bytes,
            "plain_temporary_bytes": plain.program.temporary_bytes,
            "gradient_bytes": gradient,
            "flops": run.program.flops,
            "plain_flops": plain.program.flops,
            "compile_seconds": run.compile_seconds,
            "plain_compile_seconds": plain.compile_seconds,
            "python": platform.python_version(),
            "jax": jax.__version__,
            "optax": optax.__version__,
            "device": jax.devices()[0].device_kind,
        }


def report():
    rows = protocol.read(ROWS)
    text = "\n".join(
        section([row for row in rows if row["device"] == device])
        for device in dict.fromkeys(row["device"] for row in rows)
    )
    (ROWS.parent / "cost.md").write_text(text)
    print(text)


def section(rows):
    """The table of one device."""
    row = rows[-1]
    times = "Seconds of the process, one core"
    if row["device"] != "cpu":
        times = "Seconds by a clock"
    lines = [
        f"{times}; Python {row['python']}, jax {row['jax']}, optax {row['optax']}, "
        f"device: {row['device']}.",
        "",
        "| model, batch | products on | past steps | residual directions | s "
        "(plain) | × plain | operations, × plain | temporaries, MB (plain) | "
        "compiled in s (plain) |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in WORKLOADS:
        for case in CASES:
            mine = [
                row
                for row in rows
                if row["model"] == name
                and (row["fraction"], row["history"], row["residuals"]) == case
            ]
            if not mine:
                continue
            row, operations = mine[-1], "–"
            if "flops" in row:
                operations = f"{row['flops'] / row['plain_flops']:.2f}"
            lines.append(
                f"| {name}, {row['batch_size']:,} of {row['image_size']}² | "
                f"{case[0]:.0%} | {case[1]} | {case[2]} | "
                f"{row['seconds']:.3g} ({row['plain_seconds']:.3g}) | "
                f"{row['ratio']:.2f} ({min(row['ratios']):.2f}–"
                f"{max(row['ratios']):.2f}) | "
                f"{operations} | "
                f"{row['temporary_bytes'] / 1e6:,.0f} "
                f"({row['plain_temporary_bytes'] / 1e6:,.0f}) | "
                f"{row['compile_seconds']:.0f} ({row['plain_compile_seconds']:.0f}) |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(WORKLOADS), action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", help="numbers of some of them: 0,1")
    parser.add_argument("--report", action="store_true")
    flags = parser.parse_args()
    chosen = range(len(CASES)) if flags.cases is None else flags.cases.split(",")
    if not flags.report:
        for name in flags.model or WORKLOADS:
            for row in measure(name, flags.rounds, [CASES[int(i)] for i in chosen]):
                protocol.append(ROWS, row)
    report()


if __name__ == "__main__":
    main()

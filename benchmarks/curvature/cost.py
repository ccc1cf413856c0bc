"""What the curvature adds to a training step: time and memory.

    taskset -c 1 python benchmarks/curvature/cost.py          # about 20 minutes
    taskset -c 1 python benchmarks/curvature/cost.py --batch_size 500 --model resnet8

The whole jitted step of `nlcg_optax.training` with tuned-rate `nlcg` and with the
quadratic model, by the part of the batch that the products are taken on, the past steps
and the residual directions, side by side in one process: rounds of one step each, and
the median over the rounds. Images are made up. Times are those of the process, so that
others on the machine do not count. Writes `results/cost.md`.
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
from nlcg_optax.training.config import apply_overrides, base_config
from nlcg_optax.training.mesh import create_mesh

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import compiled  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
SHAPE = (32, 32, 3)
WORKLOADS = {"resnet8": (5000, 8), "resnet32": (1024, 16)}  # batch, filters
# Part of the batch, past steps, residual directions.
CASES = (
    (0.1, 3, 1),
    (0.1, 1, 0),
    (0.1, 3, 0),
    (0.1, 1, 1),
    (0.25, 3, 1),
    (0.25, 1, 0),
    (1.0, 3, 1),
    (1.0, 1, 0),
)


class Case:
    """One way to take a step, compiled."""

    def __init__(self, config, mesh, tx, batch):
        model = loop.create_model(config, 10)
        schedule = optax.constant_schedule(0.01)
        self.state = steps.create_state(model, tx, config, SHAPE, mesh)
        step = steps.make_train_step(model, tx, schedule, config, mesh, augment=True)
        start = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=0).lower(self.state, batch)
        self.step = lowered.compile()
        self.compile_seconds = time.perf_counter() - start
        self.program = compiled.read(self.step)
        self.seconds = []

    def run(self, batch):
        start = time.process_time()
        self.state, metrics = self.step(self.state, batch)
        jax.block_until_ready(metrics)
        self.seconds.append(time.process_time() - start)


def measure(name, batch_size, rounds, cases):
    batch_size, filters = batch_size or WORKLOADS[name][0], WORKLOADS[name][1]
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(
            rng.integers(0, 256, (1, batch_size, *SHAPE), dtype=np.uint8)
        ),
        "label": jnp.asarray(rng.integers(0, 10, (1, batch_size)), jnp.int32),
    }
    runs = {}
    for case in (None, *cases):
        config = base_config()
        overrides = [f"batch_size={batch_size}", f"model.name={name}"]
        overrides.append(f"model.filters={filters}")
        if case is not None:
            overrides.append("optimizer.nlcg.step_rule=quadratic_model")
            overrides.append(f"optimizer.nlcg.curvature_fraction={case[0]}")
        apply_overrides(config, overrides)
        mesh = create_mesh(config)
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
        runs[case] = Case(config, mesh, tx, batch)
        print(
            f"{name}, {case}: compiled in {runs[case].compile_seconds:.0f} s",
            flush=True,
        )
    for _ in range(rounds + 1):
        for run in runs.values():
            run.run(batch)
    plain = runs[None]
    gradient = 4 * sum(x.size for x in jax.tree.leaves(plain.state.params))
    rows = []
    for case, run in runs.items():
        ratios = [
            mine / other
            for mine, other in zip(run.seconds[1:], plain.seconds[1:], strict=True)
        ]
        more = run.program.temporary_bytes - plain.program.temporary_bytes
        what = (
            "`nlcg` with a rate | | "
            if case is None
            else "{:.0%} | {} | {}".format(*case)
        )
        rows.append(
            f"| {name}, {batch_size:,} | {what} | "
            f"{statistics.median(run.seconds[1:]):.3f} | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}) | "
            f"{run.program.temporary_bytes / 1e6:,.0f} | {more / 1e6:+,.1f} | "
            f"{run.compile_seconds:.0f} |"
        )
    rows.append(
        f"| {name}, {batch_size:,} | a gradient's own bytes | | | | | "
        f"{gradient / 1e6:,.1f} | | |"
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(WORKLOADS), action="append")
    parser.add_argument("--batch_size", type=int, help="of all models")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", type=int, default=len(CASES), help="the first few")
    args = parser.parse_args()
    lines = [
        "| model, batch | products on | past steps | residual | s | × plain | "
        "temporaries, MB | more | compiled, s |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in args.model or WORKLOADS:
        lines += measure(name, args.batch_size, args.rounds, CASES[: args.cases])
    lines += [
        "",
        f"`python benchmarks/curvature/cost.py`, {args.rounds} rounds, seconds of the "
        f"process, Python {platform.python_version()}, jax {jax.__version__}, optax "
        f"{optax.__version__}, device: {jax.devices()[0].device_kind}, one core.",
    ]
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "cost.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

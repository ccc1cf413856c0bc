"""How long the first step takes: tracing, lowering and compiling, by model.

    taskset -c 1 python benchmarks/update_cost/compile_time.py --data_dir=DATA

The training steps of `benchmarks/large_batch`, and that of an MLP of six layers, by
each optimizer in turn; seconds are of the processor, medians over rounds, and ratios to
the first optimizer's. Kernels are loops that XLA compiles, counted once where several
are the same: on a CPU these are what the time goes into, 10 ms each and more. Writes
`results/compile.md`. Needs the data of those workloads that are named.
"""

import argparse
import collections
import functools
import pathlib
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

HERE = pathlib.Path(__file__).resolve().parent
sys.path += [str(HERE.parent), str(HERE.parent / "large_batch")]
import training_tasks  # noqa: E402
from workloads import WORKLOADS  # noqa: E402

import nlcg_optax  # noqa: E402

# By workload: the batch.
SIZES = {
    "mlp": 1024,
    "autoencoder": 512,
    "autoencoder_cifar": 1024,
    "burgers": 1,
    "tinyshakespeare": 128,
    "digits": 512,
    "cifar10_jpeg": 1000,
}
OPTIMIZERS = ("adamw", "nlcg", "nlcg by curvature", "nlcg by full curvature")


def mlp(optimizer: str) -> tuple[Callable, tuple]:
    """A step of an MLP of six layers, and its arguments."""
    widths = (64, 128, 128, 128, 128, 128, 10)
    make = {
        "adamw": lambda: optax.with_extra_args_support(optax.adamw(1e-3)),
        "nlcg": lambda: nlcg_optax.nlcg(0.04),
        "nlcg by curvature": lambda: nlcg_optax.nlcg_auto(1000),
        "nlcg by full curvature": lambda: nlcg_optax.nlcg_auto(residuals=5),
    }
    tx = make[optimizer]()

    def outputs(params, batch):
        return training_tasks.mlp(params, batch["x"])

    def loss(logits, batch):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return jnp.mean(losses)

    evaluate = nlcg_optax.value_grad_and_curvature(
        outputs, loss, fraction=1.0 if "full" in optimizer else 0.05
    )

    def step(params, state, batch):
        value, grads, curvature = evaluate(params, batch)
        given = {"curvature": curvature} if "curvature" in optimizer else {}
        updates, state = tx.update(grads, state, params, value=value, **given)
        return optax.apply_updates(params, updates), state, value

    params = training_tasks.mlp_init(widths, 0)
    size = SIZES["mlp"]
    batch = {"x": jnp.zeros([size, widths[0]]), "y": jnp.zeros([size], jnp.int32)}
    return step, (params, tx.init(params), batch)


@functools.cache
def task_of(name: str, data_dir: str | None) -> tuple:
    workload = WORKLOADS[name](data_dir)
    return workload, workload.task(workload.config)


def training_step(name: str, optimizer: str, data_dir: str | None) -> tuple:
    """The step of a workload, and its arguments."""
    if name == "mlp":
        return mlp(optimizer)
    workload, task = task_of(name, data_dir)
    size = min(SIZES[name], task.num_train)
    init, step = task.make(workload.optimizers[optimizer][0], size, 1000)
    zeros = np.float32(0), np.int32(0)
    state = jax.eval_shape(init, zeros[1])
    return step, (state, np.zeros(size, np.int32), task.data, *zeros)


def measure(step: Callable, arguments: tuple) -> dict[str, float]:
    """Seconds of the processor, and what was compiled."""
    jax.clear_caches()
    marks = [time.process_time()]
    traced = jax.jit(step, donate_argnums=0).trace(*arguments)
    marks.append(time.process_time())
    lowered = traced.lower()
    marks.append(time.process_time())
    program = lowered.compile()
    marks.append(time.process_time())
    text = program.as_text() or ""
    return {
        "trace": marks[1] - marks[0],
        "lower": marks[2] - marks[1],
        "compile": marks[3] - marks[2],
        "total": marks[3] - marks[0],
        "lowered": len(re.findall(r' = "?stablehlo\.', lowered.as_text() or "")),
        "compiled": len(re.findall(r"^ +(?:ROOT )?%?[\w.\-]+ = ", text, re.M)),
        "kernels": different_loops(text),
    }


def different_loops(text: str) -> int:
    """The loops of a compiled program that differ by more than their names."""
    found = set()
    names = set(re.findall(r"kind=kLoop, calls=%?([\w.\-]+)", text))
    for name, body in re.findall(
        r"^%?([\w.\-]+) \(.*?\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL
    ):
        if name in names:
            body = re.sub(r", metadata=\{[^}]*\}", "", body)
            numbers: dict[str, str] = {}
            found.add(
                re.sub(
                    r"%[\w.\-]+",
                    lambda m, numbers=numbers: numbers.setdefault(
                        m[0], f"%{len(numbers)}"
                    ),
                    body,
                )
            )
    return len(found)


def table(rows: dict[tuple[str, str], dict[str, float]]) -> list[str]:
    """The results as lines of Markdown."""
    names = list(dict.fromkeys(optimizer for _, optimizer in rows))
    lines = [
        "| model | optimizer | lowered | compiled | kernels | trace | lower | "
        "compile | all | ratio |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (model, optimizer), row in rows.items():
        counts = [f"{row[key]:,.0f}" for key in ("lowered", "compiled", "kernels")]
        seconds = [f"{row[key]:.2f}" for key in ("trace", "lower", "compile", "total")]
        ratio = row["total"] / rows[model, names[0]]["total"]
        cells = [model, optimizer, *counts, *seconds, f"{ratio:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", help="the folder of workloads that need one")
    parser.add_argument("--models", default=",".join(SIZES))
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--output", type=pathlib.Path, default=HERE / "results" / "compile.md"
    )
    flags = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    results = {}
    for model in flags.models.split(","):
        measured = collections.defaultdict(list)
        for _ in range(flags.rounds):
            for optimizer in flags.optimizers.split(","):
                step = training_step(model, optimizer, flags.data_dir)
                measured[optimizer].append(measure(*step))
        for optimizer, rows in measured.items():
            results[model, optimizer] = {
                key: statistics.median(row[key] for row in rows) for key in rows[0]
            }
        print("\n".join(table(results)[-len(measured) :]), flush=True)
    lines = [
        *table(results),
        "",
        "Instructions of the lowered and of the compiled program, loops that differ, "
        f"and seconds of one core, medians of {flags.rounds} rounds in which the "
        "optimizers take turns; the ratio is to the first optimizer of the model. "
        f"`python benchmarks/update_cost/compile_time.py`, Python "
        f"{platform.python_version()}, jax {jax.__version__}, optax "
        f"{optax.__version__}, device: {jax.devices()[0].device_kind}.",
    ]
    flags.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""How long the first step takes, and what of: tracing, lowering, compiling.

taskset -c 1 python benchmarks/update_cost/compile_time.py --data_dir=DATA
"""

import argparse
import collections
import json
import pathlib
import re
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path[:0] = [
    str(pathlib.Path(__file__).resolve().parents[1] / name)
    for name in ("large_batch", "")
]
import compiled  # noqa: E402
import training_tasks  # noqa: E402
from workloads import WORKLOADS  # noqa: E402

import nlcg_optax  # noqa: E402

SIZES = {
    "autoencoder": 512,
    "autoencoder_cifar": 1024,
    "burgers": 1,
    "tinyshakespeare": 128,
    "digits": 512,
    "cifar10_jpeg": 1000,
}
NAMES = ("adamw", "nlcg", "nlcg by curvature", "nlcg by full curvature")


def mlp(optimizer):
    """An MLP of six layers: the arguments of a step, and the step."""
    widths = (64, 128, 128, 128, 128, 128, 10)
    tx = {
        "adamw": lambda: optax.with_extra_args_support(optax.adamw(1e-3)),
        "nlcg": lambda: nlcg_optax.nlcg(0.04),
        "nlcg by curvature": lambda: nlcg_optax.nlcg_auto(1000),
        "nlcg by full curvature": lambda: nlcg_optax.nlcg_auto(residuals=5),
    }[optimizer]()
    auto = "curvature" in optimizer

    def outputs(params, batch):
        return training_tasks.mlp(params, batch["x"])

    def loss(logits, batch):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return jnp.mean(losses)

    evaluate = nlcg_optax.value_grad_and_curvature(
        outputs, loss, **({"fraction": 1.0} if "full" in optimizer else {})
    )

    def step(params, state, batch):
        if auto:
            value, grads, curvature = evaluate(params, batch)
            given = {"curvature": curvature}
        else:
            value, grads = jax.value_and_grad(lambda p: loss(outputs(p, batch), batch))(
                params
            )
            given = {}
        updates, state = tx.update(grads, state, params, value=value, **given)
        return optax.apply_updates(params, updates), state, value

    params = training_tasks.mlp_init(widths, 0)
    batch = {
        "x": jnp.zeros([1024, widths[0]]),
        "y": jnp.zeros([1024], jnp.int32),
    }
    return step, (params, tx.init(params), batch)


def workload(name, optimizer, data_dir, cache={}):
    if name not in cache:
        made = WORKLOADS[name](data_dir)
        cache[name] = made, made.task(made.config)
    made, task = cache[name]
    size = min(SIZES[name], task.num_train)
    steps = made.num_steps(size, task.num_train) if not made.steps else 1000
    init, step = task.make(made.optimizers[optimizer][0], size, steps)
    zeros = np.float32(0), np.int32(0)
    state = jax.eval_shape(init, zeros[1])
    return step, (state, np.zeros(size, np.int32), task.data, *zeros)


def measure(step, args):
    jax.clear_caches()
    clock = time.process_time
    marks = [clock()]
    traced = jax.jit(step, donate_argnums=0).trace(*args)
    marks.append(clock())
    lowered = traced.lower()
    marks.append(clock())
    program = lowered.compile()
    marks.append(clock())
    text = lowered.as_text()
    hlo = program.as_text()
    entry, computations = compiled._computations(hlo)
    return (
        {
            "trace": marks[1] - marks[0],
            "lower": marks[2] - marks[1],
            "compile": marks[3] - marks[2],
            "total": marks[3] - marks[0],
            "operations": len(re.findall(r" = \"?stablehlo\.", text)),
            "instructions": sum(map(len, computations.values())),
            "kernels": compiled.read(hlo, 1).kernels,
            "fusions": sum(
                i.opcode
                in (
                    "fusion",
                    "call",
                    "custom-call",
                    "dot",
                    "convolution",
                    "while",
                    "conditional",
                    "reduce",
                    "copy",
                    "broadcast",
                    "transpose",
                )
                for name, c in computations.items()
                for i in c
                if not name.startswith("fused_") and "fused" not in name
            ),
        },
        traced,
        lowered,
        program,
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data_dir")
    parser.add_argument("--models", default="mlp," + ",".join(SIZES))
    parser.add_argument("--optimizers", default=",".join(NAMES))
    parser.add_argument("--rounds", type=int, default=1)
    flags = parser.parse_args()
    data = {"tinyshakespeare": flags.data_dir}
    for model in flags.models.split(","):
        found = collections.defaultdict(list)
        for round in range(flags.rounds):
            for optimizer in flags.optimizers.split(","):
                make = (
                    mlp(optimizer)
                    if model == "mlp"
                    else workload(model, optimizer, flags.data_dir)
                )
                found[optimizer].append(measure(*make)[0])
        base = None
        for optimizer, rows in found.items():
            row = {k: statistics.median(r[k] for r in rows) for k in rows[0]}
            base = base or row["total"]
            print(
                f"{model:18} {optimizer:24} trace {row['trace']:5.2f} lower "
                f"{row['lower']:5.2f} compile {row['compile']:6.2f} total "
                f"{row['total']:6.2f} = {row['total'] / base:5.2f}x; "
                f"ops {row['operations']:6.0f} instr {row['instructions']:6.0f} "
                f"kernels {row['kernels']:5.0f} all {row['fusions']:5.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

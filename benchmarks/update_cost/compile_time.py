"""How long the first step takes: tracing, lowering and compiling, by model.

    taskset -c 1 python benchmarks/update_cost/compile_time.py --data_dir=DATA

The training steps of `benchmarks/large_batch`, and that of an MLP of six layers, by
each optimizer in turn, each in a process of its own; seconds are of the processor,
medians over rounds, and ratios to the first optimizer's. Kernels are loops that XLA
compiles, counted once where several are the same: on a CPU these are what the time goes
into. Those that are called together are one. With `--before=FOLDER`, another checkout,
its rows are measured in the same rounds. Adds to `results/compile.jsonl` what was
measured, and writes `results/compile.md` from the last rows of each kind there. Needs
the data of those workloads that are named.
"""

import argparse
import collections
import functools
import json
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

HERE = pathlib.Path(__file__).resolve().parent
sys.path += [str(HERE.parent), str(HERE.parent / "large_batch")]
if "--checkout" in sys.argv:  # in place of this one's package
    sys.path.insert(0, sys.argv[sys.argv.index("--checkout") + 1])
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
        "kernels": different_kernels(text),
    }


def computations(text: str) -> dict[str, str]:
    """The computations of a compiled program, by name."""
    found = re.findall(
        r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL
    )
    return dict(found)


def different_kernels(text: str) -> int:
    """The kernels of a compiled program that differ by more than their names.

    A loop is one, and so is what is called as a whole, whatever loops are in it.
    """
    bodies = computations(text)
    calls = r"call\(.*to_apply=%?([\w.\-]+).*xla_cpu_small_call=\"true\""
    together = set(re.findall(calls, text))
    found = {_numbered(bodies[name]) for name in together}
    loop = r"kind=kLoop, calls=%?([\w.\-]+)"
    for name, body in bodies.items():
        if name not in together:
            found |= {_numbered(bodies[each]) for each in re.findall(loop, body)}
    return len(found)


def _numbered(body: str) -> str:
    """The text of a computation, with numbers for names."""
    body = re.sub(r", (?:metadata|frontend_attributes)=\{[^}]*\}", "", body)
    numbers: dict[str, str] = {}
    return re.sub(
        r"%[\w.\-]+", lambda m: numbers.setdefault(m[0], f"%{len(numbers)}"), body
    )


Key = tuple[str, str, str]


def measured(key: Key, flags: argparse.Namespace) -> dict[str, float]:
    """What `--one` prints, in a process of its own."""
    model, optimizer, checkout = key
    command = [sys.executable, __file__, "--one", model, optimizer]
    if flags.data_dir is not None:
        command += ["--data_dir", flags.data_dir]
    if checkout == "before":
        command += ["--checkout", flags.before]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: dict[Key, dict[str, float]]) -> list[str]:
    """The results as lines of Markdown."""
    lines = [
        "| model | optimizer | | lowered | compiled | kernels | trace | lower | "
        "compile | all | ratio |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (model, optimizer, checkout), row in rows.items():
        counts = [f"{row[key]:,.0f}" for key in ("lowered", "compiled", "kernels")]
        seconds = [f"{row[key]:.2f}" for key in ("trace", "lower", "compile", "total")]
        first = rows.get((model, OPTIMIZERS[0], "now"))
        ratio = f"{row['total'] / first['total']:.2f}" if first else ""
        cells = [model, optimizer, checkout, *counts, *seconds, ratio]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", help="the folder of workloads that need one")
    parser.add_argument("--models", default=",".join(SIZES))
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", help="another checkout, measured in turn")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--checkout", help=argparse.SUPPRESS)
    parser.add_argument(
        "--output", type=pathlib.Path, default=HERE / "results" / "compile"
    )
    flags = parser.parse_args()
    if flags.one is not None:
        jax.config.update("jax_enable_compilation_cache", False)
        print(json.dumps(measure(*training_step(*flags.one, flags.data_dir))))
        return
    log = flags.output.with_suffix(".jsonl")
    for model in flags.models.split(","):
        keys: list[Key] = [(model, name, "now") for name in flags.optimizers.split(",")]
        if flags.before is not None:
            keys = [
                (*key[:2], at)
                for key in keys
                for at in ("before", "now")
                if at == "now" or key[1] != OPTIMIZERS[0]  # which is Optax's
            ]
        rows = collections.defaultdict(list)
        for _ in range(flags.rounds):
            for key in keys:
                rows[key].append(measured(key, flags))
        with log.open("a") as file:
            for key, each in rows.items():
                median = {
                    name: round(statistics.median(row[name] for row in each), 3)
                    for name in each[0]
                }
                known = {"key": key, "rounds": flags.rounds, "jax": jax.__version__}
                print(json.dumps({**known, **median}), file=file)
    recorded = [json.loads(line) for line in log.read_text().splitlines()]
    results = {tuple(row["key"]): row for row in recorded}
    order = sorted(results, key=lambda key: (list(SIZES).index(key[0]),))
    lines = [
        *table({key: results[key] for key in order}),
        "",
        "Instructions of the lowered and of the compiled program, kernels that differ, "
        f"and seconds of one core, medians of "
        f"{min(row['rounds'] for row in results.values())} rounds or more in which all "
        "rows of a model take turns; the ratio is to AdamW's. "
        "`python benchmarks/update_cost/compile_time.py --before=CHECKOUT`, Python "
        f"{platform.python_version()}, jax {jax.__version__}, optax "
        f"{optax.__version__}, device: {jax.devices()[0].device_kind}.",
    ]
    flags.output.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""The quadratic model against `minimize`, on small networks and at equal cost.

    taskset -c 0 python benchmarks/curvature/minimizers.py     # what is missing
    python benchmarks/curvature/minimizers.py --report         # results/minimizers.md

The tasks of `tasks.py`, in float32, where each evaluation sees all the data. The cost
is counted in gradients: the operations of a program, as XLA counts them, over those of
the loss and its gradient. A step of the quadratic model is charged for all that it
does, the products and the orthogonalization too; `minimize` for the points that it
evaluated, each as a gradient, and not for the work on its vectors. Its direct
competitors are limited-memory BFGS, its default, and nonlinear conjugate gradient in
the narrow sense; both with their line search and nothing tuned, as the quadratic model.
"""

import argparse
import pathlib
import statistics
import sys

import jax
import numpy as np
import optax
import tasks

import nlcg_optax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import compiled  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "large_batch"))
import protocol  # noqa: E402

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
ROWS = RESULTS / "minimizers.jsonl"
SEEDS = (0, 1, 2)
COSTS = (50, 150, 500, 1500)  # in gradients
OURS = "by curvature"
MINIMIZERS = {
    "`minimize`, L-BFGS": {},
    "`minimize`, CG": {"preconditioner": None},
}


def by_curvature(task, seed):
    """Loss against cost of the quadratic model."""
    tx = nlcg_optax.nlcg_auto()
    curvature = nlcg_optax.gauss_newton(task.outputs, task.loss, l2=task.l2)

    def step(params, state):
        value, grads = jax.value_and_grad(task.value)(params)
        updates, state = tx.update(
            grads, state, params, value=value, curvature=curvature
        )
        return optax.apply_updates(params, updates), state, value

    params = task.init(seed)
    state = tx.init(params)
    gradient = jax.jit(jax.value_and_grad(task.value)).lower(params).compile()
    step = jax.jit(step).lower(params, state).compile()
    cost = compiled.read(step).flops / compiled.read(gradient).flops
    values = []
    while len(values) * cost <= COSTS[-1]:
        params, state, value = step(params, state)
        values.append(value)
    # The loss before a step is known once that step has evaluated it.
    curve = [(cost * i, float(value)) for i, value in enumerate(values)]
    return curve, cost


def by_minimize(task, seed, options):
    """Loss against cost of a minimizer, and why it stopped."""
    curve = []

    def note(info):
        curve.append((int(info.value_evaluations), float(info.value)))
        return info.value_evaluations > COSTS[-1]

    result = nlcg_optax.minimize(
        task.value,
        task.init(seed),
        max_iter=COSTS[-1],
        callback=note,
        gtol=0.0,
        **options,
    )
    return curve, result.message


def at(curve, cost):
    """The lowest loss by then."""
    values = [value for spent, value in curve if spent <= cost]
    return float(f"{min(values, default=np.inf):.5g}")


def run(name, method, seed):
    task = tasks.TASKS[name]()
    row = dict(task=name, method=method, seed=seed)
    if method == OURS:
        curve, row["gradients_a_step"] = by_curvature(task, seed)
    else:
        curve, row["message"] = by_minimize(task, seed, MINIMIZERS[method])
    row["losses"] = [at(curve, cost) for cost in COSTS]
    row |= dict(jax=jax.__version__, device=jax.devices()[0].device_kind)
    protocol.append(ROWS, row)
    print(row, flush=True)


def report():
    rows, lines = protocol.read(ROWS), []
    lines.append(
        "| task | gradients a step | | "
        + " | ".join(f"cost {cost:,}" for cost in COSTS)
        + " |"
    )
    lines.append("|---|---:|---|" + "---:|" * len(COSTS))
    for name in tasks.TASKS:
        for method in (OURS, *MINIMIZERS):
            mine = [r for r in rows if (r["task"], r["method"]) == (name, method)]
            if not mine:
                continue
            step = [f"{r['gradients_a_step']:.1f}" for r in mine if method == OURS]
            columns = zip(*(row["losses"] for row in mine), strict=True)
            cells = [cell(column) for column in columns]
            lines.append(
                f"| {name} | {step[0] if step else ''} | {method} | "
                + " | ".join(cells)
                + " |"
            )
    lines += [
        "",
        "The lowest training loss within so many gradients' worth of operations: the "
        f"median of seeds {', '.join(map(str, SEEDS))}, and in brackets the extremes.",
    ]
    (RESULTS / "minimizers.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def cell(values):
    middle = f"{statistics.median(values):.3g}"
    return f"{middle} ({min(values):.3g}–{max(values):.3g})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default=",".join(tasks.TASKS))
    parser.add_argument("--report", action="store_true")
    flags = parser.parse_args()
    if not flags.report:
        known = {
            (row["task"], row["method"], row["seed"]) for row in protocol.read(ROWS)
        }
        for name in flags.tasks.split(","):
            for method in (OURS, *MINIMIZERS):
                for seed in SEEDS:
                    if (name, method, seed) not in known:
                        run(name, method, seed)
    report()


if __name__ == "__main__":
    main()

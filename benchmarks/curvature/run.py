"""The quadratic model against tuned peers, on small tasks without noise.

    taskset -c 0 python benchmarks/curvature/run.py     # what is missing; half an hour
    python benchmarks/curvature/run.py --report         # results/tables.md

Every step sees all the data, and there are 150 of them. The quadratic model has no
number to choose. Peers have a cosine decay and a learning rate chosen *by the figure
that is reported*, the mean over the same three seeds: five rates a factor of 2 apart,
more while the best is at the edge of the grid. Muon and a constant β are there with
several momenta. Rows of runs that are there are not run again.
"""

import argparse
import pathlib
import statistics
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import tasks

import nlcg_optax
from nlcg_optax.training import models

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "large_batch"))
import protocol  # noqa: E402

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
ROWS = RESULTS / "small_tasks.jsonl"
SEEDS = (0, 1, 2)


def muon(beta):
    return lambda rate: optax.contrib.muon(
        rate,
        beta=beta,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=models.muon_matrices,
    )


# By name: from the learning rate to the optimizer, and the middle of the grid.
PEERS = {
    "adamw": (optax.adamw, 8e-3),
    "muon β=0.8": (muon(0.8), 0.02),
    "muon β=0.9": (muon(0.9), 0.02),
    "muon β=0.95": (muon(0.95), 0.02),
    "nlcg": (nlcg_optax.nlcg, 0.02),
    "nlcg β=0.9": (lambda rate: nlcg_optax.nlcg(rate, beta_bounds=(0.9, 0.9)), 0.01),
}
# By name: residual directions.
OURS = {"nlcg by curvature": 2, "nlcg by curvature, 5 residual directions": 5}


def losses_of(task, tx, seed, curvature=None):
    """The loss before every tenth step, and after the last one."""
    tx = optax.with_extra_args_support(tx)
    given = {} if curvature is None else {"curvature": curvature}

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(task.value)(params)
        updates, state = tx.update(grads, state, params, value=value, **given)
        return optax.apply_updates(params, updates), state, value

    params = task.init(seed)
    state, losses = tx.init(params), []
    for _ in range(tasks.STEPS):
        params, state, value = step(params, state)
        losses.append(value)
    losses.append(jax.jit(task.value)(params))
    kept = [*losses[:-1:10], losses[-1]]  # every tenth, and the last
    return [float(f"{x:.5g}") for x in np.asarray(jnp.stack(kept))]


def run(name, optimizer, rate, seed):
    """The row of a run, which is appended if it is new."""
    known = (name, optimizer, rate, seed)
    for row in protocol.read(ROWS):
        if (row["task"], row["optimizer"], row["rate"], row["seed"]) == known:
            return row
    task = tasks.TASKS[name]()
    if optimizer in OURS:
        curvature = nlcg_optax.gauss_newton(task.outputs, task.loss, l2=task.l2)
        tx = nlcg_optax.nlcg_auto(residuals=OURS[optimizer])
        losses = losses_of(task, tx, seed, curvature)
    else:
        decay = optax.cosine_decay_schedule(rate, tasks.STEPS)
        losses = losses_of(task, PEERS[optimizer][0](decay), seed)
    row = dict(task=name, optimizer=optimizer, rate=rate, seed=seed, losses=losses)
    row |= dict(jax=jax.__version__, device=jax.devices()[0].device_kind)
    protocol.append(ROWS, row)
    print(name, optimizer, rate, seed, losses[-1], flush=True)
    return row


def final(rows):
    value = statistics.mean(row["losses"][-1] for row in rows)
    return value if np.isfinite(value) else np.inf


def tune(name, optimizer):
    """Runs a peer at all the rates that the protocol asks for."""
    centre, scores, low, high = PEERS[optimizer][1], {}, -2, 2
    while True:
        for k in range(low, high + 1):
            rate = float(f"{centre * 2.0**k:.6g}")
            if k not in scores:
                scores[k] = final([run(name, optimizer, rate, seed) for seed in SEEDS])
        best = min(scores, key=lambda k: scores[k])
        if low < best < high or high - low > 10:
            return
        low, high = low - (best == low), high + (best == high)


def report():
    rows, lines = protocol.read(ROWS), []
    names = [*OURS, *PEERS]
    lines.append("| task | " + " | ".join(names) + " |")
    lines.append("|---" * (len(names) + 1) + "|")
    for name in tasks.TASKS:
        cells = []
        for optimizer in names:
            by_rate = {}
            for row in rows:
                if (row["task"], row["optimizer"]) == (name, optimizer):
                    by_rate.setdefault(row["rate"], []).append(row)
            if not by_rate:
                cells.append("not run")
                continue
            best = min(by_rate, key=lambda rate: final(by_rate[rate]))
            ends = [row["losses"][-1] for row in by_rate[best]]
            error = statistics.stdev(ends) / len(ends) ** 0.5 if len(ends) > 1 else 0.0
            where = "" if best is None else f" ({best:g})"
            cells.append(f"{statistics.mean(ends):.4g} ± {error:.1g}{where}")
        held_out = tasks.TASKS[name] in tasks.HELD_OUT
        lines.append(
            f"| {name}{' (held out)' if held_out else ''} | {' | '.join(cells)} |"
        )
    lines += [
        "",
        "Training loss after 150 steps: the mean of three seeds and its standard "
        "error, and the learning rate with the lowest mean.",
    ]
    (RESULTS / "tables.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default=",".join(tasks.TASKS))
    everything = ";".join([*OURS, *PEERS])
    parser.add_argument("--optimizers", default=everything, help="some of them: a;b")
    parser.add_argument("--report", action="store_true")
    flags = parser.parse_args()
    if not flags.report:
        for optimizer in flags.optimizers.split(";"):
            for name in flags.tasks.split(","):
                if optimizer in OURS:
                    for seed in SEEDS:
                        run(name, optimizer, None, seed)
                else:
                    tune(name, optimizer)
    report()


if __name__ == "__main__":
    main()

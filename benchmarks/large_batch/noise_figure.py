"""The cost of noise, the gain and the rate over a run, as a picture.

    python benchmarks/large_batch/noise_figure.py

It trains the autoencoder of the sweep by batches of 128 (a minute), and writes
`results/noise_balance.png`.
"""

import pathlib

import jax
import matplotlib
import numpy as np
import optax
import workloads

import nlcg_optax
from nlcg_optax.training import data

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FIGURE = pathlib.Path(__file__).resolve().parent / "results" / "noise_balance.png"
SIZE, SEED = 128, 100
SHOWN = ("signal", "noise_rate", "noise_cost", "gain", "rate")


def run() -> dict[str, np.ndarray]:
    """What `diagnostics` tells, and the loss, step by step."""
    workload = workloads.autoencoder()
    task = workload.task(workload.config)
    steps = workload.num_steps(SIZE, task.num_train)
    tx = nlcg_optax.nlcg_auto(steps)
    arrays = jax.device_put(task.data)

    @jax.jit
    def step(params, state, places):
        batch = jax.tree.map(lambda x: x[places], arrays)
        loss, grads = task.value_and_grad(params, batch, SIZE)
        curvature = nlcg_optax.gauss_newton(
            lambda params: task.outputs(params, batch),
            lambda outputs: task.loss(outputs, batch),
            fraction=1.0,
        )
        updates, state = tx.update(
            grads, state, params, value=loss, curvature=curvature
        )
        told = nlcg_optax.diagnostics(state)
        told = {name: told[name] for name in SHOWN} | {"loss": loss}
        return optax.apply_updates(params, updates), state, told

    params = task.init(SEED)
    state, rows = tx.init(params), []
    for t in range(steps):
        places = data.batch_indices(t, SIZE, task.num_train, SEED).astype(np.int32)
        params, state, told = step(params, state, places)
        rows.append(told)
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def main() -> None:
    told = run()
    steps = np.arange(len(told["loss"]))
    since = int(np.argmax(told["rate"] > 0))
    figure, axes = plt.subplots(3, 1, figsize=(7, 7), sharex=True)
    axes[0].plot(steps, told["loss"], color="0.6", label="loss of the batch")
    axes[0].set_yscale("log")
    later = steps[since + 10 :]
    axes[1].plot(later, told["noise_cost"][later], label="cost of noise, E")
    axes[1].plot(later, told["gain"][later], label="gain, R")
    axes[1].set_ylim(bottom=0)
    axes[2].plot(steps[since:], told["noise_rate"][since:], label="rate")
    axes[2].set_xlabel("step")
    for axis in axes:
        axis.axvline(since, color="0.8", linestyle=":", label="noise rules")
        axis.axvline(since + 0.55 * (len(steps) - since), color="0.9", linestyle="--")
        axis.legend()
    figure.tight_layout()
    figure.savefig(FIGURE, dpi=110)
    print(f"{FIGURE}: noise rules from step {since} of {len(steps)} on")


if __name__ == "__main__":
    main()

"""How NLCG goes on once noise rules, tried on a validation split.

    taskset -c 0 python benchmarks/curvature/noise.py --data_dir=FOLDER
    python benchmarks/curvature/noise.py --report       # results/noise.md

The sweep's `cifar10_jpeg` at batch 1,000, a fifth of the training images held out, with
the quadratic model for as long as there is signal enough. What differs is how much
signal that is, the rate with which NLCG's own direction goes on from there, its
warm-up, and its least β. One program is compiled, of which these are arguments. Every
run is a line of `results/noise.jsonl`, and what is there is not run again. The images
of the test were not looked at.
"""

import argparse
import importlib
import pathlib
import statistics
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nlcg_optax.curvature import noise
from nlcg_optax.training import data, models, optimizers, steps
from nlcg_optax.training.config import apply_overrides, typed

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "large_batch"))
import protocol  # noqa: E402

ROWS = HERE / "results" / "noise.jsonl"
BATCH_SIZE = 1000
SEEDS = (100, 101, 102)


class Variant(NamedTuple):
    """How the rate goes, in average best lengths, and β.

    Attributes:
      rate: at the peak.
      start: when noise takes over; it grows linearly from there.
      warm_up: where the peak is, as a part of the run; a cosine falls to 0 after it.
      least_beta: β is at least this.
      signal: noise takes over once the share of signal is below this.
    """

    rate: float = 1.0
    start: float = 1.0
    warm_up: float = 0.0
    least_beta: float = 0.0
    signal: float = 0.4


VARIANTS = {
    "half the best length": Variant(0.5, 0.5),
    "the best length (default)": Variant(),
    "twice the best length": Variant(2.0, 2.0),
    "half, warm-up 30% from a quarter": Variant(0.5, 0.25, 0.3),
    "once, warm-up 30% from a quarter": Variant(1.0, 0.25, 0.3),
    "twice, warm-up 30% from a quarter": Variant(2.0, 0.25, 0.3),
    "the best length, β = 0.9": Variant(least_beta=0.9),
    "once less than 0.6 is signal": Variant(signal=0.6),
}


def varied(original, variant):
    """The product's `hand_over`, with another course of the rate."""

    def hand_over(state, signal, log_length, measurements, count, horizon):
        stage = original(state, signal, log_length, measurements, count, horizon)
        dtype = stage.rate.dtype
        since = jnp.asarray(stage.since).astype(dtype)
        count = jnp.asarray(count).astype(dtype)
        peak = jnp.maximum(since, variant.warm_up * horizon)
        grown = (count - since) / jnp.maximum(peak - since, 1e-6)
        up = variant.start + (variant.rate - variant.start) * grown
        done = jnp.clip((count - peak) / jnp.maximum(horizon - peak, 1), 0, 1)
        down = variant.rate * 0.5 * (1 + jnp.cos(jnp.pi * done))
        return stage._replace(size=stage.rate * jnp.where(count < peak, up, down))

    return hand_over


def create_runner(data_dir):
    """A function of a variant and a seed that gives what a run came to."""
    sweep = importlib.import_module("sweep")
    workload = sweep.WORKLOADS["cifar10_jpeg"](data_dir)
    trainer = sweep.Trainer(workload)
    task = trainer.task
    kept, evaluate, _ = trainer.phase("tuning")
    config = workload.config.copy_and_resolve_references()
    apply_overrides(config, workload.optimizers["nlcg by curvature"][0])
    config.batch_size = BATCH_SIZE
    total = round(config.num_epochs * len(kept) / BATCH_SIZE)
    config = typed(config)
    tx = optimizers.create_optimizer(config, lambda _: 1.0, models.l2_mask, total)
    kept_names = ("hand_over", "_RULED_BY_NOISE", "_BETA_BOUNDS")
    originals = {name: getattr(noise, name) for name in kept_names}

    def train_step(state, indices, images, labels, variant, seed):
        variant = Variant(*variant)
        noise.hand_over = varied(originals["hand_over"], variant)
        noise._RULED_BY_NOISE = variant.signal
        noise._BETA_BOUNDS = (variant.least_beta, 0.9)
        try:
            step = steps.make_train_step(
                task.model,
                tx,
                lambda _: 1.0,
                config,
                task.mesh,
                augment=True,
                seed=seed,
            )
            batch = {"image": images[indices][None], "label": labels[indices][None]}
            state, metrics = step(state, batch)
        finally:
            for name, original in originals.items():
                setattr(noise, name, original)
        return state, metrics["loss"]

    images, labels = trainer.arrays
    shape = task.dataset.image_shape
    init = jax.jit(steps.make_init(task.model, tx, config, shape))
    train_step = jax.jit(train_step, donate_argnums=0)

    def run(variant, seed):
        numbers = tuple(map(np.float32, variant))
        state, losses = init(np.int32(seed)), []
        for step in range(total):
            places = data.batch_indices(step, BATCH_SIZE, len(kept), seed)
            state, loss = train_step(
                state,
                kept[places].astype(np.int32),
                images,
                labels,
                numbers,
                np.int32(seed),
            )
            losses.append(float(loss))
        last = losses[-len(losses) // 6 :]
        return {**evaluate(state), "training_loss": float(np.mean(last))}

    return run


def report():
    lines = [
        "| | validation accuracy, % | validation loss | training loss | seeds |",
        "|---|---:|---:|---:|---|",
    ]
    for name in VARIANTS:
        mine = [row for row in protocol.read(ROWS) if row["variant"] == name]
        if not mine:
            lines.append(f"| {name} | not run | | | |")
            continue

        def mean(field, mine=mine):
            return statistics.mean(row[field] for row in mine)

        seeds = ", ".join(str(row["seed"]) for row in mine)
        lines.append(
            f"| {name} | {100 * mean('accuracy'):.1f} | {mean('loss'):.3f} | "
            f"{mean('training_loss'):.3f} | {seeds} |"
        )
    lines += ["", "The training loss is the mean of the last sixth of the steps."]
    (ROWS.parent / "noise.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", help="a folder of train/<class>/*.jpg and test")
    parser.add_argument("--report", action="store_true")
    flags = parser.parse_args()
    if not flags.report:
        known = {(row["variant"], row["seed"]) for row in protocol.read(ROWS)}
        run = create_runner(flags.data_dir)
        for seed in SEEDS:
            for name, variant in VARIANTS.items():
                if (name, seed) not in known:
                    row = {"variant": name, "seed": seed, **run(variant, seed)}
                    row |= {"batch_size": BATCH_SIZE, **protocol.environment()}
                    protocol.append(ROWS, row)
                    print(row, flush=True)
    report()


if __name__ == "__main__":
    main()

"""NLCG against tuned momentum on the default config (digits, full batch, 60 steps).

    taskset -c 0 python benchmarks/digits/run.py

(On one core: with more, sums are taken in another order, and an image or two of the 360
comes out otherwise.)

NLCG is there twice: as the config has it, β clipped to 0.9, and with the paper's 1. All
get the same learning rates, chosen by the mean accuracy on a validation split (a fifth
of the training images, seeds 100 to 102); then seeds 0, 1 and 2 train on all the
training images and are tested. Every run is a line of `results.jsonl` beside this file;
what is there already is not run again. The table is `results.md`.
"""

import json
import os
import pathlib
import platform
import statistics
import tempfile
import time

import jax
import jaxlib
import optax

from nlcg_optax.training import loop
from nlcg_optax.training.config import apply_overrides, load_config

HERE = pathlib.Path(__file__).resolve().parent
CONFIG = HERE.parents[1] / "configs" / "digits_resnet8.py"
OPTIMIZERS = {
    "nlcg": ["optimizer.name=nlcg"],  # as the config has it: β ≤ 0.9
    "nlcg, β ≤ 1": ["optimizer.name=nlcg", "optimizer.nlcg.beta_bounds=(0.0, 1.0)"],
    "momentum": ["optimizer.name=momentum"],
}
LEARNING_RATES = (0.1, 0.2, 0.4, 0.8, 1.6)
TUNING_SEEDS = (100, 101, 102)
SEEDS = (0, 1, 2)


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run(optimizer: str, rate: float, seed: int, split: str) -> dict:
    config = load_config(CONFIG)
    overrides = [
        *OPTIMIZERS[optimizer],
        f"optimizer.learning_rate={rate}",
        f"seed={seed}",
        "eval_every_epochs=60",
        "checkpoint_every_epochs=60",
    ]
    if split == "validation":
        overrides += ["dataset.validation_fraction=0.2", "batch_size=1150"]
    apply_overrides(config, overrides)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as workdir:
        result = loop.train_and_evaluate(config, workdir)
    return {
        "optimizer": optimizer,
        "learning_rate": rate,
        "seed": seed,
        "split": split,
        "steps": result.step,
        **result.metrics[split],
        "seconds": round(time.monotonic() - start, 1),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "optax": optax.__version__,
        "device": jax.devices()[0].device_kind,
        "cores": cores(),
    }


def main() -> None:
    path = HERE / "results.jsonl"
    rows = (
        [json.loads(line) for line in path.read_text().splitlines()]
        if path.exists()
        else []
    )

    def cell(optimizer: str, rate: float, seed: int, split: str) -> dict:
        wanted = (optimizer, rate, seed, split)
        for row in rows:
            if (
                row["optimizer"],
                row["learning_rate"],
                row["seed"],
                row["split"],
            ) == wanted:
                return row
        rows.append(run(*wanted))
        with path.open("a") as file:
            file.write(json.dumps(rows[-1], ensure_ascii=False) + "\n")
        return rows[-1]

    def mean(cells: list[dict], metric: str) -> float:
        return statistics.mean(cell[metric] for cell in cells)

    tuned, tested = {}, {}
    for name in OPTIMIZERS:
        tuned[name] = {
            rate: [cell(name, rate, seed, "validation") for seed in TUNING_SEEDS]
            for rate in LEARNING_RATES
        }
        # The lower loss decides between equal accuracies.
        best = max(
            LEARNING_RATES,
            key=lambda rate, cells=tuned[name]: (
                mean(cells[rate], "accuracy"),
                -mean(cells[rate], "loss"),
            ),
        )
        tested[name] = [cell(name, best, seed, "test") for seed in SEEDS]

    header = "| optimizer | " + " | ".join(f"{r:g}" for r in LEARNING_RATES) + " |"
    lines = [header, "|---" * (len(LEARNING_RATES) + 1) + "|"]
    for name, by_rate in tuned.items():
        columns = [f"{mean(cells, 'accuracy'):.4f}" for cells in by_rate.values()]
        lines.append(f"| {name} | {' | '.join(columns)} |")
    lines = [
        "Validation accuracy (mean of three seeds) by learning rate:",
        "",
        *lines,
        "",
    ]
    lines += ["Test accuracy at the chosen rate:", ""]
    lines += ["| optimizer | rate | " + " | ".join(f"seed {s}" for s in SEEDS)]
    lines[-1] += " | mean |"
    lines += ["|---" * (len(SEEDS) + 3) + "|"]
    for name, cells in tested.items():
        accuracies = [row["accuracy"] for row in cells]
        columns = [f"{x:.4f}" for x in (*accuracies, statistics.mean(accuracies))]
        rate = f"{cells[0]['learning_rate']:g}"
        lines.append(f"| {name} | {rate} | {' | '.join(columns)} |")
    row = rows[-1]
    lines += [
        "",
        f"`taskset -c 0 python benchmarks/digits/run.py`; Python {row['python']}, jax "
        f"{row['jax']}, optax {row['optax']}, device: {row['device']}, {row['cores']} "
        "core(s).",
    ]
    (HERE / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

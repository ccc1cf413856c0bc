"""What a history in half precision does to training: the default config, three seeds.

    taskset -c 1 python benchmarks/update_cost/history.py    # about 4 minutes

Digits, ResNet-8, full batch, 60 steps, rate 0.4: the paper's optimizer (β ≤ 0.9) with
its whole state, and with history in bfloat16. Writes `results/history.md`.
"""

import pathlib
import platform
import statistics
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import optax

import nlcg_optax
from nlcg_optax.training import loop, optimizers
from nlcg_optax.training.config import apply_overrides, load_config

HERE = pathlib.Path(__file__).resolve().parent
CONFIG = HERE.parents[1] / "configs" / "digits_resnet8.py"
SEEDS = (0, 1, 2)
OPTIONS = {
    "float32 history": None,
    "bfloat16 history": jnp.bfloat16,
}


def run(state_dtype: Any, seed: int) -> tuple[dict, float, float]:
    """Metrics of the test split, of the last training step, and bytes of the state."""
    optimizers.OPTIMIZERS["nlcg"] = lambda config, rate: nlcg_optax.nlcg(
        rate,
        preconditioner="diagonal_bfgs",
        nesterov=False,
        state_dtype=state_dtype,
    )
    config = load_config(CONFIG)
    apply_overrides(config, [f"seed={seed}", "eval_every_epochs=60"])
    apply_overrides(config, ["optimizer.name=nlcg", "optimizer.learning_rate=0.4"])
    apply_overrides(config, ["schedule.name=cosine", "schedule.warmup_epochs=5"])
    apply_overrides(config, ["checkpoint_every_epochs=60", "compare_with=none"])
    with tempfile.TemporaryDirectory() as workdir:
        result = loop.train_and_evaluate(config, workdir)
    arrays = [x for x in jax.tree.leaves(result.state.opt_state) if x.ndim]
    size = sum(x.size for x in jax.tree.leaves(result.state.params))
    skipped = nlcg_optax.diagnostics(result.state.opt_state)["skipped_curvature"]
    return result.metrics["test"], sum(x.nbytes for x in arrays) / size, float(skipped)


def main() -> None:
    seeds = " | ".join(f"seed {seed}" for seed in SEEDS)
    lines = [f"| state | bytes/parameter | {seeds} | mean | test loss | skipped |"]
    lines.append("|---" * (len(SEEDS) + 5) + "|")
    for name, state_dtype in OPTIONS.items():
        cells = [run(state_dtype, seed) for seed in SEEDS]
        accuracies = [metrics["accuracy"] for metrics, *_ in cells]
        columns = [f"{x:.4f}" for x in (*accuracies, statistics.mean(accuracies))]
        loss = statistics.mean(metrics["loss"] for metrics, *_ in cells)
        skipped = statistics.mean(count for *_, count in cells)
        lines.append(
            f"| {name} | {cells[0][1]:.0f} | {' | '.join(columns)} | {loss:.4f} "
            f"| {skipped:.1f} |"
        )
        print(lines[-1], flush=True)
    lines += [
        "",
        "Test accuracy after 60 steps; skipped: curvature updates skipped, of 60. "
        f"`taskset -c 1 python benchmarks/update_cost/history.py`; Python "
        f"{platform.python_version()}, jax {jax.__version__}, optax "
        f"{optax.__version__}, device: {jax.devices()[0].device_kind}, 1 core.",
    ]
    (HERE / "results" / "history.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

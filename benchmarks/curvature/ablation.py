"""What each part of the quadratic model is worth, where batches are large.

    taskset -c 1 python benchmarks/curvature/ablation.py --data_dir=FOLDER
    taskset -c 1 python benchmarks/curvature/ablation.py --data_dir=FOLDER --seeds=0,1,2
    python benchmarks/curvature/ablation.py --report    # results/ablation.md

The sweep's `cifar10_jpeg` with all 5,000 images in each of 30 steps: its model, crops,
penalty and evaluation, by its own program (`benchmarks/large_batch`). Nothing is tuned.
The reference takes the products on a tenth of the batch, and one residual direction;
what the other rows say is what they differ in. Every run is a line of
`results/ablation.jsonl`, and what is there is not run again. FOLDER is as for the
sweep.
"""

import argparse
import importlib
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import optax

import nlcg_optax

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "large_batch"))
import protocol  # noqa: E402

ROWS = HERE / "results" / "ablation.jsonl"
BATCH_SIZE = 5000
# What Muon, the best of the sweep's peers, ends with: its rate and momentum tuned.
TARGET = 1.518
REFERENCE = [
    "optimizer.name=nlcg_auto",
    "optimizer.nlcg_auto.curvature_fraction=0.1",
    "optimizer.nlcg_auto.curvature_min_examples=1",
]


def hessian_of(outputs_fn, loss_fn, *, l2, l2_mask, has_aux, in_turn):
    """In place of `gauss_newton` in the trainer: the Hessian of the same loss."""
    del has_aux, in_turn

    def value(params):
        squares = jax.tree.map(
            lambda w, kept: kept * jnp.sum(w**2), params, l2_mask(params)
        )
        penalty = 0.5 * l2 * sum(jax.tree.leaves(squares))
        return loss_fn(outputs_fn(params)[0]) + penalty

    return nlcg_optax.hessian(value)


class Variant(NamedTuple):
    """The reference but for some things.

    Attributes:
      overrides: of the trainer's config, fields of `optimizer.nlcg_auto`.
      options: arguments of `scale_by_quadratic_model`.
      preconditioner: what makes it, or them; None for the config's.
      curvature: in place of `gauss_newton`.
    """

    overrides: tuple[str, ...] = ()
    options: dict[str, Any] = {}  # noqa: RUF012
    preconditioner: Callable[[], Any] | None = None
    curvature: Callable[..., Any] = nlcg_optax.gauss_newton


def length_only(rule: str, bounds: tuple[float, float] = (0.0, 0.9)) -> Variant:
    """NLCG's own direction, and of the model but the length along it."""

    def direction():
        return nlcg_optax.scale_by_conjugate_direction(
            rule,
            nlcg_optax.scale_by_orthogonalization(),
            beta_bounds=bounds,
            nesterov=True,
        )

    return Variant((), {"history": 0, "residuals": 0}, direction)


def orthogonalized_and_rms():
    return [
        nlcg_optax.scale_by_orthogonalization(),
        optax.scale_by_adam(b1=0.0, b2=0.99),
    ]


VARIANTS = {
    "reference": Variant(),
    "preconditioner: none": Variant(("preconditioner=none",)),
    "preconditioner: RMS": Variant(("preconditioner=rms",)),
    "preconditioner: BFGS diagonal": Variant(("preconditioner=diagonal_bfgs",)),
    "preconditioner: Adam's": Variant(("preconditioner=adam",)),
    "two preconditioners: orthogonalized and RMS": Variant(
        (), {}, orthogonalized_and_rms
    ),
    "length only, β = 0": length_only("fletcher_reeves", (0.0, 0.0)),
    "length only, Fletcher–Reeves ≤ 0.9": length_only("fletcher_reeves"),
    "length only, Polak–Ribière ≤ 0.9": length_only("polak_ribiere"),
    "length only, Dai–Yuan ≤ 0.9": length_only("dai_yuan"),
    "length only, Hager–Zhang ≤ 0.9": length_only("hager_zhang"),
    "products on all of the batch": Variant(("curvature_fraction=1.0",)),
    "products on a half": Variant(("curvature_fraction=0.5",)),
    "products on a quarter": Variant(("curvature_fraction=0.25",)),
    "products on a twentieth": Variant(("curvature_fraction=0.05",)),
    "1 past step": Variant((), {"history": 1}),
    "6 past steps": Variant((), {"history": 6}),
    "no residual direction": Variant((), {"residuals": 0}),
    "2 residual directions": Variant((), {"residuals": 2}),
    # Which is the default.
    "products on a twentieth, 2 residual directions": Variant(
        ("curvature_fraction=0.05",), {"residuals": 2}
    ),
    "products on a twentieth, 5 residual directions": Variant(
        ("curvature_fraction=0.05",), {"residuals": 5}
    ),
    "1 past step, no residual direction": Variant((), {"history": 1, "residuals": 0}),
    "Hessian": Variant((), {}, None, hessian_of),
    "Hessian, 1 past step, no residual direction": Variant(
        (), {"history": 1, "residuals": 0}, None, hessian_of
    ),
    "λ = 0": Variant((), {"damping": 0.0, "noise_damping": 0.0, "first_damping": 0.0}),
    "λ = 0.01 whatever the noise": Variant((), {"noise_damping": 0.0}),
    "λ = 0.1 whatever the noise": Variant((), {"noise_damping": 0.0, "damping": 0.1}),
    "no bound on the length": Variant((), {"max_growth": float("inf")}),
}


def create_trainer(sweep, workload):
    """The sweep's trainer, with what the config cannot say."""

    class Trainer(sweep.Trainer):
        def compiled(self, optimizer, *arguments):
            variant = VARIANTS[optimizer]
            create = self.task.create_optimizer

            def model(preconditioner, **given):
                if preconditioner == "diagonal_bfgs":
                    preconditioner = nlcg_optax.scale_by_diagonal_bfgs()
                options = given | {"residuals": 1} | variant.options
                tx = nlcg_optax.scale_by_quadratic_model(preconditioner, **options)
                return optax.chain(tx, optax.scale(-1.0))

            def auto(num_steps, *, preconditioner, **given):
                return model(preconditioner, horizon=num_steps, **given)

            def create_optimizer(config, words, rate, horizon):
                if variant.preconditioner is None:
                    return create(config, words, rate, horizon)
                return model(variant.preconditioner(), horizon=horizon)

            with (
                mock.patch.object(nlcg_optax, "nlcg_auto", auto),
                mock.patch.object(nlcg_optax, "gauss_newton", variant.curvature),
                mock.patch.object(self.task, "create_optimizer", create_optimizer),
            ):
                return super().compiled(optimizer, *arguments)

    return Trainer(workload)


def read():
    """The rows of variants that there are."""
    return [row for row in protocol.read(ROWS) if row["optimizer"] in VARIANTS]


def measure(names, seeds, data_dir):
    """Runs what is missing, one seed of all after the other."""
    sweep = importlib.import_module("sweep")
    workload = sweep.WORKLOADS["cifar10_jpeg"](data_dir)
    overrides = {
        name: [
            *REFERENCE,
            *(f"optimizer.nlcg_auto.{x}" for x in variant.overrides),
            # The trainer names the coefficients by it.
            f"optimizer.nlcg_auto.residuals={variant.options.get('residuals', 1)}",
        ]
        for name, variant in VARIANTS.items()
    }
    workload = workload._replace(
        optimizers={name: (words, 1.0) for name, words in overrides.items()}
    )
    schedule = next(iter(workload.schedules))  # which the quadratic model ignores
    trainer = None
    for name in names:
        for seed in seeds:
            done = {(row["optimizer"], row["seed"]) for row in read()}
            if (name, seed) in done:
                continue
            trainer = trainer or create_trainer(sweep, workload)
            cell = protocol.Cell("test", 1.0, schedule, seed)
            row = trainer.run(name, BATCH_SIZE, cell)
            row = {"workload": "cifar10_jpeg", **row, **protocol.environment()}
            protocol.append(ROWS, row)
            last = "diverged" if row["diverged"] else f"{row['curve'][-1]:.4f}"
            print(f"{name}, seed {seed}: {last}, {row['accuracy']}", flush=True)


def report():
    """The table of what there is."""
    lines = [
        f"| | loss at the end | test accuracy, % | first step at {TARGET} | seeds |",
        "|---|---:|---:|---:|---|",
    ]
    rows = read()
    for name in VARIANTS:
        mine = sorted(
            (row for row in rows if row["optimizer"] == name),
            key=lambda row: row["seed"],
        )
        if not mine:
            lines.append(f"| {name} | not run | | | |")
            continue
        seeds = ", ".join(str(row["seed"]) for row in mine)
        if any(row["diverged"] for row in mine):
            lines.append(f"| {name} | diverged | | | {seeds} |")
            continue
        firsts = [
            next((i for i, x in enumerate(row["curve"], 1) if x <= TARGET), None)
            for row in mine
        ]
        reached = ", ".join("–" if i is None else str(i) for i in firsts)
        loss = mean_and_error([row["curve"][-1] for row in mine], "{:.3f}")
        accuracy = mean_and_error([100 * row["accuracy"] for row in mine], "{:.1f}")
        lines.append(f"| {name} | {loss} | {accuracy} | {reached} | {seeds} |")
    versions = sorted({", ".join(map(" ".join, r["versions"].items())) for r in rows})
    devices = sorted({f"{r['device']}, {r['cores']} core(s)" for r in rows})
    lines += ["", f"{'; '.join(versions)}; device: {'; '.join(devices)}."]
    text = "\n".join(lines) + "\n"
    (ROWS.parent / "ablation.md").write_text(text)
    print(text)


def mean_and_error(values, form):
    text = form.format(statistics.mean(values))
    if len(values) > 1:
        error = statistics.stdev(values) / len(values) ** 0.5
        text += " ± " + form.format(error)
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", help="a folder of train/<class>/*.jpg and test")
    parser.add_argument("--variants", help="some of them: a;b", default=None)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--report", action="store_true")
    flags = parser.parse_args()
    names = flags.variants.split(";") if flags.variants else list(VARIANTS)
    if unknown := set(names) - set(VARIANTS):
        parser.error(f"unknown: {sorted(unknown)}; there are {list(VARIANTS)}")
    if not flags.report:
        seeds = [int(seed) for seed in flags.seeds.split(",")]
        measure(names, seeds, flags.data_dir)
    report()


if __name__ == "__main__":
    main()

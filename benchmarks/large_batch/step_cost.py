"""What a step costs over a whole run, beside SOAP's and AdamW's, and what states hold.

    taskset -c 1 python benchmarks/large_batch/step_cost.py --workload=autoencoder \
        --batch_sizes=32,512
    python benchmarks/large_batch/step_cost.py --table

All train at once, by turns of some steps, so that whatever else the machine does slows
all. SOAP and AdamW have the rates and the schedules that the sweep chose; AdamW's step
is next to nothing but the gradient. Cells are lines of `results/step_cost.jsonl`, and
`--table` writes `results/step_cost.md`.
"""

import argparse
import statistics
from typing import Any

import jax
import numpy as np
import protocol
import report
import sweep
from workloads import WORKLOADS, Workload

from nlcg_optax.training import data

RESULTS = sweep.RESULTS / "step_cost.jsonl"
OURS, PEERS = "nlcg by curvature", ("soap", "adamw")
TURN = 20  # steps


class Run:
    """One of the trainings, step by step."""

    def __init__(self, trainer: sweep.Trainer, optimizer: str, size: int, setting: Any):
        rate, schedule = setting
        self.workload, self.arrays = trainer.workload, trainer.arrays
        self.kept = trainer.phase("test").kept
        self.size = size
        self.num_steps = self.workload.num_steps(size, len(self.kept))
        init, self.step, _ = trainer.compiled(optimizer, size, self.num_steps)
        _, self.rates = sweep.words_and_rates(
            self.workload, optimizer, rate, schedule, self.num_steps
        )
        self.state: Any = init(np.int32(0))
        self.seconds: list[float] = []

    def turn(self) -> None:
        """Some more steps, each with its time."""
        first = len(self.seconds)
        for i in range(first, min(first + TURN, self.num_steps)):
            places = data.batch_indices(i, self.size, len(self.kept), 0)
            indices = self.kept[places].astype(np.int32)
            clock = sweep.now()
            self.state, _ = self.step(
                self.state, indices, self.arrays, self.rates[i], np.int32(0)
            )
            jax.block_until_ready(self.state)
            self.seconds.append(sweep.now() - clock)


def arrays_of_state(run: Run) -> float:
    """How many numbers the optimizer's state holds for each of the parameters."""

    def numbers(tree: Any) -> int:
        return sum(np.size(leaf) for leaf in jax.tree.leaves(tree))

    return numbers(run.state.opt_state) / numbers(run.state.params)


def measure(name: str, workload: Workload, size: int) -> dict:
    """The row of a cell."""
    rows = protocol.read(sweep.RESULTS / f"{name}.jsonl")
    settings = {OURS: (1.0, next(iter(workload.schedules)))}
    for peer in PEERS:
        cell = peer, size, "test"
        settings[peer] = next(
            (row["learning_rate"], row["schedule"])
            for row in rows
            if (row["optimizer"], row["batch_size"], row["phase"]) == cell
        )
    trainer = sweep.Trainer(workload)
    runs = [Run(trainer, who, size, settings[who]) for who in settings]
    while len(runs[0].seconds) < runs[0].num_steps:
        for run in runs:
            run.turn()
    ours, *peers = (run.seconds for run in runs)
    return {
        "workload": name,
        "batch_size": size,
        "steps": runs[0].num_steps,
        "median_ms": [milliseconds(statistics.median(run.seconds)) for run in runs],
        "mean_ms": [milliseconds(statistics.mean(run.seconds)) for run in runs],
        "ratios": [
            # The first step of each reads what no later one has to.
            [
                protocol.rounded(
                    statistics.median(ours[i : i + TURN])
                    / statistics.median(peer[i : i + TURN])
                )
                for i in range(0, len(ours), TURN)
            ]
            for peer in peers
        ],
        "state": [protocol.rounded(arrays_of_state(run)) for run in runs],
        **protocol.environment(),
    }


def milliseconds(seconds: float) -> float:
    return round(1e3 * seconds, 3)


def table(rows: list[dict]) -> str:
    cells = []
    for row in rows:
        ours, *peers = row["mean_ms"]
        cells.append(
            [
                f"`{row['workload']}`, {row['batch_size']:,} ({row['steps']:,} steps)",
                ", ".join(f"{each:.3g}" for each in row["median_ms"]),
                *(
                    f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to "
                    f"{max(ratios):.2f}); {ours / peer:.2f}"
                    for ratios, peer in zip(row["ratios"], peers, strict=True)
                ),
                ", ".join(f"{each:.1f}" for each in row["state"]),
            ]
        )
    header = ["batches", "median step, ms", "over SOAP's", "over AdamW's"]
    header += ["numbers of state a parameter"]
    lines = [
        "# What a step costs over a whole run",
        "",
        f"`{OURS}` first, then SOAP and AdamW as tuned; the first two renew their "
        "bases in every step. Ratios are of turns, their median and range; after the "
        "semicolon of all steps of the run.",
        "",
        *report.table(header, cells),
        "",
        f"`python benchmarks/large_batch/step_cost.py`, turns of {TURN} steps, seconds "
        f"of the processor; {report.environments(rows)}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=WORKLOADS)
    parser.add_argument("--batch_sizes", help="such as 64,256; all by default")
    parser.add_argument("--data_dir", help="the folder of a workload that needs one")
    parser.add_argument("--table", action="store_true", help="write step_cost.md")
    flags = parser.parse_args()
    if flags.table:
        RESULTS.with_suffix(".md").write_text(table(protocol.read(RESULTS)))
        return
    if not flags.workload:
        parser.error("--workload or --table?")
    workload = WORKLOADS[flags.workload](flags.data_dir)
    for size in sweep.sizes_of(workload, flags.batch_sizes):
        row = measure(flags.workload, workload, size)
        protocol.append(RESULTS, row)
        print(table([row]), flush=True)


if __name__ == "__main__":
    main()

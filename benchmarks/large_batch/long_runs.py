"""Twenty thousand steps: what drifts, leaks or diverges late, and what a resume keeps.

    taskset -c 1 python benchmarks/large_batch/long_runs.py --workload=digits \
        --batch_size=64 --horizon=known
    python benchmarks/large_batch/long_runs.py --table

`nlcg_auto(num_steps)`, or with `--horizon=endless` `nlcg_auto(math.inf)`, whose rate
never falls and which is evaluated at its average. Every thousand steps the losses are
noted, and how much memory and how many compiled programs there are. Half way the state
is written to a file and read back, and 100 steps are made from it and from what was
never written: both have to be equal to the last bit. Runs are lines of
`results/long_runs.jsonl`; `--table` writes `results/long_runs.md`.
"""

import argparse
import math
import os
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np
import protocol
import report
import sweep
from workloads import OPTIMIZERS, WORKLOADS

import nlcg_optax
from nlcg_optax.training import data

RESULTS = sweep.RESULTS / "long_runs.jsonl"
STEPS, EVERY, TOGETHER = 20_000, 1_000, 100


class Run:
    """A training, step by step."""

    def __init__(self, trainer: sweep.Trainer, size: int, horizon: float):
        self.kept, self.evaluate, _ = trainer.phase("test")
        self.size, self.arrays = size, trainer.arrays
        words, _ = OPTIMIZERS["nlcg by curvature"]
        init, step = trainer.task.make(words, size, horizon)
        self.step = jax.jit(step, donate_argnums=0)
        self.state: Any = jax.jit(init)(np.int32(0))
        self.count = 0

    def go(self, steps: int) -> list[float]:
        """So many steps more; their losses."""
        losses = []
        for _ in range(steps):
            places = data.batch_indices(self.count, self.size, len(self.kept), 0)
            indices = self.kept[places].astype(np.int32)
            self.state, loss = self.step(
                self.state, indices, self.arrays, np.float32(1), np.int32(0)
            )
            losses.append(loss)
            self.count += 1
        return [float(loss) for loss in losses]

    def averaged(self) -> dict[str, float]:
        """The scores at the average of the parameters."""
        params = nlcg_optax.eval_params(self.state.opt_state, self.state.params)
        named = hasattr(self.state, "_replace")  # a tuple, or the trainer's
        replace = self.state._replace if named else self.state.replace
        return self.evaluate(replace(params=params))


def resumed(run: Run) -> bool:
    """Whether steps from a file are those that would have been made without it."""
    leaves, tree = jax.tree.flatten(jax.device_get(run.state))
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "state.npz"
        np.savez(path, **{str(i): leaf for i, leaf in enumerate(leaves)})
        with np.load(path) as file:
            read = [file[str(i)] for i in range(len(leaves))]
    count = run.count
    run.go(TOGETHER)
    without = jax.tree.leaves(jax.device_get(run.state))
    run.state, run.count = jax.device_put(jax.tree.unflatten(tree, read)), count
    run.go(TOGETHER)
    again = jax.tree.leaves(jax.device_get(run.state))
    return all(
        np.array_equal(a, b, equal_nan=True)
        for a, b in zip(without, again, strict=True)
    )


def memory() -> float:
    """Resident, in MiB."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def train(name: str, data_dir: str | None, size: int, endless: bool) -> dict:
    """A run to its end; its row."""
    workload = WORKLOADS[name](data_dir)
    compiled = 0

    def listen(event: str, duration: float, **kwargs: Any) -> None:
        nonlocal compiled
        del duration, kwargs
        compiled += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    run = Run(sweep.Trainer(workload), size, math.inf if endless else STEPS)
    seen, start, same = [], sweep.now(), None
    while run.count < STEPS:
        if run.count == STEPS // 2:
            same = resumed(run)
        losses = run.go(EVERY - run.count % EVERY)
        told = nlcg_optax.diagnostics(run.state.opt_state)
        point = {
            "step": run.count,
            "training": protocol.rounded(float(np.mean(losses))),
            "highest": protocol.rounded(max(losses)),
            "loss": protocol.rounded(run.evaluate(run.state)["loss"]),
            "averaged": protocol.rounded(run.averaged()["loss"]),
            "rate": protocol.rounded(float(told["noise_rate"])),
            "returns": int(told["noise_returns"]),
            "nonfinite": int(told["noise_nonfinite"]),
            "memory": round(memory(), 1),
            "compiled": compiled,
        }
        seen.append(point)
        print(point, flush=True)
    return {
        "workload": name,
        "batch_size": size,
        "horizon": "endless" if endless else "known",
        "steps": STEPS,
        "same_after_resume": same,
        "seconds": round(sweep.now() - start, 1),
        "seen": seen,
    }


def table(rows: list[dict]) -> str:
    """The Markdown."""
    cells = []
    for row in rows:
        seen = row["seen"]
        fifth, last = seen[len(seen) // 5 - 1], seen[-1]
        after = [point["averaged"] for point in seen[len(seen) // 5 :]]
        cells.append(
            [
                f"`{row['workload']}`, {row['batch_size']:,}",
                row["horizon"],
                *(
                    f"{p['training']:.4g}; {p['loss']:.4g}; {p['averaged']:.4g}"
                    for p in (fifth, seen[len(seen) // 2 - 1], last)
                ),
                f"{min(after):.4g} to {max(after):.4g}",
                f"{last['returns']}; {last['nonfinite']}",
                f"{fifth['memory']:,.0f} to {last['memory']:,.0f}",
                str(last["compiled"] - fifth["compiled"]),
                "yes" if row["same_after_resume"] else "**no**",
            ]
        )
    header = ["batches", "end", "after a fifth", "after a half", "at the end"]
    header += ["averaged since the fifth", "returns; not finite", "memory, MiB"]
    header += ["compiled since", "a resume is the same"]
    lines = [
        "# Long runs",
        "",
        f"{STEPS:,} steps of `nlcg_auto`, the end known or not. Losses: the mean of "
        f"the {EVERY:,} steps before, of held-out examples, and of these at the "
        "average of the parameters.",
        "",
        "<!-- long runs -->",
        "",
        *report.table(header, cells),
        "",
        "<!-- end -->",
        "",
        f"`python benchmarks/large_batch/long_runs.py`; {report.environments(rows)}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=WORKLOADS)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--horizon", choices=("known", "endless"), default="known")
    parser.add_argument("--data_dir", help="the folder of a workload that needs one")
    parser.add_argument("--table", action="store_true", help="write long_runs.md")
    flags = parser.parse_args()
    if flags.table:
        RESULTS.with_suffix(".md").write_text(table(protocol.read(RESULTS)))
        return
    if not (flags.workload and flags.batch_size):
        parser.error("--workload and --batch_size, or --table?")
    endless = flags.horizon == "endless"
    row = train(flags.workload, flags.data_dir, flags.batch_size, endless)
    protocol.append(RESULTS, row | protocol.environment())


if __name__ == "__main__":
    main()

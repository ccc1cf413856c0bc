"""Trains for a long time, and watches what a long run must not lose.

    python benchmarks/soak/run.py --seconds=3600

A small ResNet-8 learns digits in steps of 64 images, with an evaluation and a
checkpoint every few epochs, until the time is over; then the run is stopped by SIGTERM,
as a user would stop it. Once a second the memory, the open files, the threads and the
programs that XLA has compiled are counted. Writes `results/tables.md`, and ends with 1
if something grew that should not.
"""

import argparse
import json
import os
import pathlib
import platform
import signal
import sys
import tempfile
import threading
import time

import jax
import numpy as np

from nlcg_optax.training import loop
from nlcg_optax.training.config import apply_overrides, load_config

HERE = pathlib.Path(__file__).resolve().parent
OVERRIDES = (
    "model.filters=4",
    "batch_size=64",
    "num_epochs=1e6",
    "optimizer.name=nlcg",
    "optimizer.learning_rate=0.01",
    "schedule.name=constant",
    "schedule.warmup_epochs=5",
    "compare_with=none",
    "eval_every_epochs=10",
    "checkpoint_every_epochs=10",
)
# What memory may grow by after the first fifth of the run: allocators keep some.
MEMORY_SLACK = 0.05


class Watch(threading.Thread):
    """Counts once a second, and ends the run when its time is over."""

    def __init__(self, seconds: float, metrics_path: pathlib.Path):
        super().__init__(daemon=True)
        self._seconds, self._path = seconds, metrics_path
        self._compiled = 0
        self.rows: list[dict[str, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **kwargs) -> None:
        del duration, kwargs
        self._compiled += event == "/jax/core/compile/backend_compile_duration"

    def run(self) -> None:
        began = time.monotonic()
        while time.monotonic() - began < self._seconds:
            time.sleep(1.0)
            self.rows.append({"seconds": time.monotonic() - began, **self._count()})
        os.kill(os.getpid(), signal.SIGTERM)

    def _count(self) -> dict[str, float]:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        return {
            "step": last_step(tail(self._path)),
            "memory": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
            "files": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
            "compiled": self._compiled,
        }


def tail(path: pathlib.Path) -> list[str]:
    """The last lines of a file, of which the first may be cut off."""
    if not path.exists():
        return []
    with path.open("rb") as file:  # the whole of it would be memory that grows
        file.seek(max(0, path.stat().st_size - 4096))
        return file.read().decode(errors="ignore").splitlines()


def last_step(lines: list[str]) -> int:
    """The step of the last whole line of `metrics.jsonl`."""
    for line in reversed(lines):
        try:
            return json.loads(line)["step"]
        except json.JSONDecodeError:
            continue  # cut off: it is being written
    return 0


def judge(rows: list[dict[str, float]]) -> tuple[list[tuple], list[str]]:
    """What became of each count after the first fifth of the run.

    Returns:
      Rows of a table (name, at the fifth, at the end, largest), and what grew.
    """
    steady = rows[len(rows) // 5 :]
    table, grown = [], []
    for name in ("memory", "files", "threads", "compiled"):
        values = np.array([row[name] for row in steady])
        # Means over a tenth of it: files and threads come and go with each checkpoint.
        tenth = max(1, len(values) // 10)
        first, last = values[:tenth].mean(), values[-tenth:].mean()
        table.append((name, first, last, values.max()))
        slack = {"memory": MEMORY_SLACK * first, "compiled": 0.0}.get(name, 2.0)
        if last - first > slack:
            grown.append(f"{name} grew from {first:.1f} to {last:.1f}")
    return table, grown


def main() -> int:
    """Runs, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3600.0)
    args = parser.parse_args()
    config = load_config("digits_resnet8")
    apply_overrides(config, OVERRIDES)
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder) / "run"
        watch = Watch(args.seconds, workdir / "metrics.jsonl")
        watch.start()
        result = loop.train_and_evaluate(config, workdir, "quiet")
    table, grown = judge(watch.rows)
    units = {
        "memory": "resident memory, MiB",
        "files": "open files",
        "threads": "threads of Python",
        "compiled": "programs compiled",
    }
    verdict = "; ".join(grown) or "Nothing grew by more than it may"
    lines = [
        "| | after a fifth of the run | at the end | largest in between |",
        "|---|---|---|---|",
        *(
            f"| {units[name]} | {first:,.1f} | {last:,.1f} | {largest:,.1f} |"
            for name, first, last, largest in table
        ),
        "",
        f"{result.step:,} steps in {args.seconds:,.0f} s, with an evaluation and a "
        "checkpoint every 220 of them; each number is the mean over a tenth of what "
        f"follows the first fifth. {verdict}.",
        "",
        f"`python benchmarks/soak/run.py --seconds={args.seconds:g}`; Python "
        f"{platform.python_version()}, jax {jax.__version__}, "
        f"{jax.devices()[0].device_kind}.",
        "",
    ]
    (HERE / "results" / "tables.md").write_text("\n".join(lines))
    print("\n".join(lines))
    return int(bool(grown))


if __name__ == "__main__":
    sys.exit(main())

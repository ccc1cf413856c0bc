"""A run small enough for tests: a tiny model on a few digits.

As a program it is `nlcg-train` with that model, without curves, and with the digits
from a file, since scikit-learn and Matplotlib take longer to import than all the rest:
`python tiny.py --workdir=FOLDER [--config.FIELD=VALUE ...]`.
"""

import contextlib
import io
import os
import pathlib
import resource
import subprocess
import sys
from unittest import mock

import flax.linen as nn
import numpy as np
import xla
from waiting import HANGING_SECONDS

from nlcg_optax.training import cli, curves, loop, models
from nlcg_optax.training.config import apply_overrides, load_config
from nlcg_optax.training.data import digits, load
from nlcg_optax.training.data.sources import Arrays

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "digits_resnet8.py"

TRAIN_EXAMPLES = 96
OVERRIDES = (
    "compare_with=none",
    f"dataset.max_train_examples={TRAIN_EXAMPLES}",
    "batch_size=40",  # no divisor of 96: batches straddle epochs
    "num_epochs=5",  # 12 steps
    "eval_batch_size=100",  # no divisor of 360
    "eval_every_epochs=2.5",
    "checkpoint_every_epochs=1.7",
    "average_decay=0.9",
    "mesh.min_size_to_split=8",
    # State enough to be split and saved; and rounding stays rounding: orthogonalization
    # amplifies that of small singular values, which a tiny model's gradient has.
    "optimizer.name=nlcg",
    "optimizer.learning_rate=0.4",
    "schedule.name=cosine",
    "schedule.warmup_epochs=5",
    "optimizer.nlcg.preconditioner=diagonal_bfgs",
)
_LIMIT = "TINY_FILE_SIZE_LIMIT"
#: Names the file of :func:`save_digits`, for the processes that tests start.
DIGITS = "TINY_DIGITS"


class Tiny(nn.Module):
    """In place of the ResNet where the loop is tested: it compiles at once."""

    num_classes: int
    batch_norm_momentum: float = 0.5

    @nn.compact
    def __call__(self, x, train, mask=None):
        mask = None if mask is None else mask[:, None, None, None]
        norm = nn.BatchNorm(
            use_running_average=not train, momentum=self.batch_norm_momentum
        )
        x = nn.relu(norm(x, mask=mask))
        return nn.Dense(self.num_classes)(x.reshape(len(x), -1))


def save_digits(path):
    """The examples that a run sees: to choose them takes scikit-learn too."""
    found = load("digits", max_train_examples=TRAIN_EXAMPLES)
    parts = found.train.images, found.train.labels, found.test.images, found.test.labels
    np.savez(path, *parts)


def load_saved(split_seed):
    assert split_seed == 0
    with np.load(os.environ[DIGITS]) as file:
        arrays = list(file.values())
    names = tuple(map(str, range(10)))
    return Arrays(*arrays[:2]), Arrays(*arrays[2:]), names


create_model = models.create_model


def create_tiny_model(name, num_classes, **options):
    """In place of `models.create_model`."""
    create_model(name, num_classes, **options)  # its errors
    return Tiny(num_classes)


def tiny_model(config, num_classes, remat=False):
    """In place of `loop.create_model`, for `train_and_evaluate`."""
    loop.create_model(config, num_classes, remat)  # its errors
    return Tiny(num_classes)


def train(*args):
    return loop.train_and_evaluate(*args, create_model=tiny_model)


def run(workdir, *overrides, devices=1):
    """A run in this process on so many of its devices, without curves.

    It is what :func:`start` begins, without the seconds that a process takes for its
    imports. Returns what it printed.
    """
    config = load_config(CONFIG)
    apply_overrides(config, [*OVERRIDES, *overrides])
    printed = io.StringIO()
    with (
        mock.patch("jax.device_count", lambda: devices),
        mock.patch.object(curves, "plot_curves"),
        contextlib.redirect_stdout(printed),
    ):
        train(config, workdir)
    return printed.getvalue()


def start(workdir, *args, devices=1, process=None, limit=None):
    """Starts this program on so many CPU devices.

    Args:
      process: (port, number of processes, this one's number), or None for one alone.
      limit: largest file that it can write, in bytes.
    """
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla.flags(devices)}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    if limit is not None:
        env[_LIMIT] = str(limit)
    command = [sys.executable, __file__, f"--workdir={workdir}", *args]
    if process is not None:
        port, count, number = process
        command += [f"--coordinator=localhost:{port}"]
        command += [f"--num_processes={count}", f"--process_id={number}"]
    return subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes, code=0):
    """Waits for processes to end with that exit code; returns what they printed."""
    try:
        outputs = [
            process.communicate(timeout=HANGING_SECONDS)[0] for process in processes
        ]
    finally:
        for process in processes:
            process.kill()
    if code is not None:
        assert {process.returncode for process in processes} == {code}, outputs
    return outputs


def main():
    if _LIMIT in os.environ:
        limit = int(os.environ[_LIMIT])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    curves.plot_curves = lambda *args, **options: None
    digits.load = load_saved
    overrides = [f"--config.{override}" for override in OVERRIDES]
    return cli.main([f"--config={CONFIG}", *overrides, *sys.argv[1:]], train)


if __name__ == "__main__":
    sys.exit(main())

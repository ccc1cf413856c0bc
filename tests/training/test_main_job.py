"""The main job as a newcomer runs it: the default config, from the command line."""

import os
import pathlib
import subprocess
import sys

import pytest
import xla
from waiting import HANGING_SECONDS

from nlcg_optax.training import metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("steps", [10, pytest.param(60, marks=pytest.mark.long)])
def test_the_default_config_reaches_97_percent_in_full_batch_steps(tmp_path, steps):
    # Not from the repository: the config is a built-in one.
    program = ROOT / "examples" / "train.py"
    command = [sys.executable, program, f"--workdir={tmp_path}"]
    if steps != 60:  # as it is
        command.append(f"--config.num_epochs={steps}")
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            # Unlike other tests it runs for longer than it compiles.
            "XLA_FLAGS": f"--xla_backend_optimization_level=1 {xla.GIVEN}",
        },
        capture_output=True,
        text=True,
        timeout=HANGING_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    rows = metrics.read_metrics(tmp_path / "metrics.jsonl")
    train = [row for row in rows if row["split"] == "train"]
    assert len(train) <= steps
    tests = [row for row in rows if row["split"] == "test"]
    assert tests[-1]["accuracy"] >= 0.97
    # By BatchNorm's running averages it would rise to 3 at the second.
    first, *later = [row["loss"] for row in tests]
    assert len(later) == {10: 1, 60: 11}[steps] and max(later) < first
    assert train[-1]["cross_entropy"] < 0.1 * train[0]["cross_entropy"]
    assert all(row["loss"] > row["cross_entropy"] for row in train)  # and the penalty
    assert (tmp_path / "curves.png").exists()
    printed = done.stdout
    for text in (
        "resnet8, 77,818 parameters",
        "digits, 1,437 training, 360 test images of 8×8×1, 10 classes",
        "1,437 images, 1,437 per device",
        f"{steps}: {steps} epochs of 1 step",
        f"done: test accuracy {rows[-1]['accuracy']:.4f} (best ",
        f"{tmp_path / 'checkpoints'}, the last of step {steps}",
        # How it compares; not if the others took more steps.
        f"after 60 steps {100 * rows[-1]['accuracy']:.1f}% of the test images"
        if steps == 60
        else "not with tuned Muon",
    ):
        assert text in printed, printed
    assert "\033" not in printed + done.stderr  # no colours in a log

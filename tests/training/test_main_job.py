"""The main job as a newcomer runs it: the default config, from the command line."""

import pathlib
import subprocess
import sys

from nlcg_optax.training import metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_the_default_config_reaches_97_percent_in_60_full_batch_steps(tmp_path):
    command = [sys.executable, "examples/train.py", f"--workdir={tmp_path}"]
    done = subprocess.run(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    rows = metrics.read_metrics(tmp_path / "metrics.jsonl")
    train = [row for row in rows if row["split"] == "train"]
    assert len(train) <= 60
    assert [row for row in rows if row["split"] == "test"][-1]["accuracy"] >= 0.97
    assert train[-1]["loss"] < 0.2 * train[0]["loss"]
    assert (tmp_path / "curves.png").exists()
    assert f"checkpoint in {tmp_path / 'checkpoints'}" in done.stderr

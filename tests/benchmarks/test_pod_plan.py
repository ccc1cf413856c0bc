"""The plan for a pod: what it reads off a compiled program, on a tiny case."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import compiled
import pytest
from test_compiled import PROGRAM
from waiting import HANGING_SECONDS

ROOT = pathlib.Path(__file__).resolve().parents[2]
PLAN = ROOT / "benchmarks" / "pod_plan" / "plan.py"


@pytest.fixture(scope="module")
def plan():
    spec = importlib.util.spec_from_file_location("pod_plan", PLAN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_collectives_of_a_program(plan):
    program = compiled.read(PROGRAM, devices=8)
    found = {c["kind"]: c for c in plan.read_collectives(program)}
    assert found == {
        "all-gather": {
            "kind": "all-gather",
            "group": 4,
            "in_loop_of": 1,
            "count": 1,
            "bytes": 160,
            "wire_bytes": 120,
        },
        "reduce-scatter": {
            "kind": "reduce-scatter",
            "group": 2,
            "in_loop_of": 1,
            "count": 1,
            "bytes": 80,
            "wire_bytes": 40,
        },
        "all-reduce": {
            "kind": "all-reduce",
            "group": 8,
            "in_loop_of": 3,
            "count": 3,
            "bytes": 3 * (40 + 12),
            "wire_bytes": 3 * 52 * 7 / 4,
        },
        "collective-permute": {
            "kind": "collective-permute",
            "group": 8,
            "in_loop_of": 1,
            "count": 1,
            "bytes": 40,
            "wire_bytes": 40,
        },
    }


@pytest.mark.long
def test_tiny_step():
    command = [sys.executable, str(PLAN), "--one", "--devices=8"]
    command += ["--config", str(ROOT / "configs" / "digits_resnet8.py")]
    command += ["--image_shape=8x8x1", "--classes=10", "--config.batch_size=64"]
    command += ["--config.optimizer.name=nlcg", "--config.optimizer.learning_rate=0.01"]
    command += ["--config.schedule.name=cosine"]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=HANGING_SECONDS,
    )
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout)
    parameters = 77_818
    assert row["parameters"] == parameters
    assert row["devices"] == row["images_per_device_at_a_time"] == 8
    # The whole state, and images and labels of 8 examples.
    assert row["memory"]["arguments"] == row["state_bytes_whole"] + 8 * (64 + 4)
    assert row["memory"]["aliased"] > 0.95 * row["state_bytes_whole"]
    # Nothing but all-reduces: the gradient, the loss and the accuracy, and of each of
    # BatchNorm's 240 channels two sums forward, and one or two more backward.
    (collective,) = row["collectives"]
    assert collective["kind"] == "all-reduce"
    assert collective["group"] == 8
    few = 2 * 240 + 2
    assert 4 * (parameters + few) <= collective["bytes"] <= 4 * (parameters + 2 * few)
    assert row["wire_bytes"] == pytest.approx(2 * 7 / 8 * collective["bytes"])

"""Orthogonalization on eight devices: the numbers of one, and what is sent."""

import json
import pathlib

import pytest

WORKER = pathlib.Path(__file__).parents[1] / "workers" / "placement.py"


@pytest.fixture(scope="module")
def found(run_on_devices):
    # Without LLVM's optimizations, which leave collectives alone, it compiles faster.
    done = run_on_devices(WORKER, 8, "--xla_backend_optimization_level=0")
    return json.loads(done.stdout)


def test_the_numbers_are_those_of_one_device(found):
    assert len(found) == 33
    worst = max(found, key=lambda case: found[case]["difference"])
    assert found[worst]["difference"] < 1e-12, worst

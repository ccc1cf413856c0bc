"""The numbers of the house before it was rebuilt, to 1e-12 in float64.

The trajectories of `workers/recorded.py` were recorded from earlier code. Each step is
made again from the point where it was made then; what the optimizer remembers is its
own.
"""

import pathlib
import sys

import numpy as np
import pytest

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE / "workers"))
import recorded  # noqa: E402

DATA = HERE / "trajectories" / "house"


def load(name):
    with np.load(DATA / name) as file:
        return dict(file)


EXPECTED = load("one_device.npz")


@pytest.mark.parametrize("name", recorded.CASES)
@pytest.mark.usefixtures("x64")
def test_each_step_is_the_recorded_one(name):
    points, expected = EXPECTED[name]
    _, got = recorded.CASES[name](points)
    scale = np.max(np.abs(expected), axis=1, keepdims=True)
    errors = np.abs(got - expected) / np.where(scale == 0, 1, scale)
    assert np.max(errors) < 1e-12


def test_eight_devices_make_the_recorded_steps(run_on_devices, tmp_path):
    file = tmp_path / "eight.npz"
    run_on_devices(HERE / "workers" / "recorded.py", 8, str(file), "--mesh")
    expected, got = load("eight_devices.npz"), np.load(file)
    assert set(got.files) == set(recorded.MESH_CASES) == set(expected)
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-12, atol=1e-12)

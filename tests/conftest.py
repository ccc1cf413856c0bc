import os
import pathlib
import subprocess
import sys

import jax
import pytest
from waiting import HANGING_SECONDS, PATIENT_XLA

# Programs that tests start; importing one would change JAX's settings for all.
collect_ignore = ["workers"]

REFERENCE = pathlib.Path(__file__).resolve().parents[2] / "shared" / "reference"


@pytest.fixture(autouse=True)
def strict_promotion(request):
    """Silent promotions between dtypes are bugs in an optimizer.

    Tests of code that promotes (some of optax's and flax's does) are marked
    `standard_promotion`.
    """
    marked = request.node.get_closest_marker("standard_promotion")
    with jax.numpy_dtype_promotion("standard" if marked else "strict"):
        yield


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def run_on_devices():
    """Runs a program on so many CPU devices, warnings being errors.

    Devices are counted when JAX starts, so this needs a process of its own.
    """

    def run(program, count, flags=""):
        flags = f"--xla_force_host_platform_device_count={count} {flags} {PATIENT_XLA}"
        done = subprocess.run(
            [sys.executable, "-W", "error", program],
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            capture_output=True,
            text=True,
            timeout=HANGING_SECONDS,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run

import os
import pathlib
import subprocess
import sys

import jax
import pytest
import xla
from waiting import HANGING_SECONDS

# Before JAX starts its devices; the programs that tests start inherit them.
os.environ["XLA_FLAGS"] = xla.flags()

# Of this process alone, for meshes; what does not ask for others is on the first.
jax.config.update("jax_num_cpu_devices", 8)

# Programs that tests start; importing one would change JAX's settings for all.
collect_ignore = ["workers"]

REFERENCE = pathlib.Path(__file__).resolve().parents[2] / "shared" / "reference"


# The files whose single tests take longest. They come first, so that no worker is left
# with one of them when the others have nothing to do.
LONGEST = ("test_main_job", "test_notebooks", "test_recorded", "test_docs")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(autouse=True, scope="session")
def compilation_cache(tmp_path_factory):
    """What this process or one that it starts compiles, it compiles once.

    Every worker has a folder of its own: JAX's files are not written in one go, and
    another worker might read half of one.
    """
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    for name, value in options.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture(autouse=True)
def strict_promotion(request):
    """Silent promotions between dtypes are bugs in an optimizer.

    Tests of code that promotes (some of optax's and flax's does) are marked
    `standard_promotion`.
    """
    marked = request.node.get_closest_marker("standard_promotion")
    with jax.numpy_dtype_promotion("standard" if marked else "strict"):
        yield


@pytest.fixture(autouse=True, scope="module")
def trainer_on_one_device(request):
    """The trainer takes all devices that it counts; on eight its tests take longer."""
    with pytest.MonkeyPatch.context() as patch:
        if "training" in request.path.parts:
            patch.setattr(jax, "device_count", lambda: 1)
        yield


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def run_on_devices():
    """Runs a program on so many CPU devices, warnings being errors.

    What only needs eight devices has them in this process.
    """

    def run(program, count, *args):
        done = subprocess.run(
            [sys.executable, "-W", "error", program, *args],
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": xla.flags(count),
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            capture_output=True,
            text=True,
            timeout=HANGING_SECONDS,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run

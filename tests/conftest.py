import pathlib

import jax
import pytest

# Programs that tests start; importing one would change JAX's settings for all.
collect_ignore = [
    "front_doors_worker.py",
    "linesearch_worker.py",
    "training/mesh_worker.py",
]

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

import pathlib

import jax
import pytest

# Silent promotions between dtypes are bugs in an optimizer.
jax.config.update("jax_numpy_dtype_promotion", "strict")

REFERENCE = pathlib.Path(__file__).resolve().parents[2] / "shared" / "reference"


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield

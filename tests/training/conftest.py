import os

import jax
import pytest
import tiny


def pytest_collection_modifyitems(items):
    # Flax and most of optax's optimizers promote dtypes.
    for item in items:
        if "training" in item.path.parts:
            item.add_marker(pytest.mark.standard_promotion)


@pytest.fixture(autouse=True, scope="session")
def compilation_cache(tmp_path_factory):
    """Runs of one config, in this process or another, compile once a session."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    for name, value in options.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture(autouse=True, scope="session")
def saved_digits(tmp_path_factory):
    """For the processes that tests start."""
    os.environ[tiny.DIGITS] = str(tmp_path_factory.mktemp("digits") / "digits.npz")
    tiny.save_digits(os.environ[tiny.DIGITS])

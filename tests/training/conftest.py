import os

import pytest
import tiny


def pytest_collection_modifyitems(items):
    # Flax and most of optax's optimizers promote dtypes.
    for item in items:
        if "training" in item.path.parts:
            item.add_marker(pytest.mark.standard_promotion)


@pytest.fixture(autouse=True, scope="session")
def saved_digits(tmp_path_factory):
    """For the processes that tests start."""
    os.environ[tiny.DIGITS] = str(tmp_path_factory.mktemp("digits") / "digits.npz")
    tiny.save_digits(os.environ[tiny.DIGITS])

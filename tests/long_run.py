"""What is tried in the long run alone."""

import pytest


def rest_long(values, quick):
    """The values of a test's parameter; `make test` tries those that are `quick`."""
    long = pytest.mark.long
    return [v if v in quick else pytest.param(v, marks=long) for v in values]

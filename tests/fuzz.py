"""How many cases a test of drawn inputs tries: few, or ``FUZZ=1000 pytest ...``."""

import os


def cases(quick: int) -> int:
    """So many, unless the environment's FUZZ says how many."""
    return int(os.environ.get("FUZZ", quick))

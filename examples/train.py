"""The command `nlcg-train` where it is not installed: see `--help`."""

import sys

from nlcg_optax.training.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""Trains a ResNet with NLCG: see `python examples/train.py --help`."""

import sys

from nlcg_optax.training.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""What is a matrix in a tree of parameters: functions for ``matrices=``."""

from nlcg_optax.matrices.describe import equinox, flax, last_axis

__all__ = ["equinox", "flax", "last_axis"]

"""What is a matrix in a tree of parameters: functions for ``matrices=``."""

from nlcg_optax.matrices.recognition import equinox, flax, last_axis, recognize

__all__ = ["equinox", "flax", "last_axis", "recognize"]

"""Minima of functions without noise: `minimize` and its parts."""

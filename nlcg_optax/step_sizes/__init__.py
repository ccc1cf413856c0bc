"""Step sizes: how far to go along a direction."""

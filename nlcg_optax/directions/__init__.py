"""Directions: how z and the last direction make the next, d = −z + βd."""

"""What goes wrong with data."""


class DataError(ValueError):
    """The data that was asked for is unknown, missing, or cannot be read."""

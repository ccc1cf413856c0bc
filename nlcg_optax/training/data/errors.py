"""What goes wrong with data."""

from collections.abc import Iterable

_NAMED = 10  # broken images that an error names


class DataError(ValueError):
    """The data that was asked for is unknown, missing, or cannot be read."""


class BrokenImage(DataError):
    """An image that cannot be decoded.

    Args:
      description: where it is.
      reason: what the decoder says.
    """

    def __init__(self, description: str, reason: object):
        super().__init__(f"cannot decode the image {description}: {reason}")
        self.description, self.reason = description, reason

    def __reduce__(self):
        return type(self), (self.description, self.reason)


def broken_images(found: Iterable[BrokenImage], checked: str) -> DataError:
    """One error for all the broken images, of which it names the first ten.

    One of an image that is there already is left out. `checked` says in words which
    images were looked at.
    """
    each = {error.description: error for error in found}
    if len(each) == 1:
        return next(iter(each.values()))
    lines = [f"  {name}: {each[name].reason}" for name in sorted(each)[:_NAMED]]
    if len(each) > _NAMED:
        lines.append(f"  and {len(each) - _NAMED:,} more")
    return DataError(
        "\n".join([f"{len(each):,} of {checked} cannot be decoded:", *lines])
    )

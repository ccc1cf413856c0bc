"""Data sets by their names."""

import math
import os

from nlcg_optax.training.data import digits, image_folder, tfds
from nlcg_optax.training.data.errors import DataError
from nlcg_optax.training.data.sources import (
    Dataset,
    Split,
    decode,
    first_shape,
    split_indices,
    take,
)

#: What :func:`load` knows, in words.
DATASETS = (digits.DESCRIPTION, image_folder.DESCRIPTION, tfds.DESCRIPTION)

_MEMORY_LIMIT = 2**30


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    split_seed: int = 0,
    validation_fraction: float = 0.0,
    image_size: int | None = None,
    in_memory: str | bool = "auto",
    max_train_examples: int | None = None,
    test_fraction: float | None = None,
) -> Dataset:
    """Loads a data set by its name.

    A TFDS data set that is not yet in ``data_dir`` is downloaded and written there,
    once, as ``array_record`` files. That needs a network, the package
    ``importlib_resources`` and, for the many data sets that TFDS makes from arrays
    (cifar10, mnist, ...), TensorFlow; where one is missing the error says so. Reading
    the files, here or on any machine that they are copied to, needs none of these.

    Args:
      name: one of ``DATASETS``.
      data_dir: where the images of ``folder`` lie, or TFDS's data folder.
      split_seed: decides which examples are held out.
      validation_fraction: how much of the training split to hold out, in [0, 1). With
        labels at hand (digits, a folder, a TFDS split in memory) every class gives its
        share.
      image_size: images in memory are resized (shorter side) and centrally cropped to
        this height and width; streamed images are left to :func:`stream`. Needed where
        sizes differ.
      in_memory: ``"auto"`` (decoded training and test images under 1 GiB), ``"yes"`` or
        ``"no"``; also a bool.
      max_train_examples: keep only so many training examples, after those held out.
      test_fraction: how much of a folder that has no test split is held out as one, by
        ``split_seed``; of every class its share.

    Returns:
      The data set.

    Raises:
      DataError: a ValueError; an unknown name, a folder that is missing or empty, all
        images that are broken, images of differing size, a download that failed.

    Example:
      >>> digits = load("digits")
      >>> digits.train.images.shape, len(digits.test), digits.num_classes
      ((1437, 8, 8, 1), 360, 10)
    """
    memory = {"auto": None, "yes": True, "no": False, True: True, False: False}
    if in_memory not in memory:
        raise DataError(f'in_memory is "auto", "yes" or "no", not {in_memory!r}')
    if not 0 <= validation_fraction < 1:
        raise DataError(
            f"validation_fraction must lie in [0, 1), not {validation_fraction}"
        )
    if test_fraction is not None and not 0 < test_fraction < 1:
        raise DataError(f"test_fraction must lie in (0, 1), not {test_fraction}")
    if test_fraction is not None and name != "folder":
        raise DataError(f"test_fraction is for the data set 'folder', not {name!r}")
    sizes = {"max_train_examples": max_train_examples, "image_size": image_size}
    for option, value in sizes.items():
        if value is not None and value < 1:
            raise DataError(f"{option} must be positive, not {value}")

    if name == "digits":
        train, test, class_names = digits.load(split_seed)
    elif name == "folder":
        train, test, class_names = image_folder.load(
            data_dir, test_fraction, split_seed
        )
    else:
        train, test, class_names = tfds.load(
            name, data_dir, "known: " + "; ".join(DATASETS)
        )

    (height, width, channels), first = first_shape(train)
    if image_size is not None:
        height = width = image_size
    shape = (height, width, channels)

    num_held_out = round(validation_fraction * len(train))
    num_train = len(train) - num_held_out
    num_train = min(num_train, max_train_examples or num_train)
    keep = memory[in_memory]
    if keep is None:
        num_examples = num_train + num_held_out + len(test)
        keep = num_examples * math.prod(shape) < _MEMORY_LIMIT

    if keep and len(train) * math.prod(shape) < _MEMORY_LIMIT:
        # Before the split, as only decoding shows the labels of a TFDS data set.
        train, test = decode((train, test), shape, image_size, first)
    order_labels = getattr(train, "labels", None)
    validation = None
    if num_held_out:
        train_indices, held_out = split_indices(
            len(train), num_held_out, order_labels, split_seed
        )
        validation, train = take(train, held_out), take(train, train_indices)
        order_labels = getattr(train, "labels", None)
    if num_train < len(train):
        _, kept = split_indices(len(train), num_train, order_labels, split_seed)
        train = take(train, kept)
    if keep:
        parts = [train, test] + ([validation] if validation else [])
        train, test, *rest = decode(parts, shape, image_size, first)
        validation = rest[0] if rest else None
    return Dataset(
        name=name,
        num_classes=len(class_names),
        class_names=class_names,
        image_shape=shape,
        train=Split(train),
        test=Split(test),
        validation=Split(validation) if validation else None,
    )

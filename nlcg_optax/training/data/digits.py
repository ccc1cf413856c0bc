"""The digits of scikit-learn."""

from typing import Any

import numpy as np

from nlcg_optax.training.data.sources import Arrays, split_indices, take

DESCRIPTION = (
    "digits: 1,797 grey images of 8x8 pixels, part of scikit-learn; no download"
)


def load(split_seed: int) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    """Training source, test source and class names."""
    from sklearn import datasets

    digits: Any = datasets.load_digits()
    # From 0..16 to the 0..255 of every other data set.
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    train, test = split_indices(len(labels), 360, labels, split_seed)
    everything = Arrays(images, labels)
    names = tuple(str(name) for name in digits.target_names)
    return take(everything, train), take(everything, test), names

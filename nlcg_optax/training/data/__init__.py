"""Image-classification data by name: load, index, augment, stream.

Three kinds of data sets, see ``DATASETS``: the digits that scikit-learn brings
along, a folder of images, and everything in the catalog of TensorFlow Datasets (TFDS).
TensorFlow itself is never imported here. Reading a TFDS data set does not need it;
preparing one for the first time mostly does, see :func:`load`.

A split that fits lies in memory as uint8, and training visits it through
:func:`batch_indices`; a larger one is read, decoded and cropped by :func:`stream`. In
both the batch of a step is a function of the seed and the step alone, so that a resumed
run sees what an uninterrupted one would have.
"""

from nlcg_optax.training.data.augmentation import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    augment,
    normalize_imagenet,
    standardize,
)
from nlcg_optax.training.data.errors import DataError
from nlcg_optax.training.data.order import batch_indices, epoch_indices
from nlcg_optax.training.data.registry import DATASETS, load
from nlcg_optax.training.data.sources import Dataset, Source, Split
from nlcg_optax.training.data.streaming import eval_batches, stream
from nlcg_optax.training.data.tfds import TFDS_DATASETS

__all__ = [
    "DATASETS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "TFDS_DATASETS",
    "DataError",
    "Dataset",
    "Source",
    "Split",
    "augment",
    "batch_indices",
    "epoch_indices",
    "eval_batches",
    "load",
    "normalize_imagenet",
    "standardize",
    "stream",
]

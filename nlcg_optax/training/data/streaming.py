"""Batches on the host, from memory or read ahead by threads."""

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Iterator
from typing import Any, cast

import numpy as np

from nlcg_optax.training.data import order
from nlcg_optax.training.data.errors import BrokenImage
from nlcg_optax.training.data.images import central_crop, random_resized_crop
from nlcg_optax.training.data.sources import Source, Split, differing_sizes, find_broken


def stream(
    split: Split,
    *,
    batch_size: int,
    seed: int = 0,
    start_step: int = 0,
    places: np.ndarray | None = None,
    image_size: int | None = None,
    flip: bool = True,
    train: bool = True,
    num_threads: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Reads a split in batches of ``image`` (uint8 [B, H, W, C]) and ``label`` (int32).

    For training the iterator is infinite, and the examples of a step are those of
    :func:`batch_indices`. With ``image_size``, images are ImageNet's random resized
    crops: 8% to 100% of the area, an aspect ratio from 3/4 to 4/3, and with ``flip``
    half of them flipped; a draw follows from the seed and the example's position in the
    sequence of all epochs. Without it they come as they are, and :func:`augment` is
    there for the device.

    For evaluation it is one pass in order, and the batches have a ``mask`` too, float32
    [B]: 1 for an example and 0 for what fills up the last batch. With ``image_size``
    the shorter side is resized to 256/224 of it, and the centre cut out.

    Resizing is Pillow's: bilinear and antialiased.

    Args:
      split: the examples.
      batch_size: B.
      seed: of order and crops, not negative.
      start_step: the first batch to read.
      places: the places of each batch, counted from 0, that are read, in that order;
        all of them by default. Several processes read a batch together so, each its
        own places.
      image_size: height and width of the images. Needed where sizes differ.
      flip: whether the random crops are flipped. Mirrored digits are no digits.
      train: for training or for evaluation.
      num_threads: threads that read ahead, about two batches; by default one for each
        core, up to 16. More compete with each other, unless the disk is slow.

    Returns:
      The iterator. Its arrays have as many rows as there are places.

    Raises:
      ValueError: if the batch size is below 1, the step negative, or, for training, the
        split smaller than a batch; for places that a batch does not have.
      DataError: while iterating, for images of differing size, and for broken ones; the
        split (of a large one, 100,000 images) is then looked through for others.
    """
    if batch_size < 1 or (train and batch_size > len(split)):
        raise ValueError(
            f"the batch size must be at least 1 and for training at most the number of "
            f"examples, {len(split)}, and is {batch_size}"
        )
    if start_step < 0:
        raise ValueError(f"the step must not be negative, and is {start_step}")
    places = _check_places(places, batch_size)
    random_crop = functools.partial(random_resized_crop, flip=flip)
    visits = _Visits(
        split.source,
        batch_size=batch_size,
        places=places,
        seed=seed if train else None,
        transform=image_size and (random_crop if train else central_crop),
        image_size=image_size,
    )
    if num_threads is None:
        num_threads = min(os.cpu_count() or 1, 16)
    return _stream(visits, start_step, max(1, num_threads))


def eval_batches(
    split: Split,
    batch_size: int,
    *,
    places: np.ndarray | None = None,
    image_size: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """One pass in order, for evaluation, over a split in memory or not.

    Args:
      split: the examples.
      batch_size: B.
      places: the places of each batch that are read, as in :func:`stream`.
      image_size: for a split that is not in memory, as in :func:`stream`; images in
        memory had theirs when they were loaded.

    Returns:
      An iterator of batches of ``image``, ``label`` and ``mask`` (float32: 1 for an
      example, 0 for what fills up the last batch), all of as many rows as there are
      places (B by default).
    """
    if not split.in_memory:
        return stream(
            split,
            batch_size=batch_size,
            places=places,
            image_size=image_size,
            train=False,
        )
    if batch_size < 1:
        raise ValueError(f"the batch size must be at least 1, and is {batch_size}")
    chosen = _check_places(places, batch_size)

    def batch(start: int) -> dict[str, np.ndarray]:
        positions = start + chosen
        # Some example or other, masked out, fills up the last batch.
        indices = np.minimum(positions, len(split) - 1)
        return {
            "image": split.images[indices],
            "label": split.labels[indices],
            "mask": (positions < len(split)).astype(np.float32),
        }

    return map(batch, range(0, len(split), batch_size))


def _check_places(places: np.ndarray | None, batch_size: int) -> np.ndarray:
    if places is None:
        return np.arange(batch_size)
    places = np.asarray(places)
    if places.size < 1 or places.min() < 0 or places.max() >= batch_size:
        raise ValueError(
            f"the places in a batch must lie between 0 and {batch_size - 1}, at least "
            f"one of them, and are {places}"
        )
    return places


@dataclasses.dataclass(frozen=True, repr=False)
class _Visits:
    """The examples as they are visited, batch after batch, each with its number."""

    source: Source
    batch_size: int
    places: np.ndarray
    seed: int | None  # None for evaluation, one pass in order
    transform: Any  # of an image, `image_size` and a random generator
    image_size: int | None

    def __len__(self) -> int:
        if self.seed is not None:
            return len(self.places) * 2**32  # steps without an end
        return len(self.places) * math.ceil(len(self.source) / self.batch_size)

    def __getitem__(self, index: int) -> dict[str, Any]:
        step, i = divmod(int(index), len(self.places))
        position = step * self.batch_size + int(self.places[i])
        count = len(self.source)
        if self.seed is None:
            # Some example or other, masked out, fills up the last batch.
            number, rng = min(position, count - 1), None
            extra = {"mask": np.float32(position < count)}
        else:
            epoch, offset = divmod(position, count)
            number = int(order.permutation(epoch, count, self.seed)[offset])
            rng, extra = np.random.default_rng([self.seed, position]), {}
        example = self.source[number]
        image = example["image"]
        if self.transform:
            image = self.transform(image, self.image_size, rng)
        return {**example, "image": image, "index": number, **extra}


def _stream(
    visits: _Visits, start_step: int, num_threads: int
) -> Iterator[dict[str, np.ndarray]]:
    import grain

    count = len(visits.places)
    if start_step * count >= len(visits):
        return
    # Threads work on chunks of a batch: Grain's overhead for each example is larger
    # than the decoding of a small image, and whole batches of ImageNet, one for each
    # thread, would take gigabytes.
    chunk = max(n for n in range(1, 65) if count % n == 0)
    chunks = count // chunk
    dataset: Any = grain.MapDataset.source(cast(Any, visits))
    dataset = dataset.batch(chunk, batch_fn=lambda examples: examples)
    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=max(2 * chunks, num_threads)
    )
    parts = dataset[start_step * chunks :].to_iter_dataset(options)
    try:
        yield from parts.batch(
            chunks, batch_fn=functools.partial(_batch, visits.source)
        )
    except BrokenImage as error:
        # Rather than one by one, each with a run that it ends.
        raise find_broken(visits.source, error) from error


def _batch(source: Any, chunks: Any) -> dict[str, np.ndarray]:
    examples = list(itertools.chain.from_iterable(chunks))
    first = examples[0]
    for example in examples:
        if example["image"].shape != first["image"].shape:
            raise differing_sizes(
                source.describe(example["index"]),
                example["image"].shape,
                source.describe(first["index"]),
                first["image"].shape,
            )
    keys = [key for key in first if key != "index"]
    return {key: np.stack([example[key] for example in examples]) for key in keys}

"""What a data set is: splits, and the sources that their examples come from."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, Protocol

import numpy as np

from nlcg_optax.training.data.errors import BrokenImage, DataError, broken_images
from nlcg_optax.training.data.images import read_image, resize_and_crop

# Images that are looked at for others where a stream comes upon a broken one.
_MOST_CHECKED = 100_000


class Source(Protocol):
    """Random access to examples.

    Item ``i`` is a dict of ``image`` (uint8 [height, width, channels]) and ``label``
    (int32 scalar).
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Split:
    """A split of a data set: its examples, in memory or read one by one.

    Attributes:
      source: the examples.
    """

    source: Source = dataclasses.field(repr=False)

    @classmethod
    def from_arrays(cls, images: Any, labels: Any) -> "Split":
        """A split in memory, of images [N, H, W, C] and labels [N]."""
        return cls(Arrays(np.asarray(images, np.uint8), np.asarray(labels, np.int32)))

    @property
    def in_memory(self) -> bool:
        """Whether ``images`` and ``labels`` are there."""
        return isinstance(self.source, Arrays)

    @property
    def images(self) -> np.ndarray:
        """All images, uint8 [N, H, W, C]; of a split in memory alone."""
        return self._arrays().images

    @property
    def labels(self) -> np.ndarray:
        """All labels, int32 [N]; of a split in memory alone."""
        return self._arrays().labels

    def _arrays(self) -> "Arrays":
        if not isinstance(self.source, Arrays):
            raise TypeError("this split is not in memory: read it with stream()")
        return self.source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[index]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set for image classification.

    Attributes:
      name: the name it was loaded by.
      num_classes: how many classes there are.
      class_names: their names, in the order of the labels.
      image_shape: height, width and channels; of a streamed data set without
        ``image_size`` those of its first training image.
      train: the training split.
      test: the test split; ``validation`` of TFDS where the test labels are secret, as
        ImageNet's are.
      validation: what was held out of the training split, or None.
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    train: Split
    test: Split
    validation: Split | None = None

    @property
    def streamed(self) -> bool:
        """Whether the splits are not in memory."""
        return not self.train.in_memory


@dataclasses.dataclass(frozen=True, repr=False)
class Arrays:
    """Examples in memory."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": self.labels[index]}

    def describe(self, index: int) -> str:
        """For messages: where the example comes from."""
        return f"image {index}"


@dataclasses.dataclass(frozen=True, repr=False)
class Files:
    """Image files, decoded as they are asked for."""

    paths: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = str(self.paths[index])
        return {"image": read_image(path, path, 3), "label": self.labels[index]}

    def describe(self, index: int) -> str:
        """For messages: where the example comes from."""
        return str(self.paths[index])


@dataclasses.dataclass(frozen=True, repr=False)
class Subset:
    """Some examples of a source."""

    source: Any
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[int(self.indices[index])]

    def describe(self, index: int) -> str:
        """For messages: where the example comes from."""
        return self.source.describe(int(self.indices[index]))


def take(source: Any, indices: np.ndarray) -> Any:
    """The examples of these indices."""
    if isinstance(source, Arrays):
        return Arrays(source.images[indices], source.labels[indices])
    if isinstance(source, Files):
        return Files(source.paths[indices], source.labels[indices])
    return Subset(source, indices)


def split_indices(
    num_examples: int, num_second: int, labels: np.ndarray | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Two random parts, of every class its share where the labels are given."""
    from sklearn import model_selection

    try:
        first, second = model_selection.train_test_split(
            np.arange(num_examples),
            test_size=num_second,
            stratify=labels,
            random_state=seed,
        )
    except ValueError as error:
        raise DataError(
            f"cannot take {num_second} of {num_examples} examples, of every class its "
            f"share: {error}"
        ) from error
    return np.sort(first), np.sort(second)


def first_shape(source: Any) -> tuple[tuple[int, int, int], str]:
    """Shape of the first image that can be decoded, and where it comes from.

    Raises:
      DataError: if none can.
    """
    broken = []
    for i in range(len(source)):
        try:
            return source[i]["image"].shape, source.describe(i)
        except BrokenImage as error:
            broken.append(error)
    raise broken_images(broken, f"{len(source):,} images")


def decode(
    sources: Sequence[Any],
    shape: tuple[int, int, int],
    image_size: int | None,
    first: str,
) -> list[Arrays]:
    """Reads whole sources into memory, by all cores, as images of that shape.

    With `image_size` they are resized to it. `first` says, for messages, where the
    image comes from that told the shape.

    Raises:
      DataError: for images of differing sizes; for all the images that are broken.
    """
    broken: list[BrokenImage] = []

    def decoded(source: Any) -> Arrays:
        if isinstance(source, Arrays) and source.images.shape[1:] == shape:
            return source
        images = np.empty((len(source), *shape), np.uint8)
        labels = np.empty(len(source), np.int32)

        def read(i: int, example: dict[str, Any]) -> None:
            image = example["image"]
            if image_size is not None:
                image = resize_and_crop(image, image_size, image_size)
            elif image.shape != shape:
                raise differing_sizes(source.describe(i), image.shape, first, shape)
            images[i], labels[i] = image, example["label"]

        broken.extend(_visit(source, range(len(source)), read))
        return Arrays(images, labels)

    arrays = list(map(decoded, sources))
    if broken:
        raise broken_images(broken, f"{sum(map(len, sources)):,} images")
    return arrays


def find_broken(source: Source, found: BrokenImage) -> DataError:
    """The error for all the broken images of a source in which one was found."""
    indices = range(min(len(source), _MOST_CHECKED))
    broken = _visit(source, indices, lambda i, example: None)
    checked = f"{len(source):,} images"
    if len(indices) < len(source):
        checked = f"the {len(indices):,} images that were looked at"
    return broken_images([found, *broken], checked)


def _visit(
    source: Source, indices: range, visit: Callable[[int, dict[str, Any]], None]
) -> list[BrokenImage]:
    """Calls `visit` for examples, by all cores; returns what was broken."""

    def visit_all(indices: range) -> list[BrokenImage]:
        broken = []
        for i in indices:
            try:
                example = source[i]
            except BrokenImage as error:
                broken.append(error)
            else:
                visit(i, example)
        return broken

    chunks = [indices[start : start + 256] for start in range(0, len(indices), 256)]
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        tasks = [pool.submit(visit_all, chunk) for chunk in chunks]
        try:
            return [error for task in tasks for error in task.result()]
        finally:
            pool.shutdown(cancel_futures=True)


def differing_sizes(
    found: str, shape: tuple[int, ...], first: str, first_shape: tuple[int, ...]
) -> DataError:
    """The error for two images that cannot be in one batch."""
    return DataError(
        f"the images differ in size, so image_size is needed: "
        f"{first} is {first_shape[0]}x{first_shape[1]} and "
        f"{found} is {shape[0]}x{shape[1]} (height x width)"
    )

"""Image-classification data by name: load, index, augment, stream.

Three kinds of data sets, see :data:`DATASETS`: the digits that scikit-learn brings
along, a folder of images, and everything in the catalog of TensorFlow Datasets (TFDS).
TensorFlow itself is never imported here. Reading a TFDS data set does not need it;
preparing one for the first time mostly does, see :func:`load`.

A split that fits lies in memory as uint8, and training visits it through
:func:`batch_indices`; a larger one is read, decoded and cropped by :func:`stream`. In
both the batch of a step is a function of the seed and the step alone, so that a resumed
run sees what an uninterrupted one would have.
"""

import dataclasses
import difflib
import functools
import itertools
import logging
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np

#: What :func:`load` knows, in words.
DATASETS = (
    "digits: 1,797 grey images of 8x8 pixels, part of scikit-learn; no download",
    "folder: images in <data_dir>/train/<class>/ and <data_dir>/test/<class>/ "
    "(or val/, validation/), JPEG or PNG",
    "any image-classification data set of TensorFlow Datasets by its name there: "
    "cifar10, cifar100, imagenet2012, ...; <data_dir> is TFDS's own, by default "
    "~/tensorflow_datasets",
)

# Sets of TFDS with an image, a label, and a split to test on: height and width (None:
# they differ from image to image) and the number of classes. Any other will do that has
# these; the names are for who looks for one.
TFDS_DATASETS: dict[str, tuple[int | None, int]] = {
    "beans": (500, 3),
    "caltech101": (None, 102),
    "caltech_birds2011": (None, 200),
    "cars196": (None, 196),
    "cassava": (None, 5),
    "cifar10": (32, 10),
    "cifar100": (32, 100),
    "cmaterdb": (32, 10),
    "dtd": (None, 47),
    "emnist": (28, 62),
    "fashion_mnist": (28, 10),
    "food101": (None, 101),
    "horses_or_humans": (300, 2),
    "i_naturalist2017": (None, 5089),
    "imagenet2012": (None, 1000),
    "imagenet_resized/32x32": (32, 1000),
    "imagenet_resized/64x64": (64, 1000),
    "imagenette": (None, 10),
    "imagewang": (None, 20),
    "kmnist": (28, 10),
    "mnist": (28, 10),
    "oxford_flowers102": (None, 102),
    "oxford_iiit_pet": (None, 37),
    "patch_camelyon": (96, 2),
    "places365_small": (256, 365),
    "rock_paper_scissors": (300, 3),
    "smallnorb": (96, 5),
    "stanford_dogs": (None, 120),
    "stl10": (96, 10),
    "sun397": (None, 397),
    "svhn_cropped": (32, 10),
}

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_MEMORY_LIMIT = 2**30
_EXTENSIONS = ("jpg", "jpeg", "png")
_EVAL_SPLITS = ("test", "val", "validation")

_logger = logging.getLogger(__name__)


class DataError(ValueError):
    """The data that was asked for is unknown, missing, or cannot be read."""


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
        return cls(_Arrays(np.asarray(images, np.uint8), np.asarray(labels, np.int32)))

    @property
    def in_memory(self) -> bool:
        """Whether ``images`` and ``labels`` are there."""
        return isinstance(self.source, _Arrays)

    @property
    def images(self) -> np.ndarray:
        """All images, uint8 [N, H, W, C]; of a split in memory alone."""
        return self._arrays().images

    @property
    def labels(self) -> np.ndarray:
        """All labels, int32 [N]; of a split in memory alone."""
        return self._arrays().labels

    def _arrays(self) -> "_Arrays":
        if not isinstance(self.source, _Arrays):
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


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    split_seed: int = 0,
    validation_fraction: float = 0.0,
    image_size: int | None = None,
    in_memory: str | bool = "auto",
    max_train_examples: int | None = None,
) -> Dataset:
    """Loads a data set by its name.

    A TFDS data set that is not yet in ``data_dir`` is downloaded and written there,
    once, as ``array_record`` files. That needs a network, the package
    ``importlib_resources`` and, for the many data sets that TFDS makes from arrays
    (cifar10, mnist, ...), TensorFlow; where one is missing the error says so. Reading
    the files, here or on any machine that they are copied to, needs none of these.

    Args:
      name: one of :data:`DATASETS`.
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

    Returns:
      The data set.

    Raises:
      DataError: a ValueError; an unknown name, a folder or an image that is missing or
        broken, images of differing size, a download that failed.

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
    for option, value in (
        ("max_train_examples", max_train_examples),
        ("image_size", image_size),
    ):
        if value is not None and value < 1:
            raise DataError(f"{option} must be positive, not {value}")

    if name == "digits":
        train, test, class_names = _load_digits(split_seed)
    elif name == "folder":
        train, test, class_names = _load_folder(data_dir)
    else:
        train, test, class_names = _load_tfds(name, data_dir)

    height, width, channels = train[0]["image"].shape
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
        train = _decode(train, shape, image_size)
    order_labels = getattr(train, "labels", None)
    validation = None
    if num_held_out:
        train_indices, held_out = _split_indices(
            len(train), num_held_out, order_labels, split_seed
        )
        validation, train = _take(train, held_out), _take(train, train_indices)
        order_labels = getattr(train, "labels", None)
    if num_train < len(train):
        _, kept = _split_indices(len(train), num_train, order_labels, split_seed)
        train = _take(train, kept)
    if keep:
        train, test = (_decode(source, shape, image_size) for source in (train, test))
        validation = validation and _decode(validation, shape, image_size)
    return Dataset(
        name=name,
        num_classes=len(class_names),
        class_names=class_names,
        image_shape=shape,
        train=Split(train),
        test=Split(test),
        validation=Split(validation) if validation else None,
    )


# Sources.


@dataclasses.dataclass(frozen=True, repr=False)
class _Arrays:
    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": self.labels[index]}

    def describe(self, index: int) -> str:
        return f"image {index}"


@dataclasses.dataclass(frozen=True, repr=False)
class _Files:
    paths: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = str(self.paths[index])
        return {"image": _read_image(path, path, 3), "label": self.labels[index]}

    def describe(self, index: int) -> str:
        return str(self.paths[index])


@dataclasses.dataclass(frozen=True, repr=False)
class _TfdsRecords:
    records: Any
    image_key: str
    label_key: str
    channels: int
    description: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[int(index)]
        image = _read_image(record[self.image_key], self.describe(index), self.channels)
        return {"image": image, "label": np.int32(record[self.label_key])}

    def describe(self, index: int) -> str:
        return f"{self.description}[{index}]"


@dataclasses.dataclass(frozen=True, repr=False)
class _Subset:
    source: Any
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[int(self.indices[index])]

    def describe(self, index: int) -> str:
        return self.source.describe(int(self.indices[index]))


def _take(source: Any, indices: np.ndarray) -> Any:
    if isinstance(source, _Arrays):
        return _Arrays(source.images[indices], source.labels[indices])
    if isinstance(source, _Files):
        return _Files(source.paths[indices], source.labels[indices])
    return _Subset(source, indices)


def _split_indices(
    num_examples: int, num_second: int, labels: np.ndarray | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
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


def _read_image(file: Any, description: str, channels: int) -> np.ndarray:
    import io

    from PIL import Image

    try:
        file = io.BytesIO(file) if isinstance(file, bytes) else file
        with Image.open(file, formats=("JPEG", "PNG")) as image:
            if channels == 3 and image.mode == "P":
                # Pillow warns where it drops a palette's transparency in one go.
                image = image.convert("RGBA")
            decoded = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"cannot decode the image {description}: {error}") from error
    return decoded[..., None] if channels == 1 else decoded


def _resize(
    image: np.ndarray,
    size: tuple[int, int],
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """Resizes to height and width, antialiased; ``box``: left, top, right, bottom."""
    from PIL import Image

    height, width = size
    grey = image.shape[-1] == 1
    resized = Image.fromarray(image[..., 0] if grey else image).resize(
        (width, height), Image.Resampling.BILINEAR, box=box
    )
    return np.asarray(resized).reshape(height, width, image.shape[-1])


def _resize_and_crop(image: np.ndarray, size: int, resize_to: int) -> np.ndarray:
    """Resizes the shorter side to ``resize_to`` and cuts out the centre."""
    height, width, _ = image.shape
    scale = resize_to / min(height, width)
    height, width = round(height * scale), round(width * scale)
    if (height, width) != image.shape[:2]:
        image = _resize(image, (height, width))
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def _decode(
    source: Any, shape: tuple[int, int, int], image_size: int | None
) -> _Arrays:
    if isinstance(source, _Arrays) and source.images.shape[1:] == shape:
        return source
    images = np.empty((len(source), *shape), np.uint8)
    labels = np.empty(len(source), np.int32)

    def decode(indices: range) -> None:
        for i in indices:
            example = source[i]
            image = example["image"]
            if image_size is not None:
                image = _resize_and_crop(image, image_size, image_size)
            elif image.shape != shape:
                raise _differing_sizes(source, i, image.shape, 0, shape)
            images[i], labels[i] = image, example["label"]

    chunks = [
        range(start, min(start + 256, len(source)))
        for start in range(0, len(source), 256)
    ]
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        tasks = [pool.submit(decode, chunk) for chunk in chunks]
        try:
            for task in tasks:
                task.result()
        finally:
            pool.shutdown(cancel_futures=True)
    return _Arrays(images, labels)


def _differing_sizes(
    source: Any,
    index: int,
    shape: tuple[int, ...],
    first_index: int,
    first_shape: tuple[int, ...],
) -> DataError:
    return DataError(
        f"the images differ in size, so image_size is needed: "
        f"{source.describe(first_index)} is {first_shape[0]}x{first_shape[1]} and "
        f"{source.describe(index)} is {shape[0]}x{shape[1]} (height x width)"
    )


# Loaders: the training source, the test source and the class names.


def _load_digits(split_seed: int) -> tuple[Any, Any, tuple[str, ...]]:
    from sklearn import datasets

    digits: Any = datasets.load_digits()
    # From 0..16 to the 0..255 of every other data set.
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    train, test = _split_indices(len(labels), 360, labels, split_seed)
    everything = _Arrays(images, labels)
    names = tuple(str(name) for name in digits.target_names)
    return _take(everything, train), _take(everything, test), names


def _load_folder(
    data_dir: str | os.PathLike[str] | None,
) -> tuple[Any, Any, tuple[str, ...]]:
    if data_dir is None:
        raise DataError(f"data set 'folder' needs data_dir. {DATASETS[1]}")
    root = pathlib.Path(data_dir).expanduser()
    for path in (root, root / "train"):
        if not path.is_dir():
            raise DataError(f"no folder {path}. {DATASETS[1]}")
    test_folder = next(
        (root / split for split in _EVAL_SPLITS if (root / split).is_dir()), None
    )
    if test_folder is None:
        raise DataError(
            f"no test split: {root} has none of the folders {', '.join(_EVAL_SPLITS)}"
        )
    train, class_names = _list_images(root / "train")
    test, test_class_names = _list_images(test_folder)
    if class_names != test_class_names:
        differing = sorted(set(class_names) ^ set(test_class_names))
        raise DataError(
            f"the class folders of {root / 'train'} and {test_folder} differ: "
            f"{', '.join(differing[:10])} in one alone"
        )
    return train, test, class_names


def _list_images(folder: pathlib.Path) -> tuple[_Files, tuple[str, ...]]:
    from sklearn import datasets

    extensions = [f".{e}" for ext in _EXTENSIONS for e in (ext, ext.upper())]
    listing: Any = datasets.load_files(
        str(folder), load_content=False, shuffle=False, allowed_extensions=extensions
    )
    if not listing.target_names:
        raise DataError(f"no class folders in {folder}")
    counts = np.bincount(
        np.asarray(listing.target, int), minlength=len(listing.target_names)
    )
    for name, count in zip(listing.target_names, counts, strict=True):
        if not count:
            raise DataError(f"no images ({', '.join(_EXTENSIONS)}) in {folder / name}")
    files = _Files(np.asarray(listing.filenames), listing.target.astype(np.int32))
    return files, tuple(listing.target_names)


def _load_tfds(
    name: str, data_dir: str | os.PathLike[str] | None
) -> tuple[Any, Any, tuple[str, ...]]:
    known = "known: " + "; ".join(DATASETS)
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(
            f"unknown data set {name!r} ({known}). TFDS is not installed: "
            "pip install 'nlcg-optax[train]'"
        ) from error

    kwargs: dict[str, Any] = {} if data_dir is None else {"data_dir": str(data_dir)}
    try:
        builder: Any = tfds.builder(name, file_format="array_record", **kwargs)
    except tfds.core.DatasetNotFoundError as error:
        catalog = ["digits", "folder"]
        # The community data sets would be looked up in the network.
        catalog += tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(name.split("/")[0], catalog, n=3)
        suggestion = f"; did you mean {' or '.join(close)}?" if close else ""
        raise DataError(f"unknown data set {name!r}{suggestion} ({known})") from error
    except (ValueError, ImportError) as error:
        raise DataError(
            f"TFDS does not accept the data set {name!r} ({known}): {str(error)[:600]}"
        ) from error

    # There may be a third: weights of the examples, or (places365_small) file names.
    image_key, label_key, *_ = builder.info.supervised_keys or ("image", "label")
    features = builder.info.features
    is_dict = isinstance(features, tfds.features.FeaturesDict)
    features: dict[str, Any] = dict(features.items()) if is_dict else {}
    image, label = features.get(image_key), features.get(label_key)
    if not (
        isinstance(image, tfds.features.Image)
        and isinstance(label, tfds.features.ClassLabel)
        and image.np_dtype == np.uint8
        and (channels := image.shape[-1]) in (1, 3)  # pyright: ignore
    ):
        raise DataError(
            f"TFDS's {name!r} is no image-classification data set: that has an 8-bit "
            "image of 1 or 3 channels and one class label"
        )
    if not builder.is_prepared():
        _prepare(name, builder)

    def source(split: str) -> _TfdsRecords:
        # The bytes rather than the pixels: Pillow decodes them, as it does a folder's.
        records = builder.as_data_source(
            split, decoders={image_key: tfds.decode.SkipDecoding()}
        )
        return _TfdsRecords(records, image_key, label_key, channels, f"{name} {split}")

    # The labels of a public benchmark's test split are often secret: -1 in TFDS.
    candidates = (
        source(split)
        for split in ("test", "validation")
        if split in builder.info.splits
    )
    test = next((s for s in candidates if s[0]["label"] >= 0), None)
    if test is None or "train" not in builder.info.splits:
        raise DataError(
            f"{name} needs the split train and a labelled split test or validation; it "
            f"has {', '.join(builder.info.splits)}"
        )
    return (
        source("train"),
        test,
        tuple(label.names or map(str, range(label.num_classes or 0))),
    )


def _prepare(name: str, builder: Any) -> None:
    _logger.info("preparing %s in %s, once", name, builder.data_dir)
    try:
        builder.download_and_prepare()
    except Exception as error:
        missing = [
            package
            for package in ("tensorflow", "importlib_resources")
            if f"No module named '{package}'" in str(error)
        ]
        if missing:
            advice = (
                f"preparing it needs the package {missing[0]}, once (reading it does "
                f"not): pip install {missing[0]}"
            )
        elif isinstance(error, AssertionError) and builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
            advice = "its files must be downloaded by hand"
        else:
            advice = (
                "if this machine has no network, prepare it on another one and copy "
                "that folder here"
            )
        raise DataError(
            f"cannot prepare the TFDS data set {name!r} in {builder.data_dir}: "
            f"{advice} ({type(error).__name__}: {str(error)[-600:]})"
        ) from error


# The order of the examples in memory.


@functools.lru_cache(maxsize=8)
def _permutation(epoch: int, num_examples: int, seed: int) -> np.ndarray:
    permutation = np.random.default_rng([seed, epoch]).permutation(num_examples)
    permutation.flags.writeable = False
    return permutation


def epoch_indices(epoch: int, num_examples: int, seed: int) -> np.ndarray:
    """The order of the examples in an epoch, a permutation from seed and epoch.

    Args:
      epoch: counted from 0.
      num_examples: N.
      seed: not negative.

    Returns:
      The permutation, int32 [N].
    """
    return _permutation(int(epoch), int(num_examples), int(seed)).astype(np.int32)


def batch_indices(
    step: int, batch_size: int, num_examples: int, seed: int
) -> np.ndarray:
    """The examples of a training step.

    The epochs' permutations follow on each other without a gap, and step k has the
    positions [kB, (k + 1)B) of that sequence: every example comes once an epoch, none
    is dropped, and a batch may straddle two epochs.

    Args:
      step: k, counted from 0.
      batch_size: B, from 1 to N.
      num_examples: N.
      seed: not negative.

    Returns:
      The indices, int32 [B], a function of the arguments alone.

    Raises:
      ValueError: if the batch size is not in [1, N] or the step is negative.

    Example:
      >>> [batch_indices(step, 2, 3, seed=0).tolist() for step in range(3)]
      [[2, 0], [1, 2], [0, 1]]
    """
    if not 1 <= batch_size <= num_examples:
        raise ValueError(
            f"the batch size must lie between 1 and the number of training examples, "
            f"{num_examples}, and is {batch_size}"
        )
    if step < 0:
        raise ValueError(f"the step must not be negative, and is {step}")
    epoch, offset = divmod(int(step) * batch_size, num_examples)
    indices = epoch_indices(epoch, num_examples, seed)[offset : offset + batch_size]
    if len(indices) < batch_size:
        rest = epoch_indices(epoch + 1, num_examples, seed)[: batch_size - len(indices)]
        indices = np.concatenate([indices, rest])
    return indices


# On the device.


def augment(
    key: jax.Array,
    images: jax.Array,
    *,
    crop_padding: int = 4,
    flip: bool = True,
    places: jax.Array | None = None,
    batch_size: int | None = None,
) -> jax.Array:
    """Random crops of the zero-padded images, half of them flipped left to right.

    The images keep their shape and dtype, and each has its own draw, which depends on
    its place in the batch and not on how the batch is split into parts.

    Args:
      key: a random key.
      images: [B, H, W, C], before any normalisation (the padding is black).
      crop_padding: pixels of padding on every side; 0 for no crop.
      flip: whether to flip. Mirrored digits are no digits.
      places: where the images are a part of a batch, their places in it, int [B].
      batch_size: with `places`, how many images the whole batch has.

    Returns:
      The augmented images.
    """
    if crop_padding < 0:
        raise ValueError(f"crop_padding must not be negative, and is {crop_padding}")
    crop_key, flip_key = jax.random.split(key)
    batch, *shape = images.shape
    batch = batch_size or batch

    def of_these(draws: jax.Array) -> jax.Array:
        return draws if places is None else draws[places]

    if crop_padding:
        pad = (crop_padding, crop_padding)
        padded = jnp.pad(images, ((0, 0), pad, pad, (0, 0)))
        corners = jax.random.randint(crop_key, (batch, 2), 0, 2 * crop_padding + 1)
        corners = of_these(corners)

        def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
            start = (corner[0], corner[1], jnp.zeros_like(corner[0]))
            return jax.lax.dynamic_slice(image, start, shape)

        images = jax.vmap(crop)(padded, corners)
    if flip:
        flipped = jax.random.bernoulli(flip_key, 0.5, (batch, 1, 1, 1))
        images = jnp.where(of_these(flipped), images[:, :, ::-1], images)
    return images


def standardize(images: jax.Array) -> jax.Array:
    r"""Gives every image zero mean and unit variance.

    :math:`(x - \mathrm{mean}) / \max(\mathrm{std}, 1 / \sqrt{HWC})` over all pixels and
    channels of one image, as TensorFlow's ``tf.image.per_image_standardization``: the
    bound keeps a constant image from being divided by zero.

    Args:
      images: [..., H, W, C] of any dtype.

    Returns:
      float32, of the same shape.

    Example:
      >>> standardize(jnp.array([[[[0], [4]]], [[[7], [7]]]]))[..., 0].tolist()
      [[[-1.0, 1.0]], [[0.0, 0.0]]]
    """
    axes = (-3, -2, -1)
    images = images.astype(jnp.float32)
    centred = images - jnp.mean(images, axes, keepdims=True)
    std = jnp.sqrt(jnp.mean(jnp.square(centred), axes, keepdims=True))
    return centred / jnp.maximum(std, 1 / math.sqrt(math.prod(images.shape[-3:])))


def normalize_imagenet(images: jax.Array) -> jax.Array:
    """Subtracts ImageNet's mean colour and divides by its standard deviation.

    Args:
      images: 0..255, [..., 3].

    Returns:
      float32, of the same shape.
    """
    mean = jnp.array(IMAGENET_MEAN, jnp.float32)
    std = jnp.array(IMAGENET_STD, jnp.float32)
    return (images.astype(jnp.float32) / 255 - mean) / std


# Batches on the host.


def stream(
    split: Split,
    *,
    batch_size: int,
    seed: int = 0,
    start_step: int = 0,
    places: np.ndarray | None = None,
    image_size: int | None = None,
    train: bool = True,
    num_threads: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Reads a split in batches of ``image`` (uint8 [B, H, W, C]) and ``label`` (int32).

    For training the iterator is infinite, and the examples of a step are those of
    :func:`batch_indices`. With ``image_size``, images are ImageNet's random resized
    crops: 8% to 100% of the area, an aspect ratio from 3/4 to 4/3, flipped half the
    time; a draw follows from the seed and the example's position in the sequence of all
    epochs. Without it they come as they are, and :func:`augment` is there for the
    device.

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
      train: for training or for evaluation.
      num_threads: threads that read ahead, about two batches; by default one for each
        core, up to 16. More compete with each other, unless the disk is slow.

    Returns:
      The iterator. Its arrays have as many rows as there are places.

    Raises:
      ValueError: if the batch size is below 1, the step negative, or, for training, the
        split smaller than a batch; for places that a batch does not have.
      DataError: while iterating, for a broken image and for images of differing size.
    """
    if batch_size < 1 or (train and batch_size > len(split)):
        raise ValueError(
            f"the batch size must be at least 1 and for training at most the number of "
            f"examples, {len(split)}, and is {batch_size}"
        )
    if start_step < 0:
        raise ValueError(f"the step must not be negative, and is {start_step}")
    places = _check_places(places, batch_size)
    visits = _Visits(
        split.source,
        batch_size=batch_size,
        places=places,
        seed=seed if train else None,
        transform=image_size and (_random_resized_crop if train else _central_crop),
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
    """The examples as they are visited, batch after batch, each with its number.

    Attributes:
      source: the examples.
      batch_size: of the whole batch.
      places: those of its places that are visited.
      seed: of order and crops; None for evaluation, one pass in order.
      transform: what is made of an image, with `image_size` and a random generator.
      image_size: given to `transform`.
    """

    source: Source
    batch_size: int
    places: np.ndarray
    seed: int | None
    transform: Any
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
            number = int(_permutation(epoch, count, self.seed)[offset])
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
    yield from parts.batch(chunks, batch_fn=_batch(visits.source))


def _batch(source: Any) -> Callable[[Any], dict[str, np.ndarray]]:
    def batch(chunks: Any) -> dict[str, np.ndarray]:
        examples = list(itertools.chain.from_iterable(chunks))
        first = examples[0]
        for example in examples:
            if example["image"].shape != first["image"].shape:
                raise _differing_sizes(
                    source,
                    example["index"],
                    example["image"].shape,
                    first["index"],
                    first["image"].shape,
                )
        return {
            key: np.stack([example[key] for example in examples])
            for key in first
            if key != "index"
        }

    return batch


def _central_crop(image: np.ndarray, size: int, rng: None) -> np.ndarray:
    del rng
    return _resize_and_crop(image, size, round(size * 256 / 224))


def _random_resized_crop(
    image: np.ndarray, size: int, rng: np.random.Generator
) -> np.ndarray:
    top, left, height, width = _random_box(image.shape[0], image.shape[1], rng)
    image = _resize(image[top : top + height, left : left + width], (size, size))
    return image[:, ::-1] if rng.random() < 0.5 else image


def _random_box(
    height: int, width: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a box in an image."""
    for _ in range(10):
        area = rng.uniform(0.08, 1) * height * width
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        box_width = round(math.sqrt(area * aspect))
        box_height = round(math.sqrt(area / aspect))
        if 1 <= box_width <= width and 1 <= box_height <= height:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            return top, left, box_height, box_width
    # An image so long that no draw fits: the central box of the nearest aspect ratio.
    box_width = max(1, min(width, round(height * 4 / 3)))
    box_height = max(1, min(height, round(width * 4 / 3)))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width

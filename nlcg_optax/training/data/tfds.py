"""TensorFlow Datasets, read without TensorFlow."""

import contextlib
import dataclasses
import difflib
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any
from urllib import parse

import numpy as np

from nlcg_optax.training.data.errors import BrokenImage, DataError
from nlcg_optax.training.data.images import read_image

DESCRIPTION = (
    "any image-classification data set of TensorFlow Datasets by its name there: "
    "cifar10, cifar100, imagenet2012, ...; <data_dir> is TFDS's own, by default "
    "~/tensorflow_datasets"
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

# After so long without an answer there is no network.
_NETWORK_SECONDS = 10

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, repr=False)
class _Records:
    records: Any
    image_key: str
    label_key: str
    channels: int
    description: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            record = self.records[int(index)]
            content, label = record[self.image_key], int(record[self.label_key])
        except Exception as error:  # TFDS documents none
            raise BrokenImage(self.describe(index), error) from error
        if label < 0:
            raise BrokenImage(self.describe(index), f"its label, {label}, is no class")
        image = read_image(content, self.describe(index), self.channels)
        return {"image": image, "label": np.int32(label)}

    def describe(self, index: int) -> str:
        return f"{self.description}[{index}]"


@contextlib.contextmanager
def _errors_only(*loggers: str) -> Iterator[None]:
    """Silences warnings of other libraries, which are for who develops with them."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@_errors_only("absl", "urllib3")  # of folders yet to be made, and of every attempt
def load(
    name: str, data_dir: str | os.PathLike[str] | None, known: str
) -> tuple[Any, Any, tuple[str, ...]]:
    """Training source, test source and class names; `known` is for the errors."""
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

    def source(split: str) -> _Records:
        # The bytes rather than the pixels: Pillow decodes them, as it does a folder's.
        records = builder.as_data_source(
            split, decoders={image_key: tfds.decode.SkipDecoding()}
        )
        return _Records(records, image_key, label_key, channels, f"{name} {split}")

    # The labels of a public benchmark's test split are often secret: -1 in TFDS.
    candidates = (
        source(split)
        for split in ("test", "validation")
        if split in builder.info.splits
    )
    test = next((s for s in candidates if s.records[0][label_key] >= 0), None)
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
        _check_network(builder)
        builder.download_and_prepare()
    except Exception as error:
        packages = "tensorflow", "importlib_resources"
        missing = [p for p in packages if f"No module named '{p}'" in str(error)]
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


def _check_network(builder: Any) -> None:
    """Raises if what there is to be downloaded cannot be reached.

    TFDS itself would try for minutes. Where one of the files is there already, the rest
    may be, too.
    """
    import requests

    urls = list(builder.url_infos or ())
    downloads = pathlib.Path(builder.data_dir_root) / "downloads"
    known = "".join(path.read_text() for path in downloads.glob("*.INFO"))
    there = any(url in known for url in urls)
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS or there or not urls:
        return
    address = parse.urlsplit(urls[0])
    if address.scheme not in ("http", "https"):
        return
    try:
        requests.head(urls[0], timeout=_NETWORK_SECONDS).close()
    except (requests.ConnectionError, requests.Timeout) as error:
        raise ConnectionError(f"{address.netloc} cannot be reached") from error

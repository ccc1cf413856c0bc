"""Folders of images, one for each class."""

import os
import pathlib
from typing import Any

import numpy as np

from nlcg_optax.training.data.errors import DataError
from nlcg_optax.training.data.sources import Files

DESCRIPTION = (
    "folder: images in <data_dir>/train/<class>/ and <data_dir>/test/<class>/ "
    "(or val/, validation/), JPEG or PNG"
)

_EXTENSIONS = ("jpg", "jpeg", "png")
_EVAL_SPLITS = ("test", "val", "validation")


def load(
    data_dir: str | os.PathLike[str] | None,
) -> tuple[Files, Files, tuple[str, ...]]:
    """Training source, test source and class names."""
    if data_dir is None:
        raise DataError(f"data set 'folder' needs data_dir. {DESCRIPTION}")
    root = pathlib.Path(data_dir).expanduser()
    for path in (root, root / "train"):
        if not path.is_dir():
            raise DataError(f"no folder {path}. {DESCRIPTION}")
    test_folders = [root / split for split in _EVAL_SPLITS if (root / split).is_dir()]
    if not test_folders:
        raise DataError(
            f"no test split: {root} has none of the folders {', '.join(_EVAL_SPLITS)}"
        )
    test_folder = test_folders[0]
    train, class_names = _list_images(root / "train")
    test, test_class_names = _list_images(test_folder)
    if class_names != test_class_names:
        differing = sorted(set(class_names) ^ set(test_class_names))
        raise DataError(
            f"the class folders of {root / 'train'} and {test_folder} differ: "
            f"{', '.join(differing[:10])} in one alone"
        )
    return train, test, class_names


def _list_images(folder: pathlib.Path) -> tuple[Files, tuple[str, ...]]:
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
    files = Files(np.asarray(listing.filenames), listing.target.astype(np.int32))
    return files, tuple(listing.target_names)

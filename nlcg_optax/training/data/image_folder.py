"""Folders of images, one for each class."""

import logging
import os
import pathlib

import numpy as np

from nlcg_optax.training.data.errors import DataError
from nlcg_optax.training.data.images import FORMATS
from nlcg_optax.training.data.sources import Files, split_indices, take

DESCRIPTION = (
    "folder: images in <data_dir>/train/<class>/ and <data_dir>/test/<class>/ "
    "(or val/, validation/), or in <data_dir>/<class>/ with test_fraction, JPEG, PNG "
    "or another common format"
)

_EXTENSIONS = ("jpg", "jpeg", "png", "bmp", "gif", "ppm", "pgm", "tif", "tiff", "webp")
_EVAL_SPLITS = ("test", "val", "validation")
# What people call splits beside that.
_TRAIN_NAMES = ("train", "training")
_EVAL_NAMES = (*_EVAL_SPLITS, "testing", "valid", "eval", "evaluation", "dev")
_NAMED = 3  # of what is passed over for one reason

_logger = logging.getLogger(__name__)


def load(
    data_dir: str | os.PathLike[str] | None,
    test_fraction: float | None = None,
    split_seed: int = 0,
) -> tuple[Files, Files, tuple[str, ...]]:
    """Training source, test source and class names.

    With `test_fraction` the folder has no test split, and may have its classes at the
    top. Whatever is passed over is told in one line, and in another what lies or leads
    where images of a class are not looked for.
    """
    if data_dir is None:
        raise DataError(f"data set 'folder' needs data_dir. {DESCRIPTION}")
    root = pathlib.Path(data_dir).expanduser()
    if not root.is_dir():
        raise DataError(f"no folder {root}. {DESCRIPTION}")
    test_folders = [root / split for split in _EVAL_SPLITS if (root / split).is_dir()]
    listing = _Listing()
    if test_fraction is not None:
        if test_folders:
            raise DataError(
                f"test_fraction={test_fraction} is for a folder without a test split, "
                f"and {root} has {test_folders[0].name}/: leave it out"
            )
        folders = [path.name for path in _entries(root) if path.is_dir()]
        splits = folders == ["train"]
        if not splits:
            _check_classes(root, [name for name in folders if name[0] != "."])
        found, class_names = listing.images(root / "train" if splits else root)
        listing.tell(root)
        count = max(1, round(test_fraction * len(found)))
        train, test = split_indices(len(found), count, found.labels, split_seed)
        return take(found, train), take(found, test), class_names
    wanted = None if (root / "train").is_dir() else f"no folder {root / 'train'}"
    if not (wanted or test_folders):
        wanted = "no test split: "
        wanted += f"{root} has none of the folders {', '.join(_EVAL_SPLITS)}"
    if wanted:
        raise DataError(
            f"{wanted}. {DESCRIPTION}. --config.dataset.test_fraction=0.2 would hold "
            "out a fifth of every class"
        )
    test_folder = test_folders[0]
    for path in _entries(root):
        if path.name not in ("train", test_folder.name):
            listing.skip("beside the splits", path)
    train, class_names = listing.images(root / "train")
    test, test_class_names = listing.images(test_folder)
    if class_names != test_class_names:
        differing = sorted(set(class_names) ^ set(test_class_names))
        raise DataError(
            f"the class folders of {root / 'train'} and {test_folder} differ: "
            f"{', '.join(differing[:10])} in one alone"
        )
    listing.tell(root)
    return train, test, class_names


def _check_classes(root: pathlib.Path, names: list[str]) -> None:
    """Raises if folders that should be classes have the names of splits."""
    train = [name for name in names if name.lower() in _TRAIN_NAMES]
    test = [name for name in names if name.lower() in _EVAL_NAMES]
    if (train and test) or len(train) + len(test) == len(names) > 0:
        raise DataError(
            f"{', '.join(train + test)} in {root} would be classes, and have the names "
            "of splits: call them train and test, without test_fraction where there "
            "are both"
        )


class _Listing:
    """Files below a folder, what is passed over, and what is odd, by reasons."""

    def __init__(self):
        self.passed_over: dict[str, list[pathlib.Path]] = {}
        self.odd: dict[str, list[pathlib.Path]] = {}
        self.folders: set[pathlib.Path] = set()
        self.read: list[pathlib.Path] = []

    def skip(self, reason: str, path: pathlib.Path) -> None:
        """Notes that something is passed over."""
        self.passed_over.setdefault(reason, []).append(path)

    def note(self, reason: str, path: pathlib.Path) -> None:
        """Notes that something is read, and may not be meant."""
        self.odd.setdefault(reason, []).append(path)

    def images(self, folder: pathlib.Path) -> tuple[Files, tuple[str, ...]]:
        """All images of a split, class by class, and the names of the classes."""
        classes = []
        for path in _entries(folder):
            if path.name.startswith("."):
                self.skip("hidden", path)
            elif path.is_dir():
                classes.append(path)
            else:
                self.skip("beside the class folders", path)
        if not classes:
            raise DataError(f"no class folders in {folder}")
        if len(classes) == 1:
            self.note("the only class", classes[0])
        found, labels = [], []
        for label, path in enumerate(classes):
            images = self._below(path, ())
            if not images:
                raise DataError(f"no images ({', '.join(_EXTENSIONS)}) in {path}")
            found += images
            self.read += images
            labels += [label] * len(images)
        files = Files(np.asarray(list(map(str, found))), np.asarray(labels, np.int32))
        return files, tuple(path.name for path in classes)

    def _below(
        self, folder: pathlib.Path, above: tuple[pathlib.Path, ...]
    ) -> list[pathlib.Path]:
        """The images in a folder, and in those within it."""
        found = []
        whole = folder.resolve()
        if whole in self.folders:
            self.note("links to a folder that is read elsewhere", folder)
        self.folders.add(whole)
        above = (*above, whole)
        entries = _entries(folder)
        if not entries:
            self.skip("empty", folder)
        for path in entries:
            if path.name.startswith("."):
                self.skip("hidden", path)
            elif path.is_dir():
                if path.resolve() in above:
                    self.skip("links to a folder around them", path)
                elif images := self._below(path, above):
                    self.note("folders within a class, whose images count to it", path)
                    found += images
            elif path.exists() and not path.is_file():
                self.skip("no files", path)
            elif path.suffix.lower().removeprefix(".") in _EXTENSIONS:
                found.append(path)  # of a link to nothing the error comes when read
            elif path.exists() and _is_image(path):
                found.append(path)
            else:
                self.skip("no images", path)
        return found

    def _note_links(self) -> None:
        """Notes links to a picture that is read elsewhere, in another split, say."""
        links = [path for path in self.read if path.is_symlink()]
        if not links:
            return
        folders = {folder: folder.resolve() for folder in {p.parent for p in self.read}}
        places = {folders[path.parent] / path.name for path in self.read}
        for path in links:
            target = pathlib.Path(os.path.realpath(path))  # of a circle too
            if target in places:
                self.note("links to a picture that is read elsewhere", path)
            places.add(target)

    def tell(self, root: pathlib.Path) -> None:
        """Says in a line what is passed over, and in another what is odd."""
        self._note_links()
        for kinds, what in (
            (self.passed_over, "are passed over"),
            (self.odd, "are read, and may not be meant"),
        ):
            total = sum(map(len, kinds.values()))
            if not total:
                continue
            reasons = []
            for reason, paths in kinds.items():
                names = ", ".join(str(p.relative_to(root)) for p in paths[:_NAMED])
                more = ", ..." if len(paths) > _NAMED else ""
                reasons.append(f"{len(paths):,} {reason} ({names}{more})")
            _logger.warning(
                "%s: %s files or folders %s: %s",
                *(root, f"{total:,}", what, "; ".join(reasons)),
            )


def _entries(folder: pathlib.Path) -> list[pathlib.Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error}") from error


def _is_image(path: pathlib.Path) -> bool:
    """Whether a file is an image of a format that is read, whatever its name is."""
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS):
            return True
    except Exception:  # whatever a file that is none makes of a decoder
        return False

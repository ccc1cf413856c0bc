import os
import pathlib
import subprocess
import sys

import numpy as np

from nlcg_optax.training import data


def test_digits_has_its_sizes():
    digits = data.load("digits")
    assert digits.train.images.shape == (1437, 8, 8, 1)
    assert digits.test.images.shape == (360, 8, 8, 1)
    assert digits.validation is None
    assert digits.image_shape == (8, 8, 1)
    assert digits.num_classes == 10
    assert digits.class_names == tuple("0123456789")
    for split in (digits.train, digits.test):
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
        assert split.in_memory
    assert not digits.streamed


def test_digits_holds_every_image_once_with_its_label():
    from sklearn import datasets

    digits = data.load("digits")
    expected = datasets.load_digits()
    found = sorted(
        (label, image.tobytes())
        for split in (digits.train, digits.test)
        for image, label in zip(split.images, split.labels, strict=True)
    )
    scaled = np.rint(expected.images * 255 / 16).astype(np.uint8)
    assert scaled.max() == 255
    assert found == sorted(
        (label, image.tobytes())
        for image, label in zip(scaled, expected.target, strict=True)
    )


def test_digits_is_stratified():
    digits = data.load("digits", validation_fraction=0.1)
    assert len(digits.validation) == 144
    assert len(digits.train) == 1437 - 144
    splits = (digits.train, digits.test, digits.validation)
    counts = np.array([np.bincount(split.labels) for split in splits])
    shares = counts / counts.sum(axis=1, keepdims=True)
    overall = counts.sum(axis=0) / counts.sum()
    sizes = counts.sum(axis=1, keepdims=True)
    assert (np.abs(shares - overall) * sizes <= 1.5).all()


def test_digits_imports_no_tensorflow():
    code = (
        "import sys; from nlcg_optax.training import data; data.load('digits');"
        "print([name for name in sys.modules if name.startswith('tensorflow')])"
    )
    root = pathlib.Path(data.__file__).parents[3]
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert result.stdout.strip() == "[]"

import logging
import sys
from unittest import mock

import numpy as np
import pytest
import requests
from pictures import encode, random_image

from nlcg_optax.training import data

KEYS = ("image", "label")


def write_tfds(root, name, splits, shape=(None, None, 3), label="class", keys=KEYS):
    """A TFDS data set on disk: PNGs, as TFDS itself encodes with TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")

    def info(self):
        features = {"image": tfds.features.Image(shape=shape)}
        if label == "class":
            features["label"] = tfds.features.ClassLabel(names=["ant", "bee"])
        else:
            features["label"] = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=keys,
        )

    def generate(self, examples):
        for i, (image, label) in enumerate(examples):
            yield i, {"image": encode(image), "label": label}

    builder = type(
        name,
        (tfds.core.GeneratorBasedBuilder,),
        {
            "VERSION": tfds.core.Version("1.0.0"),
            # A module of one part spares TFDS the package importlib_resources.
            "__module__": "tiny_datasets",
            "_info": info,
            "_split_generators": lambda self, _: {
                split: generate(self, examples) for split, examples in splits.items()
            },
            "_generate_examples": generate,
        },
        skip_registration=True,
    )(data_dir=root, file_format="array_record")
    builder.download_and_prepare()


def examples(count, seed, channels=3, label=None):
    return [
        (random_image(seed + i, channels=channels), i % 2 if label is None else label)
        for i in range(count)
    ]


@pytest.mark.parametrize("channels", [1, 3])
def test_tfds_is_read_without_tensorflow(tmp_path, channels):
    splits = {
        "train": examples(20, 0, channels),
        "test": examples(8, 100, channels),
        "validation": examples(4, 200, channels),
    }
    write_tfds(tmp_path, f"tiny{channels}", splits, (None, None, channels))
    dataset = data.load(f"tiny{channels}", data_dir=tmp_path, validation_fraction=0.25)
    assert "tensorflow" not in sys.modules
    assert dataset.class_names == ("ant", "bee")
    assert dataset.image_shape == (6, 6, channels)
    assert np.bincount(dataset.validation.labels) == pytest.approx([2.5, 2.5], abs=0.5)
    assert (len(dataset.train), len(dataset.test)) == (15, 8)
    for split, parts in (
        ("train", (dataset.train, dataset.validation)),
        ("test", (dataset.test,)),
    ):
        found = [
            (image.tobytes(), int(label))
            for part in parts
            for image, label in zip(part.images, part.labels, strict=True)
        ]
        expected = [(image.tobytes(), label) for image, label in splits[split]]
        assert sorted(found) == sorted(expected)


def test_secret_test_labels_are_passed_over(tmp_path):
    splits = {
        "train": examples(4, 0),
        "test": examples(3, 100, label=-1),
        "validation": examples(5, 200),
    }
    write_tfds(tmp_path, "secret", splits, keys=(*KEYS, "image"))  # a third one
    dataset = data.load("secret", data_dir=tmp_path, in_memory="no")
    assert len(dataset.test) == 5
    expected = {image.tobytes() for image, _ in splits["validation"]}
    found = {dataset.test[i]["image"].tobytes() for i in range(5)}
    assert found == expected


def test_capped_tfds_split_on_disk(tmp_path):
    splits = {"train": examples(20, 0), "test": examples(4, 100)}
    write_tfds(tmp_path, "capped", splits)
    dataset = data.load(
        "capped",
        data_dir=tmp_path,
        in_memory="no",
        validation_fraction=0.25,
        max_train_examples=10,
    )
    parts = [
        {part[i]["image"].tobytes() for i in range(len(part))}
        for part in (dataset.train, dataset.validation)
    ]
    assert [len(part) for part in parts] == [10, 5]
    assert not parts[0] & parts[1]


def test_tfds_set_that_does_not_fit_is_refused(tmp_path):
    write_tfds(tmp_path, "untested", {"train": examples(4, 0)})
    with pytest.raises(data.DataError, match="labelled split test or validation"):
        data.load("untested", data_dir=tmp_path)
    captions = {"train": [(random_image(0), "text")] * 2}
    write_tfds(tmp_path, "captions", captions, label="text")
    with pytest.raises(data.DataError, match="no image-classification data set"):
        data.load("captions", data_dir=tmp_path)


def test_the_listed_tfds_sets_are_what_the_list_says(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    for name, (pixels, classes) in data.TFDS_DATASETS.items():
        builder = tfds.builder(name, file_format="array_record", data_dir=tmp_path)
        image_key, label_key, *_ = builder.info.supervised_keys or ("image", "label")
        image, label = (builder.info.features[k] for k in (image_key, label_key))
        assert image.np_dtype == np.uint8
        assert image.shape[:2] == (pixels, pixels) and image.shape[2] in (1, 3)
        assert label.num_classes == classes, name


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("mnist", ImportError("No module named 'tensorflow'"), "install tensorflow "),
        ("mnist", ConnectionError("no route"), "no network.*ConnectionError: no route"),
        ("imagenet2012", AssertionError("Manual directory"), "downloaded by hand"),
    ],
)
def test_failed_preparation_says_what_to_do(
    tmp_path, monkeypatch, name, error, message
):
    tfds = pytest.importorskip("tensorflow_datasets")

    def fail(self, **kwargs):
        raise error

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    monkeypatch.setattr(requests, "head", mock.Mock())
    with pytest.raises(data.DataError, match=f"'{name}' in {tmp_path}.*{message}"):
        data.load(name, data_dir=tmp_path)


@pytest.mark.parametrize("error", [requests.ConnectionError, requests.Timeout])
def test_without_a_network_one_attempt_says_so(tmp_path, monkeypatch, caplog, error):
    tfds = pytest.importorskip("tensorflow_datasets")
    attempts, prepared = [], []

    def head(url, timeout):
        logging.getLogger("urllib3.connectionpool").warning("Retrying")
        attempts.append((url, timeout))
        raise error("a paragraph of urllib3's")

    monkeypatch.setattr(requests, "head", head)
    builder = tfds.core.DatasetBuilder
    monkeypatch.setattr(builder, "download_and_prepare", lambda x: prepared.append(x))
    with pytest.raises(data.DataError) as info:
        data.load("mnist", data_dir=tmp_path)
    assert str(info.value) == (
        f"cannot prepare the TFDS data set 'mnist' in {tmp_path}/mnist/3.0.1: if this "
        "machine has no network, prepare it on another one and copy that folder here "
        "(ConnectionError: storage.googleapis.com cannot be reached)"
    )
    ((url, timeout),) = attempts
    assert "storage.googleapis.com" in url and 0 < timeout <= 10
    assert not prepared and not caplog.records
    # What is downloaded already needs no network.
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "a.INFO").write_text(f'{{"urls": ["{url}"]}}')
    with pytest.raises(Exception, match="mnist"):
        data.load("mnist", data_dir=tmp_path)
    assert len(attempts) == 1 and len(prepared) == 1

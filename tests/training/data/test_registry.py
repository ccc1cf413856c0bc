import sys

import numpy as np
import pytest
from pictures import write_folder

from nlcg_optax.training import data
from nlcg_optax.training.data import registry


def test_splits_follow_from_their_seed():
    def load(seed):
        return data.load("digits", split_seed=seed, validation_fraction=0.2)

    first, again, other = load(3), load(3), load(4)
    for name in ("train", "test", "validation"):
        split = getattr(first, name)
        np.testing.assert_array_equal(split.images, getattr(again, name).images)
        assert not np.array_equal(split.images, getattr(other, name).images)


def test_capped_training_split_leaves_the_others():
    whole = data.load("digits", validation_fraction=0.1)
    capped = data.load("digits", validation_fraction=0.1, max_train_examples=50)
    assert np.bincount(capped.train.labels).tolist() == [5] * 10
    np.testing.assert_array_equal(capped.validation.images, whole.validation.images)
    np.testing.assert_array_equal(capped.test.images, whole.test.images)
    known = {image.tobytes() for image in whole.train.images}
    assert {image.tobytes() for image in capped.train.images} <= known


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 1.0}, "validation_fraction .* 1.0"),
        ({"validation_fraction": 0.001}, "cannot take 1 of 1437"),
        ({"max_train_examples": 0}, "max_train_examples .* 0"),
        ({"image_size": -8}, "image_size .* -8"),
        ({"in_memory": "perhaps"}, "in_memory .* 'perhaps'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(data.DataError, match=message):
        data.load("digits", **options)


def test_large_data_stay_on_disk(tmp_path, monkeypatch):
    write_folder(tmp_path)
    size = 24 * 6 * 6 * 3
    monkeypatch.setattr(registry, "_MEMORY_LIMIT", size)
    assert data.load("folder", data_dir=tmp_path).streamed
    monkeypatch.setattr(registry, "_MEMORY_LIMIT", size + 1)
    assert not data.load("folder", data_dir=tmp_path).streamed


def test_unknown_name_lists_the_known_ones(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(data.DataError) as info:
        data.load("cifer10", data_dir=tmp_path)
    assert "did you mean cifar10" in str(info.value)
    assert "known: digits" in str(info.value) and "folder:" in str(info.value)
    with pytest.raises(data.DataError, match="did you mean digits"):
        data.load("digit", data_dir=tmp_path)
    with pytest.raises(data.DataError, match="known: digits"):
        data.load("../digits", data_dir=tmp_path)


def test_unknown_name_without_tfds(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(data.DataError, match="known: digits.*TFDS is not installed"):
        data.load("cifar10")

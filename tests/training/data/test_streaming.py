import itertools

import numpy as np
import pytest

from nlcg_optax.training import data


class Recorded:
    """Images of two sizes whose pixels tell their number."""

    def __init__(self, count, sizes=((6, 6),)):
        self.count, self.sizes = count, sizes

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        height, width = self.sizes[index % len(self.sizes)]
        image = np.full((height, width, 3), index, np.uint8)
        return {"image": image, "label": np.int32(index)}

    def describe(self, index):
        return f"recorded {index}"


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_batches_equal(found, expected):
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            np.testing.assert_array_equal(x[key], y[key])


@pytest.mark.parametrize("image_size", [None, 5])
def test_stream_resumes_at_any_step(image_size):
    source = data.load("digits").train
    options = {"batch_size": 100, "seed": 7, "image_size": image_size}
    batches = take(data.stream(source, **options), 20)
    for start in (1, 14, 17):
        resumed = data.stream(source, **options, start_step=start, num_threads=3)
        assert_batches_equal(take(resumed, 3), batches[start : start + 3])
    other = take(data.stream(source, **options | {"seed": 8}), 1)
    assert not np.array_equal(other[0]["label"], batches[0]["label"])


@pytest.mark.parametrize("batch_size", [4, 7])
def test_stream_has_every_example_once_an_epoch(batch_size):
    split = data.Split(Recorded(10))
    batches = take(data.stream(split, batch_size=batch_size, seed=1), 10)
    for batch in batches:
        assert batch["image"].shape == (batch_size, 6, 6, 3)
        assert (batch["image"].dtype, batch["label"].dtype) == (np.uint8, np.int32)
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])
    labels = np.concatenate([batch["label"] for batch in batches])
    epochs = labels[: len(labels) // 10 * 10].reshape(-1, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_random_crops_are_boxes_of_the_image():
    """Rows and columns are told by colour, so a crop's box can be read from it."""
    height, width, size = 60, 80, 16
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    image = np.stack([3 * rows, 3 * columns, 0 * rows], axis=-1)
    split = data.Split.from_arrays([image] * 64, [0] * 64)
    batches = take(data.stream(split, batch_size=64, image_size=size, seed=0), 8)
    images = np.concatenate([batch["image"] for batch in batches]).astype(float) / 3
    top, bottom = images[:, 0, 0, 0], images[:, -1, 0, 0]
    left, right = images[:, 0, 0, 1], images[:, 0, -1, 1]
    flipped = right < left
    assert 0.4 < flipped.mean() < 0.6
    # Pixel centres: the first and the last are one step of the grid short of the box.
    scale = size / (size - 1)
    heights, widths = (bottom - top) * scale, np.abs(right - left) * scale
    area = heights * widths / (height * width)
    aspect = widths / heights
    assert 0.06 < area.min() < 0.15 and 0.85 < area.max() <= 1.05
    assert 0.65 < aspect.min() < 0.85 and 1.2 < aspect.max() < 1.5
    assert len(np.unique(images.reshape(512, -1), axis=0)) > 500


def test_crops_may_stay_unflipped():
    """The same boxes: left is darker than right, but in what is flipped."""
    image = np.mgrid[:60, :80][1].astype(np.uint8)[..., None]
    split = data.Split.from_arrays([image] * 64, [0] * 64)
    options = {"batch_size": 64, "image_size": 16, "seed": 0}
    flipped = next(data.stream(split, **options))["image"]
    plain = next(data.stream(split, **options, flip=False))["image"]
    assert (plain[:, 0, 0] < plain[:, 0, -1]).all()
    differ = (flipped != plain).any((1, 2, 3))
    assert 16 < differ.sum() < 48
    np.testing.assert_array_equal(flipped[differ], plain[differ, :, ::-1])


def test_epochs_have_new_crops():
    split = data.load("digits", max_train_examples=10).train
    first, second = take(data.stream(split, batch_size=10, image_size=8, seed=0), 2)
    images = [batch["image"][np.argsort(batch["label"])] for batch in (first, second)]
    assert sum(np.array_equal(x, y) for x, y in zip(*images, strict=True)) < 3


@pytest.mark.parametrize("count", [8, 10, 3])
@pytest.mark.parametrize("in_memory", [True, False])
def test_evaluation_counts_every_example_once(count, in_memory):
    split = data.Split(Recorded(count))
    if in_memory:
        images = np.stack([split[i]["image"] for i in range(count)])
        split = data.Split.from_arrays(images, np.arange(count))
    batches = list(data.eval_batches(split, 4))
    assert len(batches) == -(-count // 4)
    for batch in batches:
        assert batch["image"].shape == (4, 6, 6, 3)
        assert batch["mask"].dtype == np.float32
        assert batch["label"].dtype == np.int32
    assert sum(batch["mask"].sum() for batch in batches) == count
    seen = np.concatenate([b["label"][b["mask"] == 1] for b in batches])
    assert seen.tolist() == list(range(count))
    pixels = np.concatenate([b["image"][b["mask"] == 1] for b in batches])
    assert pixels[:, 0, 0, 0].tolist() == list(range(count))


def test_evaluation_stream_starts_at_a_step():
    split = data.Split(Recorded(10))
    batches = list(data.eval_batches(split, 4))
    for start in range(4):
        rest = data.stream(split, batch_size=4, train=False, start_step=start)
        assert_batches_equal(list(rest), batches[start:])


def test_evaluation_takes_the_centre():
    rows, columns = np.mgrid[:64, :96].astype(np.uint8)
    image = np.stack([rows, columns, rows], axis=-1)
    split = data.Split.from_arrays([image], [1])
    # The shorter side becomes 32 = 256 / 224 * 28: half as large, less 2 on each side.
    (batch,) = data.stream(split, batch_size=1, image_size=28, train=False)
    found = batch["image"][0].astype(float)
    expected_rows = 2 * (np.arange(28) + 2) + 0.5
    expected_columns = 2 * (np.arange(28) + 10) + 0.5
    np.testing.assert_allclose(found[:, 5, 0], expected_rows, atol=1)
    np.testing.assert_allclose(found[5, :, 1], expected_columns, atol=1)


def test_streams_of_differing_sizes():
    split = data.Split(Recorded(8, sizes=((6, 6), (7, 9))))
    for train in (True, False):
        batches = data.stream(split, batch_size=4, image_size=5, train=train)
        assert next(batches)["image"].shape == (4, 5, 5, 3)
    with pytest.raises(data.DataError, match="recorded 0 is 6x6 and recorded 1 is 7x9"):
        list(data.eval_batches(split, 4))

import io
import itertools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from nlcg_optax.training import data


def random_image(seed, height=6, width=6, channels=3):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels), np.uint8)


# Digits.


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


def test_digits_imports_no_tensorflow():
    code = (
        "import sys; from nlcg_optax.training import data; data.load('digits');"
        "print([name for name in sys.modules if name.startswith('tensorflow')])"
    )
    root = pathlib.Path(data.__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert result.stdout.strip() == "[]"


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


# Folders.


def write_folder(root, sizes=((6, 6),), splits=("train", "test"), count=6):
    """Two classes; PNGs, so that the pixels come back."""
    written = {}
    for split, name in itertools.product(splits, ("ant", "bee")):
        (root / split / name).mkdir(parents=True)
        for i in range(count):
            image = random_image(len(written), *sizes[i % len(sizes)])
            path = root / split / name / f"{i}.png"
            Image.fromarray(image).save(path)
            written[path] = image
    return written


def images_of(written, split):
    paths = sorted(path for path in written if path.parts[-3] == split)
    return np.stack([written[path] for path in paths])


@pytest.mark.parametrize("test_name", ["test", "val", "validation"])
def test_folder_is_read(tmp_path, test_name):
    written = write_folder(tmp_path, splits=("train", test_name))
    dataset = data.load("folder", data_dir=tmp_path)
    assert dataset.class_names == ("ant", "bee")
    assert dataset.image_shape == (6, 6, 3)
    np.testing.assert_array_equal(dataset.train.images, images_of(written, "train"))
    np.testing.assert_array_equal(dataset.test.images, images_of(written, test_name))
    assert dataset.train.labels.tolist() == [0] * 6 + [1] * 6


def test_folder_reads_grey_palette_and_jpeg_as_colour(tmp_path):
    write_folder(tmp_path)
    image = Image.fromarray(random_image(0))
    folder = tmp_path / "train" / "ant"
    image.convert("L").save(folder / "6.png")
    image.convert("P").save(folder / "7.png", transparency=b"\0\1\2")
    image.save(folder / "8.JPEG")
    dataset = data.load("folder", data_dir=tmp_path)
    assert dataset.train.images.shape == (15, 6, 6, 3)
    grey = dataset.train.images[6]
    np.testing.assert_array_equal(grey[..., 0], np.asarray(image.convert("L")))
    np.testing.assert_array_equal(grey[..., 0], grey[..., 2])


def test_folder_may_stay_on_disk(tmp_path):
    written = write_folder(tmp_path)
    memory = data.load("folder", data_dir=tmp_path, validation_fraction=0.5)
    disk = data.load(
        "folder", data_dir=tmp_path, validation_fraction=0.5, in_memory="no"
    )
    assert disk.streamed
    assert len(written) == 24
    for name in ("train", "test", "validation"):
        split, expected = getattr(disk, name), getattr(memory, name)
        assert len(split) == len(expected)
        for i in range(len(split)):
            np.testing.assert_array_equal(split[i]["image"], expected[i]["image"])
            assert split[i]["label"] == expected[i]["label"]
    with pytest.raises(TypeError, match="not in memory"):
        _ = disk.train.images


def test_large_data_stay_on_disk(tmp_path, monkeypatch):
    write_folder(tmp_path)
    size = 24 * 6 * 6 * 3
    monkeypatch.setattr(data, "_MEMORY_LIMIT", size)
    assert data.load("folder", data_dir=tmp_path).streamed
    monkeypatch.setattr(data, "_MEMORY_LIMIT", size + 1)
    assert not data.load("folder", data_dir=tmp_path).streamed


def test_differing_sizes_need_an_image_size(tmp_path):
    written = write_folder(tmp_path, sizes=[(6, 6), (8, 10)])
    with pytest.raises(data.DataError) as error:
        data.load("folder", data_dir=tmp_path)
    first, second = (tmp_path / "train" / "ant" / f"{i}.png" for i in range(2))
    assert f"{first} is 6x6 and {second} is 8x10" in str(error.value)
    assert "image_size" in str(error.value)

    dataset = data.load("folder", data_dir=tmp_path, image_size=6)
    assert dataset.image_shape == (6, 6, 3)
    np.testing.assert_array_equal(dataset.train.images[0], written[first])
    # Shorter side to 6, so 6x8 (7.5 rounds to even), of which the central 6 columns.
    resized = Image.fromarray(written[second]).resize((8, 6), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(dataset.train.images[1], np.array(resized)[:, 1:7])


def test_folder_errors_name_the_path(tmp_path):
    def error(path=tmp_path):
        with pytest.raises(data.DataError) as info:
            data.load("folder", data_dir=path)
        return str(info.value)

    assert "needs data_dir" in error(None)
    assert str(tmp_path / "nothing") in error(tmp_path / "nothing")
    assert f"no folder {tmp_path / 'train'}" in error()
    (tmp_path / "train").mkdir()
    assert "no test split" in error() and "validation" in error()
    (tmp_path / "test").mkdir()
    assert f"no class folders in {tmp_path / 'train'}" in error()
    empty = tmp_path / "train" / "cat"
    empty.mkdir()
    (empty / "notes.txt").write_text("no image")
    assert str(empty) in error() and "no images (jpg, jpeg, png)" in error()
    empty.joinpath("0.png").write_bytes(encode(random_image(0)))
    (tmp_path / "test" / "dog").mkdir()
    (tmp_path / "test" / "dog" / "0.png").write_bytes(encode(random_image(0)))
    assert "differ: cat, dog" in error()


@pytest.mark.parametrize("damage", [lambda b: b"text", lambda b: b[: len(b) // 2]])
def test_broken_image_is_named(tmp_path, damage):
    write_folder(tmp_path)
    path = tmp_path / "train" / "bee" / "2.png"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(data.DataError, match="cannot decode .*bee/2.png"):
        data.load("folder", data_dir=tmp_path)


# TFDS.


def encode(image):
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


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


def test_the_listed_tfds_sets_are_what_the_list_says(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    for name, (pixels, classes) in data.TFDS_DATASETS.items():
        builder = tfds.builder(name, file_format="array_record", data_dir=tmp_path)
        image_key, label_key, *_ = builder.info.supervised_keys or ("image", "label")
        image, label = (builder.info.features[k] for k in (image_key, label_key))
        assert image.np_dtype == np.uint8
        assert image.shape[:2] == (pixels, pixels) and image.shape[2] in (1, 3)
        assert label.num_classes == classes, name


def test_unknown_name_without_tfds(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(data.DataError, match="known: digits.*TFDS is not installed"):
        data.load("cifar10")


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
    with pytest.raises(data.DataError, match=f"'{name}' in {tmp_path}.*{message}"):
        data.load(name, data_dir=tmp_path)


# Order.


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10])
def test_every_example_comes_once_an_epoch(batch_size):
    num_examples = 10
    batches = [
        data.batch_indices(step, batch_size, num_examples, seed=5)
        for step in range(3 * num_examples)
    ]
    assert {(b.dtype, b.shape) for b in batches} == {
        (np.dtype(np.int32), (batch_size,))
    }
    sequence = np.concatenate(batches)
    epochs = sequence[: len(sequence) // num_examples * num_examples]
    for epoch, order in enumerate(epochs.reshape(-1, num_examples)):
        expected = np.random.default_rng([5, epoch]).permutation(num_examples)
        np.testing.assert_array_equal(order, expected)
        np.testing.assert_array_equal(
            order, data.epoch_indices(epoch, num_examples, seed=5)
        )


def test_batch_straddles_two_epochs():
    batch = data.batch_indices(2, 4, 10, seed=0)
    assert batch[:2].tolist() == data.epoch_indices(0, 10, 0)[8:].tolist()
    assert batch[2:].tolist() == data.epoch_indices(1, 10, 0)[:2].tolist()


def test_batch_does_not_depend_on_what_came_before():
    expected = data.batch_indices(7, 4, 10, seed=0)
    expected_copy = expected.copy()
    expected[:] = -1
    for step in range(20):
        data.batch_indices(step, 4, 10, seed=0)
    again = data.batch_indices(7, 4, 10, seed=0)
    np.testing.assert_array_equal(again, expected_copy)
    assert not np.array_equal(again, data.batch_indices(7, 4, 10, seed=1))


@pytest.mark.parametrize("batch_size", [0, -1, 11])
def test_batch_size_must_fit(batch_size):
    with pytest.raises(ValueError, match=f"1 and .* 10, and is {batch_size}"):
        data.batch_indices(0, batch_size, 10, seed=0)
    split = data.Split.from_arrays(np.zeros((10, 2, 2, 3)), np.zeros(10))
    with pytest.raises(ValueError, match=f"10, and is {batch_size}"):
        data.stream(split, batch_size=batch_size)


def test_step_must_not_be_negative():
    with pytest.raises(ValueError, match="step must not be negative, and is -1"):
        data.batch_indices(-1, 2, 10, seed=0)
    split = data.Split.from_arrays(np.zeros((10, 2, 2, 3)), np.zeros(10))
    with pytest.raises(ValueError, match="step must not be negative, and is -1"):
        data.stream(split, batch_size=2, start_step=-1)


# On the device.


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_augment_gives_windows_of_the_padded_image(dtype):
    rng = np.random.default_rng(0)
    batch, height, width, padding = 400, 5, 6, 2
    # No pixel is the padding's 0, and no two are equal, so each window is unique.
    pixels = 1 + np.stack([rng.permutation(height * width) for _ in range(batch)])
    images = pixels.reshape(batch, height, width, 1).repeat(2, -1).astype(dtype)
    out = jax.jit(data.augment, static_argnames=("crop_padding", "flip"))(
        jax.random.key(3), images, crop_padding=padding
    )
    assert (out.shape, out.dtype) == (images.shape, images.dtype)
    pad = (padding, padding)
    padded = np.pad(images, ((0, 0), pad, pad, (0, 0)))
    draws = []
    for image, result in zip(padded, np.asarray(out), strict=True):
        draws += [
            (top, left, flip)
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
            for flip in (1, -1)
            if np.array_equal(
                image[top : top + height, left : left + width][:, ::flip], result
            )
        ]
    assert len(draws) == batch
    tops, lefts, flips = np.array(draws).T
    # 80 expected of each offset and 200 flips; five standard deviations.
    for offsets in (tops, lefts):
        assert np.abs(np.bincount(offsets, minlength=5) - 80).max() < 40
    assert abs((flips == -1).sum() - 200) < 50
    # Independent of each other: about 8 of each of the 50 combinations.
    assert len(set(draws)) == 50


@pytest.mark.parametrize("options", [{"flip": False}, {"crop_padding": 0}])
def test_augment_follows_from_its_key(options):
    images = jnp.asarray(np.stack([random_image(0)] * 20))
    first, again, other = (
        data.augment(jax.random.key(seed), images, **options) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    distinct = {image.tobytes() for image in np.asarray(first)}
    assert len(distinct) == 2 if "crop_padding" in options else len(distinct) > 10


def test_augment_can_be_switched_off():
    images = jnp.asarray(np.stack([random_image(i) for i in range(20)]))
    key = jax.random.key(0)
    same = data.augment(key, images, crop_padding=0, flip=False)
    np.testing.assert_array_equal(same, images)
    flipped = np.asarray(data.augment(key, images, crop_padding=0))
    equal = [np.array_equal(x, y) for x, y in zip(flipped, images, strict=True)]
    assert 0 < sum(equal) < 20
    for image, result, same in zip(images, flipped, equal, strict=True):
        np.testing.assert_array_equal(result, image if same else image[:, ::-1])
    with pytest.raises(ValueError, match="crop_padding .* -1"):
        data.augment(key, images, crop_padding=-1)


def test_standardize_is_tensorflows():
    images = np.stack([random_image(i, 4, 5) for i in range(3)])
    images[1] = 77
    images[2] = 10
    images[2, 0, 0, 0] = 11
    found = jax.jit(data.standardize)(images)
    assert found.dtype == jnp.float32
    for image, result in zip(images.astype(np.float64), found, strict=True):
        std = max(image.std(), 1 / np.sqrt(4 * 5 * 3))
        np.testing.assert_allclose(result, (image - image.mean()) / std, atol=1e-4)


def test_standardize_bounds_the_deviation():
    """Faint noise is not blown up to unit variance."""
    image = np.full((1, 2, 2, 1), 0.5, np.float32)
    image[0, 0, 0, 0] += 0.1
    expected = (image - image.mean()) * 2
    np.testing.assert_allclose(data.standardize(image), expected, rtol=1e-5)


def test_normalize_imagenet():
    images = np.zeros((2, 1, 1, 3), np.uint8)
    images[1] = 255
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    found = data.normalize_imagenet(jnp.asarray(images))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[0, 0, 0], -mean / std, rtol=1e-5)
    np.testing.assert_allclose(found[1, 0, 0], (1 - mean) / std, rtol=1e-5)


# Streams.


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


def test_epochs_have_new_crops():
    split = data.load("digits", max_train_examples=10).train
    first, second = take(data.stream(split, batch_size=10, image_size=8, seed=0), 2)
    images = [batch["image"][np.argsort(batch["label"])] for batch in (first, second)]
    assert sum(np.array_equal(x, y) for x, y in zip(*images, strict=True)) < 3


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 200), (200, 2), (7, 5)])
def test_crop_of_an_odd_image_lies_within_it(height, width):
    rng = np.random.default_rng(0)
    for _ in range(50):
        top, left, box_height, box_width = data._random_box(height, width, rng)
        assert box_height >= 1 and 0 <= top <= height - box_height
        assert box_width >= 1 and 0 <= left <= width - box_width


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

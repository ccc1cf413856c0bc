import numpy as np
import pytest
from pictures import encode, images_of, random_image, write_folder
from PIL import Image

from nlcg_optax.training import data


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


def test_of_differing_sizes_that_of_the_first_image_read_is_named(tmp_path):
    """Which lies in another split, and is not the first where that one is broken."""
    write_folder(tmp_path, splits=("train",))
    write_folder(tmp_path, splits=("test",), sizes=[(8, 10)])
    first, second = (tmp_path / "train" / "ant" / f"{i}.png" for i in range(2))
    other = tmp_path / "test" / "ant" / "0.png"

    def read():
        with pytest.raises(data.DataError) as error:
            data.load("folder", data_dir=tmp_path)
        return str(error.value)

    assert f"{first} is 6x6 and {other} is 8x10" in read()
    first.write_bytes(b"text")
    assert f"{second} is 6x6 and {other} is 8x10" in read()


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
    assert str(empty) in error() and "no images (jpg, jpeg, png, " in error()
    empty.joinpath("0.png").write_bytes(encode(random_image(0)))
    (tmp_path / "test" / "dog").mkdir()
    (tmp_path / "test" / "dog" / "0.png").write_bytes(encode(random_image(0)))
    assert "differ: cat, dog" in error()


def test_a_folder_without_a_test_split_is_split_on_request(tmp_path):
    write_folder(tmp_path / "both", splits=("train",))  # six of each of two classes
    (tmp_path / "both" / "train").rename(tmp_path / "classes")

    def load(**options):
        return data.load("folder", data_dir=tmp_path / "classes", **options)

    with pytest.raises(data.DataError, match="no folder.*test_fraction=0.2"):
        load()
    found = load(test_fraction=0.3)
    assert found.class_names == ("ant", "bee")
    assert np.bincount(found.test.labels).tolist() == [2, 2]
    assert np.bincount(found.train.labels).tolist() == [4, 4]
    everything = np.concatenate([found.train.images, found.test.images])
    assert len(np.unique(everything, axis=0)) == 12  # none twice
    np.testing.assert_array_equal(
        load(test_fraction=0.3).test.images, found.test.images
    )
    other = load(test_fraction=0.3, split_seed=1)
    assert not np.array_equal(other.test.images, found.test.images)
    # Below train/ too, if that is all there is.
    (tmp_path / "classes").rename(tmp_path / "both" / "train")
    (tmp_path / "classes").symlink_to(tmp_path / "both")
    np.testing.assert_array_equal(
        load(test_fraction=0.3).test.images, found.test.images
    )
    (tmp_path / "both" / "val").mkdir()
    with pytest.raises(data.DataError, match="test_fraction=0.3 .* has val/: leave it"):
        load(test_fraction=0.3)
    for name, fraction in (("digits", 0.3), ("folder", 1.0)):
        with pytest.raises(data.DataError, match="test_fraction"):
            data.load(name, data_dir=tmp_path, test_fraction=fraction)


@pytest.mark.parametrize("damage", [lambda b: b"text", lambda b: b[: len(b) // 2]])
def test_broken_image_is_named(tmp_path, damage):
    write_folder(tmp_path)
    path = tmp_path / "train" / "bee" / "2.png"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(data.DataError, match="cannot decode .*bee/2.png"):
        data.load("folder", data_dir=tmp_path)


def break_images(folder, count):
    """Damages the first images of every class and split; returns their paths."""
    paths = [
        folder / split / name / f"{i}.png"
        for split in ("test", "train")
        for name in ("ant", "bee")
        for i in range(count)
    ]
    for path in paths:
        path.write_bytes(path.read_bytes()[:60])
    return paths


def test_broken_images_are_reported_all_at_once(tmp_path):
    # The very first image of the training split, which tells the shape, is among them.
    write_folder(tmp_path)
    broken = break_images(tmp_path, 2)
    with pytest.raises(data.DataError) as error:
        data.load("folder", data_dir=tmp_path, validation_fraction=0.25)
    first, *lines = str(error.value).split("\n")
    assert first == "8 of 24 images cannot be decoded:"
    assert [line.split(": ")[0] for line in lines] == [f"  {path}" for path in broken]
    assert all(": image file is truncated" in line for line in lines)


def test_of_many_broken_images_ten_are_named(tmp_path):
    write_folder(tmp_path)
    broken = break_images(tmp_path, 3)
    with pytest.raises(data.DataError) as error:
        data.load("folder", data_dir=tmp_path)
    lines = str(error.value).split("\n")
    assert lines[0] == "12 of 24 images cannot be decoded:"
    assert [line.split(": ")[0] for line in lines[1:-1]] == [
        f"  {path}" for path in broken[:10]
    ]
    assert lines[-1] == "  and 2 more"


def test_no_image_can_be_decoded(tmp_path):
    write_folder(tmp_path)
    break_images(tmp_path, 6)
    with pytest.raises(data.DataError, match="^12 of 12 images cannot be decoded"):
        data.load("folder", data_dir=tmp_path)


@pytest.mark.parametrize("train", [True, False])
def test_a_stream_reports_broken_images_all_at_once(tmp_path, train, monkeypatch):
    write_folder(tmp_path)
    break_images(tmp_path, 2)
    dataset = data.load("folder", data_dir=tmp_path, in_memory="no")

    def read():
        with pytest.raises(data.DataError) as error:
            for _ in data.stream(dataset.train, batch_size=4, train=train):
                pass
        return str(error.value)

    message = read()
    assert message.startswith("4 of 12 images cannot be decoded:\n")
    for name in ("ant/0", "ant/1", "bee/0", "bee/1"):
        assert f"{tmp_path}/train/{name}.png: image file is truncated" in message

    monkeypatch.setattr("nlcg_optax.training.data.sources._MOST_CHECKED", 3)
    assert "of the 3 images that were looked at cannot be decoded:" in read()


def test_what_is_passed_over_or_odd_is_told_in_a_line(tmp_path, caplog):
    write_folder(tmp_path)
    train = tmp_path / "train"
    (train / "ant" / "sub").mkdir()
    (train / "ant" / "0.png").rename(train / "ant" / "sub" / "0.PNG")
    (train / "ant" / "nothing").mkdir()
    (train / "ant" / "notes.txt").write_text("no image")
    (train / "ant" / ".hidden.png").write_bytes(encode(random_image(0)))
    (train / "ant" / "round").symlink_to(train / "ant", target_is_directory=True)
    (train / "ant" / "1.png").rename(train / "ant" / "1.of another kind")
    (train / "readme").write_text("beside")
    (tmp_path / "val").mkdir()
    dataset = data.load("folder", data_dir=tmp_path)
    assert len(dataset.train) == 12
    passed_over, odd = caplog.messages
    assert "6 files or folders are passed over: 1 beside the splits (val); " in (
        passed_over
    )
    for told in (
        "1 beside the class folders (train/readme)",
        "1 hidden (train/ant/.hidden.png)",
        "1 empty (train/ant/nothing)",
        "1 no images (train/ant/notes.txt)",
        "1 links to a folder around them (train/ant/round)",
    ):
        assert told in passed_over
    assert "1 folders within a class, whose images count to it (train/ant/sub)" in odd


def test_a_split_that_is_the_other_one_is_told(tmp_path, caplog):
    write_folder(tmp_path, splits=("train",))
    (tmp_path / "test").symlink_to(tmp_path / "train", target_is_directory=True)
    data.load("folder", data_dir=tmp_path)
    (odd,) = caplog.messages
    assert "2 links to a folder that is read elsewhere (test/ant, test/bee)" in odd


def test_images_without_classes_are_told(tmp_path, caplog):
    """The folder of the images stands one level too low."""
    write_folder(tmp_path)
    for split in ("train", "test"):
        (tmp_path / split).rename(tmp_path / "all")
        (tmp_path / split).mkdir()
        (tmp_path / "all").rename(tmp_path / split / "all")
    dataset = data.load("folder", data_dir=tmp_path)
    assert dataset.class_names == ("all",)
    assert "2 the only class (train/all, test/all)" in caplog.text


@pytest.mark.parametrize(
    "names",
    [
        *(("training", "testing"), ("Train", "Test"), ("TRAIN",), ("train", "valid")),
        *(("labels", "train", "dev"), ("Training",), ("eval", "train")),
    ],
)
def test_splits_of_other_names_are_no_classes(tmp_path, names):
    write_folder(tmp_path, splits=names)
    with pytest.raises(data.DataError, match=f"{names[-1]}.*have the names of splits"):
        data.load("folder", data_dir=tmp_path, test_fraction=0.5)


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    write_folder(tmp_path, splits=("bus", "train"))
    dataset = data.load("folder", data_dir=tmp_path, test_fraction=0.5)
    assert dataset.class_names == ("bus", "train")


def test_links_to_a_picture_that_is_read_elsewhere_are_told(tmp_path, caplog):
    """As where the same picture is in training and test; not where all are links."""
    write_folder(tmp_path / "real")
    root = tmp_path / "linked"
    for path in sorted((tmp_path / "real").rglob("*.png")):
        link = root / path.relative_to(tmp_path / "real")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    data.load("folder", data_dir=root)
    assert "links to" not in caplog.text
    (root / "test" / "bee" / "again.png").symlink_to(
        tmp_path / "real" / "train" / "bee" / "0.png"
    )
    real = root / "train" / "ant" / "real.png"
    real.write_bytes((tmp_path / "real" / "train" / "ant" / "1.png").read_bytes())
    (root / "test" / "ant" / "real.png").symlink_to(real)
    data.load("folder", data_dir=root)
    assert "2 links to a picture that is read elsewhere" in caplog.text
    assert "test/bee/again.png" in caplog.text and "test/ant/real.png" in caplog.text

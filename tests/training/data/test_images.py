import io
import struct
import zlib

import numpy as np
import pytest
from pictures import random_image
from PIL import Image

from nlcg_optax.training.data import errors, images


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 200), (200, 2), (7, 5)])
def test_crop_of_an_odd_image_lies_within_it(height, width):
    rng = np.random.default_rng(0)
    for _ in range(50):
        top, left, box_height, box_width = images.random_box(height, width, rng)
        assert box_height >= 1 and 0 <= top <= height - box_height
        assert box_width >= 1 and 0 <= left <= width - box_width


# What EXIF calls them: how to turn what is stored so that it is upright.
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, 1),
}


def encoded(image, kind, orientation=1):
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    if kind == "TIFF":
        options["tiffinfo"] = {0x0112: orientation}
    else:
        options["exif"] = exif.tobytes()
    image.save(file, kind, **options)
    return file.getvalue()


MODES = ("RGB", "RGBA", "P", "L", "LA", "1", "I;16")
FILES = {"PNG": MODES, "TIFF": MODES, "WEBP": MODES[:2]}


@pytest.mark.parametrize(
    ("kind", "mode"), [(kind, mode) for kind in FILES for mode in FILES[kind]]
)
def test_of_every_mode_and_orientation_the_true_values_are_read(kind, mode):
    pixels = random_image(0, 4, 7)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        pixels = pixels[..., :1].repeat(3, -1)
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 256 + 77)
    elif mode == "P":
        image = image.quantize(20)
    elif mode != "RGB":
        image = image.convert(mode)
    if mode in ("L", "LA", "1", "P"):
        pixels = np.asarray(image.convert("RGB"))
    for orientation, turn in UPRIGHT.items():
        content = encoded(image, kind, orientation)
        got = images.read_image(content, "image", 3)
        np.testing.assert_array_equal(got, turn(pixels), err_msg=str(orientation))


def tiff(order, data, *, bits=16, white=1, sample_format=1):
    """Two grey values, as scanners and microscopes write them."""
    entries = [(256, 2), (257, 1), (258, bits), (259, 1), (262, white), (273, 134)]
    entries += [(277, 1), (278, 1), (279, len(data)), (339, sample_format)]
    order, magic = (">", b"MM") if order == "big" else ("<", b"II")
    content = magic + struct.pack(f"{order}HIH", 42, 8, len(entries))
    for tag, value in entries:
        content += struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0)
    return content + bytes(4) + data


def test_grey_values_of_more_than_8_bits_are_scaled():
    for order, data in (("little", b"\x34\x12\xcd\xab"), ("big", b"\x12\x34\xab\xcd")):
        (values,) = images.read_image(tiff(order, data), "image", 1)
        assert values.ravel().tolist() == [0x12, 0xAB]
    packed = tiff("little", b"\x12\x3a\xbc", bits=12)
    assert images.read_image(packed, "image", 1).ravel().tolist() == [0x12, 0xAB]
    white_is_0 = tiff("little", b"\x34\x12\xcd\xab", white=0)
    got = images.read_image(white_is_0, "image", 1).ravel()
    assert got.tolist() == [255 - 0x12, 255 - 0xAB]
    with pytest.raises(errors.BrokenImage, match="its values are signed"):
        images.read_image(tiff("little", b"\1\2", bits=8, sample_format=2), "image", 1)


def test_a_download_that_broke_off_is_refused():
    """Where the file was given its size first: Pillow takes the rest for grey."""
    whole = encoded(Image.fromarray(random_image(0, 64, 64)), "JPEG")
    for part in (0.3, 0.6, 0.95):
        cut = whole[: int(part * len(whole))]
        with pytest.raises(errors.BrokenImage, match="image"):
            images.read_image(cut + bytes(len(whole) - len(cut)), "image", 3)


def jpeg(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"quality": 20}]
)
def test_a_jpeg_that_was_cut_and_closed_again_is_refused(options):
    """Its last rows would be of one colour, and only libjpeg knows."""
    for shape in ((100, 75), (12, 12), (1, 30)):
        whole = jpeg(random_image(0, *shape), **options)
        images.read_image(whole, "image", 3)
        scan = whole.rfind(b"\xff\xda") + 14
        for part in (0.1, 0.5, 0.9):
            cut = whole[: scan + int(part * (len(whole) - 2 - scan))]
            with pytest.raises(errors.BrokenImage, match="image"):
                images.read_image(cut + b"\xff\xd9", "image", 3)
    flat = np.full((70, 70, 3), 200, np.uint8)
    images.read_image(jpeg(flat, **options), "image", 3)


def png(width, height, kind, pixels, *more, interlaced=0):
    def part(name, data):
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, interlaced)
    parts = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(part(*each) for each in parts)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (png(4, 4, 0, b"\0abcd"), "fewer rows"),
        (png(4, 4, 0, (b"\0abcd" * 4)[:-1]), "fewer rows"),
        (png(3, 3, 0, b"\0a" + b"\0b" * 3, interlaced=1), "fewer rows"),
        (png(1, 1, 3, b"\0\5"), "palette is missing"),
        (png(1, 1, 3, b"\0\5", (b"PLTE", b"abc")), "colours beyond its palette's 1"),
    ],
)
def test_a_png_that_lacks_what_it_promises_is_refused(content, what):
    with pytest.raises(errors.BrokenImage, match=what):
        images.read_image(content, "image", 1)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (9, 8), (17, 2)])
def test_a_whole_png_is_read(mode, size):
    image = Image.fromarray(random_image(0, *size)).convert(mode)
    expected = np.asarray(image.convert("RGB"))
    got = images.read_image(encoded(image, "PNG"), "image", 3)
    np.testing.assert_array_equal(got, expected)
    # Interlaced: its first pass alone has the one pixel of this.
    one = images.read_image(png(1, 1, 0, b"\0a", interlaced=1), "image", 1)
    assert one.tolist() == [[[97]]]


def test_of_a_png_far_too_large_nothing_is_unpacked(monkeypatch):
    monkeypatch.setattr(images, "_check_pixels", lambda parts: pytest.fail("unpacked"))
    with pytest.raises(errors.BrokenImage, match="decompression bomb"):
        images.read_image(png(100_000, 100_000, 0, bytes(10)), "image", 1)

"""Images on the host: decoding, resizing and ImageNet's crops, by Pillow."""

import contextlib
import io
import math
import pathlib
import struct
import zlib
from typing import Any

import numpy as np

from nlcg_optax.training.data.errors import BrokenImage

#: What is read, as Pillow calls it.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
# Those that Pillow converts to grey and to RGB as one would expect.
_MODES = ("1", "L", "LA", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_PNG = b"\x89PNG\r\n\x1a\n"
# How its interlaced pixels are spread: the first, and the distance of the next.
_ADAM7 = (
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
    *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
)
_WITH_PALETTE = 3  # the kind of its colours
_JPEG, _JPEG_SCAN, _JPEG_END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
# Pixels of a JPEG, whatever its code is, and others than zeros would be.
_MORE = bytes((90 + 181 * i) % 255 for i in range(510))
# Levels of grey in a block without a pattern, and pixels that are soon decoded again.
_FLAT, _SMALL = 16, 64 * 64
# Tags of TIFF: bits of a value, what is white, and whether values are signed.
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339


def read_image(file: Any, description: str, channels: int) -> np.ndarray:
    """Decodes an image: its path or bytes, grey for one channel.

    Upright, as its EXIF data say; in 8 bits, of more the highest; the colours as they
    are stored, also below what is transparent.

    Raises:
      BrokenImage: for whatever cannot be decoded so, and why.
    """
    from PIL import Image

    try:
        content = file if isinstance(file, bytes) else pathlib.Path(file).read_bytes()
        parts = _check_png(content) if content.startswith(_PNG) else None
        if content.startswith(_JPEG):
            _check_jpeg(content)
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            # Of a camera's MPO, which is a JPEG too, the first is the picture.
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"it has {image.n_frames} frames")  # pyright: ignore
            if parts is not None:  # of a size that Pillow does not refuse
                _check_pixels(parts)
            if image.format == "JPEG":
                _check_last_rows(image, content)
            upright = _upright(_in_8_bits(image))
            decoded = np.asarray(upright.convert("L" if channels == 1 else "RGB"))
    # Decoders raise nearly anything where a file is damaged.
    except Exception as error:
        what = str(error) or type(error).__name__
        raise BrokenImage(description, what) from error
    return decoded[..., None] if channels == 1 else decoded


def _in_8_bits(image: Any) -> Any:
    """The image, or an error if it has values that 8 bits do not tell."""
    from PIL import Image

    mode = image.mode
    tags = getattr(image, "tag_v2", {})
    if mode == "P":
        if image.format == "PNG":
            colours = len(image.palette.palette) // len(image.palette.mode)
            if np.max(np.asarray(image), initial=0) >= colours:
                raise ValueError(f"it has colours beyond its palette's {colours}")
        # Pillow warns where it drops a palette's transparency in one go.
        return image.convert("RGBA")
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
        # Pillow would cut off all above 255. PPM has as many bits as its maximum says,
        # and is scaled to 16 by Pillow.
        exif = image.getexif()
        values = np.asarray(image).astype(np.int64)
        # A TIFF may have 12 bits, and white at 0.
        values >>= tags.get(_BITS, (16,))[0] - 8
        values = values if tags.get(_PHOTOMETRIC, 1) else 255 - values
        image = Image.fromarray(values.astype(np.uint8))
        image.info["exif"] = exif.tobytes() if len(exif) else b""
        return image
    if mode in ("I", "F"):
        raise ValueError(
            f"its values are {'floating-point' if mode == 'F' else '32-bit'} numbers, "
            "of which nobody knows what is white: convert it to 8 or 16 bits"
        )
    if 2 in tags.get(_SAMPLE_FORMAT, ()):
        raise ValueError("its values are signed: convert it to 8 or 16 bits without")
    if mode not in _MODES:
        raise ValueError(f"its mode {mode} is not known: convert it to RGB")
    return image


def _upright(image: Any) -> Any:
    """The image, turned as its EXIF data say, if they can be read."""
    from PIL import ImageOps

    with contextlib.suppress(Exception):  # the pixels may be whole all the same
        if image.getexif().get(0x0112, 1) != 1:  # the orientation
            return ImageOps.exif_transpose(image)
    return image


def _check_png(content: bytes) -> dict[bytes, bytearray]:
    """Its header, palette and packed pixels, or a ValueError for a wrong checksum.

    Pillow does not look at the checksums of the pixels.
    """
    place = len(_PNG)
    parts = {kind: bytearray() for kind in (b"IHDR", b"PLTE", b"IDAT")}
    while place < len(content):
        if place + 8 > len(content):
            break
        length, kind = struct.unpack(">I4s", content[place : place + 8])
        end = place + 8 + length
        if end + 4 > len(content):
            break
        (checksum,) = struct.unpack(">I", content[end : end + 4])
        if zlib.crc32(content[place + 4 : end]) != checksum:
            raise ValueError(
                f"the checksum of its part {kind.decode('latin1')} is wrong"
            )
        if kind in parts:
            parts[kind] += content[place + 8 : end]
        if kind == b"IEND":
            return parts
        place = end + 4
    raise ValueError("image file is truncated")


def _check_pixels(parts: dict[bytes, bytearray]) -> None:
    """Raises a ValueError if rows of a PNG are missing, or its palette is.

    Pillow takes for black what is missing.
    """
    header, palette, packed = (parts[kind] for kind in (b"IHDR", b"PLTE", b"IDAT"))
    width, height, bits, kind, _, _, interlaced = struct.unpack(">IIBBBBB", header[:13])
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(kind, 1)
    # Where the first pixel is, and how far the next, of each pass: across and down.
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    expected = 0
    for x, y, across, down in passes:
        columns, rows = -(-(width - x) // across), -(-(height - y) // down)
        if columns > 0 and rows > 0:
            expected += rows * (1 + -(-columns * samples * bits // 8))
    if len(zlib.decompressobj().decompress(packed, expected)) < expected:
        raise ValueError("it has fewer rows of pixels than it says")
    if kind == _WITH_PALETTE and not palette:
        raise ValueError("its palette is missing")


def _check_jpeg(content: bytes) -> None:
    """Raises a ValueError if the pixels of a JPEG have no end.

    As where a download broke off, and zeros fill up the file: Pillow takes them for
    grey.
    """
    if content.rfind(_JPEG_END) < content.rfind(_JPEG_SCAN):
        raise ValueError("image file is truncated")


def _check_last_rows(image: Any, content: bytes) -> None:
    """Raises a ValueError if a JPEG ends before its pixels do, though it has an end.

    libjpeg fills its last rows with one colour then, and warns, which Pillow does not
    tell. What stands before the end is read if, and only if, pixels are missing.
    """
    from PIL import Image

    # The last block, or what is seen of it: into its colours others are blurred.
    corner = (image.width - 1) // 8 * 8, (image.height - 1) // 8 * 8
    last = np.asarray(image.crop((*corner, *image.size)).convert("L"))
    small = image.width * image.height <= _SMALL  # and its last block much of it
    if not (small or image.info.get("progressive")) and np.ptp(last) > _FLAT:
        return
    pixels = np.asarray(image)
    end = content.rfind(_JPEG_END)
    end -= content[end - 1] == _JPEG_END[0]  # of a marker that was cut
    more = content[:end] + _MORE + content[end:]
    with Image.open(io.BytesIO(more), formats=("JPEG",)) as other:
        if not np.array_equal(pixels, np.asarray(other)):
            raise ValueError("image file is truncated, for pixels are missing")


def resize(
    image: np.ndarray,
    size: tuple[int, int],
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """Resizes to height and width, antialiased; ``box``: left, top, right, bottom."""
    from PIL import Image

    height, width = size
    grey = image.shape[-1] == 1
    resized = Image.fromarray(image[..., 0] if grey else image).resize(
        (width, height), Image.Resampling.BILINEAR, box=box
    )
    return np.asarray(resized).reshape(height, width, image.shape[-1])


def resize_and_crop(image: np.ndarray, size: int, resize_to: int) -> np.ndarray:
    """Resizes the shorter side to ``resize_to`` and cuts out the centre."""
    height, width, _ = image.shape
    scale = resize_to / min(height, width)
    height, width = round(height * scale), round(width * scale)
    if (height, width) != image.shape[:2]:
        image = resize(image, (height, width))
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def central_crop(image: np.ndarray, size: int, rng: None) -> np.ndarray:
    """For evaluation: the shorter side to 256/224 of the size, and the centre."""
    del rng
    return resize_and_crop(image, size, round(size * 256 / 224))


def random_resized_crop(
    image: np.ndarray, size: int, rng: np.random.Generator, flip: bool
) -> np.ndarray:
    """For training: a box of random size and shape, if wanted flipped half the time."""
    top, left, height, width = random_box(image.shape[0], image.shape[1], rng)
    image = resize(image[top : top + height, left : left + width], (size, size))
    return image[:, ::-1] if flip and rng.random() < 0.5 else image


def random_box(
    height: int, width: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a box in an image."""
    for _ in range(10):
        area = rng.uniform(0.08, 1) * height * width
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        box_width = round(math.sqrt(area * aspect))
        box_height = round(math.sqrt(area / aspect))
        if 1 <= box_width <= width and 1 <= box_height <= height:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            return top, left, box_height, box_width
    # An image so long that no draw fits: the central box of the nearest aspect ratio.
    box_width = max(1, min(width, round(height * 4 / 3)))
    box_height = max(1, min(height, round(width * 4 / 3)))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width

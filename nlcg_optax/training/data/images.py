"""Images on the host: decoding, resizing and ImageNet's crops, by Pillow."""

import io
import math
from typing import Any

import numpy as np

from nlcg_optax.training.data.errors import BrokenImage


def read_image(file: Any, description: str, channels: int) -> np.ndarray:
    """Decodes a JPEG or PNG: its path or bytes, grey for one channel."""
    from PIL import Image

    try:
        file = io.BytesIO(file) if isinstance(file, bytes) else file
        with Image.open(file, formats=("JPEG", "PNG")) as image:
            if channels == 3 and image.mode == "P":
                # Pillow warns where it drops a palette's transparency in one go.
                image = image.convert("RGBA")
            decoded = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise BrokenImage(description, error) from error
    return decoded[..., None] if channels == 1 else decoded


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

"""Images to test with, in memory and in folders."""

import io
import itertools

import numpy as np
from PIL import Image


def random_image(seed, height=6, width=6, channels=3):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels), np.uint8)


def encode(image):
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


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

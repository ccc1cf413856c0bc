import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pictures import random_image

from nlcg_optax.training import data


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

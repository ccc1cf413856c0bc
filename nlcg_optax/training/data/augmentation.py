"""What the device makes of images: random crops and flips, normalization."""

import math

import jax
import jax.numpy as jnp

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def augment(
    key: jax.Array,
    images: jax.Array,
    *,
    crop_padding: int = 4,
    flip: bool = True,
    places: jax.Array | None = None,
    batch_size: int | None = None,
) -> jax.Array:
    """Random crops of the zero-padded images, half of them flipped left to right.

    The images keep their shape and dtype, and each has its own draw, which depends on
    its place in the batch and not on how the batch is split into parts.

    Args:
      key: a random key.
      images: [B, H, W, C], before any normalisation (the padding is black).
      crop_padding: pixels of padding on every side; 0 for no crop.
      flip: whether to flip. Mirrored digits are no digits.
      places: where the images are a part of a batch, their places in it, int [B].
      batch_size: with `places`, how many images the whole batch has.

    Returns:
      The augmented images.
    """
    if crop_padding < 0:
        raise ValueError(f"crop_padding must not be negative, and is {crop_padding}")
    crop_key, flip_key = jax.random.split(key)
    batch, *shape = images.shape
    batch = batch_size or batch

    def of_these(draws: jax.Array) -> jax.Array:
        return draws if places is None else draws[places]

    if crop_padding:
        pad = (crop_padding, crop_padding)
        padded = jnp.pad(images, ((0, 0), pad, pad, (0, 0)))
        corners = jax.random.randint(crop_key, (batch, 2), 0, 2 * crop_padding + 1)
        corners = of_these(corners)

        def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
            start = (corner[0], corner[1], jnp.zeros_like(corner[0]))
            return jax.lax.dynamic_slice(image, start, shape)

        images = jax.vmap(crop)(padded, corners)
    if flip:
        flipped = jax.random.bernoulli(flip_key, 0.5, (batch, 1, 1, 1))
        images = jnp.where(of_these(flipped), images[:, :, ::-1], images)
    return images


def standardize(images: jax.Array) -> jax.Array:
    r"""Gives every image zero mean and unit variance.

    :math:`(x - \mathrm{mean}) / \max(\mathrm{std}, 1 / \sqrt{HWC})` over all pixels and
    channels of one image, as TensorFlow's ``tf.image.per_image_standardization``: the
    bound keeps a constant image from being divided by zero. Images, [..., H, W, C] of
    any dtype, become float32 of the same shape.

    Example:
      >>> standardize(jnp.array([[[[0], [4]]], [[[7], [7]]]]))[..., 0].tolist()
      [[[-1.0, 1.0]], [[0.0, 0.0]]]
    """
    axes = (-3, -2, -1)
    images = images.astype(jnp.float32)
    centred = images - jnp.mean(images, axes, keepdims=True)
    std = jnp.sqrt(jnp.mean(jnp.square(centred), axes, keepdims=True))
    return centred / jnp.maximum(std, 1 / math.sqrt(math.prod(images.shape[-3:])))


def normalize_imagenet(images: jax.Array) -> jax.Array:
    """Subtracts ImageNet's mean colour and divides by its standard deviation.

    Images, 0..255, [..., 3], become float32 of the same shape.
    """
    mean = jnp.array(IMAGENET_MEAN, jnp.float32)
    std = jnp.array(IMAGENET_STD, jnp.float32)
    return (images.astype(jnp.float32) / 255 - mean) / std

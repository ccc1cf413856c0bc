"""What the mesh examples train: a small network on scikit-learn's real digits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets

BATCH = 1024  # the global batch: every number of devices up to 1,024 that divides it
STEPS = 40


def init():
    """The parameters: two layers, 64 pixels to 10 classes."""
    first, second = jax.random.split(jax.random.key(0))
    return {
        "w1": jax.random.normal(first, (64, 128)) / 8,
        "b1": jnp.zeros(128),
        "w2": jax.random.normal(second, (128, 10)) / 11,
        "b2": jnp.zeros(10),
    }


def loss_fn(params, batch):
    """The mean cross-entropy of a batch, or of a device's share of one."""
    hidden = jax.nn.relu(batch["image"] @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return losses.mean()


def batches():
    """Global batches of distinct images, the same in every run."""
    digits = sklearn.datasets.load_digits()
    images = digits.data.astype(np.float32) / 16
    labels = digits.target.astype(np.int32)
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        rows = rng.permutation(len(images))[:BATCH]
        yield {"image": images[rows], "label": labels[rows]}

"""What the mesh examples train: a small network on scikit-learn's real digits.

    python examples/digits_mlp.py

On one device, and without a learning rate, it is trained when this runs as a program.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets

import nlcg_optax

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


def model(params, batch):
    """The logits [examples, 10] of a batch."""
    hidden = jax.nn.relu(batch["image"] @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def cross_entropy(logits, batch):
    """The mean cross-entropy of the labels."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return losses.mean()


def loss_fn(params, batch):
    """The loss of a batch, or of a device's share of one."""
    return cross_entropy(model(params, batch), batch)


def batches():
    """Global batches of distinct images, the same in every run."""
    digits = sklearn.datasets.load_digits()
    images = digits.data.astype(np.float32) / 16
    labels = digits.target.astype(np.int32)
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        rows = rng.permutation(len(images))[:BATCH]
        yield {"image": images[rows], "label": labels[rows]}


def share(*trees):
    """How much of some trees of arrays the first device holds, of 1."""
    arrays = jax.tree.leaves(trees)
    held = sum(x.addressable_shards[0].data.size for x in arrays)
    return held / sum(x.size for x in arrays)


def main():
    """Trains on one device by `nlcg_auto`."""
    tx = nlcg_optax.nlcg_auto(STEPS)
    evaluate = nlcg_optax.value_grad_and_curvature(model, cross_entropy)

    @jax.jit
    def step(params, opt_state, batch):
        loss, grads, curvature = evaluate(params, batch)
        updates, opt_state = tx.update(
            grads, opt_state, params, value=loss, curvature=curvature
        )
        return optax.apply_updates(params, updates), opt_state, loss

    params = init()
    opt_state = tx.init(params)
    for i, batch in enumerate(batches(), start=1):
        params, opt_state, loss = step(params, opt_state, batch)
        if i % 10 == 0:
            print(f"nlcg_auto: step {i}, loss {loss:.5f}")
    right = jnp.mean(jnp.argmax(model(params, batch), -1) == batch["label"])
    print(
        f"{right:.1%} of the last batch of {BATCH:,} are right after {STEPS} steps, "
        "without a learning rate"
    )


if __name__ == "__main__":
    main()

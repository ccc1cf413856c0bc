"""Tasks that were written after every constant was fixed, and run once.

Each is of a kind that no constant was chosen on: a hundred classes, a long tail of rare
words, and a regression with outliers by a loss that is straight far out. What the first
of these showed changed how the rate may grow; after that two more were written, whose
outputs have no noise: a sum over a sequence, and an operator between functions.
"""

import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
from sklearn.datasets import load_digits
from training_tasks import FunctionTask, gru_cell, mlp, mlp_init

from nlcg_optax.training import loop
from nlcg_optax.training.config import ConfigDict, typed


def cross_entropy(logits: jax.Array, examples: Any) -> jax.Array:
    """Of examples whose last array are the labels."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, examples[-1])
    return jnp.mean(losses)


def regression(
    init: Callable[[Any], Any],
    outputs: Callable[[Any, Any], jax.Array],
    examples: Callable[[int], tuple[np.ndarray, np.ndarray]],
    config: ConfigDict,
) -> FunctionTask:
    """By the mean squared error, from 16,384 drawn examples and 2,048 held out."""
    return FunctionTask(
        init,
        outputs,
        lambda y, examples: jnp.mean((y - examples[1]) ** 2),
        examples(16_384),
        examples(2_048),
        config,
    )


def two_digits(config: ConfigDict) -> FunctionTask:
    """Two of scikit-learn's digits side by side, a hundred classes: 128-256-256-100.

    The pairs that are held out are of images that no pair of the training has.
    """
    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(labels))

    def pairs(part: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        left, right = rng.choice(part, (2, count))
        x = np.concatenate([images[left], images[right]], -1) / 16
        return np.float32(x), np.int32(10 * labels[left] + labels[right])

    return FunctionTask(
        functools.partial(mlp_init, (128, 256, 256, 100)),
        lambda params, examples: mlp(params, examples[0], jax.nn.relu),
        cross_entropy,
        pairs(order[:1400], 65_536),
        pairs(order[1400:], 4_096),
        config,
    )


CONTEXT, VOCABULARY, WIDTH = 4, 2048, 32


def rare_words(config: ConfigDict, path: pathlib.Path) -> FunctionTask:
    """The next word after four of Shakespeare's, as Bengio et al. (2003) have it.

    Half of the 2,048 words occur about 20 times or fewer; what is rarer still is one
    word. As of the GPT embedding and head go to Adam: their rows are too many for a
    basis.
    """
    words = re.findall(r"[a-z']+|[.,;:!?]", path.read_text().lower())
    names, counts = np.unique(words, return_counts=True)
    kept = names[np.argsort(-counts, kind="stable")[: VOCABULARY - 1]]
    code = {name: number for number, name in enumerate(kept)}
    tokens = np.array([code.get(word, VOCABULARY - 1) for word in words], np.int32)
    rows = np.lib.stride_tricks.sliding_window_view(tokens, CONTEXT + 1)
    cut = len(rows) * 9 // 10

    def init(seed: Any) -> Any:
        keys = jax.random.split(jax.random.key(seed))
        embedding = jax.random.normal(keys[0], (VOCABULARY, WIDTH)) / np.sqrt(WIDTH)
        head = jax.random.normal(keys[1], (128, VOCABULARY)) / np.sqrt(128)
        (hidden,) = mlp_init((CONTEXT * WIDTH, 128), seed)
        return {"embedding": embedding, "hidden": hidden, "head": head}

    def outputs(params: Any, examples: Any) -> jax.Array:
        words = params["embedding"][examples[0]].reshape(-1, CONTEXT * WIDTH)
        hidden = params["hidden"]
        return jnp.tanh(words @ hidden["w"] + hidden["b"]) @ params["head"]

    def labels(params: Any) -> Any:
        rest = jax.tree.map(lambda _: peers.REST, params)
        hidden = jax.tree.map(lambda _: peers.MATRICES, params["hidden"])
        return rest | {"hidden": hidden}

    def examples(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return part[:, :-1], part[:, -1]

    return FunctionTask(
        init,
        outputs,
        cross_entropy,
        examples(rows[:cut]),
        examples(rows[cut::4]),
        config,
        labels=labels,
    )


def inpainting(config: ConfigDict) -> FunctionTask:
    """The hidden middle of grey images, 4×4 of 12×12, by 128-256-256-16 and GELU.

    One in twenty of the pixels to be learned is noise of five standard deviations; of
    those held out none is. The loss is Huber's, δ = 1.
    """
    dataset = loop.load_dataset(typed(config).dataset)
    middle = np.zeros((12, 12), bool)
    middle[4:8, 4:8] = True
    rng = np.random.default_rng(0)

    def examples(split: Any, wrong: float) -> tuple[np.ndarray, np.ndarray]:
        x = split.images.mean(-1)
        x = (x - x.mean()) / x.std()
        y = x[:, middle]
        noise = 5 * rng.normal(size=y.shape)
        y = np.where(rng.uniform(size=y.shape) < wrong, noise, y)
        return np.float32(x[:, ~middle]), np.float32(y)

    return FunctionTask(
        functools.partial(mlp_init, (128, 256, 256, 16)),
        lambda params, examples: mlp(params, examples[0], jax.nn.gelu),
        lambda y, examples: jnp.mean(jnp.sum(optax.huber_loss(y, examples[1]), -1)),
        examples(dataset.train, 0.05),
        examples(dataset.test, 0.0),
        config,
    )


LENGTH, UNITS = 12, 48


def adding(config: ConfigDict) -> FunctionTask:
    """The adding problem of Hochreiter and Schmidhuber (1997), by a GRU of 48 units.

    Of twelve numbers from 0 to 1 two are marked; their sum is to be told at the end.
    """
    rng = np.random.default_rng(0)

    def examples(count: int) -> tuple[np.ndarray, np.ndarray]:
        numbers = rng.uniform(size=(count, LENGTH))
        marks = np.argsort(rng.uniform(size=(count, LENGTH))) < 2
        y = np.sum(numbers * marks, -1)
        return np.float32(np.stack([numbers, marks], -1)), np.float32(y)

    def init(seed: Any) -> Any:
        keys = jax.random.split(jax.random.key(seed), 3)
        shapes = {"input": (2, 3 * UNITS), "state": (UNITS, 3 * UNITS), "out": (UNITS,)}
        weights = {
            name: jax.random.normal(key, shape) / np.sqrt(shape[0])
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        return weights | {"bias": jnp.zeros(3 * UNITS)}

    def outputs(params: Any, examples: Any) -> jax.Array:
        def parts(x: jax.Array) -> tuple[jax.Array, ...]:
            update, reset, new = jnp.split(x, 3, -1)
            return reset, update, new

        def step(h: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
            given = parts(x @ params["input"] + params["bias"])
            return gru_cell(h, given, parts(h @ params["state"])), None

        x = jnp.swapaxes(examples[0], 0, 1)
        h, _ = jax.lax.scan(step, jnp.zeros((x.shape[1], UNITS)), x)
        return h @ params["out"]

    return regression(init, outputs, examples, config)


POINTS = 32


def antiderivative(config: ConfigDict) -> FunctionTask:
    """From a function to its integral, by a DeepONet (Lu et al., 2021).

    The functions are random, at 32 points of an interval: Gaussian processes with the
    kernel of squares and a length of 0.2. A branch of 32-128-128-64 times a trunk of
    1-64-64-64, by the mean squared error.
    """
    rng = np.random.default_rng(0)
    points = np.linspace(0, 1, POINTS)
    kernel = np.exp(-0.5 * (points[:, None] - points) ** 2 / 0.2**2)
    values, vectors = np.linalg.eigh(kernel)
    root = vectors * np.sqrt(np.maximum(values, 0))

    def examples(count: int) -> tuple[np.ndarray, np.ndarray]:
        u = rng.normal(size=(count, POINTS)) @ root.T
        trapezoids = (u[:, 1:] + u[:, :-1]) / 2 / (POINTS - 1)
        integral = np.cumsum(np.pad(trapezoids, ((0, 0), (1, 0))), -1)
        return np.float32(u), np.float32(integral)

    def init(seed: Any) -> Any:
        branch = mlp_init((POINTS, 128, 128, 64), seed)
        return {"branch": branch, "trunk": mlp_init((1, 64, 64, 64), seed + 1)}

    def outputs(params: Any, examples: Any) -> jax.Array:
        branch = mlp(params["branch"], examples[0], jnp.tanh)
        trunk = mlp(params["trunk"], jnp.float32(points)[:, None], jnp.tanh)
        return branch @ trunk.T / 8

    return regression(init, outputs, examples, config)

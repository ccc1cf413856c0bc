"""Small tasks with much noise, where the rate that no one tunes was chosen and tried.

    python benchmarks/large_batch/noise_tasks.py --task=outliers --seeds=2
    python benchmarks/large_batch/noise_tasks.py --task=words --data_dir=FOLDER

FOLDER has tinyshakespeare.txt. Each line is the loss at the end: of peers at each rate
of a grid, with cosine decay, and of `nlcg_auto`, for which nothing is tuned. `words`
and `outliers` were looked at while the rule was made, `vit` and `gru` only at the end.
"""

import argparse
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
from training_tasks import FunctionTask, mlp, mlp_init

import nlcg_optax
from nlcg_optax.training import data
from nlcg_optax.training.config import base_config

Task = tuple[FunctionTask, int, int]  # with a batch size and a number of steps


def outliers(data_dir: str | None = None) -> Task:
    """Regression by squared error, one label in twenty far off; clean ones held out."""
    del data_dir
    rng = np.random.default_rng(0)
    x = rng.normal(size=(9216, 12)) * np.geomspace(1, 0.1, 12)
    hidden = np.sin(x @ rng.normal(size=(12, 16)))
    y = hidden @ rng.normal(size=(16, 3)) / 4
    noisy = y + np.where(rng.uniform(size=y.shape) < 0.05, 5, 0.1) * rng.normal(
        size=y.shape
    )
    cut = 8192
    return (
        FunctionTask(
            functools.partial(mlp_init, (12, 64, 64, 3)),
            lambda params, examples: mlp(params, examples[0]),
            lambda y, examples: jnp.mean(jnp.sum((y - examples[1]) ** 2, -1)),
            (np.float32(x[:cut]), np.float32(noisy[:cut])),
            (np.float32(x[cut:]), np.float32(y[cut:])),
            base_config(),
        ),
        64,
        800,
    )


def words(data_dir: str | None = None) -> Task:
    """Skip-grams with negative sampling: a batch touches few rows of its embeddings."""
    text = (pathlib.Path(data_dir or ".") / "tinyshakespeare.txt").read_text()
    found = re.findall(r"[a-z']+", text.lower())
    names, counts = np.unique(found, return_counts=True)
    kept = names[np.argsort(-counts)[:3000]]
    number = {name: i for i, name in enumerate(kept)}
    stream = np.array([number[w] for w in found if w in number], np.int32)
    rng = np.random.default_rng(0)
    centre = rng.integers(4, len(stream) - 4, 60_000)
    offset = rng.choice([-4, -3, -2, -1, 1, 2, 3, 4], len(centre))
    often = np.bincount(stream, minlength=3000) ** 0.75
    negative = rng.choice(3000, (len(centre), 5), p=often / often.sum())
    targets = np.concatenate([stream[centre + offset][:, None], negative], 1)
    rows = np.concatenate([stream[centre][:, None], targets], 1).astype(np.int32)

    def init(seed: Any) -> Any:
        keys = jax.random.split(jax.random.key(seed))
        return {
            name: 0.1 * jax.random.normal(key, (3000, 24))
            for name, key in zip(("centres", "contexts"), keys, strict=True)
        }

    def outputs(params: Any, rows: Any) -> jax.Array:
        u, v = params["centres"][rows[:, 0]], params["contexts"][rows[:, 1:]]
        return jnp.einsum("bd,bkd->bk", u, v)

    def loss(scores: jax.Array, rows: Any) -> jax.Array:
        del rows
        signs = jnp.array([1.0, -1, -1, -1, -1, -1])
        return jnp.mean(jnp.sum(jax.nn.softplus(-signs * scores), -1))

    return (
        FunctionTask(
            init,
            outputs,
            loss,
            rows[:54_000],
            rows[54_000:],
            base_config(),
            # The embeddings have no basis: their rows are too many.
            labels=lambda params: jax.tree.map(lambda _: peers.REST, params),
        ),
        128,
        800,
    )


def vit(data_dir: str | None = None) -> Task:
    """A small vision transformer of handwritten digits, with dropout of a tenth."""
    del data_dir
    images, labels = load_digits(return_X_y=True)
    x = np.float32(images.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4) / 16)
    x = x.reshape(-1, 16, 4)
    order = np.random.default_rng(0).permutation(len(x))
    width = 32

    def init(seed: Any) -> Any:
        def matrix(key: Any, m: int, n: int) -> jax.Array:
            return jax.random.normal(key, (m, n)) / np.sqrt(m)

        keys = iter(jax.random.split(jax.random.key(seed), 12))
        block = {"qkv": 3 * width, "up": 2 * width}
        return {
            "patch": matrix(next(keys), 4, width),
            "place": 0.1 * matrix(next(keys), 16, width),
            "blocks": [
                {name: matrix(next(keys), width, n) for name, n in block.items()}
                | {
                    "out": matrix(next(keys), width, width),
                    "down": matrix(next(keys), 2 * width, width),
                }
                for _ in range(2)
            ],
            "head": matrix(next(keys), width, 10),
        }

    def norm(h: jax.Array) -> jax.Array:
        return jax.nn.standardize(h, axis=-1)

    def outputs(params: Any, examples: Any) -> jax.Array:
        x, numbers, _ = examples
        key = jax.random.fold_in(jax.random.key(7), jnp.sum(numbers))
        kept = jax.random.bernoulli(key, 0.9, (5, *x.shape[:2], width)) / 0.9
        kept = jnp.where(numbers[0] < 0, 1.0, kept)  # of those held out all are kept
        h = (x @ params["patch"] + params["place"]) * kept[0]
        for i, block in enumerate(params["blocks"]):
            q, k, v = jnp.split(norm(h) @ block["qkv"], 3, -1)
            q, k, v = (a.reshape(*a.shape[:2], 4, -1) for a in (q, k, v))
            a = jax.nn.dot_product_attention(q, k, v).reshape(h.shape)
            h = h + (a @ block["out"]) * kept[2 * i + 1]
            up = jax.nn.gelu(norm(h) @ block["up"])
            h = h + (up @ block["down"]) * kept[2 * i + 2]
        return norm(jnp.mean(h, 1)) @ params["head"]

    def loss(logits: jax.Array, examples: Any) -> jax.Array:
        labels = examples[2]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses)

    def part(places: np.ndarray, held_out: bool) -> Any:
        numbers = -np.ones(len(places)) if held_out else np.arange(len(places))
        return x[places], numbers.astype(np.int32), labels[places].astype(np.int32)

    return (
        FunctionTask(
            init,
            outputs,
            loss,
            part(order[:1400], False),
            part(order[1400:], True),
            base_config(),
        ),
        64,
        600,
    )


def gru(data_dir: str | None = None) -> Task:
    """A GRU of characters, by windows of 32."""
    text = (pathlib.Path(data_dir or ".") / "tinyshakespeare.txt").read_text()
    letters = sorted(set(text))
    code = {letter: i for i, letter in enumerate(letters)}
    tokens = np.array([code[letter] for letter in text], np.int32)
    count = (len(tokens) - 1) // 32
    rows = np.stack([tokens[: 32 * count], tokens[1 : 32 * count + 1]], -1)
    rows = rows.reshape(count, 32, 2)
    cut, width = count * 9 // 10, 64

    def init(seed: Any) -> Any:
        keys = jax.random.split(jax.random.key(seed), 4)
        sizes = {
            "embedding": (len(letters), width),
            "input": (width, 3 * width),
            "state": (width, 3 * width),
            "head": (width, len(letters)),
        }
        return {
            name: jax.random.normal(key, size) / np.sqrt(width)
            for key, (name, size) in zip(keys, sizes.items(), strict=True)
        }

    def outputs(params: Any, rows: Any) -> jax.Array:
        x = params["embedding"][rows[..., 0]] @ params["input"]

        def step(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            r, z, n = jnp.split(x, 3, -1)
            hr, hz, hn = jnp.split(h @ params["state"], 3, -1)
            gate = jax.nn.sigmoid(z + hz)
            h = gate * h + (1 - gate) * jnp.tanh(n + jax.nn.sigmoid(r + hr) * hn)
            return h, h

        _, h = jax.lax.scan(step, jnp.zeros((len(rows), width)), jnp.swapaxes(x, 0, 1))
        return jnp.swapaxes(h, 0, 1) @ params["head"]

    def loss(logits: jax.Array, rows: Any) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows[..., 1])
        return jnp.mean(losses)

    return (
        FunctionTask(
            init,
            outputs,
            loss,
            rows[:cut],
            rows[cut::8],
            base_config(),
            fewest=32,
        ),
        32,
        800,
    )


TASKS: dict[str, Callable[..., Task]] = {
    "words": words,
    "outliers": outliers,
    "vit": vit,
    "gru": gru,
}


def soap(b1: float) -> optax.GradientTransformation:
    """SOAP; of a tall embedding without a basis of its rows."""
    return optax.chain(nlcg_optax.scale_by_soap(b1), optax.scale(5.0))


PEERS = {
    "soap": lambda: soap(0.95),
    "soap β=0.8": lambda: soap(0.8),
    "adam": optax.scale_by_adam,
}
RATES = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064)


def peer(name: str, rate: float, steps: int) -> optax.GradientTransformation:
    """One of the peers, with a warm-up of a tenth and cosine decay."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.1 * rate, rate, max(steps // 10, 1), steps
    )
    return optax.chain(PEERS[name](), optax.scale_by_learning_rate(schedule))


def final(task: FunctionTask, size: int, steps: int, seed: int, tx: Any) -> float:
    """The loss of the examples held out, after a run."""
    order = [data.batch_indices(t, size, task.num_train, seed) for t in range(steps)]
    arrays, tx = jax.device_put(task.data), optax.with_extra_args_support(tx)
    stride = max(size // 256, 1)

    @jax.jit
    def step(params: Any, state: Any, places: Any) -> Any:
        batch = jax.tree.map(lambda x: x[places], arrays)
        loss, grads = task.value_and_grad(params, batch, size)
        few = jax.tree.map(lambda x: x[::stride], batch)
        curvature = nlcg_optax.gauss_newton(
            lambda params: task.outputs(params, few),
            lambda outputs: task.loss(outputs, few),
            fraction=1 / stride,
        )
        updates, state = tx.update(
            grads, state, params, value=loss, curvature=curvature
        )
        return optax.apply_updates(params, updates), state

    params = task.init(seed)
    state = tx.init(params)
    for places in order:
        params, state = step(params, state, places.astype(np.int32))
    return float(jax.jit(task.loss)(task.outputs(params, task.held_out), task.held_out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--data_dir")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", help="of the peers, or nlcg")
    flags = parser.parse_args()
    task, size, steps = TASKS[flags.task](flags.data_dir)
    runs: list[tuple[str, Callable[[], Any]]] = [
        (f"{name}, {rate:g}", functools.partial(peer, name, rate, steps))
        for name in PEERS
        for rate in RATES
    ]
    auto = functools.partial(nlcg_optax.nlcg_auto, steps)
    runs.append(("nlcg by curvature", auto))
    for name, make in runs:
        if flags.only is None or name.startswith(flags.only):
            losses = [final(task, size, steps, s, make()) for s in range(flags.seeds)]
            shown = ", ".join(f"{loss:.5g}" for loss in losses)
            print(f"{flags.task}: {name}: {shown}", flush=True)


if __name__ == "__main__":
    main()

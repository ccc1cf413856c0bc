"""Small tasks with much noise, where the rate that no one tunes was chosen and tried.

    python benchmarks/large_batch/noise_tasks.py --task=outliers --seeds=2
    python benchmarks/large_batch/noise_tasks.py --task=words --data_dir=FOLDER

    python benchmarks/large_batch/noise_tasks.py --table

FOLDER has tinyshakespeare.txt. Each run is a line of `results/noise_tasks.jsonl`, the
loss at the end: of peers at each rate of a grid, with cosine decay, and of `nlcg_auto`,
for which nothing is tuned. What is there is not run again; `--table` writes
`results/noise_tasks.md`. `words` and `outliers` were looked at while the rule was made,
`vit` and `gru` only at the end.
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
import protocol
import report
from sklearn.datasets import load_digits
from training_tasks import FunctionTask, gru_cell, mlp, mlp_init

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
            known = jnp.split(h @ params["state"], 3, -1)
            h = gru_cell(h, jnp.split(x, 3, -1), known)
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


RESULTS = pathlib.Path(__file__).resolve().parent / "results" / "noise_tasks.jsonl"
OURS = "nlcg by curvature"


def schedule(rate: float, steps: int) -> np.ndarray:
    """The rates of a run: a warm-up of a tenth, and cosine decay."""
    made = optax.warmup_cosine_decay_schedule(
        0.1 * rate, rate, max(steps // 10, 1), steps
    )
    return np.asarray(made(jnp.arange(steps)), np.float32)


def trained(found: Task, make: Callable[[Any], Any]) -> Callable[..., float]:
    """A function from a seed and the rates of a run to the loss of those held out.

    It is compiled once. `make` is given the rate of a step, and returns the optimizer.
    """
    task, size, steps = found
    arrays, stride = jax.device_put(task.data), max(size // 256, 1)

    @jax.jit
    def step(params: Any, state: Any, places: Any, rate: Any) -> Any:
        batch = jax.tree.map(lambda x: x[places], arrays)
        loss, grads = task.value_and_grad(params, batch, size)
        few = jax.tree.map(lambda x: x[::stride], batch)
        curvature = nlcg_optax.gauss_newton(
            lambda params: task.outputs(params, few),
            lambda outputs: task.loss(outputs, few),
            fraction=1 / stride,
        )
        updates, state = optax.with_extra_args_support(make(rate)).update(
            grads, state, params, value=loss, curvature=curvature
        )
        return optax.apply_updates(params, updates), state

    init = jax.jit(lambda params: make(0.0).init(params))
    loss_of = jax.jit(
        lambda p: task.loss(task.outputs(p, task.held_out), task.held_out)
    )

    def run(seed: int, rates: np.ndarray) -> float:
        params = task.init(seed)
        state = init(params)
        for t in range(steps):
            places = data.batch_indices(t, size, task.num_train, seed)
            params, state = step(params, state, places.astype(np.int32), rates[t])
        return float(loss_of(params))

    return run


def record(name: str, data_dir: str | None, seeds: int, only: str | None) -> None:
    """Adds the lines that are not there, one for each seed and rate."""
    done = {
        (row["task"], row["optimizer"], row["rate"], row["seed"])
        for row in protocol.read(RESULTS)
    }
    found, where = TASKS[name](data_dir), protocol.environment()
    steps = found[2]
    makers: dict[str, tuple[Callable[[Any], Any], tuple[float, ...]]] = {
        OURS: (lambda _: nlcg_optax.nlcg_auto(steps), (0.0,))
    }
    for peer, direction in PEERS.items():

        def make(rate: Any, direction: Any = direction) -> Any:
            return optax.chain(direction(), optax.scale(-rate))

        makers[peer] = make, RATES
    for optimizer, (make, rates) in makers.items():
        if only is not None and not optimizer.startswith(only):
            continue
        run = None
        for rate in rates:
            for seed in range(seeds):
                if (name, optimizer, rate, seed) in done:
                    continue
                run = run or trained(found, make)
                loss = run(seed, schedule(rate, steps))
                row = {
                    "task": name,
                    "optimizer": optimizer,
                    "rate": rate,
                    "seed": seed,
                    "loss": protocol.rounded(loss) if np.isfinite(loss) else None,
                }
                protocol.append(RESULTS, row | where)
                print(row, flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """By task: ours, and each peer at its best rate, means of the seeds."""
    names = [OURS, *PEERS]
    cells = []
    for task in dict.fromkeys(row["task"] for row in rows):
        line = [f"`{task}`"]
        for name in names:
            by_rate: dict[float, list[float | None]] = {}
            for row in rows:
                if (row["task"], row["optimizer"]) == (task, name):
                    by_rate.setdefault(row["rate"], []).append(row["loss"])
            means = {
                rate: (float(np.mean(losses)), losses)
                for rate, losses in by_rate.items()
                if None not in losses
            }
            if not means:
                line.append("diverged" if by_rate else "not run")
                continue
            rate = min(means, key=lambda rate: means[rate][0])
            mean, losses = means[rate]
            each = ", ".join(f"{loss:.4g}" for loss in losses)
            at = f"; rate {rate:g}" if name != OURS else ""
            line.append(f"{mean:.4g} ({each}{at})")
        cells.append(line)
    lines = [
        "# Small tasks with much noise",
        "",
        "Loss of held-out examples at the end: the mean of the seeds, each, and "
        "of a peer the best of the rates "
        f"{', '.join(f'{rate:g}' for rate in RATES)} (with a warm-up of a tenth and "
        f"cosine decay), chosen by these losses; of `{OURS}` nothing is tuned.",
        "",
        *report.table(["task", *names], cells),
        "",
        f"`python benchmarks/large_batch/noise_tasks.py`; {report.environments(rows)}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--data_dir")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", help="of the peers, or nlcg")
    parser.add_argument("--table", action="store_true", help="write noise_tasks.md")
    flags = parser.parse_args()
    if flags.table:
        RESULTS.with_suffix(".md").write_text(table(protocol.read(RESULTS)))
    elif flags.task:
        record(flags.task, flags.data_dir, flags.seeds, flags.only)
    else:
        parser.error("--task or --table?")


if __name__ == "__main__":
    main()

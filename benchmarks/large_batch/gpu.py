"""ResNet-32 on cifar10_jpeg at 32×32 in bfloat16, 40 epochs: for one GPU.

    python benchmarks/large_batch/gpu.py --data=cifar10_jpeg.tar.xz --minutes=9

Run it again until nothing is left: what `results/cifar10_jpeg_gpu.jsonl` holds is not
run again, and no run is started that would not end in time. The largest batch comes
first, one seed of all optimizers before more seeds. Several processes may share a GPU,
each with `--part=i/n` of the optimizers and batch sizes, which is faster (one compiles
while another trains) and tells nothing of their speed. It needs jax, flax, optax, numpy
and pillow, and nothing of the package's extra [train] beside them.
"""

import argparse
import io
import math
import pathlib
import tarfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import protocol
import running
from PIL import Image

import nlcg_optax
from nlcg_optax.training import data, models

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
BATCH_SIZES = (50_000, 16_384, 1024)  # in the order of running
EPOCHS = 40
SCHEDULE = "cosine, warm-up 10%"
NUM_RATES = 3
HELD_OUT = 5000  # while the rate is tuned
L2_PENALTY = 2e-4
MICROBATCH = 5000  # images through the model at once: 10 GB
CURVATURE_EVERY = 10  # one image of so many tells the curvature


def _muon(beta: float) -> Callable[[Any], Any]:
    return lambda rate: optax.contrib.muon(
        rate,
        beta=beta,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=models.muon_matrices,
    )


def _lars(rate: Any) -> Any:
    return optax.lars(
        rate,
        weight_decay=0.0,
        trust_coefficient=0.02,
        trust_ratio_mask=models.l2_mask,
        momentum=0.9,
    )


# By name: from the learning rate to the optimizer, and the middle of the grid. In the
# order of running. Without a rate the curvature chooses the step.
OPTIMIZERS: dict[str, tuple[Callable[[Any], Any] | None, float]] = {
    "nlcg by curvature": (None, 1.0),
    "nlcg": (nlcg_optax.nlcg, 0.04),
    "muon β=0.8": (_muon(0.8), 0.08),
    "muon": (_muon(0.95), 0.04),
    "lars": (_lars, 1.6),
    "momentum": (lambda rate: optax.sgd(rate, 0.9), 0.8),
}


class Images(NamedTuple):
    """uint8 images [N, H, W, 3] and int32 labels [N]."""

    images: np.ndarray
    labels: np.ndarray


def read_images(path: pathlib.Path) -> dict[str, Images]:
    """The splits "train" and "test" of a folder or tar of SPLIT/CLASS/*.jpg."""

    def files() -> Iterator[tuple[pathlib.PurePath, bytes]]:
        if path.is_dir():
            for file in sorted(path.glob("*/*/*.jpg")):
                yield file.relative_to(path), file.read_bytes()
            return
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    content = tar.extractfile(member)
                    assert content is not None
                    yield pathlib.PurePath(member.name), content.read()

    found: dict[str, list[tuple[str, str, np.ndarray]]] = {"train": [], "test": []}
    for name, content in files():
        split, label, file = name.parts[-3:]
        image = Image.open(io.BytesIO(content)).convert("RGB")
        found[split].append((label, file, np.asarray(image)))
    if not found["train"] or not found["test"]:
        raise SystemExit(f"{path} has no train/CLASS/*.jpg and test/CLASS/*.jpg.")
    classes = sorted({label for label, _, _ in found["train"]})
    splits = {}
    for split, rows in found.items():
        rows.sort(key=lambda row: row[:2])
        labels = np.array([classes.index(label) for label, _, _ in rows], np.int32)
        splits[split] = Images(np.stack([image for _, _, image in rows]), labels)
    return splits


class State(NamedTuple):
    """Parameters, BatchNorm's statistics, the optimizer's state, and steps made."""

    params: Any
    batch_stats: Any
    opt_state: Any
    step: jax.Array


class Trainer:
    """Trains the cells; what they share is read and compiled once."""

    def __init__(
        self,
        splits: dict[str, Images],
        model: Any,
        epochs: float = EPOCHS,
        microbatch: int = MICROBATCH,
        held_out: int = HELD_OUT,
    ):
        self.splits, self.epochs, self.microbatch = splits, epochs, microbatch
        self.model = model
        self.train = jax.device_put(splits["train"])
        order = np.random.default_rng(0).permutation(len(splits["train"].labels))
        everything = np.sort(order)
        self.kept = {"tuning": np.sort(order[held_out:]), "test": everything}
        self.judged = {
            "tuning": Images(*(x[np.sort(order[:held_out])] for x in splits["train"])),
            "test": splits["test"],
        }
        self._compiled: tuple[Any, Any] = (None, None)
        self._score = jax.jit(self.score)

    def parts(self, batch_size: int) -> int:
        """The fewest microbatches of one size that are small enough."""
        first = math.ceil(batch_size / self.microbatch)
        return next(n for n in range(first, batch_size + 1) if batch_size % n == 0)

    def create_optimizer(self, name: str, rate: Any, horizon: int | None) -> Any:
        make, _ = OPTIMIZERS[name]
        if make is None:
            return nlcg_optax.nlcg_auto(horizon)
        return optax.with_extra_args_support(make(lambda _: rate))

    def logits(self, params, batch_stats, images, train=True, model=None):
        model = model or self.model
        variables = {"params": params, "batch_stats": batch_stats}
        x = data.standardize(images)
        if not train:
            return model.apply(variables, x, train=False), batch_stats
        out, updated = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return out, updated["batch_stats"]

    def train_step(self, name, horizon, parts, state, indices, images, rate, seed):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        chosen = images.images[indices]
        batch = Images(data.augment(key, chosen), images.labels[indices])

        def loss_of(params, batch_stats, part):
            logits, batch_stats = self.logits(params, batch_stats, part.images)
            return cross_entropy(logits, part.labels) / parts, batch_stats

        def add(total, part):
            (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(
                state.params, state.batch_stats, part
            )
            share = jax.tree.map(lambda x: x / parts, stats)
            return jax.tree.map(jnp.add, total, (loss, share, grads)), None

        chunks = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
        zeros = jax.tree.map(
            jnp.zeros_like, (jnp.zeros([]), state.batch_stats, state.params)
        )
        (loss, batch_stats, grads), _ = jax.lax.scan(add, zeros, chunks)
        penalty, penalty_grads = jax.value_and_grad(l2)(state.params)
        loss, grads = loss + penalty, jax.tree.map(jnp.add, grads, penalty_grads)

        given = {}
        if OPTIMIZERS[name][0] is None:
            few = jax.tree.map(lambda x: x[::CURVATURE_EVERY], batch)
            given["curvature"] = nlcg_optax.gauss_newton(
                lambda params: self.logits(params, state.batch_stats, few.images),
                lambda logits: cross_entropy(logits, few.labels),
                l2=L2_PENALTY,
                l2_mask=models.l2_mask,
                has_aux=True,
            )
        tx = self.create_optimizer(name, rate, horizon)
        updates, opt_state = tx.update(
            grads, state.opt_state, state.params, value=loss, **given
        )
        finite = jnp.isfinite(optax.tree.norm(grads))
        params = optax.apply_updates(state.params, updates)
        new = State(params, batch_stats, opt_state, state.step + 1)
        return new, jnp.where(finite, loss, jnp.nan)

    def score(self, params, batch_stats, few, images, labels):
        """Loss and accuracy, under BatchNorm's statistics of a few training images."""
        forgetful = self.model.clone(batch_norm_momentum=0.0)
        _, stats = self.logits(params, batch_stats, few, True, forgetful)
        logits, _ = self.logits(params, stats, images, train=False)
        hits = jnp.argmax(logits, -1) == labels
        return cross_entropy(logits, labels), jnp.mean(hits.astype(jnp.float32))

    def evaluate(self, state: State, phase: str) -> dict:
        """With the last weights, and statistics of at most 10,000 images trained on.

        All at once, for a state that has not seen many steps.
        """
        kept = self.kept[phase]
        few = self.train.images[kept[:: math.ceil(len(kept) / 10_000)]]
        judged = self.judged[phase]
        loss, accuracy = self._score(state.params, state.batch_stats, few, *judged)
        return {"loss": float(loss), "accuracy": float(accuracy)}

    def compiled(self, name: str, size: int, num_kept: int, num_steps: int) -> tuple:
        """The two programs of an optimizer: a state from a seed, and a step."""
        key = (name, size, num_kept)
        if self._compiled[0] == key:
            return self._compiled[1]
        horizon = num_steps if size < num_kept else None
        shape = (1, *self.train.images.shape[1:])

        def init(seed):
            images = jnp.zeros(shape, jnp.float32)
            variables = self.model.init(jax.random.key(seed), images, train=False)
            params = variables["params"]
            tx = self.create_optimizer(name, 0.0, horizon)
            zero = jnp.zeros([], jnp.int32)
            return State(params, variables["batch_stats"], tx.init(params), zero)

        def step(*args):
            return self.train_step(name, horizon, self.parts(size), *args)

        start = time.monotonic()
        init = jax.jit(init).lower(np.int32(0)).compile()
        example = np.zeros(size, np.int32), self.train, np.float32(0), np.int32(0)
        step = jax.jit(step, donate_argnums=0).lower(init(np.int32(0)), *example)
        programs = init, step.compile(), time.monotonic() - start
        self._compiled = key, programs
        return programs

    def run(self, name: str, batch_size: int, cell: protocol.Cell) -> dict:
        """Trains one cell; its row."""
        kept = self.kept[cell.phase]
        size = min(batch_size, len(kept))
        num_steps = round(self.epochs * len(kept) / size)
        init, step, compile_seconds = self.compiled(name, size, len(kept), num_steps)
        rates = np.ones(num_steps, np.float32)
        if OPTIMIZERS[name][0] is not None:
            rates = learning_rates(cell.learning_rate, num_steps)
        state = init(np.int32(cell.seed))
        jax.block_until_ready(state)
        start = time.monotonic()
        state, losses = running.train(
            step, state, self.train, kept, size, rates, cell.seed
        )
        seconds = time.monotonic() - start
        return {
            "workload": "cifar10_jpeg_gpu",
            "optimizer": name,
            "batch_size": batch_size,
            **running.outcome(
                cell, num_steps, losses, lambda: self.evaluate(state, cell.phase)
            ),
            "seconds": round(seconds, 1),
            "step_seconds": protocol.rounded(seconds / len(losses)),
            "compile_seconds": round(compile_seconds, 1),
            "overrides": [],
            **protocol.environment(),
        }


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses)


def l2(params: Any) -> jax.Array:
    """The penalty on all but BatchNorm's parameters."""
    squares = jax.tree.map(
        lambda w, counts: jnp.sum(jnp.square(w)) if counts else jnp.zeros([]),
        params,
        models.l2_mask(params),
    )
    return jnp.asarray(0.5 * L2_PENALTY * optax.tree.sum(squares))


def learning_rates(peak: float, num_steps: int) -> np.ndarray:
    """Linear warm-up over a tenth, from a tenth of the rate, then cosine decay."""
    warmup = round(0.1 * num_steps)
    schedule = optax.cosine_decay_schedule(peak, max(num_steps - warmup, 1))
    if warmup:
        rise = optax.linear_schedule(0.1 * peak, peak, warmup)
        schedule = optax.join_schedules([rise, schedule], [warmup])
    return np.asarray(jax.vmap(schedule)(jnp.arange(num_steps)), np.float32)


def run_all(
    make_trainer: Callable[[], Any],
    path: pathlib.Path,
    batch_sizes: tuple[int, ...] = BATCH_SIZES,
    minutes: float = math.inf,
    part: str = "0/1",
) -> int:
    """Runs what is missing until the time is up; how many runs are left at least."""
    first, parts = map(int, part.split("/"))
    groups = [(name, size) for size in batch_sizes for name in OPTIMIZERS]
    groups = groups[first::parts]
    rows: dict[tuple[str, int], list[dict]] = {group: [] for group in groups}
    for row in protocol.read(path):
        rows.get((row["optimizer"], row["batch_size"]), []).append(row)

    def next_cells(group: tuple[str, int], seeds: tuple[int, ...]) -> list:
        make, centre = OPTIMIZERS[group[0]]
        return protocol.plan(
            rows[group],
            centre,
            [SCHEDULE],
            test_seeds=seeds,
            tuned=make is not None,
            num_rates=NUM_RATES,
        )

    start, trainer, longest = time.monotonic(), None, 0.0
    seeds = protocol.TEST_SEEDS
    for some in (seeds[:1], seeds):
        for group in groups:
            while cells := next_cells(group, some):
                began = time.monotonic()
                if began + longest - start > 60 * minutes:
                    return sum(len(next_cells(group, seeds)) for group in groups)
                trainer = trainer or make_trainer()
                row = trainer.run(*group, cells[0])
                protocol.append(path, row)
                rows[group].append(row)
                longest = max(longest, time.monotonic() - began)
                result = "diverged" if row["diverged"] else f"{row['accuracy']:.4f}"
                print(*group, *cells[0], result, f"{row['seconds']} s", flush=True)
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--part", default="0/1", help="i/n: of n processes, this is i")
    parser.add_argument(
        "--results", type=pathlib.Path, default=RESULTS / "cifar10_jpeg_gpu.jsonl"
    )
    flags = parser.parse_args()

    def make_trainer() -> Trainer:
        model = models.create_model("resnet32", 10, dtype="bfloat16", remat=False)
        return Trainer(read_images(flags.data), model)

    left = run_all(make_trainer, flags.results, minutes=flags.minutes, part=flags.part)
    print(f"{left} runs are left at least." if left else "Nothing is left.")


if __name__ == "__main__":
    main()

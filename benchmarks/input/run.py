"""How fast images are read and decoded, beside how fast a training step uses them.

    python benchmarks/input/run.py --data_dir=FOLDER

FOLDER holds `train/<class>/*.jpg` and `test/<class>/*.jpg` of one size. It is streamed
alone (by 1, 2 and 16 threads, and by two processes' shares), then trained on by
ResNet-8 from memory and streamed; "waiting" is the share of a step's time in which it
had no input yet. Images as large as ImageNet's are made up, 500×375, and cropped to
224. Writes `results/tables.md`. About two minutes on two cores.
"""

import argparse
import os
import pathlib
import platform
import statistics
import tempfile
import time

import grain
import jax
import numpy as np
from PIL import Image

from nlcg_optax.training import data, loop, models, optimizers, steps
from nlcg_optax.training.config import apply_overrides, base_config, typed
from nlcg_optax.training.mesh import create_mesh

HERE = pathlib.Path(__file__).resolve().parent
REPEATS = 3


def stream_rate(split: data.Split, batch_size: int, batches: int, **options) -> float:
    """Images/s of a stream, the median of several runs, what it read ahead aside."""
    rates = []
    for repeat in range(REPEATS):
        stream = data.stream(split, batch_size=batch_size, seed=repeat, **options)
        for _ in range(4):
            next(stream)
        start = time.perf_counter()
        count = sum(len(next(stream)["label"]) for _ in range(batches))
        rates.append(count / (time.perf_counter() - start))
        stream.close()
    return statistics.median(rates)


def one_by_one(split: data.Split, count: int) -> float:
    """Images/s of a plain loop over the files in the order of an epoch."""
    rates = []
    for repeat in range(REPEATS):
        indices = data.epoch_indices(0, len(split), repeat)[:count]
        start = time.perf_counter()
        np.stack([split[int(i)]["image"] for i in indices])
        rates.append(count / (time.perf_counter() - start))
    return statistics.median(rates)


def step_rate(data_dir: str, in_memory: str, batch_size: int) -> tuple[float, float]:
    """Images/s of training steps, and the share of their time spent waiting."""
    config = base_config()
    apply_overrides(
        config,
        [
            "dataset.name=folder",
            f"dataset.data_dir={data_dir}",
            f"dataset.in_memory={in_memory}",
            "dataset.max_train_examples=10000",
            f"batch_size={batch_size}",
        ],
    )
    config = typed(config)
    mesh = create_mesh(config.mesh)
    dataset = loop.load_dataset(config.dataset)
    model = loop.create_model(config.model, dataset.num_classes)
    schedule = optimizers.create_schedule(config, len(dataset.train) / batch_size)
    tx = optimizers.create_optimizer(config, schedule, models.l2_mask)
    state = steps.create_state(model, tx, config, dataset.image_shape, mesh)
    next_batch, step = loop.make_input(config, dataset, model, tx, schedule, mesh, 0)
    rates, waits, pending = [], [], None
    for i in range(3 + 6 * REPEATS):
        # As the loop does: the input of a step while the one before runs.
        start = time.perf_counter()
        batch = next_batch(i)
        waited = time.perf_counter() - start
        state, metrics = step(state, batch)
        if pending is not None:
            jax.block_until_ready(pending)
        pending = metrics
        if i >= 3:
            seconds = time.perf_counter() - start
            rates.append(batch_size / seconds)
            waits.append(waited / seconds)
    return statistics.median(rates), statistics.median(waits)


def make_large_images(folder: pathlib.Path, count: int) -> data.Split:
    """Photograph-like JPEGs: smooth noise with some grain."""
    rng = np.random.default_rng(0)
    (folder / "train" / "a").mkdir(parents=True)
    (folder / "test" / "a").mkdir(parents=True)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC))
        noisy = pixels + rng.normal(0, 8, pixels.shape)
        image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
        image.save(folder / "train" / "a" / f"{i}.jpg", quality=87)
    image.save(folder / "test" / "a" / "0.jpg")
    dataset = data.load("folder", data_dir=folder, image_size=224, in_memory="no")
    return dataset.train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, help="a folder of images")
    args = parser.parse_args()
    small = data.load("folder", data_dir=args.data_dir, in_memory="no")
    height, width, _ = small.image_shape
    rows = [(f"{height}×{width}, a plain Python loop", one_by_one(small.train, 4096))]
    for threads in (1, 2, 16):
        rate = stream_rate(small.train, 1024, 16, num_threads=threads)
        rows.append((f"{height}×{width}, stream, {threads} thread(s)", rate))
    half = np.arange(512)
    rate = stream_rate(small.train, 1024, 32, places=half)
    rows.append((f"{height}×{width}, stream of one process of two", rate))
    with tempfile.TemporaryDirectory() as folder:
        large = make_large_images(pathlib.Path(folder), 256)
        for threads in (1, 2, 16):
            options = {"image_size": 224, "num_threads": threads}
            rate = stream_rate(large, 128, 12, **options)
            rows.append((f"500×375 to 224×224, stream, {threads} thread(s)", rate))
    lines = ["| input alone | images/s |", "|---|---|"]
    lines += [f"| {name} | {rate:,.0f} |" for name, rate in rows]
    lines += ["", "| training step, batch 256 | images/s | waiting for input |"]
    lines += ["|---|---|---|"]
    for in_memory, name in (("yes", "from memory"), ("no", "streamed")):
        rate, waited = step_rate(args.data_dir, in_memory, 256)
        lines.append(f"| ResNet-8, {name} | {rate:,.0f} | {waited:.1%} |")
    lines += [
        "",
        "`python benchmarks/input/run.py --data_dir=FOLDER` on cifar10_jpeg (50,000 "
        f"JPEGs of 32×32), medians of {REPEATS} runs; Python "
        f"{platform.python_version()}, jax {jax.__version__}, grain "
        f"{grain.__version__}, {os.cpu_count()} CPU cores, which the step shares with "
        "the decoding.",
    ]
    (HERE / "results" / "tables.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

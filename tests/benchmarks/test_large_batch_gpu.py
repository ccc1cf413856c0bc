"""The program of the large-batch benchmark for one GPU, on a CPU."""

import functools
import json
import pathlib
import subprocess
import sys
import tarfile

import gpu
import numpy as np
import pytest
import tiny
from PIL import Image

# Flax and most of optax's optimizers promote dtypes.
pytestmark = pytest.mark.standard_promotion


@pytest.fixture(autouse=True)
def few_optimizers(monkeypatch):
    names = ("nlcg by curvature", "momentum")
    monkeypatch.setattr(gpu, "OPTIMIZERS", {n: gpu.OPTIMIZERS[n] for n in names})


@pytest.fixture
def images(tmp_path):
    """A folder of two classes of 8×8, in colours that no crop or flip changes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 6)):
        for label, channel in (("blue", 2), ("red", 0)):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (8, 8, 3)).astype(np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(folder / f"{i:04}.jpg")
    return tmp_path / "images"


def make_tiny_trainer(folder, **budget):
    budget = {"held_out": 8, "microbatch": 20, **budget}
    return gpu.Trainer(gpu.read_images(folder), tiny.Tiny(2), **budget)


def test_images_are_read_from_a_folder_as_from_a_tar(images, tmp_path):
    path = tmp_path / "images.tar.xz"
    with tarfile.open(path, "w:xz") as tar:
        tar.add(images, arcname=".")
    splits = gpu.read_images(images)
    for split, read in gpu.read_images(path).items():
        np.testing.assert_array_equal(read.images, splits[split].images)
        np.testing.assert_array_equal(read.labels, splits[split].labels)
    train = splits["train"]
    assert train.images.shape == (40, 8, 8, 3)
    assert train.labels.tolist() == [0] * 20 + [1] * 20
    red, _, blue = train.images.mean((1, 2)).T
    np.testing.assert_array_equal(red > blue, train.labels == 1)


@pytest.mark.long
def test_gpu_program_goes_on_where_it_stopped(images, tmp_path):
    """The largest batch of all optimizers first, then smaller ones, then more seeds."""
    path, sizes = tmp_path / "rows.jsonl", (50_000, 16)
    make = functools.partial(make_tiny_trainer, images, epochs=3)
    assert gpu.run_all(make, path, sizes, minutes=0.0) > 0
    assert not path.exists()

    class Interrupted(Exception):
        """As a part that is over."""

    runs = []

    def interrupted():
        trainer = make()
        run = trainer.run

        def some(*args):
            if len(runs) == 3:
                raise Interrupted
            runs.append(args)
            return run(*args)

        trainer.run = some
        return trainer

    with pytest.raises(Interrupted):
        gpu.run_all(interrupted, path, sizes)
    assert len(path.read_text().splitlines()) == 3
    assert gpu.run_all(make, path, sizes) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    cells = [(r["optimizer"], r["batch_size"], r["phase"], r["seed"]) for r in rows]
    assert len(set(cells) - {c for c in cells if c[2] == "tuning"}) == 2 * 2 * 3
    first = cells.index(("momentum", 50_000, "test", 0))
    assert {size for _, size, *_ in cells[:first]} == {50_000}
    assert cells[0] == ("nlcg by curvature", 50_000, "test", 0)
    later = [i for i, cell in enumerate(cells) if cell[2:] == ("test", 1)]
    assert min(later) > max(i for i, c in enumerate(cells) if c[2:] == ("test", 0))
    whole = [r["steps"] for r in rows if r["batch_size"] == 50_000]
    assert set(whole) == {3} and not any(row["diverged"] for row in rows)
    assert gpu.run_all(make, path, sizes) == 0
    assert len(path.read_text().splitlines()) == len(rows)


@pytest.mark.long
def test_gpu_program_learns(images):
    trainer = make_tiny_trainer(images, epochs=20)
    cell = gpu.protocol.Cell("test", 0.02, gpu.SCHEDULE, 0)
    for name in gpu.OPTIMIZERS:
        row = trainer.run(name, 40, cell)
        assert row["accuracy"] == 1.0, name
        assert row["curve"][-1] < 0.5 * row["curve"][0]


@pytest.mark.long
def test_a_seed_of_the_gpu_program_draws_its_own_crops(images):
    trainer = make_tiny_trainer(images, epochs=1)
    init, step, _ = trainer.compiled("momentum", 8, 40, 5)

    def loss(seed):
        state = init(np.int32(0))  # a step consumes it
        indices, rate = np.arange(8, dtype=np.int32), np.float32(0.1)
        return float(step(state, indices, trainer.train, rate, np.int32(seed))[1])

    assert loss(0) == loss(0) != loss(1)


def test_tuning_on_a_gpu_sees_no_statistics_of_held_out_images(images, monkeypatch):
    """And one program of each phase serves all its cells."""
    trainer = make_tiny_trainer(images)
    init, _, _ = trainer.compiled("momentum", 8, 40, 5)
    state, traced, logits = init(np.int32(0)), [], trainer.logits

    def counted(*args, **options):
        traced.append(args)
        return logits(*args, **options)

    monkeypatch.setattr(trainer, "logits", counted)
    phases = ("tuning", "test")
    before = [trainer.evaluate(state, phase) for phase in phases]
    held_out = np.setdiff1d(np.arange(40), trainer.kept["tuning"])
    assert len(held_out) == 8
    train = trainer.train
    changed = train._replace(images=train.images.at[held_out].set(255))
    monkeypatch.setattr(trainer, "train", changed)
    after = [trainer.evaluate(state, phase) for phase in phases]
    assert before[0] == after[0]
    assert before[1]["loss"] != after[1]["loss"]
    assert len(traced) == 2 * len(phases)  # for the statistics, and for the scores


def test_gpu_program_needs_few_packages():
    """Those of the extra [train] that a machine with a GPU may lack are not needed."""
    program = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in (
            "ml_collections", "grain", "orbax", "tensorboardX", "tensorflow_datasets",
            "tqdm", "sklearn", "matplotlib",
        ):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import gpu
gpu.models.create_model("resnet32", 10, dtype="bfloat16")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=pathlib.Path(gpu.__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr

"""The tasks and peers of the large-batch benchmark that the trainer does not have."""

import functools
import importlib
import json
import math
import pathlib
import subprocess
import sys
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import tiny
from flax import nnx
from PIL import Image

from nlcg_optax.training.config import base_config

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "large_batch"


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        names = (
            "sweep",
            "peers",
            "training_tasks",
            "workloads",
            "targets",
            "gpu",
            "report",
        )
        yield {name: importlib.import_module(name) for name in names}


# SOAP.


def literal_soap(grads, b1, b2, eps, every):
    """Algorithm 3 of arXiv:2409.11321 on one matrix, line by line; its updates."""
    m, n = grads[0].shape
    moment, second, updates = np.zeros((m, n)), np.zeros((m, n)), []
    for t, g in enumerate(grads):
        if t == 0:  # as the authors' code: no step, only the eigenvectors
            left, right = g @ g.T, g.T @ g
            q_left = np.linalg.eigh(left)[1][:, ::-1]
            q_right = np.linalg.eigh(right)[1][:, ::-1]
            updates.append(np.zeros((m, n)))
            continue
        g_rotated = q_left.T @ g @ q_right
        moment = b1 * moment + (1 - b1) * g
        m_rotated = q_left.T @ moment @ q_right
        second = b2 * second + (1 - b2) * g_rotated**2
        m_hat, v_hat = m_rotated / (1 - b1**t), second / (1 - b2**t)
        updates.append(q_left @ (m_hat / (np.sqrt(v_hat) + eps)) @ q_right.T)
        left = b2 * left + (1 - b2) * g @ g.T
        right = b2 * right + (1 - b2) * g.T @ g
        if t % every == 0:
            q_left = np.linalg.qr(left @ q_left)[0]
            q_right = np.linalg.qr(right @ q_right)[0]
    return updates


@pytest.mark.parametrize("every", [1, 3])
def test_soap_is_its_literal_statement(modules, every):
    rng = np.random.default_rng(0)
    # Singular values apart: eigenvectors are then the same but for their signs,
    # which cancel.
    scale = np.linspace(1, 3, 4)[:, None] * np.linspace(1, 2, 3)
    grads = [np.float32(scale * rng.normal(size=(4, 3))) for _ in range(8)]
    tx = modules["peers"].scale_by_soap(0.9, 0.8, 1e-6, every)
    params = {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}
    state = tx.init(params)
    update = jax.jit(tx.update)
    expected = literal_soap([np.float64(g) for g in grads], 0.9, 0.8, 1e-6, every)
    for step, g in enumerate(grads):
        updates, state = update({"w": g, "b": g[0]}, state)
        np.testing.assert_allclose(updates["w"], expected[step], atol=2e-3)
    # A vector gets Adam, one step late.
    mu, nu = np.zeros(3), np.zeros(3)
    for g in grads[1:]:
        mu, nu = 0.9 * mu + 0.1 * g[0], 0.8 * nu + 0.2 * g[0] ** 2
    adam = mu / (1 - 0.9**7) / (np.sqrt(nu / (1 - 0.8**7)) + 1e-6)
    np.testing.assert_allclose(updates["b"], adam, rtol=1e-4)


# Schedule-free methods.


def test_schedule_free_is_evaluated_at_its_average(modules):
    """The loss of a row is that of the average, not of the point of the gradients."""
    sweep, tasks = modules["sweep"], modules["training_tasks"]
    workload = regression(modules)
    cell = sweep.Cell("test", 0.1, "constant, no warm-up", 0)
    row = sweep.Trainer(workload).run("schedule-free adamw", 8, cell)

    task = workload.task(workload.config)
    tx = optax.contrib.schedule_free_adamw(0.1)
    params = task.init(0)
    state = tx.init(params)
    for _ in range(row["steps"]):
        grads = jax.grad(lambda p: task.loss(task.outputs(p, task.data), task.data))(
            params
        )
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    losses = [
        float(task.loss(task.outputs(p, task.held_out), task.held_out))
        for p in (optax.contrib.schedule_free_eval_params(state, params), params)
    ]
    assert row["loss"] == pytest.approx(losses[0], rel=1e-4)
    assert abs(losses[1] / losses[0] - 1) > 1e-2
    assert isinstance(task, tasks.FunctionTask)


# Tasks.


def regression(modules, **budget):
    """Eight examples of a line, with a slope for each of three inputs."""
    tasks, workloads = modules["training_tasks"], modules["workloads"]
    config = base_config()
    config.num_epochs = 1.0
    rng = np.random.default_rng(0)

    def examples(count):
        x = rng.normal(size=(count, 3)).astype(np.float32)
        return x, x @ np.array([[1.0], [-2.0], [0.5]], np.float32)

    train, held_out = examples(8), examples(4)

    def task(config):
        return tasks.FunctionTask(
            lambda seed: {"w": 0.1 * jax.random.normal(jax.random.key(seed), (3, 1))},
            lambda params, batch: batch[0] @ params["w"],
            lambda outputs, batch: jnp.mean((outputs - batch[1]) ** 2),
            train,
            held_out,
            config,
        )

    schedules = workloads._schedules(1.0, 2)
    optimizers = workloads.AUTOENCODER
    steps = {4: 40, 8: 20}
    return workloads.Workload(
        "Noise", config, (4, 8), schedules, optimizers, task, steps, **budget
    )


@pytest.mark.parametrize("name", ["nlcg by curvature", "soap", "adamw", "muon β=0.8"])
def test_a_sweep_needs_only_a_task(modules, name, tmp_path):
    """Plan, rows and evaluations of something that has no images and no accuracy."""
    sweep = modules["sweep"]
    workload = regression(modules, test_seeds=(0, 1))
    path = tmp_path / "regression.jsonl"
    sweep.sweep("regression", workload, path, [(name, 8)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    tests = [row for row in rows if row["phase"] == "test"]
    assert [row["seed"] for row in tests] == [0, 1]
    tuned = name not in modules["workloads"].UNTUNED
    assert (len(rows) >= 5 + 1 + 2) if tuned else (len(rows) == 2)
    for row in tests:
        assert row["steps"] == 20 and len(row["evaluations"]) == 20
        steps, losses = zip(*row["evaluations"], strict=True)
        assert steps == tuple(range(1, 21))
        assert losses[-1] == pytest.approx(row["loss"], rel=1e-4)
        assert row["accuracy"] is None and row["step_seconds"] > 0
        assert losses[-1] < 0.9 * losses[0], name
    if not tuned:  # a quadratic of three numbers is done in a few steps
        assert tests[0]["loss"] < 1e-5


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_only_on_a_cpu_the_time_of_the_processor_counts(modules, backend, monkeypatch):
    """Where a GPU computes, that of the host does not tell how long a step takes."""
    sweep = modules["sweep"]
    monkeypatch.setattr(sweep.jax, "default_backend", lambda: backend)
    monkeypatch.setattr(sweep.time, "process_time", lambda: 0.0)
    trainer = sweep.Trainer(regression(modules))
    cell = sweep.Cell("test", 0.01, "cosine, no warm-up", 0)
    timed, run = trainer.time("adamw", 8, steps=2), trainer.run("adamw", 8, cell)
    for row in (timed, run):
        assert (row["step_seconds"] > 0) == (backend == "gpu")
    device = {"cpu": "cpu", "gpu": "NVIDIA H100"}[backend]
    text = sweep.line(run | {"device": device}, 1, 1, 0.0)
    assert ("of processor" in text) == (backend == "cpu")


def test_time_that_is_up_ends_a_sweep_and_the_next_goes_on(modules, tmp_path, capsys):
    sweep = modules["sweep"]
    workload = regression(modules, test_seeds=(0,))
    path, groups = tmp_path / "rows.jsonl", [("nlcg by curvature", 8), ("adamw", 8)]
    sweep.sweep("regression", workload, path, groups, minutes=0.0)
    assert not path.exists()
    assert "8 runs are left at least" in capsys.readouterr().out
    sweep.sweep("regression", workload, path, groups[:1])
    sweep.print_missing("regression", workload, path, groups)
    assert capsys.readouterr().out.splitlines()[-1:] == [
        "regression: adamw, batch 8: 7 runs left (not begun)"
    ]


def text_task(modules, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("To be, or not to be, that is the question:\n" * 40)
    return modules["training_tasks"].tinyshakespeare(base_config(), path)


@pytest.mark.long
def test_language_model_sees_the_past_alone(modules, tmp_path):
    task = text_task(modules, tmp_path)
    params = task.init(0)
    inputs, targets = jax.tree.map(lambda x: x[:2], task.data)
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    changed = inputs.copy()
    changed[:, 40] = (changed[:, 40] + 1) % 5
    before, after = (task.outputs(params, (x, targets)) for x in (inputs, changed))
    np.testing.assert_allclose(before[:, :40], after[:, :40], atol=1e-5)
    assert np.abs(before[:, 40:] - after[:, 40:]).max() > 1e-2
    loss = float(task.loss(before, (inputs, targets)))
    no_idea = math.log(before.shape[-1])
    assert no_idea < loss < no_idea + 1


@pytest.mark.long
def test_chunks_of_a_batch_make_its_gradient(modules, tmp_path):
    task = text_task(modules, tmp_path)._replace(chunk=4)
    params, batch = task.init(0), jax.tree.map(lambda x: x[:12], task.data)
    whole, chunked = (
        jax.jit(functools.partial(one.value_and_grad, batch_size=12))(params, batch)
        for one in (task._replace(chunk=None), task)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5),
        whole,
        chunked,
    )
    with pytest.raises(ValueError, match="no multiple of 4"):
        task.value_and_grad(params, jax.tree.map(lambda x: x[:10], batch), 10)


def test_embedding_and_head_are_left_to_adam(modules, tmp_path):
    """At a fifth of its size in `nlcg`; kernels get singular values of one size."""
    task, peers = text_task(modules, tmp_path), modules["peers"]
    words = [*modules["workloads"].NLCG]
    config = peers.configured(task.config, words)
    tx = peers.create_optimizer(
        config, words, lambda _: 1.0, None, None, labels=task.labels
    )
    params = task.init(0)

    @jax.jit
    def first_updates(params):
        grads = jax.grad(lambda p: task.loss(task.outputs(p, task.data), task.data))
        return tx.update(grads(params), tx.init(params), params, value=3.0)[0]

    updates = first_updates(params)
    flat = dict(nnx.to_flat_state(updates))
    for part in ("embedding", "position", "head"):
        for path, update in flat.items():
            if path[0] == part:
                seen = update[...][update[...] != 0]
                np.testing.assert_allclose(np.abs(seen), 0.2, rtol=0.2)
    kernel = flat["blocks", 0, "up", "kernel"][...]
    assert float(jnp.std(kernel)) == pytest.approx(0.2, rel=0.25)
    values = np.linalg.svd(kernel, compute_uv=False)
    assert values.max() < 2 * np.median(values)


# How far the batch can grow.


def growth_row(rate, evaluations, phase="tuning", seed=100):
    return {
        "phase": phase,
        "learning_rate": rate,
        "schedule": "a",
        "seed": seed,
        "steps": evaluations[-1][0],
        "diverged": False,
        "evaluations": evaluations,
        "step_seconds": 0.5,
    }


def test_the_setting_that_reaches_the_target_first_counts(modules):
    targets = modules["targets"]
    slow = growth_row(0.1, [[10, 4.0], [20, 1.0]])
    # Faster in one seed, but not in the other, which never gets there.
    fast = [
        growth_row(0.2, [[10, 1.0], [20, 0.5]]),
        growth_row(0.2, [[10, 4.0], [20, 3.0]], "test", 0),
    ]
    found = targets.reached([slow, *fast], 2.0)
    assert found is not None
    assert (found.steps, found.learning_rate, found.seeds) == (15.0, 0.1, 1)
    assert found.seconds == pytest.approx(7.5)
    fast[1]["evaluations"][1][1] = 1.0
    found = targets.reached([slow, *fast], 2.0)
    assert (found.steps, found.learning_rate, found.seeds) == (12.5, 0.2, 2)
    assert targets.reached([slow, *fast], 0.1) is None


def test_target_is_the_median_peer_at_the_smallest_batch(modules):
    targets = modules["targets"]

    def ends(loss):
        return [growth_row(0.1, [[1, 9.0], [2, loss]], "test", 0)]

    groups = {("a", 4): ends(1.0), ("b", 4): ends(3.0), ("c", 4): ends(2.0)}
    groups |= {("ours", 4): ends(0.1), ("a", 8): ends(5.0)}
    assert targets.target(groups, ["a", "b", "c"], 4) == (2.0, "c")
    assert targets.target(groups, ["a", "b", "c"], 8) == (5.0, "a")
    assert targets.target(groups, ["d"], 4) is None


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ({32: 1000.0, 128: 250.0, 512: 63.0}, "above 512"),
        ({32: 1000.0, 128: 250.0, 512: 200.0}, "128 to 512"),
        ({32: 1000.0, 128: 391.0, 512: 98.0}, "32 to 128"),  # 1.599 a doubling
        ({32: 1000.0, 128: 390.0, 512: 98.0}, "above 512"),
        ({32: 1000.0, 128: None}, "32 to 128"),
        ({32: None, 128: 10.0}, "–"),
        ({}, "–"),
    ],
)
def test_critical_batch_size(modules, steps, expected):
    assert modules["targets"].critical_batch_size(steps) == expected


def test_basin_is_the_factor_within_one_percent(modules):
    """Of a loss that is piecewise linear in the logarithm of the rate."""
    targets = modules["targets"]
    losses = {1.0: 1.04, 2.0: 1.0, 4.0: 1.005, 8.0: 1.025}
    rows = [growth_row(r, [[1, x]]) for r, x in losses.items()]
    # A quarter of the way to 1 on one side, and of that from 4 to 8 on the other.
    assert targets.basin(rows) == pytest.approx(2 ** (0.25 + 1 + 0.25))
    assert targets.basin(rows[:2]) is None
    other = growth_row(2.0, [[1, 0.1]]) | {"schedule": "b"}
    assert targets.basin([*rows, other]) == targets.basin(rows)


def workload_rows(optimizer, batch_size, losses, seconds=0.01):
    """Two rates, each a run of tuning, and a test of the better."""
    steps = {32: 1800, 1797: 150}[batch_size]
    rows = []
    for rate, loss in zip((0.1, 0.2), losses, strict=True):
        evaluations = [[steps // 2, 4.0 * loss], [steps, loss]]
        rows.append(growth_row(rate, evaluations))
    best = min(rows, key=lambda row: row["evaluations"][-1][1])
    rows.append(best | {"phase": "test", "seed": 0})
    return [
        row
        | {
            "optimizer": optimizer,
            "batch_size": batch_size,
            "step_seconds": seconds,
            "seconds": 1,
            "accuracy": None,
            "loss": row["evaluations"][-1][1],
            "versions": {},
            "device": "cpu",
            "cores": 1,
        }
        for row in rows
    ]


def test_tables_of_growth(modules, tmp_path):
    report = modules["report"]
    rows = [
        *workload_rows("nlcg", 32, (1.0, 0.5)),
        *workload_rows("muon", 32, (1.0, 2.0), seconds=0.02),
        *workload_rows("momentum", 32, (4.0, 2.0)),
        *workload_rows("nlcg", 1797, (1.0, 0.5), seconds=0.03),
        *workload_rows("muon", 1797, (2.0, 3.0)),
    ]
    path = tmp_path / "autoencoder.jsonl"
    path.write_text("".join(json.dumps(row | {"workload": 0}) + "\n" for row in rows))
    markdown = report.report(tmp_path, tmp_path)
    # Two peers at the smallest batch, momentum at no other: the lower of both.
    _, steps = markdown.split("Steps to a loss of all training examples of 1, ")
    assert steps.startswith("which is what the median of the tuned peers (muon) ends")
    assert "at batch 32:" in steps.splitlines()[0]
    # From 2 to 0.5 in half of the run, the logarithm being linear.
    assert "| nlcg | 1,350 | not run | not run | not run | 112 |" in steps
    assert "| muon | 1,800 | not run | not run | not run | > 150 |" in steps
    assert "| momentum | > 1,800 | not run | not run | not run | not run |" in steps
    assert "| nlcg | 32 to 1,797 |" in steps  # 12 times fewer, 56 times the batch
    # What muon, the one peer at the largest batch, ends with.
    _, steps = steps.split("Another target, not fixed beforehand: ")
    assert "2, the lowest that a tuned peer (muon) ends with at batch 1,797" in steps
    assert "| nlcg | 900 | not run | not run | not run | 75 | 32 to 1,797 |" in steps
    assert "| muon | 1,350 | not run | not run | not run | 150 | 32 to 1,797 |" in steps
    assert "| momentum | 1,800 | not run | not run | not run | not run | – |" in steps
    for cell in ("13.5 s (10 ms, 0%)", "36 s (20 ms, 50%)", "not measured"):
        assert cell in steps
    assert "0.5 (one seed)" in markdown
    assert "0.2 (edge); a; 2 runs" in markdown
    assert (tmp_path / "steps_autoencoder.png").exists()
    assert (tmp_path / "steps_autoencoder_second.png").exists()
    assert (tmp_path / "sensitivity_autoencoder.png").exists()


# The GPU's program, on a CPU.


def write_images(folder, rng):
    """Two classes of 8×8, in colours that no crop or flip changes."""
    for split, count in (("train", 20), ("test", 6)):
        for label, channel in (("blue", 2), ("red", 0)):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (8, 8, 3)).astype(np.uint8)
                pixels[..., channel] += 120
                image = Image.fromarray(pixels)
                image.save(folder / split / label / f"{i:04}.jpg")


@pytest.fixture
def gpu(modules, monkeypatch):
    gpu = modules["gpu"]
    names = ("nlcg by curvature", "momentum")
    monkeypatch.setattr(gpu, "OPTIMIZERS", {n: gpu.OPTIMIZERS[n] for n in names})
    return gpu


def make_tiny_trainer(gpu, folder, **budget):
    return gpu.Trainer(gpu.read_images(folder), tiny.Tiny(2), held_out=8, **budget)


def test_images_are_read_from_a_folder_as_from_a_tar(gpu, tmp_path):
    write_images(tmp_path / "images", np.random.default_rng(0))
    path = tmp_path / "images.tar.xz"
    with tarfile.open(path, "w:xz") as tar:
        tar.add(tmp_path / "images", arcname=".")
    splits = gpu.read_images(tmp_path / "images")
    for split, images in gpu.read_images(path).items():
        np.testing.assert_array_equal(images.images, splits[split].images)
        np.testing.assert_array_equal(images.labels, splits[split].labels)
    train = splits["train"]
    assert train.images.shape == (40, 8, 8, 3)
    assert train.labels.tolist() == [0] * 20 + [1] * 20
    red, _, blue = train.images.mean((1, 2)).T
    np.testing.assert_array_equal(red > blue, train.labels == 1)


@pytest.mark.standard_promotion
@pytest.mark.long
def test_gpu_program_goes_on_where_it_stopped(gpu, tmp_path, capsys):
    """The largest batch of all optimizers first, then smaller ones, then more seeds."""
    write_images(tmp_path / "images", np.random.default_rng(0))
    path, sizes = tmp_path / "rows.jsonl", (50_000, 16)
    make = functools.partial(
        make_tiny_trainer, gpu, tmp_path / "images", epochs=3, microbatch=20
    )
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


@pytest.mark.standard_promotion
@pytest.mark.long
def test_gpu_program_learns(gpu, tmp_path):
    write_images(tmp_path / "images", np.random.default_rng(0))
    trainer = make_tiny_trainer(gpu, tmp_path / "images", epochs=20, microbatch=20)
    cell = gpu.protocol.Cell("test", 0.02, gpu.SCHEDULE, 0)
    for name in gpu.OPTIMIZERS:
        row = trainer.run(name, 40, cell)
        assert row["accuracy"] == 1.0, name
        assert row["curve"][-1] < 0.5 * row["curve"][0]


@pytest.mark.standard_promotion
@pytest.mark.long
def test_a_seed_of_the_gpu_program_draws_its_own_crops(gpu, tmp_path):
    write_images(tmp_path / "images", np.random.default_rng(0))
    trainer = make_tiny_trainer(gpu, tmp_path / "images", epochs=1, microbatch=20)
    init, step, _ = trainer.compiled("momentum", 8, 40, 5)

    def loss(seed):
        state = init(np.int32(0))  # a step consumes it
        indices, rate = np.arange(8, dtype=np.int32), np.float32(0.1)
        return float(step(state, indices, *trainer.train, rate, np.int32(seed))[1])

    assert loss(0) == loss(0) != loss(1)


@pytest.mark.standard_promotion
def test_tuning_on_a_gpu_sees_no_statistics_of_held_out_images(
    gpu, tmp_path, monkeypatch
):
    """And one program of each phase serves all its cells."""
    write_images(tmp_path / "images", np.random.default_rng(0))
    trainer = make_tiny_trainer(gpu, tmp_path / "images", microbatch=20)
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
        [sys.executable, "-c", program], cwd=FOLDER, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

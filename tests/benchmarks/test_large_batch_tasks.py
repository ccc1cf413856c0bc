"""The tasks and peers of the large-batch benchmark that the trainer does not have."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import peers
import pytest
import sweep
import training_tasks
import untouched_tasks
import workloads
from flax import nnx

from nlcg_optax.training.config import base_config

# Flax and most of optax's optimizers promote dtypes.
pytestmark = pytest.mark.standard_promotion


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


def test_soap_is_its_literal_statement():
    rng = np.random.default_rng(0)
    # Singular values apart: eigenvectors are then the same but for their signs,
    # which cancel.
    scale = np.linspace(1, 3, 4)[:, None] * np.linspace(1, 2, 3)
    grads = [np.float32(scale * rng.normal(size=(4, 3))) for _ in range(8)]
    tx = peers.scale_by_published_soap(0.9, b2=0.8, eps=1e-6)
    params = {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}
    state = tx.init(params)
    update = jax.jit(tx.update)
    expected = literal_soap([np.float64(g) for g in grads], 0.9, 0.8, 1e-6, every=1)
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


def test_schedule_free_is_evaluated_at_its_average():
    """The loss of a row is that of the average, not of the point of the gradients."""
    workload = regression()
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
    assert isinstance(task, training_tasks.FunctionTask)


# Tasks.


def regression(**budget):
    """Eight examples of a line, with a slope for each of three inputs."""
    config = base_config()
    config.num_epochs = 1.0
    rng = np.random.default_rng(0)

    def examples(count):
        x = rng.normal(size=(count, 3)).astype(np.float32)
        return x, x @ np.array([[1.0], [-2.0], [0.5]], np.float32)

    train, held_out = examples(8), examples(4)

    def task(config):
        return training_tasks.FunctionTask(
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
def test_a_sweep_needs_only_a_task(name, tmp_path):
    """Plan, rows and evaluations of something that has no images and no accuracy."""
    workload = regression(test_seeds=(0, 1))
    path = tmp_path / "regression.jsonl"
    sweep.sweep("regression", workload, path, [(name, 8)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    tests = [row for row in rows if row["phase"] == "test"]
    assert [row["seed"] for row in tests] == [0, 1]
    tuned = name not in workloads.UNTUNED
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
def test_only_on_a_cpu_the_time_of_the_processor_counts(backend, monkeypatch):
    """Where a GPU computes, that of the host does not tell how long a step takes."""
    monkeypatch.setattr(sweep.jax, "default_backend", lambda: backend)
    monkeypatch.setattr(sweep.time, "process_time", lambda: 0.0)
    trainer = sweep.Trainer(regression())
    cell = sweep.Cell("test", 0.01, "cosine, no warm-up", 0)
    timed, run = trainer.time("adamw", 8, steps=2), trainer.run("adamw", 8, cell)
    for row in (timed, run):
        assert (row["step_seconds"] > 0) == (backend == "gpu")
    device = {"cpu": "cpu", "gpu": "NVIDIA H100"}[backend]
    text = sweep.line(run | {"device": device}, 1, 1, 0.0)
    assert ("of processor" in text) == (backend == "cpu")


def test_time_that_is_up_ends_a_sweep_and_the_next_goes_on(tmp_path, capsys):
    workload = regression(test_seeds=(0,))
    path, groups = tmp_path / "rows.jsonl", [("nlcg by curvature", 8), ("adamw", 8)]
    sweep.sweep("regression", workload, path, groups, minutes=0.0)
    assert not path.exists()
    assert "8 runs are left at least" in capsys.readouterr().out
    sweep.sweep("regression", workload, path, groups[:1])
    sweep.print_missing("regression", workload, path, groups)
    assert capsys.readouterr().out.splitlines()[-1:] == [
        "regression: adamw, batch 8: 7 runs left (not begun)"
    ]


def text_task(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("To be, or not to be, that is the question:\n" * 40)
    return training_tasks.tinyshakespeare(base_config(), path)


@pytest.mark.long
def test_language_model_sees_the_past_alone(tmp_path):
    task = text_task(tmp_path)
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
def test_chunks_of_a_batch_make_its_gradient(tmp_path):
    task = text_task(tmp_path)._replace(chunk=4)
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


def test_embedding_and_head_are_left_to_adam(tmp_path):
    """At a fifth of its size in `nlcg`; kernels get singular values of one size."""
    task = text_task(tmp_path)
    words = [*workloads.NLCG]
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


def test_the_adding_problem_is_a_gru_that_reads_marked_numbers():
    task = untouched_tasks.adding(base_config())
    x, y = task.data
    numbers, marks = x[..., 0], x[..., 1]
    np.testing.assert_array_equal(marks.sum(-1), 2)
    np.testing.assert_allclose(y, (numbers * marks).sum(-1), rtol=1e-6)
    params = jax.tree.map(np.float64, task.init(0))

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    h, n = np.zeros(untouched_tasks.UNITS), untouched_tasks.UNITS
    for token in np.float64(x[0]):
        given, known = token @ params["input"], h @ params["state"]
        update, reset = sigmoid(given[:n] + known[:n]), sigmoid((given + known)[n:-n])
        new = np.tanh(given[-n:] + reset * known[-n:])
        h = update * h + (1 - update) * new
    (output,) = task.outputs(task.init(0), (x[:1], y[:1]))
    np.testing.assert_allclose(output, h @ params["out"], rtol=1e-4)


def test_antiderivatives_have_the_functions_for_derivatives():
    task = untouched_tasks.antiderivative(base_config())
    u, y = task.data
    np.testing.assert_allclose(y[:, 0], 0)
    slopes = np.diff(y) * (untouched_tasks.POINTS - 1)
    np.testing.assert_allclose(slopes, (u[:, 1:] + u[:, :-1]) / 2, atol=1e-4)
    assert 0.9 < np.std(u) < 1.1
    assert task.outputs(task.init(0), task.data).shape == y.shape

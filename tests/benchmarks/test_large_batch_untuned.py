"""Rows and tables of what has nothing tuned."""

import jax
import jax.numpy as jnp
import noise_tasks
import numpy as np
import pytest
import starts
import step_cost
import training_tasks
import untuned
import workloads
from sweep_rows import WHERE, row

import nlcg_optax
from nlcg_optax.training.config import base_config

# Most of optax's optimizers promote dtypes.
pytestmark = pytest.mark.standard_promotion


def line_workload():
    x = np.linspace(-1, 1, 8, dtype=np.float32)[:, None]

    def task(config):
        return training_tasks.FunctionTask(
            lambda seed: {"w": jax.random.normal(jax.random.key(seed), (1, 1))},
            lambda params, x: x @ params["w"],
            lambda outputs, x: jnp.mean((outputs - 2 * x) ** 2),
            x,
            None,
            config,
        )

    config = base_config()
    config.num_epochs = 1.0
    schedules = workloads._schedules(1.0, 2)
    optimizers = workloads.AUTOENCODER
    return workloads.Workload(
        "Line", config, (4,), schedules, optimizers, task, {4: 20}, test_seeds=(0,)
    )


def test_defaults_run_once_with_and_without_a_decay(tmp_path):
    path = tmp_path / "rows.jsonl"
    workload = line_workload()
    groups = [("momo-adam", 4), ("schedule-free adamw, 0.0025", 4)]
    for _ in range(2):
        untuned.run("line", workload, groups, path)
    rows = untuned.protocol.read(path)
    assert [(row["optimizer"], row["schedule"]) for row in rows] == [
        ("momo-adam", "constant"),
        ("momo-adam", "cosine"),
        ("schedule-free adamw, 0.0025", "constant"),
    ]
    assert {row["phase"] for row in rows} == {"test"}
    assert [row["learning_rate"] for row in rows] == [0.01, 0.01, 0.0025]
    # A rate that falls to zero goes less far.
    assert rows[0]["loss"] < rows[1]["loss"] < rows[1]["evaluations"][0][1]


def test_table_has_the_best_that_came_to_an_end(tmp_path):
    swept = [row("nlcg by curvature", 0.5), row("soap", 0.7), row("adamw", 0.9)]
    for each in swept:
        untuned.protocol.append(tmp_path / "autoencoder.jsonl", each)
    rows = [
        row("dowg", 2.0),
        row("dowg", 1.0, "cosine"),
        row("prodigy", 0.1),
        row("prodigy", None, seed=1),
    ]
    text = untuned.tables(rows, tmp_path)
    assert (
        "| `autoencoder`, 32 | 0.5 (one seed) | 1 (one seed) (dowg, cosine) | "
        "0.7 (one seed) (soap) |" in text
    )
    assert "| prodigy, constant | 1 of 2 diverged |" in text
    assert "Not run: adamw, 0.001" in text


def test_first_rate_changes_in_the_step_of_the_hand_over_alone():
    before = nlcg_optax.nlcg_auto(100).init({"w": jnp.ones(2)})

    def at(since):
        def change(node):
            if not starts.is_model(node):
                return node
            balance = node.noise.balance
            numbers = balance.balance._replace(rate=jnp.float32(0.5))
            balance = balance._replace(balance=numbers)
            return node._replace(
                noise=node.noise._replace(since=jnp.int32(since), balance=balance)
            )

        return jax.tree.map(change, before, is_leaf=starts.is_model)

    def rate(old, new):
        state = starts.with_first_rate(at(old), at(new), jnp.float32(10))
        (model,) = filter(
            starts.is_model, jax.tree.leaves(state, is_leaf=starts.is_model)
        )
        return float(model.noise.balance.balance.rate)

    assert [rate(-1, 7), rate(7, 7), rate(-1, -1)] == [5.0, 0.5, 0.5]


def start(loss, seed, factor=1.0, returns=0, diverged=False):
    return {
        "task": "words",
        "batch_size": 4,
        "steps": 9,
        "seed": seed,
        "factor": factor,
        "loss": loss,
        "diverged": diverged,
        "since": 3,
        "returns": returns,
        **WHERE,
    }


def test_table_of_starts_counts_what_went_wrong():
    rows = [start(1.0, 0), start(1.04, 1), start(1.2, 2, returns=2)]
    rows += [start(None, 3, diverged=True), start(0.9, 4)]
    rates = [start(1.0, 0), start(1.1, 0, 10.0), start(0.5, 0, 0.1)]
    text = starts.tables(rows, rates)
    assert "| words (4; 9 steps) | 5 | 1.02 (0.9 to 1.2) | 3 to 3 | 1 | 2 | 1 |" in text
    assert "| words | 1 (one seed) | 1.1 (one seed) (+10.0%) | 0.5" in text


def test_tables_of_noise_tasks_and_of_steps():
    rows = [
        {"task": "gru", "optimizer": "nlcg by curvature", "rate": 0.0, "seed": 0}
        | {"loss": 1.5}
        | WHERE,
        *(
            {"task": "gru", "optimizer": "soap", "rate": rate, "seed": seed}
            | {"loss": loss}
            | WHERE
            for rate, seed, loss in ((0.1, 0, 1.0), (0.1, 1, None), (0.2, 0, 2.0))
        ),
    ]
    text = noise_tasks.table(rows)
    assert "| `gru` | 1.5 (1.5) | 2 (2; rate 0.2) | not run | not run |" in text
    cell = {"workload": "gru", "batch_size": 8, "steps": 40, "state": [9.0, 8.0, 2]}
    cell |= {"median_ms": [3.0, 2.0, 1.0], "mean_ms": [4.0, 2.0, 1.0]}
    cell |= {"ratios": [[1.0, 1.5, 1.7], [3.0, 3.0, 4.0]]}
    text = step_cost.table([cell | WHERE])
    told = "| 3, 2, 1 | 1.50 (1.00 to 1.70); 2.00 | 3.00 (3.00 to 4.00); 4.00 |"
    assert f"{told} 9.0, 8.0, 2.0 |" in text


def test_tables_are_those_of_the_rows():
    results, read = untuned.RESULTS.parent, untuned.protocol.read
    for name, text in {
        "untuned": untuned.tables(read(untuned.RESULTS), results),
        "noise_tasks": noise_tasks.table(read(noise_tasks.RESULTS)),
        "starts": starts.tables(read(starts.STARTS), read(starts.FIRST_RATES)),
        "step_cost": step_cost.table(read(step_cost.RESULTS)),
    }.items():
        path = results / f"{name}.md"
        assert not path.exists() or path.read_text() == text, name

"""Ratios to the best peer, repeats, constants one by one, and long runs."""

import pathlib

import constants
import jax
import jax.numpy as jnp
import long_runs
import numpy as np
import pytest
import relative
import repeats
import sweep
import training_tasks
import workloads
from sweep_rows import WHERE, row

import nlcg_optax
from nlcg_optax.training.config import base_config

# Most of optax's optimizers promote dtypes.
pytestmark = pytest.mark.standard_promotion

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_a_ratio_has_the_errors_of_both_means():
    found = relative.ratio([1.0, 2.0, 3.0], [4.0, 4.0, 4.0])
    assert found.value == 0.5
    # The standard error of 2 is 1/√3, of 4 none.
    assert found.error == pytest.approx(0.25 / np.sqrt(3))
    assert relative.Ratio(0.98, 0.02).verdict == "level"
    assert relative.Ratio(0.9, 0.06).verdict == "open"
    assert relative.Ratio(0.9, 0.04).verdict == "below"
    assert relative.Ratio(1.1, 0.04).verdict == "above"


def test_the_peer_is_the_best_that_came_to_its_end(tmp_path):
    name = "autoencoder"
    rows = [
        *(row("nlcg by curvature", x, seed=i) for i, x in enumerate((0.5, 0.6, 0.7))),
        *(row("soap", x, seed=i) for i, x in enumerate((1.0, 1.0, 1.0))),
        *(row("muon", x, seed=i) for i, x in enumerate((0.1, None, 0.1))),
        row("adamw", 0.01, phase="tuning"),
    ]
    for each in rows:
        sweep.append(tmp_path / f"{name}.jsonl", each)
    for loss in (2.0, 4.0):
        other = row("muon, 0.02", loss, seed=int(loss))
        sweep.append(tmp_path / "untuned.jsonl", other)
    (cell,) = relative.cells(tmp_path)
    assert (cell.workload, cell.size, cell.peer) == (name, 32, "soap")
    assert cell.ours.value == pytest.approx(0.6)
    assert cell.untuned.value == pytest.approx(3.0)
    text = relative.table([cell], "here")
    assert "below the best tuned peer in 1 of 1 cells" in text
    assert "in 1 of 1.\n" in text
    assert "| autoencoder, 32 | SOAP, momentum 0.95 | 0.600 ± 0.058 | below |" in text
    relative.plot([cell], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_the_picture_on_record_is_of_the_rows():
    folder = sweep.RESULTS
    found = relative.cells(folder)
    number = relative.counts(found)
    assert sum(number.values()) == len(found) >= 25
    said = (folder / "relative.md").read_text()
    assert f"best tuned peer in {number['below']} of {len(found)} cells" in said
    for cell in found:
        assert f"| {relative.label(cell)} |" in said
    readme = (ROOT / "README.md").read_text()
    counted = (
        f"in {number['below']} of {len(found)} cells, level in {number['level']}, "
        f"above in {number['above']}; {number['open']} are open"
    )
    assert counted in readme


def test_repeats_count_what_failed():
    ours = [row("nlcg by curvature", x, seed=i) for i, x in enumerate((1.0, 1.0, 1.2))]
    for each, back in zip(ours, (0, 2, 0), strict=True):
        each["steps_back"] = back
    peers = [row("soap", x, seed=i) for i, x in enumerate((2.0, None, 2.0))]
    text = repeats.table(peers + ours)
    assert "nothing tuned | 1 (1 to 1.2) | 3 | 0 | 1 | 1 |" in text
    # What diverged is above the median too.
    assert "| SOAP, momentum 0.95 | 2 (2 to 2) | 3 | 1 | 1 | – |" in text
    assert text.index("nlcg_auto") < text.index("SOAP")
    assert "| **ours, all** |  |  | **3** | **0** | **1** | **1** |" in text


def test_the_peer_of_a_cell_is_the_tuned_one():
    found = repeats.best_peer("autoencoder", 512)
    assert (found["optimizer"], found["phase"]) == ("soap β=0.8", "test")


@pytest.mark.parametrize("name", constants.CONSTANTS)
def test_a_constant_is_another_only_within(name):
    constant = constants.CONSTANTS[name]
    assert constant.usual not in constant.others
    task = training_tasks.FunctionTask(*5 * [None], base_config())
    start = task, 4, 10

    def seen():
        defaults = nlcg_optax.scale_by_quadratic_model.__kwdefaults__
        modules = constants.noise, constants.transform, constants.noise_balance
        words = workloads.OPTIMIZERS["nlcg by curvature"][0]
        return dict(defaults), [dict(vars(m)) for m in modules], list(words)

    before = seen()
    context, (changed, *_) = constant.changed(start, constant.others[0])
    with context:
        assert seen() != before or changed.fewest != task.fewest
    assert seen() == before


def test_the_table_of_constants_says_by_how_much(tmp_path, monkeypatch):
    (task, *_), name = constants.TASKS, "damping"
    usual = [
        {"task": task, "constant": "none", "value": 1.0, "seed": i, "loss": loss}
        for i, loss in enumerate((1.0, 1.2))
    ]
    other = [
        {"task": task, "constant": name, "value": value, "seed": 0, "loss": loss}
        for value, loss in ((0.001, 1.21), (0.1, None))
    ]
    rows = [r | {"diverged": r["loss"] is None, **WHERE} for r in usual + other]
    text = constants.table(rows)
    assert "| **none** |  |  | 1.1 ± 9.1% |" in text
    assert "| damping | 0.01 | 0.001 | +10.0% |" in text
    assert "| damping | 0.01 | 0.1 | diverged |" in text
    monkeypatch.setattr(constants, "PLOT", tmp_path / "plot.png")
    constants.plot(rows)
    assert constants.PLOT.stat().st_size > 1000


def test_a_long_run_is_the_same_after_a_resume(tmp_path, monkeypatch):
    def task(config):
        x = jax.random.normal(jax.random.key(0), (64, 4))
        return training_tasks.FunctionTask(
            lambda seed: {"w": jax.random.normal(jax.random.key(seed), (4, 2))},
            lambda params, x: jnp.tanh(x @ params["w"]),
            lambda y, x: jnp.mean((y - x[:, :2]) ** 2),
            x,
            x[:16],
            config,
        )

    config = base_config()
    config.num_epochs = 1.0
    made = workloads.Workload("Small", config, (8,), {}, {}, task, {8: 40})
    monkeypatch.setitem(workloads.WORKLOADS, "small", lambda _: made)
    monkeypatch.setattr(long_runs, "STEPS", 40)
    monkeypatch.setattr(long_runs, "EVERY", 20)
    monkeypatch.setattr(long_runs, "TOGETHER", 4)
    found = long_runs.train("small", None, 8, endless=True)
    assert found["same_after_resume"] is True
    assert [point["step"] for point in found["seen"]] == [20, 40]
    assert all(np.isfinite(point["averaged"]) for point in found["seen"])
    text = long_runs.table([found | WHERE])
    assert "| `small`, 8 | endless |" in text
    assert "| yes |\n\n<!-- end -->" in text
    # Steps that are not those of before are seen.
    run = long_runs.Run(sweep.Trainer(made), 8, 40)
    steps = iter((1, 2))
    monkeypatch.setattr(run, "go", lambda _: long_runs.Run.go(run, next(steps)))
    assert not long_runs.resumed(run)

import json

import pytest

from nlcg_optax.training import comparison
from nlcg_optax.training.config import (
    ConfigError,
    base_config,
    builtin_configs,
    load_config,
)

RECORDED = sorted(builtin_configs()[0].path.parent.glob("*.jsonl"))


def rows(losses, split="train"):
    return [
        {"step": i, "split": split, "loss": loss, "accuracy": 0.5}
        for i, loss in enumerate(losses, 1)
    ]


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_recorded_runs_are_those_of_a_config_but_for_the_optimizer(path):
    users = [
        config
        for config in builtin_configs()
        if path.stem in (load_config(config.name).compare_with or "")
    ]
    assert users, "nothing compares itself with it"
    other = comparison.load_run(path.stem)
    for user in users:
        assert comparison.differing_fields(load_config(user.name), other) == []
    assert other.config["optimizer.name"] in path.stem
    command = comparison.metrics.read_metrics(path, head=True)[0]["command"]
    rate = f"--config.optimizer.learning_rate={other.config['optimizer.learning_rate']}"
    assert rate in command and f"--config={users[0].name} " in command
    assert f"{other.config['optimizer.learning_rate']:g}" in other.label
    steps = [row["step"] for row in other.rows if row["split"] == "train"]
    assert steps == list(range(1, len(steps) + 1))


def test_fields_beside_the_optimizer_are_compared():
    config = load_config("digits_resnet8")
    other = comparison.load_run(RECORDED[0].stem)
    config.optimizer.name = "adamw"
    config.schedule.update(name="cosine", warmup_epochs=5.0)
    config.seed = 3
    assert comparison.differing_fields(config, other) == []
    config.model.filters = 8
    config.batch_size = 100
    found = comparison.differing_fields(config, other)
    assert found == ["batch_size", "model.filters"]


def test_a_run_by_curvature_is_compared_whenever_it_was_made(tmp_path):
    nlcg = {"step_rule": "quadratic_model", "curvature_residuals": 5}
    old = {"optimizer": {"name": "nlcg", "learning_rate": 1.0, "nlcg": nlcg}}
    old["schedule"] = {"name": "constant"}
    new = {"optimizer": {"name": "nlcg_auto", "learning_rate": None}}
    row = {"step": 1, "split": "train", "loss": 1.0, "accuracy": 0.5}
    for name, saved in (("old", old), ("new", new)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, ({"config": saved}, row))))
        other = comparison.load_run(str(path))
        assert other.label == "nlcg_auto" and other.rows == [row]
        # Its schedule does not count, but all else does.
        config = base_config()
        config.schedule.name, config.batch_size = "cosine", 100
        assert comparison.differing_fields(config, other) == ["batch_size"]


def test_a_comparison_that_is_lost_is_told_too():
    theirs = rows([9.0, 8.0]) + rows([2.0, 0.1], "test")
    other = comparison.OtherRun("adamw at 0.01", {}, theirs)
    worse = [{**row, "accuracy": 0.25} for row in rows([3.0, 0.2], "test")]
    third = comparison.OtherRun("sgd", {}, rows([1.0, 1.0, 1.0], "test"))
    ours = rows([1.0, 0.0]) + worse
    assert comparison.in_words("ours", ours, [other, third]) == [
        f"after {steps} steps 25.0% of the test images are right with ours, 50.0% with "
        "adamw at 0.01, 50.0% with sgd"
        for steps in (1, 2)
    ]
    elsewhere = [{**row, "step": 10 + row["step"]} for row in worse]
    (text,) = comparison.in_words("ours", elsewhere, [other, third])
    assert text == "not with adamw at 0.01, sgd, evaluated at other steps"


def test_several_runs_are_named_with_commas():
    names = [path.stem for path in RECORDED]
    assert len(names) > 1
    found = comparison.load_runs(f" {', '.join(names)},")
    assert found == [comparison.load_run(name) for name in names]
    assert comparison.load_runs(None) == []


def test_a_record_is_the_run_in_short(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(
        '{"optimizer": {"name": "sgd", "learning_rate": 0.5}, "seed": 1}'
    )
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "split": "train", "loss": 0.123456789, "accuracy": 1, "beta": 0}\n'
    )
    whole = comparison.load_run(str(run))
    comparison.record(run, tmp_path / "short.jsonl", "nlcg-train ...", "tuned SGD")
    short = comparison.load_run(str(tmp_path / "short.jsonl"))
    assert whole.label == "sgd at 0.5" and short.label == "tuned SGD"
    assert short.config == whole.config
    (row,) = short.rows
    assert row == {"step": 1, "split": "train", "loss": 0.12346, "accuracy": 1}


@pytest.mark.parametrize("text", [None, "", "{", '{"config": {}}\n', "[1]\n"])
def test_what_cannot_be_read(tmp_path, text):
    path = tmp_path / "run.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as error:
        comparison.load_run(str(path))
    for needle in ("compare_with=", "cannot be read", "folder of a run", RECORDED[0]):
        assert str(getattr(needle, "stem", needle)) in str(error.value)

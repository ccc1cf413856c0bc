"""The large-batch benchmark: its protocol, its report, and a tiny sweep."""

import json
import pathlib
import re

import figures
import optax
import protocol
import pytest
import report
import sweep
import tiny

from nlcg_optax.training import loop, models, optimizers
from nlcg_optax.training.config import apply_overrides, typed

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "large_batch"
SCHEDULES = ("default", "other")


# Flax and most of optax's optimizers promote dtypes.
pytestmark = pytest.mark.standard_promotion


def row(cell, accuracy, loss=1.0):
    """What a run of a cell might give; `accuracy` None: it diverged."""
    diverged = accuracy is None
    return {
        **cell._asdict(),
        "diverged": diverged,
        "accuracy": accuracy,
        "loss": None if diverged else loss,
    }


def run_all(accuracy):
    """Rows of a whole group, and how many runs each call of `plan` asked for."""
    rows, asked = [], []
    while cells := sweep.plan(rows, 1.0, SCHEDULES):
        asked.append(len(cells))
        rows += [row(cell, accuracy(cell)) for cell in cells]
    return rows, asked


def test_stages_follow_on_each_other():
    """Five rates, the other schedule at the best of them, three seeds of the winner."""
    rows, asked = run_all(
        lambda cell: (cell.schedule == "other") - abs(cell.learning_rate - 0.5),
    )
    assert asked == [5, 1, 3]
    rates = [row["learning_rate"] for row in rows]
    assert rates == [0.25, 0.5, 1.0, 2.0, 4.0, 0.5, 0.5, 0.5, 0.5]
    assert [row["phase"] for row in rows] == ["tuning"] * 6 + ["test"] * 3
    assert {row["schedule"] for row in rows[6:]} == {"other"}
    assert [row["seed"] for row in rows[6:]] == list(protocol.TEST_SEEDS)


@pytest.mark.parametrize(
    ("accuracy", "extensions"),
    [
        (lambda rate: -abs(rate - 8), [8.0, 16.0]),  # not at the edge with 16
        (lambda rate: rate, [8.0, 16.0, 32.0]),  # three at most
        (lambda rate: -rate, [0.125, 0.0625, 0.03125]),
        (lambda rate: None if rate > 0.125 else rate, [0.125, 0.0625]),  # all failed
    ],
)
def test_grid_is_extended_at_its_edge(accuracy, extensions):
    rows, asked = run_all(lambda cell: accuracy(cell.learning_rate))
    assert asked == [5, *[1] * len(extensions), 1, 3]
    assert [row["learning_rate"] for row in rows[5 : 5 + len(extensions)]] == extensions


def test_rates_that_a_wider_grid_had_count_too():
    """A grid of five was begun; of the three that are left the middle one is best."""
    rows = [
        row(cell, {0.25: 0.9, 1.0: 0.5}.get(cell.learning_rate, 0.1))
        for cell in sweep.plan([], 1.0, SCHEDULES)
    ]
    (lower,) = sweep.plan(rows, 1.0, SCHEDULES, num_rates=3)
    assert lower[:3] == ("tuning", 0.125, next(iter(SCHEDULES)))
    rows.append(row(lower, 0.2))
    (other,) = sweep.plan(rows, 1.0, SCHEDULES, num_rates=3)
    assert other[:3] == ("tuning", 0.25, "other")


def test_nothing_is_tested_where_every_rate_diverges():
    _, asked = run_all(lambda cell: None)
    assert asked == [5, 1, 1, 1]


def test_loss_decides_between_equal_accuracies():
    rows = [
        row(cell, 0.5, loss=abs(cell.learning_rate - 2))
        for cell in sweep.plan([], 1.0, SCHEDULES)
    ]
    (cell,) = sweep.plan(rows, 1.0, SCHEDULES)
    assert cell.learning_rate == 2.0


def test_an_interrupted_stage_goes_on():
    first = sweep.plan([], 1.0, SCHEDULES)
    assert sweep.plan([row(first[1], 0.5)], 1.0, SCHEDULES) == [first[0], *first[2:]]


def test_what_has_nothing_to_tune_is_only_tested():
    cells = sweep.plan([], 1.0, SCHEDULES, tuned=False)
    assert [cell.seed for cell in cells] == list(protocol.TEST_SEEDS)
    assert {cell[:3] for cell in cells} == {("test", 1.0, next(iter(SCHEDULES)))}
    rows = [row(cells[1], 0.5)]
    assert sweep.plan(rows, 1.0, SCHEDULES, tuned=False) == [cells[0], *cells[2:]]


def test_thinned_curves_keep_the_mean():
    assert protocol.thin([1.23456, 2.0]) == [1.235, 2.0]
    thinned = protocol.thin([float(i) for i in range(1000)])
    assert len(thinned) == protocol.CURVE_POINTS
    assert thinned[0] == 2.0


def test_sweep_and_report(monkeypatch, tmp_path):
    """From the data to the table; a second time nothing is run."""
    monkeypatch.setattr(models, "create_model", tiny.create_tiny_model)
    path = tmp_path / "digits.jsonl"
    workload = sweep.WORKLOADS["digits"](None)
    workload.config.num_epochs = 2.0
    workload.config.dataset.max_train_examples = 100
    workload = workload._replace(schedules=dict([*workload.schedules.items()][:1]))
    groups = [("nlcg", 1437)]  # capped at the 80 and 100 that there are
    sweep.sweep("digits", workload, path, groups)
    text = path.read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert {(row["phase"], row["steps"]) for row in rows} == {
        ("tuning", 2),
        ("test", 2),
    }
    assert all(len(row["curve"]) == row["steps"] for row in rows)
    # A seed changes the run, as an argument of the same program.
    tested = [row for row in rows if row["phase"] == "test"]
    assert len(tested) == 3
    assert len({row["loss"] for row in tested}) == 3

    sweep.sweep("digits", workload, path, groups)
    assert path.read_text() == text

    markdown = report.report(tmp_path, tmp_path)
    accuracies = [row["accuracy"] for row in tested]
    mean = f"{100 * sum(accuracies) / 3:.2f} ± "
    assert f"| nlcg | {mean}" in markdown
    assert "## cifar10_jpeg_gpu\n\nNot measured" in markdown
    assert (tmp_path / "accuracy_digits.png").exists()


@pytest.mark.long
def test_a_cell_is_a_run_of_the_training_loop(monkeypatch, tmp_path):
    """The same numbers, though rate and seed are arguments of one program here."""
    monkeypatch.setattr(models, "create_model", tiny.create_tiny_model)
    workload = sweep.WORKLOADS["digits"](None)
    workload.config.num_epochs = 3.0
    workload.config.dataset.max_train_examples = 1400  # two batches are the whole
    (schedule, *_) = workload.schedules
    cell = sweep.Cell("test", 0.4, schedule, seed=2)
    row = sweep.Trainer(workload).run("nlcg_paper", 700, cell)
    config = workload.config
    apply_overrides(
        config,
        [
            *row["overrides"],
            "seed=2",
            "batch_size=700",
            "optimizer.learning_rate=0.4",
            "eval_every_epochs=3",
            "checkpoint_every_epochs=3",
        ],
    )
    result = loop.train_and_evaluate(config, tmp_path)
    assert row["steps"] == result.step == 6
    assert row["loss"] == pytest.approx(result.metrics["test"]["loss"], rel=1e-5)
    assert row["accuracy"] == pytest.approx(result.metrics["test"]["accuracy"])


@pytest.mark.parametrize("name", ["soap", "schedule-free adamw"])
def test_peers_train_in_the_trainer_too(name, monkeypatch):
    monkeypatch.setattr(models, "create_model", tiny.create_tiny_model)
    workload = sweep.WORKLOADS["digits"](None)
    workload.config.num_epochs = 5.0
    workload.config.dataset.max_train_examples = 100
    (schedule, *_) = workload.schedules_of(name)
    row = sweep.Trainer(workload).run(name, 1437, sweep.Cell("test", 0.01, schedule, 0))
    assert row["steps"] == 5 and not row["diverged"]
    assert row["curve"][-1] < row["curve"][0]


@pytest.mark.parametrize("name", ["digits", "cifar10_jpeg", "cifar10_jpeg_ablation"])
def test_recorded_rows_are_found_as_done(name, monkeypatch, tmp_path):
    """What is new may be missing."""

    def trainer(workload):
        raise AssertionError("a recorded run would be run again")

    monkeypatch.setattr(sweep, "Trainer", trainer)
    recorded = FOLDER / "results" / f"{name}.jsonl"
    path = tmp_path / recorded.name
    path.write_text(recorded.read_text())
    workload = sweep.WORKLOADS[name](None)
    known = {(row["optimizer"], row["batch_size"]) for row in sweep.read(path)}
    groups = [group for group in known if group[0] in workload.optimizers]
    assert {"nlcg", "nlcg_paper", "muon"} <= {optimizer for optimizer, _ in groups}
    sweep.sweep(name, workload, path, groups)
    with pytest.raises(AssertionError, match="run again"):
        path.write_text("")
        sweep.sweep(name, workload, path, groups)


def test_what_was_tested_is_the_best_of_what_was_tuned():
    def setting(row):
        return row["learning_rate"], row["schedule"]

    for path in [FOLDER / "results" / f"{name}.jsonl" for name in sweep.WORKLOADS]:
        groups = {}
        for row in protocol.read(path):
            key = row["optimizer"], row["batch_size"]
            groups.setdefault(key, {}).setdefault(row["phase"], []).append(row)
        for key, phases in groups.items():
            if "tuning" not in phases or "test" not in phases:
                continue
            best = max(protocol.score([row]) for row in phases["tuning"])
            winners = [r for r in phases["tuning"] if protocol.score([r]) == best]
            tested = {setting(row) for row in phases["test"]}
            assert len(tested) == 1, (path.name, key, tested)
            assert tested <= set(map(setting, winners)), (path.name, key, tested)


def test_other_overrides_than_recorded_are_refused(tmp_path):
    workload = sweep.WORKLOADS["digits"](None)
    path = tmp_path / "digits.jsonl"
    for overrides in (["optimizer.name=nlcg"], []):
        row = {"workload": "digits", "optimizer": "nlcg_paper", "batch_size": 64}
        path.write_text(json.dumps(row | {"overrides": overrides}) + "\n")
        with pytest.raises(SystemExit, match="has runs of 'nlcg_paper'"):
            sweep.sweep("digits", workload, path, [("nlcg_paper", 64)])


def curve_row(optimizer, curve):
    return {
        "phase": "test",
        "optimizer": optimizer,
        "batch_size": 64,
        "learning_rate": 1.0,
        "schedule": "default",
        "seed": 0,
        "steps": 8,
        "diverged": False,
        "accuracy": 0.5,
        "curve": curve,
        "seconds": 1,
        "versions": {},
        "device": "cpu",
        "cores": 1,
    }


def test_steps_to_the_loss_of_the_best_peer():
    rows = [
        curve_row("nlcg", [4.0, 2.0, 1.0, 0.5]),
        curve_row("sgd", [4.0, 3.0, 2.5, 2.0]),
        curve_row("momentum", [4.0, 3.0, 2.0, 1.0]),
    ]
    markdown = "\n".join(report.section("digits", rows))
    table = markdown.split("fraction of the budget:")[1]
    for line in ("| nlcg | 0.75 |", "| sgd | not reached |", "| momentum | 1.00 |"):
        assert line in table


def test_a_target_is_missed_in_the_steps_of_a_test():
    """Tuning holds examples out, so that its runs are shorter."""
    test = curve_row("nlcg", [4.0, 3.0, 2.5, 2.0])
    tuning = test | {"phase": "tuning", "seed": 100, "steps": 6}
    rows = [tuning, test, curve_row("momentum", [4.0, 3.0, 2.0, 1.0])]
    steps = "\n".join(report.section("digits", rows)).split("Steps to a training")[1]
    assert "| nlcg | > 8 | not run | not run |" in steps


def test_an_ablation_is_one_table():
    """Without plots: there is one batch size."""
    rows = [curve_row("nlcg", [1.0, 0.4]), curve_row("muon", [1.0, 0.6])]
    markdown = "\n".join(report.section("cifar10_jpeg_ablation", rows))
    assert "| nlcg | 50.00 (one seed) | 1; default | 0.4 | 1.00 | – |" in markdown
    assert "png" not in markdown
    assert "No longer" not in markdown
    rows.append(curve_row("restart on ascent", [1.0, 0.5]))
    markdown = "\n".join(report.section("cifar10_jpeg_ablation", rows))
    assert "| restart on ascent | 50.00 (one seed) |" in markdown
    assert "No longer in the sweep (README.md says why): restart on ascent." in markdown


def test_every_variant_of_the_ablation_is_an_optimizer_of_its_own():
    workload = sweep.WORKLOADS["cifar10_jpeg_ablation"](None)
    variants = [tuple(overrides) for overrides, _ in workload.optimizers.values()]
    assert len(set(variants)) == len(variants)
    for overrides in variants:
        config = workload.config.copy_and_resolve_references()
        apply_overrides(config, overrides)
        optimizers.create_optimizer(typed(config), optax.constant_schedule(0.1), None)


def test_figures_that_guides_show_are_those_of_the_rows():
    results = FOLDER / "results"
    assert (results / "figures.md").read_text() == figures.figures(
        figures.Results(results)
    )


def test_what_documents_quote_by_hand_is_what_was_generated():
    """Tables are included; a sentence, and the README, have to repeat a number."""
    tables = (FOLDER / "results").glob("*.md")
    generated = "".join(path.read_text() for path in tables).replace("**", "")
    measured = re.findall(r"(\d+\.\d+) ± (\d[\d.e-]*)", generated)
    numbers = [float(x) for x in re.findall(r"\d+\.\d+", generated)]

    def is_rounded(quoted, number):
        digits = len(quoted.partition(".")[2])
        return abs(float(quoted) - float(number)) <= 0.5000001 * 10**-digits

    root = FOLDER.parents[1]
    found = []
    for path in (root / "README.md", *root.glob("docs/*.md"), FOLDER / "README.md"):
        text = path.read_text().replace("**", "")
        for number, error in re.findall(r"(\d+\.\d+) ± (\d+\.\d+)", text):
            pairs = [
                is_rounded(number, a) and is_rounded(error, b) for a, b in measured
            ]
            if not any(pairs):
                found.append((path, number, error))
        for number in re.findall(r"(\d\d\.\d+)%", text):
            if not any(is_rounded(number, x) for x in numbers):
                found.append((path, number))
    assert not found


def test_the_first_page_says_what_the_figures_do():
    readme = (FOLDER.parents[1] / "README.md").read_text()
    generated = (FOLDER / "results" / "figures.md").read_text()
    rows = [row for row in readme.splitlines() if "±" in row and row.startswith("|")]
    assert len(rows) == 6 and not [row for row in rows if row not in generated]

    cells = [row.replace("**", "").split(" | ") for row in rows]
    last = [float(row[-1].split(" ± ")[0]) for row in cells if "±" in row[-1]]
    ours, *peers = last[:1] + last[2:]  # without `nlcg`
    said = f"{ours:.1f}% of the test images, where the best tuned peer has "
    assert f"{said}{max(peers):.1f}%" in readme

    def differences(workload, *sizes):
        rows = [rf"`{workload}`, {size:,} \|.*\| (.\d+\.\d)%" for size in sizes]
        found = [re.search(row, generated)[1].replace("−", "-") for row in rows]
        return sorted(round(abs(float(x))) for x in found)

    below = differences("autoencoder", 32, 128, 512, 1_024)
    assert f"{below[0]} to {below[-1]}% below the best tuned peer" in readme
    level = differences("tinyshakespeare", 32, 128, 512)
    said = "level with tuned SOAP"
    assert max(level) == 0 and said in readme
    assert said in (FOLDER.parents[1] / "docs/curvature.md").read_text()

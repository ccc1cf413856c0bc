"""How far the batch can grow, as the large-batch benchmark tells it."""

import json

import pytest
import report
import targets


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


def test_the_setting_that_reaches_the_target_first_counts():
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


def test_target_is_the_median_peer_at_the_smallest_batch():

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
def test_critical_batch_size(steps, expected):
    assert targets.critical_batch_size(steps) == expected


def test_basin_is_the_factor_within_one_percent():
    """Of a loss that is piecewise linear in the logarithm of the rate."""
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


def test_tables_of_growth(tmp_path):
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

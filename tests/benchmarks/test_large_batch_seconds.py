"""Seconds to the target, ours and the best tuned peer's."""

import math

import pytest
import seconds
import workloads


def row(rate, losses, phase="tuning", seed=100, step_seconds=0.5):
    return {
        "phase": phase,
        "learning_rate": rate,
        "schedule": "cosine, warm-up 10%",
        "seed": seed,
        "steps": 10 * len(losses),
        "diverged": False,
        "evaluations": [[10 * (i + 1), loss] for i, loss in enumerate(losses)],
        "step_seconds": step_seconds,
        "seconds": 10 * len(losses) * step_seconds,
        "compile_seconds": 3.0,
    }


def test_the_peer_that_is_there_in_the_fewest_seconds():
    groups = {
        ("adamw", 8): [row(0.1, [4.0, 2.0, 1.0]), row(0.2, [4.0, 3.0, 2.0])],
        ("muon", 8): [row(0.3, [2.0, 1.0], step_seconds=5.0)],
        ("lamb", 8): [row(0.4, [9.0, 8.0])],
        ("nlcg", 8): [row(0.5, [0.1, 0.1])],
    }
    name, reached = seconds.best_peer(groups, 8, 2.0)
    assert (name, reached.learning_rate, reached.steps) == ("adamw", 0.1, 20.0)
    # A setting that was tested goes before a faster one that ran once.
    three = [row(0.7, [4.0, 3.0, 2.0], "test", seed) for seed in range(3)]
    name, reached = seconds.best_peer({**groups, ("soap", 8): three}, 8, 2.0)
    assert (name, reached.seeds, reached.steps) == ("soap", 3, 30.0)
    assert seconds.best_peer(groups, 8, 0.5) is None
    assert seconds.best_peer(groups, 16, 2.0) is None
    # 15 + 15 seconds of steps, and its program once.
    assert seconds.tuning_seconds(groups["adamw", 8]) == 33.0


def test_both_take_turns_and_the_tuning_counts(monkeypatch):
    order = []

    class Trainer:
        def __init__(self, workload):
            self.compiled = False

        def run(self, name, size, cell):
            assert not self.compiled, "compiled before"
            self.compiled = True
            order.append((name, cell.learning_rate, cell.seed))
            losses = [4.0, 1.0] if name == "nlcg by curvature" else [4.0, 3.0, 1.0]
            return row(cell.learning_rate, losses, "test", cell.seed, 1.0)

    monkeypatch.setattr(seconds.sweep, "Trainer", Trainer)
    workload = workloads.autoencoder()
    groups = {("adamw", 8): [row(0.1, [4.0, 3.0, 1.0])]}
    ours, peer = seconds.duel(workload, groups, 8, 1.0, (0, 1))
    assert order == [("nlcg by curvature", 1.0, 0), ("adamw", 0.1, 0)] + [
        ("nlcg by curvature", 1.0, 1),
        ("adamw", 0.1, 1),
    ]
    assert ours.seconds == [3.0 + 20.0] * 2 and ours.tuning_seconds == 0
    assert peer.seconds == [3.0 + 30.0] * 2 and peer.tuning_seconds == 3.0 + 15.0
    lines = seconds.table({8: [ours, peer]})
    assert lines[2] == (
        "| 8 | nlcg by curvature | 20 | 3.0 | 23.0 (23.0 to 23.0) | 23 |"
    )
    assert lines[3].endswith("| 33.0 (33.0 to 33.0) | 51 |")


def test_what_is_not_reached_is_said():
    assert seconds.way(row(0.1, [4.0, 3.0]), 1.0) == (math.inf, math.inf)
    timed = seconds.Timed("nlcg", [math.inf], [math.inf], [3.0], 0.0)
    assert "| – | 3.0 | not reached | – |" in seconds.table({8: [timed]})[2]
    assert seconds.way(row(0.1, [4.0, 1.0]), 1.0) == pytest.approx((13.0, 20.0))

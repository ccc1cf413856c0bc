"""Seconds to the target, ours and the best tuned peer's."""

import math

import pytest
import seconds
import workloads

WHERE = {"versions": {"jax": "1.0"}, "device": "cpu", "cores": 1}


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
    cell = seconds.row_of("autoencoder", 8, 1.0, [ours, peer]) | WHERE
    text = seconds.table([cell | {"target": 5.0}, cell])  # the last one counts
    assert (
        "| `autoencoder`, 8; 1 | 20 | 3.0 | 23.0 (23.0 to 23.0) | AdamW | 30 | 3.0 | "
        "33.0 (33.0 to 33.0) | 51 |"
    ) in text
    assert "Of 1 cells `nlcg_auto` takes fewer steps than the peer in 1, fewer" in text
    assert "one run of it in 1 (1 once it is compiled), and fewer than that" in text
    assert "run with its tuning in 1." in text


def test_what_is_not_reached_is_said():
    assert seconds.way(row(0.1, [4.0, 3.0]), 1.0) == (math.inf, math.inf)
    assert seconds.way(row(0.1, [4.0, 1.0]), 1.0) == pytest.approx((13.0, 20.0))
    never, once = [math.inf] * 3, [5.0, math.inf, 4.0]
    ours = seconds.Timed("nlcg by curvature", never, never, [3.0], 0.0)
    peer = seconds.Timed("muon", once, once, [1.0], 10.0)
    alone = seconds.row_of("burgers", 1, 0.5, [ours]) | WHERE
    both = seconds.row_of("digits", 64, 0.25, [ours, peer]) | WHERE
    lines = seconds.table([alone, both]).splitlines()
    assert (
        "| `digits`, 64; 0.25 | – | 3.0 | not reached | Muon, momentum 0.95 | 5 | 1.0 "
        "| 5.0 (4.0 to –) | 15 |"
    ) in lines
    told = "| `burgers`, 1; 0.5 | – | 3.0 | not reached | none gets there | – | – | – |"
    assert f"{told} – |" in lines
    assert (
        "Of 1 cells `nlcg_auto` takes fewer steps than the peer in 0, fewer seconds "
        "than one run of it in 0 (0 once it is compiled), and fewer than that run with "
        "its tuning in 0."
    ) in lines


def test_the_table_is_that_of_the_rows():
    text = seconds.table(seconds.protocol.read(seconds.RESULTS))
    assert seconds.RESULTS.with_suffix(".md").read_text() == text

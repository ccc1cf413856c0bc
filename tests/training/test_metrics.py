import math
import os

import pytest

from nlcg_optax.training import metrics


def test_lines_round_trip_also_when_not_finite(tmp_path):
    writer = metrics.MetricsWriter(tmp_path, resume_step=0)
    writer.write(1, "train", {"loss": 0.5})
    writer.write(2, "train", {"loss": math.inf, "grad_norm": math.nan})
    writer.close()
    first, second = metrics.read_metrics(tmp_path / "metrics.jsonl")
    assert first == {"step": 1, "split": "train", "loss": 0.5}
    assert second["loss"] == math.inf and math.isnan(second["grad_norm"])
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_resuming_drops_what_will_come_again(tmp_path):
    writer = metrics.MetricsWriter(tmp_path, resume_step=0)
    for step in range(1, 6):
        writer.write(step, "train", {"loss": 1.0 / step})
    writer.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "spl')  # cut off by a crash
    metrics.MetricsWriter(tmp_path, resume_step=3).close()
    assert [row["step"] for row in metrics.read_metrics(path)] == [1, 2, 3]


def test_damage_in_the_middle_is_reported(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('nonsense\n{"step": 1, "split": "train"}\n')
    with pytest.raises(
        ValueError,
        match="metrics.jsonl, line 1 is no row .*it is not JSON.*: 'nonsense'",
    ):
        metrics.read_metrics(path)


@pytest.mark.parametrize("rows", [0, 3])
def test_curves_are_drawn_whatever_there_is(tmp_path, rows):
    data = [
        {"step": s, "split": split, "loss": 1.0 / (s + 1), "accuracy": 0.5, "beta": 0.1}
        for s in range(rows)
        for split in ("train", "test")
    ]
    metrics.plot_curves(data, tmp_path / "curves.png", "title")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_flushed_would_outlast_a_power_cut(tmp_path, monkeypatch):
    """The lines, the events, and the old lines before they replace the file."""
    synced, fsync = [], os.fsync

    def record(file):
        number = os.fstat(file).st_ino
        here = [p for p in tmp_path.rglob("*") if p.stat().st_ino == number]
        synced.extend((p.name, p.stat().st_size) for p in here)
        fsync(file)

    monkeypatch.setattr(os, "fsync", record)
    writer = metrics.MetricsWriter(tmp_path, resume_step=0)
    assert synced.pop() == ("metrics.jsonl.tmp", 0)
    writer.write(1, "train", {"loss": 0.5})
    writer.flush()
    sizes = {p.name: p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()}
    assert dict(synced) == sizes and len(sizes) == 2 and min(sizes.values()) > 0
    writer.close()

import math
import os
import struct

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


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"step": 1, "split": "train", "loss": 1, "loss": 2}', "loss more than once"),
        ('{"step": 1, "step": 1, "split": "train"}', "step more than once"),
        ('{"step": 1, "split": "nan"}', "split is 'nan', expected one of train, "),
        ('{"step": 1, "split": "tset"}', "split is 'tset'"),
        ('{"step": 1, "split": 3}', "split is 3"),
        ('{"step": 1}', "split is None"),
    ],
)
def test_what_no_run_writes_is_reported(tmp_path, line, problem):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(metrics.MetricsError, match=f"line 1 .*{problem}"):
        metrics.read_metrics(path)


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


def test_what_is_not_finite_is_written_without_a_word(tmp_path, caplog):
    """And TensorBoard gets it: tensorboardX's own function would warn each time."""
    writer = metrics.MetricsWriter(tmp_path, resume_step=0)
    writer.write(2, "train", {"loss": math.nan, "grad_norm": math.inf})
    writer.close()
    assert not caplog.records
    (events,) = (tmp_path / "tensorboard").glob("events.*")
    written = events.read_bytes()
    assert b"train/loss" in written and struct.pack("<f", math.inf) in written

"""What a run prints, on a terminal and elsewhere."""

import contextlib
import io
import os
import pathlib
import pty
import termios
import types

import pytest

from nlcg_optax.training import report

EVALUATED = {"test": {"loss": 0.5, "accuracy": 0.75}}


@contextlib.contextmanager
def terminal(printed):
    """A real one; what was written to it is appended to `printed` at the end."""
    outside, inside = pty.openpty()
    termios.tcsetwinsize(inside, (24, 120))
    with os.fdopen(inside, "w") as file:
        yield file
    written = b""
    with os.fdopen(outside, "rb", buffering=0) as other, contextlib.suppress(OSError):
        while part := other.read(2**16):  # the end of a terminal is an OSError on Linux
            written += part
    printed.append(written.decode())


def tell(verbosity="normal", out=None, err=None):
    """A run of four steps of ten images, two an epoch, evaluated at the end."""
    told = report.Report(verbosity, out, err)
    told.start([("model", "tiny")], 4, 0, 2.0, 10)
    told.compiled([("memory", "little")], seconds=75.0)
    for _ in range(4):
        told.update({"loss": 1.0, "accuracy": 0.5}, seconds=0.1)
    told.evaluation(4, {"loss": 1.0, "accuracy": 0.5}, EVALUATED)
    told.close()
    rows = [
        {"step": 2, "split": "test", "accuracy": 0.875},
        {"step": 4, "split": "test", "accuracy": 0.75},
    ]
    folder = pathlib.Path("runs/a")
    told.end(EVALUATED, rows, folder, folder / "checkpoints")


def test_plain_lines_and_no_bar_where_there_is_no_terminal():
    out, err = io.StringIO(), io.StringIO()
    tell("normal", out, err)
    assert err.getvalue() == ""
    printed = out.getvalue()
    assert "\033" not in printed and "\r" not in printed
    assert (
        "step 4 of 4 (epoch 2): train loss 1.0000, accuracy 0.5000; "
        "test loss 0.5000, accuracy 0.7500; 100 images/s\n" in printed
    )
    assert "done: test accuracy 0.7500 (best 0.8750 at epoch 1); 4 steps in " in printed
    assert " after 1 min 15 s of compiling; all in runs/a\n" in printed


def test_colours_and_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    out, err = [], []
    with terminal(out) as out_file, terminal(err) as err_file:
        tell("normal", out_file, err_file)
    assert "\033[2mmodel    \033[0m  tiny" in out[0]
    assert "\033[1;32mdone\033[0m: test accuracy \033[1m0.7500\033[0m" in out[0]
    assert "4/4" in err[0]
    assert "loss 1.0000, accuracy 0.5000, 100 images/s, input 0%" in err[0]


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colours_can_be_turned_off(monkeypatch, name, value):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, value)
    out = []
    with terminal(out) as file:
        tell("normal", file, io.StringIO())
    assert "done: test accuracy 0.7500" in out[0] and "\033[1" not in out[0]


def test_quiet_shows_no_bar_even_on_a_terminal():
    out, err = io.StringIO(), []
    with terminal(err) as file:
        tell("quiet", out, file)
        file.write("end")
    assert err == ["end"]
    assert out.getvalue().startswith("done: ") and out.getvalue().count("\n") == 1


def test_a_log_gets_a_line_now_and_then(monkeypatch):
    """Where no bar is seen and the next evaluation is far."""
    now = [0.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    told = report.Report("normal", out, io.StringIO())
    told.start([], 10, 0, 2.0, 10)
    told.compiled([("memory", "little")], seconds=1.0)
    for _ in range(3):
        now[0] += 40.0
        told.update({"loss": 1.0, "accuracy": 0.5}, seconds=40.0)
    lines = [line for line in out.getvalue().splitlines() if line.startswith("step")]
    assert lines == [
        "step  2 of 10 (epoch 1): train loss 1.0000, accuracy 0.5000; 0.25 images/s, "
        "5 min 20 s left"
    ]


def test_memory_of_a_step_beside_what_the_device_has():
    analysis = types.SimpleNamespace(
        argument_size_in_bytes=3 * 10**9,
        output_size_in_bytes=2 * 10**9 + 5000,
        alias_size_in_bytes=2 * 10**9,
        temp_size_in_bytes=10**9,
    )
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 80 * 10**9})
    name, text = report.memory_row(analysis, device)
    assert name == "memory" and text.startswith("4.00 GB of 80.0 GB per device ")
    assert "state and images 3.00 GB, activations and other temporaries 1.00 GB" in text
    assert "not told" in report.memory_row(None, device)[1]


@pytest.mark.parametrize(
    ("initial", "counts", "warned_at"),
    [
        (0, [min(s, 12) for s in range(1, 31)], [10]),  # not at nine of nine
        (0, [s // 2 for s in range(1, 31)], []),  # half of them is not most
        (100, [s - s // 5 for s in range(1, 31)], [112]),  # since it was resumed
    ],
)
def test_a_loss_that_does_not_fit_is_told_once(initial, counts, warned_at):
    for verbosity in ("quiet", "normal"):
        out = io.StringIO()
        told = report.Report(verbosity, out, io.StringIO())
        told.start([], 1000, initial, 2.0, 10)
        seen = []
        for step, count in enumerate(counts, initial + 1):
            told.loss_mismatch(step, float(count))
            seen += [step] * (out.getvalue().count("\n") > len(seen))
        assert seen == warned_at
    if initial:
        assert out.getvalue() == (
            "warning: loss_mismatch: in 10 of 12 steps loss, gradient and curvature "
            "did not fit together. nlcg_optax.check says what is wrong with them.\n"
        )


def test_unknown_verbosity():
    with pytest.raises(ValueError, match="'loud' is unknown.*'quiet', 'normal'"):
        report.Report("loud")

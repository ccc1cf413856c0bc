"""The metrics that a run leaves behind."""

import contextlib
import json
import math
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

from nlcg_optax.training.checkpoint import to_disk

# Classes made at run time, which no type checker knows.
_Event: Any = vars(event_pb2)["Event"]
_SessionLog: Any = vars(event_pb2)["SessionLog"]
_Summary: Any = vars(summary_pb2)["Summary"]


class MetricsError(ValueError):
    """A ``metrics.jsonl`` that cannot be read."""


class MetricsWriter:
    """Writes metrics as JSON lines and TensorBoard events.

    One line of ``metrics.jsonl`` is an object with ``"step"`` (the number of steps
    taken), ``"split"`` (``"train"`` or the name of an evaluated split) and the metrics.
    Numbers that are not finite are written as strings ("nan", "inf"), so that every
    line is valid JSON. Where the disk is full, or the like, an OSError names the file.

    Args:
      workdir: folder of the run.
      resume_step: what was written after this step is dropped: it will come again.

    Raises:
      MetricsError: if what is there already cannot be read.
    """

    def __init__(self, workdir: pathlib.Path, resume_step: int):
        """Opens the files, dropping what lies after `resume_step`."""
        self.path = workdir / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= resume_step]
        partial = self.path.with_suffix(".jsonl.tmp")
        with _naming(partial):
            partial.write_text("".join(_line(row) for row in kept))
            to_disk(partial)
            partial.replace(self.path)
        self._file = self.path.open("a")
        # Not tensorboardX's SummaryWriter: its thread dies when the disk is full, and
        # the next write then waits for it without end.
        folder = workdir / "tensorboard"
        folder.mkdir(exist_ok=True)
        before = {*folder.iterdir()}
        self._events = EventsWriter(str(folder / "events"))
        # More than one where two runs started within a second.
        self._event_files = {*folder.iterdir()} - before
        start = _SessionLog(status=_SessionLog.START)
        self._write_event(resume_step + 1, session_log=start)

    def _write_event(self, step: int, **content: Any) -> None:
        self._events.write_event(_Event(wall_time=time.time(), step=step, **content))

    def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of one step or evaluation."""
        with _naming(self.path):
            self._file.write(_line({"step": step, "split": split, **metrics}))
        # Not by tensorboardX's function, which warns of numbers that are not finite.
        values = [
            _Summary.Value(tag=f"{split}/{name}", simple_value=number)
            for name, number in metrics.items()
        ]
        self._write_event(step, summary=_Summary(value=values))

    def flush(self) -> None:
        """Makes sure that everything written is on disk."""
        with _naming(self.path):
            self._file.flush()
            self._events.flush()
            for path in (self.path, *self._event_files):
                to_disk(path)

    def close(self) -> None:
        """Flushes and closes the files."""
        if not self._file.closed:
            self.flush()
        with _naming(self.path):
            self._file.close()
            self._events.close()


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Says in an error of a write which file it was."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


class Silence:
    """Stands in for a writer or a report in all processes but the first."""

    def __getattr__(self, name: str) -> Any:
        """Any method, which does nothing."""
        return lambda *args, **kwargs: None


def _line(row: Mapping[str, Any]) -> str:
    def valid(value: Any) -> Any:
        broken = isinstance(value, float) and not math.isfinite(value)
        return str(value) if broken else value

    return json.dumps({key: valid(value) for key, value in row.items()}) + "\n"


def read_metrics(path: pathlib.Path, head: bool = False) -> list[dict[str, Any]]:
    """Reads ``metrics.jsonl``; a last line cut off by a crash is left out.

    Args:
      path: the file; one that is not there has no rows.
      head: whether the first line is an object of another kind.

    Raises:
      MetricsError: for a line that is no row of metrics, with its number.
    """
    rows: list[dict[str, Any]] = []
    try:
        text = path.read_text() if path.exists() else ""
    except (UnicodeDecodeError, OSError) as error:
        problem = "is no text" if isinstance(error, ValueError) else "cannot be read"
        raise MetricsError(f"{path} {problem} ({error}). {_WAY_OUT}") from error
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_without_doubles)
            if not (head and number == 1):
                _check_row(row)
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # it does not end, so its end was cut off
                break
            problem = error if type(error) is ValueError else "it is not JSON"
            raise MetricsError(
                f"{path}, line {number} is no row of metrics ({problem}): "
                f"{line!r:.200}. {_WAY_OUT}"
            ) from error
        for key, value in row.items():
            if value in ("nan", "inf", "-inf"):
                row[key] = float(value)
        rows.append(row)
    return rows


_WAY_OUT = (
    "It is damaged: mend or remove that line, or move the file away, without which the "
    "run goes on with new curves."
)


_SPLITS = ("train", "validation", "test")
# As whole numbers are in floating point.
_LARGEST = 10**300


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, or a ValueError if a name occurs twice in it."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has {twice} more than once")
    return found


def _check_row(row: Any) -> None:
    """Raises a ValueError unless this is a row of metrics."""
    if not isinstance(row, dict):
        raise ValueError("it is no object")
    step, split = row.get("step"), row.get("split")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError("it has no step")
    if split not in _SPLITS:
        expected = f"expected one of {', '.join(_SPLITS)}"
        raise ValueError(f"its split is {split!r:.60}, {expected}")
    for name, value in row.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name != "split" and not number and value not in ("nan", "inf", "-inf"):
            raise ValueError(f"its {name} is no number")
        if number and isinstance(value, int) and abs(value) > _LARGEST:
            raise ValueError(f"its {name} is too large")

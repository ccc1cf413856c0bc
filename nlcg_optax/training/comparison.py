"""Other runs, drawn beside this one: where a reader sees what the optimizer does.

Each is the folder of a run, or a file that :func:`record` made of one. A file in
``configs/`` goes by its name without the suffix, as configs do.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from nlcg_optax.training import checkpoint, metrics
from nlcg_optax.training.config import (
    ConfigError,
    builtin_configs,
    differing,
    flatten,
    modern,
    to_json,
)
from nlcg_optax.training.run_config import RunConfig

# Fields that may differ between two runs that are compared: what is compared, and what
# does not change the curves.
_FREE = (
    *checkpoint.FREE_FIELDS,
    "dataset.data_dir",
    "dataset.in_memory",
    "seed",
    "weight_decay",
)
_FREE_GROUPS = ("optimizer.", "mesh.")


class OtherRun(NamedTuple):
    """A run to compare with.

    Attributes:
      label: what it is called: its optimizer and learning rate, if nothing else.
      config: its fields, by their names with dots.
      rows: of its ``metrics.jsonl``.
    """

    label: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]


def load_runs(names: str | None) -> list[OtherRun]:
    """Reads the runs that the field ``compare_with`` names, with commas between them.

    Raises:
      ConfigError: if there is none of that name, or it cannot be read.
    """
    return [load_run(name.strip()) for name in (names or "").split(",") if name.strip()]


def load_run(name: str) -> OtherRun:
    """Reads a run by its name.

    Raises:
      ConfigError: if there is none, or it cannot be read.
    """
    folder, *_ = [config.path.parent for config in builtin_configs()]
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        path = pathlib.Path(name)
    try:
        if path.is_dir():
            head = {"config": json.loads((path / "config.json").read_text())}
            rows = metrics.read_metrics(path / "metrics.jsonl")
        else:
            head, *rows = metrics.read_metrics(path, head=True)
        config = modern(head["config"])
        label, rate = config["optimizer.name"], config["optimizer.learning_rate"]
        label += "" if rate is None else f" at {rate:g}"
        label = head.get("label", label)
        if not {"step", "split", "loss", "accuracy"} <= rows[0].keys():
            raise ValueError("it holds no metrics")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        known = ", ".join(repr(path.stem) for path in sorted(folder.glob("*.jsonl")))
        raise ConfigError(
            f"compare_with={name!r} cannot be read ({type(error).__name__}: {error}): "
            f"expected the folder of a run, or one of {known}."
        ) from error
    return OtherRun(label, config, rows)


def differing_fields(config: RunConfig, other: OtherRun) -> list[str]:
    """The fields, but those of the optimizer, in which two runs differ."""
    ours, groups = flatten(to_json(config)), _FREE_GROUPS
    if "nlcg_auto" in (config.optimizer.name, other.config["optimizer.name"]):
        groups += ("schedule.",)  # which it has not
    return differing(ours, other.config, _FREE, groups)


def evaluated(rows: Sequence[dict[str, Any]]) -> tuple[str, dict[int, dict[str, Any]]]:
    """The split that tells most of a run, and its rows by their steps.

    That is the test split, if there is one.
    """
    splits = {row["split"] for row in rows}
    split = next((s for s in ("test", "validation") if s in splits), "train")
    return split, {row["step"]: row for row in rows if row["split"] == split}


def early_and_end(
    rows: Sequence[dict[str, Any]], others: Sequence[OtherRun]
) -> tuple[int, ...]:
    """A step after about a sixth of the run, and the last: of those that all know."""
    _, ours = evaluated(rows)
    common = set(ours).intersection(*(evaluated(other.rows)[1] for other in others))
    if not common:
        return ()
    end = max(common)
    return tuple(sorted({min(common, key=lambda step: abs(step - end / 6)), end}))


def in_words(
    label: str, rows: Sequence[dict[str, Any]], others: Sequence[OtherRun]
) -> list[str]:
    """How runs of the same length compare: early, and at their ends, in a line each.

    Args:
      label: what this run is called.
      rows: of this run.
      others: the runs it is compared with.

    Example:
      >>> def run(*accuracies):
      ...     return [
      ...         {"step": 10 * i, "split": "test", "accuracy": accuracy, "loss": 1.0}
      ...         for i, accuracy in enumerate(accuracies, 1)
      ...     ]
      >>> ours, theirs = run(0.967, 0.97, 0.98), run(0.821, 0.9, 0.985)
      >>> for line in in_words("ours", ours, [OtherRun("momentum", {}, theirs)]):
      ...     print(line)
      after 10 steps 96.7% of the test images are right with ours, 82.1% with momentum
      after 30 steps 98.0% of the test images are right with ours, 98.5% with momentum
    """
    split, _ = evaluated(rows)
    names = ", ".join(other.label for other in others)
    steps = early_and_end(rows, others)
    if not steps:
        return [f"not with {names}, evaluated at other steps"]
    lines = []
    for step in steps:
        parts = [
            f"{100 * evaluated(run)[1][step]['accuracy']:.1f}%{words}"
            for run, words in [
                (rows, f" of the {split} images are right with {label}"),
                *((other.rows, f" with {other.label}") for other in others),
            ]
        ]
        lines.append(f"after {step:,} steps {', '.join(parts)}")
    return lines


def record(
    workdir: str | pathlib.Path, path: str | pathlib.Path, command: str, label: str
) -> None:
    """Writes one small file of a run: the command and config, loss and accuracy.

    Args:
      workdir: of the run.
      path: of the file to write.
      command: that made the run.
      label: what the run is to be called.
    """
    workdir = pathlib.Path(workdir)
    config = json.loads((workdir / "config.json").read_text())
    head = {"command": command, "label": label, "config": config}
    lines: list[dict[str, Any]] = [head]
    for row in metrics.read_metrics(workdir / "metrics.jsonl"):
        names = [name for name in ("loss", "cross_entropy", "accuracy") if name in row]
        short = {name: round(row[name], 5) for name in names}
        lines.append({"step": row["step"], "split": row["split"], **short})
    pathlib.Path(path).write_text("".join(json.dumps(x) + "\n" for x in lines))

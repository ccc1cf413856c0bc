"""Another run, drawn beside this one: where a reader sees what the optimizer does.

It is the folder of a run, or a file that :func:`record` made of one. A file in
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
      label: its optimizer and learning rate, in words.
      config: its fields, by their names with dots.
      rows: of its ``metrics.jsonl``.
    """

    label: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]


def load_run(name: str) -> OtherRun:
    """Reads the run that the field ``compare_with`` names.

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


def in_words(rows: Sequence[dict[str, Any]], other: OtherRun) -> str:
    """How two runs of the same length compare: early, and at their ends.

    By their evaluations, since the training loss has the penalty in it.

    Args:
      rows: of this run.
      other: the run it is compared with.

    Example:
      >>> numbers = [(10, 0.8, 0.5), (20, 0.9, 0.25)]
      >>> ours = [
      ...     {"step": step, "split": "test", "accuracy": accuracy, "loss": loss}
      ...     for step, accuracy, loss in numbers
      ... ]
      >>> theirs = [{**row, "accuracy": 0.75, "loss": 1.0} for row in ours]
      >>> text = in_words(ours, OtherRun("momentum at 0.1", {}, theirs))
      >>> for part in text.split("; "):
      ...     print(part.replace(" at the end", ""))
      test accuracy of momentum at 0.1: 0.7500 after 10 steps and 0.7500 (loss 1.0000)
      of this run: 0.8000 and 0.9000 (loss 0.2500)
    """
    (split, *_) = [row["split"] for row in rows if row["split"] != "train"] or ["train"]
    ours, theirs = (
        {row["step"]: row for row in part if row["split"] == split}
        for part in (rows, other.rows)
    )
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        return f"not with {other.label}, which was evaluated at other steps"
    early, end = common[0], common[-1]

    def at_end(run: dict[int, dict[str, Any]]) -> str:
        return f"{run[end]['accuracy']:.4f} (loss {run[end]['loss']:.4f})"

    return (
        f"{split} accuracy of {other.label}: {theirs[early]['accuracy']:.4f} after "
        f"{early:,} steps and {at_end(theirs)} at the end; of this run: "
        f"{ours[early]['accuracy']:.4f} and {at_end(ours)}"
    )


def record(workdir: str | pathlib.Path, path: str | pathlib.Path, command: str) -> None:
    """Writes one small file of a run: the command and config, loss and accuracy."""
    workdir = pathlib.Path(workdir)
    config = json.loads((workdir / "config.json").read_text())
    lines: list[dict[str, Any]] = [{"command": command, "config": config}]
    for row in metrics.read_metrics(workdir / "metrics.jsonl"):
        short = {name: round(row[name], 5) for name in ("loss", "accuracy")}
        lines.append({"step": row["step"], "split": row["split"], **short})
    pathlib.Path(path).write_text("".join(json.dumps(x) + "\n" for x in lines))

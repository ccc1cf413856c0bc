"""Checkpoints of a run, by Orbax."""

import json
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from nlcg_optax.training.config import ConfigDict, ConfigError, to_json

# Fields that may differ between a run and its continuation.
_FREE_FIELDS = (
    "checkpoint_every_epochs",
    "eval_batch_size",
    "eval_every_epochs",
    "keep_checkpoints",
    "log_every_steps",
)


class Checkpoints:
    """The checkpoints in a run's folder.

    Writing goes on in the background while training does. A checkpoint appears under
    its name only when it is whole.

    Args:
      workdir: folder of the run.
      keep: how many of the newest to keep.
    """

    def __init__(self, workdir: pathlib.Path, keep: int):
        """Opens the folder, making it if need be."""
        self.path = workdir / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self.path.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=keep)
        )

    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def restore(self, like: Any) -> Any:
        """Restores the newest checkpoint, shaped (and placed) like a given state."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._manager.restore(
            self.latest_step(), args=ocp.args.StandardRestore(abstract)
        )

    def save(self, step: int, state: Any) -> None:
        """Starts to save a state, unless that step is saved already."""
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def wait(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until everything is on disk, and closes the folder."""
        self._manager.close()


def save_config(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Writes ``config.json``, or checks that the run goes on with the same config.

    Raises:
      ConfigError: if the folder holds a run with another config; names the fields that
        differ.
    """
    path = workdir / "config.json"
    fields = to_json(config)
    if path.exists():
        saved = json.loads(path.read_text())
        old, new = _flatten(saved), _flatten(fields)
        names = sorted(old.keys() | new.keys())
        changed = [
            f"{name}={new.get(name)!r} (was {old.get(name)!r})"
            for name in names
            if name not in _FREE_FIELDS and old.get(name) != new.get(name)
        ]
        if changed:
            raise ConfigError(
                f"{str(workdir)!r} holds a run with another config: "
                f"{', '.join(changed)}. Choose another --workdir, or remove that one."
            )
    partial = path.with_suffix(".json.tmp")
    partial.write_text(json.dumps(fields, indent=2) + "\n")
    partial.replace(path)


def _flatten(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat

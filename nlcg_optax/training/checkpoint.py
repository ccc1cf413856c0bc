"""Checkpoints of a run, by Orbax."""

import contextlib
import json
import os
import pathlib
import socket
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from nlcg_optax.training.config import ConfigError, differing, modern, to_json
from nlcg_optax.training.run_config import RunConfig

try:
    import fcntl
except ModuleNotFoundError:  # on Windows
    fcntl = None

# Fields that may differ between a run and its continuation; those of the mesh may too.
FREE_FIELDS = (
    "checkpoint_every_epochs",
    "compare_with",
    "eval_batch_size",
    "eval_every_epochs",
    "keep_checkpoints",
    "log_every_steps",
)

_CENTURY = 4 * 10**9  # seconds


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read."""


class Checkpoints:
    """The checkpoints in a run's folder.

    Writing goes on in the background while training does. A checkpoint appears under
    its name only when it is whole. All processes take part; the folder must be one that
    all of them see.

    Args:
      workdir: folder of the run.
      keep: how many of the newest to keep.

    Raises:
      CheckpointError: by its methods, if this state or the last cannot be written.
    """

    def __init__(self, workdir: pathlib.Path, keep: int):
        """Opens the folder, making it if need be."""
        self.path = workdir / "checkpoints"
        # Orbax reads its deadline off the clock on the wall: were that set by more than
        # 20 minutes during a write, the write would fail. Several processes need one.
        never = ocp.AsyncOptions(timeout_secs=_CENTURY)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, async_options=never if jax.process_count() == 1 else None
        )
        self._manager = ocp.CheckpointManager(self.path.absolute(), options=options)

    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def restore(self, like: Any) -> Any:
        """Restores the newest checkpoint, shaped and placed as `like`.

        Args:
          like: a state, or one of `jax.ShapeDtypeStruct` with shardings.

        Raises:
          CheckpointError: if it cannot be read, or does not fit.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        steps = sorted(self._manager.all_steps())
        try:
            state = self._manager.restore(
                steps[-1], args=ocp.args.StandardRestore(abstract)
            )
            _check_fits(state, abstract)
        except Exception as error:  # Orbax documents none
            older = f", from step {steps[-2]:,}" if steps[1:] else ", from the start"
            raise CheckpointError(
                f"The checkpoint of step {steps[-1]:,}, {self.path / str(steps[-1])}, "
                f"cannot be read: {_shortened(error)}. It is damaged, or was written "
                "by another program. Nothing was changed. Move that folder away, and "
                f"the same command goes on{older}."
            ) from error
        return state

    def save(self, step: int, state: Any) -> None:
        """Starts to save a state, unless that step is saved already."""
        # Orbax copies to the host in a way that a transfer guard takes as not meant.
        with self._writing(), jax.transfer_guard("allow"):
            if step not in self._manager.all_steps():
                self._check_writable()
                self._manager.save(step, args=ocp.args.StandardSave(state))

    def wait(self) -> None:
        """Waits until everything is on disk."""
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Waits until everything is on disk, and closes the folder."""
        try:
            self.wait()
        finally:
            with self._writing():
                self._manager.close()

    def _check_writable(self) -> None:
        # Where Orbax cannot make a folder, its threads hold up the program's end for
        # five minutes.
        self.path.mkdir(parents=True, exist_ok=True)
        pathlib.Path(tempfile.mkdtemp(prefix=".writable-", dir=self.path)).rmdir()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax documents none
            whole = sorted(p.name for p in self.path.glob("*") if p.name.isdigit())
            kept = f"step {max(map(int, whole)):,}" if whole else "none yet"
            raise CheckpointError(
                f"Cannot write a checkpoint to {self.path}: {_shortened(error)}. Is "
                f"the disk full, or the folder read-only? The last whole one: {kept}."
            ) from error


def _check_fits(state: Any, abstract: Any) -> None:
    def check(path: Any, x: Any, y: Any) -> None:
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            raise ValueError(
                f"{jax.tree_util.keystr(path)} is {x.dtype}{list(x.shape)} there and "
                f"{y.dtype}{list(y.shape)} in this program"
            )

    jax.tree_util.tree_map_with_path(check, state, abstract)


def _shortened(error: BaseException) -> str:
    """What an error says, cut to a readable length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}{'…' * (len(text) > 500)}"


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Makes a run's folder, and holds it, so that no other run writes there meanwhile.

    The lock is the operating system's, and ends with the process, whatever ends it.
    Where there is no such lock (on Windows, and on some file systems of a network)
    nothing is held.

    Raises:
      ConfigError: if another run holds it, or nothing can be written there.
    """
    with _choosing_another(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    with _choosing_another(workdir):
        file = (workdir / ".lock").open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"Another run, {file.read() or 'just begun'}, is at work in "
                f"--workdir={workdir}. Wait until it ends, stop it, or choose another "
                "folder."
            ) from None
        except OSError:
            pass  # no locks there
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def check_config(config: RunConfig, workdir: pathlib.Path) -> None:
    """Checks that a folder is new, or holds a run with the same config.

    Raises:
      ConfigError: if it holds a run with another config; names the fields that differ.
    """
    path = workdir / "config.json"
    try:
        saved = json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}). Choose another --workdir, or remove "
            "that file if you know that the run in its folder had this config."
        ) from error
    if saved is None:
        return
    old, new = modern(saved), modern(to_json(config))
    changed = [
        f"{name}={new.get(name)!r} (was {old.get(name)!r})"
        for name in differing(old, new, FREE_FIELDS, ("mesh.",))
    ]
    if changed:
        raise ConfigError(
            f"{str(workdir)!r} holds a run with another config: "
            f"{', '.join(changed)}. Choose another --workdir, or remove that one."
        )


def save_config(config: RunConfig, workdir: pathlib.Path) -> None:
    """Writes ``config.json`` into the folder of a run, or raises a ConfigError."""
    path = workdir / "config.json"
    partial = path.with_suffix(".json.tmp")
    with _choosing_another(workdir):
        partial.write_text(json.dumps(to_json(config), indent=2) + "\n")
        partial.replace(path)


@contextlib.contextmanager
def _choosing_another(workdir: pathlib.Path) -> Iterator[None]:
    """Says in an error of a write that another folder would do."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"Cannot write to --workdir={workdir}: {error}. Choose another."
        ) from error


def check_shared(workdir: pathlib.Path, seconds: float = 20.0) -> None:
    """Checks that what another process wrote into the folder is seen here.

    Raises:
      ConfigError: if it is not, also after some time (a network's folder may be slow).
    """
    deadline = time.monotonic() + seconds
    while not (workdir / "config.json").exists():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"--workdir={workdir} does not hold what process 0 wrote there: all "
                "processes need the same folder, on a file system that they share."
            )
        time.sleep(0.2)

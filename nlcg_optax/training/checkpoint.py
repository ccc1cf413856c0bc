"""Checkpoints of a run, by Orbax."""

import contextlib
import functools
import json
import math
import os
import pathlib
import socket
import tempfile
import time
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nlcg_optax.matrices import for_devices
from nlcg_optax.matrices.matrix import is_kept
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
# Beside the arrays of a checkpoint: of each file its size and CRC-32.
_CHECKSUMS = "checksums.json"
# What Orbax writes after them, where there are no arrays.
_AFTERWARDS = ("_CHECKPOINT_METADATA", "commit_success.txt")
_NAMED = 3  # of what is passed over


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read."""


class Checkpoints:
    """The checkpoints in a run's folder.

    Writing goes on in the background while training does. A checkpoint appears under
    its name only when it is whole, with a checksum of each of its files in it. These
    are verified before anything is read: of a damaged one the folder is renamed, and
    the one before it takes its place. All processes take part; the folder must be one
    that all of them see.

    Args:
      workdir: folder of the run.
      keep: how many of the newest to keep.

    Attributes:
      notes: sentences on what was found damaged, or could not be verified.

    Raises:
      CheckpointError: by its methods, if this state or the last cannot be written.
    """

    def __init__(self, workdir: pathlib.Path, keep: int):
        """Opens the folder, making it if need be."""
        self.path = workdir / "checkpoints"
        # Orbax reads its deadline off the clock on the wall: were that set by more than
        # 20 minutes during a write, the write would fail. Several processes need one.
        deadline: Any = {"timeout_secs": _CENTURY} if jax.process_count() == 1 else {}
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            async_options=ocp.AsyncOptions(
                # Between the last array and the name.
                post_finalization_callback=self._write_checksums,
                **deadline,
            ),
        )
        self._manager = ocp.CheckpointManager(self.path.absolute(), options=options)
        self._verified: set[int] = set()
        self.notes: list[str] = []
        odd = sorted(p.name for p in self.path.glob("*") if _is_odd(p))
        if odd:
            more = ", ..." if len(odd) > _NAMED else ""
            self.notes.append(
                f"{len(odd):,} in {self.path} are no checkpoints and passed over: "
                f"{', '.join(odd[:_NAMED])}{more}. The folder of a checkpoint is "
                "called by the number of its step, without zeros before it."
            )

    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint, or None if there never was one.

        Raises:
          CheckpointError: if there are some, and all are damaged; or if a damaged one
            cannot be renamed.
        """
        steps = sorted(self._manager.all_steps())
        if not steps or steps[-1] in self._verified:
            return max(steps, default=None)
        step = np.int64(-1)
        error = None
        if jax.process_index() == 0:
            try:
                step = np.int64(self._set_damaged_aside(steps))
            except (OSError, CheckpointError) as caught:
                error = caught
        if jax.process_count() > 1:
            step = multihost_utils.broadcast_one_to_all(step)
        if error is not None or step < 0:
            if not isinstance(error, CheckpointError):
                problem = f": {error}" if error else ", see the message of process 0"
                error = CheckpointError(
                    f"No checkpoint in {self.path} is whole{problem}"
                )
            raise error
        self._manager.reload()
        self._verified.add(int(step))
        return int(step)

    def _set_damaged_aside(self, steps: list[int]) -> int:
        """Step of the newest whole checkpoint; the names of newer ones are changed."""
        damaged: dict[int, str] = {}
        for place, step in reversed([*enumerate(steps)]):
            problem = self._damage(step, steps[:place])
            if problem is None:
                break
            damaged[step] = problem
        else:
            told = "; ".join(f"of step {s:,}, {told}" for s, told in damaged.items())
            raise CheckpointError(
                f"No checkpoint in {self.path} is whole: {told}. Nothing was changed. "
                "Move that folder away, and the same command goes on from the start."
            )
        for number, problem in damaged.items():
            folder = self.path / str(number)
            aside = self.path / f"damaged-{number}-{time.time_ns()}"
            folder.rename(aside)
            self.notes.append(
                f"The checkpoint of step {number:,} is damaged: {problem}. It is now "
                f"{aside}, and the run goes on from that of step {step:,}."
            )
        return step

    def _damage(self, step: int, older: list[int]) -> str | None:
        """What is wrong with the files of a checkpoint, in words; None for nothing."""
        folder = self.path / str(step)
        path = folder / _CHECKSUMS
        if not path.exists():
            if any((self.path / str(s) / _CHECKSUMS).exists() for s in older):
                return f"{path} is missing"
            if not any(file.is_file() for file in folder.rglob("*")):
                return f"{folder} is empty"
            self.notes.append(
                f"The checkpoint of step {step:,} has no {_CHECKSUMS}, as those of "
                "earlier versions, and cannot be verified."
            )
            return None
        try:
            listed = json.loads(path.read_text())
            # Those of earlier versions have the files alone.
            expected = listed.get("files", listed)
            if (of := listed.get("step", step)) != step:
                return f"{folder} is the checkpoint of step {of}"
            if listed.get("count", len(expected)) != len(expected):
                return f"{path} does not list all files"
            for name, (size, checksum) in expected.items():
                if not (folder / name).is_file():
                    return f"{folder / name} is missing"
                if _checksum(folder / name) != [size, checksum]:
                    return f"{folder / name} is not what was written"
            if not expected:
                return f"{path} lists no file"
        except (OSError, ValueError, TypeError, AttributeError) as error:
            return f"{path} cannot be read ({_shortened(error)})"
        return None

    def _write_checksums(self) -> None:
        """Writes those of the checkpoint that has no name yet."""
        if jax.process_index():
            return
        for folder in self.path.glob("*.orbax-checkpoint-tmp*"):
            path = folder / _CHECKSUMS
            if not folder.is_dir() or path.exists():
                continue
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            checksums = {
                str(file.relative_to(folder)): _checksum(file)
                for file in files
                if str(file.relative_to(folder)) not in _AFTERWARDS
            }
            step = int(folder.name.partition(".")[0])
            listed = {"step": step, "count": len(checksums), "files": checksums}
            path.write_text(json.dumps(listed))
            for file in [*files, path]:
                to_disk(file)

    def restore(self, like: Any) -> Any:
        """Restores the newest whole checkpoint, shaped and placed as `like`.

        Another number of devices may have written it (`matrices.for_devices`).

        Args:
          like: a state, or one of `jax.ShapeDtypeStruct` with shardings.

        Raises:
          CheckpointError: if there is none, it cannot be read, or does not fit.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        newest = self.latest_step()
        if newest is None:
            raise CheckpointError(f"There is no checkpoint in {self.path}.")
        try:
            shapes = self._as_written(newest, abstract)
            state = self._manager.restore(newest, args=ocp.args.StandardRestore(shapes))
            _check_fits(state, shapes)
            if shapes is not abstract:
                state = _moved(state, abstract)
        except Exception as error:  # Orbax documents none
            steps = [step for step in self._manager.all_steps() if step < newest]
            older = f", from step {max(steps):,}" if steps else ", from the start"
            raise CheckpointError(
                f"The checkpoint of step {newest:,}, {self.path / str(newest)}, "
                f"cannot be read: {_shortened(error)}. It was written by another "
                "program, or is damaged. Nothing was changed. Move that folder away, "
                f"and the same command goes on{older}."
            ) from error
        return state

    def _as_written(self, step: int, abstract: Any) -> Any:
        """The abstract state as it was on the devices that wrote the checkpoint."""
        mesh = _mesh_of(abstract)
        if mesh is None or not any(map(is_kept, _kept_and_others(abstract))):
            return abstract
        folder: Any = self.path.absolute() / str(step) / "default"
        told = jax.tree.leaves(ocp.StandardCheckpointHandler().metadata(folder))
        sizes = [getattr(x.sharding, "shape", None) for x in told]
        devices = math.prod(next((s for s in sizes if s is not None), (1,)))
        if devices == mesh.size:
            return abstract
        there = jax.eval_shape(
            functools.partial(for_devices, devices=devices), abstract
        )
        others = (x for x in _kept_and_others(abstract) if not is_kept(x))

        def placed(node: Any) -> Any:
            if not is_kept(node):
                return next(others)
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(
                    x.shape,
                    x.dtype,
                    sharding=NamedSharding(
                        mesh,
                        P(None, mesh.axis_names)
                        if x.shape[1] % mesh.size == 0
                        else P(),
                    ),
                ),
                node,
            )

        return jax.tree.map(placed, there, is_leaf=is_kept)

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
            to_disk(self.path)  # the names

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


def _is_odd(path: pathlib.Path) -> bool:
    """Whether this is neither a checkpoint nor what was on the way to be or was one."""
    name = path.name
    number = name.isdecimal() and str(int(name)) == name and path.is_dir()
    ours = name.startswith((".", "damaged-")) or ".orbax-checkpoint-tmp" in name
    return not number and not ours


def to_disk(path: pathlib.Path) -> None:
    """Waits until a file, or the names in a folder, would outlast a power cut."""
    if os.name == "nt" and path.is_dir():  # where folders cannot be opened
        return
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _checksum(path: pathlib.Path) -> list[int]:
    """Size and CRC-32 of a file."""
    checksum, size = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            checksum, size = zlib.crc32(chunk, checksum), size + len(chunk)
    return [size, checksum]


def _kept_and_others(state: Any) -> list[Any]:
    return jax.tree.leaves(state, is_leaf=is_kept)


def _mesh_of(abstract: Any) -> Any:
    """The mesh that a state is to be on; None for none."""
    placed = [getattr(x, "sharding", None) for x in jax.tree.leaves(abstract)]
    return next((s.mesh for s in placed if isinstance(s, NamedSharding)), None)


def _moved(state: Any, abstract: Any) -> Any:
    """A state as on the devices of the abstract one."""
    move = functools.partial(for_devices, devices=_mesh_of(abstract).size)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(move, out_shardings=shardings)(state)


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


def check_config(config: RunConfig, workdir: pathlib.Path) -> float | None:
    """Checks that a folder is new, or holds a run with the same config.

    It may have more epochs than that run, if nothing before depended on their number: a
    cosine schedule does.

    Returns:
      The number of epochs that the run in the folder had, if this one has more.

    Raises:
      ConfigError: if it holds a run with another config; names the fields that differ.
    """
    path = workdir / "config.json"
    try:
        if not path.exists() and not path.is_symlink():
            return None
        saved = json.loads(path.read_text())
        if not isinstance(saved, dict):
            raise ValueError(f"expected an object of fields, found {saved!r:.60}")
        old = modern(saved)
    except (OSError, ValueError, RecursionError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}). Choose another --workdir, or remove "
            "that file if you know that the run in its folder had this config."
        ) from error
    new = modern(to_json(config))
    names = differing(old, new, FREE_FIELDS, ("mesh.",))
    epochs = old.get("num_epochs")
    longer = (
        "num_epochs" in names
        and isinstance(epochs, int | float)
        and not isinstance(epochs, bool)
        and 0 < epochs < new["num_epochs"]
    )
    by_cosine = new["schedule.name"] == "cosine"
    if longer and not by_cosine:
        names.remove("num_epochs")
    if names:
        changed = [
            f"{name}={new.get(name)!r} (was {old.get(name)!r})" for name in names
        ]
        why = ""
        if longer and by_cosine:
            why = (
                "With schedule.name='cosine' a longer run has other learning rates "
                "from its start on. "
            )
        raise ConfigError(
            f"{str(workdir)!r} holds a run with another config: "
            f"{', '.join(changed)}. {why}Choose another --workdir, or remove that one."
        )
    return epochs if longer else None


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

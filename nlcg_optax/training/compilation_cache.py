"""What was compiled once is kept, and read again by the next run: JAX's own cache.

Where it is, how large it may become and how it is turned off is up to the environment,
as everywhere in JAX: ``JAX_COMPILATION_CACHE_DIR=FOLDER``, and
``JAX_ENABLE_COMPILATION_CACHE=false``.
"""

import contextlib
import hashlib
import os
import pathlib
import platform
from typing import Any

import jax

# Whatever was used longest ago goes first. A step of a ResNet takes a megabyte or two.
MOST_BYTES = 2**30
# What compiles faster is not worth a file.
LEAST_SECONDS = 0.2

_settings: Any = jax.config  # whose attributes no type checker knows


def enable() -> str | None:
    """Switches the cache on, unless the user has decided already.

    Returns:
      A sentence on what went wrong, which is no reason not to train, or None.
    """
    decided = _settings.jax_compilation_cache_dir
    if decided or not _settings.jax_enable_compilation_cache:
        return None
    folder = default_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        prune(folder)
    except OSError as error:
        return (
            f"what is compiled will not be kept, for the folder {folder} cannot be "
            f"used ({error.strerror}): name another, JAX_COMPILATION_CACHE_DIR=FOLDER."
        )
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    return None


def describe() -> str:
    """Where compiled programs are kept, and how not to, in words."""
    folder = _settings.jax_compilation_cache_dir
    if not _settings.jax_enable_compilation_cache or not folder:
        return "nothing that is compiled is kept for the next run"
    most = ""
    if folder == str(default_folder()):
        most = f", at most {MOST_BYTES // 2**30} GB"
    return (
        f"what is compiled is kept in {_short(pathlib.Path(folder))}{most} "
        "(JAX_ENABLE_COMPILATION_CACHE=false: it is not)"
    )


def default_folder() -> pathlib.Path:
    """In the user's folder of caches, one for each kind of processor.

    A program for one with more instructions would end another, on which the same home
    may be, without a word.
    """
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    described = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):  # not Linux
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        described += next((line for line in lines if line.startswith("flags")), "")
    kind = hashlib.sha256(described.encode()).hexdigest()[:8]
    return pathlib.Path(home) / "nlcg-optax" / f"compiled-{kind}"


def prune(folder: pathlib.Path, most_bytes: int = MOST_BYTES) -> None:
    """Removes what was used longest ago, until the rest is small enough."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another run prunes too
            status = path.stat()
            found.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    total = sum(bytes_ for _, bytes_, _ in found)
    for _, bytes_, path in sorted(found):
        if total <= most_bytes:
            break
        path.unlink(missing_ok=True)
        total -= bytes_


def _short(path: pathlib.Path) -> str:
    with contextlib.suppress(ValueError):
        return f"~/{path.relative_to(pathlib.Path.home())}"
    return str(path)

"""Checkpoints whose files are damaged, in the folder of the command line, so often.

In a process of its own: where a read fails, Orbax leaves coroutines behind, which warn
when they are collected, at any time.
"""

import json
import pathlib
import random
import sys

import jax
import jax.numpy as jnp
import numpy as np

from nlcg_optax.training.checkpoint import Checkpoints


def state(seed):
    w = np.random.default_rng(seed).normal(size=(50, 40)).astype(np.float32)
    return {"w": jnp.asarray(w), "count": jnp.int32(seed), "none": None}


def damage(path, draw, older):
    """Changes a file in one of several ways; the same file of an older checkpoint."""
    data = bytearray(path.read_bytes())
    place = draw.randrange(len(data) or 1)
    kind = draw.choice(["cut", "flipped", "zeros", "longer", "gone", "older"])
    if kind == "cut":
        del data[place:]
    elif kind == "flipped" and data:
        data[place] ^= 1 << draw.randrange(8)
    elif kind == "zeros":
        data[place : place + 64] = bytes(len(data[place : place + 64]))
    elif kind == "longer":
        data[place:place] = draw.randbytes(3)
    elif kind == "older" and older.exists():
        data = older.read_bytes()
    path.write_bytes(data)
    if kind == "gone":
        path.unlink()


def run(folder, count):
    """Damages the files of one: prints how often it was restored, with the right bits,
    and how often refused."""
    checkpoints = Checkpoints(folder, keep=2)
    for step in (3, 4):
        checkpoints.save(step, state(step))
    checkpoints.close()
    like = jax.tree.map(jnp.zeros_like, state(0))
    newest = folder / "checkpoints" / "4"
    paths = sorted(p for p in newest.rglob("*") if p.is_file())
    sizes = [path.stat().st_size for path in paths]
    draw = random.Random(0)
    outcomes = {"restored": 0, "refused": 0}
    for i in range(count):
        # Half of them by their size, so that the arrays are damaged in many places.
        (path,) = draw.choices(paths, sizes if i % 2 else None)
        data = path.read_bytes()
        damage(path, draw, newest.with_name("3") / path.relative_to(newest))
        checkpoints = Checkpoints(folder, keep=2)
        restored = checkpoints.restore(like)
        number = 3 if checkpoints.notes else 4  # a file that nothing needs
        jax.tree.map(np.testing.assert_array_equal, restored, state(number))
        outcomes["refused" if checkpoints.notes else "restored"] += 1
        checkpoints.close()
        for aside in (folder / "checkpoints").glob("damaged-4-*"):
            aside.rename(newest)
        path.write_bytes(data)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    run(pathlib.Path(sys.argv[1]), int(sys.argv[2]))

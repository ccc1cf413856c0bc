"""Checkpoints whose files are cut, in the folder of the command line.

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


def cut(folder):
    """Cuts the files of one at random bytes: prints how often it was restored, with
    the right bits, and how often refused."""
    checkpoints = Checkpoints(folder, keep=2)
    for step in (3, 4):
        checkpoints.save(step, state(step))
    checkpoints.close()
    like = jax.tree.map(jnp.zeros_like, state(0))
    paths = [p for p in (folder / "checkpoints" / "4").rglob("*") if p.is_file()]
    sizes = [path.stat().st_size for path in paths]
    draw = random.Random(0)
    outcomes = {"restored": 0, "refused": 0}
    for i in range(100):
        # Half of them by their size, so that the arrays are cut in many places.
        (path,) = draw.choices(paths, sizes if i % 2 else None)
        data = path.read_bytes()
        path.write_bytes(data[: draw.randrange(len(data) or 1)])
        checkpoints = Checkpoints(folder, keep=2)
        restored = checkpoints.restore(like)
        number = 3 if checkpoints.notes else 4  # a file that nothing needs
        jax.tree.map(np.testing.assert_array_equal, restored, state(number))
        outcomes["refused" if checkpoints.notes else "restored"] += 1
        checkpoints.close()
        for aside in (folder / "checkpoints").glob("damaged-4-*"):
            aside.rename(folder / "checkpoints" / "4")
        path.write_bytes(data)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    cut(pathlib.Path(sys.argv[1]))

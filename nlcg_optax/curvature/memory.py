"""The last steps in their slots: which is where, and what replaces which."""

from typing import Any

import jax
import jax.numpy as jnp

from nlcg_optax import _tree
from nlcg_optax.curvature.state import Memory
from nlcg_optax.curvature.trust import BACKTRACK


def read(memory: Memory) -> list[Any]:
    """The last steps, the newest first."""
    return [
        jax.tree.map(lambda x, i=i: jnp.asarray(x)[i], memory.prev_updates)
        for i in _by_age(memory)
    ]


def newest_norm(memory: Memory) -> jax.Array:
    """The length of the last step; 0 where there was none."""
    return jnp.asarray(memory.prev_norms)[_by_age(memory)[0]]


def write(
    memory: Memory,
    step: Any,
    norm: jax.Array,
    *,
    taken: jax.Array,
    rejected: jax.Array,
    kept: jax.Array,
) -> Memory:
    """The memory after a step.

    Args:
      memory: the one before it.
      step: with its sign turned.
      norm: its length.
      taken: whether it is taken; if not, nothing changes.
      rejected: whether the last step is taken back instead, which shortens it.
      kept: the part of it that stays. (A length is remembered of what is taken back
        wholly, too: it says how long the next step may be.)
    """
    # A step of length zero, as at the start of a warm-up, is none to remember.
    stored = taken & (norm > 0)
    newest, slots = _by_age(memory)[0], len(memory.prev_norms)
    slot = jnp.where(taken, jnp.asarray(memory.stored) % slots, newest)

    def replace(array: Any, new: jax.Array, part: Any) -> jax.Array:
        array = jnp.asarray(array)  # a restored state may be NumPy's
        old = array[slot]
        lifted = _tree.lift(old)
        shortened = (_tree.scalar_like(part, lifted) * lifted).astype(old.dtype)
        old = jnp.where(rejected, shortened, old)
        return array.at[slot].set(jnp.where(stored, new.astype(old.dtype), old))

    def remember(array: Any, u: jax.Array) -> jax.Array:
        return replace(array, u, kept)

    return Memory(
        stored=jnp.asarray(memory.stored) + stored.astype(jnp.int32),
        prev_updates=jax.tree.map(remember, memory.prev_updates, step),
        prev_norms=replace(memory.prev_norms, norm, BACKTRACK),
    )


def _by_age(memory: Memory) -> jax.Array:
    """The slots, that of the newest step first."""
    slots = len(memory.prev_norms)
    return (jnp.asarray(memory.stored) - 1 - jnp.arange(slots, dtype=jnp.int32)) % slots

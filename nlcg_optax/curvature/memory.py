"""The last steps in their slots: which is where, and what replaces which."""

from typing import Any

import jax
import jax.numpy as jnp

from nlcg_optax import _tree, _xla
from nlcg_optax.curvature.state import Memory
from nlcg_optax.curvature.trust import BACKTRACK


def read(memory: Memory, handed_over: jax.Array) -> list[Any]:
    """The last steps, the newest first; after the hand-over, as the slots have them."""
    count = len(memory.prev_norms)
    order = jnp.arange(count, dtype=jnp.int32)
    slots = jnp.where(handed_over, order, _by_age(memory))
    return [
        jax.tree.map(lambda x, i=i: jnp.asarray(x)[i], memory.prev_updates)
        for i in slots
    ]


def stacked(memory: Memory, handed_over: jax.Array, in_slots: bool) -> tuple[Any, Any]:
    """The last steps, stacked, and their order, which is its own inverse.

    Args:
      memory: the memory.
      handed_over: whether NLCG's direction makes the steps.
      in_slots: whether to leave each step in its slot, which saves a copy: the numbers
        that are made of them are to be put in order. Else they come as `read` has them.
    """
    slots = len(memory.prev_norms)
    if in_slots:
        order = jnp.where(
            handed_over, jnp.arange(slots, dtype=jnp.int32), _by_age(memory)
        )
        return jax.tree.map(jnp.asarray, memory.prev_updates), order
    past = read(memory, handed_over)
    return jax.tree.map(lambda *each: jnp.stack(each), *past), jnp.arange(
        slots, dtype=jnp.int32
    )


def write(
    memory: Memory,
    step: Any,
    norm: jax.Array,
    *,
    taken: jax.Array,
    rejected: jax.Array,
    handed_over: jax.Array,
    direction: Any | None,
) -> Memory:
    """The memory after a step.

    Args:
      memory: the one before it.
      step: with its sign turned.
      norm: its length.
      taken: whether it is taken; if not, nothing changes.
      rejected: whether the last step is taken back instead, which shortens it.
      handed_over: whether NLCG's direction makes the steps.
      direction: that direction, which has a slot of its own; None where there is none.
    """
    # A step of length zero, as at the start of a warm-up, is none to remember.
    stored = _xla.flag_once(taken & (handed_over | (norm > 0)))
    held = _xla.flag_once(handed_over & taken)
    newest, slots = _by_age(memory)[0], len(memory.prev_norms)
    slot = jnp.where(taken, jnp.asarray(memory.stored) % slots, newest)

    def replace(array: Any, slot: jax.Array, new: jax.Array) -> jax.Array:
        array = jnp.asarray(array)  # a restored state may be NumPy's
        kept = _tree.lift(array[slot])
        kept = (_tree.scalar_like(part, kept) * kept).astype(array.dtype)
        return array.at[slot].set(jnp.where(stored, new.astype(array.dtype), kept))

    # What a kernel compares in each element is compiled for all its outcomes: once.
    part = _xla.compute_once(jnp.where(rejected, BACKTRACK, 1.0).astype(norm.dtype))
    slot_of_step = jnp.where(handed_over, 0, slot)

    def remember(array: Any, u: jax.Array) -> jax.Array:
        return replace(array, slot_of_step, u)

    def hold(array: jax.Array, d: jax.Array) -> jax.Array:
        new = jnp.where(held, d.astype(array.dtype), array[1])
        return array.at[1].set(new)

    arrays = jax.tree.map(remember, memory.prev_updates, step)
    if direction is not None:
        arrays = jax.tree.map(hold, arrays, direction)
    return Memory(
        stored=jnp.asarray(memory.stored) + stored.astype(jnp.int32),
        prev_updates=arrays,
        prev_norms=replace(memory.prev_norms, slot, norm),
    )


def _by_age(memory: Memory) -> jax.Array:
    """The slots, that of the newest step first."""
    slots = len(memory.prev_norms)
    return (jnp.asarray(memory.stored) - 1 - jnp.arange(slots, dtype=jnp.int32)) % slots

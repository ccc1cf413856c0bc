"""The last steps in their slots: which is where, and what replaces which."""

from typing import Any

import jax
import jax.numpy as jnp

from nlcg_optax import _tree, _xla
from nlcg_optax.curvature.state import Memory
from nlcg_optax.curvature.trust import BACKTRACK


def read(memory: Memory) -> list[Any]:
    """The last steps, the newest first."""
    return [
        jax.tree.map(lambda x, i=i: jnp.asarray(x)[i], memory.prev_updates)
        for i in _by_age(memory)
    ]


def newest(memory: Memory) -> Any:
    """The last step; zero where there was none."""
    slot = _by_age(memory)[0]
    return jax.tree.map(lambda x: jnp.asarray(x)[slot], memory.prev_updates)


def newest_norm(memory: Memory) -> jax.Array:
    """The length of the last step; 0 where there was none."""
    return jnp.asarray(memory.prev_norms)[_by_age(memory)[0]]


def stacked(memory: Memory, in_slots: bool) -> tuple[Any, Any]:
    """The last steps, stacked, and their order, which is its own inverse.

    Args:
      memory: the memory.
      in_slots: whether to leave each step in its slot, which saves a copy: the numbers
        that are made of them are to be put in order. Else they come as `read` has them.
    """
    slots = len(memory.prev_norms)
    if in_slots:
        return jax.tree.map(jnp.asarray, memory.prev_updates), _by_age(memory)
    past = read(memory)
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
    here = jnp.arange(slots, dtype=jnp.int32)
    slot = jnp.asarray(memory.stored) % slots

    # What becomes of each slot, as a sum of products with 0 and 1 over all of them: for
    # a condition XLA's CPU compiler makes a kernel for each outcome, for each shape.
    def once(flags: jax.Array) -> jax.Array:
        return _xla.compute_once(flags.astype(norm.dtype))

    takes_step = stored & (here == slot)
    is_last = rejected & (here == newest)
    part = jnp.where(is_last, kept, 1.0)
    weights = [once(takes_step), once(jnp.where(takes_step, 0, part))]
    norms = jnp.where(is_last, BACKTRACK, 1.0).astype(norm.dtype) * memory.prev_norms
    norms = jnp.where(takes_step, norm, norms)

    def remember(array: Any, new: jax.Array) -> jax.Array:
        array = jnp.asarray(array)  # a restored state may be NumPy's
        old, shape = _tree.lift(array), (slots,) + (1,) * (array.ndim - 1)
        # Where one is not finite its factor is 0, and the product has to be.
        new = _tree.lift(_xla.finite(new).astype(array.dtype))
        taken, left = (_tree.scalar_like(w, old).reshape(shape) for w in weights)
        return (left * old + taken * new[None]).astype(array.dtype)

    return Memory(
        stored=jnp.asarray(memory.stored) + stored.astype(jnp.int32),
        prev_updates=jax.tree.map(remember, memory.prev_updates, step),
        prev_norms=norms,
    )


def replace_newest(memory: Memory, step: Any, taken: jax.Array) -> Memory:
    """The memory with a step in the place of the last one, where it is taken.

    Args:
      memory: the memory.
      step: with its sign turned. Its length is not kept.
      taken: whether it is taken; if not, nothing changes.
    """
    slot = _by_age(memory)[0]

    def replace(array: Any, new: jax.Array) -> jax.Array:
        array = jnp.asarray(array)
        new = jnp.where(taken, new.astype(array.dtype), array[slot])
        return jax.lax.dynamic_update_index_in_dim(array, new, slot, 0)

    updates = jax.tree.map(replace, memory.prev_updates, step)
    return memory._replace(prev_updates=updates)


def _by_age(memory: Memory) -> jax.Array:
    """The slots, that of the newest step first."""
    slots = len(memory.prev_norms)
    return (jnp.asarray(memory.stored) - 1 - jnp.arange(slots, dtype=jnp.int32)) % slots

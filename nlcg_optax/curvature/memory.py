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
    stored = taken & (handed_over | (norm > 0))
    newest, slots = _by_age(memory)[0], len(memory.prev_norms)
    here = jnp.arange(slots, dtype=jnp.int32)
    slot = jnp.asarray(memory.stored) % slots

    # What becomes of each slot, as a sum of products with 0 and 1 over all of them: for
    # a condition XLA's CPU compiler makes a kernel for each outcome, for each shape.
    def once(flags: jax.Array) -> jax.Array:
        return _xla.compute_once(flags.astype(norm.dtype))

    takes_step = stored & (here == jnp.where(handed_over, 0, slot))
    takes_direction = handed_over & taken & (here == 1)
    last = jnp.where(handed_over, 0, newest)
    part = jnp.where(rejected & (here == last), BACKTRACK, 1.0)
    weights = [
        once(takes_step),
        once(takes_direction),
        once(jnp.where(takes_step | takes_direction, 0, part)),
    ]
    takes_norm = stored & (here == slot)
    shortened = jnp.where(rejected & (here == newest), BACKTRACK, 1.0)
    norms = shortened.astype(norm.dtype) * memory.prev_norms
    norms = jnp.where(takes_norm, norm, norms)

    def remember(array: Any, *new: jax.Array) -> jax.Array:
        array = jnp.asarray(array)  # a restored state may be NumPy's
        old, shape = _tree.lift(array), (slots,) + (1,) * (array.ndim - 1)
        # Where one is not finite its factor is 0, and the product has to be.
        others = [_tree.lift(_xla.finite(x).astype(array.dtype)) for x in new]
        rows = [_tree.scalar_like(w, old).reshape(shape) for w in weights]
        total = rows[2] * old
        for row, x in zip(rows[:2], others, strict=False):
            total += row * x
        return total.astype(array.dtype)

    other = () if direction is None else (direction,)
    return Memory(
        stored=jnp.asarray(memory.stored) + stored.astype(jnp.int32),
        prev_updates=jax.tree.map(remember, memory.prev_updates, step, *other),
        prev_norms=norms,
    )


def _by_age(memory: Memory) -> jax.Array:
    """The slots, that of the newest step first."""
    slots = len(memory.prev_norms)
    return (jnp.asarray(memory.stored) - 1 - jnp.arange(slots, dtype=jnp.int32)) % slots

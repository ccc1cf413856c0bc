"""What is kept for matrices, for another number of devices than it was planned for."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nlcg_optax import _check
from nlcg_optax.matrices.devices import lasting, unsplit
from nlcg_optax.matrices.layout import Group
from nlcg_optax.matrices.matrix import Mask
from nlcg_optax.matrices.plan import Share, Work


def for_devices(state: Any, devices: int) -> Any:
    """An optimizer's state as it is on so many devices.

    Of :func:`~nlcg_optax.scale_by_soap` what is kept for matrices is spread over the
    devices that `init` knew of, and so are its shapes. This makes of a state for one
    number of devices that for another: the next update is the same. Other states are
    left as they are. To restore a checkpoint that eight devices wrote on four:

    .. code-block:: python

        like = jax.eval_shape(lambda p: for_devices(tx.init(p), 8), params)
        state = for_devices(checkpointer.restore(folder, like), 4)

    (and ``jax.device_put`` by :func:`state_specs`).

    Args:
      state: the state, or one that contains it.
      devices: how many there are now, at least 1.

    Returns:
      A state of the same kind. Nothing is said of where its arrays are; that is for
      `jax.device_put`, or ``out_shardings`` of a `jit` around this function.

    Raises:
      ValueError: if `devices` is no integer of at least 1.

    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> tx = nlcg_optax.scale_by_soap()
    >>> grads = {f"w{i}": jnp.ones((2, 3)) for i in range(5)}
    >>> state = nlcg_optax.matrices.for_devices(tx.init(grads), 4)
    >>> state.factors["w0"].left.shape  # one stack, for each device to work on
    (5, 1, 1, 2, 2)
    """
    _check.static_counts(devices=(devices, 1))

    def one(node: Any) -> Any:
        return node.for_devices(int(devices)) if _is_planned(node) else node

    return jax.tree.map(one, state, is_leaf=_is_planned)


def _is_planned(node: Any) -> bool:
    return callable(getattr(type(node), "for_devices", None))


def moved(
    work: Work,
    found: Sequence[tuple[Any, Any, Mask]],
    kept: Sequence[Any],
    devices: int,
    mapped: bool,
) -> list[tuple[int, Any]]:
    """What is kept for each share on so many devices; and its first leaf's number.

    Args:
      work: what is done with it.
      found: paths, whole shapes, and masks, which say for how many it was planned.
      kept: what is kept now, in the order in which `devices.create` made it.
      devices: for how many it is to be.
      mapped: whether an axis was named, see `devices.lasting`.
    """
    longs = {
        i: max(m.matrix.sides(m.shape or ())[1:]) for i, (*_, m) in enumerate(found)
    }
    items: dict[int, Any] = {}
    for share, node in zip(lasting(found, work, mapped), kept, strict=True):
        items.update(_apart(share, node, longs))
    there = [(path, x, said.planned_for(devices)) for path, x, said in found]
    return [
        (share.first, _together(share, items, longs, devices))
        for share in lasting(there, work, mapped)
    ]


def _apart(
    share: Share, node: Any, longs: Mapping[int, int]
) -> Iterator[tuple[int, Any]]:
    """What is kept for the matrices of each leaf, [matrices, parts, ...]."""
    wide, slots = share.groups[0].stack.long, share.slots

    def whole(x: jax.Array) -> jax.Array:
        return unsplit(x)[..., :wide] if x.shape[1] > 1 else x

    def stack(i: int, g: Group, x: jax.Array) -> jax.Array:
        return slots.rows_to(slots.pick(x, i), i, g.stack.count)

    def part(g: Group, start: int, count: int, long: int, x: jax.Array) -> jax.Array:
        return _resized(g, x[start : start + count], wide, long)

    if share.how == "split":
        node = jax.tree.map(whole, node)
    for i, g in enumerate(share.groups):
        stacked = jax.tree.map(functools.partial(stack, i, g), node)
        start = 0
        for number, count in g.numbers:
            own = functools.partial(part, g, start, count, longs[number])
            yield number, jax.tree.map(own, stacked)
            start += count


def _together(
    share: Share, items: Mapping[int, Any], longs: Mapping[int, int], devices: int
) -> Any:
    """And back, [rows, devices, parts, ...]."""
    wide, slots = share.groups[0].stack.long, share.slots
    there = devices if share.how == "spread" else 1

    def rows(i: int, *xs: jax.Array) -> jax.Array:
        return slots.rows_from(jnp.concatenate(xs), i, there)

    def split(x: jax.Array) -> jax.Array:
        if x.ndim < 4 or x.shape[-1] != wide:
            return x
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -wide % devices)])
        return jnp.moveaxis(x[:, 0].reshape(*x[:, 0].shape[:-1], devices, -1), -2, 1)

    stacks = []
    for i, g in enumerate(share.groups):
        alike = [
            jax.tree.map(
                functools.partial(_resized, g, long=longs[number], new=wide),
                items[number],
            )
            for number, _ in g.numbers
        ]
        stacks.append(jax.tree.map(functools.partial(rows, i), *alike))
    node = jax.tree.map(lambda *xs: slots.add(jnp.add, xs), *stacks)
    return jax.tree.map(split, node) if share.how == "split" else node


def _resized(g: Group, x: jax.Array, long: int, new: int) -> jax.Array:
    """Arrays of matrices with a longer side of another length."""
    if x.ndim < 3 or x.shape[-1] != long or long == new:
        return x
    return g.resize(x, new, lambda y: y)

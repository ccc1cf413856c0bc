"""How matrices get to the devices that work on them, and back.

Under `jit` by sharding constraints (:class:`Global`), in a `shard_map` by `all_to_all`
(:class:`Mapped`). What they do is the same, and said once (:class:`Exchange`).
"""
# ruff: noqa: D102 - what the methods of both do is said by the first class

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from nlcg_optax import _tree
from nlcg_optax.matrices.layout import Group


class Exchange:
    """Moves stacks of matrices between devices; this one leaves all where it is.

    A stack is [count, ...], or [rows, devices, ...] where each device has a slot of
    each row.
    """

    devices: int

    def scatter(self, rows: jax.Array, group: Group) -> jax.Array:
        """From where a group's leaves are to the slots: matrices are whole there."""
        return rows

    def gather(self, rows: jax.Array, group: Group) -> jax.Array:
        """And back."""
        return rows

    def stay(self, rows: jax.Array) -> jax.Array:
        """What is kept for each slot, which does not move from step to step."""
        return rows

    def whole(self, x: jax.Array, group: Group) -> jax.Array:
        """The stack of a group, whole on every device."""
        return x

    def part(self, x: jax.Array, group: Group) -> jax.Array:
        """And back: this device's part of it."""
        return x

    def split(self, x: jax.Array) -> jax.Array:
        """Matrices with their last axis split over the devices."""
        return x

    def unsplit(self, x: jax.Array, group: Group) -> jax.Array:
        """And back, without what was filled up."""
        return x

    def together(self, x: jax.Array) -> jax.Array:
        """A stack whose first axis stays whole, so that it is moved as one."""
        return x

    def largest(self, x: jax.Array) -> jax.Array:
        """The largest over devices that have parts of a matrix."""
        return x

    def total(self, x: jax.Array) -> jax.Array:
        """The sum over them."""
        return x


class Still(Exchange):
    """Slots of so many devices, wherever they are: nothing is said of what moves."""

    def __init__(self, devices: int):
        self.devices = devices

    def split(self, x: jax.Array) -> jax.Array:
        fill = -x.shape[-1] % self.devices
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, fill)])

    def unsplit(self, x: jax.Array, group: Group) -> jax.Array:
        return x[..., : group.stack.long]


class Global(Still):
    """Exchanges under `jit`, by constraints over a mesh; None for one device."""

    def __init__(self, mesh: Any):
        self.mesh = mesh
        self.axes: tuple[str, ...] = ()
        if mesh is not None:
            kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
            self.axes = tuple(name for name, kind in kinds if kind == AxisType.Auto)
        self.sizes = [mesh.shape[name] for name in self.axes] if mesh else []
        super().__init__(math.prod(self.sizes))

    def scatter(self, rows: jax.Array, group: Group) -> jax.Array:
        if not group.layered:
            # Else the compiler would take the stack apart while it is made.
            rows = self._constrain(rows, None, None, rest=P.UNCONSTRAINED)
        return self.stay(rows)

    def gather(self, rows: jax.Array, group: Group) -> jax.Array:
        rows = self.stay(rows)
        if group.layered:  # the layers of a leaf may well stay where they are
            return rows
        return self._constrain(rows, None, None, rest=P.UNCONSTRAINED)

    def stay(self, rows: jax.Array) -> jax.Array:
        # With an axis for each of the mesh's the compiler moves one after the other.
        x = rows.reshape(rows.shape[0], *self.sizes, *rows.shape[2:])
        x = self._constrain(x, None, *self.axes)
        return x.reshape(rows.shape)

    def whole(self, x: jax.Array, group: Group) -> jax.Array:
        return self._constrain(x)

    def split(self, x: jax.Array) -> jax.Array:
        return self._constrain(super().split(x), *[None] * (x.ndim - 1), self.axes)

    def together(self, x: jax.Array) -> jax.Array:
        return self._constrain(x, None, rest=P.UNCONSTRAINED)

    def total(self, x: jax.Array) -> jax.Array:
        # The compiler adds up (or compares) to have it whole.
        return self._constrain(x)

    largest = total

    def _constrain(self, x: jax.Array, *spec: Any, rest: Any = None) -> jax.Array:
        if self.devices == 1:
            return x
        spec += (rest,) * (x.ndim - len(spec))
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(*spec)))


class Mapped(Exchange):
    """Exchanges inside a `shard_map`, over axes of which some have leaves `sharded`.

    Here a device has [rows, 1, ...] of what is [rows, devices, ...]. To split matrices
    there is nothing to do: nobody asks it but for those that are.
    """

    def __init__(
        self, axes: Sequence[_tree.AxisName], sharded: Sequence[_tree.AxisName]
    ):
        self.axes, self.sharded = tuple(axes), tuple(sharded)
        self.sizes = [jax.lax.axis_size(axis) for axis in self.axes]
        self.devices = math.prod(self.sizes)

    def scatter(self, rows: jax.Array, group: Group) -> jax.Array:
        x = rows.reshape(rows.shape[0], *self.sizes, *rows.shape[2:])
        # The last axis first: where two split one of a matrix's, it is the inner one.
        for i, axis in reversed(list(enumerate(self.axes, start=1))):
            if axis in group.sharded:
                dim = 1 + len(self.axes) + group.sharded[axis]
                x = jax.lax.all_to_all(x, axis, i, dim, tiled=True)
            else:  # every device has all
                index = jax.lax.axis_index(axis)
                x = jax.lax.dynamic_index_in_dim(x, index, i)
        return x.reshape(rows.shape[0], 1, *x.shape[1 + len(self.axes) :])

    def gather(self, rows: jax.Array, group: Group) -> jax.Array:
        x = rows.reshape(rows.shape[0], *[1] * len(self.axes), *rows.shape[2:])
        for i, axis in enumerate(self.axes, start=1):
            if axis in group.sharded:
                dim = 1 + len(self.axes) + group.sharded[axis]
                x = jax.lax.all_to_all(x, axis, dim, i, tiled=True)
            else:
                # The sum, unlike a gather, is known to be the same on all devices.
                shape = (*x.shape[:i], self.sizes[i - 1], *x.shape[i + 1 :])
                axes = tuple(_tree.varying_axes(x))
                zeros = _tree.vary(jnp.zeros(shape, x.dtype), axes)
                index = jax.lax.axis_index(axis)
                x = jax.lax.dynamic_update_index_in_dim(zeros, x, index, i)
                x = jax.lax.psum(x, axis)
        return x.reshape(rows.shape[0], self.devices, *x.shape[1 + len(self.axes) :])

    def whole(self, x: jax.Array, group: Group) -> jax.Array:
        for axis, dim in reversed(group.sharded.items()):
            x = jax.lax.all_gather(x, axis, axis=1 + dim, tiled=True)
        return x

    def part(self, x: jax.Array, group: Group) -> jax.Array:
        for axis, dim in group.sharded.items():
            size = x.shape[1 + dim] // jax.lax.axis_size(axis)
            start = jax.lax.axis_index(axis) * size
            x = jax.lax.dynamic_slice_in_dim(x, start, size, 1 + dim)
        return x

    def largest(self, x: jax.Array) -> jax.Array:
        return jax.lax.pmax(x, self.sharded)

    def total(self, x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, self.sharded)

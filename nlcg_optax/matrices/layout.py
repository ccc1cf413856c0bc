"""Leaves, the stacks of their matrices, and the slots of devices for these."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nlcg_optax import _tree
from nlcg_optax.matrices.matrix import Matrix


class Leaf(NamedTuple):
    """A leaf whose matrices are to be worked on.

    Attributes:
      value: the array.
      matrix: what it is.
      sharded: in a `shard_map`, the axes over which it is sharded, and along which of
        its own each of them goes.
      everywhere: whether it is known to be whole on every device, or not; None where
        only the compiler knows.
    """

    value: jax.Array
    matrix: Matrix
    sharded: Mapping[_tree.AxisName, int] = {}
    everywhere: bool | None = None


@dataclasses.dataclass(frozen=True)
class Stack:
    """How many matrices of one shape there are, and where: what costs are counted by.

    Attributes:
      count: how many.
      small, long: their sides; those of a part, where they are several side by side.
      parts: how many.
      itemsize: bytes of an element.
      sharded: whether they lie split over the devices; None where nobody knows.
      splittable: whether the longer side can be split.
    """

    count: int
    small: int
    long: int
    parts: int = 1
    itemsize: int = 4
    sharded: bool | None = None
    splittable: bool = True

    @property
    def bytes(self) -> int:
        """Bytes of all matrices, zeros among them."""
        return self.count * self.parts * self.small * self.long * self.itemsize


@dataclasses.dataclass(frozen=True)
class Slots:
    """Which slots of the devices the matrices of several stacks have.

    Each device has so many slots; a row is one slot of each. A stack fills some rows
    and, with the rest, part of one that it may share with the rests of other stacks.

    Attributes:
      full: for each stack, the rows that it fills.
      row: for each stack, the number of the shared row with its rest; None for no rest.
      offset: for each stack, the first device of the rest.
      shared: how many rows are shared.
    """

    full: tuple[int, ...]
    row: tuple[int | None, ...]
    offset: tuple[int, ...]
    shared: int

    @classmethod
    def fit(cls, counts: Sequence[int], devices: int) -> "Slots":
        """As few rows as can be, by first fit."""
        rows, offsets = [], []
        used: list[int] = []
        for count in counts:
            rest = count % devices
            row, offset = None, 0
            if rest:
                fits = (i for i, n in enumerate(used) if n + rest <= devices)
                row = next(fits, len(used))
                if row == len(used):
                    used.append(0)
                offset = used[row]
                used[row] += rest
            rows.append(row)
            offsets.append(offset)
        full = tuple(count // devices for count in counts)
        return cls(full, tuple(rows), tuple(offsets), len(used))

    @property
    def rows(self) -> int:
        """Matrices that each device works on."""
        return sum(self.full) + self.shared

    def rows_of(self, i: int) -> int:
        """The rows of which a stack has a part."""
        return self.full[i] + (self.row[i] is not None)

    def rows_from(self, x: jax.Array, i: int, devices: int) -> jax.Array:
        """From the matrices of a stack, [count, ...], to [rows, devices, ...]."""
        full = self.full[i] * devices
        # Neighbours stay together, as layers that are split over devices are.
        rows = x[:full].reshape(devices, self.full[i], *x.shape[1:]).swapaxes(0, 1)
        if self.row[i] is None:
            return rows
        after = devices - self.offset[i] - (x.shape[0] - full)
        fill = [(self.offset[i], after)] + [(0, 0)] * (x.ndim - 1)
        rest = jnp.pad(x[full:], fill)[None]
        return jnp.concatenate([rows, rest]) if full else rest

    def rows_to(self, rows: jax.Array, i: int, count: int) -> jax.Array:
        """And back."""
        full = self.full[i]
        x = rows[:full].swapaxes(0, 1)
        x = x.reshape(full * rows.shape[1], *rows.shape[2:])
        if self.row[i] is None:
            return x
        start = self.offset[i]
        rest = rows[full, start : start + count - x.shape[0]]
        return jnp.concatenate([x, rest]) if full else rest

    def add(self, operation: Callable, stacks: Sequence[jax.Array]) -> jax.Array:
        """One array of all rows, from those of each stack."""
        parts = [x[:n] for x, n in zip(stacks, self.full, strict=True) if n]
        for row in range(self.shared):
            rests = [
                x[n:]
                for x, n, i in zip(stacks, self.full, self.row, strict=True)
                if i == row
            ]
            parts.append(functools.reduce(operation, rests))
        return _concatenate(parts)

    def pick(self, x: jax.Array, i: int) -> jax.Array:
        """The rows of a stack, from an array of all."""
        start, row = sum(self.full[:i]), self.row[i]
        parts = [x[start : start + self.full[i]]] if self.full[i] else []
        if row is not None:
            row += sum(self.full)
            parts.append(x[row : row + 1])
        return _concatenate(parts)


@dataclasses.dataclass(frozen=True)
class Group:
    """Leaves that are stacked, as items: their axes are first the rows, then columns.

    Attributes:
      matrices: what each of the leaves is.
      numbers: which leaves these are, and how many items each has.
      item: shape of an item, as far as this device has it.
      sharded: the mapped axes over which items are sharded, and along which of theirs.
      layered: whether this is one leaf with axes that count matrices.
      wide: whether there are no more rows than columns (in one of the parts).
      stack: to be counted.
      simple: whether a leaf has one axis of rows and one of columns, in this order.
      chunks: shorter matrices are made as long as the others by zeros at the end of
        each of so many parts, which is where devices have theirs.
    """

    matrices: tuple[Matrix, ...]
    numbers: tuple[tuple[int, int], ...]
    item: tuple[int, ...]
    sharded: dict[_tree.AxisName, int]
    layered: bool
    wide: bool
    stack: Stack
    simple: bool
    chunks: int = 1

    @property
    def whole(self) -> tuple[int, ...]:
        """Shape of an item, over all devices."""
        return _whole(self.item, self.sharded)

    def apart(self) -> list["Group"]:
        """A group for each leaf."""
        return [
            dataclasses.replace(
                self,
                matrices=(matrix,),
                numbers=((i, count),),
                stack=dataclasses.replace(self.stack, count=count),
            )
            for (i, count), matrix in zip(self.numbers, self.matrices, strict=True)
        ]

    def items(self, leaves: Sequence[Leaf], together: Callable) -> jax.Array:
        """All items, of shape [count, *item].

        Args:
          leaves: all leaves, some of which are in this group.
          together: see `Exchange.together`.
        """
        # Those of one shape first: a stack may have to be moved to be lengthened.
        stacks: dict[Any, list[jax.Array]] = {}
        for (i, count), matrix in zip(self.numbers, self.matrices, strict=True):
            x = leaves[i].value.transpose(matrix.order)
            x = x.reshape(count, *x.shape[len(matrix.batch) :])
            stacks.setdefault(x.shape[1:], []).append(x)
        whole = (_concatenate(alike) for alike in stacks.values())
        return _concatenate([self._lengthen(x, together) for x in whole])

    def leaves(
        self, items: jax.Array, leaves: Sequence[Leaf], together: Callable
    ) -> Iterator[tuple[int, jax.Array]]:
        """And back: the leaves, with their numbers."""
        start = 0
        members = zip(self.numbers, self.matrices, strict=True)
        for long, alike in itertools.groupby(
            members, lambda m: leaves[m[0][0]].value.shape[m[1].order[-1]]
        ):
            alike = list(alike)
            total = sum(count for (_, count), _ in alike)
            x = self._shorten(items[start : start + total], long, together)
            start, first = start + total, 0
            for (i, count), matrix in alike:
                shape = [leaves[i].value.shape[axis] for axis in matrix.order]
                back = [matrix.order.index(axis) for axis in range(len(shape))]
                one = x[first : first + count]
                yield i, one.reshape(shape).transpose(back)
                first += count

    def _lengthen(self, x: jax.Array, together: Callable) -> jax.Array:
        if x.shape[-1] == self.item[-1]:
            return x
        x = together(x)
        fill = (self.item[-1] - x.shape[-1]) // self.chunks
        x = x.reshape(*x.shape[:-1], self.chunks, -1)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, fill)])
        return together(x.reshape(*x.shape[:-2], -1))

    def _shorten(self, x: jax.Array, long: int, together: Callable) -> jax.Array:
        if x.shape[-1] == long:
            return x
        x = together(x).reshape(*x.shape[:-1], self.chunks, -1)
        x = x[..., : long // self.chunks]
        return together(x.reshape(*x.shape[:-2], -1))

    def to_matrices(self, items: jax.Array) -> jax.Array:
        """Of items [k, d, *item] the matrices [k, d, parts, small side, long side]."""
        shape, parts = items.shape[2:], self.stack.parts
        n = len(self.matrices[0].rows)
        rows, columns = math.prod(shape[:n]), math.prod(shape[n:]) // parts
        x = items.reshape(*items.shape[:2], rows, parts, columns).swapaxes(2, 3)
        return x if self.wide else x.mT

    def from_matrices(self, x: jax.Array, item: Sequence[int]) -> jax.Array:
        """And back."""
        x = (x if self.wide else x.mT).swapaxes(2, 3)
        return x.reshape(*x.shape[:2], *item)


def group(leaves: Sequence[Leaf]) -> list[list[Group]]:
    """Stacks leaves of one shape; lists together those of one small side.

    These can be worked on together. The lists come in the order of that side.
    """
    stacks: dict[Any, list[tuple[int, Matrix, int]]] = {}
    for i, leaf in enumerate(leaves):
        matrix, shape = leaf.matrix, leaf.value.shape
        simple = len(matrix.rows) == len(matrix.columns) == matrix.parts == 1
        _, rows, columns = matrix.sides(_whole(shape, leaf.sharded))
        if simple and rows > columns:
            # Its transpose, which may stand in one stack with others.
            matrix = matrix._replace(rows=matrix.columns, columns=matrix.rows)
        axes = (*matrix.rows, *matrix.columns)
        sharded = tuple(
            (a, axes.index(d)) for a, d in leaf.sharded.items() if d in axes
        )
        layers = tuple(a for a, d in leaf.sharded.items() if d not in axes)
        count = math.prod(shape[axis] for axis in matrix.batch)
        key = (
            (len(matrix.batch), len(matrix.rows), len(matrix.columns), matrix.parts),
            tuple(shape[axis] for axis in axes),
            leaf.value.dtype,
            sharded,
            layers,
            leaf.everywhere,
            i if matrix.batch else None,
        )
        stacks.setdefault(key, []).append((i, matrix, count))
    bundles: dict[Any, list[Group]] = {}
    for key, members in stacks.items():
        (_, n, _, parts), item, dtype, sharded, layers, everywhere, layered = key
        whole = _whole(item, dict(sharded))
        rows, columns = math.prod(whole[:n]), math.prod(whole[n:]) // parts
        wide = rows <= columns
        # Which of an item's axes are of the longer side, and may be split.
        along = range(n, len(item)) if wide else range(n)
        inside = all(dim in along for _, dim in sharded)
        stack = Stack(
            count=sum(count for *_, count in members),
            small=min(rows, columns),
            long=max(rows, columns),
            parts=parts,
            itemsize=dtype.itemsize,
            sharded=None if everywhere is None else not everywhere,
            splittable=inside and (not sharded or parts == 1 or not wide),
        )
        made = Group(
            matrices=tuple(matrix for _, matrix, _ in members),
            numbers=tuple((i, count) for i, _, count in members),
            item=item,
            sharded=dict(sharded),
            layered=layered is not None,
            wide=wide,
            stack=stack,
            simple=len(item) == 2 and parts == 1 and layered is None and inside,
        )
        shared = (stack.small, parts, dtype, frozenset(dict(sharded)), layers)
        bundles.setdefault(shared, []).append(made)
    return [bundles[key] for key in sorted(bundles, key=lambda key: key[0])]


def merge(one: Group, other: Group, devices: int) -> Group | None:
    """One group of both, the shorter matrices filled up with zeros; None if unlike."""
    alike = one.simple and other.simple and one.sharded == other.sharded
    alike &= one.stack.small == other.stack.small
    if not alike or one.stack.sharded != other.stack.sharded:
        return None
    lengths = [one.item[1], other.item[1]]
    chunks = math.gcd(one.chunks, other.chunks)
    if not one.sharded:  # as the compiler may have split it
        chunks = devices if all(n % devices == 0 for n in lengths) else 1
    stacks = one.stack, other.stack
    return dataclasses.replace(
        one,
        matrices=one.matrices + other.matrices,
        numbers=one.numbers + other.numbers,
        item=(one.item[0], max(lengths)),
        stack=dataclasses.replace(
            one.stack,
            count=sum(s.count for s in stacks),
            long=max(s.long for s in stacks),
        ),
        chunks=chunks,
    )


def _concatenate(stacks: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate(stacks) if len(stacks) > 1 else stacks[0]


def _whole(
    shape: Sequence[int], sharded: Mapping[_tree.AxisName, int]
) -> tuple[int, ...]:
    """A shape over all devices, given along which axes it is sharded."""
    sizes = list(shape)
    for axis, dim in sharded.items():
        sizes[dim] *= jax.lax.axis_size(axis)
    return tuple(sizes)

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
    """A leaf whose matrices are to be worked on."""

    value: jax.Array
    matrix: Matrix
    # In a `shard_map`, the axes over which it is sharded, and along which of its own.
    sharded: Mapping[_tree.AxisName, int] = {}
    # Whether it is known to be whole on every device, or not; None where only the
    # compiler knows.
    everywhere: bool | None = None


@dataclasses.dataclass(frozen=True)
class Stack:
    """How many matrices of one shape there are, and where; what costs depend on."""

    count: int
    small: int  # the sides; those of a part, where several are side by side
    long: int
    parts: int = 1
    itemsize: int = 4  # bytes of an element
    sharded: bool | None = None  # over the devices; None where nobody knows
    splittable: bool = True  # along the longer side


@dataclasses.dataclass(frozen=True)
class Slots:
    """Which slots of the devices the matrices of several stacks have.

    Each device has so many slots; a row is one slot of each. A stack fills some rows
    and, with the rest, part of one that it may share with the rests of other stacks.
    """

    full: tuple[int, ...]  # for each stack, the rows that it fills
    row: tuple[int | None, ...]  # the number of the shared row with its rest, if any
    offset: tuple[int, ...]  # the first device of the rest
    shared: int  # how many rows are shared

    @classmethod
    def fit(cls, counts: Sequence[int], devices: int) -> "Slots":
        """As few rows as can be, by first fit."""
        rows, offsets = [], []
        used = [0] * len(counts)
        for count in counts:
            rest = count % devices
            row, offset = None, 0
            if rest:
                row = next(i for i, n in enumerate(used) if n + rest <= devices)
                offset = used[row]
                used[row] += rest
            rows.append(row)
            offsets.append(offset)
        full = tuple(count // devices for count in counts)
        return cls(full, tuple(rows), tuple(offsets), sum(n > 0 for n in used))

    @property
    def rows(self) -> int:
        """Matrices that each device works on."""
        return sum(self.full) + self.shared

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
            members = zip(stacks, self.full, self.row, strict=True)
            rests = [x[n:] for x, n, i in members if i == row]
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
    """Leaves that are stacked, as items: axes are first those of rows, then columns."""

    matrices: tuple[Matrix, ...]  # what each of the leaves is
    numbers: tuple[tuple[int, int], ...]  # which leaves, and how many items each has
    item: tuple[int, ...]  # shape of an item, as far as this device has it
    # The mapped axes over which items are sharded, and along which of theirs.
    sharded: dict[_tree.AxisName, int]
    layered: bool  # one leaf, with axes that count matrices
    wide: bool  # no more rows than columns, in one of the parts
    stack: Stack
    simple: bool  # a leaf has one axis of rows and one of columns, in this order
    # Shorter matrices are made as long as the others by zeros at the end of each of so
    # many parts, which is where devices have theirs.
    chunks: int = 1

    @property
    def whole(self) -> tuple[int, ...]:
        """Shape of an item, over all devices."""
        return _whole(self.item, self.sharded)

    def apart(self) -> list["Group"]:
        """A group for each leaf."""
        found = []
        for number, matrix in zip(self.numbers, self.matrices, strict=True):
            stack = dataclasses.replace(self.stack, count=number[1])
            one = {"numbers": (number,), "matrices": (matrix,), "stack": stack}
            found.append(dataclasses.replace(self, **one))
        return found

    def items(self, leaves: Sequence[Leaf], together: Callable) -> jax.Array:
        """All items, of shape [count, *item]; `together` is an exchange's."""
        # Those of one shape first: a stack may have to be moved to be lengthened.
        stacks: dict[Any, list[jax.Array]] = {}
        for (i, count), matrix in zip(self.numbers, self.matrices, strict=True):
            x = leaves[i].value.transpose(matrix.order)
            x = x.reshape(count, *x.shape[len(matrix.batch) :])
            stacks.setdefault(x.shape[1:], []).append(x)
        whole = (_concatenate(alike) for alike in stacks.values())
        return _concatenate([self.resize(x, self.item[-1], together) for x in whole])

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
            x = self.resize(items[start : start + total], long, together)
            start, first = start + total, 0
            for (i, count), matrix in alike:
                shape = [leaves[i].value.shape[axis] for axis in matrix.order]
                back = [matrix.order.index(axis) for axis in range(len(shape))]
                one = x[first : first + count]
                yield i, one.reshape(shape).transpose(back)
                first += count

    def resize(self, x: jax.Array, long: int, together: Callable) -> jax.Array:
        """Makes each of the chunks longer by zeros, or shorter."""
        if x.shape[-1] == long:
            return x
        x = together(x).reshape(*x.shape[:-1], self.chunks, -1)
        more = long // self.chunks - x.shape[-1]
        if more < 0:
            x = x[..., :more]
        else:
            x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)])
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
        (_, n, _, parts), item, dtype, by_axis, layers, everywhere, layered = key
        sharded = dict(by_axis)
        whole = _whole(item, sharded)
        rows, columns = math.prod(whole[:n]), math.prod(whole[n:]) // parts
        wide = rows <= columns
        # Which of an item's axes are of the longer side, and may be split.
        along = range(n, len(item)) if wide else range(n)
        inside = all(dim in along for dim in sharded.values())
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
            sharded=sharded,
            layered=layered is not None,
            wide=wide,
            stack=stack,
            simple=len(item) == 2 and parts == 1 and layered is None and inside,
        )
        together = stack.small, parts, dtype, frozenset(sharded), layers
        bundles.setdefault(together, []).append(made)
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
    count = one.stack.count + other.stack.count
    long = max(one.stack.long, other.stack.long)
    return dataclasses.replace(
        one,
        matrices=one.matrices + other.matrices,
        numbers=one.numbers + other.numbers,
        item=(one.item[0], max(lengths)),
        stack=dataclasses.replace(one.stack, count=count, long=long),
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

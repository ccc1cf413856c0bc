"""Which device orthogonalizes which matrix, by counting, and how it gets there.

Matrices of one shape are stacked. A stack is worked on

- by **each** device as a whole (a little work, that is not worth a message);
- **spread**: each matrix by one device, to which it is sent, and from which it comes
  back, in one exchange of the whole stack;
- or **split**: all devices have their part of the longer side of each matrix, and add
  up its Gram matrix: for few, long ones.

The iteration works on Gram matrices, so stacks whose matrices have one small side share
it, each device being given as many of their matrices as any other, or one less. Where
it pays, stacks of nearly one small side do, the smaller Gram matrices being filled up.

Under `jit` the exchange is a sharding constraint (:class:`Global`), in a `shard_map` it
is an `all_to_all` (:class:`Mapped`).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from nlcg_optax import _tree
from nlcg_optax.matrices import newton_schulz
from nlcg_optax.matrices.newton_schulz import Method

# What a device could compute while it sends a byte, and while it waits for a collective
# that sends next to nothing: round numbers for chips of today (docs/scaling.md) and
# float32 at the highest precision. Only the choice between placements depends on them.
OPERATIONS_PER_BYTE = 200
OPERATIONS_PER_COLLECTIVE = 1e9
# Larger sides than so many times another do not share its iteration.
NEARLY = 1.25

How = Literal["each", "spread", "split"]


@dataclasses.dataclass(frozen=True)
class Stack:
    """Matrices of one shape, to be counted.

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
    """Where the matrices of several stacks are.

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


def choose(
    stacks: Sequence[Stack], devices: int, method: Method, copies: int = 1
) -> tuple[float, list[How]]:
    """How to work on each of the stacks that share an iteration, and what it costs.

    Args:
      stacks: the stacks.
      devices: over how many devices they may be spread or split.
      method: the iteration.
      copies: on how many of them there is a copy of each element.

    Returns:
      The operations of a device, messages counted as operations; and how.
    """

    def cost(how: Sequence[How]) -> float:
        return _cost(stacks, how, devices, method, copies)

    found: list[list[How]] = []
    starts: list[How] = ["each"] if devices == 1 else ["each", "spread"]
    for start in starts:
        how: list[How] = [start] * len(stacks)
        for i in [*range(len(stacks))] * (2 if devices > 1 else 0):
            options: list[How] = ["each", "spread"]
            if stacks[i].splittable:
                options.append("split")
            changed = [[*how[:i], option, *how[i + 1 :]] for option in options]
            how = min(changed, key=cost)
        found.append(how)
    best = min(found, key=cost)
    return cost(best), best


def _cost(
    stacks: Sequence[Stack],
    how: Sequence[How],
    devices: int,
    method: Method,
    copies: int,
) -> float:
    spread = [i for i, choice in enumerate(how) if choice == "spread"]
    placed = Slots.fit([stacks[i].count for i in spread], devices)
    # Of those that are worked on together the Gram matrices are of one size.
    sides: dict[How, int] = {}
    numbers: dict[How, int] = {}
    for stack, choice in zip(stacks, how, strict=True):
        sides[choice] = max(stack.small, sides.get(choice, 0))
        number = stack.count * stack.parts
        numbers[choice] = number + numbers.get(choice, 0)
    total = 0.0
    for i, (stack, choice) in enumerate(zip(stacks, how, strict=True)):
        side, stacked = sides[choice], choice == "spread" or numbers[choice] > 1
        iterating, _ = newton_schulz.operations(side, side, method, stacked=stacked)
        _, outside = newton_schulz.operations(
            stack.small, stack.long, method, stacked=stacked
        )
        matrices = stack.count * stack.parts
        size = stack.bytes
        sent, messages = 0.0, 0
        if choice == "each":
            total += matrices * (iterating + outside)
            if stack.sharded:
                sent, messages = size, 1
        elif choice == "split":
            total += matrices * (iterating + outside / devices)
            sent = 2 * matrices * stack.small**2 * stack.itemsize
            sent += 0 if stack.sharded else size
            messages = 1 if stack.sharded else 2
        else:
            rows = placed.rows_of(spread.index(i))
            if i == spread[0]:
                total += placed.rows * stack.parts * iterating
            total += rows * stack.parts * outside
            # Replicated matrices are gathered with the slots that nothing is in. Where
            # nobody knows they may be, and if not, they are sent for less.
            sent, messages = size * rows * devices / stack.count, 1
            if stack.sharded:
                sent, messages = 2 * size * rows / stack.count, 2
                if copies > 1:
                    sent, messages = sent + 2 * size * copies / devices, 3
        total += OPERATIONS_PER_BYTE * sent + OPERATIONS_PER_COLLECTIVE * messages
    return total


class Matrix(NamedTuple):
    """How the axes of a leaf make it a matrix, or several.

    Attributes:
      rows: the axes that, together, count rows.
      columns: the axes that, together, count columns.
      batch: the axes that count matrices: layers of a scan, experts.
      parts: how many matrices are side by side along the columns, as in a kernel that
        makes queries, keys and values at once; each is orthogonalized by itself.

    A kernel of shape [layers, inputs, 3 · outputs]:

    >>> import nlcg_optax
    >>> nlcg_optax.Matrix(rows=(1,), columns=(2,), batch=(0,), parts=3)
    Matrix(rows=(1,), columns=(2,), batch=(0,), parts=3)
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    batch: tuple[int, ...] = ()
    parts: int = 1

    @property
    def order(self) -> tuple[int, ...]:
        """All axes, in the order in which matrices are stacked."""
        return (*self.batch, *self.rows, *self.columns)


class Leaf(NamedTuple):
    """A leaf that is to be orthogonalized.

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

    def items(self, leaves: Sequence[Leaf], place: Any) -> jax.Array:
        """All items, of shape [count, *item]."""
        # Those of one shape first: a stack may have to be moved to be lengthened.
        stacks: dict[Any, list[jax.Array]] = {}
        for (i, count), matrix in zip(self.numbers, self.matrices, strict=True):
            x = leaves[i].value.transpose(matrix.order)
            x = x.reshape(count, *x.shape[len(matrix.batch) :])
            stacks.setdefault(x.shape[1:], []).append(x)
        whole = (_concatenate(alike) for alike in stacks.values())
        return _concatenate([self._lengthen(x, place) for x in whole])

    def leaves(
        self, items: jax.Array, leaves: Sequence[Leaf], place: Any
    ) -> list[jax.Array]:
        """The leaves again, scaled."""
        result, start = [], 0
        members = zip(self.numbers, self.matrices, strict=True)
        for long, alike in itertools.groupby(
            members, lambda m: leaves[m[0][0]].value.shape[m[1].order[-1]]
        ):
            alike = list(alike)
            total = sum(count for (_, count), _ in alike)
            x = self._shorten(items[start : start + total], long, place)
            scale = 0.2 * math.sqrt(self.stack.long * long // self.item[-1])
            if not self.simple:
                scale = 0.2 * math.sqrt(self.stack.long)
            x, start, first = scale * x, start + total, 0
            for (i, count), matrix in alike:
                shape = [leaves[i].value.shape[axis] for axis in matrix.order]
                back = [matrix.order.index(axis) for axis in range(len(shape))]
                one = x[first : first + count]
                result.append(one.reshape(shape).transpose(back))
                first += count
        return result

    def _lengthen(self, x: jax.Array, place: Any) -> jax.Array:
        if x.shape[-1] == self.item[-1]:
            return x
        x = place.together(x)
        fill = (self.item[-1] - x.shape[-1]) // self.chunks
        x = x.reshape(*x.shape[:-1], self.chunks, -1)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, fill)])
        return place.together(x.reshape(*x.shape[:-2], -1))

    def _shorten(self, x: jax.Array, long: int, place: Any) -> jax.Array:
        if x.shape[-1] == long:
            return x
        x = place.together(x).reshape(*x.shape[:-1], self.chunks, -1)
        x = x[..., : long // self.chunks]
        return place.together(x.reshape(*x.shape[:-2], -1))

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
    """Stacks leaves of one shape; lists together what shares an iteration.

    These have one small side, and come in the order of it.
    """
    stacks: dict[Any, list[tuple[int, Matrix, int]]] = {}
    for i, leaf in enumerate(leaves):
        matrix, shape = leaf.matrix, leaf.value.shape
        simple = len(matrix.rows) == len(matrix.columns) == matrix.parts == 1
        if simple and _whole(leaf, matrix.rows[0]) > _whole(leaf, matrix.columns[0]):
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
        whole = list(item)
        for axis, dim in sharded:
            whole[dim] *= jax.lax.axis_size(axis)
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


def join(
    bundles: Sequence[list[Group]], leaves: Sequence[Leaf], cost: Callable
) -> list[list[Group]]:
    """Puts bundles of nearly one small side together, where that costs less.

    Args:
      bundles: in the order of their small sides.
      leaves: of which they are.
      cost: from a bundle to what it costs.
    """

    def kind(bundle: list[Group]) -> tuple:
        first = bundle[0]
        dtype = leaves[first.numbers[0][0]].value.dtype
        return first.stack.parts, dtype, first.sharded, first.layered

    def pays(one: list[Group], other: list[Group]) -> bool:
        near = other[0].stack.small < NEARLY * one[0].stack.small
        return near and cost([*one, *other]) < cost(one) + cost(other)

    joined: list[list[Group]] = []
    for bundle in bundles:
        last = next((b for b in reversed(joined) if kind(b) == kind(bundle)), None)
        if last is not None and pays(last, bundle):
            last.extend(bundle)
        else:
            joined.append(list(bundle))
    return joined


def _concatenate(stacks: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate(stacks) if len(stacks) > 1 else stacks[0]


def _whole(leaf: Leaf, dim: int) -> int:
    """The length of an axis, over all devices."""
    sizes = [jax.lax.axis_size(a) for a, d in leaf.sharded.items() if d == dim]
    return leaf.value.shape[dim] * math.prod(sizes)


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


def orthogonalize(
    leaves: Sequence[Leaf],
    method: Method,
    mesh: Any = None,
    axes: Sequence[_tree.AxisName] = (),
) -> list[jax.Array]:
    """0.2 √max(m, n) times the polar factors of all matrices of some leaves.

    Args:
      leaves: the leaves, in the dtype of the arithmetic.
      method: the iteration.
      mesh: the mesh over whose automatic axes to place the work; None for none.
      axes: the mapped axes (of size 2 and more) over which to.

    Returns:
      Arrays of the shapes of the leaves.
    """
    results: list[Any] = [None] * len(leaves)
    bundles = group(leaves)
    if mesh is not None and not axes:
        devices = Global(mesh).devices
        bundles = join(bundles, leaves, lambda b: _plan(b, devices, method)[0])
    for bundle in bundles:
        place, bundle, how = _place(bundle, leaves, method, mesh, axes)
        for choice in ("each", "spread", "split"):
            groups = [g for g, h in zip(bundle, how, strict=True) if h == choice]
            together = [groups] if groups else []
            if place.devices == 1:
                # Nothing travels; and XLA for CPUs is slow at stacks of products.
                together = [[one] for g in groups for one in g.apart()]
            for groups in together:
                made = _work(choice, groups, leaves, method, place)
                for g, items in zip(groups, made, strict=True):
                    arrays = g.leaves(items, leaves, place)
                    for (i, _), x in zip(g.numbers, arrays, strict=True):
                        results[i] = x
    return results


def _place(
    bundle: list[Group],
    leaves: Sequence[Leaf],
    method: Method,
    mesh: Any,
    axes: Sequence[_tree.AxisName],
) -> tuple[Any, list[Group], list[How]]:
    """Over which devices to place a bundle, in which groups, and how each of them."""
    if not axes:
        place = Global(mesh)
        _, groups, how = _plan(bundle, place.devices, method)
        return place, groups, how
    bundle = [
        dataclasses.replace(
            g,
            stack=dataclasses.replace(
                g.stack, splittable=g.stack.splittable and bool(g.sharded)
            ),
        )
        for g in bundle
    ]
    # Along an axis that splits the layers, each device has matrices of its own.
    leaf = leaves[bundle[0].numbers[0][0]]
    layers = {a for a, d in leaf.sharded.items() if d in leaf.matrix.batch}
    sharded = [a for a in axes if a in bundle[0].sharded]
    least = Mapped(sharded, sharded)
    most = Mapped([a for a in axes if a not in layers], sharded)
    few = _plan(bundle, least.devices, method)
    many = _plan(bundle, most.devices, method, most.devices // least.devices)
    return (most, *many[1:]) if many[0] < few[0] else (least, *few[1:])


def _plan(
    bundle: list[Group], devices: int, method: Method, copies: int = 1
) -> tuple[float, list[Group], list[How]]:
    """What the best that was found costs, its groups, and how to work on each."""
    groups = sorted(bundle, key=lambda g: (g.stack.small, g.stack.long))
    cost, how = choose([g.stack for g in groups], devices, method, copies)
    if devices == 1:
        return cost, groups, how
    while True:
        found = []
        for i, pair in enumerate(itertools.pairwise(groups)):
            if (merged := merge(*pair, devices)) is not None:
                changed = [*groups[:i], merged, *groups[i + 2 :]]
                stacks = [g.stack for g in changed]
                found.append((*choose(stacks, devices, method, copies), changed))
        best = min(found, key=lambda plan: plan[0], default=None)
        if best is None or best[0] >= cost:
            return cost, groups, how
        cost, how, groups = best


def _work(
    choice: How, groups: Sequence[Group], leaves: Sequence[Leaf], method: Method, place
) -> list[jax.Array]:
    """The polar factors of all items of some groups, of shape [count, *item]."""
    items = [g.items(leaves, place) for g in groups]
    if choice == "spread":
        slots = Slots.fit([g.stack.count for g in groups], place.devices)
        items = [
            place.spread(slots.rows_from(x, i, place.devices), g)
            for i, (g, x) in enumerate(zip(groups, items, strict=True))
        ]
    else:
        slots = Slots.fit([g.stack.count for g in groups], 1)
        if choice == "each":
            items = [place.whole(x, g) for g, x in zip(groups, items, strict=True)]
        items = [x[:, None] for x in items]
    xs = [g.to_matrices(x) for g, x in zip(groups, items, strict=True)]
    reductions = {}
    if choice == "split":
        xs = [place.split(x) for x in xs]
        reductions = {"largest": place.largest, "total": place.total}
    if len(xs) == 1 and math.prod(xs[0].shape[:3]) == 1:
        shape = xs[0].shape
        xs = [xs[0].reshape(shape[3:])]
        ys = newton_schulz.polar_factors(xs, method, **reductions)
        ys = [ys[0].reshape(shape)]
    else:
        ys = newton_schulz.polar_factors(
            xs, method, add=slots.add, pick=slots.pick, **reductions
        )
    results = []
    for i, (g, x, y) in enumerate(zip(groups, items, ys, strict=True)):
        if choice == "split":
            y = place.unsplit(y, g)
        y = g.from_matrices(y, x.shape[2:])
        if choice == "spread":
            y = slots.rows_to(place.unspread(y, g), i, g.stack.count)
        else:
            y = y[:, 0]
            y = place.unwhole(y, g) if choice == "each" else y
        results.append(y)
    return results


class Global:
    """Exchanges under `jit`, by sharding constraints.

    Args:
      mesh: the mesh; None for one device.
    """

    def __init__(self, mesh: Any):
        self.mesh = mesh
        self.axes: tuple[str, ...] = ()
        if mesh is not None:
            kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
            self.axes = tuple(name for name, kind in kinds if kind == AxisType.Auto)
        self.sizes = [mesh.shape[name] for name in self.axes] if mesh else []
        self.devices = math.prod(self.sizes)

    def spread(self, rows: jax.Array, group: Group) -> jax.Array:
        """Puts axis 1 of [rows, devices, ...] over the devices."""
        if not group.layered:
            # Else the compiler would take the stack apart while it is made.
            rows = self._constrain(rows, None, None, *self._anywhere(rows, 2))
        return self._to_devices(rows)

    def unspread(self, rows: jax.Array, group: Group) -> jax.Array:
        """And back to where the compiler finds best, but for the first two axes."""
        rows = self._to_devices(rows)
        if group.layered:  # the layers of a leaf may well stay where they are
            return rows
        return self._constrain(rows, None, None, *self._anywhere(rows, 2))

    def _to_devices(self, rows: jax.Array) -> jax.Array:
        # With an axis for each of the mesh's the compiler moves one after the other.
        x = rows.reshape(rows.shape[0], *self.sizes, *rows.shape[2:])
        x = self._constrain(x, None, *self.axes, *[None] * (rows.ndim - 2))
        return x.reshape(rows.shape)

    def _anywhere(self, x: jax.Array, start: int) -> list[Any]:
        return [P.UNCONSTRAINED] * (x.ndim - start)

    def together(self, x: jax.Array) -> jax.Array:
        """A stack whose first axis stays whole, so that it is moved as one."""
        return self._constrain(x, None, *self._anywhere(x, 1))

    def whole(self, x: jax.Array, group: Group) -> jax.Array:
        """The stack, whole on every device."""
        del group
        return self._constrain(x, *[None] * x.ndim)

    def unwhole(self, x: jax.Array, group: Group) -> jax.Array:
        """This device's part of the stack."""
        del group
        return x

    def split(self, x: jax.Array) -> jax.Array:
        """Matrices with their last axis over the devices, filled up with zeros."""
        fill = -x.shape[-1] % self.devices
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, fill)])
        return self._constrain(x, *[None] * (x.ndim - 1), self.axes)

    def unsplit(self, x: jax.Array, group: Group) -> jax.Array:
        """Without the zeros."""
        return x[..., : group.stack.long]

    def replicate(self, x: jax.Array) -> jax.Array:
        """The sum (or largest) over devices, which the compiler adds to this."""
        return self._constrain(x, *[None] * x.ndim)

    largest = total = replicate

    def _constrain(self, x: jax.Array, *spec: Any) -> jax.Array:
        if self.devices == 1:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(*spec)))


class Mapped:
    """Exchanges inside a `shard_map`, of leaves sharded over its axes.

    Args:
      axes: the mapped axes over which to spread.
      sharded: those along which the leaves are sharded.
    """

    def __init__(
        self, axes: Sequence[_tree.AxisName], sharded: Sequence[_tree.AxisName]
    ):
        self.axes, self.sharded = tuple(axes), tuple(sharded)
        self.sizes = [jax.lax.axis_size(axis) for axis in self.axes]
        self.devices = math.prod(self.sizes)

    def spread(self, rows: jax.Array, group: Group) -> jax.Array:
        """From [rows, devices, ...] to the [rows, 1, ...] of this device, whole."""
        x = rows.reshape(rows.shape[0], *self.sizes, *rows.shape[2:])
        for i, axis in enumerate(self.axes, start=1):
            if axis in group.sharded:
                dim = 1 + len(self.axes) + group.sharded[axis]
                x = jax.lax.all_to_all(x, axis, i, dim, tiled=True)
            else:  # every device has all
                index = jax.lax.axis_index(axis)
                x = jax.lax.dynamic_index_in_dim(x, index, i)
        return x.reshape(rows.shape[0], 1, *x.shape[1 + len(self.axes) :])

    def unspread(self, rows: jax.Array, group: Group) -> jax.Array:
        """And back."""
        ones = [1] * len(self.axes)
        x = rows.reshape(rows.shape[0], *ones, *rows.shape[2:])
        for i, axis in reversed(list(enumerate(self.axes, start=1))):
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

    def together(self, x: jax.Array) -> jax.Array:
        """As for `Global`."""
        return x

    def whole(self, x: jax.Array, group: Group) -> jax.Array:
        """The stack, whole on every device."""
        for axis, dim in group.sharded.items():
            x = jax.lax.all_gather(x, axis, axis=1 + dim, tiled=True)
        return x

    def unwhole(self, x: jax.Array, group: Group) -> jax.Array:
        """This device's part of the stack."""
        for axis, dim in reversed(group.sharded.items()):
            size = x.shape[1 + dim] // jax.lax.axis_size(axis)
            start = jax.lax.axis_index(axis) * size
            x = jax.lax.dynamic_slice_in_dim(x, start, size, 1 + dim)
        return x

    def split(self, x: jax.Array) -> jax.Array:
        """Matrices whose last axis is over the devices already."""
        return x

    def unsplit(self, x: jax.Array, group: Group) -> jax.Array:
        """This device's part of the matrices."""
        del group
        return x

    def largest(self, x: jax.Array) -> jax.Array:
        """The largest over all devices."""
        return jax.lax.pmax(x, self.sharded)

    def total(self, x: jax.Array) -> jax.Array:
        """The sum over all devices."""
        return jax.lax.psum(x, self.sharded)

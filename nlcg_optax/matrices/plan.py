"""Which device works on which matrix, by counting.

Matrices of one shape are stacked. A stack is worked on

- by **each** device as a whole (a little work, that is not worth a message);
- **spread**: each matrix by one device, to which it is sent, and from which it comes
  back, in one exchange of the whole stack;
- or **split**: all devices have their part of the longer side of each matrix, and add
  up what they need of the whole: for few, long ones.

What is done with the matrices is handed in, as a :class:`Work`. Stacks whose matrices
have one small side are worked on together, each device being given as many of their
matrices as any other, or one less. Where it pays, stacks of nearly one small side are,
too: as if what is as small as that side were all of one size.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax

from nlcg_optax import _tree
from nlcg_optax.matrices.exchange import Exchange, Global, Mapped, Still
from nlcg_optax.matrices.layout import Group, Leaf, Slots, Stack, group, merge

# What a device could compute while it sends a byte, and while it waits for a collective
# that sends next to nothing: round numbers for chips of today (docs/scaling.md) and
# float32 at the highest precision. Only the choice between placements depends on them.
OPERATIONS_PER_BYTE = 200
OPERATIONS_PER_COLLECTIVE = 1e9
# Larger sides than so many times another are not worked on together.
NEARLY = 1.25

How = Literal["each", "spread", "split"]


@dataclasses.dataclass(frozen=True)
class Work:
    """What is to be done with matrices, and what it costs.

    Attributes:
      function: from stacks of matrices [rows, devices, parts, small side, long side],
        the :class:`Share` that they are, what is kept for it, and what is `given`, to
        stacks of the same shapes and what is kept then.
      operations: from the small side of a matrix, the long one, and whether it is one
        of several, to the operations on what is as small as the small side, and to
        those on the matrix itself.
      ways: those that are allowed, ``"each"`` or ``"spread"`` among them. Work that
        needs whole matrices leaves out ``"split"``.
      splits: whether a stack may be split, where some may.
      ragged: whether, in work that keeps something, columns of zeros do no harm to it.
      given: arrays that the function reads beside, the same on all devices.
    """

    function: Callable[
        [list[jax.Array], "Share", Any, Any], tuple[list[jax.Array], Any]
    ]
    operations: Callable[[int, int, bool], tuple[float, float]]
    ways: tuple[How, ...] = ("each", "spread", "split")
    splits: Callable[[Stack], bool] = lambda stack: stack.splittable
    ragged: Callable[[Stack], bool] = lambda stack: False
    given: Any = None


@dataclasses.dataclass(frozen=True)
class Share:
    """Groups of matrices that are worked on together: how, and how they travel."""

    how: How
    groups: tuple[Group, ...]
    exchange: Exchange

    @property
    def slots(self) -> Slots:
        """Which matrices are where: `add` makes one stack of them, `pick` undoes it."""
        devices = self.exchange.devices if self.how == "spread" else 1
        return Slots.fit([g.stack.count for g in self.groups], devices)

    @property
    def first(self) -> int:
        """The number of the first of its leaves."""
        return self.groups[0].numbers[0][0]

    def scatter_group(self, i: int, leaves: Sequence[Leaf]) -> jax.Array:
        """Of a group [rows, devices, parts, small side, long side], to work on."""
        g = self.groups[i]
        x = g.items(leaves, self.exchange.together)
        if self.how == "spread":
            rows = self.slots.rows_from(x, i, self.exchange.devices)
            x = self.exchange.scatter(rows, g)
        else:
            x = (self.exchange.whole(x, g) if self.how == "each" else x)[:, None]
        x = g.to_matrices(x)
        return self.exchange.split(x) if self.how == "split" else x

    def gather_group(
        self, i: int, y: jax.Array, leaves: Sequence[Leaf]
    ) -> Iterator[tuple[int, jax.Array]]:
        """And back: its leaves, with their numbers."""
        g = self.groups[i]
        if self.how == "split":
            y = g.from_matrices(self.exchange.unsplit(y, g), g.item)[:, 0]
        elif self.how == "spread":
            rows = self.exchange.gather(g.from_matrices(y, g.whole), g)
            y = self.slots.rows_to(rows, i, g.stack.count)
        else:
            y = self.exchange.part(g.from_matrices(y, g.whole)[:, 0], g)
        yield from g.leaves(y, leaves, self.exchange.together)

    def largest(self, x: jax.Array) -> jax.Array:
        """The largest over devices, if they have parts of each matrix."""
        return self.exchange.largest(x) if self.how == "split" else x

    def total(self, x: jax.Array) -> jax.Array:
        """The sum over devices, if they have parts of each matrix."""
        return self.exchange.total(x) if self.how == "split" else x


def shares(
    leaves: Sequence[Leaf], work: Work, mesh: Any, axes: Sequence[_tree.AxisName]
) -> list[Share]:
    """Shares the work on leaves, or their shapes, out as it takes least time.

    Over the automatic axes of a mesh, if any, or mapped axes of size 2 and more.
    """
    bundles = group(leaves)
    if mesh is not None and not axes:
        devices = Global(mesh).devices
        bundles = join(bundles, leaves, lambda b: divide(b, devices, work)[0])
    found = []
    for bundle in bundles:
        exchange, groups, how = _with_exchange(bundle, leaves, work, mesh, axes)
        for choice in ("each", "spread", "split"):
            chosen = [g for g, h in zip(groups, how, strict=True) if h == choice]
            together = [chosen] if chosen else []
            if exchange.devices == 1:
                # Nothing travels; and XLA for CPUs is slow at stacks of products.
                together = [[one] for g in chosen for one in g.apart()]
            found += [Share(choice, tuple(groups), exchange) for groups in together]
    return found


def lasting(shapes: Sequence[Leaf], work: Work, devices: int) -> list[Share]:
    """Shares out work that keeps something for each matrix, from step to step.

    That has to be known before the first step, and must not depend on where leaves are
    then: the plan follows from whole shapes and the number of devices alone. Matrices
    of one shape are together, and, where it pays, filled up with zeros, those of one
    small side if the work is `ragged`; but those of a leaf with axes that count
    matrices alone. The shares come in the order of their first leaves, and have no
    exchange yet.
    """
    sets: dict[Any, list[Group]] = {}
    for one in itertools.chain(*group(shapes)):
        long = 0 if work.ragged(one.stack) else one.stack.long
        dtype = shapes[one.numbers[0][0]].value.dtype
        alone = one.numbers if one.layered else None
        key = (one.stack.small, long, one.stack.parts, dtype, alone)
        sets.setdefault(key, []).append(one)
    found, nowhere = [], Still(devices)
    for groups in sets.values():
        if devices == 1:
            found += [Share("each", (o,), nowhere) for g in groups for o in g.apart()]
            continue
        _, groups, how = divide(groups, devices, work)
        alike: dict[Any, list[Group]] = {}
        for one, choice in zip(groups, how, strict=True):
            alike.setdefault((choice, one.stack.long), []).append(one)
        found += [Share(k[0], tuple(some), nowhere) for k, some in alike.items()]
    return sorted(found, key=lambda share: share.first)


def divide(
    bundle: list[Group], devices: int, work: Work, copies: int = 1
) -> tuple[float, list[Group], list[How]]:
    """What the best that was found costs, its groups, and how to work on each."""
    groups = sorted(bundle, key=lambda g: (g.stack.small, g.stack.long))
    cost, how = choose([g.stack for g in groups], devices, work, copies)
    if devices == 1:
        return cost, groups, how
    while True:
        found = []
        for i, pair in enumerate(itertools.pairwise(groups)):
            if (merged := merge(*pair, devices)) is not None:
                changed = [*groups[:i], merged, *groups[i + 2 :]]
                stacks = [g.stack for g in changed]
                found.append((*choose(stacks, devices, work, copies), changed))
        best = min(found, key=lambda plan: plan[0], default=None)
        if best is None or best[0] >= cost:
            return cost, groups, how
        cost, how, groups = best


def choose(
    stacks: Sequence[Stack], devices: int, work: Work, copies: int = 1
) -> tuple[float, list[How]]:
    """How to work on each of some stacks that may be together, and what it costs.

    The cost is in operations of a device, messages counted as operations. On `copies`
    of the devices there is a copy of each element.
    """

    def cost(how: Sequence[How]) -> float:
        return _cost(stacks, how, devices, work, copies)

    starts: list[How] = [way for way in work.ways if way != "split"]
    if devices == 1:
        starts = ["each"]
    found = []
    for start in starts:
        how: list[How] = [start] * len(stacks)
        for i in [*range(len(stacks))] * (2 if devices > 1 else 0):
            changed = [
                [*how[:i], way, *how[i + 1 :]]
                for way in work.ways
                if way != "split" or work.splits(stacks[i])
            ]
            how = min(changed, key=cost)
        found.append(how)
    best = min(found, key=cost)
    return cost(best), best


def _cost(
    stacks: Sequence[Stack], how: Sequence[How], devices: int, work: Work, copies: int
) -> float:
    spread = [i for i, choice in enumerate(how) if choice == "spread"]
    slots = Slots.fit([stacks[i].count for i in spread], devices)
    # Of those that are worked on together the Gram matrices are of one size.
    sides: dict[How, int] = {}
    numbers = collections.Counter[How]()
    for stack, choice in zip(stacks, how, strict=True):
        sides[choice] = max(stack.small, sides.get(choice, 0))
        numbers[choice] += stack.count * stack.parts
    total = 0.0
    for i, (stack, choice) in enumerate(zip(stacks, how, strict=True)):
        side, stacked = sides[choice], choice == "spread" or numbers[choice] > 1
        inside, _ = work.operations(side, side, stacked)
        _, outside = work.operations(stack.small, stack.long, stacked)
        matrices = stack.count * stack.parts
        size = matrices * stack.small * stack.long * stack.itemsize
        sent, messages = 0.0, 0
        if choice == "each":
            total += matrices * (inside + outside)
            if stack.sharded:
                sent, messages = size, 1
        elif choice == "split":
            total += matrices * (inside + outside / devices)
            sent = 2 * matrices * stack.small**2 * stack.itemsize
            sent += 0 if stack.sharded else size
            messages = 1 if stack.sharded else 2
        else:
            at = spread.index(i)
            rows = slots.full[at] + (slots.row[at] is not None)
            if at == 0:
                total += slots.rows * stack.parts * inside
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


def join(
    bundles: Sequence[list[Group]], leaves: Sequence[Leaf], cost: Callable
) -> list[list[Group]]:
    """Puts bundles of nearly one small side together, where that costs less.

    They come in the order of their small sides.
    """

    def kind(bundle: list[Group]) -> tuple:
        first = bundle[0]
        dtype = leaves[first.numbers[0][0]].value.dtype
        return first.stack.parts, dtype, first.sharded, first.layered

    joined: list[list[Group]] = []
    for bundle in bundles:
        last = next((b for b in reversed(joined) if kind(b) == kind(bundle)), None)
        if (
            last is not None
            and bundle[0].stack.small < NEARLY * last[0].stack.small
            and cost([*last, *bundle]) < cost(last) + cost(bundle)
        ):
            last.extend(bundle)
        else:
            joined.append(list(bundle))
    return joined


def _with_exchange(
    bundle: list[Group], leaves: Sequence[Leaf], work: Work, mesh: Any, axes: Sequence
) -> tuple[Exchange, list[Group], list[How]]:
    """By which exchange a bundle travels, in which groups, and how to work on each."""
    if not axes:
        everywhere = Global(mesh)
        return everywhere, *divide(bundle, everywhere.devices, work)[1:]
    if not bundle[0].sharded:  # nor are the others
        ways = tuple(way for way in work.ways if way != "split")
        work = dataclasses.replace(work, ways=ways)
    # Along an axis that splits the layers, each device has matrices of its own.
    leaf = leaves[bundle[0].numbers[0][0]]
    layers = {a for a, d in leaf.sharded.items() if d in leaf.matrix.batch}
    sharded = [a for a in axes if a in bundle[0].sharded]
    least = Mapped(sharded, sharded)
    most = Mapped([a for a in axes if a not in layers], sharded)
    few = divide(bundle, least.devices, work)
    many = divide(bundle, most.devices, work, most.devices // least.devices)
    return (most, *many[1:]) if many[0] < few[0] else (least, *few[1:])

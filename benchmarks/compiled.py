"""What a compiled program computes, keeps and sends, read off it without running it.

    program = compiled.read(jax.jit(step).lower(*arguments).compile())
    program.counts()                    # {"all-gather": 6, "all-reduce": 2}
    program.by_kind()["all-reduce"]     # Total(count=2, elements=18, bytes=72, ...)
    program.total().bytes               # of all collectives
    program.flops, program.product_flops, program.temporary_bytes

For the benchmarks and the tests. All figures are of one device and one run.

The program is taken as XLA prints it. A collective inside a loop or a branch stands
there once, and counts once; so do the `-start` and `-done` of an asynchronous one.
`by_kind(executed=True)` multiplies by the trips of the loops around it instead. FLOPs
and bytes accessed are XLA's own estimates, which take the body of a loop once, too;
`product_flops` are those of the products of matrices alone, as often as they are run.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# Opcodes that compute nothing; nor do those that wait, whose names end in `-done`.
NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}


class Array(NamedTuple):
    """One array, as XLA describes it: `f32[8,128]`."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        bits = {"pred": 8, "token": 0, "opaque": 0}.get(self.dtype)
        if bits is None:  # the first number in a name such as bf16, f8e4m3fn or c64
            bits = int(re.findall(r"\d+", self.dtype)[0])
        return (bits * self.elements + 7) // 8


class Collective(NamedTuple):
    """One collective operation of a program.

    Attributes:
      kind: one of `KINDS`.
      results: the arrays that it gives, several where XLA has combined operations.
      group: devices that take part.
      times: how often a run of the program executes it, a branch taken as executed;
        None in a loop of unknown length.
    """

    kind: str
    results: tuple[Array, ...]
    group: int
    times: int | None

    @property
    def elements(self) -> int:
        return sum(array.elements for array in self.results)

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.results)

    @property
    def whole_bytes(self) -> int:
        """Bytes of the arrays that it works on: a reduce-scatter gives but a part."""
        return self.bytes * (self.group if self.kind == "reduce-scatter" else 1)

    @property
    def ring_bytes(self) -> float:
        """Bytes that each device sends, if in a ring."""
        return ring_bytes(self.kind, self.whole_bytes, self.group)


class Total(NamedTuple):
    """Collectives added up: their number, and the sizes of their results."""

    count: int
    elements: int
    bytes: int
    whole_bytes: int
    ring_bytes: float


class Instruction(NamedTuple):
    """A line of a program: its name, the shape of its result, its opcode, all of it."""

    name: str
    shape: str
    opcode: str
    line: str


@dataclasses.dataclass(frozen=True)
class Program:
    """What was read off a program.

    Attributes:
      collectives: in the order of the text.
      kernels: instructions of the entry computation that do something.
      product_flops: 2 m n k of every product of matrices, times the trips of the loops
        around it; NaN if one is in a loop of unknown length.
      flops: by XLA's estimate; None where only text was given, as are the next ones.
      bytes_accessed: by XLA's estimate, every kernel's operands read from memory.
      argument_bytes: what is given to the program.
      output_bytes: what it returns.
      aliased_bytes: the part of the outputs that takes the place of donated arguments.
      temporary_bytes: what lives only while it runs.
    """

    collectives: tuple[Collective, ...]
    kernels: int
    product_flops: float
    flops: float | None = None
    bytes_accessed: float | None = None
    argument_bytes: int | None = None
    output_bytes: int | None = None
    aliased_bytes: int | None = None
    temporary_bytes: int | None = None

    @property
    def memory_bytes(self) -> int:
        """What a device must hold: arguments, outputs beside them, and temporaries."""
        outputs = self.output_bytes - self.aliased_bytes
        return self.argument_bytes + outputs + self.temporary_bytes

    def counts(self) -> dict[str, int]:
        """How many collectives of each kind."""
        return dict(collections.Counter(c.kind for c in self.collectives))

    def by_kind(self, executed: bool = False) -> dict[str, Total]:
        """The collectives of each kind, added up."""
        kinds = sorted({c.kind for c in self.collectives})
        return {
            kind: add_up([c for c in self.collectives if c.kind == kind], executed)
            for kind in kinds
        }

    def total(self, executed: bool = False) -> Total:
        """All collectives, added up."""
        return add_up(self.collectives, executed)


def read(program: Any, devices: int | None = None) -> Program:
    """Reads a program, or its text.

    Args:
      program: a `jax.stages.Compiled`, or what its `as_text` gives.
      devices: how many there are, which some groups do not say; by default as many as
        the program's first line names.

    Raises:
      ValueError: if this is not the text of a compiled program (that of `lower` is
        not: XLA has put no collectives into it yet).
    """
    text = program if isinstance(program, str) else program.as_text()
    entry, computations = _computations(text)
    if devices is None:
        head = text.partition("\n")[0]
        counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", head)
        devices = math.prod(int(n) for n in counts)
    found = {
        "collectives": tuple(_collectives(entry, computations, devices)),
        "kernels": sum(
            i.opcode not in NO_KERNEL and not i.opcode.endswith("-done")
            for i in computations[entry]
        ),
        "product_flops": _product_flops(entry, computations),
    }
    if isinstance(program, str):
        return Program(**found)
    cost = program.cost_analysis() or {}
    memory = program.memory_analysis()
    return Program(
        **found,
        flops=cost.get("flops"),
        bytes_accessed=cost.get("bytes accessed"),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
    )


def add_up(collectives: Iterable[Collective], executed: bool = False) -> Total:
    """Number and sizes of some collectives.

    Raises:
      ValueError: with `executed`, if one is in a loop of unknown length.
    """
    sums = [0] * len(Total._fields)
    for collective in collectives:
        times = collective.times if executed else 1
        if times is None:
            raise ValueError(f"a collective in a loop of unknown length: {collective}")
        sums[0] += times
        for i, field in enumerate(Total._fields[1:], 1):
            sums[i] += times * getattr(collective, field)
    return Total(*sums)


def ring_bytes(kind: str, size: float, group: int) -> float:
    """Bytes that each device sends in a ring; `size` is that of the whole array."""
    if kind.startswith("collective-"):
        return size
    part = (group - 1) / group * size
    return 2 * part if kind == "all-reduce" else part


# ---- XLA's notation ------------------------------------------------------------------


def _computations(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """The name of the entry computation, and the instructions of each."""
    computations: dict[str, list[Instruction]] = {}
    entry, instructions = None, []
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            instructions = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif named := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line):
            shape, rest = _first_shape(line[named.end() :])
            if opcode := re.match(r" ([a-z][\w\-]*)\(", rest):
                instructions.append(Instruction(named[1], shape, opcode[1], line))
    if entry is None:
        raise ValueError(
            "this is not the text of a compiled program: it has no ENTRY computation. "
            "Pass `jitted.lower(...).compile()`, or its `as_text()`."
        )
    return entry, computations


def _first_shape(text: str) -> tuple[str, str]:
    """Splits off the shape that a text begins with, which may be a nested tuple."""
    end = next(_outside(text, " "), len(text))
    return text[:end], text[end:]


def _elements(shape: str) -> list[str]:
    """The elements of a tuple's shape, which may be tuples themselves."""
    inside = shape[1:-1]
    ends = [*_outside(inside, ","), len(inside)]
    starts = [0, *(end + 1 for end in ends)]
    return [inside[a:b] for a, b in zip(starts, ends, strict=False)]


def _outside(text: str, wanted: str) -> Iterator[int]:
    """Where a character stands outside of all brackets."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character in "({[") - (character in ")}]")
        if depth == 0 and character == wanted:
            yield i


def _arrays(shape: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(n) for n in re.findall(r"\d+", sizes)))
        for dtype, sizes in re.findall(r"(\w+)\[([\d,<=]*)\]", shape)
    )


def _results(opcode: str, shape: str) -> tuple[Array, ...]:
    """The results of a collective, without what begins one names beside them."""
    if opcode.endswith("-start") and opcode != "all-reduce-start":
        shape = _elements(shape)[1]  # (operands, results, and perhaps more)
    return _arrays(shape)


def _group(line: str, devices: int) -> int:
    """Devices that take part in a collective, from any of XLA's notations."""
    if found := re.search(r"replica_groups=mesh\[([^]]*)\] ?\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        return math.prod(
            int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found[2])
        )
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(found[1].split(","))
    return devices


def _executions(
    entry: str, computations: dict[str, list[Instruction]]
) -> dict[str, float]:
    """How often each computation runs: NaN in a loop of unknown length."""
    times: dict[str, float] = collections.defaultdict(int)

    def walk(name: str, here: float) -> None:
        times[name] += here
        for instruction in computations[name]:
            line, inner = instruction.line, here
            if instruction.opcode == "while":
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                inner = here * (int(trips[1]) if trips else math.nan)
            called = re.findall(
                r"(?:body|condition|to_apply|calls|(?:true|false)_computation)"
                r"=%?([\w.\-]+)",
                line,
            )
            if branches := re.search(r"branch_computations=\{([^}]*)\}", line):
                called += re.findall(r"%?([\w.\-]+)", branches[1])
            for computation in called:
                walk(computation, inner)

    walk(entry, 1)
    return times


def _product_flops(entry: str, computations: dict[str, list[Instruction]]) -> float:
    """Operations of all products of matrices, in one run."""
    executions, total = _executions(entry, computations), 0.0
    for name, instructions in computations.items():
        shapes = {i.name: i.shape for i in instructions}
        for i in instructions:
            if i.opcode == "dot":
                operand = re.search(r" dot\((?:[^%)]*)%?([\w.\-]+)", i.line)
                axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.line)
                (left,), (result,) = _arrays(shapes[operand[1]]), _arrays(i.shape)
                inner = [left.shape[int(n)] for n in axes[1].split(",") if n]
                total += executions[name] * 2.0 * result.elements * math.prod(inner)
    return total


def _collectives(
    entry: str, computations: dict[str, list[Instruction]], devices: int
) -> Iterator[Collective]:
    executions = _executions(entry, computations)
    for name, instructions in computations.items():
        for _, shape, opcode, line in instructions:
            kind = opcode.removesuffix("-start")
            if kind in KINDS:
                times = executions[name]
                yield Collective(
                    kind,
                    _results(opcode, shape),
                    _group(line, devices),
                    None if math.isnan(times) else int(times),
                )

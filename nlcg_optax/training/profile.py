"""Where the time of a step goes, by JAX's own profiler."""

import collections
import contextlib
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import jax

# The scopes that the step, and what it calls, is traced in, and what they are called.
SCOPES = {
    "nlcg_input": "input",
    "nlcg_gradient": "gradient",
    "nlcg_products": "products",
    "nlcg_preconditioner": "preconditioner",
}
COMMUNICATION, REST = "all-reduce", "the rest"
PARTS = (*SCOPES.values(), COMMUNICATION, REST)

_COLLECTIVE = re.compile(
    r"(all-(gather|reduce|to-all)|collective-\w+|reduce-scatter|ragged-all-to-all)"
)
# What holds others, whose time is counted already.
_HOLDS_OTHERS = {"while", "conditional", "call", "async-start", "async-done"}
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+) ([a-z][\w\-]*)\(", re.MULTILINE
)
_SCOPE = re.compile("|".join(SCOPES))


class Profile:
    """Seconds of a device in a step, by part.

    Attributes:
      seconds: by the names in ``PARTS``, once what was traced is known; empty where the
        device's profiler tells nothing.
    """

    def __init__(self) -> None:
        """Nothing is known yet."""
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def trace(self, program: Any) -> Iterator[None]:
        """Profiles what runs meanwhile: once the compiled program, and to its end.

        Raises:
          RuntimeError: if another profile is being taken.
        """
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        # Or the profiler writes every program of this process down.
        options.enable_hlo_proto = False
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, profiler_options=options):
                yield
            self.seconds = read(pathlib.Path(folder), program.as_text())

    def in_words(self) -> str:
        """The whole, and the shares of the parts that take time."""
        total = sum(self.seconds.values())
        if not total:
            return "not told by this device's profiler"
        if {*self.seconds} <= {REST}:
            # What is kept of another version has the names that it had there.
            return f"not told by this program, of {total:.3g} s of a device's work"
        shares = [
            f"{part} {self.seconds[part] / total:.0%}"
            for part in PARTS
            if self.seconds.get(part, 0) >= 0.005 * total
        ]
        return f"{', '.join(shares)}, of {total:.3g} s of a device's work"


def read(folder: pathlib.Path, text: str) -> dict[str, float]:
    """Seconds by part, of the program of this text, from what the profiler wrote.

    Several devices of one process count together.
    """
    module = re.match(r"HloModule ([\w.\-]+)", text)
    parts = parts_of(text)
    total: dict[str, float] = collections.defaultdict(float)
    for path in sorted(folder.rglob("*.xplane.pb")):
        data = jax.profiler.ProfileData.from_file(str(path))
        for event in (e for p in data.planes for line in p.lines for e in line.events):
            found = dict(event.stats)
            name, of = found.get("hlo_op"), found.get("hlo_module")
            # Some begin and end as two events, of which the second takes no time.
            if name in parts and module and str(of).partition("(")[0] == module[1]:
                total[parts[name]] += 1e-9 * event.duration_ns
    return dict(total)


def parts_of(text: str) -> dict[str, str]:
    """To which part each instruction of a compiled program belongs.

    Example:
      >>> parts_of('''
      ...   %dot.1 = f32[2]{0} dot(%a, %b), metadata={op_name="nlcg_gradient/dot"}
      ...   ROOT %all-reduce.3 = f32[2]{0} all-reduce(%dot.1), replica_groups={}
      ... ''')
      {'dot.1': 'gradient', 'all-reduce.3': 'all-reduce'}
    """
    parts = {}
    for line in text.splitlines():
        if not (found := _INSTRUCTION.match(line)) or found[2] in _HOLDS_OTHERS:
            continue
        if _COLLECTIVE.match(found[2]):
            parts[found[1]] = COMMUNICATION
            continue
        name = re.search(r'op_name="([^"]*)"', line)
        # The innermost: a preconditioner of what products gave is a preconditioner.
        scopes = _SCOPE.findall(name[1]) if name else []
        parts[found[1]] = SCOPES[scopes[-1]] if scopes else REST
    return parts

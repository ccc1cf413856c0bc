"""The CUTEst problems of sif2jax, with a record of what was evaluated."""

import functools
import json
import math
import pathlib
import time

import numpy as np


@functools.cache
def _all():
    """The unconstrained problems, without importing the others.

    Importing `sif2jax` builds the data of all its problems, which takes minutes.
    """
    import importlib
    import importlib.util
    import sys
    import types

    root = pathlib.Path(importlib.util.find_spec("sif2jax").origin).parent
    for name, path in (("sif2jax", root), ("sif2jax.cutest", root / "cutest")):
        if name not in sys.modules:
            package = types.ModuleType(name)
            package.__path__ = [str(path)]
            sys.modules[name] = package
    module = importlib.import_module("sif2jax.cutest._unconstrained_minimisation")
    return module.unconstrained_minimisation_problems


def names(largest, smallest=2):
    """Names and sizes of the unconstrained problems up to a size."""
    with (pathlib.Path(__file__).parent / "problems.json").open() as file:
        return [(k, n) for k, n in json.load(file).items() if smallest <= n <= largest]


def by_name(name):
    return next(problem for problem in _all() if problem.name == name)


class BudgetError(Exception):
    """The points of a cell are used up."""


class SecondsError(Exception):
    """The seconds of a cell are used up."""


class Oracle:
    """A problem's value and gradient on the host, and every point asked for.

    A point is counted once, however often its value and its gradient are asked for, in
    whatever order. A solver that asks for the same ones again and again is stopped
    after `max_seconds` of the processor's time, which its first question starts.
    """

    def __init__(self, problem, max_points, max_seconds=math.inf):
        import jax
        from jax.flatten_util import ravel_pytree

        start, unravel = ravel_pytree(problem.y0)
        self.start = np.asarray(start)
        self.n = self.start.size
        self.max_points = max_points
        self.max_seconds = max_seconds
        self.objective = lambda y: problem.objective(unravel(y), problem.args)
        # One executable serves the counting of every solver.
        self._compiled = jax.jit(jax.value_and_grad(self.objective))
        self.reset()
        self.f0, self.g0 = self.value_and_grad(self.start)
        self.tolerance_scale = max(1.0, float(np.max(np.abs(self.g0))))
        self.reset()

    def reset(self):
        self.seen = {}
        self.values = 0
        self.gradients = 0
        self.trace = []
        self.began = None

    def _at(self, x):
        if self.began is None:
            self.began = time.process_time()
        elif time.process_time() - self.began > self.max_seconds:
            raise SecondsError
        x = np.asarray(x, self.start.dtype)
        key = x.tobytes()
        if key not in self.seen:
            if len(self.seen) >= self.max_points:
                raise BudgetError
            f, g = self._compiled(x)
            f, g = float(f), np.asarray(g)
            # The last points are kept whole, the others only remembered.
            self.seen[key] = None
            self.trace.append((f, float(np.max(np.abs(g)))))
            self._last = (key, f, g)
        elif self._last[0] != key:
            f, g = self._compiled(x)
            self._last = (key, float(f), np.asarray(g))
        return self._last[1:]

    def value(self, x):
        self.values += 1
        return self._at(x)[0]

    def gradient(self, x):
        self.gradients += 1
        return self._at(x)[1]

    def value_and_grad(self, x):
        self.values += 1
        self.gradients += 1
        return self._at(x)

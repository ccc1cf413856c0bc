"""Tells who compiles in every step, because the curvature's functions are new ones."""

import warnings
from typing import Any

import jax
from jax.core import Tracer

from nlcg_optax.curvature.products import Curvature

# So many compilations for functions that are written once are a mistake.
_MANY = 3


class Compilations:
    """Counts what one transformation was compiled for."""

    def __init__(self) -> None:
        self._seen: dict[Any, list[Any]] = {}

    def watch(self, curvature: Curvature, grad: Any) -> None:
        """Warns at the third compilation for functions that stand in the same lines.

        A curvature that is made within the compiled function is none of these: it is
        new in each trace, and traces are as few as the function's own.
        """
        traced = any(isinstance(x, Tracer) for x in jax.tree.leaves(grad))
        if not traced or not curvature.made_outside:
            return
        functions = curvature.functions
        seen = self._seen.setdefault(_where_written(functions.value), [])
        if functions in seen or len(seen) >= _MANY:
            return
        seen.append(functions)
        if len(seen) == _MANY:
            warnings.warn(
                "`update` is being compiled for the third time, because the functions "
                "of its curvature are new ones in each step. Define them once, outside "
                "of the loop, as functions of the parameters and the batch, and pass "
                "the batch beside them: `nlcg_optax.gauss_newton(outputs_fn, loss_fn, "
                "batch)`. Or make the curvature inside of the function that `jax.jit` "
                "compiles.",
                stacklevel=3,
            )


def _where_written(functions: Any) -> Any:
    several = functions if isinstance(functions, tuple) else (functions,)
    return tuple(getattr(f, "__code__", type(f)) for f in several)

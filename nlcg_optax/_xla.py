"""What XLA has to be told, because it cannot see it by itself.

XLA's CPU compiler copies a donated array before it overwrites it, unless it can tell
that everything has read it, and it repeats the cheap scalar operations that follow a
sum in each kernel that uses the result. Neither changes a value; both cost time:

============================== ============= ============== ========
``nlcg_paper``, jax 0.10.2     with          without        what for
============================== ============= ============== ========
accesses of a flat leaf        42, 1 copy    46, 3 copies   `after`
a step on it (4 Mi, float32)   20 ms         41 ms          `after`
additions, 160 leaves          5,289         57,283         `compute_once`
compiling them, CPU time       35 s          77 s           `compute_once`
============================== ============= ============== ========

jax 0.12 makes the same counts. ``tests/test_cost.py`` fails if either is taken out
(``test_bytes_of_the_compiled_program``,
``test_the_program_grows_with_the_leaves_and_not_with_their_square``), so when those
tests pass without them, these two can go.

It also compiles what is called as often as it is called, but for `compiled_once`; and
it has a library for convolutions, but in branches and loops not for all of them, but
for `canonical`. ``docs/cost.md`` has what both bring.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.core import Tracer
from jax.experimental.xla_metadata import set_xla_metadata


def after(never: jax.Array, x: jax.Array, *earlier: jax.Array) -> jax.Array:
    """`x` itself, in a way that XLA computes `earlier` before it.

    Where `x` replaces a donated array that only `earlier` reads, this tells XLA that
    it may be overwritten in place. (`jax.lax.optimization_barrier` does not: it is gone
    before memory is assigned. Neither does a product with a constant.)

    Args:
      never: a scalar that is False, though XLA cannot know.
      x: any array.
      *earlier: arrays that broadcast to its shape.
    """
    for other in earlier:
        other = other if jnp.iscomplexobj(x) else jnp.real(other)
        x = jnp.where(never, other.astype(x.dtype), x)
    return x


def compute_once(scalar: jax.Array) -> jax.Array:
    """`scalar` itself, computed in one kernel and not in every one that uses it.

    XLA repeats what it takes for cheap, such as the additions that make an inner
    product over all leaves, but never a division. So this divides by 1, in a form that
    the simplifier does not recognize: NaN / 2 is NaN too.
    """
    one = jnp.where(jnp.isnan(scalar), 2, 1).astype(scalar.dtype)
    return scalar / one


def decide_once(condition: jax.Array) -> jax.Array:
    """`condition` itself, found in one kernel and not in every one that goes by it."""
    return compute_once(condition.astype(jnp.float32)) > 0


def finite(x: jax.Array) -> jax.Array:
    """The elements that are finite, and 0 for the others: to be multiplied by 0 or 1.

    That chooses as a `where` does whose condition is a scalar. But for such a `where`
    XLA's CPU compiler makes a loop for each outcome, and for five of them in one kernel
    as many as there are combinations.
    """
    return jnp.where(jnp.isfinite(x), x, 0)


_CONVOLUTION, _CALLS = "conv_general_dilated", ("jit", "pjit", "closed_call")
_OPTIONS = (
    *("window_strides", "padding", "lhs_dilation", "rhs_dilation", "precision"),
    *("feature_group_count", "batch_group_count", "preferred_element_type"),
)


def compiled_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, traced and compiled once for all calls with such shapes.

    XLA puts what is called in the place of each call, and optimizes each. It is told
    not to where one CPU does all the work. What the function closes over must not
    differ between calls. Convolutions do not belong in it: there XLA's CPU compiler
    leaves aside its library for those that are not `canonical`.
    """

    def called(*args: Any) -> Any:
        with set_xla_metadata(inlineable=None):  # what is in it is put in its place
            return function(*args)

    call = jax.jit(called)

    def run(*args: Any) -> Any:
        if not _alone(args):
            return function(*args)
        with set_xla_metadata(inlineable="false"):
            return call(*args)

    return run


def canonical(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, whose convolutions are in the one layout that is fast.

    XLA's CPU compiler has a library for batches of which the channels are last, and
    kernels of which they are the last two axes. Others it transposes so, but not in a
    branch or a loop, where those of a backward pass take twenty times as long. Here
    they are transposed before it sees them, wherever one CPU does all the work.
    """

    def run(*args: Any) -> Any:
        if not _alone(args):
            return function(*args)
        traced, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        results = _evaluate(traced.jaxpr, traced.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return run


def _evaluate(jaxpr: Any, consts: Any, args: Any) -> list[Any]:
    """As it is, but for convolutions."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(x: Any) -> Any:
        return x.val if isinstance(x, jax.extend.core.Literal) else values[x]

    for equation in jaxpr.eqns:
        inputs, inner = list(map(read, equation.invars)), _inner(equation)
        if equation.primitive.name == _CONVOLUTION:
            found = [_convolve(*inputs, **equation.params)]
        elif equation.primitive.name in _CALLS and any(map(_convolves, inner)):
            (body,) = inner
            found = _evaluate(body.jaxpr, body.consts, inputs)
        else:
            # In earlier versions of JAX a pair, with the functions that it calls.
            given: Any = equation.primitive.get_bind_params(equation.params)
            calls, params = given if isinstance(given, tuple) else ((), given)
            found = equation.primitive.bind(*calls, *inputs, **params)
            found = found if equation.primitive.multiple_results else [found]
        values.update(zip(equation.outvars, found, strict=True))
    return list(map(read, jaxpr.outvars))


def _inner(equation: Any) -> list[Any]:
    """The functions that it calls, in whatever way."""
    values = jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
    )
    return [x for x in values if hasattr(x, "eqns")]


def _convolves(jaxpr: Any) -> bool:
    return any(
        equation.primitive.name == _CONVOLUTION
        or any(map(_convolves, _inner(equation)))
        for equation in jaxpr.eqns
    )


def _convolve(x: jax.Array, w: jax.Array, **params: Any) -> jax.Array:
    """A convolution of any layout by one of the canonical layout."""
    given, n = params.pop("dimension_numbers"), x.ndim
    x_axes, out_axes = (
        (spec[0], *spec[2:], spec[1]) for spec in (given.lhs_spec, given.out_spec)
    )
    x = x.transpose(x_axes)
    w = w.transpose(*given.rhs_spec[2:], given.rhs_spec[1], given.rhs_spec[0])
    space = range(n - 2)
    outer = (0, n - 1, *(i + 1 for i in space))
    canonical = jax.lax.ConvDimensionNumbers(outer, (n - 1, n - 2, *space), outer)
    options = {name: params[name] for name in _OPTIONS}
    y = jax.lax.conv_general_dilated(x, w, dimension_numbers=canonical, **options)
    return y.transpose([out_axes.index(axis) for axis in range(n)])


def _alone(args: Any) -> bool:
    """Whether a program is made, for one CPU."""
    return (
        jax.default_backend() == "cpu"
        and jax.device_count() == 1
        and any(isinstance(x, Tracer) for x in jax.tree.leaves(args))
        and not jax.sharding.get_abstract_mesh().manual_axes
    )

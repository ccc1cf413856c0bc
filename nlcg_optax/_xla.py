"""Two things that XLA has to be told, because it cannot see them by itself.

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
tests pass without them, this file can go.
"""

import jax
import jax.numpy as jnp


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


def finite(x: jax.Array) -> jax.Array:
    """The elements that are finite, and 0 for the others: to be multiplied by 0 or 1.

    That chooses as a `where` does whose condition is a scalar. But for such a `where`
    XLA's CPU compiler makes a loop for each outcome, and for five of them in one kernel
    as many as there are combinations.
    """
    return jnp.where(jnp.isfinite(x), x, 0)

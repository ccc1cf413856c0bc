"""The two-loop recursion of limited-memory BFGS, as a pure function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nlcg_optax import _tree


def two_loop_recursion(
    vector: Any,
    pair: Callable[[jax.Array], tuple[Any, Any, jax.Array]],
    max_count: int,
    gamma: jax.Array,
    inner: Callable[[Any, Any], jax.Array],
) -> Any:
    """Multiplies a tree by the inverse Hessian's approximation H.

    Nocedal & Wright, *Numerical Optimization*, algorithm 7.4.

    Args:
      vector: the tree.
      pair: the pair of a given age, 0 being the newest: s, y, and 1 / sᵀy, which is 0
        where there is no pair yet.
      max_count: pairs there can be.
      gamma: the scale γ of the matrix γI that the pairs correct.
      inner: the inner product of two trees.

    Returns:
      A tree like `vector`.
    """

    def add(x, factor, other):
        return jax.tree.map(
            lambda a, b: a + _tree.scalar_like(factor, a) * _tree.lift(b), x, other
        )

    def backwards(age, carry):  # from the newest pair to the oldest
        q, coefficients = carry
        s, y, weight = pair(age)
        coefficient = weight * inner(s, q)
        return add(q, -coefficient, y), coefficients.at[age].set(coefficient)

    def forwards(k, q):
        age = max_count - 1 - k
        s, y, weight = pair(age)
        return add(q, coefficients[age] - weight * inner(y, q), s)

    # Over all that there can be: a number that is known can be differentiated through.
    # Like gamma: varying over the devices of a `shard_map` if it is.
    coefficients = jnp.zeros_like(gamma, shape=(max_count,))
    q, coefficients = jax.lax.fori_loop(0, max_count, backwards, (vector, coefficients))
    q = jax.tree.map(lambda x: _tree.scalar_like(gamma, x) * x, q)
    return jax.lax.fori_loop(0, max_count, forwards, q)

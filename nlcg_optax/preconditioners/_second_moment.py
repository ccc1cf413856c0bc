"""What preconditioners of matrices do with the leaves that are none."""

from typing import Any

import jax
import jax.numpy as jnp

from nlcg_optax import _tree
from nlcg_optax.matrices.matrix import Mask, is_mask


def over_root(
    x: jax.Array, v: jax.Array, epsilon: Any, scale: float = 1.0
) -> jax.Array:
    """The quotient x / (√v + ε) times a scale; zero where both are, whatever ε is."""
    root = safe_sqrt(v) + _tree.real_scalar(epsilon, v.dtype)
    safe = jnp.where(root == 0, 1, root)
    if scale != 1:
        safe = safe / _tree.real_scalar(scale, safe.dtype)
    return x / safe.astype(x.dtype)


def safe_sqrt(x: jax.Array) -> jax.Array:
    """The root of what is not negative; that of zero has no derivative, and gets 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def check_moments(updates: Any, moments: Any, shards: bool = True) -> None:
    """Raises unless the gradients are of the tree that `init` saw.

    Args:
      updates: the gradients.
      moments: the tree of second moments, with masks in place of matrices.
      shards: whether gradients of matrices may be shards of them.
    """
    leaves, structure = jax.tree.flatten(moments, is_leaf=is_mask)
    given = jax.tree.leaves(updates)
    if jax.tree.structure(updates) != structure:  # which is an error
        given = [0.0] * len(leaves)

    def expected(g: Any, v: Any) -> Any:
        if not isinstance(v, Mask):
            return v
        if shards and jnp.ndim(g) == len(v.matrix.order):
            return g
        return jax.ShapeDtypeStruct(v.shape or (), float)

    wanted = jax.tree.unflatten(structure, map(expected, given, leaves))
    _tree.check_match(updates, wanted, "the optimizer's state")

"""Preconditioning by orthogonalization, matrix by matrix."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nlcg_optax import _check, _tree
from nlcg_optax.preconditioners import _newton_schulz


class NoSecondMoment(NamedTuple):
    """In a tree of second moments, the place of a matrix, which has none."""


class OrthogonalizationState(NamedTuple):
    """State of :func:`scale_by_orthogonalization`.

    Attributes:
      count: steps taken, int32 scalar.
      second_moment: moving average of the squared gradient of the leaves that are no
        matrices, float32 or wider; an empty node in place of the others.
    """

    count: jax.typing.ArrayLike
    second_moment: Any


def scale_by_orthogonalization(
    decay: float = 0.99,
    epsilon: float = 1e-8,
    *,
    iterations: int = 5,
    batch_axes: int = 0,
    axis_name: _tree.AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Preconditions each matrix of the gradient to (nearly) equal singular values.

    A leaf of two or more axes is a matrix :math:`G` of shape [m, n]: the last axis
    counts its columns, all before it together its rows, as the kernels of Flax's dense
    and convolutional layers have it. The output is

    .. math::
        z = 0.2 \sqrt{\max(m, n)}\; (G G^\top)^{-1/2} G ,

    the orthogonal polar factor of G, scaled to a root mean square of 0.2 where G has
    full rank. Other leaves (biases, scales of normalizations) are divided by the root
    of their second moment, as by Adam without its first: with
    :math:`v_t = \gamma v_{t-1} + (1 - \gamma) g_t^2`,

    .. math:: z = g_t / (\sqrt{v_t / (1 - \gamma^t)} + \epsilon) .

    This is what Muon (Jordan et al., 2024) does to its momentum, with the scale of Liu
    et al. (arXiv:2502.16982), done to the gradient; it is also Shampoo
    (arXiv:1802.09568) without memory. The metric is
    :math:`M = (G G^\top)^{1/2} / (0.2 \sqrt{\max(m, n)})`, so that
    :math:`g^\top z` is a nuclear norm. The result does not change when the loss is
    multiplied by a constant.

    The polar factor is approximated by Muon's five steps of a Newton–Schulz iteration,
    :math:`X \leftarrow P X` with :math:`P = a + b A + c A^2` and :math:`A = X X^\top`,
    from :math:`X = G / \lVert G \rVert_F`. As :math:`A \leftarrow P A P`, all but the
    first and the last product are those of matrices as small as the smaller side of G.
    Singular values end between 0.68 and 1.21, if they were not below 1/500 of the norm
    before.

    Args:
      decay: γ, in [0, 1).
      epsilon: ε, at least 0.
      iterations: steps of the Newton–Schulz iteration.
      batch_axes: leading axes of every leaf that count layers (of a scan over layers),
        not rows.
      axis_name: the mapped axis (or axes) of a `shard_map` over which leaves may be
        sharded. Every device needs whole matrices, though: with an axis, a matrix that
        is sharded over it is refused. (Under `jit` matrices may be sharded; name no
        axis there, nor in a `pmap`.)

    Returns:
      A transformation. Updates keep the gradient's dtype; arithmetic is in float32 or
      wider. To precondition some leaves in another way, nest it in ``optax.partition``.

    Raises:
      ValueError: when built, for an argument out of range; in `update`, if the
        gradients do not match the parameters that `init` saw, or a matrix is sharded
        over `axis_name`.

    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> tx = nlcg_optax.scale_by_orthogonalization()
    >>> grads = {"w": jnp.array([[3.0, 0.0, 0.0], [0.0, -0.1, 0.0]]), "b": jnp.ones(3)}
    >>> updates, _ = tx.update(grads, tx.init(grads))
    >>> print(jnp.diagonal(updates["w"]).round(2), updates["b"].round(4))
    [ 0.24 -0.39] [1. 1. 1.]
    """
    _check.number("decay", decay, minimum=0)
    if not isinstance(decay, jax.Array) and decay >= 1:
        raise ValueError(f"decay={decay!r} is not valid: expected a number below 1.")
    _check.number("epsilon", epsilon, minimum=0)
    _check.number("iterations", iterations, minimum=1, integer=True)
    _check.number("batch_axes", batch_axes, minimum=0, integer=True)

    def is_matrix(x: jax.Array) -> bool:
        return jnp.ndim(x) - batch_axes >= 2

    def init_fn(params: optax.Params) -> OrthogonalizationState:
        def moment(x: jax.Array) -> Any:
            if is_matrix(x):
                return NoSecondMoment()
            return jnp.zeros_like(x, dtype=_tree.scalar_dtype(x))

        return OrthogonalizationState(
            count=jnp.zeros([], jnp.int32),
            second_moment=jax.tree.map(moment, params),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        _check_moments(updates, state.second_moment)
        if axis_name is not None:
            matrices = jax.tree.map(lambda g: g if is_matrix(g) else None, updates)
            _check_whole(matrices, _tree.bound_axes(axis_name))
        count = optax.safe_increment(state.count)

        def new_moment(g, v):
            if is_matrix(g):
                return v
            rate = _tree.real_scalar(1 - decay, v.dtype)
            return v + rate * (_tree.abs_sq(_tree.lift(g)) - v)

        moments = jax.tree.map(new_moment, updates, state.second_moment)

        def precondition(g, v):
            x = _tree.lift(g)
            if is_matrix(g):
                return _orthogonalize(x, batch_axes, iterations).astype(g.dtype)
            base = _tree.real_scalar(decay, v.dtype)
            correction = 1 - base ** jnp.asarray(count).astype(v.dtype)
            root = jnp.sqrt(v / correction) + _tree.real_scalar(epsilon, v.dtype)
            # A gradient that was never other than zero stays zero, whatever ε is.
            safe = jnp.where(root == 0, 1, root)
            return (x / safe.astype(x.dtype)).astype(g.dtype)

        return jax.tree.map(precondition, updates, moments), OrthogonalizationState(
            count=count, second_moment=moments
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _orthogonalize(g: jax.Array, batch_axes: int, iterations: int) -> jax.Array:
    """0.2 √max(m, n) times the polar factor of each of the matrices of a leaf."""
    if g.size == 0:
        return g
    placed = jax.typeof(g).sharding
    explicit = any(axis is not None for axis in placed.spec)
    if explicit:  # explicit axes do not say how to multiply or reshape along them
        g = jax.sharding.reshard(g, NamedSharding(placed.mesh, P()))
    batch, columns = g.shape[:batch_axes], g.shape[-1]
    rows = math.prod(g.shape[batch_axes:-1])
    x = g.reshape(*batch, rows, columns)
    x = _newton_schulz.polar_factor(x, iterations, 0.2 * math.sqrt(max(rows, columns)))
    x = x.reshape(g.shape)
    return jax.sharding.reshard(x, placed) if explicit else x


def _check_moments(updates: Any, moments: Any) -> None:
    """Raises unless the gradients are of the tree that `init` saw."""
    leaves, structure = jax.tree.flatten(
        moments, is_leaf=lambda x: isinstance(x, NoSecondMoment)
    )
    if jax.tree.structure(updates) == structure:
        grads = jax.tree.leaves(updates)
        leaves = [
            g if isinstance(v, NoSecondMoment) else v
            for g, v in zip(grads, leaves, strict=True)
        ]
    expected = jax.tree.unflatten(structure, leaves)
    _tree.check_match(updates, expected, "the optimizer's state")


def _check_whole(matrices: Any, axes: tuple[_tree.AxisName, ...]) -> None:
    """Raises unless every device is known to hold a copy of all the leaves."""
    tracked = _tree.tracked_axes(axes)
    for path, leaf in jax.tree_util.tree_leaves_with_path(matrices):
        varying = _tree.varying_axes(leaf)
        if parts := [axis for axis in axes if axis not in tracked - varying]:
            names = ", ".join(map(repr, parts))
            raise ValueError(
                f"The gradient's leaf '{jax.tree_util.keystr(path)}' is sharded over "
                f"{names} (or not known to be the same on all devices), but "
                "orthogonalization needs whole matrices. Use `jit` with shardings, "
                "where no axis is named; or another preconditioner, such as "
                "'diagonal_bfgs'; or, where the leaves are whole, name no axis."
            )

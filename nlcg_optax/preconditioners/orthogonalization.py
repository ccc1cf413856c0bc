"""Preconditioning by orthogonalization, matrix by matrix."""

import contextlib
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nlcg_optax import _check, _tree, _xla
from nlcg_optax.matrices import devices, newton_schulz, plan, recognition
from nlcg_optax.matrices.matrix import Mask, Matrices, is_mask
from nlcg_optax.preconditioners._second_moment import check_moments, over


class OrthogonalizationState(NamedTuple):
    """State of :func:`scale_by_orthogonalization`.

    Attributes:
      count: steps taken, int32 scalar.
      root_mean_square: of the gradient of the leaves that are no matrices, by a moving
        average, float32 or wider; an empty node in place of the others. (Squares of
        gradients that fit into the dtype need not.)
    """

    count: jax.typing.ArrayLike
    root_mean_square: Any


def scale_by_orthogonalization(
    decay: float = 0.99,
    epsilon: float = 1e-8,
    *,
    iterations: int = 5,
    coefficients: str | Sequence[tuple[float, float, float]] = "muon",
    precision: str = "highest",
    batch_axes: int = 0,
    matrices: Matrices | None = None,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
    axis_name: _tree.AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Preconditions each matrix of the gradient to (nearly) equal singular values.

    Which leaves are matrices, and how, is recognized by the names and shapes of Flax,
    Haiku and Equinox (:func:`nlcg_optax.matrices.recognize`). Of other leaves of two
    axes and more the last counts columns, all before it together rows; where there are
    more than two, that is a guess, and `init` warns. For a matrix :math:`G` of shape
    [m, n] the output is

    .. math::
        z = 0.2 \sqrt{\max(m, n)}\; (G G^\top)^{-1/2} G ,

    the orthogonal polar factor of G, scaled to a root mean square of 0.2 where G has
    full rank. Other leaves (biases, scales of normalizations, embeddings) are divided
    by the root of their second moment, as by Adam without its first: with
    :math:`v_t = \gamma v_{t-1} + (1 - \gamma) g_t^2`,

    .. math:: z = g_t / (\sqrt{v_t / (1 - \gamma^t)} + \epsilon) ,

    and those of two axes and more (embeddings) multiplied by 0.2, so that one learning
    rate suits them and the matrices.

    This is what Muon (Jordan et al., 2024) does to its momentum, with the scale of Liu
    et al. (arXiv:2502.16982), done to the gradient; it is also Shampoo
    (arXiv:1802.09568) without memory. The metric is
    :math:`M = (G G^\top)^{1/2} / (0.2 \sqrt{\max(m, n)})`, so that
    :math:`g^\top z` is a nuclear norm. When the loss is multiplied by a constant the
    result of a matrix does not change, and that of other leaves hardly while √v is far
    above ε.

    The polar factor is approximated by five steps of a Newton–Schulz iteration,
    :math:`X \leftarrow P X` with :math:`P = a + b A + c A^2` and :math:`A = X X^\top`,
    from X = G over its Frobenius norm. As :math:`A \leftarrow P A P`, all but the first
    and the last product are those of matrices as small as the smaller side of G, and
    symmetric. With Muon's coefficients, the same in each step, singular values end
    between 0.68 and 1.21. Those of Polar Express (Amsel et al., arXiv:2505.16932)
    differ from step to step, and let all that are at least 1/500 of the largest end
    between 0.96 and 1.03, for as many products; in four steps
    (``iterations=4, coefficients="polar_express"``, a quarter fewer products) all that
    are at least 1/100. In our trials both trained as well, no better beyond an error
    (``benchmarks/matrices``).

    On several devices each matrix is worked on by one of them, wherever that takes less
    time than that each of them does all: matrices of one shape travel together, once
    there and once back. They may be sharded along any axis, or be replicated. What
    counts is operations against bytes, so that small models do not pay for messages.

    Args:
      decay: γ, in [0, 1).
      epsilon: ε, at least 0.
      iterations: steps of the Newton–Schulz iteration.
      coefficients: ``"muon"``, ``"polar_express"`` (which starts from a closer bound,
        the Schatten norm of order 8), or (a, b, c) for each step, from that bound too.
        The last are used again where steps are left.
      precision: of the products of float32 matrices (and of those of 16 bits):
        ``"highest"``, or half precision with sums in float32, ``"float16"`` or
        ``"bfloat16"``, for matrix units that are faster so. The Gram matrix is then
        made anew of X after each step, without which rounding can grow without bound.
      batch_axes: leading axes of every leaf that count layers (of a scan over layers).
        What a leaf is then follows from the axes behind them.
      matrices: a function of a leaf's path (keys, as in `jax.tree_util`) and the leaf
        that returns a :class:`~nlcg_optax.Matrix`, which names the axes of rows, of
        columns and those that count matrices, and the number of parts side by side; or
        None for a leaf that is no matrix; or a tree of these, like the parameters. By
        default (None) it is :func:`nlcg_optax.matrices.recognize`, with a warning for
        what that only guesses; :func:`nlcg_optax.describe` prints what went where, and
        why.
      mesh: the mesh over whose devices the work is shared out under `jit`; None for
        the one that is set (`jax.set_mesh`), if any. Arrays with explicit axes bring
        their own.
      axis_name: the mapped axis (or axes) of a `shard_map` over which leaves may be
        sharded, and the work is shared out. Along which of its axes a matrix is
        sharded is found by its shape, so `init` has to see the whole of it: call it
        outside of the `shard_map`. (Under `jit`, and in a `pmap`, name no axis.)

    Returns:
      A transformation. Updates keep the gradient's dtype; arithmetic is in float32 or
      wider. To precondition some leaves in another way, nest it in ``optax.partition``.

    Raises:
      ValueError: when built, for an argument out of range; in `update`, if the
        gradients do not match the parameters that `init` saw, or the shards of a
        matrix over `axis_name` cannot be put together; in `init`, if a parameter lies
        on a device that the mesh does not have, or what `matrices` gives does not fit.

    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> tx = nlcg_optax.scale_by_orthogonalization()
    >>> grads = {"w": jnp.array([[3.0, 0.0, 0.0], [0.0, -0.1, 0.0]]), "b": jnp.ones(3)}
    >>> updates, _ = tx.update(grads, tx.init(grads))
    >>> print(jnp.diagonal(updates["w"]).round(2), updates["b"].round(4))
    [ 0.24 -0.39] [1. 1. 1.]
    """
    _check.axis_name(axis_name)
    _check.number("decay", decay, minimum=0)
    if not isinstance(decay, jax.Array) and decay >= 1:
        raise ValueError(f"decay={decay!r} is not valid: expected a number below 1.")
    _check.number("epsilon", epsilon, minimum=0, finite=True)
    _check.static_counts(iterations=(iterations, 1), batch_axes=(batch_axes, 0))
    _check_coefficients(coefficients)
    _check.one_of("precision", precision, ("highest", *newton_schulz.HALF))
    iterations = operator.index(iterations)
    work = work_of(newton_schulz.Method.of(coefficients, iterations, precision))
    devices.check_arguments(mesh, matrices, batch_axes)

    def init_fn(params: optax.Params) -> OrthogonalizationState:
        found = recognition.all_of(params, matrices, batch_axes)

        def moment(path: Any, x: Any) -> Any:
            if (matrix := found[path]) is None:
                return jnp.zeros_like(x, dtype=_tree.scalar_dtype(x))
            return devices.mask_of(path, x, matrix, mesh, axis_name)

        return OrthogonalizationState(
            count=jnp.zeros([], jnp.int32),
            root_mean_square=jax.tree_util.tree_map_with_path(moment, params),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        check_moments(updates, state.root_mean_square)
        count = optax.safe_increment(state.count)
        # A mask is no leaf of its own, so the trees are walked side by side.
        paths, structure = jax.tree_util.tree_flatten_with_path(updates)
        results, moments, found = [g for _, g in paths], [], {}
        roots = jax.tree.leaves(state.root_mean_square, is_leaf=is_mask)
        for i, v in enumerate(roots):
            if not isinstance(v, Mask):
                # An embedding is scaled as the matrices beside it.
                scale = 0.2 if results[i].ndim - batch_axes > 1 else 1.0
                v, results[i] = _normalize(results[i], v, count, decay, epsilon, scale)
            elif jnp.size(results[i]):
                found[i] = (*paths[i], v)
            moments.append(v)
        factors, _ = devices.apply(work, list(found.values()), mesh, axis_name)
        for (i, (_, g, v)), z in zip(found.items(), factors, strict=True):
            whole = v.shape if axis_name is not None and v.shape else g.shape
            _, rows, columns = v.matrix.sides(whole)
            results[i] = (0.2 * math.sqrt(max(rows, columns)) * z).astype(g.dtype)
        return jax.tree.unflatten(structure, results), OrthogonalizationState(
            count=count, root_mean_square=jax.tree.unflatten(structure, moments)
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _normalize(
    g: jax.Array, root: jax.Array, count: Any, decay: Any, epsilon: Any, scale: float
) -> tuple[jax.Array, jax.Array]:
    """The root of the second moment, and a leaf that is no matrix over it."""
    x = _tree.lift(g)
    size = jnp.abs(x).astype(root.dtype)
    # The share of this step in vₜ / (1 - γᵗ), which for γ = 1 (as in half precision
    # 0.999 is) is the mean of all squares.
    steps = jnp.asarray(count).astype(root.dtype)
    gamma = _tree.real_scalar(decay, root.dtype)
    memory = 1 - gamma**steps
    endless = memory == 0
    share = (1 - gamma) / jnp.where(endless, 1, memory)
    share = jnp.where(endless, 1 / steps, share)
    # Squares of what is 1 at most; of a gradient that is zero there is no derivative.
    peak = jax.lax.stop_gradient(jnp.maximum(size, root))
    safe = jnp.where(peak == 0, 1, peak)
    mean = share * jnp.square(size / safe) + (1 - share) * jnp.square(root / safe)
    moment = peak * _tree.square_root(mean)
    return moment, over(x, moment, epsilon, scale).astype(g.dtype)


def work_of(method: newton_schulz.Method) -> plan.Work:
    """Polar factors as work for several devices."""
    alone = _xla.compiled_once(lambda x: newton_schulz.polar_factors([x], method)[0])

    def function(xs: list[jax.Array], share: plan.Share, kept: Any, given: Any) -> Any:
        del given
        shape, slots = xs[0].shape, share.slots
        if len(xs) == 1 and math.prod(shape[:3]) == 1:  # one matrix, and no stack
            x = xs[0].reshape(shape[3:])
            if share.how == "split":
                (y,) = newton_schulz.polar_factors(
                    [x], method, largest=share.largest, total=share.total
                )
            else:
                y = alone(x)
            return [y.reshape(shape)], kept
        return newton_schulz.polar_factors(
            xs,
            method,
            add=slots.add,
            pick=slots.pick,
            largest=share.largest,
            total=share.total,
        ), kept

    return plan.Work(function, method.operations)


def _check_coefficients(coefficients: Any) -> None:
    """Raises unless these are the name of some, or triples of numbers."""
    if isinstance(coefficients, str):
        _check.one_of("coefficients", coefficients, ("muon", "polar_express"))
        return
    with contextlib.suppress(TypeError, ValueError):  # said below
        steps = [tuple(step) for step in coefficients]
        for value in itertools.chain(*steps):
            _check.number("coefficients", value)
        if steps and all(len(step) == 3 for step in steps):
            return
    raise ValueError(
        f"coefficients={coefficients!r} is not valid: expected 'polar_express', "
        "'muon', or a sequence of (a, b, c), one for each step."
    )

"""Preconditioning by orthogonalization, matrix by matrix."""

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import AxisType

from nlcg_optax import _check, _tree
from nlcg_optax.matrices import describe as ready_matrices
from nlcg_optax.matrices import newton_schulz, plan
from nlcg_optax.matrices.plan import Matrix


class NoSecondMoment(tuple):
    """In a tree of second moments, the place of a matrix, which has none.

    To whatever flattens or stores a state this is a named tuple without fields. What it
    says is said by its class, of which there is one for each matrix and shape, so that
    it is part of the tree's structure and nothing of the kind has to be stored.

    Attributes:
      matrix: which axes of the leaf are its rows, its columns, and count matrices.
      shape: of the whole leaf, by which shards of it are known in a `shard_map`; None
        where `init` saw a shard, or may have.
    """

    __slots__ = ()
    _fields = ()
    matrix: ClassVar[Matrix]
    shape: ClassVar[tuple[int, ...] | None]

    def __reduce__(self) -> Any:
        return no_second_moment, (self.matrix, self.shape)

    def __repr__(self) -> str:
        return f"NoSecondMoment(matrix={self.matrix}, shape={self.shape})"


@functools.cache
def no_second_moment(matrix: Matrix, shape: tuple[int, ...] | None) -> NoSecondMoment:
    """The place of a matrix; the same object for the same matrix and shape."""
    said = {"__slots__": (), "matrix": matrix, "shape": shape}
    return type("NoSecondMoment", (NoSecondMoment,), said)()


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
    coefficients: str | Sequence[tuple[float, float, float]] = "muon",
    precision: str = "highest",
    batch_axes: int = 0,
    matrices: ready_matrices.Matrices | None = None,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
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
    (``benchmarks/orthogonalization``).

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
      batch_axes: leading axes of every leaf that count layers (of a scan over layers),
        not rows.
      matrices: a function of a leaf's path (keys, as in `jax.tree_util`) and the leaf
        that returns a :class:`~nlcg_optax.Matrix`, which names the axes of rows, of
        columns and those that count matrices, and the number of parts side by side; or
        None for a leaf that is no matrix: it is divided by the root of its second
        moment, and where it has two axes or more (an embedding) multiplied by 0.2, so
        that one learning rate suits it and the matrices beside it.
        :mod:`nlcg_optax.matrices` has such functions for Flax and Equinox, and
        :func:`nlcg_optax.describe` prints what went where. By default (None) it is as
        said above.
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
    _check.number("decay", decay, minimum=0)
    if not isinstance(decay, jax.Array) and decay >= 1:
        raise ValueError(f"decay={decay!r} is not valid: expected a number below 1.")
    _check.number("epsilon", epsilon, minimum=0)
    _check.static_counts(iterations=(iterations, 1), batch_axes=(batch_axes, 0))
    if mesh is not None and not isinstance(
        mesh, jax.sharding.Mesh | jax.sharding.AbstractMesh
    ):
        raise ValueError(
            f"mesh={mesh!r} is not valid: expected a jax.sharding.Mesh or None."
        )

    _check_coefficients(coefficients)
    _check.one_of("precision", precision, ("highest", *newton_schulz.HALF))
    method = newton_schulz.Method.of(
        coefficients, operator.index(iterations), precision
    )

    if matrices is not None and batch_axes != 0:
        raise ValueError(
            f"batch_axes={batch_axes!r} is not valid beside `matrices`, which says of "
            "each leaf which axes count matrices: Matrix(rows, columns, batch)."
        )

    def treatment(path: Any, leaf: Any) -> Matrix | None:
        if matrices is not None:
            return ready_matrices.check(path, leaf, matrices(path, leaf))
        return ready_matrices.by_last_axis(leaf, batch_axes)

    def init_fn(params: optax.Params) -> OrthogonalizationState:
        mapped = _mapped_axes(axis_name)

        def moment(path: Any, x: Any) -> Any:
            matrix = treatment(path, x)
            if matrix is None:
                return jnp.zeros_like(x, dtype=_tree.scalar_dtype(x))
            _check_devices(path, x, mesh)
            whole = _known_whole(x, mapped)
            return no_second_moment(matrix, tuple(jnp.shape(x)) if whole else None)

        return OrthogonalizationState(
            count=jnp.zeros([], jnp.int32),
            second_moment=jax.tree_util.tree_map_with_path(moment, params),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        _check_moments(updates, state.second_moment)
        count = optax.safe_increment(state.count)

        def new_moment(g, v):
            if isinstance(v, NoSecondMoment):
                return v
            rate = _tree.real_scalar(1 - decay, v.dtype)
            return v + rate * (_tree.abs_sq(_tree.lift(g)) - v)

        def normalize(g, v):
            x = _tree.lift(g)
            base = _tree.real_scalar(decay, v.dtype)
            correction = 1 - base ** jnp.asarray(count).astype(v.dtype)
            root = jnp.sqrt(v / correction) + _tree.real_scalar(epsilon, v.dtype)
            # A gradient that was never other than zero stays zero, whatever ε is.
            safe = jnp.where(root == 0, 1, root)
            if matrices is not None and g.ndim > 1:  # an embedding, beside matrices
                safe = safe / _tree.real_scalar(0.2, safe.dtype)
            return (x / safe.astype(x.dtype)).astype(g.dtype)

        # A matrix's place is no leaf of its own, so the trees are walked side by side.
        paths, structure = jax.tree_util.tree_flatten_with_path(updates)
        moments = [
            new_moment(g, v)
            for (_, g), v in zip(paths, _moments(state.second_moment), strict=True)
        ]
        results = [g for _, g in paths]
        found = [
            (i, path, g, v)
            for i, ((path, g), v) in enumerate(zip(paths, moments, strict=True))
            if isinstance(v, NoSecondMoment) and jnp.size(g)
        ]
        orthogonalized = _orthogonalize(
            [entry[1:] for entry in found], method, mesh, axis_name
        )
        for (i, *_), z in zip(found, orthogonalized, strict=True):
            results[i] = z
        for i, v in enumerate(moments):
            if not isinstance(v, NoSecondMoment):
                results[i] = normalize(results[i], v)
        return jax.tree.unflatten(structure, results), OrthogonalizationState(
            count=count, second_moment=jax.tree.unflatten(structure, moments)
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _orthogonalize(
    matrices: Sequence[tuple[Any, jax.Array, NoSecondMoment]],
    method: newton_schulz.Method,
    mesh: Any,
    axis_name: _tree.AxisName | None,
) -> list[jax.Array]:
    """The leaves of some paths, orthogonalized where and how it takes least time."""
    grads = [g for _, g, _ in matrices]
    leaves = [plan.Leaf(_tree.lift(g), v.matrix) for _, g, v in matrices]
    axes: tuple[_tree.AxisName, ...] = ()
    explicit = None
    if axis_name is not None:
        axes = _tree.bound_axes(axis_name)
        leaves = [
            leaf._replace(sharded=_find_shards(path, g, v, axes))
            for leaf, (path, g, v) in zip(leaves, matrices, strict=True)
        ]
        leaves = [leaf._replace(everywhere=not leaf.sharded) for leaf in leaves]
        axes = tuple(axis for axis in axes if jax.lax.axis_size(axis) > 1)
    elif grads:
        explicit = _explicit_mesh(grads)
        if explicit is not None:
            leaves = [
                leaf._replace(everywhere=not any(jax.typeof(leaf.value).sharding.spec))
                for leaf in leaves
            ]
        elif mesh is None:
            mesh = jax.sharding.get_abstract_mesh()
            mesh = None if mesh.empty else mesh
        if not any(isinstance(g, Tracer) for g in grads):
            mesh = None  # outside of `jit` there is no compiler to place anything

    def compute(values: Sequence[jax.Array], mesh: Any = mesh) -> list[jax.Array]:
        placed = [
            leaf._replace(value=x) for leaf, x in zip(leaves, values, strict=True)
        ]
        results = plan.orthogonalize(placed, method, mesh, axes)
        return [x.astype(g.dtype) for x, g in zip(results, grads, strict=True)]

    values = [leaf.value for leaf in leaves]
    if explicit is None:
        return compute(values)
    # Explicit axes do not say how to multiply or reshape along them: as automatic ones.
    names = tuple(
        name
        for name, kind in zip(explicit.axis_names, explicit.axis_types, strict=True)
        if kind == AxisType.Explicit
    )

    def automatic(values: Sequence[jax.Array]) -> list[jax.Array]:
        return compute(values, jax.sharding.get_abstract_mesh())

    shardings = [jax.typeof(g).sharding for g in grads]
    with jax.sharding.use_abstract_mesh(explicit):
        run: Any = jax.sharding.auto_axes(automatic, axes=names, out_sharding=shardings)
        return run(values)


def _check_coefficients(coefficients: Any) -> None:
    """Raises unless these are the name of some, or triples of numbers."""
    if isinstance(coefficients, str):
        _check.one_of("coefficients", coefficients, ("muon", "polar_express"))
        return
    try:
        steps = [tuple(step) for step in coefficients]
        valid = bool(steps) and all(len(step) == 3 for step in steps)
        for value in itertools.chain(*steps):
            _check.number("coefficients", value)
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise ValueError(
            f"coefficients={coefficients!r} is not valid: expected 'polar_express', "
            "'muon', or a sequence of (a, b, c), one for each step."
        )


def _explicit_mesh(grads: Sequence[jax.Array]) -> Any:
    """The mesh of the leaves, if it has explicit axes; else None."""
    for g in grads:
        mesh = jax.typeof(g).sharding.mesh
        if not mesh.empty and AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def _mapped_axes(axis_name: _tree.AxisName | None) -> tuple[_tree.AxisName, ...]:
    """The named axes, if something maps them here; else none."""
    if axis_name is None:
        return ()
    try:
        return _tree.bound_axes(axis_name)
    except NameError:
        return ()


def _known_whole(x: Any, axes: Sequence[_tree.AxisName]) -> bool:
    """Whether this device is known to hold all of the leaf."""
    return not axes or set(axes) <= _tree.tracked_axes(axes) - _tree.varying_axes(x)


def _find_shards(
    path: Any, g: jax.Array, moment: NoSecondMoment, axes: Sequence[_tree.AxisName]
) -> dict[_tree.AxisName, int]:
    """Along which of a leaf's axes each mapped axis splits it."""
    if _known_whole(g, axes):
        return {}
    tracked, varying = _tree.tracked_axes(axes), _tree.varying_axes(g)
    parts = [axis for axis in axes if axis not in tracked - varying]
    names = ", ".join(map(repr, parts))
    where = jax.tree_util.keystr(path)
    if moment.shape is None or len(moment.shape) != g.ndim:
        raise ValueError(
            f"The gradient's leaf '{where}' of shape {g.shape} is sharded over {names} "
            "(or not known to be the same on all devices), but `init` did not see the "
            "whole leaf, by whose shape the shards of a matrix are put together. Call "
            "`init` outside of the `shard_map` (under `jit`, with `out_shardings`); or "
            "use another preconditioner, such as 'diagonal_bfgs'; or, where every "
            "device has the whole leaf, name no axis."
        )
    # Axes of one device split nothing.
    parts = [axis for axis in parts if jax.lax.axis_size(axis) > 1]
    fits = []
    for dims in itertools.product([*range(g.ndim), None], repeat=len(parts)):
        sizes = list(g.shape)
        for axis, dim in zip(parts, dims, strict=True):
            if dim is not None:
                sizes[dim] *= jax.lax.axis_size(axis)
        copied = [axis for axis, dim in zip(parts, dims, strict=True) if dim is None]
        if tuple(sizes) == moment.shape and tracked.isdisjoint(copied):
            fits.append(dict(zip(parts, dims, strict=True)))
    if len(fits) != 1:
        found = "could be so in several ways" if fits else "cannot be"
        raise ValueError(
            f"The gradient's leaf '{where}' has shape {g.shape} on each device, and "
            f"`init` saw one of shape {moment.shape}: that it is split over {names} "
            f"{found}. Shard it over one axis, or over axes of different sizes, and "
            "average gradients over the others; or use another preconditioner, such "
            "as 'diagonal_bfgs'."
        )
    return {axis: dim for axis, dim in fits[0].items() if dim is not None}


def _check_devices(path: Any, x: Any, mesh: Any) -> None:
    """Raises if a leaf lies on devices that the mesh does not have."""
    if not isinstance(mesh, jax.sharding.Mesh) or isinstance(x, Tracer):
        return
    if isinstance(x, jax.Array) and x.committed:
        missing = x.sharding.device_set - set(mesh.devices.flat)
        if missing:
            names = ", ".join(sorted(map(str, missing)))
            raise ValueError(
                f"The parameter '{jax.tree_util.keystr(path)}' of shape {x.shape} lies "
                f"on {names}, which the mesh of `scale_by_orthogonalization` "
                f"({mesh.devices.size} devices) does not have. Put the parameters on "
                "the mesh, or give the mesh that they are on."
            )


def _moments(tree: Any) -> list[Any]:
    """The second moments, and the places of those that there are none of."""
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, NoSecondMoment))


def _check_moments(updates: Any, moments: Any) -> None:
    """Raises unless the gradients are of the tree that `init` saw."""
    leaves, structure = jax.tree.flatten(
        moments, is_leaf=lambda x: isinstance(x, NoSecondMoment)
    )
    if jax.tree.structure(updates) == structure:

        def as_given(g: Any, v: Any) -> Any:
            place = isinstance(v, NoSecondMoment)
            return g if place and jnp.ndim(g) == len(v.matrix.order) else v

        leaves = list(map(as_given, jax.tree.leaves(updates), leaves))
    leaves = [
        jax.ShapeDtypeStruct(v.shape or (), float)
        if isinstance(v, NoSecondMoment)
        else v
        for v in leaves
    ]
    expected = jax.tree.unflatten(structure, leaves)
    _tree.check_match(updates, expected, "the optimizer's state")

"""Inner products and leaf-wise arithmetic over pytrees of parameters.

Everything runs leaf by leaf: a raveled vector would force communication between
devices wherever the leaves are sharded.
"""

import functools
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from nlcg_optax import _xla

AxisName = Hashable


def real_dtype(dtype: Any) -> jnp.dtype:
    """The real dtype of the same precision: complex64 gives float32."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"Conjugate gradient needs real or complex floating-point leaves, got "
            f"{jnp.dtype(dtype).name}: keep such leaves out with `optax.masked` or "
            "`optax.partition`."
        )
    return jnp.finfo(dtype).dtype


def compute_dtype(dtype: Any) -> jnp.dtype:
    """`dtype` itself, or float32 where it is a 16-bit (or smaller) float."""
    return jnp.dtype(jnp.float32 if real_dtype(dtype).itemsize < 4 else dtype)


def scalar_dtype(tree: Any) -> jnp.dtype:
    """The real dtype in which scalars of `tree` are kept: float32 or wider."""
    # Compared by size: under strict promotion JAX does not mix dtypes.
    dtypes = [real_dtype(jnp.result_type(leaf)) for leaf in jax.tree.leaves(tree)]
    return max(dtypes + [jnp.dtype(jnp.float32)], key=lambda dtype: dtype.itemsize)


def lift(x: jax.Array) -> jax.Array:
    """Casts a leaf to the dtype in which its arithmetic is done."""
    x = jnp.asarray(x)
    return x.astype(compute_dtype(x.dtype))


def real_scalar(value: jax.typing.ArrayLike, dtype: jnp.dtype) -> jax.Array:
    """A hyperparameter as a real scalar.

    Beside complex parameters `optax.inject_hyperparams` makes it complex.
    """
    return jnp.real(jnp.asarray(value)).astype(dtype)


def scalar_like(scalar: jax.typing.ArrayLike, x: jax.Array) -> jax.Array:
    """Casts a scalar to the dtype of a (lifted) leaf."""
    return jnp.asarray(scalar).astype(x.dtype)


def real_inner(a: jax.Array, b: jax.Array) -> jax.Array:
    """Elementwise integrand of the real inner product, Re(conj(a) b)."""
    if jnp.iscomplexobj(a) or jnp.iscomplexobj(b):
        return jnp.real(a) * jnp.real(b) + jnp.imag(a) * jnp.imag(b)
    return a * b


def abs_sq(a: jax.Array) -> jax.Array:
    """Elementwise squared modulus, real for complex input."""
    return real_inner(a, a)


def axis_names(axis_name: AxisName) -> tuple[AxisName, ...]:
    """One axis, or several, as a tuple."""
    return tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)


def bound_axes(axis_name: AxisName) -> tuple[AxisName, ...]:
    """The named axes as a tuple.

    Raises:
      NameError: if nothing around the call maps one of them.
    """
    axes = axis_names(axis_name)
    for axis in axes:
        try:
            jax.lax.axis_index(axis)
        except NameError:
            raise NameError(
                f"Axis {axis!r} is not bound: no `shard_map` or `pmap` around this "
                "call maps it. Under `jit` alone name no axis: sums and means are "
                "global there."
            ) from None
    return axes


def tracked_axes(axes: Sequence[AxisName]) -> frozenset[AxisName]:
    """Those of the bound axes whose `shard_map` types say what varies along them.

    That is all axes of a `shard_map` with ``check_vma=True``, its default, and none of
    another `shard_map`, a `pmap` or a `vmap`.
    """
    # The index of a device varies along its axis wherever anything is known to vary.
    return frozenset(
        axis for axis in axes if axis in varying_axes(jax.lax.axis_index(axis))
    )


def untracked_axes() -> frozenset[AxisName]:
    """The axes around the call whose types do not say what varies along them.

    Those of a `pmap`, and of a `shard_map` with ``check_vma=False``; not of a `vmap`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return frozenset(mesh.manual_axes) - tracked_axes(mesh.manual_axes)


def varying_axes(x: jax.typing.ArrayLike) -> frozenset[AxisName]:
    """The tracked axes along which `x` may differ from device to device."""
    kind: Any = jax.typeof(x)
    # Named `vma` before JAX 0.10. With neither name fail: a guess would be a wrong sum.
    if hasattr(kind, "manual_axis_type"):
        return kind.manual_axis_type.varying
    return kind.vma


def vary(x: Any, axes: Sequence[AxisName]) -> Any:
    """`x` with a type that may vary along tracked axes along which it does not yet."""
    if not axes:
        return x
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, tuple(axes), to="varying")
    return getattr(jax.lax, "pvary")(x, tuple(axes))  # noqa: B009 - before JAX 0.9


def reduce_products(
    integrands: Callable[..., Sequence[jax.Array]],
    *trees: Any,
    dtype: jnp.dtype,
    axis_name: AxisName | None = None,
    stacked: bool = False,
) -> list[jax.Array]:
    """Sums several elementwise integrands over all the leaves of some trees.

    Args:
      integrands: maps one (lifted) leaf of each tree to a sequence of real arrays.
      *trees: trees of one structure.
      dtype: dtype of the sums.
      axis_name: mapped axis (or axes) over which the leaves are sharded; the sums are
        then global. All of them travel in a single all-reduce. A leaf counts once along
        an axis where its type says that every device holds a copy of it, which types
        say in a `shard_map` with ``check_vma=True``; elsewhere *every* leaf counts as
        sharded.
      stacked: whether the arrays of the integrands have a leading axis, of stacked
        trees, which stays.

    Returns:
      One scalar for each integrand; with ``stacked`` one vector.
    """
    columns = [jax.tree.leaves(tree) for tree in trees]
    if not columns[0]:  # a group of `optax.partition` may be empty
        columns = [[jnp.zeros([0], dtype)] for _ in trees]

    def summed(value: jax.Array) -> jax.Array:
        axes = tuple(range(1, value.ndim)) if stacked else None
        return jnp.sum(value, axes).astype(dtype)

    axes = () if axis_name is None else bound_axes(axis_name)
    tracked = tracked_axes(axes)
    whole, sharded = [], []
    for leaves in zip(*columns, strict=True):
        values = integrands(*(lift(leaf) for leaf in leaves))
        row = [summed(value) for value in values]
        # Of all the leaf's arrays together: a constant gradient of a sharded leaf does
        # not vary, but counts on every device.
        varying = frozenset().union(*(varying_axes(leaf) for leaf in leaves))
        copied = [axis for axis in axes if axis in tracked - varying]
        if len(copied) == len(axes):
            whole.append(row)
        else:
            sharded.append([_on_first(value, copied) for value in row])
    totals = [_total(rows) for rows in (whole, sharded) if rows]
    if sharded:
        together = jnp.stack(totals[-1])
        # A sum does not take what varies along some of its axes only.
        constant = tracked - varying_axes(together)
        together = vary(together, [axis for axis in axes if axis in constant])
        totals[-1] = list(jax.lax.psum(together, axes))
    return [_xla.compute_once(total) for total in _total(totals)]


def combine(coefficients: jax.Array, stacked: jax.Array) -> jax.Array:
    """The linear combination of what is stacked along the first axis of an array."""
    weights = scalar_like(coefficients, stacked)
    if stacked.ndim > 3:
        return sum(
            (weights[i] * stacked[i] for i in range(1, len(stacked))),
            start=weights[0] * stacked[0],
        )
    # By a library where loops are slow to compile, and never rounded first.
    return jnp.tensordot(weights, stacked, 1, precision=jax.lax.Precision.HIGHEST)


def split_explicitly(*arrays: jax.Array) -> bool:
    """Whether the type of an array says that one of its axes is split over devices."""
    return any(
        not (kind := jax.typeof(x)).sharding.mesh.empty
        and any(axis is not None for axis in kind.sharding.spec)
        for x in arrays
    )


def vary_like(x: jax.Array, like: Any) -> jax.Array:
    """`x` with a type that varies along the axes along which another does."""
    return vary(x, tuple(varying_axes(like) - varying_axes(x)))


def _total(rows: Sequence[Sequence[jax.Array]]) -> list[jax.Array]:
    """Sums the columns."""
    return [
        functools.reduce(operator.add, column) for column in zip(*rows, strict=True)
    ]


def _on_first(x: jax.Array, axes: Sequence[AxisName]) -> jax.Array:
    """`x` on the first device along each of the axes, and 0 on the others."""
    for axis in axes:
        x = jnp.where(jax.lax.axis_index(axis) == 0, x, jnp.zeros_like(x))
    return x


def inner_products(
    vectors: Callable[..., Sequence[jax.Array]],
    pairs: Sequence[tuple[int, int]],
    *trees: Any,
    groups: Sequence[int],
    dtype: jnp.dtype,
    axis_name: AxisName | None = None,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Real inner products of vectors whose squares need not fit into their dtype.

    The vectors are scaled first, by the largest magnitude in them, as by BLAS's nrm2;
    but by a power of two, and by 1 where their squares are well in range, so that
    ordinary numbers come out as they would without.

    Args:
      vectors: maps one (lifted) leaf of each tree to the leaves of some vectors.
      pairs: which of the vectors to multiply.
      *trees: trees of one structure.
      groups: of each vector the number of its group, whose vectors share a scale.
      dtype: dtype of the sums.
      axis_name: as for :func:`reduce_products`.

    Returns:
      For each pair (i, j) a scalar, and for each group an exponent, int32: the inner
      product is the scalar times 2 to the exponents of the groups of i and of j.
    """
    # The dtype with the least range in which anything is multiplied.
    leaves = [dtype, *map(jnp.result_type, jax.tree.leaves(trees))]
    narrow = min(map(real_dtype, map(compute_dtype, leaves)), key=lambda k: k.itemsize)
    peaks: list[list[jax.Array]] = [[] for _ in range(max(groups) + 1)]
    for leaves in zip(*map(jax.tree.leaves, trees), strict=True):
        found = vectors(*map(lift, leaves))
        for v, group in zip(found, groups, strict=True):
            peaks[group].append(jax.lax.stop_gradient(v))
    largest = jnp.stack([max_abs(peak, dtype=dtype) for peak in peaks])
    exponents = [exponent_of(x, narrow) for x in _largest(largest, axis_name)]
    scales = [_xla.compute_once(power_of_two(-e, dtype)) for e in exponents]

    def integrands(*leaves: jax.Array) -> list[jax.Array]:
        found = [
            # Not the bare product: XLA would take the scales out of the sum, too late.
            jnp.where(scales[group] > 0, scalar_like(scales[group], v) * v, 0)
            for v, group in zip(vectors(*leaves), groups, strict=True)
        ]
        return [real_inner(found[i], found[j]) for i, j in pairs]

    sums = reduce_products(integrands, *trees, dtype=dtype, axis_name=axis_name)
    return sums, exponents


def exponent_of(size: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The power of two above a size, int32, within the range of the dtype's.

    It is 0 for a size whose square is in that range by far, and for zero or no number.
    """
    info = jnp.finfo(dtype)
    usable = (size > 0) & jnp.isfinite(size)
    _, exponent = jnp.frexp(jnp.where(usable, jax.lax.stop_gradient(size), 0.5))
    exponent = jnp.where(jnp.abs(exponent) < info.maxexp // 4, 0, exponent)
    return jnp.clip(exponent, info.minexp, -info.minexp).astype(jnp.int32)


def power_of_two(exponent: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """2 to an exponent, exactly; as far as the dtype's range goes."""
    info = jnp.finfo(dtype)
    exponent = jnp.clip(exponent, info.minexp, info.maxexp - 1)
    return jnp.ldexp(jnp.ones_like(exponent, dtype=dtype), exponent)


def times_power_of_two(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """X times 2 to an exponent, exactly wherever that is in range."""
    half = exponent // 2  # neither factor alone leaves it
    kind = real_dtype(x.dtype)
    first, second = power_of_two(half, kind), power_of_two(exponent - half, kind)
    # A zero apart: XLA may multiply the factors first, and their product be infinite.
    zero = x == 0
    return jnp.where(zero, 0, jnp.where(zero, 1, x) * first * second)


def square_root(x: jax.Array) -> jax.Array:
    """The root of what is not negative; its derivative is 0 at 0, not infinite."""
    positive = x > 0
    root = jnp.sqrt(jnp.where(positive, x, 1))
    return jnp.where(positive, root, jnp.where(jnp.isnan(x), x, 0))


def norm(
    tree: Any, *, dtype: jnp.dtype, axis_name: AxisName | None = None
) -> jax.Array:
    """The length of a tree: the root of the sum of its squares."""
    (square,), (exponent,) = inner_products(
        lambda x: [x], [(0, 0)], tree, groups=[0], dtype=dtype, axis_name=axis_name
    )
    return times_power_of_two(square_root(square), exponent)


def max_abs(
    tree: Any, *, dtype: jnp.dtype, axis_name: AxisName | None = None
) -> jax.Array:
    """The largest modulus of any element: NaN if one is NaN, 0 if there is none.

    Over `axis_name` leaves may be sharded or not: copies do not change a maximum.
    """
    largest = [
        jnp.max(jnp.abs(lift(leaf)), initial=0).astype(dtype)
        for leaf in jax.tree.leaves(tree)
    ]
    total = functools.reduce(jnp.maximum, largest, jnp.zeros([], dtype))
    return _largest(total, axis_name)


def _largest(x: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """The largest over the axes, but along none where it is known to be the same."""
    if axis_name is None:
        return x
    axes = bound_axes(axis_name)
    constant = tracked_axes(axes) - varying_axes(x)
    apart = tuple(axis for axis in axes if axis not in constant)
    return jax.lax.pmax(x, apart) if apart else x


def is_nonzero(tree: Any, axis_name: AxisName | None = None) -> Any:
    """For each leaf whether any element is not zero, on any device along the axes."""
    leaves, structure = jax.tree.flatten(tree)
    found = [jnp.any(leaf != 0) for leaf in leaves]
    if axis_name is not None and found:
        stacked = jnp.stack([x.astype(jnp.int32) for x in found])
        found = list(_largest(stacked, axis_name) > 0)
    return jax.tree.unflatten(structure, found)


def slope(
    grad: Any, updates: Any, dtype: jnp.dtype, axis_name: AxisName | None = None
) -> jax.Array:
    """The derivative of a value along `updates`, from what `jax.grad` returns."""
    (total,), exponents = inner_products(
        lambda g, u: [jnp.conj(g), u],  # jax.grad's is the conjugate
        [(0, 1)],
        grad,
        updates,
        groups=[0, 1],
        dtype=dtype,
        axis_name=axis_name,
    )
    return times_power_of_two(total, sum(exponents[1:], start=exponents[0]))


def zeros_like(tree: Any, dtype: Any | None = None) -> Any:
    """Zeros shaped (and sharded) like `tree`; complex leaves stay complex."""

    def zeros(x: Any) -> jax.Array:
        kind = jnp.result_type(x) if dtype is None else jnp.dtype(dtype)
        if dtype is not None and jnp.iscomplexobj(x):
            kind = jnp.complex128 if kind.itemsize == 8 else jnp.complex64
        return jnp.zeros_like(x, dtype=kind)

    return jax.tree.map(zeros, tree)


def slots(x: jax.typing.ArrayLike, count: int) -> jax.Array:
    """Zeros like some copies of a leaf, stacked along a leading axis.

    Like it, and not merely of its shape: where it varies over the devices of a
    `shard_map`, or its axes are split along explicit axes of a mesh, so are they.
    """
    shape = (count, *jnp.shape(x))
    # The dtype is named because that of a Python number is weak.
    zeros = functools.partial(jnp.zeros_like, x, jnp.result_type(x), shape)
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return zeros()
    spec = jax.sharding.PartitionSpec(None, *sharding.spec)
    return zeros(device=jax.sharding.NamedSharding(sharding.mesh, spec))


def cast_like(tree: Any, like: Any) -> Any:
    """Casts every leaf to the dtype of the corresponding leaf of `like`."""
    return jax.tree.map(lambda x, y: jnp.asarray(x).astype(y.dtype), tree, like)


def where(condition: jax.Array, on_true: Any, on_false: Any) -> Any:
    """Selects one of two trees by a scalar condition."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), on_true, on_false)


def check_match(updates: Any, expected: Any, name: str) -> None:
    """Raises unless two trees agree in structure and in the shapes of their leaves.

    Args:
      updates: the gradients given to `update`.
      expected: the tree they must match.
      name: what `expected` is, for the message.
    """
    structure = jax.tree.structure(updates)
    wanted = jax.tree.structure(expected)
    if structure != wanted:
        raise ValueError(
            f"The gradients do not match {name}: their tree is {structure}, expected "
            f"{wanted}. Pass `update` the gradients of the parameters that `init` saw."
        )
    flat, _ = jax.tree_util.tree_flatten_with_path(updates)
    for (path, leaf), other in zip(flat, jax.tree.leaves(expected), strict=True):
        if jnp.shape(leaf) != jnp.shape(other):
            raise ValueError(
                f"The gradients do not match {name}: leaf "
                f"'{jax.tree_util.keystr(path)}' has shape {jnp.shape(leaf)}, expected "
                f"{jnp.shape(other)}."
            )


def check_params(updates: Any, params: Any, name: str) -> None:
    """Raises unless `update` was given parameters, and gradients that match them.

    Args:
      updates: the gradients given to `update`.
      params: the parameters given to it, or None.
      name: what needs them, for the message.
    """
    if params is None:
        raise ValueError(
            f"params=None: {name} needs the parameters. Call "
            "`update(grads, state, params)`."
        )
    check_match(updates, params, "the parameters")

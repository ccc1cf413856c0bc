"""Work on the matrices of leaves, wherever a call finds that these are."""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from nlcg_optax import _tree
from nlcg_optax.matrices import plan
from nlcg_optax.matrices.exchange import Global, Mapped
from nlcg_optax.matrices.layout import Group, Leaf
from nlcg_optax.matrices.matrix import Mask, Matrix, is_kept, mask
from nlcg_optax.matrices.plan import Share, Work


def apply(
    work: Work,
    found: Sequence[tuple[Any, jax.Array, Mask]],
    mesh: Any,
    axis_name: _tree.AxisName | None,
    kept: Any = None,
) -> tuple[list[jax.Array], Any]:
    """Works on the matrices of some leaves where and how it takes least time.

    Args:
      work: what is to be done.
      found: paths, leaves, and their masks.
      mesh: the mesh to use under `jit`; None for the one that is set, if any.
      axis_name: the mapped axis (or axes) of a `shard_map`; None for none.
      kept: what :func:`create` made, or the call before returned; None where the work
        keeps nothing.

    Returns:
      Arrays of the shapes of the leaves, in the dtypes of the arithmetic, and what is
      kept then.
    """
    leaves, mesh, axes = locate(found, mesh, axis_name)
    values = [leaf.value for leaf in leaves]

    def compute(values: list[jax.Array], kept: Any, given: Any, mesh: Any) -> Any:
        here = [leaf._replace(value=x) for leaf, x in zip(leaves, values, strict=True)]
        results, after = {}, []
        if kept is None:
            shares = plan.shares(here, work, mesh, axes)
            parts = [[(s, here, range(len(s.groups)))] for s in shares]
        else:
            shares = lasting(found, work, axis_name is not None)
            parts = [_placed(s, here, mesh, axes) for s in shares]
        for n, alike in enumerate(parts):
            stacks: dict[int, jax.Array] = {}
            for part, those, groups in alike:
                for i in groups:
                    x = part.scatter_group(i, those)
                    stacks[i] = stacks[i] + x if i in stacks else x
            share = alike[0][0]
            before = kept and kept[n]
            if kept is not None and share.how == "split":
                before = jax.tree.map(unsplit, before)
            done, then = work.function(
                [stacks[i] for i in sorted(stacks)], share, before, given
            )
            if kept is not None:
                then = jax.tree.map(functools.partial(_as_kept, share), then, kept[n])
            after.append(then)
            for part, those, groups in alike:
                for i in groups:
                    gathered = part.gather_group(i, done[i], those)
                    results.update((j, y) for j, y in gathered if those[j] is here[j])
        return [results[i] for i in range(len(here))], kept and after

    explicit = None if axis_name is not None else _explicit_mesh(values)
    if explicit is None:
        return compute(values, kept, work.given, mesh)
    # Explicit axes do not say how to multiply or reshape along them: as automatic ones.
    names = _explicit_names(explicit)

    def automatic(values: list[jax.Array], kept: Any, given: Any) -> Any:
        return compute(values, kept, given, jax.sharding.get_abstract_mesh())

    shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, (values, kept))
    with jax.sharding.use_abstract_mesh(explicit):
        run: Any = jax.sharding.auto_axes(automatic, axes=names, out_sharding=shardings)
        return run(values, kept, work.given)


def check_arguments(mesh: Any, matrices: Any, batch_axes: int) -> None:
    """Raises unless a preconditioner of matrices can make something of these."""
    if not isinstance(mesh, jax.sharding.Mesh | jax.sharding.AbstractMesh | None):
        raise ValueError(
            f"mesh={mesh!r} is not valid: expected a jax.sharding.Mesh or None."
        )
    if matrices is not None and batch_axes != 0:
        raise ValueError(
            f"batch_axes={batch_axes!r} is not valid beside `matrices`, which says of "
            "each leaf which axes count matrices: Matrix(rows, columns, batch)."
        )


def number_of(params: Any, mesh: Any, axis_name: _tree.AxisName | None) -> int:
    """How many devices share the work of the steps to come, as far as `init` can tell.

    Raises:
      ValueError: if nothing says how many a mapped axis has.
    """
    if axis_name is None:
        mesh = _explicit_mesh(jax.tree.leaves(params)) or _mesh_of(mesh)
        return math.prod(mesh.shape[axis] for axis in _free_axes(mesh))
    with contextlib.suppress(NameError):
        return math.prod(map(jax.lax.axis_size, _tree.bound_axes(axis_name)))
    axes = _tree.axis_names(axis_name)
    placed = [getattr(x, "sharding", None) for x in jax.tree.leaves(params)]
    meshes = [s.mesh for s in placed if isinstance(s, NamedSharding)]
    for one in (_mesh_of(mesh), *meshes):
        if one is not None and set(axes) <= set(one.axis_names):
            return math.prod(one.shape[axis] for axis in axes)
    raise ValueError(
        f"`init` has to know how many devices the axis {axis_name!r} has, over which "
        "what is kept for each matrix is spread. Call it with parameters that are on "
        "the mesh, or under `jax.set_mesh(mesh)`, or give the preconditioner `mesh=`."
    )


def lasting(
    found: Sequence[tuple[Any, Any, Mask]], work: Work, mapped: bool
) -> list[Share]:
    """The shares of work that keeps something, by whole shapes."""
    shapes = []
    for _, x, said in found:
        dtype = _tree.compute_dtype(jnp.result_type(x))
        value: Any = jax.ShapeDtypeStruct(said.shape or (), dtype)
        shapes.append(Leaf(value, said.matrix))
    if mapped:
        # In a `shard_map` copies on several devices need more than their values say.
        work = dataclasses.replace(work, ways=("spread",))
    return plan.lasting(shapes, work, found[0][2].devices) if found else []


def create(
    work: Work,
    found: Sequence[tuple[Any, Any, Mask]],
    mesh: Any,
    axis_name: _tree.AxisName | None,
    shapes: Callable[[int, int, jnp.dtype], Any],
) -> list[tuple[int, Any]]:
    """What is kept at first, zeros, for each share; and the number of its first leaf.

    Args:
      work: what is to be done.
      found: paths, leaves, and their masks.
      mesh: as for :func:`apply`.
      axis_name: as for :func:`apply`.
      shapes: from the sides of a matrix and the dtype of its arithmetic to a tree of
        `jax.ShapeDtypeStruct`, what is kept for one matrix.
    """
    shares = lasting(found, work, axis_name is not None)
    values = [x for _, x, _ in found]
    explicit = None if axis_name is not None else _explicit_mesh(values)
    mesh = explicit or _mesh_of(mesh)
    if explicit is not None and not any(isinstance(x, Tracer) for x in values):
        mesh = next(getattr(x, "sharding").mesh for x in values)  # noqa: B009
    axes = _free_axes(mesh)
    if axis_name is not None:
        axes = _tree.axis_names(axis_name)
    mapped = False
    with contextlib.suppress(NameError):  # nothing maps them here
        mapped = axis_name is not None and bool(_tree.bound_axes(axis_name))

    def zeros(share: Share, devices: int) -> Any:
        first = share.groups[0]
        dtype = _tree.compute_dtype(jnp.result_type(found[first.numbers[0][0]][1]))
        long = first.stack.long
        lead = (share.slots.rows, devices if share.how == "spread" else 1)

        def zero(x: jax.ShapeDtypeStruct) -> jax.Array:
            shape, spec = (*lead, first.stack.parts, *x.shape), P()
            if share.how == "spread":
                spec = P(None, axes)
            elif share.how == "split" and x.shape[-1:] == (long,):
                part = -(-long // devices)
                shape = (shape[0], devices, *shape[2:-1], part)
                spec = P(None, axes)
            if mapped:
                return _tree.vary(jnp.zeros((shape[0], 1, *shape[2:]), x.dtype), axes)
            if mesh is None or devices == 1:
                return jnp.zeros(shape, x.dtype)
            there = NamedSharding(mesh, spec)
            if explicit is not None:
                return jnp.zeros(shape, x.dtype, device=there)
            return jax.lax.with_sharding_constraint(jnp.zeros(shape, x.dtype), there)

        return jax.tree.map(zero, shapes(first.stack.small, long, dtype))

    def make() -> list[Any]:
        return [zeros(share, found[0][2].devices) for share in shares]

    made = make() if mapped or explicit is not None else jax.jit(make)()
    return [(share.first, x) for share, x in zip(shares, made, strict=True)]


def unsplit(x: jax.Array) -> jax.Array:
    """Whole matrices [rows, 1, parts, ...] of the parts that the devices have."""
    if x.shape[1] == 1:
        return x
    x = jnp.moveaxis(x, 1, -2)
    return x.reshape(*x.shape[:-2], -1)[:, None]


def _as_kept(share: Share, x: jax.Array, before: jax.Array) -> jax.Array:
    """And back; what is kept in slots stays there."""
    if share.how == "split" and before.shape[1] > 1:
        x = x[:, 0].reshape(*x[:, 0].shape[:-1], before.shape[1], before.shape[-1])
        x = jnp.moveaxis(x, -2, 1)
    return share.exchange.stay(x) if before.shape[1] > 1 else x


def _placed(
    share: Share, leaves: Sequence[Leaf], mesh: Any, axes: Sequence[_tree.AxisName]
) -> list[tuple[Share, Sequence[Leaf], Sequence[int]]]:
    """A share where the leaves are: once for each way in which some are sharded.

    With it come leaves that are all sharded so, zeros where they are not, and the
    numbers of the groups in which any is.
    """
    if not axes:
        everywhere = Global(mesh)
        if everywhere.devices == share.exchange.devices:
            share = dataclasses.replace(share, exchange=everywhere)
        return [(share, leaves, range(len(share.groups)))]

    def way(i: int, matrix: Matrix) -> tuple:
        order = (*matrix.rows, *matrix.columns)
        dims = [(a, order.index(d)) for a, d in leaves[i].sharded.items() if d in order]
        return tuple(dims), frozenset(leaves[i].sharded) - {a for a, _ in dims}

    def members(g: Group) -> list[tuple[int, Matrix, tuple]]:
        numbers = zip(g.numbers, g.matrices, strict=True)
        return [(i, matrix, way(i, matrix)) for (i, _), matrix in numbers]

    def local(g: Group, dims: Mapping, copies: int) -> Group:
        item, chunks = list(g.item), g.chunks
        for axis, dim in dims.items():
            item[dim] //= jax.lax.axis_size(axis)
            if dim == len(item) - 1:
                chunks = max(chunks // jax.lax.axis_size(axis), 1)
        return dataclasses.replace(
            g,
            item=tuple(item),
            chunks=chunks,
            sharded=dict(dims),
            stack=dataclasses.replace(g.stack, count=g.stack.count // copies),
            numbers=tuple((i, count // copies) for i, count in g.numbers),
        )

    planned, number = share.exchange.devices, math.prod(map(jax.lax.axis_size, axes))
    if planned != number:
        raise ValueError(
            f"What is kept for matrices was planned for {planned} devices, and the "
            f"axes {', '.join(map(repr, axes))} have {number}. Call `init` with "
            "parameters that are on this mesh, or under `jax.set_mesh(mesh)`; or make "
            "of a state that other devices left one for these, by "
            f"`nlcg_optax.matrices.for_devices(state, {number})`."
        )
    ways = dict.fromkeys(w for g in share.groups for *_, w in members(g))
    found = []
    for dims, layers in ways:
        copies = math.prod(map(jax.lax.axis_size, layers))
        here, groups, numbers = list(leaves), list(share.groups), []
        for n, g in enumerate(share.groups):
            others = [(i, m) for i, m, w in members(g) if w != (dims, layers)]
            if len(others) == len(g.numbers):
                continue
            groups[n] = local(g, dict(dims), copies)
            numbers.append(n)
            for i, matrix in others:
                # Leaves of one group have axes in another order, as its matrices do.
                sizes = dict(zip(matrix.order, groups[n].item, strict=True))
                shape = [sizes[axis] for axis in range(len(sizes))]
                zero = jnp.zeros(shape, leaves[i].value.dtype)
                zero = _tree.vary(zero, tuple(_tree.tracked_axes(axes)))
                here[i] = leaves[i]._replace(value=zero)
        exchange = Mapped([a for a in axes if a not in layers], [a for a, _ in dims])
        placed = dataclasses.replace(share, groups=tuple(groups), exchange=exchange)
        found.append((placed, here, numbers))
    return found


def locate(
    found: Sequence[tuple[Any, jax.Array, Mask]],
    mesh: Any,
    axis_name: _tree.AxisName | None,
) -> tuple[list[Leaf], Any, tuple[_tree.AxisName, ...]]:
    """The leaves, lifted, with what is known of where they are; a mesh; mapped axes."""
    leaves = [Leaf(_tree.lift(g), said.matrix) for _, g, said in found]
    if axis_name is not None:
        axes = _tree.bound_axes(axis_name)
        shards = [_find_shards(*entry, axes) for entry in found]
        leaves = [
            leaf._replace(sharded=sharded, everywhere=not sharded)
            for leaf, sharded in zip(leaves, shards, strict=True)
        ]
        return leaves, mesh, tuple(a for a in axes if jax.lax.axis_size(a) > 1)
    values = [leaf.value for leaf in leaves]
    if _explicit_mesh(values) is not None:
        leaves = [
            leaf._replace(everywhere=not any(jax.typeof(leaf.value).sharding.spec))
            for leaf in leaves
        ]
    else:
        mesh = _mesh_of(mesh)
    if not any(isinstance(x, Tracer) for x in values):
        mesh = None  # outside of `jit` there is no compiler to place anything
    return leaves, mesh, ()


def mask_of(
    path: Any,
    x: Any,
    matrix: Matrix,
    mesh: Any,
    axis_name: _tree.AxisName | None,
    number: int = 1,
    planned_by: Any = None,
) -> Mask:
    """The mask of a parameter, which must not be on devices that the mesh lacks."""
    placed = isinstance(x, jax.Array) and not isinstance(x, Tracer) and x.committed
    if placed and isinstance(mesh, jax.sharding.Mesh):
        missing = x.sharding.device_set - set(mesh.devices.flat)
        if missing:
            names = ", ".join(sorted(map(str, missing)))
            raise ValueError(
                f"The parameter '{jax.tree_util.keystr(path)}' of shape {x.shape} lies "
                f"on {names}, which the mesh that the preconditioner was given "
                f"({mesh.devices.size} devices) does not have. Put the parameters on "
                "the mesh, or give the mesh that they are on."
            )
    axes: tuple[_tree.AxisName, ...] = ()
    if axis_name is not None:
        with contextlib.suppress(NameError):  # nothing maps them here
            axes = _tree.bound_axes(axis_name)
    whole = _known_whole(x, axes)
    return mask(matrix, tuple(jnp.shape(x)) if whole else None, number, planned_by)


def _mesh_of(mesh: Any) -> Any:
    """The mesh that is given, or else set; None for none."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return None if mesh.empty else mesh


def _free_axes(mesh: Any) -> tuple[str, ...]:
    """The axes of a mesh, if any, that no `shard_map` has taken."""
    if mesh is None:
        return ()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind != AxisType.Manual)


def _explicit_names(mesh: Any) -> tuple[str, ...]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)


def _explicit_mesh(grads: Sequence[jax.Array]) -> Any:
    """The mesh of the leaves, if it has explicit axes; else None."""
    meshes = [jax.typeof(g).sharding.mesh for g in grads]
    explicit = (m for m in meshes if not m.empty and AxisType.Explicit in m.axis_types)
    return next(explicit, None)


def _known_whole(x: Any, axes: Sequence[_tree.AxisName]) -> bool:
    """Whether this device is known to hold all of the leaf."""
    return not axes or set(axes) <= _tree.tracked_axes(axes) - _tree.varying_axes(x)


def _find_shards(
    path: Any, g: jax.Array, mask: Mask, axes: Sequence[_tree.AxisName]
) -> dict[_tree.AxisName, int]:
    """Along which of a leaf's axes each mapped axis splits it."""
    if _known_whole(g, axes):
        return {}
    tracked, varying = _tree.tracked_axes(axes), _tree.varying_axes(g)
    parts = [axis for axis in axes if axis not in tracked - varying]
    names = ", ".join(map(repr, parts))
    where = jax.tree_util.keystr(path)
    if mask.shape is None or len(mask.shape) != g.ndim:
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
        if tuple(sizes) == mask.shape and tracked.isdisjoint(copied):
            fits.append(dict(zip(parts, dims, strict=True)))
    if len(fits) != 1:
        found = "could be so in several ways" if fits else "cannot be"
        raise ValueError(
            f"The gradient's leaf '{where}' has shape {g.shape} on each device, and "
            f"`init` saw one of shape {mask.shape}: that it is split over {names} "
            f"{found}. Shard it over one axis, or over axes of different sizes, and "
            "average gradients over the others; or use another preconditioner, such "
            "as 'diagonal_bfgs'."
        )
    return {axis: dim for axis, dim in fits[0].items() if dim is not None}


def state_specs(state: Any, params: Any, specs: Any, axis_name: _tree.AxisName) -> Any:
    """Where each array of an optimizer's state lies, as a `shard_map` has to be told.

    What is kept for matrices is spread over the axes; whatever ends in the path of a
    parameter and has its shape lies as that does; the rest is whole on every device.

    Args:
      state: the state, or its shapes.
      params: the parameters, or their shapes.
      specs: of each parameter the `jax.sharding.PartitionSpec`.
      axis_name: the mapped axis (or axes) that the optimizer was given; under `jit` all
        axes of the mesh.

    Returns:
      A tree like the state, of `jax.sharding.PartitionSpec`.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> from jax.sharding import PartitionSpec as P
    >>> params, specs = {"w": jnp.ones((8, 4))}, {"w": P("data")}
    >>> state = nlcg_optax.nlcg(0.04).init(params)
    >>> got = nlcg_optax.matrices.state_specs(state, params, specs, "data")
    >>> tuple(got[0].prev_update["w"]), tuple(got[0].beta)
    (('data',), ())
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    known = {
        (path, jnp.shape(x)): spec
        for (path, x), spec in zip(leaves, structure.flatten_up_to(specs), strict=True)
    }
    axes = _tree.axis_names(axis_name)

    def spec(path: Any, x: Any) -> Any:
        if is_kept(x):
            spread = P(None, axes)
            return jax.tree.map(lambda y: spread if y.shape[1] > 1 else P(), x)
        ends = ((path[i:], jnp.shape(x)) for i in range(len(path)))
        return next((known[end] for end in ends if end in known), P())

    return jax.tree_util.tree_map_with_path(spec, state, is_leaf=is_kept)

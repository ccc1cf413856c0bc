"""Work on the matrices of leaves, wherever a call finds that these are."""

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType

from nlcg_optax import _tree
from nlcg_optax.matrices import plan
from nlcg_optax.matrices.layout import Leaf
from nlcg_optax.matrices.matrix import Mask, Matrix, mask
from nlcg_optax.matrices.plan import Work


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
      kept: what is kept for each of the :func:`plan.shares`; None for nothing.

    Returns:
      Arrays of the shapes of the leaves, in the dtypes of the arithmetic, and what is
      kept then.
    """
    leaves, mesh, axes = locate(found, mesh, axis_name)
    values = [leaf.value for leaf in leaves]

    def compute(values: list[jax.Array], kept: Any, mesh: Any) -> Any:
        here = [leaf._replace(value=x) for leaf, x in zip(leaves, values, strict=True)]
        results, after = {}, []
        for i, share in enumerate(plan.shares(here, work, mesh, axes)):
            stacks = share.scatter(here)
            stacks, then = work.function(stacks, share, kept and kept[i])
            after.append(then)
            results.update(share.gather(stacks, here))
        return [results[i] for i in range(len(here))], kept and after

    explicit = None if axis_name is not None else _explicit_mesh(values)
    if explicit is None:
        return compute(values, kept, mesh)
    # Explicit axes do not say how to multiply or reshape along them: as automatic ones.
    kinds = dict(zip(explicit.axis_names, explicit.axis_types, strict=True))
    names = tuple(name for name in kinds if kinds[name] == AxisType.Explicit)

    def automatic(values: list[jax.Array], kept: Any) -> Any:
        return compute(values, kept, jax.sharding.get_abstract_mesh())

    shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, (values, kept))
    with jax.sharding.use_abstract_mesh(explicit):
        run: Any = jax.sharding.auto_axes(automatic, axes=names, out_sharding=shardings)
        return run(values, kept)


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
    elif mesh is None:
        mesh = jax.sharding.get_abstract_mesh()
        mesh = None if mesh.empty else mesh
    if not any(isinstance(x, Tracer) for x in values):
        mesh = None  # outside of `jit` there is no compiler to place anything
    return leaves, mesh, ()


def mask_of(
    path: Any, x: Any, matrix: Matrix, mesh: Any, axis_name: _tree.AxisName | None
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
    return mask(matrix, tuple(jnp.shape(x)) if whole else None)


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

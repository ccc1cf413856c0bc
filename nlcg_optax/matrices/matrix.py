"""What a leaf is: a matrix, or several, and the mask that says so in a state."""

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np


class Matrix(NamedTuple):
    """How the axes of a leaf make it a matrix, or several.

    Attributes:
      rows: the axes that, together, count rows.
      columns: the axes that, together, count columns.
      batch: the axes that count matrices: layers of a scan, experts.
      parts: how many matrices are side by side along the columns, as in a kernel that
        makes queries, keys and values at once; each is a matrix by itself.

    A kernel of shape [layers, inputs, 3 · outputs]:

    >>> import nlcg_optax
    >>> nlcg_optax.Matrix(rows=(1,), columns=(2,), batch=(0,), parts=3)
    Matrix(rows=(1,), columns=(2,), batch=(0,), parts=3)
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    batch: tuple[int, ...] = ()
    parts: int = 1

    @property
    def order(self) -> tuple[int, ...]:
        """All axes, in the order in which matrices are stacked."""
        return (*self.batch, *self.rows, *self.columns)

    def sides(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """How many matrices a leaf of a shape is, their rows, and their columns."""
        rows, columns, batch = (
            math.prod(shape[axis] for axis in axes) for axes in self[:3]
        )
        return batch * self.parts, rows, columns // self.parts


# From a leaf's path and the leaf to what it is, None for no matrix; or a tree of these.
Matrices = Callable[[Any, Any], Matrix | None] | Any


class Mask(tuple):
    """In a tree of what is kept of leaves that are no matrices: here is a matrix.

    To whatever flattens or stores a state this is a named tuple without fields. What it
    says is said by its class, of which there is one for each matrix and shape, so that
    it is part of the tree's structure and nothing of the kind has to be stored.

    Attributes:
      matrix: which axes of the leaf are its rows, its columns, and count matrices.
      shape: of the whole leaf, by which shards of it are known in a `shard_map`; None
        where `init` saw a shard, or may have.
      devices: for how many of them it was planned what is kept for each matrix.
      planned_by: what else that plan follows from, and the preconditioner knows.
    """

    __slots__ = ()
    _fields = ()
    matrix: ClassVar[Matrix]
    shape: ClassVar[tuple[int, ...] | None]
    devices: ClassVar[int]
    planned_by: ClassVar[Any]

    def __reduce__(self) -> Any:
        return mask, (self.matrix, self.shape, self.devices, self.planned_by)

    def planned_for(self, devices: int) -> "Mask":
        """The same for another number of devices."""
        return mask(self.matrix, self.shape, devices, self.planned_by)

    def __repr__(self) -> str:
        text = f"Mask(matrix={self.matrix}, shape={self.shape}"
        return text + (f", devices={self.devices})" if self.devices > 1 else ")")


@functools.cache
def mask(
    matrix: Matrix,
    shape: tuple[int, ...] | None,
    devices: int = 1,
    planned_by: Any = None,
) -> Mask:
    """The mask of a matrix; the same object for the same arguments."""
    said = {"__slots__": (), "matrix": matrix, "shape": shape, "devices": devices}
    return type("Mask", (Mask,), said | {"planned_by": planned_by})()


def is_mask(x: Any) -> bool:
    """For `is_leaf`: a mask is no leaf of its own."""
    return isinstance(x, Mask)


def is_kept(x: Any) -> bool:
    """Whether this is a tuple of arrays [rows, devices, parts, ...]: state of matrices.

    Each device of a mesh has its own part along the second axis, and nobody else's, or
    all of it where that is 1.
    """
    return getattr(type(x), "kept_by_devices", False)


def check(path: Any, leaf: Any, matrix: Any) -> Matrix | None:
    """What a function or a tree gave, with axes counted from the first.

    Raises:
      ValueError: if it does not fit the leaf.
    """
    if matrix is None:
        return None
    shape = tuple(np.shape(leaf))
    where = f"'{jax.tree_util.keystr(path)}' of shape {shape}"
    if not isinstance(matrix, Matrix):
        raise ValueError(
            f"`matrices` gave {matrix!r} for the parameter {where}: expected an "
            "nlcg_optax.Matrix, or None for a leaf that is no matrix."
        )
    ndim = len(shape)
    named = sorted(axis + ndim if axis < 0 else axis for axis in matrix.order)
    if not matrix.rows or not matrix.columns or named != list(range(ndim)):
        raise ValueError(
            f"`matrices` gave {matrix} for the parameter {where}: rows, columns and "
            f"batch have to name each of its axes, 0 to {ndim - 1}, once, and rows and "
            "columns at least one. None is for a leaf that is no matrix."
        )
    width = math.prod(shape[axis] for axis in matrix.columns)
    if not isinstance(matrix.parts, int) or matrix.parts < 1 or width % matrix.parts:
        raise ValueError(
            f"`matrices` gave {matrix} for the parameter {where}: its {width} "
            f"columns do not come apart into parts={matrix.parts!r} of one size."
        )
    rows, columns, batch = (tuple(axis % ndim for axis in axes) for axes in matrix[:3])
    return Matrix(rows, columns, batch, matrix.parts)

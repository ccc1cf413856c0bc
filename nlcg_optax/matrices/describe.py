"""Which leaves are matrices, and how: functions for `scale_by_orthogonalization`."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from nlcg_optax.matrices import newton_schulz
from nlcg_optax.matrices.plan import Matrix

Matrices = Callable[[Any, Any], Matrix | None]


def last_axis(path: Any, leaf: Any) -> Matrix | None:
    """Two axes and more: the last counts columns, all before it together rows.

    >>> import jax.numpy as jnp
    >>> from nlcg_optax import matrices
    >>> matrices.last_axis((), jnp.ones((3, 3, 8, 16)))
    Matrix(rows=(0, 1, 2), columns=(3,), batch=(), parts=1)
    """
    del path
    return by_last_axis(leaf)


def by_last_axis(leaf: Any, batch_axes: int = 0) -> Matrix | None:
    """As :func:`last_axis` says, of what follows some axes that count matrices."""
    axes = tuple(range(np.ndim(leaf)))
    if len(axes) - batch_axes < 2:
        return None
    return Matrix(axes[batch_axes:-1], axes[-1:], axes[:batch_axes])


def flax(path: Any, leaf: Any) -> Matrix | None:
    """For parameters of Flax's layers, NNX or Linen.

    Biases and scales are no matrices, of however many axes (those of attention have
    two), and embeddings are none either. The kernels of queries, keys and values, of
    shape [inputs, heads, features], have inputs by outputs. All else is as by
    :func:`last_axis`.

    >>> import jax.numpy as jnp
    >>> from jax.tree_util import DictKey
    >>> from nlcg_optax import matrices
    >>> query = (DictKey("attention"), DictKey("query"))
    >>> matrices.flax((*query, DictKey("kernel")), jnp.ones((64, 4, 16)))
    Matrix(rows=(0,), columns=(1, 2), batch=(), parts=1)
    >>> matrices.flax((*query, DictKey("bias")), jnp.ones((4, 16)))
    """
    names = [name for name in map(_name, path) if name not in ("value", "raw_value")]
    parent, name = ["", "", *names][-2:]
    if name in ("bias", "scale", "embedding"):
        return None
    if name == "kernel" and parent in ("query", "key", "value") and np.ndim(leaf) == 3:
        return Matrix((0,), (1, 2))
    return last_axis(path, leaf)


def equinox(path: Any, leaf: Any) -> Matrix | None:
    """For parameters of Equinox's layers, whose first axis is that of outputs.

    Biases are no matrices, of however many axes. (The weight of an embedding cannot be
    told from that of a linear layer: write a function that asks this one for the rest.)

    >>> import jax.numpy as jnp
    >>> from jax.tree_util import GetAttrKey
    >>> from nlcg_optax import matrices
    >>> convolution = (GetAttrKey("layers"), GetAttrKey("weight"))
    >>> matrices.equinox(convolution, jnp.ones((16, 4, 3, 3)))
    Matrix(rows=(1, 2, 3), columns=(0,), batch=(), parts=1)
    """
    axes = tuple(range(np.ndim(leaf)))
    if len(axes) < 2 or (path and _name(path[-1]) == "bias"):
        return None
    return Matrix(axes[1:], axes[:1])


def describe(
    what: optax.GradientTransformation | Matrices, params: Any, *, iterations: int = 5
) -> None:
    """Prints what orthogonalization does with each parameter, on one device.

    Args:
      what: an optimizer that orthogonalizes somewhere, or a function of path and leaf,
        as `scale_by_orthogonalization` takes it.
      params: the parameters, or their shapes.
      iterations: steps of the iteration, for the count of operations.

    Raises:
      ValueError: if the optimizer does not orthogonalize; if what the function gives
        does not fit a leaf.

    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> params = {"w": jnp.ones((64, 192)), "b": jnp.ones(192)}
    >>> nlcg_optax.describe(nlcg_optax.nlcg(0.04), params)
    path     shape     treatment       operations      bytes
    ['b']    192       second moment            0        768
    ['w']    64×192    64×192           1.206e+07      49152
    """
    from nlcg_optax.preconditioners import orthogonalization

    if not isinstance(what, optax.GradientTransformation):
        what = orthogonalization.scale_by_orthogonalization(matrices=what)
    shapes = jax.eval_shape(lambda tree: tree, params)
    state = jax.eval_shape(what.init, shapes)
    kind = orthogonalization.OrthogonalizationState
    place = orthogonalization.NoSecondMoment
    # One for each orthogonalizer, which may see a part of the parameters only.
    found = [
        dict(
            jax.tree_util.tree_leaves_with_path(
                node.second_moment, is_leaf=lambda x: isinstance(x, place)
            )
        )
        for node in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
        if isinstance(node, kind)
    ]
    if not found:
        raise ValueError(
            "This optimizer has no state of `scale_by_orthogonalization`: it "
            "orthogonalizes nothing."
        )
    method = newton_schulz.Method(((0.0, 0.0, 0.0),) * iterations)
    rows = [("path", "shape", "treatment", "operations", "bytes")]
    for (path, leaf), nodes in itertools.product(
        jax.tree_util.tree_leaves_with_path(shapes), found
    ):
        if path not in nodes:
            continue
        node = nodes[path]
        treatment, operations = "second moment", 0.0
        if isinstance(node, place):
            count, m, n = sides(node.matrix, leaf.shape)
            treatment = f"{m}×{n}" if count == 1 else f"{count} × {m}×{n}"
            operations = count * sum(
                newton_schulz.operations(min(m, n), max(m, n), method, stacked=False)
            )
        rows.append(
            (
                jax.tree_util.keystr(path),
                "×".join(map(str, leaf.shape)) or "scalar",
                treatment,
                f"{operations:.4g}",
                str(leaf.size * leaf.dtype.itemsize),
            )
        )
    first, second, third = (max(len(row[i]) for row in rows) for i in range(3))
    for path, shape, treatment, operations, size in rows:
        texts = path.ljust(first + 3), shape.ljust(second + 3), treatment.ljust(third)
        print(*texts, operations.rjust(12), size.rjust(10))


def sides(matrix: Matrix, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """How many matrices a leaf is, their rows, and their columns."""
    batch, rows, columns = (
        math.prod(shape[axis] for axis in axes)
        for axes in (matrix.batch, matrix.rows, matrix.columns)
    )
    return batch * matrix.parts, rows, columns // matrix.parts


def check(path: Any, leaf: Any, matrix: Any) -> Matrix | None:
    """What a function gave, with axes counted from the first.

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
    named = [axis for axes in matrix[:3] for axis in axes]
    if (
        not matrix.rows
        or not matrix.columns
        or sorted(axis + ndim if axis < 0 else axis for axis in named)
        != list(range(ndim))
    ):
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


def _name(key: Any) -> str:
    """What a key of a path says: an attribute's name, a dictionary's key, a number."""
    for field in ("key", "name", "idx"):
        if hasattr(key, field):
            return str(getattr(key, field))
    return str(key)

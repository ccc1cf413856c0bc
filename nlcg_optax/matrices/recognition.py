"""Which leaves are matrices, and how: by shapes and the names of common libraries."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import GetAttrKey

from nlcg_optax import _check
from nlcg_optax.matrices.matrix import Matrices, Matrix, check


class Decision(NamedTuple):
    """What a leaf is taken for, and why in words."""

    matrix: Matrix | None
    why: str
    sure: bool = True  # path and shape allow no other reading


def recognize(path: Any, leaf: Any) -> Matrix | None:
    """What path and shape say, by the names of Flax, Haiku and Equinox: the default.

    - Fewer than two axes, a name of ``bias``, ``scale`` or ``offset``, an Equinox
      ``weight`` of a normalization, and three axes or more of which but one is longer
      than 1: no matrix. Embeddings are none either, known by an ``embed`` in their name
      or (for the weights of Equinox) in that of their layer.
    - Other leaves of two axes: rows by columns.
    - The kernels of attention in Flax: inputs by heads · features, and back.
    - Convolutions, of outputs last (``kernel`` and ``w``) or first (Equinox's
      ``weight``): all other axes are rows. A kernel of four axes is one, and one of
      three or more where its layer's name says so.
    - All else is as by :func:`last_axis` (a ``weight`` of Equinox as by
      :func:`equinox`), which is a guess: by default a warning tells of these.

    Args:
      path: keys of the leaf, as in `jax.tree_util`.
      leaf: the leaf, or its shape and dtype.

    >>> import jax.numpy as jnp
    >>> from jax.tree_util import DictKey, GetAttrKey
    >>> from nlcg_optax import matrices
    >>> query = (DictKey("attention"), DictKey("query"), DictKey("kernel"))
    >>> matrices.recognize(query, jnp.ones((64, 4, 16)))
    Matrix(rows=(0,), columns=(1, 2), batch=(), parts=1)
    >>> convolution = (GetAttrKey("layers"), GetAttrKey("weight"))
    >>> matrices.recognize(convolution, jnp.ones((16, 4, 3, 3)))
    Matrix(rows=(1, 2, 3), columns=(0,), batch=(), parts=1)
    """
    return decide(path, np.shape(leaf)).matrix


def decide(path: Any, shape: Sequence[int], batch_axes: int = 0) -> Decision:
    """As :func:`recognize` says, of what follows some axes that count matrices."""
    shape = tuple(shape)[batch_axes:]
    parent, name = _names(path)
    ndim, layer = len(shape), parent.lower()
    outputs_first = name == "weight" and isinstance(path[-1], GetAttrKey)
    last = Matrix(tuple(range(ndim - 1)), (ndim - 1,)) if ndim > 1 else None
    first = Matrix(tuple(range(1, ndim)), (0,)) if ndim > 2 else last

    def decided() -> Decision:
        if last is None:
            return Decision(None, "fewer than two axes")
        if name in ("bias", "scale", "offset") or (name == "b" and "conv" in layer):
            return Decision(None, f"a {'bias' if name == 'b' else name}")
        if "embed" in (layer if outputs_first and ndim == 2 else name.lower()):
            return Decision(None, "an embedding")
        if outputs_first and "norm" in layer:
            return Decision(None, "the scale of a normalization")
        if ndim == 2:
            return Decision(last, "two axes")
        if name == "kernel" and layer in ("query", "key", "value", "out"):
            if ndim == 3:
                into = Matrix((0,), (1, 2)) if layer != "out" else last
                return Decision(into, "attention, by heads")
        elif name in ("kernel", "w") or outputs_first:
            # Five axes are a convolution over space, or stacked ones over images.
            convolution = "conv" in layer and (ndim < 5 or "conv3" in layer)
            if convolution or (ndim == 4 and name != "w"):
                if name == "w" and "transpose" in layer:  # outputs before inputs
                    between = (*range(ndim - 2), ndim - 1)
                    return Decision(Matrix(between, (ndim - 2,)), "a convolution")
                return Decision(first if outputs_first else last, "a convolution")
        if sum(size > 1 for size in shape) < 2:
            return Decision(None, "a vector")
        guess, which = (first, "first") if outputs_first else (last, "last")
        return Decision(guess, f"a guess: the {which} axis by the others", False)

    decision = decided()
    if not batch_axes or decision.matrix is None:
        return decision
    rows, columns = (
        tuple(axis + batch_axes for axis in axes) for axes in decision.matrix[:2]
    )
    matrix = Matrix(rows, columns, tuple(range(batch_axes)))
    return decision._replace(matrix=matrix)


def _looked_up(tree: Any) -> Matrices:
    """A function of path and leaf that looks up what a tree says."""
    said = dict(
        jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda x: x is None or isinstance(x, Matrix)
        )
    )

    def matrices(path: Any, leaf: Any) -> Any:
        del leaf
        if path not in said:
            raise ValueError(
                f"`matrices` is a {type(tree).__name__}, a tree, and has nothing for "
                f"the parameter '{jax.tree_util.keystr(path)}': expected a tree like "
                "the parameters of nlcg_optax.Matrix and None, or a function of path "
                "and leaf. (What can be called and is a tree is the tree: of a module "
                "that is to be called give the function, `lambda path, leaf: "
                "module(path, leaf)`.)"
            )
        return said[path]

    return matrices


def all_of(
    params: Any, matrices: Matrices | None = None, batch_axes: int = 0
) -> dict[Any, Matrix | None]:
    """What the leaves of a tree, or of their shapes, are by their paths.

    A function or a tree may say so; else :func:`decide` does, and a warning names
    leaves of which it is not sure. (With `batch_axes` it is to be.)
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if matrices is not None:
        function = _check.is_function(matrices)
        says = matrices if function else _looked_up(matrices)
        return {path: check(path, x, says(path, x)) for path, x in leaves}
    found = {path: decide(path, np.shape(x), batch_axes) for path, x in leaves}
    unsure = [
        f"'{jax.tree_util.keystr(path)}' of shape {tuple(np.shape(x))}"
        for path, x in leaves
        if not found[path].sure
    ]
    if unsure and not batch_axes:
        warnings.warn(
            f"Which axes of {', '.join(unsure)} are rows, and which columns? Names and "
            "shapes do not say. The last axis was taken as columns (of Equinox's "
            "weights the first) and the others as rows: right for a convolution, wrong "
            "for stacked layers. Say it by `nlcg_optax.scale_by_orthogonalization`: "
            "`batch_axes=1` where all first axes count layers, else `matrices=`, a "
            "function of path and leaf (`nlcg_optax.matrices.recognize` is this guess, "
            "without a warning). `nlcg_optax.describe` prints what is what.",
            UserWarning,
            stacklevel=3,
        )
    return {path: decision.matrix for path, decision in found.items()}


def last_axis(path: Any, leaf: Any) -> Matrix | None:
    """Two axes and more: the last counts columns, all before it together rows.

    >>> import jax.numpy as jnp
    >>> from nlcg_optax import matrices
    >>> matrices.last_axis((), jnp.ones((3, 3, 8, 16)))
    Matrix(rows=(0, 1, 2), columns=(3,), batch=(), parts=1)
    """
    del path
    axes = tuple(range(np.ndim(leaf)))
    return Matrix(axes[:-1], axes[-1:]) if len(axes) > 1 else None


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
    parent, name = _names(path)
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
    if len(axes) < 2 or _names(path)[1] == "bias":
        return None
    return Matrix(axes[1:], axes[:1])


def _names(path: Any) -> tuple[str, str]:
    """Of a leaf's layer and of itself, as a path of attributes or keys has them."""
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    names = [name for name in names if not name.isdigit()]
    # Of an `nnx.State` a leaf is the value of a variable. (Attention has one, too.)
    if names[-1:] in (["value"], ["raw_value"]):
        names.pop()
    parent, name = ["", "", *names][-2:]
    return parent, name

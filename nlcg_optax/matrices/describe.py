"""What a preconditioner of matrices does with each parameter, as a table."""

from typing import Any

import jax
import optax

from nlcg_optax.matrices import newton_schulz, recognition
from nlcg_optax.matrices.matrix import Mask, Matrices, Matrix, is_kept, is_mask


def describe(
    what: optax.GradientTransformation | Matrices, params: Any, *, iterations: int = 5
) -> None:
    """Prints what is done with each parameter as a matrix, on one device, and why.

    The last column says by what a leaf was recognized
    (:func:`nlcg_optax.matrices.recognize`), or that it was told: by `matrices=` or
    `batch_axes=`, otherwise than by default.

    Args:
      what: an optimizer that orthogonalizes somewhere, or preconditions by SOAP; or a
        function of path and leaf, as `scale_by_orthogonalization` takes it.
      params: the parameters, or their shapes.
      iterations: steps of the iteration, for the count of operations. (Those of SOAP
        are of a step in which no basis is renewed.)

    Raises:
      ValueError: if the optimizer does neither; if what the function gives
        does not fit a leaf.

    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> params = {"w": jnp.ones((64, 192)), "b": jnp.ones(192)}
    >>> nlcg_optax.describe(nlcg_optax.nlcg(0.04), params)
    path     shape     treatment       operations      bytes  why
    ['b']    192       second moment            0        768  fewer than two axes
    ['w']    64×192    64×192           1.206e+07      49152  two axes
    """
    shapes = jax.eval_shape(lambda tree: tree, params)
    if isinstance(what, optax.GradientTransformation):
        # One for each orthogonalizer, which may see a part of the parameters only.
        state = jax.eval_shape(what.init, shapes)
        nodes = filter(_has_masks, jax.tree.leaves(state, is_leaf=_has_masks))
        found = [(_masks(node.second_moment), _sides(node)) for node in nodes]
    else:
        found = [(recognition.all_of(shapes, what), None)]
    if not found:
        raise ValueError(
            "This optimizer has no state of `scale_by_orthogonalization` or "
            "`scale_by_soap`: nothing is a matrix to it."
        )
    method = newton_schulz.Method(((0.0, 0.0, 0.0),) * iterations)
    rows = [("path", "shape", "treatment", "operations", "bytes", "why")]
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        here = [
            (matrices[path], sides) for matrices, sides in found if path in matrices
        ]
        for matrix, sides in here:
            treatment, operations = "second moment", 0.0
            if matrix is not None:
                count, m, n = matrix.sides(leaf.shape)
                treatment = f"{m}×{n}" if count == 1 else f"{count} × {m}×{n}"
                each = sum(method.operations(min(m, n), max(m, n), stacked=False))
                if sides is not None:
                    treatment += ", SOAP"
                    each = sum(6.0 * m * n * side for side in (m, n) if side in sides)
                operations = count * each
            decision = recognition.decide(path, leaf.shape)
            why = "as told" if decision.matrix != matrix else decision.why
            shape = "×".join(map(str, leaf.shape)) or "scalar"
            size = str(leaf.size * leaf.dtype.itemsize)
            name = jax.tree_util.keystr(path)
            rows.append((name, shape, treatment, f"{operations:.4g}", size, why))
    first, second, third = (max(len(row[i]) for row in rows) for i in range(3))
    for path, shape, treatment, operations, size, why in rows:
        texts = path.ljust(first + 3), shape.ljust(second + 3), treatment.ljust(third)
        print(*texts, operations.rjust(12), size.rjust(10), "", why)


def _has_masks(node: Any) -> bool:
    """Whether this is a state that keeps second moments of what is no matrix."""
    return hasattr(node, "second_moment")


def _sides(node: Any) -> set[int] | None:
    """The sides that have a basis, of SOAP's state; None of another."""
    if not hasattr(node, "factors"):
        return None
    kept = filter(is_kept, jax.tree.leaves(node.factors, is_leaf=is_kept))
    both = ((one.left, one.right) for one in kept)
    return {x.shape[-1] for pair in both for x in pair if x is not None}


def _masks(moments: Any) -> dict[Any, Matrix | None]:
    leaves = jax.tree_util.tree_leaves_with_path(moments, is_leaf=is_mask)
    return {path: x.matrix if isinstance(x, Mask) else None for path, x in leaves}

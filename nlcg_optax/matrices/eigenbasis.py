r"""Bases that follow the eigenvectors of averaged Gram matrices, by products alone.

One step of orthogonal iteration makes the basis Q of a positive semidefinite matrix L
the orthogonal factor of L Q. A Householder QR does that column after column; here it is
made of products, Cholesky factors and triangular solves, which matrix units are fast at
and which work on stacks.

With :math:`A = Q^H L Q + \delta I`, L Q is Q A but for the ridge, and so the factor
wanted is Q times that of A. If :math:`A = C C^H`, then
:math:`A^H A = C (C^H C) C^H = (C C_1) (C C_1)^H` with :math:`C_1` the Cholesky factor
of :math:`C^H C`, so that

.. math:: Q \leftarrow Q\, C\, C_1^{-H} .

That is CholeskyQR (Yamamoto et al., 2015) of C, whose condition number is the root of
A's, where CholeskyQR of L Q would square it. A second pass, of the new Q itself, brings
it to rounding, and keeps errors from adding up over the steps.
"""

import jax
import jax.numpy as jnp

_HIGHEST = jax.lax.Precision.HIGHEST
# Of a renewal, products of n×n matrices as operations over n³: four to make A, two for
# the Gram matrices each, two to turn Q; three factors, and two solves.
OPERATIONS = 4 + 2 * 2 + 2 + 3 / 3 + 2 * 1


def renew(matrix: jax.Array, basis: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""One step of orthogonal iteration.

    Eigenvectors whose eigenvalues are below the ridge, :math:`4 \sqrt n` roundings of
    the trace, are not told apart. That keeps it defined where matrices are singular.

    Args:
      matrix: positive semidefinite matrices L, [..., n, n].
      basis: orthogonal ones Q of the same shape.

    Returns:
      The new Q, and whether there is one, [...]: elsewhere, as where L has numbers that
      are not finite, Q is what it was.

    >>> import jax.numpy as jnp
    >>> from nlcg_optax.matrices import eigenbasis
    >>> matrix, basis = jnp.array([[2.0, 1.0], [1.0, 2.0]]), jnp.eye(2)
    >>> for _ in range(20):
    ...     basis, _ = eigenbasis.renew(matrix, basis)
    >>> found = basis.T @ matrix @ basis
    >>> print(*(f"{x:.3f}" for x in jnp.diagonal(found)), abs(found[0, 1]) < 1e-4)
    3.000 1.000 True
    """
    n = matrix.shape[-1]
    identity = jnp.eye(n, dtype=matrix.dtype)
    trace = jnp.trace(matrix, axis1=-2, axis2=-1)[..., None, None].real
    safe = jnp.where(trace > 0, trace, 1).astype(matrix.dtype)
    inner = _product(basis.conj().mT, _product(matrix / safe, basis))
    # Of zero every vector is an eigenvector.
    inner = jnp.where(trace > 0, inner, identity)
    ridge = 4 * n**0.5 * float(jnp.finfo(matrix.dtype).eps)
    factor = _cholesky((inner + inner.conj().mT) / 2 + ridge * identity)
    turned = _over(factor, _product(factor.conj().mT, factor))
    found = _product(basis, turned)
    found = _over(found, _product(found.conj().mT, found))
    good = jnp.all(jnp.isfinite(found), (-2, -1)) & jnp.isfinite(trace[..., 0, 0])
    return jnp.where(good[..., None, None], found, basis), good


def _over(x: jax.Array, gram: jax.Array) -> jax.Array:
    """X over the conjugate transpose of the Cholesky factor of its Gram matrix."""
    return jax.lax.linalg.triangular_solve(
        _cholesky(gram),
        x,
        left_side=False,
        lower=True,
        transpose_a=True,
        conjugate_a=jnp.iscomplexobj(x),
    )


def _cholesky(x: jax.Array) -> jax.Array:
    return jnp.linalg.cholesky(x, symmetrize_input=False)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=_HIGHEST)

"""The Newton–Schulz iteration for polar factors, as pure functions of arrays."""

import jax
import jax.numpy as jnp

# a x + b x³ + c x⁵ maps (0, 1] towards 1, and small values fast (Muon's choice).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def polar_factor(x: jax.Array, iterations: int, scale: float = 1.0) -> jax.Array:
    """The orthogonal polar factor (XXᴴ)^(-1/2) X, approximately, times a scale.

    Args:
      x: matrices, real or complex, of shape [..., m, n].
      iterations: steps of the iteration.
      scale: what the singular values are to be.

    Returns:
      Matrices of the shape of `x`; zero where `x` is.
    """
    # Squares of very small or large entries would leave the range.
    largest = jnp.max(jnp.abs(x), (-2, -1), keepdims=True)
    x = x / jnp.where(largest == 0, 1, largest).astype(x.dtype)
    wide = x.shape[-2] <= x.shape[-1]
    gram = _multiply(x, x.conj().mT) if wide else _multiply(x.conj().mT, x)
    # The squared Frobenius norm.
    trace = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None].real
    trace = jnp.where(trace == 0, 1, trace)
    factor = newton_schulz(gram / trace.astype(x.dtype), iterations)
    factor = factor * (scale / jnp.sqrt(trace)).astype(x.dtype)
    return _multiply(factor, x) if wide else _multiply(x, factor)


def newton_schulz(gram: jax.Array, iterations: int) -> jax.Array:
    """The matrix by which the iteration multiplies X, given its Gram matrix.

    All factors are polynomials of the Gram matrix, the smaller of the two that X has:
    X itself is read twice, and communicated once where it is sharded.
    """
    a, b, c = COEFFICIENTS
    factor = None
    for i in range(iterations):
        square = _multiply(gram, gram)
        step = a * jnp.eye(gram.shape[-1], dtype=gram.dtype) + b * gram + c * square
        factor = step if factor is None else _multiply(factor, step)
        if i < iterations - 1:
            gram = _multiply(_multiply(step, gram), step)
    assert factor is not None
    return factor


def _multiply(a: jax.Array, b: jax.Array) -> jax.Array:
    # The errors of bfloat16 products would grow by 3.44 squared with each iteration.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

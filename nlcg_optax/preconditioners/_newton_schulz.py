"""The Newton–Schulz iteration for polar factors, as pure functions of arrays."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

# a x + b x³ + c x⁵ maps (0, 1] towards 1, and small values fast (Muon's choice).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Elements of the Gram matrices that are iterated on at a time, to bound the memory.
CHUNK = 2**24


def polar_factor(x: jax.Array, iterations: int, scale: float = 1.0) -> jax.Array:
    """The orthogonal polar factor (XXᴴ)^(-1/2) X, approximately, times a scale.

    Args:
      x: matrices, real or complex, of shape [..., m, n].
      iterations: steps of the iteration.
      scale: what the singular values are to be.

    Returns:
      Matrices of the shape of `x`; zero where `x` is.
    """
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    stacked = x.reshape(-1, *x.shape[-2:])
    (y,) = polar_factors([stacked], iterations, [scale])
    y = y.reshape(x.shape)
    return y if wide else y.mT


def polar_factors(
    xs: Sequence[jax.Array],
    iterations: int,
    scales: Sequence[float],
    *,
    add: Callable[..., jax.Array] | None = None,
    pick: Callable[[jax.Array, int], jax.Array] | None = None,
    largest: Callable[[jax.Array], jax.Array] = lambda x: x,
    total: Callable[[jax.Array], jax.Array] = lambda gram: gram,
) -> list[jax.Array]:
    """Polar factors of stacks of matrices of one small side, which share an iteration.

    Args:
      xs: stacks, of shape [k, ..., m, n] with m <= n; k and n may differ.
      iterations: steps of the iteration.
      scales: for each stack, what the singular values are to be.
      add: from an operation and stacks of shape [k, ...] to the one stack in which they
        share slots, combined by the operation where they share one: but one of them
        is zero there. By default no two share one.
      pick: from the one stack to the slots of the stack of a number.
      largest: the largest of something over devices that have parts of each matrix.
      total: the sum of something over those.

    Returns:
      Stacks of the shapes of `xs`.
    """
    ends = [sum(x.shape[0] for x in xs[: i + 1]) for i in range(len(xs))]
    if add is None or pick is None:

        def add(_, stacks):
            return jnp.concatenate(stacks) if len(stacks) > 1 else stacks[0]

        def pick(stack, i):
            return stack[ends[i] - xs[i].shape[0] : ends[i]]

    # Squares of very small or large entries would leave the range.
    peaks = [jnp.max(jnp.abs(x), (-2, -1), keepdims=True) for x in xs]
    peak = largest(add(jnp.maximum, peaks))
    peak = jnp.where(peak == 0, 1, peak)
    xs = [x / pick(peak, i).astype(x.dtype) for i, x in enumerate(xs)]
    gram = total(add(jnp.add, [_multiply(x, x.conj().mT) for x in xs]))
    # The squared Frobenius norm.
    trace = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None].real
    trace = jnp.where(trace == 0, 1, trace)
    gram = gram / trace.astype(gram.dtype)
    size = max(1, CHUNK // max(1, math.prod(gram.shape[1:])))
    chunks = [
        newton_schulz(gram[i : i + size], iterations)
        for i in range(0, gram.shape[0], size)
    ]
    factor = jnp.concatenate(chunks) if len(chunks) > 1 else chunks[0]
    factor = factor / jnp.sqrt(trace).astype(gram.dtype)
    return [
        _multiply(pick(factor, i) * jnp.asarray(scale, x.dtype), x)
        for i, (x, scale) in enumerate(zip(xs, scales, strict=True))
    ]


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


def iteration_operations(small: int, iterations: int) -> float:
    """Operations of `newton_schulz` for one Gram matrix."""
    products = iterations + (iterations - 1) + 2 * (iterations - 1)
    return products * 2.0 * small**3


def outer_operations(small: int, long: int) -> float:
    """Operations of making one Gram matrix, and of multiplying X with the factor."""
    return 2 * 2.0 * small**2 * long


def _multiply(a: jax.Array, b: jax.Array) -> jax.Array:
    # The errors of bfloat16 products would grow by 3.44 squared with each iteration.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

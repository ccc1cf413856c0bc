"""The Newton–Schulz iteration for polar factors, as pure functions of arrays."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

Coefficients = Sequence[tuple[float, float, float]]

# Of a x + b x³ + c x⁵. Muon's maps (0, 1] towards 1, and small values fast. Those of
# Polar Express (Amsel et al., arXiv:2505.16932) are each the best that can follow the
# ones before, here for five steps and singular values of at least 1/500 of the bound,
# and for four and those of 1/100 (`benchmarks/matrices/coefficients.py`
# computes them).
MUON = ((3.4445, -4.7750, 2.0315),)
POLAR_EXPRESS = (
    (8.253595227743643, -23.50322074147463, 17.233118511300717),
    (4.055362684994962, -2.935300513752399, 0.547050881969206),
    (3.7307534901767996, -2.7897420303056277, 0.5442611269073386),
    (2.808983598362529, -2.0965465180030503, 0.46591534682373165),
    (2.0027032206820636, -1.385578578850389, 0.3887952625970629),
    (1.875, -1.25, 0.375),
)
POLAR_EXPRESS_IN_FOUR = (
    (7.989906545828694, -22.75233181040092, 16.682548949777498),
    (3.6433823852176985, -2.726839433373312, 0.5371049566023567),
    (2.671214024452903, -1.985272532208051, 0.4535177515384369),
    (1.958878649729896, -1.3403422800688176, 0.384142670433097),
)
# By so much all steps but the last allow for values that rounding leaves above 1.
SAFETY = 1.01
# Beyond so many elements of Gram matrices one row of slots is iterated on at a time, to
# bound the memory, and the program.
CHUNK = 2**24
# Smaller products of symmetric result are made whole.
HERMITIAN_BLOCK = 256
HALF = ("bfloat16", "float16")


def coefficients_of(name: str | Coefficients, iterations: int) -> Coefficients:
    """The coefficients of each step; the last are used again where steps are left."""
    if name == "muon":
        return MUON * iterations
    if isinstance(name, str):
        known = POLAR_EXPRESS_IN_FOUR if iterations == 4 else POLAR_EXPRESS
        known += known[-1:] * iterations
        safe = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in known]
        return (*safe[: iterations - 1], known[iterations - 1])
    known = tuple((a, b, c) for a, b, c in name)
    return (known + known[-1:] * iterations)[:iterations]


class Method(NamedTuple):
    """How to iterate."""

    coefficients: Coefficients  # of each step
    precision: str = "highest"  # of the products
    # By which the matrix is divided first, an upper bound of its largest singular
    # value: Frobenius's ("frobenius"), which Muon's coefficients were made for; or the
    # Schatten norm of order 8 ("schatten"), which is closer, and costs nothing since
    # the square of the Gram matrix tells it.
    norm: str = "schatten"

    @classmethod
    def of(
        cls, coefficients: str | Coefficients, iterations: int, precision: str
    ) -> "Method":
        """That of a name, or of the coefficients of each step."""
        norm = "frobenius" if coefficients == "muon" else "schatten"
        return cls(coefficients_of(coefficients, iterations), precision, norm)

    @property
    def segments(self) -> list[Coefficients]:
        """The steps that are done on one Gram matrix.

        In half precision rounding gives the iterated Gram matrix eigenvalues below
        zero, which the steps after would blow up; made anew of X it has none. Once,
        after two steps of five, is enough for most matrices in float16
        (Dao-AILab/gram-newton-schulz) but not for all: one in some hundred with
        singular values of many sizes ends at a thousand. After every step it is for all
        that were tried.
        """
        steps = self.coefficients
        return [[step] for step in steps] if self.precision in HALF else [steps]

    def operations(
        self, small: int, long: int, stacked: bool = True
    ) -> tuple[float, float]:
        """Operations for one matrix: on its Gram matrix, and on the matrix itself."""
        products = sum(4 * len(steps) - 3 for steps in self.segments)
        part = _hermitian_part(small) if stacked else 1.0
        inner = products * part * 2.0 * small**3
        return inner, len(self.segments) * (part + 1) * 2.0 * small**2 * long


def polar_factors(
    xs: Sequence[jax.Array],
    method: Method,
    *,
    add: Callable[..., jax.Array] = lambda _, stacks: stacks[0],
    pick: Callable[[jax.Array, int], jax.Array] = lambda stack, _: stack,
    largest: Callable[[jax.Array], jax.Array] = lambda x: x,
    total: Callable[[jax.Array], jax.Array] = lambda gram: gram,
) -> list[jax.Array]:
    """The polar factors (XXᴴ)^(-1/2) X of stacks, nearly, by an iteration they share.

    It works on their Gram matrices, the smaller of which are filled up with zeros. The
    factor of zero is zero.

    Args:
      xs: stacks, of shape [k, ..., m, n] with m <= n; k, m and n may differ.
      method: the iteration.
      add: from an operation and stacks of shape [k, ...] to the one stack in which they
        share slots, combined by the operation where they share one: but one of them
        is zero there. By default there is but one stack.
      pick: from the one stack to the slots of the stack of a number.
      largest: the largest of something over devices that have parts of each matrix.
      total: the sum of something over those.
    """
    # Squares of very small or large entries would leave the range.
    peaks = [jnp.max(jnp.abs(x), (-2, -1), keepdims=True) for x in xs]
    peak = largest(add(jnp.maximum, peaks))
    peak = jnp.where(peak == 0, 1, peak)
    xs = [x / pick(peak, i).astype(x.dtype) for i, x in enumerate(xs)]
    precision = method.precision
    sides = [x.shape[-2] for x in xs]

    for number, steps in enumerate(method.segments):
        grams = [_gram(x, max(sides), precision) for x in xs]
        gram = total(add(jnp.add, grams))
        norm = method.norm if number == 0 else None
        iterate = functools.partial(
            newton_schulz, coefficients=steps, precision=precision, norm=norm
        )
        if gram.ndim == 2 or gram.shape[0] == 1 or gram.size <= CHUNK:
            factor, root = iterate(gram)
        else:
            factor, root = jax.lax.map(iterate, gram)
        if precision not in HALF:
            factor = factor / root  # the smaller of the two
        factors = [pick(factor, i)[..., :m, :m] for i, m in enumerate(sides)]
        xs = [multiply(a, x, precision) for a, x in zip(factors, xs, strict=True)]
        if precision in HALF:
            # Not before the product: half precision has no room for it.
            xs = [x / pick(root, i) for i, x in enumerate(xs)]
    return list(xs)


def newton_schulz(
    gram: jax.Array,
    coefficients: Coefficients,
    precision: str = "highest",
    norm: str | None = "schatten",
) -> tuple[jax.Array, jax.Array]:
    """The matrix by which the iteration multiplies X, given its Gram matrix.

    All factors are polynomials of the Gram matrix, the smaller of the two that X has:
    X itself is read twice, and communicated once where it is sharded. They commute, so
    all products are symmetric.

    Returned too is what to divide the product by, of shape [..., 1, 1]. `norm` is that
    of `Method`; None where X needs none, as it does after the first step.
    """
    root = jnp.ones((*gram.shape[:-2], 1, 1), gram.dtype)
    if norm == "frobenius":
        trace = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None].real
        trace = jnp.where(trace == 0, 1, trace).astype(gram.dtype)
        gram, root = gram / trace, jnp.sqrt(trace)
    if norm == "schatten":
        # First by its own norm, so that the square stays in the range of the numbers.
        size = _norm(gram)
        gram, root = gram / size, jnp.sqrt(size)
    identity = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    factor = None
    for i, (a, b, c) in enumerate(coefficients):
        square = hermitian(gram, gram, precision)
        if i == 0 and norm == "schatten":
            bound = jnp.sqrt(_norm(square))
            gram, square = gram / bound, square / bound**2
            root = root * jnp.sqrt(bound)
        step = a * identity + b * gram + c * square
        factor = step if factor is None else hermitian(factor, step, precision)
        if i < len(coefficients) - 1:
            gram = hermitian(step, hermitian(step, gram, precision), precision)
    assert factor is not None
    return factor, root


def _gram(x: jax.Array, side: int, precision: str) -> jax.Array:
    """Gram matrices, with zeros on the right and below up to a side."""
    gram = hermitian(x, x.conj().mT, precision)
    fill = side - gram.shape[-1]
    return jnp.pad(gram, [(0, 0)] * (gram.ndim - 2) + [(0, fill)] * 2)


def _norm(x: jax.Array) -> jax.Array:
    """The Frobenius norm, but 1 of zero."""
    total = jnp.sum(jnp.square(jnp.abs(x)), (-2, -1), keepdims=True)
    return jnp.sqrt(jnp.where(total == 0, 1, total)).astype(x.dtype)


def _hermitian_part(size: int) -> float:
    """Which part of a product is computed where it is known to be symmetric."""
    if size < HERMITIAN_BLOCK or size % 2:
        return 1.0
    return 1 / 4 + _hermitian_part(size // 2) / 2


def hermitian(a: jax.Array, b: jax.Array, precision: str) -> jax.Array:
    """The product of [..., p, m] and [..., m, p], where it is Hermitian."""
    p = a.shape[-2]
    # Only stacks: of 512 rows it saves a seventh of the time on a CPU, where each such
    # product takes ten times as long to compile.
    if a.ndim == 2 or p < HERMITIAN_BLOCK or p % 2:
        return multiply(a, b, precision)
    half = p // 2
    above = multiply(a[..., :half, :], b[..., half:], precision)
    diagonal = hermitian(
        a.reshape(*a.shape[:-2], 2, half, a.shape[-1]),
        b.reshape(*b.shape[:-1], 2, half).swapaxes(-3, -2),
        precision,
    )
    upper = jnp.concatenate([diagonal[..., 0, :, :], above], -1)
    lower = jnp.concatenate([above.conj().mT, diagonal[..., 1, :, :]], -1)
    return jnp.concatenate([upper, lower], -2)


_exactly = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def multiply(a: jax.Array, b: jax.Array, precision: str) -> jax.Array:
    """The product, of float32 matrices in half precision with sums in float32."""
    if precision == "highest" or a.dtype != jnp.float32:
        return _exactly(a, b)

    def on_matrix_units(a, b):
        a, b = a.astype(precision), b.astype(precision)
        return jnp.matmul(a, b, preferred_element_type=jnp.float32)

    def on_cpu(a, b):  # which does not have all of these products: their rounding
        kind = jnp.finfo(precision)
        a, b = (jax.lax.reduce_precision(x, kind.nexp, kind.nmant) for x in (a, b))
        return _exactly(a, b)

    return jax.lax.platform_dependent(a, b, cpu=on_cpu, default=on_matrix_units)

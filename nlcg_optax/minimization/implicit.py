"""Derivatives of a minimum with respect to what the objective depends on."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nlcg_optax.minimization import loop
from nlcg_optax.minimization.box import Box
from nlcg_optax.minimization.result import MinimizeResult


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def solution(
    fun: Callable,
    options: loop.Options,
    params: Any,
    args: Any,
    gtol: jax.Array,
    box: Box | None,
) -> MinimizeResult:
    """The loop's result, with derivatives by the implicit function theorem.

    What is at a bound moves with the bound; the others are the minimum given these.
    """
    return loop.solve(lambda x: fun(x, *args), options, params, gtol, box)


@solution.defjvp
def _solution_jvp(fun, options, primals, tangents):
    params, args, gtol, box = primals
    _, args_dot, _, box_dot = tangents
    result = solution(fun, options, params, args, gtol, box)
    x = result.params
    real = _to_real(x)

    def value(real, args):
        out = fun(_from_real(real, x), *args)
        return out[0] if options.has_aux else out

    first_order = functools.partial(jax.value_and_grad(value), real)
    (_, grad), (value_dot, grad_dot) = jax.jvp(first_order, (args,), (args_dot,))

    def hessian_product(v):
        gradient = jax.grad(lambda real: value(real, args))
        return jax.jvp(gradient, (real,), (v,))[1]

    matrix = hessian_product
    if box is not None:
        held = _to_real(box.held(x))
        zeros = jax.tree.map(jnp.zeros_like, real)
        with_bound = _where(held, _to_real(box.moved(x, box_dot)), zeros)
        by_bound = jax.tree.map(jnp.vdot, grad, with_bound)
        value_dot += sum(jax.tree.leaves(by_bound))
        by_bound = hessian_product(with_bound)
        grad_dot = _where(held, zeros, jax.tree.map(jnp.add, grad_dot, by_bound))

        def matrix(v):
            return _where(held, v, hessian_product(_where(held, zeros, v)))

    tolerance = float(jnp.finfo(result.value.dtype).eps) ** 0.75

    def solve(matvec, b):
        return jax.scipy.sparse.linalg.cg(matvec, b, tol=tolerance)[0]

    x_dot = jax.lax.custom_linear_solve(matrix, grad_dot, solve, symmetric=True)
    x_dot = jax.tree.map(jnp.negative, x_dot)
    if box is not None:
        x_dot = _where(held, with_bound, x_dot)
    x_dot = _from_real(x_dot, x)
    aux_dot = None
    if options.has_aux:
        _, aux_dot = jax.jvp(
            lambda x, args: fun(x, *args)[1], (x, args), (x_dot, args_dot)
        )
    others = jax.tree.map(_zero_tangent, result)
    return result, others._replace(
        params=x_dot, value=value_dot.astype(result.value.dtype), aux=aux_dot
    )


def _zero_tangent(x: jax.Array) -> Any:
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)


def _where(condition: Any, on_true: Any, on_false: Any) -> Any:
    return jax.tree.map(jnp.where, condition, on_true, on_false)


def _to_real(tree: Any) -> Any:
    """Complex leaves as pairs of real ones."""
    return jax.tree.map(
        lambda x: (jnp.real(x), jnp.imag(x)) if jnp.iscomplexobj(x) else (x,), tree
    )


def _from_real(real: Any, like: Any) -> Any:
    """The inverse of `_to_real`."""
    return jax.tree.map(
        lambda x, parts: jax.lax.complex(*parts) if jnp.iscomplexobj(x) else parts[0],
        like,
        real,
    )

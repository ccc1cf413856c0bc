"""Derivatives of a minimum with respect to what the objective depends on."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nlcg_optax.minimization import loop
from nlcg_optax.minimization.result import MinimizeResult


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def solution(
    fun: Callable[..., Any],
    options: loop.Options,
    params: Any,
    args: Any,
    closed_over: Any,
    gtol: jax.Array,
) -> MinimizeResult:
    """The loop's result, with derivatives by the implicit function theorem."""

    def objective(x):
        return fun(x, *args, *closed_over)

    return loop.solve(objective, options, params, gtol)


@solution.defjvp
def _solution_jvp(fun, options, primals, tangents):
    params, args, closed_over, gtol = primals
    _, args_dot, closed_over_dot, _ = tangents
    result = solution(fun, options, params, args, closed_over, gtol)
    x = result.params

    def value_and_gradient(x, args, closed_over):
        """The value, and the gradient in real coordinates."""

        def value(real):
            out = fun(_from_real(real, x), *args, *closed_over)
            return out[0] if options.has_aux else out

        return jax.value_and_grad(value)(_to_real(x))

    (_, _), (value_dot, grad_dot) = jax.jvp(
        functools.partial(value_and_gradient, x),
        (args, closed_over),
        (args_dot, closed_over_dot),
    )

    def hessian_product(v):
        def gradient(real):
            return value_and_gradient(_from_real(real, x), args, closed_over)[1]

        return jax.jvp(gradient, (_to_real(x),), (v,))[1]

    tolerance = float(jnp.finfo(result.value.dtype).eps) ** 0.75

    def solve(matvec, b):
        return jax.scipy.sparse.linalg.cg(matvec, b, tol=tolerance)[0]

    x_dot = jax.lax.custom_linear_solve(
        hessian_product, grad_dot, solve, symmetric=True
    )
    x_dot = jax.tree.map(jnp.negative, _from_real(x_dot, x))
    aux_dot = None
    if options.has_aux:
        _, aux_dot = jax.jvp(
            lambda x, args, closed_over: fun(x, *args, *closed_over)[1],
            (x, args, closed_over),
            (x_dot, args_dot, closed_over_dot),
        )
    still = jax.tree.map(_zero_tangent, result)
    return result, still._replace(
        params=x_dot, value=value_dot.astype(result.value.dtype), aux=aux_dot
    )


def _zero_tangent(x: jax.Array) -> Any:
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)


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

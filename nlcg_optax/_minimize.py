"""Minimization of smooth functions without noise."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nlcg_optax import (
    _alias,
    _beta,
    _check,
    _direction,
    _linesearch,
    _tree,
)

_MESSAGES = (
    "still running",
    "converged: the gradient is small enough (gtol)",
    "converged: the value decreases by too little (ftol)",
    "stopped: max_iter iterations are used up",
    "stopped: no lower point is found along steepest descent at this precision",
    "stopped: the value or the gradient is not finite at the starting point",
    "stopped: every point tried along steepest descent gave a value or a gradient that "
    "is not finite",
)
_RUNNING, _GTOL, _FTOL, _MAX_ITER, _STUCK, _BAD_START, _NONFINITE = range(7)

# Iterations without a lower value or gradient after which the search starts afresh.
_PATIENCE = 10


class MinimizeResult(NamedTuple):
    """Where :func:`minimize` stopped and why.

    Under `vmap` every field has a leading axis.

    Attributes:
      params: the parameters reached.
      value: the objective there.
      grad_norm: the largest modulus of the gradient's elements there.
      iterations: directions searched along, int32.
      value_evaluations: how often the objective was evaluated, int32.
      grad_evaluations: how often its gradient was, always at such a point, int32.
      restarts: how often the direction and its preconditioner were started afresh,
        int32.
      status: why it stopped, int32; :attr:`message` says it in words.
      aux: what the objective returns beside the value, with ``has_aux``; else None.
    """

    params: Any
    value: jax.Array
    grad_norm: jax.Array
    iterations: jax.Array
    value_evaluations: jax.Array
    grad_evaluations: jax.Array
    restarts: jax.Array
    status: jax.Array
    aux: Any = None

    @property
    def message(self) -> Any:
        """The status in words; a list of them for a batch."""

        def words(status: Any) -> Any:
            if isinstance(status, list):
                return [words(one) for one in status]
            return _MESSAGES[status]

        return words(np.asarray(self.status).tolist())

    @property
    def success(self) -> jax.Array:
        """Whether a tolerance was met."""
        return (self.status == _GTOL) | (self.status == _FTOL)


class IterationInfo(NamedTuple):
    """What a callback of :func:`minimize` is told after each iteration.

    Attributes:
      iteration: iterations so far.
      params: the parameters.
      value: the objective.
      grad_norm: the largest modulus of the gradient's elements.
      value_evaluations: evaluations of the objective so far.
    """

    iteration: Any
    params: Any
    value: Any
    grad_norm: Any
    value_evaluations: Any


class _Options(NamedTuple):
    """What is fixed when the solver is compiled."""

    max_iter: int
    ftol: float
    has_aux: bool
    beta_rule: str | _beta.BetaRule
    preconditioner: str | optax.GradientTransformation | None
    line_search: str | optax.GradientTransformation
    memory_size: int
    callback: Callable[[IterationInfo], Any] | None


class _State(NamedTuple):
    """The loop's state; `grad` is what `jax.grad` returns."""

    params: Any
    value: jax.Array
    grad: Any
    grad_norm: jax.Array
    direction: Any
    line_search: Any
    iterations: jax.Array
    value_evaluations: jax.Array
    grad_evaluations: jax.Array
    restarts: jax.Array
    fresh: jax.Array
    idle: jax.Array
    lowest: tuple[jax.Array, jax.Array]
    status: jax.Array


def minimize(
    fun: Callable[..., Any],
    params: optax.Params,
    *args: Any,
    max_iter: int = 10_000,
    gtol: float = 1e-6,
    ftol: float = 0.0,
    has_aux: bool = False,
    beta_rule: str | _beta.BetaRule = "hager_zhang",
    preconditioner: str | optax.GradientTransformation | None = "lbfgs",
    line_search: str | optax.GradientTransformation = "hager_zhang",
    memory_size: int = 10,
    callback: Callable[[IterationInfo], Any] | None = None,
) -> MinimizeResult:
    """TODO."""
    options = _Options(
        max_iter=max_iter,
        ftol=ftol,
        has_aux=has_aux,
        beta_rule=beta_rule,
        preconditioner=preconditioner,
        line_search=line_search,
        memory_size=memory_size,
        callback=callback,
    )
    params = jax.tree.map(jnp.asarray, params)
    return _minimize(fun, options, params, args, gtol)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _minimize(fun, options, params, args, gtol):
    fun, closed_over = jax.closure_convert(fun, params, *args)
    return _solution(fun, options, params, args, closed_over, gtol)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _solution(fun, options, params, args, closed_over, gtol):
    def objective(x):
        return fun(x, *args, *closed_over)

    return _solve(objective, options, params, gtol)


@_solution.defjvp
def _solution_jvp(fun, options, primals, tangents):
    params, args, closed_over, gtol = primals
    _, args_dot, closed_over_dot, _ = tangents
    result = _solution(fun, options, params, args, closed_over, gtol)
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
    x_dot, _ = jax.scipy.sparse.linalg.cg(hessian_product, grad_dot, tol=tolerance)
    x_dot = jax.tree.map(jnp.negative, _from_real(x_dot, x))
    still = jax.tree.map(_zero_tangent, result)
    return result, still._replace(
        params=x_dot, value=value_dot.astype(result.value.dtype)
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


def _solve(objective, options, params, gtol):
    """Runs the loop."""
    direction = _make_direction(options)
    line_search = _make_line_search(options)
    dtype = _tree.scalar_dtype(params)

    def value_fn(x):
        value = objective(x)[0] if options.has_aux else objective(x)
        return value

    def norm(grad):
        return _tree.max_abs(grad, dtype=dtype)

    value, grad = jax.value_and_grad(value_fn)(params)
    value = value.astype(dtype)
    grad_norm = norm(grad)
    tolerance = gtol * jnp.maximum(1, grad_norm)
    zero = jnp.zeros([], jnp.int32)

    def body(state: _State) -> _State:
        updates, direction_state = direction.update(
            jax.tree.map(jnp.conj, state.grad), state.direction, state.params
        )
        steps, line_search_state = line_search.update(
            jax.tree.map(jnp.negative, updates),
            state.line_search,
            state.params,
            value=state.value,
            grad=state.grad,
            value_fn=value_fn,
        )
        new_params = optax.apply_updates(state.params, steps)
        new_value = optax.tree.get(line_search_state, "value")
        new_grad = optax.tree.get(line_search_state, "grad")
        evaluations = optax.tree.get(line_search_state, "num_linesearch_steps", 0)
        nonfinite = optax.tree.get(line_search_state, "nonfinite", 0)
        grad_evaluations = evaluations
        if new_value is None or new_grad is None:
            new_value, new_grad = jax.value_and_grad(value_fn)(new_params)
            evaluations, grad_evaluations = evaluations + 1, 1
        new_value = new_value.astype(dtype)
        new_norm = norm(new_grad)

        moved = functools.reduce(
            jnp.logical_or,
            [jnp.any(step != 0) for step in jax.tree.leaves(steps)],
            jnp.zeros([], bool),
        )
        failed = ~(moved & jnp.isfinite(new_value) & jnp.isfinite(new_norm))
        lowest_value, lowest_norm = state.lowest
        improved = (new_value < lowest_value) | (new_norm < lowest_norm)
        idle = jnp.where(failed | improved, 0, state.idle + 1)
        restart = failed | (idle >= _PATIENCE)

        def keep(new, old):
            return _tree.where(failed, old, new)

        value, grad_norm = keep(
            (new_value, new_norm), (state.value, state.grad_norm)
        )
        iterations = state.iterations + 1
        decrease = state.value - new_value
        scale = jnp.maximum(jnp.maximum(jnp.abs(state.value), jnp.abs(new_value)), 1)
        small = (options.ftol > 0) & ~failed & (decrease <= options.ftol * scale)
        stuck = restart & state.fresh
        hopeless = (evaluations > 0) & (nonfinite == evaluations)
        status = jnp.where(
            grad_norm <= tolerance,
            _GTOL,
            jnp.where(
                small,
                _FTOL,
                jnp.where(
                    stuck,
                    jnp.where(hopeless, _NONFINITE, _STUCK),
                    jnp.where(iterations >= options.max_iter, _MAX_ITER, _RUNNING),
                ),
            ),
        ).astype(jnp.int32)
        new_state = _State(
            params=keep(new_params, state.params),
            value=value,
            grad=keep(_tree.cast_like(new_grad, state.grad), state.grad),
            grad_norm=grad_norm,
            direction=_tree.where(restart, direction.init(params), direction_state),
            line_search=_tree.where(
                restart, line_search.init(params), line_search_state
            ),
            iterations=iterations,
            value_evaluations=state.value_evaluations + evaluations,
            grad_evaluations=state.grad_evaluations + grad_evaluations,
            restarts=state.restarts + (restart & ~stuck),
            fresh=jnp.where(restart, True, state.fresh & ~improved),
            idle=jnp.where(restart, 0, idle),
            lowest=(
                jnp.fmin(value, lowest_value),
                jnp.fmin(grad_norm, lowest_norm),
            ),
            status=status,
        )
        _report(options.callback, state.status == _RUNNING, new_state)
        return new_state

    bad = ~(jnp.isfinite(value) & jnp.isfinite(grad_norm))
    status = jnp.where(
        bad,
        _BAD_START,
        jnp.where(
            grad_norm <= tolerance,
            _GTOL,
            _MAX_ITER if options.max_iter == 0 else _RUNNING,
        ),
    )
    final = jax.lax.while_loop(
        lambda state: state.status == _RUNNING,
        body,
        _State(
            params=params,
            value=value,
            grad=grad,
            grad_norm=grad_norm,
            direction=direction.init(params),
            line_search=line_search.init(params),
            iterations=zero,
            value_evaluations=zero + 1,
            grad_evaluations=zero + 1,
            restarts=zero,
            fresh=jnp.ones([], bool),
            idle=zero,
            lowest=(value, grad_norm),
            status=status.astype(jnp.int32),
        ),
    )
    aux = objective(final.params)[1] if options.has_aux else None
    return MinimizeResult(
        params=final.params,
        value=final.value,
        grad_norm=final.grad_norm,
        iterations=final.iterations,
        value_evaluations=final.value_evaluations + options.has_aux,
        grad_evaluations=final.grad_evaluations,
        restarts=final.restarts,
        status=final.status,
        aux=aux,
    )


def _make_direction(options: _Options) -> optax.GradientTransformationExtraArgs:
    preconditioner = options.preconditioner
    if preconditioner == "lbfgs":
        preconditioner = optax.scale_by_lbfgs(options.memory_size)
    elif preconditioner == "diagonal_bfgs":
        preconditioner = _alias._preconditioner.scale_by_diagonal_bfgs(0)
    return _direction.scale_by_conjugate_direction(
        options.beta_rule,
        preconditioner,
        beta_bounds=(-math.inf, math.inf),
        restart_on_ascent=True,
        epsilon=0,
    )


def _make_line_search(options: _Options) -> optax.GradientTransformationExtraArgs:
    line_search = options.line_search
    if line_search == "hager_zhang":
        scaled = options.preconditioner == "lbfgs"
        line_search = _linesearch.scale_by_hager_zhang_linesearch(
            initial_step="auto" if scaled else "quadratic"
        )
    return optax.with_extra_args_support(line_search)


def _report(callback, active, state):
    """Calls back on the host; problems of a batch that have stopped are silent."""
    if callback is None:
        return

    def call(active, *info):
        if active:
            callback(IterationInfo(*info))

    jax.debug.callback(
        call,
        active,
        state.iterations,
        state.params,
        state.value,
        state.grad_norm,
        state.value_evaluations,
    )

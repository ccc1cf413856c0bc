"""Minimization of smooth functions without noise."""

import difflib
import functools
import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from nlcg_optax import _check, _tree
from nlcg_optax.directions import beta as beta_rules
from nlcg_optax.directions.conjugate import scale_by_conjugate_direction
from nlcg_optax.preconditioners.diagonal_bfgs import scale_by_diagonal_bfgs
from nlcg_optax.preconditioners.limited_memory_bfgs import (
    scale_by_limited_memory_bfgs,
)
from nlcg_optax.step_sizes.hager_zhang import scale_by_hager_zhang_linesearch

_MESSAGES = (
    "still running",
    "converged: the gradient is small enough (gtol)",
    "converged: the value decreases by too little (ftol)",
    "stopped: max_iter iterations are used up",
    "stopped: no lower point is found along steepest descent",
    "stopped: the value or the gradient is not finite at the starting point",
    "stopped: along steepest descent most points tried gave a value or a gradient that "
    "is not finite, and none a lower value",
    "stopped: the callback asked for it",
    "stopped: the objective seems to have no lower bound; its value falls ever "
    "further, and its gradient does not shrink",
)
_RUNNING, _GTOL, _FTOL, _MAX_ITER, _STUCK, _BAD_START, _NONFINITE = range(7)
_CALLBACK, _UNBOUNDED = 7, 8

# Where the gradient is no smaller than ever before, a fall so many times the first
# value, along a way so many times the starting point's size, has no end.
_FALL = 1e10

# What stands in the place of an argument of scipy.optimize.minimize.
_INSTEAD = {
    "args": "pass them one by one behind params: minimize(fun, params, a, b)",
    "bounds": "minimize over y in params = lower + (upper - lower) * jnp.sin(y)**2, "
    "which cannot leave them and reaches them",
    "constraints": "express params by variables that are free, or add a penalty",
    "disp": "progress=True prints a line after each iteration",
    "fprime": "leave it out: JAX differentiates fun, written in jax.numpy",
    "hess": "leave it out: curvature is learned from the gradients",
    "hessp": "leave it out: curvature is learned from the gradients",
    "jac": "leave it out: JAX differentiates fun, written in jax.numpy",
    "maxiter": "it is called max_iter",
    "method": "preconditioner, beta_rule and line_search choose it; the default is "
    "limited-memory BFGS, and preconditioner=None nonlinear conjugate gradient",
    "options": "its entries are arguments themselves: max_iter, gtol, ftol, "
    "memory_size, progress",
    "tol": "there are two: gtol, of the gradient, and ftol, of the value's decrease",
    "x0": "it is the second argument, params",
}

# The predicted decrease that is left when the search may stop, in units of gtol times
# the value or the decrease made so far.
_PREDICTED = 0.1

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

    def __repr__(self) -> str:
        """Why it stopped, where, and after how much work, in a few lines."""
        told = (self.value, self.grad_norm, self.iterations, self.value_evaluations)
        if any(
            isinstance(x, jax.core.Tracer) or jnp.ndim(x) for x in (*told, self.status)
        ):
            return f"MinimizeResult{tuple(self)!r}"
        shapes = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", self.params)
        return (
            f"{self.message}\n"
            f"  value {self.value:.8g}, largest element of the gradient "
            f"{self.grad_norm:.3g}\n"
            f"  {self.iterations} iterations, {self.value_evaluations} evaluations of "
            f"the objective, {self.grad_evaluations} of its gradient, "
            f"{self.restarts} restarts\n"
            f"  params: {shapes}"
        )


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
    beta_rule: str | beta_rules.BetaFunction | None
    preconditioner: str | optax.GradientTransformation | None
    line_search: str | optax.GradientTransformation
    memory_size: int
    restart_every: int | None
    callback: Callable[[IterationInfo], Any] | None
    progress: bool


class _State(NamedTuple):
    """The loop's state; `grad` is what `jax.grad` returns."""

    params: Any
    value: jax.Array
    grad: Any
    grad_norm: jax.Array
    updates: Any
    direction: Any
    line_search: Any
    iterations: jax.Array
    value_evaluations: jax.Array
    grad_evaluations: jax.Array
    restarts: jax.Array
    fresh: jax.Array
    idle: jax.Array
    lowest: tuple[jax.Array, jax.Array]
    steepest: jax.Array
    status: jax.Array


def minimize(
    fun: Callable[..., Any],
    params: optax.Params,
    *args: Any,
    max_iter: int = 3_000,
    gtol: jax.typing.ArrayLike | None = None,
    ftol: float = 0.0,
    has_aux: bool = False,
    beta_rule: str | beta_rules.BetaFunction | None = "auto",
    preconditioner: str | optax.GradientTransformation | None = "lbfgs",
    line_search: str | optax.GradientTransformation = "hager_zhang",
    memory_size: int = 10,
    restart_every: int | None = None,
    callback: Callable[[IterationInfo], Any] | None = None,
    progress: bool = False,
    **unknown: Any,
) -> MinimizeResult:
    r"""Minimizes a smooth function by preconditioned nonlinear conjugate gradient.

    .. math::
        d_t = -M_t^{-1} g_t + \beta_t d_{t-1}, \qquad x_{t+1} = x_t + \alpha_t d_t,

    with α from a line search. It stops where

    .. math::
        \lVert g \rVert_\infty \le \mathrm{gtol} \cdot
            \max(1, \lVert g_0 \rVert_\infty)
        \quad\text{and}\quad
        -\tfrac{1}{2} \alpha\, g^\top d \le 0.1\, \mathrm{gtol} \cdot
            \max(\lvert f \rvert, f_0 - f),

    the second being the decrease that the next step promises if it is as long as the
    last one; a starting point need only meet the first. Where no lower point is found,
    or neither the value nor the gradient has fallen for 10 iterations, the direction is
    started afresh from the gradient, once; if that does not help either the search
    stops and says so. Nothing raises inside: points where the value or the gradient is
    not finite are backed off from.

    The default preconditioner is limited-memory BFGS. Its newest pair makes the
    direction satisfy Perry's condition :math:`d_t^\top y_{t-1} = -g_t^\top s_{t-1}`, so
    that with an exact search it is conjugate already; Dai & Kou's β in that metric is
    identically 0, and ``beta_rule="auto"`` then leaves the second term out.
    With ``preconditioner=None`` this is nonlinear conjugate gradient in the narrow
    sense, with seven vectors of state instead of 26.

    The parameters, the value and what `has_aux` returns are differentiable, forwards
    and backwards, with respect to `args` and to whatever `fun` closes over, by the
    implicit function theorem: the Hessian at the solution, which must be positive
    definite, is solved with by linear conjugate gradient. Their derivative with respect
    to the starting point is 0.

    Args:
      fun: the objective, called as ``fun(params, *args)``; returns a real scalar, or,
        with `has_aux`, a scalar and any tree of arrays. Outside `jit` the compiled
        solver is kept for the function object and the options: pass what varies
        through `args`.
      params: where to start, any tree of real or complex floating-point arrays. The
        result is sharded like them. A list of numbers is one array of them, as for
        scipy.
      *args: further arguments of the objective: trees of arrays.
      max_iter: iterations at most.
      gtol: tolerance of the gradient; None for 1e-8 in float64 and 1e-5 in float32.
      ftol: stops too where an iteration lowers the value by no more than this times
        the larger of the value's size and 1; 0 for never.
      has_aux: whether the objective returns something beside the value. It is evaluated
        once more, at the solution, for it.
      beta_rule: see :func:`~nlcg_optax.scale_by_conjugate_direction`; β is not clipped.
        None for β = 0. ``"auto"`` is None over ``"lbfgs"`` and ``"hager_zhang"``
        otherwise.
      preconditioner: ``"lbfgs"``, ``"diagonal_bfgs"``, any gradient transformation, or
        None.
      line_search: ``"hager_zhang"``
        (:func:`~nlcg_optax.scale_by_hager_zhang_linesearch`) or any transformation
        that takes a descent direction, such as
        ``optax.scale_by_zoom_linesearch(20)``. One that keeps no value or gradient
        costs a further evaluation in each iteration.
      memory_size: pairs of vectors that ``"lbfgs"`` keeps.
      restart_every: β = 0 every so many iterations; None for never. Nothing to do where
        β is 0 in all of them.
      callback: called on the host after each iteration with an
        :class:`IterationInfo`; under `vmap` once for each problem still running. The
        search stops where it returns True or raises StopIteration.
      progress: prints a line after each iteration.
      **unknown: refused; for the arguments of ``scipy.optimize.minimize`` the error
        says what stands in their place.

    Returns:
      A :class:`MinimizeResult`; its `message` says why it stopped. Evaluations by other
      line searches than ours are counted as they report them.

    Raises:
      TypeError: for parameters that are not floating-point numbers, an unknown
        argument, or an objective that does not return what it should.
      ValueError: for an unknown name or an argument out of range.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> def rosenbrock(x, a):
    ...     return jnp.sum((a - x[:-1]) ** 2 + 100.0 * (x[1:] - x[:-1] ** 2) ** 2)
    >>> result = nlcg_optax.minimize(rosenbrock, jnp.zeros(2), 2.0)
    >>> print(result.params.round(2), result.message)
    [2. 4.] converged: the gradient is small enough (gtol)

    The solution is (a, a²), so its derivative with respect to a is (1, 2a):

    >>> def solution(a):
    ...     return nlcg_optax.minimize(rosenbrock, jnp.zeros(2), a).params
    >>> print(jax.jacobian(solution)(2.0).round(2))
    [1. 4.]

    Bounds are kept by a transformation of variables that can reach them:

    >>> lower, upper = jnp.array([-1.0, -1.0]), jnp.array([1.5, 3.0])
    >>> def inside(y):
    ...     return lower + (upper - lower) * jnp.sin(y) ** 2
    >>> result = nlcg_optax.minimize(lambda y: rosenbrock(inside(y), 2.0), jnp.ones(2))
    >>> print(inside(result.params).round(2))
    [1.5  2.25]
    """
    for name in unknown:
        instead = _INSTEAD.get(name)
        if instead is None:
            known = list(inspect.signature(minimize).parameters)[3:-1]
            near = difflib.get_close_matches(name, known, n=1) or known
            instead = f"did you mean {', '.join(near)}?"
        raise TypeError(f"minimize takes no argument {name!r}: {instead}")
    _check.number("max_iter", max_iter, minimum=0, integer=True)
    _check.number("ftol", ftol, minimum=0)
    _check.number("memory_size", memory_size, minimum=1, integer=True)
    if gtol is not None:
        _check.number("gtol", gtol, minimum=0)
    if restart_every is not None:
        _check.number("restart_every", restart_every, minimum=1, integer=True)
    if not isinstance(preconditioner, optax.GradientTransformation | None):
        _check.one_of(
            "preconditioner",
            preconditioner,
            ("lbfgs", "diagonal_bfgs"),
            ", a gradient transformation, or None",
        )
    if beta_rule == "auto":
        beta_rule = None if preconditioner == "lbfgs" else "hager_zhang"
    elif beta_rule is not None:
        beta_rules.resolve(beta_rule)
    if not isinstance(line_search, optax.GradientTransformation):
        _check.one_of(
            "line_search",
            line_search,
            ("hager_zhang",),
            " or a gradient transformation",
        )
    options = _Options(
        max_iter=int(max_iter),
        ftol=float(ftol),
        has_aux=has_aux,
        beta_rule=beta_rule,
        preconditioner=preconditioner,
        line_search=line_search,
        memory_size=memory_size,
        restart_every=restart_every,
        callback=callback,
        progress=progress,
    )
    if isinstance(params, list) and all(
        isinstance(x, numbers.Real) and not isinstance(x, bool) for x in params
    ):
        params = jnp.asarray(params, float)
    params = jax.tree.map(jnp.asarray, params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} has dtype {leaf.dtype}: expected "
                "real or complex floating-point numbers. Start from 1.0 rather than 1, "
                "and pass what is not to be optimized through `args`."
            )
    dtype = _tree.scalar_dtype(params)
    if gtol is None:
        gtol = 1e-5 if dtype == jnp.float32 else 1e-8
    return _minimize(fun, options, params, args, jnp.asarray(gtol, dtype))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _minimize(fun, options, params, args, gtol):
    @functools.wraps(fun)
    def checked(*given):
        # Before JAX sees it, whose messages about what is no array are not clear.
        out = fun(*given)
        _check_output(out, options.has_aux)
        return out

    fun, closed_over = jax.closure_convert(checked, params, *args)
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


def _check_output(out: Any, has_aux: bool) -> None:
    """Raises unless an objective may return this."""
    pair = isinstance(out, tuple) and len(out) == 2
    if has_aux and not pair:
        raise TypeError(
            f"has_aux=True: the objective is to return (value, aux), and returns "
            f"{_described(out)}."
        )
    if has_aux:
        out, aux = out
        for path, leaf in jax.tree_util.tree_leaves_with_path(aux):
            try:
                jax.typeof(leaf)
            except TypeError:
                where = jax.tree_util.keystr(path)
                raise TypeError(
                    f"The objective returns {leaf!r} in aux{where}: expected arrays "
                    "or numbers, since the solver is compiled. Leave it out."
                ) from None
    elif pair:
        raise TypeError(
            f"The objective returns {_described(out)}: a second output beside the "
            "value, which has_aux=True allows and returns as `result.aux`."
        )
    scalar = hasattr(out, "dtype") and out.ndim == 0  # pyright: ignore
    if not scalar or jnp.iscomplexobj(out):
        raise TypeError(
            f"The objective returns {_described(out)}: expected a real scalar, such as "
            "the sum or the mean of its elements."
        )


def _described(out: Any) -> str:
    if hasattr(out, "dtype"):
        return f"an array of shape {jnp.shape(out)} and dtype {out.dtype}"
    if out is None or jax.tree_util.all_leaves([out]):
        return f"{out!r}, which is no array"
    return f"a {type(out).__name__} of {len(jax.tree.leaves(out))} arrays"


def _solve(objective, options, params, gtol):
    """Runs the loop."""
    direction = _make_direction(options)
    line_search = _make_line_search(options)
    dtype = _tree.scalar_dtype(params)

    def value_fn(x):
        out = objective(x)
        return out[0] if options.has_aux else out

    def norm(grad):
        return _tree.max_abs(grad, dtype=dtype)

    value, grad = jax.value_and_grad(value_fn)(params)
    value = first_value = value.astype(dtype)
    grad_norm = norm(grad)
    tolerance = gtol * jnp.maximum(1, grad_norm)
    size = jnp.maximum(1, _tree.max_abs(params, dtype=dtype))
    zero = jnp.zeros([], jnp.int32)

    def search_direction(value, grad, direction_state, params):
        updates, direction_state = direction.update(
            jax.tree.map(jnp.conj, grad), direction_state, params, value=value
        )
        return jax.tree.map(jnp.negative, updates), direction_state

    def start_afresh(restart, transformation, state):
        # Not a select, which would read and write all of the memory at every step.
        return jax.lax.cond(
            restart,
            lambda state: _tree.cast_like(transformation.init(params), state),
            lambda state: state,
            state,
        )

    def slope(grad, updates):
        (total,) = _tree.reduce_products(
            lambda g, u: [_tree.real_inner(jnp.conj(g), u)], grad, updates, dtype=dtype
        )
        return total

    def body(state: _State) -> _State:
        steps, line_search_state = line_search.update(
            state.updates,
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

        new_grad = _tree.cast_like(new_grad, state.grad)
        x, value, grad, grad_norm = keep(
            (new_params, new_value, new_grad, new_norm),
            (state.params, state.value, state.grad, state.grad_norm),
        )
        updates, direction_state = search_direction(
            value,
            grad,
            start_afresh(restart, direction, state.direction),
            x,
        )
        line_search_state = start_afresh(restart, line_search, line_search_state)

        iterations = state.iterations + 1
        # A search that keeps no step promises nothing: the gradient alone decides.
        step = optax.tree.get(line_search_state, "learning_rate", 0)
        predicted = -0.5 * step * slope(grad, updates)
        decided = predicted <= _PREDICTED * gtol * jnp.maximum(
            jnp.abs(value), first_value - value
        )
        stuck = restart & state.fresh
        small = grad_norm <= tolerance
        decrease = state.value - new_value
        scale = jnp.maximum(jnp.maximum(jnp.abs(state.value), jnp.abs(new_value)), 1)
        level = (options.ftol > 0) & ~failed & (decrease <= options.ftol * scale)
        hopeless = 2 * nonfinite > evaluations
        fall = first_value / _FALL - value / _FALL  # this way nothing overflows
        steepest = jnp.maximum(grad_norm, state.steepest)
        unbounded = (grad_norm >= steepest) & (
            fall > jnp.maximum(jnp.abs(first_value), grad_norm * size)
        )
        # No step goes further down than the numbers do.
        unbounded |= stuck & (value < -(float(jnp.finfo(dtype).max) ** 0.85))
        used_up = iterations >= options.max_iter
        status = jnp.asarray(_RUNNING, jnp.int32)
        for condition, reason in (  # the last that holds is given
            (used_up, _MAX_ITER),
            (stuck, _STUCK),
            (stuck & hopeless, _NONFINITE),
            (unbounded, _UNBOUNDED),
            (level, _FTOL),
            (small & (decided | stuck | used_up), _GTOL),
        ):
            status = jnp.where(condition, reason, status)
        new_state = _State(
            params=x,
            value=value,
            grad=grad,
            grad_norm=grad_norm,
            updates=updates,
            direction=direction_state,
            line_search=line_search_state,
            iterations=iterations,
            value_evaluations=state.value_evaluations + evaluations,
            grad_evaluations=state.grad_evaluations + grad_evaluations,
            restarts=state.restarts + (restart & ~stuck).astype(jnp.int32),
            fresh=restart | (state.fresh & ~improved),
            idle=jnp.where(restart, 0, idle),
            lowest=(jnp.fmin(value, lowest_value), jnp.fmin(grad_norm, lowest_norm)),
            steepest=steepest,
            status=status,
        )
        stop = _report(options, state.status == _RUNNING, new_state)
        going_on = status == _RUNNING
        return new_state._replace(status=jnp.where(stop & going_on, _CALLBACK, status))

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
    updates, direction_state = search_direction(
        value, grad, direction.init(params), params
    )
    final = jax.lax.while_loop(
        lambda state: state.status == _RUNNING,
        body,
        _State(
            params=params,
            value=value,
            grad=grad,
            grad_norm=grad_norm,
            updates=updates,
            direction=direction_state,
            line_search=line_search.init(params),
            iterations=zero,
            value_evaluations=zero + 1,
            grad_evaluations=zero + 1,
            restarts=zero,
            fresh=jnp.ones([], bool),
            idle=zero,
            lowest=(value, grad_norm),
            steepest=grad_norm,
            status=status.astype(jnp.int32),
        ),
    )
    aux = objective(final.params)[1] if options.has_aux else None
    return MinimizeResult(
        params=final.params,
        value=final.value,
        grad_norm=final.grad_norm,
        iterations=final.iterations,
        value_evaluations=final.value_evaluations + int(options.has_aux),
        grad_evaluations=final.grad_evaluations,
        restarts=final.restarts,
        status=final.status,
        aux=aux,
    )


def _make_direction(options: _Options) -> optax.GradientTransformationExtraArgs:
    preconditioner = options.preconditioner
    if isinstance(preconditioner, str):
        if preconditioner == "lbfgs":
            preconditioner = scale_by_limited_memory_bfgs(options.memory_size)
        else:
            preconditioner = scale_by_diagonal_bfgs(0)
    if options.beta_rule is None:
        if preconditioner is None:
            preconditioner = optax.identity()
        return optax.with_extra_args_support(preconditioner)
    return scale_by_conjugate_direction(
        options.beta_rule,
        preconditioner,
        beta_bounds=(-math.inf, math.inf),
        restart_on_ascent=True,
        restart_every=options.restart_every,
        epsilon=0,
    )


def _make_line_search(options: _Options) -> optax.GradientTransformationExtraArgs:
    line_search = options.line_search
    if isinstance(line_search, str):
        scaled = options.preconditioner == "lbfgs"
        line_search = scale_by_hager_zhang_linesearch(
            initial_step="one" if scaled else "quadratic"
        )
    return optax.with_extra_args_support(line_search)


def _report(options: _Options, active: jax.Array, state: _State) -> Any:
    """Calls back on the host; returns whether the callback wants to stop.

    Problems of a batch that have stopped already are silent.
    """
    if options.callback is None and not options.progress:
        return False

    def call(active, *info):
        if not active:
            return np.bool_(False)
        info = IterationInfo(*info)
        if options.progress:
            print(
                f"iteration {info.iteration:6d}  value {info.value:.8g}  "
                f"gradient {info.grad_norm:.3g}  "
                f"evaluations {info.value_evaluations}"
            )
        try:
            wish = options.callback(info) if options.callback is not None else None
        except StopIteration:
            wish = True
        # Not whatever is true: many callbacks return something by chance.
        wish = np.asarray(wish)
        return np.bool_(wish.dtype == bool and wish.ndim == 0 and wish)

    # Pure as far as JAX is concerned: derivatives allow no other that returns a value.
    return jax.pure_callback(
        call,
        jax.ShapeDtypeStruct((), bool),
        active,
        state.iterations,
        state.params if options.callback is not None else None,
        state.value,
        state.grad_norm,
        state.value_evaluations,
        vmap_method="sequential",
    )

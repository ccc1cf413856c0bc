"""The iteration of a minimization: search, direct, judge."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nlcg_optax import _transformations, _tree
from nlcg_optax.directions import beta as beta_rules
from nlcg_optax.directions.conjugate import scale_by_conjugate_direction
from nlcg_optax.minimization import result
from nlcg_optax.minimization.result import IterationInfo, MinimizeResult
from nlcg_optax.preconditioners.diagonal_bfgs import scale_by_diagonal_bfgs
from nlcg_optax.preconditioners.limited_memory_bfgs import (
    scale_by_limited_memory_bfgs,
)
from nlcg_optax.step_sizes.hager_zhang import scale_by_hager_zhang_linesearch

# Where the gradient is no smaller than ever before, a fall so many times the first
# value, along a way so many times the starting point's size, has no end.
_FALL = 1e10

# The predicted decrease that is left when the search may stop, in units of gtol times
# the value or the decrease made so far.
_PREDICTED = 0.1

# Iterations without a lower value or gradient after which the search starts afresh.
_PATIENCE = 10


class Options(NamedTuple):
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
    """The loop's state; `grad` is what `jax.grad` returns.

    Attributes of which the names do not tell all:
      reached: where it is, after how much work.
      updates: the direction along which the next search goes.
      fresh: whether nothing was gained since the direction was started afresh.
      idle: iterations since the value or the gradient was last the lowest so far.
      lowest: the lowest value and gradient so far.
      steepest: the largest gradient so far.
    """

    reached: MinimizeResult
    grad: Any
    updates: Any
    direction: Any
    line_search: Any
    fresh: jax.Array
    idle: jax.Array
    lowest: tuple[jax.Array, jax.Array]
    steepest: jax.Array


class _Problem(NamedTuple):
    """What stays the same in all iterations.

    Attributes of which the names do not tell all:
      value_fn: the objective's value alone.
      tolerance: gtol with the first gradient taken into account.
      size: the size of the parameters at the start, 1 at least.
      dtype: of scalars.
    """

    value_fn: Callable[[Any], jax.Array]
    options: Options
    gtol: jax.Array
    tolerance: jax.Array
    start: Any
    first_value: jax.Array
    size: jax.Array
    direction: optax.GradientTransformationExtraArgs
    line_search: optax.GradientTransformationExtraArgs
    dtype: jnp.dtype


class _Found(NamedTuple):
    """Where a line search arrived, and after how many evaluations.

    It failed if it did not move, or to where something is not finite.
    """

    params: Any
    value: jax.Array
    grad: Any
    grad_norm: jax.Array
    failed: jax.Array
    evaluations: Any
    grad_evaluations: Any
    nonfinite: Any
    line_search: Any


def solve(
    objective: Callable[[Any], Any], options: Options, params: Any, gtol: jax.Array
) -> MinimizeResult:
    """Runs the loop."""

    def value_fn(x: Any) -> jax.Array:
        out = objective(x)
        return out[0] if options.has_aux else out

    problem, state = _begin(value_fn, options, params, gtol)
    final = jax.lax.while_loop(
        lambda state: state.reached.status == result.RUNNING,
        functools.partial(_iterate, problem),
        state,
    ).reached
    if not options.has_aux:
        return final
    return final._replace(
        value_evaluations=final.value_evaluations + 1, aux=objective(final.params)[1]
    )


def _begin(
    value_fn: Callable[[Any], jax.Array],
    options: Options,
    params: Any,
    gtol: jax.Array,
) -> tuple[_Problem, _State]:
    """The problem, and the loop's state at the starting point."""
    dtype = _tree.scalar_dtype(params)
    value, grad = jax.value_and_grad(value_fn)(params)
    value = value.astype(dtype)
    grad_norm = _tree.max_abs(grad, dtype=dtype)
    problem = _Problem(
        value_fn=value_fn,
        options=options,
        gtol=gtol,
        tolerance=gtol * jnp.maximum(1, grad_norm),
        start=params,
        first_value=value,
        size=jnp.maximum(1, _tree.max_abs(params, dtype=dtype)),
        direction=_make_direction(options),
        line_search=_make_line_search(options),
        dtype=dtype,
    )
    bad = ~(jnp.isfinite(value) & jnp.isfinite(grad_norm))
    status = jnp.where(
        bad,
        result.BAD_START,
        jnp.where(
            grad_norm <= problem.tolerance,
            result.GTOL,
            result.MAX_ITER if options.max_iter == 0 else result.RUNNING,
        ),
    )
    updates, direction_state = _direct(
        problem, value, grad, problem.direction.init(params), params
    )
    zero = jnp.zeros([], jnp.int32)
    return problem, _State(
        reached=MinimizeResult(
            params=params,
            value=value,
            grad_norm=grad_norm,
            iterations=zero,
            value_evaluations=zero + 1,
            grad_evaluations=zero + 1,
            restarts=zero,
            status=status.astype(jnp.int32),
        ),
        grad=grad,
        updates=updates,
        direction=direction_state,
        line_search=problem.line_search.init(params),
        fresh=jnp.ones([], bool),
        idle=zero,
        lowest=(value, grad_norm),
        steepest=grad_norm,
    )


def _iterate(problem: _Problem, state: _State) -> _State:
    """One iteration: along the direction, to a new one, and whether to stop."""
    last, found = state.reached, _search(problem, state)
    lowest_value, lowest_norm = state.lowest
    improved = (found.value < lowest_value) | (found.grad_norm < lowest_norm)
    idle = jnp.where(found.failed | improved, 0, state.idle + 1)
    restart = found.failed | (idle >= _PATIENCE)
    stuck = restart & state.fresh

    # A search that failed leaves everything where it was.
    x, value, grad, grad_norm = _tree.where(
        found.failed,
        (last.params, last.value, state.grad, last.grad_norm),
        (found.params, found.value, found.grad, found.grad_norm),
    )
    direction_state = _start_afresh(
        problem, restart, problem.direction, state.direction
    )
    updates, direction_state = _direct(problem, value, grad, direction_state, x)
    new_state = _State(
        reached=MinimizeResult(
            params=x,
            value=value,
            grad_norm=grad_norm,
            iterations=last.iterations + 1,
            value_evaluations=last.value_evaluations + found.evaluations,
            grad_evaluations=last.grad_evaluations + found.grad_evaluations,
            restarts=last.restarts + (restart & ~stuck).astype(jnp.int32),
            status=last.status,
        ),
        grad=grad,
        updates=updates,
        direction=direction_state,
        line_search=_start_afresh(
            problem, restart, problem.line_search, found.line_search
        ),
        fresh=restart | (state.fresh & ~improved),
        idle=jnp.where(restart, 0, idle),
        lowest=(jnp.fmin(value, lowest_value), jnp.fmin(grad_norm, lowest_norm)),
        steepest=jnp.maximum(grad_norm, state.steepest),
    )
    status = _judge(problem, last, found, new_state, stuck)
    active = last.status == result.RUNNING
    stop = _report(problem.options, active, new_state.reached)
    status = jnp.where(stop & (status == result.RUNNING), result.CALLBACK, status)
    return new_state._replace(reached=new_state.reached._replace(status=status))


def _search(problem: _Problem, state: _State) -> _Found:
    """Goes along the direction."""
    steps, line_search_state = problem.line_search.update(
        state.updates,
        state.line_search,
        state.reached.params,
        value=state.reached.value,
        grad=state.grad,
        value_fn=problem.value_fn,
    )
    params = optax.apply_updates(state.reached.params, steps)
    value = optax.tree.get(line_search_state, "value")
    grad = optax.tree.get(line_search_state, "grad")
    evaluations = optax.tree.get(line_search_state, "num_linesearch_steps", 0)
    grad_evaluations = evaluations
    if value is None or grad is None:
        value, grad = jax.value_and_grad(problem.value_fn)(params)
        evaluations, grad_evaluations = evaluations + 1, 1
    value = value.astype(problem.dtype)
    grad_norm = _tree.max_abs(grad, dtype=problem.dtype)
    moved = functools.reduce(
        jnp.logical_or,
        [jnp.any(step != 0) for step in jax.tree.leaves(steps)],
        jnp.zeros([], bool),
    )
    return _Found(
        params=params,
        value=value,
        grad=_tree.cast_like(grad, state.grad),
        grad_norm=grad_norm,
        failed=~(moved & jnp.isfinite(value) & jnp.isfinite(grad_norm)),
        evaluations=evaluations,
        grad_evaluations=grad_evaluations,
        nonfinite=optax.tree.get(line_search_state, "nonfinite", 0),
        line_search=line_search_state,
    )


def _direct(
    problem: _Problem, value: jax.Array, grad: Any, direction_state: Any, params: Any
) -> tuple[Any, Any]:
    """The direction in which to search next."""
    updates, direction_state = problem.direction.update(
        jax.tree.map(jnp.conj, grad), direction_state, params, value=value
    )
    return jax.tree.map(jnp.negative, updates), direction_state


def _start_afresh(
    problem: _Problem, restart: jax.Array, transformation: Any, state: Any
) -> Any:
    """The state of a transformation, or its first one."""
    # Not a select, which would read and write all of the memory at every step.
    return jax.lax.cond(
        restart,
        lambda state: _tree.cast_like(transformation.init(problem.start), state),
        lambda state: state,
        state,
    )


def _judge(
    problem: _Problem,
    last: MinimizeResult,
    found: _Found,
    new_state: _State,
    stuck: jax.Array,
) -> jax.Array:
    """Whether to stop, and why: the status."""
    options, gtol, first_value = problem.options, problem.gtol, problem.first_value
    new = new_state.reached
    # A search that keeps no step promises nothing: the gradient alone decides.
    step = optax.tree.get(new_state.line_search, "learning_rate", 0)
    predicted = (
        -0.5 * step * _tree.slope(new_state.grad, new_state.updates, problem.dtype)
    )
    decided = predicted <= _PREDICTED * gtol * jnp.maximum(
        jnp.abs(new.value), first_value - new.value
    )
    small = new.grad_norm <= problem.tolerance
    decrease = last.value - found.value
    scale = jnp.maximum(jnp.maximum(jnp.abs(last.value), jnp.abs(found.value)), 1)
    level = (options.ftol > 0) & ~found.failed & (decrease <= options.ftol * scale)
    hopeless = 2 * found.nonfinite > found.evaluations
    fall = first_value / _FALL - new.value / _FALL  # this way nothing overflows
    unbounded = (new.grad_norm >= new_state.steepest) & (
        fall > jnp.maximum(jnp.abs(first_value), new.grad_norm * problem.size)
    )
    # No step goes further down than the numbers do.
    unbounded |= stuck & (new.value < -(float(jnp.finfo(problem.dtype).max) ** 0.85))
    used_up = new.iterations >= options.max_iter
    status = jnp.asarray(result.RUNNING, jnp.int32)
    for condition, reason in (  # the last that holds is given
        (used_up, result.MAX_ITER),
        (stuck, result.STUCK),
        (stuck & hopeless, result.NONFINITE),
        (unbounded, result.UNBOUNDED),
        (level, result.FTOL),
        (small & (decided | stuck | used_up), result.GTOL),
    ):
        status = jnp.where(condition, reason, status)
    return status


def _make_direction(options: Options) -> optax.GradientTransformationExtraArgs:
    preconditioner = options.preconditioner
    if isinstance(preconditioner, str):
        if preconditioner == "lbfgs":
            preconditioner = scale_by_limited_memory_bfgs(options.memory_size)
        else:
            preconditioner = scale_by_diagonal_bfgs(0)
    if options.beta_rule is None:
        return _transformations.preconditioner(preconditioner)
    return scale_by_conjugate_direction(
        options.beta_rule,
        preconditioner,
        beta_bounds=(-math.inf, math.inf),
        restart_on_ascent=True,
        restart_every=options.restart_every,
        epsilon=0,
    )


def _make_line_search(options: Options) -> optax.GradientTransformationExtraArgs:
    line_search = options.line_search
    if isinstance(line_search, str):
        scaled = options.preconditioner == "lbfgs"
        line_search = scale_by_hager_zhang_linesearch(
            initial_step="one" if scaled else "quadratic"
        )
    return optax.with_extra_args_support(line_search)


def _report(options: Options, active: jax.Array, reached: MinimizeResult) -> Any:
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
        reached.iterations,
        reached.params if options.callback is not None else None,
        reached.value,
        reached.grad_norm,
        reached.value_evaluations,
        vmap_method="sequential",
    )

"""The iteration of a minimization: search, direct, judge."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nlcg_optax import _transformations, _tree
from nlcg_optax.directions import beta as beta_rules
from nlcg_optax.directions.conjugate import scale_by_conjugate_direction
from nlcg_optax.minimization import result
from nlcg_optax.minimization.box import Box, projected_search
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
# the value, or of gtol squared times the decrease made so far: something like that is
# left of a quadratic whose minimum is 0 where the gradient has shrunk to gtol.
_PREDICTED, _OF_THE_FALL = 0.1, 0.01

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


def solve(
    objective: Callable[[Any], Any],
    options: Options,
    params: Any,
    gtol: jax.Array,
    box: Box | None,
) -> MinimizeResult:
    """Runs the loop."""

    def value_fn(x: Any) -> jax.Array:
        out = objective(x)
        return out[0] if options.has_aux else out

    loop = _Loop(value_fn, options, params, gtol, box)
    final = jax.lax.while_loop(
        lambda state: state.reached.status == result.RUNNING,
        loop.iterate,
        loop.first_state(),
    ).reached
    if not options.has_aux:
        return final
    return final._replace(
        value_evaluations=final.value_evaluations + 1, aux=objective(final.params)[1]
    )


class _Loop:
    """What stays the same in all iterations, and what is done in each."""

    def __init__(
        self,
        value_fn: Callable,
        options: Options,
        params: Any,
        gtol: jax.Array,
        box: Box | None,
    ):
        self.value_fn, self.options, self.box = value_fn, options, box
        self.direction = _make_direction(options)
        self.line_search = _make_line_search(options, box)
        if box is not None:
            params = box.project(params)
        self.start, self.dtype = params, _tree.scalar_dtype(params)
        value, self.first_grad = jax.value_and_grad(value_fn)(params)
        self.first_value = value.astype(self.dtype)
        self.first_norm = self._size(params, self.first_grad)
        self.gtol, self.tolerance = gtol, gtol * jnp.maximum(1, self.first_norm)
        self.size = jnp.maximum(1, _tree.max_abs(params, dtype=self.dtype))

    def _free(self, params: Any, grad: Any) -> Any:
        """The gradient of what no bound holds."""
        return grad if self.box is None else self.box.reduced(params, grad)

    def _size(self, params: Any, grad: Any) -> jax.Array:
        """Its largest element."""
        return _tree.max_abs(self._free(params, grad), dtype=self.dtype)

    def first_state(self) -> _State:
        """The state at the starting point."""
        value, grad_norm = self.first_value, self.first_norm
        status = _last_that_holds(
            (self.options.max_iter == 0, result.MAX_ITER),
            (grad_norm <= self.tolerance, result.AT_START),
            (grad_norm == 0, result.GTOL),
            (~(jnp.isfinite(value) & jnp.isfinite(grad_norm)), result.BAD_START),
        )
        zero = jnp.zeros([], jnp.int32)
        reached = MinimizeResult(
            params=self.start,
            value=value,
            grad_norm=grad_norm,
            iterations=zero,
            value_evaluations=zero + 1,
            grad_evaluations=zero + 1,
            restarts=zero,
            status=status,
        )
        state = _State(
            reached=reached,
            grad=self.first_grad,
            updates=None,
            direction=self.direction.init(self.start),
            line_search=self.line_search.init(self.start),
            fresh=jnp.ones([], bool),
            idle=zero,
            lowest=(value, grad_norm),
            steepest=grad_norm,
        )
        return self._direct(state)

    def iterate(self, state: _State) -> _State:
        """One iteration: along the direction, to a new one, and whether to stop."""
        last = state.reached
        state, failed, hopeless = self._search(state)
        reached, (value, grad_norm) = state.reached, state.lowest
        improved = (reached.value < value) | (reached.grad_norm < grad_norm)
        idle = jnp.where(failed | improved, 0, state.idle + 1)
        restart = failed | (idle >= _PATIENCE)
        stuck = restart & state.fresh
        restarts = reached.restarts + (restart & ~stuck).astype(jnp.int32)
        direction_state, line_search_state = self._start_afresh(
            restart, (state.direction, state.line_search)
        )
        state = self._direct(
            state._replace(
                reached=reached._replace(restarts=restarts),
                direction=direction_state,
                line_search=line_search_state,
                fresh=restart | (state.fresh & ~improved),
                idle=jnp.where(restart, 0, idle),
                lowest=(
                    jnp.fmin(reached.value, value),
                    jnp.fmin(reached.grad_norm, grad_norm),
                ),
                steepest=jnp.maximum(reached.grad_norm, state.steepest),
            )
        )
        status = self._judge(last, state, failed, stuck, hopeless)
        active = last.status == result.RUNNING
        stop = _report(self.options, active, state.reached)
        status = jnp.where(stop & (status == result.RUNNING), result.CALLBACK, status)
        return state._replace(reached=state.reached._replace(status=status))

    def _search(self, state: _State) -> tuple[_State, jax.Array, jax.typing.ArrayLike]:
        """Goes along the direction: to where, whether it failed, and hopelessly so."""
        last = state.reached
        steps, line_search_state = self.line_search.update(
            state.updates,
            state.line_search,
            last.params,
            value=last.value,
            grad=state.grad,
            value_fn=self.value_fn,
        )
        params = optax.apply_updates(last.params, steps)
        if self.box is not None:  # rounded sums would miss the bounds
            params = cast(Any, line_search_state).params
        value = optax.tree.get(line_search_state, "value")
        grad = optax.tree.get(line_search_state, "grad")
        evaluations = optax.tree.get(line_search_state, "num_linesearch_steps", 0)
        grad_evaluations = evaluations
        if value is None or grad is None:
            value, grad = jax.value_and_grad(self.value_fn)(params)
            evaluations, grad_evaluations = evaluations + 1, 1
        value = value.astype(self.dtype)
        grad_norm = self._size(params, grad)
        moved = _tree.max_abs(steps, dtype=self.dtype) != 0
        # Where it did not move, or to where something is not finite.
        failed = ~(moved & jnp.isfinite(value) & jnp.isfinite(grad_norm))
        hopeless = 2 * optax.tree.get(line_search_state, "nonfinite", 0) > evaluations
        here = last._replace(
            iterations=last.iterations + 1,
            value_evaluations=last.value_evaluations + evaluations,
            grad_evaluations=last.grad_evaluations + grad_evaluations,
        )
        there = here._replace(params=params, value=value, grad_norm=grad_norm)
        # A search that failed leaves everything where it was.
        reached, grad = _tree.where(
            failed, (here, state.grad), (there, _tree.cast_like(grad, state.grad))
        )
        state = state._replace(
            reached=reached, grad=grad, line_search=line_search_state
        )
        return state, failed, hopeless

    def _direct(self, state: _State) -> _State:
        """The state with the direction in which to search next."""
        params = state.reached.params
        updates, direction_state = self.direction.update(
            jax.tree.map(jnp.conj, self._free(params, state.grad)),
            state.direction,
            params,
            value=state.reached.value,
        )
        if self.box is not None:
            updates = self.box.descent(params, state.grad, updates)
        updates = jax.tree.map(jnp.negative, updates)
        return state._replace(updates=updates, direction=direction_state)

    def _start_afresh(self, restart: jax.Array, states: Any) -> Any:
        """The states of direction and line search, or their first ones."""

        def first(states: Any) -> Any:
            made = self.direction.init(self.start), self.line_search.init(self.start)
            return _tree.cast_like(made, states)

        # Not a select, which would read and write all of the memory at every step.
        return jax.lax.cond(restart, first, lambda states: states, states)

    def _judge(
        self,
        last: MinimizeResult,
        state: _State,
        failed: jax.Array,
        stuck: jax.Array,
        hopeless: jax.typing.ArrayLike,
    ) -> jax.Array:
        """Whether to stop, and why: the status."""
        new, first_value = state.reached, self.first_value
        # A search that keeps no step promises nothing: the gradient alone decides.
        step = optax.tree.get(state.line_search, "learning_rate", 0)
        steps = jax.tree.map(
            lambda u: _tree.scalar_like(step, _tree.lift(u)) * _tree.lift(u),
            state.updates,
        )
        predicted = -0.5 * _tree.slope(state.grad, steps, self.dtype)
        # The decrease so far says little of the accuracy where the start was steep.
        decided = predicted <= _PREDICTED * self.gtol * jnp.maximum(
            jnp.abs(new.value),
            _OF_THE_FALL * self.gtol * (first_value - new.value),
        )
        small = new.grad_norm <= self.tolerance
        ftol = self.options.ftol
        scale = jnp.maximum(jnp.maximum(jnp.abs(last.value), jnp.abs(new.value)), 1)
        level = (ftol > 0) & ~failed & (last.value - new.value <= ftol * scale)
        fall = first_value / _FALL - new.value / _FALL  # this way nothing overflows
        unbounded = (new.grad_norm >= state.steepest) & (
            fall > jnp.maximum(jnp.abs(first_value), new.grad_norm * self.size)
        )
        # No step goes further down than the numbers do.
        unbounded |= stuck & (new.value < -(float(jnp.finfo(self.dtype).max) ** 0.85))
        used_up = new.iterations >= self.options.max_iter
        return _last_that_holds(
            (used_up, result.MAX_ITER),
            (stuck, result.STUCK),
            (stuck & hopeless, result.NONFINITE),
            (unbounded, result.UNBOUNDED),
            (level, result.FTOL),
            (small & (decided | stuck | used_up), result.GTOL),
        )


def _last_that_holds(*reasons: tuple[jax.typing.ArrayLike, int]) -> jax.Array:
    """The status of the last condition that holds."""
    status = jnp.asarray(result.RUNNING, jnp.int32)
    for condition, reason in reasons:
        status = jnp.where(condition, reason, status)
    return status


def _make_direction(options: Options) -> optax.GradientTransformationExtraArgs:
    preconditioner = options.preconditioner
    if preconditioner == "lbfgs":
        preconditioner = scale_by_limited_memory_bfgs(options.memory_size)
    elif preconditioner == "diagonal_bfgs":
        preconditioner = scale_by_diagonal_bfgs(0)
    if options.beta_rule is None:
        return _transformations.preconditioner(preconditioner)
    return scale_by_conjugate_direction(
        options.beta_rule,
        _transformations.preconditioner(preconditioner),
        beta_bounds=(-math.inf, math.inf),
        restart_on_ascent=True,
        restart_every=options.restart_every,
        epsilon=0,
    )


def _make_line_search(
    options: Options, box: Box | None
) -> optax.GradientTransformationExtraArgs:
    if box is not None:
        return projected_search(box)
    line_search = options.line_search
    if isinstance(line_search, str):
        initial_step = "one" if options.preconditioner == "lbfgs" else "quadratic"
        line_search = scale_by_hager_zhang_linesearch(initial_step=initial_step)
    return optax.with_extra_args_support(line_search)


# What callbacks raised, while somebody waits for the result. Through the compiled
# program it would come as a page of JAX's own.
_raised: dict[Any, list[Exception]] = {}


@contextlib.contextmanager
def heard(callback: Callable[[IterationInfo], Any] | None) -> Iterator[None]:
    """Raises what a callback raises until the end, by which the result is there."""
    if callback is None:
        yield
        return
    _raised[callback] = errors = []
    try:
        yield
    finally:
        _raised.pop(callback, None)
    if errors:
        errors[0].add_note(
            "The callback of `minimize` raised it. It is called with an IterationInfo, "
            "which has params, value and grad_norm; one whose parameter is named xk "
            "is called with the parameters."
        )
        raise errors[0]


def _report(options: Options, active: jax.Array, reached: MinimizeResult) -> Any:
    """Calls back on the host; returns whether the callback wants to stop."""
    if options.callback is None and not options.progress:
        return False

    def call(active, *info):
        if not active:  # problems of a batch that have stopped already are silent
            return np.bool_(False)
        info = IterationInfo(*info)
        if options.progress:
            print(
                f"iteration {info.iteration:6d}  value {info.value:.8g}  "
                f"gradient {info.grad_norm:.3g}  "
                f"evaluations {info.value_evaluations}"
            )
        callback = options.callback
        try:
            wish = callback(info) if callback is not None else None
        except StopIteration:
            wish = True
        except Exception as error:
            waiting = _raised.get(callback)
            if waiting is None:
                raise
            waiting.append(error)
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

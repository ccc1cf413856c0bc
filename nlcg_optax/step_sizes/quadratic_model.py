"""The step that the curvature chooses: its length, and the share of the last steps."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nlcg_optax import _check, _tree
from nlcg_optax._curvature import Curvature
from nlcg_optax.step_sizes import _small_system

Preconditioners = (
    optax.GradientTransformation | Sequence[optax.GradientTransformation] | None
)


class QuadraticModelState(NamedTuple):
    """State of :func:`scale_by_quadratic_model`.

    Attributes:
      count: updates made, int32 scalar.
      stored: steps stored so far, int32 scalar; the newest is at
        ``(stored - 1) % history``.
      preconditioner_states: states of the nested preconditioners, a tuple.
      prev_updates: the last steps, with their sign turned, stacked along a leading
        axis.
      coefficients: of the last step: one for each preconditioned gradient, then one for
        each past step, the newest first.
      damping: λ.
      prev_value: the loss where the last step began.
      prev_slope: how far the loss would have fallen by its slope along the last step.
      prev_curvature: the curvature along the last step.
      predicted_decrease: how far the model said that the loss would fall.
      actual_decrease: how far it fell in the step before, which is seen one step later.
      model_error: average distance of the loss from the model's prediction.
      conjugacy: cosine between the last two steps in the metric of the curvature.
      rejected: steps that were taken back, int32 scalar.
      nonfinite: steps left out for a product that was not finite, int32 scalar.
    """

    count: jax.typing.ArrayLike
    stored: jax.typing.ArrayLike
    preconditioner_states: tuple[optax.OptState, ...]
    prev_updates: optax.Updates
    coefficients: jax.Array
    damping: jax.Array
    prev_value: jax.Array
    prev_slope: jax.Array
    prev_curvature: jax.Array
    predicted_decrease: jax.Array
    actual_decrease: jax.Array
    model_error: jax.Array
    conjugacy: jax.Array
    rejected: jax.typing.ArrayLike
    nonfinite: jax.typing.ArrayLike


# Of Levenberg–Marquardt: λ grows where the loss fell by less than a quarter of what the
# model promised, and shrinks where it fell by three quarters or more.
_POOR, _GOOD = 0.25, 0.75
_GROW, _SHRINK = 2.0, 0.5
_MIN_DAMPING, _MAX_DAMPING = 1e-4, 1e3
# A step that is taken back keeps this part of its length, and λ is raised to at least…
_CUT = 0.25
_DAMPING_OF_REJECTED, _GROW_OF_REJECTED = 0.1, 4.0
# … for a rise of the loss beyond so many predicted decreases and model errors.
_TOLERATED_DECREASES, _TOLERATED_ERRORS = 1.0, 4.0
_ERROR_DECAY = 0.8


def scale_by_quadratic_model(
    preconditioner: Preconditioners = None,
    *,
    history: int = 3,
    every: int = 1,
    damping: float = 0.0,
    multiplier: optax.ScalarOrSchedule = 1.0,
    state_dtype: Any | None = None,
    axis_name: _tree.AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""TODO"""
    _check.number("history", history, minimum=0, integer=True)
    _check.number("every", every, minimum=1, integer=True)
    _check.number("damping", damping, minimum=0)
    if not callable(multiplier):
        _check.number("multiplier", multiplier, minimum=0)
    inner = _preconditioners(preconditioner)
    kinds, slots = len(inner), max(history, 1)

    def init_fn(params: optax.Params) -> Any:
        dtype = _tree.scalar_dtype(params)

        def memory(x: jax.Array) -> jax.Array:
            # Like x, and not merely of its shape: sharded in a `shard_map` if x is.
            return jnp.zeros_like(x, shape=(slots, *jnp.shape(x)))

        zero, none = jnp.zeros([], dtype), jnp.zeros([], jnp.int32)
        return QuadraticModelState(
            count=none,
            stored=none,
            preconditioner_states=tuple(one.init(params) for one in inner),
            prev_updates=jax.tree.map(memory, _tree.zeros_like(params, state_dtype)),
            coefficients=jnp.zeros([kinds + history], dtype),
            damping=jnp.asarray(damping, dtype),
            prev_value=zero,
            prev_slope=zero,
            prev_curvature=zero,
            predicted_decrease=zero,
            actual_decrease=zero,
            model_error=zero,
            conjugacy=zero,
            rejected=none,
            nonfinite=none,
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        value: jax.typing.ArrayLike | None = None,
        curvature: Curvature | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        grad, dtype = updates, state.damping.dtype
        _tree.check_params(grad, params, "the quadratic model")
        loss = _check_loss(value).astype(dtype)
        curvature = _check_curvature(curvature)

        # What became of the last step.
        newest = (state.stored - 1) % slots
        actual = state.prev_value - loss
        pending = state.predicted_decrease > 0
        tolerated = jnp.maximum(
            _TOLERATED_DECREASES * state.predicted_decrease,
            _TOLERATED_ERRORS * state.model_error,
        )
        # Not "rose by more": a loss that is no number is no success.
        rejected = pending & ~(-actual <= tolerated)
        judged = pending & ~rejected
        damping = _adapted(state, actual, judged, rejected)
        error = jnp.abs(state.predicted_decrease - actual)
        known = state.model_error > 0
        error = jnp.where(known, jnp.minimum(error, 3 * state.model_error), error)
        average = state.model_error + (1 - _ERROR_DECAY) * (error - state.model_error)
        model_error = jnp.where(
            judged, jnp.where(known, average, error), state.model_error
        )

        # The directions, and the model along them.
        preconditioned, preconditioner_states = [], []
        for one, one_state in zip(inner, state.preconditioner_states, strict=True):
            z, one_state = one.update(
                grad, one_state, params, value=value, curvature=curvature, **extra_args
            )
            preconditioned.append(z)
            preconditioner_states.append(one_state)
        past = [
            jax.tree.map(lambda x, i=i: x[i], state.prev_updates)
            for i in range(history)
        ]

        def along(g: jax.Array, memory: jax.Array, *zs: jax.Array) -> list[jax.Array]:
            directions = [*zs, *(memory[i] for i in range(history))]
            return [_tree.real_inner(g, d.astype(g.dtype)) for d in directions]

        slopes = jnp.stack(
            _tree.reduce_products(
                along,
                grad,
                state.prev_updates,
                *preconditioned,
                dtype=dtype,
                axis_name=axis_name,
            )
        )
        # Where each past step is, the newest first.
        places = (state.stored - 1 - jnp.arange(history, dtype=jnp.int32)) % slots

        def solve() -> tuple[jax.Array, jax.Array, jax.Array]:
            directions = [*preconditioned, *past]
            matrix = _products(curvature, params, directions, loss).astype(dtype)
            return _small_system.minimize(slopes, matrix, damping), matrix

        def reuse() -> tuple[jax.Array, jax.Array]:
            zs, us = jnp.split(state.coefficients, [kinds])
            by_place = jnp.concatenate([zs, jnp.zeros_like(us).at[places].set(us)])
            return by_place, jnp.zeros([kinds + history] * 2, dtype)

        if every == 1:
            fresh = jnp.ones([], bool)
            coefficients, matrix = solve()
        else:
            fresh = state.count % every == 0
            coefficients, matrix = jax.lax.cond(fresh, solve, reuse)
        factor = multiplier(state.count) if callable(multiplier) else multiplier
        coefficients = _tree.real_scalar(factor, dtype) * coefficients
        slope = jnp.sum(slopes * coefficients)
        # Where it is not known, what it is at the minimum of a quadratic.
        curved = _small_system.inner(coefficients, matrix, coefficients)
        curved = jnp.where(fresh, curved, slope)
        finite = (
            jnp.isfinite(loss) & jnp.isfinite(slope) & jnp.all(jnp.isfinite(matrix))
        )
        accepted = finite & ~rejected

        # A step that is taken back: the last one, turned round, but for what is kept.
        back = jnp.where(
            jnp.arange(slots, dtype=jnp.int32) == newest, _CUT - 1, 0
        ).astype(dtype)
        zs, us = jnp.split(coefficients, [kinds])
        us = jnp.concatenate([us, jnp.zeros([slots - history], dtype)])
        us = jnp.where(accepted, us, jnp.where(rejected, back, 0))

        def combine(g: jax.Array, memory: jax.Array, *leaves: jax.Array) -> jax.Array:
            total = jnp.zeros_like(_tree.lift(g))
            for i, z in enumerate(leaves):
                z = _tree.lift(z).astype(total.dtype)
                # Not 0·z, which may be NaN.
                total += jnp.where(accepted, _tree.scalar_like(zs[i], z) * z, 0)
            for i in range(slots):
                u = _tree.lift(memory[i]).astype(total.dtype)
                total += _tree.scalar_like(us[i], u) * u
            return total.astype(g.dtype)

        step = jax.tree.map(combine, grad, state.prev_updates, *preconditioned)
        place = jnp.where(rejected, newest, state.stored % slots)

        def store(memory: jax.Array, u: jax.Array) -> jax.Array:
            memory = jnp.asarray(memory)  # a restored state may be NumPy's
            kept = memory[place]
            shortened = _tree.lift(kept) * _CUT
            new = jnp.where(rejected, shortened.astype(kept.dtype), kept)
            return memory.at[place].set(jnp.where(accepted, u.astype(kept.dtype), new))

        def choose(new: Any, cut: Any, old: Any) -> jax.Array:
            return jnp.where(accepted, new, jnp.where(rejected, cut, old))

        kept_slope, kept_curved = (
            _CUT * state.prev_slope,
            _CUT**2 * state.prev_curvature,
        )
        by_age = jnp.concatenate([zs, coefficients[kinds:][places]])
        moved = accepted | rejected
        return step, QuadraticModelState(
            count=jnp.where(moved, optax.safe_increment(state.count), state.count),
            stored=state.stored + accepted.astype(jnp.int32),
            preconditioner_states=_tree.where(
                accepted, tuple(preconditioner_states), state.preconditioner_states
            ),
            prev_updates=jax.tree.map(store, state.prev_updates, step),
            coefficients=jnp.where(accepted, by_age, state.coefficients),
            damping=jnp.where(moved, damping, state.damping),
            prev_value=jnp.where(accepted, loss, state.prev_value),
            prev_slope=choose(slope, kept_slope, state.prev_slope),
            prev_curvature=choose(curved, kept_curved, state.prev_curvature),
            predicted_decrease=choose(
                slope - 0.5 * curved,
                kept_slope - 0.5 * kept_curved,
                state.predicted_decrease,
            ),
            actual_decrease=jnp.where(moved & pending, actual, state.actual_decrease),
            model_error=jnp.where(moved, model_error, state.model_error),
            conjugacy=jnp.where(
                accepted,
                _cosine(coefficients, matrix, kinds + newest) if history else 0.0,
                state.conjugacy,
            ),
            rejected=state.rejected + rejected.astype(jnp.int32),
            nonfinite=state.nonfinite + (~moved).astype(jnp.int32),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _adapted(
    state: Any, actual: jax.Array, judged: jax.Array, rejected: jax.Array
) -> jax.Array:
    """λ after the last step."""
    poor = judged & ~(actual >= _POOR * state.predicted_decrease)
    good = judged & (actual >= _GOOD * state.predicted_decrease)
    shrunk = _SHRINK * state.damping
    shrunk = jnp.where(shrunk < _MIN_DAMPING, 0, shrunk)
    damping = jnp.where(poor, _GROW * state.damping, state.damping)
    damping = jnp.where(good, shrunk, damping)
    raised = _GROW_OF_REJECTED * jnp.maximum(state.damping, _DAMPING_OF_REJECTED)
    return jnp.minimum(jnp.where(rejected, raised, damping), _MAX_DAMPING)


def _cosine(coefficients: jax.Array, matrix: jax.Array, newest: jax.Array) -> jax.Array:
    """Cosine between the new step and the last one in the metric of the curvature."""
    other = jnp.zeros_like(coefficients).at[newest].set(1)
    product = _small_system.inner(coefficients, matrix, other)
    squares = (
        _small_system.inner(coefficients, matrix, coefficients)
        * (matrix[newest, newest])
    )
    defined = squares > 0
    return jnp.where(defined, product / jnp.sqrt(jnp.where(defined, squares, 1)), 0)


def _preconditioners(
    preconditioner: Any,
) -> tuple[optax.GradientTransformationExtraArgs, ...]:
    """The preconditioners as a tuple; None stands for the plain gradient."""
    # A transformation is a (named) tuple itself.
    one = preconditioner is None or isinstance(
        preconditioner, optax.GradientTransformation
    )
    several = (preconditioner,) if one else tuple(preconditioner)
    given = [optax.identity() if each is None else each for each in several]
    if not given or not all(
        isinstance(each, optax.GradientTransformation) for each in given
    ):
        raise ValueError(
            f"preconditioner={preconditioner!r} is not valid: expected an "
            "optax.GradientTransformation, a sequence of them, or None."
        )
    return tuple(optax.with_extra_args_support(each) for each in given)


_CALL = (
    "`update(grads, state, params, value=loss, curvature=nlcg_optax.gauss_newton("
    "lambda params: model(params, x), lambda outputs: loss(outputs, y).mean()))`"
)


def _check_loss(value: jax.typing.ArrayLike | None) -> jax.Array:
    """Returns the loss as an array, or says how to pass it."""
    if value is None:
        raise ValueError(
            "value=None: a step is judged by the loss that follows it. Call "
            f"{_CALL} with the loss averaged over the global batch."
        )
    value = jnp.asarray(value)
    if value.ndim or jnp.iscomplexobj(value):
        raise ValueError(
            f"value of shape {value.shape} and dtype {value.dtype} is not valid: "
            "expected the loss, a real scalar."
        )
    return value


def _check_curvature(curvature: Any) -> Curvature:
    """Returns the curvature, or says how to make and to pass it."""
    if not isinstance(curvature, Curvature):
        what = "None" if curvature is None else f"{type(curvature).__name__}"
        raise ValueError(
            f"curvature={what}: the step is chosen by the curvature of the loss, an "
            "nlcg_optax.Curvature as `gauss_newton` and `hessian` make it. Call "
            f"{_CALL}."
        )
    return curvature


def _products(
    curvature: Curvature, params: Any, directions: list[Any], loss: jax.Array
) -> jax.Array:
    """The matrix of the directions, the same on all devices where the loss is."""
    matrix = jnp.asarray(curvature(params, directions))
    size = len(directions)
    if matrix.shape != (size, size):
        raise ValueError(
            f"The curvature of {size} directions has shape {matrix.shape}, expected "
            f"{(size, size)}."
        )
    local = _tree.varying_axes(matrix) - _tree.varying_axes(loss)
    if local:
        axes = ", ".join(repr(axis) for axis in sorted(map(str, local)))
        raise ValueError(
            f"The curvature is each device's own along the axis {axes}: name it, "
            "`nlcg_optax.gauss_newton(..., axis_name=...)`, to take the mean."
        )
    return matrix

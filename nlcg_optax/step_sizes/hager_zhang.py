"""A line search for conjugate directions: Hager and Zhang's."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nlcg_optax import _check, _transformations, _tree
from nlcg_optax.step_sizes._interpolation import Point, cubic, secant

INITIAL_STEPS = ("auto", "one", "quadratic")

# What the next point is: one that doubles as a stage of the search.
_EXPAND, _BISECT, _SECANT, _SECOND_SECANT, _MIDPOINT = range(5)


class HagerZhangLinesearchInfo(NamedTuple):
    """What the last search did.

    Attributes:
      num_linesearch_steps: points evaluated, int32 scalar; each gave a value and a
        gradient.
      nonfinite: how many of them were not finite, int32 scalar.
      success: whether the accepted point satisfies the (approximate) Wolfe conditions.
        Otherwise the best point seen was taken, which may be the starting point.
    """

    num_linesearch_steps: jax.Array
    nonfinite: jax.Array
    success: jax.Array


class HagerZhangLinesearchState(NamedTuple):
    """State of :func:`scale_by_hager_zhang_linesearch`.

    Attributes:
      count: searches made, int32 scalar.
      learning_rate: the last step accepted.
      value: value at the accepted point, for ``optax.value_and_grad_from_state``.
      grad: gradient at the accepted point, likewise.
      prev_change: what the last step changes the value by to first order: the step
        times the slope where its search began.
      value_scale: the running average of the values' size, C in the papers.
      value_weight: the weight that this average has gathered, Q in the papers.
      info: what the last search did.
    """

    count: jax.Array
    learning_rate: jax.Array
    value: jax.Array
    grad: optax.Updates
    prev_change: jax.Array
    value_scale: jax.Array
    value_weight: jax.Array
    info: HagerZhangLinesearchInfo


class _Search(NamedTuple):
    """State of one search: an interval [low, high] and the point to try next.

    ``low`` has a negative slope and a value no higher than the start's (up to the
    tolerance). ``high`` is the other end: a point of non-negative slope, or, while
    bisecting, one too high. The best point is the one to be taken if nothing better
    comes.
    """

    stage: jax.Array
    trial: jax.Array
    low: Point
    high: Point
    width: jax.Array
    count: jax.Array
    nonfinite: jax.Array
    accepted: jax.Array
    exhausted: jax.Array
    best: Point
    best_grad: Any


def scale_by_hager_zhang_linesearch(
    max_linesearch_steps: int = 20,
    *,
    delta: float = 1e-3,
    sigma: float = 0.9,
    epsilon: float = 1e-6,
    initial_step: str = "quadratic",
    axis_name: _tree.AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales updates by Hager & Zhang's line search (2005, 2006).

    Along :math:`\phi(\alpha) = f(x + \alpha u)`, with u the incoming update, a step is
    accepted if it satisfies the Wolfe conditions

    .. math::
        \phi(\alpha) - \phi(0) \le \delta \alpha \phi'(0), \qquad
        \phi'(\alpha) \ge \sigma \phi'(0),

    or, where rounding hides differences of :math:`\phi`, the approximate ones, which
    need only slopes to be told apart:

    .. math::
        (2 \delta - 1) \phi'(0) \ge \phi'(\alpha) \ge \sigma \phi'(0), \qquad
        \phi(\alpha) \le \phi(0) + \epsilon_k .

    The latter count only where :math:`\phi` changed by less than a thousandth of the
    average of :math:`|f|`: further away they would accept any point that is level.

    The search expands until a minimum is bracketed, then takes secant² steps, each
    pair followed by a bisection if it did not shrink the interval enough. Deviations
    from the papers: while the values at the ends of the interval can be told apart, the
    minimum of the cubic through them (and the slopes) replaces the pair of secants; and
    where none of three points was low enough, the step is divided by ten instead of
    two, as it is from a point where the value or the slope is not finite. Each point
    costs one evaluation of the value and the gradient together, and there is one call
    of the objective in the compiled program.

    :math:`\epsilon_k` is ``epsilon`` times the running average of :math:`|f|`, and at
    least four units in the last place of :math:`\phi(0)`: in float32 the approximate
    conditions would otherwise fail on rounding alone.

    Args:
      max_linesearch_steps: points evaluated at most in one search. When they are used
        up the best point is taken, at worst the starting point (a zero update).
      delta: δ, of sufficient decrease, in (0, 1/2).
      sigma: σ, of curvature, from δ to 1.
      epsilon: relative error tolerated in the value.
      initial_step: the first point tried. ``"quadratic"`` guesses from the last step
        (for conjugate gradient): the step that makes the first-order change what it was
        in the last search. ``"one"`` is 1, for directions that carry a scale
        (quasi-Newton). ``"auto"`` is 1 too, but for the first search. Where there is no
        last step, it is 1% of the size of x, or such as to change the value by 1%
        where x is zero.
      axis_name: the mapped axis (or axes) over which the trees are sharded, see
        :func:`~nlcg_optax.nlcg`; None where they are whole, as they are under `jit`.

    Returns:
      A transformation to be placed last, where updates are descent directions. Its
      `update` needs `params` and, as in ``optax.scale_by_zoom_linesearch``, the keyword
      arguments ``value``, ``grad`` (what ``jax.grad`` returns, for complex leaves
      too), and ``value_fn``; those extra arguments that ``value_fn`` names are passed
      on to it. The accepted point's value and gradient are in the state, where
      ``optax.value_and_grad_from_state`` finds them.

    Raises:
      ValueError: when built, for an argument out of range; in `update`, if something it
        needs is missing.

    Rosenbrock's valley with Hager & Zhang's direction:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import math
    >>> import optax
    >>> import nlcg_optax
    >>> def value_fn(x):
    ...     return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
    >>> tx = nlcg_optax.nlcg(
    ...     1.0,
    ...     beta_rule="hager_zhang",
    ...     preconditioner=None,
    ...     beta_bounds=(-math.inf, math.inf),
    ...     step_rule=nlcg_optax.scale_by_hager_zhang_linesearch(),
    ... )
    >>> x = jnp.array([-1.2, 1.0])
    >>> state = tx.init(x)
    >>> value_and_grad = optax.value_and_grad_from_state(value_fn)
    >>> @jax.jit
    ... def step(x, state):
    ...     value, grad = value_and_grad(x, state=state)
    ...     updates, state = tx.update(
    ...         grad, state, x, value=value, grad=grad, value_fn=value_fn
    ...     )
    ...     return x + updates, state
    >>> for _ in range(60):
    ...     x, state = step(x, state)
    >>> print(x.round(3))
    [1. 1.]
    """
    _check.number("max_linesearch_steps", max_linesearch_steps, minimum=1, integer=True)
    _check.number("delta", delta, minimum=0, exclusive=True)
    # `optax.inject_hyperparams` makes arrays, which have no value while traced.
    delta_known = not isinstance(delta, jax.Array)
    _check.number("sigma", sigma, minimum=delta if delta_known else 0)
    _check.axis_name(axis_name)
    _check.number("epsilon", epsilon, minimum=0, finite=True)
    sigma_known = not isinstance(sigma, jax.Array)
    if (delta_known and delta >= 0.5) or (sigma_known and sigma >= 1):
        raise ValueError(
            f"delta={delta!r}, sigma={sigma!r} are not valid: expected delta < 1/2 and "
            "sigma < 1."
        )
    _check.one_of("initial_step", initial_step, INITIAL_STEPS)

    def init_fn(params: optax.Params) -> HagerZhangLinesearchState:
        dtype = _tree.scalar_dtype(params)
        return HagerZhangLinesearchState(
            count=jnp.zeros([], jnp.int32),
            learning_rate=jnp.ones([], dtype),
            value=jnp.asarray(jnp.inf, dtype),
            grad=_tree.zeros_like(params),
            prev_change=jnp.zeros([], dtype),
            value_scale=jnp.zeros([], dtype),
            value_weight=jnp.zeros([], dtype),
            info=HagerZhangLinesearchInfo(
                num_linesearch_steps=jnp.zeros([], jnp.int32),
                nonfinite=jnp.zeros([], jnp.int32),
                success=jnp.ones([], bool),
            ),
        )

    def update_fn(
        updates: optax.Updates,
        state: HagerZhangLinesearchState,
        params: optax.Params | None = None,
        *,
        value: jax.typing.ArrayLike | None = None,
        grad: optax.Updates | None = None,
        value_fn: Callable[..., Any] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, HagerZhangLinesearchState]:
        if params is None or grad is None or value_fn is None:
            raise ValueError(f"A line search needs the objective. {_CALL}")
        value = _check.loss(value, f"a line search needs the objective. {_CALL}")
        _tree.check_match(updates, state.grad, "the optimizer's state")
        dtype = state.learning_rate.dtype
        # Along a direction of ordinary length, or no slope along it would be in range.
        longest = _tree.max_abs(updates, dtype=dtype, axis_name=axis_name)
        exponent = _tree.exponent_of(longest, dtype)
        unit = _tree.power_of_two(-exponent, dtype)
        updates = jax.tree.map(functools.partial(_scaled, unit), updates)
        value_and_grad = jax.value_and_grad(_with_known_arguments(value_fn, extra_args))

        def evaluate(step):
            moved = jax.tree.map(functools.partial(_move, step), params, updates)
            value, grad = value_and_grad(moved)
            slope = _tree.slope(grad, updates, dtype, axis_name)
            return Point(step, jnp.asarray(value).astype(dtype), slope), grad

        zero = jnp.zeros([], dtype)
        start = Point(
            step=zero,
            value=value.astype(dtype),
            slope=_tree.slope(grad, updates, dtype, axis_name),
        )
        # C of the papers: an average of |f|, with a memory of about three searches.
        weight = 1 + 0.7 * state.value_weight
        scale = state.value_scale + (jnp.abs(start.value) - state.value_scale) / weight
        ulp = jnp.finfo(dtype).eps
        tolerance = jnp.maximum(epsilon * scale, 4 * ulp * jnp.abs(start.value))
        ceiling = start.value + tolerance

        search = jax.lax.while_loop(
            lambda s: ~s.accepted & ~s.exhausted & (s.count < max_linesearch_steps),
            functools.partial(
                _advance,
                start=start,
                ceiling=ceiling,
                small_change=_SMALL_CHANGE * scale + tolerance,
                evaluate=evaluate,
                delta=delta,
                sigma=sigma,
            ),
            _Search(
                stage=jnp.asarray(_EXPAND, jnp.int32),
                trial=_initial_step(
                    initial_step, state, start, params, longest * unit, unit, axis_name
                ),
                low=start,
                high=start,
                width=zero,
                count=jnp.zeros([], jnp.int32),
                nonfinite=jnp.zeros([], jnp.int32),
                accepted=jnp.zeros([], bool),
                # Uphill or not finite: there is nothing to search.
                exhausted=~((start.slope < 0) & jnp.isfinite(start.value)),
                best=start,
                best_grad=_tree.cast_like(grad, state.grad),
            ),
        )
        step = search.best.step
        scaled = jax.tree.map(functools.partial(_scaled, step), updates)
        return scaled, HagerZhangLinesearchState(
            count=_transformations.increment(state.count),
            learning_rate=jnp.where(step > 0, step * unit, state.learning_rate),
            value=search.best.value,
            grad=search.best_grad,
            prev_change=jnp.where(step > 0, step * start.slope, state.prev_change),
            value_scale=scale,
            value_weight=weight,
            info=HagerZhangLinesearchInfo(
                num_linesearch_steps=search.count,
                nonfinite=search.nonfinite,
                success=search.accepted,
            ),
        )

    return _transformations.make(init_fn, update_fn)


def _move(step: jax.Array, x: jax.Array, u: jax.Array) -> jax.Array:
    """A leaf of the parameters, so far along the direction."""
    lifted = _tree.lift(u)
    scaled = _tree.scalar_like(step, lifted) * lifted
    return (_tree.lift(x) + scaled).astype(x.dtype)


def _scaled(step: jax.Array, u: jax.Array) -> jax.Array:
    """A leaf of the step."""
    lifted = _tree.lift(u)
    # Not 0·u: a direction that is not finite gives no step, rather than NaN.
    moved = _tree.scalar_like(step, lifted) * lifted
    return jnp.where(step > 0, moved, 0).astype(u.dtype)


_CALL = (
    "Call `update(grads, state, params, value=value, grad=grad, value_fn=value_fn)` "
    "with the objective and its value and gradient at the parameters."
)

_SMALL_CHANGE = 1e-3  # ω of the papers
_EXPANSION = 5.0  # ρ of the papers
_SHRINKAGE = 0.66  # γ of the papers


def _advance(
    search: _Search,
    start: Point,
    ceiling: jax.Array,
    small_change: jax.Array,
    evaluate: Callable[[jax.Array], tuple[Point, Any]],
    *,
    delta: float,
    sigma: float,
) -> _Search:
    """Evaluates the trial point, then accepts it or names the next one."""
    point, grad = evaluate(search.trial)
    finite = jnp.isfinite(point.value) & jnp.isfinite(point.slope)
    wolfe = point.value - start.value <= delta * point.step * start.slope
    approximate = (
        (point.slope <= (2 * delta - 1) * start.slope)
        & (point.value <= ceiling)
        & (jnp.abs(point.value - start.value) <= small_change)
    )
    accepted = finite & (point.slope >= sigma * start.slope) & (wolfe | approximate)
    better = accepted | (finite & (point.value < search.best.value))

    # Where the point lies, by the rules U1, U2 and U3.
    rising = finite & (point.slope >= 0)
    low_enough = finite & (point.slope < 0) & (point.value <= ceiling)
    too_high = ~rising & ~low_enough

    expanding = search.stage == _EXPAND
    # While expanding, a point low enough becomes the lower end and there is no upper.
    low = _tree.where(low_enough, point, search.low)
    high = _tree.where(low_enough & ~expanding, search.high, point)
    return _next_trial(search, point, low, high, low_enough, too_high, finite)._replace(
        count=search.count + 1,
        nonfinite=search.nonfinite + (~finite).astype(jnp.int32),
        accepted=accepted,
        best=_tree.where(better, point, search.best),
        best_grad=jax.tree.map(
            lambda new, old: jnp.where(better, new.astype(old.dtype), old),
            grad,
            search.best_grad,
        ),
    )


def _next_trial(
    search: _Search,
    point: Point,
    low: Point,
    high: Point,
    low_enough: jax.Array,
    too_high: jax.Array,
    finite: jax.Array,
) -> _Search:
    """The search with the next point to try in the interval from low to high.

    Args:
      search: as it was before the last point.
      point: that point.
      low: the lower end now.
      high: the upper end now.
      low_enough: whether the point became the lower end.
      too_high: whether it is the upper end for its value alone.
      finite: whether it has a value and a slope.
    """
    stage = search.stage
    expand = (stage == _EXPAND) & low_enough
    # Only bisection leads out of an interval whose upper end is too high, and it goes
    # on until that end rises.
    bisect = too_high | ((stage == _BISECT) & low_enough)

    # Between points whose values can be told apart a cubic knows most; near a minimum,
    # where rounding hides their difference, secants go by the slopes alone.
    visible = jnp.finfo(low.value.dtype).eps ** (2 / 3) * jnp.maximum(
        jnp.abs(low.value), jnp.abs(high.value)
    )
    by_value = jnp.abs(high.value - low.value) > visible
    # S2 and S3: a second secant through the end that was just replaced.
    replaced = _tree.where(low_enough, search.low, search.high)
    second = secant(replaced, point)
    inside = ~by_value & (second > low.step) & (second < high.step)
    take_second = (stage == _SECANT) & inside
    to_midpoint = (((stage == _SECANT) & ~inside) | (stage == _SECOND_SECANT)) & (
        high.step - low.step > _SHRINKAGE * search.width
    )

    middle = low.step + 0.5 * (high.step - low.step)
    first = jnp.where(by_value, cubic(low, high), secant(low, high))
    usable = (first > low.step) & (first < high.step)
    # Three points and none low enough: the first step was out of scale. Halving alone
    # would use up the search within a millionth of it.
    unscaled = (low.step == 0) & (search.count >= 2)
    share = jnp.where(finite & ~unscaled, 0.5, 0.1)
    back_off = low.step + share * (high.step - low.step)
    cases = (
        (expand, _EXPANSION * point.step, _EXPAND),
        (bisect, jnp.where(too_high, back_off, middle), _BISECT),
        (take_second, second, _SECOND_SECANT),
        (to_midpoint, middle, _MIDPOINT),
    )
    trial, next_stage = jnp.where(usable, first, middle), _SECANT
    for condition, step, name in reversed(cases):
        trial = jnp.where(condition, step, trial)
        next_stage = jnp.where(condition, name, next_stage)
    starts_anew = ~(expand | bisect | take_second | to_midpoint)
    width = jnp.where(starts_anew, high.step - low.step, search.width)
    # No number lies strictly between the ends (or beyond the last one).
    exhausted = jnp.where(
        expand,
        ~jnp.isfinite(trial),
        (trial <= low.step) | (trial >= high.step),
    )
    return search._replace(
        stage=jnp.asarray(next_stage, jnp.int32),
        trial=trial,
        low=low,
        high=high,
        width=width,
        exhausted=exhausted,
    )


def _initial_step(
    kind: str,
    state: HagerZhangLinesearchState,
    start: Point,
    params: Any,
    length: jax.Array,
    unit: jax.Array,
    axis_name: _tree.AxisName | None,
) -> jax.Array:
    """The first step to try, along a direction that was multiplied by a unit."""
    one = 1 / unit
    if kind == "one":
        return one
    size = _tree.max_abs(params, dtype=one.dtype, axis_name=axis_name)

    def ratio(a, b):
        """The quotient, or 0 where that is no positive number."""
        quotient = a / jnp.where(b == 0, 1, b)
        usable = (b != 0) & jnp.isfinite(quotient) & (quotient > 0)
        return jnp.where(usable, quotient, 0)

    fresh = ratio(0.01 * size, length)
    fresh = jnp.where(
        fresh > 0, fresh, ratio(0.01 * jnp.abs(start.value), jnp.abs(start.slope))
    )
    fresh = jnp.where(fresh > 0, fresh, one)
    if kind == "auto":
        later = one
    else:
        change = ratio(state.prev_change, start.slope)
        later = jnp.where(change > 0, change, state.learning_rate / unit)
    return jnp.where(state.count == 0, fresh, later)


def _with_known_arguments(
    value_fn: Callable[..., Any], extra_args: dict[str, Any]
) -> Callable[[Any], Any]:
    """Binds those of the extra arguments that the function names."""
    parameters = inspect.signature(value_fn).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        known = extra_args
    else:
        names = [p.name for p in parameters]
        known = {key: value for key, value in extra_args.items() if key in names}
    return lambda params: value_fn(params, **known)

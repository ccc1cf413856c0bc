"""Bounds of variables: what they are, and a search along what they leave."""

import math
from typing import Any, NamedTuple, cast

import jax
import jax.core
import jax.numpy as jnp
import optax

from nlcg_optax import _tree

# Of what the slope promises, as little is enough.
_SUFFICIENT = 1e-4
_MAX_POINTS = 30


class Box(NamedTuple):
    """Bounds of each element of the parameters, as two trees like them."""

    lower: Any
    upper: Any

    def project(self, params: Any) -> Any:
        """The nearest point within the bounds."""
        return jax.tree.map(jnp.clip, params, *self)

    def reduced(self, params: Any, grad: Any) -> Any:
        """The gradient, but zero where a bound holds an element."""
        return self.descent(params, grad, grad)

    def descent(self, params: Any, grad: Any, updates: Any) -> Any:
        """What of `updates` can be subtracted.

        Nothing where an element is at a bound and the gradient's descent, or that of
        the update itself, leads beyond it. If updates are a positive definite matrix
        times :meth:`reduced`, then what is left descends too.
        """

        def free(x, g, u, low, high):
            below = (x <= low) & ((g > 0) | (u > 0))
            above = (x >= high) & ((g < 0) | (u < 0))
            return jnp.where(below | above, jnp.zeros_like(u), u)

        return jax.tree.map(free, params, grad, updates, *self)

    def held(self, params: Any) -> Any:
        """Where elements are at a bound."""
        return jax.tree.map(
            lambda x, low, high: (x <= low) | (x >= high), params, *self
        )

    def moved(self, params: Any, tangents: Any) -> Any:
        """How such elements move with their bounds."""
        return jax.tree.map(
            lambda x, low, by_low, by_high: jnp.where(x <= low, by_low, by_high),
            params,
            self.lower,
            *tangents,
        )


def make(bounds: Any, params: Any) -> Box:
    """The bounds that `minimize` was given, in one of the forms that it takes.

    Raises:
      TypeError: for complex parameters.
      ValueError: for bounds that do not fit them, or an upper one below the lower.
    """
    if any(jnp.iscomplexobj(x) for x in jax.tree.leaves(params)):
        raise TypeError("bounds: complex parameters have none.")
    structure = jax.tree.structure(params)
    vector = structure == jax.tree.structure(0) and params.ndim == 1
    if hasattr(bounds, "lb") and hasattr(bounds, "ub"):  # scipy.optimize.Bounds
        sides = bounds.lb, bounds.ub
    elif vector and len(bounds) != params.size:
        raise ValueError(
            f"bounds: expected a pair (lower, upper) for each of the {params.size} "
            f"variables, or `scipy.optimize.Bounds`, not {len(bounds)} entries."
        )
    elif vector:
        sides = tuple(
            jnp.array([none if pair[k] is None else pair[k] for pair in bounds])
            for k, none in enumerate((-math.inf, math.inf))
        )
    else:
        sides = tuple(bounds)

    def fill(side: Any, none: float) -> Any:
        side = none if side is None else side
        if jax.tree.structure(side) == jax.tree.structure(0):
            side = jax.tree.map(lambda _: side, params)  # one for all of them
        return jax.tree.map(
            lambda x, bound: jnp.broadcast_to(jnp.asarray(bound, x.dtype), x.shape),
            params,
            side,
        )

    try:
        lower, upper = sides
        box = Box(fill(lower, -math.inf), fill(upper, math.inf))
    except (TypeError, ValueError) as error:
        raise ValueError(
            "bounds: expected a pair (lower, upper) of numbers or of trees like the "
            f"parameters, {jax.tree.map(jnp.shape, params)}: {error}"
        ) from None
    for low, high in zip(*map(jax.tree.leaves, box), strict=True):
        wrong = ~(low <= high)
        if not isinstance(wrong, jax.core.Tracer) and wrong.any():
            raise ValueError("bounds: an upper one is below the lower, or no number.")
    return box


class ProjectedSearchState(NamedTuple):
    """What a search left, most of it by the names under which the loop asks for it.

    Attributes:
      params: the point reached, which is on a bound to the last digit.
      learning_rate: the step accepted; 0 for none.
      value: the value there.
      grad: the gradient there.
      num_linesearch_steps: points tried.
      nonfinite: how many of them were not finite.
    """

    params: Any
    learning_rate: jax.Array
    value: jax.Array
    grad: Any
    num_linesearch_steps: jax.Array
    nonfinite: jax.Array


def projected_search(box: Box) -> optax.GradientTransformationExtraArgs:
    r"""Searches along the projection of a direction u onto the bounds.

    A step α is accepted where, with :math:`x_\alpha = P(x + \alpha u)`,

    .. math::
        f(x_\alpha) \le f(x) + 10^{-4}\, g^\top (x_\alpha - x),

    or where rounding hides the difference and the gradient shrinks. The first is 1, the
    next at the minimum of the parabola through what is known, between a tenth and a
    half of the last (Bertsekas, *Projected Newton methods*, 1982).
    """

    def init_fn(params: Any) -> ProjectedSearchState:
        return _state(params, params, 0, 0, 0)

    def _state(params, grad, value, step, count, nonfinite: Any = 0):
        dtype = _tree.scalar_dtype(params)
        return ProjectedSearchState(
            params=params,
            learning_rate=jnp.asarray(step, dtype),
            value=jnp.asarray(value, dtype),
            grad=_tree.cast_like(grad, params),
            num_linesearch_steps=jnp.asarray(count, jnp.int32),
            nonfinite=jnp.asarray(nonfinite, jnp.int32),
        )

    def update_fn(updates, state, params, *, value, grad, value_fn, **extra_args):
        del extra_args
        dtype = state.value.dtype
        size = _tree.max_abs(box.reduced(params, grad), dtype=dtype)
        level = 4 * jnp.finfo(dtype).eps * jnp.abs(value)

        def difference(there):
            return jax.tree.map(jnp.subtract, there, params)

        def attempt(carry):
            step, _, last = carry
            there = box.project(
                jax.tree.map(
                    lambda x, u: x + _tree.scalar_like(step, x) * u.astype(x.dtype),
                    params,
                    updates,
                )
            )
            found, new = jax.value_and_grad(value_fn)(there)
            found = found.astype(dtype)
            promised = jnp.minimum(_tree.slope(grad, difference(there), dtype), 0)
            new_size = _tree.max_abs(box.reduced(there, new), dtype=dtype)
            finite = jnp.isfinite(found) & jnp.isfinite(new_size)
            fallen = found <= value + _SUFFICIENT * promised
            alike = (found <= value + level) & (new_size < size)
            curved = 2 * (found - value - promised)
            usable = jnp.isfinite(curved) & (curved > 0)
            ratio = jnp.clip(-promised / jnp.where(usable, curved, 1), 0.1, 0.5)
            tried = _state(
                there,
                new,
                found,
                step,
                last.num_linesearch_steps + 1,
                last.nonfinite + (~finite).astype(jnp.int32),
            )
            shorter = step * jnp.where(usable, ratio, 0.1)
            return shorter, finite & (fallen | alike), tried

        first = jnp.ones([], dtype), jnp.zeros([], bool), _state(params, grad, 0, 0, 0)
        _, accepted, tried = jax.lax.while_loop(
            lambda carry: ~carry[1] & (carry[2].num_linesearch_steps < _MAX_POINTS),
            attempt,
            first,
        )
        # Where none was accepted it stays, which the loop takes for a failure.
        counts = tried.num_linesearch_steps, tried.nonfinite
        kept = _state(params, grad, value, 0, *counts)
        state = _tree.where(accepted, tried, kept)
        return difference(state.params), state

    return optax.GradientTransformationExtraArgs(init_fn, cast(Any, update_fn))

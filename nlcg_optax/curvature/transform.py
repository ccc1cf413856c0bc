"""The step that the curvature chooses: its length, and the share of the last steps."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nlcg_optax import _check, _tree
from nlcg_optax.curvature import noise, subspace, trust
from nlcg_optax.curvature.products import Curvature, Images, combine, join, stack

Preconditioners = (
    optax.GradientTransformation | Sequence[optax.GradientTransformation | None] | None
)


class QuadraticModelState(NamedTuple):
    """State of :func:`scale_by_quadratic_model`.

    Attributes:
      count: updates made, int32 scalar.
      stored: steps taken, neither left out nor of length zero, int32 scalar.
      preconditioner_states: states of the nested preconditioners, a tuple.
      prev_updates: the last steps, with their sign turned, stacked along a leading
        axis, the newest at ``(stored - 1) % history``. Once noise rules, the last step
        comes first, and then NLCG's direction.
      prev_norms: the lengths of the last steps, the newest at the same place.
      coefficients: of the last step: of each preconditioned gradient, then of each past
        step, the newest first, then of each residual direction.
      damping: λ of the last step.
      extra_damping: what the first step or a rejected one added to it.
      prev_value: the loss where the last step began.
      prev_slope: how far the loss would have fallen by its slope along the last step.
      prev_curvature: the curvature along the last step.
      predicted_decrease: how far the model said that the loss would fall.
      actual_decrease: how far it fell in the step before, which is seen one step later.
      model_error: average distance of the loss from the model's prediction.
      conjugacy: cosine between the last two steps in the metric of the curvature.
      signal: average share of the slope along a step that is no noise.
      log_length: mean logarithm of the best length along the preconditioned gradient
        alone.
      rate: the rate with which NLCG goes on once noise rules; 0 before.
      rate_since: the count when it took over.
      prev_g_z: gᵀz of the last step.
      bounded: steps that were shortened to the longest allowed, int32 scalar.
      rejected: steps that were taken back, int32 scalar.
      nonfinite: steps left out for a product that was not finite, int32 scalar.
    """

    count: jax.typing.ArrayLike
    stored: jax.typing.ArrayLike
    preconditioner_states: tuple[optax.OptState, ...]
    prev_updates: optax.Updates
    prev_norms: jax.Array
    coefficients: jax.Array
    damping: jax.Array
    extra_damping: jax.Array
    prev_value: jax.Array
    prev_slope: jax.Array
    prev_curvature: jax.Array
    predicted_decrease: jax.Array
    actual_decrease: jax.Array
    model_error: jax.Array
    conjugacy: jax.Array
    signal: jax.Array
    log_length: jax.Array
    rate: jax.Array
    rate_since: jax.typing.ArrayLike
    prev_g_z: jax.Array
    bounded: jax.typing.ArrayLike
    rejected: jax.typing.ArrayLike
    nonfinite: jax.typing.ArrayLike

    def report(self) -> dict[str, jax.typing.ArrayLike]:
        """What :func:`nlcg_optax.diagnostics` tells."""
        return {
            "coefficients": self.coefficients,
            "damping": self.damping,
            "predicted_decrease": self.predicted_decrease,
            "actual_decrease": self.actual_decrease,
            "conjugacy": self.conjugacy,
            "signal": self.signal,
            "rate": self.rate,
            "bounded_steps": self.bounded,
            "rejected_steps": self.rejected,
            "nonfinite_products": self.nonfinite,
        }


# A step that is taken back keeps this part of its length.
_CUT = 0.25
# No step is to take more off a positive loss than this many times what there is.
_MOST = 2.0


class _Plan(NamedTuple):
    """A step over the directions: the new ones, those of the past, the residual ones.

    Attributes:
      slopes: of the gradient along each direction.
      products: the inner products of the directions in the curvature.
      coefficients: of the directions.
      residual_directions: those that are not known from outside.
    """

    slopes: jax.Array
    products: jax.Array
    coefficients: jax.Array
    residual_directions: list[Any]


def scale_by_quadratic_model(
    preconditioner: Preconditioners = None,
    *,
    history: int = 3,
    residuals: int = 2,
    damping: float = 0.01,
    noise_damping: float = 0.1,
    first_damping: float = 3.0,
    max_growth: float = 3.0,
    horizon: int | None = None,
    multiplier: optax.ScalarOrSchedule = 1.0,
    state_dtype: Any | None = None,
    axis_name: _tree.AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Takes the step that minimizes a quadratic model over a few directions.

    The directions are the preconditioned gradient :math:`z_t`, the last steps
    :math:`\delta_{t-1}, \dots, \delta_{t-k}`, and two residual directions :math:`z'`.
    With :math:`d_i` for all of them the step is
    :math:`\delta_t = -\sum_i c_i d_i`, where

    .. math::
        (K + \lambda\, \mathrm{diag} K)\, c = s, \qquad
        s_i = g_t^\top d_i, \quad K_{ij} = d_i^\top C_t\, d_j ,

    the minimum of :math:`g^\top \delta + \tfrac{1}{2} \delta^\top C \delta`, damped by
    λ. The curvature C of the loss is an argument of `update`. Its products need no
    matrix, and a part of the batch suffices for them. There is no learning rate: length
    and conjugacy come from the curvature, as in Møller's scaled conjugate gradient
    (1993, doi:10.1016/S0893-6080(05)80056-5), Schraudolph's stochastic one (2002), and
    K-FAC's step and momentum (Martens & Grosse, 2015, arXiv:1503.05671, section 7);
    with more past steps it is sequential subspace optimization (Narkiss & Zibulevsky,
    2005). On a quadratic, with a fixed preconditioner, one past step and no residual
    direction, this *is* preconditioned conjugate gradient.

    A residual direction is the preconditioned gradient of the model at its minimum over
    the directions before it, :math:`z' = M^{-1}(g + C \delta^0)`: one more iteration of
    conjugate gradient on the same model, which takes one backward pass on that part of
    the batch.

    The loss that `update` is given next tells whether the model held. Where the loss
    rose by more than it was to fall, and by more than four times what the model is
    usually wrong by (or is no number at all), three quarters of the step are taken
    back, which is counted, and λ is raised.

    The slope along a step, as the next gradient has it, tells how much of it was
    signal. λ grows with the ratio of noise to signal. With a ``horizon``, once less
    than 0.4 of the slope is signal, NLCG's own direction takes over for good: β
    by Fletcher & Reeves, 0.9 at most, a look ahead, and as the rate the (geometric)
    average of the best lengths along z, which falls to zero at the horizon by a cosine.
    From then on there are no products. For a step that is best for one batch is too
    short for the average over many (Wu et al., 2018, arXiv:1803.02021).

    As everywhere in Optax the updates keep the gradient's sign until the final negative
    scaling: follow it by ``optax.scale(-1.0)``, as
    ``nlcg(step_rule="quadratic_model")`` does. Nothing else should change the updates
    after it, for it goes by the steps that it made.

    Args:
      preconditioner: any gradient transformation, or a sequence of them, each of which
        makes a direction; None for the plain gradient. The first one makes the residual
        directions too, for which its state does not advance. Each is given `params`
        and all extra arguments.
      history: past steps k among the directions; each is as large as the parameters.
        One copy is kept even for 0, to take a step back.
      residuals: residual directions. With 0 there is no backward pass.
      damping: λ without noise, relative to the curvature along each direction.
      noise_damping: what the ratio of noise to signal, times this, adds to λ.
      first_damping: what the first step adds to λ, because nothing is known yet of how
        far the model holds. It fades by a factor of 4 with each step.
      max_growth: how much longer a step may be than the longest of the last ones
        remembered; ``math.inf`` for any length. Nor may the model of Gauss and Newton
        fall by more than twice the loss, where that is positive: the curvature of a few
        examples that are predicted with confidence is next to nothing, and says nothing
        of the others. Shortened steps are counted.
      horizon: the steps of the whole run, for losses of sampled batches, where noise
        may come to rule. None where each loss is that of the same data: the early steps
        of a hard problem without noise can look like noise.
      multiplier: of the step, a number or a schedule of the count: 1, or a final decay.
      state_dtype: dtype of the past steps (kept complex for complex leaves); None for
        each parameter's own.
      axis_name: the mapped axis (or axes) of a `shard_map` or `pmap` over which the
        trees are sharded; None where they are whole, as they are under `jit`. In a
        `shard_map` that checks types (``check_vma=True``, its default) some leaves may
        be replicated; elsewhere *every* leaf counts as sharded. (The axis over which
        the batch is split is an argument of the curvature.)

    Returns:
      A transformation whose `update` needs `params` and the keyword arguments
      ``value``, the loss averaged over the global batch, and ``curvature``, a
      :class:`Curvature` of the same loss. If a product is not finite the update is
      zero, and the state stays as it was but for a count.

    Raises:
      ValueError: when built, for an argument out of range; in `update`, if something it
        needs is missing or does not match.

    A curved valley, without a learning rate:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> def residuals(x):  # half their sum of squares is Rosenbrock's function
    ...     return jnp.array([10.0 * (x[1] - x[0] ** 2), 1.0 - x[0]])
    >>> def loss_fn(outputs):
    ...     return 0.5 * jnp.sum(outputs**2)
    >>> curvature = nlcg_optax.gauss_newton(residuals, loss_fn)
    >>> tx = nlcg_optax.scale_by_quadratic_model()
    >>> x = jnp.array([-1.2, 1.0])
    >>> state = tx.init(x)
    >>> @jax.jit
    ... def step(x, state):
    ...     loss, grads = jax.value_and_grad(lambda x: loss_fn(residuals(x)))(x)
    ...     updates, state = tx.update(
    ...         grads, state, x, value=loss, curvature=curvature
    ...     )
    ...     return x - updates, state
    >>> for _ in range(60):
    ...     x, state = step(x, state)
    >>> print(x.round(3))
    [1. 1.]
    """
    _check.static_counts(jax.Array, history=(history, 0), residuals=(residuals, 0))
    _check.number("damping", damping, minimum=0)
    _check.number("first_damping", first_damping, minimum=0)
    _check.number("max_growth", max_growth, minimum=0, exclusive=True)
    _check.number("noise_damping", noise_damping, minimum=0)
    if horizon is not None:
        _check.number("horizon", horizon, minimum=1, integer=True)
    if not callable(multiplier):
        _check.number("multiplier", multiplier, minimum=0)
    _check.floating_dtype("state_dtype", state_dtype)
    inner = _preconditioners(preconditioner)
    # At least the last step, to take it back, and NLCG's direction if need be.
    may_coast = horizon is not None
    kinds, slots = len(inner), max(history, 2 if may_coast else 1)

    def init_fn(params: optax.Params) -> Any:
        dtype = _tree.scalar_dtype(params)

        def memory(x: jax.Array) -> jax.Array:
            # Like x, and not merely of its shape: sharded in a `shard_map` if x is.
            return jnp.zeros_like(x, shape=(slots, *jnp.shape(x)))

        def number(value: float = 0.0) -> jax.Array:
            return jnp.asarray(value, dtype)

        def counter() -> jax.Array:
            return jnp.zeros([], jnp.int32)

        size = kinds + slots
        return QuadraticModelState(
            count=counter(),
            stored=counter(),
            preconditioner_states=tuple(one.init(params) for one in inner),
            prev_updates=jax.tree.map(memory, _tree.zeros_like(params, state_dtype)),
            prev_norms=jnp.zeros([slots], dtype),
            coefficients=jnp.zeros([size + residuals], dtype),
            damping=_tree.real_scalar(damping, dtype),
            extra_damping=_tree.real_scalar(first_damping, dtype),
            prev_value=number(),
            prev_slope=number(),
            prev_curvature=number(),
            predicted_decrease=number(),
            actual_decrease=number(),
            model_error=number(),
            conjugacy=number(),
            signal=number(1.0),
            log_length=number(),
            rate=number(),
            rate_since=counter(),
            prev_g_z=number(),
            bounded=counter(),
            rejected=counter(),
            nonfinite=counter(),
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

        def reduce(integrands: Any, *trees: Any) -> jax.Array:
            sums = _tree.reduce_products(
                integrands, *trees, dtype=dtype, axis_name=axis_name
            )
            return jnp.stack(sums)

        def slopes_along(g: jax.Array, *leaves: jax.Array) -> list[jax.Array]:
            return [_tree.real_inner(g, d.astype(g.dtype)) for d in leaves]

        def squares(*leaves: jax.Array) -> list[jax.Array]:
            return [_tree.abs_sq(d) for d in leaves]

        def precondition(one: Any, one_state: Any, grad: Any) -> tuple[Any, Any]:
            extra = {"value": value, "curvature": curvature, **extra_args}
            return one.update(grad, one_state, params, **extra)

        # The directions: one for each preconditioner, and the past, the newest first.
        pairs = zip(inner, state.preconditioner_states, strict=True)
        results = [precondition(one, one_state, grad) for one, one_state in pairs]
        preconditioned = [z for z, _ in results]
        preconditioner_states = tuple(one_state for _, one_state in results)
        coasted = state.rate > 0
        order = jnp.arange(slots, dtype=jnp.int32)
        by_age = (state.stored - 1 - order) % slots
        places = jnp.where(coasted, order, by_age)
        past = [
            jax.tree.map(lambda x, i=i: jnp.asarray(x)[i], state.prev_updates)
            for i in places
        ]
        directions = [*preconditioned, *past[:history]]
        slopes = reduce(slopes_along, grad, *preconditioned, *past)

        # What became of the last step.
        verdict = trust.judge(
            loss,
            jnp.all(jnp.isfinite(slopes)),
            state.prev_value,
            state.predicted_decrease,
            state.extra_damping,
            state.model_error,
            _tree.real_scalar(damping, dtype),
        )
        rejected = verdict.rejected
        measured = ~coasted & (state.prev_slope > 0)
        share = noise.share_of_signal(
            slopes[kinds],
            jnp.where(measured, state.prev_slope, 1),
            state.prev_curvature,
        )
        share = noise.average(state.signal, share, state.stored)
        signal = jnp.where(measured, share, state.signal)
        total_damping = (
            _tree.real_scalar(damping, dtype)
            + _tree.real_scalar(noise_damping, dtype) * noise.ratio(signal)
            + verdict.extra_damping
        )

        known, unused = len(directions), slots - history

        def solve() -> _Plan:
            images = curvature.push(params, stack(params, directions))
            products = _products(curvature, params, images, images, loss).astype(dtype)
            # What is remembered but no direction has zeros.
            products = jnp.pad(0.5 * (products + products.T), (0, unused))
            coefficients = subspace.minimize(slopes, products, total_damping)
            plan = _Plan(slopes, products, coefficients, [])
            for _ in range(residuals):
                # The gradient of the model at its minimum, preconditioned.
                used = [plan.coefficients[:known], plan.coefficients[known + unused :]]
                step = combine(images, jnp.concatenate(used))
                residual = jax.tree.map(_difference, grad, curvature.pull(params, step))
                z, _ = precondition(inner[0], preconditioner_states[0], residual)
                image = curvature.push(params, stack(params, [z]))
                images = join(images, image)
                (row,) = _products(curvature, params, image, images, loss).astype(dtype)
                parts = [row[:known], jnp.zeros([unused], dtype), row[known:]]
                row = jnp.concatenate(parts)
                products = jnp.pad(plan.products, (0, 1)).at[-1].set(row)
                products = products.at[:, -1].set(row)
                all_slopes = [plan.slopes, reduce(slopes_along, grad, z)]
                all_slopes = jnp.concatenate(all_slopes)
                plan = _Plan(
                    all_slopes,
                    products,
                    subspace.minimize(all_slopes, products, total_damping),
                    [*plan.residual_directions, z],
                )
            return plan

        def no_products() -> _Plan:
            size = kinds + slots + residuals
            zeros = jax.tree.map(jnp.zeros_like, preconditioned[0])
            return _Plan(
                jnp.pad(slopes, (0, residuals)),
                jnp.zeros([size, size], dtype),
                jnp.zeros([size], dtype),
                [zeros] * residuals,
            )

        if not jax.tree.leaves(params):  # an empty group of `optax.partition`
            plan = no_products()
        else:
            plan = jax.lax.cond(coasted, no_products, solve) if may_coast else solve()

        # The best length along the preconditioned gradient alone.
        steep = plan.products[0, 0] > 0
        steep &= plan.slopes[0] > 0  # elsewhere there is none
        length = plan.slopes[0] / jnp.where(steep, plan.products[0, 0], 1)
        length = jnp.log(jnp.where(steep, length, 1))
        length = noise.mean(state.log_length, length, state.stored)
        log_length = jnp.where(coasted | ~steep, state.log_length, length)
        course = noise.set_course(
            jnp.where(rejected, 1, signal),
            state.rate,
            state.rate_since,
            log_length,
            state.stored,
            slopes[0],
            state.prev_g_z,
            state.count,
            0 if horizon is None else horizon,
        )
        coasts = course.active
        coasting = jnp.zeros_like(plan.coefficients).at[0].set(course.gradient)
        if may_coast:
            coasting = coasting.at[kinds + 1].set(course.direction)
        products = jnp.where(coasts, 0, plan.products)

        factor = multiplier(state.count) if callable(multiplier) else multiplier
        coefficients = jnp.where(coasts, coasting, plan.coefficients)
        coefficients = _tree.real_scalar(factor, dtype) * coefficients

        def total(g: jax.Array, *leaves: jax.Array) -> jax.Array:
            lifted = [_tree.lift(d).astype(_tree.lift(g).dtype) for d in leaves]
            parts = [
                _tree.scalar_like(coefficients[i], d) * d for i, d in enumerate(lifted)
            ]
            return sum(parts[1:], start=parts[0])

        step = jax.tree.map(
            total, grad, *preconditioned, *past, *plan.residual_directions
        )
        (norm,) = jnp.sqrt(reduce(squares, step))
        longest = jnp.max(state.prev_norms)
        longest = longest * _tree.real_scalar(max_growth, dtype)
        too_long = (longest > 0) & (norm > longest)
        ratio = jnp.where(too_long, longest / jnp.where(too_long, norm, 1), 1)
        slope = jnp.sum(plan.slopes * coefficients)
        curved = subspace.inner(coefficients, products, coefficients)
        if curvature.nonnegative:
            part = subspace.part_that_falls(slope, curved, _MOST * loss)
            believed = coasts | (loss <= 0)
            ratio = jnp.where(believed, ratio, jnp.minimum(ratio, part))
        bounded = ratio < 1
        coefficients = ratio * coefficients
        slope, curved = ratio * slope, ratio**2 * curved
        finite = jnp.isfinite(loss) & jnp.isfinite(slope) & jnp.isfinite(curved)
        accepted = finite & jnp.isfinite(norm) & ~rejected
        moved = accepted | rejected
        # A step of length zero, as at the start of a warm-up, is none to remember.
        stored = accepted & (coasts | (norm > 0))

        def choose(step: jax.Array, back: jax.Array, g: jax.Array) -> jax.Array:
            step = _tree.scalar_like(ratio, step) * step
            back = (_CUT - 1) * _tree.lift(back).astype(step.dtype)
            chosen = jnp.where(accepted, step, jnp.where(rejected, back, 0))
            return chosen.astype(g.dtype)

        output = jax.tree.map(choose, step, past[0], grad)
        # Among the last steps, and among the arrays that hold them.
        next_place = jnp.where(accepted, state.stored % slots, by_age[0])
        place = jnp.where(coasts, 0, next_place)

        def replace(memory: Any, place: jax.Array, new: jax.Array) -> jax.Array:
            memory = jnp.asarray(memory)  # a restored state may be NumPy's
            kept = memory[place]
            shortened = (_CUT * _tree.lift(kept)).astype(kept.dtype)
            kept = jnp.where(rejected, shortened, kept)
            new = jnp.where(stored, new.astype(kept.dtype), kept)
            return memory.at[place].set(new)

        def remember(memory: Any, u: jax.Array, z: jax.Array, *past: jax.Array) -> Any:
            memory = replace(memory, place, u)
            if not may_coast:
                return memory
            lifted = _tree.lift(z)
            d = _tree.lift(past[1]).astype(lifted.dtype)
            direction = lifted + _tree.scalar_like(course.beta, d) * d
            kept = memory[1]
            coasting = coasts & accepted
            return memory.at[1].set(
                jnp.where(coasting, direction.astype(kept.dtype), kept)
            )

        def latest(new: Any, old: jax.Array, of_rejected: Any = None) -> jax.Array:
            """What a field of the state becomes."""
            of_rejected = old if of_rejected is None else of_rejected
            return jnp.where(accepted, new, jnp.where(rejected, of_rejected, old))

        cut_slope = _CUT * state.prev_slope
        cut_curvature = _CUT**2 * state.prev_curvature
        conjugacy = jnp.zeros([], dtype)
        if history:
            conjugacy = _cosine(coefficients, products, kinds)
        return output, QuadraticModelState(
            count=jnp.where(moved, optax.safe_increment(state.count), state.count),
            stored=state.stored + stored.astype(jnp.int32),
            preconditioner_states=_tree.where(
                accepted, preconditioner_states, state.preconditioner_states
            ),
            prev_updates=jax.tree.map(
                remember, state.prev_updates, output, preconditioned[0], *past
            ),
            prev_norms=replace(state.prev_norms, next_place, ratio * norm),
            coefficients=latest(coefficients, state.coefficients),
            damping=latest(total_damping, state.damping),
            extra_damping=jnp.where(moved, verdict.extra_damping, state.extra_damping),
            prev_value=latest(loss, state.prev_value),
            prev_slope=latest(slope, state.prev_slope, cut_slope),
            prev_curvature=latest(curved, state.prev_curvature, cut_curvature),
            predicted_decrease=latest(
                slope - 0.5 * curved,
                state.predicted_decrease,
                cut_slope - 0.5 * cut_curvature,
            ),
            actual_decrease=jnp.where(
                moved & verdict.pending, verdict.actual, state.actual_decrease
            ),
            model_error=jnp.where(moved, verdict.model_error, state.model_error),
            conjugacy=latest(conjugacy, state.conjugacy),
            signal=latest(signal, state.signal),
            log_length=latest(log_length, state.log_length),
            rate=latest(course.rate, state.rate),
            rate_since=latest(course.since, state.rate_since),
            prev_g_z=latest(slopes[0], state.prev_g_z),
            bounded=state.bounded + (accepted & bounded).astype(jnp.int32),
            rejected=state.rejected + rejected.astype(jnp.int32),
            nonfinite=state.nonfinite + (~moved).astype(jnp.int32),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _difference(grad: jax.Array, product: jax.Array) -> jax.Array:
    lifted = _tree.lift(grad)
    return (lifted - _tree.lift(product).astype(lifted.dtype)).astype(grad.dtype)


def _cosine(coefficients: jax.Array, matrix: jax.Array, newest: int) -> jax.Array:
    """Cosine between the new step and the last one in the metric of the curvature."""
    other = jnp.zeros_like(coefficients).at[newest].set(1)
    product = subspace.inner(coefficients, matrix, other)
    squares = (
        subspace.inner(coefficients, matrix, coefficients) * (matrix[newest, newest])
    )
    defined = squares > 0
    return jnp.where(defined, product / jnp.sqrt(jnp.where(defined, squares, 1)), 0)


def _preconditioners(
    preconditioner: Any,
) -> tuple[optax.GradientTransformationExtraArgs, ...]:
    """The preconditioners as a tuple; None stands for the plain gradient."""
    # A transformation is a (named) tuple itself.
    if preconditioner is None or isinstance(
        preconditioner, optax.GradientTransformation
    ):
        preconditioner = (preconditioner,)
    given: list[Any] = [
        optax.identity() if each is None else each for each in preconditioner
    ]
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
    curvature: Curvature, params: Any, a: Images, b: Images, loss: jax.Array
) -> jax.Array:
    """The inner products, the same on all devices where the loss is."""
    matrix = curvature.inner(params, a, b)
    local = _tree.varying_axes(matrix) - _tree.varying_axes(loss)
    if local:
        axes = ", ".join(sorted(map(repr, local)))
        raise ValueError(
            f"The curvature is each device's own along the axis {axes}: name it, "
            "`nlcg_optax.gauss_newton(..., axis_name=...)`, to take the mean."
        )
    return matrix

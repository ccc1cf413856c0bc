"""The step that the curvature chooses: its length, and the share of the last steps."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import optax

from nlcg_optax import _check, _transformations, _tree, _xla
from nlcg_optax.curvature import memory, noise, subspace, trust
from nlcg_optax.curvature.compilations import Compilations
from nlcg_optax.curvature.products import Constant, Curvature, Penalty
from nlcg_optax.curvature.state import LastStep, QuadraticModelState, initial

Preconditioners = (
    optax.GradientTransformation | Sequence[optax.GradientTransformation | None] | None
)


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
    weight_decay: float | None = None,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
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
    :func:`~nlcg_optax.nlcg_auto` does. Nothing else should change the updates
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
      weight_decay: λ of a term :math:`\tfrac{\lambda}{2} \lVert x \rVert^2` of the
        model, whose gradient and curvature are known without a pass through it. The
        loss by which steps are judged has it too. None or 0 for none. (An optimizer
        with a learning rate multiplies a decay by that rate. Here there is none: this
        is the penalty itself, and λ counts against the loss.)
      weight_decay_mask: the leaves that decay: a tree of booleans, a prefix of the
        parameters' tree, or a function from parameters to it; None for all.
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
    settings = _Settings(
        _preconditioners(preconditioner),
        history,
        residuals,
        damping,
        noise_damping,
        max_growth,
        horizon,
        multiplier,
        _decay(weight_decay, weight_decay_mask),
        axis_name,
    )
    compilations = Compilations()

    def init_fn(params: optax.Params) -> QuadraticModelState:
        return initial(
            params,
            tuple(one.init(params) for one in settings.preconditioners),
            slots=settings.slots,
            directions=settings.kinds + settings.slots + residuals,
            damping=damping,
            first_damping=first_damping,
            state_dtype=state_dtype,
        )

    def update_fn(
        updates: optax.Updates,
        state: QuadraticModelState,
        params: optax.Params | None = None,
        *,
        value: jax.typing.ArrayLike | None = None,
        curvature: Curvature | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, QuadraticModelState]:
        _tree.check_params(updates, params, "the quadratic model")
        loss = _check.loss(value, _MISSING).astype(state.trust.damping.dtype)
        given = _Given(updates, params, loss, _check_curvature(curvature), extra_args)
        compilations.watch(given.curvature, updates)
        given = _with_decay(given, settings)

        found = _precondition(given, settings, state)
        verdict = trust.judge(
            given.loss,
            jnp.all(jnp.isfinite(found.slopes)),
            state.last,
            state.trust,
            _tree.real_scalar(damping, loss.dtype),
            state.counts.count,
        )
        signal = noise.measure(
            state.noise,
            state.last,
            found.slopes[settings.kinds],
            state.memory.stored,
        )
        total_damping = _total_damping(settings, verdict.trust.extra_damping, signal)
        model = _minimize(given, settings, state, found, total_damping)
        log_length = noise.best_length(
            state.noise, model.slopes[0], model.products[0, 0], state.memory.stored
        )
        stage = noise.hand_over(
            state.noise,
            jnp.where(verdict.rejected, 1, signal),
            log_length,
            state.memory.stored,
            state.counts.count,
            horizon,
        )
        step = _make_step(given, settings, state, found, model, stage)
        step = _shorten(given, settings, state, step, stage)
        taken = step.finite & ~verdict.rejected
        output = _choose(given, step, found.past[0], taken, verdict.rejected)

        after = _after_step(given, settings, state, found, model, step, verdict)
        after = after._replace(
            trust=after.trust._replace(damping=total_damping),
            noise=state.noise._replace(
                signal=signal,
                log_length=log_length,
                rate=stage.rate,
                rate_since=stage.since,
                prev_g_z=found.slopes[0],
            ),
        )
        new_state = _select(state, after, verdict, taken)
        new_memory = memory.write(
            state.memory,
            _tree.cast_like(step.tree, updates),
            step.norm,
            taken=taken,
            rejected=verdict.rejected,
            handed_over=stage.active,
            direction=step.direction,
        )
        return output, new_state._replace(memory=new_memory)

    return _transformations.make(init_fn, update_fn)


class _Settings(NamedTuple):
    """Arguments of `scale_by_quadratic_model`, which explains them."""

    preconditioners: tuple[optax.GradientTransformationExtraArgs, ...]
    history: int
    residuals: int
    damping: jax.typing.ArrayLike
    noise_damping: jax.typing.ArrayLike
    max_growth: jax.typing.ArrayLike
    horizon: Any
    multiplier: optax.ScalarOrSchedule
    decay: Penalty | None
    axis_name: _tree.AxisName | None

    @property
    def kinds(self) -> int:
        """How many preconditioned gradients there are."""
        return len(self.preconditioners)

    @property
    def slots(self) -> int:
        """How many steps are remembered.

        At least the last one, to take it back, and NLCG's direction if need be.
        """
        return max(self.history, 1 if self.horizon is None else 2)


class _Given(NamedTuple):
    """What `update` is given.

    Attributes:
      grad: the gradient.
      params: the parameters.
      loss: the value, in the dtype of scalars.
      curvature: of the loss.
      extra: what else there is, for the preconditioners.
    """

    grad: Any
    params: Any
    loss: jax.Array
    curvature: Curvature
    extra: dict[str, Any]


class _Directions(NamedTuple):
    """The directions that are known before anything is computed of the curvature.

    Attributes:
      preconditioned: the preconditioned gradients.
      preconditioner_states: what becomes of the preconditioners' states.
      precondition: the first preconditioner, for other gradients.
      past: the last steps, the newest first.
      stacked: all of them.
      order: where each of those stacked is in that order (and the other way round).
      slopes: of the gradient along all of them, in that order.
    """

    preconditioned: list[Any]
    preconditioner_states: tuple[Any, ...]
    precondition: Callable[[Any], Any]
    past: list[Any]
    stacked: Any
    order: jax.Array
    slopes: jax.Array


class _Step(NamedTuple):
    """A step, with its sign turned, and what the model says of it.

    Attributes:
      tree: the step itself.
      norm: its length.
      coefficients: of the directions.
      slope: by how far the loss falls by its slope along the step.
      curved: the curvature along it.
      direction: NLCG's, to be kept; None where it never makes the step.
      bounded: whether the step was shortened.
      finite: whether all of these are finite.
    """

    tree: Any
    norm: jax.Array
    coefficients: jax.Array
    slope: jax.Array
    curved: jax.Array
    direction: Any
    bounded: Any = False
    finite: Any = True


def _with_decay(given: _Given, settings: _Settings) -> _Given:
    """Loss, gradient and curvature with those of weight decay."""
    penalty = settings.decay
    if penalty is None:
        return given
    curvature = given.curvature.with_penalty(penalty)

    decayed = curvature.penalized(penalty, given.params, given.params)
    total = _sum_of_squares(decayed, given.loss.dtype, settings.axis_name)
    factor = _tree.real_scalar(penalty.factor, given.loss.dtype)
    decay = dataclasses.replace(curvature, penalties=(penalty,))
    return given._replace(
        grad=decay.add_decay(given.grad, given.params),
        loss=given.loss + 0.5 * factor * total,
        curvature=curvature,
    )


def _precondition(
    given: _Given, settings: _Settings, state: QuadraticModelState
) -> _Directions:
    """The directions: one for each preconditioner, and the past, the newest first."""
    extra = {"value": given.loss, "curvature": given.curvature, **given.extra}
    with jax.named_scope("nlcg_preconditioner"):
        results = [
            one.update(given.grad, one_state, given.params, **extra)
            for one, one_state in zip(
                settings.preconditioners, state.preconditioner_states, strict=True
            )
        ]
    preconditioned = [z for z, _ in results]
    states = tuple(one_state for _, one_state in results)

    def precondition(grad: Any) -> Any:
        first = settings.preconditioners[0]
        with jax.named_scope("nlcg_preconditioner"):
            return first.update(grad, states[0], given.params, **extra)[0]

    past = memory.read(state.memory, state.noise.handed_over)
    kept, places = memory.stacked(
        state.memory,
        state.noise.handed_over,
        in_slots=settings.history == settings.slots,
    )
    stacked = jax.tree.map(_stack, kept, *preconditioned)
    order = jnp.concatenate(
        [jnp.arange(settings.kinds, dtype=jnp.int32), settings.kinds + places]
    )
    slopes = subspace.slopes_along(
        given.grad, stacked, given.loss.dtype, settings.axis_name
    )
    return _Directions(
        preconditioned, states, precondition, past, stacked, order, slopes[order]
    )


def _stack(past: jax.Array, *new: jax.Array) -> jax.Array:
    """Arrays, and a stack of them behind; all lifted, unless they are of one dtype."""
    parts = [*(x[None] for x in new), past]
    if len({x.dtype for x in parts}) > 1:
        parts = [_tree.lift(x) for x in parts]
        parts = [x.astype(parts[0].dtype) for x in parts]
    return jnp.concatenate(parts)


def _total_damping(
    settings: _Settings, extra_damping: jax.Array, signal: jax.Array
) -> jax.Array:
    """λ: little without noise, more with it, and after what went wrong."""
    base, factor = (
        _tree.real_scalar(x, signal.dtype)
        for x in (settings.damping, settings.noise_damping)
    )
    return base + factor * noise.ratio(signal) + extra_damping


def _minimize(
    given: _Given,
    settings: _Settings,
    state: QuadraticModelState,
    found: _Directions,
    damping: jax.Array,
) -> subspace.Model:
    """The model over the directions, but for none once noise rules."""

    def with_products() -> subspace.Model:
        return jax.named_scope("nlcg_products")(subspace.build)(
            given.curvature,
            given.params,
            given.grad,
            given.loss,
            jax.tree.map(lambda d: d[:known], found.stacked),
            found.order[:known],
            found.slopes,
            damping,
            settings.residuals,
            found.precondition,
            settings.axis_name,
        )

    def without() -> subspace.Model:
        return subspace.without_products(
            found.preconditioned[0], given.loss, found.slopes, settings.residuals
        )

    known = settings.kinds + settings.history
    if not jax.tree.leaves(given.params):  # an empty group of `optax.partition`
        return without()
    if settings.horizon is None:
        return with_products()
    handed_over = state.noise.handed_over
    if jax.default_backend() != "cpu":
        return jax.lax.cond(handed_over, without, with_products)
    traced, shapes = jax.make_jaxpr(with_products, return_shape=True)()

    def run() -> subspace.Model:
        results = jax.extend.core.jaxpr_as_fun(traced)()
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    # In a branch XLA's CPU compiler leaves aside its library for convolutions. They
    # then take 17 times as long: more than products for nothing once noise rules.
    if not _convolves(traced.jaxpr):
        return jax.lax.cond(handed_over, without, run)
    model, none = run(), without()
    # The residual directions have no coefficients then.
    none = none._replace(residual_directions=model.residual_directions)
    return _tree.where(handed_over, none, model)


def _convolves(jaxpr: Any) -> bool:
    """Whether there is a convolution in a function, or in one that it calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            return True
        values = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        )
        inner = [getattr(value, "jaxpr", value) for value in values]
        if any(_convolves(each) for each in inner if hasattr(each, "eqns")):
            return True
    return False


def _make_step(
    given: _Given,
    settings: _Settings,
    state: QuadraticModelState,
    found: _Directions,
    model: subspace.Model,
    stage: noise.Stage,
) -> _Step:
    """The step to the minimum of the model; once noise rules, NLCG's own."""
    dtype, kinds = given.loss.dtype, settings.kinds
    multiplier = settings.multiplier
    factor = multiplier(state.counts.count) if callable(multiplier) else multiplier
    factor = _tree.real_scalar(factor, dtype)
    coefficients, products = factor * model.coefficients, model.products

    known = len(found.order)
    weights = _xla.compute_once(
        jnp.concatenate([coefficients[:known][found.order], coefficients[known:]])
    )

    def total(g: jax.Array, stacked: jax.Array, *others: jax.Array) -> jax.Array:
        dtype = _tree.lift(g).dtype
        lifted = [_tree.lift(d).astype(dtype) for d in (stacked, *others)]
        total = _tree.combine(weights[:known], lifted[0])
        for i, d in enumerate(lifted[1:], known):
            total += _tree.scalar_like(weights[i], d) * d
        return total

    directions = [found.stacked, *model.residual_directions]
    tree, direction = jax.tree.map(total, given.grad, *directions), None
    if settings.horizon is not None:
        nlcg = noise.direction(
            state.noise,
            stage.starts,
            given.grad,
            found.preconditioned[0],
            found.past[1],
            settings.axis_name,
        )
        direction, size = nlcg.direction, factor * stage.size
        tree = jax.tree.map(
            lambda u, x: jnp.where(
                stage.active, _tree.scalar_like(size, x) * u.astype(x.dtype), x
            ),
            nlcg.look_ahead,
            tree,
        )
        # z + β d, by z and the direction before.
        own = jnp.zeros_like(coefficients).at[0].set(size * (1 + nlcg.beta))
        own = own.at[kinds + 1].set(size * nlcg.beta**2)
        coefficients = jnp.where(stage.active, own, coefficients)
        products = jnp.where(stage.active, 0, products)
    return _Step(
        tree,
        jnp.sqrt(_sum_of_squares(tree, dtype, settings.axis_name)),
        coefficients,
        slope=jnp.sum(model.slopes * coefficients),
        curved=subspace.inner(coefficients, products, coefficients),
        direction=direction,
    )


def _sum_of_squares(
    tree: Any, dtype: jnp.dtype, axis_name: _tree.AxisName | None
) -> jax.Array:
    def square(x: jax.Array) -> list[jax.Array]:
        return [_tree.abs_sq(x)]

    (total,) = _tree.reduce_products(square, tree, dtype=dtype, axis_name=axis_name)
    return total


def _shorten(
    given: _Given,
    settings: _Settings,
    state: QuadraticModelState,
    step: _Step,
    stage: noise.Stage,
) -> _Step:
    """The step, not much longer than the last ones, nor than the loss allows."""
    growth = _tree.real_scalar(settings.max_growth, given.loss.dtype)
    ratio = _xla.compute_once(
        trust.shorten(
            step.norm,
            jnp.max(state.memory.prev_norms) * growth,
            step.slope,
            step.curved,
            given.loss,
            ~stage.active if given.curvature.nonnegative else None,
        )
    )
    slope, curved = ratio * step.slope, ratio**2 * step.curved
    sizes = jnp.stack([given.loss, slope, curved, step.norm])
    return step._replace(
        tree=jax.tree.map(lambda x: _tree.scalar_like(ratio, x) * x, step.tree),
        norm=ratio * step.norm,
        coefficients=ratio * step.coefficients,
        slope=slope,
        curved=curved,
        bounded=ratio < 1,
        finite=jnp.all(jnp.isfinite(sizes)),
    )


def _choose(
    given: _Given, step: _Step, last: Any, taken: jax.Array, rejected: jax.Array
) -> Any:
    """The step, or most of the last one back, or nothing."""
    dtype = step.norm.dtype
    forth = _xla.compute_once(taken.astype(dtype))
    back = jnp.where(rejected, trust.BACKTRACK - 1, 0).astype(dtype)
    back = _xla.compute_once(back)

    def choose(step: jax.Array, last: jax.Array, g: jax.Array) -> jax.Array:
        last = _tree.lift(last).astype(step.dtype)
        chosen = _tree.scalar_like(forth, step) * _xla.finite(step)
        return (chosen + _tree.scalar_like(back, step) * last).astype(g.dtype)

    return jax.tree.map(choose, step.tree, last, given.grad)


def _after_step(
    given: _Given,
    settings: _Settings,
    state: QuadraticModelState,
    found: _Directions,
    model: subspace.Model,
    step: _Step,
    verdict: trust.Verdict,
) -> QuadraticModelState:
    """The state if the step is taken, but for memory, noise, and λ."""
    conjugacy = jnp.zeros([], given.loss.dtype)
    if settings.history:
        # NLCG's own steps have none.
        products = jnp.where(step.curved == 0, 0, model.products)
        conjugacy = subspace.cosine(step.coefficients, products, settings.kinds)
    flat = (model.slopes[0] > 0) & (model.products[0, 0] == 0)
    # After the hand-over there is no model to fit anything.
    by_model = ~state.noise.handed_over
    mismatch = trust.mismatch(
        given.loss,
        model.own_loss,
        given.curvature.fraction,
        flat,
        verdict.trust,
        state.counts.count,
    )
    counts = state.counts
    return state._replace(
        preconditioner_states=found.preconditioner_states,
        last=LastStep(
            prev_value=given.loss,
            prev_slope=step.slope,
            prev_curvature=step.curved,
            coefficients=step.coefficients,
            conjugacy=conjugacy,
        ),
        trust=verdict.trust,
        counts=counts._replace(
            count=optax.safe_increment(counts.count),
            bounded=counts.bounded + step.bounded.astype(jnp.int32),
            loss_mismatch=counts.loss_mismatch
            + (mismatch & by_model).astype(jnp.int32),
        ),
    )


def _select(
    state: QuadraticModelState,
    after: QuadraticModelState,
    verdict: trust.Verdict,
    taken: jax.Array,
) -> QuadraticModelState:
    """The state after a step that was taken, or one that took the last one back.

    Where neither happened nothing changes but a count. Memory is seen to elsewhere.
    """
    counts, last = state.counts, state.last
    back = state._replace(
        last=last._replace(
            prev_slope=trust.BACKTRACK * last.prev_slope,
            prev_curvature=trust.BACKTRACK**2 * last.prev_curvature,
        ),
        trust=verdict.trust,
        counts=counts._replace(
            count=optax.safe_increment(counts.count),
            rejected=optax.safe_increment(counts.rejected),
        ),
    )
    left = state._replace(
        counts=counts._replace(nonfinite=optax.safe_increment(counts.nonfinite))
    )
    states = [each._replace(memory=None) for each in (after, back, left)]
    return _tree.where(
        taken, states[0], _tree.where(verdict.rejected, states[1], states[2])
    )


def _decay(weight_decay: Any, mask: Any) -> Penalty | None:
    """Weight decay as a term of the model; None for none."""
    if weight_decay is None:
        if mask is not None:
            raise ValueError(
                "weight_decay_mask without weight_decay does nothing: give both, "
                "`nlcg_auto(weight_decay=1e-4, weight_decay_mask=...)`."
            )
        return None
    if callable(weight_decay):
        raise ValueError(
            f"weight_decay={weight_decay!r} is not valid: expected a number, for it is "
            "a term of the loss."
        )
    _check.number("weight_decay", weight_decay, minimum=0)
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return None
    return Penalty(weight_decay, Constant(mask))


def _preconditioners(
    given: Preconditioners,
) -> tuple[optax.GradientTransformationExtraArgs, ...]:
    """The preconditioners as a tuple; None stands for the plain gradient."""
    found = tuple(map(_transformations.preconditioner, _transformations.several(given)))
    if not found:
        raise ValueError(
            f"preconditioner={given!r} is not valid: expected an "
            "optax.GradientTransformation, a sequence of them, or None."
        )
    return found


_CALL = (
    "`update(grads, state, params, value=loss, curvature=nlcg_optax.gauss_newton("
    "lambda params: model(params, x), lambda outputs: loss(outputs, y).mean()))`"
)
_MISSING = (
    f"a step is judged by the loss that follows it. Call {_CALL} with the loss "
    "averaged over the global batch."
)


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

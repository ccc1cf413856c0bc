"""The step that the curvature chooses: its length, and the share of the last steps."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from nlcg_optax import _check, _transformations, _tree, _xla
from nlcg_optax.curvature import memory, noise, subspace, trust
from nlcg_optax.curvature.compilations import Compilations
from nlcg_optax.curvature.products import Constant, Curvature, Penalty
from nlcg_optax.curvature.state import LastStep, Noise, QuadraticModelState, initial
from nlcg_optax.directions.conjugate import scale_by_conjugate_direction
from nlcg_optax.step_sizes import noise_balance

# Of NLCG's own direction where noise rules.
_BETA = 0.9
# How its rate is steered, see `scale_by_noise_balance`.
_TARGET, _DELAY = 1.0, 5.0
# Of a direction whose square is zero or infinite, as a power of two.
_BEYOND = 96
# The first rate, in best lengths; and where the next batch contradicts those.
_FIRST, _DOUBTED = 0.3, 0.03
# After steps that rounding hides one may be so many times as long as a first one along
# a straight line.
_ELSEWHERE = 10.0

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
    horizon: float | None = None,
    noise_direction: optax.GradientTransformation | None = None,
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
    signal. λ grows with the ratio of noise to signal. With a ``horizon`` another
    direction takes over for good once less than 0.4 of the slope is signal, by the
    curvature of the batch after the step: for a step that is best for one batch is too
    short for the average over many (Wu et al., 2018, arXiv:1803.02021). Eight steps are
    measured first, unless the next batch says that the loss rose along a step by more
    than it was to fall. Nor is the curvature taken on more than a fifth of the examples
    of the whole run. From then on there are no products. The rate starts with the
    0.3 of the (geometric) mean of the best lengths along z (with 0.03 where the next
    batch contradicts them) and is steered by
    :func:`scale_by_noise_balance`, with the loss of the curvature's part of the batch.

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
        may come to rule; ``math.inf`` where their number is not known (then evaluate
        :func:`eval_params`). None where each loss is that of the same data: the early
        steps of a hard problem without noise can look like noise.
      noise_direction: what makes the direction once noise rules: a transformation that
        averages gradients or steps, as long as its input is when all of it is signal.
        Its `update` is given ``mean_weight``, the part that an averaged gradient should
        have beside the newest one: :math:`1 - e^{-5.5 o}`; :math:`-o` is the slope
        along the last steps by the gradients after them over that by their own.
        None for NLCG's own over the first preconditioner, with β = 0.9 and a look
        ahead, times 0.1. A preconditioner that is linear in the gradient suits it,
        where orthogonalization keeps all of the noise.
      multiplier: of the step, a number of at most 1, or a schedule of the count: 1, or
        a final decay.
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
    _check.axis_name(axis_name)
    _check.number("damping", damping, minimum=0, finite=True)
    _check.number("first_damping", first_damping, minimum=0, finite=True)
    _check.number("max_growth", max_growth, minimum=0, exclusive=True)
    _check.number("noise_damping", noise_damping, minimum=0, finite=True)
    if horizon is not None and not _endless(horizon):
        _check.number("horizon", horizon, minimum=1, integer=True)
    if not _check.is_schedule(multiplier):
        _check.number("multiplier", multiplier, minimum=0)
        number: Any = multiplier
        # By NumPy, for within a traced function jax would trace the comparison; of the
        # real part, for an injected number has the parameters' dtype.
        if not isinstance(number, Tracer) and np.real(np.asarray(number)) > 1:
            raise ValueError(
                f"multiplier={multiplier} is not valid: expected at most 1, for "
                "1 is the minimum of the model, and from 2 on it predicts no fall."
            )
    _check.floating_dtype("state_dtype", state_dtype)
    preconditioners = _preconditioners(preconditioner)
    if noise_direction is None:
        noise_direction = _own_direction(preconditioners[0], state_dtype, axis_name)
    settings = _Settings(
        preconditioners,
        history,
        residuals,
        damping,
        noise_damping,
        max_growth,
        horizon,
        _transformations.preconditioner(noise_direction, "noise_direction"),
        multiplier,
        _decay(weight_decay, weight_decay_mask),
        axis_name,
    )
    compilations = Compilations()

    def init_fn(params: optax.Params) -> QuadraticModelState:
        rules = horizon is not None
        return initial(
            params,
            tuple(one.init(params) for one in settings.preconditioners),
            settings.noise_direction.init(params) if rules else None,
            noise_balance.begin(params, 0.0) if rules else None,
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
        curvature = _check_curvature(curvature)
        given = _Given(updates, updates, params, loss, curvature, extra_args)
        compilations.watch(given.curvature, updates)
        given = _with_decay(given, settings)
        if settings.horizon is None or not jax.tree.leaves(params):
            return _by_curvature(given, settings, state)
        seen = None
        if jax.default_backend() == "cpu" and jax.device_count() > 1:
            # In a branch convolutions may be slow there, see `_xla.canonical`.
            seen = _at_average(given, state)
        return jax.lax.cond(
            state.noise.handed_over,
            lambda: _by_noise(
                given, settings, state, seen or _at_average(given, state)
            ),
            lambda: _by_curvature(given, settings, state),
        )

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
    noise_direction: optax.GradientTransformationExtraArgs
    multiplier: optax.ScalarOrSchedule
    decay: Penalty | None
    axis_name: _tree.AxisName | None

    @property
    def kinds(self) -> int:
        """How many preconditioned gradients there are."""
        return len(self.preconditioners)

    @property
    def slots(self) -> int:
        """How many steps are remembered: at least the last one, to take it back."""
        return max(self.history, 1)

    def factor(self, count: jax.typing.ArrayLike, dtype: Any) -> jax.Array:
        """What steps are multiplied by."""
        factor: Any = self.multiplier
        if _check.is_schedule(factor):
            factor = factor(count)
        return _tree.real_scalar(factor, dtype)


class _Given(NamedTuple):
    """What `update` is given.

    Attributes:
      grad: the gradient.
      raw_grad: that of the loss without weight decay.
      params: the parameters.
      loss: the value, in the dtype of scalars.
      curvature: of the loss.
      extra: what else there is, for the preconditioners.
    """

    grad: Any
    raw_grad: Any
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
      last: the last of the steps, whole.
      stacked: all directions, and steps that are remembered but are none.
      order: where each of those stacked is in the order of the model, the newest step
        first (and the other way round).
      slopes: of the gradient along all of them, in that order.
      square: of the length of the first one.
      scale: what that was multiplied by, to be in range.
    """

    preconditioned: list[Any]
    preconditioner_states: tuple[Any, ...]
    precondition: Callable[[Any], Any]
    last: Any
    stacked: Any
    order: jax.Array
    slopes: jax.Array
    square: jax.Array
    scale: jax.Array


class _Level(NamedTuple):
    """What is done where there is no curvature.

    Attributes:
      flat: whether there is none.
      coefficient: of the preconditioned gradient, which makes the step then.
      curved: the curvature along it, by which that is the best step if there is none.
      usual: how much there usually is.
    """

    flat: jax.Array
    coefficient: jax.Array
    curved: jax.Array
    usual: jax.Array


class _Step(NamedTuple):
    """A step, with its sign turned, and what the model says of it.

    Attributes:
      tree: the step itself.
      norm: its length.
      coefficients: of the directions.
      slope: by how far the loss falls by its slope along the step.
      curved: the curvature along it.
      bounded: whether the step was shortened.
      finite: whether all of these are finite.
    """

    tree: Any
    norm: jax.Array
    coefficients: jax.Array
    slope: jax.Array
    curved: jax.Array
    bounded: Any = False
    finite: Any = True


def _by_curvature(
    given: _Given, settings: _Settings, state: QuadraticModelState
) -> tuple[Any, QuadraticModelState]:
    """A step to the minimum of the model."""
    found = _precondition(given, settings, state)
    verdict = trust.judge(
        given.loss,
        jnp.all(jnp.isfinite(found.slopes)),
        state.last,
        state.trust,
        _tree.real_scalar(settings.damping, given.loss.dtype),
        state.counts.count,
        settings.horizon is None,
    )
    signal = noise.measure(
        state.noise.signal,
        state.last,
        found.slopes[settings.kinds],
        state.last.prev_curvature,
        state.memory.stored,
    )
    total_damping = _total_damping(settings, verdict.trust.extra_damping, signal)
    model = _minimize(given, settings, found, total_damping)
    level = _level(given, settings, state, found, model, verdict)
    step = _make_step(given, settings, state, found, model, level)
    step = _shorten(given, settings, state, step, verdict)
    taken = step.finite & ~verdict.rejected
    output = _choose(given, step, found.last, taken, verdict)

    after = _after_step(given, settings, state, found, model, level, step, verdict)
    after = after._replace(
        trust=after.trust._replace(damping=total_damping),
        noise=state.noise._replace(signal=signal),
    )
    new_state = _select(state, after, verdict, taken)
    new_memory = memory.write(
        state.memory,
        output,
        step.norm,
        taken=taken,
        rejected=verdict.rejected,
        kept=verdict.kept,
    )
    new_state = new_state._replace(memory=new_memory)
    if settings.horizon is not None:
        new_state = new_state._replace(
            noise=_hand_over(given, settings, state, new_state, found, model, level)
        )
    return output, new_state


def _hand_over(
    given: _Given,
    settings: _Settings,
    state: QuadraticModelState,
    after: QuadraticModelState,
    found: _Directions,
    model: subspace.Model,
    level: _Level,
) -> Noise:
    """What is known of noise after a step, and whether it rules from now on."""
    known, newest = state.noise, settings.kinds
    stored, slope = state.memory.stored, found.slopes[newest]
    curved = state.last.prev_curvature
    if settings.history:  # by the batch that did not make the step
        curved = model.products[newest, newest]
    signal = noise.measure(known.fresh_signal, state.last, slope, curved, stored)
    log_length = noise.best_length(
        known.log_length, found.scale * model.slopes[0], level.curved, stored
    )
    finite = jnp.isfinite(signal) & jnp.isfinite(log_length)
    signal = jnp.where(finite, signal, known.fresh_signal)
    log_length = jnp.where(finite, log_length, known.log_length)
    contradicted = noise.contradicts(state.last, slope, curved) & finite
    fraction = given.curvature.fraction
    examples = known.examples + (1.0 if fraction is None else fraction)
    count = jnp.asarray(after.counts.count)
    starts = noise.rules(
        signal, stored, contradicted, examples, count, settings.horizon
    )
    starts &= jnp.asarray(stored) > 0
    balance: Any = known.balance
    length = jnp.exp(log_length) * jnp.where(contradicted, _DOUBTED, _FIRST)
    rate = jnp.where(starts, length, balance.balance.rate)
    return after.noise._replace(
        fresh_signal=signal,
        log_length=log_length,
        examples=examples,
        since=jnp.where(starts, count, known.since).astype(jnp.int32),
        balance=balance._replace(balance=balance.balance._replace(rate=rate)),
    )


def _at_average(given: _Given, state: QuadraticModelState) -> tuple[Any, jax.Array]:
    """The averaged parameters, and what the loss is above that there."""
    balance: Any = state.noise.balance
    average = noise_balance.averaged(balance, given.params)
    excess = _xla.canonical(noise_balance.excess_of)(
        given.curvature, given.loss, given.params, average
    )
    return average, excess


def _by_noise(
    given: _Given,
    settings: _Settings,
    state: QuadraticModelState,
    seen: tuple[Any, jax.Array],
) -> tuple[Any, QuadraticModelState]:
    """A step where noise rules, without a product."""
    dtype, known, counts = given.loss.dtype, state.noise, state.counts
    next_slope = _slope(given, settings, memory.newest(state.memory))
    outlier = noise.is_outlier(known, next_slope)
    known = noise.slopes(known, state.last.prev_slope, next_slope)
    extra = {"value": given.loss, "curvature": given.curvature, **given.extra}
    extra["mean_weight"] = _xla.compute_once(noise.mean_weight(known))
    direction, direction_state = settings.noise_direction.update(
        given.grad, known.direction_state, given.params, **extra
    )
    both = jax.tree.map(lambda g, d: _stack(g[None], d), given.grad, direction)
    slope, size_sq = subspace.slopes_along(given.grad, both, dtype, settings.axis_name)
    before: Any = known.balance
    # What is no number in the gradient would stay in the direction.
    fits = jnp.isfinite(slope) & jnp.isfinite(size_sq) & ~outlier
    loss = jnp.where(fits, given.loss, jnp.nan)
    average, excess = seen
    left = _tree.real_scalar(settings.horizon, dtype)
    left = left - jnp.asarray(known.since).astype(dtype)
    balance, size, taken = noise_balance.follow(
        before, given.params, average, loss, excess, left, _TARGET, _DELAY
    )
    size = size * settings.factor(counts.count, dtype)
    output = noise_balance.scaled(direction, given.params, balance.average, size, taken)
    output = _tree.cast_like(output, given.grad)
    # What the gradient does not reach stays, though the average remembers it moving.
    output = _only(_tree.is_nonzero(given.grad, settings.axis_name), output)
    skipped = jnp.asarray(balance.nonfinite) - jnp.asarray(before.nonfinite)
    after = state._replace(
        last=state.last._replace(
            prev_value=jnp.where(taken, given.loss, state.last.prev_value),
            prev_slope=jnp.where(taken, size * slope, 0),
            prev_curvature=jnp.zeros([], dtype),
        ),
        noise=known._replace(
            direction_state=_tree.where(taken, direction_state, known.direction_state),
            balance=balance,
        ),
        memory=memory.replace_newest(state.memory, output, taken),
        counts=counts._replace(
            count=optax.safe_increment(counts.count),
            nonfinite=jnp.asarray(counts.nonfinite) + skipped,
        ),
    )
    return output, after


def _slope(given: _Given, settings: _Settings, direction: Any) -> jax.Array:
    """The inner product of the gradient with a direction."""
    stacked = jax.tree.map(lambda x: x[None], direction)
    dtype, axis_name = given.loss.dtype, settings.axis_name
    return subspace.slopes_along(given.grad, stacked, dtype, axis_name)[0]


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
    states = tuple(one_state for _, one_state in results)
    moves = _tree.is_nonzero(given.grad, settings.axis_name)
    learns = moves
    if given.raw_grad is not given.grad:
        learns = _tree.is_nonzero(given.raw_grad, settings.axis_name)

    dtype, axis_name = given.loss.dtype, settings.axis_name
    in_range = [_in_range(_only(moves, z), dtype, axis_name) for z, _ in results]
    preconditioned = [each.tree for each in in_range]

    def precondition(grad: Any) -> Any:
        first = settings.preconditioners[0]
        with jax.named_scope("nlcg_preconditioner"):
            found = first.update(grad, states[0], given.params, **extra)[0]
        return _times(in_range[0].scale, _only(learns, found))

    kept, places = memory.stacked(
        state.memory, in_slots=settings.history == settings.slots
    )
    stacked = jax.tree.map(_stack, _only(moves, kept), *preconditioned)
    order = jnp.concatenate(
        [jnp.arange(settings.kinds, dtype=jnp.int32), settings.kinds + places]
    )
    slopes = subspace.slopes_along(given.grad, stacked, dtype, axis_name)[order]
    last = memory.newest(state.memory)
    return _Directions(
        *(preconditioned, states, precondition, last, stacked, order, slopes),
        *(in_range[0].square, in_range[0].scale),
    )


class _InRange(NamedTuple):
    """A direction times a power of two, 1 unless its squares are far out.

    Attributes:
      tree: the direction.
      scale: the power of two.
      square: of the length.
    """

    tree: Any
    scale: jax.Array
    square: jax.Array


def _in_range(tree: Any, dtype: jnp.dtype, axis_name: Any) -> _InRange:
    """A direction of which the products with the curvature are in range.

    A plain gradient is as large as the loss, and those are like its cube.
    """
    square = _sum_of_squares(tree, dtype, axis_name)
    known = (square > 0) & jnp.isfinite(square)
    # Beyond its range a square tells no more than that.
    beyond = jnp.where(square == 0, -_BEYOND, jnp.where(jnp.isinf(square), _BEYOND, 0))
    exponent = _tree.exponent_of(_tree.square_root(jnp.where(known, square, 1)), dtype)
    exponent = jnp.where(known, exponent, beyond)
    scale = _xla.compute_once(_tree.power_of_two(-exponent, dtype))
    scaled = _times(scale, tree)
    square = jax.lax.cond(
        exponent == 0,
        lambda: square,
        lambda: _sum_of_squares(scaled, dtype, axis_name),
    )
    return _InRange(scaled, scale, square)


def _times(scale: jax.Array, tree: Any) -> Any:
    def times(x: jax.Array) -> jax.Array:
        lifted = _tree.lift(x)
        return (_tree.scalar_like(scale, lifted) * lifted).astype(x.dtype)

    return jax.tree.map(times, tree)


def _stack(past: jax.Array, *new: jax.Array) -> jax.Array:
    """Arrays, and a stack of them behind; all lifted, unless they are of one dtype."""
    parts = [*(x[None] for x in new), past]
    if len({x.dtype for x in parts}) > 1:
        parts = [_tree.lift(x) for x in parts]
        parts = [x.astype(parts[0].dtype) for x in parts]
    return jnp.concatenate(parts)


def _only(moves: Any, tree: Any) -> Any:
    """A direction without the leaves that the gradient does not reach.

    There the model would have them make up for what the others do.
    """
    return jax.tree.map(lambda keep, x: jnp.where(keep, x, 0), moves, tree)


def _level(
    given: _Given,
    settings: _Settings,
    state: QuadraticModelState,
    found: _Directions,
    model: subspace.Model,
    verdict: trust.Verdict,
) -> _Level:
    """How far to go along the gradient where the curvature does not tell.

    As far as in the last step, or twice or half as far, as the loss has it.
    """
    slope, curved = model.slopes[0], model.products[0, 0]
    nonnegative = given.curvature.nonnegative
    flat, usual = trust.lacks_curvature(
        slope,
        curved,
        found.square,
        state.trust.curvature,
        trust.MAX_DECREASE * given.loss if nonnegative else None,
        verdict.trust.length_factor,
        (state.last.coefficients[0] != 0) & jnp.all(state.last.coefficients[1:] == 0),
    )
    dtype, count = slope.dtype, jnp.asarray(state.counts.count)
    factor = settings.factor(count, dtype)
    before = settings.factor(jnp.maximum(count - 1, 0), dtype)
    last = memory.newest_norm(state.memory)
    unknown = (last == 0) | (before == 0)

    def first() -> jax.Array:
        return factor * _first_length(given, settings)

    def next_one() -> jax.Array:
        ratio = factor / jnp.where(unknown, 1, before)
        return ratio * verdict.trust.length_factor * last

    length = jax.lax.cond(flat & unknown, first, next_one)
    norm = jnp.sqrt(jnp.where(flat, found.square, 1))
    coefficient = jnp.where(flat, length / norm, 0)
    best = slope / jnp.where(coefficient > 0, coefficient, 1)
    return _Level(flat, coefficient, jnp.where(flat, best, curved), usual)


def _first_length(given: _Given, settings: _Settings) -> jax.Array:
    """A length for a step of which nothing is known."""
    dtype, axis_name = given.loss.dtype, settings.axis_name
    norm = _tree.norm(given.params, dtype=dtype, axis_name=axis_name)
    size = sum(jnp.size(x) for x in jax.tree.leaves(given.params))
    return trust.first_length(norm, size)


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
    found: _Directions,
    damping: jax.Array,
) -> subspace.Model:
    """The model over the directions."""
    if not jax.tree.leaves(given.params):  # an empty group of `optax.partition`
        return subspace.without_products(
            found.preconditioned[0], given.loss, found.slopes, settings.residuals
        )
    known = settings.kinds + settings.history
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


def _make_step(
    given: _Given,
    settings: _Settings,
    state: QuadraticModelState,
    found: _Directions,
    model: subspace.Model,
    level: _Level,
) -> _Step:
    """The step to the minimum of the model."""
    dtype = given.loss.dtype
    factor = settings.factor(state.counts.count, dtype)
    coefficients = factor * model.coefficients
    along = jnp.zeros_like(coefficients).at[0].set(level.coefficient)
    coefficients = jnp.where(level.flat, along, coefficients)

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
    tree = jax.tree.map(total, given.grad, *directions)
    return _Step(
        tree,
        _tree.norm(tree, dtype=dtype, axis_name=settings.axis_name),
        coefficients,
        slope=jnp.sum(model.slopes * coefficients),
        curved=subspace.inner(coefficients, model.products, coefficients),
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
    verdict: trust.Verdict,
) -> _Step:
    """The step, not much longer than the last ones, nor than the loss allows."""
    growth = _tree.real_scalar(settings.max_growth, given.loss.dtype)
    far_too_long = jnp.asarray(state.trust.rejections) >= trust.MOST_REJECTIONS
    longest = jnp.where(
        # What was taken back wholly, unless that was no fault of the step.
        far_too_long & ~verdict.new_level,
        memory.newest_norm(state.memory),
        jnp.max(state.memory.prev_norms),
    )
    # At a minimum steps become as short as rounding; the next one may lie elsewhere.
    longest = jax.lax.cond(
        verdict.unseen,
        lambda: jnp.maximum(longest, _ELSEWHERE * _first_length(given, settings)),
        lambda: longest,
    )
    ratio = _xla.compute_once(
        trust.shorten(
            step.norm,
            longest * growth,
            step.slope,
            step.curved,
            given.loss,
            jnp.asarray(True) if given.curvature.nonnegative else None,
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
    given: _Given, step: _Step, last: Any, taken: jax.Array, verdict: trust.Verdict
) -> Any:
    """The step, or the last one back (or most of it), or nothing."""
    dtype = step.norm.dtype
    forth = _xla.compute_once(taken.astype(dtype))
    back = jnp.where(verdict.rejected, verdict.kept - 1, 0).astype(dtype)
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
    level: _Level,
    step: _Step,
    verdict: trust.Verdict,
) -> QuadraticModelState:
    """The state if the step is taken, but for memory, noise, and λ."""
    conjugacy = jnp.zeros([], given.loss.dtype)
    if settings.history:
        conjugacy = subspace.cosine(step.coefficients, model.products, settings.kinds)
    mismatch = trust.mismatch(
        given.loss,
        model.own_loss,
        given.curvature.fraction,
        verdict.trust,
        state.counts.count,
    )
    counts = state.counts
    trusted = trust.told(
        verdict.trust._replace(curvature=level.usual),
        given.loss,
        model.own_loss,
        settings.factor(counts.count, given.loss.dtype),
        ~level.flat & ~step.bounded,
        counts.count,
    )
    return state._replace(
        preconditioner_states=found.preconditioner_states,
        last=LastStep(
            prev_value=given.loss,
            prev_slope=step.slope,
            prev_curvature=step.curved,
            coefficients=step.coefficients,
            conjugacy=conjugacy,
        ),
        trust=trusted,
        counts=counts._replace(
            count=optax.safe_increment(counts.count),
            new_level=counts.new_level + verdict.new_level.astype(jnp.int32),
            flat=counts.flat + level.flat.astype(jnp.int32),
            bounded=counts.bounded + step.bounded.astype(jnp.int32),
            loss_mismatch=counts.loss_mismatch + mismatch.astype(jnp.int32),
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
            prev_slope=verdict.kept * last.prev_slope,
            prev_curvature=verdict.kept**2 * last.prev_curvature,
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
    if _check.is_schedule(weight_decay):
        raise ValueError(
            f"weight_decay={weight_decay!r} is not valid: expected a number, for it is "
            "a term of the loss."
        )
    _check.number("weight_decay", weight_decay, minimum=0, finite=True)
    _check.mask("weight_decay_mask", mask)
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return None
    return Penalty(weight_decay, Constant(mask))


def _endless(horizon: Any) -> bool:
    """Whether the steps of a run are not known, math.inf."""
    return isinstance(horizon, float) and math.isinf(horizon)


def _own_direction(
    preconditioner: optax.GradientTransformation,
    state_dtype: Any | None,
    axis_name: _tree.AxisName | None,
) -> optax.GradientTransformation:
    """NLCG's, as long as an average of the preconditioned gradients."""
    nlcg = scale_by_conjugate_direction(
        "fletcher_reeves",
        preconditioner,
        # Of noise as large in each step the rule's own β would be 1, but for chance.
        beta_bounds=(_BETA, _BETA),
        nesterov=True,
        epsilon=0.0,
        state_dtype=state_dtype,
        axis_name=axis_name,
    )
    return optax.chain(nlcg, optax.scale(1 - _BETA))


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
    if curvature.axis_name is None:
        alone = _tree.untracked_axes()
        if alone:
            axes = ", ".join(sorted(map(repr, alone)))
            raise ValueError(
                f"The curvature has no axis_name, inside of a `pmap` or a `shard_map` "
                f"with check_vma=False over {axes}: if each device has its own part of "
                "the batch, steps differ and copies of the parameters drift apart. "
                "Name the axis, `nlcg_optax.gauss_newton(..., axis_name="
                f"{sorted(map(str, alone))[0]!r})`, or `axis_name=()` if the curvature "
                "is the same on all devices."
            )
    return curvature

"""The step that the curvature chooses: its length, and the share of the last steps."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nlcg_optax import _check, _tree
from nlcg_optax._curvature import Curvature, Images, combine, join, stack
from nlcg_optax.step_sizes import _small_system, _trust

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
      coefficients: of the last step: of each preconditioned gradient, then of each past
        step, the newest first, then of each residual direction.
      damping: λ.
      prev_value: the loss where the last step began.
      prev_slope: how far the loss would have fallen by its slope along the last step.
      prev_curvature: the curvature along the last step.
      predicted_decrease: how far the model said that the loss would fall.
      actual_decrease: how far it fell in the step before, which is seen one step later.
      model_error: average distance of the loss from the model's prediction.
      conjugacy: cosine between the last two steps in the metric of the curvature.
      signal: average share of the slope along a step that is no noise.
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
    signal: jax.Array
    rejected: jax.typing.ArrayLike
    nonfinite: jax.typing.ArrayLike


# A step that is taken back keeps this part of its length.
_CUT = 0.25
# Part of a new share of signal in its average.
_SIGNAL_WEIGHT = 0.1


class _Plan(NamedTuple):
    """A step.

    Attributes:
      coefficients: of all directions.
      residual_directions: those that are not known from outside.
      slope: how far the loss would fall by its slope alone.
      curvature: the curvature along the step.
      conjugacy: as in the state.
    """

    coefficients: jax.Array
    residual_directions: list[Any]
    slope: jax.Array
    curvature: jax.Array
    conjugacy: jax.Array


def scale_by_quadratic_model(
    preconditioner: Preconditioners = None,
    *,
    history: int = 3,
    residuals: int = 1,
    every: int = 1,
    damping: float = 0.1,
    multiplier: optax.ScalarOrSchedule = 1.0,
    state_dtype: Any | None = None,
    axis_name: _tree.AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Takes the step that minimizes a quadratic model over a few directions.

    The directions are the preconditioned gradient :math:`z_t`, the last steps
    :math:`\delta_{t-1}, \dots, \delta_{t-k}`, and a residual direction :math:`z'`.
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

    The residual direction is the preconditioned gradient of the model at its minimum
    over the other directions, :math:`z' = M^{-1}(g + C \delta^0)`: a second iteration
    of conjugate gradient on the same model, which takes one backward pass on that part
    of the batch.

    The loss that `update` is given next tells whether the model held. Where the loss
    rose by more than it was to fall, and by more than four times what the model is
    usually wrong by (or is no number at all), three quarters of the step are taken
    back, which is counted, and λ is raised.

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
      every: steps between new products of the curvature. In between, the coefficients
        stay what they are (those of residual directions are 0).
      damping: λ, relative to the curvature along each direction.
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
    for name, number, minimum in (
        ("history", history, 0),
        ("residuals", residuals, 0),
        ("every", every, 1),
    ):
        if isinstance(number, jax.Array):
            raise ValueError(
                f"{name} is an array, but shapes follow from it. Call "
                "`optax.inject_hyperparams(..., static_args=('history', 'residuals', "
                "'every'))`."
            )
        _check.number(name, number, minimum=minimum, integer=True)
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
            coefficients=jnp.zeros([kinds + history + residuals], dtype),
            damping=jnp.asarray(damping, dtype),
            prev_value=zero,
            prev_slope=zero,
            prev_curvature=zero,
            predicted_decrease=zero,
            actual_decrease=zero,
            model_error=zero,
            conjugacy=zero,
            signal=jnp.ones([], dtype),
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

        verdict = _trust.judge(
            loss,
            state.prev_value,
            state.predicted_decrease,
            state.damping,
            state.model_error,
            _tree.real_scalar(damping, dtype),
        )

        def precondition(one: Any, one_state: Any, grad: Any) -> tuple[Any, Any]:
            extra = {"value": value, "curvature": curvature, **extra_args}
            return one.update(grad, one_state, params, **extra)

        pairs = zip(inner, state.preconditioner_states, strict=True)
        results = [precondition(one, one_state, grad) for one, one_state in pairs]
        preconditioned = [z for z, _ in results]
        preconditioner_states = tuple(one_state for _, one_state in results)

        def inner_products(directions: list[Any]) -> jax.Array:
            """Of the gradient with each of the directions."""

            def integrands(g: jax.Array, *leaves: jax.Array) -> list[jax.Array]:
                return [_tree.real_inner(g, d.astype(g.dtype)) for d in leaves]

            return jnp.stack(
                _tree.reduce_products(
                    integrands, grad, *directions, dtype=dtype, axis_name=axis_name
                )
            )

        newest = (state.stored - 1) % slots
        # Where each past step is, the newest first.
        places = (state.stored - 1 - jnp.arange(history, dtype=jnp.int32)) % slots
        past = [
            jax.tree.map(lambda x, i=i: jnp.asarray(x)[i], state.prev_updates)
            for i in places
        ]

        last = jax.tree.map(lambda x: jnp.asarray(x)[newest], state.prev_updates)
        known_slopes = inner_products([*preconditioned, *(past or [last])])
        signal = _signal(state, known_slopes[kinds])

        def solve() -> _Plan:
            directions = [*preconditioned, *past]
            slopes = known_slopes[: len(directions)]
            images = curvature.push(params, stack(params, directions))
            matrix = _products(curvature, params, images, images, loss).astype(dtype)
            matrix = 0.5 * (matrix + matrix.T)
            coefficients = _small_system.minimize(slopes, matrix, verdict.damping)
            extra = []
            for _ in range(residuals):
                # The gradient of the model at its minimum, preconditioned.
                product = curvature.pull(params, combine(images, coefficients))
                residual = jax.tree.map(
                    lambda g, p: (_tree.lift(g) - p.astype(_tree.lift(g).dtype)).astype(
                        g.dtype
                    ),
                    grad,
                    product,
                )
                z, _ = precondition(inner[0], preconditioner_states[0], residual)
                extra.append(z)
                image = curvature.push(params, stack(params, [z]))
                images = join(images, image)
                row = _products(curvature, params, image, images, loss).astype(dtype)
                matrix = jnp.block([[matrix, row[:, :-1].T], [row]])
                slopes = jnp.concatenate([slopes, inner_products([z])])
                coefficients = _small_system.minimize(slopes, matrix, verdict.damping)
            coefficients = factor * coefficients
            return _Plan(
                coefficients=coefficients,
                residual_directions=extra,
                slope=jnp.sum(slopes * coefficients),
                curvature=_small_system.inner(coefficients, matrix, coefficients),
                conjugacy=_cosine(coefficients, matrix, len(preconditioned))
                if history
                else jnp.zeros([], dtype),
            )

        def reuse() -> _Plan:
            # Without the residual directions, which only a new product gives.
            kept = kinds + history
            coefficients = state.coefficients.at[kept:].set(0)
            slope = jnp.sum(known_slopes[:kept] * coefficients[:kept])
            return _Plan(
                coefficients=coefficients,
                residual_directions=[
                    jax.tree.map(jnp.zeros_like, preconditioned[0])
                    for _ in range(residuals)
                ],
                slope=slope,
                # What it is at the minimum of a quadratic.
                curvature=slope,
                conjugacy=state.conjugacy,
            )

        factor = multiplier(state.count) if callable(multiplier) else multiplier
        factor = _tree.real_scalar(factor, dtype)
        if every == 1:
            plan = solve()
        else:
            plan = jax.lax.cond(state.count % every == 0, solve, reuse)
        finite = jnp.isfinite(loss) & jnp.isfinite(plan.slope)
        finite &= jnp.isfinite(plan.curvature)
        rejected = verdict.rejected
        accepted = finite & ~rejected
        moved = accepted | rejected

        def combine_leaf(g: jax.Array, last: jax.Array, *leaves: jax.Array) -> Any:
            # A step that is taken back: the last one, turned round, but for a part.
            last = _tree.lift(last).astype(_tree.lift(g).dtype)
            back = jnp.where(rejected, (_CUT - 1) * last, 0)
            total = jnp.zeros_like(last)
            for i, d in enumerate(leaves):
                d = _tree.lift(d).astype(total.dtype)
                total += _tree.scalar_like(plan.coefficients[i], d) * d
            return jnp.where(accepted, total, back).astype(g.dtype)

        step = jax.tree.map(
            combine_leaf, grad, last, *preconditioned, *past, *plan.residual_directions
        )
        place = jnp.where(accepted, state.stored % slots, newest)

        def store(memory: jax.Array, u: jax.Array) -> jax.Array:
            memory = jnp.asarray(memory)  # a restored state may be NumPy's
            kept = memory[place]
            shortened = (_CUT * _tree.lift(kept)).astype(kept.dtype)
            new = jnp.where(rejected, shortened, kept)
            return memory.at[place].set(jnp.where(accepted, u.astype(kept.dtype), new))

        def choose(new: Any, cut: Any, old: Any) -> jax.Array:
            return jnp.where(accepted, new, jnp.where(rejected, cut, old))

        cut_slope = _CUT * state.prev_slope
        cut_curvature = _CUT**2 * state.prev_curvature
        return step, QuadraticModelState(
            count=jnp.where(moved, optax.safe_increment(state.count), state.count),
            stored=state.stored + accepted.astype(jnp.int32),
            preconditioner_states=_tree.where(
                accepted, preconditioner_states, state.preconditioner_states
            ),
            prev_updates=jax.tree.map(store, state.prev_updates, step),
            coefficients=jnp.where(accepted, plan.coefficients, state.coefficients),
            damping=jnp.where(moved, verdict.damping, state.damping),
            prev_value=jnp.where(accepted, loss, state.prev_value),
            prev_slope=choose(plan.slope, cut_slope, state.prev_slope),
            prev_curvature=choose(plan.curvature, cut_curvature, state.prev_curvature),
            predicted_decrease=choose(
                plan.slope - 0.5 * plan.curvature,
                cut_slope - 0.5 * cut_curvature,
                state.predicted_decrease,
            ),
            actual_decrease=jnp.where(
                moved & verdict.pending, verdict.actual, state.actual_decrease
            ),
            model_error=jnp.where(moved, verdict.model_error, state.model_error),
            conjugacy=jnp.where(accepted, plan.conjugacy, state.conjugacy),
            signal=jnp.where(accepted & verdict.pending, signal, state.signal),
            rejected=state.rejected + rejected.astype(jnp.int32),
            nonfinite=state.nonfinite + (~moved).astype(jnp.int32),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _signal(state: Any, slope: jax.Array) -> jax.Array:
    r"""The average share of the slope that is signal, with what the last step tells.

    Without noise the slope along the last step :math:`-u` is now
    :math:`u^\top g_t - u^\top C u`. Of a noisy gradient the noise is gone that had made
    it seem steeper.
    """
    steep = state.prev_slope > 0
    share = (slope + state.prev_curvature) / jnp.where(steep, state.prev_slope, 1)
    share = jnp.clip(share, 0, 1)
    average = state.signal + _SIGNAL_WEIGHT * (share - state.signal)
    return jnp.where(steep, average, state.signal)


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

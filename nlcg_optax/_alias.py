"""The ready optimizers: chains of a preconditioner, a direction and a step size."""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from nlcg_optax import _check, _transformations, _tree
from nlcg_optax.curvature.transform import scale_by_quadratic_model
from nlcg_optax.directions.beta import BetaFunction
from nlcg_optax.directions.conjugate import scale_by_conjugate_direction
from nlcg_optax.matrices import recognition
from nlcg_optax.preconditioners.diagonal_bfgs import scale_by_diagonal_bfgs
from nlcg_optax.preconditioners.orthogonalization import scale_by_orthogonalization
from nlcg_optax.preconditioners.soap import scale_by_soap
from nlcg_optax.step_sizes.loss_feedback import scale_by_loss_feedback

# What is said of it where none is given names `nlcg_auto`.
_GIVE_ONE = cast(Any, None)
Preconditioner = str | optax.GradientTransformation | None


def nlcg(
    learning_rate: optax.ScalarOrSchedule = _GIVE_ONE,
    *,
    beta_rule: str | BetaFunction = "fletcher_reeves",
    beta_bounds: tuple[float, float] = (0.0, 0.9),
    preconditioner: Preconditioner = "orthogonalization",
    step_rule: str | optax.GradientTransformation | None = "step",
    nesterov: bool | None = None,
    weight_decay: float | None = None,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    epsilon: float = 1e-8,
    state_dtype: Any | None = None,
    axis_name: _tree.AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic preconditioned nonlinear conjugate gradient, for large batches.

    The chain of :func:`~nlcg_optax.scale_by_conjugate_direction` over
    :func:`~nlcg_optax.scale_by_orthogonalization`,
    :func:`~nlcg_optax.scale_by_loss_feedback`, and the learning rate:

    .. math::
        d_t = -z_t + \beta_t d_{t-1}, \qquad z_t = M_t^{-1} g_t, \qquad
        x_{t+1} = x_t + \alpha_t b_t (-z_t + \beta_t d_t) - \alpha_t \lambda x_t .

    The method is that of arXiv:1812.02886. Three defaults are not, because with them it
    trains as well on small batches and better on large ones
    (``benchmarks/large_batch``): the preconditioner orthogonalizes each matrix of the
    gradient, where the paper's is the diagonal of BFGS; β is clipped to 0.9 rather than
    1; and the step looks ahead along the direction by one more β (``nesterov``).
    :func:`~nlcg_optax.nlcg_paper` is the paper's configuration, exactly.

    One step moves a matrix of full rank by a root mean square of
    :math:`0.2 \alpha`, and up to ten times that where directions agree (β = 0.9); 0.04
    is a learning rate to try first, then a factor of 4 to either side.

    :func:`~nlcg_optax.nlcg_auto` has no learning rate.

    Args:
      learning_rate: α, a number or a schedule, which has to be given.
      beta_rule: see :func:`~nlcg_optax.scale_by_conjugate_direction`.
      preconditioner: ``"orthogonalization"``, ``"soap"``
        (:func:`~nlcg_optax.scale_by_soap`), ``"diagonal_bfgs"``, any gradient
        transformation, or None.
      step_rule: ``"step"`` or ``"online"``, see
        :func:`~nlcg_optax.scale_by_loss_feedback`; None for none. A gradient
        transformation is placed last, where it is given the descent direction times the
        learning rate, as line searches expect it.
      beta_bounds: β is clipped to this closed interval, which without a line search
        lies in [-1, 1].
      nesterov: whether the step goes along :math:`-z_t + \beta_t d_t`; None: yes,
        unless a line search follows, which needs the direction itself.
      weight_decay: λ, decoupled as in :func:`optax.adamw`: the learning rate multiplies
        it and the base step b does not, and the directions do not see it. None or 0 for
        none. With a transformation as step rule there is none.
      weight_decay_mask: the leaves that decay: a tree of booleans, a prefix of the
        parameters' tree, or a function from parameters to it; None for all. (With
        `optax.inject_hyperparams` a function has to be named in ``static_args``.)
      epsilon: ε of the direction and of the preconditioner.
      state_dtype: dtype of the history (directions and gradients; B and the copy of the
        parameters keep their own); None for each parameter's own.
      axis_name: the mapped axis (or axes) of a `shard_map` or `pmap` over which the
        trees are sharded; None where they are whole, as they are under `jit`. In a
        `shard_map` that checks types (``check_vma=True``, its default) some leaves may
        be replicated; elsewhere *every* leaf counts as sharded. Orthogonalization puts
        shards together by the whole shapes that `init` sees, outside the `shard_map`.

    Returns:
      An optimizer. Its `update` needs `params` for the diagonal of BFGS and for weight
      decay, and the keyword argument ``value``, the loss averaged over the global
      batch, for the step rules.

    Raises:
      ValueError: for an unknown name or an argument out of range.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> import optax
    >>> target = jnp.array([[1.0, -2.0], [0.5, 3.0]])
    >>> def loss_fn(w):
    ...     return jnp.sum((w - target) ** 2 * jnp.array([1.0, 10.0]))
    >>> tx = nlcg_optax.nlcg(optax.cosine_decay_schedule(0.4, 100))
    >>> @jax.jit
    ... def step(w, state):
    ...     loss, grads = jax.value_and_grad(loss_fn)(w)
    ...     updates, state = tx.update(grads, state, w, value=loss)
    ...     return w + updates, state
    >>> w = jnp.zeros((2, 2))
    >>> state = tx.init(w)
    >>> for _ in range(100):
    ...     w, state = step(w, state)
    >>> print(w.round(2))
    [[ 1.  -2. ]
     [ 0.5  3. ]]
    """
    if step_rule == "quadratic_model":
        raise ValueError(
            "step_rule='quadratic_model' is not valid: the step that curvature chooses "
            "has an optimizer of its own, which takes no learning rate, "
            "`nlcg_optax.nlcg_auto()`."
        )
    if learning_rate is None:
        raise ValueError(
            "learning_rate=None is not valid: expected a number or a schedule. "
            "`nlcg_optax.nlcg_auto()` does without one."
        )
    decay = _decay(weight_decay, weight_decay_mask, step_rule)
    if nesterov is None:
        nesterov = not isinstance(step_rule, optax.GradientTransformation)
    direction = scale_by_conjugate_direction(
        beta_rule,
        _preconditioner(preconditioner, epsilon, state_dtype, axis_name),
        beta_bounds=beta_bounds,
        nesterov=nesterov,
        epsilon=epsilon,
        state_dtype=state_dtype,
        axis_name=axis_name,
    )
    _check_memory(beta_bounds, step_rule)
    return _chain(
        direction, step_rule, learning_rate, decay=decay, state_dtype=state_dtype
    )


def nlcg_auto(
    num_steps: float | None = None,
    *,
    preconditioner: Preconditioner | Sequence[Preconditioner] = "orthogonalization",
    noise_direction: optax.GradientTransformation | None = None,
    residuals: int = 2,
    multiplier: optax.ScalarOrSchedule = 1.0,
    weight_decay: float | None = None,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    epsilon: float = 1e-8,
    state_dtype: Any | None = None,
    axis_name: _tree.AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""NLCG without a learning rate: the curvature of the loss chooses the step.

    :func:`~nlcg_optax.scale_by_quadratic_model` with a preconditioner, and the final
    negative scaling. In each step it minimizes a quadratic model of the loss over the
    preconditioned gradient, the last three steps, and residual directions, and so
    chooses both the length of the step and β.

    Args:
      num_steps: the steps of the whole run, where each step sees another batch. Once
        most of the gradient is noise, an averaged gradient goes on without products,
        with a rate that balances what noise costs with what is still gained
        (:func:`~nlcg_optax.scale_by_noise_balance`), and falls to zero at the last
        step. ``math.inf`` where the end is not known: then the rate does not fall, and
        :func:`~nlcg_optax.eval_params` gives the parameters to evaluate. None where
        each loss is that of the same data: the curvature then chooses each step.
      preconditioner: ``"orthogonalization"``, ``"soap"``, ``"diagonal_bfgs"``, any
        gradient transformation, None, or a sequence of them, of which each makes a
        direction.
      noise_direction: what makes the direction once noise rules, as for
        :func:`~nlcg_optax.scale_by_quadratic_model`; None for the average of the
        gradients, scaled as by Adam in the basis of their Gram matrices:
        ``scale_by_soap(0.95, nesterov=True)``, and 0.2 of it for vectors. The newest
        gradient's part in it follows how far the last steps overshot. A matrix with
        a side longer than 1,024, and 32 times the other, has no basis: of an embedding
        a batch touches but a few rows.
      residuals: residual directions, each of which takes a backward pass on the part of
        the batch that the curvature is taken on: 5 where that is all of the data.
      multiplier: of the step, a number or a schedule of the count: 1, or a final decay.
      weight_decay: λ of a term :math:`\tfrac{\lambda}{2} \lVert x \rVert^2` of the
        model: the penalty itself, which no learning rate multiplies, at no price. None
        or 0 for none.
      weight_decay_mask: the leaves that decay: a tree of booleans, a prefix of the
        parameters' tree, or a function from parameters to it; None for all.
      epsilon: ε of the preconditioner.
      state_dtype: dtype of the past steps (and of the preconditioner's); None for each
        parameter's own.
      axis_name: as for :func:`~nlcg_optax.nlcg`.

    Returns:
      An optimizer. Its `update` needs `params`, and what
      :func:`~nlcg_optax.value_grad_and_curvature` makes: the gradient, and the keyword
      arguments ``value``, the loss averaged over the global batch, and ``curvature``.
      Nothing that changes the updates should follow it.

    Raises:
      ValueError: for an unknown name or an argument out of range.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> import optax
    >>> x = jnp.linspace(-1.0, 1.0, 20)[:, None]
    >>> evaluate = nlcg_optax.value_grad_and_curvature(
    ...     lambda w, batch: jnp.tanh(batch["x"] @ w["a"]) @ w["b"],
    ...     lambda outputs, batch: jnp.mean((outputs - batch["y"]) ** 2),
    ... )
    >>> tx = nlcg_optax.nlcg_auto()
    >>> @jax.jit
    ... def step(w, state, batch):
    ...     value, grads, curvature = evaluate(w, batch)
    ...     updates, state = tx.update(
    ...         grads, state, w, value=value, curvature=curvature
    ...     )
    ...     return optax.apply_updates(w, updates), state, value
    >>> w = {"a": jnp.array([[1.0, -0.5, 2.0]]), "b": jnp.array([[0.1], [0.2], [0.3]])}
    >>> state = tx.init(w)
    >>> for _ in range(30):
    ...     w, state, value = step(w, state, {"x": x, "y": jnp.sin(3 * x)})
    >>> print(bool(value < 1e-3))
    True
    """
    several = _transformations.several(preconditioner)
    if num_steps is not None and num_steps != math.inf:
        _check.number("num_steps", num_steps, minimum=1, integer=True)
    if noise_direction is None and num_steps is not None:
        noise_direction = _averaged_basis(epsilon, axis_name)
    model = scale_by_quadratic_model(
        [_preconditioner(p, epsilon, state_dtype, axis_name) for p in several],
        residuals=residuals,
        horizon=num_steps,
        noise_direction=noise_direction,
        multiplier=multiplier,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        state_dtype=state_dtype,
        axis_name=axis_name,
    )
    return optax.chain(model, optax.scale(-1.0))


def nlcg_paper(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta_rule: str | BetaFunction = "fletcher_reeves",
    preconditioner: str | optax.GradientTransformation | None = "diagonal_bfgs",
    step_rule: str | optax.GradientTransformation | None = "step",
    period: int = 5,
    threshold: float = 1.0,
    epsilon: float = 1e-8,
    state_dtype: Any | None = None,
    axis_name: _tree.AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The configuration of arXiv:1812.02886, exactly.

    :func:`~nlcg_optax.nlcg`, which explains the arguments, with the paper's
    preconditioner and clip of β, and without weight decay: the paper has its penalty in
    the loss. The tests replay recorded trajectories of the
    published code with it.

    Raises:
      ValueError: for an unknown name or an argument out of range.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> def loss_fn(x):
    ...     return (x[0] - 1.0) ** 2 + 10.0 * (x[1] + 2.0) ** 2
    >>> tx = nlcg_optax.nlcg_paper(learning_rate=0.02)
    >>> @jax.jit
    ... def step(x, state):
    ...     loss, grads = jax.value_and_grad(loss_fn)(x)
    ...     updates, state = tx.update(grads, state, x, value=loss)
    ...     return x + updates, state
    >>> x = jnp.zeros(2)
    >>> state = tx.init(x)
    >>> for _ in range(100):
    ...     x, state = step(x, state)
    >>> print(x.round(2))
    [ 1. -2.]
    """
    direction = scale_by_conjugate_direction(
        beta_rule,
        _preconditioner(preconditioner, epsilon, state_dtype, axis_name),
        beta_bounds=(0.0, 1.0),
        epsilon=epsilon,
        state_dtype=state_dtype,
        axis_name=axis_name,
    )
    return _chain(
        direction, step_rule, learning_rate, period, threshold, state_dtype=state_dtype
    )


# Matrices as long as that, and so many times as long as wide, have no basis.
_LONG, _TALL = 1024, 32


def _averaged_basis(
    epsilon: float, axis_name: _tree.AxisName | None
) -> optax.GradientTransformation:
    """SOAP's direction, all leaves of one scale: one rate is found for all of them."""
    soap = scale_by_soap(
        0.95, eps=epsilon, nesterov=True, matrices=_not_tall, axis_name=axis_name
    )

    def level(u: jax.Array) -> jax.Array:
        return u if jnp.ndim(u) > 1 else u * _tree.real_scalar(0.2, u.real.dtype)

    return optax.chain(soap, optax.stateless(lambda u, _: jax.tree.map(level, u)))


def _not_tall(path: Any, leaf: Any) -> recognition.Matrix | None:
    """What :func:`nlcg_optax.matrices.recognize` says, but of embeddings by shape."""
    matrix = recognition.recognize(path, leaf)
    if matrix is None:
        return None
    _, rows, columns = matrix.sides(jnp.shape(leaf))
    short, long = sorted((rows, columns))
    return None if long > _LONG and long >= _TALL * short else matrix


def _preconditioner(
    preconditioner: Any,
    epsilon: float,
    state_dtype: Any | None,
    axis_name: _tree.AxisName | None,
) -> optax.GradientTransformation | None:
    """The preconditioner of a name; whatever is no name stands for itself."""
    if not isinstance(preconditioner, str):
        return preconditioner
    _check.one_of(
        "preconditioner",
        preconditioner,
        ("diagonal_bfgs", "orthogonalization", "soap"),
        ", a gradient transformation, or None",
    )
    if preconditioner == "orthogonalization":
        return scale_by_orthogonalization(epsilon=epsilon, axis_name=axis_name)
    if preconditioner == "soap":
        return scale_by_soap(eps=epsilon, axis_name=axis_name)
    return scale_by_diagonal_bfgs(epsilon, state_dtype=state_dtype, axis_name=axis_name)


def _check_memory(beta_bounds: Any, step_rule: Any) -> None:
    """Raises if directions could grow without bound at a given learning rate."""
    if isinstance(step_rule, optax.GradientTransformation):
        return  # a line search bounds the step
    ends = beta_bounds if isinstance(beta_bounds, tuple | list) else ()
    known = [x for x in ends if isinstance(x, int | float)]
    if any(abs(x) > 1 for x in known):
        raise ValueError(
            f"beta_bounds={beta_bounds!r} is not valid with a learning rate: beyond "
            "-1 or 1 directions grow from step to step. Wider bounds are for a line "
            "search as step_rule, which bounds the step itself."
        )


def _decay(
    weight_decay: Any, mask: Any, step_rule: Any
) -> optax.GradientTransformation | None:
    """What adds λ·w to a leaf w that decays; None for nothing."""
    # Not so for the array that `optax.inject_hyperparams` makes of a number.
    if weight_decay is None or (
        isinstance(weight_decay, int | float) and weight_decay == 0
    ):
        if weight_decay is None and mask is not None:
            raise ValueError(
                "weight_decay_mask without weight_decay does nothing: give both, "
                "`nlcg(..., weight_decay=0.1, weight_decay_mask=...)`."
            )
        return None
    if _check.is_schedule(weight_decay):
        raise ValueError(
            f"weight_decay={weight_decay!r} is not valid: expected a number. The "
            "schedule of the learning rate multiplies it; `optax.inject_hyperparams` "
            "gives it one of its own."
        )
    _check.number("weight_decay", weight_decay, minimum=0, finite=True)
    _check.mask("weight_decay_mask", mask)
    if isinstance(step_rule, optax.GradientTransformation):
        raise ValueError(
            f"weight_decay={weight_decay} is not valid with a gradient transformation "
            "as step_rule, which may be a line search along the direction alone. Chain "
            "`optax.add_decayed_weights` before or after, as that one needs it."
        )

    def add(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        # `optax.add_decayed_weights` would change the dtype where parameters are wider.
        _tree.check_params(updates, params, "weight decay")

        def one(u: jax.Array, w: jax.Array) -> jax.Array:
            x = _tree.lift(u)
            w = _tree.lift(w).astype(x.dtype)
            return (x + _tree.scalar_like(weight_decay, x) * w).astype(u.dtype)

        return jax.tree.map(one, updates, params)

    decay = optax.stateless(add)
    if mask is None:
        return decay
    # `optax.masked` would call whatever can be called.
    return optax.masked(
        decay, lambda params: mask(params) if _check.is_function(mask) else mask
    )


def _chain(
    direction: optax.GradientTransformationExtraArgs,
    step_rule: str | optax.GradientTransformation | None,
    learning_rate: optax.ScalarOrSchedule,
    period: int = 5,
    threshold: float = 1.0,
    decay: optax.GradientTransformation | None = None,
    state_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Chains a direction, a step rule, weight decay and the learning rate."""
    if not _check.is_schedule(learning_rate):
        # A negative one would climb: the sign is turned here.
        _check.number("learning_rate", learning_rate, minimum=0, finite=True)
    scale = optax.scale_by_learning_rate(learning_rate)
    if isinstance(step_rule, optax.GradientTransformation):
        return optax.chain(direction, scale, step_rule)
    last = (scale,) if decay is None else (decay, scale)
    if step_rule is None:
        return optax.chain(direction, *last)
    _check.one_of(
        "step_rule",
        step_rule,
        ("step", "online"),
        ", a gradient transformation, or None",
    )
    feedback = scale_by_loss_feedback(
        step_rule, period, threshold, state_dtype=state_dtype
    )
    return optax.chain(direction, feedback, *last)

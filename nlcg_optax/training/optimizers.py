"""Optimizers and learning rate schedules from a config."""

from collections.abc import Callable
from typing import Any

import optax
import optax.contrib

import nlcg_optax
from nlcg_optax.training import models
from nlcg_optax.training.config import ConfigDict, ConfigError


def create_schedule(config: ConfigDict, steps_per_epoch: float) -> optax.Schedule:
    """The learning rate by step: warm-up, then the schedule's own decay.

    The warm-up is polynomial, as in the recipe of arXiv:1812.02886:
    ``(init - max)·(1 - t/T)**power + max`` at step t of T. From an ``init`` of 0, where
    the first step would move nothing, it is ``(t + 1)/(T + 1)`` instead of ``t/T``.
    ``"step"`` divides the rate by ``decay_factor`` at every boundary; ``"cosine"``
    falls to zero at the last step. Boundaries are epochs from the start of training,
    the warm-up included.

    Args:
      config: the whole config of a run.
      steps_per_epoch: steps (or a fraction of one) that an epoch takes.

    Returns:
      A function of the step, 1 throughout where the quadratic model chooses the step.

    Raises:
      ConfigError: for an unknown schedule.
    """
    if uses_quadratic_model(config):
        return optax.constant_schedule(1.0)
    schedule, peak = config.schedule, config.optimizer.learning_rate
    warmup_steps = round(schedule.warmup_epochs * steps_per_epoch)
    total_steps = round(config.num_epochs * steps_per_epoch)
    if schedule.name == "constant":
        after = optax.constant_schedule(peak)
    elif schedule.name == "step":
        after = optax.piecewise_constant_schedule(
            peak,
            {
                round(epoch * steps_per_epoch) - warmup_steps: 1 / schedule.decay_factor
                for epoch in schedule.boundaries
            },
        )
    elif schedule.name == "cosine":
        after = optax.cosine_decay_schedule(peak, max(total_steps - warmup_steps, 1))
    else:
        raise ConfigError(
            f"schedule.name={schedule.name!r} is unknown: expected one of 'constant', "
            "'cosine', 'step'."
        )
    if warmup_steps == 0:
        return after
    from_zero = int(schedule.warmup_init == 0)
    warmup = optax.polynomial_schedule(
        init_value=schedule.warmup_init * peak,
        end_value=peak,
        power=schedule.warmup_power,
        transition_steps=warmup_steps + from_zero,
    )
    return optax.join_schedules(
        [lambda step: warmup(step + from_zero), after], [warmup_steps]
    )


def uses_quadratic_model(config: ConfigDict) -> bool:
    """Whether the curvature of the loss chooses the step."""
    optimizer = config.optimizer
    return optimizer.name == "nlcg" and optimizer.nlcg.step_rule == "quadratic_model"


def curvature_stride(config: ConfigDict) -> int:
    """One image of so many of the batch is among those that tell the curvature."""
    options = config.optimizer.nlcg
    wanted = config.batch_size * options.curvature_fraction
    wanted = max(round(wanted), options.curvature_min_images)
    return max(config.batch_size // wanted, 1)


def _nlcg(
    config: ConfigDict, learning_rate: optax.Schedule, total_steps: int | None = None
) -> Any:
    """The optimizer ``config.name``, nlcg or nlcg_paper, of the group of that name."""
    options = config[config.name].to_dict()
    fraction = options.pop("curvature_fraction", 1.0)
    fewest = options.pop("curvature_min_images", 1)
    residuals = options.pop("curvature_residuals", 2)
    if not 0 < fraction <= 1:
        raise ConfigError(
            f"optimizer.nlcg.curvature_fraction={fraction} is not valid: expected a "
            "part of the batch, above 0 and up to 1."
        )
    if fewest < 1:
        raise ConfigError(
            f"optimizer.nlcg.curvature_min_images={fewest} is not valid: expected at "
            "least 1 image."
        )
    if not isinstance(residuals, int) or residuals < 0:
        raise ConfigError(
            f"optimizer.nlcg.curvature_residuals={residuals} is not valid: expected an "
            "integer of at least 0."
        )
    preconditioners = {
        "orthogonalization": nlcg_optax.scale_by_orthogonalization(),
        "diagonal_bfgs": "diagonal_bfgs",
        "rms": optax.scale_by_rms(),
        # Without Adam's own momentum: the conjugate direction takes its place.
        "adam": optax.scale_by_adam(b1=0.0, b2=config.adam.b2, eps=config.adam.eps),
        "none": None,
    }
    name = options.pop("preconditioner")
    if name not in preconditioners:
        raise ConfigError(
            f"optimizer.{config.name}.preconditioner={name!r} is unknown: expected one "
            f"of {', '.join(map(repr, preconditioners))}."
        )
    step_rule = options.pop("step_rule")
    if step_rule == "quadratic_model" and config.name == "nlcg":
        preconditioners["diagonal_bfgs"] = nlcg_optax.scale_by_diagonal_bfgs()
        model = nlcg_optax.scale_by_quadratic_model(
            preconditioners[name], residuals=residuals, horizon=total_steps
        )
        return optax.chain(model, optax.scale(-1.0))
    make = {"nlcg": nlcg_optax.nlcg, "nlcg_paper": nlcg_optax.nlcg_paper}[config.name]
    return make(
        learning_rate,
        preconditioner=preconditioners[name],
        step_rule=None if step_rule == "none" else step_rule,
        **options,
    )


def _muon(config: ConfigDict, learning_rate: optax.Schedule) -> Any:
    """Kernels as matrices, their last axis the output; Adam takes the rest."""
    return optax.contrib.muon(
        learning_rate,
        muon_weight_dimension_numbers=models.muon_matrices,
        adam_b1=config.adam.b1,
        adam_b2=config.adam.b2,
        **config.muon,
    )


# Optimizers that leave weight decay to be applied after them.
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "nlcg": _nlcg,
    "nlcg_paper": _nlcg,
    "sgd": lambda config, rate: optax.sgd(rate),
    "momentum": lambda config, rate: optax.sgd(rate, config.momentum),
    "nesterov": lambda config, rate: optax.sgd(rate, config.momentum, nesterov=True),
    "rmsprop": lambda config, rate: optax.rmsprop(rate, **config.rmsprop),
    "adam": lambda config, rate: optax.adam(rate, **config.adam),
    "muon": _muon,
}

# Optimizers that have a place of their own for weight decay.
DECAYING_OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "adamw": lambda config, rate, decay, mask: optax.adamw(
        rate, weight_decay=decay, mask=mask, **config.adam
    ),
    "lars": lambda config, rate, decay, mask: optax.lars(
        rate,
        weight_decay=decay,
        weight_decay_mask=mask,
        trust_ratio_mask=mask,
        momentum=config.momentum,
        **config.lars,
    ),
    "lamb": lambda config, rate, decay, mask: optax.lamb(
        rate, weight_decay=decay, mask=mask, **config.adam
    ),
}


def create_optimizer(
    config: ConfigDict,
    schedule: optax.Schedule,
    decay_mask: Any,
    total_steps: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a config, with its layerwise scaling and weight decay.

    Weight decay is decoupled: whatever the optimizer makes of the gradient,
    ``weight_decay · learning rate · w`` is subtracted too. "adamw", "lars" and "lamb"
    apply it in their own place (within the trust ratio, for the last two).

    Args:
      config: the whole config of a run.
      schedule: the learning rate by step.
      decay_mask: tree of booleans, or a function from parameters to it: the leaves that
        weight decay (and the trust ratio of "lars") applies to.
      total_steps: steps of the whole run where batches differ from step to step: the
        quadratic model then goes over to plain NLCG once noise rules.

    Raises:
      ConfigError: for an unknown optimizer, or options that it refuses.
    """
    optimizer, decay = config.optimizer, config.weight_decay
    name = optimizer.name
    pieces = []
    quadratic = uses_quadratic_model(config)
    if quadratic:
        # The model is of the loss and of the step as they are.
        for field, value in (
            ("optimizer.layerwise_coefficient", optimizer.layerwise_coefficient),
            ("weight_decay", decay),
        ):
            if value:
                raise ConfigError(
                    f"{field}={value} is not valid with optimizer.nlcg.step_rule="
                    "'quadratic_model': expected 0. l2_penalty is part of the loss."
                )
    try:
        if optimizer.layerwise_coefficient:
            pieces.append(nlcg_optax.scale_by_lars(optimizer.layerwise_coefficient))
        if name in DECAYING_OPTIMIZERS:
            pieces.append(
                DECAYING_OPTIMIZERS[name](optimizer, schedule, decay, decay_mask)
            )
        elif name in OPTIMIZERS:
            horizon = {"total_steps": total_steps} if quadratic else {}
            pieces.append(OPTIMIZERS[name](optimizer, schedule, **horizon))
            if decay:
                decayed = optax.inject_hyperparams(
                    optax.add_decayed_weights, static_args="mask"
                )
                pieces.append(decayed(lambda t: -decay * schedule(t), mask=decay_mask))
        else:
            known = sorted([*OPTIMIZERS, *DECAYING_OPTIMIZERS])
            raise ConfigError(
                f"optimizer.name={name!r} is unknown: expected one of "
                f"{', '.join(map(repr, known))}."
            )
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"optimizer: {error}") from error
    return optax.chain(*pieces)

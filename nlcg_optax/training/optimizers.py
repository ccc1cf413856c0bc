"""Optimizers and learning rate schedules from a config."""

from collections.abc import Callable
from typing import Any

import optax
import optax.contrib

import nlcg_optax
from nlcg_optax.training import models
from nlcg_optax.training.run_config import (
    AdamConfig,
    ConfigError,
    NLCGAutoConfig,
    OptimizerConfig,
    RunConfig,
)


def create_schedule(config: RunConfig, steps_per_epoch: float) -> optax.Schedule:
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
      A function of the step, 1 throughout where the curvature chooses the step.
    """
    if config.optimizer.name == "nlcg_auto":
        return optax.constant_schedule(1.0)
    schedule, peak = config.schedule, config.optimizer.learning_rate
    assert peak is not None  # or OptimizerConfig had raised
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
    else:
        after = optax.cosine_decay_schedule(peak, max(total_steps - warmup_steps, 1))
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


def curvature_stride(options: NLCGAutoConfig, batch_size: int) -> int:
    """One image of so many of the batch is among those that tell the curvature."""
    wanted = round(batch_size * options.curvature_fraction)
    return max(batch_size // max(wanted, options.curvature_min_examples), 1)


def _preconditioner(name: str, adam: AdamConfig) -> Any:
    return {
        "orthogonalization": nlcg_optax.scale_by_orthogonalization(),
        "soap": "soap",
        "diagonal_bfgs": "diagonal_bfgs",
        "rms": optax.scale_by_rms(),
        # Without Adam's own momentum: the conjugate direction takes its place.
        "adam": optax.scale_by_adam(b1=0.0, b2=adam.b2, eps=adam.eps),
        "none": None,
    }[name]


def _nlcg(config: OptimizerConfig, learning_rate: optax.Schedule) -> Any:
    """The optimizer ``config.name``, nlcg or nlcg_paper, of the group of that name."""
    options = vars(getattr(config, config.name)) | {}
    name, rule = options["preconditioner"], options["step_rule"]
    options["preconditioner"] = _preconditioner(name, config.adam)
    options["step_rule"] = None if rule == "none" else rule
    return getattr(nlcg_optax, config.name)(learning_rate, **options)


def _muon(config: OptimizerConfig, learning_rate: optax.Schedule) -> Any:
    """Kernels as matrices, their last axis the output; Adam takes the rest."""
    return optax.contrib.muon(
        learning_rate,
        muon_weight_dimension_numbers=models.muon_matrices,
        adam_b1=config.adam.b1,
        adam_b2=config.adam.b2,
        **vars(config.muon),
    )


# Optimizers that leave weight decay to be applied after them.
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "nlcg": _nlcg,
    "nlcg_paper": _nlcg,
    "sgd": lambda config, rate: optax.sgd(rate),
    "momentum": lambda config, rate: optax.sgd(rate, config.momentum),
    "nesterov": lambda config, rate: optax.sgd(rate, config.momentum, nesterov=True),
    "rmsprop": lambda config, rate: optax.rmsprop(rate, **vars(config.rmsprop)),
    "adam": lambda config, rate: optax.adam(rate, **vars(config.adam)),
    "muon": _muon,
}

# Optimizers that have a place of their own for weight decay.
DECAYING_OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "adamw": lambda config, rate, decay, mask: optax.adamw(
        rate, weight_decay=decay, mask=mask, **vars(config.adam)
    ),
    "lars": lambda config, rate, decay, mask: optax.lars(
        rate,
        weight_decay=decay,
        weight_decay_mask=mask,
        trust_ratio_mask=mask,
        momentum=config.momentum,
        **vars(config.lars),
    ),
    "lamb": lambda config, rate, decay, mask: optax.lamb(
        rate, weight_decay=decay, mask=mask, **vars(config.adam)
    ),
}


def create_optimizer(
    config: RunConfig,
    schedule: optax.Schedule,
    decay_mask: Any,
    total_steps: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a config, with its layerwise scaling and weight decay.

    Weight decay is decoupled: whatever the optimizer makes of the gradient,
    ``weight_decay · learning rate · w`` is subtracted too. "adamw", "lars" and "lamb"
    apply it in their own place (within the trust ratio, for the last two), and
    "nlcg_auto" makes it part of its model.

    Args:
      config: the whole config of a run.
      schedule: the learning rate by step.
      decay_mask: tree of booleans, or a function from parameters to it: the leaves that
        weight decay (and the trust ratio of "lars") applies to.
      total_steps: steps of the whole run where batches differ from step to step: those
        that :func:`nlcg_optax.nlcg_auto` is given.

    Raises:
      ConfigError: for options that the optimizer refuses.
    """
    optimizer, decay = config.optimizer, config.weight_decay
    name = optimizer.name
    pieces = []
    try:
        if optimizer.layerwise_coefficient:
            pieces.append(nlcg_optax.scale_by_lars(optimizer.layerwise_coefficient))
        if name == "nlcg_auto":
            auto = optimizer.nlcg_auto
            nlcg_auto = nlcg_optax.nlcg_auto(
                total_steps,
                preconditioner=_preconditioner(auto.preconditioner, optimizer.adam),
                residuals=auto.residuals,
                weight_decay=decay,
                weight_decay_mask=decay_mask,
            )
            pieces.append(nlcg_auto)
        elif name in DECAYING_OPTIMIZERS:
            pieces.append(
                DECAYING_OPTIMIZERS[name](optimizer, schedule, decay, decay_mask)
            )
        else:
            pieces.append(OPTIMIZERS[name](optimizer, schedule))
            if decay:
                decayed = optax.inject_hyperparams(
                    optax.add_decayed_weights, static_args="mask"
                )
                pieces.append(decayed(lambda t: -decay * schedule(t), mask=decay_mask))
    except ValueError as error:
        raise ConfigError(f"optimizer: {error}") from error
    return optax.chain(*pieces)

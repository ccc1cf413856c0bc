"""The state of a run, and the jit-compiled steps that train and evaluate."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

import nlcg_optax
from nlcg_optax.training import data, models
from nlcg_optax.training.config import ConfigDict, ConfigError

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """Everything that a run needs to go on, bit for bit.

    Random draws and the position in the data follow from the step and the seed.

    Attributes:
      step: updates made, int32 scalar.
      params: float32 parameters.
      batch_stats: running statistics of BatchNorm.
      opt_state: the optimizer's state.
      average: moving average of the parameters for evaluation, or None.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    average: Any


def create_state(
    model: Any,
    tx: optax.GradientTransformation,
    config: ConfigDict,
    image_shape: tuple[int, ...],
) -> TrainState:
    """Initializes a model and its optimizer from ``config.seed`` (under jit)."""

    def init(key: jax.Array) -> TrainState:
        images = jnp.zeros((1, *image_shape), jnp.float32)
        variables = model.init(key, images, train=False)
        params = variables["params"]
        return TrainState(
            step=jnp.zeros([], jnp.int32),
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=tx.init(params),
            # A copy: donated buffers must not be shared.
            average=jax.tree.map(jnp.copy, params) if config.average_decay else None,
        )

    # It runs once. On a CPU, optimizing it took 14 s for ResNet-8; this way 2 s.
    options = {"xla_backend_optimization_level": 0}
    on_cpu = jax.default_backend() == "cpu"
    init = jax.jit(init, compiler_options=options if on_cpu else None)
    return init(jax.random.key(config.seed))


def normalizer(config: ConfigDict) -> Callable[[jax.Array], jax.Array]:
    """The function that turns uint8 images into the model's float32 input.

    Raises:
      ConfigError: for an unknown normalization.
    """
    known = {
        "per_image": data.standardize,
        "imagenet": data.normalize_imagenet,
    }
    name = config.dataset.normalization
    if name not in known:
        raise ConfigError(
            f"dataset.normalization={name!r} is unknown: expected one of "
            f"{', '.join(map(repr, known))}."
        )
    return known[name]


def make_train_step(
    model: Any,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: ConfigDict,
    *,
    augment: bool,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    r"""One update of the parameters, to be jitted with its state donated.

    The loss is the mean cross-entropy of the global batch plus
    :math:`\frac{\lambda}{2} \lVert w \rVert^2` over all but the BatchNorm parameters;
    the optimizer sees its value too.

    A step whose loss or gradient is not finite leaves the state as it was, so that the
    run can stop with everything that came before.

    Args:
      model: a Flax module.
      tx: the optimizer.
      schedule: its learning rate, for the metrics.
      config: the whole config of a run.
      augment: whether to crop and flip here (images that were streamed through a
        random crop are not).

    Returns:
      A function of the state and a batch (``image`` [B, H, W, C], ``label`` [B]) to the
      new state and the metrics: scalars in float32.
    """
    normalize = normalizer(config)
    tx = optax.with_extra_args_support(tx)
    crop_padding, flip = config.dataset.crop_padding, config.dataset.flip

    def loss_fn(params, batch_stats, images, labels):
        logits, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        loss = jnp.mean(cross_entropy) + config.l2_penalty * l2_loss(params)
        accuracy = jnp.mean(jnp.argmax(logits, -1) == labels, dtype=jnp.float32)
        return loss, (accuracy, updated["batch_stats"])

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        images, labels = batch["image"], batch["label"]
        if augment:
            key = jax.random.fold_in(jax.random.key(config.seed), state.step)
            images = data.augment(key, images, crop_padding=crop_padding, flip=flip)
        (loss, (accuracy, batch_stats)), grads = jax.value_and_grad(
            loss_fn, has_aux=True
        )(state.params, state.batch_stats, normalize(images), labels)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, value=loss)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if config.average_decay:
            # As TensorFlow's averages: short memory at first.
            ramp = (1 + state.step) / (10 + state.step)
            decay = jnp.minimum(config.average_decay, ramp)
            average = optax.incremental_update(params, average, 1 - decay)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            average=average,
        )
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        new_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), new_state, state
        )
        rate = jnp.asarray(schedule(state.step), jnp.float32)
        metrics = {
            "loss": loss,
            "accuracy": accuracy,
            "grad_norm": grad_norm,
            "update_norm": optax.tree.norm(updates),
            "learning_rate": rate,
        }
        if config.optimizer.name == "nlcg":
            report = nlcg_optax.diagnostics(opt_state)
            metrics |= report
            metrics["step_size"] = rate * report.get("base_step", 1.0)
        return new_state, metrics

    return train_step


def l2_loss(params: Any) -> jax.Array:
    """Half the squared norm of all but the BatchNorm parameters."""
    penalized = jax.tree.map(
        lambda w, penalize: jnp.sum(jnp.square(w)) if penalize else jnp.zeros([]),
        params,
        models.l2_mask(params),
    )
    return jnp.asarray(0.5 * optax.tree.sum(penalized))


def make_eval_step(
    model: Any, config: ConfigDict
) -> Callable[[TrainState, Batch], Metrics]:
    """Sums of loss, hits and examples over one batch, padding masked out.

    Uses the averaged parameters where the run keeps them. Sums over batches divided by
    ``count`` are exact at any batch size.
    """
    normalize = normalizer(config)

    def eval_step(state: TrainState, batch: Batch) -> Metrics:
        params = state.params if state.average is None else state.average
        logits = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            normalize(batch["image"]),
            train=False,
        )
        labels, mask = batch["label"], batch["mask"]
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        hits = (jnp.argmax(logits, -1) == labels).astype(jnp.float32)
        return {
            "loss": jnp.sum(cross_entropy * mask),
            "accuracy": jnp.sum(hits * mask),
            "count": jnp.sum(mask),
        }

    return eval_step

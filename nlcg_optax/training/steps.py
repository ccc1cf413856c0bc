"""The state of a run, and the jit-compiled steps that train and evaluate."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import nlcg_optax
from nlcg_optax.training import data, models
from nlcg_optax.training.config import ConfigDict, ConfigError
from nlcg_optax.training.mesh import AXES, BatchLayout, replicated, state_shardings
from nlcg_optax.training.optimizers import curvature_stride, uses_quadratic_model

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


def make_init(
    model: Any,
    tx: optax.GradientTransformation,
    config: ConfigDict,
    image_shape: tuple[int, ...],
) -> Callable[[jax.typing.ArrayLike], TrainState]:
    """The function from a seed to the first state, to be jitted."""

    def init(seed: jax.typing.ArrayLike) -> TrainState:
        images = jnp.zeros((1, *image_shape), jnp.float32)
        variables = model.init(jax.random.key(seed), images, train=False)
        params = variables["params"]
        return TrainState(
            step=jnp.zeros([], jnp.int32),
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=tx.init(params),
            # A copy: donated buffers must not be shared.
            average=jax.tree.map(jnp.copy, params) if config.average_decay else None,
        )

    return init


def abstract_state(
    model: Any,
    tx: optax.GradientTransformation,
    config: ConfigDict,
    image_shape: tuple[int, ...],
    mesh: jax.sharding.Mesh,
) -> TrainState:
    """Shapes, dtypes and shardings of the state on the mesh; nothing is allocated."""
    init = make_init(model, tx, config, image_shape)
    shapes = jax.eval_shape(functools.partial(init, config.seed))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings(shapes, mesh, config),
    )


def create_state(
    model: Any,
    tx: optax.GradientTransformation,
    config: ConfigDict,
    image_shape: tuple[int, ...],
    mesh: jax.sharding.Mesh,
) -> TrainState:
    """Initializes a model and its optimizer from ``config.seed``, on the mesh.

    The state is born sharded: no device ever holds more than its part.
    """
    init = functools.partial(make_init(model, tx, config, image_shape), config.seed)
    # It runs once. On a CPU, optimizing it took 14 s for ResNet-8; this way 2 s.
    options = {"xla_backend_optimization_level": 0}
    on_cpu = jax.default_backend() == "cpu"
    return jax.jit(
        init,
        out_shardings=shardings(jax.eval_shape(init), mesh, config),
        compiler_options=options if on_cpu else None,
    )()


def shardings(tree: Any, mesh: jax.sharding.Mesh, config: ConfigDict) -> Any:
    """The shardings of a state, or of a part of it, by the rule of ``config.mesh``."""
    return state_shardings(tree, mesh, config.mesh.min_size_to_split)


def at_once(config: ConfigDict) -> bool:
    """Whether all microbatches go through the model side by side."""
    return config.microbatches == 1 or config.batch_norm_statistics == "batch"


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
    mesh: jax.sharding.Mesh,
    *,
    augment: bool,
    seed: jax.typing.ArrayLike | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    r"""One update of the parameters, to be jitted with its state donated.

    The loss is the mean cross-entropy of the global batch plus
    :math:`\frac{\lambda}{2} \lVert w \rVert^2` over all but the BatchNorm parameters;
    the optimizer sees its value too.

    Several microbatches are worked through one after the other, their losses and
    gradients added up. The sums equal those of the whole batch at once to rounding, but
    for BatchNorm: with ``batch_norm_statistics="microbatch"`` each microbatch is
    normalized by its own statistics (those of all devices), and the running statistics
    follow the average of theirs. With ``"batch"`` they are the whole batch's, and
    nothing differs: the microbatches go through the model side by side, and memory is
    saved by computing each of its blocks a second time in the backward pass.

    A step whose loss or gradient is not finite leaves the state as it was, so that the
    run can stop with everything that came before; so do those after it that are given
    its ``go_on``. But where the quadratic model chooses the steps, it takes the one
    back that led there, and the metric ``taken_back`` is 1.

    The curvature that the model is given is that of some of the batch, evenly spaced
    over it: of those images, cropped and flipped as they are for the gradient, as one
    batch with BatchNorm statistics of its own.

    Args:
      model: a Flax module.
      tx: the optimizer.
      schedule: its learning rate, for the metrics.
      config: the whole config of a run.
      mesh: the devices.
      augment: whether to crop and flip here (images that were streamed through a
        random crop are not).
      seed: of the crops and flips, ``config.seed`` by default. Traced, where one
        compiled program is to serve several seeds.

    Returns:
      A function of the state, a batch (``image`` [M, R, H, W, C] and ``label`` [M, R],
      as :class:`nlcg_optax.training.mesh.BatchLayout` lays it out) and the ``go_on`` of
      the step before (True by default), to the new state and the metrics: scalars in
      float32, and ``go_on``, a boolean.
    """
    normalize = normalizer(config)
    draws: jax.typing.ArrayLike = config.seed if seed is None else seed
    tx = optax.with_extra_args_support(tx)
    crop_padding, flip = config.dataset.crop_padding, config.dataset.flip
    batch_size, parts = config.batch_size, config.microbatches
    examples = batch_size // parts
    side_by_side = at_once(config)
    quadratic = uses_quadratic_model(config)
    stride = curvature_stride(config)

    def split_rows(x: jax.Array) -> jax.Array:
        """Splits the rows over the devices, if they can be."""
        if len(x) % mesh.size:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(AXES)))

    def run_model(params, batch_stats, key, batch, places, some_empty):
        """Logits and new BatchNorm statistics; some rows may have no example."""
        images = split_rows(batch["image"])
        if augment:
            images = data.augment(
                key,
                images,
                crop_padding=crop_padding,
                flip=flip,
                places=places,
                batch_size=batch_size,
            )
        mask = {"mask": places >= 0} if some_empty else {}
        logits, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            normalize(images),
            train=True,
            mutable=["batch_stats"],
            **mask,
        )
        return logits, updated["batch_stats"]

    def loss_fn(params, batch_stats, key, batch, places):
        """Cross-entropy and accuracy; a microbatch's share in the whole batch's."""
        labels = split_rows(batch["label"])
        # The model sees a mask only where there are rows without an example.
        some_empty = len(labels) > (batch_size if side_by_side else examples)
        logits, statistics = run_model(
            params, batch_stats, key, batch, places, some_empty
        )
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        hits = (jnp.argmax(logits, -1) == labels).astype(jnp.float32)
        if some_empty:
            cross_entropy = jnp.where(places >= 0, cross_entropy, 0)
            hits = jnp.where(places >= 0, hits, 0)
        loss = jnp.sum(cross_entropy) / batch_size
        return loss, (jnp.sum(hits) / batch_size, statistics)

    def curvature(state: TrainState, batch: Batch) -> nlcg_optax.Curvature:
        """That of the loss on some of the images, evenly spaced, and of the penalty."""
        key = jax.random.fold_in(jax.random.key(draws), state.step)
        chosen, places = jax.tree.map(
            lambda x: _every(stride, x, mesh.size), (batch, rows_of(batch))
        )
        present = places >= 0
        some_empty = batch["label"].shape[1] > examples

        def outputs_fn(params: Any) -> tuple[jax.Array, Any]:
            return run_model(
                whole(params), state.batch_stats, key, chosen, places, some_empty
            )

        def mean_loss(logits: jax.Array) -> jax.Array:
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits, chosen["label"]
            )
            return jnp.sum(jnp.where(present, losses, 0)) / jnp.sum(present)

        return nlcg_optax.gauss_newton(
            outputs_fn,
            mean_loss,
            l2=config.l2_penalty,
            l2_mask=models.l2_mask,
            has_aux=True,
            in_turn=mesh.size > 1,
        )

    def rows_of(batch: Batch) -> jax.Array:
        """The place in the global batch of each row [M, R]; -1 for those without."""
        row = jnp.arange(batch["label"].shape[1])
        return jnp.where(
            row < examples, jnp.arange(parts)[:, None] * examples + row, -1
        )

    def constrain(tree: Any) -> Any:
        return jax.lax.with_sharding_constraint(tree, shardings(tree, mesh, config))

    def whole(tree: Any) -> Any:
        return jax.lax.with_sharding_constraint(tree, replicated(mesh))

    def value_and_grad(params, *args):
        result, grads = jax.value_and_grad(loss_fn, has_aux=True)(params, *args)
        # Whole first: a sum over all devices of which each keeps its part. Otherwise
        # the partitioner splits activations as the parameters are.
        return result, constrain(whole(grads))

    def add_penalty(params, result):
        (loss, rest), grads = result
        penalty, penalty_grads = jax.value_and_grad(
            lambda params: config.l2_penalty * l2_loss(params)
        )(params)
        grads = jax.tree.map(jnp.add, grads, constrain(penalty_grads))
        return (loss + penalty, rest), grads

    def whole_batch(state: TrainState, batch: Batch):
        """Loss, accuracy, BatchNorm statistics and gradient of the whole batch."""
        key = jax.random.fold_in(jax.random.key(draws), state.step)
        places = rows_of(batch)
        params = whole(state.params)
        if side_by_side:
            # Rows first: they are what is split over the devices.
            batch, places = jax.tree.map(
                lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), (batch, places)
            )
            result = value_and_grad(params, state.batch_stats, key, batch, places)
            return add_penalty(params, result)

        def add(total, part):
            result = value_and_grad(params, state.batch_stats, key, *part)
            return jax.tree.map(jnp.add, total, result), None

        first = jax.tree.map(lambda x: x[0], (batch, places))
        shapes = jax.eval_shape(value_and_grad, params, state.batch_stats, key, *first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, (batch, places))
        (loss, (accuracy, batch_stats)), grads = total
        batch_stats = jax.tree.map(lambda x: x / parts, batch_stats)
        # After the loop: XLA for GPUs moves an all-reduce out of a loop (and so reduces
        # once instead of for every microbatch) only if its result is added to a sum
        # and to nothing else.
        return add_penalty(params, ((loss, (accuracy, batch_stats)), grads))

    def train_step(
        state: TrainState, batch: Batch, go_on: jax.Array | bool = True
    ) -> tuple[TrainState, Metrics]:
        (loss, (accuracy, batch_stats)), grads = whole_batch(state, batch)
        given = {"curvature": curvature(state, batch)} if quadratic else {}
        # The devices over which orthogonalization may share out its work.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            updates, opt_state = tx.update(
                grads, state.opt_state, state.params, value=loss, **given
            )
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if config.average_decay:
            # As TensorFlow's averages: short memory at first.
            ramp = (1 + state.step) / (10 + state.step)
            decay = jnp.minimum(config.average_decay, ramp)
            average = optax.incremental_update(params, average, 1 - decay)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        report, kept = {}, go_on & finite
        if config.optimizer.name in ("nlcg", "nlcg_paper"):
            report = nlcg_optax.diagnostics(opt_state)
        if quadratic:  # where it steps back it has seen to parameters and state itself
            before = nlcg_optax.diagnostics(state.opt_state)["rejected_steps"]
            report["taken_back"] = report["rejected_steps"] - before
            kept = go_on & (finite | (report["taken_back"] > 0))

        def guard(keep: jax.Array, new: Any, old: Any) -> Any:
            return jax.tree.map(lambda new, old: jnp.where(keep, new, old), new, old)

        new_state = TrainState(
            step=guard(kept, state.step + 1, state.step),
            params=guard(kept, params, state.params),
            batch_stats=guard(kept & finite, batch_stats, state.batch_stats),
            opt_state=guard(kept, opt_state, state.opt_state),
            average=guard(kept & finite, average, state.average),
        )
        rate = jnp.asarray(schedule(state.step), jnp.float32)
        metrics = {
            "loss": loss,
            "accuracy": accuracy,
            "grad_norm": grad_norm,
            "update_norm": optax.tree.norm(updates),
            "learning_rate": rate,
            "go_on": kept,
        }
        if report:
            if quadratic:
                coefficients = report.pop("coefficients")
                report |= _by_name(coefficients, config.optimizer.nlcg)
            metrics |= report
            metrics["step_size"] = rate * report.get("base_step", 1.0)
        return constrain(new_state), whole(metrics)

    return train_step


def _by_name(coefficients: jax.Array, options: ConfigDict) -> Metrics:
    """The quadratic model's coefficients: gradient, past steps, residuals."""
    past = len(coefficients) - 1 - options.curvature_residuals
    names = [
        "gradient",
        *(f"past_{i}" for i in range(1, past + 1)),
        *(f"residual_{i}" for i in range(1, options.curvature_residuals + 1)),
    ]
    return {
        f"coefficient_{name}": coefficient
        for name, coefficient in zip(names, coefficients, strict=True)
    }


def curvature_images(config: ConfigDict, mesh: jax.sharding.Mesh) -> int:
    """How many images of each batch tell the curvature, on the devices of ``mesh``."""
    layout = BatchLayout(mesh, config.batch_size, config.microbatches)
    present = np.arange(layout.rows) < layout.examples
    present = np.tile(present, (layout.microbatches, 1))
    return int(np.sum(_every(curvature_stride(config), present, mesh.size)))


def _every(stride: int, x: Any, devices: int) -> Any:
    """The first of every so many rows [M, R, ...] of each device, as rows [N, ...].

    None changes its device: any other choice would gather all that follows.
    """
    if x.shape[1] % devices:
        devices = 1
    x = x.reshape(x.shape[0], devices, -1, *x.shape[2:])[:, :, ::stride]
    return x.swapaxes(0, 1).reshape(-1, *x.shape[3:])


def l2_loss(params: Any) -> jax.Array:
    """Half the squared norm of all but the BatchNorm parameters."""
    penalized = jax.tree.map(
        lambda w, penalize: jnp.sum(jnp.square(w)) if penalize else jnp.zeros([]),
        params,
        models.l2_mask(params),
    )
    return jnp.asarray(0.5 * optax.tree.sum(penalized))


def make_eval_step(
    model: Any, config: ConfigDict, mesh: jax.sharding.Mesh
) -> Callable[[TrainState, Batch], Metrics]:
    """Sums of loss, hits and examples over one batch [1, R, ...], padding masked out.

    Uses the averaged parameters where the run keeps them. Sums over batches divided by
    ``count`` are exact at any batch size.
    """
    normalize = normalizer(config)

    def eval_step(state: TrainState, batch: Batch) -> Metrics:
        variables = _variables_to_evaluate(state, mesh)
        logits = model.apply(variables, normalize(batch["image"][0]), train=False)
        labels, mask = batch["label"][0], batch["mask"][0]
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        hits = (jnp.argmax(logits, -1) == labels).astype(jnp.float32)
        return {
            "loss": jnp.sum(cross_entropy * mask),
            "accuracy": jnp.sum(hits * mask),
            "count": jnp.sum(mask),
        }

    return eval_step


def make_statistics_step(
    model: Any, config: ConfigDict, mesh: jax.sharding.Mesh, batch_size: int
) -> Callable[[TrainState, Batch], Any]:
    """BatchNorm's statistics of one batch [1, R, ...], under the weights evaluated.

    Args:
      model: a Flax module with the attribute ``batch_norm_momentum``.
      config: the whole config of a run.
      mesh: the devices.
      batch_size: images in the batch; the rows after them do not count.

    Returns:
      A function of the state and a batch to what may take ``batch_stats``' place.
    """
    normalize = normalizer(config)
    forgetful = model.clone(batch_norm_momentum=0.0)

    def statistics_step(state: TrainState, batch: Batch) -> Any:
        images = batch["image"][0]
        rows = len(images)
        mask = {"mask": jnp.arange(rows) < batch_size} if rows > batch_size else {}
        variables = _variables_to_evaluate(state, mesh)
        _, updated = forgetful.apply(
            variables, normalize(images), train=True, mutable=["batch_stats"], **mask
        )
        return updated["batch_stats"]

    return statistics_step


def pool_statistics(statistics: Sequence[Any]) -> Any:
    """BatchNorm's statistics of several batches of one size, from those of each.

    The variance is the mean of theirs plus the variance of their means.

    Example:
      >>> batches = [{"mean": np.zeros(1), "var": np.ones(1)}] * 2
      >>> batches += [{"mean": np.full(1, 3.0), "var": np.ones(1)}] * 2
      >>> pool_statistics(batches)
      {'mean': array([1.5]), 'var': array([3.25])}
    """

    def pool(*norms: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        means = np.stack([norm["mean"] for norm in norms])
        variances = np.stack([norm["var"] for norm in norms])
        return {"mean": means.mean(0), "var": variances.mean(0) + means.var(0)}

    def is_norm(node: Any) -> bool:
        return isinstance(node, dict) and "var" in node

    return jax.tree.map(pool, *statistics, is_leaf=is_norm)


def _variables_to_evaluate(state: TrainState, mesh: jax.sharding.Mesh) -> Any:
    params = state.params if state.average is None else state.average
    params = jax.lax.with_sharding_constraint(params, replicated(mesh))
    return {"params": params, "batch_stats": state.batch_stats}

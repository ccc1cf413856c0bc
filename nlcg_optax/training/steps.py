"""The state of a run, and the jit-compiled steps that train and evaluate."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import nlcg_optax
from nlcg_optax import _xla
from nlcg_optax.training import data, models
from nlcg_optax.training.mesh import AXES, BatchLayout, replicated, state_shardings
from nlcg_optax.training.optimizers import curvature_stride
from nlcg_optax.training.run_config import DatasetConfig, RunConfig

Optimizer = optax.GradientTransformation
Shape = tuple[int, ...]
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
    model: Any, tx: Optimizer, config: RunConfig, image_shape: Shape
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
    model: Any, tx: Optimizer, config: RunConfig, image_shape: Shape, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state on the mesh; nothing is allocated."""
    init = make_init(model, tx, config, image_shape)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        shapes = jax.eval_shape(functools.partial(init, config.seed))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        state_shardings(shapes, mesh, config.mesh),
    )


def create_state(
    model: Any, tx: Optimizer, config: RunConfig, image_shape: Shape, mesh: Mesh
) -> TrainState:
    """Initializes a model and its optimizer from ``config.seed``, on the mesh.

    The state is born sharded: no device ever holds more than its part.
    """
    init = functools.partial(make_init(model, tx, config, image_shape), config.seed)
    # It runs once. On a CPU, optimizing it took 14 s for ResNet-8; this way 2 s.
    options = {"xla_backend_optimization_level": 0}
    on_cpu = jax.default_backend() == "cpu"
    with jax.set_mesh(mesh):
        return jax.jit(
            init,
            out_shardings=state_shardings(jax.eval_shape(init), mesh, config.mesh),
            compiler_options=options if on_cpu else None,
        )()


def normalizer(config: DatasetConfig) -> Callable[[jax.Array], jax.Array]:
    """The function that turns uint8 images into the model's float32 input."""
    return {"per_image": data.standardize, "imagenet": data.normalize_imagenet}[
        config.normalization
    ]


def make_train_step(
    model: Any,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: RunConfig,
    mesh: Mesh,
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
    its ``go_on``. But where the curvature chooses the steps, `nlcg_auto` takes the one
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
    seed = config.seed if seed is None else seed
    extended = optax.with_extra_args_support(tx)
    return _TrainStep(model, extended, schedule, config, mesh, augment, seed)


@dataclasses.dataclass(frozen=True, eq=False)
class _TrainStep:
    """The function that :func:`make_train_step` returns, stage by stage."""

    model: Any
    tx: optax.GradientTransformationExtraArgs
    schedule: optax.Schedule
    config: RunConfig
    mesh: Mesh
    augment: bool
    seed: jax.typing.ArrayLike

    def __call__(
        self, state: TrainState, batch: Batch, go_on: jax.Array | bool = True
    ) -> tuple[TrainState, Metrics]:
        """Gradient, update, and what of the new state is kept."""
        auto = self.config.optimizer.name == "nlcg_auto"
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)
        with jax.named_scope("nlcg_gradient"):
            result = self._whole_batch(state, batch, key)
        (loss, (cross_entropy, accuracy, batch_stats)), grads = result
        given = {"curvature": self._curvature(state, batch, key)} if auto else {}
        # The devices over which orthogonalization may share out its work.
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            updates, opt_state = self.tx.update(
                grads, state.opt_state, state.params, value=loss, **given
            )
        params = optax.apply_updates(state.params, updates)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            average=self._average(state, params),
        )
        metrics = {
            "loss": loss,
            "cross_entropy": cross_entropy,
            "accuracy": accuracy,
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            "learning_rate": jnp.asarray(self.schedule(state.step), jnp.float32),
        }
        if report := self._report(state.opt_state, opt_state):
            base_step = report.get("base_step", 1.0)
            metrics |= report
            metrics["step_size"] = metrics["learning_rate"] * base_step
        new_state, metrics["go_on"] = _guarded(new_state, state, metrics, go_on)
        return self._constrain(new_state), self._whole(metrics)

    # --- The loss and its gradient ---

    def _run_model(self, params, batch_stats, key, batch, places, some_empty):
        """Logits and new BatchNorm statistics; some rows may have no example."""
        options = self.config.dataset
        images = self._split_rows(batch["image"])
        with jax.named_scope("nlcg_input"):
            if self.augment:
                images = data.augment(
                    key,
                    images,
                    crop_padding=options.crop_padding,
                    flip=options.flip,
                    places=places,
                    batch_size=self.config.batch_size,
                )
            images = normalizer(options)(images)
        mask = {"mask": places >= 0} if some_empty else {}
        logits, updated = self.model.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
            **mask,
        )
        return logits, updated["batch_stats"]

    def _loss(self, params, batch_stats, key, batch, places):
        """Cross-entropy and accuracy; a microbatch's share in the whole batch's."""
        batch_size, labels = self.config.batch_size, self._split_rows(batch["label"])
        # The model sees a mask only where there are rows without an example.
        real = batch_size if self.config.at_once else self._examples
        some_empty = len(labels) > real
        logits, statistics = self._run_model(
            params, batch_stats, key, batch, places, some_empty
        )
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        hits = (jnp.argmax(logits, -1) == labels).astype(jnp.float32)
        if some_empty:
            cross_entropy = jnp.where(places >= 0, cross_entropy, 0)
            hits = jnp.where(places >= 0, hits, 0)
        loss = jnp.sum(cross_entropy) / batch_size
        return loss, (jnp.sum(hits) / batch_size, statistics)

    def _value_and_grad(self, params, *args):
        result, grads = jax.value_and_grad(self._loss, has_aux=True)(params, *args)
        # Whole first: a sum over all devices of which each keeps its part. Otherwise
        # the partitioner splits activations as the parameters are.
        return result, self._constrain(self._whole(grads))

    def _whole_batch(self, state: TrainState, batch: Batch, key: jax.Array):
        """Loss and gradient; cross-entropy, accuracy and BatchNorm statistics."""
        places, parts = self._places(batch), self.config.microbatches
        params = self._whole(state.params)
        if self.config.at_once:
            # Rows first: they are what is split over the devices.
            batch, places = jax.tree.map(
                lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), (batch, places)
            )
            result = self._value_and_grad(params, state.batch_stats, key, batch, places)
            return self._add_penalty(params, result)

        # In a loop convolutions may be slow on a CPU.
        value_and_grad = _xla.canonical(self._value_and_grad)

        def add(total, part):
            result = value_and_grad(params, state.batch_stats, key, *part)
            return jax.tree.map(jnp.add, total, result), None

        first = jax.tree.map(lambda x: x[0], (batch, places))
        shapes = jax.eval_shape(
            self._value_and_grad, params, state.batch_stats, key, *first
        )
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, (batch, places))
        (loss, (accuracy, batch_stats)), grads = total
        batch_stats = jax.tree.map(lambda x: x / parts, batch_stats)
        # After the loop: XLA for GPUs moves an all-reduce out of a loop (and so reduces
        # once instead of for every microbatch) only if its result is added to a sum
        # and to nothing else.
        return self._add_penalty(params, ((loss, (accuracy, batch_stats)), grads))

    def _add_penalty(self, params, result):
        (cross_entropy, rest), grads = result
        penalty, penalty_grads = jax.value_and_grad(
            lambda params: self.config.l2_penalty * l2_loss(params)
        )(params)
        grads = jax.tree.map(jnp.add, grads, self._constrain(penalty_grads))
        return (cross_entropy + penalty, (cross_entropy, *rest)), grads

    def _curvature(
        self, state: TrainState, batch: Batch, key: jax.Array
    ) -> nlcg_optax.Curvature:
        """That of the loss on some of the images, evenly spaced, and of the penalty."""
        stride = curvature_stride(
            self.config.optimizer.nlcg_auto, self.config.batch_size
        )
        chosen, places = jax.tree.map(
            lambda x: _every(stride, x, self.mesh.size), (batch, self._places(batch))
        )
        present = places >= 0
        some_empty = batch["label"].shape[1] > self._examples

        def outputs_fn(params: Any) -> tuple[jax.Array, Any]:
            params = self._whole(params)
            return self._run_model(
                params, state.batch_stats, key, chosen, places, some_empty
            )

        def mean_loss(logits: jax.Array) -> jax.Array:
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits, chosen["label"]
            )
            return jnp.sum(jnp.where(present, losses, 0)) / jnp.sum(present)

        # All images in several microbatches are another loss than in one batch, where
        # each has BatchNorm statistics of its own.
        same = stride > 1 or self.config.at_once
        return nlcg_optax.gauss_newton(
            outputs_fn,
            mean_loss,
            fraction=1 / stride if same else None,
            l2=self.config.l2_penalty,
            l2_mask=models.l2_mask,
            has_aux=True,
            # On a CPU it takes less, to compile and to run.
            in_turn=self.mesh.size > 1 or jax.default_backend() == "cpu",
        )

    # --- What comes of the update ---

    def _average(self, state: TrainState, params: Any) -> Any:
        if not self.config.average_decay:
            return state.average
        # As TensorFlow's averages: short memory at first.
        ramp = (1 + state.step) / (10 + state.step)
        decay = jnp.minimum(self.config.average_decay, ramp)
        return optax.incremental_update(params, state.average, 1 - decay)

    def _report(self, before: Any, after: Any) -> Metrics:
        """What NLCG tells of the step that led from one optimizer state to another."""
        optimizer = self.config.optimizer
        if optimizer.name not in ("nlcg", "nlcg_auto", "nlcg_paper"):
            return {}
        report = nlcg_optax.diagnostics(after)
        if optimizer.name == "nlcg_auto":
            rejected = nlcg_optax.diagnostics(before)["rejected_steps"]
            report["taken_back"] = report["rejected_steps"] - rejected
            coefficients = report.pop("coefficients")
            report |= _by_name(coefficients, optimizer.nlcg_auto.residuals)
        return report

    # --- Where things lie ---

    @property
    def _examples(self) -> int:
        """Examples of a microbatch."""
        return self.config.batch_size // self.config.microbatches

    def _places(self, batch: Batch) -> jax.Array:
        """The place in the global batch of each row [M, R]; -1 for those without."""
        row = jnp.arange(batch["label"].shape[1])
        first = jnp.arange(self.config.microbatches)[:, None] * self._examples
        return jnp.where(row < self._examples, first + row, -1)

    def _split_rows(self, x: jax.Array) -> jax.Array:
        """Splits the rows over the devices, if they can be."""
        if len(x) % self.mesh.size:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(AXES)))

    def _constrain(self, tree: Any) -> Any:
        return jax.lax.with_sharding_constraint(
            tree, state_shardings(tree, self.mesh, self.config.mesh)
        )

    def _whole(self, tree: Any) -> Any:
        return jax.lax.with_sharding_constraint(tree, replicated(self.mesh))


def _guarded(
    new: TrainState, old: TrainState, metrics: Metrics, go_on: jax.Array | bool
) -> tuple[TrainState, jax.Array]:
    """What of a new state is kept where a step was not finite, and whether to go on."""
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    kept = go_on & finite
    if "taken_back" in metrics:
        # Where it steps back it has seen to parameters and state itself.
        kept = go_on & (finite | (metrics["taken_back"] > 0))
    go_on = kept
    # Not asked anew in the kernel of every array.
    finite, kept = map(_xla.decide_once, (finite, kept))

    def guard(keep: jax.Array, new: Any, old: Any) -> Any:
        return jax.tree.map(lambda new, old: jnp.where(keep, new, old), new, old)

    state = TrainState(
        step=guard(kept, new.step, old.step),
        params=guard(kept, new.params, old.params),
        batch_stats=guard(kept & finite, new.batch_stats, old.batch_stats),
        opt_state=guard(kept, new.opt_state, old.opt_state),
        average=guard(kept & finite, new.average, old.average),
    )
    return state, go_on


def _by_name(coefficients: jax.Array, residuals: int) -> Metrics:
    """The coefficients that the curvature chose: gradient, past steps, residuals."""
    past = len(coefficients) - 1 - residuals
    names = ["gradient", *(f"past_{i + 1}" for i in range(past))]
    names += [f"residual_{i + 1}" for i in range(residuals)]
    return {f"coefficient_{name}": coefficients[i] for i, name in enumerate(names)}


def curvature_images(config: RunConfig, mesh: Mesh) -> int:
    """How many images of each batch tell the curvature, on the devices of ``mesh``."""
    layout = BatchLayout(mesh, config.batch_size, config.microbatches)
    stride = curvature_stride(config.optimizer.nlcg_auto, config.batch_size)
    present = np.arange(layout.rows) < layout.examples
    present = np.tile(present, (layout.microbatches, 1))
    return int(np.sum(_every(stride, present, mesh.size)))


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

    def squares(w: Any, penalize: bool) -> jax.Array:
        return jnp.sum(jnp.square(w)) if penalize else jnp.zeros([])

    penalized = jax.tree.map(squares, params, models.l2_mask(params))
    return jnp.asarray(0.5 * optax.tree.sum(penalized))


def make_eval_step(
    model: Any, config: DatasetConfig, mesh: Mesh
) -> Callable[[TrainState, Batch], Metrics]:
    """Sums of loss, hits and examples over one batch [1, R, ...], padding masked out.

    Uses the averaged parameters where the run keeps them, and otherwise those that the
    optimizer has for it (:func:`nlcg_optax.eval_params`). Sums over batches divided by
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
    model: Any, config: DatasetConfig, mesh: Mesh, batch_size: int
) -> Callable[[TrainState, Batch], Any]:
    """BatchNorm's statistics of one batch [1, R, ...], under the weights evaluated.

    The model is to have the attribute ``batch_norm_momentum``. Rows of the batch after
    `batch_size` images do not count.

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

    return jax.tree.map(
        pool, *statistics, is_leaf=lambda x: isinstance(x, dict) and "var" in x
    )


def _variables_to_evaluate(state: TrainState, mesh: Mesh) -> Any:
    params = state.average
    if params is None:  # that of the optimizer, if it has one
        params = nlcg_optax.eval_params(state.opt_state, state.params)
    params = jax.lax.with_sharding_constraint(params, replicated(mesh))
    return {"params": params, "batch_stats": state.batch_stats}

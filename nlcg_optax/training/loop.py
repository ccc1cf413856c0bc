"""A whole run: data, model, optimizer, steps, evaluation, checkpoints, curves."""

import contextlib
import itertools
import math
import operator
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from nlcg_optax.training import (
    comparison,
    data,
    distributed,
    metrics,
    models,
    optimizers,
    report,
    steps,
)
from nlcg_optax.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    check_config,
    check_shared,
    locked,
    make_folder,
    save_config,
)
from nlcg_optax.training.config import ConfigDict, ConfigError
from nlcg_optax.training.mesh import (
    BatchLayout,
    create_mesh,
    put_replicated,
    replicated,
)


class NonFiniteLossError(ArithmeticError):
    """The loss or its gradient was not finite; what came before is saved."""


class Result(NamedTuple):
    """How a run ended.

    Attributes:
      step: updates made.
      signal: the signal that interrupted the run, or None if it is complete.
      metrics: metrics of the last evaluation, by split.
      state: the last state.
    """

    step: int
    signal: signal.Signals | None
    metrics: dict[str, dict[str, float]]
    state: steps.TrainState


def train_and_evaluate(
    config: ConfigDict, workdir: str | pathlib.Path, verbosity: str = "normal"
) -> Result:
    """Trains as the config says, or goes on with what the folder holds.

    The folder receives ``config.json``, ``metrics.jsonl``, ``tensorboard/``,
    ``curves.png`` and ``checkpoints/``. A run that was stopped, by whatever, goes on
    from its last checkpoint and ends with the same bits as one that was not (on another
    number of devices: the same up to rounding). SIGINT (Ctrl-C) and SIGTERM save a
    checkpoint and end the run in an orderly way.

    Of several processes each calls this with the same arguments, after
    :func:`nlcg_optax.training.distributed.initialize`; the folder is one that all see.

    Args:
      config: see :func:`nlcg_optax.training.config.base_config`.
      workdir: folder of the run, made if need be.
      verbosity: what is printed, see :class:`nlcg_optax.training.report.Report`.

    Raises:
      ConfigError: for a config that cannot be used, or that is not the one of the run
        in the folder; if another run is at work there.
      nlcg_optax.training.data.DataError: if the data cannot be read.
      nlcg_optax.training.checkpoint.CheckpointError: if a checkpoint cannot be read or
        written.
      NonFiniteLossError: if the loss was not finite.
    """
    with contextlib.ExitStack() as held:
        return _run(config, pathlib.Path(workdir), verbosity, held)


def _run(
    config: ConfigDict,
    workdir: pathlib.Path,
    verbosity: str,
    held: contextlib.ExitStack,
) -> Result:
    """:func:`train_and_evaluate`; `held` keeps the folder until it has returned."""
    told: Any = metrics.Silence()
    if distributed.is_first():
        told = report.Report(verbosity)
    told.loading(config)
    if jax.process_count() > 1:
        distributed.check_same_config(config)
    mesh = create_mesh(config)
    _check_without_data(config, mesh)
    other = comparison.load_run(config.compare_with) if config.compare_with else None
    differing = comparison.differing_fields(config, other) if other else []
    check_config(config, workdir)
    # The first process may have to prepare the data for all.
    dataset = distributed.first_alone(lambda: load_dataset(config), "load the data")
    dataset = dataset or load_dataset(config)
    steps_per_epoch, total_steps = _count_steps(config, len(dataset.train))
    schedule = optimizers.create_schedule(config, steps_per_epoch)
    # Noise comes to rule where each step has other images.
    sampled = config.batch_size < len(dataset.train)
    tx = optimizers.create_optimizer(
        config, schedule, models.l2_mask, total_steps if sampled else None
    )
    model = create_model(config, dataset.num_classes)

    def begin() -> None:
        make_folder(workdir)
        held.enter_context(locked(workdir))
        check_config(config, workdir)  # another run may have been here meanwhile
        save_config(config, workdir)

    distributed.first_alone(begin, "begin in --workdir")
    check_shared(workdir)

    checkpoints = Checkpoints(workdir, config.keep_checkpoints)
    start = checkpoints.latest_step() or 0
    described = (model, tx, config, dataset.image_shape, mesh)
    if start:
        state = checkpoints.restore(steps.abstract_state(*described))
    else:
        state = steps.create_state(*described)

    next_batch, step_fn = make_input(config, dataset, model, tx, schedule, mesh, start)
    evaluate = make_evaluation(config, dataset, model, mesh)
    metrics_path = workdir / "metrics.jsonl"
    writer: Any = metrics.Silence()
    if distributed.is_first():
        writer = metrics.MetricsWriter(workdir, resume_step=start)
    told.start(
        report.summary(
            config, dataset, mesh, state, steps_per_epoch, total_steps, start, workdir
        ),
        total=total_steps,
        initial=start,
        steps_per_epoch=steps_per_epoch,
        batch_size=config.batch_size,
    )

    def due(step: int, every_epochs: float) -> bool:
        """Whether a multiple of so many epochs ends with (or within) this step."""
        every = every_epochs * steps_per_epoch
        return step == total_steps or step // every > (step - 1) // every

    def record(step: int, values: Any) -> dict[str, float]:
        """Writes the metrics of a step; raises if it was not finite."""
        row = {name: float(value) for name, value in jax.device_get(values).items()}
        if step % config.log_every_steps == 0 or not _is_finite(row):
            writer.write(step, "train", row)
            told.step(step, row)
        if not _is_finite(row) and not row.get("taken_back"):
            raise NonFiniteLossError(
                f"At step {step:,} the loss was {row['loss']} and the gradient's norm "
                f"{row['grad_norm']}. The state before that step is saved in "
                f"{checkpoints.path}, the metrics in {metrics_path}. Lower "
                "optimizer.learning_rate or lengthen schedule.warmup_epochs, and start "
                "again in another --workdir."
            )
        return row

    def draw_curves() -> None:
        if distributed.is_first():
            metrics.plot_curves(
                metrics.read_metrics(metrics_path),
                workdir / "curves.png",
                f"{config.model.name}, {dataset.name}, {config.optimizer.name}",
                (other.label, other.rows) if other and not differing else None,
            )

    def finish() -> None:
        """Closes everything, whatever fails of it, and draws the curves."""
        with contextlib.ExitStack() as stack:
            stack.callback(draw_curves)
            stack.callback(checkpoints.close)
            stack.callback(told.close)
            stack.callback(writer.close)

    results: dict[str, dict[str, float]] = {}
    step, saved, stopping = start, start, False
    pending: tuple[int, Any] | None = None
    try:
        with distributed.Interrupts() as interrupts, jax.transfer_guard("disallow"):
            clock = time.monotonic()
            while step < total_steps and not stopping:
                batch = next_batch(step)
                waited = time.monotonic() - clock
                if step == start:
                    told.compiling()
                    clock = time.monotonic()
                    memory = step_fn.compile(state, batch)
                    seconds = time.monotonic() - clock
                    told_rows = [report.memory_row(memory, mesh.local_devices[0])]
                    if distributed.is_first() and optimizers.uses_quadratic_model(
                        config
                    ):
                        images = steps.curvature_images(config, mesh)
                        counts = _operations(*described)
                        told_rows.append(report.curvature_row(images, *counts))
                    told.compiled(told_rows, seconds)
                    clock = time.monotonic() - waited
                state, values = step_fn(state, batch)
                step += 1
                # Reading the metrics of the step before keeps the device busy.
                before, pending = pending, (step, values)
                shown = record(*before) if before else None
                evaluation = due(step, config.eval_every_epochs)
                saving = due(step, config.checkpoint_every_epochs)
                if evaluation or saving:
                    pending = None
                    shown = record(step, values)
                told.update(shown, time.monotonic() - clock, waited)
                if evaluation:
                    results = evaluate(state)
                    for split, row in results.items():
                        writer.write(step, split, row)
                    writer.flush()
                    told.evaluation(step, shown, results)
                if saving:
                    writer.flush()
                    checkpoints.save(step, state)
                    saved = step
                clock = time.monotonic()
                stopping = interrupts.reached(step)
            if pending:
                last, pending = pending, None
                record(*last)
        if step > saved:
            writer.flush()
            checkpoints.save(step, state)
        finish()
    except BaseException as error:
        # A loss that is not finite is so in all processes. Of another error the others
        # may know nothing, and closing in an orderly way takes all of them.
        if isinstance(error, NonFiniteLossError) or jax.process_count() == 1:
            # Where a file cannot be written, what comes of it is not the news.
            of_files = isinstance(error, CheckpointError | OSError)
            ignored = (CheckpointError, OSError) if of_files else ()
            # Only a step that failed while it ran has used up the state.
            whole = not any(x.is_deleted() for x in jax.tree.leaves(state))
            with contextlib.suppress(*ignored), contextlib.ExitStack() as stack:
                stack.callback(finish)
                if whole and not isinstance(error, CheckpointError):
                    # Even where the metrics cannot be written.
                    stack.callback(checkpoints.save, int(state.step), state)
                    if pending and not isinstance(error, NonFiniteLossError):
                        with contextlib.suppress(NonFiniteLossError):
                            record(*pending)
        raise
    received = interrupts.received if stopping else None
    if received and step < total_steps:
        told.stopped(received.name, step, checkpoints.path)
        return Result(step, received, results, state)
    if not results:  # the run was complete already
        results = evaluate(state)
        told.evaluation(step, None, results)
    if distributed.is_first():
        rows = metrics.read_metrics(metrics_path)
        compared = None
        if other and differing:
            compared = f"not with {other.label}, which had another "
            compared += ", ".join(differing)
        elif other:
            compared = comparison.in_words(rows, other)
        told.end(results, rows, workdir, checkpoints.path, compared)
    return Result(step, None, results, state)


def _operations(
    model: Any,
    tx: optax.GradientTransformation,
    config: ConfigDict,
    image_shape: tuple[int, ...],
    mesh: Mesh,
) -> tuple[float | None, float | None]:
    """Those of a training step, and of one by SGD; None where JAX does not tell.

    Nothing is compiled. All is counted in one microbatch: the count takes the body of a
    loop once.
    """

    def count(config: ConfigDict, tx: Any) -> float | None:
        step = steps.make_train_step(
            model, tx, optax.constant_schedule(0.0), config, mesh, augment=True
        )
        state = steps.abstract_state(model, tx, config, image_shape, mesh)
        rows = BatchLayout(mesh, config.batch_size).rows
        batch = {
            "image": jax.ShapeDtypeStruct((1, rows, *image_shape), jnp.uint8),
            "label": jax.ShapeDtypeStruct((1, rows), jnp.int32),
        }
        return (jax.jit(step).lower(state, batch).cost_analysis() or {}).get("flops")

    whole = config.copy_and_resolve_references()
    whole.microbatches = 1
    plain = whole.copy_and_resolve_references()
    plain.optimizer.name = "sgd"
    return count(whole, tx), count(plain, optax.sgd(0.0))


def _check_without_data(config: ConfigDict, mesh: Mesh) -> None:
    """Raises for what is wrong whatever the data are, before they are downloaded."""
    batch_size, parts = config.batch_size, config.microbatches
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} does not fit: expected 1 or more.")
    if parts < 1 or batch_size % parts:
        near = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
        near = sorted(sorted(near, key=lambda n: abs(n - parts))[:4])
        raise ConfigError(
            f"microbatches={parts} does not divide batch_size={batch_size}; "
            f"{', '.join(map(str, near))} would."
        )
    if batch_size // parts < mesh.size:
        raise ConfigError(
            f"batch_size={batch_size} in {parts} microbatch(es) is less than one image "
            f"for each of {mesh.size} devices: raise batch_size, lower microbatches or "
            "use fewer devices."
        )
    known = ("microbatch", "batch")
    if config.batch_norm_statistics not in known:
        raise ConfigError(
            f"batch_norm_statistics={config.batch_norm_statistics!r} is unknown: "
            f"expected one of {', '.join(map(repr, known))}."
        )
    for name, least in (
        ("seed", 0),
        ("dataset.crop_padding", 0),
        ("eval_batch_size", 1),
        ("log_every_steps", 1),
        ("keep_checkpoints", 1),
    ):
        value = operator.attrgetter(name)(config)
        if value < least:
            raise ConfigError(f"{name}={value} is not valid: expected {least} or more.")
    for name in ("eval_every_epochs", "checkpoint_every_epochs"):
        if not config[name] > 0:
            raise ConfigError(
                f"{name}={config[name]} is not valid: expected more than 0. At the end "
                "of the run it happens in any case: num_epochs is for no other time."
            )
    if (config.precise_batch_norm_batches or 0) < 0:
        raise ConfigError(
            f"precise_batch_norm_batches={config.precise_batch_norm_batches} is not "
            "valid: expected 0 (off) or a number of batches."
        )
    if config.num_epochs <= 0:
        raise ConfigError(f"num_epochs={config.num_epochs} is no step: raise it.")
    # They are made again when the data tell how many steps and classes there are.
    schedule = optimizers.create_schedule(config, steps_per_epoch=1.0)
    optimizers.create_optimizer(config, schedule, models.l2_mask)
    create_model(config, num_classes=2)
    steps.normalizer(config)


def _count_steps(config: ConfigDict, num_train: int) -> tuple[float, int]:
    """Steps of an epoch (a fraction, mostly) and of the run; raises if none fits."""
    batch_size = config.batch_size
    if batch_size > num_train:
        raise ConfigError(
            f"batch_size={batch_size} does not fit: expected 1 to {num_train}, "
            f"the number of training images of {config.dataset.name!r}."
        )
    steps_per_epoch = num_train / batch_size
    total_steps = round(config.num_epochs * steps_per_epoch)
    if total_steps < 1:
        raise ConfigError(
            f"num_epochs={config.num_epochs} of {num_train} images is no step at "
            f"batch_size={batch_size}: raise num_epochs or lower batch_size."
        )
    return steps_per_epoch, total_steps


def load_dataset(config: ConfigDict) -> data.Dataset:
    """Loads the data set that a config names."""
    options = config.dataset
    return data.load(
        options.name,
        data_dir=options.data_dir,
        split_seed=options.split_seed,
        validation_fraction=options.validation_fraction,
        image_size=options.image_size,
        in_memory=options.in_memory,
        max_train_examples=options.max_train_examples,
    )


def create_model(config: ConfigDict, num_classes: int) -> Any:
    """The model that a config names, for so many classes."""
    options = config.model
    try:
        return models.create_model(
            options.name,
            num_classes,
            dtype=options.dtype,
            batch_norm_momentum=options.batch_norm_momentum,
            batch_norm_epsilon=options.batch_norm_epsilon,
            filters=options.filters,
            remat=config.microbatches > 1 and steps.at_once(config),
        )
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


class Update:
    """A jitted training step: a function of the state and its input.

    It returns the new state and the metrics. The state is donated. After a step that
    was not finite all later ones leave the state as it is.

    Args:
      step: the function, of the state, its input, `go_on` and the constants; see
        :func:`nlcg_optax.training.steps.make_train_step`.
      mesh: the devices.
      constants: what it takes beside these.
    """

    def __init__(self, step: Callable[..., Any], mesh: Mesh, *constants: Any):
        """Compiles nothing yet."""
        self._jitted = jax.jit(step, donate_argnums=0)
        self._run: Callable[..., Any] = self._jitted
        self._go_on = put_replicated(np.array(True), mesh)
        self._constants = constants

    def compile(self, state: steps.TrainState, batch: Any) -> Any:
        """Compiles the step for calls with such arguments, and runs nothing.

        Returns:
          What the compiler says of its memory on each device, or None.
        """
        inputs = state, batch, self._go_on, *self._constants
        compiled = self._jitted.lower(*inputs).compile()
        self._run = compiled
        return compiled.memory_analysis()

    def __call__(
        self, state: steps.TrainState, batch: Any
    ) -> tuple[steps.TrainState, steps.Metrics]:
        """Takes the step."""
        state, metrics = self._run(state, batch, self._go_on, *self._constants)
        self._go_on = metrics.pop("go_on")
        return state, metrics


def make_input(
    config: ConfigDict,
    dataset: data.Dataset,
    model: Any,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    start: int,
) -> tuple[Callable[[int], Any], Update]:
    """The two halves of a training step: its input, and the jitted update.

    A split in memory lies on every device, and a batch is the indices of its images; a
    streamed batch is the images themselves, each process reading those that its devices
    work on. Both follow from the step alone.

    Returns:
      A function of the step to its input, and the update of the state by that input.
    """
    split = dataset.train
    layout = BatchLayout(mesh, config.batch_size, config.microbatches)
    augment = not (dataset.streamed and config.dataset.image_size)
    train_step = steps.make_train_step(
        model, tx, schedule, config, mesh, augment=augment
    )
    if dataset.streamed:
        batches = data.stream(
            split,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=start,
            places=layout.places,
            image_size=config.dataset.image_size,
            flip=config.dataset.flip,
            train=True,
        )
        return lambda step: layout.put(next(batches)), Update(train_step, mesh)

    images, labels = put_replicated((split.images, split.labels), mesh)

    def gathering_step(state, indices, go_on, images, labels):
        batch = {"image": images[indices], "label": labels[indices]}
        return train_step(state, batch, go_on)

    def indices(step: int) -> jax.Array:
        chosen = data.batch_indices(step, config.batch_size, len(split), config.seed)
        return layout.put(chosen[layout.places])

    return indices, Update(gathering_step, mesh, images, labels)


def make_evaluation(
    config: ConfigDict, dataset: data.Dataset, model: Any, mesh: Mesh
) -> Callable[[steps.TrainState], dict[str, dict[str, float]]]:
    """The function that evaluates a state on every split but the training one.

    Returns:
      A function from the state to loss and accuracy by split, each example counted
      once. The loss is the cross-entropy alone. With ``precise_batch_norm_batches``
      BatchNorm's statistics are those of so many training batches, the first of the
      run, not augmented (streamed ones are cropped as in training). The state stays as
      it is.
    """
    eval_step = jax.jit(
        steps.make_eval_step(model, config, mesh), out_shardings=replicated(mesh)
    )
    splits = {"validation": dataset.validation, "test": dataset.test}
    # Splits in memory stay on the device from one evaluation to the next.
    held: dict[str, list[Any]] = {}

    def put(name: str, layout: BatchLayout, source: Iterator[Any]) -> Iterator[Any]:
        if dataset.streamed:
            return map(layout.put, source)
        if name not in held:
            held[name] = [layout.put(batch) for batch in source]
        return iter(held[name])

    def batches(name: str, split: data.Split) -> Iterator[Any]:
        # As many images for each device; what there is not is masked.
        size = min(config.eval_batch_size, len(split))
        size = math.ceil(size / mesh.size) * mesh.size
        layout = BatchLayout(mesh, size)
        source = data.eval_batches(
            split, size, places=layout.places, image_size=config.dataset.image_size
        )
        return put(name, layout, source)

    # A microbatch is normalized by itself where training does so.
    size = config.batch_size // (1 if steps.at_once(config) else config.microbatches)
    count = _precise_batches(config, len(dataset.train)) * (config.batch_size // size)
    statistics_step = jax.jit(
        steps.make_statistics_step(model, config, mesh, size),
        out_shardings=replicated(mesh),
    )

    def training_batches(layout: BatchLayout) -> Iterator[Any]:
        split, image_size = dataset.train, config.dataset.image_size
        options: Any = dict(batch_size=size, seed=config.seed)
        if dataset.streamed:
            options |= dict(places=layout.places, flip=config.dataset.flip)
            options |= dict(image_size=image_size)
            return data.stream(split, **options)
        order = (
            data.batch_indices(step, num_examples=len(split), **options)[layout.places]
            for step in itertools.count()
        )
        return ({"image": split.images[indices]} for indices in order)

    def precise(state: steps.TrainState) -> steps.TrainState:
        """The state with BatchNorm's statistics computed anew."""
        layout = BatchLayout(mesh, size)
        source = itertools.islice(training_batches(layout), count)
        statistics = [statistics_step(state, b) for b in put("train", layout, source)]
        pooled = steps.pool_statistics(jax.device_get(statistics))
        return state.replace(batch_stats=put_replicated(pooled, mesh))

    def evaluate(state: steps.TrainState) -> dict[str, dict[str, float]]:
        results = {}
        state = precise(state) if count else state
        for name, split in splits.items():
            if split is None:
                continue
            sums = [eval_step(state, batch) for batch in batches(name, split)]
            total = jax.tree.map(lambda *x: float(sum(x)), *jax.device_get(sums))
            examples = total.pop("count")
            results[name] = {key: value / examples for key, value in total.items()}
        return results

    return evaluate


def _precise_batches(config: ConfigDict, num_train: int) -> int:
    """Training batches that an evaluation takes BatchNorm's statistics from."""
    if config.precise_batch_norm_batches is not None:
        return config.precise_batch_norm_batches
    steps_per_epoch = num_train / config.batch_size
    return math.ceil(steps_per_epoch) if steps_per_epoch <= 10 else 0


def _is_finite(row: dict[str, float]) -> bool:
    return math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])

"""A whole run: data, model, optimizer, steps, evaluation, checkpoints, curves."""

import contextlib
import dataclasses
import functools
import itertools
import math
import pathlib
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

import nlcg_optax
from nlcg_optax.curvature import advice as curvature_advice
from nlcg_optax.training import (
    checkpoint,
    comparison,
    curves,
    data,
    distributed,
    metrics,
    models,
    optimizers,
    profile,
    report,
    steps,
)
from nlcg_optax.training.checkpoint import CheckpointError, Checkpoints
from nlcg_optax.training.config import ConfigDict, ConfigError, typed
from nlcg_optax.training.mesh import (
    BatchLayout,
    create_mesh,
    put_replicated,
    replicated,
)
from nlcg_optax.training.run_config import (
    DatasetConfig,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
)

# What a batch whose size is not set may hold.
_BATCH_PIXELS = 2**21
# By the step after so many a device has warmed up.
_PROFILED = 2


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


def create_model(config: ModelConfig, num_classes: int, remat: bool = False) -> Any:
    """The model of a config, by :func:`nlcg_optax.training.models.create_model`.

    Raises:
      ConfigError: for a name or an option that the model refuses.
    """
    try:
        return models.create_model(num_classes=num_classes, remat=remat, **vars(config))
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def train_and_evaluate(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    verbosity: str = "normal",
    create_model: Callable[..., Any] = create_model,
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
      create_model: makes the model of the config, see the function of that name.

    Raises:
      ConfigError: for a config that cannot be used, or that is not the one of the run
        in the folder; if another run is at work there.
      nlcg_optax.training.data.DataError: if the data cannot be read.
      nlcg_optax.training.checkpoint.CheckpointError: if a checkpoint cannot be read or
        written.
      NonFiniteLossError: if the loss was not finite.
    """
    told: Any = (
        report.Report(verbosity) if distributed.is_first() else metrics.Silence()
    )
    with contextlib.ExitStack() as held:  # the folder, until this has returned
        run = _Run(typed(config), pathlib.Path(workdir), told, create_model, held)
        run.train()
        return run.end()


class _Run:
    """A run: prepared when it is made, then trained, then ended."""

    def __init__(
        self,
        config: RunConfig,
        workdir: pathlib.Path,
        told: Any,
        create_model: Callable[..., Any],
        held: contextlib.ExitStack,
    ):
        """Checks all, loads the data and begins in the folder, which `held` keeps."""
        told.loading(config)
        if jax.process_count() > 1:
            distributed.check_same_config(config)
        mesh = create_mesh(config.mesh)
        _check_without_data(config, mesh, create_model)
        others = comparison.load_runs(config.compare_with)
        differing = [comparison.differing_fields(config, other) for other in others]
        longer_than = checkpoint.check_config(config, workdir)
        # The first process may have to prepare the data for all.
        load = functools.partial(load_dataset, config.dataset)
        dataset = distributed.first_alone(load, "load the data") or load()
        asked = config
        config = _with_batch_size(config, dataset)
        steps_per_epoch, total_steps = _count_steps(config, len(dataset.train))
        schedule = optimizers.create_schedule(config, steps_per_epoch)
        # Noise comes to rule where each step has other images.
        sampled = config.batch_size < len(dataset.train)
        tx = optimizers.create_optimizer(
            config, schedule, models.l2_mask, total_steps if sampled else None
        )
        model = create_model(config.model, dataset.num_classes, remat=config.remat)

        def begin() -> None:
            held.enter_context(checkpoint.locked(workdir))
            # Another run may have been here meanwhile.
            checkpoint.check_config(asked, workdir)
            checkpoint.save_config(asked, workdir)

        distributed.first_alone(begin, "begin in --workdir")
        checkpoint.check_shared(workdir)

        self.config, self.workdir, self.told = config, workdir, told
        pairs = list(zip(others, differing, strict=True))
        self.others = [other for other, fields in pairs if not fields]
        self.incomparable = [(other.label, fields) for other, fields in pairs if fields]
        self.steps_per_epoch, self.total_steps = steps_per_epoch, total_steps
        self.checkpoints = Checkpoints(workdir, config.keep_checkpoints)
        start = self.checkpoints.latest_step() or 0
        for note in self.checkpoints.notes:
            told.line(note, "quiet")
        self.start = self.step = self.saved = start
        self.described = (model, tx, config, dataset.image_shape, mesh)
        if start:
            state = self.checkpoints.restore(steps.abstract_state(*self.described))
        else:
            state = steps.create_state(*self.described)
        self.state: steps.TrainState = state
        self.next_batch, self.step_fn = make_input(
            config, dataset, model, tx, schedule, mesh, start
        )
        # What the optimizer has counted before this run began.
        self.mismatches = 0.0
        if config.optimizer.name == "nlcg_auto":
            before = nlcg_optax.diagnostics(state.opt_state)
            self.mismatches = float(before["loss_mismatch"])
        self.evaluate = make_evaluation(config, dataset, model, mesh)
        self.writer: Any = metrics.Silence()
        if distributed.is_first():
            self.writer = metrics.MetricsWriter(workdir, resume_step=start)
        self.results: dict[str, dict[str, float]] = {}
        self.received: signal.Signals | None = None
        self.pending: tuple[int, Any] | None = None  # whose metrics are not read yet
        rows = report.summary(
            config, dataset, mesh, state, steps_per_epoch, total_steps, start, workdir
        )
        self.title = report.title(config, total_steps, [x.label for x in self.others])
        if not asked.batch_size:
            rows.insert(1 + [name for name, _ in rows].index("batch"), _CHOSEN)
        if longer_than is not None:
            rows.append(report.longer_row(config, longer_than, sampled))
        told.start(rows, total_steps, start, steps_per_epoch, config.batch_size)

    def train(self) -> None:
        """Takes the steps that are left, until a signal comes; saves and closes."""
        try:
            with distributed.Interrupts() as interrupts:
                with jax.transfer_guard("disallow"):
                    self._take_steps(interrupts)
                    self._record_pending()
            if self.step > self.saved:
                self._save()
            self._finish()
        except BaseException as error:
            self._rescue(error)
            raise

    def _take_steps(self, interrupts: distributed.Interrupts) -> None:
        clock, stopping = time.monotonic(), False
        while self.step < self.total_steps and not stopping:
            batch = self.next_batch(self.step)
            waited = time.monotonic() - clock
            if self.step == self.start:
                self._compile(batch)
                clock = time.monotonic() - waited
            self.state, values = self._take_step(batch)
            self.step += 1
            # Reading the metrics of the step before keeps the device busy.
            shown = self._record_pending((self.step, values))
            evaluation = self._due(self.config.eval_every_epochs)
            saving = self._due(self.config.checkpoint_every_epochs)
            if evaluation or saving:
                shown = self._record_pending()
            self.told.update(shown, time.monotonic() - clock, waited)
            if evaluation:
                self.results = self.evaluate(self.state)
                for split, row in self.results.items():
                    self.writer.write(self.step, split, row)
                self.writer.flush()
                self.told.evaluation(self.step, shown, self.results)
            if saving:
                self._save()
            clock = time.monotonic()
            stopping = interrupts.reached(self.step)
        self.received = interrupts.received if stopping else None

    def _take_step(self, batch: Any) -> tuple[steps.TrainState, steps.Metrics]:
        """Takes a step, and tells of the third where its time goes."""
        third = self.step == self.start + _PROFILED
        if not third or not distributed.is_first() or not self.told.profiles:
            return self.step_fn(self.state, batch)
        try:
            result, words = self.step_fn.profile(self.state, batch)
        except (
            OSError,
            RuntimeError,
        ) as error:  # somebody else's profile is being taken
            if any(x.is_deleted() for x in jax.tree.leaves(self.state)):
                raise  # no: the step itself failed
            result, words = self.step_fn(self.state, batch), f"not measured: {error}"
        self.told.profiled(words)
        return result

    def _compile(self, batch: Any) -> None:
        """Compiles the step, and tells what it takes."""
        *_, mesh = self.described
        self.told.compiling()
        clock = time.monotonic()
        memory = self.step_fn.compile(self.state, batch)
        seconds = time.monotonic() - clock
        rows = [report.memory_row(memory, mesh.local_devices[0])]
        if distributed.is_first() and self.config.optimizer.name == "nlcg_auto":
            images = steps.curvature_images(self.config, mesh)
            rows.append(report.curvature_row(images, *_operations(*self.described)))
        self.told.compiled(rows, seconds)

    def _due(self, every_epochs: float) -> bool:
        """Whether a multiple of so many epochs ends with (or within) this step."""
        every, step = every_epochs * self.steps_per_epoch, self.step
        return step == self.total_steps or step // every > (step - 1) // every

    def _record_pending(self, next_one: Any = None) -> dict[str, float] | None:
        last, self.pending = self.pending, next_one
        return self._record(*last) if last else None

    def _record(self, step: int, values: Any) -> dict[str, float]:
        """Writes the metrics of a step; raises if it was not finite."""
        row = {name: float(value) for name, value in jax.device_get(values).items()}
        finite = math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
        if step % self.config.log_every_steps == 0 or not finite:
            self.writer.write(step, "train", row)
            self.told.step(step, row)
        if "loss_mismatch" in row:
            self.told.loss_mismatch(step, row["loss_mismatch"] - self.mismatches)
            self.told.advise(curvature_advice.advice(row, step))
        if not finite and not row.get("taken_back"):
            advice = "Lower optimizer.learning_rate or lengthen schedule.warmup_epochs"
            if self.config.optimizer.name == "nlcg_auto":
                advice = (
                    "There was no step of nlcg_auto to take back: look for what is not "
                    "finite in images, labels, the model or its gradient"
                )
            raise NonFiniteLossError(
                f"At step {step:,} the loss was {row['loss']} and the gradient's norm "
                f"{row['grad_norm']}. The state before that step is saved in "
                f"{self.checkpoints.path}, the metrics in "
                f"{self.workdir / 'metrics.jsonl'}. {advice}, and start "
                "again in another --workdir."
            )
        return row

    def _save(self) -> None:
        self.writer.flush()
        self.checkpoints.save(self.step, self.state)
        self.saved = self.step

    def _finish(self) -> None:
        """Closes everything, whatever fails of it, and draws the curves."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._draw_curves)
            stack.callback(self.checkpoints.close)
            stack.callback(self.told.close)
            stack.callback(self.writer.close)

    def _draw_curves(self) -> None:
        if distributed.is_first():
            rows = metrics.read_metrics(self.workdir / "metrics.jsonl")
            curves.plot_curves(
                rows,
                self.workdir / "curves.png",
                self.title,
                self.config.optimizer.name,
                self.others,
            )

    def _rescue(self, error: BaseException) -> None:
        """Saves what there is after an error, and closes everything."""
        # A loss that is not finite is so in all processes. Of another error the others
        # may know nothing, and closing in an orderly way takes all of them.
        if not isinstance(error, NonFiniteLossError) and jax.process_count() > 1:
            return
        # Where a file cannot be written, what comes of it is not the news.
        of_files = isinstance(error, CheckpointError | OSError)
        ignored = (CheckpointError, OSError) if of_files else ()
        # Only a step that failed while it ran has used up the state.
        whole = not any(x.is_deleted() for x in jax.tree.leaves(self.state))
        with contextlib.suppress(*ignored), contextlib.ExitStack() as stack:
            stack.callback(self._finish)
            if whole and not isinstance(error, CheckpointError):
                # Even where the metrics cannot be written.
                stack.callback(self.checkpoints.save, int(self.state.step), self.state)
                if not isinstance(error, NonFiniteLossError):
                    with contextlib.suppress(NonFiniteLossError):
                        self._record_pending()

    def end(self) -> Result:
        """Tells how it ended."""
        step, told = self.step, self.told
        if self.received and step < self.total_steps:
            told.stopped(self.received.name, step, self.checkpoints.path)
            return Result(step, self.received, self.results, self.state)
        if not self.results:  # the run was complete already
            self.results = self.evaluate(self.state)
            told.evaluation(step, None, self.results)
        if distributed.is_first():
            rows = metrics.read_metrics(self.workdir / "metrics.jsonl")
            compared = [
                f"not with {label}, which had another {', '.join(fields)}"
                for label, fields in self.incomparable
            ]
            if self.others:
                name = self.config.optimizer.name
                compared += comparison.in_words(name, rows, self.others)
            path = self.checkpoints.path
            told.end(self.results, rows, self.workdir, path, compared)
        return Result(step, None, self.results, self.state)


def _operations(
    model: Any, tx: Any, config: RunConfig, image_shape: steps.Shape, mesh: Mesh
) -> tuple[float | None, float | None]:
    """Those of a training step, and of one by SGD; None where JAX does not tell.

    Nothing is compiled. All is counted in one microbatch: the count takes the body of a
    loop once.
    """

    def count(config: RunConfig, tx: Any) -> float | None:
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

    whole = dataclasses.replace(config, microbatches=1)
    sgd = dataclasses.replace(config.optimizer, name="sgd", learning_rate=0.0)
    plain = dataclasses.replace(whole, optimizer=sgd, schedule=ScheduleConfig())
    return count(whole, tx), count(plain, optax.sgd(0.0))


def _check_without_data(
    config: RunConfig, mesh: Mesh, create_model: Callable[..., Any]
) -> None:
    """Raises for what is wrong whatever the data are, before they are downloaded."""
    parts = config.microbatches
    if config.batch_size and config.batch_size // parts < mesh.size:
        raise ConfigError(
            f"batch_size={config.batch_size} in {parts} microbatch(es) is less than "
            f"one image for each of {mesh.size} devices: raise batch_size, lower "
            "microbatches or use fewer devices."
        )
    # They are made again when the data tell how many steps and classes there are.
    schedule = optimizers.create_schedule(config, steps_per_epoch=1.0)
    optimizers.create_optimizer(config, schedule, models.l2_mask)
    create_model(config.model, 2, remat=config.remat)


_CHOSEN = (
    "",
    "(chosen by the images' number and size: --config.batch_size=N sets another)",
)


def _with_batch_size(config: RunConfig, dataset: data.Dataset) -> RunConfig:
    """The config with a batch that fits, if it has none: all images, if they fit."""
    if config.batch_size:
        return config
    pixels = math.prod(dataset.image_shape[:2])
    size = min(len(dataset.train), max(1, _BATCH_PIXELS // pixels))
    size = max(size // config.microbatches, 1) * config.microbatches
    return dataclasses.replace(config, batch_size=size)


def _count_steps(config: RunConfig, num_train: int) -> tuple[float, int]:
    """Steps of an epoch (a fraction, mostly) and of the run; raises if none fits."""
    batch_size = config.batch_size
    if batch_size > num_train:
        raise ConfigError(
            f"batch_size={batch_size} does not fit: expected 1 to {num_train}, "
            f"the number of training images of {config.dataset.name!r}, or 0, where "
            "a batch is chosen by their number and size."
        )
    steps_per_epoch = num_train / batch_size
    total_steps = round(config.num_epochs * steps_per_epoch)
    if total_steps < 1:
        raise ConfigError(
            f"num_epochs={config.num_epochs} of {num_train} images is no step at "
            f"batch_size={batch_size}: raise num_epochs or lower batch_size."
        )
    return steps_per_epoch, total_steps


def load_dataset(config: DatasetConfig) -> data.Dataset:
    """Loads the data set that a config names."""
    later = {"normalization", "crop_padding", "flip"}  # what is done to its images
    return data.load(**{k: x for k, x in vars(config).items() if k not in later})


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

    def profile(self, state: steps.TrainState, batch: Any) -> tuple[Any, str]:
        """Takes a step that was compiled, and says where its time went."""
        taken, results = profile.Profile(), []
        try:
            with taken.trace(self._run):
                results.append(jax.block_until_ready(self(state, batch)))
        except (OSError, RuntimeError) as error:
            if not results:
                raise
            return results[0], f"not measured: {error}"
        return results[0], taken.in_words()

    def __call__(
        self, state: steps.TrainState, batch: Any
    ) -> tuple[steps.TrainState, steps.Metrics]:
        """Takes the step."""
        state, metrics = self._run(state, batch, self._go_on, *self._constants)
        self._go_on = metrics.pop("go_on")
        return state, metrics


def make_input(
    config: RunConfig,
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
      A function of the step (asked for one after the other, from `start` on) to its
      input, and the update of the state by that input.
    """
    layout = BatchLayout(mesh, config.batch_size, config.microbatches)
    augment = not (dataset.streamed and config.dataset.image_size)
    train_step = steps.make_train_step(
        model, tx, schedule, config, mesh, augment=augment
    )
    source = _training_batches(config, dataset, layout, start)
    if dataset.streamed:
        return lambda step: layout.put(next(source)), Update(train_step, mesh)

    split = dataset.train
    images, labels = put_replicated((split.images, split.labels), mesh)

    def gathering_step(state, indices, go_on, images, labels):
        with jax.named_scope("nlcg_input"):
            batch = {"image": images[indices], "label": labels[indices]}
        return train_step(state, batch, go_on)

    update = Update(gathering_step, mesh, images, labels)
    return lambda step: layout.put(next(source)), update


def _training_batches(
    config: RunConfig, dataset: data.Dataset, layout: BatchLayout, start: int = 0
) -> Iterator[Any]:
    """This process's share of the batches from a step on: images, or their indices.

    Indices are those of images in memory.
    """
    size, count = layout.batch_size, len(dataset.train)
    if dataset.streamed:
        return data.stream(
            dataset.train,
            batch_size=size,
            seed=config.seed,
            start_step=start,
            places=layout.places,
            image_size=config.dataset.image_size,
            flip=config.dataset.flip,
        )
    return (
        data.batch_indices(step, size, count, config.seed)[layout.places]
        for step in itertools.count(start)
    )


def make_evaluation(
    config: RunConfig, dataset: data.Dataset, model: Any, mesh: Mesh
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
        steps.make_eval_step(model, config.dataset, mesh),
        out_shardings=replicated(mesh),
    )
    splits = {"validation": dataset.validation, "test": dataset.test}
    # Splits in memory stay on the device from one evaluation to the next.
    held: dict[str, list[Any]] = {}

    def put(name: str, layout: BatchLayout, source: Iterator[Any]) -> Iterable[Any]:
        if dataset.streamed:
            return map(layout.put, source)
        if name not in held:
            held[name] = [layout.put(batch) for batch in source]
        return held[name]

    def batches(name: str, split: data.Split) -> Iterable[Any]:
        # As many images for each device; what there is not is masked.
        size = min(config.eval_batch_size, len(split))
        size = math.ceil(size / mesh.size) * mesh.size
        layout = BatchLayout(mesh, size)
        source = data.eval_batches(
            split, size, places=layout.places, image_size=config.dataset.image_size
        )
        return put(name, layout, source)

    # A microbatch is normalized by itself where training does so.
    parts = 1 if config.at_once else config.microbatches
    size, epoch = config.batch_size // parts, len(dataset.train) / config.batch_size
    precise_batches = config.precise_batch_norm_batches
    if precise_batches is None:
        precise_batches = math.ceil(epoch) if epoch <= 10 else 0
    count = precise_batches * parts
    statistics_step = jax.jit(
        steps.make_statistics_step(model, config.dataset, mesh, size),
        out_shardings=replicated(mesh),
    )

    def precise(state: steps.TrainState) -> steps.TrainState:
        """The state with BatchNorm's statistics computed anew."""
        layout = BatchLayout(mesh, size)
        source = _training_batches(config, dataset, layout)
        if not dataset.streamed:
            images = dataset.train.images
            source = ({"image": images[indices]} for indices in source)
        source = itertools.islice(source, count)
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

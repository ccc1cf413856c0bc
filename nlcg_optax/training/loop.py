"""A whole run: data, model, optimizer, steps, evaluation, checkpoints, curves."""

import contextlib
import math
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import optax

from nlcg_optax.training import data, metrics, models, optimizers, steps
from nlcg_optax.training.checkpoint import Checkpoints, save_config
from nlcg_optax.training.config import ConfigDict, ConfigError


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


def train_and_evaluate(config: ConfigDict, workdir: str | pathlib.Path) -> Result:
    """Trains as the config says, or goes on with what the folder holds.

    The folder receives ``config.json``, ``metrics.jsonl``, ``tensorboard/``,
    ``curves.png`` and ``checkpoints/``. A run that was stopped, by whatever, goes on
    from its last checkpoint and ends with the same bits as one that was not. SIGINT
    (Ctrl-C) and SIGTERM save a checkpoint and end the run in an orderly way.

    Args:
      config: see :func:`nlcg_optax.training.config.base_config`.
      workdir: folder of the run, made if need be.

    Raises:
      ConfigError: for a config that cannot be used, or that is not the one of the run
        in the folder.
      nlcg_optax.training.data.DataError: if the data cannot be read.
      NonFiniteLossError: if the loss was not finite.
    """
    workdir = pathlib.Path(workdir)
    dataset = load_dataset(config)
    num_train = len(dataset.train)
    steps_per_epoch = num_train / max(config.batch_size, 1)
    total_steps = round(config.num_epochs * steps_per_epoch)
    if not 1 <= config.batch_size <= num_train:
        raise ConfigError(
            f"batch_size={config.batch_size} does not fit: expected 1 to {num_train}, "
            f"the number of training images of {dataset.name!r}."
        )
    if total_steps < 1:
        raise ConfigError(
            f"num_epochs={config.num_epochs} of {num_train} images is no step at "
            f"batch_size={config.batch_size}: raise num_epochs or lower batch_size."
        )
    schedule = optimizers.create_schedule(config, steps_per_epoch)
    tx = optimizers.create_optimizer(config, schedule, models.l2_mask)
    model = create_model(config, dataset)
    workdir.mkdir(parents=True, exist_ok=True)
    save_config(config, workdir)

    state = steps.create_state(model, tx, config, dataset.image_shape)
    checkpoints = Checkpoints(workdir, config.keep_checkpoints)
    start = checkpoints.latest_step() or 0
    if start:
        state = checkpoints.restore(state)

    next_batch, step_fn = make_input(config, dataset, model, tx, schedule, start)
    evaluate = make_evaluation(config, dataset, model)
    writer = metrics.MetricsWriter(workdir, resume_step=start)
    progress = metrics.Progress(total_steps, start, config.batch_size)
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    progress.line(
        f"{config.model.name} ({parameters:,} parameters) on {dataset.name} "
        f"({num_train:,} training images, {'×'.join(map(str, dataset.image_shape))}), "
        f"{config.optimizer.name}, batch {config.batch_size:,}, {total_steps:,} steps, "
        f"{jax.device_count()} {jax.devices()[0].platform} device(s)"
    )
    if start:
        progress.line(f"resumed from the checkpoint of step {start:,} in {workdir}")

    def due(step: int, every_epochs: float) -> bool:
        """Whether a multiple of so many epochs ends with (or within) this step."""
        every = every_epochs * steps_per_epoch
        return step == total_steps or step // every > (step - 1) // every

    def record(step: int, values: Any) -> dict[str, float]:
        """Writes the metrics of a step; raises if it was not finite."""
        row = {name: float(value) for name, value in jax.device_get(values).items()}
        if step % config.log_every_steps == 0 or not _is_finite(row):
            writer.write(step, "train", row)
        if not _is_finite(row):
            raise NonFiniteLossError(
                f"At step {step:,} the loss was {row['loss']} and the gradient's norm "
                f"{row['grad_norm']}. The state before that step is saved in "
                f"{checkpoints.path}, the metrics in {writer.path}. Lower "
                "optimizer.learning_rate or lengthen schedule.warmup_epochs, and start "
                "again in another --workdir."
            )
        return row

    results: dict[str, dict[str, float]] = {}
    step = start
    try:
        with _signals() as caught:
            pending = None
            clock = time.monotonic()
            while step < total_steps and not caught:
                state, values = step_fn(state, next_batch(step))
                step += 1
                # Reading the metrics of the step before keeps the device busy.
                shown = record(*pending) if pending else None
                pending = (step, values)
                evaluation = due(step, config.eval_every_epochs)
                saving = due(step, config.checkpoint_every_epochs)
                if evaluation or saving:
                    shown, pending = record(*pending), None
                if evaluation:
                    results = evaluate(state)
                    for split, row in results.items():
                        writer.write(step, split, row)
                    progress.line(_evaluation_line(step, total_steps, shown, results))
                if saving:
                    writer.flush()
                    checkpoints.save(step, state)
                now = time.monotonic()
                progress.update(shown, now - clock)
                clock = now
            if pending:
                record(*pending)
    finally:
        # On the way out of an error too. The state is the last finite one; only a step
        # that failed while it ran has used it up.
        if not any(x.is_deleted() for x in jax.tree.leaves(state)):
            checkpoints.save(int(state.step), state)
        checkpoints.close()
        writer.close()
        progress.close()
        metrics.plot_curves(
            metrics.read_metrics(writer.path),
            workdir / "curves.png",
            f"{config.model.name}, {dataset.name}, {config.optimizer.name}",
        )
    received = caught[0] if caught else None
    if received is not None and step < total_steps:
        progress.line(
            f"{received.name}: stopped after step {step:,} of {total_steps:,}, saved "
            f"in {checkpoints.path}. The same command goes on from there."
        )
        return Result(step, received, results, state)
    if not results:  # the run was complete already
        results = evaluate(state)
        progress.line(_evaluation_line(step, total_steps, None, results))
    progress.line(
        f"done: curves in {workdir / 'curves.png'}, metrics in {writer.path}, "
        f"checkpoint in {checkpoints.path}"
    )
    return Result(step, None, results, state)


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


def create_model(config: ConfigDict, dataset: data.Dataset) -> Any:
    """The model that a config names, for a data set."""
    options = config.model
    try:
        return models.create_model(
            options.name,
            dataset.num_classes,
            dtype=options.dtype,
            batch_norm_momentum=options.batch_norm_momentum,
            batch_norm_epsilon=options.batch_norm_epsilon,
        )
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def make_input(
    config: ConfigDict,
    dataset: data.Dataset,
    model: Any,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    start: int,
) -> tuple[Callable[[int], Any], Callable[..., Any]]:
    """The two halves of a training step: its input, and the jitted update.

    A split in memory lies on the device, and a batch is the indices of its images; a
    streamed batch is the images themselves. Both follow from the step alone.

    Returns:
      A function of the step to its input, and a function of the state and that input to
      the new state and the metrics. The state is donated.
    """
    split = dataset.train
    augment = not (dataset.streamed and config.dataset.image_size)
    train_step = steps.make_train_step(model, tx, schedule, config, augment=augment)
    if dataset.streamed:
        batches = data.stream(
            split,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=start,
            image_size=config.dataset.image_size,
            train=True,
        )
        return (
            lambda step: jax.device_put(next(batches)),
            jax.jit(train_step, donate_argnums=0),
        )

    images, labels = jax.device_put((split.images, split.labels))

    def gathering_step(state, indices, images, labels):
        batch = {"image": images[indices], "label": labels[indices]}
        return train_step(state, batch)

    jitted = jax.jit(gathering_step, donate_argnums=0)

    def indices(step: int) -> jax.Array:
        chosen = data.batch_indices(step, config.batch_size, len(split), config.seed)
        return jax.device_put(chosen)

    return indices, lambda state, chosen: jitted(state, chosen, images, labels)


def make_evaluation(
    config: ConfigDict, dataset: data.Dataset, model: Any
) -> Callable[[steps.TrainState], dict[str, dict[str, float]]]:
    """The function that evaluates a state on every split but the training one.

    Returns:
      A function from the state to loss and accuracy by split, each example counted
      once. The loss is the cross-entropy alone.
    """
    eval_step = jax.jit(steps.make_eval_step(model, config))
    splits = {"validation": dataset.validation, "test": dataset.test}
    # Splits in memory stay on the device from one evaluation to the next.
    held: dict[str, list[Any]] = {}

    def batches(name: str, split: data.Split) -> Iterator[Any]:
        size = min(config.eval_batch_size, len(split))
        source = data.eval_batches(split, size, image_size=config.dataset.image_size)
        if dataset.streamed:
            return map(jax.device_put, source)
        if name not in held:
            held[name] = [jax.device_put(batch) for batch in source]
        return iter(held[name])

    def evaluate(state: steps.TrainState) -> dict[str, dict[str, float]]:
        results = {}
        for name, split in splits.items():
            if split is None:
                continue
            sums = [eval_step(state, batch) for batch in batches(name, split)]
            total = jax.tree.map(lambda *x: float(sum(x)), *jax.device_get(sums))
            count = total.pop("count")
            results[name] = {key: value / count for key, value in total.items()}
        return results

    return evaluate


def _is_finite(row: dict[str, float]) -> bool:
    return math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])


def _evaluation_line(
    step: int,
    total_steps: int,
    train: dict[str, float] | None,
    results: dict[str, dict[str, float]],
) -> str:
    parts = [f"step {step:>{len(f'{total_steps:,}')},} of {total_steps:,}"]
    for name, row in (({"train": train} if train else {}) | results).items():
        parts.append(f"{name} loss {row['loss']:.4f}, accuracy {row['accuracy']:.4f}")
    return "; ".join(parts)


@contextlib.contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Collects SIGINT and SIGTERM, so that the loop can end after a whole step.

    A second signal of the kind acts as it would have without us.
    """
    caught: list[signal.Signals] = []
    previous: dict[signal.Signals, Any] = {}

    def handle(number: int, frame: Any) -> None:
        del frame
        caught.append(signal.Signals(number))
        signal.signal(number, previous[signal.Signals(number)])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handle)
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

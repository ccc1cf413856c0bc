"""What a run tells people: a summary, its progress, and how it ended.

Lines go to standard output, the progress bar to standard error. Both are for people:
programs read ``metrics.jsonl``.
"""

import dataclasses
import datetime
import importlib.metadata
import math
import os
import pathlib
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import jax
import tqdm
from jax.sharding import Mesh

import nlcg_optax
from nlcg_optax.training import compilation_cache, data
from nlcg_optax.training.config import flatten
from nlcg_optax.training.mesh import BatchLayout
from nlcg_optax.training.run_config import RunConfig

VERBOSITIES = ("quiet", "normal", "verbose")

Results = Mapping[str, Mapping[str, float]]  # metrics by split

# A log that shows no bar gets a line of progress at most so often.
_LOG_SECONDS = 60.0

_STYLES = {"bold": "1", "dim": "2", "red": "1;31", "green": "1;32", "yellow": "33"}

_PACKAGES = ("jax", "jaxlib", "optax", "flax", "orbax-checkpoint")


def paint(text: str, style: str, file: TextIO) -> str:
    """The text with the codes of a colour, if `file` is a terminal that shows it.

    ``NO_COLOR`` (any value but an empty one) and ``TERM=dumb`` turn colours off.

    Args:
      text: what to paint.
      style: "bold", "dim", "red", "green" or "yellow".
      file: where it will be written.

    Example:
      >>> import io
      >>> paint("done", "green", io.StringIO())
      'done'
    """
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if plain or not file.isatty():
        return text
    return f"\033[{_STYLES[style]}m{text}\033[0m"


def duration(seconds: float) -> str:
    """A time for people.

    Example:
      >>> duration(4.04), duration(75.2), duration(7500)
      ('4.0 s', '1 min 15 s', '2 h 5 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return "{} min {} s".format(*divmod(round(seconds), 60))
    return "{:,} h {} min".format(*divmod(round(seconds / 60), 60))


def size(count: float) -> str:
    """Bytes for people, in decimal units.

    Example:
      >>> size(888), size(626484), size(999_999), size(83936768), size(1.24e9)
      ('888 B', '626 kB', '1.00 MB', '83.9 MB', '1.24 GB')
    """
    unit = ""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    digits = 0 if unit == "B" or count >= 99.95 else 1 if count >= 9.995 else 2
    return f"{count:.{digits}f} {unit}"


def tensorboard_command(workdir: pathlib.Path) -> str:
    """What to type to watch a run, and what to install for it if need be."""
    command = f"tensorboard --logdir={shlex.quote(str(workdir / 'tensorboard'))}"
    missing = shutil.which("tensorboard") is None
    return command + " (after: pip install tensorboard)" * missing


def bytes_per_device(tree: Any) -> int:
    """Bytes that one device holds of arrays, or of what `jax.eval_shape` made of them.

    Exact, from shapes, dtypes and shardings (which divide every leaf evenly).
    """
    return sum(
        x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))
        for x in jax.tree.leaves(tree)
    )


def summary(
    config: RunConfig,
    dataset: data.Dataset,
    mesh: Mesh,
    state: Any,
    steps_per_epoch: float,
    total_steps: int,
    start: int,
    workdir: pathlib.Path,
) -> list[tuple[str, str]]:
    """What is about to run, from step `start` on, as rows of a name and a text."""
    axes = ", ".join(f"{axis}={n}" for axis, n in mesh.shape.items())
    processes = len({device.process_index for device in mesh.devices.flat})
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    splits = [f"{len(dataset.train):,} training", f"{len(dataset.test):,} test"]
    if dataset.validation is not None:
        splits.insert(1, f"{len(dataset.validation):,} validation")
    shape = "×".join(map(str, dataset.image_shape))
    resumes = f"resumed from the checkpoint of step {start:,}" if start else "a new run"
    if start >= total_steps:
        resumes = f"complete: {resumes}, the last"
    return [
        (
            "devices",
            f"{mesh.size} × {mesh.devices.flat[0].device_kind}, "
            f"{_count(processes, 'process', 'processes')}; mesh {axes}",
        ),
        ("model", f"{config.model.name}, {parameters:,} parameters"),
        (
            "data",
            f"{dataset.name}, {', '.join(splits)} images of {shape}, "
            f"{dataset.num_classes:,} classes"
            + (", read while training" if dataset.streamed else ""),
        ),
        ("batch", _batch(config, mesh)),
        (
            "steps",
            f"{total_steps:,}: {_count(config.num_epochs, 'epoch', 'epochs')} of "
            f"{_count(steps_per_epoch, 'step', 'steps')}",
        ),
        ("optimizer", _optimizer(config)),
        (
            "state",
            f"{size(bytes_per_device(state))} per device: parameters, "
            + ("their average, " if config.average_decay else "")
            + "BatchNorm's statistics, the optimizer's state",
        ),
        ("folder", f"{workdir}: {resumes}"),
        ("cache", compilation_cache.describe()),
        ("watch", tensorboard_command(workdir)),
    ]


def memory_row(analysis: Any, device: Any) -> tuple[str, str]:
    """The row that tells the memory of a step, by its ``memory_analysis()``, if any."""
    if analysis is None:
        return "memory", "not told by this device's compiler"
    held = analysis.argument_size_in_bytes
    held += analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    temporary = analysis.temp_size_in_bytes
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return "memory", (
        f"{size(held + temporary)}{f' of {size(limit)}' if limit else ''} per device "
        f"for a step, as compiled: state and images {size(held)}, activations and "
        f"other temporaries {size(temporary)}"
    )


def curvature_row(
    images: int, operations: float | None, plain: float | None
) -> tuple[str, str]:
    """The row that tells what the products of the curvature add to a training step.

    They are made of so many images of each batch. `operations` are those of a step,
    `plain` those of one by SGD, as far as they are known.
    """
    text = f"of {_count(images, 'image', 'images')} of each batch"
    if operations and plain:
        text += f"; a step takes {operations / plain:.2f} times the operations of SGD's"
    return "curvature", text


def longer_row(config: RunConfig, before: float, sampled: bool) -> tuple[str, str]:
    """The row that tells what becomes of a run with more epochs than it had before.

    Args:
      config: of now.
      before: the epochs that it had.
      sampled: whether a batch is less than all images.
    """
    if config.optimizer.name != "nlcg_auto":
        then = "the learning rates are those of a run that was to be so long"
    elif sampled:
        then = (
            "where noise rules, nlcg_auto now plans for the new end: its rate, which "
            "had fallen, rises again and falls to 0 over the last 45% of all steps"
        )
    else:
        then = "nlcg_auto goes on as a run would that was to be so long"
    return "longer", f"{config.num_epochs:g} epochs in place of {before:g}: {then}"


def title(config: RunConfig, total_steps: int, others: Sequence[str]) -> str:
    """What the picture of a run shows, in words."""
    name, rate = config.optimizer.name, config.optimizer.learning_rate
    rated = "no learning rate" if rate is None else f"learning rate {rate:g}"
    beside = f", beside {' and '.join(others)}" if others else ""
    return (
        f"{config.model.name} on {config.dataset.name}, {total_steps:,} steps of "
        f"{config.batch_size:,} images: {name} ({rated}){beside}"
    )


class Report:
    """Tells about a run: with colours and a bar on a terminal, plainly in a log.

    Args:
      verbosity: "quiet" (warnings, errors and the last line), "normal", or "verbose"
        (versions, the config, every step).
      out: where lines go; standard output by default.
      err: where the bar goes; standard error by default.
    """

    def __init__(
        self,
        verbosity: str = "normal",
        out: TextIO | None = None,
        err: TextIO | None = None,
    ):
        """Shows nothing yet."""
        if verbosity not in VERBOSITIES:
            known = ", ".join(map(repr, VERBOSITIES))
            raise ValueError(
                f"verbosity={verbosity!r} is unknown: expected one of {known}."
            )
        self._level = VERBOSITIES.index(verbosity)
        self._out, self._err = out or sys.stdout, err or sys.stderr
        self._bar: Any = None
        self._total, self._step, self._initial = 0, 0, 0
        self._batch_size, self._steps_per_epoch = 0, 1.0
        self._began = self._told = 0.0
        # Images, and the seconds they took, since a line last told the speed.
        self._images, self._seconds = 0, 0.0
        self._compiling = self._training = 0.0
        self._warned = False
        self._advised: set[str] = set()

    def paint(self, text: str, style: str) -> str:
        """The text in colour where lines go to a terminal."""
        return paint(text, style, self._out)

    def line(self, text: str, verbosity: str = "normal") -> None:
        """Prints a line (above the bar), from that verbosity on."""
        if self._level >= VERBOSITIES.index(verbosity):
            tqdm.tqdm.write(text, file=self._out)
            self._out.flush()

    def table(self, rows: Sequence[tuple[str, str]], width: int = 9) -> None:
        """Prints rows of a name and a text."""
        for name, text in rows:
            self.line(f"  {self.paint(f'{name:<{width}}', 'dim')}  {text}")

    def loading(self, config: RunConfig) -> None:
        """Says that a run begins, and in the verbose case with what."""
        ours = self.paint(f"nlcg-optax {nlcg_optax.__version__}", "bold")
        self.line(f"{ours}: loading {config.dataset.name}")
        if self._level < VERBOSITIES.index("verbose"):
            return
        versions = [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
        now = datetime.datetime.now().astimezone()
        self.table(
            [
                ("started", now.isoformat(" ", "seconds")),
                ("with", f"Python {platform.python_version()}, {', '.join(versions)}"),
            ]
        )
        for field, value in flatten(dataclasses.asdict(config)).items():
            self.line(f"  {self.paint(f'config.{field}', 'dim')} = {value!r}")

    def start(
        self,
        rows: Sequence[tuple[str, str]],
        total: int,
        initial: int,
        steps_per_epoch: float,
        batch_size: int,
    ) -> None:
        """Prints the rows of :func:`summary`; `initial` steps were taken already."""
        self._total, self._initial, self._step = total, initial, initial
        self._steps_per_epoch, self._batch_size = steps_per_epoch, batch_size
        self.table(rows)

    @property
    def profiles(self) -> bool:
        """Whether what a profile tells would be printed."""
        return self._level > 0

    def profiled(self, words: str) -> None:
        """Tells where the time of a step goes."""
        self.line(f"a step: {words}")

    def compiling(self) -> None:
        """Says what the wait is for."""
        self.line(self.paint("  compiling the training step ...", "dim"))

    def compiled(self, rows: Sequence[tuple[str, str]], seconds: float) -> None:
        """Tells what a step takes, as compiled, and starts the bar."""
        self.table([*rows, ("compiled", f"in {duration(seconds)}")])
        self.line("")
        self._compiling = seconds
        self._began = self._told = time.monotonic()
        self._bar = tqdm.tqdm(
            total=self._total,
            initial=self._initial,
            unit="step",
            dynamic_ncols=True,
            file=self._err,
            disable=self._level == 0 or not self._err.isatty(),
            bar_format="{percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{remaining}, "
            "{rate_fmt}{postfix}]",
        )

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tells all the metrics of a step, in the verbose case."""
        values = ", ".join(f"{name} {value:.5g}" for name, value in metrics.items())
        self.line(f"{self._place(step)}: {values}", "verbose")

    def loss_mismatch(self, step: int, count: float) -> None:
        """Warns once, where in most steps loss, gradient and curvature did not fit.

        That was so in `count` of them since the run began, or was resumed.
        """
        steps = step - self._initial
        if not self._warned and count >= 10 and count > steps / 2:
            self._warned = True
            self.line(
                f"{self.paint('warning:', 'yellow')} loss_mismatch: in {count:,.0f} of "
                f"{steps:,} steps loss, gradient and curvature did not fit together. "
                "nlcg_optax.check says what is wrong with them.",
                "quiet",
            )

    def advise(self, found: Sequence[str]) -> None:
        """Warns of what the optimizer's counts say, once of each."""
        for sentence in found:
            name = sentence.split(":")[0]
            if name not in self._advised:
                self._advised.add(name)
                self.line(f"{self.paint('warning:', 'yellow')} {sentence}", "quiet")

    def update(
        self, metrics: Mapping[str, float] | None, seconds: float, waited: float = 0.0
    ) -> None:
        """Advances by one step, which took so many seconds, `waited` of them its input.

        The metrics, if any, are those of that step or the one before.
        """
        self._step += 1
        self._images += self._batch_size
        self._seconds += seconds
        if metrics is not None:
            self._bar.set_postfix_str(
                f"loss {_loss(metrics):.4f}, accuracy {metrics['accuracy']:.4f}, "
                f"{_speed(self._batch_size, seconds)}, "
                f"input {waited / max(seconds, 1e-9):.0%}",
                refresh=False,
            )
        self._bar.update()
        if metrics is None or self._out.isatty() or self._level != 1:
            return
        now = time.monotonic()
        if now - self._told >= _LOG_SECONDS:
            mean = (now - self._began) / (self._step - self._initial)
            left = duration(mean * (self._total - self._step))
            self.line(f"{self._at(self._step, {'train': metrics})}, {left} left")
            self._told = now

    def evaluation(
        self, step: int, train: Mapping[str, float] | None, results: Results
    ) -> None:
        """Tells loss and accuracy of the last step, if any, and of every split."""
        self.line(self._at(step, ({"train": train} if train else {}) | dict(results)))
        self._told = time.monotonic()

    def _at(self, step: int, results: Results) -> str:
        """Where the run is, with the metrics of some splits, and the speed."""
        parts = [
            f"{name} loss {_loss(row):.4f}, accuracy "
            + self.paint(f"{row['accuracy']:.4f}", "bold")
            for name, row in results.items()
        ]
        if self._seconds:
            parts.append(_speed(self._images, self._seconds))
        self._images, self._seconds = 0, 0.0
        return f"{self._place(step)}: {'; '.join(parts)}"

    def _place(self, step: int) -> str:
        epoch = _number(step / self._steps_per_epoch)
        width = len(f"{self._total:,}")
        return f"step {step:>{width},} of {self._total:,} (epoch {epoch})"

    def stopped(self, name: str, step: int, folder: pathlib.Path) -> None:
        """Says that a signal ended the run."""
        self.line(
            f"{self.paint(f'{name}: stopped', 'yellow')} after step {step:,} of "
            f"{self._total:,}, saved in {folder}. The same command goes on from there.",
            "quiet",
        )

    def end(
        self,
        results: Results,
        rows: Sequence[Mapping[str, Any]],
        workdir: pathlib.Path,
        checkpoints: pathlib.Path,
        compared: Sequence[str] = (),
    ) -> None:
        """Says how a complete run ended, by its last evaluation and all its rows.

        And where everything is, and in `compared` how it compares with other runs.
        """
        parts = []
        for split, last in results.items():
            history = [row for row in rows if row["split"] == split]
            text = f"{split} accuracy " + self.paint(f"{last['accuracy']:.4f}", "bold")
            if history:
                best = max(history, key=lambda row: row["accuracy"])
                text += (
                    f" (best {best['accuracy']:.4f} at epoch "
                    f"{_number(best['step'] / self._steps_per_epoch)})"
                )
            parts.append(text)
        steps = self._total - self._initial
        if steps:
            taken = f"{_count(steps, 'step', 'steps')} in {duration(self._training)}"
            parts.append(f"{taken} after {duration(self._compiling)} of compiling")
        done = self.paint("done", "green")
        self.line(f"{done}: {'; '.join(parts)}; all in {workdir}", "quiet")
        self.table(
            [
                *(("compared", sentence) for sentence in compared),
                ("curves", str(workdir / "curves.png")),
                ("metrics", str(workdir / "metrics.jsonl")),
                ("checkpoints", f"{checkpoints}, the last of step {self._total:,}"),
                ("TensorBoard", tensorboard_command(workdir)),
            ],
            width=11,
        )

    def close(self) -> None:
        """Ends the bar, and the time that :meth:`end` tells."""
        self._training = time.monotonic() - self._began
        if self._bar is not None:
            self._bar.close()


def _number(number: float) -> str:
    """With two decimals at most, and no zeros at the end."""
    return f"{number:,.2f}".rstrip("0").rstrip(".")


def _count(number: float, one: str, many: str) -> str:
    return f"{_number(number)} {one if number == 1 else many}"


def _loss(row: Mapping[str, float]) -> float:
    """The cross-entropy alone, as evaluations have it."""
    return row.get("cross_entropy", row["loss"])


def _speed(images: int, seconds: float) -> str:
    rate = images / max(seconds, 1e-9)
    return f"{rate:,.0f} images/s" if rate >= 10 else f"{rate:.2g} images/s"


def _batch(config: RunConfig, mesh: Mesh) -> str:
    parts = config.microbatches
    layout = BatchLayout(mesh, config.batch_size, parts)
    most = "at most " if layout.rows > layout.examples else ""
    here = layout.rows // mesh.size * parts
    text = f"{config.batch_size:,} images, {most}{here:,} per device"
    if parts > 1 and not config.at_once:
        text += f", in {parts:,} parts one after the other"
    return text


def _optimizer(config: RunConfig) -> str:
    optimizer, schedule = config.optimizer, config.schedule
    text = optimizer.name
    if text == "nlcg_auto":
        preconditioner = optimizer.nlcg_auto.preconditioner
        return f"nlcg_auto ({preconditioner}), steps chosen by the curvature"
    if text in ("nlcg", "nlcg_paper"):
        options = getattr(optimizer, text)
        text += f" ({options.beta_rule}, {options.preconditioner})"
    text += f", learning rate {optimizer.learning_rate:g}"
    if schedule.name == "cosine":
        then = "cosine to 0"
    elif schedule.name == "step" and schedule.boundaries:
        epochs = ", ".join(map(_number, schedule.boundaries))
        then = f"divided by {schedule.decay_factor:g} at epoch {epochs}"
    else:
        then = "constant"
    if schedule.warmup_epochs:
        warmup = _count(schedule.warmup_epochs, "epoch", "epochs")
        then = f"warm-up of {warmup}, then {then}"
    return f"{text}; {then}"

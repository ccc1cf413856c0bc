"""The fields of a run, their defaults, and what their values may be.

Files and the command line fill in a `ml_collections.ConfigDict`
(:mod:`nlcg_optax.training.config`). :func:`typed` makes of it the :class:`RunConfig`
that a run is given, which has been checked.
"""

import dataclasses
import types
import typing
from typing import Any


class ConfigError(ValueError):
    """A config file, an override or a value that cannot be used."""


def _check(ok: Any, field: str, value: Any, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{field}={value!r} is not valid: expected {expected}.")


def _check_known(
    field: str, value: Any, known: tuple[str, ...], also: str = ""
) -> None:
    if value not in known:
        names = ", ".join(map(repr, sorted(known) if len(known) > 5 else known))
        raise ConfigError(
            f"{field}={value!r} is unknown: expected one of {names}{also}."
        )


OPTIMIZERS = (
    *("nlcg", "nlcg_auto", "nlcg_paper", "sgd", "momentum", "nesterov"),
    *("rmsprop", "adam", "adamw", "muon", "lars", "lamb"),
)
PRECONDITIONERS = ("orthogonalization", "diagonal_bfgs", "rms", "adam", "none")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """``model``: the network."""

    name: str = "resnet8"  # resnet8, 14, 20, 32, 56 (small images), resnet50
    filters: int | None = None  # of the first stage (16)
    dtype: str = "float32"  # of the computation; parameters are float32
    batch_norm_momentum: float = 0.99
    batch_norm_epsilon: float = 1e-5


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """``dataset``: the images, and what is done to them."""

    name: str = "digits"  # digits, folder, or any TFDS name
    data_dir: str | None = None
    image_size: int | None = None
    in_memory: str = "auto"  # auto, yes, no (stream)
    validation_fraction: float = 0.0  # of the training split, held out
    split_seed: int = 0
    max_train_examples: int | None = None
    normalization: str = "per_image"  # per_image, imagenet
    # Of no effect where images are streamed with image_size: those have other crops.
    crop_padding: int = 4  # random crop after padding; 0 for none
    flip: bool = True  # random horizontal flip

    def __post_init__(self):
        """Checks what needs no data; loading them checks the rest."""
        known = ("per_image", "imagenet")
        _check_known("dataset.normalization", self.normalization, known)
        field, value = "dataset.crop_padding", self.crop_padding
        _check(value >= 0, field, value, "0 or more")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """``mesh``: devices; -1 for those that the other axis leaves."""

    data: int = -1
    fsdp: int = 1  # parameters and optimizer state are split along this axis
    min_size_to_split: int = 2**12  # elements of a leaf


@dataclasses.dataclass(frozen=True)
class NLCGConfig:
    """``optimizer.nlcg``, as of :func:`nlcg_optax.nlcg`, which checks the rest."""

    beta_rule: str = "fletcher_reeves"
    # orthogonalization, diagonal_bfgs, rms, adam, none
    preconditioner: str = "orthogonalization"
    step_rule: str = "step"  # step, online, none
    beta_bounds: tuple[float, float] = (0.0, 0.9)
    nesterov: bool = True
    epsilon: float = 1e-8

    def __post_init__(self):
        """Checks the names."""
        field = "optimizer.nlcg.preconditioner"
        _check_known(field, self.preconditioner, PRECONDITIONERS)
        if self.step_rule == "quadratic_model":
            raise ConfigError(
                "optimizer.nlcg.step_rule='quadratic_model' is an optimizer of its own "
                "now: set optimizer.name=nlcg_auto, whose fields are those of "
                "optimizer.nlcg_auto, and leave optimizer.nlcg as it is."
            )


@dataclasses.dataclass(frozen=True)
class NLCGAutoConfig:
    """``optimizer.nlcg_auto``: NLCG whose step the curvature of the loss chooses."""

    preconditioner: str = "orthogonalization"  # the same choice as for nlcg
    residuals: int = 2  # residual directions: 5 where the part below is all
    # The part of a batch that the products of the curvature are taken on, and of how
    # many images at least (or all of a smaller batch).
    curvature_fraction: float = 0.05
    curvature_min_examples: int = 250

    def __post_init__(self):
        """Checks names and ranges."""
        field = "optimizer.nlcg_auto."
        _check_known(f"{field}preconditioner", self.preconditioner, PRECONDITIONERS)
        for name, ok, expected in (
            ("residuals", self.residuals >= 0, "an integer of at least 0"),
            (
                "curvature_fraction",
                0 < self.curvature_fraction <= 1,
                "a part of the batch, above 0 and up to 1",
            ),
            (
                "curvature_min_examples",
                self.curvature_min_examples >= 1,
                "at least 1 image",
            ),
        ):
            _check(ok, field + name, getattr(self, name), expected)


@dataclasses.dataclass(frozen=True)
class NLCGPaperConfig:
    """``optimizer.nlcg_paper``, as of :func:`nlcg_optax.nlcg_paper`."""

    beta_rule: str = "fletcher_reeves"
    preconditioner: str = "diagonal_bfgs"  # the same choice as for nlcg
    step_rule: str = "step"
    period: int = 5
    threshold: float = 1.0

    def __post_init__(self):
        """Checks the name."""
        field = "optimizer.nlcg_paper.preconditioner"
        _check_known(field, self.preconditioner, PRECONDITIONERS)


@dataclasses.dataclass(frozen=True)
class RmspropConfig:
    """``optimizer.rmsprop``."""

    decay: float = 0.9
    momentum: float = 0.9
    eps: float = 1.0


@dataclasses.dataclass(frozen=True)
class AdamConfig:
    """``optimizer.adam``: also of adamw, lamb, and what Muon leaves to Adam."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8


@dataclasses.dataclass(frozen=True)
class MuonConfig:
    """``optimizer.muon``."""

    beta: float = 0.95
    ns_steps: int = 5
    consistent_rms: float = 0.2


@dataclasses.dataclass(frozen=True)
class LarsConfig:
    """``optimizer.lars``."""

    trust_coefficient: float = 0.001
    eps: float = 0.0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """``optimizer``: which one, and the options of each."""

    # nlcg, nlcg_auto, nlcg_paper, sgd, momentum, nesterov, rmsprop, adam, adamw, muon,
    # lars, lamb
    name: str = "nlcg"
    # The maximum of the schedule. None, for nlcg_auto alone, which has none.
    learning_rate: float | None = 0.1
    momentum: float = 0.9  # of momentum, nesterov, lars
    layerwise_coefficient: float = 0.0  # scale_by_lars before any; 0: off
    nlcg: NLCGConfig = NLCGConfig()
    nlcg_auto: NLCGAutoConfig = NLCGAutoConfig()
    nlcg_paper: NLCGPaperConfig = NLCGPaperConfig()
    rmsprop: RmspropConfig = RmspropConfig()
    adam: AdamConfig = AdamConfig()
    muon: MuonConfig = MuonConfig()
    lars: LarsConfig = LarsConfig()

    def __post_init__(self):
        """Checks the name, and that there is a learning rate if it needs one."""
        _check_known("optimizer.name", self.name, OPTIMIZERS)
        needed = self.name != "nlcg_auto" and self.learning_rate is None
        expected = (
            f"a number, since optimizer.name={self.name} takes steps of that size"
        )
        _check(not needed, "optimizer.learning_rate", None, expected)


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """``schedule``: the learning rate by step."""

    name: str = "step"  # step, cosine, constant; none: for nlcg_auto
    warmup_epochs: float = 0.0
    warmup_power: float = 0.5
    warmup_init: float = 0.0  # as a fraction; 0: the first step is above it
    boundaries: tuple[float, ...] = ()  # epochs at which the rate is divided
    decay_factor: float = 10.0


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All the fields there are, with their defaults: the paper's where it has one."""

    seed: int = 0
    model: ModelConfig = ModelConfig()
    dataset: DatasetConfig = DatasetConfig()

    batch_size: int = 128  # the global batch
    microbatches: int = 1  # parts of a batch, one after the other, to save memory
    # With several microbatches BatchNorm normalizes by the statistics of each
    # ("microbatch"), or by the whole batch's ("batch": more memory and time).
    batch_norm_statistics: str = "microbatch"
    # An evaluation normalizes by the statistics of so many training batches under the
    # weights of then; 0: by running averages, which lag where steps are few. None: all
    # the batches of an epoch if that is at most 10 steps, otherwise 0.
    precise_batch_norm_batches: int | None = None

    mesh: MeshConfig = MeshConfig()
    eval_batch_size: int = 1000
    num_epochs: float = 200.0

    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    l2_penalty: float = 2e-4  # l2_penalty/2·‖w‖² in the loss, without BatchNorm
    weight_decay: float = 0.0  # decoupled, without BatchNorm
    average_decay: float = 0.0  # of the parameters used for evaluation; 0: off

    log_every_steps: int = 1
    eval_every_epochs: float = 1.0
    checkpoint_every_epochs: float = 1.0
    keep_checkpoints: int = 2
    # A run of the same length to draw beside this one: its folder.
    compare_with: str | None = None

    def __post_init__(self):
        """Checks ranges, and what fields ask of each other."""
        size, parts = self.batch_size, self.microbatches
        _check(size >= 1, "batch_size", size, "1 or more")
        if parts < 1 or size % parts:
            near = [n for n in range(1, size + 1) if size % n == 0]
            near = sorted(sorted(near, key=lambda n: abs(n - parts))[:4])
            raise ConfigError(
                f"microbatches={parts} does not divide batch_size={size}; "
                f"{', '.join(map(str, near))} would."
            )
        known = ("microbatch", "batch")
        _check_known("batch_norm_statistics", self.batch_norm_statistics, known)
        leasts = {"seed": 0, "eval_batch_size": 1}
        leasts |= {"log_every_steps": 1, "keep_checkpoints": 1}
        for name, least in leasts.items():
            value = getattr(self, name)
            _check(value >= least, name, value, f"{least} or more")
        for name in ("eval_every_epochs", "checkpoint_every_epochs"):
            value, expected = getattr(self, name), "more than 0. At the end of the run "
            expected += "it happens in any case: num_epochs is for no other time"
            _check(value > 0, name, value, expected)
        batches = self.precise_batch_norm_batches
        expected = "0 (off) or a number of batches"
        _check((batches or 0) >= 0, "precise_batch_norm_batches", batches, expected)
        if self.num_epochs <= 0:
            raise ConfigError(f"num_epochs={self.num_epochs} is no step: raise it.")
        if self.optimizer.name == "nlcg_auto":
            self._check_without_rate()
        else:
            also = "; 'none' is for optimizer.name=nlcg_auto"
            known = ("constant", "cosine", "step")
            _check_known("schedule.name", self.schedule.name, known, also)

    def _check_without_rate(self):
        """Refuses what would do nothing where the curvature chooses the step."""
        optimizer, schedule = self.optimizer, self.schedule
        known = ("none", "constant", "cosine", "step")
        _check_known("schedule.name", schedule.name, known)
        refused, overrides = [], []
        if optimizer.learning_rate not in (None, OptimizerConfig.learning_rate):
            refused.append(f"optimizer.learning_rate={optimizer.learning_rate}")
            overrides.append("--config.optimizer.learning_rate=none")
        if optimizer.layerwise_coefficient:
            value = optimizer.layerwise_coefficient
            refused.append(f"optimizer.layerwise_coefficient={value}")
            overrides.append("--config.optimizer.layerwise_coefficient=0.0")
        if schedule.name != "none" and schedule != ScheduleConfig():
            fields, defaults = map(dataclasses.asdict, (schedule, ScheduleConfig()))
            for name, value in fields.items():
                if value != defaults[name]:
                    refused.append(f"schedule.{name}={value}")
            overrides.append("--config.schedule.name=none")
        if refused:
            raise ConfigError(
                f"{', '.join(refused)} would do nothing with optimizer.name=nlcg_auto, "
                "where the curvature chooses the step: leave out what sets them, or "
                f"add {' '.join(overrides)}."
            )

    @property
    def at_once(self) -> bool:
        """Whether all microbatches go through the model side by side."""
        return self.microbatches == 1 or self.batch_norm_statistics == "batch"


def typed(config: Any) -> RunConfig:
    """The checked config of a run, of the one that files and overrides have filled in.

    Args:
      config: as :func:`nlcg_optax.training.config.base_config`.

    Raises:
      ConfigError: for a value that cannot be used; it names the field.

    Example:
      >>> from nlcg_optax.training.config import base_config
      >>> typed(base_config()) == RunConfig()
      True
    """
    return _group(RunConfig, config, "")


def _group(kind: Any, config: Any, prefix: str) -> Any:
    values = {}
    for name, (hint, optional) in fields_of(kind).items():
        value = config[name]
        if dataclasses.is_dataclass(hint):
            value = _group(hint, value, f"{prefix}{name}.")
        elif isinstance(value, list):
            value = tuple(value)
        elif value is None:
            _check(optional, prefix + name, value, f"a value, {hint.__name__}")
        values[name] = value
    return kind(**values)


def fields_of(kind: Any) -> dict[str, tuple[Any, bool]]:
    """The type of each field of a group, and whether None is a value of it, too."""
    fields = {}
    for name, hint in typing.get_type_hints(kind).items():
        optional = typing.get_origin(hint) is types.UnionType
        hint = typing.get_args(hint)[0] if optional else hint
        fields[name] = hint, optional
    return fields

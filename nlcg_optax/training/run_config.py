"""The fields of a run, their defaults, and what their values may be.

Files and the command line fill in a `ml_collections.ConfigDict`
(:mod:`nlcg_optax.training.config`). :func:`typed` makes of it the :class:`RunConfig`
that a run is given, which has been checked.
"""

import dataclasses
import functools
import types
import typing
from typing import Annotated, Any, Literal


class ConfigError(ValueError):
    """A config file, an override or a value that cannot be used."""


@typing.dataclass_transform(frozen_default=True)
class Group:
    """Frozen dataclasses, whose fields are checked by their types."""

    def __init_subclass__(cls, at: str = ""):
        """Takes the group's own name, with a dot at its end."""
        cls._at = at
        dataclasses.dataclass(frozen=True)(cls)

    def __post_init__(self):
        """Raises for a value that its type does not allow."""
        for name, (kind, optional, known, limits) in fields_of(type(self)).items():
            field, value = self._at + name, getattr(self, name)
            if known and value not in known:
                raise ConfigError(
                    f"{field}={value!r} is unknown: expected one of "
                    f"{', '.join(map(repr, known))}."
                )
            if value is None and not optional:
                limits = [(lambda _: False, f"a value, {kind.__name__}")]
            for holds, expected in limits:
                if not holds(value):
                    raise ConfigError(
                        f"{field}={value!r} is not valid: expected {expected}."
                    )


@functools.cache
def fields_of(group: Any) -> dict[str, tuple[Any, bool, tuple[str, ...], Any]]:
    """Of each field the type, whether it may be None, the names and limits it has."""
    fields = {}
    for name, kind in typing.get_type_hints(group, include_extras=True).items():
        annotated = typing.get_origin(kind) is Annotated
        kind, *limits = typing.get_args(kind) if annotated else (kind,)
        optional = isinstance(kind, types.UnionType)
        kind = typing.get_args(kind)[0] if optional else kind
        origin = typing.get_origin(kind)
        known = typing.get_args(kind) if origin is Literal else ()
        fields[name] = str if known else origin or kind, optional, known, limits
    return fields


Natural = Annotated[int, (lambda x: x >= 0, "0 or more")]
Positive = Annotated[int, (lambda x: x >= 1, "1 or more")]
_INTERVAL = "more than 0. At the end of the run it happens in any case: num_epochs is "
_INTERVAL += "for no other time"
Interval = Annotated[float, (lambda x: x > 0, _INTERVAL)]
Preconditioner = Literal[
    "orthogonalization", "soap", "diagonal_bfgs", "rms", "adam", "none"
]


class ModelConfig(Group, at="model."):
    """``model``: the network."""

    name: str = "resnet8"  # resnet8, 14, 20, 32, 56 (small images), resnet50
    filters: int | None = None  # of the first stage (16)
    dtype: str = "float32"  # of the computation; parameters are float32
    batch_norm_momentum: float = 0.99
    batch_norm_epsilon: float = 1e-5


class DatasetConfig(Group, at="dataset."):
    """``dataset``: the images, and what is done to them."""

    name: str = "digits"  # digits, folder, or any TFDS name
    data_dir: str | None = None
    image_size: int | None = None
    in_memory: str = "auto"  # auto, yes, no (stream)
    validation_fraction: float = 0.0  # of the training split, held out
    split_seed: int = 0
    test_fraction: float | None = None  # of a folder that has no test split
    max_train_examples: int | None = None
    normalization: Literal["per_image", "imagenet"] = "per_image"
    # Of no effect where images are streamed with image_size: those have other crops.
    crop_padding: Natural = 4  # random crop after padding; 0 for none
    flip: bool = True  # random horizontal flip


class MeshConfig(Group, at="mesh."):
    """``mesh``: devices; -1 for those that the other axis leaves."""

    data: int = -1
    fsdp: int = 1  # parameters and optimizer state are split along this axis
    min_size_to_split: int = 2**12  # elements of a leaf


class NLCGConfig(Group, at="optimizer.nlcg."):
    """``optimizer.nlcg``, as of :func:`nlcg_optax.nlcg`, which checks the rest."""

    beta_rule: str = "fletcher_reeves"
    preconditioner: Preconditioner = "orthogonalization"
    step_rule: str = "step"  # step, online, none
    beta_bounds: tuple[float, float] = (0.0, 0.9)
    nesterov: bool = True
    epsilon: float = 1e-8


class NLCGAutoConfig(Group, at="optimizer.nlcg_auto."):
    """``optimizer.nlcg_auto``: NLCG whose step the curvature of the loss chooses."""

    preconditioner: Preconditioner = "orthogonalization"
    # Residual directions: 5 where the part below is all.
    residuals: Annotated[int, (lambda x: x >= 0, "an integer of at least 0")] = 2
    # The part of a batch that the products of the curvature are taken on, and of how
    # many images at least (or all of a smaller batch).
    curvature_fraction: Annotated[
        float, (lambda x: 0 < x <= 1, "a part of the batch, above 0 and up to 1")
    ] = 0.05
    curvature_min_examples: Annotated[int, (lambda x: x >= 1, "at least 1 image")] = 250


class NLCGPaperConfig(Group, at="optimizer.nlcg_paper."):
    """``optimizer.nlcg_paper``, as of :func:`nlcg_optax.nlcg_paper`."""

    beta_rule: str = "fletcher_reeves"
    preconditioner: Preconditioner = "diagonal_bfgs"
    step_rule: str = "step"
    period: int = 5
    threshold: float = 1.0


class RmspropConfig(Group, at="optimizer.rmsprop."):
    """``optimizer.rmsprop``."""

    decay: float = 0.9
    momentum: float = 0.9
    eps: float = 1.0


class AdamConfig(Group, at="optimizer.adam."):
    """``optimizer.adam``: also of adamw, lamb, and what Muon leaves to Adam."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8


class MuonConfig(Group, at="optimizer.muon."):
    """``optimizer.muon``."""

    beta: float = 0.95
    ns_steps: int = 5
    consistent_rms: float = 0.2


class LarsConfig(Group, at="optimizer.lars."):
    """``optimizer.lars``."""

    trust_coefficient: float = 0.001
    eps: float = 0.0


_Ours = Literal["nlcg", "nlcg_auto", "nlcg_paper"]
_Peer = Literal[
    "sgd", "momentum", "nesterov", "rmsprop", "adam", "adamw", "muon", "lars", "lamb"
]


class OptimizerConfig(Group, at="optimizer."):
    """``optimizer``: which one, and the options of each."""

    name: Literal[_Ours, _Peer] = "nlcg"
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


class ScheduleConfig(Group, at="schedule."):
    """``schedule``: the learning rate by step."""

    name: Literal["constant", "cosine", "step", "none"] = "step"  # none: of nlcg_auto
    warmup_epochs: float = 0.0
    warmup_power: float = 0.5
    warmup_init: float = 0.0  # as a fraction; 0: the first step is above it
    boundaries: tuple[float, ...] = ()  # epochs at which the rate is divided
    decay_factor: float = 10.0


class RunConfig(Group):
    """All the fields there are, with their defaults: the paper's where it has one."""

    seed: Natural = 0
    model: ModelConfig = ModelConfig()
    dataset: DatasetConfig = DatasetConfig()

    # The global batch; 0: all training images, or as many as hold two million pixels.
    batch_size: Natural = 128
    microbatches: int = 1  # parts of a batch, one after the other, to save memory
    # With several microbatches BatchNorm normalizes by the statistics of each
    # ("microbatch"), or by the whole batch's ("batch": more memory and time).
    batch_norm_statistics: Literal["microbatch", "batch"] = "microbatch"
    # An evaluation normalizes by the statistics of so many training batches under the
    # weights of then; 0: by running averages, which lag where steps are few. None: all
    # the batches of an epoch if that is at most 10 steps, otherwise 0.
    precise_batch_norm_batches: Annotated[
        int | None, (lambda x: (x or 0) >= 0, "0 (off) or a number of batches")
    ] = None

    mesh: MeshConfig = MeshConfig()
    eval_batch_size: Positive = 1000
    num_epochs: float = 200.0

    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    l2_penalty: float = 2e-4  # l2_penalty/2·‖w‖² in the loss, without BatchNorm
    weight_decay: float = 0.0  # decoupled, without BatchNorm
    average_decay: float = 0.0  # of the parameters used for evaluation; 0: off

    log_every_steps: Positive = 1
    eval_every_epochs: Interval = 1.0
    checkpoint_every_epochs: Interval = 1.0
    keep_checkpoints: Positive = 2
    # Runs of the same length to draw beside this one: their folders, by commas.
    compare_with: str | None = None

    def __post_init__(self):
        """Checks what fields ask of each other."""
        super().__post_init__()
        size, parts = self.batch_size, self.microbatches
        if parts < 1 or size % parts:
            near = [n for n in range(1, size + 1) if size % n == 0]
            near = sorted(sorted(near, key=lambda n: abs(n - parts))[:4])
            raise ConfigError(
                f"microbatches={parts} does not divide batch_size={size}; "
                f"{', '.join(map(str, near))} would."
            )
        if self.num_epochs <= 0:
            raise ConfigError(f"num_epochs={self.num_epochs} is no step: raise it.")
        optimizer = self.optimizer
        if optimizer.nlcg.step_rule == "quadratic_model":
            raise ConfigError(
                "optimizer.nlcg.step_rule='quadratic_model' is an optimizer of its own "
                "now: set optimizer.name=nlcg_auto, whose fields are those of "
                "optimizer.nlcg_auto, and leave optimizer.nlcg as it is."
            )
        if optimizer.name == "nlcg_auto":
            self._check_without_rate()
        elif optimizer.learning_rate is None or self.schedule.name == "none":
            raise ConfigError(
                f"optimizer.learning_rate={optimizer.learning_rate} with schedule.name="
                f"{self.schedule.name!r} is not valid for optimizer.name="
                f"{optimizer.name}: expected a number and a schedule, which nlcg_auto "
                "alone does without."
            )

    def _check_without_rate(self):
        """Refuses what would do nothing where the curvature chooses the step."""
        optimizer, schedule = self.optimizer, self.schedule
        refused, overrides = [], []
        if optimizer.learning_rate not in (None, OptimizerConfig.learning_rate):
            refused.append(f"optimizer.learning_rate={optimizer.learning_rate}")
            overrides.append("--config.optimizer.learning_rate=none")
        if optimizer.layerwise_coefficient:
            value = optimizer.layerwise_coefficient
            refused.append(f"optimizer.layerwise_coefficient={value}")
            overrides.append("--config.optimizer.layerwise_coefficient=0.0")
        if schedule.name != "none" and schedule != ScheduleConfig():
            for name, value in vars(schedule).items():
                if value != getattr(ScheduleConfig, name):
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

    @property
    def remat(self) -> bool:
        """Whether the backward pass computes blocks again, to save their memory."""
        return self.microbatches > 1 and self.at_once


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

    def make(group: Any, config: Any) -> Any:
        values = {}
        for name, (kind, *_) in fields_of(group).items():
            value = config[name]
            if dataclasses.is_dataclass(kind):
                value = make(kind, value)
            values[name] = tuple(value) if isinstance(value, list) else value
        return group(**values)

    return make(RunConfig, config)

"""What the sweep trains, and with what: workloads and optimizers.

A workload is a function that returns a :class:`Workload`; an optimizer is a name and
the config overrides that make it. Add to `WORKLOADS` or `OPTIMIZERS`, and the sweep has
another row.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import gpu
import training_tasks
import untouched_tasks
from protocol import NUM_RATES, TEST_SEEDS

from nlcg_optax.training.config import base_config

# By name: config overrides, and the learning rate in the middle of the grid.
Optimizers = dict[str, tuple[list[str], float]]

NLCG = [
    "optimizer.name=nlcg",
    "optimizer.nlcg.preconditioner=orthogonalization",
    "optimizer.nlcg.beta_bounds=(0.0, 0.9)",
    "optimizer.nlcg.nesterov=True",
]

CURVATURE = ["optimizer.name=nlcg_auto"]

# L2 is in the loss, the same for all; none has decoupled weight decay.
OPTIMIZERS: Optimizers = {
    # The rate is per step, and β = 0.9 makes up to ten of it: low for that reason.
    "nlcg": (NLCG, 0.04),
    "nlcg β=0.9": (
        [
            *(word for word in NLCG if "beta_bounds" not in word),
            "optimizer.nlcg.beta_bounds=(0.9, 0.9)",
        ],
        0.04,
    ),
    "nlcg_paper": (["optimizer.name=nlcg_paper"], 0.4),
    "sgd": (["optimizer.name=sgd"], 0.4),
    "momentum": (["optimizer.name=momentum"], 0.1),
    "nesterov": (["optimizer.name=nesterov"], 0.1),
    "rmsprop": (["optimizer.name=rmsprop"], 0.1),  # the paper's: ε = 1
    "adamw": (["optimizer.name=adamw"], 4e-3),
    # One rate serves BatchNorm's parameters, outside the trust ratio, too: with the
    # usual coefficient of 0.001, one that suits the kernels is far too large for them.
    "lars": (["optimizer.name=lars", "optimizer.lars.trust_coefficient=0.02"], 0.4),
    "lamb": (["optimizer.name=lamb"], 0.02),
    "muon": (["optimizer.name=muon"], 0.02),
    "muon β=0.8": (["optimizer.name=muon", "optimizer.muon.beta=0.8"], 0.04),
    "soap": (["peer.name=soap"], 4e-3),
    "soap β=0.8": (["peer.name=soap", "peer.b1=0.8"], 4e-3),
    "schedule-free adamw": (["peer.name=schedule_free_adamw"], 8e-3),
    "nlcg by curvature": (CURVATURE, 1.0),
    # Where data are few: more of the curvature, for a longer step.
    "nlcg by full curvature": (
        [
            *CURVATURE,
            "optimizer.nlcg_auto.curvature_fraction=1.0",
            "optimizer.nlcg_auto.residuals=5",
        ],
        1.0,
    ),
}

# The curvature chooses the step: there is nothing to tune, and no rate or schedule.
UNTUNED = {"nlcg by curvature", "nlcg by full curvature"}

# Made for a constant rate: they have schedules of their own.
SCHEDULE_FREE = {"schedule-free adamw"}


# With nothing tuned, as a user gets them: Optax's own rate where it has one, 1 where
# its documents say so, the usual one of AdamW, and that of Muon's author.
DEFAULTS: Optimizers = {
    "adamw, 0.001": (["peer.name=adamw"], 1e-3),
    "muon, 0.02": (["peer.name=muon"], 0.02),
    "prodigy": (["peer.name=prodigy"], 1.0),
    "schedule-free adamw, 0.0025": (["peer.name=schedule_free_adamw"], 0.0025),
    "mechanic over adamw": (["peer.name=mechanic_adamw"], 1.0),
    "mechanic over muon": (["peer.name=mechanic_muon"], 1.0),
    "dowg": (["peer.name=dowg"], 1.0),
    "momo-adam": (["peer.name=momo_adam"], 0.01),
}


def _variant(*overrides: str, rate: float = 0.04) -> tuple[list[str], float]:
    """NLCG's default but for some fields of ``optimizer.nlcg``."""
    return [*NLCG, *(f"optimizer.nlcg.{field}" for field in overrides)], rate


# What each part of the default is worth, and what was tried in its place.
ABLATION: Optimizers = {
    "nlcg": OPTIMIZERS["nlcg"],
    "β = 0": _variant("beta_bounds=(0.0, 0.0)", rate=0.16),
    "β = 0.9": _variant("beta_bounds=(0.9, 0.9)"),
    "β ≤ 0.8": _variant("beta_bounds=(0.0, 0.8)"),
    "β ≤ 0.95": _variant("beta_bounds=(0.0, 0.95)", rate=0.02),
    "β ≤ 1": _variant("beta_bounds=(0.0, 1.0)", rate=0.02),
    "Polak–Ribière": _variant("beta_rule=polak_ribiere"),
    "Hestenes–Stiefel": _variant("beta_rule=hestenes_stiefel"),
    "Dai–Yuan": _variant("beta_rule=dai_yuan"),
    "hybrid HS–DY": _variant("beta_rule=hybrid_hs_dy"),
    "Hager–Zhang": _variant("beta_rule=hager_zhang"),
    "Dai–Kou": _variant("beta_rule=dai_kou"),
    "no look-ahead": _variant("nesterov=False"),
    "no step rule": _variant("step_rule=none"),
    "step rule online": _variant("step_rule=online"),
    "preconditioner: none": _variant("preconditioner=none", rate=0.4),
    "preconditioner: BFGS diagonal": _variant("preconditioner=diagonal_bfgs", rate=0.4),
    "preconditioner: RMS": _variant("preconditioner=rms", rate=4e-3),
    "preconditioner: Adam's": _variant("preconditioner=adam", rate=4e-3),
    "nlcg_paper": OPTIMIZERS["nlcg_paper"],
    "muon": OPTIMIZERS["muon"],
}


class Workload(NamedTuple):
    """A data set, a model and a budget.

    Attributes:
      title: of its plots.
      config: everything but the optimizer, learning rate, batch size and schedule.
      batch_sizes: a batch larger than the training set is the whole of it.
      schedules: config overrides by name; the learning rates are compared with the
        first, and the others are tried at the best of them.
      optimizers: those that the sweep compares.
      task: from the config to what is trained.
      steps: by batch size, where not all have the same epochs.
      num_rates: learning rates of the grid to begin with.
      test_seeds: of the runs with what was tuned.
      measured: what the scores and targets are.
      program: what runs it, where that is not the sweep.
    """

    title: str
    config: Any
    batch_sizes: tuple[int, ...]
    schedules: dict[str, list[str]]
    optimizers: Optimizers = OPTIMIZERS
    task: Callable[[Any], training_tasks.Task] = training_tasks.ImageTask
    steps: dict[int, int] | None = None
    num_rates: int = NUM_RATES
    test_seeds: tuple[int, ...] = TEST_SEEDS
    measured: str = "loss of held-out examples"
    program: str | None = None

    def num_steps(self, batch_size: int, num_examples: int) -> int:
        """Of a run that trains on so many examples."""
        if self.steps:
            return self.steps[batch_size]
        batches = num_examples / min(batch_size, num_examples)
        return round(self.config.num_epochs * batches)

    def schedules_of(self, optimizer: str) -> dict[str, list[str]]:
        """Those that are tried with an optimizer."""
        if optimizer not in SCHEDULE_FREE:
            return self.schedules
        epochs = self.config.num_epochs
        count = min(len(self.schedules), len(CONSTANT))
        return {
            f"constant, {name}": _schedule("constant", warmup, epochs)
            for name, warmup in CONSTANT[:count]
        }


# As many as the others have, of what such an optimizer leaves to choose.
CONSTANT = [("warm-up 10%", 0.1), ("no warm-up", 0.0), ("warm-up 30%", 0.3)]


# The middle of the grids where a loss has another scale than that of ResNets, in the
# order in which they are run: of autoencoders, of physics, of language.
CENTRES = {
    "nlcg by curvature": (1.0, 1.0, 1.0),
    "nlcg by full curvature": (1.0, 1.0, 1.0),
    "nlcg": (0.02, 0.16, 0.02),
    "muon": (0.04, 0.08, 0.02),
    "muon β=0.8": (0.08, 0.16, 0.04),
    "adamw": (8e-3, 0.016, 8e-3),
    "soap": (8e-3, 0.016, 4e-3),
    "lars": (0.2, 0.2, 0.4),
    "momentum": (0.02, 0.05, 0.4),
    "nlcg β=0.9": (0.01, 0.08, 0.04),
    "nlcg_paper": (0.05, 0.2, 1.6),
    "soap β=0.8": (8e-3, 0.016, 4e-3),
    "schedule-free adamw": (0.016, 0.032, 8e-3),
    "lamb": (0.02, 0.04, 0.02),
}
AUTOENCODER, PHYSICS, LANGUAGE = (
    {name: (OPTIMIZERS[name][0], rates[i]) for name, rates in CENTRES.items()}
    for i in range(3)
)


# The best rates of `cifar10_jpeg` in 30 steps of all 5,000 images (of its ablation for
# a constant β).
BEST_AT_5000 = {
    "nlcg by curvature": 1.0,
    "nlcg by full curvature": 1.0,
    "muon β=0.8": 0.08,
    "soap β=0.8": 0.032,
    "nlcg": 0.04,
    "nlcg β=0.9": 0.02,
    "muon": 0.04,
    "schedule-free adamw": 0.016,
    "soap": 0.032,
    "lars": 1.6,
    "adamw": 0.016,
    "momentum": 1.6,
    "nlcg_paper": 1.6,
    "lamb": 0.08,
}


def _schedule(name: str, warmup: float, num_epochs: float) -> list[str]:
    return [
        f"schedule.name={name}",
        f"schedule.warmup_epochs={warmup * num_epochs}",
        "schedule.warmup_power=1.0",
        "schedule.warmup_init=0.1",  # from 0 the first step would be for nothing
        f"schedule.boundaries=({0.5 * num_epochs}, {0.75 * num_epochs})",
    ]


def _schedules(num_epochs: float, count: int = 4) -> dict[str, list[str]]:
    def overrides(name: str, warmup: float) -> list[str]:
        return _schedule(name, warmup, num_epochs)

    schedules = {
        "cosine, warm-up 10%": overrides("cosine", 0.1),
        "cosine, no warm-up": overrides("cosine", 0.0),
        "cosine, warm-up 30%": overrides("cosine", 0.3),
        "step, warm-up 10%": overrides("step", 0.1),
    }
    return dict(list(schedules.items())[:count])


def untuned(workload: Workload) -> Workload:
    """The same with :data:`DEFAULTS`, whose rates decay along a cosine or stay."""
    epochs = workload.config.num_epochs
    schedules = {name: _schedule(name, 0.0, epochs) for name in ("constant", "cosine")}
    return workload._replace(optimizers=DEFAULTS, schedules=schedules)


def digits(data_dir: str | None = None) -> Workload:
    """ResNet-8 on scikit-learn's digits, to the whole training set in one batch."""
    del data_dir
    config = base_config()
    config.model.name = "resnet8"
    config.dataset.crop_padding = 1
    config.dataset.flip = False
    config.num_epochs = 60.0
    title = "ResNet-8 on handwritten digits"
    sizes = (64, 192, 512, 720, 1437)
    return Workload(title, config, sizes, _schedules(config.num_epochs))


def cifar10_jpeg(data_dir: str | None = None) -> Workload:
    """A narrow ResNet-8 on 5,000 CIFAR-10 images of 12×12: for two CPU cores."""
    config = base_config()
    config.model.name = "resnet8"
    config.model.filters = 8
    config.dataset.name = "folder"
    config.dataset.data_dir = data_dir
    config.dataset.image_size = 12
    config.dataset.max_train_examples = 5000
    config.dataset.crop_padding = 1
    config.num_epochs = 30.0
    title = "ResNet-8 on 5,000 images of CIFAR-10"
    sizes = (250, 500, 1000, 2500, 5000)
    return Workload(title, config, sizes, _schedules(config.num_epochs))


def cifar10_jpeg_ablation(data_dir: str | None = None) -> Workload:
    """Variants of NLCG on `cifar10_jpeg`, all images in one batch, one schedule."""
    workload = cifar10_jpeg(data_dir)
    schedule = "cosine, no warm-up"
    return workload._replace(
        batch_sizes=workload.batch_sizes[-1:],
        schedules={schedule: workload.schedules[schedule]},
        optimizers=ABLATION,
    )


def cifar10_jpeg_all(data_dir: str | None = None) -> Workload:
    """The same with all 50,000 images: for a GPU, or for days.

    The grids have three rates, around the best that 5,000 images a step have.
    """
    config = cifar10_jpeg(data_dir).config
    config.dataset.max_train_examples = None
    optimizers = {
        name: (OPTIMIZERS[name][0], rate) for name, rate in BEST_AT_5000.items()
    }
    schedules = _schedules(config.num_epochs, 3)
    sizes = (800, 3125, 12_500, 50_000)
    title = "ResNet-8 on all images of CIFAR-10"
    return Workload(title, config, sizes, schedules, optimizers, num_rates=3)


def cifar10_jpeg_draw(data_dir: str | None, number: int) -> Workload:
    """`cifar10_jpeg` at 5,000 with another draw of images: what that draw decides.

    It draws which 5,000 of the 50,000 training images there are, and which of these
    are held out while the rate is tuned. The test images stay the same.
    """
    workload = cifar10_jpeg(data_dir)
    workload.config.dataset.split_seed = number
    names = "nlcg", "muon β=0.8", "lars"  # ours, and the best of the peers
    return workload._replace(
        batch_sizes=workload.batch_sizes[-1:],
        optimizers={name: OPTIMIZERS[name] for name in names},
    )


def _by_steps(
    title: str,
    config: Any,
    task: Any,
    steps: dict[int, int],
    optimizers: Optimizers,
    **budget: Any,
) -> Workload:
    """A workload whose schedules are fractions of so many steps by batch size."""
    config.num_epochs = 1.0
    config.l2_penalty = 0.0
    schedules = _schedules(config.num_epochs, 2)
    sizes = tuple(steps)
    return Workload(title, config, sizes, schedules, optimizers, task, steps, **budget)


def autoencoder(data_dir: str | None = None) -> Workload:
    """A deep autoencoder of scikit-learn's digits."""
    del data_dir
    return _by_steps(
        "An autoencoder of handwritten digits",
        base_config(),
        training_tasks.digits_autoencoder,
        {32: 1800, 128: 600, 512: 240, 1024: 180, 1797: 150},
        AUTOENCODER,
        measured="loss of all training examples",
    )


def autoencoder_cifar(data_dir: str | None = None) -> Workload:
    """A deep autoencoder of 16,384 grey images of 12×12."""
    config = cifar10_jpeg(data_dir).config
    config.dataset.max_train_examples = 16_384
    return _by_steps(
        "An autoencoder of grey images",
        config,
        training_tasks.cifar_autoencoder,
        {256: 1280, 1024: 480, 4096: 200, 16384: 100},
        AUTOENCODER,
    )


def burgers(data_dir: str | None = None) -> Workload:
    """A physics-informed network; there are no smaller batches than all points."""
    del data_dir
    return _by_steps(
        "Burgers' equation by a network",
        base_config(),
        training_tasks.burgers,
        {1: 150},
        PHYSICS,
        measured="training loss",
    )


def tinyshakespeare(data_dir: str | None = None) -> Workload:
    """A small GPT of characters, by batches of 64-character sequences.

    The largest batch takes a core ten minutes a run: the grid has three rates, as long
    as the best is between two others.
    """
    path = pathlib.Path(data_dir or ".") / "tinyshakespeare.txt"
    return _by_steps(
        "A small GPT on Shakespeare's plays",
        base_config(),
        functools.partial(training_tasks.tinyshakespeare, path=path),
        {32: 1536, 128: 512, 512: 192, 2048: 80},
        LANGUAGE,
        num_rates=3,
    )


# The peers of what is run once: the best of the sweep, and what most people use.
ONCE = (
    "nlcg by curvature",
    "muon",
    "muon β=0.8",
    "soap",
    "soap β=0.8",
    "adamw",
    "momentum",
)


def _once(optimizers: Optimizers) -> Optimizers:
    return {name: optimizers[name] for name in ONCE}


def two_digits(data_dir: str | None = None) -> Workload:
    """Pairs of handwritten digits, a hundred classes."""
    del data_dir
    return _by_steps(
        "A hundred classes: pairs of handwritten digits",
        base_config(),
        untouched_tasks.two_digits,
        {64: 1000, 1024: 200},
        _once(LANGUAGE),
    )


def rare_words(data_dir: str | None = None) -> Workload:
    """The next word of Shakespeare's plays, most of the words rare.

    Without SOAP, whose authors give 2,048 words a basis too: a step takes many seconds.
    """
    path = pathlib.Path(data_dir or ".") / "tinyshakespeare.txt"
    optimizers = _once(LANGUAGE)
    return _by_steps(
        "The next word of Shakespeare's plays",
        base_config(),
        functools.partial(untouched_tasks.rare_words, path=path),
        {128: 1000, 1024: 250},
        {name: made for name, made in optimizers.items() if "soap" not in name},
    )


def inpainting(data_dir: str | None = None) -> Workload:
    """The hidden middle of grey images, with outliers, by Huber's loss."""
    config = cifar10_jpeg(data_dir).config
    config.dataset.max_train_examples = 16_384
    return _by_steps(
        "The middle of grey images, with outliers",
        config,
        untouched_tasks.inpainting,
        {64: 1000, 1024: 250},
        _once(AUTOENCODER),
    )


def adding(data_dir: str | None = None) -> Workload:
    """The sum of two marked numbers of a sequence."""
    del data_dir
    return _by_steps(
        "The adding problem by a GRU",
        base_config(),
        untouched_tasks.adding,
        {64: 800, 512: 300},
        _once(AUTOENCODER),
    )


def antiderivative(data_dir: str | None = None) -> Workload:
    """From functions to their integrals."""
    del data_dir
    return _by_steps(
        "Antiderivatives by a DeepONet",
        base_config(),
        untouched_tasks.antiderivative,
        {64: 1000, 1024: 250},
        _once(AUTOENCODER),
    )


def cifar10_jpeg_gpu(data_dir: str | None = None) -> Workload:
    """What `gpu.py` runs: ResNet-32 on all images of 32×32."""
    config = cifar10_jpeg(data_dir).config
    config.num_epochs = float(gpu.EPOCHS)
    optimizers = {name: ([], rate) for name, (_, rate) in gpu.OPTIMIZERS.items()}
    schedules = {gpu.SCHEDULE: []}
    sizes = tuple(sorted(gpu.BATCH_SIZES))
    return Workload(
        "ResNet-32 on CIFAR-10",
        config,
        sizes,
        schedules,
        optimizers,
        program="gpu.py --data=DATA",
    )


WORKLOADS: dict[str, Callable[[str | None], Workload]] = {
    "digits": digits,
    "cifar10_jpeg": cifar10_jpeg,
    "cifar10_jpeg_ablation": cifar10_jpeg_ablation,
    "cifar10_jpeg_draw_1": functools.partial(cifar10_jpeg_draw, number=1),
    "cifar10_jpeg_draw_2": functools.partial(cifar10_jpeg_draw, number=2),
    "cifar10_jpeg_all": cifar10_jpeg_all,
    "autoencoder": autoencoder,
    "autoencoder_cifar": autoencoder_cifar,
    "burgers": burgers,
    "tinyshakespeare": tinyshakespeare,
    "two_digits": two_digits,
    "rare_words": rare_words,
    "inpainting": inpainting,
    "adding": adding,
    "antiderivative": antiderivative,
    "cifar10_jpeg_gpu": cifar10_jpeg_gpu,
}

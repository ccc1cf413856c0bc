"""The command line: ``nlcg-train --config=digits_resnet8 --workdir=runs/a``."""

import argparse
import contextlib
import difflib
import logging
import os
import re
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import nlcg_optax

DEFAULT_CONFIG = "digits_resnet8"

_DESCRIPTION = """\
Trains an image classifier with NLCG, or with a peer of it. The same command again goes
on where the run in its folder stopped.

  %(prog)s --workdir=runs/a
      a ResNet-8 on digits: no download, two minutes on a CPU
  %(prog)s --workdir=runs/b --config=cifar10_resnet32
      another config: --list-configs
  %(prog)s --workdir=runs/c --config.optimizer.name=momentum \\
      --config.optimizer.learning_rate=0.3 --config.schedule.name=cosine
      with other values: any field of the config can be set so
"""

_EPILOG = """\
exit code:
    0  the run is complete, or SIGTERM has stopped it and its progress is saved
    1  something went wrong that is none of the below (a traceback says what)
    2  a mistake in the arguments, the config or the data, or a package is missing
    3  the loss was not finite; what came before is saved
    4  a file cannot be written or read: a full disk, damaged checkpoints or metrics
  130  Ctrl-C has stopped the run and its progress is saved

Lines are printed to standard output, errors and the progress bar to standard error.
Colours and the bar are for terminals alone; NO_COLOR=1 turns colours off.
"""


def main(
    argv: Sequence[str] | None = None, train: Callable[..., Any] | None = None
) -> int:
    """Trains as the command line says.

    Args:
      argv: arguments without the program's name; those of the process by default.
      train: what trains, :func:`nlcg_optax.training.loop.train_and_evaluate` by
        default.

    Returns:
      The exit code, as ``--help`` lists them. Anything else that goes wrong raises; of
      several processes the one that it happens to prints it and ends with 1, which ends
      the others.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    for text, following in zip(rest, [*rest, ""][1:], strict=True):
        if not text.startswith("--config.") or "=" not in text:
            parser.error(_unknown_argument(parser, text, following))
    overrides = [text.removeprefix("--config.") for text in rest]
    listing = args.list_configs or args.list_datasets
    if not args.workdir and not listing:
        parser.error("--workdir=FOLDER is needed: where checkpoints and metrics go")
    numbers = (args.num_processes, args.process_id)
    if args.coordinator is None and numbers != (None, None):
        parser.error("--num_processes and --process_id need --coordinator=HOST:PORT")

    # Late, so that --help and mistakes answer at once.
    try:
        from nlcg_optax.training import (
            checkpoint,
            compilation_cache,
            config,
            data,
            distributed,
            loop,
            metrics,
        )
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "nlcg_optax":
            raise
        print(
            f"error: training needs the package {error.name!r}, which is missing: "
            "pip install 'nlcg-optax[train]'",
            file=sys.stderr,
        )
        return 2

    # What Orbax logs of an error is in ours, as is what its threads say afterwards.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    sys.unraisablehook = _but_for_closed_loops
    if args.list_configs:
        _list_configs()
    if args.list_datasets:
        _list_datasets()
    if listing:
        return 0

    try:
        if args.coordinator is not None:
            distributed.initialize(args.coordinator, *numbers)
    except config.ConfigError as error:
        return _report(error, 2)
    try:
        chosen = config.load_config(args.config)
        config.apply_overrides(chosen, overrides)
        if problem := compilation_cache.enable():
            print(f"warning: {problem}", file=sys.stderr)
        train = train or loop.train_and_evaluate
        result = train(chosen, args.workdir, args.verbosity)
        code = 130 if result.signal == signal.SIGINT else 0
    except (config.ConfigError, data.DataError) as error:
        code = _report(error, 2)
    except loop.NonFiniteLossError as error:
        code = _report(error, 3)
    except (checkpoint.CheckpointError, metrics.MetricsError, OSError) as error:
        code = _report(error, 4)
        _silence()
    except Exception:
        if not _several_processes():
            raise
        traceback.print_exc()
        code = 1
    # A loss that is not finite is so in all processes, and they end together.
    if code not in (0, 3, 130) and _several_processes():
        distributed.end_all(code)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s --workdir=FOLDER [--config=NAME] [--config.FIELD=VALUE ...] "
        "[options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--workdir",
        metavar="FOLDER",
        help="where checkpoints, metrics and curves go, and what a run resumes from",
    )
    parser.add_argument(
        "--config",
        default=DEFAULT_CONFIG,
        metavar="NAME",
        help="a built-in config, or a file that ends in .py (default: %(default)s); a "
        "wrong --config.FIELD=VALUE lists the fields",
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"nlcg-optax {nlcg_optax.__version__}",
        help="print the version, and end",
    )
    lists = parser.add_argument_group("lists, instead of training")
    lists.add_argument(
        "--list-configs", action="store_true", help="the built-in configs"
    )
    lists.add_argument(
        "--list-datasets", action="store_true", help="the data sets there are"
    )
    amount = parser.add_argument_group("how much is printed")
    amount = amount.add_mutually_exclusive_group()
    level: Any = {"dest": "verbosity", "action": "store_const", "default": "normal"}
    text = "warnings, errors and the last line alone"
    amount.add_argument("-q", "--quiet", **level, const="quiet", help=text)
    text = "also versions, the whole config, and every step"
    amount.add_argument("-v", "--verbose", **level, const="verbose", help=text)
    several = parser.add_argument_group(
        "several processes", "The same command is started once for each of them."
    )
    several.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="address of the first process, free there; or 'auto' on a cluster that "
        "tells (Cloud TPU, Slurm, Open MPI, Kubernetes)",
    )
    several.add_argument("--num_processes", type=int, metavar="N", help="how many")
    several.add_argument("--process_id", type=int, metavar="I", help="0 to N - 1")
    return parser


def _unknown_argument(
    parser: argparse.ArgumentParser, text: str, following: str
) -> str:
    """What is wrong with an argument, given the one after it, and what is meant."""
    if text.startswith("--config."):
        value = "VALUE" if following.startswith("-") else following or "VALUE"
        return f"{text} needs '=' and a value: {text}={value}"
    name, _, value = text.partition("=")
    flags = re.findall(r"--[a-z_-]+", parser.format_help())
    near = difflib.get_close_matches(name, sorted({*flags}), n=1, cutoff=0.75)
    if not near and name.startswith("--"):
        with contextlib.suppress(ModuleNotFoundError):  # of the extra [train]
            from nlcg_optax.training import config

            known = config.known_fields(config.base_config())
            fields = config.near_fields(name.lstrip("-"), known)
            near = [f"--config.{field}={value or 'VALUE'}" for field in fields]
    if near:
        return f"unknown argument {text!r}: did you mean {' or '.join(near)}?"
    return f"unknown argument {text!r}: fields are set by --config.FIELD=VALUE"


def _several_processes() -> bool:
    import jax

    # Not by their number: to count them JAX would start its devices.
    return jax.distributed.is_initialized()


def _but_for_closed_loops(unraisable: Any) -> None:
    """Prints what nothing can catch, unless a thread of TensorStore came too late."""
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and "loop is closed" in str(error)):
        sys.__unraisablehook__(unraisable)


def _silence() -> None:
    """Leaves the last word to what was reported.

    Threads of Orbax that cannot write either would follow it by pages of traceback.
    """
    logging.disable(logging.CRITICAL)
    threading.excepthook = sys.unraisablehook = lambda args: None


def _report(error: Exception, code: int) -> int:
    import jax

    from nlcg_optax.training.report import paint

    process = f"process {jax.process_index()}: " if _several_processes() else ""
    label = paint("error:", "red", sys.stderr)
    print(f"{process}{label} {error}", file=sys.stderr)
    return code


def _list_configs() -> None:
    from nlcg_optax.training.config import builtin_configs
    from nlcg_optax.training.report import paint

    configs = builtin_configs()
    for config in configs:
        default = " (the default)" * (config.name == DEFAULT_CONFIG)
        print(paint(config.name, "bold", sys.stdout) + default)
        print(f"  {config.description}")
        print(f"  needs {config.needs}")
    print(
        f"\nThey are files in {configs[0].path.parent}; a copy is the start of your "
        "own: --config=mine.py"
    )


def _list_datasets() -> None:
    from nlcg_optax.training.data import TFDS_DATASETS
    from nlcg_optax.training.report import paint

    def heading(text: str) -> str:
        return paint(text, "bold", sys.stdout)

    folder = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    print(
        f"""\
{heading("digits")}
  1,797 grey images of 8×8 pixels, 10 classes
  needs nothing; read from the installed scikit-learn

{heading("folder")}
  your own images, JPEG or PNG
  needs --config.dataset.data_dir=DIR, and --config.dataset.image_size=PIXELS where
  their sizes differ; read from DIR/train/<class>/ and DIR/test/<class>/ (or val/,
  validation/), or with --config.dataset.test_fraction=0.2 from DIR/<class>/, of which
  a fifth is then held out to test on

{heading("any image classification set of TensorFlow Datasets, by its name there")}
  needs a network for the first run, which downloads and prepares it (for many that
  also takes TensorFlow: pip install tensorflow), or the files that another machine
  has prepared; read from {folder}, or --config.dataset.data_dir=DIR

  pixels    name (classes)"""
    )
    groups: dict[int, list[str]] = {}
    for name, (pixels, classes) in TFDS_DATASETS.items():
        # One is to be broken between names alone.
        text = f"{name} ({classes:,})".replace(" ", "\xa0")
        groups.setdefault(pixels or sys.maxsize, []).append(text)
    for pixels, names in sorted(groups.items()):
        sizes = "differ" if pixels == sys.maxsize else f"{pixels}×{pixels}"
        lines = textwrap.wrap(", ".join(names), 74)
        for size, line in zip([sizes] + [""] * len(lines), lines, strict=False):
            print(f"  {size:<8}  " + line.replace("\xa0", " "))
    print(
        """
  Where they differ, --config.dataset.image_size=PIXELS is needed. The files of
  imagenet2012 must be downloaded by hand. Any other set there will do that has an
  image, a label, and a split to test on.

Choose one by --config.dataset.name=NAME."""
    )

"""The command line: ``examples/train.py --config=configs/x.py --workdir=runs/x``."""

import argparse
import signal
import sys
from collections.abc import Sequence

from nlcg_optax.training.config import ConfigError, apply_overrides, load_config


def main(argv: Sequence[str] | None = None) -> int:
    """Trains as the command line says.

    Args:
      argv: arguments without the program's name; those of the process by default.

    Returns:
      The exit code: 0 when the run is complete or SIGTERM has stopped it with its
      progress saved, 130 after Ctrl-C (saved too), 2 for a mistake in the config or the
      data, 3 for a loss that was not finite.
    """
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Trains a ResNet with NLCG (or a peer) from a config file.",
        epilog="Any field of the config can be set: --config.optimizer.learning_rate="
        "0.5. A name that does not exist lists those that do.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        default="configs/digits_resnet8.py",
        metavar="FILE",
        help="config file (default: %(default)s)",
    )
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="FOLDER",
        help="where checkpoints, metrics and curves go, and what a run resumes from",
    )
    args, rest = parser.parse_known_args(argv)
    overrides = [text.removeprefix("--config.") for text in rest]
    for text in rest:
        if not text.startswith("--config.") or "=" not in text:
            parser.error(
                f"unknown argument {text!r}: set fields by --config.FIELD=VALUE"
            )

    # Late, so that --help and mistakes answer at once.
    from nlcg_optax.training.data import DataError
    from nlcg_optax.training.loop import NonFiniteLossError, train_and_evaluate

    try:
        config = load_config(args.config)
        apply_overrides(config, overrides)
        result = train_and_evaluate(config, args.workdir)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NonFiniteLossError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    return 130 if result.signal == signal.SIGINT else 0

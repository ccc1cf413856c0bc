"""The command line: ``examples/train.py --config=configs/x.py --workdir=runs/x``."""

import argparse
import signal
import sys
import traceback
from collections.abc import Sequence

from nlcg_optax.training.config import ConfigError, apply_overrides, load_config


def main(argv: Sequence[str] | None = None) -> int:
    """Trains as the command line says.

    Args:
      argv: arguments without the program's name; those of the process by default.

    Returns:
      The exit code, 0 when the run is complete or SIGTERM has stopped it with its
      progress saved, 130 after Ctrl-C (saved too), 2 for a mistake in the config or the
      data, 3 for a loss that was not finite, 4 for a file that cannot be written or
      read (a full disk, a damaged checkpoint). Anything else that goes wrong raises; of
      several processes the one that it happens to prints it and ends with 1, which ends
      the others.
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
    args, rest = parser.parse_known_args(argv)
    overrides = [text.removeprefix("--config.") for text in rest]
    for text in rest:
        if not text.startswith("--config.") or "=" not in text:
            parser.error(
                f"unknown argument {text!r}: set fields by --config.FIELD=VALUE"
            )
    numbers = (args.num_processes, args.process_id)
    if args.coordinator is None and numbers != (None, None):
        parser.error("--num_processes and --process_id need --coordinator=HOST:PORT")

    # Late, so that --help and mistakes answer at once.
    from nlcg_optax.training import distributed

    try:
        if args.coordinator is not None:
            distributed.initialize(args.coordinator, *numbers)
        code = _train(args.config, overrides, args.workdir)
    except ConfigError as error:
        return _report(error, 2)
    except Exception:
        if not _several_processes():
            raise
        traceback.print_exc()
        code = 1
    # A loss that is not finite is so in all processes, and they end together.
    if code not in (0, 3, 130) and _several_processes():
        distributed.end_all(code)
    return code


def _train(path: str, overrides: Sequence[str], workdir: str) -> int:
    from nlcg_optax.training.checkpoint import CheckpointError
    from nlcg_optax.training.data import DataError
    from nlcg_optax.training.loop import NonFiniteLossError, train_and_evaluate

    try:
        config = load_config(path)
        apply_overrides(config, overrides)
        result = train_and_evaluate(config, workdir)
    except (ConfigError, DataError) as error:
        return _report(error, 2)
    except NonFiniteLossError as error:
        return _report(error, 3)
    except (CheckpointError, OSError) as error:
        return _report(error, 4)
    return 130 if result.signal == signal.SIGINT else 0


def _several_processes() -> bool:
    import jax

    # Not by their number: to count them JAX would start its devices.
    return jax.distributed.is_initialized()


def _report(error: Exception, code: int) -> int:
    import jax

    process = f"process {jax.process_index()}: " if _several_processes() else ""
    print(f"{process}error: {error}", file=sys.stderr)
    return code

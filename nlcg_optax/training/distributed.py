"""Several processes that train one model, by JAX's own multi-host runtime.

Every process runs the same program. The first one (index 0) alone prints and writes
metrics; all take part in every computation and in every checkpoint.
"""

import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from nlcg_optax.training.config import ConfigError, to_json
from nlcg_optax.training.run_config import RunConfig

# After so long without a sign of life a process counts as dead, and the others end.
_HEARTBEAT_SECONDS = 30

T = TypeVar("T")


def initialize(
    coordinator: str, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the other processes; to be called before anything else of JAX.

    Args:
      coordinator: ``"host:port"`` of the first process, or ``"auto"`` where the cluster
        tells (Cloud TPU, Slurm, Open MPI, Kubernetes; see
        :func:`jax.distributed.initialize`).
      num_processes: how many there are; the cluster tells with ``"auto"``.
      process_id: this one's number, from 0.

    Raises:
      ConfigError: for arguments that do not fit, or if the processes cannot meet.
    """
    automatic = coordinator == "auto"
    if not automatic and (
        num_processes is None or process_id not in range(num_processes)
    ):
        raise ConfigError(
            f"--coordinator={coordinator} needs --num_processes=N and --process_id=I, "
            f"0 <= I < N; they are {num_processes} and {process_id}."
        )
    try:
        jax.distributed.initialize(
            None if automatic else coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"--coordinator={coordinator}: the processes could not meet: {error}"
        ) from error


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def check_same_config(config: RunConfig) -> None:
    """Raises a ConfigError in all processes unless they were given the same config."""
    text = json.dumps(to_json(config), sort_keys=True)
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], np.uint32)
    digests = multihost_utils.process_allgather(digest).reshape(-1, 2)
    other = np.flatnonzero((digests != digests[0]).any(axis=1))
    if other.size:
        raise ConfigError(
            f"Process {', '.join(map(str, other))} was started with another config "
            "than process 0: give all of them the same arguments."
        )


def first_alone(work: Callable[[], T], what: str) -> T | None:
    """Does some work in the first process while the others wait.

    There it returns and raises what the work does. In the others it returns None, and
    raises a RuntimeError if the work failed.
    """
    result, error = None, None
    if is_first():
        try:
            result = work()
        except Exception as caught:
            error = caught
    if jax.process_count() > 1:
        failed = multihost_utils.broadcast_one_to_all(np.int32(error is not None))
        if failed and error is None:
            raise RuntimeError(f"process 0 could not {what}, see its message")
    if error is not None:
        raise error
    return result


def end_all(code: int) -> None:
    """Ends this process of several at once, so that the others notice and end too.

    An orderly exit would wait for the others, who wait for this one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Interrupts:
    """SIGINT and SIGTERM, noted so that a run ends after a whole step.

    With several processes all of them end after the same step, whichever of them was
    signalled. A second signal of the kind acts as it would have without us.

    Example:
      >>> with Interrupts() as interrupts:
      ...     os.kill(os.getpid(), signal.SIGTERM)
      ...     interrupts.reached(step=1), interrupts.received.name
      (True, 'SIGTERM')
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT]
            # SIGTERM is JAX's own where there are several processes.
            numbers += [signal.SIGTERM] if jax.process_count() == 1 else []
            for number in numbers:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *args: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        del frame
        self.received = signal.Signals(number)
        signal.signal(number, self._previous[self.received])
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # which JAX tells all the others

    def reached(self, step: int) -> bool:
        """Whether to stop after this step; all processes are to ask at every step."""
        if jax.process_count() == 1:
            return self.received is not None
        if not multihost_utils.reached_preemption_sync_point(step):
            return False
        self.received = self.received or signal.SIGTERM
        return True

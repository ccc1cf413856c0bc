"""Waiting for other processes: for what they do, and never for so many seconds.

How fast the machine is must not decide a test. The one deadline ends what would hang
for ever.
"""

import time

import jax

HANGING_SECONDS = 3600

# Devices of one process, and several processes, wait for each other too: XLA gives up
# after 40 seconds by default. (Older ones, where that is fixed, know no such flags.)
PATIENT_XLA = (
    " ".join(
        f"--xla_cpu_collective_{name}_seconds={HANGING_SECONDS}"
        for name in ("call_warn_stuck_timeout", "call_terminate_timeout", "timeout")
    )
    if jax.__version_info__ >= (0, 9)
    else ""
)


def wait_for(condition, *processes):
    """Waits until a condition holds, while all of these processes run.

    Args:
      condition: a function without arguments.
      *processes: each a `subprocess.Popen`.
    """
    deadline = time.monotonic() + HANGING_SECONDS
    while not condition():
        for process in processes:
            if process.poll() is not None:
                output = process.communicate()[0]
                raise AssertionError(f"ended with {process.returncode}:\n{output}")
        assert time.monotonic() < deadline, "hangs"
        time.sleep(0.05)

"""Waiting for other processes: for what they do, and never for so many seconds.

How fast the machine is must not decide a test. The one deadline ends what would hang
for ever.
"""

import time

HANGING_SECONDS = 3600


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

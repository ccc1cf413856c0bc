"""XLA's flags under test: it compiles quickly, and waits long."""

import os

import jax
from waiting import HANGING_SECONDS

# XLA does not start with a flag that it does not know: where these are known, no test
# needs them.
_FLAGS = {
    # Compiling is most of what the tests do. Without LLVM's optimizations and without
    # MLIR for fusions it takes a third of the time; what comes before (partitioning,
    # collectives, fusion) stays as it is.
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": "false",
    # Nor is a small program worth 32 modules, to be compiled side by side.
    "xla_cpu_parallel_codegen_split_count": 1,
    # Devices of one process, and several processes, wait for each other. By default XLA
    # gives up after 40 seconds.
    "xla_cpu_collective_call_warn_stuck_timeout_seconds": HANGING_SECONDS,
    "xla_cpu_collective_call_terminate_timeout_seconds": HANGING_SECONDS,
    "xla_cpu_collective_timeout_seconds": HANGING_SECONDS,
}
_KNOWN = (0, 9) <= jax.__version_info__ < (0, 11)

#: What the user has set, which has the last word. Programs that tests start read it in
#: a variable of its own, as theirs has our flags already.
GIVEN = os.environ.setdefault("XLA_FLAGS_GIVEN", os.environ.get("XLA_FLAGS", ""))


def flags(devices=1):
    """The value of XLA_FLAGS, for so many CPU devices."""
    ours = [f"--{name}={value}" for name, value in _FLAGS.items() if _KNOWN]
    count = f"--xla_force_host_platform_device_count={devices}"
    return " ".join([*ours, GIVEN, count])

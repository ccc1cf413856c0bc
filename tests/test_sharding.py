"""On two devices the numbers are those of one."""

import os
import pathlib
import subprocess
import sys

WORKER = pathlib.Path(__file__).with_name("sharded_worker.py")


def test_sharded_equals_whole():
    # Devices are counted when JAX starts, so this needs a process of its own.
    flags = os.environ.get("XLA_FLAGS", "")
    flags += " --xla_force_host_platform_device_count=2"
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-W", "error", WORKER],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": flags,
            "PYTHONPATH": path,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 5

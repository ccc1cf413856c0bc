"""What is compiled is kept, where the user has not decided otherwise."""

import json
import os
import subprocess
import sys

import jax
import pytest
from waiting import HANGING_SECONDS

from nlcg_optax.training import compilation_cache

# A program that takes long enough to be kept, and whether it was found.
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from nlcg_optax.training import compilation_cache
found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name))
problem = compilation_cache.enable()
compilation_cache_said = compilation_cache.describe()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: jnp.linalg.eigh(x)[1] @ x)(jnp.eye(3))
hits = found.count("/jax/compilation_cache/cache_hits")
print(json.dumps([problem, compilation_cache_said, hits]))
"""


def run(home, **environment):
    kept = {k: v for k, v in os.environ.items() if "COMPILATION_CACHE" not in k}
    kept |= {"HOME": str(home), "XDG_CACHE_HOME": "", "JAX_PLATFORMS": "cpu"}
    kept |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=HANGING_SECONDS,
        check=True,
    )
    return json.loads(done.stdout)


def test_the_second_process_compiles_nothing(tmp_path):
    problem, said, hits = run(tmp_path)
    assert problem is None and hits == 0
    assert "~/.cache/nlcg-optax/compiled-" in said and "at most 1 GB" in said
    (folder,) = (tmp_path / ".cache" / "nlcg-optax").iterdir()
    assert any(folder.iterdir())
    *_, hits = run(tmp_path)
    assert hits > 0


def test_the_user_decides(tmp_path):
    off = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    problem, said, _ = run(tmp_path, **off)
    assert problem is None and said.startswith("nothing that is compiled is kept")
    assert not (tmp_path / ".cache").exists()

    own = tmp_path / "own"
    _, said, _ = run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(own))
    assert "~/own (" in said and "at most" not in said
    assert any(own.iterdir()) and not (tmp_path / ".cache").exists()


def test_a_home_that_cannot_be_written_is_no_obstacle(tmp_path):
    (tmp_path / ".cache").write_text("a file")
    problem, said, _ = run(tmp_path)
    assert "JAX_COMPILATION_CACHE_DIR=FOLDER" in problem
    assert said.startswith("nothing that is compiled is kept")


def test_what_was_used_longest_ago_goes_first(tmp_path):
    for i, name in enumerate(["old", "older", "new"]):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, ([200, 100, 300][i], [200, 100, 300][i]))
    compilation_cache.prune(tmp_path, most_bytes=250)
    assert {path.name for path in tmp_path.iterdir()} == {"old", "new"}
    compilation_cache.prune(tmp_path, most_bytes=250)
    assert {path.name for path in tmp_path.iterdir()} == {"old", "new"}


@pytest.mark.parametrize("enabled", [True, False])
def test_it_is_said(enabled):
    before = compilation_cache._settings.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", enabled)
    try:
        said = compilation_cache.describe()
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
    assert ("is kept in" in said) is enabled

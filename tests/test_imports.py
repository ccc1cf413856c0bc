"""The core stays light, and what it says is public is there."""

import os
import subprocess
import sys

import nlcg_optax
from nlcg_optax import beta


def test_import_pulls_in_jax_and_optax_alone():
    heavy = (
        *("flax", "tensorflow", "tensorflow_datasets", "sklearn", "orbax", "grain"),
        *("matplotlib", "ml_collections", "tensorboardX", "nlcg_optax.training"),
    )
    code = (
        "import sys, jax, optax; before = set(sys.modules); import nlcg_optax;"
        f"new = set({heavy!r}) & (set(sys.modules) - before);"
        "assert not new, new;"
        f"assert 'nlcg_optax.training' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_all_is_importable():
    for module in (nlcg_optax, beta):
        assert module.__all__ == sorted(module.__all__)
        for name in module.__all__:
            assert getattr(module, name) is not None


def test_the_promised_names_are_public():
    promised = {
        *("scale_by_diagonal_bfgs", "scale_by_conjugate_direction"),
        *("scale_by_loss_feedback", "nlcg", "scale_by_lars", "diagnostics"),
    }
    assert promised <= set(nlcg_optax.__all__)


def test_everything_public_is_documented():
    for name in nlcg_optax.__all__:
        assert getattr(nlcg_optax, name).__doc__

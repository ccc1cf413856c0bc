"""The core stays light, and what it says is public is there."""

import ast
import os
import pathlib
import subprocess
import sys

from waiting import HANGING_SECONDS

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
        timeout=HANGING_SECONDS,
    )
    assert done.returncode == 0, done.stderr


# From the bottom up; a module imports from its own layer or from those below.
LAYERS = (
    ("_check", "_xla"),
    ("_tree",),
    ("_parallel",),
    ("_curvature",),
    ("preconditioners", "directions", "step_sizes"),
    ("beta", "_alias", "_diagnostics"),
    ("_minimize",),
    ("__init__",),
    ("training",),
)


def test_arrows_point_down():
    package = pathlib.Path(nlcg_optax.__file__).parent
    layer = {name: i for i, names in enumerate(LAYERS) for name in names}
    for path in package.rglob("*.py"):
        own = path.relative_to(package).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import"
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            for module in modules:
                if not module.startswith("nlcg_optax"):
                    continue
                name = (module.split(".")[1:] or ["__init__"])[0]
                # A public name is the whole package's.
                used = layer.get(name, layer["__init__"])
                assert used <= layer[own], f"{path} imports {module}"


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

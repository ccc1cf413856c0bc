"""The core stays light, and what it says is public is there."""

import ast
import os
import pathlib
import re
import subprocess
import sys
import tomllib

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


# From the bottom up; a file imports from those of lower layers alone.
LAYERS = (
    ("_check", "_diagnostics", "_transformations", "_xla"),
    ("_tree",),
    ("_parallel",),
    ("matrices/matrix", "matrices/newton_schulz"),
    ("matrices/layout", "matrices/recognition"),
    ("matrices/exchange", "matrices/eigenbasis"),
    ("matrices/plan",),
    ("matrices/devices",),
    ("matrices/moving",),
    ("matrices/__init__", "matrices/describe"),
    (
        "preconditioners/_two_loop",
        "preconditioners/_second_moment",
        "step_sizes/_interpolation",
        "directions/beta",
    ),
    (
        "preconditioners/diagonal_bfgs",
        "preconditioners/limited_memory_bfgs",
        "preconditioners/orthogonalization",
        "preconditioners/soap",
        "directions/conjugate",
        "step_sizes/hager_zhang",
        "step_sizes/lars",
        "step_sizes/loss_feedback",
        "step_sizes/noise_balance",
    ),
    ("curvature/products", "curvature/state"),
    ("curvature/subspace", "curvature/noise", "curvature/compilations"),
    ("curvature/trust",),
    ("curvature/memory", "curvature/advice"),
    ("curvature/transform", "curvature/objective", "curvature/checkup"),
    ("beta", "_alias"),
    ("minimization/result", "minimization/box", "minimization/covariance"),
    ("minimization/loop",),
    ("minimization/implicit",),
    ("minimization/minimize",),
    ("__init__",),
)
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names}


def imported(path):
    """The modules of the package that a file imports, by their path in it."""
    package = pathlib.Path(nlcg_optax.__file__).parent
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        for module in modules:
            parts = module.split(".")
            if parts[0] != "nlcg_optax":
                continue
            # As much of the name as is a file; the rest is in it.
            parts = parts[1:]
            while parts and not (package.joinpath(*parts).with_suffix(".py")).is_file():
                if package.joinpath(*parts, "__init__.py").is_file():
                    parts.append("__init__")
                    break
                parts.pop()
            yield "/".join(parts or ["__init__"])


def test_arrows_point_down():
    package = pathlib.Path(nlcg_optax.__file__).parent
    for path in package.rglob("*.py"):
        own = path.relative_to(package).with_suffix("").as_posix()
        if own.startswith("training/") or own in LAYER and own.endswith("/__init__"):
            continue
        if own.endswith("/__init__"):  # a room's name alone
            assert not list(imported(path)), path
            continue
        for used in imported(path):
            assert LAYER[used] < LAYER[own], (own, used)


def test_nothing_but_itself_imports_the_trainer():
    package = pathlib.Path(nlcg_optax.__file__).parent
    for path in package.rglob("*.py"):
        if "training" not in path.relative_to(package).parts:
            assert not any(used.startswith("training") for used in imported(path))


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


ROOT = pathlib.Path(__file__).parents[1]
# What packages are called where they are installed, if not as they are imported.
INSTALLED = {
    "PIL": "pillow",
    "ml_collections": "ml-collections",
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
    "tensorflow_datasets": "tensorflow-datasets",
}
# jax needs the first, and every builder of tensorflow-datasets the second.
NOT_IMPORTED = {"jaxlib", "importlib_resources"}


def declared():
    """The packages of pyproject.toml with their lowest versions: core, and training."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    kinds = project["dependencies"], project["optional-dependencies"]["train"]
    return [dict(re.split(">=", text) for text in kind) for kind in kinds]


def test_what_is_imported_is_declared_and_the_other_way_round():
    found = {"core": set(), "training": set()}
    package = pathlib.Path(nlcg_optax.__file__).parent
    for path in (*package.rglob("*.py"), *(ROOT / "configs").glob("*.py")):
        training = "training" in path.parts or "configs" in path.parts
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in {name.partition(".")[0] for name in names}:
                if name not in {*sys.stdlib_module_names, "nlcg_optax"}:
                    kind = "training" if training else "core"
                    found[kind].add(INSTALLED.get(name, name))
    core, training = declared()
    assert found["core"] == {*core} - NOT_IMPORTED
    assert found["training"] - {*core} == {*training} - NOT_IMPORTED


def test_the_lowest_versions_are_those_that_ci_tries():
    core, _ = declared()
    lines = (ROOT / ".ci" / "lowest.txt").read_text().splitlines()
    tried = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {*tried} == {*core}
    for name, version in tried.items():
        assert version in (core[name], f"{core[name]}.0"), name

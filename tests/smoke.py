"""A short trial of the installed package alone; `make dist` runs it.

    python -I smoke.py           # in an environment of the package and nothing else
    python -I smoke.py --train   # with the extra [train]

Run it outside of the checkout. `-I` keeps `PYTHONPATH` and this file's folder out of
the import path.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import pathlib
import pkgutil
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax

import nlcg_optax


def is_installed():
    """What is imported is the installed distribution, with all that belongs to it."""
    package = pathlib.Path(nlcg_optax.__file__).parent
    assert package.is_relative_to(sys.prefix), f"{package} is not in {sys.prefix}"
    assert (package / "py.typed").exists(), "py.typed is missing"
    distribution = importlib.metadata.distribution("nlcg-optax")
    assert distribution.version == nlcg_optax.__version__
    licence = distribution.read_text("licenses/LICENSE")
    assert licence is not None, "LICENSE is missing"
    assert "Apache License" in licence
    for name in nlcg_optax.__all__:
        getattr(nlcg_optax, name)


def is_alone():
    """Nothing of the extras is there, so nothing of them was needed."""
    installed = {d.name.lower() for d in importlib.metadata.distributions()}
    extras = {"flax", "orbax-checkpoint", "grain", "ml-collections", "pytest"}
    assert not installed & extras, installed & extras
    assert "nlcg_optax.training" not in sys.modules


def trains():
    """`nlcg` brings a quadratic down, and tells of its last step."""
    target = jnp.array([[1.0, -2.0], [0.5, 3.0]])
    tx = nlcg_optax.nlcg(optax.cosine_decay_schedule(0.4, 100))

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(
            lambda p: jnp.sum((p["w"] - target) ** 2) + jnp.sum((p["b"] - 1) ** 2)
        )(params)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state, loss

    params = {"w": jnp.zeros((2, 2)), "b": jnp.zeros(3)}
    state = tx.init(params)
    for _ in range(100):
        params, state, loss = step(params, state)
    assert loss < 1e-3, f"the loss is {loss}"
    report = nlcg_optax.diagnostics(state)
    assert {"beta", "base_step", "cosine", "restarts"} <= set(report), report
    assert 0 <= report["beta"] <= 0.9


def minimizes():
    """`minimize` solves Rosenbrock's problem."""

    def rosenbrock(x):
        return jnp.sum((1 - x[:-1]) ** 2 + 100 * (x[1:] - x[:-1] ** 2) ** 2)

    result = nlcg_optax.minimize(rosenbrock, jnp.zeros(5))
    assert result.success, result.message
    assert jnp.abs(result.params - 1).max() < 1e-2, result.params


def runs_its_readme():
    """The example of the README, as PyPI shows it, runs as it stands."""
    text = importlib.metadata.metadata("nlcg-optax")["Description"]
    (example,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "README.md", "exec"), {})
    assert re.fullmatch(r"loss 0\.00\d\d\n", printed.getvalue()), printed.getvalue()


def has_training():
    """All of the extra [train] can be imported, and its programs answer."""
    training = importlib.import_module("nlcg_optax.training")
    for module in pkgutil.walk_packages(training.__path__, "nlcg_optax.training."):
        importlib.import_module(module.name)
    for script in importlib.metadata.distribution("nlcg-optax").entry_points:
        if script.group == "console_scripts":
            program = pathlib.Path(sys.executable).parent / script.name
            subprocess.run([program, "--help"], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Tries the installed nlcg-optax.")
    parser.add_argument("--train", action="store_true", help="with the extra [train]")
    checks = [is_installed, runs_its_readme, trains, minimizes]
    checks.append(has_training if parser.parse_args().train else is_alone)
    for check in checks:
        check()
        print(f"{check.__name__}: ok")
    print(f"nlcg-optax {nlcg_optax.__version__} works with jax {jax.__version__}")

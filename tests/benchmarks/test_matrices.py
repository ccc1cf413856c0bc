"""The programs of `benchmarks/matrices`: a GPU's part on this CPU, and a variant."""

import argparse
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "matrices"
pytestmark = pytest.mark.standard_promotion


def load(name):
    spec = importlib.util.spec_from_file_location(f"matrices_{name}", FOLDER / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_part_for_a_device_and_its_table(tmp_path, monkeypatch, capsys):
    run = load("run.py")
    run.args = argparse.Namespace(layers=None, rounds=1)
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(run.newton_schulz, "HALF", ())
    monkeypatch.setitem(run.TREES, "tiny", lambda layers: {"w": (8, 12)})
    run.write("device", run.on_device("tiny"))
    soap, other = run.read("device")
    assert soap["optimizer"] == "soap" and "optimizer" not in other
    assert min(soap["milliseconds"], other["milliseconds"], other["error"]) > 0
    run.write("times", run.measure("tiny", ["soap, every 10"]))
    run.report()
    capsys.readouterr()
    table = (tmp_path / "results" / "tables.md").read_text()
    assert "| tiny | soap | highest |" in table
    assert "| cpu | tiny | all | `soap, every 10` |" in table


def test_without_weights_kl_soap_is_soap():
    module = load("soap.py")
    rng = np.random.default_rng(0)
    ours, theirs = module.soap(0.8), module.kl_soap(0.8, weighted=False)
    other = module.kl_soap(0.8)
    params = {"w": jnp.zeros((4, 6)), "b": jnp.zeros(6)}
    states = [tx.init(params) for tx in (ours, theirs, other)]
    updates = [jax.jit(tx.update) for tx in (ours, theirs, other)]
    for _ in range(3):
        g = {k: np.float32(rng.normal(size=x.shape)) for k, x in params.items()}
        steps = [f(g, s) for f, s in zip(updates, states, strict=True)]
        states = [state for _, state in steps]
        (got, wanted, weighted), _ = zip(*steps, strict=True)
        for key in params:
            np.testing.assert_allclose(got[key], wanted[key], atol=1e-5)
    assert jnp.max(jnp.abs(weighted["w"] - wanted["w"])) > 0.01

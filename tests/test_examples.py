"""The examples that are no tests of meshes, with tiny settings.

They compile for most of a minute each, on a busy core: `make test-all` runs them.
"""

import importlib.util
import pathlib
import re
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"


def run(name, monkeypatch, capsys, *args, **changed):
    """What an example prints, with other values of its constants."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for key, value in changed.items():
        monkeypatch.setattr(module, key, value)
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    module.main()
    return capsys.readouterr().out


@pytest.mark.long
@pytest.mark.standard_promotion  # optax's schedules promote
def test_finetune_text(monkeypatch, capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Dreiunddreissig Kätzchen. " * 200)
    small = "--pretrain_steps=2 --steps=12 --batch_size=8 --width=8 --layers=1".split()
    out = run(
        "finetune_text", monkeypatch, capsys, text, *small, RATES=(3e-2,), HEADS=2
    )
    before, after, theirs = re.findall(r"held out ([\d.]+)", out)
    assert float(after) < float(before) - 0.5 and float(theirs) < float(before)
    assert f"fine-tuned from {before} to {after} without a learning rate" in out
    assert "\nThe " in out


@pytest.mark.long
def test_physics_informed(monkeypatch, capsys):
    small = "--points=5 --width=4 --steps=9".split()
    out = run("physics_informed", monkeypatch, capsys, *small)
    rows = re.findall(
        r"^(nlcg_auto|L-BFGS) +(\d+) .* ([\d.e+-]+) +[\d.e+-]+$", out, re.M
    )
    assert [(name, int(steps)) for name, steps, _ in rows] == [
        (name, steps) for name in ("nlcg_auto", "L-BFGS") for steps in (1, 3, 9)
    ]
    losses = [float(loss) for *_, loss in rows]
    assert losses[2] < losses[0] and losses[5] < losses[3]
    assert re.search(r"^(nlcg_auto|L-BFGS) ends nearer to the solution", out, re.M)


@pytest.mark.long
def test_digits_mlp(monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    out = run("digits_mlp", monkeypatch, capsys, STEPS=12)
    assert "step 10, loss" in out
    (right,) = re.findall(r"^([\d.]+)% of the last batch", out, re.M)
    assert float(right) > 90

"""The README is one page, and its Python runs as it stands."""

import pathlib
import re

import jax
import optax
import pytest
import snippets

import nlcg_optax

README = pathlib.Path(__file__).resolve().parents[1] / "README.md"


@pytest.fixture(scope="module")
def ran():
    """The names that the README's Python leaves, and what it printed."""
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules promote
        return snippets.run(snippets.snippets(README.read_text()), README)


def test_it_is_one_page():
    assert len(README.read_text().splitlines()) <= 120


def test_the_loop_trains(ran):
    assert re.fullmatch(r"loss 0\.00\d\d\n", ran[1])


def test_what_the_table_says_to_write_can_be_written(ran):
    scope = dict(ran[0], fun=lambda x: (x**2).sum(), x0=ran[0]["w1"])
    params = scope["params"]
    loss, grads, curvature = scope["evaluate"](params, scope["batch"])
    cells = re.findall(r"^\|[^|]*\| `([^`]*)` \|", README.read_text(), re.MULTILINE)
    kinds = []
    for cell in cells:
        if not re.match(r"(nlcg_)?optax\.", cell):
            continue  # a command, or of a model that is not here
        made = eval(cell, scope)
        kinds.append(type(made).__name__)
        if isinstance(made, optax.GradientTransformation):
            state = made.init(params)
            if "axis_name" not in cell:  # without a mesh
                given = {"value": loss, "curvature": curvature}
                made.update(grads, state, params, **given)
        elif isinstance(made, nlcg_optax.MinimizeResult):
            assert made.success
        else:
            assert {"coefficients", "damping", "signal"} <= set(made)
    expected = {"GradientTransformationExtraArgs": 7, "MinimizeResult": 1, "dict": 1}
    assert {kind: kinds.count(kind) for kind in kinds} == expected

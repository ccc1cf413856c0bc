"""Diagnostics, from any state that contains ours."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import paper

import nlcg_optax
from nlcg_optax import diagnostics, nlcg_paper

ALL = {
    *("beta", "cosine", "restarts", "base_step"),
    *("nonfinite_losses", "skipped_curvature"),
}
PARAMS = {"w": np.array([1.0, -2.0], np.float32), "b": np.float32([0.5])}
LOSSES = [1.0, np.nan, 9.0, 8.0]


def feed(tx, params=PARAMS, *, jit=False):
    """Gradients that make every diagnostic move; returns the last state."""
    state = tx.init(params)
    update = jax.jit(tx.update) if jit else tx.update
    for t, loss in enumerate(LOSSES):
        params = jax.tree.map(jnp.asarray, params)
        grads = jax.tree.map(lambda x, c=(-1.0) ** t: c * x, params)
        _, state = update(grads, state, params, value=jnp.float32(loss))
        params = jax.tree.map(lambda x, c=1 + 0.1 * t: c * x, params)
    return state


def optimizer(rate=0.1):
    return paper(rate, step_rule="online", restart_every=3)


def test_what_is_reported():
    report = diagnostics(feed(optimizer()))
    assert set(report) == ALL
    assert all(isinstance(v, jax.Array) and v.shape == () for v in report.values())
    assert report["restarts"] == 1
    assert report["nonfinite_losses"] == 1
    assert report["base_step"] < 1
    assert report["skipped_curvature"] > 0
    assert report["beta"] == 0  # the restart was in the last step
    # So d = -z, which the diagonal keeps within a right angle of -g.
    assert 0 < report["cosine"] < 1


def test_limited_memory_bfgs_reports_alone():
    report = diagnostics(feed(nlcg_optax.scale_by_limited_memory_bfgs()))
    assert set(report) == {"skipped_curvature"}
    assert report["skipped_curvature"] > 0


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip(10.0), tx, optax.scale(0.5)),
    "named chain": lambda tx: optax.named_chain(("a", optax.clip(10.0)), ("b", tx)),
    "masked": lambda tx: optax.masked(tx, {"w": True, "b": True}),
    "partition": lambda tx: optax.partition(
        {"ours": tx, "none": optax.sgd(0.1)}, {"w": "ours", "b": "ours"}
    ),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "extra args": optax.with_extra_args_support,
    "deep": lambda tx: optax.chain(
        optax.apply_if_finite(optax.masked(optax.chain(tx), {"w": True, "b": True}), 3)
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_from_wrapped_states(wrapper):
    expected = diagnostics(feed(optimizer()))
    report = diagnostics(feed(WRAPPERS[wrapper](optimizer()), jit=True))
    assert set(report) == ALL
    for name, value in report.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5)


@pytest.mark.standard_promotion  # MultiSteps promotes
def test_from_multi_steps():
    tx = optax.MultiSteps(optimizer(), every_k_schedule=1)
    assert set(diagnostics(feed(tx, jit=True))) == ALL


def test_from_inject_hyperparams():
    tx = optax.inject_hyperparams(optimizer)(0.1)
    report = diagnostics(feed(tx))
    assert set(report) == ALL
    for name, value in diagnostics(feed(optimizer())).items():
        np.testing.assert_allclose(report[name], value, rtol=1e-4)


@pytest.mark.parametrize(
    ("tx", "names"),
    [
        (nlcg_paper(0.1, step_rule=None), ALL - {"base_step", "nonfinite_losses"}),
        (nlcg_paper(0.1, preconditioner=None), ALL - {"skipped_curvature"}),
        (
            nlcg_paper(0.1, preconditioner=optax.scale_by_rms()),
            ALL - {"skipped_curvature"},
        ),
        (nlcg_optax.scale_by_diagonal_bfgs(), {"skipped_curvature"}),
        (nlcg_optax.scale_by_loss_feedback(), {"base_step", "nonfinite_losses"}),
        (
            nlcg_optax.scale_by_conjugate_direction(
                preconditioner=optax.chain(
                    optax.clip(1.0), nlcg_optax.scale_by_diagonal_bfgs()
                )
            ),
            ALL - {"base_step", "nonfinite_losses"},
        ),
    ],
    ids=range(6),
)
def test_only_what_the_state_holds(tx, names):
    assert set(diagnostics(feed(tx))) == names


def test_several_of_a_kind_are_told_apart_by_their_path():
    tx = optax.partition(
        {"slow": paper(0.1, restart_every=2), "fast": optimizer()},
        {"w": "slow", "b": "fast"},
    )
    report = diagnostics(feed(tx))
    assert len(report) == 2 * len(ALL)
    restarts = {
        key: int(value) for key, value in report.items() if key.endswith("/restarts")
    }
    (slow,) = (key for key in restarts if "slow" in key)
    (fast,) = (key for key in restarts if "fast" in key)
    assert (restarts[slow], restarts[fast]) == (1, 1)
    assert {key.rsplit("/")[-1] for key in report} == ALL


def test_two_kinds_that_share_a_name_are_told_apart_by_their_path():
    tx = nlcg_optax.scale_by_quadratic_model(
        [
            nlcg_optax.scale_by_diagonal_bfgs(),
            nlcg_optax.scale_by_limited_memory_bfgs(),
        ]
    )
    state = tx.init(jnp.ones(2))
    diagonal, memory = state.preconditioner_states
    states = diagonal._replace(skipped=1), memory._replace(skipped=2)
    report = diagnostics(state._replace(preconditioner_states=states))
    for i in range(2):
        key = f".preconditioner_states[{i}]/skipped_curvature"
        assert report.pop(key) == i + 1
    assert not any("skipped" in key or "/" in key for key in report)


class Counting(NamedTuple):
    """A state from elsewhere, within which lies one of ours."""

    within: Any
    steps: Any

    def report(self):
        return {"steps": self.steps}


class Silent(NamedTuple):
    """A state that happens to have something of that name."""

    report: Any


def test_a_state_from_elsewhere_is_asked_too():
    inner = (Silent(jnp.ones(2)), feed(optimizer()))
    state = {"a": Counting(inner, 3), "b": (Silent(jnp.ones([])),)}
    report = diagnostics(state)
    assert set(report) == ALL | {"steps"}
    assert report["steps"] == 3
    assert isinstance(report["steps"], jax.Array)
    twice = diagnostics({"a": Counting(Counting(inner, 4), 3)})
    assert twice["['a']/steps"] == 3
    assert twice["['a'].within/steps"] == 4
    assert set(twice) - set(report) == {"['a']/steps", "['a'].within/steps"}


def test_under_jit_and_vmap():
    tx = optimizer()
    state = feed(tx)
    eager = diagnostics(state)
    for name, value in jax.jit(diagnostics)(state).items():
        np.testing.assert_array_equal(value, eager[name])
    batch = jax.tree.map(lambda x: jnp.stack([x, x, x]), state)
    for name, value in diagnostics(batch).items():
        np.testing.assert_array_equal(value, [eager[name]] * 3)


def test_before_the_first_step():
    report = diagnostics(optimizer().init(PARAMS))
    assert report["base_step"] == 1
    assert all(value == 0 for name, value in report.items() if name != "base_step")

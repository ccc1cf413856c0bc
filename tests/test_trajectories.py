"""Recorded trajectories, the oracle, and the library agree."""

import json
import math
import pathlib

import jax
import numpy as np
import pytest
from conftest import REFERENCE
from oracle import Oracle
from problems import NonConvex, record, relative_errors, replay

import nlcg_optax

COPIES = pathlib.Path(__file__).parent / "trajectories"
COPIED = sorted(path.name for path in COPIES.glob("*.npz"))
OTHERS = sorted({path.name for path in REFERENCE.glob("*.npz")} - set(COPIED))

RULES = {"FR": "fletcher_reeves", "PR": "polak_ribiere"}
OUTPUTS = ("update", "direction", "diagonal", "beta", "base_step")

pytestmark = pytest.mark.usefixtures("x64")


def load(name):
    path = COPIES / name
    with np.load(path if path.exists() else REFERENCE / name) as file:
        data = dict(file)
    meta = json.loads(str(data.pop("meta")))
    options = {
        "beta_rule": RULES[meta["update_rule"]],
        "preconditioner": {"Bfgs": "diagonal_bfgs", "None": None}[
            meta["preconditioner"]
        ],
        "step_rule": {"None": None, "Step": "step", "Online": "online"}[
            meta["step_rule"]
        ],
        "period": meta["period"],
        "threshold": meta["threshold"],
    }
    data = {key: value.astype(np.float64) for key, value in data.items()}
    data["params"] = np.cumsum(data["displacement"], axis=0)
    return options, data


def check_recording(got, expected):
    # The recordings hold 1 throughout where a piece is switched off.
    compared = [name for name in OUTPUTS if name in got]
    assert {"update", "direction", "beta"} <= set(compared)
    for name in compared:
        errors = relative_errors(got[name], expected[name])
        # Negated, so that a NaN fails.
        assert not np.any(~(errors <= 1e-4)), name
        assert np.mean(errors <= 1e-5) >= 0.99, name


@pytest.mark.parametrize("name", COPIED + OTHERS)
def test_replays_recording(name):
    options, data = load(name)
    inputs = (data[k] for k in ("learning_rate", "params", "gradient", "loss"))
    got = replay(options, *inputs)
    check_recording(got, data)
    assert ("diagonal" in got) == (options["preconditioner"] is not None)
    assert ("base_step" in got) == (options["step_rule"] is not None)


def test_every_reference_recording_is_replayed():
    if not REFERENCE.is_dir():
        pytest.skip(
            f"{REFERENCE} is absent: only the {len(COPIED)} copies are replayed"
        )
    assert OTHERS
    assert set(COPIED) <= {path.name for path in REFERENCE.glob("*.npz")}


def test_copies_cover_every_rule_and_stay_small():
    files = [COPIES / name for name in COPIED]
    assert sum(path.stat().st_size for path in files) < 2_000_000
    seen = {tuple(load(name)[0].values())[:3] for name in COPIED}
    assert {(rule, p) for rule, p, _ in seen} == {
        (rule, p) for rule in RULES.values() for p in ("diagonal_bfgs", None)
    }
    assert {step for *_, step in seen} == {None, "step", "online"}
    # Those with a falling loss alone would never test the shrinking step.
    assert any(load(name)[1]["base_step"].min() < 0.01 for name in COPIED)


@pytest.mark.parametrize("name", COPIED + OTHERS)
def test_oracle_agrees_with_recording(name):
    options, data = load(name)
    oracle = Oracle(**options)
    inputs = zip(
        data["params"],
        data["gradient"],
        data["loss"],
        data["learning_rate"],
        strict=True,
    )
    rows = [oracle.step(*row) for row in inputs]
    got = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    check_recording(got, data)


def test_a_nan_fails_the_comparison():
    _, data = load(COPIED[0])
    broken = {name: data[name].copy() for name in OUTPUTS}
    check_recording(broken, data)
    broken["update"][3, 0] = np.nan
    with pytest.raises(AssertionError, match="update"):
        check_recording(broken, data)


def check_against_oracle(
    options, seed=0, *, offset=0.0, learning_rate=0.1, losses=None, jit=False
):
    """The library replays what the oracle did on a noisy non-convex problem.

    Compiled only where a configuration occurs often enough to be worth it.
    """
    expected = record(
        Oracle(**options), NonConvex(seed, offset=offset), learning_rate=learning_rate
    )
    if losses is not None:
        oracle = Oracle(**options)
        rows = [
            oracle.step(x, g, f, learning_rate)
            for x, g, f in zip(
                expected["params"], expected["gradient"], losses, strict=True
            )
        ]
        expected |= {key: np.array([row[key] for row in rows]) for key in rows[0]}
        expected["loss"] = np.asarray(losses)
    inputs = ("params", "gradient", "loss")
    rates = np.full(len(expected["loss"]), learning_rate)
    got = replay(options, rates, *(expected[name] for name in inputs), jit=jit)
    assert set(got) == set(expected) - set(inputs)
    for name, values in got.items():
        errors = relative_errors(values, expected[name])
        assert not np.any(~(errors <= 1e-8)), (name, errors.max())
    return got


@pytest.mark.parametrize("step_rule", [None, "step", "online"])
@pytest.mark.parametrize("preconditioner", [None, "diagonal_bfgs"])
@pytest.mark.parametrize("beta_rule", nlcg_optax.beta.BETA_RULES)
def test_every_combination_agrees_with_oracle(beta_rule, preconditioner, step_rule):
    options = {
        "beta_rule": beta_rule,
        "preconditioner": preconditioner,
        "step_rule": step_rule,
    }
    # Up and down, so that the step size moves in every case.
    got = check_against_oracle(options, losses=3 + np.sin(np.arange(30.0)))
    assert len(np.unique(got["beta"])) > 2
    if step_rule is not None:
        assert len(np.unique(got["base_step"])) > 1
    if preconditioner is not None:
        assert 0 < got["skipped_curvature"][-1] < 29


@pytest.mark.parametrize(
    "options",
    [
        {"restart_on_ascent": True},
        {"restart_on_ascent": True, "beta_rule": "hestenes_stiefel"},
        {"restart_every": 4},
        {"nesterov": True},
        {"nesterov": True, "beta_rule": "dai_kou", "step_rule": None},
        {"restart_every": 1},
        {"restart_every": 7, "restart_on_ascent": True, "preconditioner": None},
        {"beta_bounds": (-2.0, 3.0), "beta_rule": "hager_zhang"},
        {"beta_bounds": (-math.inf, math.inf), "beta_rule": "polak_ribiere"},
        {"beta_bounds": (-math.inf, math.inf), "beta_rule": "liu_storey"},
        {"beta_bounds": (-math.inf, math.inf), "beta_rule": "hybrid_hs_dy"},
        {"epsilon": 1e-2, "beta_rule": "liu_storey"},
        {"epsilon": 1e-2, "beta_rule": "dai_kou"},
        {"beta_bounds": (0.0, 0.0)},
        {"period": 1},
        {"period": 3, "threshold": 0.3},
        {"threshold": 4.0, "step_rule": "online"},
        {"threshold": 0.1, "step_rule": "online"},
        {"epsilon": 1e-2},
        {"epsilon": 0.0, "beta_rule": "dai_yuan"},
    ],
    ids=repr,
)
def test_options_agree_with_oracle(options):
    # A long step, so that there are ascents to restart from.
    got = check_against_oracle(options, seed=1, learning_rate=0.3)
    if "restart_every" in options or options.get("restart_on_ascent"):
        assert got["restarts"][-1] > 0
    else:
        assert got["restarts"][-1] == 0


@pytest.mark.parametrize("preconditioner", [None, "diagonal_bfgs"])
@pytest.mark.parametrize("restart_every", [None, 4])
@pytest.mark.parametrize("beta_rule", ["hager_zhang", "dai_kou"])
def test_truncation_agrees_with_oracle(beta_rule, preconditioner, restart_every):
    options = {
        "beta_rule": beta_rule,
        "preconditioner": preconditioner,
        "beta_bounds": (-math.inf, math.inf),
        "restart_every": restart_every,
    }
    got = check_against_oracle(options, seed=1, learning_rate=0.3)

    # Without the bound from below, some of these steps would have gone elsewhere.
    def free(p, epsilon):
        rule = nlcg_optax.beta.BETA_RULES[beta_rule]
        return rule(p._replace(prev_d_d=math.nan), epsilon)

    seen = record(Oracle(**options), NonConvex(1), learning_rate=0.3)
    inputs = (seen[name] for name in ("params", "gradient", "loss"))
    options["beta_rule"] = free
    untruncated = replay(options, np.full(30, 0.3), *inputs, jit=False)
    first = np.flatnonzero(got["beta"] != untruncated["beta"])[0]
    assert got["beta"][first] > untruncated["beta"][first]
    # Nor does it bind always.
    assert 1 < first < 29


@pytest.mark.parametrize("step_rule", ["step", "online"])
@pytest.mark.parametrize("offset", [5.0, 100.0])
def test_negative_losses_agree_with_oracle(step_rule, offset):
    options = {"step_rule": step_rule, "threshold": 0.02, "period": 2}
    got = check_against_oracle(options, offset=offset)
    assert len(np.unique(got["base_step"])) > 1


# The average hits zero exactly, from either side, and stays there.
ZEROS = ([0.0] * 4, [0.0, 1.0, -1.0, 0.0], [0.0, -1.0, 1.0, 0.0], [1.0, -7 / 3, 0, 1])


@pytest.mark.parametrize("step_rule", ["step", "online"])
@pytest.mark.parametrize("start", ZEROS, ids=repr)
def test_a_loss_of_zero_agrees_with_oracle(step_rule, start):
    losses = np.concatenate([start, np.sin(np.arange(26.0))])
    check_against_oracle({"step_rule": step_rule, "period": 1}, losses=losses, jit=True)


@pytest.mark.parametrize("step_rule", ["step", "online"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [[0], [0, 1, 7], [5, 6, 29]], ids=repr)
def test_nonfinite_losses_agree_with_oracle(step_rule, bad, where):
    losses = 3 + np.sin(np.arange(30.0))
    losses[where] = bad
    got = check_against_oracle({"step_rule": step_rule}, losses=losses, jit=True)
    assert got["nonfinite_losses"][-1] == len(where)


def test_float32_follows_float64():
    # The same inputs in the precision of everyday use.
    expected = record(Oracle(), NonConvex(0, noise=0.0), steps=15)
    with jax.enable_x64(False):
        inputs = (np.float32(expected[key]) for key in ("params", "gradient", "loss"))
        got = replay({}, np.full(15, 0.1, np.float32), *inputs)
    for name in ("update", "direction", "diagonal", "beta", "base_step"):
        assert got[name].dtype == np.float32
        assert np.max(relative_errors(got[name], expected[name])) < 1e-3

"""Step size control from the loss."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlcg_optax import scale_by_loss_feedback

pytestmark = pytest.mark.usefixtures("x64")

# relative rise of the loss, shrink, part taken back: one between every two rows
ROWS = [
    (10.0, 0.5, 0.9),
    (0.16, 0.5, 0.9),
    (0.14, 0.7, 0.7),
    (0.11, 0.8, 0.5),
    (0.08, 0.9, 0.3),
    (0.06, 0.95, 0.2),
    (0.03, 0.975, 0.1),
    (0.015, 1.0, 0.1),
]
U = [np.array([1.0, 2.0]), np.array([0.5, -3.0]), np.array([2.0, 0.25])]


def rising(rule, rise):
    """A second loss (after 1) of this relative rise, by the rule's own measure."""
    if rule == "step":  # (0.7 + 0.3 f) / 1 = 1 + r
        return 1 + rise / 0.3
    return 0.7 * (1 + rise) / (0.7 - 0.3 * rise)  # f / (0.7 + 0.3 f) = 1 + r


def feed(tx, losses, updates=None):
    updates = [U[t % 3] for t in range(len(losses))] if updates is None else updates
    state = tx.init(updates[0])
    rows = []
    for loss, u in zip(losses, updates, strict=True):
        out, state = tx.update(jnp.asarray(u), state, value=loss)
        rows.append((out, state))
    return rows


@pytest.mark.parametrize("rule", ["step", "online"])
@pytest.mark.parametrize(("rise", "shrink", "omega"), ROWS)
@pytest.mark.parametrize("threshold", [1.0, 0.5])
def test_a_rise_shrinks_the_step_and_takes_back(rule, rise, shrink, omega, threshold):
    if rule == "online" and rise * threshold > 2:
        rise = 1.0  # the average follows: f / m is 10/3 at most
    tx = scale_by_loss_feedback(rule, 1, threshold)
    loss = rising(rule, rise * threshold)
    (first, _), (out, state) = feed(tx, [1.0, loss])
    np.testing.assert_array_equal(first, U[0])
    np.testing.assert_allclose(state.base_step, shrink)
    expected = shrink * ((1 - omega) * U[1] - omega * (1 / shrink) * U[0])
    np.testing.assert_allclose(out, expected)


@pytest.mark.parametrize("rule", ["step", "online"])
@pytest.mark.parametrize("rise", [0.009, 0.0, -0.2, -3.0])
def test_no_rise_to_speak_of_grows_the_step(rule, rise):
    # Shrunk to a half first, so that there is room.
    growth = {"step": 1.05, "online": 1.02}[rule]
    tx = scale_by_loss_feedback(rule, 1)
    state = feed(tx, [1.0, 9.0])[-1][1]
    assert state.base_step == 0.5
    m = state.loss_average
    if rule == "step":
        loss = m + m * rise / 0.3
    else:
        loss = 0.7 * m * (1 + rise) / (1 - 0.3 * (1 + rise))
    out, state = tx.update(jnp.asarray(U[2]), state, value=loss)
    np.testing.assert_allclose(state.base_step, 0.5 * growth)
    np.testing.assert_allclose(out, 0.5 * growth * U[2])


def test_the_step_grows_to_one_and_no_further():
    tx = scale_by_loss_feedback("online")
    rows = feed(tx, [1.0, 9.0, *([0.0] * 40)])
    steps = [float(state.base_step) for _, state in rows]
    assert steps[0] == 1 and min(steps) == 0.5 and max(steps) == 1
    assert steps[-1] == 1
    assert steps[2] == pytest.approx(0.51)


def test_the_step_shrinks_to_a_floor():
    tx = scale_by_loss_feedback("online")
    rows = feed(tx, [10.0**t for t in range(20)])
    steps = np.array([float(state.base_step) for _, state in rows])
    np.testing.assert_allclose(steps[:14], 0.5 ** np.arange(14))
    np.testing.assert_allclose(steps[14:], 1e-4)
    # At the floor b_old/b_new is 1, not 1/shrink.
    np.testing.assert_allclose(
        rows[-1][0], 1e-4 * (0.1 * U[19 % 3] - 0.9 * U[18 % 3]), rtol=1e-9
    )


def test_the_step_rule_acts_once_a_period():
    tx = scale_by_loss_feedback("step", period=3)
    losses = [1.0, *(2.0**t for t in range(1, 10))]
    steps = [float(state.base_step) for _, state in feed(tx, losses)]
    assert steps == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125]


def test_the_step_rule_compares_averages_of_whole_periods():
    # By hand: m = 1, 1.3, 0.91, 0.937; compared are m_2 with m_0, then m_4 with m_2.
    tx = scale_by_loss_feedback("step", period=2)
    rows = feed(tx, [1.0, 2.0, 0.0, 1.0, 0.95])
    steps = [float(state.base_step) for _, state in rows]
    m_4 = 0.7 * 0.937 + 0.3 * 0.95
    assert 0.025 < m_4 / 0.91 - 1 < 0.05
    np.testing.assert_allclose(steps, [1, 1, 1, 1, 0.975])
    np.testing.assert_allclose(rows[-1][1].prev_loss_average, m_4)


@pytest.mark.parametrize("rule", ["step", "online"])
def test_a_larger_threshold_tolerates_larger_rises(rule):
    tx = scale_by_loss_feedback(rule, 1, threshold=20.0)
    (_, state) = feed(tx, [1.0, rising(rule, 0.19)])[-1]
    assert state.base_step == 1
    (_, state) = feed(tx, [1.0, rising(rule, 0.21)])[-1]
    assert state.base_step == 1  # the last row: no shrink, but
    out = feed(tx, [1.0, rising(rule, 0.21)])[-1][0]
    np.testing.assert_allclose(out, 0.9 * U[1] - 0.1 * U[0])


@pytest.mark.parametrize("rule", ["step", "online"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_loss_changes_no_scalar_and_is_counted(rule, bad):
    tx = scale_by_loss_feedback(rule, 2)
    *_, (_, before), (out, state) = feed(tx, [1.0, 9.0, 12.0, bad])
    assert before.base_step < 1
    assert (before.nonfinite, state.nonfinite) == (0, 1)
    unchanged = state._replace(
        nonfinite=before.nonfinite, prev_update=before.prev_update
    )
    jax.tree.map(np.testing.assert_array_equal, unchanged, before)
    # Its direction was taken all the same, and is the last one.
    np.testing.assert_array_equal(state.prev_update, U[0])
    np.testing.assert_allclose(out, before.base_step * U[0])


@pytest.mark.parametrize("rule", ["step", "online"])
def test_a_first_loss_that_is_nan_is_as_if_never_seen(rule):
    tx = scale_by_loss_feedback(rule, 2)
    losses = [3.0, 1.0, 7.0, 2.0, 9.0]
    updates = [U[t % 3] for t in range(5)]
    rows = feed(tx, [math.nan, math.nan, *losses], [U[2], U[2], *updates])
    np.testing.assert_array_equal(rows[0][0], U[2])
    assert rows[-1][1].nonfinite == 2
    for (out, state), (expected, expected_state) in zip(
        rows[2:], feed(tx, losses, updates), strict=True
    ):
        np.testing.assert_array_equal(out, expected)
        jax.tree.map(
            np.testing.assert_array_equal, state._replace(nonfinite=0), expected_state
        )


@pytest.mark.parametrize("rule", ["step", "online"])
def test_a_loss_of_zero_makes_no_nan(rule):
    tx = scale_by_loss_feedback(rule, 1)
    with jax.debug_nans(True):
        rows = feed(tx, [0.0, 0.0, 1.0])
    assert [state.base_step for _, state in rows] == [1, 1, 0.5]
    *_, (_, state) = feed(tx, [0.0, -1.0])
    assert state.base_step == 1


@pytest.mark.parametrize("rule", ["step", "online"])
def test_the_scale_of_the_loss_does_not_matter(rule):
    tx = scale_by_loss_feedback(rule, 2)
    losses = 3 + np.random.default_rng(0).normal(size=30)
    plain = [out for out, _ in feed(tx, losses)]
    scaled = [out for out, _ in feed(tx, losses * 2.0**-70)]
    np.testing.assert_array_equal(plain, scaled)
    assert feed(tx, losses)[-1][1].base_step < 1


@pytest.mark.parametrize("rule", ["step", "online"])
def test_falling_negative_losses_do_not_shrink_the_step(rule):
    tx = scale_by_loss_feedback(rule, 1)
    *_, (_, state) = feed(tx, [-1.0, -2.0, -4.0, -8.0])
    assert state.base_step == 1
    *_, (_, state) = feed(tx, [-8.0, -4.0, -2.0, -1.0])
    assert state.base_step < 0.5


@pytest.mark.parametrize(
    "make",
    [
        *(int, float, np.float32, np.float64, np.int32),
        *(jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64, jnp.int32),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_the_loss_may_have_any_real_dtype(make, dtype):
    tx = scale_by_loss_feedback("online")
    u = jnp.ones(2, dtype)
    state = tx.init(u)
    out, state = tx.update(u, state, value=make(2))
    assert out.dtype == dtype
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    assert state.loss_average.dtype == state.base_step.dtype == wide
    assert state.loss_average == 2

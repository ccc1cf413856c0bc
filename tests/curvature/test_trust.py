"""The verdict on a step, by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlcg_optax.curvature import trust
from nlcg_optax.curvature.state import LastStep, Trust


def trust_of(
    damping=0.1, extra_damping=0.5, model_error=0.02, rejections=0, trend=0.0, climb=0.0
):
    numbers = jnp.float32([damping, extra_damping, 0, model_error, 0, 0])
    rest = jnp.float32([trend, climb, 0, 1, 0, 1])
    return Trust(*numbers, jnp.int32(rejections), *rest)


def judge(
    loss,
    prev_value=2.0,
    predicted=0.1,
    extra_damping=0.5,
    model_error=0.02,
    damping=0.1,
    finite=True,
    rejections=0,
    trend=0.0,
    climb=0.0,
    same_data=False,
):
    # At the minimum of a model the slope is the curvature.
    last = (prev_value, 2 * predicted, 2 * predicted, 0.0, 0.0)
    last = LastStep(*map(jnp.float32, last))
    trusted = trust_of(damping, extra_damping, model_error, rejections, trend, climb)
    numbers = (
        jnp.float32(loss),
        jnp.asarray(finite),
        last,
        trusted,
        jnp.float32(damping),
    )
    verdict = trust.judge(*numbers, 5, same_data)
    return jax.tree.map(np.asarray, verdict)


def test_extra_damping_fades():
    for loss in (1.8, 1.95, 2.05):
        verdict = judge(loss)
        assert not verdict.rejected
        np.testing.assert_allclose(verdict.trust.extra_damping, 0.125)
        np.testing.assert_allclose(
            verdict.trust.actual_decrease, 2.0 - loss, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("loss", [2.11, 50.0, np.inf, np.nan])
def test_a_rise_beyond_the_prediction_is_rejected(loss):
    verdict = judge(loss)
    assert verdict.rejected
    np.testing.assert_allclose(verdict.trust.extra_damping, 2.0)
    assert verdict.kept == 0.25 and verdict.trust.rejections == 1
    # Of losses that jump by turns the usual error grows.
    error = 0.02 if not np.isfinite(loss) else 0.028
    np.testing.assert_allclose(verdict.trust.model_error, error, rtol=1e-6)
    for damping, raised in ((0.3, 1.2), (0.1, 0.4), (0.0, 0.4)):
        verdict = judge(loss, extra_damping=0.01, damping=damping)
        np.testing.assert_allclose(verdict.trust.extra_damping, raised, rtol=1e-6)


def test_a_gradient_that_is_not_finite_is_rejected():
    assert judge(1.9, finite=False).rejected and not judge(1.9).rejected


def test_noise_is_tolerated():
    assert judge(2.2).rejected and not judge(2.2, model_error=0.06).rejected
    # The average of the error takes in a fifth of a new one, of at most three times.
    for loss, before, after in (
        (1.94, 0.02, 0.024),
        (1.0, 0.02, 0.028),
        (1.94, 0, 0.04),
    ):
        error = judge(loss, model_error=before).trust.model_error
        np.testing.assert_allclose(error, after, rtol=1e-5)


def test_without_a_step_there_is_nothing_to_judge():
    verdict = judge(7.0, predicted=0.0)
    assert not verdict.rejected
    np.testing.assert_allclose(verdict.trust.extra_damping, 0.5)
    np.testing.assert_allclose(verdict.trust.model_error, 0.02, rtol=1e-6)


def test_rounding_is_no_rise():
    """At a minimum the loss changes by rounding, and the model predicts less."""
    above = np.nextafter(np.float32(2.0), np.float32(3.0))
    verdict = judge(above, predicted=1e-12, model_error=1e-13)
    assert not verdict.rejected


def test_a_factor_in_the_loss_changes_nothing():
    for loss in (1.9, 1.99, 2.05, 2.3):
        one, other = judge(loss), judge(8 * loss, 16.0, 0.8, 0.5, 0.16)
        assert one.rejected == other.rejected
        assert one.trust.extra_damping == other.trust.extra_damping
        errors = one.trust.model_error, other.trust.model_error
        np.testing.assert_allclose(8 * errors[0], errors[1], rtol=1e-6)


def test_predictions_that_are_wrong_by_one_factor_are_seen():
    """Twice what was predicted, step after step; and one that comes and goes."""

    def after(decreases):
        trusted = trust_of()
        last = LastStep(*map(jnp.float32, (2.0, 0.2, 0.2, 0.0, 0.0)))
        for count, decrease in enumerate(decreases):
            loss = jnp.float32(2.0 - decrease)
            trusted = trust.judge(
                loss, jnp.array(True), last, trusted, jnp.float32(0.1), count, True
            ).trust
        loss = jnp.float32(1.0)
        fits = (loss, loss, None, trusted, len(decreases))
        return float(jnp.exp(trusted.log_ratio)), bool(trust.mismatch(*fits))

    ratio, wrong = after([0.2] * 8)
    assert ratio == pytest.approx(2.0, rel=1e-3) and wrong
    assert not after([0.2] * 3)[1]  # too early to say
    assert after([0.01] * 8)[1]
    assert not after([0.11, 0.09] * 4)[1]
    assert not after([0.4, -0.2, 0.02, 0.3] * 3)[1]


@pytest.mark.parametrize(
    ("loss", "own", "fraction", "expected"),
    [
        (2.0, 2.03, 1, False),
        (2.0, 2.1, 1, True),
        (2.0, 2.1, 0.5, False),
        (2.0, 15.0, None, False),
        (2.0, 25.0, None, True),
        (2.0, 0.1, 0.1, True),
        (-2.0, 25.0, None, False),
        (0.0, 25.0, None, False),
        (2e-30, 2e-30, 1, False),
    ],
)
def test_losses_of_one_batch_are_equal_and_of_parts_alike(
    loss, own, fraction, expected
):
    numbers = map(jnp.float32, (loss, own))
    assert trust.mismatch(*numbers, fraction, trust_of(), 9) == expected


def test_what_is_rejected_twice_is_taken_back_wholly_and_then_accepted():
    second = judge(7.0, rejections=1)
    assert second.rejected and second.kept == 0 and second.trust.rejections == 2
    # No step is left to judge: the loss is what it is, and λ what it was.
    for loss, new_level in ((7.0, True), (2.01, False), (np.nan, False)):
        third = judge(loss, predicted=0.0, rejections=2, extra_damping=8.0)
        assert not third.rejected and third.new_level == new_level
        extra = 0.5 if new_level else 8.0
        np.testing.assert_allclose(third.trust.extra_damping, extra)


def test_a_loss_that_climbs_is_stopped():
    """By rises that are tolerated one by one."""
    trend, rises = 1.0, 0
    while not (verdict := judge(2.05, trend=trend)).rejected:
        trend, rises = verdict.trust.trend, rises + 1
        assert rises < 12
    assert rises == 6
    assert not judge(1.99, trend=-0.9).rejected
    assert judge(2.05, trend=-0.9, rejections=1).trust.rejections == 2
    assert judge(2.05, predicted=0.0, trend=-0.9, rejections=2).trust.trend == 0


def test_a_loss_stays_within_four_errors_of_its_lowest():
    """Also by rises that are tolerated one by one, with falls between."""
    above = functools.partial(judge, same_data=True)
    for climb, loss, rejected in (
        *((0.04, 2.05, False), (0.07, 2.05, True), (0.2, 1.99, False)),
        *((0.0, 2.09, False), (0.0, 2.11, True)),
    ):
        verdict = above(loss, climb=climb)
        assert verdict.rejected == rejected
        # It is above by so much then; and what is too high is no error of the model.
        stays = rejected or loss < 2
        assert (verdict.trust.model_error == np.float32(0.02)) == stays
        after = climb if rejected else climb + loss - 2
        np.testing.assert_allclose(verdict.trust.climb, after, rtol=1e-4)
    assert above(1.9, climb=0.04).trust.climb == 0
    assert judge(2.05).trust.climb == 0  # of sampled batches
    # What was promised too much is no error either, above the lowest one.
    for climb, error in ((0.0, 0.028), (0.04, 0.018)):
        verdict = above(1.99, predicted=5.0, climb=climb)
        np.testing.assert_allclose(verdict.trust.model_error, error, rtol=1e-4)
    # A new level is the lowest.
    level = above(7.0, predicted=0.0, rejections=2, climb=0.09)
    assert level.new_level and level.trust.climb == 0 and level.trust.model_error > 1


def test_a_prediction_that_is_negative_is_judged_all_the_same():
    last = LastStep(*map(jnp.float32, (2.0, 0.1, 0.5, 0.0, 0.0)))
    assert last.predicted_decrease < 0
    for loss, rejected in ((2.1, True), (2.05, False), (1.0, False)):
        verdict = trust.judge(
            jnp.float32(loss),
            jnp.array(True),
            last,
            trust_of(),
            jnp.float32(0.1),
            5,
            True,
        )
        assert verdict.rejected == rejected


def test_a_straight_line_is_judged_by_what_came():
    """Twice as far after half of what it promised, half as far below a quarter."""
    last = LastStep(*map(jnp.float32, (2.0, 0.4, 0.01, 0.0, 0.0)))
    for decrease, factor in ((0.3, 2), (0.15, 1), (0.05, 0.5), (-0.05, 0.5)):
        loss = jnp.float32(2.0 - decrease)
        verdict = trust.judge(
            loss, jnp.array(True), last, trust_of(), jnp.float32(0.1), 5, True
        )
        assert not verdict.rejected and verdict.trust.length_factor == factor
    # A curved model may be as wrong as its promise, a line may not.
    for curved, rejected in ((0.01, True), (0.4, False)):
        last = last._replace(prev_curvature=jnp.float32(curved))
        verdict = trust.judge(
            jnp.float32(2.15),
            jnp.array(True),
            last,
            trust_of(),
            jnp.float32(0.1),
            5,
            True,
        )
        assert verdict.rejected == rejected


def test_where_there_is_no_curvature():
    def flat(slope, curved, usual=0.0, most=None, factor=1.0, after_flat=False):
        numbers = map(jnp.float32, (slope, curved, 4.0, usual))
        return trust.lacks_curvature(*numbers, most, factor, jnp.array(after_flat))

    assert flat(1.0, 0.0)[0] and not flat(0.0, 0.0)[0]
    is_flat, usual = flat(1.0, 8.0)
    assert not is_flat and usual == pytest.approx(2.0)  # for a length of 1
    is_flat, usual = flat(1.0, 8.0, usual=2.0 * 101)
    assert is_flat and usual == pytest.approx(2.0 * 101**0.8)
    assert not flat(1.0, 8.0, usual=2.0 * 99)[0]
    # By the slope and the curvature the loss would fall by 16.
    assert flat(16.0, 8.0, most=1.5)[0] and not flat(16.0, 8.0, most=1.7)[0]
    assert flat(16.0, 8.0, most=31.0, after_flat=True)[0]
    assert not flat(16.0, 8.0, most=33.0, after_flat=True)[0]
    huge, small = (flat(x * 1e30, x * 0.5e30, most=x * 1.5e30) for x in (1.0, 1e-60))
    assert not huge[0] and not small[0]
    assert flat(16.0, 8.0, factor=0.5)[0] and not flat(16.0, 8.0, most=-1.0)[0]

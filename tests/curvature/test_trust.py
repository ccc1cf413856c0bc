"""The verdict on a step, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlcg_optax.curvature import trust
from nlcg_optax.curvature.state import LastStep, Trust


def judge(
    loss,
    prev_value=2.0,
    predicted=0.1,
    extra_damping=0.5,
    model_error=0.02,
    damping=0.1,
    finite=True,
):
    last = LastStep(*map(jnp.float32, (prev_value, predicted, 0.0, 0.0, 0.0)))
    trusted = Trust(
        *map(jnp.float32, (damping, extra_damping, 0.0, model_error, 0.0, 0.0))
    )
    verdict = trust.judge(
        jnp.float32(loss), jnp.asarray(finite), last, trusted, jnp.float32(damping), 5
    )
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
    np.testing.assert_allclose(verdict.trust.model_error, 0.02, rtol=1e-6)
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
        trusted = Trust(*map(jnp.float32, (0.1, 0.5, 0.0, 0.02, 0.0, 0.0)))
        last = LastStep(*map(jnp.float32, (2.0, 0.1, 0.0, 0.0, 0.0)))
        for count, decrease in enumerate(decreases):
            loss = jnp.float32(2.0 - decrease)
            trusted = trust.judge(
                loss, jnp.array(True), last, trusted, jnp.float32(0.1), count
            ).trust
        loss = jnp.float32(1.0)
        fits = (loss, loss, None, jnp.array(False), trusted, len(decreases))
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
    trusted = Trust(*map(jnp.float32, (0.1, 0.5, 0.0, 0.02, 0.0, 0.0)))
    numbers = map(jnp.float32, (loss, own))
    flat = jnp.array(False)
    assert trust.mismatch(*numbers, fraction, flat, trusted, 9) == expected
    assert trust.mismatch(*map(jnp.float32, (1, 1)), 1, ~flat, trusted, 0)

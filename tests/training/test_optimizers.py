import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nlcg_optax
from nlcg_optax.training import config as config_lib
from nlcg_optax.training import optimizers
from nlcg_optax.training.config import (
    ConfigError,
    apply_overrides,
    base_config,
    load_config,
    typed,
)
from nlcg_optax.training.run_config import OptimizerConfig, RunConfig, fields_of

ALL = sorted([*optimizers.OPTIMIZERS, *optimizers.DECAYING_OPTIMIZERS])


def make_config(**fields):
    config = config_lib.base_config()
    config.update_from_flattened_dict(fields)
    return typed(config)


def test_step_schedule_follows_the_recipe():
    config = make_config(
        **{
            "num_epochs": 200.0,
            "optimizer.learning_rate": 1.6,
            "schedule.warmup_epochs": 25.0,
            "schedule.warmup_init": 0.0625,
            "schedule.boundaries": (102, 153),
        }
    )
    rate = optimizers.create_schedule(config, steps_per_epoch=2.0)
    warmup = [(0.1 - 1.6) * (1 - t / 50) ** 0.5 + 1.6 for t in range(50)]
    np.testing.assert_allclose([rate(t) for t in range(50)], warmup, rtol=1e-5)
    np.testing.assert_allclose(
        [rate(t) for t in (50, 203, 204, 305, 306, 399)],
        [1.6, 1.6, 0.16, 0.16, 0.016, 0.016],
        rtol=1e-5,
    )


def test_cosine_schedule_ends_at_zero():
    config = make_config(
        **{
            "num_epochs": 10.0,
            "optimizer.learning_rate": 2.0,
            "schedule.name": "cosine",
            "schedule.warmup_epochs": 2.0,
        }
    )
    rate = optimizers.create_schedule(config, steps_per_epoch=3.0)
    np.testing.assert_allclose([rate(6), rate(18), rate(30)], [2, 1, 0], atol=1e-6)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_a_warmup_from_zero_wastes_no_step(power):
    config = make_config(
        **{
            "optimizer.learning_rate": 2.0,
            "schedule.name": "constant",
            "schedule.warmup_epochs": 4.0,
            "schedule.warmup_power": power,
        }
    )
    rate = optimizers.create_schedule(config, steps_per_epoch=1.0)
    expected = [2 * (1 - (1 - t / 5) ** power) for t in (1, 2, 3, 4, 5)]
    np.testing.assert_allclose([rate(t) for t in range(5)], expected, rtol=1e-5)
    assert rate(5) == 2


@pytest.mark.parametrize("name", ALL)
def test_every_optimizer_descends_and_keeps_bias_undecayed(name):
    """Weight decay alone moves what the mask names, by rate·decay·w, no more."""
    config = make_config(
        **{"optimizer.name": name, "weight_decay": 0.1, "optimizer.learning_rate": 0.5}
    )
    mask = {"w": True, "b": False}
    tx = optimizers.create_optimizer(config, optax.constant_schedule(0.5), mask)
    params = {"w": jnp.array([1.0, -2.0]), "b": jnp.array([3.0])}
    state = tx.init(params)
    step = jax.jit(tx.update)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = step(zero, state, params, value=jnp.float32(1.0))
    np.testing.assert_array_equal(updates["b"], 0)
    if name not in ("lars", "lamb"):  # theirs is scaled by the trust ratio
        np.testing.assert_allclose(updates["w"], -0.05 * params["w"], rtol=1e-6)

    loss, grads = jax.value_and_grad(lambda p: optax.tree.norm(p) ** 2)(params)
    updates, _ = step(grads, state, params, value=loss)
    assert optax.tree.vdot(grads, updates) < 0


def test_muon_orthogonalizes_kernels_as_matrices():
    config = make_config(**{"optimizer.name": "muon"})
    tx = optimizers.create_optimizer(config, optax.constant_schedule(0.5), True)
    params = {"kernel": jnp.zeros((3, 3, 2, 4)), "bias": jnp.zeros(4)}
    grads = jax.tree.map(
        lambda w: jnp.cos(jnp.arange(w.size, dtype=w.dtype) ** 2).reshape(w.shape),
        params,
    )
    updates, _ = tx.update(grads, tx.init(params), params, value=jnp.float32(1.0))
    # Singular values near 1, times the rate and 0.2·√18, the longer side.
    values = np.linalg.svd(np.reshape(updates["kernel"], (18, 4)), compute_uv=False)
    np.testing.assert_allclose(values, 0.5 * 0.2 * 18**0.5, rtol=0.35)
    # Adam's first step, with Nesterov's momentum.
    adam = -0.5 * (0.9 * 0.1 / (1 - 0.9**2) + 1) * np.sign(grads["bias"])
    np.testing.assert_allclose(updates["bias"], adam, 1e-3)


@pytest.mark.parametrize(
    "preconditioner",
    ["orthogonalization", "soap", "diagonal_bfgs", "rms", "adam", "none"],
)
@pytest.mark.parametrize("step_rule", ["step", "online", "none"])
@pytest.mark.parametrize("name", ["nlcg", "nlcg_paper"])
def test_nlcg_options_reach_the_optimizer(name, preconditioner, step_rule):
    config = make_config(
        **{
            "optimizer.name": name,
            f"optimizer.{name}.preconditioner": preconditioner,
            f"optimizer.{name}.step_rule": step_rule,
            f"optimizer.{name}.beta_rule": "dai_yuan",
        }
    )
    tx = optimizers.create_optimizer(config, optax.constant_schedule(0.5), True)
    params = jnp.array([1.0, 2.0])
    updates, _ = tx.update(params, tx.init(params), params, value=1.0)
    expected = {
        "rms": [1 / 0.1**0.5] * 2,
        "adam": [1.0, 1.0],
        "orthogonalization": [1.0, 1.0],  # a vector is no matrix
        "soap": [1.0, 1.0],
    }
    np.testing.assert_allclose(
        updates, -0.5 * np.array(expected.get(preconditioner, [1.0, 2.0])), rtol=1e-4
    )


@pytest.mark.parametrize("name", ["nlcg", "nlcg_paper"])
def test_the_defaults_are_those_of_the_function_of_that_name(name):
    config = make_config(**{"optimizer.name": name})
    ours = optimizers.create_optimizer(config, optax.constant_schedule(0.1), None)
    expected = getattr(nlcg_optax, name)(0.1)
    scale = jnp.array([[1.0, 4.0], [9.0, 0.5]])
    x = y = jnp.array([[1.0, -2.0], [3.0, 1.5]])
    state, expected_state = ours.init(x), expected.init(x)
    for _ in range(12):
        # The loss rises and falls, so that the step rule acts.
        loss = jnp.sum(scale * y**2)
        updates, expected_state = expected.update(
            2 * scale * y, expected_state, y, value=loss
        )
        y = y + updates
        updates, state = ours.update(2 * scale * x, state, x, value=loss)
        x = x + updates
        np.testing.assert_allclose(x, y, rtol=1e-5)


def test_layerwise_coefficient_scales_the_gradient_first():
    config = make_config(
        **{
            "optimizer.layerwise_coefficient": 0.01,
            "optimizer.nlcg.preconditioner": "none",
        }
    )
    tx = optimizers.create_optimizer(config, optax.constant_schedule(1.0), True)
    params, grads = jnp.array([3.0, 4.0]), jnp.array([0.0, 2.0])
    updates, _ = tx.update(grads, tx.init(params), params, value=1.0)
    np.testing.assert_allclose(updates, [0, -2 * 0.05 / (2 + 0.005)], rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer.name": "sgdm"}, "optimizer.name='sgdm'.*'momentum'"),
        ({"schedule.name": "linear"}, "schedule.name='linear'.*'cosine'"),
        ({"optimizer.nlcg.beta_rule": "fr"}, "beta_rule='fr'.*'fletcher_reeves'"),
        ({"optimizer.nlcg.preconditioner": "hessian"}, "preconditioner.*'rms'"),
        (
            {"optimizer.name": "nlcg_paper", "optimizer.nlcg_paper.period": 0},
            "period=0",
        ),
        (
            {"optimizer.name": "nlcg_paper", "optimizer.nlcg_paper.preconditioner": ""},
            "optimizer.nlcg_paper.preconditioner=''.*'diagonal_bfgs'",
        ),
    ],
)
def test_mistakes_name_the_field_and_what_is_accepted(fields, message):
    with pytest.raises(ConfigError, match=message):
        config = make_config(**fields)
        schedule = optimizers.create_schedule(config, 1.0)
        optimizers.create_optimizer(config, schedule, True)


AUTO = "optimizer.name=nlcg_auto"


def overridden(*overrides, name=None):
    config = load_config(name) if name else base_config()
    apply_overrides(config, [AUTO, *overrides])
    return typed(config)


@pytest.mark.parametrize(
    ("override", "needles"),
    [
        (f"{AUTO}.curvature_fraction=0.0", ["curvature_fraction=0.0", "part"]),
        (f"{AUTO}.curvature_fraction=1.5", ["curvature_fraction=1.5", "part"]),
        (f"{AUTO}.curvature_min_examples=0", ["min_examples=0", "at least 1"]),
        (f"{AUTO}.residuals=-1", ["residuals=-1", "at least 0"]),
        (f"{AUTO}.preconditioner=bfgs", ["preconditioner='bfgs'", "'diagonal_bfgs'"]),
        (
            "optimizer.layerwise_coefficient=0.1",
            ["layerwise_coefficient=0.1", "add --config.optimizer.layerwise_coeff"],
        ),
        (
            "optimizer.learning_rate=0.2",
            ["learning_rate=0.2 would", "add --config.optimizer.learning_rate=none."],
        ),
        ("schedule.name=linear", ["schedule.name='linear'", "'none'"]),
        (
            "schedule.warmup_epochs=2",
            ["schedule.warmup_epochs=2.0 would", "add --config.schedule.name=none."],
        ),
        (
            "optimizer.nlcg.step_rule=quadratic_model",
            ["step_rule='quadratic_model'", "optimizer.name=nlcg_auto"],
        ),
    ],
)
def test_what_does_not_go_with_nlcg_auto(override, needles):
    with pytest.raises(ConfigError) as error:
        overridden(override.replace("name=nlcg_auto.", "nlcg_auto."))
    for needle in needles:
        assert needle in str(error.value)


@pytest.mark.parametrize("name", ["cifar10_resnet32", "imagenet_resnet50"])
def test_the_error_tells_how_to_run_a_built_in_config_by_curvature(name):
    with pytest.raises(ConfigError, match=r"learning_rate=.*schedule.name=") as error:
        overridden(name=name)
    words = re.findall(r"--config\.(\S+=\w+)", str(error.value))
    config = overridden(*words, name=name)
    assert config.optimizer.learning_rate is None and config.schedule.name == "none"


@pytest.mark.parametrize("override", ["optimizer.learning_rate", "schedule.name"])
def test_what_nlcg_auto_alone_can_do_without(override):
    config = base_config()
    apply_overrides(config, [f"{override}=none"])
    with pytest.raises(ConfigError, match=f"(?i){override}='?none'?.* nlcg_auto"):
        typed(config)


def test_with_nlcg_auto_there_is_no_learning_rate():
    schedule = optimizers.create_schedule(overridden(), 10.0)
    assert [schedule(t) for t in (0, 5, 9)] == [1.0] * 3


def test_the_config_says_how_many_residual_directions():
    sizes = []
    for number in (0, 5):
        config = overridden(f"optimizer.nlcg_auto.residuals={number}")
        tx = optimizers.create_optimizer(config, optax.constant_schedule(1.0), None, 10)
        report = nlcg_optax.diagnostics(tx.init({"w": jnp.ones((2, 3))}))
        sizes.append(len(report["coefficients"]))
    assert sizes[1] == sizes[0] + 5


def test_the_config_knows_all_the_optimizers():
    _, _, known, _ = fields_of(OptimizerConfig)["name"]
    assert sorted([*ALL, "nlcg_auto"]) == sorted(known)
    assert typed(base_config()) == RunConfig()
    with pytest.raises(ConfigError, match="batch_size=None is not valid: .* int"):
        make_config(batch_size=None)

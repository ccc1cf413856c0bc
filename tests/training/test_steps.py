import re

import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nlcg_optax
from nlcg_optax.training import models, optimizers, steps
from nlcg_optax.training.config import ConfigError, base_config, typed
from nlcg_optax.training.mesh import create_mesh

SHAPE = (4, 4, 1)


class Tiny(nn.Module):
    """Small enough to compile at once; names as in the ResNets."""

    batch_norm_momentum: float = 0.99

    @nn.compact
    def __call__(self, x, train, mask=None):
        mask = None if mask is None else mask[:, None, None, None]
        x = nn.Conv(2, (3, 3), use_bias=False)(x)
        norm = nn.BatchNorm(not train, momentum=self.batch_norm_momentum)
        x = nn.relu(norm(x, mask=mask))
        return nn.Dense(3)(x.reshape(len(x), -1))


def setup(**fields):
    config = base_config()
    config.batch_size = 6
    config.update_from_flattened_dict(fields)
    config = typed(config)
    mesh = create_mesh(config.mesh)
    model = Tiny()
    schedule = optax.constant_schedule(config.optimizer.learning_rate or 1.0)
    tx = optimizers.create_optimizer(config, schedule, models.l2_mask)
    state = steps.create_state(model, tx, config, SHAPE, mesh)
    step = steps.make_train_step(model, tx, schedule, config, mesh, augment=False)
    return config, model, state, jax.jit(step)


def batch(seed=0, size=6):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (1, size, *SHAPE)), jnp.uint8),
        "label": jnp.asarray(rng.integers(0, 3, (1, size)), jnp.int32),
    }


def test_l2_penalty_is_in_the_loss_and_leaves_batch_norm_out():
    *_, state, step = setup(l2_penalty=0.0)
    _, plain = step(state, batch())
    *_, state, step = setup(l2_penalty=0.1)
    _, penalized = step(state, batch())
    squares = sum(
        float(jnp.sum(leaf**2))
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
        if "BatchNorm" not in jax.tree_util.keystr(path)
    )
    np.testing.assert_allclose(
        penalized["loss"] - plain["loss"], 0.05 * squares, rtol=1e-4
    )


def test_step_is_the_optimizers_update_of_the_reported_loss():
    config, model, state, step = setup(**{"optimizer.name": "sgd", "l2_penalty": 0.0})
    data = batch()

    def loss_fn(params):
        images = steps.normalizer(config.dataset)(data["image"][0])
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
        one_hot = jax.nn.one_hot(data["label"][0], 3)
        return -jnp.mean(jnp.sum(one_hot * jax.nn.log_softmax(logits), -1))

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    new_state, metrics = step(state, data)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)
    rate = config.optimizer.learning_rate
    expected = jax.tree.map(lambda p, g: p - rate * g, state.params, grads)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        new_state.params,
        expected,
    )
    assert int(new_state.step) == 1


def test_microbatches_are_normalized_by_their_own_statistics():
    options = {"l2_penalty": 0.1, "optimizer.name": "sgd"}
    config, model, state, step = setup(microbatches=2, **options)
    data = batch()
    halves = jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[2:]), data)
    new_state, metrics = step(state, halves)

    def loss_fn(params, images, labels):
        variables = {"params": params, "batch_stats": state.batch_stats}
        images = steps.normalizer(config.dataset)(images)
        logits, new = model.apply(
            variables, images, train=True, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses) + 0.1 * steps.l2_loss(params), new["batch_stats"]

    parts = [
        jax.value_and_grad(loss_fn, has_aux=True)(state.params, image, label)
        for image, label in zip(halves["image"], halves["label"], strict=True)
    ]
    (loss, stats), grads = jax.tree.map(lambda a, b: (a + b) / 2, *parts)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        new_state.batch_stats,
        stats,
    )
    # Those of the whole batch are others.
    *_, step = setup(**options)
    _, whole = step(state, data)
    assert abs(whole["loss"] - loss) > 1e-3


def test_convolutions_of_microbatches_have_the_layout_that_is_fast_in_a_loop():
    *_, state, step = setup(microbatches=2)
    halves = jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[2:]), batch())
    program = step.lower(state, halves).as_text()
    layouts = re.findall(r"dim_numbers = (\[.*?\]->\[.*?\])", program)
    assert {*layouts} == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}


def test_parameters_are_averaged_with_a_short_memory_at_first():
    *_, state, step = setup(average_decay=0.15)
    first, _ = step(state, batch())
    second, _ = step(first, batch(1))
    leaf = lambda tree: np.asarray(jax.tree.leaves(tree)[0])  # noqa: E731
    average = 0.1 * leaf(state.params) + 0.9 * leaf(first.params)
    np.testing.assert_allclose(leaf(first.average), average, rtol=1e-5, atol=1e-7)
    average = 0.15 * average + 0.85 * leaf(second.params)  # (1 + 1)/(10 + 1) > 0.15
    np.testing.assert_allclose(leaf(second.average), average, rtol=1e-5, atol=1e-7)


def test_a_step_that_is_not_finite_leaves_the_state_as_it_was():
    *_, state, step = setup()
    state, _ = step(state, batch())
    broken = state.replace(
        params=jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.inf), state.params)
    )
    after, metrics = step(broken, batch(1))
    assert not np.isfinite(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, after, broken)


def test_metrics_say_what_nlcg_did():
    *_, state, step = setup()
    state, first = step(state, batch())
    state, second = step(state, batch())
    assert first["beta"] == 0 and second["beta"] > 0
    assert 0 < first["cosine"] < 1  # of the gradient and what orthogonalization makes
    assert first["step_size"] == first["learning_rate"] * first["base_step"]


def test_evaluation_ignores_padding_and_uses_the_average():
    config, model, state, step = setup(average_decay=0.9)
    state, _ = step(state, batch())
    mesh = create_mesh(config.mesh)
    evaluate = jax.jit(steps.make_eval_step(model, config.dataset, mesh))
    whole = {**batch(2, 5), "mask": jnp.ones((1, 5))}
    padded = jax.tree.map(lambda x: jnp.concatenate([x, x[:, :3]], 1), whole)
    padded["mask"] = padded["mask"].at[:, 5:].set(0)
    expected = evaluate(state, whole)
    assert expected["count"] == 5
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        evaluate(state, padded),
        expected,
    )
    swapped = state.replace(params=state.average, average=None)
    np.testing.assert_allclose(
        evaluate(swapped, whole)["loss"], expected["loss"], rtol=1e-5
    )
    other = evaluate(state.replace(average=None), whole)
    assert abs(other["loss"] - expected["loss"]) > 1e-4


@pytest.mark.parametrize("average_decay", [0.0, 0.9])
def test_precise_statistics_are_those_of_the_activations(average_decay):
    """Of the weights that are evaluated, over all batches; padding does not count."""
    config, model, state, step = setup(average_decay=average_decay)
    for i in range(2):
        state, _ = step(state, batch(i))
    parts = [batch(seed, size=8) for seed in (2, 3, 4)]
    mesh = create_mesh(config.mesh)
    statistics = jax.jit(
        steps.make_statistics_step(model, config.dataset, mesh, batch_size=6)
    )
    before = jax.device_get(state)
    found = steps.pool_statistics(
        jax.device_get([statistics(state, part) for part in parts])
    )
    images = np.concatenate([part["image"][0, :6] for part in parts])
    _, seen = model.apply(
        {"params": state.average or state.params, "batch_stats": state.batch_stats},
        steps.normalizer(config.dataset)(images),
        train=False,
        capture_intermediates=lambda module, _: isinstance(module, nn.Conv),
    )
    (activations,) = jax.tree.leaves(seen["intermediates"])
    activations = np.asarray(activations, np.float64)
    expected = {
        "mean": activations.mean(axis=(0, 1, 2)),
        "var": activations.var(axis=(0, 1, 2)),
    }
    assert found.keys() == state.batch_stats.keys() == {"BatchNorm_0"}
    for name, value in expected.items():
        np.testing.assert_allclose(found["BatchNorm_0"][name], value, rtol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)
    lagging = state.batch_stats["BatchNorm_0"]["var"]
    assert np.abs(lagging / expected["var"] - 1).max() > 0.1


def test_unknown_normalization_lists_the_known_ones():
    with pytest.raises(ConfigError, match="normalization='mean'.*'per_image'"):
        setup(**{"dataset.normalization": "mean"})


# --- By curvature ------------------------------------------------------------


def auto_setup(**fields):
    return setup(**{"optimizer.name": "nlcg_auto", "l2_penalty": 0.01, **fields})


@pytest.mark.parametrize(
    ("fraction", "stride"),
    [
        (0.1, 6),
        pytest.param(0.5, 2, marks=pytest.mark.long),
        pytest.param(1.0, 1, marks=pytest.mark.long),
    ],
)
def test_nlcg_auto_sees_the_curvature_of_some_images(fraction, stride):
    # Without a preconditioner, so that rounding stays what it is.
    config, model, state, step = auto_setup(
        **{
            "optimizer.nlcg_auto.curvature_fraction": fraction,
            "optimizer.nlcg_auto.curvature_min_examples": 1,
            "optimizer.nlcg_auto.preconditioner": "none",
        }
    )
    data = batch()
    images = steps.normalizer(config.dataset)(data["image"][0])
    labels = data["label"][0]

    def run_model(params, images):
        variables = {"params": params, "batch_stats": state.batch_stats}
        return model.apply(variables, images, train=True, mutable=["batch_stats"])

    def cross_entropy(logits, labels):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def loss_fn(params):
        penalty = config.l2_penalty * steps.l2_loss(params)
        return cross_entropy(run_model(params, images)[0], labels) + penalty

    def penalized_outputs(params):
        return run_model(params, images[::stride])[0], params

    def penalized_loss(outputs):
        logits, params = outputs
        penalty = config.l2_penalty * steps.l2_loss(params)
        return cross_entropy(logits, labels[::stride]) + penalty

    @jax.jit
    def wanted_updates(params):
        tx = nlcg_optax.scale_by_quadratic_model(optax.identity())
        loss, grads = jax.value_and_grad(loss_fn)(params)
        curvature = nlcg_optax.gauss_newton(penalized_outputs, penalized_loss)
        given = {"value": loss, "curvature": curvature}
        return tx.update(grads, tx.init(params), params, **given)[0]

    updates = wanted_updates(state.params)
    new_state, metrics = step(state, data)
    for new, old, u in zip(
        *map(jax.tree.leaves, (new_state.params, state.params, updates)), strict=True
    ):
        np.testing.assert_allclose(new, old - u, rtol=1e-5, atol=1e-6)
    assert metrics["taken_back"] == 0
    wanted = ("gradient", "past_1", "past_3", "residual_2")
    names = {f"coefficient_{n}" for n in wanted}
    assert names < set(metrics) and metrics["coefficient_gradient"] > 0


def test_nlcg_auto_decays_by_the_penalty_itself_but_for_batch_norm():
    """Decay in its model takes the step of as much penalty in the loss."""
    plain = {"optimizer.nlcg_auto.curvature_fraction": 1.0}
    plain["optimizer.nlcg_auto.preconditioner"] = "none"
    moved = []
    for fields in ({}, {"weight_decay": 1e-3}, {"l2_penalty": 1e-3}):
        *_, state, step = auto_setup(**{"l2_penalty": 0.0, **plain, **fields})
        # Weights long enough to be penalized.
        params = jax.tree.map(lambda w: 3 * w, state.params)
        state = state.replace(params=params)
        for _ in range(3):
            state, _ = step(state, batch())
        moved.append(
            jax.flatten_util.ravel_pytree(state.params)[0]
            - jax.flatten_util.ravel_pytree(params)[0]
        )
    without, decayed, penalized = map(np.asarray, moved)
    np.testing.assert_allclose(decayed, penalized, rtol=1e-3, atol=1e-5)
    assert np.abs(without - penalized).max() > 20 * np.abs(decayed - penalized).max()


def test_nlcg_auto_takes_microbatches():
    fields = {"microbatches": 2, "optimizer.nlcg_auto.curvature_fraction": 1.0}
    *_, state, step = auto_setup(**fields)
    data = jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[2:]), batch())
    losses = []
    for _ in range(8):
        state, metrics = step(state, data)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]


def test_nlcg_auto_takes_back_a_step_to_where_there_is_no_loss():
    *_, state, step = auto_setup()
    first, _ = step(state, batch())
    # As if that step had led far away.
    far = first.replace(params=jax.tree.map(lambda x: x * jnp.inf, first.params))
    back, metrics = step(far, batch())
    assert not np.isfinite(metrics["loss"]) and metrics["taken_back"] == 1
    assert back.step == 2
    arrays = [x for x in jax.tree.leaves((back.batch_stats, back.opt_state)) if x.ndim]
    assert all(np.all(np.isfinite(x)) for x in arrays)

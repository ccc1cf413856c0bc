import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlcg_optax.training import models

# Optimising the random numbers of an initialisation takes XLA half a minute.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def shapes_of(model, size=32):
    """Shapes of the variables, without computing them."""
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    init = functools.partial(model.init, train=True)
    return jax.eval_shape(init, jax.random.key(0), images)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def count_by_hand(depth, num_classes):
    """Weights of every layer, in the order of the network."""
    total = 9 * 3 * 16
    inputs = 16
    for filters in (16, 32, 64):
        for block in range((depth - 2) // 6):
            total += 2 * inputs
            total += inputs * filters if block == 0 else 0
            total += 9 * inputs * filters + 2 * filters + 9 * filters * filters
            inputs = filters
    return total + 2 * 64 + 64 * num_classes + num_classes


@pytest.mark.parametrize(
    ("depth", "published"),
    [(8, None), (14, None), (20, 0.27e6), (32, 0.46e6), (56, 0.85e6)],
)
def test_small_family_has_the_published_size(depth, published):
    params = count(shapes_of(models.create_model(f"resnet{depth}", 10))["params"])
    assert params == count_by_hand(depth, 10)
    if published:
        # He et al. (2015) give two digits, for shortcuts without parameters.
        projections = 16 * 16 + 16 * 32 + 32 * 64
        assert abs(params - projections - published) < 0.005e6


def test_projections_are_in_the_first_block_of_every_stage():
    params = shapes_of(models.create_model("resnet14", 10))["params"]
    projected = [name for name in params if "projection" in params[name]]
    assert projected == ["stage1_block1", "stage2_block1", "stage3_block1"]


def test_no_convolution_has_a_bias():
    for name in ("resnet8", "resnet50"):
        params = shapes_of(models.create_model(name, 10))["params"]
        for path, _ in jax.tree_util.tree_leaves_with_path(params):
            keys = [key.key for key in path]
            if "Conv" in keys[-2] or keys[-2] == "projection":
                assert keys[-1] == "kernel"


def test_resnet50_has_its_parameters():
    params = shapes_of(models.create_model("resnet50", 1000), size=224)["params"]
    assert count(params) == 25_557_032
    assert len(params) == 2 + 3 + 4 + 6 + 3 + 1


def capture_shapes(model, size):
    def run(images):
        variables = model.init(jax.random.key(0), images, train=False)
        _, state = model.apply(
            variables, images, train=False, capture_intermediates=True, mutable=True
        )
        return state["intermediates"]

    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    captured = jax.eval_shape(run, images)
    return captured, {
        name: value["__call__"][0].shape
        for name, value in captured.items()
        if name.startswith("stage")
    }


def test_small_family_halves_the_image_at_stages_two_and_three():
    _, shapes = capture_shapes(models.create_model("resnet14", 10), 32)
    assert shapes == {
        "stage1_block1": (2, 32, 32, 16),
        "stage1_block2": (2, 32, 32, 16),
        "stage2_block1": (2, 16, 16, 32),
        "stage2_block2": (2, 16, 16, 32),
        "stage3_block1": (2, 8, 8, 64),
        "stage3_block2": (2, 8, 8, 64),
    }


def test_resnet50_strides_in_the_3x3_convolution():
    captured, shapes = capture_shapes(models.create_model("resnet50", 10), 64)
    assert shapes["stage1_block3"] == (2, 16, 16, 256)
    assert shapes["stage4_block3"] == (2, 2, 2, 2048)
    block = captured["stage2_block1"]
    assert block["Conv_0"]["__call__"][0].shape == (2, 16, 16, 128)
    assert block["Conv_1"]["__call__"][0].shape == (2, 8, 8, 128)


def small(**kwargs):
    kwargs = {"depth": 8, "num_classes": 5, "filters": 4} | kwargs
    return models.ResNetV2(**kwargs)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (4, 8, 8, 3))


@pytest.fixture(scope="module")
def variables(images):
    return quick_jit(functools.partial(small().init, train=False))(
        jax.random.key(0), images
    )


def apply(model, variables, images, **kwargs):
    kwargs = {"train": False, "mutable": True} | kwargs
    return quick_jit(functools.partial(model.apply, **kwargs))(variables, images)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_and_logits_are_float32(dtype, variables, images):
    model = small(dtype=jnp.dtype(dtype))
    shapes = jax.eval_shape(
        functools.partial(model.init, train=True), jax.random.key(0), images
    )
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes)} == {"float32"}
    logits, state = apply(model, variables, images, capture_intermediates=True)
    assert (logits.shape, logits.dtype) == ((4, 5), jnp.float32)
    blocks = state["intermediates"]
    assert blocks["stage3_block1"]["__call__"][0].dtype == jnp.dtype(dtype)


def test_bfloat16_computes_about_the_same(variables, images):
    exact, _ = apply(small(), variables, images)
    rough, _ = apply(small(dtype=jnp.bfloat16), variables, images)
    np.testing.assert_allclose(rough, exact, atol=0.05 * float(jnp.std(exact)) + 0.02)
    assert not np.array_equal(rough, exact)


def test_a_block_adds_its_projected_input(variables, images):
    """The first block, computed by hand from its layers."""
    _, state = apply(small(), variables, images, capture_intermediates=True)
    captured = state["intermediates"]["stage2_block1"]

    def output(name):
        return captured[name]["__call__"][0]

    np.testing.assert_allclose(
        captured["__call__"][0],
        output("projection") + output("Conv_1"),
        rtol=1e-5,
        atol=1e-6,
    )
    kernel = variables["params"]["stage2_block1"]["projection"]["kernel"]
    activated = nn.relu(output("BatchNorm_0"))
    np.testing.assert_allclose(
        output("projection"),
        jnp.einsum("bhwi,io->bhwo", activated[:, ::2, ::2], kernel[0, 0]),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("momentum", [0.99, 0.6])
def test_statistics_follow_the_batch_with_the_momentum(momentum, variables, images):
    model = small(batch_norm_momentum=momentum)
    _, state = apply(model, variables, images, train=True, capture_intermediates=True)
    before = state["intermediates"]["Conv_0"]["__call__"][0]
    stats = state["batch_stats"]["stage1_block1"]["BatchNorm_0"]
    mean = np.mean(before, axis=(0, 1, 2))
    var = np.var(before, axis=(0, 1, 2))
    np.testing.assert_allclose(stats["mean"], (1 - momentum) * mean, atol=1e-5)
    np.testing.assert_allclose(stats["var"], momentum + (1 - momentum) * var, rtol=1e-4)


def test_evaluation_leaves_the_statistics(variables, images):
    _, state = apply(small(), variables, images)
    jax.tree.map(
        np.testing.assert_array_equal, state["batch_stats"], variables["batch_stats"]
    )


def test_axis_name_makes_statistics_global(variables, images):
    run = functools.partial(small(axis_name="data").apply, train=True, mutable=True)
    halves = images.reshape(2, 2, 8, 8, 3)
    run = quick_jit(jax.vmap(run, in_axes=(None, 0), axis_name="data"))
    logits, state = run(variables, halves)
    expected, whole = apply(small(), variables, images, train=True)
    np.testing.assert_allclose(logits.reshape(4, 5), expected, rtol=1e-3, atol=1e-4)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x[0], y, rtol=1e-3, atol=1e-4),
        state["batch_stats"],
        whole["batch_stats"],
    )


@pytest.mark.parametrize("zero", [True, False])
def test_last_scale_of_a_bottleneck_starts_at_zero(zero):
    model = models.ResNet50(num_classes=2, zero_init_residual=zero)

    @quick_jit
    def scales():
        variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=True)
        block = variables["params"]["stage3_block2"]
        return [jnp.max(block[f"BatchNorm_{i}"]["scale"]) for i in range(3)]

    assert [float(x) for x in scales()] == [1, 1, 0 if zero else 1]


def test_l2_mask_spares_batch_norm_alone():
    for name in ("resnet8", "resnet50"):
        params = shapes_of(models.create_model(name, 10))["params"]
        mask = models.l2_mask(params)
        assert jax.tree.structure(mask) == jax.tree.structure(params)
        for path, penalised in jax.tree_util.tree_leaves_with_path(mask):
            assert penalised == ("BatchNorm" not in jax.tree_util.keystr(path))
        assert mask["Dense_0"] == {"kernel": True, "bias": True}


@pytest.mark.parametrize("depth", [2, 9, 18, -4])
def test_depth_must_be_6n_plus_2(depth):
    with pytest.raises(ValueError, match=rf"6n \+ 2.*8, 14, 20.*not {depth}$"):
        models.ResNetV2(depth=depth, num_classes=10)


def test_unknown_names_are_told_the_known_ones():
    with pytest.raises(ValueError, match="'resnet18'; known: resnet8, .*resnet50"):
        models.create_model("resnet18", 10)
    with pytest.raises(ValueError, match="'float64'; known: float32, bfloat16"):
        models.create_model("resnet8", 10, dtype="float64")
    with pytest.raises(ValueError, match="num_classes must be at least 1, not 0"):
        models.create_model("resnet8", 0)
    with pytest.raises(ValueError, match="filters.* not 0 for resnet8"):
        models.create_model("resnet8", 10, filters=0)
    with pytest.raises(ValueError, match="filters.* not 8 for resnet50"):
        models.create_model("resnet50", 10, filters=8)


def test_options_of_create_model_arrive():
    for name in models.MODELS:
        model = models.create_model(
            name,
            7,
            dtype="bfloat16",
            batch_norm_momentum=0.5,
            batch_norm_epsilon=0.25,
        )
        assert model.num_classes == 7
        assert model.dtype == jnp.bfloat16
        assert model.batch_norm_momentum == 0.5
        assert model.batch_norm_epsilon == 0.25
    for filters, expected in ((None, 16), (8, 8)):
        assert models.create_model("resnet8", 10, filters=filters).filters == expected

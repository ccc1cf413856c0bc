"""What XLA is told, and does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nlcg_optax
from nlcg_optax import _xla


def lowered(function, *args):
    # Anew, whatever was lowered before.
    return jax.jit(lambda *args: function(*args)).lower(*args)


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def test_compiled_once(monkeypatch):
    once = _xla.compiled_once(lambda x: x @ x.T @ x)
    x = jnp.arange(6.0).reshape(2, 3)

    def twice(x):
        return once(x) + once(x + 1)

    assert lowered(twice, x).as_text().count("dot_general") == 4
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    made = lowered(twice, x)
    assert made.as_text().count("dot_general") == 2
    program = made.compile()
    assert program.as_text().count(" call(") == 2
    y = x + 1
    np.testing.assert_allclose(program(x), x @ x.T @ x + y @ y.T @ y)


def test_matrices_of_one_shape_are_compiled_once(one_device):
    tx = nlcg_optax.scale_by_orthogonalization()
    params = {str(i): jnp.full([4, 6], 0.1 * i) + jnp.eye(4, 6) for i in range(3)}
    counts = []
    for some in (params, {"0": params["0"]}):
        text = lowered(tx.update, some, tx.init(some)).as_text()
        counts.append(text.count("dot_general"))
    assert counts[0] == counts[1] > 0


def layouts(program):
    """Of the convolutions of a lowered program."""
    return {
        line.split("dim_numbers = ")[1].split(", window")[0]
        for line in program.as_text().splitlines()
        if "stablehlo.convolution" in line
    }


FAST = {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}


@jax.jit
def layer(x, w):
    y = jax.lax.conv_general_dilated(
        x,
        w,
        (2, 1),
        "SAME",
        rhs_dilation=(1, 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
    )
    return jnp.tanh(y)


def model(w, x):
    return layer(layer(x, w["a"]), w["b"])


def mean_square(y, x):
    return jnp.mean(y**2)


@pytest.fixture
def images():
    key = jax.random.key(0)
    shapes = {"a": (3, 2, 1, 4), "b": (3, 3, 2, 6)}
    w = {k: jax.random.normal(key, s) for k, s in shapes.items()}
    return w, jax.random.normal(key, (4, 8, 6, 2))


def test_the_pull_of_convolutions_is_of_the_layout_that_is_fast(one_device, images):
    w, x = images
    curvature = nlcg_optax.gauss_newton(model, mean_square, x)

    def times(w):
        linear = curvature.linearize(w)
        return linear.pull(linear.push(jax.tree.map(lambda x: x[None], w)))

    made = lowered(times, w)
    assert layouts(made) == FAST
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        made.compile()(w),
        curvature.times(w, w),
    )


def test_so_is_the_gradient_of_microbatches(one_device, images):
    evaluate = nlcg_optax.value_grad_and_curvature(model, mean_square, microbatches=2)
    assert layouts(lowered(lambda w, x: evaluate(w, x)[:2], *images)) == FAST

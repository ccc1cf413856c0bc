"""Curvature along a few directions, against dense matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nlcg_optax

RNG = np.random.default_rng(0)
ROWS, FEATURES, CLASSES = 12, 3, 4
X = RNG.normal(size=(ROWS, FEATURES))
LABELS = RNG.integers(CLASSES, size=ROWS)
TARGETS = RNG.normal(size=(ROWS, CLASSES))
COUNTS = RNG.poisson(2.0, size=(ROWS, CLASSES)).astype(float)
SIGNS = RNG.choice([-1.0, 1.0], size=(ROWS, CLASSES))
PARAMS = {
    "hidden": RNG.normal(size=(FEATURES, 5)),
    "bias": RNG.normal(size=5),
    "out": RNG.normal(size=(5, CLASSES)),
}
DIRECTIONS = [
    jax.tree.map(lambda x: RNG.normal(size=x.shape), PARAMS) for _ in range(3)
]


def model(params, x=X):
    return jnp.tanh(x @ params["hidden"] + params["bias"]) @ params["out"]


# Each loss, and the second derivative of one row's loss by its outputs, by hand.


def softmax_curvature(y, _):
    p = np.exp(y - y.max())
    p /= p.sum()
    return np.diag(p) - np.outer(p, p)


def logistic_curvature(y, sign):
    s = 1 / (1 + np.exp(-sign * y))
    return np.diag(s * (1 - s))


LOSSES = {
    "squared error": (
        lambda y: jnp.mean(jnp.sum((y - TARGETS) ** 2, -1)),
        lambda y, _: 2 * np.eye(CLASSES),
    ),
    "softmax cross-entropy": (
        lambda y: jnp.mean(optax.softmax_cross_entropy_with_integer_labels(y, LABELS)),
        softmax_curvature,
    ),
    "logistic": (
        lambda y: jnp.mean(jnp.sum(jnp.log1p(jnp.exp(-SIGNS * y)), -1)),
        logistic_curvature,
    ),
    "Poisson": (
        lambda y: jnp.mean(jnp.sum(jnp.exp(y) - COUNTS * y, -1)),
        lambda y, _: np.diag(np.exp(y)),
    ),
}


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def jacobian(outputs_fn, params):
    """Rows × outputs × parameters, the leaves in the order of `flat`."""
    leaves = jax.tree.leaves(jax.jit(jax.jacrev(outputs_fn))(params))
    return np.concatenate([np.reshape(x, (ROWS, CLASSES, -1)) for x in leaves], -1)


def dense_gauss_newton(row_curvature):
    jac, y = jacobian(model, PARAMS), np.asarray(model(PARAMS))
    curvatures = [row_curvature(y[n], SIGNS[n]) for n in range(ROWS)]
    return sum(j.T @ c @ j for j, c in zip(jac, curvatures, strict=True)) / ROWS


def along(matrix, directions=DIRECTIONS):
    d = np.stack([flat(direction) for direction in directions])
    return d @ matrix @ d.T


@jax.jit
def both(curvature, params, directions):
    """The matrix, and its last row from the product with the last direction."""
    matrix = curvature(params, directions)
    product = curvature.times(params, directions[-1])
    for leaf, x in zip(jax.tree.leaves(product), jax.tree.leaves(params), strict=True):
        assert leaf.shape == x.shape and leaf.dtype == x.dtype

    def inner(direction):
        return sum(
            jnp.sum(jnp.real(jnp.conj(d).astype(p.dtype) * p)).astype(matrix.dtype)
            for d, p in zip(
                jax.tree.leaves(direction), jax.tree.leaves(product), strict=True
            )
        )

    return matrix, jnp.stack([inner(d) for d in directions])


def close(curvature, params, directions, expected, rtol=1e-10):
    # A constant to `jit`, so that it may be an argument.
    got, row = both(curvature, params, directions)
    assert got.dtype == jnp.float64
    largest = abs(np.asarray(expected)).max()
    np.testing.assert_allclose(got, got.T, rtol=1e-14, atol=1e-14 * largest)
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol * largest)
    np.testing.assert_allclose(row, expected[-1], rtol=rtol, atol=rtol * largest)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_gauss_newton_is_the_dense_matrix(loss, count, x64):
    loss_fn, row_curvature = LOSSES[loss]
    curvature = nlcg_optax.gauss_newton(model, loss_fn)
    expected = along(dense_gauss_newton(row_curvature), DIRECTIONS[:count])
    close(curvature, PARAMS, DIRECTIONS[:count], expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_hessian_is_the_dense_matrix(loss, x64):
    def value_fn(params):
        return LOSSES[loss][0](model(params))

    blocks = jax.jit(jax.hessian(value_fn))(PARAMS)
    sizes = {name: x.size for name, x in PARAMS.items()}
    names = sorted(PARAMS)
    dense = np.block(
        [[np.reshape(blocks[a][b], (sizes[a], sizes[b])) for b in names] for a in names]
    )
    curvature = nlcg_optax.hessian(value_fn)
    close(curvature, PARAMS, DIRECTIONS, along(dense))


def test_of_a_loss_that_is_convex_in_linear_outputs_both_are_the_same(x64):
    def outputs_fn(params):
        return X @ params["hidden"] @ PARAMS["out"][:5]

    loss_fn, _ = LOSSES["softmax cross-entropy"]
    hidden = [{"hidden": d["hidden"]} for d in DIRECTIONS]
    args = ({"hidden": PARAMS["hidden"]}, hidden)
    expected = nlcg_optax.hessian(lambda p: loss_fn(outputs_fn(p)))
    close(nlcg_optax.gauss_newton(outputs_fn, loss_fn), *args, both(expected, *args)[0])


def test_directions_in_turn_are_those_side_by_side(x64):
    loss, row_curvature = LOSSES["Poisson"]
    expected = along(dense_gauss_newton(row_curvature))
    curvature = nlcg_optax.gauss_newton(
        lambda p: (model(p), "aux"), loss, has_aux=True, in_turn=True
    )
    close(curvature, PARAMS, DIRECTIONS, expected)


def test_penalty(x64):
    loss_fn, row_curvature = LOSSES["softmax cross-entropy"]
    no_bias = np.concatenate(  # in the order of `flat`: bias, hidden, out
        [np.zeros(5), np.ones(PARAMS["hidden"].size + PARAMS["out"].size)]
    )
    expected = along(dense_gauss_newton(row_curvature) + 0.3 * np.diag(no_bias))
    mask = {"hidden": True, "bias": False, "out": True}
    for l2_mask in (mask, lambda params: {name: name != "bias" for name in params}):
        curvature = nlcg_optax.gauss_newton(model, loss_fn, l2=0.3, l2_mask=l2_mask)
        close(curvature, PARAMS, DIRECTIONS, expected)
    # The parameters as outputs say the same.
    among = nlcg_optax.gauss_newton(
        lambda params: {"logits": model(params), "params": params},
        lambda y: (
            loss_fn(y["logits"])
            + 0.15 * jnp.sum(y["params"]["hidden"] ** 2)
            + 0.15 * jnp.sum(y["params"]["out"] ** 2)
        ),
    )
    close(among, PARAMS, DIRECTIONS, expected)
    whole = nlcg_optax.gauss_newton(model, loss_fn, l2=0.3)
    identity = np.eye(no_bias.size)
    close(
        whole,
        PARAMS,
        DIRECTIONS,
        along(dense_gauss_newton(row_curvature) + 0.3 * identity),
    )


def test_auxiliary_outputs_are_ignored(x64):
    loss_fn, row_curvature = LOSSES["squared error"]
    curvature = nlcg_optax.gauss_newton(
        lambda params: (model(params), {"seen": jnp.int32(ROWS)}),
        loss_fn,
        has_aux=True,
    )
    close(curvature, PARAMS, DIRECTIONS, along(dense_gauss_newton(row_curvature)))


@pytest.mark.parametrize("kind", ["gauss_newton", "hessian"])
def test_microbatches_are_averaged(kind, x64):
    def rows(params, part):
        return model(params, part["x"])

    def loss_fn(y, part):
        return jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(y, part["labels"])
        )

    parts = {"x": X.reshape(3, 4, FEATURES), "labels": LABELS.reshape(3, 4)}
    whole = {"x": X, "labels": LABELS}

    def make(part, **options):
        if kind == "hessian":
            return nlcg_optax.hessian(
                lambda params, *one: loss_fn(
                    rows(params, *(one or part)), *(one or part)
                ),
                **options,
            )
        return nlcg_optax.gauss_newton(
            lambda params, *one: rows(params, *(one or part)),
            lambda y, *one: loss_fn(y, *(one or part)),
            **options,
        )

    expected, _ = both(make((whole,)), PARAMS, DIRECTIONS)
    close(make(None, microbatches=parts), PARAMS, DIRECTIONS, expected)


COMPLEX = {"w": np.array([1.0 + 2.0j, -0.5 + 0.25j]), "b": np.array([0.3, -1.0])}


def complex_outputs(params):
    w, b = params["w"], params["b"]
    wave = jax.lax.complex(jnp.cos(b), jnp.sin(b)) * w**2
    return {"wave": wave + jnp.conj(w[::-1]), "power": jnp.abs(w) ** 2 * b}


def complex_loss(y):
    off = y["wave"] - jnp.array([1.0 - 1.0j, 2.0j])
    square = jnp.real(off) ** 2 + 3 * jnp.imag(off) ** 2 + jnp.real(off) * jnp.imag(off)
    return jnp.sum(square * jnp.exp(0.1 * y["power"]))


def as_real(v):
    """[Re w, Im w, b] as one vector, and back."""
    return {"w": jax.lax.complex(*jnp.split(v[:4], 2)), "b": v[4:]}


def test_complex_parameters_and_outputs(x64):
    x = np.array([1.0, -0.5, 2.0, 0.25, 0.3, -1.0])
    d = RNG.normal(size=(3, 6))
    directions = [as_real(row) for row in d]

    def real_outputs(v):
        y = complex_outputs(as_real(v))
        return jnp.concatenate([y["wave"].real, y["wave"].imag, y["power"]])

    def real_loss(y):
        wave = jax.lax.complex(*jnp.split(y[:4], 2))
        return complex_loss({"wave": wave, "power": y[4:]})

    @jax.jit
    def dense_gauss_newton(x):
        jac = jax.jacfwd(real_outputs)(x)
        return jac.T @ jax.hessian(real_loss)(real_outputs(x)) @ jac

    curvature = nlcg_optax.gauss_newton(complex_outputs, complex_loss, l2=0.2)
    close(
        curvature,
        COMPLEX,
        directions,
        np.asarray(d @ (dense_gauss_newton(x) + 0.2 * np.eye(6)) @ d.T),
    )
    dense = jax.jit(jax.hessian(lambda v: real_loss(real_outputs(v))))(x)
    curvature = nlcg_optax.hessian(lambda p: complex_loss(complex_outputs(p)))
    close(curvature, COMPLEX, directions, np.asarray(d @ dense @ d.T))


def test_mixed_dtypes_are_summed_in_float32():
    # 1001 products that need 15 bits each: bfloat16 has 8.
    fine = jnp.full(1001, 1 + 2.0**-7, jnp.bfloat16)
    params = {"half": jnp.zeros(1001, jnp.bfloat16), "single": jnp.zeros([])}

    def outputs_fn(params):
        return {"half": params["half"], "single": 3 * params["single"]}

    def loss_fn(y):
        half = 0.5 * jnp.sum(y["half"] ** 2)
        return half.astype(jnp.float32) + 0.5 * y["single"] ** 2

    direction = {"half": fine, "single": jnp.float32(2.0)}
    expected = 1001 * (1 + 2.0**-7) ** 2 + 36
    curvature = nlcg_optax.gauss_newton(outputs_fn, loss_fn, l2=1.0)
    got, _ = both(curvature, params, [direction])
    assert got.dtype == jnp.float32
    penalty = 1001 * (1 + 2.0**-7) ** 2 + 4
    np.testing.assert_allclose(got, [[expected + penalty]], rtol=1e-6)
    # Directions of another precision are taken in the parameters'.
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), direction)
    np.testing.assert_array_equal(both(curvature, params, [wide])[0], got)


# --- Transformations of JAX ---------------------------------------------------------

LAYERS = 0.5 * RNG.normal(size=(4, 3, 3))
LAYER_DIRECTIONS = [RNG.normal(size=LAYERS.shape) for _ in range(2)]


def in_a_loop(layers, x=X):
    for layer in layers:
        x = jnp.tanh(x @ layer)
    return x


def in_a_scan(layers, x=X, wrap=lambda f: f):
    return jax.lax.scan(wrap(lambda x, w: (jnp.tanh(x @ w), None)), x, layers)[0]


@pytest.mark.parametrize(
    "outputs_fn",
    [
        in_a_scan,
        jax.checkpoint(in_a_loop),
        functools.partial(in_a_scan, wrap=jax.checkpoint),
        jax.jit(in_a_loop),
    ],
    ids=["scan", "remat", "scan of remat", "jit"],
)
def test_scan_and_remat(outputs_fn, x64):
    def loss_fn(y):
        return jnp.mean(optax.softmax_cross_entropy(y, jax.nn.one_hot(LABELS % 3, 3)))

    args = (LAYERS, LAYER_DIRECTIONS)
    expected, _ = both(nlcg_optax.gauss_newton(in_a_loop, loss_fn), *args)
    close(nlcg_optax.gauss_newton(outputs_fn, loss_fn), *args, expected)
    expected, _ = both(nlcg_optax.hessian(lambda w: loss_fn(in_a_loop(w))), *args)
    close(nlcg_optax.hessian(lambda w: loss_fn(outputs_fn(w))), *args, expected)


@pytest.mark.parametrize("kind", ["gauss_newton", "hessian"])
def test_vmap_is_a_loop(kind, x64):
    loss_fn, _ = LOSSES["Poisson"]
    if kind == "gauss_newton":
        curvature = nlcg_optax.gauss_newton(model, loss_fn)
    else:
        curvature = nlcg_optax.hessian(lambda params: loss_fn(model(params)))
    scales = np.array([1.0, 0.5, -0.3])
    stacked = jax.tree.map(lambda x: np.stack([c * x for c in scales]), PARAMS)
    got = jax.jit(jax.vmap(curvature, (0, None)))(stacked, DIRECTIONS)
    for c, one in zip(scales, got, strict=True):
        params = jax.tree.map(lambda x, c=c: c * x, PARAMS)
        close(curvature, params, DIRECTIONS, one)


def test_the_model_runs_forward_once_for_all_directions():
    """Counted in the program: each direction adds its own products, and no more."""
    loss_fn, _ = LOSSES["softmax cross-entropy"]
    curvature = nlcg_optax.gauss_newton(model, loss_fn)
    params = single(PARAMS)

    def flops(count):
        lowered = jax.jit(curvature).lower(params, [params] * count)
        return lowered.compile().cost_analysis()["flops"]

    forward = jax.jit(model).lower(params).compile().cost_analysis()["flops"]
    one, two, four = flops(1), flops(2), flops(4)
    assert two - one < 3 * forward
    # The outputs are small here, so that their own products count for more than usual.
    assert four - one < 3.6 * (two - one)


# --- Part of the parameters ---------------------------------------------------------


def test_part_of_the_parameters(x64):
    loss_fn, row_curvature = LOSSES["softmax cross-entropy"]
    # Integers among what is fixed are no matter.
    whole = PARAMS | {"count": np.int32(3)}
    masked = optax.MaskedNode()
    part = {**PARAMS, "out": masked, "count": masked}
    directions = [{**d, "out": masked, "count": masked} for d in DIRECTIONS]
    size = flat({name: PARAMS[name] for name in ("bias", "hidden")}).size
    d = np.stack([flat(direction) for direction in directions])
    dense = dense_gauss_newton(row_curvature)[:size, :size] + 0.3 * np.eye(size)
    curvature = nlcg_optax.gauss_newton(model, loss_fn, params=whole, l2=0.3)
    close(curvature, part, directions, d @ dense @ d.T)
    curvature = nlcg_optax.gauss_newton(model, loss_fn)
    with pytest.raises(ValueError, match="params=params"):
        curvature(part, directions)


def test_no_parameters():
    curvature = nlcg_optax.gauss_newton(lambda p: jnp.zeros(3), jnp.sum)
    np.testing.assert_array_equal(curvature({}, [{}, {}]), np.zeros((2, 2)))


# --- Bad input ----------------------------------------------------------------------


def single(tree):
    return jax.tree.map(np.float32, tree)


def check(error, *needles):
    for needle in needles:
        assert needle in str(error.value)


def test_outputs_that_are_no_floats():
    def zero(y):
        return jnp.float32(0.0)

    args = single((PARAMS, DIRECTIONS))
    curvature = nlcg_optax.gauss_newton(
        lambda p: {"classes": jnp.argmax(model(p, np.float32(X)), -1)}, zero
    )
    with pytest.raises(TypeError) as error:
        curvature(*args)
    check(error, "classes", "int32", "has_aux=True", "nlcg_optax.gauss_newton(lambda")
    with pytest.raises(ValueError) as error:
        nlcg_optax.gauss_newton(lambda p: (), zero)(*args)
    check(error, "outputs_fn returned nothing", "nlcg_optax.gauss_newton(lambda")


@pytest.mark.parametrize(
    ("loss_fn", "needles"),
    [
        (lambda y: jnp.mean(y, -1), ["(12,)", "float32"]),
        (lambda y: jnp.sum(y).astype(jnp.complex64), ["()", "complex64"]),
        (lambda y: jnp.int32(3), ["()", "int32"]),
    ],
)
def test_a_loss_that_is_no_real_scalar(loss_fn, needles):
    params, directions = single((PARAMS, DIRECTIONS))

    def outputs_fn(params):
        return model(params, np.float32(X))

    with pytest.raises(ValueError) as error:
        nlcg_optax.gauss_newton(outputs_fn, loss_fn)(params, directions)
    check(error, "loss_fn returned", *needles, "real scalar", "gauss_newton(lambda")
    with pytest.raises(ValueError) as error:
        nlcg_optax.hessian(lambda p: loss_fn(outputs_fn(p)))(params, directions)
    check(error, "value_fn returned", *needles, "real scalar", "hessian(lambda")


def test_directions_that_do_not_match():
    curvature = nlcg_optax.hessian(lambda p: jnp.sum(p["w"] ** 2))
    params = {"w": jnp.ones(3)}
    with pytest.raises(ValueError) as error:
        curvature(params, [params, {"v": jnp.ones(3)}])
    check(error, "Direction 1", "'v'", "'w'")
    with pytest.raises(ValueError) as error:
        curvature(params, [{"w": jnp.ones(2)}])
    check(error, "Direction 0", "'w'", "(2,)", "(3,)")


@pytest.mark.parametrize("l2", [-1.0, "0.1", None])
def test_a_coefficient_that_is_none(l2):
    with pytest.raises(ValueError, match="l2="):
        nlcg_optax.gauss_newton(model, LOSSES["Poisson"][0], l2=l2)


def test_an_axis_that_nothing_maps():
    curvature = nlcg_optax.hessian(lambda p: jnp.sum(p**2), axis_name="data")
    with pytest.raises(NameError, match="'data' is not bound"):
        curvature(jnp.ones(3), [jnp.ones(3)])

"""Orthogonalization against singular values by NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.sharding import PartitionSpec as P
from matrices.coefficients import polar_express

import nlcg_optax
from nlcg_optax import scale_by_orthogonalization

pytestmark = pytest.mark.usefixtures("x64")

SHAPES = [(5, 3), (3, 5), (4, 4), (1, 6), (6, 1), (3, 3, 2, 4), (3, 3, 5, 2)]


def normal(shape, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    if np.issubdtype(dtype, np.complexfloating):
        x = x + 1j * rng.normal(size=shape)
    return x.astype(dtype)


def once(g, **options):
    tx = scale_by_orthogonalization(**options)
    return tx.update(g, tx.init(g))[0]


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matrices_agree_with_oracle(shape, dtype):
    g = normal(shape, dtype=dtype)
    got = once(g, matrices=nlcg_optax.matrices.last_axis)
    np.testing.assert_allclose(got, oracle.orthogonalize(g), atol=1e-12)


def test_the_other_leaves_agree_with_oracle():
    tx = scale_by_orthogonalization(decay=0.9, epsilon=1e-2)
    gradients = [
        {"bias": normal(4, seed), "scale": normal((), seed), "z": normal(2, seed) * 1j}
        for seed in range(6)
    ]
    state = tx.init(gradients[0])
    got = []
    for g in gradients:
        update, state = tx.update(g, state)
        got.append(update)
    for name in gradients[0]:
        rows = [g[name] for g in gradients]
        expected = oracle.second_moments(rows, decay=0.9, epsilon=1e-2)
        for update, row in zip(got, expected, strict=True):
            np.testing.assert_allclose(update[name], row, rtol=1e-12)


@pytest.mark.parametrize("iterations", [1, 3, 7])
def test_the_number_of_iterations(iterations):
    g = normal((4, 3))
    expected = oracle.orthogonalize(g, iterations)
    np.testing.assert_allclose(once(g, iterations=iterations), expected, atol=1e-12)


def test_the_coefficients():
    g = normal((4, 3))
    # Polar Express has no safety factor in its last step.
    last = polar_express(5, 0.002)[-1]
    steps = [*oracle.POLAR_EXPRESS[:4], last]
    expected = oracle.orthogonalize(g, quintics=steps, norm=8)
    got = once(g, coefficients="polar_express")
    np.testing.assert_allclose(got, expected, atol=1e-12)
    given = [(1.5, -0.5, 0.0), (1.875, -1.25, 0.375)]
    steps = [*given, given[1], given[1]]
    expected = oracle.orthogonalize(g, 4, quintics=steps, norm=8)
    got = once(g, coefficients=given, iterations=4)
    np.testing.assert_allclose(got, expected, atol=1e-12)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(96, 96), (300, 40)], ids=str)
def test_half_precision_stays_near(shape, precision):
    # Small singular values are where rounding would make an iteration blow up.
    u, sigma, vh = np.linalg.svd(normal(shape, dtype=np.float32), full_matrices=False)
    sigma = sigma[0] * np.geomspace(1, 1e-4, len(sigma), dtype=np.float32)
    g = (u * sigma) @ vh
    error = once(g, precision=precision) - once(g)
    assert np.sqrt(np.mean(error**2)) < 0.3 * 0.2 * np.sqrt(len(sigma) / min(shape))
    assert np.linalg.norm(error, 2) < 1.5 * 0.2 * math.sqrt(max(shape))
    largest = u[:, :20].T @ error @ vh[:20].T / (0.2 * math.sqrt(max(shape)))
    assert np.abs(largest).max() < 0.1
    if precision == "float16":
        double = np.asarray(g, np.float64)  # which has its own products
        np.testing.assert_allclose(
            once(double, precision=precision), once(double), atol=1e-9
        )


def test_singular_values_end_near_one():
    g = jnp.asarray(normal((60, 40)) * np.logspace(0, -1.5, 40))
    near = {
        ("muon", 5): (0.68, 1.21),
        ("polar_express", 5): (0.97, 1.03),
        ("polar_express", 4): (0.96, 1.04),
    }
    for (name, iterations), (least, most) in near.items():
        z = once(g, coefficients=name, iterations=iterations)
        sigma = np.linalg.svd(z / (0.2 * math.sqrt(60)), compute_uv=False)
        assert least < sigma.min() < sigma.max() < most
        # So the root mean square is near 0.2, whatever the shape.
        tall = jnp.asarray(normal((300, 20)))
        tall = once(tall, coefficients=name, iterations=iterations)
        assert least < math.sqrt(jnp.mean(tall**2)) / 0.2 < most


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(scale):
    # The squares of such float32 entries are not float32 numbers.
    g = normal((7, 5), dtype=np.float32)
    got, plain = once(g * np.float32(scale)), once(g)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 4), (3,), ()])
@pytest.mark.parametrize("epsilon", [0.0, 1e-8])
def test_a_gradient_of_zero_stays_zero(shape, epsilon):
    g = jnp.zeros(shape)
    np.testing.assert_array_equal(once(g, epsilon=epsilon), g)


def test_layers_of_a_scan_are_matrices_of_their_own():
    g = normal((3, 5, 4))
    expected = np.stack([oracle.orthogonalize(layer) for layer in g])
    np.testing.assert_allclose(once(g, batch_axes=1), expected, atol=1e-12)
    rows = nlcg_optax.matrices.last_axis
    assert not np.allclose(once(g, matrices=rows), expected)
    # A bias of each layer is no matrix.
    bias = normal((3, 4))
    np.testing.assert_allclose(once(bias, batch_axes=1), np.sign(bias), rtol=1e-6)


def test_bfloat16_is_computed_in_float32():
    g = jnp.asarray(normal((64, 32)), jnp.bfloat16)
    got = once(g)
    assert got.dtype == jnp.bfloat16
    exact = oracle.orthogonalize(np.asarray(g, np.float64))
    # To the rounding of the result alone.
    np.testing.assert_allclose(np.asarray(got, np.float64), exact, atol=2e-3)
    state = scale_by_orthogonalization().init(jnp.zeros(3, jnp.bfloat16))
    assert state.root_mean_square.dtype == jnp.float32


def test_only_the_other_leaves_are_remembered():
    params = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    state = scale_by_orthogonalization().init(params)
    assert [x.shape for x in jax.tree.leaves(state)] == [(), (4,)]


def test_the_metric_is_the_nuclear_norm():
    # gᵀz of the exact polar factor; the iteration comes within its band.
    g = normal((6, 4))
    nuclear = np.linalg.svd(g, compute_uv=False).sum() * 0.2 * math.sqrt(6)
    assert 0.68 < np.vdot(g, once(g)) / nuclear < 1.21
    z = once(g, coefficients="polar_express")
    assert np.vdot(g, z) / nuclear == pytest.approx(1, abs=0.03)


def test_gradients_of_another_tree():
    tx = scale_by_orthogonalization()
    state = tx.init({"w": jnp.ones((2, 2)), "b": jnp.ones(2)})
    with pytest.raises(ValueError, match="do not match"):
        tx.update({"w": jnp.ones((2, 2))}, state)
    with pytest.raises(ValueError, match=r"\(3,\), expected \(2,\)"):
        tx.update({"w": jnp.ones((2, 2)), "b": jnp.ones(3)}, state)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"decay": -0.1}, "at least 0"),
        ({"decay": 1.0}, "below 1"),
        ({"decay": "a"}, "a number"),
        ({"epsilon": -1.0}, "at least 0"),
        ({"iterations": 0}, "at least 1"),
        ({"iterations": 2.5}, "an integer"),
        ({"coefficients": "best"}, "'muon', 'polar_express'"),
        ({"coefficients": []}, "sequence of"),
        ({"coefficients": [(1.5, -0.5)]}, "sequence of"),
        ({"coefficients": [("a", 0.0, 1.0)]}, "sequence of"),
        ({"precision": "float8"}, "'bfloat16', 'float16', 'highest'"),
        ({"mesh": "data"}, "jax.sharding.Mesh"),
        ({"batch_axes": -1}, "at least 0"),
    ],
    ids=str,
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words) as error:
        scale_by_orthogonalization(**options)
    assert next(iter(options)) in str(error.value)


@pytest.mark.parametrize("name", ["iterations", "batch_axes"])
def test_traced_counts_are_to_be_static(name):
    with pytest.raises(ValueError, match=f"{name} is a traced .*static_args=") as error:
        jax.jit(lambda count: once(jnp.ones((2, 2)), **{name: count}))(1)
    assert f"'{name}'" in str(error.value)


@pytest.mark.standard_promotion  # optax's Adam promotes
def test_other_leaves_by_partition():
    # The first layer by Adam's second moment, the rest orthogonalized.
    tx = nlcg_optax.scale_by_conjugate_direction(
        preconditioner=optax.partition(
            {
                "adam": optax.scale_by_adam(b1=0.0),
                "matrix": scale_by_orthogonalization(),
            },
            {"first": "adam", "second": "matrix"},
        )
    )
    g = {"first": jnp.asarray(normal((3, 2))), "second": jnp.asarray(normal((3, 2), 1))}
    update, _ = tx.update(g, tx.init(g))
    np.testing.assert_allclose(update["first"], np.sign(g["first"]), rtol=1e-6)
    np.testing.assert_allclose(update["second"], oracle.orthogonalize(g["second"]))


def one_device(check_vma, spec):
    """An update of a kernel and a bias in a `shard_map` over one device."""
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
    tx = scale_by_orthogonalization(axis_name="data")

    def update(g):
        return tx.update(g, tx.init(g))[0]

    specs = {"kernel": spec, "bias": P("data")}
    return jax.jit(
        jax.shard_map(
            update, mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=check_vma
        )
    )


def test_whole_matrices_among_sharded_leaves():
    g = {"kernel": normal((4, 3)), "bias": normal(4)}
    update = one_device(True, P())(g)
    np.testing.assert_allclose(
        update["kernel"], oracle.orthogonalize(g["kernel"]), atol=1e-12
    )
    np.testing.assert_allclose(update["bias"], np.sign(g["bias"]), rtol=1e-6)


@pytest.mark.parametrize(
    ("check_vma", "spec"), [(True, P("data")), (True, P(None, "data")), (False, P())]
)
def test_sharded_matrices_are_refused(check_vma, spec):
    g = {"kernel": normal((4, 3)), "bias": normal(4)}
    with pytest.raises(ValueError, match="'kernel'.*sharded over 'data'"):
        one_device(check_vma, spec)(g)
    with pytest.raises(NameError, match="'data' is not bound"):
        once(g, axis_name="data")

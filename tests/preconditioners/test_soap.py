"""SOAP against a literal statement by NumPy, and where it could go wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import nlcg_optax
from nlcg_optax import matrices, scale_by_soap
from nlcg_optax.matrices.matrix import is_kept

pytestmark = pytest.mark.usefixtures("x64")


def gradients(shape=(5, 5), number=8, dtype=np.float64):
    """Matrices that change slowly, with singular values of several sizes."""
    rng = np.random.default_rng(0)
    scale = np.geomspace(1, 0.03, shape[-1])
    found = [rng.normal(size=shape) * scale for _ in range(number)]
    if np.issubdtype(dtype, np.complexfloating):
        found = [g + 1j * rng.normal(size=shape) * scale for g in found]
    return [g.astype(dtype) for g in found]


def run(grads, **options):
    """All updates, and the state."""
    tx = scale_by_soap(**options)
    state, out = tx.init(grads[0]), []
    update = jax.jit(tx.update)
    for g in grads:
        z, state = update(g, state)
        out.append(z)
    return out, state


def factors(state):
    nodes = jax.tree.leaves(state.factors, is_leaf=is_kept)
    return [jax.tree.map(lambda x: x[0, 0, 0], node) for node in nodes]


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize(
    "options",
    [
        {"b1": b1, "every": every, "linear": linear}
        for b1 in (0.0, 0.9)
        for every in (1, 3)
        for linear in (False, True)
    ]
    + [{"b1": 0.9, "nesterov": True}],
    ids=str,
)
def test_matrices_agree_with_oracle(options, dtype):
    grads = gradients(dtype=dtype)
    options = {"b2": 0.8, **options}
    got, state = run(grads, **options)
    for z, expected in zip(got, oracle.soap(grads, **options), strict=True):
        np.testing.assert_allclose(z, expected, atol=1e-9)
    assert nlcg_optax.diagnostics(state)["soap_fallbacks"] == 0


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (2, 2, 2, 3)], ids=str)
def test_a_longer_side_has_no_basis(shape):
    grads = gradients(shape)
    got, state = run(grads, max_side=3, matrices=matrices.last_axis)
    rows = [g.reshape(-1, g.shape[-1]) for g in grads]
    for z, expected in zip(got, oracle.soap(rows, max_side=3), strict=True):
        np.testing.assert_allclose(z, expected.reshape(shape), atol=1e-9)
    (node,) = factors(state)
    assert node.right is None and node.left.shape == (3, 3)


def test_other_leaves_are_scaled_as_by_adam_from_the_second_gradient_on():
    shapes = {"bias": (4,), "embedding": (6, 2)}
    rng = np.random.default_rng(0)
    grads = [{k: rng.normal(size=s) for k, s in shapes.items()} for _ in range(5)]
    got, _ = run(grads, b1=0.5, b2=0.8, eps=1e-3)
    adam = optax.scale_by_adam(b1=0.5, b2=0.8, eps=1e-3)
    state, update = (
        adam.init(grads[0]),
        jax.numpy_dtype_promotion("standard")(adam.update),
    )
    for name, scale in (("bias", 1), ("embedding", 0.2)):
        first = grads[0][name]
        expected = scale * first / (np.abs(first) + 1e-3)
        np.testing.assert_allclose(got[0][name], expected, rtol=1e-12)
    for z, g in zip(got[1:], grads[1:], strict=True):
        expected, state = update(g, state)
        np.testing.assert_allclose(z["bias"], expected["bias"], rtol=1e-9)
        np.testing.assert_allclose(
            z["embedding"], 0.2 * expected["embedding"], rtol=1e-9
        )


def test_other_leaves_look_ahead_as_by_nadam():
    rng = np.random.default_rng(0)
    grads = [rng.normal(size=4) for _ in range(5)]
    got, _ = run(grads, b1=0.5, b2=0.8, nesterov=True)
    mean, v = 0.0, 0.0
    for t, (z, g) in enumerate(zip(got, grads, strict=True)):
        if t:
            mean, v = 0.5 * mean + 0.5 * g, 0.8 * v + 0.2 * g**2
            ahead = 0.5 * mean / (1 - 0.5**t) + 0.5 * g
            np.testing.assert_allclose(z, ahead / np.sqrt(v / (1 - 0.8**t)), rtol=1e-6)


def test_the_averages_part_may_change_from_step_to_step():
    grads = [
        {"w": g, "b": g[0]} for g in gradients((4, 6))[:5]
    ]  # a matrix, and what is none
    ahead = scale_by_soap(0.7, nesterov=True)
    states = {weight: ahead.init(grads[0]) for weight in (None, 0.7, 1.0, 0.0, 0.4)}
    plain, without = scale_by_soap(0.7), scale_by_soap()
    plain_state, without_state = plain.init(grads[0]), without.init(grads[0])
    for g in grads:
        z = {}
        for weight in states:
            given = {} if weight is None else {"mean_weight": jnp.asarray(weight)}
            z[weight], states[weight] = ahead.update(g, states[weight], **given)
        z["average"], plain_state = plain.update(g, plain_state, mean_weight=None)
        z["gradient"], without_state = without.update(g, without_state, mean_weight=0.3)
        mixed = jax.tree.map(lambda a, b: 0.4 * a + 0.6 * b, z[1.0], z[0.0])
        for one, other in (
            (z[0.7], z[None]),
            (z[1.0], z["average"]),
            (z[0.0], z["gradient"]),
            (z[0.4], mixed),
        ):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), one, other
            )


def test_numbers_may_be_arrays_on_a_mesh_with_explicit_axes():
    kind = jax.sharding.AxisType.Explicit
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    tx = scale_by_soap(jnp.asarray(0.7), nesterov=True)
    step = jax.jit(lambda g, state, weight: tx.update(g, state, mean_weight=weight))

    def last_of(grads):
        state = tx.init(grads[0])
        for g in grads:
            z, state = step(g, state, jnp.asarray(0.4))
        return z

    grads = gradients()[:3]
    alone = last_of(grads)
    with jax.set_mesh(mesh):
        spread = last_of(jax.device_put(grads, jax.P()))
    np.testing.assert_allclose(spread, alone, rtol=1e-12)


@pytest.mark.parametrize("shape", [(5, 5), (4, 7)], ids=str)
def test_it_is_linear_and_symmetric_where_it_is_said_to_be(shape):
    *past, a, b = gradients(shape)
    _, state = run(past, linear=True)
    tx = scale_by_soap(linear=True)

    def z(g):
        return tx.update(g, state)[0]

    np.testing.assert_allclose(z(2 * a - 3 * b), 2 * z(a) - 3 * z(b), rtol=1e-9)
    np.testing.assert_allclose(np.sum(z(a) * b), np.sum(a * z(b)), rtol=1e-9)
    assert np.sum(z(a) * a) > 0
    # By default V has the gradient in it.
    plain = scale_by_soap()
    once, twice = (plain.update(s * a, state)[0] for s in (1, 2))
    assert np.max(np.abs(twice - 2 * once)) > 0.01


@pytest.mark.parametrize("linear", [False, True])
def test_a_multiple_of_the_loss_changes_nothing(linear):
    grads = gradients()
    expected, _ = run(grads, linear=linear, eps=0.0)
    for scale in (2.0**-200, 2.0**200):
        got, _ = run([scale * g for g in grads], linear=linear, eps=0.0)
        np.testing.assert_array_equal(np.array(got), np.array(expected))


def test_the_updates_have_the_size_of_other_preconditioners():
    grads = {"w": np.random.default_rng(0).normal(size=(40, 60))}
    other, _ = nlcg_optax.scale_by_orthogonalization().update(
        grads, nlcg_optax.scale_by_orthogonalization().init(grads)
    )
    rng = np.random.default_rng(1)
    got, _ = run([{"w": rng.normal(size=(40, 60))} for _ in range(30)])
    for z in (got[0]["w"], got[-1]["w"], other["w"]):
        assert 0.15 < np.sqrt(np.mean(np.square(z))) < 0.25


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("options", [{}, {"linear": True}, {"b1": 0.9, "every": 2}])
def test_matrices_that_are_singular_or_zero(options, dtype):
    g = np.zeros((6, 9))
    one = np.array(g)
    one[:2, 3:5] = gradients((2, 2))[0]  # dead units
    rank = np.outer(np.arange(6) * (np.arange(6) < 4), np.arange(9))
    steps = [g, one, g, rank, one, one]
    got, state = run([x.astype(dtype) for x in steps], **options)
    for z in got:
        assert z.dtype == dtype and np.all(np.isfinite(z))
        if not options.get("b1"):
            np.testing.assert_allclose(z[4:], 0, atol=0.01)
            np.testing.assert_allclose(z[:, 0], 0, atol=0.01)
    for node in factors(state):
        for basis in (node.left_basis, node.right_basis):
            unit = basis.T @ basis
            np.testing.assert_allclose(unit, np.eye(len(unit)), atol=1e-5)
    assert nlcg_optax.diagnostics(state)["soap_fallbacks"] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
@pytest.mark.parametrize("at", [0, 3])
def test_what_is_not_finite_is_left_out_and_counted(bad, at):
    grads = [{"w": g, "other": g[:3, :4]} for g in gradients()]
    spoilt = [{k: np.array(x) for k, x in g.items()} for g in grads]
    spoilt[at]["w"][1, 2] = bad
    got, state = run(spoilt)
    kept = [g for i, g in enumerate(grads) if i != at]
    expected, _ = run(kept)
    np.testing.assert_allclose(got[-1]["w"], expected[-1]["w"], atol=1e-9)
    reference, _ = run(grads)
    np.testing.assert_allclose(got[-1]["other"], reference[-1]["other"], atol=1e-9)
    assert nlcg_optax.diagnostics(state)["soap_fallbacks"] == 1
    # That one step goes by the gradient's own size, and what is NaN is not hidden.
    alone = got[at]["w"]
    rest = np.ones((5, 5), bool)
    rest[1, 2] = False
    np.testing.assert_allclose(
        np.asarray(alone)[rest], 0.2 * np.sign(grads[at]["w"])[rest], rtol=1e-6
    )
    assert np.isfinite(alone[1, 2]) == np.isfinite(bad)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_comes_near(precision):
    rng = np.random.default_rng(0)
    grads = [rng.normal(size=(16, 24)).astype(np.float32) for _ in range(12)]
    expected, _ = run(grads, eps=0.0)
    for scale in (1, 1e-9, 1e9):  # beyond the range of float16
        scaled = [np.float32(scale) * g for g in grads]
        got, _ = run(scaled, precision=precision, eps=0.0)
        # Not the step after the first: of so few gradients half of R is singular.
        apart = [
            np.linalg.norm(a - b) / np.linalg.norm(b)
            for a, b in zip(got, expected, strict=True)
        ]
        assert max(apart[6:]) < {"bfloat16": 0.2, "float16": 0.05}[precision]


def test_ten_thousand_steps_in_float32():
    tx = scale_by_soap()
    state = tx.init(jnp.zeros((6, 8), jnp.float32))

    @functools.partial(jax.jit, static_argnums=1)
    def steps(state, number):
        def one(state, key):
            g = jax.random.normal(key, (6, 8), jnp.float32)
            g = g * jnp.geomspace(1, 1e-6, 8, dtype=jnp.float32)
            z, state = tx.update(g, state)
            return state, jnp.max(jnp.abs(z))

        return jax.lax.scan(one, state, jax.random.split(jax.random.key(0), number))

    state, largest = steps(state, 10_000)
    (node,) = factors(state)
    for basis in (node.left_basis, node.right_basis):
        np.testing.assert_allclose(basis.T @ basis, np.eye(len(basis)), atol=2e-6)
    assert float(jnp.max(largest)) < 3 and node.seen == 10_000
    assert nlcg_optax.diagnostics(state)["soap_fallbacks"] == 0


def test_bases_are_renewed_when_they_are_due():
    grads = gradients(number=10)
    bases = [factors(run(grads[:n], every=3)[1])[0].left_basis for n in range(1, 11)]
    changed = [bool(np.any(a != b)) for a, b in zip(bases, bases[1:], strict=False)]
    assert changed == [True, True, True, False, False, True, False, False, True]


def test_layers_and_parts_are_matrices_of_their_own():
    grads = [np.random.default_rng(i).normal(size=(3, 4, 8)) for i in range(4)]
    matrix = nlcg_optax.Matrix((1,), (2,), (0,), parts=2)
    got, _ = run(grads, matrices=lambda path, leaf: matrix)
    for layer in range(3):
        for half in (slice(0, 4), slice(4, 8)):
            expected = oracle.soap([g[layer, :, half] for g in grads])
            for z, x in zip(got, expected, strict=True):
                np.testing.assert_allclose(z[layer, :, half], x, atol=1e-9)


def test_one_huge_gradient_does_not_stay_in_the_mean():
    tx = nlcg_optax.scale_by_soap(0.9)
    grads = {"b": jnp.arange(1.0, 6.0)}
    state = tx.init(grads)
    for i in range(12):
        factor = 1e20 if i == 5 else 1.0
        updates, state = tx.update({"b": factor * grads["b"]}, state)
        assert jnp.max(jnp.abs(updates["b"])) < 1.1


def test_derivatives_go_through_it():
    first, second = gradients((3, 3), 2)

    def total(scale):
        tx = scale_by_soap(b1=0.5)
        state = tx.init(first)
        for g in (first, first.T):
            _, state = tx.update(jnp.asarray(g), state)
        z, _ = tx.update(scale * first + second, state)
        return jnp.sum(jnp.sin(3 * z) * jnp.arange(9.0).reshape(3, 3))

    for shift in (1.0, 0.0):
        numeric = (total(shift + 1e-6) - total(shift - 1e-6)) / 2e-6
        np.testing.assert_allclose(jax.grad(total)(shift), numeric, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"b2": 1.0}, "b2=1.0 is not valid: expected less than 1"),
        ({"b1": -0.1}, "b1=-0.1 is not valid"),
        ({"eps": -1}, "eps=-1"),
        ({"every": 0}, "every=0 is not valid: expected an integer of at least 1"),
        ({"max_side": -1}, "max_side=-1"),
        ({"precision": "int8"}, "precision='int8' is unknown"),
        ({"mesh": "data"}, "mesh='data' is not valid"),
        (
            {"batch_axes": 1, "matrices": matrices.last_axis},
            "batch_axes=1 is not valid beside `matrices`",
        ),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        scale_by_soap(**options)


def test_gradients_of_another_tree():
    tx = scale_by_soap()
    state = tx.init({"w": jnp.ones((3, 4))})
    with pytest.raises(ValueError, match="do not match the optimizer's state"):
        tx.update({"v": jnp.ones((3, 4))}, state)
    with pytest.raises(ValueError, match=r"'\['w'\]' has shape \(4, 4\)"):
        tx.update({"w": jnp.ones((4, 4))}, state)

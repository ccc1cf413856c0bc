"""What holds for any tree, any numbers and any text, tried on drawn ones.

``FUZZ=1000 pytest tests/test_properties.py`` tries so many of each.
The draws are the same in every run (`derandomize`), and few: shapes are what compiles.
"""

import functools
import string

import fuzz
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import nlcg_optax
from nlcg_optax.training.config import (
    ConfigError,
    apply_overrides,
    base_config,
    flatten,
    known_fields,
    to_json,
)

# The default, but without a warning of leaves that could be several things.
ORTHOGONALIZATION = nlcg_optax.scale_by_orthogonalization(
    matrices=nlcg_optax.matrices.recognize
)
FACTORIES = {
    "nlcg": lambda: nlcg_optax.nlcg(
        0.04, preconditioner=ORTHOGONALIZATION, weight_decay=0.01
    ),
    "nlcg_paper": lambda: nlcg_optax.nlcg_paper(0.1),
    "quadratic_model": nlcg_optax.scale_by_quadratic_model,
    "hager_zhang": lambda: nlcg_optax.scale_by_conjugate_direction("hager_zhang"),
    "limited_memory_bfgs": lambda: nlcg_optax.scale_by_limited_memory_bfgs(2),
    "lars": nlcg_optax.scale_by_lars,
    "online": lambda: nlcg_optax.scale_by_loss_feedback("online"),
}
# Small, so that their squares and the sums of these fit into float32.
SCALES = (0.0, 1e-30, 1e-6, 1.0, 1e6, 1e15)


def drawn(examples):
    """Settings: few examples, the same ones always, however slow the machine is."""
    return hypothesis.settings(
        max_examples=fuzz.cases(examples),
        derandomize=True,
        deadline=None,
        database=None,
    )


shapes = st.lists(st.integers(0, 3), max_size=4).map(tuple)
dtypes = st.sampled_from([jnp.float32, jnp.bfloat16, jnp.complex64])
leaves = st.tuples(shapes, dtypes)
trees = st.recursive(
    leaves.map(lambda leaf: jax.ShapeDtypeStruct(*leaf)) | st.none(),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3)
        | st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3)
    ),
    max_leaves=4,
).filter(lambda tree: tree is not None)  # which would be no parameters at all


def numbers(like, rng, scale):
    """A tree of normal numbers of that scale."""

    def leaf(x):
        values = rng.normal(size=x.shape) * scale
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            values = values + 1j * rng.normal(size=x.shape) * scale
        return jnp.asarray(values, x.dtype)

    return jax.tree.map(leaf, like)


def all_finite(tree):
    return all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(tree))


def loss_of(params):
    total = jnp.zeros([], jnp.float32)
    for x in jax.tree.leaves(params):
        total += jnp.sum(jnp.real(x * jnp.conj(x)).astype(jnp.float32))
    return total


@pytest.mark.parametrize("name", FACTORIES)
@drawn(3)
@hypothesis.given(like=trees, seed=st.integers(0, 2**32 - 1))
def test_any_tree_and_any_gradient(name, like, seed):
    """No exception, no other dtype, and a state that stays finite."""
    rng = np.random.default_rng(seed)
    tx = optax.with_extra_args_support(FACTORIES[name]())
    curvature = nlcg_optax.hessian(loss_of)

    @jax.jit
    def step(params, state, grads, value):
        return tx.update(grads, state, params, value=value, curvature=curvature)

    params = numbers(like, rng, 1.0)
    state = tx.init(params)
    for scale in rng.permutation(SCALES):
        grads = numbers(like, rng, scale)
        value = jnp.asarray(rng.normal() * scale, jnp.float32)
        updates, new_state = step(params, state, grads, value)
        for got, wanted in ((updates, params), (new_state, state)):
            assert jax.tree.structure(got) == jax.tree.structure(wanted)
            for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
                assert (x.shape, x.dtype) == (jnp.shape(y), jnp.result_type(y))
        state = new_state
        assert all_finite(state), (scale, state)
        assert all_finite(updates), (scale, updates)


@pytest.mark.parametrize("name", FACTORIES)
@drawn(2)
@hypothesis.given(
    like=trees.filter(lambda tree: any(x.size for x in jax.tree.leaves(tree))),
    bad=st.sampled_from([jnp.nan, jnp.inf, -jnp.inf]),
    seed=st.integers(0, 2**32 - 1),
)
def test_one_number_that_is_none(name, like, bad, seed):
    """It raises nothing, and within `apply_if_finite` it is counted and forgotten."""
    rng = np.random.default_rng(seed)
    tx = optax.apply_if_finite(FACTORIES[name](), 10)
    curvature = nlcg_optax.hessian(loss_of)

    @jax.jit
    def step(params, state, grads, value):
        return tx.update(grads, state, params, value=value, curvature=curvature)

    params, grads = numbers(like, rng, 1.0), numbers(like, rng, 1.0)
    flat, structure = jax.tree.flatten(grads)
    place = rng.choice([i for i, x in enumerate(flat) if x.size])
    flat[place] = flat[place].ravel().at[-1].set(bad).reshape(flat[place].shape)
    broken = jax.tree.unflatten(structure, flat)
    state = tx.init(params)
    _, state = step(params, state, grads, jnp.float32(1.0))
    updates, after = step(params, state, broken, jnp.float32(bad))
    assert not any(bool(jnp.any(u != 0)) for u in jax.tree.leaves(updates))
    assert after.total_notfinite == 1
    for x, y in zip(
        jax.tree.leaves(after.inner_state),
        jax.tree.leaves(state.inner_state),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)


# --- Devices --------------------------------------------------------------------------


def on_two_devices(kind, update):
    """`update` of parameters, state, gradients and a value, mapped over two devices."""
    devices = jax.devices()[:2]
    if kind == "pmap":
        return jax.pmap(update, "d", devices=devices)
    mesh = jax.make_mesh((2,), ("d",), (AxisType.Auto,), devices=devices)

    def one(*args):
        found = update(*jax.tree.map(lambda x: x[0], args))
        return jax.tree.map(lambda x: x[None], found)

    mapped = jax.shard_map(one, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    return jax.jit(mapped)


MAPPED = {
    "nlcg": lambda: nlcg_optax.nlcg(
        0.04, preconditioner="diagonal_bfgs", axis_name="d"
    ),
    "quadratic_model": lambda: nlcg_optax.scale_by_quadratic_model(
        history=1, residuals=1, axis_name="d"
    ),
    "limited_memory_bfgs": lambda: nlcg_optax.scale_by_limited_memory_bfgs(
        2, axis_name="d"
    ),
    "lars": lambda: nlcg_optax.scale_by_lars(axis_name="d"),
}


def drawn_tree(rng):
    """Some leaves of any shape and dtype, in a tree, and one that is not empty."""
    kinds = (jnp.float32, jnp.bfloat16, jnp.complex64)
    found = [
        jax.ShapeDtypeStruct(tuple(rng.integers(0, 4, rng.integers(4))), kinds[i])
        for i in rng.integers(3, size=rng.integers(3))
    ]
    return {"a": found, "b": [None, jax.ShapeDtypeStruct((2, 3), jnp.float32)]}


# Few by default, for each is compiled for two devices.
@pytest.mark.parametrize("kind", ["pmap", "shard_map"])
@pytest.mark.parametrize("seed", range(fuzz.cases(1)))
def test_shards_of_any_tree_and_any_gradient(kind, seed):
    """Of a number that is none on one device every device hears."""
    rng = np.random.default_rng(seed)
    names = ["lars", "limited_memory_bfgs", "nlcg", "quadratic_model"]
    name = names[(seed + (kind == "shard_map")) % 4]
    like, bad = drawn_tree(rng), rng.choice([jnp.nan, jnp.inf, -jnp.inf])
    tx = optax.with_extra_args_support(MAPPED[name]())
    curvature = nlcg_optax.hessian(loss_of, axis_name="d")

    def update(params, state, grads, value):
        return tx.update(grads, state, params, value=value, curvature=curvature)

    params = numbers(like, rng, 1.0)
    twice = functools.partial(jax.tree.map, lambda x: jnp.stack([x, x]))
    state = twice(tx.init(params))
    step, params = on_two_devices(kind, update), twice(params)
    for scale in (1.0, *rng.choice(SCALES, 2), None):
        grads = twice(numbers(like, rng, 1.0 if scale is None else scale))
        value = jnp.full(2, 1.0, jnp.float32)
        if scale is None:
            flat, structure = jax.tree.flatten(grads)
            place = rng.choice([i for i, x in enumerate(flat) if x.size])
            # On the first device alone.
            broken = flat[place].reshape(2, -1).at[0, -1].set(bad)
            flat[place] = broken.reshape(flat[place].shape)
            grads = jax.tree.unflatten(structure, flat)
        updates, new = step(params, state, grads, value)
        for got, wanted in ((updates, params), (new, state)):
            for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
                assert (x.shape, x.dtype) == (y.shape, y.dtype)
        if scale is not None:
            state = new
            assert all_finite((updates, state)), (scale, state)
        elif name == "quadratic_model":
            assert all_finite((updates, new))
            assert not any(bool(jnp.any(u != 0)) for u in jax.tree.leaves(updates))


# --- minimize -----------------------------------------------------------------------


@functools.lru_cache
def solver(preconditioner):
    """One compiled program for all problems of five variables."""

    def convex(x, factor, target, quartic, shift):
        r = factor @ (x - target)
        return shift + jnp.sum(r**2) + quartic * jnp.sum(r**4)

    def solve(x, *args):
        return nlcg_optax.minimize(convex, x, *args, preconditioner=preconditioner)

    return jax.jit(solve)


@pytest.mark.parametrize("preconditioner", [None, "lbfgs"])
@drawn(15)
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    condition=st.sampled_from([1.0, 10.0, 1e3]),
    scale=st.sampled_from([1e-6, 1.0, 1e6, 1e15]),
    quartic=st.sampled_from([0.0, 1.0]),
    shift=st.sampled_from([0.0, -1e3, 10.0]),
)
def test_minimize_finds_the_minimum_of_any_convex_function(
    preconditioner, seed, condition, scale, quartic, shift
):
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    factor = np.sqrt(scale) * np.geomspace(1, condition**-0.5, 5)[:, None] * basis
    target, start = rng.normal(size=5), rng.normal(size=5) * 10
    with jax.enable_x64(True):
        result = solver(preconditioner)(
            start, factor, target, quartic / scale, shift * scale
        )
    assert result.success, result
    # By what is left of the objective (it is 0 at the minimum), and by the place.
    squares = (factor @ (start - target)) ** 2
    fallen = np.sum(squares + quartic / scale * squares**2)
    told = 1e-9 * abs(shift * scale)  # a tenth of gtol beside the value itself
    assert float(result.value) - shift * scale < 1e-7 * fallen + told, result
    np.testing.assert_allclose(result.params, target, atol=0.1)


# --- The config parser --------------------------------------------------------------

FIELDS = known_fields(base_config())


@drawn(200)
@hypothesis.given(
    name=st.sampled_from(FIELDS),
    text=st.text(max_size=12)
    | st.text(string.digits + "+-.e_(),[]{}'\" ", max_size=12)
    | st.sampled_from(["1" * 400, "9" * 5000, "(" * 300, "1e999", "nan", "0x10"]),
)
def test_a_value_is_taken_or_refused_in_a_sentence(name, text):
    config = base_config()
    before = flatten(to_json(config))
    try:
        apply_overrides(config, [f"{name}={text}"])
    except ConfigError as error:
        assert f"--config.{name}={text} does not fit: expected" in str(error)
        assert flatten(to_json(config)) == before
    else:
        after = flatten(to_json(config))
        assert [k for k in after if repr(after[k]) != repr(before[k])] in ([], [name])


@drawn(50)
@hypothesis.given(text=st.text(max_size=20).filter(lambda t: t not in FIELDS))
def test_a_field_that_is_none_is_refused_in_a_sentence(text):
    config = base_config()
    name = text.partition("=")[0]
    hypothesis.assume(name not in FIELDS)
    with pytest.raises(ConfigError) as error:
        apply_overrides(config, [text])
    assert str(error.value).startswith(f"--config.{name}: ")


@drawn(100)
@hypothesis.given(data=st.data())
def test_values_of_the_right_kind_arrive(data):
    config = base_config()
    values = {
        "seed": st.integers(0, 2**31),
        "optimizer.learning_rate": st.floats(allow_nan=False),
        "dataset.flip": st.booleans(),
        "dataset.name": st.text(st.characters(exclude_categories=["Cs"]), max_size=9),
        "schedule.boundaries": st.tuples(st.integers(), st.floats(0, 1)),
    }
    name = data.draw(st.sampled_from(sorted(values)))
    value = data.draw(values[name])
    apply_overrides(config, [f"{name}={value}".replace("inf", "1e999")])
    node = config
    for part in name.split("."):
        node = node[part]
    expected = value
    if isinstance(value, str):
        expected = value.replace("inf", "1e999")
    assert node == expected and isinstance(node, type(value))

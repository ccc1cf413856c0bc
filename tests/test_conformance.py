"""What every Optax transformation owes its users, asked of all of ours.

The demands of optax's own alias tests are among them, restated.
"""

import collections
import contextlib
import dataclasses
import functools
import math
import pickle
from typing import NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from long_run import rest_long

import nlcg_optax
from nlcg_optax import (
    nlcg,
    nlcg_paper,
    scale_by_conjugate_direction,
    scale_by_diagonal_bfgs,
    scale_by_lars,
    scale_by_limited_memory_bfgs,
    scale_by_loss_feedback,
    scale_by_noise_balance,
    scale_by_orthogonalization,
    scale_by_quadratic_model,
    scale_by_soap,
)

# Factory and options of every transformation, in its main configurations.
FACTORIES = {
    "diagonal_bfgs": (scale_by_diagonal_bfgs, {}),
    "limited_memory_bfgs": (scale_by_limited_memory_bfgs, {"memory_size": 2}),
    "orthogonalization": (scale_by_orthogonalization, {}),
    "soap": (scale_by_soap, {}),
    "soap-all": (
        scale_by_soap,
        {"b1": 0.9, "every": 2, "max_side": 2, "linear": True},
    ),
    "conjugate_direction-hager_zhang": (
        scale_by_conjugate_direction,
        {"beta_rule": "hager_zhang", "preconditioner": scale_by_diagonal_bfgs()},
    ),
    "loss_feedback-step": (scale_by_loss_feedback, {"period": 2}),
    "loss_feedback-online": (scale_by_loss_feedback, {"rule": "online"}),
    "lars": (scale_by_lars, {"coefficient": 0.1}),
    "noise_balance": (scale_by_noise_balance, {"num_steps": 9, "first_rate": 0.1}),
    "quadratic_model": (scale_by_quadratic_model, {}),
    # Noise rules after the first step, a fifth of the run.
    "quadratic_model-noise": (scale_by_quadratic_model, {"horizon": 5}),
    "quadratic_model-two": (
        scale_by_quadratic_model,
        {
            "preconditioner": (None, scale_by_diagonal_bfgs()),
            "history": 1,
            "residuals": 0,
        },
    ),
    "nlcg": (nlcg, {"learning_rate": 0.1}),
    "nlcg-decay": (nlcg, {"learning_rate": 0.1, "weight_decay": 0.1}),
    "nlcg_paper": (nlcg_paper, {"learning_rate": 0.1}),
    "nlcg-hager_zhang": (
        nlcg_paper,
        {"learning_rate": 0.1, "beta_rule": "hager_zhang", "period": 2},
    ),
    "conjugate_direction-restarts": (
        scale_by_conjugate_direction,
        {"beta_rule": "hager_zhang", "restart_on_ascent": True, "restart_every": 7},
    ),
    "nlcg-polak_ribiere-plain": (
        nlcg_paper,
        {
            "learning_rate": 0.1,
            "beta_rule": "polak_ribiere",
            "preconditioner": None,
            "step_rule": None,
        },
    ),
    "conjugate_direction-small": (
        scale_by_conjugate_direction,
        {"preconditioner": scale_by_diagonal_bfgs(), "track_cosine": False},
    ),
    "nlcg-rms": (
        nlcg_paper,
        {"learning_rate": 0.1, "preconditioner": optax.scale_by_rms()},
    ),
}
# For tests that compile, or try many things.
PUBLIC = (
    "diagonal_bfgs",
    "limited_memory_bfgs",
    "orthogonalization",
    "soap",
    "conjugate_direction-hager_zhang",
    "loss_feedback-online",
    "lars",
    "noise_balance",
    "quadratic_model",
    "quadratic_model-noise",
    "nlcg",
    "nlcg_paper",
)
each_public = pytest.mark.parametrize("name", PUBLIC)


def with_variants(names):
    """Of these the variants of public ones are tried in the long run alone."""
    return pytest.mark.parametrize("name", rest_long(names, PUBLIC))


every_transformation = with_variants(FACTORIES)


@functools.cache
def make(name):
    factory, options = FACTORIES[name]
    return optax.with_extra_args_support(factory(**options))


def assert_close(got, expected, rtol=1e-6, atol=0.0):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert jnp.result_type(a) == jnp.result_type(b)
        np.testing.assert_allclose(
            np.asarray(a, complex), np.asarray(b, complex), rtol=rtol, atol=atol
        )


def shapes_and_dtypes(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


def value_and_grad(params):
    """A weighted sum of squares, above 1, and its (conjugated) gradient by hand."""
    total = jnp.ones([], jnp.float32)
    leaves, structure = jax.tree.flatten(params)
    grads = []
    for i, x in enumerate(leaves):
        weight = np.arange(i + 1.0, i + 1 + x.size).reshape(x.shape)
        grads.append(2 * jnp.asarray(weight, x.dtype) * x)
        square = jnp.real(grads[-1] * x.conj()) / 2
        total += jnp.sum(square.astype(jnp.float32))
    return total, jax.tree.unflatten(structure, grads)


CURVATURE = nlcg_optax.hessian(lambda params: value_and_grad(params)[0])


# Scaled so that the pieces that keep the gradient's sign descend a little too.
def apply(name, params, updates):
    sign = 1.0 if name.startswith("nlcg") else -0.01
    sign = -1.0 if name.startswith("quadratic_model") else sign
    return jax.tree.map(lambda p, u: p + (sign * u).astype(p.dtype), params, updates)


def step(name, tx, params, state, **extra_args):
    value, grads = value_and_grad(params)
    given = {"value": value, "curvature": CURVATURE, **extra_args}
    updates, state = tx.update(grads, state, params, **given)
    return apply(name, params, updates), state, updates


@functools.cache  # so that tests that take the same steps share the program
def stepper(name, tx):
    return jax.jit(functools.partial(step, name, tx))


def train(name, tx, params, steps=4, one=None):
    state = tx.init(params)
    one = one or stepper(name, tx)
    for _ in range(steps):
        params, state, _ = one(params, state)
    return params, state


def simple_params(dtype=jnp.float32):
    return {
        "w": jnp.asarray([[1.0, -0.5], [0.25, 2.0]], dtype),
        "b": jnp.asarray([0.3, -0.7], dtype),
    }


# --- Optax's alias tests ------------------------------------------------------------


@functools.cache
def trained(name, dtype=jnp.float32):
    """Parameters and state after four steps: what many tests compare with."""
    return train(name, make(name), simple_params(dtype))


def abs_sq(x):
    return jnp.real(x * jnp.conj(x))


def parabola(dtype):
    start = jnp.array([-1.0, 10.0, 1.0], dtype)
    end = jnp.array([1.0, -1.0, 1.0], dtype)
    if jnp.iscomplexobj(end):
        end *= jnp.asarray(1 + 1j, dtype)
    return start, end, lambda x: jnp.sum(abs_sq(x - end))


def rosenbrock(dtype):
    a = jnp.asarray(1 + 1j if dtype == jnp.complex64 else 1.0, dtype)

    def objective(x):
        return abs_sq(a - x[0]) + 100.0 * abs_sq(x[1] - x[0] ** 2)

    return jnp.zeros(2, dtype), jnp.stack([a, a**2]), objective


def matrix_and_vector(dtype):
    end = {"w": jnp.array([[1.0, 0.0], [-1.0, 4.0]], dtype), "b": jnp.ones(3, dtype)}
    start = jax.tree.map(jnp.zeros_like, end)

    def objective(x):
        return sum(jnp.sum(abs_sq(x[key] - end[key])) for key in end)

    return start, end, objective


# One learning rate for all problems.
SOLVERS = {
    "paper": nlcg_paper(0.1),
    "online": nlcg_paper(0.1, step_rule="online"),
    "no preconditioner": nlcg_paper(1e-3, preconditioner=None),
    "dai_yuan": nlcg_paper(0.1, beta_rule="dai_yuan"),
    "hager_zhang": nlcg_paper(0.5, beta_rule="hager_zhang"),
    "rms": nlcg_paper(1e-2, preconditioner=optax.scale_by_rms()),
    "orthogonalization": nlcg(0.01),
    "soap": nlcg(0.01, preconditioner="soap"),
}


@pytest.mark.standard_promotion  # optax's RMSProp promotes complex leaves
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
@pytest.mark.parametrize("problem", [parabola, rosenbrock, matrix_and_vector])
@pytest.mark.parametrize("solver", SOLVERS)
def test_reaches_the_minimum(solver, problem, dtype):
    of_matrices = solver in ("orthogonalization", "soap")
    if of_matrices != (problem is matrix_and_vector):
        pytest.skip("another preconditioner")
    tx = SOLVERS[solver]
    start, end, objective = problem(dtype)

    @jax.jit
    def run(x):
        def step(carry, _):
            x, state = carry
            value, grad = jax.value_and_grad(objective)(x)
            grad = jax.tree.map(jnp.conj, grad)
            updates, state = tx.update(grad, state, x, value=value)
            return (optax.apply_updates(x, updates), state), None

        return jax.lax.scan(step, (x, tx.init(x)), length=10_000)[0][0]

    assert_close(run(start), end, rtol=3e-2, atol=3e-2)


@every_transformation
def test_tree_map_params(name):
    tx = make(name)
    _, state = trained(name)
    assert_close(optax.tree.map_params(tx, lambda v: v, state), state)
    # Whatever is shaped like the parameters is found, and nothing else.
    marked = optax.tree.map_params(tx, lambda v: jnp.full_like(v, 7), state)
    for (path, before), after in zip(
        jax.tree_util.tree_leaves_with_path(state),
        jax.tree.leaves(marked),
        strict=True,
    ):
        # Weights of a memory and coefficients are scalars, several of them.
        scalars = (".weights", ".coefficients", ".prev_norms", ".prev_products")
        scalar = before.ndim == 0 or jax.tree_util.keystr(path).endswith(scalars)
        expected = before if scalar else jnp.full_like(before, 7)
        np.testing.assert_array_equal(after, expected)


@every_transformation
def test_unexpected_extra_arguments_are_ignored(name):
    tx = make(name)
    params = simple_params()
    state = tx.init(params)
    one = stepper(name, tx)
    _, expected, _ = one(params, state)
    _, got, _ = one(params, state, nobody_expects=1, grad=None)
    assert_close(got, expected)


@pytest.mark.parametrize(
    "dtype",
    rest_long((jnp.float32, jnp.bfloat16, jnp.complex64), (jnp.float32,)),
)
@each_public
def test_inject_hyperparams(name, dtype):
    factory, options = FACTORIES[name]
    static = {
        scale_by_quadratic_model: ["history", "residuals"],
        scale_by_soap: ["b1", "every", "max_side", "linear", "batch_axes"],
    }.get(factory, [])
    tx = optax.inject_hyperparams(factory, static)(**options)
    _, state = trained(name, dtype)
    # Op by op counts are arrays, which hold integers; in `jit` they would be tracers.
    counts = name in ("limited_memory_bfgs", "orthogonalization")
    one = functools.partial(step, name, tx) if counts else None
    _, injected = train(name, tx, simple_params(dtype), one=one)
    # An injected hyperparameter has the precision of the parameters.
    rtol = 0.1 if dtype == jnp.bfloat16 else 1e-3
    assert_close(injected.inner_state, state, rtol, atol=rtol)


@pytest.mark.parametrize("name", ["quadratic_model", "quadratic_model-noise"])
def test_what_is_injected_may_be_complex(name):
    """As the parameters are; these two read the values of their numbers."""
    test_inject_hyperparams(name, jnp.complex64)


@every_transformation
def test_updates_keep_the_dtype_of_the_gradient(name):
    for dtype in (jnp.bfloat16, jnp.float32):
        params = simple_params(dtype)
        tx = make(name)
        one = stepper(name, tx)
        _, _, updates = one(params, jax.jit(tx.init)(params))
        assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize(
    "dtype",
    [
        *(jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64),
        *(jnp.complex64, jnp.complex128),
    ],
)
@each_public
def test_shapes_and_dtypes_are_stable_through_cond(name, dtype):
    with jax.enable_x64(dtype in (jnp.float64, jnp.complex128)):
        tx = make(name)
        params = simple_params(dtype)
        wide = jnp.float16 if dtype != jnp.float16 else jnp.float32

        def conditional_step(on, params, state):
            def update():
                value, grads = value_and_grad(params)
                return tx.update(
                    grads, state, params, value=value.astype(wide), curvature=CURVATURE
                )

            return jax.lax.cond(on, update, lambda: (params, state))

        # `cond` raises where its branches differ; no need to compile for that.
        state = jax.eval_shape(tx.init, params)
        updates, new_state = jax.eval_shape(conditional_step, True, params, state)
        assert shapes_and_dtypes(new_state) == shapes_and_dtypes(state)
        assert shapes_and_dtypes(updates) == shapes_and_dtypes(params)
        assert not any(x.weak_type for x in jax.tree.leaves((updates, new_state)))


# They begin with the parameters themselves.
WITH_AN_AVERAGE = ("noise_balance", "quadratic_model-noise")


@pytest.mark.parametrize("name", [n for n in PUBLIC if n not in WITH_AN_AVERAGE])
def test_init_takes_shapes(name):
    shapes = jax.eval_shape(simple_params)
    got = shapes_and_dtypes(make(name).init(shapes))
    assert got == shapes_and_dtypes(jax.eval_shape(make(name).init, shapes))


@each_public
def test_types_are_stable_on_an_explicit_mesh(name):
    tx, types = make(name), []
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    curvature = nlcg_optax.hessian(lambda x: jnp.sum(x.astype(jnp.float32) ** 2))

    def take_a_step(params, state):
        given = {"value": jnp.float32(1), "curvature": curvature}
        updates, after = tx.update(params, state, params, **given)
        for tree in (state, after, params, updates):
            types.append(jax.tree.map(lambda x: str(jax.typeof(x)), tree))

    with jax.set_mesh(mesh):
        there = NamedSharding(mesh, P("x"))
        params = jax.ShapeDtypeStruct((8, 4), jnp.float16, sharding=there)
        state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape,
                x.dtype,
                sharding=NamedSharding(mesh, getattr(x.sharding, "spec", P())),
            ),
            jax.eval_shape(jax.jit(tx.init), params),
        )
        jax.eval_shape(take_a_step, params, state)
    assert types[0] == types[1]
    assert types[2] == types[3] == "float16[8@x,4]"


@pytest.mark.standard_promotion  # MultiSteps promotes
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("nlcg", jnp.bfloat16),
        *((name, jnp.float32) for name in (*PUBLIC, "nlcg-hager_zhang")),
    ],
)
def test_multi_steps(name, dtype):
    params = simple_params(dtype)
    tx = make(name)
    multi = optax.MultiSteps(tx, every_k_schedule=2)
    state, multi_state = tx.init(params), multi.init(params)
    update, single = jax.jit(multi.update), jax.jit(tx.update)
    for t in range(3):
        value, grads = value_and_grad(params)
        updates, state = single(grads, state, params, value=value, curvature=CURVATURE)
        for k in range(2):
            # The loss of the last mini-batch is the one that is seen.
            loss = value if k == 1 else jnp.full_like(value, math.nan)
            got, multi_state = update(
                grads, multi_state, params, value=loss, curvature=CURVATURE
            )
            if k == 0:
                assert all(jnp.all(u == 0) for u in jax.tree.leaves(got))
        # The accumulated mean of equal gradients is rounded.
        rtol = 1e-4 if dtype == jnp.float32 else 0.1
        assert_close(got, updates, rtol, atol=rtol)
        assert multi_state.gradient_step == t + 1
        params = apply(name, params, updates)
    assert_close(multi_state.inner_opt_state, state, rtol=0.1, atol=0.1)


# --- Transformations of JAX ---------------------------------------------------------


@each_public
def test_jit_changes_nothing(name):
    tx, params = make(name), simple_params()
    one = functools.partial(step, name, tx)
    eager = train(name, tx, params, one=one)
    jitted = train(name, tx, params, one=jax.jit(one))
    assert_close(jitted, eager, 1e-4, 1e-5)


@each_public
def test_vmap_is_a_loop(name):
    tx = make(name)
    params = jax.vmap(lambda c: jax.tree.map(lambda x: c * x, simple_params()))(
        jnp.array([1.0, 0.3, -2.0])
    )

    def run(params):
        return train(name, tx, params, 3)

    batched = jax.jit(jax.vmap(run))(params)
    run = jax.jit(run)
    for i in range(3):
        one = run(jax.tree.map(lambda x, i=i: x[i], params))
        assert_close(jax.tree.map(lambda x, i=i: x[i], batched), one, 1e-4, 1e-5)


@each_public
def test_scan_is_a_loop(name):
    tx, params = make(name), simple_params()

    @jax.jit
    def run(params):
        def body(carry, _):
            return step(name, tx, *carry)[:2], None

        return jax.lax.scan(body, (params, tx.init(params)), length=4)[0]

    assert_close(run(params), trained(name), 1e-4, 1e-5)


@each_public
def test_the_strict_modes_of_jax_find_nothing(name):
    """Beside strict promotion of dtypes, which is on in all tests."""
    tx = make(name)
    with contextlib.ExitStack() as modes:
        modes.enter_context(jax.enable_checks(True))
        modes.enter_context(jax.checking_leaks())
        modes.enter_context(jax.numpy_rank_promotion("raise"))
        state = tx.init(simple_params())
        # Which check what is traced, so that nothing need be compiled anew.
        jax.eval_shape(functools.partial(step, name, tx), simple_params(), state)
    with jax.debug_nans(True):
        train(name, tx, simple_params(), 3)


@each_public
def test_a_step_goes_without_jit(name):
    tx, before = make(name), trained(name)
    with jax.disable_jit():
        found = step(name, tx, *before)[:2]
    assert_close(found, stepper(name, tx)(*before)[:2], 1e-4, 1e-5)


@every_transformation
def test_the_second_step_does_not_recompile(name):
    tx = make(name)
    traces = collections.Counter()

    @jax.jit
    def one(params, state):
        traces["step"] += 1
        return step(name, tx, params, state)[:2]

    # A weakly typed scalar is among the parameters, as in toy examples.
    params = simple_params() | {"scale": jnp.float32(1.0)}
    state = tx.init(params)
    for _ in range(4):
        params, state = one(params, state)
    assert traces["step"] == 1


@each_public
def test_donation(name):
    tx = make(name)
    expected, _ = trained(name)
    one = jax.jit(lambda p, s: step(name, tx, p, s)[:2], donate_argnums=(0, 1))
    params = simple_params()
    state = tx.init(params)
    for _ in range(4):
        kept = params
        params, state = one(params, state)
        assert all(x.is_deleted() for x in jax.tree.leaves(kept))
    assert_close(params, expected, 1e-4, 1e-5)


# --- Composition with Optax ---------------------------------------------------------


@every_transformation
def test_chain_with_clipping_and_weight_decay(name):
    tx = make(name)
    params = simple_params()
    chain = optax.chain(
        optax.clip_by_global_norm(1.0), tx, optax.add_decayed_weights(-0.01)
    )
    state, inner = chain.init(params), tx.init(params)
    update, single = jax.jit(chain.update), jax.jit(tx.update)
    for _ in range(3):
        value, grads = value_and_grad(params)
        given = {"value": value, "curvature": CURVATURE}
        updates, state = update(grads, state, params, **given)
        clipped, _ = optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())
        expected, inner = single(clipped, inner, params, **given)
        expected = jax.tree.map(lambda u, p: u - 0.01 * p, expected, params)
        assert_close(updates, expected, 1e-4, 1e-6)
        params = apply(name, params, updates)


def curvatures(params):
    """Where the optimizer sees "w" alone: of the whole, and of the part."""

    def of_part(part):
        return value_and_grad({**part, "b": params["b"]})[0]

    return (
        nlcg_optax.hessian(lambda p: value_and_grad(p)[0], params=params),
        nlcg_optax.hessian(of_part),
    )


def beside(tx, wrapped):
    """A compiled step of what is wrapped, and one of the piece that sees "w" alone."""

    @jax.jit
    def one(params, state, inner):
        value, grads = value_and_grad(params)
        whole, part = curvatures(params)
        updates, state = wrapped.update(
            grads, state, params, value=value, curvature=whole
        )
        expected, inner = tx.update(
            {"w": grads["w"]}, inner, {"w": params["w"]}, value=value, curvature=part
        )
        return grads, updates, state, expected, inner

    return one


@every_transformation
def test_masked(name):
    tx = make(name)
    params = simple_params()
    masked = optax.masked(tx, {"w": True, "b": False})
    state, inner = masked.init(params), tx.init({"w": params["w"]})
    one = beside(tx, masked)
    for _ in range(3):
        grads, updates, state, expected, inner = one(params, state, inner)
        np.testing.assert_array_equal(updates["b"], grads["b"])
        np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-4, atol=1e-6)
        params = {"w": apply(name, params["w"], updates["w"]), "b": params["b"] * 0.9}


@every_transformation
def test_partition_with_an_empty_group(name):
    tx = make(name)
    params = simple_params()
    groups = {"ours": tx, "empty": make(name), "other": optax.sgd(0.01)}
    partition = optax.partition(groups, {"w": "ours", "b": "other"})
    state, inner = partition.init(params), tx.init({"w": params["w"]})
    one = beside(tx, partition)
    for _ in range(3):
        grads, updates, state, expected, inner = one(params, state, inner)
        np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(updates["b"], -0.01 * grads["b"], rtol=1e-6)
        params = apply(name, params, updates)


@each_public
def test_apply_if_finite(name):
    tx = make(name)
    safe = optax.apply_if_finite(tx, max_consecutive_errors=3)
    params = simple_params()
    state, inner = safe.init(params), tx.init(params)
    update, single = jax.jit(safe.update), jax.jit(tx.update)
    for t in range(5):
        value, grads = value_and_grad(params)
        if t in (1, 3):
            grads = jax.tree.map(lambda g: g * jnp.float32(jnp.nan), grads)
        updates, state = update(grads, state, params, value=value, curvature=CURVATURE)
        if t in (1, 3):
            assert all(jnp.all(u == 0) for u in jax.tree.leaves(updates))
            continue
        expected, inner = single(grads, inner, params, value=value, curvature=CURVATURE)
        assert_close(updates, expected, 1e-4, 1e-6)
        params = apply(name, params, updates)
    assert state.total_notfinite == 2
    assert_close(state.inner_state, inner, 1e-3, 1e-5)


# --- Trees --------------------------------------------------------------------------


class Pair(NamedTuple):
    first: object
    second: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Node:
    weight: object
    bias: object


W, B = [1.0, -2.0, 0.5], 0.25
TREES = {
    "array": lambda: jnp.array(W),
    "scalar": lambda: jnp.array(B),
    "nothing": lambda: {},
    "only an empty leaf": lambda: jnp.zeros((0, 2)),
    "nodes of all kinds": lambda: {
        "tuple": (jnp.array(W), (jnp.array(B), ())),
        "empty leaves": [jnp.array(W), jnp.zeros((0,)), jnp.zeros((3, 0))],
        "none": {"a": jnp.array(W), "b": None, "c": [None, jnp.array(B)]},
        "namedtuple": Pair(jnp.array(W), Pair(jnp.array(B), None)),
        "dataclass": {"layer": Node(jnp.array(W), jnp.array(B))},
    },
    "ranks": lambda: [jnp.ones((1,) * rank) * (rank + 1) for rank in range(5)],
}


@pytest.mark.parametrize("tree", rest_long(TREES, TREES.keys() - {"array", "ranks"}))
@each_public
def test_any_tree(name, tree):
    tx = make(name)
    params = TREES[tree]()
    state = tx.init(params)
    one = stepper(name, tx)
    for _ in range(3):
        updates_shape = shapes_and_dtypes(params)
        params, new_state, updates = one(params, state)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert shapes_and_dtypes(updates) == updates_shape
        assert shapes_and_dtypes(new_state) == shapes_and_dtypes(state)
        assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(new_state))
        state = new_state


LEAF_BY_LEAF = ("lars", "nlcg", "nlcg-decay", "orthogonalization", "soap", "soap-all")


@with_variants(n for n in FACTORIES if n not in LEAF_BY_LEAF)
def test_how_the_tree_is_cut_does_not_matter(name):
    # Inner products run over all the leaves together.
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(5, 6)).astype(np.float32)
    tx = make(name)
    bowl = nlcg_optax.hessian(lambda tree: optax.tree.norm(tree, squared=True))

    def run(cut):
        params = cut(jnp.ones(6))
        state = tx.init(params)
        update = jax.jit(tx.update)
        out = []
        for row in rows:
            g = cut(jnp.asarray(row))
            value = jnp.sum(row) ** 2
            updates, state = update(g, state, params, value=value, curvature=bowl)
            params = apply(name, params, updates)
            out.append(np.concatenate([np.ravel(u) for u in jax.tree.leaves(updates)]))
        return np.array(out)

    whole = run(lambda v: v)
    parts = run(lambda v: [v[0], {"m": v[1:5].reshape(2, 2), "z": v[:0]}, v[5:]])
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-6)


MIXED = {
    "bf16": jnp.bfloat16,
    "f16": jnp.float16,
    "f32": jnp.float32,
    "f64": jnp.float64,
    "c64": jnp.complex64,
    "c128": jnp.complex128,
}


# The residual of a gradient in half precision is mostly rounding.
NOT_MIXED = ("nlcg-rms", "quadratic_model", "quadratic_model-noise")


@with_variants(n for n in FACTORIES if n not in NOT_MIXED)
def test_mixed_trees_keep_the_dtype_of_every_leaf(name, x64):
    tx = make(name)
    values = np.array([1.0, -0.5, 0.25])
    params = {key: jnp.asarray(values, dtype) for key, dtype in MIXED.items()}
    state = tx.init(params)
    before = shapes_and_dtypes(state)
    update = jax.jit(tx.update)
    for t in range(4):
        grads = jax.tree.map(lambda x, c=1.5 - t: (c * x).astype(x.dtype), params)
        given = {"value": 1.0 + t, "curvature": CURVATURE}
        updates, state = update(grads, state, params, **given)
        assert shapes_and_dtypes(updates) == shapes_and_dtypes(params)
        assert shapes_and_dtypes(state) == before
        # Six copies of one problem: every leaf goes the same way in its precision.
        for key, got in updates.items():
            rtol = 0.1 if key in ("bf16", "f16") else 1e-3
            np.testing.assert_allclose(
                np.asarray(got, complex), updates["f64"], rtol=rtol, atol=rtol
            )
        params = apply(name, params, updates)


def test_grads_may_have_another_precision_than_parameters():
    for params_dtype, grads_dtype in (
        (jnp.float32, jnp.bfloat16),
        (jnp.bfloat16, jnp.float32),
    ):
        for sign, tx in (
            (1, nlcg_paper(0.1, beta_rule="hager_zhang")),
            (-1, optax.with_extra_args_support(scale_by_limited_memory_bfgs(2))),
        ):
            params = jnp.ones(3, params_dtype)
            state = tx.init(params)
            for _ in range(3):
                grads = params.astype(grads_dtype)
                updates, new_state = tx.update(grads, state, params, value=1.0)
                assert updates.dtype == grads_dtype
                assert shapes_and_dtypes(new_state) == shapes_and_dtypes(state)
                params, state = params + sign * updates.astype(params_dtype), new_state


# --- Sums in float32 or wider -------------------------------------------------------

# Its square needs 15 bits, and 1001 of them more: bfloat16 has 8.
FINE = 1 + 2.0**-7


@pytest.mark.parametrize("leaves", [1, 77])
def test_inner_products_of_bfloat16_are_summed_in_float32(leaves):
    g = jnp.full(1001 // leaves, FINE, jnp.bfloat16)
    g = [g] * leaves
    tx = scale_by_conjugate_direction("hager_zhang")
    _, state = tx.update(g, tx.init(g))
    exact = 1001 * FINE**2
    np.testing.assert_allclose(state.prev_g_z, exact, rtol=1e-6)
    np.testing.assert_allclose(state.prev_g_d, -exact, rtol=1e-6)
    # g·w / y·w, for a gradient that triples
    tx = scale_by_conjugate_direction(
        lambda p, _: p.g_w / p.y_w, beta_bounds=(-math.inf, math.inf)
    )
    state = tx.init(g)
    for scale in (1.0, 3.0):
        row = jax.tree.map(lambda v, c=scale: (c * v).astype(v.dtype), g)
        _, state = tx.update(row, state)
    before, after = (float(tree[0][0]) for tree in (g, row))
    np.testing.assert_allclose(state.beta, after / (after - before), rtol=1e-4)


def test_curvature_of_bfloat16_is_summed_in_float32():
    n = 1001
    tx = scale_by_diagonal_bfgs(epsilon=0.0)
    x0, x1 = jnp.zeros(n, jnp.bfloat16), jnp.full(n, FINE, jnp.bfloat16)
    g0, g1 = jnp.zeros(n, jnp.bfloat16), jnp.full(n, 3 * FINE, jnp.bfloat16)
    _, state = tx.update(g0, tx.init(x0), x0)
    _, state = tx.update(g1, state, x1)
    s, y = np.asarray(x1, np.float64), np.asarray(g1, np.float64)
    expected = 1 - s**2 / (s @ s) + y**2 / (y @ s)
    assert state.diagonal.dtype == jnp.float32
    np.testing.assert_allclose(state.diagonal, expected, rtol=1e-6)


def test_lars_norms_of_bfloat16_are_summed_in_float32():
    # Steps of 1/8 in the factor would show in a gradient of powers of two only.
    n = 1001
    w = jnp.full(n, FINE, jnp.bfloat16)
    g = jnp.concatenate([jnp.full(n - 1, 2.0**-9), jnp.ones(1)]).astype(jnp.bfloat16)
    out, _ = scale_by_lars(1.0, damping=0.0).update(g, optax.EmptyState(), w)
    factor = np.sqrt(n * FINE**2 / (1 + (n - 1) * 2.0**-18))
    assert out[-1] == jnp.asarray(factor, jnp.bfloat16)


# --- State --------------------------------------------------------------------------


@every_transformation
def test_state_is_a_tree_of_arrays_that_travels(name):
    tx, (params, state) = make(name), trained(name)
    leaves, structure = jax.tree.flatten(state)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    copies = {
        "flattened": jax.tree.unflatten(structure, leaves),
        "pickled": pickle.loads(pickle.dumps(state)),
        "serialized": flax.serialization.from_bytes(
            tx.init(params), flax.serialization.to_bytes(state)
        ),
        "state dict": flax.serialization.from_state_dict(
            tx.init(params), flax.serialization.to_state_dict(state)
        ),
    }
    one = stepper(name, tx)
    expected = one(params, state)
    for copy in copies.values():
        assert_close(copy, state, rtol=0)
        assert_close(one(params, copy), expected, rtol=0)


@every_transformation
def test_history_does_not_collide_with_names_that_optax_looks_up(name):
    # `optax.value_and_grad_from_state` would take them for a line search's.
    _, state = train(name, make(name), simple_params(), 1)
    for key in ("value", "grad", "updates", "params", "learning_rate"):
        assert optax.tree.get(state, key) is None


def test_public_states_are_documented():
    for kind in (
        nlcg_optax.ConjugateDirectionState,
        nlcg_optax.DiagonalBfgsState,
        nlcg_optax.HagerZhangLinesearchInfo,
        nlcg_optax.HagerZhangLinesearchState,
        nlcg_optax.IterationInfo,
        nlcg_optax.LimitedMemoryBfgsState,
        nlcg_optax.LossFeedbackState,
        nlcg_optax.MinimizeResult,
        nlcg_optax.QuadraticModelState,
    ):
        for field in kind._fields:
            assert f"      {field}: " in kind.__doc__ or f"  {field}: " in kind.__doc__

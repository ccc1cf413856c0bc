import functools
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from problems import paper

import nlcg_optax

SEARCH = nlcg_optax.scale_by_hager_zhang_linesearch


def search_once(value_fn, x, u, tx=None, state=None, **extra_args):
    tx = SEARCH() if tx is None else tx
    value, grad = jax.value_and_grad(value_fn)(x, **extra_args)
    state = tx.init(x) if state is None else state
    update = jax.jit(functools.partial(tx.update, value_fn=value_fn))
    return update(u, state, x, value=value, grad=grad, **extra_args)


# Lines of Moré & Thuente (1994), tables I to III: value as a function of the step, and
# its minimizer.
def more_thuente_1(a):
    return -a / (a**2 + 2.0)


def more_thuente_2(a):
    return (a + 0.004) ** 5 - 2.0 * (a + 0.004) ** 4


def oscillating(a):
    waves = 39.0
    beta = 0.01
    phi = jnp.where(
        a <= 1 - beta,
        1 - a,
        jnp.where(a >= 1 + beta, a - 1, (a - 1) ** 2 / (2 * beta) + beta / 2),
    )
    return phi + 2 * (1 - beta) / (waves * math.pi) * jnp.sin(waves * math.pi / 2 * a)


@pytest.mark.parametrize("phi", [more_thuente_1, more_thuente_2, oscillating])
@pytest.mark.parametrize("first", [1e-3, 1e-1, 1e1, 1e3])
def test_wolfe_conditions_hold(x64, phi, first):
    """Whatever the scale of the direction, the accepted point satisfies them."""
    delta, sigma = 1e-3, 0.1
    tx = SEARCH(60, delta=delta, sigma=sigma, initial_step="one")
    x = jnp.zeros(())
    u = jnp.asarray(first)
    update, state = search_once(phi, x, u, tx)
    step = state.learning_rate
    np.testing.assert_allclose(update, step * u)
    slope0 = jax.grad(phi)(x) * u
    slope = jax.grad(phi)(x + update) * u
    assert state.info.success and state.info.num_linesearch_steps <= 25
    assert slope >= sigma * slope0
    assert phi(x + update) <= phi(x) + delta * step * slope0
    # What is stored is what the objective gives there.
    np.testing.assert_allclose(state.value, phi(x + update), rtol=1e-12)
    np.testing.assert_allclose(state.grad, jax.grad(phi)(x + update), rtol=1e-9)


def test_secant_finds_the_minimum_of_a_quadratic_in_two_points(x64):
    hessian = jnp.diag(jnp.array([1.0, 7.0]))
    x = jnp.array([1.0, -2.0])
    u = -(hessian @ x)
    tx = SEARCH(sigma=1e-10, delta=1e-10, initial_step="one")
    update, state = search_once(lambda x: 0.5 * x @ hessian @ x, x, u, tx)
    exact = (u @ u) / (u @ hessian @ u)
    np.testing.assert_allclose(update, exact * u, rtol=1e-12)
    assert state.info.num_linesearch_steps == 2


def test_the_accepted_point_costs_no_second_evaluation():
    calls = []

    def value_fn(x):
        jax.debug.callback(lambda x: calls.append(x.tobytes()), x)
        return jnp.sum(jnp.cosh(x - 1.5))

    tx = optax.chain(optax.scale(-1.0), SEARCH())
    value_and_grad = optax.value_and_grad_from_state(value_fn)

    @jax.jit
    def step(x, state):
        value, grad = value_and_grad(x, state=state)
        updates, state = tx.update(
            grad, state, x, value=value, grad=grad, value_fn=value_fn
        )
        return optax.apply_updates(x, updates), state

    x = jnp.array([0.0, 4.0])
    state = tx.init(x)
    expected = 1
    for _ in range(3):
        x, state = step(x, state)
        expected += int(state[-1].info.num_linesearch_steps)
    jax.effects_barrier()
    assert len(calls) == expected == len(set(calls))


def test_backs_off_quickly_from_a_step_that_is_much_too_long(x64):
    """Twenty halvings would stop at a millionth of it."""

    def value_fn(x):  # a valley in a plain that falls, ever so slowly
        return jnp.where(jnp.abs(x) < 2, x**2, 100 - 1e-12 * x)

    tx = SEARCH(initial_step="one")
    start = -jnp.ones(())
    update, state = search_once(value_fn, start, jnp.asarray(1e12), tx)
    assert state.info.success and state.info.num_linesearch_steps < 20
    np.testing.assert_allclose(start + update, 0, atol=1e-3)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_backs_off_from_where_it_is_not_finite(bad):
    def value_fn(x):
        return jnp.where(x > 0.9, bad, (x - 0.8) ** 2)

    tx = SEARCH(sigma=0.5, initial_step="one")
    update, state = search_once(value_fn, jnp.zeros(()), jnp.asarray(100.0), tx)
    assert 0.3 < update < 0.9
    assert state.info.success and state.info.nonfinite > 0


def test_nothing_finite_leaves_the_parameters():
    def value_fn(x):
        return jnp.where(x != 0, jnp.nan, -x)

    update, state = search_once(value_fn, jnp.zeros(()), jnp.ones(()))
    assert update == 0 and not state.info.success
    assert state.info.nonfinite == state.info.num_linesearch_steps > 0
    assert state.value == 0 and state.grad == -1


def test_uphill_makes_no_step():
    update, state = search_once(lambda x: x**2, jnp.ones(()), jnp.ones(()))
    assert update == 0 and not state.info.success
    assert state.info.num_linesearch_steps == 0


def test_approximate_wolfe_near_the_minimum_in_float32():
    """Where values cannot be told apart the slopes still lead to the minimum."""
    hessian = jnp.array([1.0, 3.0], jnp.float32)

    def value_fn(x):
        return 1.0 + 0.5 * jnp.sum(hessian * x**2)

    x = jnp.array([1e-4, -5e-5], jnp.float32)
    assert value_fn(x) == 1.0  # all of the decrease is below the precision
    u = -(hessian * x)
    update, state = search_once(value_fn, x, u, SEARCH(sigma=0.1, initial_step="one"))
    assert state.info.success
    after = jnp.abs(jnp.vdot(hessian * (x + update), u))
    assert after <= 0.1 * jnp.vdot(u, u)


def test_complex_leaves_and_extra_arguments():
    def value_fn(z, centre):
        return jnp.sum(jnp.abs(z - centre) ** 2)

    z = jnp.array([1 + 1j, -2j], jnp.complex64)
    centre = jnp.array([0.5, 1j], jnp.complex64)
    u = -jnp.conj(jax.grad(value_fn)(z, centre))
    tx = SEARCH(sigma=1e-3, initial_step="one")
    update, state = search_once(value_fn, z, u, tx, centre=centre)
    np.testing.assert_allclose(z + update, centre, atol=1e-5)
    assert update.dtype == jnp.complex64 and state.value.dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_state_keeps_its_dtypes_and_travels(dtype):
    def value_fn(params):
        leaves = jax.tree.leaves(params)
        total = sum(jnp.sum(jnp.abs(x.astype(wide) - 1) ** 2) for x in leaves)
        return total + jnp.zeros([], jnp.float32)

    wide = jnp.complex64 if dtype == jnp.complex64 else jnp.float32
    params = {"a": jnp.full(3, 5, dtype), "none": None, "b": (jnp.zeros((0,), dtype),)}
    tx = SEARCH(initial_step="one")
    state = tx.init(params)
    for _ in range(2):
        grad = jax.grad(value_fn)(params)
        u = jax.tree.map(lambda g: -g, grad)
        update, new_state = search_once(value_fn, params, u, tx, state)
        for before, after in ((params, update), (state, new_state)):
            assert jax.tree.structure(before) == jax.tree.structure(after)
            for x, y in zip(
                jax.tree.leaves(before), jax.tree.leaves(after), strict=True
            ):
                assert (x.shape, x.dtype) == (y.shape, y.dtype) and not y.weak_type
        params = optax.apply_updates(params, update)
        state = pickle.loads(pickle.dumps(jax.tree.map(np.asarray, new_state)))
    np.testing.assert_allclose(np.asarray(params["a"], complex), 1, atol=0.1)


STEPS = 5
MEMORY = 3
rng = np.random.default_rng(0)
PARAMS = {"w": rng.normal(size=(4, 3)), "b": rng.normal(size=2)}
PARAMS["c"] = rng.normal(size=6) + 1j * rng.normal(size=6)


def difference(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(
        float(np.max(np.abs(x - y) / (np.abs(y) + 1e-3), initial=0.0))
        for x, y in (np.asarray(pair, complex) for pair in pairs)
    )


def search(axis_name, preconditioner, mesh=None, manual=False):
    """Steps with a line search, which evaluates an objective over all devices."""
    tx = paper(
        1.0,
        beta_rule="hager_zhang",
        beta_bounds=(-np.inf, np.inf),
        preconditioner=preconditioner,
        restart_on_ascent=True,
        step_rule=nlcg_optax.scale_by_hager_zhang_linesearch(axis_name=axis_name),
        axis_name=axis_name,
    )

    def value_fn(params):
        # The leaves differ in curvature and in what they do to the first step.
        values = [
            (k + 1) * jnp.sum(jnp.abs(x) ** 4 + jnp.abs(x - 0.3) ** 2)
            for k, x in enumerate(jax.tree.leaves(params))
        ]
        total = sum(values[1:], values[0])
        return total if axis_name is None else jax.lax.psum(total, axis_name)

    def step(params, state):
        value, grad = jax.value_and_grad(value_fn)(params)
        updates, state = tx.update(
            jax.tree.map(jnp.conj, grad),
            state,
            params,
            value=value,
            grad=grad,
            value_fn=value_fn,
        )
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, PARAMS)
    state = tx.init(params)

    def memory_spec(x):  # of limited-memory BFGS, whose leading axis is the pairs'
        if jnp.shape(x)[:1] != (MEMORY,):
            return P("x") if jnp.ndim(x) else P()
        return P(None, "x") if jnp.ndim(x) > 1 else P()

    if mesh is not None:
        params, state = jax.tree.map(
            lambda x: jax.device_put(x, NamedSharding(mesh, memory_spec(x))),
            (params, state),
        )
    if manual:
        specs = jax.tree.map(memory_spec, (params, state))
        step = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=specs)
    step = jax.jit(step)
    for _ in range(STEPS):
        params, state = step(params, state)
    return jax.tree.map(np.asarray, (params, state))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("memory", [True, False])
def test_sharded_leaves_give_the_numbers_of_one_device(memory):
    """Under `jit`, and under `shard_map` with the axis named."""
    mesh = jax.make_mesh((2,), ("x",))

    def preconditioner(axis_name):
        if not memory:
            return None
        return nlcg_optax.scale_by_limited_memory_bfgs(MEMORY, axis_name=axis_name)

    expected = search(None, preconditioner(None))
    manual = difference(search("x", preconditioner("x"), mesh, True), expected)
    automatic = difference(search(None, preconditioner(None), mesh), expected)
    assert manual < 1e-9 and automatic < 1e-9


def test_vmap_searches_each_line_by_itself():
    def run(centre):
        def value_fn(x):
            return jnp.sum((x - centre) ** 4)

        x = jnp.zeros(2)
        value, grad = jax.value_and_grad(value_fn)(x)
        tx = SEARCH(initial_step="one")
        update, state = tx.update(
            -grad, tx.init(x), x, value=value, grad=grad, value_fn=value_fn
        )
        return update, state.info.num_linesearch_steps

    centres = jnp.array([[1.0, 2.0], [0.01, 0.0], [30.0, -5.0]])
    together, counts = jax.jit(jax.vmap(run))(centres)
    alone = [jax.jit(run)(centre) for centre in centres]
    np.testing.assert_allclose(together, [a for a, _ in alone], rtol=1e-5)
    assert counts.tolist() == [int(n) for _, n in alone]
    assert len(set(counts.tolist())) > 1


def test_steps_follow_the_scale_of_the_objective(x64):
    """A loss multiplied by a constant gives the same points."""

    def run(factor):
        def value_fn(x):
            return factor * (jnp.sum(x**4) + jnp.sum((x - 1.0) ** 2))

        tx = nlcg_optax.nlcg(
            1.0 / factor,
            beta_rule="hager_zhang",
            preconditioner=None,
            beta_bounds=(-math.inf, math.inf),
            epsilon=0,
            step_rule=SEARCH(),
        )
        x = jnp.array([3.0, -2.0])
        state = tx.init(x)

        def step(_, carry):
            x, state = carry
            value, grad = jax.value_and_grad(value_fn)(x)
            u, state = tx.update(
                grad, state, x, value=value, grad=grad, value_fn=value_fn
            )
            return x + u, state

        return jax.lax.fori_loop(0, 5, step, (x, state))[0]

    np.testing.assert_allclose(run(2.0**20), run(1.0), rtol=1e-9)


@pytest.mark.parametrize("static", [(), ("delta",), ("sigma",)])
def test_injected_hyperparameters_may_be_traced(static):
    def value_fn(x):
        return jnp.sum((x - 1.0) ** 2)

    x, u = jnp.zeros(2), jnp.full(2, 2.0)
    expected, _ = search_once(value_fn, x, u)
    tx = optax.inject_hyperparams(SEARCH, static_args=static)()
    update, _ = search_once(value_fn, x, u, tx)
    np.testing.assert_allclose(update, expected, rtol=1e-6)


def test_arguments_are_checked():
    for options in (
        {"max_linesearch_steps": 0},
        {"delta": 0.7},
        {"delta": 0},
        {"sigma": 1.5},
        {"sigma": 1e-9},
        {"epsilon": -1},
        {"initial_step": "long"},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            SEARCH(**options)
    tx = SEARCH()
    with pytest.raises(ValueError, match="value_fn"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))
    x = jnp.ones(2)
    given = {"grad": x, "value_fn": jnp.sum}
    for value, needle in ((None, "value=None"), (x, "shape \\(2,\\)"), (1j, "real")):
        with pytest.raises(ValueError, match=needle):
            tx.update(-x, tx.init(x), x, value=value, **given)

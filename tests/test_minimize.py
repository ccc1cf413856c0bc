import dataclasses
import functools
import math
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xla
from problems import paper
from waiting import HANGING_SECONDS

import nlcg_optax
from nlcg_optax import minimize


def rosenbrock(x):
    return jnp.sum((1 - x[:-1]) ** 2 + 100 * (x[1:] - x[:-1] ** 2) ** 2)


def quadratic(x, hessian, b):
    return 0.5 * x @ hessian @ x - b @ x


PROBLEM = jnp.diag(jnp.array([1.0, 3.0, 9.0, 27.0])) + 0.5


def exact_search(hessian):
    """The line search that a quadratic allows."""

    def update(updates, state, params=None, *, grad, **extra_args):
        del params, extra_args
        step = -(grad @ updates) / (updates @ hessian @ updates)
        return step * updates, state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )


@pytest.mark.parametrize(
    ("beta_rule", "preconditioner"),
    [
        ("hager_zhang", None),
        ("dai_kou", None),
        ("hestenes_stiefel", None),
        ("liu_storey", None),
        ("auto", "lbfgs"),
    ],
)
def test_quadratic_of_n_variables_takes_n_steps(x64, beta_rule, preconditioner):
    hessian = PROBLEM.astype(jnp.float64)
    b = jnp.ones(4)
    result = minimize(
        quadratic,
        jnp.array([1.0, -2.0, 3.0, 0.5]),
        hessian,
        b,
        beta_rule=beta_rule,
        preconditioner=preconditioner,
        line_search=exact_search(hessian),
        max_iter=4,
    )
    assert result.iterations == 4
    np.testing.assert_allclose(result.params, np.linalg.solve(hessian, b), rtol=1e-6)


@pytest.mark.parametrize("preconditioner", ["lbfgs", "diagonal_bfgs", None])
def test_rosenbrock(x64, preconditioner):
    start = jnp.array([-1.2, 1.0, -1.2, 1.0])
    result = minimize(rosenbrock, start, preconditioner=preconditioner, gtol=1e-9)
    np.testing.assert_allclose(result.params, jnp.ones(4), atol=1e-5)
    assert result.value_evaluations < {"lbfgs": 100}.get(preconditioner, 1000)
    assert "gradient is small enough" in result.message and result.success


def test_float32_stops_and_says_why():
    start = jnp.array([-1.2, 1.0], jnp.float32)
    result = minimize(rosenbrock, start)
    assert result.params.dtype == result.value.dtype == jnp.float32
    np.testing.assert_allclose(result.params, [1, 1], atol=1e-3)
    # A tolerance below the precision: it gives up at the minimum, soon.
    result = minimize(lambda x: 3.0 + rosenbrock(x), start, gtol=0.0)
    assert result.value_evaluations < 300
    np.testing.assert_allclose(result.params, [1, 1], atol=2e-3)
    assert "no lower point" in result.message or "gradient" in result.message


def test_every_point_is_evaluated_once():
    """What the result counts is what was evaluated, value and gradient together."""
    points = []

    def fun(x):
        jax.debug.callback(lambda x: points.append(x.tobytes()), x)
        return rosenbrock(x)

    result = minimize(fun, jnp.array([-1.2, 1.0], jnp.float32))
    jax.effects_barrier()
    assert len(points) == len(set(points)) == result.value_evaluations
    assert result.grad_evaluations == result.value_evaluations


def test_trees_of_real_and_complex_leaves_and_aux():
    target = {"a": jnp.array([1.0, 2.0]), "b": (jnp.array(1 + 2j, jnp.complex64),)}

    def fun(params, target, weight):
        errors = jax.tree.map(
            lambda x, y: jnp.sum(jnp.abs(x - y) ** 2 * (1 + jnp.abs(x) ** 2)),
            params,
            target,
        )
        errors = jax.tree.leaves(errors)
        return weight * errors[0] + errors[1], {"errors": errors}

    start = jax.tree.map(jnp.zeros_like, target)
    for preconditioner in ("lbfgs", None):
        result = minimize(
            fun, start, target, 3.0, has_aux=True, preconditioner=preconditioner
        )
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-3),
            result.params,
            target,
        )
        assert jax.tree.structure(result.params) == jax.tree.structure(target)
        total = 3 * result.aux["errors"][0] + result.aux["errors"][1]
        np.testing.assert_allclose(total, result.value, rtol=1e-6)
        assert result.grad_evaluations == result.value_evaluations - 1


def test_vmap_lets_each_problem_stop_by_itself(x64):
    # In float32 the last digits depend on what XLA fuses.
    starts = jnp.array([[-1.2, 1.0], [1.0, 1.0], [0.5, 3.0]])
    solve = functools.partial(minimize, rosenbrock)
    together = jax.jit(jax.vmap(solve))(starts)
    alone = [solve(start) for start in starts]
    assert together.iterations.tolist() == [int(r.iterations) for r in alone]
    assert len(set(together.iterations.tolist())) == 3
    np.testing.assert_allclose(together.params, [r.params for r in alone], rtol=1e-6)
    evaluations = [int(r.value_evaluations) for r in alone]
    assert together.value_evaluations.tolist() == evaluations
    assert together.message == [r.message for r in alone]


def test_a_batch_keeps_the_reasons_apart():
    def fun(x, kind):
        return jnp.where(kind == 0, jnp.sum(x**2), jnp.where(kind == 1, jnp.nan, 0.0))

    kinds = jnp.arange(2)
    result = jax.vmap(lambda kind: minimize(fun, jnp.ones(2), kind))(kinds)
    assert "gradient is small" in result.message[0]
    assert "not finite at the starting point" in result.message[1]
    np.testing.assert_array_equal(result.params[1], jnp.ones(2))
    assert result.success.tolist() == [True, False]


def test_backs_off_from_regions_that_are_not_finite(x64):
    def fun(x):  # -log x: undefined on the left, where the first step leads
        return jnp.sum(x - jnp.log(x)) + jnp.where(jnp.any(x > 50), jnp.nan, 0.0)

    result = minimize(fun, jnp.array([1e-3, 40.0]))
    np.testing.assert_allclose(result.params, jnp.ones(2), rtol=1e-5)
    assert result.success


def test_status_in_words(x64):
    start = jnp.array([-1.2, 1.0])
    assert "max_iter" in minimize(rosenbrock, start, max_iter=3).message
    assert minimize(rosenbrock, start, max_iter=3).iterations == 3
    assert minimize(rosenbrock, start, max_iter=0).value_evaluations == 1
    assert "ftol" in minimize(rosenbrock, start, ftol=1e-3).message
    # A kink: slopes promise a descent that the values deny.
    kink = minimize(lambda x: jnp.sum(jnp.sqrt(jnp.abs(x - 1.0))), jnp.ones(2) * 1.5)
    assert not kink.success and "stopped" in kink.message

    def cliff(x):  # defined at the starting point alone
        return jnp.where(jnp.all(x == 1.0), jnp.sum(x), jnp.nan)

    result = minimize(cliff, jnp.ones(2))
    assert "not finite" in result.message
    np.testing.assert_array_equal(result.params, jnp.ones(2))


def test_a_small_gradient_is_not_enough_where_much_is_promised(x64):
    """1/x: the gradient meets the tolerance at 316, long before the value does."""
    result = minimize(lambda x: 1 / x, jnp.asarray(1.0), gtol=1e-5)
    assert result.success and result.value < 1e-4
    # Nothing is promised by a search that names no step; then the gradient decides.
    search = optax.stateless(lambda updates, params: params)  # doubles them
    options = {"preconditioner": None, "beta_rule": None, "line_search": search}
    result = minimize(lambda x: 1 / x, jnp.asarray(1.0), gtol=1e-5, **options)
    assert result.success and result.value == 1 / 512
    # Nor is more asked for than there are iterations.
    for steps, success in ((15, False), (25, True)):
        result = minimize(lambda x: 1 / x, jnp.asarray(1.0), gtol=1e-5, max_iter=steps)
        assert result.success == success and result.iterations == steps
        assert (result.grad_norm <= 1e-5) == success


def test_gives_up_after_ten_iterations_without_progress():
    """A search that mirrors the parameters lowers neither value nor gradient."""

    def mirror(updates, params):
        return jax.tree.map(lambda x: -2 * x, params)

    def solve(start, search):
        options = {"preconditioner": None, "line_search": search}
        return minimize(lambda x: jnp.sum(x**2), start, **options)

    result = solve(jnp.ones(3), optax.stateless(mirror))
    assert result.iterations == 10 and result.restarts == 0
    assert "no lower point" in result.message and result.value == 3

    def first_a_real_step(updates, params):
        return jax.tree.map(
            lambda u, x: jnp.where(jnp.all(x == 1), 0.25 * u, -2 * x), updates, params
        )

    # The direction is then a conjugate one, and is first started afresh.
    result = solve(jnp.ones(3), optax.stateless(first_a_real_step))
    assert result.iterations == 21 and result.restarts == 1 and result.value == 0.75


def test_restarts_follow_their_number():
    directions = []

    def record(updates, params):
        jax.debug.callback(lambda u: directions.append(np.asarray(u)), updates)
        return jax.tree.map(lambda u: 0.01 * u, updates)

    hessian = jnp.array([1.0, 5.0, 20.0])
    minimize(
        lambda x: 0.5 * jnp.sum(hessian * x**2),
        jnp.ones(3),
        preconditioner=None,
        beta_rule="fletcher_reeves",
        line_search=optax.stateless(record),
        restart_every=3,
        max_iter=7,
    )
    jax.effects_barrier()
    x, steepest = np.ones(3), []
    for direction in directions:
        steepest.append(np.allclose(direction, -hessian * x, rtol=1e-5))
        x = x + 0.01 * direction
    assert steepest == [True, False, False, True, False, False, True]


def test_python_numbers_and_other_trees():
    result = minimize(lambda p: (p[0] - 2.0) ** 2 + (p[1][0] + 1) ** 2, [0.5, (1.0,)])
    np.testing.assert_allclose(jax.tree.leaves(result.params), [2, -1], atol=1e-5)
    assert minimize(lambda p: jnp.ones([]), {}).success
    with pytest.raises(TypeError, match="params.'n'. has dtype int32.*args"):
        minimize(lambda p: jnp.sum(p["n"] ** 2), {"n": jnp.arange(3)})


def test_composes_with_the_line_searches_of_optax():
    start = jnp.array([-1.2, 1.0], jnp.float32)
    searches = {
        "zoom": optax.scale_by_zoom_linesearch(20, initial_guess_strategy="one"),
        "backtracking": optax.scale_by_backtracking_linesearch(30, store_grad=True),
        "no store": optax.scale_by_backtracking_linesearch(30),
        "fixed": optax.scale(1e-3),
    }
    for name, search in searches.items():
        with jax.numpy_dtype_promotion("standard"):  # optax's own are not strict
            result = minimize(
                rosenbrock,
                start,
                line_search=search,
                max_iter=2000,
                preconditioner=None if name == "fixed" else "lbfgs",
                beta_rule=None if name == "fixed" else "auto",
            )
        assert result.value < (0.1 if name == "fixed" else 1e-4), name
        assert result.value_evaluations >= result.iterations


def test_chain_of_the_alias_with_the_line_searches_of_optax():
    def solve(search, steps):
        tx = paper(
            1.0,
            beta_rule="hybrid_hs_dy",
            preconditioner=None,
            beta_bounds=(0.0, 1e10),
            restart_on_ascent=True,
            step_rule=search,
        )
        value_and_grad = optax.value_and_grad_from_state(rosenbrock)

        def step(_, carry):
            x, state = carry
            value, grad = value_and_grad(x, state=state)
            updates, state = tx.update(
                grad, state, x, value=value, grad=grad, value_fn=rosenbrock
            )
            return optax.apply_updates(x, updates), state

        x = jnp.array([-1.2, 1.0], jnp.float32)
        x, _ = jax.jit(lambda x: jax.lax.fori_loop(0, steps, step, (x, tx.init(x))))(x)
        return rosenbrock(x)

    with jax.numpy_dtype_promotion("standard"):
        assert solve(optax.scale_by_zoom_linesearch(20), 150) < 1e-4
        search = optax.scale_by_backtracking_linesearch(30, store_grad=True)
        assert solve(search, 400) < 1e-2
    assert solve(nlcg_optax.scale_by_hager_zhang_linesearch(), 150) < 1e-4


def test_implicit_derivatives_match_finite_differences(x64):
    def scalar(theta, closed):
        def fun(x, theta):
            return (
                jnp.sum(jnp.cosh(x - theta["a"]))
                + theta["b"] * jnp.sum(x[:2] * x[1:])
                + jnp.sum(closed * x) ** 2
            )

        result = minimize(fun, jnp.zeros(3), theta, gtol=1e-13)
        weights = jnp.array([1.0, -2.0, 0.3])
        return weights @ result.params**2 + 5 * result.value

    theta = {"a": jnp.array([0.3, -0.2, 0.9]), "b": jnp.asarray(0.4)}
    closed = jnp.array([0.2, 0.5, -0.1])
    flat, unravel = jax.flatten_util.ravel_pytree((theta, closed))
    # One compilation for all: along every axis, and along all at once.
    h = 1e-5
    steps = h * np.concatenate([np.eye(flat.size), -np.eye(flat.size)])
    values = jax.jit(jax.vmap(lambda flat: scalar(*unravel(flat))))(flat + steps)
    numeric = (values[: flat.size] - values[flat.size :]) / (2 * h)
    grads = jax.jit(jax.grad(lambda flat: scalar(*unravel(flat))))(flat)
    np.testing.assert_allclose(grads, numeric, rtol=1e-4, atol=1e-7)
    # Forwards as well.
    tangent = jax.jvp(scalar, (theta, closed), unravel(jnp.arange(1.0, flat.size + 1)))[
        1
    ]
    expected = numeric @ np.arange(1.0, flat.size + 1)
    np.testing.assert_allclose(tangent, expected, rtol=1e-4)


def test_implicit_derivative_of_complex_parameters_and_batches(x64):
    def fun(z, c):  # its minimum is at z = c, whatever the scale of the imaginary part
        return jnp.real(z - c) ** 2 + 3 * jnp.imag(z - c) ** 2

    def distance(c):
        z = minimize(fun, jnp.asarray(0j), jax.lax.complex(c[0], c[1])).params
        return jnp.real(z) * 2 + jnp.imag(z) ** 2

    cs = jnp.array([[1.0, 2.0], [-3.0, 0.5]])
    grads = jax.jit(jax.vmap(jax.grad(distance)))(cs)
    np.testing.assert_allclose(grads, [[2.0, 4.0], [2.0, 1.0]], rtol=1e-6)


def test_implicit_derivative_of_aux_beside_arguments_without_one(x64):
    key = jax.random.key(0)

    def fun(x, index, key, c):  # its minimum is at c z
        z = jax.random.normal(key, (3,))[index]
        return jnp.sum((x - c * z) ** 2), {"scaled": c * x, "index": index}

    def scaled(c):
        index = jnp.array([2, 0])
        return minimize(fun, jnp.zeros(2), index, key, c, has_aux=True).aux["scaled"]

    z = jax.random.normal(key, (3,))[jnp.array([2, 0])]
    for jacobian in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(jacobian(scaled)(2.0), 2 * 2.0 * z, rtol=1e-6)


def test_second_derivative_of_the_solution(x64):
    def solution(t):
        def fun(x, t):
            return jnp.cosh(x - t) + 0.1 * x**4

        return minimize(fun, jnp.asarray(0.0), t, gtol=1e-12).params

    h = 1e-3
    values = [solution(1 + k * h) for k in (-1.0, 0.0, 1.0)]
    numeric = (values[0] - 2 * values[1] + values[2]) / h**2
    np.testing.assert_allclose(jax.grad(jax.grad(solution))(1.0), numeric, rtol=1e-4)


def test_derivative_by_the_starting_point_is_zero():
    def run(start):
        return minimize(rosenbrock, start).params[0]

    np.testing.assert_array_equal(jax.grad(run)(jnp.zeros(2)), [0, 0])


def test_runs_under_optimistix():
    optimistix = pytest.importorskip("optimistix")
    with jax.numpy_dtype_promotion("standard"):
        solver = optimistix.OptaxMinimiser(
            paper(
                1.0,
                beta_rule="hager_zhang",
                preconditioner=None,
                beta_bounds=(-math.inf, math.inf),
                restart_on_ascent=True,
                step_rule=nlcg_optax.scale_by_hager_zhang_linesearch(),
            ),
            rtol=1e-5,
            atol=1e-5,
        )
        solution = optimistix.minimise(
            lambda x, _: rosenbrock(x), solver, jnp.array([-1.2, 1.0]), max_steps=500
        )
    np.testing.assert_allclose(solution.value, [1, 1], atol=1e-2)


def test_callback_and_progress(capsys):
    seen = []
    result = minimize(
        rosenbrock, jnp.zeros(2), callback=seen.append, progress=True, max_iter=5
    )
    jax.effects_barrier()
    assert [int(info.iteration) for info in seen] == [1, 2, 3, 4, 5]
    assert int(seen[-1].value_evaluations) == result.value_evaluations
    np.testing.assert_allclose(seen[-1].params, result.params)
    assert capsys.readouterr().out.count("iteration") == 5


@pytest.mark.parametrize("preconditioner", ["lbfgs", None])
@pytest.mark.parametrize(
    "fun",
    [
        lambda x: -jnp.sum(x),
        lambda x: -jnp.sum(x**2),
        lambda x: jnp.sum(-(x**3)),
        lambda x: x[0] * (x[1] - 3),
        lambda x: -jnp.sum(jnp.exp(x)),
    ],
    ids=["linear", "concave", "cubic", "saddle", "exponential"],
)
def test_an_objective_without_a_lower_bound(fun, preconditioner):
    start = jnp.array([1.0, 0.5], jnp.float32)

    @jax.jit
    def run(scale):
        return minimize(lambda x: scale * fun(x), start, preconditioner=preconditioner)

    for scale in (1.0, 1e-4, 1e4):
        result = run(jnp.float32(scale))
        assert "no lower bound" in result.message and not result.success, scale
        assert jnp.isfinite(result.value) and result.value_evaluations < 300, scale


@pytest.mark.parametrize("preconditioner", ["lbfgs", None])
def test_a_far_minimum_is_one(preconditioner, x64):
    def far(x):  # -5e15, 1e8 away
        return 0.5 * jnp.sum((x - 1e8) ** 2) - 5e15

    result = minimize(far, jnp.zeros(2), preconditioner=preconditioner)
    assert result.success
    np.testing.assert_allclose(result.params, 1e8, rtol=1e-7)

    def low(x):  # from beside a maximum down to -2.5e9
        return jnp.sum(x**4 - 1e5 * x**2)

    result = minimize(low, jnp.full(2, 1e-12), preconditioner=preconditioner)
    assert result.success
    np.testing.assert_allclose(result.params**2, 5e4, rtol=1e-5)


@pytest.mark.parametrize("way", ["returns True", "raises StopIteration"])
def test_a_callback_stops_the_search(way):
    def callback(info):
        if info.iteration == 3 and way == "raises StopIteration":
            raise StopIteration
        return info.iteration == 3

    result = minimize(rosenbrock, jnp.zeros(2), callback=callback)
    assert result.message == "stopped: the callback asked for it"
    assert result.iterations == 3 and not result.success
    # Nor is that of a problem that has stopped a wish.
    starts = jnp.array([[-1.2, 1.0], [1.0, 1.0]])
    run = jax.vmap(lambda x: minimize(rosenbrock, x, callback=callback))
    assert run(starts).iterations.tolist() == [3, 0]


def test_a_callback_without_a_wish_changes_nothing():
    # What happens to be true is none.
    assert minimize(rosenbrock, jnp.zeros(2), callback=lambda info: 1).success

    def solution(c):  # 1/c
        hessian, b = c * jnp.eye(1), jnp.ones(1)
        return minimize(quadratic, jnp.ones(1), hessian, b, callback=print).params[0]

    np.testing.assert_allclose(jax.grad(solution)(jnp.float32(2)), -0.25, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("args", "behind params: minimize(fun, params, a, b)"),
        ("method", "preconditioner, beta_rule and line_search choose it"),
        ("constraints", "variables that are free"),
        ("tol", "gtol, of the gradient, and ftol"),
        ("options", "arguments themselves: max_iter, gtol"),
        ("jac", "JAX differentiates fun"),
        ("hess", "learned from the gradients"),
        ("maxiter", "it is called max_iter"),
        ("disp", "progress=True"),
        ("max_iters", "did you mean max_iter?"),
        ("xyz", "did you mean max_iter, gtol, ftol, bounds, has_aux, "),
    ],
)
def test_arguments_of_scipy_are_told_what_stands_in_their_place(name, instead):
    with pytest.raises(TypeError) as info:
        minimize(rosenbrock, jnp.zeros(2), **{name: None})
    assert str(info.value).startswith(f"minimize takes no argument {name!r}: ")
    assert instead in str(info.value)


@pytest.mark.parametrize("start", [[-1, 1], [-1.0, 1], [np.float32(-1), 1.0]])
def test_a_list_of_numbers_is_an_array(start):
    found = minimize(rosenbrock, start)
    expected = minimize(rosenbrock, jnp.array([-1.0, 1.0]))
    np.testing.assert_array_equal(found.params, expected.params)


@pytest.mark.parametrize(
    ("fun", "has_aux", "said"),
    [
        (lambda x: (jnp.sum(x**2), x), False, "has_aux=True allows"),
        (lambda x: x**2, False, "array of shape (2,) and dtype float32: expected a re"),
        (lambda x: {"loss": jnp.sum(x)}, False, "returns a dict of 1 arrays: expected"),
        (lambda x: jnp.sum(x**2), True, "to return (value, aux), and returns an array"),
        (lambda x: 1.0, False, "returns 1.0, which is no array: expected a real sc"),
        (lambda x: (1.0, x), True, "returns 1.0, which is no array: expected a real"),
        (lambda x: None, False, "returns None, which is no array: expected a real"),
        (lambda x: (jnp.sum(x), {"a": "b"}), True, "returns 'b' in aux['a']: expected"),
        (
            lambda x: (x, x),
            True,
            "array of shape (2,) and dtype float32: expected a re",
        ),
        (
            lambda x: jnp.sum(x).astype(complex),
            False,
            "dtype complex64: expected a real scalar",
        ),
    ],
)
def test_what_the_objective_returns_is_checked(fun, has_aux, said):
    with pytest.raises(TypeError) as info:
        minimize(fun, jnp.ones(2), has_aux=has_aux)
    assert said in str(info.value)


@pytest.mark.parametrize("aux", [None, {"a": 3, "b": (None, 2.0)}], ids=str)
def test_aux_may_be_none_or_numbers(aux):
    found = minimize(lambda x: (jnp.sum(x**2), aux), jnp.ones(2), has_aux=True)
    assert found.aux == aux


def test_a_result_is_printed_in_a_few_lines():
    result = minimize(rosenbrock, jnp.zeros(2, jnp.float32))
    first, second, third, fourth = repr(result).splitlines()
    assert first == result.message
    assert f"value {result.value:.8g}, " in second
    assert f"{result.iterations} iterations, {result.value_evaluations} eval" in third
    assert fourth == "  params: float32[2]"
    starts = jnp.array([[0.0, 0.0], [1.0, 1.0], [jnp.nan, 0.0]], jnp.float32)
    batch = jax.vmap(lambda x: minimize(rosenbrock, x))(starts)
    first, reasons = repr(batch).splitlines()[0], repr(batch).splitlines()[1:-3]
    assert first == "MinimizeResult of 3 problems"
    assert [line.split()[:2] for line in reasons] == [
        ["2", "converged:"],
        ["1", "stopped:"],
    ]
    assert repr(batch).endswith("  params: float32[3, 2]")
    # A traced one has its fields' names.
    told = []
    jax.jit(lambda x: told.append(repr(minimize(rosenbrock, x))))(jnp.zeros(2))
    assert told[0].startswith("MinimizeResult(params=JitTracer")


def test_callback_of_a_batch_hears_of_the_running_problems():
    starts = jnp.array([[-1.2, 1.0], [1.0, 1.0], [0.5, 3.0]], jnp.float32)
    heard = []

    def callback(info):
        heard.append(float(info.value))

    result = jax.vmap(lambda x: minimize(rosenbrock, x, callback=callback))(starts)
    jax.effects_barrier()
    assert result.iterations[1] == 0  # it starts at the minimum
    assert len(heard) == result.iterations.sum()


def test_a_second_call_does_not_compile_again():
    start = jnp.array([0.5, 2.0], jnp.float32)
    minimize(rosenbrock, start)
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "value_and_grad", None)  # tracing again would call it
        minimize(rosenbrock, start + 1)


@pytest.mark.parametrize(("preconditioner", "vectors"), [("lbfgs", 26), (None, 7)])
def test_vectors_of_state_are_as_many_as_documented(
    monkeypatch, preconditioner, vectors
):
    states = []

    def spy(condition, body, state):
        states.append(state)
        return loop(condition, body, state)

    loop = jax.lax.while_loop
    monkeypatch.setattr(jax.lax, "while_loop", spy)
    minimize(lambda x: jnp.sum(x**2), jnp.ones(1000), preconditioner=preconditioner)
    assert sum(x.size for x in jax.tree.leaves(states[0])) // 1000 == vectors


def test_arguments_are_checked():
    for options in (
        {"preconditioner": "newton"},
        {"beta_rule": "newton"},
        {"line_search": "newton"},
        {"max_iter": -1},
        {"gtol": -1.0},
        {"ftol": -1.0},
        {"memory_size": 0},
        {"restart_every": 0},
        {"preconditioner": 3, "beta_rule": None},
        {"line_search": None},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            minimize(rosenbrock, jnp.zeros(2), **options)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from nlcg_optax import minimize
mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
def fun(p, c):
    return jnp.sum((p["w"] ** 2 - c) ** 2) + jnp.sum((p["b"] - jnp.mean(p["w"])) ** 2)
c = jnp.arange(1.0, 9.0)
p = {"w": jnp.full(8, 2.0), "b": jnp.zeros(3)}
plain = minimize(fun, p, c)
put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
sharded = {"w": put(p["w"], P("x")), "b": put(p["b"], P())}
result = minimize(fun, sharded, put(c, P("x")))
assert result.params["w"].sharding.spec == P("x"), result.params["w"].sharding
assert len(result.params["w"].addressable_shards) == 4
np.testing.assert_allclose(result.params["w"], plain.params["w"], rtol=1e-3)
np.testing.assert_allclose(result.params["w"], jnp.sqrt(c), rtol=1e-3)
assert result.success, result.message
"""


def test_sharded_parameters():
    environment = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla.flags(devices=4),
        "PYTHONPATH": str(pathlib.Path(nlcg_optax.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANGING_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_scipy_names_of_a_result():
    result = minimize(lambda x: jnp.sum((x - 2.0) ** 2), jnp.zeros(3))
    pairs = zip("x fun nit nfev njev".split(), (0, 1, 3, 4, 5), strict=True)
    for name, place in pairs:
        assert getattr(result, name) is result[place], name
    with pytest.raises(AttributeError, match=r"'jac': .*jax\.grad\(fun\)"):
        _ = result.jac
    with pytest.raises(AttributeError, match="'parms': it has params, value"):
        _ = result.parms


@dataclasses.dataclass
class Problem:
    data: Any

    def __call__(self, x):
        return jnp.sum((x - self.data) ** 2)

    def loss(self, x):
        return self(x)


@pytest.mark.parametrize("kind", ["object", "method", "partial", "jitted"])
def test_objectives_that_are_objects(kind):
    problem = Problem(jnp.arange(3.0))
    fun = {
        "object": problem,
        "method": problem.loss,
        "partial": functools.partial(Problem.loss, problem),
        "jitted": jax.jit(problem.loss),
    }[kind]
    np.testing.assert_allclose(minimize(fun, jnp.zeros(3)).x, problem.data, atol=1e-4)
    # Another object is another function, though it may be equal.
    other = Problem(1 + jnp.arange(3.0))
    np.testing.assert_allclose(minimize(other, jnp.zeros(3)).x, other.data, atol=1e-4)


def test_a_start_in_float64_that_becomes_float32_is_told_of():
    def fun(x):
        return jnp.sum((x - 2.0) ** 2)

    with pytest.warns(UserWarning, match="jax_enable_x64"):
        minimize(fun, np.zeros(3))
    minimize(fun, np.zeros(3, np.float32))  # warnings are errors here
    minimize(fun, jnp.zeros(3))


def test_a_steep_start_does_not_loosen_success(x64):
    """By the first value and gradient alone it would stop at 85 and at 19,882."""

    @jax.jit
    @jax.vmap
    def solve(far):
        start = jnp.array([75.0, 95.0, 22.0, 118.0, 0.02]), far[None]
        return minimize(rosenbrock, jnp.concatenate(start), max_iter=20_000)

    found = solve(jnp.array([1e2, 1e4]))
    assert found.success.all()
    # Rosenbrock's chain has a second minimum, of value 4.
    lowest = jnp.minimum(found.value, jnp.abs(found.value - 3.973940500930295))
    np.testing.assert_array_less(lowest, 1e-8)


def test_a_steep_start_in_float32():
    found = minimize(rosenbrock, jnp.full(10, -1.2, jnp.float32))
    assert found.success
    np.testing.assert_allclose(found.x, 1, atol=1e-3)


def test_scipys_callback_and_what_it_raises():
    points = []

    def callback(xk):
        points.append(xk)
        if len(points) == 3:
            raise KeyError("the third")

    with pytest.raises(KeyError, match="the third") as info:
        minimize(rosenbrock, jnp.zeros(2), callback=callback)
    assert [point.shape for point in points] == [(2,)] * 3
    assert "is called with an IterationInfo" in info.value.__notes__[0]


def test_bounds_lead_where_scipy_goes(x64):
    optimize = pytest.importorskip("scipy.optimize")

    def exponential(x):  # free, held below, held above, and on the way out of a bound
        return jnp.sum(jnp.exp(x) - jnp.arange(1.0, x.size + 1) * x) + x[0] * x[1]

    def scaled(x):  # curvatures of 1 to 1e6
        weights = 10.0 ** jnp.arange(float(x.size))
        return jnp.sum(weights * (x - 1) ** 2) + 100 * jnp.sum(x) ** 2

    box = [(0.0, None), (None, 0.5), (0.5, 0.6), (1.5, 1.5), (None, None), (-1, 0.9)]
    cases = (
        (rosenbrock, [-1.2, 1.0], [(-2.0, 0.8), (None, 2.0)]),
        (exponential, [0.0, 0.5, 9.0, 9.0, 0.0, -1.0], box),
        (scaled, [3.0] * 7, [(k / 8 - 0.5, 2.0) for k in range(7)]),
    )
    for fun, start, bounds in cases:
        start = np.asarray(start)
        found = minimize(fun, start, bounds=bounds)
        by_scipy = optimize.minimize(
            jax.jit(fun),
            start,
            jac=jax.jit(jax.grad(fun)),
            bounds=bounds,
            options={"ftol": 1e-15, "gtol": 1e-9},
        )
        assert found.success, found
        np.testing.assert_allclose(found.fun, by_scipy.fun, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(found.x, by_scipy.x, atol=1e-5)
        assert found.nfev <= 2 * by_scipy.nfev + 10, (found.nfev, by_scipy.nfev)


def test_forms_of_bounds(x64):
    optimize = pytest.importorskip("scipy.optimize")
    target = jnp.array([-1.0, 0.5, 3.0])

    def tree_loss(p):
        return jnp.sum((p["a"] - target) ** 2) + (p["b"] + 2) ** 2

    start = {"a": jnp.zeros(3), "b": jnp.zeros([])}
    for bounds in (
        (0, 1),
        ({"a": jnp.zeros(3), "b": 0}, {"a": jnp.ones(3), "b": jnp.ones([])}),
        ({"a": 0, "b": -0.0}, 1.0),
    ):
        found = minimize(tree_loss, start, bounds=bounds)
        np.testing.assert_allclose(found.x["a"], [0, 0.5, 1], atol=1e-6)
        assert found.x["b"] == 0 and found.success
    found = minimize(tree_loss, start, bounds=(None, 1)).x
    np.testing.assert_allclose(found["a"], [-1, 0.5, 1], atol=1e-6)

    def loss(x):
        return jnp.sum((x - target) ** 2)

    scipys = optimize.Bounds([0, -np.inf, -np.inf], 2)
    found = minimize(loss, np.zeros(3), bounds=scipys).x
    np.testing.assert_allclose(found, [0, 0.5, 2], atol=1e-6)
    for bounds, said in (
        ([(0, 1)], "for each of the 3 variables"),
        ([(0, 1), (0, 1), (1, 0)], "upper one is below"),
        (optimize.Bounds([0, 0], 1), "trees like the parameters"),
    ):
        with pytest.raises(ValueError, match=said):
            minimize(loss, np.zeros(3), bounds=bounds)
    with pytest.raises(ValueError, match="leave preconditioner"):
        minimize(loss, np.zeros(3), bounds=[(0, 1)] * 3, preconditioner=None)


def test_implicit_derivatives_within_bounds(x64):
    weights = jnp.array([1.0, -2.0, 0.3])

    def scalar(theta):
        def fun(x, c):
            return jnp.sum(jnp.cosh(x - c)) + jnp.sum(x[:2] * x[1:])

        bounds = [(None, theta[3]), (theta[4], 9.0), (-9.0, 9.0)]
        result = minimize(fun, jnp.zeros(3), theta[:3], bounds=bounds, gtol=1e-13)
        return weights @ result.params**2 + 5 * result.value

    theta = jnp.array([2.0, -3.0, 0.5, 1.1, -0.7])  # both bounds hold
    steps = 1e-5 * np.concatenate([np.eye(5), -np.eye(5)])
    values, grad = jax.jit(
        lambda theta: (jax.vmap(scalar)(theta + steps), jax.grad(scalar)(theta))
    )(theta)
    np.testing.assert_allclose(grad, (values[:5] - values[5:]) / 2e-5, rtol=1e-5)


def test_the_covariance_of_a_fit_is_that_of_curve_fit(x64):
    optimize = pytest.importorskip("scipy.optimize")
    draw = np.random.default_rng(0)
    t = np.linspace(0, 4, 30)
    sigma = 0.05 + 0.02 * t
    y = 2.5 * np.exp(-1.3 * t) + 0.5 + sigma * draw.normal(size=t.size)

    def curve(t, a, b, c):
        return a * jnp.exp(-b * t) + c

    def residuals(p, t, y, sigma):
        return (curve(t, p["a"], *p["bc"]) - y) / sigma

    def loss(p, *data):
        return 0.5 * jnp.sum(residuals(p, *data) ** 2)

    start = {"a": jnp.ones([]), "bc": jnp.array([1.0, 0.0])}
    fit = minimize(loss, start, t, y, sigma)
    for absolute in (False, True):
        options = {"sigma": sigma, "absolute_sigma": absolute, "p0": [1.0, 1.0, 0.0]}
        best, expected = optimize.curve_fit(curve, t, y, **options)
        found = nlcg_optax.fit_covariance(
            residuals, fit.x, t, y, sigma, absolute_sigma=absolute
        )
        np.testing.assert_allclose([fit.x["a"], *fit.x["bc"]], best, rtol=1e-5)
        np.testing.assert_allclose(found, expected, rtol=1e-4)

    def doubled(p, t):  # only the sum of the two is determined
        return (p[0] + p[1]) * t

    assert jnp.isinf(nlcg_optax.fit_covariance(doubled, jnp.ones(2), t)).all()
    few = nlcg_optax.fit_covariance(doubled, jnp.ones(2), t[:1])
    assert few.shape == (2, 2) and jnp.isinf(few).all()


def test_a_start_that_meets_the_tolerance_by_its_units_is_told():
    """Of a loss in small units the gradient is below an absolute tolerance at once."""

    def fun(x):
        return 1e-9 * jnp.sum((x - 1) ** 2)

    start = jnp.zeros(3)
    result = nlcg_optax.minimize(fun, start)
    assert result.success and result.iterations == 0
    assert "at the start already" in result.message and "smaller gtol" in repr(result)
    result = nlcg_optax.minimize(fun, start, gtol=1e-14)
    assert result.success and result.iterations > 0
    assert "at the start" not in result.message
    # At a minimum there is nothing to say.
    assert "at the start" not in nlcg_optax.minimize(fun, jnp.ones(3)).message

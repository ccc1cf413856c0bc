"""Numbers far out: huge, tiny and zero gradients, and derivatives through all of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from long_run import rest_long

import nlcg_optax as n

ORTHOGONALIZATION = functools.partial(n.scale_by_orthogonalization, epsilon=0.0)
# Those that a factor of the loss does not change, but for the last entry's factor:
# 0: the steps are the same; 1: they are multiplied by it. (Of diagonal BFGS neither
# holds: its B begins as 1.)
INVARIANT = {
    "orthogonalization": (ORTHOGONALIZATION, 0),
    "conjugate direction": (
        lambda: n.scale_by_conjugate_direction(epsilon=0.0, beta_bounds=(0, 0.9)),
        1,
    ),
    **{
        f"conjugate direction, {rule}": (
            functools.partial(
                n.scale_by_conjugate_direction,
                rule,
                ORTHOGONALIZATION(),
                epsilon=0.0,
                restart_on_ascent=True,
            ),
            0,
        )
        for rule in n.beta.BETA_RULES
    },
    "loss feedback": (lambda: n.scale_by_loss_feedback("online"), 1),
    "lars": (lambda: n.scale_by_lars(0.1, damping=0.0), 0),
    "nlcg": (
        lambda: n.nlcg(0.05, epsilon=0.0, weight_decay=0.1),
        0,
    ),
    "quadratic model": (lambda: n.nlcg_auto(epsilon=0.0), 0),
    "quadratic model, Gauss-Newton": (
        lambda: n.nlcg_auto(preconditioner=None, weight_decay=0.0),
        0,
    ),
    "quadratic model, where noise rules": (
        lambda: n.nlcg_auto(4, preconditioner=None, noise_direction=optax.identity()),
        0,
    ),
    "soap": (lambda: n.scale_by_soap(eps=0.0), 0),
    "limited-memory BFGS": (lambda: n.scale_by_limited_memory_bfgs(2), 0),
}


def outputs(params):
    return (
        jnp.tanh(params["w"]) - 0.3,
        (params["b"] - 2.0) * params["b"],
        params["dead"],
    )


def loss_of(y, factor=1.0):
    return factor * (jnp.sum(y[0] ** 2) + jnp.sum(y[1] ** 2) + 0.0 * jnp.sum(y[2]))


def loss(params, factor=1.0):
    """Of a matrix, a vector, and a vector whose gradient is zero."""
    return loss_of(outputs(params), factor)


def start():
    w = jax.random.normal(jax.random.key(0), (4, 3))
    return {"w": w, "b": jnp.arange(1.0, 4.0), "dead": jnp.zeros(2)}


@functools.cache
def compiled(name):
    """A step of which the factor is an argument."""
    tx = optax.with_extra_args_support(INVARIANT[name][0]())

    @jax.jit
    def update(params, state, factor):
        value, grads = jax.value_and_grad(loss)(params, factor)
        curvature = n.hessian(functools.partial(loss, factor=factor))
        if "Gauss-Newton" in name:
            final = functools.partial(loss_of, factor=factor)
            curvature = n.gauss_newton(outputs, final)
        return tx.update(grads, state, params, value=value, curvature=curvature)

    return tx, update


def steps(name, factor, count=4):
    """The updates along the way that the unscaled loss leads."""
    tx, update = compiled(name)
    params, state, found = start(), tx.init(start()), []
    for _ in range(count):
        updates, state = update(params, state, jnp.float32(factor))
        found.append(updates)
        params = jax.tree.map(lambda p, g: p - 0.03 * g, params, jax.grad(loss)(params))
    return found


# Powers of two, of 15 digits and of 30, so that nothing is rounded in another way.
FACTORS = {
    # It takes squares of gradients as they are.
    "quadratic model, where noise rules": (2.0**-50, 2.0**50),
    # It keeps averages of squares, of which the smallest are lost first.
    "soap": (2.0**-40, 2.0**50),
    # A first gradient that is shorter than 1 is taken as it is.
    "limited-memory BFGS": (2.0**50, 2.0**100),
}
ALL = (2.0**-100, 2.0**-50, 2.0**50, 2.0**100)


@pytest.mark.parametrize(
    ("name", "factor"),
    [(name, x) for name in INVARIANT for x in FACTORS.get(name, ALL)],
)
def test_a_factor_of_the_loss_changes_no_step(name, factor):
    scale = np.float32(factor) ** INVARIANT[name][1]
    for got, expected in zip(steps(name, factor), steps(name, 1.0), strict=True):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a / scale, b, rtol=2e-3, atol=2e-4)


TRANSFORMATIONS = {
    "nlcg": lambda: n.nlcg(0.05),
    "polak_ribiere": lambda: n.nlcg(0.05, beta_rule="polak_ribiere"),
    "dai_yuan, plain": lambda: n.nlcg(0.01, beta_rule="dai_yuan", preconditioner=None),
    "hager_zhang": lambda: n.nlcg(0.05, beta_rule="hager_zhang"),
    "nlcg_paper": lambda: n.nlcg_paper(0.01),
    "nlcg_auto": n.nlcg_auto,
    "lars": lambda: optax.chain(n.scale_by_lars(0.1), optax.scale(-0.05)),
    "limited_memory_bfgs": lambda: optax.chain(
        n.scale_by_limited_memory_bfgs(2), optax.scale(-0.05)
    ),
}


@pytest.mark.parametrize("size", [1e20, 1e30])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_one_huge_gradient_leaves_all_finite(name, size):
    """The gradient is what is huge, not the loss: the parameters are not moved."""
    tx = optax.with_extra_args_support(TRANSFORMATIONS[name]())

    @jax.jit
    def update(params, state, factor):
        value, grads = jax.value_and_grad(loss)(params)
        grads = jax.tree.map(lambda g: g * factor, grads)
        curvature = n.hessian(loss)
        return tx.update(grads, state, params, value=value, curvature=curvature)

    params, state = start(), tx.init(start())
    for i in range(8):
        updates, state = update(params, state, jnp.float32(size if i == 3 else 1.0))
        for x in jax.tree.leaves((updates, state)):
            assert jnp.all(jnp.isfinite(x)), (i, name)
        moved = jnp.sqrt(sum(jnp.sum(u**2) for u in jax.tree.leaves(updates)))
        scale = jnp.minimum(1, 0.1 / jnp.where(moved > 0, moved, 1))
        params = jax.tree.map(lambda p, u, s=scale: p + s * u, params, updates)
    assert loss(params) < loss(start())


@pytest.mark.parametrize("factor", [1e-15, 1.0, 1e15, 1e22, 1e30])
@pytest.mark.parametrize("preconditioner", [None, "diagonal_bfgs", "lbfgs"])
def test_minimize_goes_down_whatever_the_factor(preconditioner, factor):
    def value(x):
        return factor * jnp.sum((1 - x[:-1]) ** 2 + 10 * (x[1:] - x[:-1] ** 2) ** 2)

    x = jnp.array([-1.2, 1.0, 3.0])
    result = n.minimize(value, x, preconditioner=preconditioner, gtol=0.0, max_iter=150)
    assert result.value < 1e-4 * value(x), result


@pytest.mark.parametrize("preconditioner", [None, "lbfgs"])
def test_a_factor_changes_no_step_of_minimize(preconditioner):
    """Powers of two: each product is then the same to the last bit."""

    def value(x, factor):
        return factor * jnp.sum(
            (1 - x[:-1]) ** 2 + 10 * (x[1:] - x[:-1] ** 2) ** 2, dtype=x.dtype
        )

    x, found = jnp.array([-1.2, 1.0, 3.0]), []
    # Limited-memory BFGS begins with a step of length 1, or the gradient if shorter.
    factors = (2.0**40, 2.0**70) if preconditioner else (1.0, 2.0**-50, 2.0**50)
    for factor in factors:
        options = {"preconditioner": preconditioner, "gtol": 0.0, "max_iter": 12}
        result = n.minimize(value, x, jnp.float32(factor), **options)
        found.append((result.params, result.value_evaluations))
    for params, evaluations in found[1:]:
        np.testing.assert_allclose(params, found[0][0], rtol=1e-5)
        assert evaluations == found[0][1]


def test_minimize_starts_where_squares_overflow():
    def value(x):
        return jnp.sum((1 - x[:-1]) ** 2 + 100 * (x[1:] - x[:-1] ** 2) ** 2)

    x = jnp.full(2, 1e6)
    for preconditioner in ("lbfgs", None, "diagonal_bfgs"):
        result = n.minimize(value, x, preconditioner=preconditioner)
        assert result.value < 1e-3 * value(x)


SMALL = "quadratic model of two directions"


@pytest.mark.parametrize(
    "name",
    rest_long([*TRANSFORMATIONS, SMALL], {*TRANSFORMATIONS, SMALL} - {"nlcg_auto"}),
)
@pytest.mark.usefixtures("x64")
def test_derivatives_through_two_steps(name):
    """Against differences; with a part whose gradient is zero, and stays so."""
    small = n.scale_by_quadratic_model(history=1, residuals=0)
    make = {**TRANSFORMATIONS, SMALL: lambda: optax.chain(small, optax.scale(-1.0))}
    tx = optax.with_extra_args_support(make[name]())

    def unrolled(factor):
        def scaled(params):
            return loss({**params, "w": factor * params["w"]})

        params, state = jax.tree.map(lambda x: x.astype(float), start()), None
        state = tx.init(params)
        for _ in range(2):
            value, grads = jax.value_and_grad(scaled)(params)
            updates, state = tx.update(
                grads, state, params, value=value, curvature=n.hessian(scaled)
            )
            params = optax.apply_updates(params, updates)
        return loss(params)

    both, h = jax.jit(jax.value_and_grad(unrolled)), 1e-5
    expected = (both(1.1 + h)[0] - both(1.1 - h)[0]) / (2 * h)
    np.testing.assert_allclose(both(1.1)[1], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("rule", n.beta.BETA_RULES)
def test_no_state_holds_nan(rule, track):
    tx = n.scale_by_conjugate_direction(rule, track_cosine=track)
    state = tx.init(jnp.ones(3))
    with jax.debug_nans(True):
        for _ in range(3):
            _, state = jax.jit(tx.update)(jnp.arange(1.0, 4.0), state)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(state))
    assert (state.cosine is None) == (not track)


@pytest.mark.parametrize("decay", [0.99, 0.999, 0.9999])
def test_a_decay_that_is_rounded_to_1_takes_the_mean(decay):
    params = {"b": jnp.ones(2, jnp.bfloat16)}
    tx = optax.inject_hyperparams(n.scale_by_orthogonalization)(decay=decay)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(params, state, params)
        np.testing.assert_allclose(updates["b"].astype(np.float32), 1.0, atol=0.01)


@jax.tree_util.register_pytree_node_class
class Module:
    """A tree of two parameters that can be called, as modules can."""

    def __init__(self, w, b):
        self.w, self.b = w, b

    def __call__(self, x):
        return x @ self.w + self.b

    def tree_flatten(self):
        return (self.w, self.b), None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)


@pytest.mark.parametrize(
    "mask",
    [
        Module(True, False),
        lambda p: Module(True, False),
        jax.tree_util.Partial(lambda p: Module(True, False)),
    ],
)
def test_a_tree_that_can_be_called_is_a_mask(mask):
    params = Module(jnp.ones((2, 2)), jnp.ones(2))
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = n.nlcg(0.1, weight_decay=0.5, weight_decay_mask=mask, step_rule=None)
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates.w, -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates.b, 0.0)
    plain, with_penalty = (
        n.gauss_newton(lambda p: p(jnp.ones((3, 2))), lambda y: jnp.mean(y**2), **more)
        for more in ({}, {"l2": 0.5, "l2_mask": mask})
    )
    difference = with_penalty(params, [params]) - plain(params, [params])
    np.testing.assert_allclose(difference, 0.5 * 4, rtol=1e-6)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Warmup:
    start: jax.Array
    slope: jax.Array

    def __call__(self, count):
        return self.start + self.slope * count.astype(jnp.float32)


@pytest.mark.parametrize("wrapped", [lambda rate: rate, jax.tree_util.Partial])
def test_a_tree_that_can_be_called_is_a_schedule(wrapped):
    """In the place of a number nothing is a tree."""
    rate = wrapped(Warmup(jnp.float32(0.5), jnp.float32(0.25)))
    params = jnp.ones(3)
    for make in (n.nlcg, n.nlcg_paper):
        tx = make(rate, preconditioner=None, step_rule=None)
        update, state = jax.jit(tx.update), tx.init(params)
        for expected in (-0.5, -0.75):
            updates, state = update(params, state, params)
            np.testing.assert_allclose(updates, expected, rtol=1e-6)
            state = (tx.init(params)[0], *state[1:])  # no momentum
    n.nlcg_auto(multiplier=rate)
    with pytest.raises(ValueError, match="learning_rate=.*Warmup.* is not valid"):
        n.nlcg(Warmup)


def test_a_mask_that_was_taken_for_a_schedule_is_an_error():
    params = {"w": jnp.ones((2, 2))}

    def mask(tree):
        return jax.tree.map(lambda x: jnp.ndim(x) > 1, tree)

    for make in (n.nlcg, n.nlcg_auto):
        rate = {"learning_rate": 0.1} if make is n.nlcg else {}
        given = {**rate, "weight_decay": 0.5, "weight_decay_mask": mask}
        known = ("residuals",) if make is n.nlcg_auto else ()
        with pytest.raises(ValueError, match="static_args=.'weight_decay_mask'"):
            optax.inject_hyperparams(make, static_args=known)(**given).init(params)
        known += ("weight_decay_mask",)
        optax.inject_hyperparams(make, static_args=known)(**given).init(params)


@pytest.mark.parametrize(
    "given",
    [
        {"learning_rate": -0.04},
        {"learning_rate": float("inf")},
        {"learning_rate": 0.04, "beta_bounds": (0, 1.5)},
        {"learning_rate": 0.04, "beta_bounds": (-2.0, 1)},
        {"learning_rate": 0.04, "weight_decay": float("inf")},
    ],
)
def test_what_climbs_or_grows_without_bound_is_refused(given):
    with pytest.raises(ValueError, match=f"{[*given][-1]}=.* is not valid"):
        n.nlcg(**given)

"""Errors come early and name the argument, the value and the accepted ones."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nlcg_optax
from nlcg_optax import (
    beta,
    diagnostics,
    nlcg,
    nlcg_paper,
    scale_by_conjugate_direction,
    scale_by_diagonal_bfgs,
    scale_by_lars,
    scale_by_loss_feedback,
    scale_by_quadratic_model,
)

X = np.array([1.0, 2.0], np.float32)


def check(error, *needles):
    for needle in needles:
        assert needle in str(error.value)


@pytest.mark.parametrize("name", ["BFGS", "", "Fletcher_Reeves", None, 3])
@pytest.mark.parametrize(
    "make", [scale_by_conjugate_direction, lambda n: nlcg_paper(0.1, beta_rule=n)]
)
def test_unknown_beta_rule(make, name):
    with pytest.raises(ValueError) as error:
        make(name)
    check(error, f"beta_rule={name!r}", *(repr(rule) for rule in beta.BETA_RULES))
    check(error, "callable")


@pytest.mark.parametrize("value", ["no", 1, 2.0, np.nan])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (scale_by_conjugate_direction, "nesterov"),
        (scale_by_conjugate_direction, "restart_on_ascent"),
        (scale_by_conjugate_direction, "track_cosine"),
        (functools.partial(nlcg_optax.nlcg, 0.1), "nesterov"),
        (nlcg_optax.scale_by_soap, "nesterov"),
        (nlcg_optax.scale_by_soap, "linear"),
    ],
)
def test_a_switch_is_true_or_false(make, name, value):
    with pytest.raises(ValueError, match=f"{name}=.*: expected True or False"):
        make(**{name: value})


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (scale_by_conjugate_direction, "epsilon"),
        (nlcg_optax.scale_by_soap, "eps"),
        (nlcg_optax.scale_by_orthogonalization, "epsilon"),
        (nlcg_optax.scale_by_diagonal_bfgs, "epsilon"),
        (nlcg_optax.scale_by_lars, "coefficient"),
        (nlcg_optax.scale_by_noise_balance, "target"),
        (nlcg_optax.scale_by_noise_balance, "first_rate"),
        (scale_by_quadratic_model, "damping"),
        (scale_by_quadratic_model, "first_damping"),
        (scale_by_loss_feedback, "threshold"),
    ],
)
def test_what_would_stop_every_step_is_refused(make, name):
    with pytest.raises(ValueError, match=f"{name}=inf is not valid.*finite"):
        make(**{name: float("inf")})


def test_a_number_of_several_numbers_is_refused():
    with pytest.raises(ValueError, match=r"learning_rate is an array of shape \(2,\)"):
        nlcg_optax.nlcg(jnp.array([0.1, 0.2]))
    with pytest.raises(ValueError, match="multiplier=2.0.* at most 1"):
        nlcg_optax.nlcg_auto(multiplier=jnp.float32(2.0))
    # An array that is known is read in a function that is traced, too.
    half = jnp.float32(0.5)
    jax.jit(lambda x: nlcg_optax.nlcg_auto(multiplier=half).init(x))(X)


@pytest.mark.parametrize("mask", ["w", 1, {"w": "yes"}, {"w": 0.5}])
def test_a_mask_has_true_and_false(mask):
    with pytest.raises(ValueError, match="weight_decay_mask has .*a tree of booleans"):
        nlcg_optax.nlcg(0.1, weight_decay=0.1, weight_decay_mask=mask)


@pytest.mark.parametrize("name", ["Step", "armijo", None, 1])
def test_unknown_loss_feedback_rule(name):
    with pytest.raises(ValueError) as error:
        scale_by_loss_feedback(name)
    check(error, f"rule={name!r}", "'step'", "'online'")


@pytest.mark.parametrize("name", ["Step", "none", 1, optax.identity, True])
def test_unknown_step_rule(name):
    with pytest.raises(ValueError) as error:
        nlcg_paper(0.1, step_rule=name)
    check(error, f"step_rule={name!r}", "'step'", "'online'", "None")


@pytest.mark.parametrize("value", ["rms", "bfgs", "none", 1, optax.scale_by_rms])
def test_preconditioner_of_the_wrong_kind(value):
    with pytest.raises(ValueError) as error:
        nlcg_paper(0.1, preconditioner=value)
    check(error, f"preconditioner={value!r}", "None")


@pytest.mark.parametrize("value", ["diagonal_bfgs", 1, optax.scale_by_rms, (1, 2)])
def test_nested_preconditioner_of_the_wrong_kind(value):
    with pytest.raises(ValueError) as error:
        scale_by_conjugate_direction(preconditioner=value)
    check(error, f"preconditioner={value!r}", "GradientTransformation", "None")


NUMBERS = {
    "period": (
        [scale_by_loss_feedback, lambda **kw: nlcg_paper(0.1, **kw)],
        [-5, 0, 2.5, 5.0, "5", None, True, math.nan],
        ["integer", "1"],
    ),
    "threshold": (
        [scale_by_loss_feedback, lambda **kw: nlcg_paper(0.1, **kw)],
        [-1.0, 0, 0.0, "1", None, math.nan, 1j, True],
        ["number", "greater than 0"],
    ),
    "epsilon": (
        [
            scale_by_diagonal_bfgs,
            scale_by_conjugate_direction,
            lambda **kw: nlcg_paper(0.1, **kw),
            lambda **kw: nlcg_paper(0.1, preconditioner=None, **kw),
        ],
        [-1e-8, -1, "1e-8", None, math.nan, 1j, False],
        ["number", "0"],
    ),
    "restart_every": (
        [scale_by_conjugate_direction],
        [0, -1, 1.5, "10", True],
        ["integer", "1"],
    ),
    "coefficient": ([scale_by_lars], [0, -0.001, "a", None, math.nan], ["number", "0"]),
    "damping": ([scale_by_lars], [-0.1, "a", None, math.nan], ["number", "0"]),
}


@pytest.mark.parametrize(
    ("name", "make", "value", "needles"),
    [
        pytest.param(name, make, value, needles, id=f"{name}-{i}-{value!r}")
        for name, (makers, values, needles) in NUMBERS.items()
        for i, make in enumerate(makers)
        for value in values
    ],
)
def test_numbers_out_of_range(name, make, value, needles):
    with pytest.raises(ValueError) as error:
        make(**{name: value})
    check(error, f"{name}={value!r}", *needles)


@pytest.mark.parametrize(
    "bounds",
    [
        *((1.0, 0.0), (0.0,), (0, 1, 2), 1.0, None, "01", (math.nan, 1.0)),
        *((0.0, math.nan), ("0", "1"), (0.0, "1"), (None, 1.0), (0.0, None)),
        *((0.0, 1j), {}),
    ],
    ids=repr,
)
@pytest.mark.parametrize(
    "make", [scale_by_conjugate_direction, lambda **kw: nlcg(0.1, **kw)]
)
def test_beta_bounds(make, bounds):
    with pytest.raises(ValueError) as error:
        make(beta_bounds=bounds)
    check(error, f"beta_bounds={bounds!r}", "lower <= upper")


@pytest.mark.parametrize("dtype", [jnp.int8, bool, "int16", "wide", 3], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        scale_by_conjugate_direction,
        scale_by_diagonal_bfgs,
        scale_by_loss_feedback,
        scale_by_quadratic_model,
        lambda **kw: nlcg(0.1, **kw),
    ],
)
def test_state_dtype_that_is_not_floating(make, dtype):
    with pytest.raises(ValueError) as error:
        make(state_dtype=dtype)
    check(error, f"state_dtype={dtype!r}", "floating-point dtype")


TAKE_AXES = {
    "nlcg": lambda **given: nlcg_optax.nlcg(0.04, **given),
    "nlcg_paper": lambda **given: nlcg_optax.nlcg_paper(0.04, **given),
    "soap": lambda **given: nlcg_optax.scale_by_soap(0.9, **given),
    "gauss_newton": lambda **given: nlcg_optax.gauss_newton(jnp.sin, jnp.sum, **given),
    "hessian": lambda **given: nlcg_optax.hessian(jnp.sum, **given),
    "objective": lambda **given: nlcg_optax.value_grad_and_curvature(
        jnp.sin, jnp.sum, **given
    ),
    "mean": lambda **given: nlcg_optax.pmean_value_and_grad(jnp.sum, **given),
    **{
        name: getattr(nlcg_optax, name)
        for name in (
            *("nlcg_auto", "scale_by_quadratic_model", "scale_by_diagonal_bfgs"),
            *("scale_by_limited_memory_bfgs", "scale_by_orthogonalization"),
            *("scale_by_conjugate_direction", "scale_by_lars"),
            "scale_by_hager_zhang_linesearch",
        )
    },
}


@pytest.mark.parametrize("name", TAKE_AXES)
def test_axis_names_are_names(name):
    make = TAKE_AXES[name]
    bad = (3, ["data"], {"data"}, b"data", ("data", None), (0,), jax.P("data"), True)
    for axis_name in bad:
        with pytest.raises(ValueError, match="axis_name=.*is not valid: .*'data'"):
            make(axis_name=axis_name)
    for axis_name in ("data", ("data", "model")):
        make(axis_name=axis_name)
    own = ("gauss_newton", "hessian", "objective", "mean")
    if name in own:
        make(axis_name=())
    else:
        with pytest.raises(ValueError, match=r"axis_name=\(\) is not valid"):
            make(axis_name=())


def test_numpy_numbers_are_numbers():
    nlcg_paper(
        np.float32(0.1),
        period=np.int64(3),
        threshold=np.float32(2),
        epsilon=np.float64(0),
    )
    scale_by_conjugate_direction(
        restart_every=np.int32(4), beta_bounds=(np.float32(0), math.inf)
    )


@pytest.mark.parametrize(
    "tx", [scale_by_diagonal_bfgs(), scale_by_lars(), nlcg_paper(0.1)], ids=range(3)
)
def test_missing_params(tx):
    tx = optax.with_extra_args_support(tx)
    with pytest.raises(ValueError) as error:
        tx.update(X, tx.init(X), value=1.0)
    check(error, "params=None", "update(grads, state, params")


@pytest.mark.parametrize("rule", ["step", "online"])
@pytest.mark.parametrize(
    "make", [scale_by_loss_feedback, lambda rule: nlcg_paper(0.1, step_rule=rule)]
)
def test_missing_value(make, rule):
    tx = make(rule)
    with pytest.raises(ValueError) as error:
        tx.update(jnp.asarray(X), tx.init(X), X)
    check(error, "value=None", "value=loss")


@pytest.mark.parametrize(
    "value", [np.ones(1), np.ones((2, 3)), [1.0, 2.0], np.complex64(1), 1j], ids=repr
)
def test_value_that_is_no_real_scalar(value):
    tx = scale_by_loss_feedback()
    with pytest.raises(ValueError) as error:
        tx.update(jnp.asarray(X), tx.init(X), value=value)
    check(error, "value", str(np.shape(value)), "real scalar")


def test_errors_come_through_jit():
    tx = nlcg_paper(0.1)
    with pytest.raises(ValueError, match="value=None"):
        jax.jit(tx.update)(X, tx.init(X), X)


PARAMS = {"w": np.ones((2, 3), np.float32), "b": np.ones(3, np.float32)}
WRONG_GRADIENTS = {
    "missing": ({"w": PARAMS["w"]}, ["'b'"]),
    "extra": (PARAMS | {"c": PARAMS["b"]}, ["'c'"]),
    "other structure": ([PARAMS["w"], PARAMS["b"]], ["[*, *]"]),
    "none": (PARAMS | {"b": None}, ["None"]),
    "shape": (PARAMS | {"w": np.ones((3, 2), np.float32)}, ["w", "(3, 2)", "(2, 3)"]),
    "broadcastable": (PARAMS | {"b": np.float32(1)}, ["b", "()", "(3,)"]),
}


@pytest.mark.parametrize("wrong", WRONG_GRADIENTS)
@pytest.mark.parametrize(
    "tx",
    [
        scale_by_diagonal_bfgs(),
        scale_by_conjugate_direction(),
        scale_by_conjugate_direction("hager_zhang", optax.scale_by_rms()),
        scale_by_loss_feedback(),
        scale_by_lars(),
        nlcg_paper(0.1),
        nlcg_paper(0.1, preconditioner=None, step_rule=None),
    ],
    ids=range(7),
)
def test_gradients_that_do_not_match(tx, wrong):
    tx = optax.with_extra_args_support(tx)
    grads, needles = WRONG_GRADIENTS[wrong]
    with pytest.raises(ValueError) as error:
        tx.update(grads, tx.init(PARAMS), PARAMS, value=1.0)
    check(error, "gradients do not match", "expected", *needles)


@pytest.mark.parametrize(
    "tx",
    [
        scale_by_diagonal_bfgs(),
        scale_by_conjugate_direction(),
        scale_by_loss_feedback(),
        nlcg_paper(0.1),
    ],
    ids=range(4),
)
def test_integer_parameters(tx):
    with pytest.raises(TypeError) as error:
        tx.init({"count": jnp.arange(3)})
    check(error, "int32", "masked")


def test_integer_parameters_of_lars():
    with pytest.raises(TypeError, match="int32"):
        scale_by_lars().update(jnp.arange(3), optax.EmptyState(), jnp.arange(3))


@pytest.mark.parametrize(
    "state", [optax.sgd(0.1).init(X), optax.adam(0.1).init(X), (), None, {"a": X}]
)
def test_diagnostics_of_a_state_that_is_not_ours(state):
    with pytest.raises(ValueError) as error:
        diagnostics(state)
    check(error, type(state).__name__, "nlcg_optax")


@pytest.mark.parametrize("value", ["0.1", None, True, [0.1], (0.1,), {}])
def test_learning_rate(value):
    with pytest.raises(ValueError) as error:
        nlcg_paper(value)
    check(error, f"learning_rate={value!r}", "a number")

"""The alias is the chain that it says it is."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from long_run import rest_long
from problems import paper, quadratic

import nlcg_optax
from nlcg_optax import (
    nlcg,
    nlcg_auto,
    nlcg_paper,
    scale_by_conjugate_direction,
    scale_by_diagonal_bfgs,
    scale_by_loss_feedback,
    scale_by_orthogonalization,
)

pytestmark = pytest.mark.usefixtures("x64")


@jax.jit
@jax.value_and_grad
def loss_and_grad(x, scale):
    """A rippled quadratic, lifted so that the loss keeps its sign."""
    hessian, b = (jnp.asarray(a) for a in quadratic(seed=5))
    return scale * (x @ hessian @ x / 2 - b @ x + 3 + 2 * jnp.sin(9 * x[0]))


def minimize(tx, steps=20, scale=1.0):
    """Parameters after every step; the loss carries `scale`."""
    x = jnp.ones(6)
    state = tx.init(x)
    xs = []
    for _ in range(steps):
        value, grad = loss_and_grad(x, scale)
        update, state = tx.update(grad, state, x, value=value)
        x = optax.apply_updates(x, update)
        xs.append(x)
    return np.array(xs)


def default_chain(*last):
    """The default's direction and step rule, made by hand, and what follows them."""
    return optax.chain(
        scale_by_conjugate_direction(
            "fletcher_reeves",
            scale_by_orthogonalization(),
            beta_bounds=(0, 0.9),
            nesterov=True,
        ),
        scale_by_loss_feedback("step", 5, 1.0),
        *last,
    )


CHAINS = {
    "paper": (
        lambda: nlcg_paper(0.1),
        lambda: optax.chain(
            scale_by_conjugate_direction(
                "fletcher_reeves", scale_by_diagonal_bfgs(1e-8), beta_bounds=(0, 1)
            ),
            scale_by_loss_feedback("step", 5, 1.0),
            optax.scale(-0.1),
        ),
    ),
    "nlcg": (
        lambda: nlcg(0.03),
        lambda: default_chain(optax.scale(-0.03)),
    ),
    "options": (
        lambda: nlcg_paper(
            0.1,
            beta_rule="hager_zhang",
            step_rule="online",
            threshold=0.1,
            epsilon=1e-3,
        ),
        lambda: optax.chain(
            scale_by_conjugate_direction(
                "hager_zhang",
                scale_by_diagonal_bfgs(1e-3),
                epsilon=1e-3,
            ),
            scale_by_loss_feedback("online", threshold=0.1),
            optax.scale(-0.1),
        ),
    ),
    "bounds": (
        lambda: nlcg(0.03, beta_bounds=(-0.5, 0.5), nesterov=False, epsilon=1e-3),
        lambda: optax.chain(
            scale_by_conjugate_direction(
                "fletcher_reeves",
                scale_by_orthogonalization(epsilon=1e-3),
                beta_bounds=(-0.5, 0.5),
                epsilon=1e-3,
            ),
            scale_by_loss_feedback("step", 5, 1.0),
            optax.scale(-0.03),
        ),
    ),
    "period": (
        lambda: nlcg_paper(0.3, period=2),
        lambda: optax.chain(
            scale_by_conjugate_direction(preconditioner=scale_by_diagonal_bfgs()),
            scale_by_loss_feedback(period=2),
            optax.scale(-0.3),
        ),
    ),
    "decay": (
        lambda: nlcg(0.03, weight_decay=0.5),
        lambda: default_chain(optax.add_decayed_weights(0.5), optax.scale(-0.03)),
    ),
    "nothing": (
        lambda: nlcg_paper(0.1, preconditioner=None, step_rule=None),
        lambda: optax.chain(scale_by_conjugate_direction(), optax.scale(-0.1)),
    ),
    "transformations": (
        lambda: nlcg_paper(
            0.1,
            preconditioner=optax.scale_by_rms(0.9),
            step_rule=scale_by_loss_feedback("online"),
        ),
        lambda: optax.chain(
            scale_by_conjugate_direction(preconditioner=optax.scale_by_rms(0.9)),
            optax.scale(-0.1),
            scale_by_loss_feedback("online"),
        ),
    ),
    "schedule": (
        lambda: nlcg_paper(optax.linear_schedule(0.02, 0.3, 20)),
        lambda: optax.chain(
            scale_by_conjugate_direction(preconditioner=scale_by_diagonal_bfgs()),
            scale_by_loss_feedback(),
            optax.scale_by_schedule(optax.linear_schedule(-0.02, -0.3, 20)),
        ),
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_alias_is_the_chain(name):
    alias, chain = (minimize(make()) for make in CHAINS[name])
    if name in ("decay", "schedule"):  # the same numbers, multiplied in another order
        np.testing.assert_allclose(alias, chain, rtol=1e-12)
    else:
        np.testing.assert_array_equal(alias, chain)
    if name != "paper":  # every case is a case of its own
        assert not np.allclose(alias, minimize(nlcg_paper(0.1)))


def public_chain(make, state_dtype):
    """What the docstring of `nlcg` (or of `nlcg_paper`) says that it is."""
    direction = (
        {
            "preconditioner": scale_by_orthogonalization(),
            "beta_bounds": (0.0, 0.9),
            "nesterov": True,
        }
        if make is nlcg
        else {"preconditioner": scale_by_diagonal_bfgs(state_dtype=state_dtype)}
    )
    return optax.chain(
        scale_by_conjugate_direction(state_dtype=state_dtype, **direction),
        scale_by_loss_feedback("online", state_dtype=state_dtype),
        optax.scale_by_learning_rate(0.1),
    )


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("state_dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("make", [nlcg, nlcg_paper])
def test_alias_is_the_chain_bit_for_bit_where_the_loss_rises(
    make, dtype, state_dtype, jit
):
    losses = [1.0, 3.0, 2.0, math.nan, 9.0, math.inf, 8.0, 30.0]
    alias = make(0.1, step_rule="online", state_dtype=state_dtype)
    both = alias, public_chain(make, state_dtype)
    rng = np.random.default_rng(4)
    params = {"w": jnp.asarray(rng.normal(size=(3, 4)), dtype), "b": jnp.ones(4, dtype)}
    states = [tx.init(params) for tx in both]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    updates = [jax.jit(tx.update) if jit else tx.update for tx in both]
    taken_back = 0
    for loss in losses:
        grads = jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=x.shape), dtype), params
        )
        results = [
            update(grads, state, params, value=jnp.asarray(loss, dtype))
            for update, state in zip(updates, states, strict=True)
        ]
        jax.tree.map(np.testing.assert_array_equal, *results)
        states = [state for _, state in results]
        made, kept = results[0][0]["w"], states[0][1]
        plain = -0.1 * kept.base_step * kept.prev_update["w"].astype(dtype)
        taken_back += not np.allclose(made, plain, rtol=0.02)
    assert taken_back == 5  # at all losses that are finite, but the first
    assert states[0][1].nonfinite == 2


def test_defaults_of_the_paper():
    parameters = inspect.signature(nlcg_paper).parameters
    defaults = {name: p.default for name, p in parameters.items()}
    assert defaults.pop("learning_rate") is inspect.Parameter.empty
    assert defaults == {
        "beta_rule": "fletcher_reeves",
        "preconditioner": "diagonal_bfgs",
        "step_rule": "step",
        "period": 5,
        "threshold": 1.0,
        "epsilon": 1e-8,
        "state_dtype": None,
        "axis_name": None,
    }
    keyword = [p for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert len(keyword) == len(parameters) - 1


def test_defaults_that_are_not_the_papers():
    ours = inspect.signature(nlcg).parameters
    papers = inspect.signature(nlcg_paper).parameters
    different = {
        name: p.default
        for name, p in ours.items()
        if name not in papers or p.default != papers[name].default
    }
    assert different == {
        "learning_rate": None,
        "preconditioner": "orthogonalization",
        "beta_bounds": (0.0, 0.9),
        "nesterov": None,
        "weight_decay": None,
        "weight_decay_mask": None,
    }
    # What only the paper's has are the settings of its step rule.
    assert set(papers) - set(ours) == {"period", "threshold"}


def test_matrices_among_the_leaves_agree_with_oracle():
    # β by hand, from z by NumPy.
    rng = np.random.default_rng(0)
    grads = [{"w": rng.normal(size=(3, 4)), "b": rng.normal(size=4)} for _ in range(4)]
    tx = nlcg(0.1, step_rule=None)
    state = tx.init(grads[0])
    biases = oracle.second_moments([g["b"] for g in grads])
    d, rho = None, None
    for g, bias in zip(grads, biases, strict=True):
        z = {"w": oracle.orthogonalize(g["w"]), "b": bias}
        new_rho = sum(np.vdot(g[k], z[k]) for k in g)
        beta = 0.0 if d is None else np.clip(new_rho / (rho + 1e-8), 0, 0.9)
        d = {k: z[k] + (beta * d[k] if d else 0) for k in g}
        rho = new_rho
        updates, state = tx.update(g, state)
        for k in g:
            ahead = z[k] + beta * d[k]
            np.testing.assert_allclose(updates[k], -0.1 * ahead, rtol=1e-9)


# --- Weight decay -------------------------------------------------------------------

MASK = {"w": True, "b": False}


def descend(weight_decay, steps=12, **options):
    """Parameters, and the gradients that they had, of nlcg with decay from within.

    The loss jumps, so that the base step shrinks.
    """
    rng = np.random.default_rng(1)
    params = {"w": rng.normal(size=(3, 4)), "b": rng.normal(size=4)}
    tx = nlcg(
        optax.linear_schedule(0.1, 0.01, 9),
        step_rule="online",
        weight_decay=weight_decay,
        **options,
    )
    state = tx.init(params)
    rows = []
    for t in range(steps):
        grads = {k: rng.normal(size=x.shape) for k, x in params.items()}
        updates, state = tx.update(grads, state, params, value=1.0 + t**2)
        rows.append((params, grads, updates))
        params = optax.apply_updates(params, updates)
    assert nlcg_optax.diagnostics(state)["base_step"] < 0.1
    return rows


@pytest.mark.parametrize("mask", [None, MASK, lambda tree: MASK])
def test_weight_decay_is_beside_the_directions_and_not_in_them(mask):
    plain = descend(None)
    decayed = descend(0.5, weight_decay_mask=mask)
    for t, (without, within) in enumerate(zip(plain, decayed, strict=True)):
        params, grads, updates = within
        for k in params:
            np.testing.assert_array_equal(grads[k], without[1][k])
            # The rate multiplies it, the base step and β do not.
            masked = mask is not None and k == "b"
            rate = 0.1 - 0.01 * min(t, 9)
            decay = 0 if masked else rate * 0.5 * np.asarray(params[k])
            np.testing.assert_allclose(
                updates[k], without[2][k] - decay, rtol=1e-6, atol=1e-8
            )


def test_weight_decay_agrees_with_oracle():
    # AdamW's decay around the literal trajectory, with gradients that follow it.
    matrix, b = quadratic(seed=3)
    tx = nlcg(
        0.03,
        preconditioner=None,
        beta_bounds=(0, 1),
        nesterov=False,
        step_rule=None,
        weight_decay=0.7,
    )
    x = np.ones(6)
    state, ours = tx.init(jnp.asarray(x)), jnp.asarray(x)
    prev_g = d = None
    for _ in range(10):
        g = matrix @ x - b
        beta = 0 if d is None else np.clip(g @ g / (prev_g @ prev_g + 1e-8), 0, 1)
        d = -g + (beta * d if d is not None else 0)
        x, prev_g = x + 0.03 * d - 0.03 * 0.7 * x, g
        updates, state = tx.update(matrix @ ours - b, state, ours)
        ours = ours + updates
        np.testing.assert_allclose(ours, x, rtol=1e-9)


@pytest.mark.parametrize("weight_decay", [0, 0.0])
def test_no_decay_is_no_piece_of_the_chain(weight_decay):
    params = {"w": jnp.ones((2, 2))}
    without = nlcg(0.1).init(params)
    assert jax.tree.structure(nlcg(0.1, weight_decay=weight_decay).init(params)) == (
        jax.tree.structure(without)
    )


def test_weight_decay_is_an_injected_hyperparameter():
    make = optax.inject_hyperparams(nlcg, static_args=("weight_decay_mask",))
    tx = make(0.1, weight_decay=0.5, weight_decay_mask=lambda tree: MASK)
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    state = tx.init(params)
    zero = jax.tree.map(jnp.zeros_like, params)
    step = jax.jit(tx.update)
    for decay in (0.5, 0.25):
        state.hyperparams["weight_decay"] = jnp.asarray(decay)
        updates, state = step(zero, state, params, value=1.0)
        np.testing.assert_allclose(updates["w"], -0.1 * decay)
        np.testing.assert_array_equal(updates["b"], 0)
    # And where there is none, injecting the others needs no parameters.
    tx = optax.inject_hyperparams(nlcg)(0.1)
    tx.update(zero, tx.init(params), value=1.0)


@pytest.mark.parametrize("wide", [jnp.float32, jnp.complex64])
def test_weight_decay_keeps_the_dtype_of_the_gradient(wide):
    narrow = jnp.bfloat16 if wide == jnp.float32 else jnp.complex64
    params = {"w": jnp.full((2, 2), 1 + 2**-7, wide)}
    grads = {"w": jnp.zeros((2, 2), narrow)}
    tx = nlcg(0.5, weight_decay=0.5, step_rule=None)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates["w"].dtype == narrow
    np.testing.assert_allclose(np.asarray(updates["w"], complex), -0.251953125)


@pytest.mark.parametrize(
    ("options", "needles"),
    [
        ({"weight_decay": -0.1}, ["weight_decay=-0.1", "at least 0"]),
        ({"weight_decay": "0.1"}, ["weight_decay='0.1'", "a number"]),
        ({"weight_decay": lambda t: 0.1}, ["schedule", "inject_hyperparams"]),
        ({"weight_decay_mask": MASK}, ["without weight_decay", "give both"]),
        (
            {"weight_decay": 0.1, "step_rule": optax.identity()},
            ["weight_decay=0.1", "line search", "add_decayed_weights"],
        ),
    ],
)
def test_weight_decay_that_cannot_be(options, needles):
    with pytest.raises(ValueError) as error:
        nlcg(0.1, **options)
    for needle in needles:
        assert needle in str(error.value)


def test_weight_decay_needs_the_parameters():
    tx = nlcg(0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match="params=None: weight decay needs"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), value=1.0)


@pytest.mark.parametrize("step_rule", [None, "step", "online", optax.identity()])
def test_it_takes_extra_arguments(step_rule):
    tx = nlcg_paper(0.1, step_rule=step_rule)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)


@pytest.mark.parametrize("step_rule", [None, optax.identity()])
def test_no_loss_is_needed_without_loss_feedback(step_rule):
    tx = nlcg_paper(0.1, step_rule=step_rule)
    x = jnp.ones(2)
    update, _ = tx.update(x, tx.init(x), x)
    np.testing.assert_allclose(update, -0.1 * x)


def test_no_parameters_are_needed_without_the_diagonal():
    tx = nlcg_paper(0.1, preconditioner=None)
    x = jnp.ones(2)
    update, _ = tx.update(x, tx.init(x), value=1.0)
    np.testing.assert_allclose(update, -0.1 * x)


def test_a_line_search_is_given_the_directions():
    search = scale_by_loss_feedback()
    usual, plain = (
        minimize(nlcg(0.03, step_rule=search)),
        minimize(nlcg(0.03, nesterov=False, step_rule=search)),
    )
    np.testing.assert_array_equal(usual, plain)


@pytest.mark.standard_promotion  # optax's line searches promote
@pytest.mark.parametrize("rule", ["fletcher_reeves", "hager_zhang"])
def test_a_line_search_is_a_step_rule(rule):
    tx = paper(
        1.0,
        beta_rule=rule,
        preconditioner=None,
        beta_bounds=(0.0, math.inf),
        restart_on_ascent=True,
        step_rule=optax.scale_by_zoom_linesearch(30),
    )
    hessian, b = (jnp.asarray(a) for a in quadratic())

    def loss(x):
        return x @ hessian @ x / 2 - b @ x

    @jax.jit
    def step(x, state):
        value, grad = jax.value_and_grad(loss)(x)
        update, state = tx.update(grad, state, x, value=value, grad=grad, value_fn=loss)
        return x + update, state

    x = jnp.zeros(6)
    state = tx.init(x)
    for _ in range(40):
        x, state = step(x, state)
    np.testing.assert_allclose(x, np.linalg.solve(hessian, b), atol=1e-4)


@pytest.mark.parametrize("rule", rest_long(nlcg_optax.beta.BETA_RULES, ["dai_kou"]))
def test_the_scale_of_the_loss_does_not_matter_without_epsilon(rule):
    # A preconditioner that forgets the scale, and no absolute ε: same parameters.
    def tx():
        return nlcg_paper(
            0.02, beta_rule=rule, preconditioner=optax.scale_by_rms(eps=0.0), epsilon=0
        )

    plain = minimize(tx())
    scaled = minimize(tx(), scale=2.0**-30)
    np.testing.assert_allclose(scaled, plain, rtol=1e-9)
    # Without a preconditioner the learning rate carries the scale.
    plain = minimize(nlcg_paper(0.05, beta_rule=rule, preconditioner=None, epsilon=0))
    scaled = minimize(
        nlcg_paper(0.05 * 2.0**30, beta_rule=rule, preconditioner=None, epsilon=0),
        scale=2.0**-30,
    )
    np.testing.assert_allclose(scaled, plain, rtol=1e-9)


# --- Without a learning rate --------------------------------------------------------


def test_nlcg_auto_is_the_quadratic_model():
    params = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array([0.3, -0.7])}

    def loss_fn(params):
        return jnp.sum(jnp.cosh(params["w"])) + 3 * jnp.sum(params["b"] ** 2)

    curvature = nlcg_optax.hessian(loss_fn)
    piece = nlcg_optax.scale_by_quadratic_model(
        nlcg_optax.scale_by_orthogonalization(), multiplier=0.5
    )
    tx = nlcg_optax.nlcg_auto(multiplier=0.5)
    ours, theirs = tx.init(params), piece.init(params)
    update, update_piece = jax.jit(tx.update), jax.jit(piece.update)
    for _ in range(2):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        given = {"value": loss, "curvature": curvature}
        updates, ours = update(grads, ours, params, **given)
        expected, theirs = update_piece(grads, theirs, params, **given)
        for name, found in updates.items():
            np.testing.assert_array_equal(found, -expected[name])
        params = optax.apply_updates(params, updates)


@pytest.mark.parametrize(
    ("make", "options", "needles"),
    [
        (nlcg, {"step_rule": "step"}, ["learning_rate=None", "nlcg_auto()"]),
        (nlcg, {"step_rule": None}, ["learning_rate=None", "nlcg_auto()"]),
        (nlcg, {"step_rule": "quadratic_model"}, ["quadratic_model", "nlcg_auto()"]),
        (
            nlcg,
            {"step_rule": "quadratic_model", "learning_rate": 0.1},
            ["quadratic_model", "nlcg_auto()"],
        ),
        (
            nlcg,
            {"learning_rate": 0.1, "step_rule": "quadratic"},
            ["'online'", "'step'"],
        ),
        (nlcg_auto, {"preconditioner": ["rms"]}, ["'rms'", "'orthogonalization'"]),
        (nlcg_auto, {"num_steps": 0}, ["num_steps=0", "at least 1"]),
        (nlcg_auto, {"num_steps": 1e4}, ["num_steps=10000.0", "an integer"]),
        (nlcg_auto, {"multiplier": -0.1}, ["multiplier=-0.1", "at least 0"]),
        (nlcg_auto, {"weight_decay": -1}, ["weight_decay=-1", "at least 0"]),
        (nlcg_auto, {"weight_decay": abs}, ["weight_decay=", "expected a number"]),
        (nlcg_auto, {"weight_decay_mask": True}, ["does nothing", "give both"]),
    ],
)
def test_what_each_front_door_takes(make, options, needles):
    with pytest.raises(ValueError) as error:
        make(**options)
    for needle in needles:
        assert needle in str(error.value)


def test_where_noise_rules_a_tall_matrix_has_no_basis():
    shapes = {"words": (2048, 16), "head": (16, 2048), "kernel": (2048, 128)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    (state,) = (
        node
        for node in jax.tree.leaves(
            nlcg_optax.nlcg_auto(100).init(params),
            is_leaf=lambda node: isinstance(node, nlcg_optax.SoapState),
        )
        if isinstance(node, nlcg_optax.SoapState)
    )
    kept = {name: isinstance(state.second_moment[name], jax.Array) for name in shapes}
    assert kept == {"words": True, "head": True, "kernel": False}

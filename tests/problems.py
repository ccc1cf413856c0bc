"""Problems to optimize, and the replay of recorded inputs through the optimizer."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nlcg_optax


def paper(learning_rate, **options):
    """`nlcg_paper`, or the chain of its pieces where an option is one of theirs."""
    if set(options) <= set(inspect.signature(nlcg_optax.nlcg_paper).parameters):
        return nlcg_optax.nlcg_paper(learning_rate, **options)
    preconditioner = options.pop("preconditioner", "diagonal_bfgs")
    step_rule = options.pop("step_rule", "step")
    shared = {k: options[k] for k in ("state_dtype", "axis_name") if k in options}
    if preconditioner == "diagonal_bfgs":
        preconditioner = nlcg_optax.scale_by_diagonal_bfgs(
            options.get("epsilon", 1e-8), **shared
        )
    feedback = {k: options.pop(k) for k in ("period", "threshold") if k in options}
    pieces = [
        nlcg_optax.scale_by_conjugate_direction(
            preconditioner=preconditioner, **options
        )
    ]
    if isinstance(step_rule, str):
        pieces.append(nlcg_optax.scale_by_loss_feedback(step_rule, **feedback))
    pieces.append(optax.scale_by_learning_rate(learning_rate))
    if isinstance(step_rule, optax.GradientTransformation):
        pieces.append(step_rule)
    return optax.chain(*pieces)


def quadratic(seed=0, n=6):
    """Hessian and gradient's constant part of a strictly convex quadratic."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(n, n)))
    hessian = (basis * np.linspace(1.0, 8.0, n)) @ basis.T
    return hessian, rng.normal(size=n)


class NonConvex:
    """A bounded quadratic bowl with ripples, seen through noisy gradients."""

    def __init__(self, seed, n=7, offset=0.0, noise=0.3):
        rng = np.random.default_rng(seed)
        self.rng = rng
        self.scale = np.geomspace(0.2, 3.0, n)
        self.frequency = rng.uniform(1.0, 3.0, n)
        self.offset, self.noise = offset, noise
        self.start = rng.normal(size=n) * 2

    def __call__(self, x):
        f = 0.5 * x @ (self.scale * x) + np.sum(np.cos(self.frequency * x))
        g = self.scale * x - self.frequency * np.sin(self.frequency * x)
        g = g + self.noise * self.rng.normal(size=x.size)
        return f - self.offset + self.noise * self.rng.normal(), g


def record(oracle, problem, steps=30, learning_rate=0.1):
    """Lets the oracle optimize; returns its inputs and outputs, step first."""
    x, rows = problem.start, []
    for _ in range(steps):
        f, g = problem(x)
        out = oracle.step(x, g, f, learning_rate)
        rows.append({"params": x, "gradient": g, "loss": f, **out})
        x = x + out["update"]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def describe(update, state):
    """What the oracle reports, from the state of `nlcg`."""
    direction = state[0]
    out = {"update": update, "direction": -direction.prev_update}
    out["metric_length"] = direction.prev_d_d
    out |= nlcg_optax.diagnostics(state)
    if isinstance(direction.preconditioner_state, nlcg_optax.DiagonalBfgsState):
        out["diagonal"] = direction.preconditioner_state.diagonal
    return out


@functools.cache
def _compiled(options, x64):
    """One compilation for all the recordings of one configuration and shape."""
    del x64  # part of the key: tracing depends on it

    @jax.jit
    def run(rates, *inputs):
        tx = paper(lambda count: rates[count], **dict(options))

        def step(state, row):
            x, g, f = row
            update, state = tx.update(g, state, x, value=f)
            return state, describe(update, state)

        return jax.lax.scan(step, tx.init(inputs[0][0]), inputs)[1]

    return run


def replay(options, rates, params, gradients, losses, *, jit=True):
    """Feeds recorded inputs to `nlcg`; returns `describe` of every step."""
    if not jit:
        tx = paper(lambda count: jnp.asarray(rates)[count], **options)
        state, rows = tx.init(jnp.asarray(params[0])), []
        for x, g, f in zip(params, gradients, losses, strict=True):
            update, state = tx.update(jnp.asarray(g), state, jnp.asarray(x), value=f)
            rows.append(describe(update, state))
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}
    run = _compiled(tuple(sorted(options.items())), jax.config.jax_enable_x64)
    inputs = (jnp.asarray(a) for a in (rates, params, gradients, losses))
    return {name: np.asarray(a) for name, a in run(*inputs).items()}


def relative_errors(got, expected):
    """|got − expected| over the largest entry of each step of `expected`."""
    got, expected = (np.reshape(a, (len(a), -1)).astype(float) for a in (got, expected))
    assert got.shape == expected.shape
    scale = np.max(np.abs(expected), axis=1, keepdims=True)
    return np.abs(got - expected) / np.where(scale == 0, 1, scale)

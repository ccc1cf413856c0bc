"""Every solver behind one function: from an oracle to the point it returns."""

import ast
import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import problems
from jax.custom_derivatives import linear_call

import nlcg_optax

MAX_ITER = 5_000  # more than the points allowed

_current = None  # the oracle that `counted` asks: one compilation serves many problems


def _on_host(function, shape, *args):
    return jax.pure_callback(function, shape, *args, vmap_method="sequential")


@jax.custom_jvp
def counted(x):
    """The current oracle's objective, evaluated (and counted) on the host."""
    shape = jax.ShapeDtypeStruct((), x.dtype)
    return _on_host(lambda x: np.asarray(_current.value(x), x.dtype), shape, x)


@counted.defjvp
def _counted_jvp(primals, tangents):
    (x,), (x_dot,) = primals, tangents

    def gradient(x):
        return _on_host(lambda x: np.asarray(_current.gradient(x)), x, x)

    # Asks for the gradient only where it is used: when the tangent is, or transposed.
    tangent = linear_call(
        lambda x, v: jnp.vdot(gradient(x), v), lambda x, ct: ct * gradient(x), x, x_dot
    )
    return counted(x), tangent


def ours(function, x0, tolerance, **options):
    del tolerance  # gtol is relative to the initial gradient by itself
    return nlcg_optax.minimize(function, x0, **options).params


def jaxopt_cg(linesearch, function, x0, tolerance):
    import jaxopt

    solver = jaxopt.NonlinearCG(
        function, maxiter=MAX_ITER, tol=tolerance, linesearch=linesearch
    )
    return solver.run(x0).params


def optimistix_cg(function, x0, tolerance):
    import optimistix

    del tolerance  # its criterion is Cauchy's, on the steps of x and f
    solver = optimistix.NonlinearCG(rtol=1e-8, atol=1e-8)
    return optimistix.minimise(
        lambda x, _: function(x), solver, x0, max_steps=MAX_ITER, throw=False
    ).value


def optax_lbfgs(function, x0, tolerance):
    import optax

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(function)

    def step(carry):
        x, state, _, count = carry
        value, grad = value_and_grad(x, state=state)
        updates, state = solver.update(
            grad, state, x, value=value, grad=grad, value_fn=function
        )
        x = optax.apply_updates(x, updates)
        norms = [jnp.max(jnp.abs(g)) for g in jax.tree.leaves(_grad(state))]
        return x, state, functools.reduce(jnp.maximum, norms), count + 1

    def _grad(state):
        return optax.tree.get(state, "grad")

    def unfinished(carry):
        return ~(carry[2] <= tolerance) & (carry[3] < MAX_ITER)

    dtype = jax.tree.leaves(x0)[0].dtype
    start = (x0, solver.init(x0), jnp.asarray(jnp.inf, dtype), 0)
    return jax.lax.while_loop(unfinished, step, start)[0]


# Each takes a function, the starting point and the tolerance of the gradient.
JAX_SOLVERS = {
    "ours": ours,  # the plain defaults
    "ours-cg": functools.partial(ours, preconditioner=None),
    "jaxopt-zoom": functools.partial(jaxopt_cg, "zoom"),
    "jaxopt-hz": functools.partial(jaxopt_cg, "hager-zhang"),
    "optimistix": optimistix_cg,
    "optax-lbfgs": optax_lbfgs,
}


SCIPY_SOLVERS = {
    "scipy-cg": ("CG", {"maxiter": MAX_ITER}),
    "scipy-lbfgs": (
        "L-BFGS-B",
        {"maxiter": MAX_ITER, "maxfun": 2 * MAX_ITER, "ftol": 0.0},
    ),
}

TIGHT = 1e-2  # for a name that ends with "-tight": the tolerance `minimize` has

_compiled = {}


def _variant(name):
    """A solver of ours with options, such as ``ours:gtol=1e-6:memory_size=3``."""
    base, *items = name.split(":")
    options = {}
    for item in items:
        key, value = item.split("=")
        try:
            options[key] = ast.literal_eval(value)
        except ValueError:
            options[key] = value
    return functools.partial(JAX_SOLVERS[base], **options)


def count_one(name, oracle, gradient_tolerance):
    """Runs a solver on the counting objective; what it returned is evaluated anew."""
    global _current
    _current = oracle
    oracle.reset()
    # The starting value is known to nobody: reset forgets it.
    small = gradient_tolerance * oracle.tolerance_scale
    base = name.removesuffix("-tight")
    tolerance = small if base == name else TIGHT * small
    began = time.perf_counter()
    error, x = None, None
    try:
        if base in SCIPY_SOLVERS:
            import scipy.optimize

            method, options = SCIPY_SOLVERS[base]
            x = scipy.optimize.minimize(
                oracle.value_and_grad,
                oracle.start,
                jac=True,
                method=method,
                options=options | {"gtol": tolerance},
            ).x
        else:
            if base not in _compiled:
                solver = JAX_SOLVERS.get(base) or _variant(base)
                _compiled[base] = jax.jit(functools.partial(solver, counted))
            x = np.asarray(_compiled[base](jnp.asarray(oracle.start), tolerance))
    except Exception as e:
        error = f"{type(e).__name__}: {str(e)[:100]}"
        if "BudgetError" in str(e) or isinstance(e, problems.BudgetError):
            error = f"{oracle.max_points:,} points"
        elif "SecondsError" in str(e) or isinstance(e, problems.SecondsError):
            error = f"over {oracle.max_seconds:g} s"
    cell = {
        "points": len(oracle.seen),
        "nf": oracle.values,
        "ng": oracle.gradients,
        "f0": oracle.f0,
        "g0": float(np.max(np.abs(oracle.g0))),
        "cell_seconds": round(time.perf_counter() - began, 2),
    }
    hits = [i for i, (_, g) in enumerate(oracle.trace) if g <= small]
    if hits:
        cell["first_small_gradient"] = hits[0] + 1
    finite = [f for f, _ in oracle.trace if math.isfinite(f)]
    cell["lowest"] = min(finite, default=None)
    if x is not None:
        f, g = oracle._compiled(x)
        cell["f"], cell["g"] = float(f), float(np.max(np.abs(g)))
    if error:
        cell["error"] = error
    return cell


def time_one(name, oracle, gradient_tolerance, repeats=25, budget=5.0):
    """Seconds of a solver with the whole program compiled, the median of many runs."""
    tolerance = gradient_tolerance * oracle.tolerance_scale
    solver = JAX_SOLVERS.get(name) or _variant(name)
    run = jax.jit(functools.partial(solver, oracle.objective))
    x0 = jnp.asarray(oracle.start)
    began = time.perf_counter()
    x = jax.block_until_ready(run(x0, tolerance))
    first = time.perf_counter() - began
    seconds = []
    while len(seconds) < repeats and sum(seconds) < budget:
        began = time.perf_counter()
        x = jax.block_until_ready(run(x0, tolerance))
        seconds.append(time.perf_counter() - began)
    f, g = oracle._compiled(x)
    return {
        "seconds": float(np.median(seconds)),
        "fastest": min(seconds),
        "runs": len(seconds),
        "first_seconds": first,
        "f": float(f),
        "g": float(np.max(np.abs(g))),
    }

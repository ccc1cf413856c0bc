"""A physics-informed network: curvature against L-BFGS, on all points in every step.

    python examples/physics_informed.py

The network u solves −Δu = f on the unit square, with u = 0 on its boundary, where f is
chosen so that u = sin(πx) sin(3πy) is the solution. What is minimized is half the mean
square of Δu + f over the points of a grid: a sum of squares without noise, for which
L-BFGS is what people use, and Gauss-Newton products are exact enough to find the length
of a step. It prints what each had reached by when, and how far u is from the solution.
"""

import argparse
import itertools
import time

import jax
import jax.numpy as jnp
import optax

import nlcg_optax


def solution(x):
    """The solution at a point [2]."""
    return jnp.sin(jnp.pi * x[0]) * jnp.sin(3 * jnp.pi * x[1])


def force(x):
    """F = −Δu of the solution at a point [2]."""
    return 10 * jnp.pi**2 * solution(x)


def init(width):
    """A network of three layers, of 2 inputs and 1 output."""
    sizes = (2, width, width, 1)
    keys = jax.random.split(jax.random.key(0), len(sizes) - 1)
    return [
        {"w": jax.random.normal(key, (n, m)) / n**0.5, "b": jnp.zeros(m)}
        for key, (n, m) in zip(keys, itertools.pairwise(sizes), strict=True)
    ]


def network(params, x):
    """U at a point [2]; the factor makes it 0 on the boundary."""
    hidden = 2 * x - 1
    for layer in params[:-1]:
        hidden = jnp.tanh(hidden @ layer["w"] + layer["b"])
    (last,) = hidden @ params[-1]["w"] + params[-1]["b"]
    return 16 * jnp.prod(x * (1 - x)) * last


def residuals(params, batch):
    """Δu + f at each of the points [N, 2] of a batch."""

    def residual(x):
        return jnp.trace(jax.hessian(network, argnums=1)(params, x)) + force(x)

    return jax.vmap(residual)(batch["x"])


def loss_fn(outputs, batch):
    """Half the mean square of the residuals."""
    del batch
    return 0.5 * jnp.mean(outputs**2)


def grid(points):
    """Points [points², 2] within the square."""
    line = jnp.arange(0.5, points) / points
    return jnp.stack(jnp.meshgrid(line, line), -1).reshape(-1, 2)


@jax.jit
def error(params):
    """The relative error of u, in the L2 norm, on a finer grid."""
    x = grid(50)
    found = jax.vmap(lambda x: network(params, x))(x)
    exact = jax.vmap(solution)(x)
    return jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)


def by_curvature(params, batch, steps):
    """`nlcg_auto`, whose curvature is that of all points; and the seconds it took."""
    tx = nlcg_optax.nlcg_auto(residuals=5)
    evaluate = nlcg_optax.value_grad_and_curvature(residuals, loss_fn, fraction=1.0)

    @jax.jit
    def step(params, opt_state):
        loss, grads, curvature = evaluate(params, batch)
        updates, opt_state = tx.update(
            grads, opt_state, params, value=loss, curvature=curvature
        )
        return optax.apply_updates(params, updates), opt_state

    state = params, tx.init(params)
    step(*state)  # compiled before the clock starts
    begin = time.perf_counter()
    for _ in range(steps):
        state = step(*state)
    params, _ = jax.block_until_ready(state)
    return params, steps, time.perf_counter() - begin


def by_lbfgs(params, batch, iterations):
    """L-BFGS with a line search; and the iterations and seconds it took."""

    def fun(params, batch):
        return loss_fn(residuals(params, batch), batch)

    def solve(iterations):
        result = nlcg_optax.minimize(fun, params, batch, max_iter=iterations, gtol=0.0)
        return jax.block_until_ready(result)

    solve(iterations)  # compiled before the clock starts
    begin = time.perf_counter()
    result = solve(iterations)
    return result.params, int(result.iterations), time.perf_counter() - begin


def main():
    """Solves by both, and prints what each has reached after how many steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=30, help="along each side")
    parser.add_argument("--width", type=int, default=32, help="of the hidden layers")
    parser.add_argument("--steps", type=int, default=300, help="of each, at most")
    args = parser.parse_args()
    params, batch = init(args.width), {"x": grid(args.points)}
    print(f"{'':16} steps  seconds       loss  error of u")
    budgets = sorted({max(1, args.steps // 10), max(1, args.steps // 3), args.steps})
    reached = {}
    for name, solve in (("nlcg_auto", by_curvature), ("L-BFGS", by_lbfgs)):
        for budget in budgets:
            found, steps, seconds = solve(params, batch, budget)
            loss = loss_fn(residuals(found, batch), batch)
            reached[name] = float(error(found))
            print(
                f"{name:16} {steps:5,}  {seconds:7.1f}  {loss:9.2e}  "
                f"{reached[name]:.1e}"
            )
    nearer, other = sorted(reached, key=reached.__getitem__)
    print(
        f"{nearer} ends nearer to the solution: {reached[nearer]:.1e} of its size from "
        f"it, and {other} {reached[other]:.1e}."
    )


if __name__ == "__main__":
    main()

"""Float32 workloads: what each solver reaches in the same number of iterations.

One JSON line for each workload and solver; cells already there are skipped.
"""

import argparse
import functools
import json
import pathlib
import time

import cutest
import jax
import jax.numpy as jnp
import numpy as np
import solvers


def digits_mlp():
    """Full-batch training of a small network on the digits of scikit-learn."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = jnp.asarray(data.data / 16.0, jnp.float32)
    y = jnp.asarray(data.target)
    keys = jax.random.split(jax.random.key(0), 2)
    sizes = (64, 32, 10)
    params = [
        {
            "w": jax.random.normal(key, (a, b), jnp.float32) / a**0.5,
            "b": jnp.zeros(b, jnp.float32),
        }
        for key, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]

    def loss(params):
        h = jnp.tanh(x @ params[0]["w"] + params[0]["b"])
        logits = h @ params[1]["w"] + params[1]["b"]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1)
        decay = sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
        return -jnp.mean(picked) + 1e-4 * decay

    return loss, params


def gaussian_process():
    """Negative log marginal likelihood of the diabetes data, one scale a feature."""
    from sklearn.datasets import load_diabetes

    data = load_diabetes()
    x = jnp.asarray(data.data / data.data.std(0), jnp.float32)
    y = jnp.asarray((data.target - data.target.mean()) / data.target.std(), jnp.float32)
    n = y.size

    def loss(params):
        scaled = x * jnp.exp(-params["scales"])
        norms = jnp.sum(scaled**2, 1)
        distance = norms[:, None] + norms - 2 * scaled @ scaled.T
        kernel = jnp.exp(2 * params["amplitude"] - 0.5 * jnp.maximum(distance, 0))
        kernel += (jnp.exp(2 * params["noise"]) + 1e-4) * jnp.eye(n, dtype=x.dtype)
        factor = jnp.linalg.cholesky(kernel)
        alpha = jax.scipy.linalg.solve_triangular(factor, y, lower=True)
        return 0.5 * jnp.sum(alpha**2) / n + jnp.mean(jnp.log(jnp.diag(factor)))

    zero = jnp.zeros((), jnp.float32)
    scales = jnp.ones(x.shape[1], jnp.float32)
    return loss, {"scales": scales, "amplitude": zero, "noise": zero}


def factorisation():
    """A matrix of rank 5 with noise as a product of two."""
    keys = jax.random.split(jax.random.key(1), 5)
    m, n, rank = 300, 200, 5
    a = jax.random.normal(keys[0], (m, rank)) @ jax.random.normal(keys[1], (rank, n))
    a = a + 0.1 * jax.random.normal(keys[2], (m, n))
    params = (
        0.1 * jax.random.normal(keys[3], (m, rank)),
        0.1 * jax.random.normal(keys[4], (rank, n)),
    )
    return lambda p: 0.5 * jnp.mean((p[0] @ p[1] - a) ** 2), params


def rosenbrock():
    """A million variables: the cost of an iteration."""

    def loss(x):
        return jnp.sum(100 * (x[1::2] - x[::2] ** 2) ** 2 + (1 - x[::2]) ** 2) / x.size

    return loss, jnp.tile(jnp.array([-1.2, 1.0], jnp.float32), 500_000)


WORKLOADS = {
    "digits-mlp": (digits_mlp, 200),
    "gaussian-process": (gaussian_process, 50),
    "factorisation": (factorisation, 200),
    "rosenbrock-1e6": (rosenbrock, 20),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=cutest.HERE / "results" / "float32.jsonl")
    parser.add_argument(
        "--solvers", default="ours,ours-cg,jaxopt-zoom,optimistix,optax-lbfgs"
    )
    flags = parser.parse_args()
    out = pathlib.Path(flags.out)
    done = {(cell["problem"], cell["solver"]) for cell in cutest.read(out)}
    for name, (build, iterations) in WORKLOADS.items():
        loss, params = build()
        solvers.MAX_ITER = iterations
        for solver in flags.solvers.split(","):
            if (name, solver) in done:
                continue
            options = {"max_iter": iterations} if "ours" in solver else {}
            # Traced afresh for each workload: the number of iterations changes.
            function = functools.partial(solvers.JAX_SOLVERS[solver], loss, **options)
            run = jax.jit(lambda x, f=function: f(x, 1e-5))
            began = time.perf_counter()
            jax.block_until_ready(run(params))
            first = time.perf_counter() - began
            began = time.perf_counter()
            x = jax.block_until_ready(run(params))
            seconds = time.perf_counter() - began
            value, grad = jax.value_and_grad(loss)(x)
            norms = [float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(grad)]
            cell = {
                "problem": name,
                "solver": solver,
                "iterations": iterations,
                "value": float(value),
                "gradient": float(np.max(norms)),
                "seconds": round(seconds, 4),
                "first_seconds": round(first, 2),
            }
            with out.open("a") as sink:
                sink.write(json.dumps(cell) + "\n")
            print(cell, flush=True)


if __name__ == "__main__":
    main()

"""Float32 workloads: what each solver reaches in the same number of iterations.

One JSON line for each workload and solver; cells already there are skipped.
"""

import argparse
import functools
import json
import pathlib
import time
import types

import cutest

cutest.configure()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import problems  # noqa: E402
import solvers  # noqa: E402


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


def digits_resnet8():
    """Full-batch training of the package's ResNet-8 on the digits, with BatchNorm."""
    from nlcg_optax.training import data, models

    digits = data.load("digits").train
    x = jnp.asarray(digits.images, jnp.float32) / 255.0
    y = jnp.asarray(digits.labels)
    model = models.create_model("resnet8", 10)
    variables = model.init(jax.random.key(0), x[:1], train=False)
    decayed = models.l2_mask(variables["params"])

    def loss(params):
        logits, _ = model.apply(
            variables | {"params": params}, x, train=True, mutable=["batch_stats"]
        )
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1)
        norms = jax.tree.map(lambda p, m: jnp.sum(p**2) if m else 0.0, params, decayed)
        return -jnp.mean(picked) + 1e-4 * sum(jax.tree.leaves(norms))

    return loss, variables["params"]


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
        return jnp.sum(100 * (x[1::2] - x[::2] ** 2) ** 2 + (1 - x[::2]) ** 2)

    return loss, jnp.tile(jnp.array([-1.2, 1.0], jnp.float32), 500_000)


# How each is built, iterations at most, and whether it is timed in a compiled loop:
# inside one XLA's convolutions are 25 times slower on a CPU.
WORKLOADS = {
    "digits-mlp": (digits_mlp, 200, True),
    "digits-resnet8": (digits_resnet8, 30, False),
    "gaussian-process": (gaussian_process, 50, True),
    "factorisation": (factorisation, 200, True),
    "rosenbrock-1e6": (rosenbrock, 20, True),
}


def measure(loss, params, solver, iterations, compiled):
    """Points and what they reach, by the counting objective; seconds without it."""
    solvers.MAX_ITER = iterations
    options = {"max_iter": iterations} if solver in ("ours", "ours-cg") else {}
    solve = functools.partial(solvers.JAX_SOLVERS[solver], **options)
    oracle = problems.Oracle(
        types.SimpleNamespace(y0=params, args=None, objective=lambda p, _: loss(p)),
        max_points=100_000,
    )
    solvers._current = oracle
    start = jnp.asarray(oracle.start)

    def seconds(function):
        # Traced afresh for each workload: the number of iterations changes.
        run = jax.jit(lambda x: solve(function, x, 1e-5))
        jax.block_until_ready(run(start))
        oracle.reset()
        began = time.perf_counter()
        x = jax.block_until_ready(run(start))
        return x, time.perf_counter() - began

    x, elapsed = seconds(solvers.counted)
    points = len(oracle.seen)
    if compiled:
        _, elapsed = seconds(oracle.objective)
    value, grad = oracle._compiled(x)
    return {
        "iterations": iterations,
        "points": points,
        "value": float(value),
        "gradient": float(np.max(np.abs(grad))),
        "seconds": round(elapsed, 4),
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
    for name, (build, iterations, compiled) in WORKLOADS.items():
        loss, params = build()
        for solver in flags.solvers.split(","):
            if (name, solver) in done:
                continue
            cell = {"problem": name, "solver": solver}
            cell |= measure(loss, params, solver, iterations, compiled)
            with out.open("a") as sink:
                sink.write(json.dumps(cell) + "\n")
            print(cell, flush=True)


if __name__ == "__main__":
    main()

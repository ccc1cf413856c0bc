"""How near Newton–Schulz iterations come to the polar factor, and what rounding does.

    python benchmarks/matrices/errors.py

For Gaussian matrices, and for the singular values of gradients that were recorded in
two trainings (`results/spectra.npz`, by matrix and step), after five steps or four:

- error: the root mean square of f(σ) - 1 over the singular values of at least a
  millionth of the largest; and over those of at least a hundredth;
- magnified: by how many times the relative change of the factor is larger than that of
  the gradient, for a random change of a millionth.

Means over the matrices, in NumPy and float64.
"""

import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from nlcg_optax.matrices.newton_schulz import coefficients_of  # noqa: E402

# The coefficients, and the order of the Schatten norm that the iteration starts from.
VARIANTS = {
    "`muon`": (coefficients_of("muon", 5), 2),
    "`polar_express`": (coefficients_of("polar_express", 5), 8),
    "`polar_express`, four steps": (coefficients_of("polar_express", 4), 8),
}
GAUSSIAN = ((768, 768), (768, 2304), (64, 576), (256, 1024))


def iterate(sigma, name):
    """f(σ): what the iteration makes of singular values."""
    steps, norm = VARIANTS[name]
    sigma = sigma / np.sum(sigma**norm) ** (1 / norm)
    for a, b, c in steps:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma


def factor(matrix, name):
    u, sigma, vh = np.linalg.svd(matrix, full_matrices=False)
    return (u * iterate(sigma, name)) @ vh


def magnified(sigma, shape, name, rng):
    """The relative change of the factor over that of the matrix."""
    u, _, vh = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    matrix = (u * sigma) @ vh
    change = rng.normal(size=shape)
    change *= 1e-6 * np.linalg.norm(matrix) / np.linalg.norm(change)
    before, after = factor(matrix, name), factor(matrix + change, name)
    return np.linalg.norm(after - before) / np.linalg.norm(before) / 1e-6


def matrices(rng):
    """By kind of gradient: singular values and shapes."""
    found = {"Gaussian matrices": []}
    for shape in GAUSSIAN:
        sigma = np.linalg.svd(rng.normal(size=shape), compute_uv=False)
        found["Gaussian matrices"].append((sigma, shape))
    with np.load(HERE / "results" / "spectra.npz") as file:
        for key in file:
            kind, _, sides = key.partition(" ")[0], *key.partition("|")[1:]
            shape = tuple(int(n) for n in sides.split("x"))
            found.setdefault(kind, []).append((file[key].astype(float), shape))
    return found


def main():
    rng = np.random.default_rng(0)
    print("| gradients | coefficients | error | σ ≥ 1% | magnified |")
    print("|---|---|---:|---:|---:|")
    for kind, members in matrices(rng).items():
        for name in VARIANTS:
            rows = []
            for sigma, shape in members:
                kept = sigma[sigma > 1e-6 * sigma[0]]
                ends = iterate(kept, name)
                large = ends[kept > 1e-2 * kept[0]]
                rms = [np.sqrt(np.mean((y - 1) ** 2)) for y in (ends, large)]
                rows.append([*rms, magnified(sigma, shape, name, rng)])
            error, large, times = np.mean(rows, axis=0)
            print(f"| {kind} | {name} | {error:.3f} | {large:.3f} | {times:.0f} |")


if __name__ == "__main__":
    main()

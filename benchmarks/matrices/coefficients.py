"""The coefficients of Polar Express: polynomials that converge to the sign function.

    python benchmarks/matrices/coefficients.py --steps=5 --lower=0.002

Amsel, Persson, Musco & Gower (arXiv:2505.16932): of all compositions of so many odd
polynomials of degree five, the one that is nearest to 1 on [lower, 1] takes in each
step the polynomial that is best on the interval which the steps before have left.
"""

import argparse

import numpy as np

CUSHION = 0.024


def best_quintic(lower: float, upper: float) -> tuple[float, float, float]:
    """a, b, c of the a x + b x³ + c x⁵ nearest to 1 on [lower, upper], by Remez.

    Its error has the same size, and alternating sign, at both ends and at the two
    extrema between.
    """
    if lower / upper > 1 - 5e-6:  # the limit, which the system below does not tell
        return 15 / 8 / upper, -10 / 8 / upper**3, 3 / 8 / upper**5
    inner = [(3 * lower + upper) / 4, (lower + 3 * upper) / 4]
    error, change = np.inf, np.inf
    while change > 1e-15:
        x = np.array([lower, *inner, upper])
        system = np.stack([x, x**3, x**5, [1, -1, 1, -1]], axis=1)
        a, b, c, new = np.linalg.solve(system, np.ones(4))
        error, change = new, abs(new - error)
        root = np.sqrt(9 * b**2 - 20 * a * c)
        inner = list(np.sqrt((-3 * b + np.array([-root, root])) / (10 * c)))
    return float(a), float(b), float(c)


def polar_express(
    steps: int, lower: float, cushion: float = CUSHION
) -> list[tuple[float, float, float]]:
    """The coefficients of each step, without the safety factor.

    Args:
      steps: how many.
      lower: the least singular value that is to come out near 1, of at most 1.
      cushion: no step is made for an interval that begins below this times its end:
        values in its middle would become smaller in between, and rounding matter more.
    """
    upper, found = 1.0, []
    for _ in range(steps):
        quintic = np.array(best_quintic(max(lower, cushion * upper), upper))
        powers = np.array([1, 3, 5])
        ends = [quintic @ end**powers for end in (lower, upper)]
        quintic *= 2 / sum(ends)  # as far above 1 as below, cushioned or not
        lower = float(quintic @ lower**powers)
        upper = 2 - lower
        found.append((float(quintic[0]), float(quintic[1]), float(quintic[2])))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--lower", type=float, default=0.002)
    args = parser.parse_args()
    for quintic in polar_express(args.steps, args.lower):
        print(quintic)


if __name__ == "__main__":
    main()

"""Tables and the performance profile of `cutest.py`'s results."""

import argparse
import math
import pathlib

import cutest
import numpy as np

RESULTS = cutest.HERE / "results"


def best_values(cells):
    """The lowest value that anyone returned, for each problem."""
    best = {}
    for cell in cells:
        f = cell.get("f")
        if f is not None and math.isfinite(f):
            best[cell["problem"]] = min(f, best.get(cell["problem"], math.inf))
    return best


def solved(cell, best):
    """The success rule, on what the solver returned."""
    f, f0 = cell.get("f"), cell.get("f0")
    if "error" in cell or f is None or not math.isfinite(f):
        return False
    tolerance = cutest.GRADIENT_TOLERANCE * max(1.0, cell["g0"])
    return (
        cell["g"] <= tolerance * (1 + 1e-9)
        and f - best <= 1e-4 * max(abs(best), 0.01 * (f0 - best))
        and cell["points"] <= cutest.MAX_POINTS
    )


def table(rows, head):
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(str(x) for x in row) + " |" for row in rows]
    return "\n".join(lines)


def profile(costs, names, path):
    """Dolan & Moré: the share of problems solved within a factor of the best."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    best = {p: min(c.get(p, math.inf) for c in costs.values()) for p in names}
    factors = np.logspace(0, 2, 200, base=10)
    figure, axes = plt.subplots(figsize=(8, 4.5))
    rows = []
    for solver, cost in costs.items():
        ratios = np.array([cost.get(p, math.inf) / best[p] for p in names])
        share = [(ratios <= factor).mean() for factor in factors]
        axes.semilogx(factors, share, label=solver)
        rows.append(
            [solver] + [f"{(ratios <= t).mean():.2f}" for t in (1, 1.5, 2, 4, 10, 100)]
        )
    axes.set_xlabel("points evaluated, relative to the best solver")
    axes.set_ylabel("share of the problems")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", default=RESULTS / "points.jsonl")
    parser.add_argument("--timing", default=RESULTS / "timing.jsonl")
    parser.add_argument("--variants", default=RESULTS / "variants.jsonl")
    parser.add_argument("--longer", default=RESULTS / "long.jsonl")
    parser.add_argument("--float32", default=RESULTS / "float32.jsonl")
    parser.add_argument("--profile", default=RESULTS / "profile.png")
    parser.add_argument("--lost", default="ours", help="list what this solver lost")
    flags = parser.parse_args()

    cells = cutest.read(flags.points)
    best = best_values(cells)
    by_solver = {}
    for cell in cells:
        by_solver.setdefault(cell["solver"], {})[cell["problem"]] = cell
    problems = list(dict.fromkeys(cell["problem"] for cell in cells))
    # A problem that nobody solves tells nothing of who is ahead, but is counted.
    wins = {
        solver: {
            p: cell["points"]
            for p, cell in mine.items()
            if p in best and solved(cell, best[p])
        }
        for solver, mine in by_solver.items()
    }
    # Runs that are not complete are shown, but say nothing of what all solve.
    whole = [s for s, mine in by_solver.items() if len(mine) == len(problems)]
    common = set.intersection(*(set(wins[s]) for s in whole))
    rows = []
    for solver, mine in by_solver.items():

        def median(names, key, mine=mine, solver=solver):
            values = [
                mine[p]["nf"] + 3 * mine[p]["ng"] if key == "cost" else mine[p][key]
                for p in names
                if p in wins[solver]
            ]
            return f"{np.median(values):g}" if values else "-"

        rows.append(
            (
                solver,
                len(mine),
                len(wins[solver]),
                median(common, "points"),
                median(common, "cost"),
                median(common, "first_small_gradient"),
                *(
                    sum(c.get("error", "").endswith(end) for c in mine.values())
                    for end in (" points", " s")
                ),
            )
        )
    rows.sort(key=lambda row: -row[2])
    print(f"{len(problems)} problems. Medians are over the {len(common)} that all of")
    print(f"these solved: {', '.join(whole)}.")
    print(
        "To a small gradient: points until it first satisfied the rule. Cut off: runs"
    )
    print("that used up their points, and those that used up their seconds.\n")
    head = ["solver", "run", "solved", "median points", "median NF + 3 NG"]
    head += ["median to a small gradient", "cut off by points", "by seconds"]
    print(table(rows, head) + "\n")

    ours = wins[flags.lost]
    print(f"{flags.lost} beside each of the others, on what both solved:\n")
    rows = []
    for solver, mine in wins.items():
        both = [p for p in mine if p in ours]
        if solver == flags.lost or not both:
            continue
        medians = [f"{np.median([w[p] for p in both]):g}" for w in (ours, mine)]
        fewer = sum(ours[p] < mine[p] for p in both)
        rows.append((solver, len(both), *medians, fewer, len(set(mine) - set(ours))))
    head = ["solver", "both solved", f"median points, {flags.lost}", "the other's"]
    head += [f"fewer points: {flags.lost}", "solved by the other alone"]
    print(table(rows, head) + "\n")
    print("Share of the problems solved within a factor of the fewest points:\n")
    shares = profile(wins, problems, pathlib.Path(flags.profile))
    print(table(shares, ["solver", "1", "1.5", "2", "4", "10", "100"]) + "\n")

    print(f"What {flags.lost} did not solve:\n")
    rows = []
    for p, cell in by_solver.get(flags.lost, {}).items():
        if p in wins[flags.lost]:
            continue
        small = cell.get("g") is not None and cell["g"] <= (
            cutest.GRADIENT_TOLERANCE * max(1.0, cell["g0"])
        )
        why = cell.get("error") or ("value" if small else "gradient")
        f = cell.get("f")
        rows.append(
            (
                p,
                cell.get("n"),
                cell.get("points"),
                why,
                "-" if f is None else f"{f:.6g}",
                f"{best.get(p, math.nan):.6g}",
                ", ".join(s for s in wins if p in wins[s]) or "nobody",
            )
        )
    head = ["problem", "n", "points", "why", "value", "best", "solved by"]
    print(table(rows, head) + "\n")

    timing = cutest.read(flags.timing)
    if timing:
        print("Milliseconds of a compiled run (and seconds of the first call, with")
        print("compilation). In bold the fastest that solved it, variants aside:\n")
        seconds = {}
        for cell in timing:
            seconds.setdefault(cell["problem"], {})[cell["solver"]] = cell
        solvers = list(dict.fromkeys(cell["solver"] for cell in timing))
        rows = []
        for p, mine in seconds.items():
            start = next(c for c in cells if c["problem"] == p and "f0" in c)
            start = {"f0": start["f0"], "g0": start["g0"], "points": 0}
            right = {s for s, cell in mine.items() if solved(start | cell, best[p])}
            fastest = min(
                (mine[s]["seconds"] for s in right if ":" not in s), default=None
            )
            row = [p, next((c["n"] for c in mine.values() if "n" in c), "-")]
            for s in solvers:
                cell = mine.get(s, {})
                text = cell.get("error", "-")
                if "seconds" in cell:
                    text = f"{1000 * cell['seconds']:.3g}"
                    if s in right and cell["seconds"] == fastest:
                        text = f"**{text}**"
                    text += f" ({cell['first_seconds']:.1f})"
                    text += "" if s in right else " unsolved"
                row.append(text)
            rows.append(row)
        print(table(rows, ["problem", "n", *solvers]) + "\n")

    variants = {}
    for cell in cutest.read(flags.variants):
        variants.setdefault(cell["solver"], {})[cell["problem"]] = cell
    if variants:
        print("Variants, by the same best values, beside the default of ours:\n")
        rows = []
        for name, mine in variants.items():
            won = {p for p, cell in mine.items() if solved(cell, best[p])}
            both = sorted(won & set(ours))
            medians = [
                f"{np.median([record[p]['points'] for p in both]):g}"
                for record in (mine, by_solver[flags.lost])
            ]
            rows.append((name, len(mine), len(won), len(both), *medians))
        head = ["variant", "run", "solved", f"{flags.lost} too", "median points"]
        print(table(rows, [*head, f"{flags.lost}'s"]) + "\n")

    longer = cutest.read(flags.longer)
    if longer:
        print("With more points and iterations allowed:\n")
        rows = [
            [
                *(c.get(k, "-") for k in ("problem", "n", "solver", "points")),
                *(f"{c[k]:.6g}" if k in c else "-" for k in ("f", "g")),
                c.get("error", ""),
            ]
            for c in longer
        ]
        head = ["problem", "n", "solver", "points", "value", "gradient", "cut off"]
        print(table(rows, head) + "\n")

    workloads = cutest.read(flags.float32)
    if workloads:
        print("Float32 workloads:\n")
        head = ["problem", "iterations", "solver", "points", "value", "gradient"]
        head.append("seconds")
        rows = [
            [f"{c[k]:.6g}" if isinstance(c[k], float) else c[k] for k in head]
            for c in workloads
        ]
        print(table(rows, head) + "\n")

    print("![Performance profile](profile.png)")


if __name__ == "__main__":
    main()

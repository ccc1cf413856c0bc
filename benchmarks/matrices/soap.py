"""Which SOAP? Variants on the small autoencoder, by a tuned rate and by curvature.

    taskset -c 1 python benchmarks/matrices/soap.py            # runs what is missing
    python benchmarks/matrices/soap.py --report                # the table

By a rate: batches of 128 and 512, with the average of 0.8 and the schedule that the
sweep of `benchmarks/large_batch` chose for SOAP; of half, once, twice and four times
its rate (and a quarter and less where the best is at the edge) seed 100 chooses one,
seeds 0 to 2 are reported. By curvature: all data, with nothing tuned. A run is a line
of `results/soap.jsonl`; what is there is not run again.
"""

import argparse
import pathlib
import statistics
import sys
from unittest import mock

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "large_batch"))

import jax  # noqa: E402
import optax  # noqa: E402
import peers  # noqa: E402
import protocol  # noqa: E402
import sweep  # noqa: E402
from workloads import WORKLOADS  # noqa: E402

import nlcg_optax  # noqa: E402

RESULTS = HERE / "results" / "soap.jsonl"
CHOSEN = {
    128: (0.032, "cosine, no warm-up"),
    512: (0.064, "cosine, warm-up 10%"),
}
FACTORS = (0.5, 1.0, 2.0, 4.0)


def soap(b1=0.8, **options):
    return nlcg_optax.scale_by_soap(
        b1, matrices=nlcg_optax.matrices.last_axis, **options
    )


def orthogonalized(b1):
    return optax.chain(
        soap(b1),
        nlcg_optax.scale_by_orthogonalization(matrices=nlcg_optax.matrices.last_axis),
    )


def level(u):
    """All leaves of one scale, as SOAP has them."""
    return 5 * u if u.ndim > 1 else u


BY_RATE = {
    "as published": peers.scale_by_published_soap,
    "`scale_by_soap`": soap,
    "`every=10`": lambda b1: soap(b1, every=10),
    "a basis for the smaller side alone": lambda b1: soap(b1, max_side=64),
    "`linear=True`": lambda b1: soap(b1, linear=True),
    '`precision="bfloat16"`': lambda b1: soap(b1, precision="bfloat16"),
    "orthogonalized after it": orthogonalized,
}
BY_CURVATURE = {
    "orthogonalization": lambda: "orthogonalization",
    "`scale_by_soap`": lambda: soap(0.0),
    "`linear=True`": lambda: soap(0.0, linear=True),
    "a basis for the smaller side alone": lambda: soap(0.0, max_side=64),
    "orthogonalized after it": lambda: orthogonalized(0.0),
    "orthogonalization and `scale_by_soap`": lambda: ["orthogonalization", soap(0.0)],
}


def by_rate(workload, variant, size, rate, seed):
    make = BY_RATE[variant]

    def peer(schedule, b1):
        pieces = [make(b1)]
        if make is not peers.scale_by_published_soap:
            pieces.append(optax.stateless(lambda u, p=None: jax.tree.map(level, u)))
        return optax.chain(*pieces, optax.scale_by_learning_rate(schedule))

    with mock.patch.dict(peers.PEERS, soap=peer):
        cell = protocol.Cell("test", rate, CHOSEN[size][1], seed)
        return trainer_of(workload, variant).run("soap β=0.8", size, cell)


def by_curvature(workload, variant, seed):
    auto, given = nlcg_optax.nlcg_auto, BY_CURVATURE[variant]()

    def with_it(*args, preconditioner=None, **options):
        return auto(*args, preconditioner=given, **options)

    with mock.patch.object(nlcg_optax, "nlcg_auto", with_it):
        cell = protocol.Cell("test", 1.0, "cosine, warm-up 10%", seed)
        return trainer_of(workload, variant).run("nlcg by curvature", 1797, cell)


def trainer_of(workload, variant, known={}):  # noqa: B006 - one is kept
    if known.get("variant") != variant:
        known.update(variant=variant, trainer=sweep.Trainer(workload))
    return known["trainer"]


def losses(rows, **wanted):
    found = [r for r in rows if all(r.get(k) == v for k, v in wanted.items())]
    return {r["seed"]: r["loss"] for r in found}


def chosen_rate(rows, variant, size):
    """The rate of the lowest loss of seed 100, and whether another is to be tried."""
    of = {
        r["learning_rate"]: r["loss"]
        for r in rows
        if (r["variant"], r["batch_size"], r["seed"]) == (variant, size, 100)
    }
    best = min(of, key=lambda rate: of[rate])
    return best, best / 2 if best == min(of) and len(of) < 9 else None


def run(rows):
    workload = WORKLOADS["autoencoder"](None)

    def add(row, variant):
        row = {"variant": variant, **row}
        rows.append(row)
        protocol.append(RESULTS, row)
        print(variant, row["batch_size"], row["learning_rate"], row["loss"], flush=True)

    for variant in BY_CURVATURE:
        for seed in protocol.TEST_SEEDS:
            if seed not in losses(rows, variant=variant, batch_size=1797):
                add(by_curvature(workload, variant, seed), variant)
    for size, (rate, _) in CHOSEN.items():
        for variant in BY_RATE:
            todo = [rate * factor for factor in FACTORS]
            while todo:
                one = todo.pop(0)
                wanted = {"variant": variant, "batch_size": size, "learning_rate": one}
                if 100 not in losses(rows, **wanted):
                    add(by_rate(workload, variant, size, one, 100), variant)
                if not todo:
                    best, more = chosen_rate(rows, variant, size)
                    todo = [more] if more else []
            for seed in protocol.TEST_SEEDS:
                wanted = {"variant": variant, "batch_size": size, "learning_rate": best}
                if seed not in losses(rows, **wanted):
                    add(by_rate(workload, variant, size, best, seed), variant)


def report(rows):
    def cell(found):
        if len(found) < 2:
            return "–"
        error = statistics.stdev(found) / len(found) ** 0.5
        return f"{statistics.mean(found):.3f} ± {error:.3f}"

    lines = ["| by a tuned rate | 128 | 512 |", "|---|---:|---:|"]
    for variant in BY_RATE:
        cells = []
        for size in CHOSEN:
            rate = chosen_rate(rows, variant, size)[0]
            of = losses(rows, variant=variant, batch_size=size, learning_rate=rate)
            cells.append(cell([of[s] for s in protocol.TEST_SEEDS if s in of]))
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    lines += ["", "| by curvature | all data |", "|---|---:|"]
    for variant in BY_CURVATURE:
        of = losses(rows, variant=variant, batch_size=1797)
        lines.append(f"| {variant} | {cell(list(of.values()))} |")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="of all rows")
    args = parser.parse_args()
    rows = protocol.read(RESULTS)
    if not args.report:
        run(rows)
    report(rows)


if __name__ == "__main__":
    main()

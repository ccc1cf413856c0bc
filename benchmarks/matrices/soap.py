"""Which SOAP? Variants on the small autoencoder, by a tuned rate and by curvature.

    taskset -c 1 python benchmarks/matrices/soap.py            # runs what is missing
    python benchmarks/matrices/soap.py --report                # the table
    taskset -c 1 python benchmarks/matrices/soap.py --stability    # 10,000 steps
    taskset -c 1 python benchmarks/matrices/soap.py --renewals     # beside QR, the time

By a rate: batches of 128 and 512, with the average of 0.8 and the schedule that the
sweep of `benchmarks/large_batch` chose for SOAP; of half, once and twice its rate (and
factors of two beyond, where the best is at the edge) seed 100 chooses one, seeds 0 to 2
are reported. By curvature: all data, with nothing tuned. A run is a line of
`results/soap.jsonl`; what is there is not run again, so that with `--minutes=4` the
same command goes on.
"""

import argparse
import functools
import itertools
import math
import pathlib
import statistics
import sys
import time
from typing import Any, NamedTuple
from unittest import mock

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "large_batch"))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
import peers  # noqa: E402
import protocol  # noqa: E402
import sweep  # noqa: E402
from workloads import WORKLOADS  # noqa: E402

import nlcg_optax  # noqa: E402
from nlcg_optax.matrices import eigenbasis  # noqa: E402
from nlcg_optax.preconditioners.soap import Factors  # noqa: E402

RESULTS = HERE / "results" / "soap.jsonl"
CHOSEN = {
    128: (0.032, "cosine, no warm-up"),
    512: (0.064, "cosine, warm-up 10%"),
}
FACTORS = (0.5, 1.0, 2.0)
MOST_RATES = 9


def soap(b1=0.8, **options):
    return nlcg_optax.scale_by_soap(
        b1, matrices=nlcg_optax.matrices.last_axis, **options
    )


def orthogonalization():
    return nlcg_optax.scale_by_orthogonalization(matrices=nlcg_optax.matrices.last_axis)


def orthogonalized(b1):
    return optax.chain(soap(b1), orthogonalization())


def average_alone(b1):
    """What is left of `orthogonalized` without SOAP's basis."""
    return optax.chain(optax.ema(b1), orthogonalization())


def with_rounded_state(tx, but=()):
    """What is kept for matrices, rounded to bfloat16 after each step, but these."""

    def rounded(node):
        if not isinstance(node, Factors):
            return node
        found = {
            name: jax.lax.reduce_precision(x, 8, 7)
            for name, x in node._asdict().items()
            if x is not None and jnp.issubdtype(x.dtype, jnp.floating)
        }
        return node._replace(**{k: x for k, x in found.items() if k not in but})

    def update(updates, state, params=None):
        updates, state = tx.update(updates, state, params)
        return updates, jax.tree.map(
            rounded, state, is_leaf=lambda x: isinstance(x, Factors)
        )

    return optax.GradientTransformation(tx.init, update)


class Sides(NamedTuple):
    """Of a matrix for :func:`kl_soap`, both sides as a pair."""

    averages: Any
    bases: Any
    second_moment: Any
    mean: Any


def kl_soap(b1, b2=0.95, eps=1e-8, weighted=True):
    """SOAP with KL-Shampoo's averages (arXiv:2509.03378), float32, on one device.

    The average of a side weighs the gradient by the inverse of the other side's: L of
    G R^-1 G^T and R of G^T L^-1 G, each over the length of the other side. The inverse
    is that of the diagonal in the basis, to which a ten-thousandth of its mean is
    added. Without the weights it is `scale_by_soap`.
    """

    def product(*xs):
        return functools.reduce(functools.partial(jnp.matmul, precision="highest"), xs)

    def average(decay, old, new):
        return decay * old + (1 - decay) * new

    def init_one(x):
        identities = tuple(jnp.eye(n, dtype=x.dtype) for n in x.shape)
        return Sides(
            tuple(map(jnp.zeros_like, identities)),
            identities,
            jnp.zeros_like(x),
            jnp.zeros_like(x),
        )

    def gram(x, other, basis, first):
        """G W G^T for the weights W of G's columns, over their number."""
        if not weighted:
            return product(x, x.T)
        sizes = jnp.einsum("ij,ik,kj->j", basis, other, basis, precision="highest")
        sizes += 1e-4 * jnp.mean(sizes)
        sizes = jnp.where(first | (sizes == 0), 1, sizes)
        x = product(x, basis) / jnp.sqrt(sizes)
        return product(x, x.T) / x.shape[1]

    def update_one(x, kept, count):
        first, (left, right) = count == 0, kept.bases

        def follow(old, new):
            return jnp.where(first, new, average(b2, old, new))

        columns = follow(
            kept.averages[1], gram(x.T, kept.averages[0], kept.bases[0], first)
        )
        # The second sees the first as it is now, which has something where x has.
        rows = gram(x, columns, kept.bases[1], first)
        if weighted:  # of the first gradient alone both would have its scale
            level = jnp.trace(columns) / columns.shape[0]
            rows = jnp.where(first, rows / jnp.where(level > 0, level, 1), rows)
        averages = follow(kept.averages[0], rows), columns
        bases = tuple(
            eigenbasis.renew(a, q)[0] for a, q in zip(averages, kept.bases, strict=True)
        )
        turn = jnp.where(first, bases[0], left), jnp.where(first, bases[1], right)
        inside = product(turn[0].T, x, turn[1])
        moment = average(b2, kept.second_moment, inside**2)
        moment = jnp.where(first, 0, moment)
        mean = jnp.where(first, 0, average(b1, kept.mean, x))
        number = jnp.maximum(count, 1).astype(x.dtype)
        used = jnp.where(first, inside**2, moment / (1 - b2**number))
        inside = jnp.where(
            first, inside, product(left.T, mean, right) / (1 - b1**number)
        )
        root = jnp.sqrt(used)
        root += eps + 64 * jnp.finfo(x.dtype).eps * jnp.sqrt(jnp.mean(used))
        z = 0.2 * product(turn[0], inside / root, turn[1].T)
        return z, Sides(averages, bases, moment, mean)

    def init(params):
        return jnp.int32(0), jax.tree.map(init_one, params)

    def update(updates, state, params=None):
        count, kept = state
        leaves, structure = jax.tree.flatten(updates)
        done = [
            update_one(x, one, count)
            for x, one in zip(leaves, structure.flatten_up_to(kept), strict=True)
        ]
        updates, kept = (
            jax.tree.unflatten(structure, x) for x in zip(*done, strict=True)
        )
        return updates, (count + 1, kept)

    matrices = optax.GradientTransformation(init, update)
    return optax.partition(
        {True: matrices, False: soap(b1, b2=b2, eps=eps)},
        lambda params: jax.tree.map(lambda x: x.ndim == 2, params),
    )


def level(u):
    """All leaves of one scale, as SOAP has them."""
    return 5 * u if u.ndim > 1 else u


BASES = ("left_basis", "right_basis")
BY_RATE = {
    "`scale_by_soap`": soap,
    "KL-Shampoo's averages": kl_soap,
    "orthogonalized after it": orthogonalized,
    "orthogonalization": average_alone,
    "a basis for sides up to 64 alone": lambda b1: soap(b1, max_side=64),
    "no basis (Adam's scaling)": lambda b1: soap(b1, max_side=0),
    "`every=10`": lambda b1: soap(b1, every=10),
    '`precision="bfloat16"`': lambda b1: soap(b1, precision="bfloat16"),
    "`linear=True`": lambda b1: soap(b1, linear=True),
}
BY_CURVATURE = {
    "orthogonalization": lambda: "orthogonalization",
    "`scale_by_soap`": lambda: soap(0.0),
    "KL-Shampoo's averages": lambda: kl_soap(0.0),
    "orthogonalized after it": lambda: orthogonalized(0.0),
    "orthogonalization and `scale_by_soap`": lambda: ["orthogonalization", soap(0.0)],
    "a basis for sides up to 64 alone": lambda: soap(0.0, max_side=64),
    "no basis (Adam's scaling)": lambda: soap(0.0, max_side=0),
    "`linear=True`": lambda: soap(0.0, linear=True),
    "state in bfloat16": lambda: with_rounded_state(soap(0.0)),
    "state in bfloat16 but for the bases": lambda: with_rounded_state(soap(0.0), BASES),
}


def by_rate(workload, variant, size, rate, seed):
    make = BY_RATE[variant]

    def peer(schedule, b1):
        return optax.chain(
            make(b1),
            optax.stateless(lambda u, p=None: jax.tree.map(level, u)),
            optax.scale_by_learning_rate(schedule),
        )

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
        r["learning_rate"]: r["loss"] if r["loss"] is not None else math.inf
        for r in rows
        if (r["variant"], r["batch_size"], r["seed"]) == (variant, size, 100)
    }
    if not of:
        return None, None
    best = min(of, key=lambda rate: of[rate])
    if len(of) >= MOST_RATES or min(of) < best < max(of):
        return best, None
    return best, best / 2 if best == min(of) else 2 * best


def run(rows, minutes):
    """Runs what is missing, and starts nothing after so many minutes."""
    workload, start = WORKLOADS["autoencoder"](None), time.monotonic()

    def add(row, variant):
        row = {"variant": variant, **row()}
        rows.append(row)
        protocol.append(RESULTS, row)
        print(variant, row["batch_size"], row["learning_rate"], row["loss"], flush=True)

    for variant, row in missing(rows, workload):
        if time.monotonic() - start > 60 * minutes:
            sys.exit("Time is up; the same command goes on.")
        add(row, variant)


def missing(rows, workload):
    """The variants and functions of runs that are to come, one after the other."""
    for variant in BY_CURVATURE:
        for seed in protocol.TEST_SEEDS:
            if seed not in losses(rows, variant=variant, batch_size=1797):
                yield variant, functools.partial(by_curvature, workload, variant, seed)
    for variant, (size, (rate, _)) in itertools.product(BY_RATE, CHOSEN.items()):

        def of_rate(rate, seeds, variant=variant, size=size):
            wanted = {"variant": variant, "batch_size": size, "learning_rate": rate}
            for seed in seeds:
                if seed not in losses(rows, **wanted):
                    run = functools.partial(by_rate, workload, variant, size)
                    yield variant, functools.partial(run, rate, seed)

        for factor in FACTORS:
            yield from of_rate(rate * factor, protocol.TUNING_SEEDS)
        best, more = chosen_rate(rows, variant, size)
        while more:
            yield from of_rate(more, protocol.TUNING_SEEDS)
            best, more = chosen_rate(rows, variant, size)
        yield from of_rate(best, protocol.TEST_SEEDS)


def report(rows):
    def cell(found):
        if None in found:
            return "diverges"
        if len(found) < 2:
            return "–"
        error = statistics.stdev(found) / len(found) ** 0.5
        return f"{statistics.mean(found):.3f} ± {error:.3f}"

    def by_its_rate(variant, size):
        rate = chosen_rate(rows, variant, size)[0]
        of = losses(rows, variant=variant, batch_size=size, learning_rate=rate)
        found = [of[s] for s in protocol.TEST_SEEDS if s in of]
        return cell(found) + (f" ({rate:g})" if len(found) > 1 else "")

    print("| | by curvature, all data | 128 (rate) | 512 (rate) |")
    print("|---|---:|---:|---:|")
    for variant in {**BY_CURVATURE, **BY_RATE}:
        of = losses(rows, variant=variant, batch_size=1797)
        cells = [cell(list(of.values()))]
        cells += [by_its_rate(variant, size) for size in CHOSEN]
        if any(text != "–" for text in cells):
            print(f"| {variant} | {' | '.join(cells)} |")


def stability():
    """How orthogonal bases are, and how large updates were, in 10,000 steps."""
    scale = jnp.geomspace(1, 1e-6, 96, dtype=jnp.float32)
    for name, tx in (
        ("float32", soap(0.0)),
        ("products in bfloat16", soap(0.0, precision="bfloat16")),
        ("state in bfloat16", with_rounded_state(soap(0.0))),
        ("state in bfloat16 but for the bases", with_rounded_state(soap(0.0), BASES)),
    ):

        def one(state, key, tx=tx):
            g = jax.random.normal(key, (64, 96)) * scale
            z, state = tx.update(g, state)
            return state, jnp.stack([jnp.max(jnp.abs(z)), jnp.sqrt(jnp.mean(z * z))])

        keys = jax.random.split(jax.random.key(0), 10_000)
        run = jax.jit(functools.partial(jax.lax.scan, one))
        state, sizes = run(tx.init(jnp.zeros((64, 96))), keys)
        nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Factors))
        (node,) = (x for x in nodes if isinstance(x, Factors))
        bases = [basis[0, 0, 0] for basis in (node.left_basis, node.right_basis)]
        off = max(float(jnp.max(jnp.abs(q.T @ q - jnp.eye(len(q))))) for q in bases)
        print(
            f"{name}: bases orthogonal to {off:.1e}, largest element "
            f"{float(jnp.max(sizes[:, 0])):.2f}, root mean square of the last tenth "
            f"{float(jnp.mean(sizes[-1000:, 1])):.3f}, "
            f"{int(jnp.sum(node.fallbacks))} fallbacks"
        )


def renewals(rounds=5):
    """Milliseconds of a step of orthogonal iteration, here and by Householder's QR."""

    def by_qr(matrix, basis):
        return jnp.linalg.qr(jnp.matmul(matrix, basis, precision="highest"))[0]

    for count, n in ((16, 64), (4, 256), (1, 1024)):
        x = jax.random.normal(jax.random.key(0), (count, n, 2 * n))
        matrix = jnp.matmul(x, x.mT) / n
        basis = jnp.broadcast_to(jnp.eye(n), matrix.shape)
        told = []
        for renew in (lambda a, q: eigenbasis.renew(a, q)[0], by_qr):
            run, seconds = jax.jit(renew), []
            for _ in range(rounds + 1):
                start = time.perf_counter()
                jax.block_until_ready(run(matrix, basis))
                seconds.append(time.perf_counter() - start)
            told.append(1e3 * statistics.median(seconds[1:]))
        print(f"{count} of {n}: {told[0]:.1f} ms, by QR {told[1]:.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="of all rows")
    parser.add_argument("--stability", action="store_true", help="of the state alone")
    parser.add_argument("--renewals", action="store_true", help="their time alone")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no more")
    args = parser.parse_args()
    if args.stability:
        return stability()
    if args.renewals:
        return renewals()
    rows = protocol.read(RESULTS)
    if not args.report:
        run(rows, args.minutes)
    report(rows)


if __name__ == "__main__":
    main()

"""Does it train as well? cifar10_jpeg, batch 5,000, by coefficients and precision.

    taskset -c 1 python benchmarks/matrices/training.py --data_dir=DIR

With the protocol of `benchmarks/large_batch` and the rate and the schedule that its
sweep chose for `nlcg` with Muon's coefficients; its rows of the test phase are the
baseline. A run is a line of `results/training.jsonl`; what is there is not run again.
"""

import argparse
import functools
import pathlib
import sys
from unittest import mock

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "large_batch"))

import protocol  # noqa: E402
import sweep  # noqa: E402
from workloads import WORKLOADS  # noqa: E402

import nlcg_optax  # noqa: E402

RESULTS = HERE / "results" / "training.jsonl"
VARIANTS = {
    "Muon's": {},
    "Muon's, bfloat16": {"precision": "bfloat16"},
    "Muon's, float16": {"precision": "float16"},
    "Polar Express": {"coefficients": "polar_express"},
    "Polar Express, float16": {
        "coefficients": "polar_express",
        "precision": "float16",
    },
    "Polar Express, 7 steps": {"coefficients": "polar_express", "iterations": 7},
    "Polar Express, 4 steps": {"coefficients": "polar_express", "iterations": 4},
}
RATE, SCHEDULE = 0.04, "cosine, warm-up 10%"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, help="cifar10_jpeg, extracted")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS))
    parser.add_argument("--rates", nargs="*", type=float, default=[RATE])
    args = parser.parse_args()
    rows = protocol.read(RESULTS)
    done = {(row["variant"], row["learning_rate"], row["seed"]) for row in rows}
    workload = WORKLOADS["cifar10_jpeg"](args.data_dir)
    make = nlcg_optax.scale_by_orthogonalization
    for variant in args.variants:
        varied = functools.partial(make, **VARIANTS[variant])
        with mock.patch.object(nlcg_optax, "scale_by_orthogonalization", varied):
            trainer = sweep.Trainer(workload)
            for rate in args.rates:
                for seed in protocol.TEST_SEEDS:
                    if (variant, rate, seed) in done:
                        continue
                    cell = protocol.Cell("test", rate, SCHEDULE, seed)
                    row = {"variant": variant, **trainer.run("nlcg", 5000, cell)}
                    row |= protocol.environment()
                    protocol.append(RESULTS, row)
                    print(variant, rate, seed, row["accuracy"], row["loss"], flush=True)


if __name__ == "__main__":
    main()

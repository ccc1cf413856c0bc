"""What a step pays for the judgement of the last one, beside the same step without it.

Times are the processor's own, and paired: the two compiled programs take turns, and the
result is the median of the ratios. What XLA counts of both is written beside it.
"""

import argparse
import pathlib
import statistics
import time
from unittest import mock

import jax
import jax.numpy as jnp
import optax

import nlcg_optax
from nlcg_optax.curvature import trust

RESULT = pathlib.Path(__file__).parent / "results" / "judgement.md"
WIDTHS, BATCH = (784, 512, 512, 10), 512


def model(params, x):
    for w in params[:-1]:
        x = jax.nn.relu(x @ w)
    return x @ params[-1]


def problem():
    keys = jax.random.split(jax.random.key(0), len(WIDTHS) + 1)
    shapes = zip(WIDTHS[:-1], WIDTHS[1:], strict=True)
    params = [
        jax.random.normal(key, shape) * (2 / shape[0]) ** 0.5
        for key, shape in zip(keys, shapes, strict=False)
    ]
    x = jax.random.normal(keys[-2], (BATCH, WIDTHS[0]))
    return params, {"x": x, "y": jax.random.randint(keys[-1], (BATCH,), 0, WIDTHS[-1])}


def unjudged():
    """What the step is without a judgement, in the place of each function of it."""

    def judge(loss, finite, last, trusted, damping, count):
        del finite, last, damping, count
        no = jnp.zeros([], bool)
        return trust.Verdict(no, jnp.ones_like(loss), no, no, trusted)

    def lacks_curvature(slope, curved, square, usual, *args):
        del slope, curved, square, args
        return jnp.zeros([], bool), usual

    return mock.patch.multiple(
        trust,
        judge=judge,
        lacks_curvature=lacks_curvature,
        told=lambda trusted, *args: trusted,
        mismatch=lambda *args: jnp.zeros([], bool),
    )


def compiled(preconditioner):
    params, batch = problem()
    tx = nlcg_optax.nlcg_auto(preconditioner=preconditioner)
    evaluate = nlcg_optax.value_grad_and_curvature(
        lambda params, batch: model(params, batch["x"]),
        lambda y, batch: jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(y, batch["y"])
        ),
    )

    def step(params, state):
        loss, grads, curvature = evaluate(params, batch)
        given = {"value": loss, "curvature": curvature}
        updates, state = tx.update(grads, state, params, **given)
        return optax.apply_updates(params, updates), state

    args = (params, tx.init(params))
    return jax.jit(step).lower(*args).compile(), args


def measure(preconditioner, rounds):
    """A row of the table."""
    judged, args = compiled(preconditioner)
    with unjudged():
        plain, _ = compiled(preconditioner)

    def seconds(program):
        start = time.process_time()
        jax.block_until_ready(program(*args))
        return time.process_time() - start

    ratios, times = [], []
    for i in range(rounds + 1):
        order = (judged, plain) if i % 2 else (plain, judged)
        took = {program: seconds(program) for program in order}
        if i:  # the first is a warm-up
            ratios.append(took[judged] / took[plain])
            times.append(took[judged])
    counts = [program.cost_analysis() for program in (judged, plain)]
    more = [
        100 * (counts[0][name] / counts[1][name] - 1)
        for name in ("flops", "bytes accessed")
    ]
    error = statistics.stdev(ratios) / rounds**0.5
    return (
        f"| `{preconditioner}` | {rounds} | {1e3 * statistics.median(times):.0f} | "
        f"{100 * (statistics.median(ratios) - 1):+.2f} ± {100 * error:.2f} | "
        f"{more[0]:+.3f} | {more[1]:+.3f} |"
    )


def main():
    """Writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    rounds = parser.parse_args().rounds
    rows = [measure(None, rounds), measure("orthogonalization", rounds // 5)]
    widths = " × ".join(map(str, WIDTHS))
    text = f"""One step of `nlcg_auto` with it against one without, on a perceptron of
{widths} with a batch of {BATCH}; paired rounds, the processor's own time,
jax {jax.__version__}, one CPU core. By
`taskset -c 1 python benchmarks/update_cost/judgement.py --rounds={rounds}`.

| preconditioner | rounds | step, ms | time, % | operations, % | bytes, % |
|---|---|---|---|---|---|
{chr(10).join(rows)}
"""
    RESULT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()

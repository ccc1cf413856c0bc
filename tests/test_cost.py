"""What a step costs, as far as the compiled program tells, and the options that save.

Times are measured in `benchmarks/update_cost`, never here.
"""

import math

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracle import Oracle
from problems import NonConvex, paper, record, relative_errors, replay

from nlcg_optax import nlcg, nlcg_paper, scale_by_noise_balance
from nlcg_optax._xla import after, compute_once, decide_once

SIZE = 1 << 18
RMS = optax.scale_by_rms()


def written(value):
    """A test's name: the same in every process, where `RMS` has an address."""
    return repr(value).replace(repr(RMS), "RMS")


def read(tx, shapes):
    """What is read off the jitted, donated step of an optimizer, and its text."""
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    state = jax.eval_shape(tx.init, params)
    loss = jax.ShapeDtypeStruct((), jnp.float32)

    def step(params, state, grads, loss):
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params, loss)
    program = lowered.compile()
    return compiled.read(program), program.as_text()


@pytest.mark.parametrize(
    ("options", "arrays", "bfloat16_bytes"),
    [
        # The step rule's last input is one of them.
        ({}, 5, 4 + 4 + 2 + 2 + 2),
        ({"step_rule": None}, 4, 4 + 4 + 2 + 2),
        ({"beta_rule": "polak_ribiere"}, 6, 4 + 4 + 2 + 2 + 2 + 2),
        ({"preconditioner": RMS}, 3, 4 + 2 + 2),
        ({"preconditioner": None}, 2, 4),
        ({"preconditioner": None, "beta_rule": "hager_zhang"}, 4, 8),
    ],
    ids=written,
)
def test_arrays_kept(options, arrays, bfloat16_bytes):
    params = jax.ShapeDtypeStruct((SIZE,), jnp.float32)
    state = jax.eval_shape(nlcg_paper(0.1, **options).init, params)
    kept = [x for x in jax.tree.leaves(state) if x.shape == (SIZE,)]
    assert len(kept) == arrays
    tx = nlcg_paper(0.1, state_dtype=jnp.bfloat16, **options)
    kept = [x for x in jax.tree.leaves(jax.eval_shape(tx.init, params)) if x.ndim]
    assert sum(x.size * x.dtype.itemsize for x in kept) == bfloat16_bytes * SIZE


def test_the_default_keeps_the_direction_and_what_was_made_of_it():
    shapes = {"kernel": (64, 32), "bias": (32,)}
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    kept = [x.shape for x in jax.tree.leaves(jax.eval_shape(nlcg(0.1).init, params))]
    assert kept.count((64, 32)) == 2
    assert kept.count((32,)) == 3  # and the second moment of what is no matrix
    assert sum(shape == () for shape in kept) == len(kept) - 5


@pytest.mark.parametrize(
    ("options", "sums"),
    [
        # yᵀs, sᵀBs, gᵀz; the cosine takes gᵀd, gᵀg, zᵀz, zᵀd and dᵀd.
        ({}, 8),
        ({"track_cosine": False}, 3),
        ({"track_cosine": False, "restart_on_ascent": True}, 4),
        ({"track_cosine": False, "beta_rule": "dai_yuan"}, 4),
        ({"track_cosine": False, "beta_rule": "polak_ribiere"}, 4),
        ({"track_cosine": False, "beta_rule": "hager_zhang"}, 6),
        ({"track_cosine": False, "preconditioner": RMS}, 1),
    ],
    ids=written,
)
def test_only_the_inner_products_that_are_needed(options, sums):
    tx = paper(0.1, **options)
    x = jax.ShapeDtypeStruct((SIZE,), jnp.float32)
    state = jax.eval_shape(tx.init, x)
    program = jax.jit(tx.update).lower(x, state, x, value=1.0).as_text()
    reductions = f"(tensor<{SIZE}xf32>, tensor<f32>) -> tensor<f32>"
    # The rest are maxima, one of each vector.
    sizes = program.count("applies stablehlo.maximum across")
    assert program.count(reductions) - sizes == sums


# Bytes accessed in sizes of the leaf, of which a third is for the scale of the inner
# products; and the largest magnitude, by which they are scaled, is read before them.
BOUNDS = [
    ({}, 64, 5),
    ({"track_cosine": False, "step_rule": None}, 50, 5),
]


@pytest.mark.parametrize(("options", "accesses", "temporaries"), BOUNDS, ids=written)
def test_bytes_of_the_compiled_program(options, accesses, temporaries):
    if jax.default_backend() != "cpu":
        pytest.skip("XLA's fusions, and its estimates, are another backend's")
    if jax.__version_info__ < (0, 10):
        pytest.skip("XLA fused otherwise before: 28 accesses where it is 23 now")
    program, _ = read(paper(0.1, **options), [(SIZE,)])
    assert program.bytes_accessed <= accesses * 4 * SIZE
    # Nothing is copied before it is overwritten (but by the step rule, which takes back
    # part of a direction that the new one replaces).
    assert program.temporary_bytes < (temporaries + 0.1) * 4 * SIZE


def test_the_program_grows_with_the_leaves_and_not_with_their_square():
    tx = paper(0.1, track_cosine=False)
    few, many = (
        read(tx, [(8 + i,) for i in range(n)])[1].count(" add(") for n in (5, 20)
    )
    # Before, the sum over the leaves was in the kernels of every leaf.
    assert few > 20
    assert many < 4.5 * few


def test_the_balance_decides_once_for_all_leaves():
    tx = scale_by_noise_balance(100)

    def comparisons(leaves):
        x = [jnp.ones(8 + i) for i in range(leaves)]

        def value(x):
            return jnp.sum(x[0])

        def step(x, state):
            return tx.update(x, state, x, value=value(x), value_fn=value)

        program = jax.jit(step).lower(x, tx.init(x)).compile()
        return program.as_text().count(" compare(")

    # Three for a leaf; ten where each finds out by itself whether a step is taken.
    assert comparisons(12) - comparisons(2) <= 10 * 6


@pytest.mark.parametrize("options", [options for options, *_ in BOUNDS], ids=written)
def test_one_program_and_nothing_from_the_host(options):
    tx = paper(optax.linear_schedule(0.1, 0.0, 10), **options)
    traces = []

    @jax.jit
    def step(params, state, loss):
        traces.append(1)
        updates, state = tx.update(params, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    params, loss = jnp.arange(4.0), jnp.float32(1)
    state = tx.init(params)
    with jax.transfer_guard("disallow"):
        for _ in range(4):
            params, state = step(params, state, loss)
    assert len(traces) == 1


# --- The options --------------------------------------------------------------------


def check(options, oracle, losses=None, steps=30):
    """`nlcg` with the options replays what the oracle does without them."""
    seen = record(oracle, NonConvex(0), steps)
    rows = replay(
        options,
        np.full(steps, 0.1),
        seen["params"],
        seen["gradient"],
        seen["loss"] if losses is None else losses,
        jit=False,
    )
    for name, values in rows.items():
        if values[0] is not None:
            assert np.max(relative_errors(values, seen[name])) <= 1e-8, name
    return rows


def test_without_the_cosine_the_updates_are_the_same(x64):
    for rule in ("fletcher_reeves", "dai_yuan", "hager_zhang"):
        check({"beta_rule": rule, "track_cosine": False}, Oracle(beta_rule=rule))


# --- What tells XLA the order -------------------------------------------------------


def test_the_order_changes_no_value():
    x = jnp.array([1.0, -0.0, math.nan, math.inf, -math.inf])
    np.testing.assert_array_equal(jax.jit(after)(False, x, 7 * x, jnp.ones(5)), x)
    for value in x:
        once = jax.jit(compute_once)(value)
        np.testing.assert_array_equal(once, value)
        assert np.signbit(once) == np.signbit(value)
    for condition in (True, False):
        assert jax.jit(decide_once)(jnp.asarray(condition)) == condition

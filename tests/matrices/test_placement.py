"""Orthogonalization on eight devices: the numbers of one, and what is sent."""

import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from nlcg_optax.matrices.layout import Leaf, Slots, Stack, group
from nlcg_optax.matrices.matrix import Matrix
from nlcg_optax.matrices.newton_schulz import Method, coefficients_of
from nlcg_optax.matrices.plan import choose, divide, join
from nlcg_optax.preconditioners.orthogonalization import work_of

# One process measures for all the tests of a group, which xdist leaves together.
pytestmark = pytest.mark.xdist_group("placement")

WORKER = pathlib.Path(__file__).parents[1] / "workers" / "placement.py"


@pytest.fixture(scope="module")
def printed(run_on_devices):
    return json.loads(run_on_devices(WORKER, 8).stdout)


@pytest.fixture(scope="module")
def found(printed):
    return printed["cases"]


def test_the_numbers_are_those_of_one_device(found):
    assert len(found) == 34
    worst = max(found, key=lambda case: found[case]["difference"])
    assert found[worst]["difference"] < 1e-12, worst


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        # Two of each: (8, 24) with its transpose, the convolutions, the embedding. Both
        # shapes of the first kind are sharded along another axis of the same matrix.
        ("shard_map, last", {"all-to-all": 8}),
        ("unchecked", {"all-to-all": 8}),
        # The embedding stays: its Gram matrix is added up, and its largest element.
        ("shard_map, first", {"all-to-all": 4, "all-reduce": 2}),
        ("shard_map, replicated", {"all-reduce": 1}),
        ("shard_map, layers, inside", {"all-to-all": 4}),
        ("shard_map, single", {"all-reduce": 2}),
        ("set, single", {"all-reduce": 2}),
        # Nothing moves where layers lie on their devices, or there is no matrix.
        *[(f"{door}, layers, layers", {}) for door in ("set", "shard_map")],
        *[(f"{door}, none", {}) for door in ("set", "shard_map")],
    ],
)
def test_collectives_are_those_of_the_shapes(found, case, expected):
    assert found[case]["collectives"] == expected


def test_replicated_parameters_cost_one_gather_of_a_stack(found):
    # Three stacks; beside them the embedding's two sums.
    for door in ("set", "explicit"):
        collectives = found[f"{door}, replicated"]["collectives"]
        assert collectives == {"all-gather": 3, "all-reduce": 2}


def test_matrices_without_work_are_not_sent_to_one_device(found):
    # Small ones are gathered as stacks where they are sharded, and stay there.
    assert found["shard_map, counted"]["collectives"].get("all-to-all", 0) == 0


def test_another_work_has_the_numbers_of_one_device_and_its_state_stays(printed):
    # Norms of matrices, averaged over the steps; not orthogonalization.
    found = printed["another"]
    assert len(found) == 6
    for case in found.values():
        assert case["difference"] < 1e-12
        # Matrices are sent, and what is kept for them is not.
        assert case["collectives"] == case["without state"] != {}


def test_nlcg_needs_no_other_preconditioner_over_sharded_parameters(printed):
    assert printed["nlcg"] < 1e-11


def test_parameters_that_lie_elsewhere_are_refused(printed):
    words = printed["refused"]
    assert "'['layer']['w']' of shape (4, 6)" in words
    assert "5" in words and "(2 devices) does not have" in words


def test_matrices_of_nearly_one_side_share_an_iteration():
    work = work_of(Method(coefficients_of("muon", 5)))

    def joined(*shapes, dtypes=(jnp.float32, jnp.float32)):
        leaves = [
            Leaf(jax.ShapeDtypeStruct(shape, dtype), Matrix((0,), (1,)))
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        bundles = join(group(leaves), leaves, lambda b: divide(b, 8, work)[0])
        return [[one.stack.small for one in bundle] for bundle in bundles]

    # Of ResNet-50 the classifier and one convolution.
    assert joined((2048, 1000), (1024, 2048)) == [[1000, 1024]]
    assert joined((2048, 700), (1024, 2048)) == [[700], [1024]]
    other = jnp.float32, jnp.bfloat16
    assert joined((2048, 1000), (1024, 2048), dtypes=other) == [[1000], [1024]]


def test_as_few_slots_as_can_be():
    slots = Slots.fit([10, 3, 8, 5], 8)
    assert slots.full == (1, 0, 1, 0)
    # The rests of 2, 3 and 5 matrices: the first two share a row, with the last none.
    assert slots.row == (0, 0, None, 1)
    assert slots.offset == (0, 2, 0, 0)
    assert slots.rows == 4


def test_the_choice_follows_the_count():
    work = work_of(Method(coefficients_of("muon", 5)))
    small = [Stack(count=10, small=64, long=64)]
    assert choose(small, 8, work)[1] == ["each"]
    # The kernels of a transformer, and its embedding, of which there is one.
    large = [Stack(16, 768, 3072, sharded=True), Stack(1, 768, 50304, sharded=True)]
    assert choose(large, 8, work)[1] == ["spread", "split"]
    assert choose(large, 1, work)[1] == ["each", "each"]
    # Replicated matrices pay for a gather: only those that are worth it.
    for size, expected in ((64, "each"), (2048, "spread")):
        stack = Stack(32, size, size, sharded=False)
        assert choose([stack], 8, work)[1] == [expected]

"""On many devices, through each front door, the numbers are those of one.

And so is the communication: that of the gradient and the loss, and two small sums more
where parameters and state are sharded. All of it is measured by one process with eight
devices, whose findings the tests below judge.
"""

import json
import pathlib
import re

import pytest

# One process measures for all the tests of a group, which xdist leaves together.
pytestmark = pytest.mark.xdist_group("front_doors")

HERE = pathlib.Path(__file__).parent
EXAMPLES = HERE.parent / "examples"


@pytest.fixture(scope="module")
def found(run_on_devices):
    return json.loads(run_on_devices(HERE / "workers" / "front_doors.py", 8).stdout)


def worst(differences):
    return max(differences, key=differences.__getitem__)


def test_the_optimizer_alone_has_the_numbers_of_one_device(found):
    differences = {**found["optimizer_alone"], **found["two_axes"]}
    assert len(differences) == 30
    case = worst(differences)
    assert differences[case] < 1e-12, case


def test_a_constant_product_of_a_sharded_leaf_counts_on_every_device(found):
    assert found["constant_along_one_axis"] == {"total": 4 * (0 + 1 + 4 + 9)}


def test_the_helper_averages_what_is_not_averaged_yet(found):
    differences = found["helper"]
    assert len(differences) == 15
    case = worst(differences)
    assert differences[case] < 1e-12, case


def test_a_model_with_batch_norm_has_the_numbers_of_one_device(found):
    differences = found["models"]
    assert len(differences) == 13
    case = worst(differences)
    assert differences[case] < 1e-10, case


@pytest.mark.parametrize("what", ["inner products", "gradient", "loss"])
def test_a_lost_sum_is_noticed(found, what):
    assert found["lost_sums"][f"{what}, pmap"] > 1e-3
    # Where types are checked it does not even compile.
    assert "{V:data}" in found["lost_sums"][f"{what}, shard_map"] or (
        "varying" in found["lost_sums"][f"{what}, shard_map"]
    )


def test_a_lost_sum_of_the_optimizer_alone_is_noticed(found):
    assert found["lost_sums"]["optimizer alone, shard_map unchecked"] > 1e-3


@pytest.mark.parametrize("name", ["nlcg", "nlcg-orthogonalization"])
@pytest.mark.parametrize("door", ["jit", "shard_map", "pmap"])
def test_replicated_nlcg_communicates_as_sgd_does(found, door, name):
    communication = found["communication"]
    sgd, nlcg = (
        communication[f"step, {name}, {door}, replicated"] for name in ("sgd", name)
    )
    # Kernels, biases and the loss: 64·128 + 128 + 128·16 + 16 + 1, in one all-reduce.
    assert sgd == {"all-reduce": [1, 10385, 0]}
    assert nlcg == sgd


# Sums in an update with sharded state: their number, and the scalars of each leaf.
UPDATES = {
    ("nlcg", "jit"): (2, 8),
    ("nlcg", "shard_map"): (2, 8),
    ("nlcg-hager_zhang", "jit"): (2, 10),
    ("nlcg-hager_zhang", "shard_map"): (2, 10),
    ("nlcg-online-restarts", "jit"): (2, 8),
    ("nlcg-online-restarts", "shard_map"): (2, 8),
    ("nlcg-rms", "jit"): (1, 6),
    ("nlcg-rms", "shard_map"): (1, 6),
    ("lars-nlcg", "jit"): (4, 10),
    ("lars-nlcg", "shard_map"): (3, 12),
}


@pytest.mark.parametrize("name, door", UPDATES)
def test_sharded_update_communicates_a_few_scalars(found, name, door):
    update = found["communication"][f"update, {name}, {door}, sharded"]
    assert set(update) == {"all-reduce"}
    reductions, scalars = UPDATES[name, door]
    # By jit each of the two sharded leaves sends its own sums, together.
    if door == "jit":
        scalars *= 2
    count, elements, small = update["all-reduce"]
    assert count == small <= reductions
    assert elements <= scalars


@pytest.mark.parametrize(
    "door, added",
    [
        ("shard_map", [2, 8, 2]),
        # Two by jit, too; but XLA lets sᵀBs, which needs no gradient, travel with part
        # of the gradient's own all-reduce, which is then not combined with the rest.
        ("jit", [3, 16, 2]),
    ],
)
def test_sharded_nlcg_adds_two_sums_to_sgd(found, door, added):
    sgd, nlcg = (
        dict(found["communication"][f"step, {name}, {door}, sharded"])
        for name in ("sgd", "nlcg")
    )
    before, after = sgd.pop("all-reduce"), nlcg.pop("all-reduce")
    assert sgd == nlcg  # gathering the parameters, scattering the gradient
    assert sgd
    more = [b - a for a, b in zip(before, after, strict=True)]
    assert all(x <= y for x, y in zip(more, added, strict=True)), more


@pytest.fixture(scope="module")
def printed(run_on_devices):
    """A function that runs an example: the steps and losses it prints, by name."""

    def run(example, devices):
        out = run_on_devices(EXAMPLES / f"{example}.py", devices).stdout
        lines = re.findall(r"^(.*): step (\d+), loss ([\d.]+)$", out, re.MULTILINE)
        assert len(lines) == len(out.splitlines())
        losses = {}
        for name, step, loss in lines:
            losses.setdefault(name, []).append((int(step), float(loss)))
        return losses

    return run


@pytest.fixture(scope="module")
def one_device(printed):
    (losses,) = printed("mesh_jit", 1).values()
    assert losses[-1][0] == 40
    assert losses[-1][1] < 0.2 < losses[0][1]
    return losses


@pytest.mark.parametrize(
    "example, runs",
    [
        ("mesh_jit", ["jit"]),
        ("mesh_shard_map", ["replicated", "sharded"]),
        pytest.param("mesh_pmap", ["pmap"], marks=pytest.mark.long),
    ],
)
def test_examples_print_the_losses_of_one_device(printed, one_device, example, runs):
    losses = printed(example, 4)
    assert list(losses) == runs
    for found in losses.values():
        assert [step for step, _ in found] == [step for step, _ in one_device]
        for (_, loss), (_, expected) in zip(found, one_device, strict=True):
            assert loss == pytest.approx(expected, rel=1e-4)

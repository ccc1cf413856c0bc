"""Meshes: the same numbers on any number of devices, and little communication."""

import collections
import functools

import compiled
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlcg_optax.training import data, loop, models, optimizers, steps
from nlcg_optax.training.config import apply_overrides, base_config, typed
from nlcg_optax.training.data.sources import Subset
from nlcg_optax.training.mesh import (
    BatchLayout,
    create_mesh,
    put_replicated,
    state_shardings,
)
from nlcg_optax.training.run_config import ConfigError, MeshConfig

STEPS = 20
IMAGES = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), dtype=np.uint8)
IMAGES[:30, :, 4:] //= 2
LABELS = (np.arange(60) < 30).astype(np.int32)  # is the right half darker?
SPLIT = data.Split.from_arrays(IMAGES, LABELS)
DATASET = data.Dataset("noise", 2, ("a", "b"), (8, 8, 1), SPLIT, SPLIT)


class Net(nn.Module):
    """A ResNet's ingredients, in float64."""

    batch_norm: bool
    batch_norm_momentum: float = 0.99
    depth: int = 1

    @nn.compact
    def __call__(self, x, train, mask=None):
        mask = None if mask is None else mask[:, None, None, None]
        options = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        # Under BatchNorm a bias would have no gradient but rounding errors.
        x = nn.Conv(8, (3, 3), strides=2, use_bias=not self.batch_norm, **options)(x)
        if self.batch_norm:
            norm = nn.BatchNorm(not train, momentum=self.batch_norm_momentum, **options)
            x = norm(x, mask=mask)
        for _ in range(1, self.depth):
            x = nn.Conv(8, (3, 3), **options)(nn.tanh(x))
        x = nn.Dense(16, **options)(nn.tanh(x).reshape(len(x), -1))
        return nn.Dense(2, **options)(nn.tanh(x))


PAPER = ("optimizer.name=nlcg_paper", "optimizer.learning_rate=0.1")
# Without a preconditioner: orthogonalization would magnify rounding.
CURVED = (
    "optimizer.name=nlcg_auto",
    "optimizer.learning_rate=none",
    "schedule.name=none",
    "optimizer.nlcg_auto.preconditioner=none",
)
# Two of the five images that each of eight devices has.
SOME = (*CURVED, "optimizer.nlcg_auto.curvature_min_examples=13")


def build(data_axis, fsdp, *overrides, batch_norm=True, depth=1):
    config = base_config()
    apply_overrides(
        config,
        [
            "batch_size=40",
            "num_epochs=100",
            "optimizer.learning_rate=0.05",  # at 0.1 rounding grows a hundredfold more
            "schedule.name=constant",
            "dataset.crop_padding=1",
            "mesh.min_size_to_split=16",
            f"mesh.data={data_axis}",
            f"mesh.fsdp={fsdp}",
            *overrides,
        ],
    )
    config = typed(config)
    mesh = create_mesh(config.mesh, jax.devices()[: data_axis * fsdp])
    model = Net(batch_norm, depth=depth)
    schedule = optimizers.create_schedule(config, len(SPLIT) / config.batch_size)
    tx = optimizers.create_optimizer(config, schedule, models.l2_mask)
    state = steps.create_state(model, tx, config, (8, 8, 1), mesh)
    # In the dtype that a step returns them in: of another, it is compiled twice.
    statistics = jax.tree.map(lambda x: x.astype(jnp.float64), state.batch_stats)
    state = state.replace(batch_stats=statistics)
    return config, mesh, model, schedule, tx, state


@functools.cache
def train(*args, **options):
    config, mesh, model, schedule, tx, state = build(*args, **options)
    next_batch, step = loop.make_input(config, DATASET, model, tx, schedule, mesh, 0)
    with jax.transfer_guard("disallow"):
        for i in range(STEPS):
            state, metrics = step(state, next_batch(i))
    if config.mesh.fsdp > 1:
        split = [x for x in jax.tree.leaves(state) if not x.is_fully_replicated]
        whole = sum(x.nbytes for x in jax.tree.leaves(state))
        here = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
        # Of the parameters, and of at least one array of the optimizer like them.
        assert len(split) >= 2 * 4, len(split)
        assert here < 1.3 * whole / config.mesh.fsdp, (here, whole)
    evaluate = loop.make_evaluation(config, DATASET, model, mesh)
    return jax.device_get((state.params, state.batch_stats)), evaluate(state), metrics


def difference(a, b):
    return max(
        float(np.max(np.abs(x - y)) / np.max(np.abs(y)))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


EVEN, ODD, PARTS = (), ("batch_size=37",), ("microbatches=4",)
EXACT = ("microbatches=4", "batch_norm_statistics=batch")
CASES = {
    # name: whether there is BatchNorm, config of one device, config and mesh
    "batch 37": (True, ODD, ODD, (2, 4)),
    "4 microbatches, the batch's statistics": (True, EVEN, EXACT, (4, 2)),
    "by curvature": (True, CURVED, CURVED, (2, 4)),
}
MORE_CASES = {
    "batch 40": (True, EVEN, EVEN, (8, 1)),
    "4 microbatches, no BatchNorm": (False, EVEN, PARTS, (2, 2)),
    "4 microbatches, their statistics": (True, PARTS, PARTS, (1, 8)),
    "the paper's": (True, PAPER, PAPER, (2, 4)),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name", [*CASES, *[pytest.param(n, marks=pytest.mark.long) for n in MORE_CASES]]
)
def test_the_training_step_on_eight_devices(name, capfd):
    batch_norm, reference, overrides, shape = {**CASES, **MORE_CASES}[name]
    expected, evaluation, _ = train(1, 1, *reference, batch_norm=batch_norm)
    found, result, metrics = train(*shape, *overrides, batch_norm=batch_norm)
    assert difference(found, expected) < 1e-10
    np.testing.assert_allclose(
        result["test"]["loss"], evaluation["test"]["loss"], rtol=1e-6
    )
    assert metrics["loss"] < 0.6  # it learns: 0.69 is chance
    assert "rematerialization" not in capfd.readouterr().err  # XLA's "bad sharding"


@pytest.mark.long
@pytest.mark.usefixtures("x64")
def test_statistics_of_microbatches_are_not_those_of_the_batch():
    assert difference(train(1, 1, *PARTS)[0], train(1, 1)[0]) > 1e-4


@functools.cache
def collectives(data_axis, fsdp, *overrides, depth=1):
    built = build(data_axis, fsdp, *overrides, depth=depth)
    config, mesh, model, schedule, tx, state = built
    step = steps.make_train_step(model, tx, schedule, config, mesh, augment=True)
    layout = BatchLayout(mesh, config.batch_size)
    batch = layout.put({"image": IMAGES[:40], "label": LABELS[:40]})
    jitted = jax.jit(step, donate_argnums=0)
    program = compiled.read(jitted.lower(state, batch).compile())
    # Donated: outputs take the place of inputs (XLA copies a small leaf or two).
    here = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert program.aliased_bytes > 0.95 * here
    return collections.Counter(program.counts())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("shape", "options"), [((8, 1), ()), ((8, 1), PAPER), ((2, 4), PAPER)]
)
def test_what_nlcg_sends_beyond_sgd(shape, options, capfd):
    """Orthogonalization sends where its matrices are split, and only there."""
    ours = collectives(*shape, "optimizer.name=nlcg", *options)
    extra = ours - collectives(*shape, "optimizer.name=sgd")
    allowed = (
        {} if shape[1] == 1 else {"all-reduce": 4}
    )  # two maxima, by which they are scaled
    assert all(n <= allowed.get(name, 0) for name, n in extra.items()), extra
    assert "rematerialization" not in capfd.readouterr().err


@pytest.mark.usefixtures("x64")
def test_images_that_tell_the_curvature_stay_where_they_are(capfd):
    assert collectives(8, 1, *SOME, depth=2).keys() == {"all-reduce"}
    assert "rematerialization" not in capfd.readouterr().err
    for devices, images in ((1, 14), (8, 16)):  # every third
        config, mesh, *_ = build(devices, 1, *SOME)
        assert steps.curvature_images(config, mesh) == images


def test_the_layout_of_an_uneven_batch():
    mesh = create_mesh(MeshConfig())
    layout = BatchLayout(mesh, batch_size=6, microbatches=2)
    assert (layout.examples, layout.rows) == (3, 3)
    np.testing.assert_array_equal(layout.places, np.arange(6))
    batch = layout.put({"x": np.arange(12).reshape(6, 2)})
    np.testing.assert_array_equal(batch["x"], np.arange(12).reshape(2, 3, 2))
    whole = put_replicated(np.arange(3), mesh)
    np.testing.assert_array_equal(whole, np.arange(3))


def test_a_process_without_an_example():
    """The last of three in a batch of 4, of which each device has two rows."""
    mesh = create_mesh(MeshConfig())
    layout = BatchLayout(mesh, batch_size=4)
    vars(layout)["local_rows"] = np.array([4, 5])
    np.testing.assert_array_equal(layout.places, [0])  # an array has to have a shape


def test_large_leaves_are_split_along_their_longest_dimension():
    mesh = jax.sharding.AbstractMesh((1, 4), ("data", "fsdp"))
    shapes = {
        "kernel": (3, 3, 16, 32),
        "last_of_equals": (8, 8),
        "odd": (9, 7),
        "small": (8,),
        "scalar": (),
    }
    tree = {k: jax.ShapeDtypeStruct(v, np.float32) for k, v in shapes.items()}
    found = state_shardings(tree, mesh, MeshConfig(min_size_to_split=16))
    assert {k: tuple(v.spec) for k, v in found.items()} == {
        "kernel": (None, None, None, "fsdp"),
        "last_of_equals": (None, "fsdp"),
        "odd": (),
        "small": (),
        "scalar": (),
    }


@pytest.mark.parametrize(("data_axis", "fsdp"), [(2, 1), (-1, 2), (0, 1), (-1, 0)])
def test_a_mesh_that_does_not_fit_the_devices(data_axis, fsdp):
    config = MeshConfig(data_axis, fsdp)
    with pytest.raises(
        ConfigError, match=f"mesh.data={data_axis} and mesh.fsdp={fsdp} .* 1 device"
    ):
        create_mesh(config)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_processes_read_a_batch_together(in_memory, train):
    split = data.load("digits", max_train_examples=21).train
    if not in_memory:
        split = data.Split(Subset(split.source, np.arange(21)))
    shares = [np.array([0, 1, 4]), np.array([2]), np.array([3])]

    def batches(places):
        if not train:
            return list(data.eval_batches(split, 5, places=places))
        if in_memory:
            indices = [data.batch_indices(step, 5, 21, seed=3) for step in range(6)]
            images, labels = split.images, split.labels
            every = np.arange(5) if places is None else places
            return [
                {"image": images[i[every]], "label": labels[i[every]]} for i in indices
            ]
        stream = data.stream(split, batch_size=5, seed=3, places=places, image_size=8)
        return [next(stream) for _ in range(6)]

    whole = batches(None)
    for places in shares:
        for part, batch in zip(batches(places), whole, strict=True):
            assert part.keys() == batch.keys()
            for key in part:
                np.testing.assert_array_equal(part[key], batch[key][places])


def test_streams_and_memory_visit_the_same_examples():
    split = data.load("digits", max_train_examples=21).train
    stream = data.stream(split, batch_size=5, seed=3)
    for step in range(9):
        indices = data.batch_indices(step, 5, 21, seed=3)
        np.testing.assert_array_equal(next(stream)["image"], split.images[indices])


@pytest.mark.parametrize("places", [[], [-1], [5]])
def test_places_that_a_batch_does_not_have(places):
    split = data.load("digits", max_train_examples=21).train
    with pytest.raises(ValueError, match="between 0 and 4"):
        data.stream(split, batch_size=5, places=np.array(places, int))


def test_an_images_augmentation_follows_its_place_in_the_batch():
    key = jax.random.key(0)
    images = np.arange(6 * 64, dtype=np.uint8).reshape(6, 8, 8, 1)
    whole = data.augment(key, images)
    places = np.array([4, 1])
    part = data.augment(key, images[places], places=places, batch_size=6)
    np.testing.assert_array_equal(part, whole[places])

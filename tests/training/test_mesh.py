"""Meshes: the same numbers on any number of devices, and little communication."""

import pathlib

import jax
import numpy as np
import pytest

from nlcg_optax.training import data
from nlcg_optax.training.data.sources import Subset
from nlcg_optax.training.mesh import (
    BatchLayout,
    create_mesh,
    put_replicated,
    state_shardings,
)
from nlcg_optax.training.run_config import ConfigError, MeshConfig

WORKER = pathlib.Path(__file__).parents[1] / "workers" / "mesh.py"


@pytest.mark.parametrize(
    ("args", "lines"), [((), 7), pytest.param(("more",), 4, marks=pytest.mark.long)]
)
def test_the_training_step_on_eight_devices(run_on_devices, args, lines):
    done = run_on_devices(WORKER, 8, *args)
    assert len(done.stdout.splitlines()) == lines, done.stdout
    assert "rematerialization" not in done.stderr  # what XLA calls bad sharding


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
    found = state_shardings(tree, mesh, min_size=16)
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

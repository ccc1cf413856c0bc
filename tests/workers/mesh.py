"""Run by `test_mesh.py` in a process with eight devices; not a test by itself.

With the argument `more` it checks other meshes and configs instead.
"""

import collections
import functools
import sys

import flax.linen as nn
import jax

jax.config.update("jax_enable_x64", True)

import compiled  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from nlcg_optax.training import data, loop, models, optimizers, steps  # noqa: E402
from nlcg_optax.training.config import (  # noqa: E402
    apply_overrides,
    base_config,
    typed,
)
from nlcg_optax.training.mesh import BatchLayout, create_mesh  # noqa: E402

STEPS = 20
rng = np.random.default_rng(0)
IMAGES = rng.integers(0, 256, (60, 8, 8, 1), dtype=np.uint8)
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


def check_numbers(cases):
    for name, (batch_norm, reference, overrides, shape) in cases.items():
        expected, evaluation, _ = train(1, 1, *reference, batch_norm=batch_norm)
        found, result, metrics = train(*shape, *overrides, batch_norm=batch_norm)
        worst = difference(found, expected)
        print(f"{name}; data {shape[0]}, fsdp {shape[1]}: {worst:.1e}")
        assert worst < 1e-10, name
        np.testing.assert_allclose(
            result["test"]["loss"], evaluation["test"]["loss"], rtol=1e-6
        )
        assert metrics["loss"] < 0.6  # it learns: 0.69 is chance


def check_statistics():
    """Those of microbatches are not those of the batch."""
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


def check_communication():
    # Orthogonalization communicates where its matrices are split, and only there.
    for shape, options in (((8, 1), ()), ((8, 1), PAPER), ((2, 4), PAPER)):
        ours = collectives(*shape, "optimizer.name=nlcg", *options)
        base = collectives(*shape, "optimizer.name=sgd")
        print(f"data {shape[0]}, fsdp {shape[1]}: nlcg {dict(ours)}, sgd {dict(base)}")
        extra = ours - base
        allowed = {} if shape[1] == 1 else {"all-reduce": 2}
        assert all(n <= allowed.get(name, 0) for name, n in extra.items()), extra
    # The images that tell the curvature stay where they are.
    found = collectives(8, 1, *SOME, depth=2)
    print(f"by curvature {dict(found)}")
    assert found.keys() == {"all-reduce"}
    for devices, images in ((1, 14), (8, 16)):  # every third
        config, mesh, *_ = build(devices, 1, *SOME)
        assert steps.curvature_images(config, mesh) == images


if __name__ == "__main__":
    if sys.argv[1:] == ["more"]:
        check_numbers(MORE_CASES)
        check_statistics()
    else:
        check_numbers(CASES)
        check_communication()

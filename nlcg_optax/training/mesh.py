"""The mesh of a run: which device holds which part of the state and of a batch.

The mesh has two axes. A batch is split over both; parameters and optimizer state are
whole along ``data`` and split along ``fsdp``. With ``fsdp`` 1 (the default) every
device holds the whole state.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nlcg_optax.matrices.matrix import is_kept
from nlcg_optax.training.run_config import ConfigError, MeshConfig

AXES = ("data", "fsdp")


def create_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a run.

    An axis of size -1 takes the devices that the other leaves.

    Args:
      config: how many devices each axis has.
      devices: all of all processes by default.

    Raises:
      ConfigError: if the axes do not make up the number of devices.
    """
    count = jax.device_count() if devices is None else len(devices)
    sizes = [config.data, config.fsdp]
    if -1 in sizes:
        i = sizes.index(-1)
        sizes[i] = count // max(sizes[1 - i], 1)
    if min(sizes) < 1 or math.prod(sizes) != count:
        raise ConfigError(
            f"mesh.data={config.data} and mesh.fsdp={config.fsdp} do not fit {count} "
            "device(s): their product must be that number (-1: what is left)."
        )
    return jax.make_mesh(
        tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, P())


def state_shardings(tree: Any, mesh: Mesh, config: MeshConfig) -> Any:
    """The shardings of parameters, or of a state made of leaves of their shapes.

    A leaf of at least ``min_size_to_split`` elements is split along ``fsdp`` in its
    longest dimension that the axis divides (the last of equals); any other leaf is
    whole. The rule looks at the shape alone, so that a parameter, its gradient and all
    that an optimizer keeps for it are split alike, and their arithmetic needs no
    communication. What is kept for matrices on the devices that work on them
    (:func:`nlcg_optax.scale_by_soap`) stays there. The tree is of arrays, or of what
    `jax.eval_shape` makes of them.

    Example:
      >>> mesh = create_mesh(MeshConfig())
      >>> config = MeshConfig(min_size_to_split=1)
      >>> tuple(state_shardings(np.zeros((8, 8)), mesh, config).spec)
      (None, 'fsdp')
    """
    parts = mesh.shape["fsdp"]

    def sharding(leaf: Any) -> NamedSharding:
        divisible = [i for i, n in enumerate(leaf.shape) if n % parts == 0]
        if not divisible or math.prod(leaf.shape) < config.min_size_to_split:
            return replicated(mesh)
        longest = max(divisible, key=lambda i: (leaf.shape[i], i))
        return NamedSharding(mesh, P(*(None,) * longest, "fsdp"))

    def shardings(node: Any) -> Any:
        if not is_kept(node):
            return sharding(node)
        spread = NamedSharding(mesh, P(None, mesh.axis_names))
        return jax.tree.map(
            lambda x: spread if x.shape[1] > 1 else replicated(mesh), node
        )

    return jax.tree.map(shardings, tree, is_leaf=is_kept)


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """How the examples of a global batch lie on the devices.

    A batch is an array [microbatches, rows, ...], its rows split over all devices.
    Microbatch m holds the examples at the places ``m·b`` to ``(m + 1)·b`` of the batch,
    ``b = batch_size / microbatches``, on any number of devices; where the devices do
    not divide b, rows that hold no example fill it up.

    Attributes:
      mesh: from :func:`create_mesh`.
      batch_size: examples in a global batch.
      microbatches: parts that are worked through one after the other; divides the batch
        size.
    """

    mesh: Mesh
    batch_size: int
    microbatches: int = 1

    @property
    def examples(self) -> int:
        """Examples of a microbatch."""
        return self.batch_size // self.microbatches

    @property
    def rows(self) -> int:
        """Rows of a microbatch, its examples and what fills it up."""
        return math.ceil(self.examples / self.mesh.size) * self.mesh.size

    @property
    def sharding(self) -> NamedSharding:
        """The sharding of a batch."""
        return NamedSharding(self.mesh, P(None, AXES))

    @functools.cached_property
    def local_rows(self) -> np.ndarray:
        """Rows of every microbatch that lie on this process's devices, ascending."""
        shape = (self.microbatches, self.rows)
        indices = self.sharding.addressable_devices_indices_map(shape).values()
        parts = [np.arange(self.rows)[index[1]] for index in indices if index]
        return np.unique(np.concatenate(parts))

    @functools.cached_property
    def places(self) -> np.ndarray:
        """Places in the batch of the examples that this process reads, ascending.

        A process whose rows hold no example reads the first, which fills one of them.
        """
        rows = self.local_rows[self.local_rows < self.examples]
        rows = rows if len(rows) else np.zeros(1, self.local_rows.dtype)
        first = np.arange(self.microbatches)[:, None] * self.examples
        return (first + rows).reshape(-1)

    def put(self, examples: Any) -> Any:
        """Makes the global batch of this process's share, a tree of arrays.

        Their first axis has the examples at :attr:`places`. The global arrays are
        [microbatches, rows, ...]; what rows without an example hold is to be masked.
        """

        def put(x: np.ndarray) -> jax.Array:
            local = x.reshape(self.microbatches, -1, *x.shape[1:])
            if empty := len(self.local_rows) - local.shape[1]:
                local = np.pad(local, [(0, 0), (0, empty)] + [(0, 0)] * (x.ndim - 1))

            def part(index: Any) -> np.ndarray:
                start, stop, _ = index[1].indices(self.rows)
                first = int(np.searchsorted(self.local_rows, start))
                return local[:, first : first + stop - start]

            shape = (self.microbatches, self.rows, *x.shape[1:])
            return _assemble(shape, self.sharding, part)

        return jax.tree.map(put, examples)


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """Puts arrays, the same in every process, whole on every device."""
    return jax.tree.map(
        lambda x: _assemble(x.shape, replicated(mesh), lambda index: x[index]), tree
    )


def _assemble(
    shape: tuple[int, ...], sharding: NamedSharding, part: Callable[[Any], np.ndarray]
) -> jax.Array:
    """A global array from its parts on this process's devices, by their indices.

    `jax.make_array_from_callback` in transfers that a transfer guard takes as meant.
    """
    indices = sharding.addressable_devices_indices_map(shape)
    parts = jax.device_put([part(index) for index in indices.values()], list(indices))
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)

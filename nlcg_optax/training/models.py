r"""ResNets for images, in Flax.

Two families, both with float32 parameters, BatchNorm statistics in the collection
``"batch_stats"`` and logits in float32:

* :class:`ResNetV2`, the small-image family :math:`6n + 2` of the paper
  (arXiv:1812.02886), after TensorFlow's official CIFAR ResNet v2;
* :class:`ResNet50`, version 1.5.

BatchNorm sees the whole batch under ``jit``, also when the batch is sharded over a
mesh: the statistics are then global, and ``axis_name`` must stay ``None``. Only where
each device runs the model on its own shard (``shard_map``, ``pmap``) does
``axis_name`` average the statistics over the named axis. A ``mask`` keeps rows that are
no examples out of them.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax.contrib

#: The names that :func:`create_model` knows.
MODELS = ("resnet8", "resnet14", "resnet20", "resnet32", "resnet56", "resnet50")

_DTYPES = ("float32", "bfloat16")


def _layers(model: Any, train: bool, *init: Any) -> tuple[Any, Any]:
    """Convolution and BatchNorm of a model, ready to be given filters or a name."""
    conv = functools.partial(
        nn.Conv,
        padding="SAME",
        use_bias=False,
        dtype=model.dtype,
        kernel_init=nn.initializers.variance_scaling(*init),
    )
    norm = functools.partial(
        nn.BatchNorm,
        use_running_average=not train,
        momentum=model.batch_norm_momentum,
        epsilon=model.batch_norm_epsilon,
        dtype=model.dtype,
        axis_name=model.axis_name if train else None,
    )
    return conv, norm


def _pool_and_classify(x: jax.Array, num_classes: int, kernel_init: Any) -> jax.Array:
    # In float32 whatever the compute dtype: it costs nothing, and a bfloat16 logit
    # has two or three digits.
    x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
    return nn.Dense(num_classes, dtype=jnp.float32, kernel_init=kernel_init)(x)


def _stages(block: Any, counts: Any, filters: int, x: jax.Array, mask: Any) -> Any:
    """Blocks in stages; each but the first halves the image and doubles the filters."""
    for stage, count in enumerate(counts):
        for i in range(count):
            x = block(
                filters=filters * 2**stage,
                strides=2 if stage > 0 and i == 0 else 1,
                project=i == 0,
                name=f"stage{stage + 1}_block{i + 1}",
            )(x, mask)
    return x


class _PreActivationBlock(nn.Module):
    filters: int
    strides: int
    project: bool
    conv: Callable[..., Any]
    norm: Callable[..., Any]

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        y = nn.relu(self.norm()(x, mask=mask))
        shortcut = x
        if self.project:
            shortcut = self.conv(
                self.filters, (1, 1), strides=self.strides, name="projection"
            )(y)
        y = self.conv(self.filters, (3, 3), strides=self.strides)(y)
        y = nn.relu(self.norm()(y, mask=mask))
        return shortcut + self.conv(self.filters, (3, 3))(y)


class ResNetV2(nn.Module):
    r"""Pre-activation ResNet of depth :math:`6n + 2` for small images.

    A 3x3 convolution, three stages of :math:`n` basic blocks with ``filters``,
    ``2 * filters`` and ``4 * filters`` channels and strides 1, 2, 2, a final BatchNorm
    and ReLU, global average pooling and a dense layer. The first block of *every*
    stage has a projection shortcut, a 1x1 convolution of the pre-activated input, as
    in TensorFlow's official CIFAR ResNet v2; no convolution has a bias. He et al.,
    *Identity mappings in deep residual networks* (arXiv:1603.05027).

    Parameters for 10 classes and colour images: 78,106 (depth 8), 272,538 (20),
    466,970 (32), 855,834 (56).

    Initialisation is the official code's: convolutions truncated normal of variance
    1 / fan-in, the dense layer Glorot uniform.

    One deviation: padding is ``"SAME"``. The official code pads strided 3x3
    convolutions by one on each side, independently of the input size; ``"SAME"`` pads
    an even input on the right and below alone, so that the sampling grid of the
    second and third stages is shifted by one pixel.

    Attributes:
      depth: :math:`6n + 2`, :math:`n \ge 1`: 8, 14, 20, 32, 56, 110, ...
      num_classes: number of logits.
      dtype: dtype of the computation, ``jnp.float32`` or ``jnp.bfloat16``. Parameters
        and BatchNorm statistics are float32 with both.
      batch_norm_momentum: decay of the running statistics.
      batch_norm_epsilon: added to the variance.
      filters: channels of the first stage.
      axis_name: axis over which BatchNorm averages its statistics under ``shard_map``
        or ``pmap``; leave ``None`` under ``jit``, where they are global anyway.
      remat: whether the backward pass computes each block again rather than keep what
        lies within it: less memory, about a third more time.

    Raises:
      ValueError: at construction, if ``depth`` is not :math:`6n + 2`.
    """

    depth: int
    num_classes: int
    dtype: Any = jnp.float32
    batch_norm_momentum: float = 0.99
    batch_norm_epsilon: float = 1e-5
    filters: int = 16
    axis_name: str | None = None
    remat: bool = False

    def __post_init__(self):
        """Checks the depth."""
        if self.depth < 8 or (self.depth - 2) % 6:
            raise ValueError(
                f"the depth of a ResNetV2 is 6n + 2 with n >= 1 (8, 14, 20, 26, 32, "
                f"..., 56, ..., 110), not {self.depth}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, mask: jax.Array | None = None
    ) -> jax.Array:
        """Logits of a batch of images.

        Args:
          x: images, ``[batch, height, width, channels]``.
          train: whether BatchNorm uses (and records) the batch's statistics, rather
            than the running ones.
          mask: bool, ``[batch]``: the images that count in the batch's statistics; all
            by default.

        Returns:
          Logits, ``[batch, num_classes]``, float32.
        """
        conv, norm = _layers(self, train, 1.0, "fan_in", "truncated_normal")
        mask = None if mask is None else mask[:, None, None, None]
        x = conv(self.filters, (3, 3))(x.astype(self.dtype))
        block = nn.remat(_PreActivationBlock) if self.remat else _PreActivationBlock
        block = functools.partial(block, conv=conv, norm=norm)
        x = _stages(block, [(self.depth - 2) // 6] * 3, self.filters, x, mask)
        x = nn.relu(norm()(x, mask=mask))
        return _pool_and_classify(x, self.num_classes, nn.initializers.glorot_uniform())


class _BottleneckBlock(nn.Module):
    filters: int
    strides: int
    project: bool
    conv: Callable[..., Any]
    norm: Callable[..., Any]
    scale_init: Callable[..., Any]

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        y = self.conv(self.filters, (1, 1))(x)
        y = nn.relu(self.norm()(y, mask=mask))
        y = self.conv(self.filters, (3, 3), strides=self.strides)(y)
        y = nn.relu(self.norm()(y, mask=mask))
        y = self.conv(4 * self.filters, (1, 1))(y)
        y = self.norm(scale_init=self.scale_init)(y, mask=mask)
        if self.project:
            x = self.conv(
                4 * self.filters, (1, 1), strides=self.strides, name="projection"
            )(x)
            x = self.norm()(x, mask=mask)
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """ResNet-50, version 1.5: the stride is in the 3x3 convolution of a bottleneck.

    25,557,032 trainable parameters for 1,000 classes and colour images. He et al.,
    *Deep residual learning for image recognition* (arXiv:1512.03385).

    Convolutions start normal of variance 2 / fan-out, the dense layer normal of
    standard deviation 0.01 (arXiv:1706.02677). Padding is ``"SAME"``, which on even
    inputs puts the extra row and column of strided convolutions on the right and
    below alone; PyTorch's model pads both sides. Attributes that are not listed are
    those of :class:`ResNetV2`.

    Attributes:
      num_classes: number of logits.
      zero_init_residual: whether the scale of the last BatchNorm of each block starts
        at zero, so that a block starts as its shortcut (arXiv:1706.02677).
    """

    num_classes: int = 1000
    dtype: Any = jnp.float32
    batch_norm_momentum: float = 0.99
    batch_norm_epsilon: float = 1e-5
    zero_init_residual: bool = True
    axis_name: str | None = None
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, mask: jax.Array | None = None
    ) -> jax.Array:
        """Logits of images, 224x224 in the literature; see :class:`ResNetV2`."""
        conv, norm = _layers(self, train, 2.0, "fan_out", "normal")
        mask = None if mask is None else mask[:, None, None, None]
        x = conv(64, (7, 7), strides=2)(x.astype(self.dtype))
        x = nn.relu(norm()(x, mask=mask))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        block = nn.remat(_BottleneckBlock) if self.remat else _BottleneckBlock
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        scale_init = zeros if self.zero_init_residual else ones
        block = functools.partial(block, conv=conv, norm=norm, scale_init=scale_init)
        x = _stages(block, (3, 4, 6, 3), 64, x, mask)
        return _pool_and_classify(x, self.num_classes, nn.initializers.normal(0.01))


def create_model(
    name: str,
    num_classes: int,
    *,
    dtype: str = "float32",
    filters: int | None = None,
    **options: Any,
) -> nn.Module:
    """A model by its name.

    Args:
      name: one of :data:`MODELS`.
      num_classes: number of logits.
      dtype: dtype of the computation, ``"float32"`` or ``"bfloat16"``.
      filters: channels of the first stage, of the small-image family alone; 16 by
        default.
      **options: attributes of both, such as ``remat``; see :class:`ResNetV2`.

    Returns:
      The module, to be called as ``model.apply(variables, images, train=...)``.

    Raises:
      ValueError: if ``name``, ``dtype``, ``num_classes`` or ``filters`` is not one of
        those accepted.

    Example:
      >>> model = create_model("resnet8", 10)
      >>> shapes = jax.eval_shape(
      ...     lambda: model.init(
      ...         jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False
      ...     )
      ... )
      >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
      78106
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(MODELS)}")
    if dtype not in _DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(_DTYPES)}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, not {num_classes}")
    if filters is not None and (name == "resnet50" or filters < 1):
        raise ValueError(
            f"filters must be at least 1, and resnet50 has its own; not {filters} for "
            f"{name}"
        )
    options |= {"num_classes": num_classes, "dtype": jnp.dtype(dtype)}
    if name == "resnet50":
        return ResNet50(**options)
    depth = int(name.removeprefix("resnet"))
    return ResNetV2(depth, filters=filters or 16, **options)


def muon_matrices(params: Any) -> Any:
    """Kernels as Muon's matrices: the last axis by all others; None for the rest.

    `optax.contrib.muon` takes it as ``muon_weight_dimension_numbers``.

    Example:
      >>> import numpy as np
      >>> tree = muon_matrices({"kernel": np.ones((3, 3, 4, 8)), "bias": np.ones(8)})
      >>> tree["kernel"].reduction_axis, tree["kernel"].output_axis, tree["bias"]
      ((0, 1, 2), 3, None)
    """

    def matrix(w: Any) -> Any:
        *others, last = range(w.ndim) or [0]
        axes = optax.contrib.MuonDimensionNumbers(tuple(others), last)
        return axes if others else None

    return jax.tree.map(matrix, params)


def l2_mask(params: Any) -> Any:
    """Which parameters carry the L2 penalty: a tree, True but for those of BatchNorm.

    A normalisation is recognised by its parameter ``scale``, which no other module
    of this file has; its ``bias`` goes with it.

    Example:
      >>> l2_mask({"norm": {"scale": 1.0, "bias": 0.0}, "dense": {"bias": 0.0}})
      {'dense': {'bias': True}, 'norm': {'bias': False, 'scale': False}}
    """

    def name(key: Any) -> str:
        return str(getattr(key, "key", getattr(key, "name", key)))

    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    norms = {path[:-1] for path, _ in leaves if path and name(path[-1]) == "scale"}
    return jax.tree.unflatten(treedef, [path[:-1] not in norms for path, _ in leaves])

"""What the sweep trains: a model, its data, and how both make a step.

A task has the attributes and methods of :class:`Task`. ResNets are trained through
``nlcg_optax.training`` (:class:`ImageTask`), everything else is a function of its
parameters and examples (:class:`FunctionTask`).
"""

import dataclasses
import functools
import importlib.util
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
from flax import nnx
from sklearn import model_selection
from sklearn.datasets import load_digits

import nlcg_optax
from nlcg_optax.training import data, loop, models, steps
from nlcg_optax.training.config import ConfigDict, typed
from nlcg_optax.training.mesh import create_mesh
from nlcg_optax.training.optimizers import curvature_stride

VALIDATION_FRACTION = 0.2


class Phase(NamedTuple):
    """Which examples are trained on, and the scores of a state on others.

    Attributes:
      kept: indices of the former.
      evaluate: from a state to ``loss`` and, of classifiers, ``accuracy``.
      during: whether that is cheap enough to be done twenty times in a run.
    """

    kept: np.ndarray
    evaluate: Callable[[Any], dict[str, float]]
    during: bool


class Task(Protocol):
    """What the sweep needs to know of a model and its data."""

    num_train: int
    data: Any  # arrays that a step takes as they are

    def phase(self, name: str) -> Phase:
        """The examples of "tuning" or "test"."""
        ...

    def make(self, words: Sequence[str], batch_size: int, total_steps: int) -> tuple:
        """The optimizer's two programs: from a seed to a state, and a step.

        A step is a function of state, indices, data, learning rate and seed to the new
        state and the loss, which is not finite where its gradient is not.
        """
        ...


class ImageTask:
    """A ResNet, trained as ``nlcg_optax.training`` does."""

    def __init__(self, config: ConfigDict):
        """Loads the data; the config has no optimizer, batch size or schedule."""
        self.config = config
        checked = typed(config)
        self.mesh = create_mesh(checked.mesh, jax.devices()[:1])
        self.dataset = loop.load_dataset(checked.dataset)
        self.model = loop.create_model(checked.model, self.dataset.num_classes)
        train = self.dataset.train
        self.num_train = len(train)
        self.data = jax.device_put((train.images, train.labels))

    @functools.cache  # noqa: B019
    def phase(self, name: str) -> Phase:
        dataset, train = self.dataset, self.dataset.train
        kept = np.arange(len(train))
        if name == "tuning":
            kept, held_out = model_selection.train_test_split(
                kept,
                test_size=VALIDATION_FRACTION,
                stratify=train.labels,
                random_state=self.config.dataset.split_seed,
            )
            splits = {"train": kept, "test": held_out}
            dataset = dataclasses.replace(
                dataset,
                **{
                    split: data.Split.from_arrays(train.images[i], train.labels[i])
                    for split, i in splits.items()
                },
            )
        config = self.config.copy_and_resolve_references()
        # BatchNorm by the statistics of the whole training set under the last weights:
        # running averages lag, which would be no property of the optimizer.
        config.batch_size = len(kept)
        config.precise_batch_norm_batches = 1
        evaluate = loop.make_evaluation(typed(config), dataset, self.model, self.mesh)

        def scores(state: Any) -> dict[str, float]:
            params = peers.parameters_to_evaluate(state.params, state.opt_state)
            return evaluate(state.replace(params=params))["test"]

        return Phase(kept, scores, during=False)

    def create_optimizer(
        self, config: ConfigDict, words: Sequence[str], rate: Any, horizon: int | None
    ) -> Any:
        """The optimizer that the words state, with this learning rate."""
        return peers.create_optimizer(
            config, words, lambda _: rate, models.l2_mask, horizon
        )

    def make(self, words: Sequence[str], batch_size: int, total_steps: int) -> tuple:
        config = peers.configured(self.config, words)
        config.batch_size = batch_size
        # Noise comes to rule where each step has other images.
        horizon = total_steps if batch_size < self.num_train else None

        def train_step(state, indices, arrays, rate, seed):
            step = steps.make_train_step(
                self.model,
                self.create_optimizer(config, words, rate, horizon),
                lambda _: rate,
                peers.checked(config),
                self.mesh,
                augment=True,
                seed=seed,
            )
            images, labels = arrays
            batch = {"image": images[indices][None], "label": labels[indices][None]}
            state, metrics = step(state, batch)
            # The loss may be finite where its gradient is not.
            finite = jnp.isfinite(metrics["grad_norm"])
            return state, jnp.where(finite, metrics["loss"], jnp.nan)

        tx = self.create_optimizer(config, words, 0.0, horizon)
        shape = self.dataset.image_shape
        init = steps.make_init(self.model, tx, peers.checked(config), shape)
        return init, train_step


class State(NamedTuple):
    """Parameters, and the optimizer's state."""

    params: Any
    opt_state: Any


class FunctionTask(NamedTuple):
    """A model as a function of its parameters and examples.

    Attributes:
      init: from a seed to the parameters.
      outputs: from parameters and examples to the model's outputs.
      loss: from outputs and examples to the mean loss.
      data: arrays with a leading axis of examples, to train on.
      held_out: such arrays of other examples; None if there are no others, and the
        loss of the training is what counts.
      config: for the optimizers' options.
      fewest: the curvature is taken on a twentieth of the batch (what the trainer
        takes), and on as many examples at least.
      labels: see :func:`peers.create_optimizer`.
      chunk: examples that go through the model at once, where fewer are faster: on a
        CPU, whose cache holds them.
    """

    init: Callable[[Any], Any]
    outputs: Callable[[Any, Any], Any]
    loss: Callable[[Any, Any], jax.Array]
    data: Any
    held_out: Any
    config: ConfigDict
    fewest: int = 256
    labels: peers.Labels | None = None
    chunk: int | None = None

    @property
    def num_train(self) -> int:
        return len(jax.tree.leaves(self.data)[0])

    def phase(self, name: str) -> Phase:
        """The held-out examples are never trained on: phases differ in their seeds."""
        del name
        examples = self.data if self.held_out is None else self.held_out

        @jax.jit
        def evaluate(state: State) -> jax.Array:
            params = peers.parameters_to_evaluate(*state)
            return self.loss(self.outputs(params, examples), examples)

        return Phase(
            np.arange(self.num_train),
            lambda state: {"loss": float(evaluate(state))},
            during=True,
        )

    def value_and_grad(self, params: Any, batch: Any, batch_size: int) -> tuple:
        """The mean loss and its gradient; the same in chunks as at once."""

        def of(examples: Any) -> tuple:
            return jax.value_and_grad(
                lambda params: self.loss(self.outputs(params, examples), examples)
            )(params)

        if self.chunk is None or batch_size <= self.chunk:
            return of(batch)
        count, rest = divmod(batch_size, self.chunk)
        if rest:
            raise ValueError(f"{batch_size} examples are no multiple of {self.chunk}.")
        chunks = jax.tree.map(
            lambda x: x.reshape(count, self.chunk, *x.shape[1:]), batch
        )
        zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros([]), params))
        total, _ = jax.lax.scan(
            lambda total, part: (jax.tree.map(jnp.add, total, of(part)), None),
            zeros,
            chunks,
        )
        return jax.tree.map(lambda x: x / count, total)

    def make(self, words: Sequence[str], batch_size: int, total_steps: int) -> tuple:
        config = peers.configured(self.config, words)
        # Noise comes to rule where each step has other examples.
        horizon = total_steps if batch_size < self.num_train else None
        config.batch_size = batch_size
        auto = peers.checked(config).optimizer.nlcg_auto
        auto = dataclasses.replace(auto, curvature_min_examples=self.fewest)
        stride = curvature_stride(auto, batch_size)

        def create_optimizer(rate: Any) -> Any:
            return peers.create_optimizer(
                config,
                words,
                lambda _: rate,
                lambda params: jax.tree.map(lambda w: w.ndim > 1, params),
                horizon,
                self.labels,
            )

        def init(seed: Any) -> State:
            params = self.init(seed)
            return State(params, create_optimizer(0.0).init(params))

        def train_step(state, indices, arrays, rate, seed):
            del seed
            batch = jax.tree.map(lambda x: x[indices], arrays)
            loss, grads = self.value_and_grad(state.params, batch, batch_size)
            given = {}
            if config.optimizer.name == "nlcg_auto":
                few = jax.tree.map(lambda x: x[::stride], batch)
                given["curvature"] = nlcg_optax.gauss_newton(
                    lambda params: self.outputs(params, few),
                    lambda outputs: self.loss(outputs, few),
                    fraction=len(jax.tree.leaves(few)[0]) / batch_size,
                )
            updates, opt_state = create_optimizer(rate).update(
                grads, state.opt_state, state.params, value=loss, **given
            )
            finite = jnp.isfinite(optax.tree.norm(grads))
            params = optax.apply_updates(state.params, updates)
            return State(params, opt_state), jnp.where(finite, loss, jnp.nan)

        return init, train_step


# Models.


def mlp(params: Any, h: jax.Array, activation: Callable = jnp.tanh) -> jax.Array:
    for layer in params[:-1]:
        h = activation(h @ layer["w"] + layer["b"])
    return h @ params[-1]["w"] + params[-1]["b"]


def mlp_init(widths: Sequence[int], seed: Any) -> Any:
    keys = jax.random.split(jax.random.key(seed), len(widths) - 1)
    return [
        {"w": jax.random.normal(key, (m, n)) / np.sqrt(m), "b": jnp.zeros(n)}
        for key, m, n in zip(keys, widths[:-1], widths[1:], strict=True)
    ]


def gru_cell(
    h: jax.Array, given: Sequence[jax.Array], known: Sequence[jax.Array]
) -> jax.Array:
    """The next state of a GRU (Cho et al., 2014).

    Args:
      h: the state.
      given: of the input, for the reset gate, the update gate and the new state.
      known: the same of the state.
    """
    reset, update = (jax.nn.sigmoid(given[i] + known[i]) for i in range(2))
    return update * h + (1 - update) * jnp.tanh(given[2] + reset * known[2])


def _autoencoder(
    train: np.ndarray, held_out: np.ndarray | None, code: int, config: ConfigDict
) -> FunctionTask:
    """Rows of numbers in [0, 1] through a few, by tanh layers.

    The loss is the sigmoid cross-entropy of an image, as Hinton & Salakhutdinov (2006)
    have it, less that of a perfect copy (the images' own entropy).
    """

    def entropy(x: np.ndarray) -> np.ndarray:
        x = np.clip(x, 1e-7, 1 - 1e-7)
        return -np.sum(x * np.log(x) + (1 - x) * np.log1p(-x), -1)

    def loss(logits, examples):
        images, floor = examples
        losses = optax.sigmoid_binary_cross_entropy(logits, images)
        return jnp.mean(jnp.sum(losses, -1) - floor)

    def examples(x: np.ndarray | None) -> Any:
        return None if x is None else (np.float32(x), np.float32(entropy(x)))

    pixels = train.shape[1]
    widths = (pixels, 256, 64, code, 64, 256, pixels)
    return FunctionTask(
        functools.partial(mlp_init, widths),
        lambda params, examples: mlp(params, examples[0]),
        loss,
        examples(train),
        examples(held_out),
        config,
    )


def digits_autoencoder(config: ConfigDict) -> FunctionTask:
    """Scikit-learn's digits, 64-256-64-16-64-256-64.

    All of them: with so few, what is held out would measure how little was learned.
    """
    return _autoencoder(load_digits().data / 16, None, 16, config)


def cifar_autoencoder(config: ConfigDict) -> FunctionTask:
    """Grey images of 12×12, 144-256-64-32-64-256-144."""
    dataset = loop.load_dataset(typed(config).dataset)
    train, test = (
        split.images.mean(-1).reshape(len(split), -1) / 255
        for split in (dataset.train, dataset.test)
    )
    return _autoencoder(train, test[::5], 32, config)


def burgers(config: ConfigDict) -> FunctionTask:
    """The physics-informed network of ``benchmarks/curvature``, all points a step."""
    path = pathlib.Path(__file__).resolve().parents[1] / "curvature" / "tasks.py"
    spec = importlib.util.spec_from_file_location("curvature_tasks", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    task = module.burgers()
    return FunctionTask(
        lambda seed: task.init(seed),
        lambda params, _: task.outputs(params),
        lambda outputs, _: task.loss(outputs),
        np.zeros(1, np.float32),  # its points are one example
        None,
        config,
    )


CONTEXT, WIDTH, HEADS, LAYERS = 64, 64, 4, 2


class Block(nnx.Module):
    """Attention and a two-layer perceptron, LayerNorm before each."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        qkv = self.qkv(self.norm1(x))
        q, k, v = (
            part.reshape(*part.shape[:-1], HEADS, -1) for part in jnp.split(qkv, 3, -1)
        )
        attention = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attention.reshape(x.shape))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class GPT(nnx.Module):
    """A decoder of characters; embedding and head untied."""

    def __init__(self, vocabulary: int, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(vocabulary, WIDTH, rngs=rngs)
        self.position = nnx.Embed(CONTEXT, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, vocabulary, rngs=rngs)

    def __call__(self, tokens):
        x = self.embedding(tokens) + self.position(jnp.arange(tokens.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def tinyshakespeare(config: ConfigDict, path: pathlib.Path) -> FunctionTask:
    """A small GPT on windows of 64 characters; the last tenth of the text held out."""
    text = path.read_text()
    vocabulary = sorted(set(text))
    code = {character: number for number, character in enumerate(vocabulary)}
    tokens = np.array([code[character] for character in text], np.int32)
    cut = len(tokens) * 9 // 10

    def windows(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count = (len(part) - 1) // CONTEXT
        size = count * CONTEXT
        return part[:size].reshape(count, -1), part[1 : size + 1].reshape(count, -1)

    train, held_out = windows(tokens[:cut]), windows(tokens[cut:])

    def create(seed: Any) -> GPT:
        return GPT(len(vocabulary), nnx.Rngs(jax.random.key(seed)))

    graph = nnx.graphdef(nnx.eval_shape(lambda: create(0)))

    def labels(params: Any) -> Any:
        """Embeddings and head to Adam; the optimizer as it is for everything else."""

        def label(path, _):
            part = str(getattr(path[0], "key", path[0]))
            ends = part in ("embedding", "position", "head")
            return peers.REST if ends else peers.MATRICES

        return jax.tree_util.tree_map_with_path(label, params)

    def loss(logits, examples):
        _, targets = examples
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.mean(losses)

    return FunctionTask(
        lambda seed: nnx.state(create(seed), nnx.Param),
        lambda params, examples: nnx.merge(graph, params)(examples[0]),
        loss,
        train,
        jax.tree.map(lambda x: x[::4], held_out),
        config,
        fewest=32,
        labels=labels,
        chunk=64 if jax.default_backend() == "cpu" else None,
    )

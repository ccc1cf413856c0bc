"""Small tasks without noise: every step sees all the data, and there are 150 of them.

Each is a tree of parameters by seed, a model's outputs, and the loss of the outputs.
Those of `HELD_OUT` were not looked at while the model's constants were chosen; for
the Helmholtz equation one was changed.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits, load_sample_images

STEPS = 150


class Task(NamedTuple):
    """A loss of a multilayer perceptron.

    Attributes:
      widths: of its layers.
      outputs: from the parameters to the outputs.
      loss: from the outputs to the mean loss.
      scale: of the initial kernels, times one over the root of their fan-in.
      l2: coefficient of a penalty l2/2·‖w‖² on all parameters.
    """

    widths: tuple[int, ...]
    outputs: Callable[[Any], Any]
    loss: Callable[[Any], jax.Array]
    scale: float = 1.0
    l2: float = 0.0

    def init(self, seed: int) -> Any:
        key, params = jax.random.key(seed), []
        for m, n in zip(self.widths[:-1], self.widths[1:], strict=True):
            key, sub = jax.random.split(key)
            w = self.scale * jax.random.normal(sub, (m, n)) / np.sqrt(m)
            params.append({"w": w, "b": jnp.zeros(n)})
        return params

    def value(self, params: Any) -> jax.Array:
        return self.loss(self.outputs(params)) + 0.5 * self.l2 * sum(
            jnp.sum(x**2) for x in jax.tree.leaves(params)
        )


def mlp(params, h, activation=jnp.tanh):
    for layer in params[:-1]:
        h = activation(h @ layer["w"] + layer["b"])
    return h @ params[-1]["w"] + params[-1]["b"]


def digits():
    order = np.random.default_rng(0).permutation(1797)
    images, labels = load_digits(return_X_y=True)
    return (
        jnp.asarray(images[order] / 16, jnp.float32),
        jnp.asarray(labels[order], jnp.int32),
    )


def autoencoder() -> Task:
    """Digits through 16 numbers; sigmoid cross-entropy, whose floor is 13.64."""
    images, _ = digits()

    def loss(logits):
        losses = optax.sigmoid_binary_cross_entropy(logits, images)
        return jnp.mean(jnp.sum(losses, -1))

    widths = (64, 256, 64, 16, 64, 256, 64)
    return Task(widths, lambda params: mlp(params, images), loss)


def patches() -> Task:
    """Grey patches of scikit-learn's two photographs through 20 numbers, deeper.

    Half the squared error of 2,000 patches of 12×12, summed over their pixels.
    """
    rng, found = np.random.default_rng(4), []
    for photograph in load_sample_images().images:
        grey = np.asarray(photograph).mean(-1) / 255
        height, width = (2 * (n // 2) for n in grey.shape)
        grey = grey[:height, :width].reshape(height // 2, 2, width // 2, 2)
        grey = grey.mean((1, 3))
        for _ in range(1000):
            i, j = (rng.integers(0, n - 11) for n in grey.shape)
            found.append(grey[i : i + 12, j : j + 12].reshape(-1))
    images = jnp.asarray(np.stack(found), jnp.float32)

    def loss(outputs):
        return 0.5 * jnp.mean(jnp.sum((outputs - images) ** 2, -1))

    widths = (144, 200, 100, 50, 20, 50, 100, 200, 144)
    return Task(widths, lambda params: mlp(params, images), loss)


def deep_narrow() -> Task:
    """Digits by ten ReLU layers of width 16, with an L2 penalty of 1e-3."""
    images, labels = digits()

    def loss(logits):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses)

    outputs = functools.partial(mlp, h=images, activation=jax.nn.relu)
    return Task((64, *[16] * 10, 10), outputs, loss, scale=np.sqrt(2), l2=1e-3)


def _physics(widths, weights, residuals) -> Task:
    """Weighted mean squares of the residuals of an equation and its conditions."""

    def loss(outputs):
        terms = zip(weights, outputs, strict=True)
        return sum(w * jnp.mean(r**2) for w, r in terms)

    def outputs(params):
        return residuals(lambda z: mlp(params, z)[0])

    return Task(widths, outputs, loss)


def _second_x(u, z):
    return jax.jvp(lambda z: jax.grad(u)(z)[0], (z,), (jnp.array([1.0, 0.0]),))[1]


def _edge(rng, low, high, n):
    """Points on the edge of a square."""
    t, side = rng.uniform(low, high, n), rng.integers(0, 4, n)
    x = np.where(side == 0, low, np.where(side == 1, high, t))
    y = np.where(side == 2, low, np.where(side == 3, high, t))
    return jnp.asarray(np.stack([x, y], 1), jnp.float32)


def _columns(*columns):
    return jnp.asarray(np.stack(columns, 1), jnp.float32)


def burgers() -> Task:
    """u_t + u u_x = (0.01/π) u_xx on [-1, 1]×[0, 1], u = -sin πx at 0, 0 at ±1."""
    rng, n = np.random.default_rng(0), 1024
    inner = _columns(rng.uniform(-1, 1, n), rng.uniform(0, 1, n))
    initial = _columns(rng.uniform(-1, 1, n), np.zeros(n))
    ends = _columns(rng.choice([-1.0, 1.0], n), rng.uniform(0, 1, n))

    def residuals(u):
        def interior(z):
            u_x, u_t = jax.grad(u)(z)
            return u_t + u(z) * u_x - 0.01 / jnp.pi * _second_x(u, z)

        start = jax.vmap(u)(initial) + jnp.sin(jnp.pi * initial[:, 0])
        return jax.vmap(interior)(inner), start, jax.vmap(u)(ends)

    return _physics((2, 32, 32, 32, 32, 1), (1.0, 1.0, 1.0), residuals)


def poisson() -> Task:
    """-Δu = f on [0, 1]², u = 0 on the edge; u = sin πx sin πy."""
    rng, n = np.random.default_rng(1), 1024
    edge = _edge(rng, 0.0, 1.0, n)
    inner = jnp.asarray(rng.uniform(0, 1, (n, 2)), jnp.float32)

    def residuals(u):
        def interior(z):
            s = jnp.sin(jnp.pi * z)
            return jnp.trace(jax.hessian(u)(z)) + 2 * jnp.pi**2 * s[0] * s[1]

        return jax.vmap(interior)(inner), jax.vmap(u)(edge)

    return _physics((2, 48, 48, 48, 1), (1.0, 10.0), residuals)


def helmholtz() -> Task:
    """Δu + 4u = f on [-1, 1]², u = 0 on the edge; u = sin πx sin 2πy."""
    rng, n = np.random.default_rng(2), 1024
    edge = _edge(rng, -1.0, 1.0, n)
    inner = jnp.asarray(rng.uniform(-1, 1, (n, 2)), jnp.float32)

    def residuals(u):
        def interior(z):
            exact = jnp.sin(jnp.pi * z[0]) * jnp.sin(2 * jnp.pi * z[1])
            f = (4.0 - 5 * jnp.pi**2) * exact
            return jnp.trace(jax.hessian(u)(z)) + 4.0 * u(z) - f

        return jax.vmap(interior)(inner), jax.vmap(u)(edge)

    return _physics((2, 40, 40, 40, 1), (1.0, 10.0), residuals)


def heat() -> Task:
    """u_t = 0.1 u_xx on [0, 1]², u(x, 0) = sin πx + ½ sin 3πx, u = 0 at the ends."""
    rng, n = np.random.default_rng(3), 1024
    inner = jnp.asarray(rng.uniform(0, 1, (n, 2)), jnp.float32)
    initial = _columns(rng.uniform(0, 1, n), np.zeros(n))
    ends = _columns(rng.choice([0.0, 1.0], n), rng.uniform(0, 1, n))

    def residuals(u):
        def interior(z):
            return jax.grad(u)(z)[1] - 0.1 * _second_x(u, z)

        x = jnp.pi * initial[:, 0]
        start = jax.vmap(u)(initial) - jnp.sin(x) - 0.5 * jnp.sin(3 * x)
        return jax.vmap(interior)(inner), start, jax.vmap(u)(ends)

    return _physics((2, 32, 32, 32, 1), (1.0, 1.0, 1.0), residuals)


CHOSEN_ON = (autoencoder, burgers, poisson, helmholtz)
HELD_OUT = (heat, deep_narrow, patches)
TASKS = {task.__name__: task for task in (*CHOSEN_ON, *HELD_OUT)}

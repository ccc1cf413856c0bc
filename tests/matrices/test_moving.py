"""What is kept for matrices, on another number of devices than it was planned for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_kept import conditioned
from test_placement import (
    difference,
    free_messages,  # noqa: F401 - a fixture
    make_mesh,
)

import nlcg_optax
from nlcg_optax import Matrix, matrices, scale_by_soap
from nlcg_optax.matrices.matrix import is_kept

pytestmark = pytest.mark.usefixtures("x64", "free_messages")

# Stacks that fill slots and those that share a row; layers, parts; and long ones that
# are split, or filled up with zeros to the length of others.
SHAPES = {
    **{f"a{i}": (8, 24) for i in range(9)},
    "b": (24, 8),
    "c": (16, 16),
    "d": (8, 40),
    "embedding": (128, 8),
    "layers": (3, 8, 48),
    "bias": (8,),
}


def kinds(path, leaf):
    if len(leaf.shape) == 3:
        return Matrix((1,), (2,), (0,), parts=2)
    return matrices.last_axis(path, leaf)


def kept(state):
    return [n for n in jax.tree.leaves(state, is_leaf=is_kept) if is_kept(n)]


def test_the_next_update_is_that_of_the_devices_before():
    soap = scale_by_soap(0.5, eps=0.01, max_side=16, matrices=kinds)
    tx = optax.chain(soap, optax.scale(-1.0))
    first, second, third = (conditioned(SHAPES, seed) for seed in range(3))
    update, move = jax.jit(tx.update), jax.jit(matrices.for_devices, static_argnums=1)

    def planned(number):
        with jax.set_mesh(make_mesh((number,), ("fsdp",))):
            state = jax.jit(tx.init)(first)
        return jax.tree.map(np.asarray, state)

    state = planned(8)
    assert 8 in {node.seen.shape[1] for node in kept(state)}
    for g in (first, second):
        _, state = update(g, state)
    expected, _ = update(third, state)
    expected = jax.tree.map(np.asarray, expected)
    moved = state
    for number in (4, 1, 8):
        moved, like = move(moved, number), planned(number)
        assert jax.tree.structure(moved) == jax.tree.structure(like)
        assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, like)
        got, _ = update(third, moved)
        assert difference(got, expected) < 1e-12
    for node, before in zip(kept(moved), kept(state), strict=True):
        assert jnp.sum(node.fallbacks) == jnp.sum(before.fallbacks)


def test_other_states_and_numbers():
    state = nlcg_optax.nlcg(0.1).init({"w": np.ones((4, 4))})
    same = matrices.for_devices(state, 4)
    assert jax.tree.structure(same) == jax.tree.structure(state)
    bias = scale_by_soap().init({"b": np.ones(3)})
    assert matrices.for_devices(bias, 4).factors == {"b": None}
    with pytest.raises(ValueError, match="devices=0 is not valid"):
        matrices.for_devices(state, 0)

"""What `pmean_value_and_grad` owes without devices: `vmap` names an axis as well."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nlcg_optax import nlcg_paper, pmean_value_and_grad

X = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)


def loss_fn(scale, w, x, *, power=2):
    return jnp.mean((scale * (x @ w)) ** power), {"sum": jnp.sum(x)}


@pytest.mark.parametrize("argnums", [0, 1, -2, (0, 1), (1, 0), (-2, 0)])
def test_equals_value_and_grad_of_the_whole(argnums):
    w = jnp.array([1.0, -2.0, 3.0])
    run = pmean_value_and_grad(loss_fn, "data", argnums=argnums, has_aux=True)
    (value, aux), grads = jax.vmap(
        lambda x: run(jnp.float32(0.5), w, x, power=4), axis_name="data"
    )(X)
    (expected, _), expected_grads = jax.value_and_grad(loss_fn, argnums, has_aux=True)(
        jnp.float32(0.5), w, X.reshape(-1, 3), power=4
    )
    for got, want in zip(
        jax.tree.leaves((value, grads)),
        jax.tree.leaves((expected, expected_grads)),
        strict=True,
    ):
        np.testing.assert_allclose(
            got, np.broadcast_to(want, got.shape), rtol=1e-5, atol=1e-6
        )
    assert jax.tree.structure(grads) == jax.tree.structure(expected_grads)
    np.testing.assert_allclose(aux["sum"], X.sum((1, 2)), rtol=1e-4)  # not averaged


def test_a_wrong_argnums_is_an_error_of_jax():
    run = pmean_value_and_grad(loss_fn, "data", argnums=7, has_aux=True)
    with pytest.raises(TypeError, match="argnums=7"):
        jax.vmap(lambda x: run(1.0, jnp.ones(3), x), axis_name="data")(X)


def test_an_unbound_axis_is_named():
    message = "Axis 'data' is not bound: no `shard_map` or `pmap`"
    with pytest.raises(NameError, match=message):
        pmean_value_and_grad(loss_fn, "data")(1.0, jnp.ones(3), X[0])
    tx = nlcg_paper(0.1, axis_name=("data",))
    x = jnp.ones(3)
    with pytest.raises(NameError, match=message):
        tx.update(x, tx.init(x), x, value=1.0)

"""Limited-memory BFGS, beside `optax.scale_by_lbfgs`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nlcg_optax


def test_limited_memory_bfgs_is_optax_lbfgs(x64):
    """The two agree where both apply: here through a memory that wraps around."""
    hessian = jnp.diag(jnp.arange(1.0, 7.0)) + 0.3
    ours = nlcg_optax.scale_by_limited_memory_bfgs(3)
    theirs = optax.scale_by_lbfgs(3)
    x = jnp.linspace(-1.0, 2.0, 6)
    a, b = ours.init(x), theirs.init(x)
    for _ in range(7):
        g = hessian @ x
        u, a = ours.update(g, a, x)
        with jax.numpy_dtype_promotion("standard"):
            v, b = theirs.update(g, b, x)
        np.testing.assert_allclose(u, v, rtol=1e-9)
        x = x - (g @ u) / (u @ hessian @ u) * u
    assert a.pairs == 6 and a.skipped == 0


def test_limited_memory_bfgs_skips_negative_curvature():
    tx = nlcg_optax.scale_by_limited_memory_bfgs(2)
    state = tx.init(jnp.zeros(2))
    _, state = tx.update(jnp.array([1.0, 0.0]), state, jnp.zeros(2))
    update, state = tx.update(jnp.array([0.5, 0.0]), state, jnp.array([-1.0, 0.0]))
    assert state.pairs == 1  # the gradient fell along the way down
    update, state = tx.update(jnp.array([0.7, 0.0]), state, jnp.array([-1.5, 0.0]))
    assert state.pairs == 1 and state.skipped == 1
    np.testing.assert_allclose(update, [1.4, 0.0])


def test_a_traced_memory_size_is_to_be_static():
    with pytest.raises(ValueError, match="memory_size is a traced .*static_args=") as e:
        jax.jit(lambda n: nlcg_optax.scale_by_limited_memory_bfgs(n).init(1.0))(3)
    assert "'memory_size'" in str(e.value)


@pytest.mark.parametrize("enable_x64", [False, True])
@pytest.mark.parametrize(
    "tx",
    [nlcg_optax.scale_by_diagonal_bfgs(), nlcg_optax.scale_by_limited_memory_bfgs(2)],
    ids=["diagonal", "limited_memory"],
)
def test_parameters_may_be_python_numbers(tx, enable_x64):
    with jax.enable_x64(enable_x64):
        array = jnp.float64 if enable_x64 else jnp.float32
        numbers, arrays = tx.init({"a": 1.0}), tx.init({"a": array(1.0)})
        for x in (1.0, 0.5, 0.25):
            g = {"a": array(3 * x)}
            update, numbers = tx.update(g, numbers, {"a": x})
            expected, arrays = tx.update(g, arrays, {"a": array(x)})
            assert update == expected
        for leaf, other in zip(*map(jax.tree.leaves, (numbers, arrays)), strict=True):
            np.testing.assert_array_equal(leaf, other)
            assert (leaf.dtype, leaf.weak_type) == (other.dtype, other.weak_type)

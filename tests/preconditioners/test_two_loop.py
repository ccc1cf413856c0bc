"""The two-loop recursion, as a pure function."""

import jax.numpy as jnp
import numpy as np
import pytest

from nlcg_optax.preconditioners._two_loop import two_loop_recursion


@pytest.mark.parametrize("count", [0, 1, 3])
def test_it_multiplies_by_the_dense_inverse(x64, count):
    rng = np.random.default_rng(0)
    hessian = np.diag([1.0, 2.0, 5.0, 9.0])
    s = rng.normal(size=(3, 4))  # the newest first
    y = s @ hessian
    weights = 1 / np.sum(s * y, axis=1)
    h = 0.5 * np.eye(4)
    for i in reversed(range(count)):  # the formula of the dense update, oldest first
        v = np.eye(4) - weights[i] * np.outer(y[i], s[i])
        h = v.T @ h @ v + weights[i] * np.outer(s[i], s[i])
    q = rng.normal(size=4)
    pairs = tuple(jnp.asarray(a) for a in (s, y, weights))
    got = two_loop_recursion(
        jnp.asarray(q),
        lambda age: (
            *(a[age] for a in pairs[:2]),
            jnp.where(age < count, pairs[2][age], 0),
        ),
        3,
        jnp.float64(0.5),
        jnp.vdot,
    )
    np.testing.assert_allclose(got, h @ q, rtol=1e-12)

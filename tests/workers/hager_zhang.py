"""Run by `test_hager_zhang.py` in a process with two devices; not a test by itself."""

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402
from problems import paper  # noqa: E402

import nlcg_optax  # noqa: E402

STEPS = 5
MEMORY = 3
rng = np.random.default_rng(0)
PARAMS = {"w": rng.normal(size=(4, 3)), "b": rng.normal(size=2)}
PARAMS["c"] = rng.normal(size=6) + 1j * rng.normal(size=6)


def difference(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(
        float(np.max(np.abs(x - y) / (np.abs(y) + 1e-3), initial=0.0))
        for x, y in (np.asarray(pair, complex) for pair in pairs)
    )


def search(axis_name, preconditioner, mesh=None, manual=False):
    """Steps with a line search, which evaluates an objective over all devices."""
    tx = paper(
        1.0,
        beta_rule="hager_zhang",
        beta_bounds=(-np.inf, np.inf),
        preconditioner=preconditioner,
        restart_on_ascent=True,
        step_rule=nlcg_optax.scale_by_hager_zhang_linesearch(axis_name=axis_name),
        axis_name=axis_name,
    )

    def value_fn(params):
        # The leaves differ in curvature and in what they do to the first step.
        values = [
            (k + 1) * jnp.sum(jnp.abs(x) ** 4 + jnp.abs(x - 0.3) ** 2)
            for k, x in enumerate(jax.tree.leaves(params))
        ]
        total = sum(values[1:], values[0])
        return total if axis_name is None else jax.lax.psum(total, axis_name)

    def step(params, state):
        value, grad = jax.value_and_grad(value_fn)(params)
        updates, state = tx.update(
            jax.tree.map(jnp.conj, grad),
            state,
            params,
            value=value,
            grad=grad,
            value_fn=value_fn,
        )
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, PARAMS)
    state = tx.init(params)

    def memory_spec(x):  # of limited-memory BFGS, whose leading axis is the pairs'
        if jnp.shape(x)[:1] != (MEMORY,):
            return P("x") if jnp.ndim(x) else P()
        return P(None, "x") if jnp.ndim(x) > 1 else P()

    if mesh is not None:
        params, state = jax.tree.map(
            lambda x: jax.device_put(x, NamedSharding(mesh, memory_spec(x))),
            (params, state),
        )
    if manual:
        specs = jax.tree.map(memory_spec, (params, state))
        step = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=specs)
    step = jax.jit(step)
    for _ in range(STEPS):
        params, state = step(params, state)
    return jax.tree.map(np.asarray, (params, state))


def main():
    mesh = jax.make_mesh((2,), ("x",))
    for memory in (True, False):

        def preconditioner(axis_name, memory=memory):
            if not memory:
                return None
            return nlcg_optax.scale_by_limited_memory_bfgs(MEMORY, axis_name=axis_name)

        expected = search(None, preconditioner(None))
        manual = difference(search("x", preconditioner("x"), mesh, True), expected)
        automatic = difference(search(None, preconditioner(None), mesh), expected)
        print("search", memory, f"{manual:.1e} {automatic:.1e}")
        assert manual < 1e-9 and automatic < 1e-9


if __name__ == "__main__":
    main()

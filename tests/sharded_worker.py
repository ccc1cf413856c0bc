"""Run by `test_sharding.py` in a process with two devices; not a test by itself."""

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import nlcg_optax  # noqa: E402

STEPS = 5
MEMORY = 3
rng = np.random.default_rng(0)
SHAPES = {"w": (4, 3), "b": (2,), "c": (6,)}
PARAMS = {k: rng.normal(size=s) for k, s in SHAPES.items()}
PARAMS["c"] = PARAMS["c"] + 1j * rng.normal(size=6)
NOISE = [{k: rng.normal(size=s) for k, s in SHAPES.items()} for _ in range(STEPS)]
LOSSES = 1 + rng.uniform(size=STEPS)


def gradient(params, noise):
    # Leaf-wise, so that only the optimizer communicates.
    return jax.tree.map(lambda x, e: 2 * x + e.astype(x.dtype), params, noise)


def train(tx, params):
    """Steps unrolled; returns the parameters and the state after each."""
    state = tx.init(params)

    def step(params, state, noise, value):
        grads = gradient(params, noise)
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    return state, step


def spec(x):
    return P("x") if jnp.ndim(x) else P()


def run(tx, mesh=None, manual=False):
    params = jax.tree.map(jnp.asarray, PARAMS)
    noise = [jax.tree.map(jnp.asarray, e) for e in NOISE]
    state, step = train(tx, params)
    if mesh is not None:

        def put(tree):
            return jax.tree.map(
                lambda x: jax.device_put(x, NamedSharding(mesh, spec(x))), tree
            )

        params, state, noise = put(params), put(state), put(noise)
    if manual:
        specs = (
            jax.tree.map(spec, params),
            jax.tree.map(spec, state),
            jax.tree.map(spec, noise[0]),
            P(),
        )
        step = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=specs[:2])
    step = jax.jit(step)
    for e, value in zip(noise, LOSSES, strict=True):
        params, state = step(params, state, e, jnp.asarray(value))
    return jax.tree.map(np.asarray, (params, state))


def difference(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(
        float(np.max(np.abs(x - y) / (np.abs(y) + 1e-3), initial=0.0))
        for x, y in (np.asarray(pair, complex) for pair in pairs)
    )


def transformations(axis_name):
    """Name and transformation, their sums over the named axis."""
    for rule in ("hager_zhang",):  # it needs every inner product
        yield (
            rule,
            nlcg_optax.nlcg(
                0.05,
                beta_rule=rule,
                beta_bounds=(-2.0, 2.0),
                restart_on_ascent=True,
                step_rule="online",
                axis_name=axis_name,
            ),
        )
    yield (
        "lars",
        optax.chain(
            nlcg_optax.scale_by_lars(0.5, axis_name=axis_name),
            nlcg_optax.nlcg(0.05, axis_name=axis_name),
        ),
    )
    yield (
        "plain",
        nlcg_optax.nlcg(0.05, preconditioner=None, axis_name=axis_name),
    )


def search(axis_name, preconditioner, mesh=None, manual=False):
    """Steps with a line search, which evaluates an objective over all devices."""
    tx = nlcg_optax.nlcg(
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
            return spec(x)
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
    whole = dict(transformations(None))
    for name, tx in transformations("x"):
        expected = run(whole[name])
        manual = difference(run(tx, mesh, manual=True), expected)
        automatic = difference(run(whole[name], mesh), expected)
        print(name, f"{manual:.1e} {automatic:.1e}")
        assert manual < 1e-12, name
        assert automatic < 1e-12, name


if __name__ == "__main__":
    main()

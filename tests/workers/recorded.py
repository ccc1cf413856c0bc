"""Trajectories of today's numbers in float64, to which later code is held.

`test_recorded.py` compares; this program, run by itself, records:

    python tests/workers/recorded.py FILE.npz          # on one device
    XLA_FLAGS=--xla_force_host_platform_device_count=8 \
        python tests/workers/recorded.py FILE.npz --mesh   # on eight

It uses public names alone, and was first run before the house was rebuilt. A row of it
changes only where a commit says that these numbers change, and why.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nlcg_optax

X = np.random.default_rng(7).normal(size=(96, 6))
Y = np.sin(X @ np.random.default_rng(8).normal(size=(6, 3))) + 0.1


def start():
    rng = np.random.default_rng(9)
    return {
        "a": jnp.asarray(rng.normal(size=(6, 8)) / 2),
        "b": jnp.zeros(8),
        "c": jnp.asarray(rng.normal(size=(8, 3)) / 3),
    }


def model(params, x):
    return jnp.tanh(x @ params["a"] + params["b"]) @ params["c"]


def loss_fn(outputs, y):
    return jnp.mean((outputs - y) ** 2)


def run(
    tx,
    steps,
    replayed,
    *,
    rows=96,
    part=96,
    noise=0.0,
    jump=None,
    descends=True,
    hessian=False,
):
    """The points from which steps were made, flat, and the steps.

    Batches are of so many rows, in turn. Where earlier points are replayed, each step
    is made from the earlier one, so that no rounding error is fed back.
    """

    @jax.jit
    def step(params, state, i):
        first = (i * rows) % 96
        x = jax.lax.dynamic_slice_in_dim(jnp.asarray(X), first, rows)
        y = jax.lax.dynamic_slice_in_dim(jnp.asarray(Y), first, rows)

        def value_fn(params):
            return loss_fn(model(params, x), y)

        loss, grads = jax.value_and_grad(value_fn)(params)
        if noise:
            drawn = jax.random.normal(jax.random.key(i), [80])
            grads = jax.tree.map(
                lambda g, n: g + noise * n, grads, unflatten(drawn, grads)
            )
        if jump is not None:
            loss = jnp.where(i == jump[0], jump[1], loss)
        curvature = (
            nlcg_optax.hessian(value_fn)
            if hessian
            else nlcg_optax.gauss_newton(
                lambda p: model(p, x[:part]), lambda out: loss_fn(out, y[:part])
            )
        )
        given = {"value": loss, "curvature": curvature, "value_fn": value_fn}
        extra = {"grad": grads} if not hessian else {}
        updates, state = optax.with_extra_args_support(tx).update(
            grads, state, params, **given, **extra
        )
        sign = 1 if descends else -1
        return jax.tree.map(lambda u: sign * u, updates), state

    params = start()
    state, points, made = tx.init(params), [], []
    for i in range(steps):
        if replayed is not None:
            params = unflatten(replayed[i], params)
        points.append(flatten(params))
        updates, state = step(params, state, i)
        params = jax.tree.map(jnp.add, params, updates)
        made.append(flatten(updates))
    return np.stack([points, made])


def flatten(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def unflatten(flat, like):
    leaves, structure = jax.tree.flatten(like)
    parts = np.split(flat, np.cumsum([x.size for x in leaves])[:-1])
    new = [jnp.reshape(p, x.shape) for p, x in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(structure, new)


def by_curvature(
    replayed, steps=20, preconditioner="orthogonalization", problem=None, **options
):
    made = {
        "orthogonalization": nlcg_optax.scale_by_orthogonalization,
        "diagonal_bfgs": nlcg_optax.scale_by_diagonal_bfgs,
        "rms": optax.scale_by_rms,
    }
    if isinstance(preconditioner, str):
        preconditioner = made[preconditioner]()
    tx = nlcg_optax.scale_by_quadratic_model(preconditioner, **options)
    return run(tx, steps, replayed, descends=False, **(problem or {}))


def by_direction(replayed, rule, *, step_rule=None, steps=20, rate=0.05, **options):
    """The public chain: a direction, a step rule, a learning rate."""
    pieces = [
        nlcg_optax.scale_by_conjugate_direction(
            rule, nlcg_optax.scale_by_orthogonalization(), **options
        )
    ]
    if isinstance(step_rule, str):
        pieces.append(nlcg_optax.scale_by_loss_feedback(step_rule))
    pieces.append(optax.scale_by_learning_rate(rate))
    return run(optax.chain(*pieces), steps, replayed, rows=48)


SMALL = {"noise": 0.3}
CASES = {
    "curvature": by_curvature,
    "curvature, part of the batch": functools.partial(
        by_curvature, problem={"part": 24}
    ),
    "curvature, plain gradient": functools.partial(by_curvature, preconditioner=None),
    "curvature, diagonal_bfgs": functools.partial(
        by_curvature, preconditioner="diagonal_bfgs"
    ),
    "curvature, two preconditioners": functools.partial(
        by_curvature, preconditioner=[optax.scale_by_rms(), None]
    ),
    "curvature, five residuals": functools.partial(
        by_curvature, preconditioner="rms", residuals=5
    ),
    "curvature, no residuals": functools.partial(by_curvature, residuals=0),
    "curvature, no history": functools.partial(by_curvature, history=0),
    "curvature, one past step": functools.partial(by_curvature, history=1),
    "curvature, hessian": functools.partial(
        by_curvature, preconditioner="rms", problem={"hessian": True}
    ),
    "curvature, schedule": functools.partial(
        by_curvature,
        preconditioner="rms",
        steps=10,
        multiplier=optax.linear_schedule(1.0, 0.5, 20),
    ),
    "curvature, bounded": functools.partial(
        by_curvature, preconditioner="rms", max_growth=0.7
    ),
    "curvature, taken back": functools.partial(
        by_curvature, problem={"jump": (7, 9.0)}
    ),
    "curvature, not finite": functools.partial(
        by_curvature, problem={"jump": (7, np.nan)}
    ),
    "curvature, noise": functools.partial(
        by_curvature, preconditioner="rms", problem=SMALL
    ),
    # Noise rules from step 4 on: products have cost a fifth of the run's gradients.
    "curvature, horizon": functools.partial(
        by_curvature,
        steps=80,
        preconditioner="rms",
        problem=SMALL,
        horizon=120,
    ),
    "curvature, horizon, taken back": functools.partial(
        by_curvature,
        steps=80,
        preconditioner="rms",
        problem={**SMALL, "jump": (40, 999.0)},
        horizon=120,
    ),
    "curvature, horizon, one past step": functools.partial(
        by_curvature,
        steps=80,
        preconditioner="rms",
        problem=SMALL,
        horizon=120,
        history=1,
        residuals=0,
    ),
    "curvature, horizon without noise": functools.partial(by_curvature, horizon=2000),
    "step, rises": functools.partial(
        by_direction, rule="fletcher_reeves", step_rule="step", rate=0.5, nesterov=True
    ),
    "online, rises": functools.partial(
        by_direction, rule="fletcher_reeves", step_rule="online", rate=0.5
    ),
    "paper": lambda replayed: run(nlcg_optax.nlcg_paper(0.3), 20, replayed, rows=48),
    "hager_zhang line search": lambda replayed: run(
        nlcg_optax.nlcg(
            1.0,
            beta_rule="hager_zhang",
            beta_bounds=(-np.inf, np.inf),
            preconditioner=None,
            step_rule=nlcg_optax.scale_by_hager_zhang_linesearch(),
        ),
        10,
        replayed,
    ),
    "limited-memory BFGS": lambda replayed: run(
        optax.chain(
            nlcg_optax.scale_by_limited_memory_bfgs(), optax.scale_by_learning_rate(0.3)
        ),
        12,
        replayed,
    ),
    "lars": lambda replayed: run(
        optax.chain(
            nlcg_optax.scale_by_lars(0.5), nlcg_optax.nlcg(0.05, step_rule=None)
        ),
        12,
        replayed,
        rows=48,
    ),
    "weight decay": lambda replayed: run(
        nlcg_optax.nlcg(0.05, weight_decay=0.1, step_rule=None), 12, replayed, rows=48
    ),
    **{
        rule: functools.partial(by_direction, rule=rule, beta_bounds=(-0.5, 0.9))
        for rule in nlcg_optax.beta.BETA_RULES
    },
    "restarts": functools.partial(
        by_direction,
        rule="polak_ribiere",
        restart_every=4,
        restart_nonorthogonal=0.2,
        restart_on_ascent=True,
    ),
}


def on_mesh(layout, door):
    """Eight steps of orthogonalization and of the optimizer over eight devices."""
    rng = np.random.default_rng(3)
    shapes = {
        **{f"a{i}": (8, 24) for i in range(10)},
        **{f"b{i}": (24, 8) for i in range(3)},
        **{"conv": (3, 3, 8, 16), "embedding": (128, 8), "bias": (8,)},
    }
    params = {name: jnp.asarray(rng.normal(size=s)) for name, s in shapes.items()}
    mesh = jax.make_mesh((8,), ("fsdp",), (AxisType.Auto,))
    specs = {
        name: P(*[None] * (len(s) - 1), "fsdp") if layout == "sharded" else P()
        for name, s in shapes.items()
    }
    axis = "fsdp" if door == "shard_map" else None
    # Of names like these the default knows nothing, or another thing (an embedding).
    preconditioner = nlcg_optax.scale_by_orthogonalization(
        matrices=nlcg_optax.matrices.last_axis, axis_name=axis
    )
    tx = nlcg_optax.nlcg(
        0.05, preconditioner=preconditioner, step_rule=None, axis_name=axis
    )

    def spec(path, x):
        name = getattr(path[-1], "key", None)
        return specs[name] if x.shape == shapes.get(name) else P()

    def step(params, state):
        grads = jax.tree.map(lambda x: x + jnp.sin(3 * x), params)
        updates, state = tx.update(grads, state, params)
        return jax.tree.map(lambda x, u: x + u, params, updates), state

    state = tx.init(params)
    where = jax.tree_util.tree_map_with_path(spec, state)
    if door == "shard_map":
        step = jax.shard_map(
            step, mesh=mesh, in_specs=(specs, where), out_specs=(specs, where)
        )
    put = jax.tree.map(lambda s: NamedSharding(mesh, s), (specs, where))
    params, state = jax.device_put((params, state), put)
    with jax.set_mesh(mesh):
        step = jax.jit(step, out_shardings=put)
        for _ in range(8):
            params, state = step(params, state)
    return flatten(params)


MESH_CASES = {
    f"{door}, {layout}": functools.partial(on_mesh, layout, door)
    for door in ("jit", "shard_map")
    for layout in ("sharded", "replicated")
}


def main():
    path, *mesh = sys.argv[1:]
    jax.config.update("jax_enable_x64", True)
    if mesh:
        found = {name: case() for name, case in MESH_CASES.items()}
    else:
        found = {name: case(None) for name, case in CASES.items()}
    np.savez_compressed(path, **found)


if __name__ == "__main__":
    main()

"""Many devices through `shard_map`: every device's step, and what it communicates.

    python examples/mesh_shard_map.py
    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu \
        python examples/mesh_shard_map.py   # 8 devices, on any machine

The step is what one device does with its share of the batch, first with replicated
parameters (data-parallel), then with sharded ones (FSDP), gathered where they are used.
The loss printed is the same on any number of devices, and in every mesh example.
"""

import digits_mlp
import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nlcg_optax


def train(name, min_size):
    """Trains with arrays of `min_size` or more sharded, the others replicated."""
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,))

    def spec(x):
        axis = int(np.argmax(x.shape)) if x.ndim else 0
        if x.size < min_size or x.shape[axis] % devices:
            return P()
        return P(*[None] * axis, "data")

    # The axis makes inner products global over the sharded leaves; those that are
    # replicated count once. With replicated leaves alone it changes nothing. (`nlcg`
    # takes the same argument, and puts the shards of each matrix together by the whole
    # shapes that `tx.init` sees, which is why that runs outside of the `shard_map`. It
    # magnifies rounding, so that its losses agree to fewer digits.)
    tx = nlcg_optax.nlcg_paper(learning_rate=0.3, axis_name="data")

    def init():
        params = digits_mlp.init()
        return params, tx.init(params)

    specs = jax.tree.map(spec, jax.eval_shape(init))

    def gather(x, spec):
        """The whole array. Its gradient is reduced and scattered, in turn."""
        if "data" not in spec:
            return x
        return jax.lax.all_gather(x, "data", axis=spec.index("data"), tiled=True)

    def loss_fn(params, batch):
        return digits_mlp.loss_fn(jax.tree.map(gather, params, specs[0]), batch)

    def step(params, opt_state, batch):
        # The batch is this device's share of it; loss and gradient are the global ones.
        loss, grads = nlcg_optax.pmean_value_and_grad(loss_fn, "data")(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        return optax.apply_updates(params, updates), opt_state, loss

    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    params, opt_state = jax.jit(init, out_shardings=shardings)()
    step = jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=(*specs, P("data")), out_specs=(*specs, P())
        ),
        donate_argnums=(0, 1),
    )
    with jax.transfer_guard("disallow"):
        for i, batch in enumerate(digits_mlp.batches(), start=1):
            batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
            params, opt_state, loss = step(params, opt_state, batch)
            if i % 10 == 0:
                print(f"{name}: step {i}, loss {jax.device_get(loss):.5f}")
    share, devices = digits_mlp.share(params, opt_state), jax.device_count()
    print(
        f"{name}: each of {devices} devices holds {share:.0%} of parameters and state"
    )


if __name__ == "__main__":
    train("replicated", min_size=np.inf)
    train("sharded", min_size=1024)

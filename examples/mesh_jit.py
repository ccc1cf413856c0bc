"""Many devices through `jit` and `NamedSharding`: the front door to try first.

    python examples/mesh_jit.py
    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu \
        python examples/mesh_jit.py   # 8 devices, on any machine

The step is that of one device. XLA reads the shardings of its inputs and adds the
communication; means and inner products are global by themselves.
The loss printed is the same on any number of devices, and in every mesh example.
"""

import functools

import digits_mlp
import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nlcg_optax


def main():
    """Trains with parameters and state sharded over `fsdp`, the batch over both."""
    devices = jax.device_count()
    fsdp = 2 if devices % 2 == 0 else 1
    mesh = jax.make_mesh(
        (devices // fsdp, fsdp), ("data", "fsdp"), (AxisType.Auto, AxisType.Auto)
    )
    by_row = NamedSharding(mesh, P(("data", "fsdp")))

    def sharding(x):
        """Big arrays are split along their longest axis, small ones are replicated."""
        axis = int(np.argmax(x.shape)) if x.ndim else 0
        if x.size < 1024 or x.shape[axis] % fsdp:
            return NamedSharding(mesh, P())
        return NamedSharding(mesh, P(*[None] * axis, "fsdp"))

    tx = nlcg_optax.nlcg_paper(learning_rate=0.3)

    def init():
        params = digits_mlp.init()
        return params, tx.init(params)

    # Born sharded: no device ever holds the whole state. One rule serves parameters
    # and state, whose arrays have the parameters' shapes.
    shardings = jax.tree.map(sharding, jax.eval_shape(init))
    params, opt_state = jax.jit(init, out_shardings=shardings)()

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=(*shardings, None))
    def step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(digits_mlp.loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        return optax.apply_updates(params, updates), opt_state, loss

    # Nothing moves between host and devices but what is put and got by name.
    with jax.transfer_guard("disallow"):
        for i, batch in enumerate(digits_mlp.batches(), start=1):
            batch = jax.device_put(batch, by_row)
            params, opt_state, loss = step(params, opt_state, batch)
            if i % 10 == 0:
                print(f"jit: step {i}, loss {jax.device_get(loss):.5f}")
    share = digits_mlp.share(params, opt_state)
    print(f"jit: each of {devices} devices holds {share:.0%} of parameters and state")


if __name__ == "__main__":
    main()

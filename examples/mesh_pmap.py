"""Many devices through `pmap`, for code that has it; new code does better by `jit`.

    python examples/mesh_pmap.py
    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu \
        python examples/mesh_pmap.py   # 8 devices, on any machine

The step is what one device does with its share of the batch and whole parameters.
The loss printed is the same on any number of devices, and in every mesh example.
"""

import functools

import digits_mlp
import jax
import jax.numpy as jnp
import optax

import nlcg_optax


def main():
    """Trains with parameters and state replicated, the batch split."""
    devices = jax.device_count()
    # No axis_name: every device has the whole trees, and the same ones.
    tx = nlcg_optax.nlcg_paper(learning_rate=0.3)

    def init(device):
        del device
        params = digits_mlp.init()
        return params, tx.init(params)

    @functools.partial(jax.pmap, axis_name="data", donate_argnums=(0, 1))
    def step(params, opt_state, batch):
        loss, grads = nlcg_optax.pmean_value_and_grad(digits_mlp.loss_fn, "data")(
            params, batch
        )
        # The mean loss, not the device's own: with that the copies would drift apart.
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        return optax.apply_updates(params, updates), opt_state, loss

    params, opt_state = jax.pmap(init)(jnp.arange(devices))
    for i, batch in enumerate(digits_mlp.batches(), start=1):
        batch = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
        params, opt_state, loss = step(params, opt_state, batch)
        if i % 10 == 0:
            print(f"pmap: step {i}, loss {loss[0]:.5f}")
    share = devices * digits_mlp.share(params, opt_state)  # whose first axis is theirs
    print(f"pmap: each of {devices} devices holds {share:.0%} of parameters and state")


if __name__ == "__main__":
    main()

"""Flax's two ways to hold an optimizer drive ours."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training import train_state

from nlcg_optax import diagnostics, nlcg_paper

pytestmark = pytest.mark.standard_promotion  # Flax promotes

INPUTS = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
TARGETS = np.tanh(INPUTS @ np.float32([[1.0], [-2.0], [0.5]]))
REPORTED = {
    *("beta", "cosine", "restarts", "base_step"),
    *("nonfinite_losses", "skipped_curvature"),
}


def optimizer():
    return optax.chain(
        optax.clip_by_global_norm(5.0), nlcg_paper(0.3, step_rule="online")
    )


def test_nnx_optimizer():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    tx = optimizer()
    trainer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def loss_fn(model):
        return jnp.mean((jnp.tanh(model(INPUTS)) - TARGETS) ** 2)

    # The same by hand.
    graph, params = nnx.split(model, nnx.Param)
    params = jax.tree.map(jnp.copy, params)
    state = tx.init(params)

    @nnx.jit
    def step(model, trainer):
        loss, grads = nnx.value_and_grad(loss_fn)(model)
        trainer.update(model, grads, value=loss)
        return loss

    losses = []
    for _ in range(30):
        losses.append(float(step(model, trainer)))
        loss, grads = jax.value_and_grad(lambda p: loss_fn(nnx.merge(graph, p)))(params)
        updates, state = tx.update(grads, state, params, value=loss)
        params = optax.apply_updates(params, updates)

    assert losses[-1] < 0.1 * losses[0]
    np.testing.assert_allclose(
        model.kernel[...], nnx.merge(graph, params).kernel[...], rtol=1e-2
    )
    report = diagnostics(trainer.opt_state)
    assert set(report) == REPORTED
    assert all(isinstance(value, jax.Array) for value in report.values())
    assert 0 < report["beta"] <= 1


def test_nnx_optimizer_needs_the_value():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    trainer = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)
    grads = nnx.grad(lambda m: jnp.sum(m(INPUTS)))(model)
    with pytest.raises(ValueError, match="value=None"):
        trainer.update(model, grads)


def test_linen_train_state():
    model = linen.Dense(1)
    state = train_state.TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), INPUTS)["params"],
        tx=optimizer(),
    )

    @jax.jit
    def step(state):
        def loss_fn(params):
            outputs = state.apply_fn({"params": params}, INPUTS)
            return jnp.mean((jnp.tanh(outputs) - TARGETS) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        # `apply_gradients` has no way to pass the loss on.
        updates, opt_state = state.tx.update(
            grads, state.opt_state, state.params, value=loss
        )
        return loss, state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
        )

    with pytest.raises(ValueError, match="TrainState of Flax drops it.*tx.update"):
        state.apply_gradients(grads=state.params, value=1.0)
    losses = []
    for _ in range(30):
        loss, state = step(state)
        losses.append(float(loss))
    assert losses[-1] < 0.1 * losses[0]
    report = diagnostics(state.opt_state)
    assert set(report) == REPORTED
    assert 0 < report["beta"] <= 1
    # The whole train state, too.
    assert set(diagnostics(state)) == REPORTED

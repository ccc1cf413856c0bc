"""Where the time of a training step goes: ResNet-32, CIFAR's shapes, batch 1,024.

    taskset -c 1 python benchmarks/update_cost/step.py       # about 5 minutes

The whole jitted step of `nlcg_optax.training`, and its parts jitted alone: the batch
(gather, crop, flip, standardize), the optimizer's update, the same without the guard
against steps that are not finite, and what the host does for a batch. The images are
made up. Writes `results/step.md`.
"""

import argparse
import pathlib
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nlcg_optax.training import data, loop, models, optimizers, steps
from nlcg_optax.training.config import apply_overrides, load_config, typed
from nlcg_optax.training.mesh import create_mesh

HERE = pathlib.Path(__file__).resolve().parent
CONFIG = HERE.parents[1] / "configs" / "cifar10_resnet32.py"
IMAGES, SHAPE = 4096, (32, 32, 3)


def seconds(call, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    config = load_config(CONFIG)
    nlcg = ["optimizer.name=nlcg", "optimizer.learning_rate=0.01"]
    apply_overrides(config, [f"batch_size={args.batch_size}", *nlcg])
    apply_overrides(config, ["schedule.name=cosine"])
    config = typed(config)
    mesh = create_mesh(config.mesh)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (IMAGES, *SHAPE), dtype=np.uint8)
    labels = rng.integers(0, 10, IMAGES)
    model = loop.create_model(config.model, 10)
    schedule = optax.constant_schedule(0.1)
    tx = optax.with_extra_args_support(
        optimizers.create_optimizer(config, schedule, models.l2_mask)
    )
    state = steps.create_state(model, tx, config, SHAPE, mesh)
    normalize = steps.normalizer(config.dataset)
    places = jnp.arange(args.batch_size)

    @jax.jit
    def make_batch(images, key, indices):
        augmented = data.augment(
            key,
            images[indices],
            crop_padding=config.dataset.crop_padding,
            flip=config.dataset.flip,
            places=places,
            batch_size=args.batch_size,
        )
        return normalize(augmented)

    def update(state, grads, loss, guard):
        updates, opt_state = tx.update(grads, state.opt_state, state.params, value=loss)
        params = optax.apply_updates(state.params, updates)
        new_state = state.replace(params=params, opt_state=opt_state)
        if guard:
            finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
            new_state = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old), new_state, state
            )
        return new_state

    device_images = jnp.asarray(images)
    indices = jnp.asarray(rng.integers(0, IMAGES, args.batch_size))
    key, loss = jax.random.key(0), jnp.float32(1.0)
    grads = jax.tree.map(lambda x: 1e-3 * x, state.params)
    rows = {}
    for name, guard in (("optimizer", True), ("optimizer without the guard", False)):
        jitted = jax.jit(update, static_argnums=3, donate_argnums=0)
        kept = [jax.tree.map(jnp.copy, state)]

        def once(jitted=jitted, kept=kept, guard=guard):
            kept[0] = jitted(kept[0], grads, loss, guard)
            return kept[0]

        rows[name] = seconds(once, 50)
    rows["batch: gather, augment, normalize"] = seconds(
        lambda: make_batch(device_images, key, indices), 5 * args.repeats
    )
    rows["host: indices of a batch"] = seconds(
        lambda: np.asarray(data.batch_indices(3, args.batch_size, IMAGES, 0)), 20
    )
    train_step = steps.make_train_step(model, tx, schedule, config, mesh, augment=True)
    jitted_step = jax.jit(train_step, donate_argnums=0)
    batch = {
        "image": jnp.asarray(images[: args.batch_size])[None],
        "label": jnp.asarray(labels[: args.batch_size], jnp.int32)[None],
    }
    start = time.perf_counter()
    compiled = jitted_step.lower(state, batch).compile()
    compile_s = time.perf_counter() - start
    kept = [state]

    def step():
        kept[0], metrics = compiled(kept[0], batch)
        return metrics

    whole = seconds(step, args.repeats)
    lines = ["| part | ms | of the step |", "|---|---:|---:|"]
    lines.append(f"| training step | {1e3 * whole:,.1f} | 100% |")
    for name, value in rows.items():
        lines.append(f"| {name} | {1e3 * value:,.2f} | {value / whole:.3%} |")
    lines += [
        "",
        f"ResNet-32, batch {args.batch_size}, nlcg as in configs/cifar10_resnet32.py; "
        f"the step compiled in {compile_s:.0f} s. `python benchmarks/update_cost/"
        f"step.py`, Python {platform.python_version()}, jax {jax.__version__}, optax "
        f"{optax.__version__}, device: {jax.devices()[0].device_kind}, one core.",
    ]
    (HERE / "results" / "step.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

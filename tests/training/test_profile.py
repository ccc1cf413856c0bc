"""Where the time of a step goes."""

import jax
import jax.numpy as jnp
from tiny import CONFIG, tiny_model

from nlcg_optax.training import loop, profile
from nlcg_optax.training.config import apply_overrides, load_config


def test_the_innermost_scope_counts_and_loops_count_once():
    found = profile.parts_of("""
  %dot.1 = f32[2]{0} dot(%a), metadata={op_name="jit(f)/nlcg_products/vmap()/dot"}
  %dot.2 = f32[2]{0} dot(%a), metadata={op_name="f/nlcg_products/nlcg_preconditioner/x"}
  %fusion.3 = (f32[2]{0}, s32[]) fusion(%a), metadata={op_name="jit(f)/add"}
  %while.4 = (f32[2]{0}, s32[]) while(%b), metadata={op_name="f/nlcg_products/while"}
  %all-gather-start.5 = f32[4]{0} all-gather-start(%dot.1)
""")
    assert found == {
        "dot.1": "products",
        "dot.2": "preconditioner",
        "fusion.3": "the rest",
        "all-gather-start.5": "all-reduce",
    }


def test_a_profile_finds_the_parts_of_a_program():
    @jax.jit
    def step(x):
        with jax.named_scope("nlcg_gradient"):
            y = jnp.linalg.eigh(x)[1]
        with jax.named_scope("nlcg_preconditioner"):
            return jnp.sin(y) @ y

    x = jnp.eye(100)
    program = step.lower(x).compile()
    program(x)
    taken = profile.Profile()
    assert taken.in_words() == "not told by this device's profiler"
    with taken.trace(program):
        jax.block_until_ready(program(x))
    assert taken.seconds["gradient"] > 0 and taken.seconds["preconditioner"] > 0
    assert taken.in_words().startswith("gradient ")
    taken.seconds = {"the rest": 1.0}
    assert taken.in_words().startswith("not told by this program")


def short_run(tmp_path, *words):
    config = load_config(CONFIG)
    small = ["dataset.max_train_examples=60", "batch_size=20", "num_epochs=1"]
    small += ["precise_batch_norm_batches=0", "compare_with=none"]
    apply_overrides(config, [*small, *words])
    return loop.train_and_evaluate(config, tmp_path / "run", create_model=tiny_model)


def test_a_run_tells_it_once(tmp_path, capsys):
    auto = ["optimizer.name=nlcg_auto", "optimizer.learning_rate=None"]
    # All images in a batch: on a CPU nobody tells what is inside of a condition.
    short_run(tmp_path, *auto, "schedule.name=none", "batch_size=60", "num_epochs=4")
    (line,) = (
        line for line in capsys.readouterr().out.splitlines() if "a step:" in line
    )
    assert "gradient" in line and "products" in line
    assert line.endswith("of a device's work")


def test_another_profile_is_no_obstacle(tmp_path, capsys):
    with jax.profiler.trace(str(tmp_path / "own")):
        sgd = ["optimizer.name=sgd", "optimizer.learning_rate=0.01"]
        result = short_run(tmp_path, *sgd, "schedule.name=constant")
    assert "a step: not measured" in capsys.readouterr().out
    assert result.step == 3

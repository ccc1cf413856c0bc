"""Where the time of a step goes."""

import jax
import jax.numpy as jnp
import pytest
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


@pytest.mark.parametrize("name", ["nlcg", "nlcg_auto"])
def test_a_run_tells_it_once(name, tmp_path, capsys):
    config = load_config(CONFIG)
    words = [f"optimizer.name={name}", "num_epochs=5"]
    if name == "nlcg_auto":
        words += ["optimizer.learning_rate=None", "schedule.name=none"]
    apply_overrides(config, words)
    loop.train_and_evaluate(config, tmp_path / "run", create_model=tiny_model)
    (line,) = (
        line for line in capsys.readouterr().out.splitlines() if "a step:" in line
    )
    assert "gradient" in line and "of a device's work" in line
    assert ("products" in line) is (name == "nlcg_auto")


def test_another_profile_is_no_obstacle(tmp_path, capsys):
    config = load_config(CONFIG)
    apply_overrides(config, ["num_epochs=5"])
    with jax.profiler.trace(str(tmp_path / "own")):
        result = loop.train_and_evaluate(
            config, tmp_path / "run", create_model=tiny_model
        )
    assert "a step: not measured" in capsys.readouterr().out
    assert result.step >= 5

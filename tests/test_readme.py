"""The README's Python runs, as it stands."""

import pathlib
import re

import pytest
import snippets

README = pathlib.Path(__file__).resolve().parents[1] / "README.md"


@pytest.mark.standard_promotion
def test_snippets_run_in_order():
    blocks = snippets.snippets(README.read_text())
    assert len(blocks) >= 3
    scope, printed = snippets.run(blocks, README)
    assert printed.startswith("[ 1. -2.  3.] True\n['base_step', 'beta',")

    # The chain that the README calls equal to nlcg(...) is.
    nlcg_optax, optax, jnp = (scope[name] for name in ("nlcg_optax", "optax", "jnp"))
    chain = re.search(
        r"tx = (optax.chain\(\n    nlcg_optax.*?\n\))", blocks[1], re.DOTALL
    )
    assert chain is not None
    written, alias = eval(chain[1], scope), nlcg_optax.nlcg(0.1)
    x = {"a": jnp.array([1.0, -2.0])}
    states = [written.init(x), alias.init(x)]
    for loss in (3.0, 2.0, 2.5, 1.0, 4.0, 3.0):
        grads = {"a": loss * x["a"] ** 3}
        (u, s), (v, t) = (
            tx.update(grads, state, x, value=loss)
            for tx, state in zip((written, alias), states, strict=True)
        )
        assert (u["a"] == v["a"]).all()
        states, x = [s, t], optax.apply_updates(x, u)

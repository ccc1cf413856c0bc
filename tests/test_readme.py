"""The README's Python runs, as it stands."""

import contextlib
import io
import pathlib
import re

import pytest

README = pathlib.Path(__file__).resolve().parents[1] / "README.md"


@pytest.mark.standard_promotion
def test_snippets_run_in_order():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    scope: dict = {}
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        for block in blocks:
            exec(compile(block, str(README), "exec"), scope)
    assert out.getvalue().startswith("[ 1. -2.  3.] True\n['base_step', 'beta',")

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

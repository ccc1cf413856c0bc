"""What is done with matrices as they are told, the table, and what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import nlcg_optax
from nlcg_optax import Matrix, matrices, scale_by_orthogonalization

pytestmark = pytest.mark.usefixtures("x64")


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape)


def once(g, matrix):
    tx = scale_by_orthogonalization(matrices=lambda path, leaf: matrix)
    return tx.update(g, tx.init(g))[0]


def test_what_is_no_matrix_has_the_scale_of_matrices():
    # Once seen, a gradient over the root of its second moment is its sign.
    g = {"embedding": jnp.full((5, 3), -2.0), "bias": jnp.full(3, 7.0)}
    tx = nlcg_optax.scale_by_orthogonalization(matrices=lambda path, leaf: None)
    update, _ = tx.update(g, tx.init(g))
    np.testing.assert_allclose(update["embedding"], -0.2, rtol=1e-6)
    np.testing.assert_allclose(update["bias"], 1, rtol=1e-6)


def test_the_axes_may_stand_in_any_order():
    g = normal(5, 3, 2, 4)  # output, input, height, width
    got = once(g, Matrix((1, 2, 3), (0,)))
    expected = oracle.orthogonalize(np.moveaxis(g, 0, -1))
    np.testing.assert_allclose(got, np.moveaxis(expected, -1, 0), atol=1e-12)
    g = normal(6, 2, 5)  # inputs, heads, features
    expected = oracle.orthogonalize(g.reshape(6, 10)).reshape(g.shape)
    np.testing.assert_allclose(once(g, Matrix((0,), (1, 2))), expected, atol=1e-12)


def test_batches_and_parts_are_matrices_of_their_own():
    g = normal(4, 3, 6)
    got = once(g, Matrix((0,), (2,), (-2,), parts=2))
    for i in range(3):
        for half in (slice(0, 3), slice(3, 6)):
            expected = oracle.orthogonalize(g[:, i, half])
            np.testing.assert_allclose(got[:, i, half], expected, atol=1e-12)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (((0,), (1,)), "expected an nlcg_optax.Matrix"),
        (Matrix((0,), (1,)), "each of its axes, 0 to 2, once"),
        (Matrix((0,), (1, 1, 2)), "each of its axes"),
        (Matrix((0, 1, 2), ()), "at least one"),
        (Matrix((0,), (1, 3)), "each of its axes"),
        (Matrix((0,), (1, 2), parts=5), "12 columns do not come apart into parts=5"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_told_with_path_and_shape(given, words):
    tx = scale_by_orthogonalization(matrices=lambda path, leaf: given)
    with pytest.raises(ValueError, match=r"'\['w'\]' of shape \(2, 3, 4\)") as error:
        tx.init({"w": jnp.ones((2, 3, 4))})
    assert words in str(error.value)
    with pytest.raises(ValueError, match="batch_axes=1"):
        scale_by_orthogonalization(batch_axes=1, matrices=matrices.flax)


def test_the_table(capsys):
    params = {
        "attention": {
            "query": {"kernel": jnp.ones((8, 2, 4)), "bias": jnp.ones((2, 4))}
        },
        "embed": {"embedding": jnp.ones((9, 4), jnp.float32)},
    }
    nlcg_optax.describe(matrices.flax, params)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["path", "shape", "treatment", "operations", "bytes", "why"]
    by_path = {row[0]: row[1:] for row in rows[1:]}
    assert by_path["['attention']['query']['bias']"][:3] == ["2×4", "second", "moment"]
    # 17 products of 8 by 8 matrices, and two with the matrix.
    kernel = by_path["['attention']['query']['kernel']"]
    assert kernel[:4] == ["8×2×4", "8×8", f"{19 * 2 * 8**3:.4g}", "512"]
    assert kernel[4:] == "attention, by heads".split()
    embedding = by_path["['embed']['embedding']"]
    assert embedding[:5] == ["9×4", "second", "moment", "0", "144"]
    assert embedding[5:] == "an embedding".split()
    # The default decides as that function does here, and says so of an optimizer.
    nlcg_optax.describe(nlcg_optax.nlcg(0.1), jax.eval_shape(lambda: params))
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == rows
    nlcg_optax.describe(matrices.last_axis, params)
    told = capsys.readouterr().out.splitlines()
    assert [line.endswith("  as told") for line in told] == [False, True, True, True]
    with pytest.raises(ValueError, match="nothing is a matrix to it"):
        nlcg_optax.describe(nlcg_optax.nlcg_paper(0.1), params)


def test_the_table_of_several_optimizers(capsys):
    groups = {"few": nlcg_optax.nlcg(0.1), "many": nlcg_optax.nlcg(0.2)}
    labels = {"a": "many", "b": "few", "c": "many"}
    params = {"a": jnp.ones((4, 5)), "b": jnp.ones((5, 6)), "c": jnp.ones(7)}
    nlcg_optax.describe(optax.partition(groups, labels), params)
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert rows[1:] == [
        ["['a']", "4×5", "4×5"],
        ["['b']", "5×6", "5×6"],
        ["['c']", "7", "second"],
    ]

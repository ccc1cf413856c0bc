"""Which leaves are matrices by default: those of real layers, and what is told."""

import dataclasses
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import DictKey, GetAttrKey

import nlcg_optax
from nlcg_optax import Matrix, matrices, scale_by_orthogonalization
from nlcg_optax.matrices import recognition
from nlcg_optax.matrices.matrix import is_mask

QUERY, OUT = Matrix((0,), (1, 2)), Matrix((0, 1), (2,))
DENSE = Matrix((0,), (1,))
OUTPUTS_LAST, OUTPUTS_FIRST = Matrix((0, 1, 2), (3,)), Matrix((1, 2, 3), (0,))
KEY = jax.random.key(0)
NAMES = {"simple": True, "separator": "/"}


def default(params, **options):
    """What orthogonalization makes of each leaf, by its path."""
    state = scale_by_orthogonalization(**options).init(params)
    return {
        jax.tree_util.keystr(path, **NAMES): getattr(leaf, "matrix", None)
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            state.root_mean_square, is_leaf=is_mask
        )
    }


def attention(kernel, bias):
    parts = dict.fromkeys(("query", "key", "value"), QUERY) | {"out": OUT}
    kernels = {kernel.format(part): matrix for part, matrix in parts.items()}
    return kernels | {bias.format(part): None for part in parts}


@pytest.mark.standard_promotion  # Flax promotes
def test_flax_nnx():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.tokens = nnx.Embed(10, 8, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(4, 8, 16, decode=False, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.layers = nnx.List([nnx.Linear(8, 5, rngs=rngs)])

    expected = {
        **{"conv/kernel": OUTPUTS_LAST, "conv/bias": None, "tokens/embedding": None},
        **{"norm/scale": None, "norm/bias": None},
        **{"layers/0/kernel": DENSE, "layers/0/bias": None},
        **attention("attention/{}/kernel", "attention/{}/bias"),
    }
    state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    assert default(state) == {f"{path}/value": x for path, x in expected.items()}
    assert default(nnx.to_pure_dict(state)) == expected


@pytest.mark.standard_promotion
def test_flax_linen():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(8, (3, 3))(x).mean(1)
            x = nn.LayerNorm()(nn.Conv(8, (5,), name="conv_of_lines")(x))
            x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
            return nn.Embed(10, 4)(nn.Dense(5)(x).argmax(-1))

    params = Model().init(KEY, jnp.ones((1, 5, 5, 1)))["params"]
    assert default(params) == {
        **{"Conv_0/kernel": OUTPUTS_LAST, "Conv_0/bias": None},
        **{"conv_of_lines/kernel": OUT, "conv_of_lines/bias": None},
        **{"LayerNorm_0/scale": None, "LayerNorm_0/bias": None},
        **{"Dense_0/kernel": DENSE, "Dense_0/bias": None, "Embed_0/embedding": None},
        **attention("attention/{}/kernel", "attention/{}/bias"),
    }


def test_equinox_modules():
    class Model(eqx.Module):
        layers: list
        up: eqx.nn.ConvTranspose2d
        conv: eqx.nn.Conv1d
        embedding: eqx.nn.Embedding
        attention: eqx.nn.MultiheadAttention
        norm: eqx.nn.LayerNorm

    model = Model(
        [eqx.nn.Conv2d(1, 8, 3, key=KEY), eqx.nn.Linear(8, 3, key=KEY)],
        eqx.nn.ConvTranspose2d(3, 5, 2, key=KEY),
        eqx.nn.Conv1d(3, 4, 5, key=KEY),
        eqx.nn.Embedding(10, 4, key=KEY),
        eqx.nn.MultiheadAttention(2, 8, key=KEY),
        eqx.nn.LayerNorm((3, 4, 5)),
    )
    projections = ("query_proj", "key_proj", "value_proj", "output_proj")
    assert default(eqx.filter(model, eqx.is_inexact_array)) == {
        **{"layers/0/weight": OUTPUTS_FIRST, "layers/0/bias": None},
        **{"layers/1/weight": DENSE, "layers/1/bias": None},
        **{"up/weight": OUTPUTS_FIRST, "up/bias": None},
        **{"conv/weight": Matrix((1, 2), (0,)), "conv/bias": None},
        **{"embedding/weight": None, "norm/weight": None, "norm/bias": None},
        **{f"attention/{name}/weight": DENSE for name in projections},
    }


def test_haikus_names():
    shapes = {  # Haiku is not installed; these are the shapes of its layers
        "net/~/linear": {"w": (4, 5), "b": (5,)},
        "net/~/conv2_d_1": {"w": (3, 3, 4, 8), "b": (8,)},
        "net/~/conv1_d": {"w": (3, 4, 8), "b": (8, 1)},
        "net/~/conv3_d": {"w": (3, 3, 3, 4, 8)},
        "net/~/conv2_d_transpose": {"w": (3, 3, 8, 4)},
        "net/~/embed": {"embeddings": (9, 4)},
        "net/~/layer_norm": {"scale": (1, 4), "offset": (1, 4)},
    }
    params = jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))
    found = {path.removeprefix("net/~/"): x for path, x in default(params).items()}
    assert {path: x for path, x in found.items() if x is not None} == {
        "linear/w": DENSE,
        "conv2_d_1/w": OUTPUTS_LAST,
        "conv1_d/w": OUT,
        "conv3_d/w": Matrix((0, 1, 2, 3), (4,)),
        "conv2_d_transpose/w": Matrix((0, 1, 3), (2,)),
    }


def test_plain_names_are_as_before():
    params = {
        **{"w1": jnp.ones((4, 5)), "b1": jnp.ones(5), "b": jnp.ones((4, 5))},
        "layer": {"w": jnp.ones((5, 3)), "b": jnp.ones(3), "bias": jnp.ones((2, 3))},
        "token": jnp.ones((1, 1, 6)),
    }
    made = {path for path, x in default(params).items() if x == DENSE}
    assert made == {"w1", "b", "layer/w"}
    assert default([jnp.ones((4, 5))]) == {"0": DENSE}
    assert default(jnp.ones((4, 5))) == {"": DENSE}


AMBIGUOUS = {
    **{"conv": (3, 3, 8, 16), "layers": {"kernel": (6, 4, 5)}, "moe": {"w": (2, 3, 4)}},
    **{"query": {"kernel": (6, 4, 2, 3)}, "conv2": {"kernel": (6, 3, 3, 2, 4)}},
    **{"fine": (4, 5), "image": {"kernel": (3, 3, 8, 16)}},
}


def test_one_warning_names_what_could_be_several_things():
    params = jax.tree.map(jnp.ones, AMBIGUOUS, is_leaf=lambda x: isinstance(x, tuple))
    with pytest.warns(UserWarning) as warned:
        nlcg_optax.nlcg(0.1).init(params)
    (warning,) = warned
    words = str(warning.message)
    for leaf in ("['conv']' of shape (3, 3, 8, 16)", "['layers']['kernel']'"):
        assert leaf in words
    for leaf in ("['moe']['w']'", "['query']['kernel']'", "['conv2']['kernel']'"):
        assert leaf in words
    assert "fine" not in words and "image" not in words
    assert "`matrices=`" in words and "`batch_axes=1`" in words
    # Told what they are, none (warnings are errors here); the guess is as it was.
    guessed = default(params, matrices=matrices.recognize)
    assert guessed == default(params, matrices=matrices.last_axis)
    default(params, batch_axes=1)


def test_an_ambiguous_weight_of_equinox_has_its_outputs_first():
    stacked = eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 5, key=key))(
        jax.random.split(KEY, 3)
    )
    with pytest.warns(UserWarning, match=r"'\.weight' of shape \(3, 5, 4\)"):
        assert default(stacked)["weight"] == Matrix((1, 2), (0,))


def test_layers_of_a_scan_are_recognized_behind_their_axis():
    params = {"query": {"kernel": jnp.ones((6, 8, 2, 4)), "bias": jnp.ones((6, 2, 4))}}
    assert default(params, batch_axes=1) == {
        "query/kernel": Matrix((1,), (2, 3), (0,)),
        "query/bias": None,
    }


def test_embeddings_and_biases_are_divided_by_their_second_moment():
    g = {"embedding": jnp.full((5, 3), -2.0), "bias": jnp.full(3, 7.0)}
    update, _ = scale_by_orthogonalization().update(
        g, scale_by_orthogonalization().init(g)
    )
    np.testing.assert_allclose(update["embedding"], -0.2, rtol=1e-6)
    np.testing.assert_allclose(update["bias"], 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("names", "shape", "expected"),
    [
        (["dense", "kernel"], (3, 4), Matrix((0,), (1,))),
        (["conv", "kernel"], (3, 3, 4, 8), Matrix((0, 1, 2), (3,))),
        (["key", "kernel"], (8, 2, 4), Matrix((0,), (1, 2))),
        (["out", "kernel"], (2, 4, 8), Matrix((0, 1), (2,))),
        (["key", "kernel", "value"], (8, 2, 4), Matrix((0,), (1, 2))),  # an nnx.State
        (["value", "kernel", "value"], (8, 2, 4), Matrix((0,), (1, 2))),
        (["value", "kernel"], (8, 2, 4), Matrix((0,), (1, 2))),
        (["key", "bias"], (2, 4), None),
        (["embed", "embedding"], (9, 4), None),
        (["norm", "scale"], (4,), None),
        (["lora_a"], (4, 2), Matrix((0,), (1,))),
    ],
    ids=str,
)
def test_flax(names, shape, expected):
    path = tuple(map(DictKey, names))
    assert matrices.flax(path, jnp.ones(shape)) == expected


def test_equinox():
    weight, bias = (GetAttrKey("layer"), GetAttrKey("weight")), (GetAttrKey("bias"),)
    assert matrices.equinox(weight, jnp.ones((5, 3))) == Matrix((1,), (0,))
    assert matrices.equinox(bias, jnp.ones((5, 1, 1))) is None  # that of a convolution
    assert matrices.equinox(weight, jnp.ones(5)) is None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    """A module, which can be called."""

    kernel: Any
    bias: Any

    def __call__(self, x):
        return x @ self.kernel + self.bias


def test_a_tree_says_what_is_a_matrix_also_if_it_can_be_called():
    params = {"first": Layer(jnp.ones((2, 3, 4)), jnp.ones(4)), "empty": None}
    said = Layer(Matrix(rows=(0, 1), columns=(2,)), None)
    found = recognition.all_of(params, {"first": said, "empty": None})
    assert [*found.values()] == [said.kernel, None]
    by_function = recognition.all_of(params["first"], lambda path, x: None)
    assert [*by_function.values()] == [None, None]
    assert [*recognition.all_of(params["first"], said).values()] == [said.kernel, None]
    # A module that is to be called is a tree all the same, and has nothing to say.
    with pytest.raises(ValueError, match="is a Layer, a tree, .*nothing for .*first"):
        recognition.all_of(params, Layer(None, None))
    with pytest.raises(ValueError, match="`matrices` gave Array"):
        recognition.all_of(params["first"], Layer(jnp.ones(3), None))

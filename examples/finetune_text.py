"""A small transformer, fine-tuned on a text of yours without a learning rate.

    python examples/finetune_text.py TEXT_FILE

It learns English first from the documentation that comes with Python, by AdamW. Then it
goes on with the text, by `nlcg_auto` and, from the same start, by AdamW at four rates,
of which the best is chosen by the same held-out text, in its favour. Printed are the
loss on the last tenth of the text, in nats per character, before and after, what each
took, and a few words that the model writes.
"""

import argparse
import functools
import math
import pathlib
import pydoc_data.topics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nlcg_optax

VOCABULARY = 128  # ASCII
CONTEXT = 64  # characters that the model sees
HEADS = 4
RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def init(width, layers):
    """The parameters, in a dictionary for each layer."""
    keys = iter(jax.random.split(jax.random.key(0), 2 + 4 * layers))

    def matrix(n, m):
        return jax.random.normal(next(keys), (n, m)) / n**0.5

    return {
        "embedding": jax.random.normal(next(keys), (VOCABULARY, width)),
        "position": 0.1 * jax.random.normal(next(keys), (CONTEXT, width)),
        "layers": [
            {
                "qkv": matrix(width, 3 * width),
                "out": matrix(width, width) / (2 * layers) ** 0.5,
                "up": matrix(width, 4 * width),
                "down": matrix(4 * width, width) / (2 * layers) ** 0.5,
                "scale_1": jnp.ones(width),
                "scale_2": jnp.ones(width),
            }
            for _ in range(layers)
        ],
        "scale": jnp.ones(width),
    }


def normalized(x, scale):
    """RMS normalization."""
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * scale


def attention(layer, x):
    """Causal attention of `HEADS` heads over x [batch, time, width]."""
    batch, time_steps, width = x.shape
    q, k, v = jnp.split(x @ layer["qkv"], 3, -1)
    split = (batch, time_steps, HEADS, width // HEADS)
    heads = jax.nn.dot_product_attention(
        q.reshape(split), k.reshape(split), v.reshape(split), is_causal=True
    )
    return heads.reshape(x.shape) @ layer["out"]


def model(params, tokens):
    """Logits [batch, time, vocabulary] of the character after each of the tokens."""
    x = params["embedding"][tokens] + params["position"][: tokens.shape[1]]
    for layer in params["layers"]:
        x = x + attention(layer, normalized(x, layer["scale_1"]))
        hidden = jax.nn.gelu(normalized(x, layer["scale_2"]) @ layer["up"])
        x = x + hidden @ layer["down"]
    width = x.shape[-1]
    return normalized(x, params["scale"]) @ params["embedding"].T / width**0.5


def outputs_fn(params, batch):
    """The model on a batch of sequences."""
    return model(params, batch["text"][:, :-1])


def loss_fn(logits, batch):
    """The mean cross-entropy of the characters."""
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, batch["text"][:, 1:]
    )
    return losses.mean()


def tokens_of(text):
    """The characters of a text as numbers [length]; what is not ASCII is a "?"."""
    return np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int32)


def batches(tokens, size, seed=0):
    """Batches of random windows, the same for everybody."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(tokens) - CONTEXT, size)
        yield {"text": tokens[starts[:, None] + np.arange(CONTEXT + 1)]}


def trained(tx, params, tokens, steps, size):
    """Trains by any optimizer, and tells the seconds after the first step."""
    evaluate = nlcg_optax.value_grad_and_curvature(outputs_fn, loss_fn)
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params, opt_state, batch):
        loss, grads, curvature = evaluate(params, batch)
        updates, opt_state = tx.update(
            grads, opt_state, params, value=loss, curvature=curvature
        )
        return optax.apply_updates(params, updates), opt_state

    source = batches(tokens, size)
    params, opt_state = step(params, tx.init(params), next(source))
    begin = time.perf_counter()
    for _ in range(steps - 1):
        params, opt_state = step(params, opt_state, next(source))
    jax.block_until_ready(params)
    # The averaged parameters, if the optimizer keeps some for evaluation.
    params = nlcg_optax.eval_params(opt_state, params)
    return params, time.perf_counter() - begin


def adamw(rate, steps):
    """AdamW as it is mostly used: a short warm-up, and a cosine to 0."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 20), steps)
    return optax.adamw(schedule, weight_decay=0.01)


@jax.jit
def _loss(params, batch):
    return loss_fn(outputs_fn(params, batch), batch)


def held_out_loss(params, tokens):
    """Of all windows that follow each other in a text, or the first 512."""
    count = min((len(tokens) - 1) // CONTEXT, 512)
    rows = CONTEXT * np.arange(count)[:, None] + np.arange(CONTEXT + 1)
    return float(_loss(params, {"text": tokens[rows]}))


def written(params, prompt, length):
    """What the model writes after a prompt, drawn with a fixed key."""

    @jax.jit
    def follow(window, key, last):
        logits = model(params, window[None])[0, last]
        return jax.random.categorical(key, logits)

    text = list(tokens_of(prompt))
    for i in range(length):
        window = np.zeros(CONTEXT, np.int32)
        window[: len(text[-CONTEXT:])] = text[-CONTEXT:]
        last = min(len(text), CONTEXT) - 1
        text.append(int(follow(window, jax.random.key(i), last)))
    characters = map(chr, text)
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in characters)


def main():
    """Pre-trains, fine-tunes by both, and prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=pathlib.Path, help="a file of plain text")
    parser.add_argument("--pretrain_steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100, help="of fine-tuning")
    parser.add_argument("--batch_size", type=int, default=64, help="sequences of 64")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    args = parser.parse_args()
    text = tokens_of(args.text.read_text())
    train, held_out = np.split(text, [int(0.9 * len(text))])
    if len(held_out) < 2 * CONTEXT:
        parser.error(f"{args.text} has {len(text)} characters: more are needed")
    english = tokens_of("\n".join(pydoc_data.topics.topics.values()))

    params = init(args.width, args.layers)
    count = sum(x.size for x in jax.tree.leaves(params))
    print(f"{count:,} parameters, {len(train):,} characters to fine-tune on")
    tx = adamw(3e-3, args.pretrain_steps)
    params, seconds = trained(tx, params, english, args.pretrain_steps, args.batch_size)
    start = held_out_loss(params, held_out)
    print(
        f"{args.pretrain_steps} steps of English, {seconds:.0f} s: held out {start:.3f}"
    )

    tune = functools.partial(
        trained, params=params, tokens=train, steps=args.steps, size=args.batch_size
    )
    ours, seconds = tune(nlcg_optax.nlcg_auto(args.steps))
    loss = held_out_loss(ours, held_out)
    print(
        f"{args.steps} steps of nlcg_auto, nothing tuned: "
        f"held out {loss:.3f}, {seconds:.0f} s"
    )
    best, total = math.inf, 0.0
    for rate in RATES:
        theirs, seconds = tune(adamw(rate, args.steps))
        found, total = held_out_loss(theirs, held_out), total + seconds
        print(f"AdamW at {rate:g}: held out {found:.3f}, {seconds:.0f} s")
        best = min(best, found)
    print(
        f"fine-tuned from {start:.3f} to {loss:.3f} without a learning rate; AdamW to "
        f"{best:.3f} at the best of {len(RATES)} rates, in {total:.0f} s for all"
    )
    print(written(ours, "The ", 120))


if __name__ == "__main__":
    main()

"""What a step of the optimizer costs: time, bytes, kernels, and time to compile.

    taskset -c 1 python benchmarks/update_cost/run.py            # about 20 minutes
    python benchmarks/update_cost/run.py --output=gpu            # on a GPU

The program that is measured is a jitted `update` + `apply_updates` with parameters and
state donated, for ResNet-50's tree, a transformer's of 110 million parameters and one
flat leaf as large as ResNet-50; with float32 throughout, and with bfloat16 parameters
and gradients beside a float32 state. All optimizers of a tree take turns in one
process; times are medians over the rounds, ratios medians of the rounds' ratios.

Roofline: the bytes that a step must move (by the accesses of `OPTIMIZERS`, derived in
`docs/cost.md`) at the bandwidth measured in the same rounds: that of a copy into a
buffer that is there, and that of an update in place (which on a CPU is faster: nothing
is read that is only written). "kernels" and "bytes accessed" (XLA's own estimate, which
takes every kernel's operands as read from memory) are read off the compiled program.

Every case is a line of `results/<output>.jsonl`, in place of what was there of its tree
and dtype; `results/<output>.md` and `results/<output>.png` show them.
"""

import argparse
import dataclasses
import gc
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax

import nlcg_optax

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import compiled  # noqa: E402

RESULTS = HERE / "results"

RATE = 1e-4


@dataclasses.dataclass(frozen=True)
class Case:
    """An optimizer, and how often its step must access an array as large as the tree.

    Attributes:
      make: from the dtype of the state (None: the parameters' own) to the optimizer.
      accesses: accesses of (parameters and their copies, gradients and theirs, state);
        None where no bound was derived.
      casts: whether the state gets its dtype from its parameters and gradients, which
        are then cast for it.
    """

    make: Callable[[Any], Any]
    accesses: tuple[int, int, int] | None
    casts: bool = True


def paper(accesses: tuple[int, int, int]) -> Case:
    """`nlcg_paper`, as users get it."""
    return Case(
        lambda dtype: nlcg_optax.nlcg_paper(RATE, state_dtype=dtype),
        accesses,
        casts=False,
    )


def lean(accesses: tuple[int, int, int], preconditioner: Callable[[Any], Any]) -> Case:
    """The conjugate direction without the cosine, and what follows it."""
    return Case(
        lambda dtype: optax.chain(
            nlcg_optax.scale_by_conjugate_direction(
                preconditioner=preconditioner(dtype),
                track_cosine=False,
                state_dtype=dtype,
            ),
            optax.scale_by_learning_rate(RATE),
        ),
        accesses,
        casts=False,
    )


OPTIMIZERS = {
    "adamw": Case(lambda _: optax.adamw(RATE), (2, 1, 4)),
    "momentum": Case(lambda _: optax.sgd(RATE, momentum=0.9), (2, 1, 2)),
    # The norm of the update stands between the moments and the parameters.
    "lamb": Case(lambda _: optax.lamb(RATE), (3, 1, 6)),
    "lbfgs(10)": Case(lambda _: optax.lbfgs(RATE, 10, linesearch=None), None),
    # Its products of matrices are arithmetic, not traffic: no bound by accesses.
    # (Embeddings are orthogonalized here, which by default are no matrices.)
    "nlcg": Case(
        lambda _: nlcg_optax.nlcg(
            RATE,
            preconditioner=nlcg_optax.scale_by_orthogonalization(
                matrices=nlcg_optax.matrices.last_axis
            ),
        ),
        None,
    ),
    "nlcg_paper": paper((7, 2, 10)),
    "nlcg_paper, no cosine, no step rule": lean(
        (7, 2, 9), lambda dtype: nlcg_optax.scale_by_diagonal_bfgs(state_dtype=dtype)
    ),
    "nlcg_paper, rms, no step rule": lean((2, 2, 5), lambda _: optax.scale_by_rms()),
}


def resnet50() -> Any:
    from nlcg_optax.training import models

    model = models.create_model("resnet50", 1000)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)), train=False)[
            "params"
        ]
    )
    return jax.tree.map(
        lambda x: x.shape, shapes, is_leaf=lambda x: hasattr(x, "dtype")
    )


def transformer(layers: int = 12, width: int = 768, vocabulary: int = 32_000) -> Any:
    """Kernels, biases and norms of a decoder: 110 million parameters."""
    block = {
        "attention_norm": {"scale": (width,), "bias": (width,)},
        "qkv": {"kernel": (width, 3 * width), "bias": (3 * width,)},
        "out": {"kernel": (width, width), "bias": (width,)},
        "mlp_norm": {"scale": (width,), "bias": (width,)},
        "up": {"kernel": (width, 4 * width), "bias": (4 * width,)},
        "down": {"kernel": (4 * width, width), "bias": (width,)},
    }
    return {
        "embedding": (vocabulary, width),
        "positions": (1024, width),
        "norm": {"scale": (width,), "bias": (width,)},
        **{f"block{i:02}": block for i in range(layers)},
    }


def flat() -> Any:
    return {"all": (25_600_000,)}


def tiny() -> Any:
    """To try the benchmark out."""
    return {"a": (300, 100), "b": (7,)}


TREES = {f.__name__: f for f in (resnet50, transformer, flat, tiny)}
# What does not fit into 20 GB beside the rest, all of which are there at once.
LEFT_OUT = {
    ("transformer", "lbfgs(10)"),
    ("transformer", "nlcg_paper, no cosine, no step rule"),
}


def fill(shapes: Any, dtype: Any, scale: float, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(
            scale * rng.standard_normal(shape, np.float32), dtype
        ),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def make_step(case: Case, tx: Any) -> Callable:
    tx = optax.with_extra_args_support(tx)

    def step(params, state, grads, loss):
        seen = params
        if case.casts:
            grads, seen = jax.tree.map(lambda x: x.astype(jnp.float32), (grads, params))
        updates, state = tx.update(grads, state, seen, value=loss)
        return optax.apply_updates(params, updates), state

    return step


def init(case: Case, tx: Any, params: Any) -> Any:
    if case.casts:
        params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    return tx.init(params)


def array_bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree) if x.ndim)


@dataclasses.dataclass
class Subject:
    """A compiled step, what it works on, and the times it took."""

    step: Any
    params: Any
    state: Any
    seconds: list[float] = dataclasses.field(default_factory=list)

    def run(self, grads: Any, loss: Any) -> None:
        start = time.perf_counter()
        self.params, self.state = self.step(self.params, self.state, grads, loss)
        jax.block_until_ready((self.params, self.state))
        self.seconds.append(time.perf_counter() - start)


def compile_step(case: Case, tx: Any, params: Any, grads: Any, loss: Any):
    state = jax.eval_shape(lambda p: init(case, tx, p), params)
    start = time.perf_counter()
    lowered = jax.jit(make_step(case, tx), donate_argnums=(0, 1)).lower(
        params, state, grads, loss
    )
    traced = time.perf_counter()
    step = lowered.compile()
    return step, traced - start, time.perf_counter() - traced


def memory_subject(grads: Any, in_place: bool) -> Subject:
    """Reads and writes the tree once: what the roofline is taken from."""

    def touch(target, state, source, loss):
        del state, loss
        return jax.tree.map(lambda x: -x, target if in_place else source), ()

    jitted = jax.jit(touch, donate_argnums=0, keep_unused=True)
    target = jax.tree.map(jnp.copy, grads)
    step = jitted.lower(target, (), grads, jnp.float32(0)).compile()
    return Subject(step, target, ())


def measure(tree: str, dtype: str, names: list[str], rounds: int) -> list[dict]:
    shapes, kind = TREES[tree](), jnp.dtype(dtype)
    grads = [fill(shapes, kind, 1e-3, seed) for seed in (1, 2)]
    params = fill(shapes, kind, 0.1, 0)
    size = sum(x.size for x in jax.tree.leaves(params))
    loss = jnp.float32(1.0)
    subjects = {
        "copy": memory_subject(grads[0], in_place=False),
        "in_place": memory_subject(grads[0], in_place=True),
    }
    rows = []
    for name in names:
        if (tree, name) in LEFT_OUT:
            continue
        case = OPTIMIZERS[name]
        tx = case.make(None if dtype == "float32" else jnp.float32)
        # A small one before: the first one of all initializes things.
        small = fill(tiny(), kind, 1.0, 0)
        compile_step(case, tx, small, small, loss)
        step, trace_s, compile_s = compile_step(case, tx, params, grads[0], loss)
        state = jax.jit(lambda p, case=case, tx=tx: init(case, tx, p))(params)
        program = compiled.read(step)
        row = {
            "tree": tree,
            "dtype": dtype,
            "optimizer": name,
            "parameters": size,
            "leaves": len(jax.tree.leaves(params)),
            "trace_s": trace_s,
            "compile_s": compile_s,
            "kernels": program.kernels,
            "bytes_accessed": program.bytes_accessed,
            "state_bytes_per_parameter": array_bytes(state) / size,
            "temporary_bytes": program.temporary_bytes,
        }
        if case.accesses is not None:
            p, g, s = case.accesses
            row["must_move"] = size * ((p + g) * kind.itemsize + 4 * s)
        rows.append(row)
        subjects[name] = Subject(step, jax.tree.map(jnp.copy, params), state)
    del params
    for r in range(rounds + 2):
        for subject in subjects.values():
            subject.run(grads[r % 2], loss)
    for subject in subjects.values():
        del subject.seconds[:2]
    copied = 2 * size * kind.itemsize
    adamw = subjects["adamw"].seconds if "adamw" in subjects else None
    for row in rows:
        seconds = subjects[row["optimizer"]].seconds
        row["seconds"] = statistics.median(seconds)
        if adamw:
            pairs = zip(seconds, adamw, strict=True)
            row["ratio_to_adamw"] = statistics.median(a / b for a, b in pairs)
        for kind_of_pass in ("copy", "in_place"):
            passes = subjects[kind_of_pass].seconds
            row[f"{kind_of_pass}_bandwidth"] = copied / statistics.median(passes)
            if "must_move" in row:
                row[f"roofline_{kind_of_pass}"] = statistics.median(
                    row["must_move"] / copied * p / s
                    for p, s in zip(passes, seconds, strict=True)
                )
    return rows


def cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions() -> dict:
    return {
        "device": jax.devices()[0].device_kind,
        "cores": cores(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "optax": optax.__version__,
    }


def table(rows: list[dict]) -> list[str]:
    lines = []
    for tree, dtype in dict.fromkeys((r["tree"], r["dtype"]) for r in rows):
        group = [r for r in rows if (r["tree"], r["dtype"]) == (tree, dtype)]
        one = group[0]
        base = next((r for r in group if r["optimizer"] == "adamw"), None)
        lines += [
            f"**{tree}**, {one['leaves']} leaves, {one['parameters'] / 1e6:.1f} "
            f"million parameters, {dtype} parameters, float32 state; a copy moves "
            f"{one['copy_bandwidth'] / 1e9:.1f} GB/s, an update in place "
            f"{one['in_place_bandwidth'] / 1e9:.1f} GB/s",
            "",
            "| optimizer | ms | × AdamW | roofline by copy | in place | GB accessed "
            "| kernels | "
            "state, bytes/parameter | temporary MB | trace s | compile s | "
            "both × AdamW |",
            "|---|" + "---:|" * 11,
        ]
        for r in group:
            total = r["trace_s"] + r["compile_s"]
            if base:
                times = f"{total / (base['trace_s'] + base['compile_s']):.2f}"
                ratio = f"{r['ratio_to_adamw']:.2f}"
            else:
                times = ratio = "–"
            rooflines = [
                f"{r[key]:.0%}" if key in r else "–"
                for key in ("roofline_copy", "roofline_in_place")
            ]
            lines.append(
                f"| {r['optimizer']} | {1e3 * r['seconds']:.1f} | {ratio} "
                f"| {' | '.join(rooflines)} "
                f"| {r['bytes_accessed'] / 1e9:.2f} | {r['kernels']} "
                f"| {r['state_bytes_per_parameter']:.1f} "
                f"| {r['temporary_bytes'] / 1e6:.0f} "
                f"| {r['trace_s']:.2f} | {r['compile_s']:.2f} | {times} |"
            )
        lines.append("")
    return lines


def figure(rows: list[dict], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = list(dict.fromkeys((r["tree"], r["dtype"]) for r in rows))
    fig, axes = plt.subplots(
        1, len(groups), figsize=(3.4 * len(groups) + 1, 4), squeeze=False, sharey=True
    )
    names = list(dict.fromkeys(r["optimizer"] for r in rows))
    for ax, (tree, dtype) in zip(axes[0], groups, strict=True):
        group = {
            r["optimizer"]: r for r in rows if (r["tree"], r["dtype"]) == (tree, dtype)
        }
        # L-BFGS and products of matrices would make the rest too small to see.
        shown = [
            r["seconds"] for r in group.values() if r.get("ratio_to_adamw", 1) < 12
        ]
        limit = 1.15 * 1e3 * max(shown)
        ax.set_xlim(0, limit)
        for y, name in enumerate(names):
            if name not in group:
                ax.text(0, y, " not run", va="center", color="gray", fontsize=8)
                continue
            r = group[name]
            color = "C1" if name.startswith("nlcg") else "C0"
            ax.barh(y, 1e3 * r["seconds"], color=color)
            if 1e3 * r["seconds"] > limit:
                text = f"{1e3 * r['seconds']:,.0f} "
                ax.text(limit, y, text, va="center", ha="right", fontsize=8)
            if "must_move" in r:
                bound = 1e3 * r["must_move"] / r["in_place_bandwidth"]
                ax.plot([bound] * 2, [y - 0.4, y + 0.4], color="black", lw=2)
        ax.set_yticks(range(len(names)), names, fontsize=8)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.set_xlabel("ms per update")
        ax.set_title(f"{tree}, {dtype}", fontsize=9)
    fig.suptitle(
        "Median time of update + apply_updates; black: bytes that must move, "
        "at the speed of an update in place",
        fontsize=9,
    )
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trees", default="resnet50,transformer,flat")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--optimizers", default=";".join(OPTIMIZERS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", default="update")
    args = parser.parse_args()
    path, facts, names = RESULTS / f"{args.output}.jsonl", versions(), args.optimizers
    rows = (
        [json.loads(line) for line in path.read_text().splitlines()]
        if path.exists()
        else []
    )
    for tree in args.trees.split(","):
        for dtype in args.dtypes.split(","):
            new = measure(tree, dtype, names.split(";"), args.rounds)
            print("\n".join(table(new)), flush=True)
            rows = [r for r in rows if (r["tree"], r["dtype"]) != (tree, dtype)]
            rows += [row | facts | {"rounds": args.rounds} for row in new]
            text = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            path.write_text("".join(text))
            gc.collect()
    lines = table(rows)
    rounds = sorted({row.get("rounds", args.rounds) for row in rows})
    lines.append(
        f"{' or '.join(map(str, rounds))} rounds. Python {facts['python']}, "
        f"jax {facts['jax']}, jaxlib {facts['jaxlib']}, optax {facts['optax']}; "
        f"device: {facts['device']}, "
        f"{facts['cores']} core(s)."
    )
    (RESULTS / f"{args.output}.md").write_text("\n".join(lines) + "\n")
    figure(rows, RESULTS / f"{args.output}.png")


if __name__ == "__main__":
    main()

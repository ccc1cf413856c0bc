"""Optimizers that the trainer does not have, and the building of any of them by words.

Peers only: they are here to be compared with, and not part of the package.
"""

import ast
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

import nlcg_optax
from nlcg_optax.preconditioners.soap import Factors
from nlcg_optax.training import models, optimizers
from nlcg_optax.training.config import ConfigDict, apply_overrides, typed
from nlcg_optax.training.run_config import RunConfig

# What an optimizer of matrices should do with each leaf.
MATRICES, REST = "matrices", "rest"
Labels = Callable[[Any], Any]


def scale_by_published_soap(b1: float = 0.95, **options) -> Any:
    """SOAP as its authors have it (arXiv:2409.11321), for any kernel and embedding.

    That is :func:`nlcg_optax.scale_by_soap` with a basis for each side, all leaves of
    one scale, no step at the first call, and bases that start from the eigenvectors.
    """
    scaled = nlcg_optax.scale_by_soap(
        b1, max_side=10_000, matrices=nlcg_optax.matrices.last_axis, **options
    )

    def eigenvectors(factor):  # the largest eigenvalue first
        return None if factor is None else jnp.linalg.eigh(factor)[1][..., ::-1]

    def start(node):
        if not isinstance(node, Factors):
            return node
        return node._replace(
            left_basis=eigenvectors(node.left),
            right_basis=eigenvectors(node.right),
        )

    def update(grads, state, params=None):
        first = state.count == 0
        updates, state = scaled.update(grads, state, params)
        updates = jax.tree.map(
            lambda u: jnp.where(first, 0, u / 0.2 if u.ndim > 1 else u), updates
        )
        factors = jax.lax.cond(
            first,
            lambda tree: jax.tree.map(
                start, tree, is_leaf=lambda x: isinstance(x, Factors)
            ),
            lambda tree: tree,
            state.factors,
        )
        return updates, state._replace(factors=factors)

    return optax.GradientTransformation(scaled.init, update)


def soap(learning_rate: optax.ScalarOrSchedule, **options) -> Any:
    """:func:`scale_by_published_soap`, and the learning rate."""
    return optax.chain(
        scale_by_published_soap(**options), optax.scale_by_learning_rate(learning_rate)
    )


def plain_muon(learning_rate: optax.ScalarOrSchedule) -> Any:
    """Optax's, all of whose options are its defaults; kernels are matrices too."""
    return optax.contrib.muon(
        learning_rate, muon_weight_dimension_numbers=models.muon_matrices
    )


PEERS: dict[str, Callable[..., Any]] = {
    "soap": soap,
    "schedule_free_adamw": optax.contrib.schedule_free_adamw,
    # Those of `workloads.DEFAULTS`.
    "adamw": optax.adamw,
    "muon": plain_muon,
    "prodigy": optax.contrib.prodigy,
    "dowg": optax.contrib.dowg,
    "momo_adam": optax.contrib.momo_adam,
    "mechanic_adamw": lambda rate: optax.contrib.mechanize(optax.adamw(rate)),
    "mechanic_muon": lambda rate: optax.contrib.mechanize(plain_muon(rate)),
}


def configured(config: ConfigDict, words: Sequence[str]) -> ConfigDict:
    """A copy of the config with what of the words concerns it."""
    config = config.copy_and_resolve_references()
    own = [word for word in words if not word.startswith("peer.")]
    apply_overrides(config, own)
    if len(own) < len(words):
        # By the name of `nlcg` the trainer would look for its state, to report of it.
        config.optimizer.name = "adamw"
    return config


def checked(config: ConfigDict) -> RunConfig:
    """The config typed; without a cell's rate and schedule where those do nothing."""
    config = config.copy_and_resolve_references()
    if config.optimizer.name == "nlcg_auto":
        config.optimizer.learning_rate, config.schedule.name = None, "none"
    return typed(config)


def create_optimizer(
    config: ConfigDict,
    words: Sequence[str],
    schedule: optax.Schedule,
    decay_mask: Any,
    total_steps: int | None = None,
    labels: Labels | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer that the words state: one of the trainer's, or a peer.

    Args:
      config: that of :func:`configured`.
      words: config overrides, or ``peer.name=soap`` and its arguments ``peer.b1=0.9``.
      schedule: the learning rate by step.
      decay_mask: where LARS has a trust ratio, as in the trainer.
      total_steps: of the run, where batches are sampled.
      labels: from the parameters to a tree of "matrices" and "rest": `nlcg` and Muon
        leave the rest (an embedding, a head) to Adam. None: all matrices are such.
    """
    peer = dict(word[5:].split("=") for word in words if word.startswith("peer."))
    if peer:
        make = PEERS[peer.pop("name")]
        options = {key: ast.literal_eval(value) for key, value in peer.items()}
        return optax.with_extra_args_support(make(schedule, **options))
    name = config.optimizer.name
    if labels is None or name not in ("nlcg", "nlcg_auto", "muon"):
        return optax.with_extra_args_support(
            optimizers.create_optimizer(
                checked(config), schedule, decay_mask, total_steps
            )
        )
    if name == "muon":
        numbers = optax.contrib.MuonDimensionNumbers((0,), 1)
        return optax.with_extra_args_support(
            optax.contrib.muon(
                schedule,
                muon_weight_dimension_numbers=lambda params: jax.tree.map(
                    lambda w, label: (
                        numbers if w.ndim == 2 and label == MATRICES else None
                    ),
                    params,
                    labels(params),
                ),
                **config.optimizer.muon,
            )
        )
    # docs/tuning.md, "Embeddings, heads and other parts".
    adam = optax.chain(optax.scale_by_adam(b1=0.0), optax.scale(0.2))
    preconditioner = optax.partition(
        {MATRICES: nlcg_optax.scale_by_orthogonalization(), REST: adam}, labels
    )
    options = config.optimizer.nlcg.to_dict()
    if name == "nlcg_auto":
        return nlcg_optax.nlcg_auto(
            total_steps,
            preconditioner=preconditioner,
            residuals=config.optimizer.nlcg_auto.residuals,
        )
    return nlcg_optax.nlcg(
        schedule,
        preconditioner=preconditioner,
        beta_bounds=options["beta_bounds"],
        nesterov=options["nesterov"],
        step_rule=options["step_rule"],
    )


def parameters_to_evaluate(params: Any, opt_state: Any) -> Any:
    """The average that schedule-free methods evaluate; the parameters of others."""
    if isinstance(opt_state, optax.contrib.ScheduleFreeState):
        return optax.contrib.schedule_free_eval_params(opt_state, params)
    return params

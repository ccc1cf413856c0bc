"""Optimizers that the trainer does not have, and the building of any of them by words.

Peers only: they are here to be compared with, and not part of the package.
"""

import ast
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

import nlcg_optax
from nlcg_optax.training import optimizers
from nlcg_optax.training.config import ConfigDict, apply_overrides, typed
from nlcg_optax.training.run_config import RunConfig

# What an optimizer of matrices should do with each leaf.
MATRICES, REST = "matrices", "rest"
Labels = Callable[[Any], Any]


class SoapState(NamedTuple):
    """State of :func:`scale_by_soap`.

    Attributes:
      count: calls of `update`, int32 scalar.
      mu: average of the gradients.
      nu: average of the squared gradients, of matrices in the basis below.
      factors: averages of (GGᵀ, GᵀG) for each matrix, None for other leaves.
      bases: eigenvectors (Q_L, Q_R) of those.
    """

    count: jax.Array
    mu: Any
    nu: Any
    factors: Any
    bases: Any


def scale_by_soap(
    b1: float = 0.95, b2: float = 0.95, eps: float = 1e-8, every: int = 1
) -> optax.GradientTransformation:
    r"""SOAP, Adam in Shampoo's eigenbasis (Vyas et al., arXiv:2409.11321, Algorithm 3).

    For a gradient :math:`G` of m×n, with :math:`M = \beta_1 M + (1 - \beta_1) G`,

    .. math::
        G' = Q_L^\top G\, Q_R, \quad V = \beta_2 V + (1 - \beta_2)\, G' \odot G', \quad
        N = Q_L \frac{Q_L^\top M\, Q_R}{\sqrt V + \epsilon} Q_R^\top ,

    and afterwards :math:`L = \beta_2 L + (1 - \beta_2) G G^\top`, :math:`Q_L` = the
    orthogonal factor of :math:`L Q_L` (one power iteration), and so for the right side.
    As in the authors' code both moments are corrected for their bias, and the first
    call makes no step: it sets :math:`L, R` and their eigenvectors. Kernels of
    convolutions are matrices, the last axis the output. Vectors get Adam.

    Args:
      b1: decay of the average of the gradients.
      b2: decay of the other averages.
      eps: added to the root of the second moment.
      every: calls between two power iterations.
    """

    def matrix(g):
        return g.reshape(-1, g.shape[-1])

    def per_leaf(fn, grads, *trees):
        """Maps over leaves of the gradient; the trees may have tuples there."""
        leaves, treedef = jax.tree.flatten(grads)
        columns = [treedef.flatten_up_to(tree) for tree in trees]
        return treedef.unflatten(
            [fn(*row) for row in zip(leaves, *columns, strict=True)]
        )

    def init(params):
        def sides(make):
            def of(p):
                return tuple(map(make, matrix(p).shape)) if p.ndim > 1 else None

            return jax.tree.map(of, params)

        zeros = jax.tree.map(jnp.zeros_like, params)
        return SoapState(
            count=jnp.zeros([], jnp.int32),
            mu=zeros,
            nu=jax.tree.map(jnp.zeros_like, params),
            factors=sides(lambda n: jnp.zeros((n, n))),
            bases=sides(jnp.eye),
        )

    def update(grads, state, params=None):
        del params
        first = state.count == 0
        steps = jnp.maximum(state.count, 1)  # the first call is none
        correct1, correct2 = 1 - b1**steps, 1 - b2**steps

        def rotate(x, bases, back=False):
            if bases is None:
                return x
            left, right = bases
            y = left @ matrix(x) @ right.T if back else left.T @ matrix(x) @ right
            return y.reshape(x.shape)

        def average(decay, old, new):
            return jnp.where(first, old, decay * old + (1 - decay) * new)

        def second_moment(g, nu, bases):
            return average(b2, nu, rotate(g, bases) ** 2)

        def direction(g, mu, nu, bases):
            scaled = rotate(mu, bases) / correct1 / (jnp.sqrt(nu / correct2) + eps)
            return jnp.where(first, 0.0, rotate(scaled, bases, back=True))

        def new_factors(g, factors):
            if factors is None:
                return None
            g = matrix(g)
            products = (g @ g.T, g.T @ g)
            return tuple(
                jnp.where(first, p, b2 * old + (1 - b2) * p)
                for old, p in zip(factors, products, strict=True)
            )

        def new_bases(g, factors, bases):
            if factors is None:
                return None

            def eigenvectors():  # the largest eigenvalue first
                return tuple(jnp.linalg.eigh(f)[1][:, ::-1] for f in factors)

            def power_iteration():
                pairs = zip(factors, bases, strict=True)
                return tuple(jnp.linalg.qr(f @ q)[0] for f, q in pairs)

            return jax.lax.cond(
                first,
                eigenvectors,
                lambda: jax.lax.cond(
                    state.count % every == 0, power_iteration, lambda: tuple(bases)
                ),
            )

        mu = jax.tree.map(lambda m, g: average(b1, m, g), state.mu, grads)
        nu = per_leaf(second_moment, grads, state.nu, state.bases)
        updates = per_leaf(direction, grads, mu, nu, state.bases)
        factors = per_leaf(new_factors, grads, state.factors)
        bases = per_leaf(new_bases, grads, factors, state.bases)
        return updates, SoapState(state.count + 1, mu, nu, factors, bases)

    return optax.GradientTransformation(init, update)


def soap(learning_rate: optax.ScalarOrSchedule, **options) -> Any:
    """:func:`scale_by_soap`, and the learning rate."""
    return optax.chain(
        scale_by_soap(**options), optax.scale_by_learning_rate(learning_rate)
    )


def averaged_basis() -> Any:
    """What `nlcg_auto` goes on with where noise rules."""
    return optax.chain(scale_by_soap(b1=0.9), optax.scale(0.2))


PEERS: dict[str, Callable[..., Any]] = {
    "soap": soap,
    "schedule_free_adamw": optax.contrib.schedule_free_adamw,
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
    if name == "nlcg_auto" and labels is None:
        return nlcg_optax.nlcg_auto(
            total_steps,
            noise_direction=averaged_basis(),
            residuals=config.optimizer.nlcg_auto.residuals,
        )
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
            noise_direction=averaged_basis(),
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

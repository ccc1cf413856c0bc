"""What the optimizer did in its last step, read from its state."""

from typing import Any

import jax
import jax.numpy as jnp


def _reports(node: Any) -> bool:
    return hasattr(type(node), "_fields") and callable(getattr(node, "report", None))


def diagnostics(opt_state: Any) -> dict[str, jax.Array]:
    """What the last step did, from any optimizer state that contains ours.

    Chained, masked, partitioned, and wrapped states are searched through. A state of
    your own is asked too, if it is a named tuple with a method ``report`` that returns
    a dictionary of arrays.

    Args:
      opt_state: an optimizer state.

    Returns:
      Scalars (arrays with leading axes, where the state was made under `vmap`), as far
      as the state holds the piece that they belong to:

      - ``beta``: β, after clipping and restarts; 0 at the first step.
      - ``cosine``: cosine between the direction and the negative gradient; below 0 the
        step climbed.
      - ``restarts``: restarts of the direction so far.
      - ``base_step``: the factor of the learning rate.
      - ``nonfinite_losses``: losses so far that were not finite.
      - ``skipped_curvature``: curvature updates of the preconditioner skipped so far.

      of :func:`scale_by_noise_balance`, also within the quadratic model:

      - ``noise_excess``: E, the excess of the loss over that at the average parameters.
      - ``noise_cost``: the same, with what the average lags behind.
      - ``gain``: R, what the run still gains.
      - ``noise_ratio``: of the cost to the gain; infinite where there is no gain.
      - ``noise_rate``: the rate of the last step, with its decay.
      - ``noise_nonfinite``: losses so far that were not finite, or whose gradient was
        far larger than usual.

      and where :func:`scale_by_quadratic_model` takes the step:

      - ``coefficients``: an array, of each preconditioned gradient, then of each past
        step, the newest first, then of each residual direction.
      - ``damping``: λ.
      - ``predicted_decrease``: how far the loss should fall by the last step.
      - ``actual_decrease``: how far it fell by the step before.
      - ``conjugacy``: cosine between the last two steps in the metric of the curvature.
      - ``signal``: average share of the slope along a step that is no noise, which the
        next gradient tells: 1 on the whole data, 0 where all is noise.
      - ``rate``: the rate of the steps once noise rules, before it decays; 0 before.
      - ``overshoot``: how far these steps go beyond where the next batch has its
        minimum along them: minus its slope there over their own, averaged.
      - ``noise_since``: the steps before noise came to rule; -1 where it does not.
      - ``bounded_steps``: steps so far that were shortened to the longest allowed.
      - ``rejected_steps``: how often so far the last step was taken back: three
        quarters of it, and where that did not help the rest.
      - ``new_levels``: how often so far the loss stayed up then: it was not the step.
      - ``flat_steps``: steps so far along which there was as good as no curvature, and
        whose length the loss alone judged.
      - ``nonfinite_products``: steps so far that were left out because an inner product
        (or the first loss) was not finite.
      - ``loss_mismatch``: steps so far in which loss, gradient and curvature did not
        fit together; :func:`check` and :func:`explain` say why.
      - ``decrease_ratio``: average of the actual decrease over the predicted one, of
        steps in which the loss fell.
      - ``loss_ratio``: average of the curvature's own loss over the one given.
      - ``way``: average part of the way to the minimum of the model that steps went: 1,
        or what the multiplier has been.

      If a name occurs several times (say under ``optax.partition``), the path of the
      state that it comes from precedes it: ``"['decoder'].inner_state[0]/beta"``.

    Raises:
      ValueError: if the state holds none of our pieces.

    >>> import jax.numpy as jnp
    >>> import optax
    >>> import nlcg_optax
    >>> tx = optax.chain(optax.clip(1.0), nlcg_optax.nlcg_paper(0.1))
    >>> x = jnp.array([0.3, 0.4])
    >>> state = tx.init(x)
    >>> for loss in (0.5, 0.4):
    ...     _, state = tx.update(x, state, x, value=loss)
    >>> report = nlcg_optax.diagnostics(state)
    >>> print(report["beta"].round(3), report["base_step"], report["skipped_curvature"])
    1.0 1.0 1
    """
    found: list[tuple[str, dict[str, Any]]] = []

    def collect(path: str, tree: Any) -> None:
        nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_reports)
        for keys, node in nodes:
            if _reports(node):
                where = path + jax.tree_util.keystr(keys)
                found.append((where, node.report()))
                # A preconditioner's state lies within that of what it serves.
                for field, value in zip(node._fields, node, strict=True):
                    collect(f"{where}.{field}", value)

    collect("", opt_state)
    if not found:
        raise ValueError(
            f"The optimizer state ({type(opt_state).__name__}) holds no state of "
            "nlcg_optax. Pass the state that `init` or `update` of a transformation "
            "containing one of its pieces returned."
        )
    # Two kinds of state may share a name, so names are counted and not kinds.
    names = [name for _, told in found for name in told]
    return {
        f"{where}/{name}" if names.count(name) > 1 else name: jnp.asarray(value)
        for where, told in found
        for name, value in told.items()
    }

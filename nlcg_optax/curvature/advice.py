"""What the counts of a run mean, in sentences."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nlcg_optax.curvature.state import QuadraticModelState
from nlcg_optax.curvature.trust import SAME_LOSS

# Of fewer steps nothing is said.
_SEEN = 10
# From these on it is said: how far the two losses differ (where it was not counted),
# by what factor predictions are wrong, the part of steps that were taken back or not
# finite, the part of the way.
_LOSSES, _DECREASES, _TAKEN_BACK, _SHORT = 3.0, 1.7, 0.2, 0.2
# Where noise rules: the overshoot below which steps still go downhill at their ends, so
# that a loss should fall, and after how many of them that is said.
_DOWNHILL, _RULED = -0.2, 50


def explain(opt_state: Any) -> list[str]:
    """Says in sentences what is wrong with the run that an optimizer state comes from.

    Where loss, gradient and curvature do not belong together, most mistakes do not stop
    a run, but only slow it down. They leave traces in what :func:`diagnostics` tells,
    and these sentences name them; :func:`check` compares the three with each other.

    Args:
      opt_state: a state of an optimizer that contains
        :func:`scale_by_quadratic_model`, after ten steps or more; outside of `jit`.

    Returns:
      Sentences, each of which begins with the name that `diagnostics` has for what it
      is about; none for a run that is well.

    Raises:
      ValueError: if the state has no quadratic model.

    A loss that is linear in the outputs has no curvature:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> x, y = jnp.arange(12.0).reshape(4, 3), jnp.ones(4)
    >>> evaluate = nlcg_optax.value_grad_and_curvature(
    ...     lambda w, batch: batch["x"] @ w,
    ...     lambda outputs, batch: jnp.mean(jnp.abs(outputs - batch["y"])),
    ... )
    >>> tx = nlcg_optax.nlcg_auto()
    >>> @jax.jit
    ... def step(w, state):
    ...     value, grads, curvature = evaluate(w, {"x": x, "y": y})
    ...     updates, state = tx.update(
    ...         grads, state, w, value=value, curvature=curvature
    ...     )
    ...     return w + updates, state
    >>> w = jnp.array([0.1, 0.2, -0.3])
    >>> state = tx.init(w)
    >>> for _ in range(10):
    ...     w, state = step(w, state)
    >>> print(nlcg_optax.explain(state)[0][:62])
    flat_steps: in 8 of 10 steps there was as good as no curvature
    """
    model = find_model(opt_state)
    report = model.report()
    if model.noise.balance is not None:
        report |= model.noise.balance.report()
    del report["coefficients"]
    told = {name: jnp.asarray(value).item() for name, value in report.items()}
    steps = jnp.asarray(model.counts.count).item()
    return advice(told, steps)


def advice(report: Mapping[str, float], steps: float) -> list[str]:
    """As `explain`, of what `diagnostics` told of so many steps.

    Args:
      report: what it told.
      steps: so far. Where noise rules hardly anything is counted.
    """
    if steps < _SEEN:
        return []
    since = report["noise_since"]
    ruled = max(steps - since, 0) if since >= 0 else 0
    steps -= ruled
    count = {
        name: report[name]
        for name in (
            "flat_steps",
            "bounded_steps",
            "rejected_steps",
            "new_levels",
            "nonfinite_products",
            "loss_mismatch",
        )
    }
    found = []

    def say(name: str, text: str) -> None:
        found.append(f"{name}: {text}")

    def often(name: str) -> str:
        return f"in {count[name]:,.0f} of {steps:,.0f} steps"

    if count["flat_steps"] > steps / 2:
        say(
            "flat_steps",
            f"{often('flat_steps')} there was as good as no curvature along the "
            "gradient, and the loss alone judged how far to go. The loss is linear in "
            "the outputs, or nearly (an absolute error, a hinge, Huber's with a small "
            "delta, a policy gradient, or `outputs_fn` returns the loss itself): "
            "or the gradient given is a multiple of the loss's. "
            "Return from `outputs_fn` what the loss is computed from, take a loss that "
            "is curved, or an optimizer with a learning rate, `nlcg_optax.nlcg(0.04)`.",
        )
    losses = report["loss_ratio"]
    mismatched = count["loss_mismatch"] > steps / 2
    wrong = _LOSSES if not mismatched else 1 + SAME_LOSS
    if not 1 / wrong < losses < wrong:
        say(
            "loss_ratio",
            f"the curvature's own loss is on average {losses:.3g} times `value`. Is "
            "one a sum and the other a mean, was one averaged over devices twice, does "
            "the curvature see rows that are padding, or other labels?",
        )
    ratio = report["decrease_ratio"]
    if mismatched and not 1 / _DECREASES < ratio < _DECREASES:
        say(
            "decrease_ratio",
            f"the loss falls by {ratio:.3g} times what is predicted, step after step. "
            "Was the gradient scaled, clipped or summed and the value not, the value "
            "averaged twice, is the curvature a sum, or does something after the "
            "optimizer scale its updates?",
        )
    flat = count["flat_steps"] > steps / 2
    if not flat and count["bounded_steps"] + count["flat_steps"] > steps / 2:
        say(
            "bounded_steps",
            f"{often('bounded_steps')} the step was shortened, for the curvature is "
            "too small for the gradient. Is the gradient a sum over the batch, does "
            "the curvature see rows that are padding, or too few, or is a term (weight "
            "decay, L2) in the gradient alone? If it is noise, larger batches help.",
        )
    if count["rejected_steps"] > _TAKEN_BACK * steps:
        say(
            "rejected_steps",
            f"{often('rejected_steps')} the last step was taken back, for the loss "
            "rose. Is a term (weight decay, L2) in the gradient and not in the value, "
            "is the gradient that of another loss or averaged over steps (optax.ema, "
            "optax.trace), or does something change the updates after the optimizer?",
        )
    if count["new_levels"] > 0.05 * steps:
        say(
            "new_levels",
            f"{count['new_levels']:,.0f} times the loss stayed up when a step was "
            "wholly taken back: it changes by itself, from task to task, or with the "
            "batch. If batches are small, give `nlcg_auto` the number of steps.",
        )
    if report["way"] < _SHORT:
        say(
            "way",
            f"the last steps went {report['way']:.2g} of the way to the minimum of "
            "their models. `multiplier` is no learning rate: it is 1, or falls from 1 "
            "to 0 at the end of a run.",
        )
    # Of no fall the logarithm was ever taken, and the last one was none.
    if ruled == 0 and report["actual_decrease"] == 0 and report["decrease_ratio"] == 1:
        say(
            "actual_decrease",
            "the loss never fell, nor rose: is `value` always the same number? By it "
            "steps are judged, so give the loss that the gradient is of.",
        )
    if count["nonfinite_products"] > _TAKEN_BACK * steps:
        say(
            "nonfinite_products",
            f"{count['nonfinite_products']:,.0f} steps were left out, for a product "
            "of the curvature or the loss is not finite.",
        )
    gain, overshoot = report.get("gain", 1), report["overshoot"]
    if ruled >= _RULED and gain == 0 and overshoot < _DOWNHILL:
        say(
            "overshoot",
            "the gradients after the last steps say that these went downhill, and the "
            "loss does not fall. Is the gradient turned round or that of another loss, "
            "or does something after the optimizer change its updates (a second "
            "`optax.scale(-1.0)`)?",
        )
    return found


def find_model(opt_state: Any) -> QuadraticModelState:
    """The state of the quadratic model in that of an optimizer."""

    def is_model(node: Any) -> bool:
        return isinstance(node, QuadraticModelState)

    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_model) if is_model(x)]
    if not found:
        raise ValueError(
            f"The state ({type(opt_state).__name__}) has no quadratic model, so there "
            "is no curvature to check. Take that of `nlcg_optax.nlcg_auto()`, or of a "
            "chain with `nlcg_optax.scale_by_quadratic_model`."
        )
    return found[0]

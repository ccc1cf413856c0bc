"""A dry run that says whether loss, gradient and curvature fit together."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nlcg_optax import _tree
from nlcg_optax.curvature.advice import find_model
from nlcg_optax.curvature.products import Curvature, stack
from nlcg_optax.curvature.state import QuadraticModelState
from nlcg_optax.curvature.subspace import slopes_along
from nlcg_optax.curvature.trust import LIKE_LOSS, SAME_LOSS


def check(
    tx: optax.GradientTransformation,
    grads: optax.Updates,
    params: optax.Params,
    *,
    value: jax.typing.ArrayLike,
    curvature: Curvature,
    **extra_args: Any,
) -> list[str]:
    r"""Makes one step outside of `jit`, and says what is wrong with what it was given.

    The curvature has a loss of its own, which it was made of. So this compares its
    value with the ``value`` given, and its gradient with the gradient given; it looks
    for curvature along the gradient; and it sees whether the step that `tx` returns is
    the step that the quadratic model made. Where the curvature says that it is of the
    whole batch (``fraction=1``), numbers have to be equal, to two percent; otherwise of
    one size.

    Call it once, with what a step of your loop would pass to `update`, parameters and
    gradients as they are before any step. It takes a backward pass and compiles
    nothing: seconds for a large model.

    Args:
      tx: an optimizer that contains :func:`scale_by_quadratic_model`, such as
        :func:`nlcg_auto`.
      grads: the gradients.
      params: the parameters.
      value: the loss.
      curvature: the curvature of the loss.
      **extra_args: whatever else `update` takes.

    Returns:
      Sentences, each of which says what is wrong and what to write instead. None if
      nothing was found.

    Raises:
      ValueError: if the state of `tx` has no quadratic model, or for what `update`
        raises it.

    A loss that is a mean for the gradient, and a sum for the curvature:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> x, y = jnp.arange(12.0).reshape(4, 3), jnp.ones(4)
    >>> def loss_fn(w):
    ...     return jnp.mean((x @ w - y) ** 2)
    >>> w = jnp.array([0.1, 0.2, -0.3])
    >>> value, grads = jax.value_and_grad(loss_fn)(w)
    >>> curvature = nlcg_optax.gauss_newton(
    ...     lambda w: x @ w, lambda outputs: jnp.sum((outputs - y) ** 2), fraction=1
    ... )
    >>> given = {"value": value, "curvature": curvature}
    >>> found = nlcg_optax.check(nlcg_optax.nlcg_auto(), grads, w, **given)
    >>> print(found[0][:57])
    The curvature's own loss is 4 times `value` (7.84 against
    """
    tx = optax.with_extra_args_support(tx)
    state = tx.init(params)
    update, after = tx.update(
        grads, state, params, value=value, curvature=curvature, **extra_args
    )
    model = find_model(after)
    if curvature.axis_name is not None:
        raise ValueError(
            f"The curvature is a mean over the axis {curvature.axis_name!r}: call "
            "`check` where there is none, with a curvature of one device's batch."
        )
    exact = curvature.fraction == 1
    return [
        *_of_values(jnp.asarray(value), curvature.loss(params), exact),
        *_of_gradients(grads, jax.grad(curvature.loss)(params), exact),
        *_of_products(grads, params, curvature),
        *_of_step(update, model),
    ]


def _of_values(given: jax.Array, own_loss: jax.Array, exact: bool) -> list[str]:
    value, own = float(given), float(own_loss)
    if not (math.isfinite(value) and math.isfinite(own)):
        return [f"`value` is {value}, and the curvature's own loss {own}."]
    ratio = own / value if value else float("inf")
    if exact and abs(own - value) > SAME_LOSS * max(abs(own), abs(value)):
        size = "the same, for both are of the whole batch"
    elif not exact and own * value > 0 and not 1 / LIKE_LOSS < ratio < LIKE_LOSS:
        size = "of one size"
    else:
        return []
    return [
        f"The curvature's own loss is {ratio:.4g} times `value` ({own:.4g} against "
        f"{value:.4g}), and should be {size}. Is one a sum over the batch and the "
        "other a mean, is a penalty in one alone, or is it other data? Write the loss "
        "once: `nlcg_optax.value_grad_and_curvature(outputs_fn, loss_fn)`."
    ]


def _of_gradients(grads: Any, own: Any, exact: bool) -> list[str]:
    dtype = _tree.scalar_dtype(grads)
    (g_g, g_o), (_, o_o) = (
        slopes_along(x, stack(x, [grads, own]), dtype, None) for x in (grads, own)
    )
    if not (g_g > 0 and o_o > 0):
        return []
    ratio = float(jnp.sqrt(o_o / g_g))
    cosine = float(g_o / jnp.sqrt(g_g) / jnp.sqrt(o_o))
    found = []
    frozen = [
        jax.tree_util.keystr(path)
        for (path, g), o in zip(
            jax.tree_util.tree_flatten_with_path(grads)[0],
            jax.tree.leaves(own),
            strict=True,
        )
        if not jnp.any(g) and jnp.any(o)
    ]
    if frozen:
        found.append(
            f"The gradient is zero for {', '.join(frozen)}, where that of the "
            "curvature's own loss is not. These stay where they are, but the products "
            "count what they would do. Show the optimizer the others alone "
            "(`optax.partition`), or put `jax.lax.stop_gradient` into `outputs_fn` too."
        )
    wrong = abs(ratio - 1) > SAME_LOSS or cosine < 1 - SAME_LOSS
    if exact and wrong or not exact and not 1 / LIKE_LOSS < ratio < LIKE_LOSS:
        found.append(
            f"The gradient of the curvature's own loss is {ratio:.4g} times as long as "
            f"the gradient given, and the cosine between them is {cosine:.3f}. Was the "
            "gradient scaled, clipped or averaged after it was taken? Whatever changes "
            "it has to be part of the loss."
        )
    return found


def _of_products(grads: Any, params: Any, curvature: Curvature) -> list[str]:
    images = curvature.push(params, stack(params, [grads]))
    product = float(curvature.inner(params, images, images)[0, 0])
    if product != 0 or not any(jnp.any(g) for g in jax.tree.leaves(grads)):
        return []
    return [
        "There is no curvature along the gradient. The loss is linear in the outputs "
        "(an absolute error, a hinge, a policy gradient, or `outputs_fn` returns the "
        "loss itself): return from `outputs_fn` what the loss is computed from, or "
        "take `nlcg_optax.hessian`, or an optimizer with a learning rate, "
        "`nlcg_optax.nlcg(0.04)`."
    ]


def _of_step(update: Any, model: QuadraticModelState) -> list[str]:
    found = []
    if jnp.asarray(model.counts.nonfinite).item():
        found.append(
            "The step was left out, for a product of the curvature is not finite."
        )
    made = float(model.memory.prev_norms[0])
    dtype = _tree.scalar_dtype(update)
    norm = float(
        jnp.sqrt(slopes_along(update, stack(update, [update]), dtype, None)[0])
    )
    if made > 0 and abs(norm / made - 1) > SAME_LOSS:
        found.append(
            f"The update is {norm / made:.4g} times as long as the step that the "
            "curvature chose. Leave out what follows it in the chain: it goes by the "
            "steps that it made. A final decay is `nlcg_auto(multiplier=...)`."
        )
    return found

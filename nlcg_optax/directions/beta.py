r"""β rules of nonlinear conjugate gradient, as pure functions of inner products.

With the gradient :math:`g_t`, the preconditioned gradient
:math:`z_t = M_t^{-1} g_t`, the direction :math:`d_t = -z_t + \beta_t d_{t-1}`,
:math:`y_t = g_t - g_{t-1}` and :math:`w_t = z_t - z_{t-1}` (which is
:math:`M^{-1} y_t` while the preconditioner stays the same), every rule is a function
of a few scalars, the :class:`InnerProducts`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nlcg_optax import _check, _tree


class InnerProducts(NamedTuple):
    r"""What a β rule may look at: real scalars over the whole parameter vector.

    Attributes:
      g_z: :math:`\rho_t = g_t^\top z_t`.
      prev_g_z: :math:`\rho_{t-1} = g_{t-1}^\top z_{t-1}`.
      g_d: :math:`g_t^\top d_{t-1}`, the slope along the last direction now.
      prev_g_d: :math:`g_{t-1}^\top d_{t-1}`, the slope along it when it was taken.
      g_w: :math:`g_t^\top (z_t - z_{t-1})`.
      y_w: :math:`(g_t - g_{t-1})^\top (z_t - z_{t-1})`.
      prev_d_d: :math:`d_{t-1}^\top M d_{t-1}`, the squared length of the last
        direction in the metric of the preconditioner (as if it had not changed since
        the last restart), which is :math:`\lVert d_{t-1} \rVert^2` without one.
    """

    g_z: jax.Array
    prev_g_z: jax.Array
    g_d: jax.Array
    prev_g_d: jax.Array
    g_w: jax.Array
    y_w: jax.Array
    prev_d_d: jax.typing.ArrayLike = jnp.nan


BetaRule = Callable[[InnerProducts, jax.typing.ArrayLike], jax.Array]


def _divide(
    numerator: jax.Array, denominator: jax.Array, epsilon: jax.typing.ArrayLike
) -> jax.Array:
    """Divides, with the denominator moved away from zero by ε; 0 if it is still 0."""
    epsilon = _tree.real_scalar(epsilon, denominator.dtype)
    denominator = jnp.where(
        denominator < 0, denominator - epsilon, denominator + epsilon
    )
    safe = jnp.where(denominator == 0, 1, denominator)
    return jnp.where(denominator == 0, 0, numerator / safe)


def fletcher_reeves(p: InnerProducts, epsilon: jax.typing.ArrayLike = 0) -> jax.Array:
    r"""Fletcher & Reeves (1964): :math:`\rho_t / (\rho_{t-1} + \epsilon)`."""
    return _divide(p.g_z, p.prev_g_z, epsilon)


def polak_ribiere(p: InnerProducts, epsilon: jax.typing.ArrayLike = 0) -> jax.Array:
    r"""Polak & Ribière (1969): :math:`g_t^\top w_t / (\rho_{t-1} + \epsilon)`.

    :math:`g_t^\top w_t = \rho_t - g_t^\top z_{t-1}`, the form of arXiv:1812.02886.
    """
    return _divide(p.g_w, p.prev_g_z, epsilon)


def hestenes_stiefel(p: InnerProducts, epsilon: jax.typing.ArrayLike = 0) -> jax.Array:
    r"""Hestenes & Stiefel (1952): :math:`g_t^\top w_t / d_{t-1}^\top y_t`."""
    return _divide(p.g_w, p.g_d - p.prev_g_d, epsilon)


def dai_yuan(p: InnerProducts, epsilon: jax.typing.ArrayLike = 0) -> jax.Array:
    r"""Dai & Yuan (1999): :math:`\rho_t / d_{t-1}^\top y_t`."""
    return _divide(p.g_z, p.g_d - p.prev_g_d, epsilon)


def _truncate(
    beta: jax.Array, slope: jax.Array, p: InnerProducts, eta: float
) -> jax.Array:
    """Raises β to η · slope / ‖d‖²; an unknown length truncates nothing."""
    length = jnp.asarray(p.prev_d_d, slope.dtype)
    known = ~jnp.isnan(length)
    # Replaced before the division too, so that the gradient meets no NaN either.
    bound = eta * _divide(slope, jnp.where(known, length, 1), 0)
    return jnp.where(known & (bound > beta), bound, beta)


def hager_zhang(p: InnerProducts, epsilon: jax.typing.ArrayLike = 0) -> jax.Array:
    r"""Hager & Zhang (2005), preconditioned and truncated as in CG_DESCENT.

    .. math::
        \max\left( \frac{g_t^\top w_t}{d_{t-1}^\top y_t}
        - 2 \frac{y_t^\top w_t}{d_{t-1}^\top y_t}
            \frac{g_t^\top d_{t-1}}{d_{t-1}^\top y_t}, \;
        0.4\, \frac{g_{t-1}^\top d_{t-1}}{d_{t-1}^\top M d_{t-1}} \right)

    The bound is that of Hager & Zhang, "The limited memory conjugate gradient method"
    (2013), eq. 1.5, which unlike the one of 2005 does not change when the loss is
    multiplied by a constant.
    """
    d_y = p.g_d - p.prev_g_d
    beta = _divide(p.g_w, d_y, epsilon) - 2 * _divide(p.y_w, d_y, epsilon) * _divide(
        p.g_d, d_y, epsilon
    )
    return _truncate(beta, p.prev_g_d, p, 0.4)


def dai_kou(p: InnerProducts, epsilon: jax.typing.ArrayLike = 0) -> jax.Array:
    r"""Dai & Kou (2013), preconditioned, with :math:`\tau_k` of Oren & Luenberger.

    .. math::
        \max\left( \frac{g_t^\top w_t}{d_{t-1}^\top y_t}
        - \frac{y_t^\top w_t}{d_{t-1}^\top y_t}
            \frac{g_t^\top d_{t-1}}{d_{t-1}^\top y_t}, \;
        0.5\, \frac{g_t^\top d_{t-1}}{d_{t-1}^\top M d_{t-1}} \right)
    """
    d_y = p.g_d - p.prev_g_d
    beta = _divide(p.g_w, d_y, epsilon) - _divide(p.y_w, d_y, epsilon) * _divide(
        p.g_d, d_y, epsilon
    )
    return _truncate(beta, p.g_d, p, 0.5)


def hybrid_hs_dy(p: InnerProducts, epsilon: jax.typing.ArrayLike = 0) -> jax.Array:
    r"""Dai & Yuan (2001): :math:`\max(0, \min(\beta_{HS}, \beta_{DY}))`."""
    return jnp.maximum(
        0, jnp.minimum(hestenes_stiefel(p, epsilon), dai_yuan(p, epsilon))
    )


def liu_storey(p: InnerProducts, epsilon: jax.typing.ArrayLike = 0) -> jax.Array:
    r"""Liu & Storey (1991): :math:`g_t^\top w_t / (-g_{t-1}^\top d_{t-1})`."""
    return _divide(p.g_w, -p.prev_g_d, epsilon)


BETA_RULES: dict[str, BetaRule] = {
    rule.__name__: rule
    for rule in (
        fletcher_reeves,
        polak_ribiere,
        hestenes_stiefel,
        dai_yuan,
        hager_zhang,
        dai_kou,
        hybrid_hs_dy,
        liu_storey,
    )
}

# Rules that need no slope, no vector of the previous step, and only z_{t-1}.
_WITHOUT_SLOPE = (fletcher_reeves, polak_ribiere)
_WITHOUT_HISTORY = (fletcher_reeves, dai_yuan)
_WITHOUT_PREV_GRAD = (
    *_WITHOUT_HISTORY,
    polak_ribiere,
    hestenes_stiefel,
    hybrid_hs_dy,
    liu_storey,
)


class ResolvedRule(NamedTuple):
    """A β rule, and what its inner products need."""

    function: BetaRule
    needs_slope: bool
    needs_prev_preconditioned: bool
    needs_prev_grad: bool


def resolve(beta_rule: str | BetaRule) -> ResolvedRule:
    """Finds a rule by name; a callable stands for itself and is given everything."""
    if not callable(beta_rule):
        _check.one_of("beta_rule", beta_rule, BETA_RULES, " or a callable")
        beta_rule = BETA_RULES[beta_rule]
    return ResolvedRule(
        function=beta_rule,
        needs_slope=beta_rule not in _WITHOUT_SLOPE,
        needs_prev_preconditioned=beta_rule not in _WITHOUT_HISTORY,
        needs_prev_grad=beta_rule not in _WITHOUT_PREV_GRAD,
    )

r"""β rules of nonlinear conjugate gradient, as pure functions of inner products.

With the gradient :math:`g_t`, the preconditioned gradient
:math:`z_t = M_t^{-1} g_t`, the direction :math:`d_t = -z_t + \beta_t d_{t-1}`,
:math:`y_t = g_t - g_{t-1}` and :math:`w_t = z_t - z_{t-1}` (which is
:math:`M^{-1} y_t` while the preconditioner stays the same), every rule is a function
of a few scalars, the :class:`InnerProducts`.
"""

import dataclasses
from collections.abc import Callable, Set
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from nlcg_optax import _check, _tree


class InnerProducts(NamedTuple):
    r"""What a β rule may look at: real scalars over the whole parameter vector.

    They have one unit, which ε shares: a power of two where they would leave the range
    of their dtype, and 1 otherwise. β has none.

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
    prev_d_d: ArrayLike = jnp.nan


BetaFunction = Callable[[InnerProducts, ArrayLike], ArrayLike]


@dataclasses.dataclass(frozen=True)
class BetaRule:
    r"""A β rule that says which inner products it looks at.

    A plain function serves as a rule too, and is given everything. For that the state
    keeps two more trees, z and g of the last step; a rule that declares its needs does
    not pay for what it never reads.

    Args:
      function: a function of :class:`InnerProducts` and ε that returns β, a scalar.
      needs: the names of those fields of :class:`InnerProducts` that it reads. Others
        may be NaN.

    Raises:
      ValueError: for a name that is no field, or a function that is none.

    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> def halved(p, epsilon):
    ...     return 0.5 * p.g_z / (p.prev_g_z + epsilon)
    >>> rule = nlcg_optax.beta.BetaRule(halved, needs={"g_z", "prev_g_z"})
    >>> tx = nlcg_optax.scale_by_conjugate_direction(rule)
    >>> state = tx.init(jnp.ones(2))
    >>> for _ in range(2):
    ...     _, state = tx.update(jnp.ones(2), state)
    >>> print(state.beta, state.prev_grad, state.prev_preconditioned)
    0.5 None None
    """

    function: BetaFunction
    needs: Set[str] = frozenset(InnerProducts._fields)

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ValueError(
                f"function={self.function!r} is not valid: expected a function of "
                "InnerProducts and ε that returns β."
            )
        needs = frozenset(self.needs)
        for name in sorted(needs):
            _check.one_of("needs", name, InnerProducts._fields)
        object.__setattr__(self, "needs", needs)
        # So that the documentation of a rule is that of its function.
        object.__setattr__(self, "__doc__", self.function.__doc__)
        object.__setattr__(self, "__wrapped__", self.function)

    def __call__(self, products: InnerProducts, epsilon: ArrayLike = 0) -> ArrayLike:
        """β, by the function."""
        return self.function(products, epsilon)


BETA_RULES: dict[str, BetaRule] = {}


def _rule(*needs: str) -> Callable[[BetaFunction], BetaRule]:
    """Enters a function into ``BETA_RULES``, as a rule with these needs."""

    def enter(function: BetaFunction) -> BetaRule:
        name = getattr(function, "__name__")  # noqa: B009 - no callable needs a name
        BETA_RULES[name] = BetaRule(function, frozenset(needs))
        return BETA_RULES[name]

    return enter


def _divide(
    numerator: jax.Array, denominator: jax.Array, epsilon: ArrayLike
) -> jax.Array:
    """Divides, with the denominator moved away from zero by ε; 0 if it is still 0."""
    epsilon = _tree.real_scalar(epsilon, denominator.dtype)
    denominator = denominator + jnp.where(denominator < 0, -epsilon, epsilon)
    safe = jnp.where(denominator == 0, 1, denominator)
    return jnp.where(denominator == 0, 0, numerator / safe)


@_rule("g_z", "prev_g_z")
def fletcher_reeves(p: InnerProducts, epsilon: ArrayLike = 0) -> jax.Array:
    r"""Fletcher & Reeves (1964): :math:`\rho_t / (\rho_{t-1} + \epsilon)`."""
    return _divide(p.g_z, p.prev_g_z, epsilon)


@_rule("g_w", "prev_g_z")
def polak_ribiere(p: InnerProducts, epsilon: ArrayLike = 0) -> jax.Array:
    r"""Polak & Ribière (1969): :math:`g_t^\top w_t / (\rho_{t-1} + \epsilon)`.

    :math:`g_t^\top w_t = \rho_t - g_t^\top z_{t-1}`, the form of arXiv:1812.02886.
    """
    return _divide(p.g_w, p.prev_g_z, epsilon)


@_rule("g_w", "g_d", "prev_g_d")
def hestenes_stiefel(p: InnerProducts, epsilon: ArrayLike = 0) -> jax.Array:
    r"""Hestenes & Stiefel (1952): :math:`g_t^\top w_t / d_{t-1}^\top y_t`."""
    return _divide(p.g_w, p.g_d - p.prev_g_d, epsilon)


@_rule("g_z", "g_d", "prev_g_d")
def dai_yuan(p: InnerProducts, epsilon: ArrayLike = 0) -> jax.Array:
    r"""Dai & Yuan (1999): :math:`\rho_t / d_{t-1}^\top y_t`."""
    return _divide(p.g_z, p.g_d - p.prev_g_d, epsilon)


def _truncated(
    p: InnerProducts, epsilon: ArrayLike, weight: float, eta: float, slope: jax.Array
) -> jax.Array:
    """Hestenes & Stiefel's less a weight times a term, raised to η · slope / ‖d‖²."""
    d_y = p.g_d - p.prev_g_d
    along = _divide(p.g_d, d_y, epsilon)
    beta = _divide(p.g_w, d_y, epsilon) - weight * _divide(p.y_w, d_y, epsilon) * along
    length = jnp.asarray(p.prev_d_d, slope.dtype)
    known = ~jnp.isnan(length)  # an unknown length truncates nothing
    # Replaced before the division too, so that the gradient meets no NaN either.
    bound = eta * _divide(slope, jnp.where(known, length, 1), 0)
    return jnp.where(known & (bound > beta), bound, beta)


@_rule("g_w", "y_w", "g_d", "prev_g_d", "prev_d_d")
def hager_zhang(p: InnerProducts, epsilon: ArrayLike = 0) -> jax.Array:
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
    return _truncated(p, epsilon, 2, 0.4, p.prev_g_d)


@_rule("g_w", "y_w", "g_d", "prev_g_d", "prev_d_d")
def dai_kou(p: InnerProducts, epsilon: ArrayLike = 0) -> jax.Array:
    r"""Dai & Kou (2013), preconditioned, with :math:`\tau_k` of Oren & Luenberger.

    .. math::
        \max\left( \frac{g_t^\top w_t}{d_{t-1}^\top y_t}
        - \frac{y_t^\top w_t}{d_{t-1}^\top y_t}
            \frac{g_t^\top d_{t-1}}{d_{t-1}^\top y_t}, \;
        0.5\, \frac{g_t^\top d_{t-1}}{d_{t-1}^\top M d_{t-1}} \right)
    """
    return _truncated(p, epsilon, 1, 0.5, p.g_d)


@_rule("g_z", "g_w", "g_d", "prev_g_d")
def hybrid_hs_dy(p: InnerProducts, epsilon: ArrayLike = 0) -> jax.Array:
    r"""Dai & Yuan (2001): :math:`\max(0, \min(\beta_{HS}, \beta_{DY}))`."""
    either = jnp.minimum(hestenes_stiefel(p, epsilon), dai_yuan(p, epsilon))
    return jnp.maximum(0, either)


@_rule("g_w", "prev_g_d")
def liu_storey(p: InnerProducts, epsilon: ArrayLike = 0) -> jax.Array:
    r"""Liu & Storey (1991): :math:`g_t^\top w_t / (-g_{t-1}^\top d_{t-1})`."""
    return _divide(p.g_w, -p.prev_g_d, epsilon)


def resolve(beta_rule: str | BetaFunction) -> BetaRule:
    """Finds a rule by name; a plain function is given everything."""
    if isinstance(beta_rule, BetaRule):
        return beta_rule
    if callable(beta_rule):
        return BetaRule(beta_rule)
    _check.one_of("beta_rule", beta_rule, BETA_RULES, " or a callable")
    return BETA_RULES[beta_rule]

"""A rate that no one tunes: what noise costs is held against what is still gained."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nlcg_optax import _check, _transformations, _tree, _xla

# The parameters are averaged over the last tenth of the steps, and over ten at first.
_PART, _FEWEST = 0.1, 10.0
# The averages of numbers: the newest of n has the weight (k + 1) / (n + k), so that
# they lag behind by n / (k + 2): a tenth and a third of the steps.
_NOW, _PAST = 8.0, 1.0
# What an average of parameters that is a tenth of the steps old lags behind, in parts
# of the gain, where the loss falls with the logarithm of the steps: 0.33.
_LAG = 3.3
# There the gain before was less than this many times that of now.
_FLATTER = 1.5
# A gain counts as this part of its standard error at least.
_LEAST = 0.1
# The gain, in parts of what is left of the loss, at whose pace it falls fast enough.
_PACE = 0.1
# How far log(rate) goes in a window, at most.
_SPEED = 1.4
# The part of a run in which the rate is steered; then it falls to zero along a line.
_STEERED = 0.55
# What is left of the rate after a loss that is not finite, or an excess that is more
# than so many gains.
_CUT, _FAR = 0.25, 4.0

_VALUE = (
    "the rate follows the loss. Call `update(grads, state, params, value=loss, "
    "value_fn=lambda params: loss_fn(params, batch))` with the loss averaged over the "
    "global batch, and the function that it is of."
)
_VALUE_FN = (
    "value_fn=None: the rate follows the loss at the average of the parameters too. "
    "Call `update(grads, state, params, value=loss, value_fn=lambda params: "
    "loss_fn(params, batch))` with the loss of the same batch, or pass `curvature=` as "
    "nlcg_optax.value_grad_and_curvature makes it."
)


class Balance(NamedTuple):
    """What a rate is steered by, and the rate: numbers alone.

    Attributes:
      seen: finite losses so far, int32 scalar.
      rate: α, before it decays.
      age: how many steps old the average of the parameters is, in the mean.
      excess: E, the average excess of the loss over that at the average parameters.
      now: average loss at the average parameters, a tenth of the steps old.
      past: the same, a third of the steps old.
      older: average of `past`, a third of the steps older.
      variance: of the loss at the average parameters, from batch to batch.
      negative: whether a loss ever was: it may then fall by more than there is of it.
    """

    seen: jax.typing.ArrayLike
    rate: jax.Array
    age: jax.Array
    excess: jax.Array
    now: jax.Array
    past: jax.Array
    older: jax.Array
    variance: jax.Array
    negative: jax.typing.ArrayLike

    @property
    def lag(self) -> jax.Array:
        """What the average of the parameters lags behind, in parts of the gain."""
        steps = jnp.maximum(jnp.asarray(self.seen), 1).astype(self.age.dtype)
        return _LAG * self.age / steps

    @property
    def cost(self) -> jax.Array:
        r"""What noise costs: :math:`E` and what the average lags behind."""
        return self.excess + self.lag * jnp.maximum(self.past - self.now, 0)

    @property
    def gain(self) -> jax.Array:
        """What the run still gains: R, and less of it where the descent flattens."""
        gain = jnp.maximum(self.past - self.now, 0)
        before = self.older - self.past
        flattens = before > _FLATTER * gain
        return jnp.where(
            flattens, _FLATTER * gain**2 / jnp.where(flattens, before, 1), gain
        )

    @property
    def fast(self) -> jax.Array:
        """Whether the loss falls so fast that no larger rate is needed."""
        steep = -self.excess > _PACE * self.now * self.lag
        return steep & ~jnp.asarray(self.negative)

    @property
    def doubt(self) -> jax.Array:
        """The standard error of the gain."""
        steps = jnp.asarray(self.seen).astype(self.age.dtype)
        return jnp.sqrt(self.variance * (_NOW + 1) / (steps + _NOW))


class NoiseBalanceState(NamedTuple):
    """State of :func:`scale_by_noise_balance`.

    Attributes:
      count: calls of `update`, int32 scalar.
      nonfinite: losses seen that were not finite, int32 scalar.
      returns: how often the parameters went back to their average for an excess that
        was far too large, int32 scalar.
      average: of the parameters over the last tenth of the steps, float32 or wider.
      size: the rate of the last step, with its decay.
      balance: what the rate is steered by.
    """

    count: jax.typing.ArrayLike
    nonfinite: jax.typing.ArrayLike
    returns: jax.typing.ArrayLike
    average: optax.Params
    size: jax.Array
    balance: Balance

    def report(self) -> dict[str, jax.typing.ArrayLike]:
        """What :func:`nlcg_optax.diagnostics` tells."""
        balance = self.balance
        steered = balance.gain > 0
        ratio = jnp.where(
            steered, balance.cost / jnp.where(steered, balance.gain, 1), jnp.inf
        )
        return {
            "noise_excess": balance.excess,
            "noise_cost": balance.cost,
            "gain": balance.gain,
            "noise_ratio": ratio,
            "noise_rate": self.size,
            "noise_nonfinite": self.nonfinite,
            "noise_returns": self.returns,
        }


def scale_by_noise_balance(
    num_steps: int | None = None,
    *,
    first_rate: float = 1e-3,
    target: float = 1.0,
    delay: float = 20.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales directions by a rate that balances the cost of noise with what is gained.

    Where gradients are noisy, a run bounces between the walls of a valley while it goes
    along it. With the average :math:`\bar x` of the parameters over the last tenth of
    the steps, bouncing costs the excess

    .. math:: E = L(x) - L(\bar x),

    both on the same batch, which a decay of the rate gives back. What a run gains in
    about its last half, R, is how far :math:`L(\bar x)` fell in that time. A larger
    rate goes further along the valley, and costs more: in the bounds of stochastic
    gradient descent, :math:`D^2 / 2 \alpha t` and :math:`\alpha G^2 / 2`, the best
    rate makes both equal. The rate is steered to where E = τR, by

    .. math::
        \log \alpha \leftarrow \log \alpha + \frac{1.4}{w + \delta} \cdot
        \frac{\tau R - E}{\tau R + |E| + \sigma}

    with the window :math:`w = (n + 8)/9` after n steps and a delay δ. R is that of the
    last half, times 1.5 R over the R before it where that is less than 1: in the steep
    descent of the first steps it says little of what is still to come. It counts as a
    tenth of its standard error σ at least, so that a rate which died comes back, and
    the σ of the denominator is R at most. To E is added what :math:`\bar x` lags
    behind, :math:`3.3 R\, a / n` with the mean age a of the parameters in it. A change
    of units of the loss changes nothing.

    The rate does not grow while the loss falls steeply, where
    :math:`-E > 0.33\, L(\bar x)\, a / n`: at that pace a tenth of what is left is
    gained in about half a run. What a rate does is seen there when it is too late, and
    the damage of a rate that is far too large does not heal. That takes a loss that
    never was negative for one that cannot be, as an error or a cross-entropy; from the
    first negative loss on it does not hold, and a constant in it changes nothing.

    The rate is steered in 55% of the steps, and then falls to zero along a line. Where
    the end is not known it is steered throughout, and :func:`eval_params` gives the
    parameters to evaluate.

    After a loss that is not finite, or where E is more than four times R + σ, the
    parameters become their average, and the rate a quarter of what it was, which is
    counted: what a rate that is far too large breaks does not heal by itself. (The
    state of a piece before this one, of a direction that averages, say, has seen the
    gradient then: ``optax.apply_if_finite`` around all of it leaves that out.)

    It follows any direction, as a final scaling that needs no learning rate:
    ``optax.chain(optax.scale_by_adam(), scale_by_noise_balance(num_steps),
    optax.scale(-1.0))``. Updates keep the gradient's sign until then. Weight decay
    belongs in the loss, or before this piece. BatchNorm uses the batch's statistics at
    :math:`\bar x` too, if the loss does.

    Args:
      num_steps: the steps of the whole run; None where that is not known.
      first_rate: the rate of the first steps.
      target: τ, what noise may cost in parts of the gain.
      delay: δ. What a rate does is seen some steps later, and in the steep descent of
        the first steps hardly at all. With 20 the rate grows there by a factor of e in
        15 steps at most; after a good start, as :func:`nlcg_auto` makes it, 5 will do.

    Returns:
      A transformation whose `update` needs `params` and the keyword arguments
      ``value``, the loss averaged over the global batch, and ``value_fn``, the function
      from parameters to the loss of that batch, in which :math:`\bar x` is tried: a
      forward pass. In its place may be ``curvature``, a
      :class:`~nlcg_optax.Curvature`: then E is taken on its part of the batch. In a
      `shard_map` the value of either has to be the same on all devices.

    Raises:
      ValueError: when built, for an argument out of range; in `update`, if something it
        needs is missing or does not match.

    Noise of standard deviation 1 in the gradient, from a rate 100 times too high:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> import optax
    >>> def loss_fn(x, noise):
    ...     return 0.5 * jnp.sum(x**2) + x @ noise
    >>> tx = optax.chain(
    ...     nlcg_optax.scale_by_noise_balance(500, first_rate=1.0), optax.scale(-1.0)
    ... )
    >>> @jax.jit
    ... def step(carry, key):
    ...     x, state = carry
    ...     value_fn = lambda x: loss_fn(x, jax.random.normal(key, x.shape))
    ...     value, grads = jax.value_and_grad(value_fn)(x)
    ...     updates, state = tx.update(
    ...         grads, state, x, value=value, value_fn=value_fn
    ...     )
    ...     return (optax.apply_updates(x, updates), state), value
    >>> x = jnp.ones(100)
    >>> keys = jax.random.split(jax.random.key(0), 500)
    >>> (x, state), _ = jax.lax.scan(step, (x, tx.init(x)), keys)
    >>> print(bool(state[0].balance.rate < 0.2), bool(0.5 * jnp.sum(x**2) < 1.5))
    True True
    """
    if num_steps is not None:
        _check.number("num_steps", num_steps, minimum=1, integer=True)
    _check.number("first_rate", first_rate, minimum=0, exclusive=True, finite=True)
    _check.number("target", target, minimum=0, exclusive=True, finite=True)
    _check.number("delay", delay, minimum=0, finite=True)

    def init_fn(params: optax.Params) -> NoiseBalanceState:
        return begin(params, first_rate)

    def update_fn(
        updates: optax.Updates,
        state: NoiseBalanceState,
        params: Any = None,
        *,
        value: jax.typing.ArrayLike | None = None,
        value_fn: Callable[[Any], jax.typing.ArrayLike] | None = None,
        curvature: Any | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, NoiseBalanceState]:
        del extra_args
        _tree.check_params(updates, params, "the balance of noise")
        _tree.check_match(updates, state.average, "the optimizer's state")
        loss = _check.loss(value, _VALUE).astype(state.balance.rate.dtype)
        average = averaged(state, params)
        if value_fn is not None:
            there = _check.loss(value_fn(_tree.cast_like(average, params)), _VALUE)
            excess = loss - there.astype(loss.dtype)
        elif curvature is not None:
            excess = excess_of(curvature, loss, params, average)
        else:
            raise ValueError(_VALUE_FN)
        new, size, taken = follow(
            state, params, average, loss, excess, num_steps, target, delay
        )
        return scaled(updates, params, new.average, size, taken), new

    return _transformations.make(init_fn, update_fn)


def begin(params: optax.Params, rate: jax.typing.ArrayLike) -> NoiseBalanceState:
    """The state before the first step."""
    dtype = _tree.scalar_dtype(params)
    numbers = {
        name: jnp.zeros([], dtype)
        for name in Balance._fields
        if name not in ("seen", "rate", "negative")
    }
    return NoiseBalanceState(
        count=jnp.zeros([], jnp.int32),
        nonfinite=jnp.zeros([], jnp.int32),
        returns=jnp.zeros([], jnp.int32),
        # A copy, for a buffer that is donated must not be shared.
        average=jax.tree.map(lambda x: jnp.array(_tree.lift(x), copy=True), params),
        size=_tree.real_scalar(rate, dtype),
        balance=Balance(
            seen=jnp.zeros([], jnp.int32),
            rate=_tree.real_scalar(rate, dtype),
            negative=jnp.zeros([], bool),
            **numbers,
        ),
    )


def weight(seen: jax.typing.ArrayLike, dtype: Any) -> jax.Array:
    """That of the newest parameters in their average, after so many before them."""
    count = 1 + jnp.asarray(seen).astype(dtype)
    return jnp.maximum(1 / count, 1 / jnp.maximum(_FEWEST, _PART * count))


def averaged(state: NoiseBalanceState, params: optax.Params) -> optax.Params:
    """The average with these parameters."""
    part = weight(state.balance.seen, state.balance.rate.dtype)

    def one(mean: jax.Array, x: jax.Array) -> jax.Array:
        mean = jnp.asarray(mean)
        x = _tree.lift(x).astype(mean.dtype)
        return mean + _tree.scalar_like(part, mean) * (x - mean)

    return jax.tree.map(one, state.average, params)


def scaled(
    updates: optax.Updates,
    params: optax.Params,
    average: optax.Params,
    size: jax.Array,
    taken: jax.typing.ArrayLike,
) -> optax.Updates:
    """The updates times the rate; to the average where no step is taken."""

    def one(u: jax.Array, w: jax.Array, mean: jax.Array) -> jax.Array:
        x, w = _tree.lift(u), _tree.lift(w)
        back = (w - jnp.asarray(mean).astype(w.dtype)).astype(x.dtype)
        return jnp.where(taken, _tree.scalar_like(size, x) * x, back).astype(u.dtype)

    return jax.tree.map(one, updates, params, average)


def excess_of(
    curvature: Any, loss: jax.Array, params: optax.Params, average: optax.Params
) -> jax.Array:
    """The excess of the loss on the part of the batch that the curvature is of."""
    there = curvature.loss(_tree.cast_like(average, params))
    here = loss if curvature.fraction == 1 else curvature.loss(params)
    return here.astype(loss.dtype) - there.astype(loss.dtype)


def watch(balance: Balance, loss: jax.Array, excess: jax.Array) -> Balance:
    """The balance with what this batch says.

    Args:
      balance: the one before.
      loss: L(x).
      excess: L(x) less the loss at the average that has x in it.
    """
    dtype = balance.rate.dtype
    count = 1 + jnp.asarray(balance.seen).astype(dtype)
    newest = (_NOW + 1) / (count + _NOW)
    long = (_PAST + 1) / (count + _PAST)
    there = loss - excess
    now = balance.now + newest * (there - balance.now)
    past = balance.past + long * (there - balance.past)
    spread = (there - balance.now) * (there - now)
    spread = jnp.where(count == 1, 0, spread)  # where there was none before
    return Balance(
        seen=_transformations.increment(jnp.asarray(balance.seen)),
        rate=balance.rate,
        age=(1 - weight(balance.seen, dtype)) * (balance.age + 1),
        excess=balance.excess + newest * (excess - balance.excess),
        now=now,
        past=past,
        older=balance.older + long * (past - balance.older),
        variance=balance.variance + newest * (spread - balance.variance),
        negative=jnp.asarray(balance.negative) | (loss < 0) | (there < 0),
    )


def change(
    balance: Balance, target: jax.typing.ArrayLike, delay: jax.typing.ArrayLike
) -> jax.Array:
    """By how much the logarithm of the rate is to grow in this step."""
    dtype = balance.rate.dtype
    doubt, cost = balance.doubt, balance.cost
    wanted = _tree.real_scalar(target, dtype) * jnp.maximum(
        balance.gain, _LEAST * doubt
    )
    # Doubt slows the rate down, where there is a gain to doubt.
    size = wanted + jnp.abs(cost) + jnp.minimum(doubt, balance.gain)
    too_low = jnp.where(size > 0, (wanted - cost) / jnp.where(size > 0, size, 1), 0)
    too_low = jnp.where(balance.fast, jnp.minimum(too_low, 0), too_low)
    window = (jnp.asarray(balance.seen).astype(dtype) + _NOW) / (_NOW + 1)
    return _SPEED * too_low / (window + _tree.real_scalar(delay, dtype))


def follow(
    state: NoiseBalanceState,
    params: optax.Params,
    average: optax.Params,
    loss: jax.Array,
    excess: jax.Array,
    num_steps: jax.typing.ArrayLike | None,
    target: jax.typing.ArrayLike,
    delay: jax.typing.ArrayLike,
) -> tuple[NoiseBalanceState, jax.Array, jax.Array]:
    """The state after a step, the rate of this one with its decay, and if it is taken.

    Where it is not, the parameters go back to their average. If they did so just now,
    that is where they are, unless something changed the update (a sign, say): going
    back again and again would lead ever further away.

    Args:
      state: the one before.
      params: the parameters.
      average: the average parameters, with those of now in it.
      loss: at the parameters.
      excess: over the loss at the average.
      num_steps: from the first step that was counted on; None if unknown.
      target: what noise may cost in parts of the gain.
      delay: by how many steps what is seen lags behind.
    """
    balance = watch(state.balance, loss, excess)
    dtype, done = balance.rate.dtype, jnp.asarray(state.count)
    steered, decay = jnp.asarray(True), jnp.ones([], dtype)
    if num_steps is not None:
        steps = jnp.maximum(jnp.asarray(num_steps), 1).astype(dtype)
        part = done.astype(dtype) / steps
        steered = part < _STEERED
        decay = jnp.clip((1 - part) / (1 - _STEERED), 0, 1)
    grown = jnp.where(
        steered & (jnp.asarray(balance.seen) > 1), change(balance, target, delay), 0
    )
    balance = balance._replace(rate=balance.rate * jnp.exp(grown))
    finite = jnp.isfinite(loss) & jnp.isfinite(excess)
    far = finite & steered & (jnp.asarray(balance.seen).astype(dtype) > _FEWEST)
    far &= balance.excess > _FAR * (balance.gain + balance.doubt)
    counted = _transformations.increment(done)
    size = _xla.compute_once(decay * balance.rate)
    new = state._replace(count=counted, average=average, size=size, balance=balance)
    cut = state.balance._replace(
        rate=_CUT * state.balance.rate,
        # At the average there is none.
        excess=jnp.where(far, 0, state.balance.excess),
    )
    # Where there is none yet, or they were to be there, the parameters stay.
    there = _xla.decide_once(
        (jnp.asarray(state.balance.seen) > 0) & (jnp.asarray(state.size) > 0)
    )

    def stay(mean: jax.Array, x: jax.Array) -> jax.Array:
        mean = jnp.asarray(mean)
        x = _tree.lift(x).astype(mean.dtype)
        return jnp.where(there | ~jnp.isfinite(x), mean, x)

    back = state._replace(
        count=counted,
        size=jnp.zeros_like(size),
        average=jax.tree.map(stay, state.average, params),
        nonfinite=jnp.asarray(state.nonfinite) + (~finite).astype(jnp.int32),
        returns=jnp.asarray(state.returns) + far.astype(jnp.int32),
        balance=cut,
    )
    taken = _xla.decide_once(finite & ~far)
    return _tree.where(taken, new, back), size, taken


def eval_params(opt_state: Any, params: optax.Params) -> optax.Params:
    """The parameters to evaluate: their average, where the loss is lower there.

    While noise holds the loss up that is so; once the rate has fallen by half, on its
    way to zero, the last parameters are given. So they are without
    :func:`scale_by_noise_balance`, and in a quadratic model before noise rules.

    Args:
      opt_state: the state of an optimizer, chained, masked or partitioned as it may be.
      params: the parameters.

    Returns:
      A tree like the parameters.

    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> tx = nlcg_optax.scale_by_noise_balance(first_rate=1.0)
    >>> x = jnp.array([1.0])
    >>> state = tx.init(x)
    >>> for gradient in (2.0, -2.0, 2.0):  # to and fro between 1 and -1
    ...     updates, state = tx.update(
    ...         jnp.array([gradient]), state, x,
    ...         value=0.5 * x[0] ** 2, value_fn=lambda x: 0.5 * x[0] ** 2,
    ...     )
    ...     x = jnp.sign(-x)
    >>> print(f"{nlcg_optax.eval_params(state, x)[0]:.2f}")  # of 1, -1 and 1
    0.33
    """

    def is_state(node: Any) -> bool:
        return isinstance(node, NoiseBalanceState)

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    for state in jax.tree.leaves(opt_state, is_leaf=is_state):
        if is_state(state):
            balance = state.balance
            lower = jnp.asarray(balance.excess) > 0
            lower &= jnp.asarray(state.size) > 0.5 * jnp.asarray(balance.rate)

            def choose(mean: Any, x: Any, lower: Any = lower) -> Any:
                if is_masked(mean):
                    return x
                return jnp.where(lower, jnp.asarray(mean).astype(x.dtype), x)

            params = jax.tree.map(choose, state.average, params, is_leaf=is_masked)
    return params

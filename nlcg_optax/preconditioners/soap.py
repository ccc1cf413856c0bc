"""Preconditioning by Adam's scaling in the eigenbasis of averaged Gram matrices."""

import functools
import math
import operator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from nlcg_optax import _check, _transformations, _tree
from nlcg_optax.matrices import (
    devices,
    eigenbasis,
    moving,
    newton_schulz,
    plan,
    recognition,
)
from nlcg_optax.matrices.matrix import Mask, Matrices, is_kept, is_mask
from nlcg_optax.preconditioners._second_moment import (
    check_moments,
    over,
)

# Beyond so many elements of a factor the matrices of a stack are worked on one after
# the other: each fills the device, and memory and program are small.
_LOOP = 2**16
# What the second moment says of directions that the gradient does not have is rounding:
# so many roundings of its root mean square are added to its root.
_ROUNDINGS = 64
# Where `linear`, so large a part of the mean second moment is added to each.
_FLOOR = 1e-4
# Of the matrices, as of the other preconditioners: one learning rate serves all.
_RMS = 0.2


class Factors(NamedTuple):
    """What is kept for matrices of one shape, on the device that works on them.

    All arrays have the axes [rows, devices, parts] before those of a matrix, whose
    smaller side is the left one. (Of matrices that are split along the longer side, the
    devices have a part of that each.)

    Attributes:
      left: average L of :math:`G G^H`; None if that side has no basis.
      right: average R of :math:`G^H G`; None if that side has no basis.
      left_basis: orthogonal :math:`Q_L`, that follows the eigenvectors of L.
      right_basis: orthogonal :math:`Q_R`.
      second_moment: average V of the squared gradient in these bases.
      mean: average of the gradient; None where ``b1`` is 0.
      seen: gradients in the averages, int32.
      fallbacks: steps so far by the gradient's own size alone, since its squares were
        not finite; and renewals of a basis that came to nothing. int32.
    """

    left: jax.Array | None
    right: jax.Array | None
    left_basis: jax.Array | None
    right_basis: jax.Array | None
    second_moment: jax.Array
    mean: jax.Array | None
    seen: jax.Array
    fallbacks: jax.Array

    kept_by_devices = True  # see `matrices.matrix.is_kept`


class SoapState(NamedTuple):
    """State of :func:`scale_by_soap`.

    Attributes:
      count: steps taken, int32 scalar.
      mean: average of the gradient of leaves that are no matrices; an empty node in
        place of the others, or of all where ``b1`` is 0.
      second_moment: average of their squared gradient, float32 or wider; a mask in
        place of the others.
      factors: at the first leaf of each stack of matrices what is kept for these:
        averages and bases of both sides, second moment, mean, and counts.
    """

    count: jax.typing.ArrayLike
    mean: Any
    second_moment: Any
    factors: Any

    def report(self) -> dict[str, jax.Array]:
        """For :func:`~nlcg_optax.diagnostics`."""
        nodes = jax.tree.leaves(self.factors, is_leaf=is_kept)
        numbers = [jnp.sum(node.fallbacks, dtype=jnp.int32) for node in nodes]
        return {"soap_fallbacks": sum(numbers, jnp.int32(0))}

    def for_devices(self, number: int) -> "SoapState":
        """For :func:`~nlcg_optax.matrices.for_devices`."""
        entries, structure = jax.tree_util.tree_flatten_with_path(
            self.second_moment, is_leaf=is_mask
        )
        nodes = structure.flatten_up_to(self.factors)
        held = [
            (i, (path, jax.ShapeDtypeStruct(x.shape, x.planned_by.dtype), x))
            for i, (path, x) in enumerate(entries)
            if is_mask(x) and 0 not in x.shape
        ]
        if not held:
            return self
        by = held[0][1][2].planned_by
        kept = [node for node in nodes if node is not None]
        found = [entry for _, entry in held]
        nodes = [None] * len(entries)
        for first, node in moving.moved(_work(by), found, kept, number, by.mapped):
            nodes[held[first][0]] = node
        moments = [x.planned_for(number) if is_mask(x) else x for _, x in entries]
        return self._replace(
            second_moment=jax.tree.unflatten(structure, moments),
            factors=jax.tree.unflatten(structure, nodes),
        )


class _PlannedBy(NamedTuple):
    """What the plan follows from beside shapes and devices."""

    max_side: int
    linear: bool
    averaged: bool
    mapped: bool
    dtype: str


class _Options(NamedTuple):
    b1: Any
    b2: Any
    eps: Any
    every: int
    max_side: int
    linear: bool
    precision: str
    averaged: bool  # whether there is a mean
    weight: Any  # of the mean, where the gradient itself has the rest; None for all


def scale_by_soap(
    b1: float = 0.0,
    b2: float = 0.95,
    eps: float = 1e-8,
    *,
    nesterov: bool = False,
    every: int = 1,
    max_side: int = 1024,
    linear: bool = False,
    precision: str = "highest",
    batch_axes: int = 0,
    matrices: Matrices | None = None,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
    axis_name: _tree.AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam's scaling in Shampoo's eigenbasis: SOAP, without its momentum by default.

    For a matrix G of the gradient, with averages :math:`L` of :math:`G G^\top` and
    :math:`R` of :math:`G^\top G`, and bases :math:`Q_L, Q_R` that follow their
    eigenvectors,

    .. math::
        G' = Q_L^\top G\, Q_R, \quad
        V \leftarrow \beta_2 V + (1 - \beta_2)\, G' \odot G', \quad
        z = 0.2\; Q_L \frac{G'}{\sqrt{\hat V} + \epsilon} Q_R^\top ,

    and afterwards :math:`L \leftarrow \beta_2 L + (1 - \beta_2) G G^\top`, and
    :math:`Q_L` the orthogonal factor of :math:`L Q_L` (one step of orthogonal
    iteration), and so for the right side. The hat corrects the bias. That is SOAP (Vyas
    et al., arXiv:2409.11321, Algorithm 3), whose moving average of G is left out, for
    the direction of NLCG takes its place; ``b1`` has it. The factor of 0.2 makes it as
    long as the output of :func:`~nlcg_optax.scale_by_orthogonalization`.

    Given its averages it is linear and symmetric in the gradient, so that noise in it
    averages out over the steps; orthogonalization, which it replaces where noise rules,
    keeps all of it. Its metric is :math:`M = Q (\sqrt{V} + \epsilon) Q^\top / 0.2` with
    :math:`Q = Q_L \otimes Q_R`.

    The first gradient goes into L and R alone, and the first step is scaled by itself
    in the bases that these give (SOAP's authors make none). Other leaves (biases,
    embeddings) have V in their own basis, as by Adam; those of fewer than two axes are
    not multiplied by 0.2. What is a matrix is decided as for orthogonalization. To the
    root of V 64 roundings of its root mean square are added, for where the gradient has
    nothing (dead units) both are rounding.

    The bases are renewed by products, Cholesky factors and triangular solves, of stacks
    of matrices (``nlcg_optax/matrices/eigenbasis.py``). On several
    devices each matrix is worked on by one of them, to which its gradient is sent, and
    which alone has its factors: they are never sent. That is planned by `init`, which
    therefore has to know the mesh. Long matrices with a basis on one side only may be
    split along the other.

    Args:
      b1: decay of an average of the gradient that is scaled in place of the gradient,
        in [0, 1); SOAP's own is 0.95.
      b2: :math:`\beta_2`, decay of the other averages, in [0, 1).
      eps: :math:`\epsilon`, at least 0.
      nesterov: look ahead, as Nadam (and Muon) does: scale ``b1`` of the average and
        ``1 - b1`` of the gradient itself. `update` takes ``mean_weight``, a number or a
        scalar array in [0, 1], for another part than ``b1`` (quasi-hyperbolic momentum:
        Ma and Yarats, arXiv:1810.06801).
      every: steps between two renewals of the bases, at least 1, once there were so
        many steps. SOAP's own is 10.
      max_side: a side that is longer has no basis: its Q is the identity.
      linear: take V from the steps before, so that z is exactly linear in G; then V
        starts between the square of the first gradient in its basis and the mean of
        these, with no correction of its bias, and a ten-thousandth of its mean is added
        to it. In our trials it trains worse, and diverges at rates that serve
        otherwise (``benchmarks/matrices``).
      precision: of the products with G, of float32 matrices: ``"highest"``, or half
        precision with sums in float32, ``"bfloat16"`` or ``"float16"``. Averages are
        kept, and bases renewed, in float32.
      batch_axes: as for :func:`~nlcg_optax.scale_by_orthogonalization`.
      matrices: as there.
      mesh: as there; what is kept is spread over its devices.
      axis_name: as there.

    Returns:
      A transformation. Updates keep the gradient's dtype; arithmetic is in float32 or
      wider. A matrix whose products :math:`G G^\top` are not finite keeps its averages
      for this step, its update is that of a first step, and
      :func:`~nlcg_optax.diagnostics` counts it as ``soap_fallbacks``.

    Raises:
      ValueError: when built, for an argument out of range; in `init`, if it cannot tell
        the whole shape of a matrix, or the number of devices, or what `matrices` gives
        does not fit; in `update`, if the gradients do not match the parameters that
        `init` saw, or the mapped axes have another number of devices.

    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> tx = nlcg_optax.scale_by_soap()
    >>> grads = {"w": jnp.array([[3.0, 1.0, 0.0], [0.0, -0.1, 0.2]]), "b": jnp.ones(3)}
    >>> state = tx.init(grads)
    >>> for scale in (1.0, 2.0, 2.0):
    ...     g = {"w": scale * grads["w"], "b": grads["b"]}
    ...     updates, state = tx.update(g, state)

    The same gradient twice: its two singular values become equal, as by
    orthogonalization.

    >>> sizes = jnp.linalg.svd(updates["w"])[1]
    >>> print(*(f"{x:.2f}" for x in sizes), updates["b"].round(4))
    0.20 0.20 [1. 1. 1.]
    """
    for name, value in (("b1", b1), ("b2", b2)):
        _check.number(name, value, minimum=0)
        if not isinstance(value, jax.Array) and value >= 1:
            raise ValueError(f"{name}={value!r} is not valid: expected less than 1.")
    _check.number("eps", eps, minimum=0, finite=True)
    _check.axis_name(axis_name)
    _check.flag("nesterov", nesterov)
    _check.flag("linear", linear)
    counts = {"every": (every, 1), "max_side": (max_side, 0)}
    _check.static_counts(**counts, batch_axes=(batch_axes, 0))
    _check.one_of("precision", precision, ("highest", *newton_schulz.HALF))
    devices.check_arguments(mesh, matrices, batch_axes)
    options = _Options(
        b1=b1,
        b2=b2,
        eps=eps,
        every=operator.index(every),
        max_side=operator.index(max_side),
        linear=bool(linear),
        precision=precision,
        averaged=isinstance(b1, jax.Array) or b1 != 0,
        weight=b1 if nesterov else None,
    )

    def init_fn(params: optax.Params) -> SoapState:
        found = recognition.all_of(params, matrices, batch_axes)
        number = (
            devices.number_of(params, mesh, axis_name) if any(found.values()) else 1
        )

        def moment(path: Any, x: Any) -> Any:
            if (matrix := found[path]) is None:
                return jnp.zeros_like(x, dtype=_tree.scalar_dtype(x))
            by = _PlannedBy(
                options.max_side,
                options.linear,
                options.averaged,
                axis_name is not None,
                _tree.compute_dtype(jnp.result_type(x)).name,
            )
            said = devices.mask_of(path, x, matrix, mesh, axis_name, number, by)
            if said.shape is None:
                raise ValueError(
                    f"`init` was given a part of the parameter "
                    f"'{jax.tree_util.keystr(path)}' (its shape on this device is "
                    f"{jnp.shape(x)}), or may have been, but what is kept for a matrix "
                    "is kept for the whole of it. Call `init` outside of the "
                    "`shard_map`."
                )
            return said

        moments = jax.tree_util.tree_map_with_path(moment, params)
        entries, structure = jax.tree_util.tree_flatten_with_path(params)
        masks = jax.tree.leaves(moments, is_leaf=is_mask)
        held = _matrices(entries, masks)
        nodes: list[Any] = [None] * len(entries)
        for first, node in devices.create(
            _work(options),
            [entry for _, entry in held],
            mesh,
            axis_name,
            functools.partial(_shapes, options),
        ):
            nodes[held[first][0]] = node
        mean = None
        if options.averaged:
            mean = jax.tree_util.tree_map_with_path(
                lambda path, x: (
                    jnp.zeros_like(x, dtype=_tree.compute_dtype(jnp.result_type(x)))
                    if found[path] is None
                    else None
                ),
                params,
            )
        return SoapState(
            count=jnp.zeros([], jnp.int32),
            mean=mean,
            second_moment=moments,
            factors=jax.tree.unflatten(structure, nodes),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        mean_weight: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        now = options
        if mean_weight is not None:
            now = options._replace(weight=mean_weight)
        check_moments(updates, state.second_moment, axis_name is not None)
        entries, structure = jax.tree_util.tree_flatten_with_path(updates)
        moments = jax.tree.leaves(state.second_moment, is_leaf=is_mask)
        means = [None] * len(entries)
        if state.mean is not None:
            means = structure.flatten_up_to(state.mean)
        results = [g for _, g in entries]
        held = _matrices(entries, moments)
        for i, v in enumerate(moments):
            if not isinstance(v, Mask):
                # An embedding is scaled as the matrices beside it.
                scale = _RMS if results[i].ndim - batch_axes > 1 else 1.0
                means[i], moments[i], z = _elementwise(
                    results[i], means[i], v, state.count, now
                )
                results[i] = _scaled(z, scale).astype(results[i].dtype)
        nodes = structure.flatten_up_to(state.factors)
        at = [i for i, node in enumerate(nodes) if node is not None]
        done, after = devices.apply(
            _work(now, state.count),
            [entry for _, entry in held],
            mesh,
            axis_name,
            [nodes[i] for i in at],
        )
        for i, node in zip(at, after or [], strict=True):
            nodes[i] = node
        for (i, (_, g, _)), z in zip(held, done, strict=True):
            results[i] = _scaled(z, _RMS).astype(g.dtype)
        mean = None if state.mean is None else jax.tree.unflatten(structure, means)
        return jax.tree.unflatten(structure, results), SoapState(
            count=_transformations.increment(state.count),
            mean=mean,
            second_moment=jax.tree.unflatten(structure, moments),
            factors=jax.tree.unflatten(structure, nodes),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _scaled(x: jax.Array, scale: float) -> jax.Array:
    return x if scale == 1 else x * jnp.asarray(scale, x.dtype)


def _matrices(entries: Any, masks: list[Any]) -> list[tuple[int, tuple]]:
    """Numbers, paths, leaves and masks of the matrices that have elements."""
    return [
        (i, (path, x, said))
        for i, ((path, x), said) in enumerate(zip(entries, masks, strict=True))
        if isinstance(said, Mask) and math.prod(jnp.shape(x))
    ]


def _shapes(options: _Options, small: int, long: int, dtype: jnp.dtype) -> Factors:
    """What is kept for one matrix."""
    real, kind = _tree.real_dtype(dtype), cast(Any, jax.ShapeDtypeStruct)
    left, right = (
        kind((side, side), dtype) if side <= options.max_side else None
        for side in (small, long)
    )
    return Factors(
        left=left,
        right=right,
        left_basis=left,
        right_basis=right,
        second_moment=kind((small, long), real),
        mean=kind((small, long), dtype) if options.averaged else None,
        seen=kind((), jnp.int32),
        fallbacks=kind((), jnp.int32),
    )


def _average(decay: Any, old: jax.Array, new: jax.Array) -> jax.Array:
    decay = _tree.real_scalar(decay, new.real.dtype).astype(new.dtype)
    return decay * old + (1 - decay) * new


def _correction(decay: Any, number: jax.typing.ArrayLike, dtype: Any) -> jax.Array:
    """What an average of so many lacks; that of one where there is none."""
    number = jnp.maximum(number, 1).astype(dtype)
    return 1 - _tree.real_scalar(decay, dtype) ** number


def _elementwise(
    g: jax.Array,
    mean: Any,
    v: jax.Array,
    count: jax.typing.ArrayLike,
    options: _Options,
) -> tuple[Any, jax.Array, jax.Array]:
    """Averages of a leaf that is no matrix, and what it becomes, before its scale."""
    x, first = _tree.lift(g), jnp.asarray(count) == 0
    b1, b2 = options.b1, options.b2
    square = _tree.abs_sq(x).astype(v.dtype)
    # Elements whose squares are beyond the range go by their own size, once.
    finite, before, mean_before = jnp.isfinite(square), v, mean
    square = jnp.where(finite, square, 0)
    scaled = x
    if mean is not None:
        mean = jnp.where(first, mean, _average(b1, mean, x))
        scaled = mean / _correction(b1, count, v.dtype).astype(x.dtype)
        if options.weight is not None:
            scaled = _average(options.weight, scaled, x)
        scaled = jnp.where(first, x, scaled)
        mean = jnp.where(finite, mean, mean_before)
    if options.linear:
        used = jnp.where(first, (square + jnp.mean(square)) / 2, v)
        v = jnp.where(first, used, _average(b2, v, square))
        level = jnp.mean(used)
        used = jnp.where(level > 0, used + _FLOOR * level, v)
    else:
        v = jnp.where(first, v, _average(b2, v, square))
        used = jnp.where(first, square, v / _correction(b2, count, v.dtype))
    z = over(scaled, _tree.square_root(used), options.eps)
    return (
        mean,
        jnp.where(finite, v, before),
        jnp.where(finite, z, over(x, jnp.abs(x), 0)),
    )


def _work(
    options: "_Options | _PlannedBy", count: jax.typing.ArrayLike = 0
) -> plan.Work:
    """The preconditioning of matrices as work for several devices, at this step."""
    # Arrays are no part of the function: on a mesh with explicit axes it may not close
    # over them.
    arrays = {k: x for k, x in options._asdict().items() if isinstance(x, jax.Array)}

    def function(
        xs: list[jax.Array], share: plan.Share, kept: Factors, given: Any
    ) -> Any:
        x, (count, arrays) = share.slots.add(jnp.add, xs), given
        step = functools.partial(
            _precondition,
            options=cast(Any, options)._replace(**arrays),
            count=count,
            total=share.total,
            size=math.prod(x.shape[-2:-1]) * share.groups[0].stack.long,
        )
        if math.prod(x.shape[:3]) == 1:  # one matrix, and no stack
            one = jax.tree.map(lambda a: a.reshape(a.shape[3:]), (x, kept))
            z, then = step(*one)
            z, kept = jax.tree.map(lambda a: a.reshape(1, 1, 1, *a.shape), (z, then))
        elif x.shape[0] > 1 and max(x.shape[-2:]) ** 2 > _LOOP:
            z, kept = jax.lax.map(lambda row: step(*row), (x, kept))
        else:
            z, kept = step(x, kept)
        return [share.slots.pick(z, i) for i in range(len(xs))], kept

    def operations(small: int, long: int, stacked: bool) -> tuple[float, float]:
        del stacked  # those of a step that renews
        inside, outside = 0.0, 0.0
        rotations = 4.0 if not options.averaged else 6.0
        if small <= options.max_side:
            inside += eigenbasis.OPERATIONS * small**3
            outside += (2 + rotations) * small**2 * long
        if long <= options.max_side:
            outside += eigenbasis.OPERATIONS * long**3
            outside += (2 + rotations) * small * long**2
        return inside, outside

    def splits(stack: plan.Stack) -> bool:
        return stack.splittable and stack.long > options.max_side

    def ragged(stack: plan.Stack) -> bool:
        # Where `linear` it takes a mean over all elements.
        return stack.long > options.max_side and not options.linear

    given = count, arrays
    return plan.Work(function, operations, splits=splits, ragged=ragged, given=given)


def _precondition(
    x: jax.Array,
    kept: Factors,
    *,
    options: _Options,
    count: jax.typing.ArrayLike,
    total: Any,
    size: int,
) -> tuple[jax.Array, Factors]:
    """What matrices become, before their scale, and what is kept then.

    Args:
      x: gradients, [..., small side, long side].
      kept: what is kept for them, [...].
      options: those of the transformation.
      count: steps before this one.
      total: the sum over devices that have parts of each matrix.
      size: elements of a matrix.
    """
    real = kept.second_moment.dtype
    b1, b2, eps = options.b1, options.b2, _tree.real_scalar(options.eps, real)
    multiply = functools.partial(newton_schulz.multiply, precision=options.precision)
    before = (kept.left_basis, kept.right_basis)

    def in_range(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The matrices over their largest element, and that, for half precision."""
        peak = jnp.ones_like(x[..., :1, :1])
        if options.precision in newton_schulz.HALF:
            peak = jnp.max(jnp.abs(x), (-2, -1), keepdims=True)
            peak = jnp.where((peak > 0) & jnp.isfinite(peak), peak, 1).astype(x.dtype)
        return x / peak, peak

    def gram(x: jax.Array) -> jax.Array:
        x, peak = in_range(x)
        product = newton_schulz.hermitian(x, x.conj().mT, options.precision)
        return product * (peak * peak)

    def rotate(x: jax.Array, bases: Any = before, back: bool = False) -> jax.Array:
        left, right = bases
        x, peak = in_range(x)
        if left is not None:
            x = multiply(left if back else left.conj().mT, x)
        if right is not None:
            x = multiply(x, right.conj().mT if back else right)
        return x * peak

    def across(flag: jax.Array) -> jax.Array:  # beside matrices
        return flag[..., None, None]

    def entries(x: jax.Array) -> jax.Array:  # the sum of a matrix's
        return total(jnp.sum(x, (-2, -1), keepdims=True))

    first = across(kept.seen == 0)
    square = _tree.abs_sq(x)
    usable = jnp.isfinite(entries(square))

    factors = []
    for old, make in (
        (kept.left, lambda: total(gram(x))),
        (kept.right, lambda: gram(x.conj().mT)),
    ):
        if old is None:
            factors.append(None)
            continue
        new = make()
        new = jnp.where(first, new, _average(b2, old, new))
        usable &= across(jnp.all(jnp.isfinite(new), (-2, -1)))
        factors.append(new)

    bases, failed = _renew(factors, kept, first, usable, count, options)

    def back(inside: jax.Array, used: jax.Array, bases: Any = before) -> jax.Array:
        """Over the root of the second moment, and rotated back."""
        roundings = _ROUNDINGS * float(jnp.finfo(real).eps)
        least = roundings * _tree.square_root(entries(used) / size)
        inside = over(inside, _tree.square_root(used), eps + least)
        return rotate(inside, bases, back=True)

    def at_first() -> tuple[jax.Array, jax.Array]:
        inside = rotate(x, bases)
        moment = _tree.abs_sq(inside)
        if not options.linear:
            return back(inside, moment, bases), jnp.zeros_like(moment)
        moment = (moment + entries(moment) / size) / 2
        return back(inside, moment, bases), moment

    def later() -> tuple[jax.Array, jax.Array]:
        inside = rotate(x)
        moment = _average(b2, kept.second_moment, _tree.abs_sq(inside))
        if mean is not None:
            correction = across(_correction(b1, kept.seen, real))
            average = rotate(mean) / correction.astype(x.dtype)
            if options.weight is None:
                inside = average
            else:
                inside = _average(options.weight, average, inside)
        used = moment / across(_correction(b2, kept.seen, real))
        if options.linear:
            used = kept.second_moment
            level = entries(used) / size
            # Of a matrix that had no gradient yet nothing is known but this one.
            used = jnp.where(level > 0, used + _FLOOR * level, moment)
        return back(inside, used), moment

    mean = kept.mean
    if mean is not None:
        mean = jnp.where(first, mean, _average(b1, mean, x))
    z, moment = jax.lax.cond(jnp.asarray(count) == 0, at_first, later)
    usable &= jnp.isfinite(entries(moment))
    # A matrix whose first gradient was of no use has no basis yet.
    usable_now = usable & ((jnp.asarray(count) == 0) | ~first)
    z = jnp.where(usable_now, z, over(x, jnp.abs(x), 0))
    then = Factors(
        left=factors[0],
        right=factors[1],
        left_basis=bases[0],
        right_basis=bases[1],
        second_moment=moment,
        mean=mean,
        seen=kept.seen + 1,
        fallbacks=kept.fallbacks,
    )
    then = jax.tree.map(
        lambda new, old: jnp.where(
            usable if new.ndim == usable.ndim else usable[..., 0, 0], new, old
        ),
        then,
        kept,
    )
    fallen = (~usable[..., 0, 0] | failed).astype(kept.fallbacks.dtype)
    return z, then._replace(fallbacks=kept.fallbacks + fallen)


def _renew(
    factors: list[Any],
    kept: Factors,
    first: jax.Array,
    usable: jax.Array,
    count: jax.typing.ArrayLike,
    options: _Options,
) -> tuple[list[Any], jax.Array]:
    """The bases after this step, and whether a renewal came to nothing."""
    sides = []
    for factor, basis in zip(factors, (kept.left_basis, kept.right_basis), strict=True):
        if factor is not None:
            assert basis is not None
            identity = jnp.eye(factor.shape[-1], dtype=factor.dtype)
            basis = jnp.where(first, identity, basis)
        sides.append(basis)
    none = jnp.zeros_like(usable[..., 0, 0])

    def renewed() -> tuple[list[Any], jax.Array]:
        bases, failed = [], none
        for factor, basis in zip(factors, sides, strict=True):
            if factor is not None:
                basis, good = eigenbasis.renew(factor, basis)
                failed |= usable[..., 0, 0] & ~good
            bases.append(basis)
        return bases, failed

    if options.every == 1:
        return renewed()
    count = jnp.asarray(count)
    # At first they are those of few gradients.
    due = (count % options.every == 0) | (count < options.every)
    return jax.lax.cond(due, renewed, lambda: (sides, none))

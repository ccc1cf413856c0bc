"""Curvature along a few directions, from forward-mode products."""

import contextlib
import dataclasses
import functools
import itertools
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from nlcg_optax import _check, _parallel, _tree, _xla


class Images(NamedTuple):
    """What becomes of some directions in the model.

    Attributes:
      outputs: the model's outputs, the same for all directions.
      tangents: how the outputs change along each direction, stacked.
      directions: the directions, in several stacks: only penalties need them.
    """

    outputs: Any
    tangents: Any
    directions: tuple[Any, ...]


class Linear(NamedTuple):
    """The model's derivative at some parameters, computed once.

    Attributes:
      push: as `Curvature.push`, without the parameters.
      pull: as `Curvature.pull`, without them.
    """

    push: Callable[[Any], Images]
    pull: Callable[[Images], Any]


class Penalty(NamedTuple):
    """A term of the loss, half the squared norm of some of the parameters.

    Attributes:
      factor: what it is multiplied by.
      mask: the leaves that it applies to, as in :func:`gauss_newton`.
    """

    factor: jax.typing.ArrayLike
    mask: "Constant"


class Constant:
    """What a compiled program holds fixed: it has no leaves, and compares by value.

    A function is equal to itself alone, a bound method to another of the same object.
    """

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Constant):
            return False
        if self.value is other.value:
            return True
        try:
            return bool(self.value == other.value)
        except Exception:  # arrays, or whatever else cannot be compared
            return False

    def __hash__(self) -> int:
        try:
            return hash(self.value)
        except TypeError:  # a tree of booleans, or a module with arrays
            return hash(type(self.value))


jax.tree_util.register_static(Constant)


@dataclasses.dataclass(frozen=True, eq=False)
class Curvature:
    r"""The curvature of a loss, seen along a few directions at a time.

    Made by :func:`gauss_newton` or :func:`hessian`, and passed to `update` as the
    keyword argument ``curvature``. Called with the parameters and a sequence of k trees
    like them it gives the matrix of their inner products :math:`d_i^\top C d_j`, real,
    symmetric, of shape [k, k].

    It is a pytree, whose leaves are the arrays that it was given (the batch, say) and
    whose functions are constants of a compiled program: it passes through `jax.jit`,
    and as long as the functions stay the same, nothing is compiled anew.

    Attributes:
      functions: of the loss, constants.
      batch: what they take beside the parameters, or None.
      microbatches: the same, with a leading axis of microbatches; None for one batch.
      penalties: terms of the parameters alone.
      whole_params: the whole parameters, where the optimizer is shown some of them.
      axis_name: the axes over which the batch is split in a `shard_map` or `pmap`.
      fraction: the part of the batch of the gradient that it is taken on; None where
        nobody said.
      made_outside: whether it was made outside of what JAX traces.
      reverse_mode: whether nothing is differentiated in forward mode.
    """

    functions: Constant
    batch: Any = None
    microbatches: Any = None
    penalties: tuple[Penalty, ...] = ()
    whole_params: Any = None
    axis_name: _tree.AxisName | None = None
    fraction: float | None = None
    made_outside: bool = False
    reverse_mode: bool = False

    #: Whether the loss is taken for one that is never below zero, as an error or a
    #: cross-entropy of outputs is: no step will then be believed to take much more off
    #: it than there is.
    nonnegative = False

    def __call__(self, params: Any, directions: Sequence[Any]) -> jax.Array:
        """The matrix of inner products of some directions."""
        if not jax.tree.leaves(params):  # an empty group of `optax.partition`
            return jnp.zeros([len(directions)] * 2)
        images = self.push(params, stack(params, directions))
        matrix = self.inner(params, images, images)
        return 0.5 * (matrix + matrix.T)

    def times(self, params: Any, direction: Any) -> Any:
        r"""The product :math:`C d` with one direction, a tree like it.

        It takes a backward pass, and on several devices an all-reduce of its size.
        """
        return self.pull(params, self.push(params, stack(params, [direction])))

    def push(self, params: Any, stacked: Any) -> Images:
        """The images of stacked directions."""
        if self.microbatches is None:
            return self._push(params, stacked, *self._inputs())
        outputs, tangents = jax.lax.map(
            lambda part: self._push(params, stacked, part)[:2], self.microbatches
        )
        return Images(outputs, _switch(tangents), (stacked,))

    def linearize(self, params: Any, transposed: bool = True) -> Linear:
        """`push` and `pull` at the parameters, for several calls.

        Args:
          params: the parameters.
          transposed: whether `pull` will be called.
        """
        del transposed
        return Linear(
            functools.partial(self.push, params), functools.partial(self.pull, params)
        )

    def value(self, params: Any, images: Images) -> jax.Array:
        """The loss itself, where the images of some directions are known."""
        if self.microbatches is None:
            total = self._value(params, images.outputs, *self._inputs())
        else:
            parts = (images.outputs, self.microbatches)
            total = jax.lax.map(lambda each: self._value(params, *each), parts)
            total = jnp.mean(total)
        total = total.astype(_tree.scalar_dtype(params))
        return self._mean(total + self._own_penalty(params))

    def loss(self, params: Any) -> jax.Array:
        """The loss itself, of parameters alone."""
        return self.value(params, self.push(params, stack(params, [params])))

    def penalty(self, params: Any) -> jax.Array:
        """The sum of the penalties."""
        total = self._own_penalty(params)
        return self._mean(total) if self.penalties else total

    def _own_penalty(self, params: Any) -> jax.Array:
        """The numbers of which `penalty` is the mean over the devices."""
        total = jnp.zeros([], _tree.scalar_dtype(params))
        for penalty in self.penalties:
            factor = _tree.real_scalar(penalty.factor, total.dtype)
            for w in jax.tree.leaves(self.penalized(penalty, params, params)):
                square = jnp.sum(_tree.abs_sq(_tree.lift(w))).astype(total.dtype)
                total += 0.5 * factor * square * _shards(w, self.axis_name)
        return total

    def add_decay(self, grads: Any, params: Any) -> Any:
        """A gradient, and that of the penalties (as `jax.grad` has it)."""

        def add(g: Any, w: Any, factor: Any) -> Any:
            if w is None:
                return g
            lifted = _tree.lift(g)
            w = jnp.conj(_tree.lift(w)).astype(lifted.dtype)
            factor = _tree.real_scalar(factor, _tree.real_dtype(lifted.dtype))
            return (lifted + factor * w).astype(g.dtype)

        for penalty in self.penalties:
            decayed = self.penalized(penalty, params, params)
            grads = jax.tree.map(
                lambda g, w, factor=penalty.factor: add(g, w, factor),
                grads,
                decayed,
                is_leaf=_is_masked,
            )
        return grads

    def inner(self, params: Any, a: Images, b: Images) -> jax.Array:
        """The inner products between two stacks of directions, from their images."""
        if self.microbatches is None:
            total = self._inner(params, a, b, *self._inputs())
        else:

            def one(inputs: Any) -> jax.Array:
                part, outputs, u, v = inputs
                images = (
                    Images(outputs, u, a.directions),
                    Images(outputs, v, b.directions),
                )
                return self._inner(params, *images, part)

            parts = (a.outputs, _switch(a.tangents), _switch(b.tangents))
            total = jnp.mean(jax.lax.map(one, (self.microbatches, *parts)), axis=0)
        for penalty in self.penalties:
            rows = [
                [
                    self._penalty_products(penalty, params, d, e, total.dtype)
                    for e in b.directions
                ]
                for d in a.directions
            ]
            total += jnp.asarray(penalty.factor, total.dtype) * jnp.block(rows)
        return self._mean(total)

    def _penalty_products(
        self, penalty: Penalty, params: Any, a: Any, b: Any, dtype: jnp.dtype
    ) -> jax.Array:
        """The inner products of two stacks of directions, where there is a penalty."""
        dots = [
            # A leaf that is split over devices is summed over them, not averaged.
            _inner(jnp.conj(d), e, dtype) * _shards(d, self.axis_name)
            for d, e in zip(
                jax.tree.leaves(self.penalized(penalty, a, params)),
                jax.tree.leaves(self.penalized(penalty, b, params)),
                strict=True,
            )
        ]
        sizes = [len(jax.tree.leaves(stacked)[0]) for stacked in (a, b)]
        return sum(dots, jnp.zeros(sizes, dtype))

    def pull(self, params: Any, image: Images) -> Any:
        r"""The tree :math:`C d`, from the image of one direction (still stacked)."""

        def whole(params: Any) -> jax.Array:
            if self.microbatches is None:
                return self._weighed(params, image, *self._inputs())

            # Each microbatch runs forward again, rather than keep all of them.
            @jax.checkpoint
            def add(total: jax.Array, inputs: Any) -> Any:
                part, outputs, u = inputs
                one = Images(outputs, u, image.directions)
                one = self._weighed(params, one, part)
                return total + vary(one, self.axis_name), None

            zero = vary(jnp.zeros([], _tree.scalar_dtype(params)), self.axis_name)
            parts = (self.microbatches, image.outputs, _switch(image.tangents))
            total, _ = jax.lax.scan(add, zero, parts)
            return total / len(jax.tree.leaves(self.microbatches)[0])

        if self.axis_name is None:
            product = jax.grad(whole)(params)
        else:
            mean = _parallel.pmean_value_and_grad(whole, self.axis_name)
            _, product = mean(params)
        return self._add_penalties(params, image, product)

    def _add_penalties(self, params: Any, image: Images, product: Any) -> Any:
        """The product, from its conjugate and without those of the penalties."""
        product = jax.tree.map(jnp.conj, product)
        for penalty in self.penalties:
            product = jax.tree.map(
                lambda p, d, factor=penalty.factor: (
                    p if d is None else p + _tree.real_scalar(factor, p.dtype) * d[0]
                ),
                product,
                self.penalized(penalty, image.directions[0], params),
                is_leaf=_is_masked,
            )
        return product

    def with_penalty(self, penalty: Penalty) -> "Curvature":
        """The curvature of the loss and one more penalty."""
        return dataclasses.replace(self, penalties=(*self.penalties, penalty))

    def penalized(self, penalty: Penalty, tree: Any, part: Any) -> Any:
        """A tree like the parameters, but None where there is no penalty."""
        mask = penalty.mask.value
        if _check.is_function(mask):
            mask = mask(self._whole(part))
        mask = jax.tree.map(
            lambda keep, leaves: jax.tree.map(lambda _: bool(keep), leaves),
            True if mask is None else mask,
            part if self.whole_params is None else self.whole_params,
        )
        return jax.tree.map(
            lambda d, keep: d if not _is_masked(d) and keep else None,
            tree,
            mask,
            is_leaf=_is_masked,
        )

    def _push(self, params: Any, stacked: Any, *inputs: Any) -> Images:
        """As `push`, of one microbatch."""
        raise NotImplementedError

    def _value(self, params: Any, outputs: Any, *inputs: Any) -> jax.Array:
        """The loss of one microbatch, on one device."""
        raise NotImplementedError

    def _inner(self, params: Any, a: Images, b: Images, *inputs: Any) -> jax.Array:
        """As `inner`, of one microbatch, on one device."""
        raise NotImplementedError

    def _weighed(self, params: Any, image: Images, *inputs: Any) -> jax.Array:
        """The number whose gradient is the product with the direction."""
        raise NotImplementedError

    def _inputs(self) -> tuple[Any, ...]:
        return () if self.batch is None else (self.batch,)

    def _whole(self, part: Any) -> Any:
        return fill(part, self.whole_params)

    def _mean(self, x: jax.Array) -> jax.Array:
        if self.axis_name is None:
            return x
        axes = _tree.bound_axes(self.axis_name)
        return jax.lax.pmean(vary(x, self.axis_name), axes)


class _Functions(NamedTuple):
    """What a Gauss–Newton matrix is made of.

    Attributes:
      outputs_fn: as in :func:`gauss_newton`.
      loss_fn: as there.
      has_aux: as there.
      in_turn: as there.
    """

    outputs_fn: Callable[..., Any]
    loss_fn: Callable[..., Any]
    has_aux: bool
    in_turn: bool


@dataclasses.dataclass(frozen=True, eq=False)
class _GaussNewton(Curvature):
    """See :func:`gauss_newton`."""

    nonnegative = True

    def _run(self, params: Any, *inputs: Any) -> Any:
        return self.functions.value.outputs_fn(self._whole(params), *inputs)

    def _push(self, params: Any, stacked: Any, *inputs: Any) -> Images:
        _, _, has_aux, in_turn = self.functions.value

        def run(params: Any) -> Any:
            return self._run(params, *inputs)

        def along(direction: Any) -> Any:
            outputs, tangent = jax.jvp(run, (params,), (direction,), has_aux=has_aux)[
                :2
            ]
            _check_outputs(outputs)
            return outputs, tangent

        if in_turn or self.reverse_mode:
            outputs, push_one = self._both_ways(run, params)[:2]
            images = self._push_each(outputs, push_one, stacked)
        else:
            with _forward_mode("outputs_fn"):
                # The outputs do not depend on the direction: they are computed once.
                outputs, tangents = jax.vmap(along, out_axes=(None, 0))(stacked)
            outputs, tangents = vary((outputs, tangents), self.axis_name)
            images = Images(outputs, tangents, (stacked,))
        self._recognize_identity(outputs, *inputs)
        return images

    def _both_ways(self, run: Any, params: Any) -> tuple[Any, Any, Any]:
        """The outputs, the product with J, and that with its transpose."""
        has_aux = self.functions.value.has_aux
        if self.reverse_mode:
            # The product with Jᵀ is linear, and its own transpose is that with J.
            outputs, pull = jax.vjp(run, params, has_aux=has_aux)[:2]
            _, push = jax.vjp(pull, outputs)
            return outputs, lambda direction: push((direction,))[0], pull
        with _forward_mode("outputs_fn"):
            outputs, push_one = jax.linearize(run, params, has_aux=has_aux)[:2]
            pull_one = jax.linear_transpose(push_one, params)
            return outputs, push_one, _xla.canonical(pull_one)

    def _push_each(self, outputs: Any, push_one: Any, stacked: Any) -> Images:
        """The images, by a function that pushes one direction."""
        _check_outputs(outputs)
        with _forward_mode("outputs_fn"):  # outside of `jit` it fails here alone
            if self.functions.value.in_turn:
                pushed = [
                    push_one(jax.tree.map(operator.itemgetter(i), stacked))
                    for i in range(len(jax.tree.leaves(stacked)[0]))
                ]
                tangents = jax.tree.map(lambda *each: jnp.stack(each), *pushed)
            else:
                tangents = _xla.canonical(jax.vmap(push_one))(stacked)
        # Every device differentiates its own loss by its own outputs, even where types
        # know that they are the same everywhere: else gradients would be summed here.
        outputs, tangents = vary((outputs, tangents), self.axis_name)
        return Images(outputs, tangents, (stacked,))

    def linearize(self, params: Any, transposed: bool = True) -> Linear:
        """As that of `Curvature`: the model runs forward once for all calls."""
        # Microbatches run again in each call, to save memory. Along named axes it takes
        # the gradient of a mean to know what is to be summed.
        if not transposed or self.microbatches is not None or self.axis_name:
            return super().linearize(params)
        inputs = self._inputs()
        outputs, push_one, pull_one = self._both_ways(
            lambda params: self._run(params, *inputs), params
        )
        self._recognize_identity(outputs, *inputs)

        def pull(image: Images) -> Any:
            weights = self._curved(params, image, *inputs)
            weights = jax.tree.map(operator.itemgetter(0), weights)
            return self._add_penalties(params, image, pull_one(weights)[0])

        return Linear(functools.partial(self._push_each, outputs, push_one), pull)

    def _value(self, params: Any, outputs: Any, *inputs: Any) -> jax.Array:
        value = self.functions.value.loss_fn(outputs, *inputs)
        value = check_loss(value, "loss_fn")
        return vary(value, self.axis_name)

    def _curved(self, params: Any, images: Images, *inputs: Any) -> Any:
        """H J d, its conjugate for complex outputs (as `jax.grad` has it)."""

        def loss(outputs: Any) -> jax.Array:
            return self._value(params, outputs, *inputs)

        def along(tangent: Any) -> Any:
            if self.reverse_mode:  # H is symmetric
                return jax.vjp(jax.grad(loss), images.outputs)[1](tangent)[0]
            return jax.jvp(jax.grad(loss), (images.outputs,), (tangent,))[1]

        with _forward_mode("loss_fn"):
            return jax.vmap(along)(images.tangents)

    def _recognize_identity(self, outputs: Any, *inputs: Any) -> None:
        """Warns if the only output is the loss itself, which has no curvature."""
        leaves = jax.tree.leaves(outputs)
        if len(leaves) > 1 or jnp.ndim(leaves[0]):
            return
        made = jax.make_jaxpr(lambda y: self.functions.value.loss_fn(y, *inputs))
        jaxpr = made(outputs).jaxpr
        if jaxpr.outvars == jaxpr.invars:
            warnings.warn(
                "outputs_fn returns one number, and loss_fn returns that number: the "
                "loss itself. It is linear in this output, so there is no curvature. "
                f"Return what the loss is computed from, {_GAUSS_NEWTON}, or take "
                f"{_HESSIAN}.",
                stacklevel=3,
            )

    def _inner(self, params: Any, a: Images, b: Images, *inputs: Any) -> jax.Array:
        dtype = _tree.scalar_dtype(params)
        pairs = zip(
            jax.tree.leaves(a.tangents),
            jax.tree.leaves(self._curved(params, b, *inputs)),
            strict=True,
        )
        dots = [_inner(u, h, dtype) for u, h in pairs]
        return sum(dots[1:], start=dots[0])

    def _weighed(self, params: Any, image: Images, *inputs: Any) -> jax.Array:
        """The sum of the outputs, each times its H J d: its gradient is Jᵀ H J d."""
        outputs = self._run(params, *inputs)
        outputs = outputs[0] if self.functions.value.has_aux else outputs
        weights = self._curved(params, image, *inputs)
        products = jax.tree.map(
            lambda y, h: jnp.sum(jnp.real(h[0] * y)), outputs, weights
        )
        dtype = _tree.scalar_dtype(params)
        return sum(
            (x.astype(dtype) for x in jax.tree.leaves(products)), jnp.zeros([], dtype)
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Hessian(Curvature):
    """See :func:`hessian`."""

    def _of(self, inputs: Any) -> Callable[[Any], jax.Array]:
        def value(params: Any) -> jax.Array:
            found = self.functions.value(self._whole(params), *inputs)
            return check_loss(found, "value_fn", _HESSIAN)

        return value

    def _push(self, params: Any, stacked: Any, *inputs: Any) -> Images:
        del params, inputs
        return Images((), (), (stacked,))

    def _value(self, params: Any, outputs: Any, *inputs: Any) -> jax.Array:
        del outputs
        return vary(self._of(inputs)(params), self.axis_name)

    def _inner(self, params: Any, a: Images, b: Images, *inputs: Any) -> jax.Array:
        value = self._of(inputs)

        dtype = _tree.scalar_dtype(params)

        def second(d: Any, e: Any) -> jax.Array:
            def slope(params: Any) -> jax.Array:
                return jax.jvp(value, (params,), (d,))[1]

            return jax.jvp(slope, (params,), (e,))[1]

        if self.reverse_mode:
            _, times = jax.vjp(jax.grad(value), params)  # H is symmetric
            products = jax.vmap(lambda e: times(e)[0])(_joined(b.directions))
            pairs = zip(
                jax.tree.leaves(_joined(a.directions)),
                jax.tree.leaves(products),
                strict=True,
            )
            return sum((_inner(d, h, dtype) for d, h in pairs), jnp.zeros([], dtype))
        rows = jax.vmap(second, (None, 0))
        with _forward_mode("value_fn"):
            matrix = jax.vmap(rows, (0, None))(
                _joined(a.directions), _joined(b.directions)
            )
        return matrix.astype(dtype)

    def _weighed(self, params: Any, image: Images, *inputs: Any) -> jax.Array:
        """The derivative along the direction: its gradient is H d."""
        direction = jax.tree.map(lambda x: x[0], image.directions[0])
        value = self._of(inputs)
        if self.reverse_mode:
            # jax.grad's is the conjugate, as `slope` has it.
            dtype = _tree.scalar_dtype(params)
            return _tree.slope(jax.grad(value)(params), direction, dtype)
        return jax.jvp(value, (params,), (direction,))[1]


# The batches, the penalties and the whole parameters are leaves; the rest is fixed.
_LEAVES = ["batch", "microbatches", "penalties", "whole_params"]
_FIXED = ["functions", "axis_name", "fraction", "made_outside", "reverse_mode"]
for _kind in (_GaussNewton, _Hessian):
    jax.tree_util.register_dataclass(_kind, data_fields=_LEAVES, meta_fields=_FIXED)


def gauss_newton(
    outputs_fn: Callable[..., Any],
    loss_fn: Callable[..., jax.typing.ArrayLike],
    batch: Any | None = None,
    *,
    microbatches: Any | None = None,
    l2: float = 0.0,
    l2_mask: Any | None = None,
    has_aux: bool = False,
    params: Any | None = None,
    axis_name: _tree.AxisName | None = None,
    in_turn: bool = False,
    fraction: float | None = None,
    reverse_mode: bool = False,
) -> Curvature:
    r"""The generalized Gauss–Newton matrix of a loss of a model's outputs.

    With the outputs :math:`y(x)`, their Jacobian :math:`J`, and the second derivative
    :math:`H_L` of the loss with respect to them,

    .. math::
        d_i^\top G\, d_j = (J d_i)^\top H_L (J d_j) + \lambda\, d_i^\top d_j

    (Schraudolph, 2002, doi:10.1162/08997660260028683, section 3; Martens, 2010). No
    matrix is formed. The model is run forward once, and all directions are pushed
    through it side by side (`jax.jvp`): that costs about as much as one forward pass
    for each direction, and no backward pass. :math:`G` is positive semidefinite
    wherever the loss is convex in the outputs, as squared error, cross-entropy with
    logits, and the likelihoods of exponential families are.

    The batch is the caller's choice: the whole one or part of it. A quarter is usually
    enough, for these are a few numbers rather than a gradient. The functions may close
    over it, inside of what `jax.jit` compiles; given as ``batch`` it is a leaf of the
    result, which then passes through `jit` by itself.
    :func:`~nlcg_optax.value_grad_and_curvature` makes loss, gradient and curvature from
    the same two functions.

    Args:
      outputs_fn: maps the parameters to the model's outputs: an array or a tree of
        them, of real or complex floating-point numbers.
      loss_fn: maps the outputs to the mean loss over the batch, a real scalar; twice
        differentiable. Terms of the parameters themselves, such as a penalty, enter if
        `outputs_fn` returns the parameters among its outputs.
      batch: a tree of arrays that both functions are given as their second argument;
        None for functions of one argument.
      microbatches: a tree of arrays with a leading axis of microbatches. Both functions
        then take one microbatch (without that axis) as their second argument, one after
        the other, and the products are their mean. None for all at once.
      l2: λ of a penalty :math:`\tfrac{\lambda}{2} \lVert x \rVert^2` in the loss.
      l2_mask: tree of booleans (or a function from the parameters to it): the leaves
        that the penalty applies to. None for all.
      has_aux: whether `outputs_fn` returns a pair of outputs and something else, such
        as running statistics, that is ignored.
      params: the whole parameters, where the optimizer is shown part of them only
        (``optax.masked``, ``optax.partition``). The rest counts as fixed.
      axis_name: the mapped axis (or axes) of a `shard_map` or `pmap` over which the
        batch is split: the products are then the mean over its devices, taken in one
        all-reduce of k² numbers. Sharded parameters are for `outputs_fn` to gather
        (see :func:`pmean_value_and_grad`). Under `jit` name no axis.
      in_turn: whether the directions are pushed through the model one after the other,
        instead of side by side. Set it where a batch is split over devices under `jit`
        and the model has convolutions: side by side these take the directions as more
        examples, for which XLA would gather the batch onto every device.
      fraction: the part of the gradient's batch that this one is, if you know it: with
        1 the two losses have to be equal, and `diagnostics` counts where they are not.
      reverse_mode: whether nothing is differentiated in forward mode, for functions
        that have no derivative there: those of `jax.custom_vjp`, as fused attention
        and most kernels are. A product :math:`J d` is then the transpose of
        :math:`w \mapsto J^\top w`, for which that function is differentiated itself:
        what `custom_vjp` runs backward needs a derivative. For each direction it takes
        about two forward passes, where forward mode takes one; and it keeps what a
        backward pass keeps.

    Returns:
      A :class:`Curvature`; its matrix is float32, or wider if the parameters are.

    Raises:
      ValueError: for a batch beside microbatches, or a fraction that is none; when
        called, if the loss is no scalar or a direction does not match the parameters.
      TypeError: when called, for outputs that are no floating-point numbers, or without
        ``reverse_mode`` for functions that have no derivative in forward mode.
      NameError: when called where nothing maps the axis.

    Poisson regression, whose second derivative is diagonal:

    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
    >>> counts = jnp.array([1.0, 0.0, 4.0])
    >>> curvature = nlcg_optax.gauss_newton(
    ...     lambda w: x @ w,
    ...     lambda log_rate: jnp.mean(jnp.exp(log_rate) - counts * log_rate),
    ... )
    >>> w = jnp.log(jnp.array([2.0, 3.0]))  # rates of 2, 6 and 18
    >>> d, e = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
    >>> print(3 * curvature(w, [d, e]))
    [[26. 42.]
     [42. 78.]]
    """
    _check.number("l2", l2, minimum=0, finite=True)
    _check.mask("l2_mask", l2_mask)
    # Where there is no penalty no inner product of parameters is taken.
    none = isinstance(l2, int | float) and l2 == 0
    return _GaussNewton(
        Constant(_Functions(outputs_fn, loss_fn, has_aux, in_turn)),
        penalties=() if none else (Penalty(l2, Constant(l2_mask)),),
        **_common(batch, microbatches, params, axis_name, fraction, reverse_mode),
    )


def hessian(
    value_fn: Callable[..., jax.typing.ArrayLike],
    batch: Any | None = None,
    *,
    microbatches: Any | None = None,
    params: Any | None = None,
    axis_name: _tree.AxisName | None = None,
    fraction: float | None = None,
    reverse_mode: bool = False,
) -> Curvature:
    r"""The second derivative of a function along a few directions.

    .. math::
        d_i^\top H d_j = \frac{\partial^2}{\partial s\, \partial t}
            f(x + s\, d_i + t\, d_j) \Big|_{s = t = 0}

    by forward mode over forward mode: there is no backward pass, and on several devices
    no gradient to sum. It costs about :math:`(k + 1)^2` forward passes. Unlike
    :func:`gauss_newton` it may be indefinite, which
    :func:`scale_by_quadratic_model` makes up for.

    Args:
      value_fn: maps the parameters to a real scalar, the mean over the batch.
      batch: a tree of arrays, the second argument of `value_fn`; None for none.
      microbatches: a tree of arrays with a leading axis of microbatches, each of which
        (without that axis) is the second argument of `value_fn` in turn; the products
        are their mean. None for all at once.
      params: the whole parameters, where the optimizer is shown part of them only
        (``optax.masked``, ``optax.partition``). The rest counts as fixed.
      axis_name: as for :func:`gauss_newton`.
      fraction: as for :func:`gauss_newton`.
      reverse_mode: as there: reverse over reverse mode, at k forward and backward
        passes through the gradient.

    Returns:
      A :class:`Curvature`; its matrix is float32, or wider if the parameters are.

    Raises:
      ValueError: when called, if the value is no real scalar or a direction does not
        match the parameters.
      NameError: when called where nothing maps the axis.

    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> curvature = nlcg_optax.hessian(lambda x: x[0] ** 3 + x[0] * x[1] ** 2)
    >>> d, e = jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0])
    >>> print(curvature(jnp.array([1.0, 2.0]), [d, e]))  # of [[6, 4], [4, 2]]
    [[ 6. 10.]
     [10. 16.]]
    """
    return _Hessian(
        Constant(value_fn),
        **_common(batch, microbatches, params, axis_name, fraction, reverse_mode),
    )


_GAUSS_NEWTON = (
    "`nlcg_optax.gauss_newton(lambda params: model(params, x), lambda outputs: "
    "loss(outputs, y).mean())`"
)
_HESSIAN = "`nlcg_optax.hessian(lambda params: loss(model(params, x), y).mean())`"


@contextlib.contextmanager
def _forward_mode(name: str) -> Iterator[None]:
    """Says what to do about functions that have no derivative in forward mode."""
    try:
        yield
    except (TypeError, NotImplementedError) as error:
        # The second is JAX's where forward mode is differentiated once more.
        if "custom_vjp" not in str(error) and "custom_lin" not in str(error):
            raise
        raise TypeError(
            f"{name} has a function of `jax.custom_vjp` in it, which has no derivative "
            "in forward mode. Make the curvature with `reverse_mode=True`, as in "
            "`nlcg_optax.gauss_newton(outputs_fn, loss_fn, reverse_mode=True)`: it "
            "takes about twice as long. Or define the function by `jax.custom_jvp`."
        ) from error


def check_fraction(fraction: float) -> None:
    """Raises unless it is a part of a batch."""
    _check.number("fraction", fraction, minimum=0, exclusive=True)
    if fraction > 1:
        raise ValueError(
            f"fraction={fraction} is not valid: expected the part of the batch that "
            "the curvature is taken on, at most 1."
        )


def _common(
    batch: Any,
    microbatches: Any,
    params: Any,
    axis_name: Any,
    fraction: Any,
    reverse_mode: bool,
) -> dict[str, Any]:
    """The fields that both kinds have."""
    _check.axis_name(axis_name, none="if all devices have the same curvature")
    if batch is not None and microbatches is not None:
        raise ValueError(
            "batch and microbatches exclude each other: give one batch, or a tree of "
            "arrays with a leading axis of microbatches."
        )
    if fraction is not None:
        check_fraction(fraction)
    return {
        "batch": batch,
        "microbatches": microbatches,
        "whole_params": params,
        "axis_name": axis_name,
        "fraction": fraction,
        "made_outside": not isinstance(jnp.zeros([]), Tracer),
        "reverse_mode": reverse_mode,
    }


def _switch(tangents: Any) -> Any:
    """Exchanges the axes of the directions and of the microbatches."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tangents)


def stack(params: Any, directions: Sequence[Any]) -> Any:
    """Stacks directions, in the dtypes of the parameters.

    Raises:
      ValueError: if one does not match the parameters.
    """
    tangents = [_tangent(i, params, d) for i, d in enumerate(directions)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *tangents)


def join(a: Images, b: Images) -> Images:
    """The images of two stacks of directions as those of one."""
    tangents = _joined([a.tangents, b.tangents])
    return Images(a.outputs, tangents, (*a.directions, *b.directions))


def _joined(stacks: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *each: jnp.concatenate(each), *stacks)


def combine(images: Images, coefficients: jax.Array) -> Images:
    """The image of a linear combination of directions."""

    def total(coefficients: jax.Array, x: jax.Array) -> jax.Array:
        return _tree.combine(coefficients, _tree.lift(x))[None].astype(x.dtype)

    def combined(tree: Any, coefficients: jax.Array) -> Any:
        return jax.tree.map(lambda x: total(coefficients, x), tree)

    sizes = [len(jax.tree.leaves(stacked)[0]) for stacked in images.directions]
    ends = list(itertools.accumulate(sizes))[:-1]
    parts = [
        combined(stacked, some)
        for stacked, some in zip(
            images.directions, jnp.split(coefficients, ends), strict=True
        )
    ]
    direction = jax.tree.map(lambda *each: sum(each[1:], each[0]), *parts)
    return Images(images.outputs, combined(images.tangents, coefficients), (direction,))


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def vary(tree: Any, axis_name: _tree.AxisName | None) -> Any:
    """The tree with types that may vary along all of the axes."""
    if axis_name is None:
        return tree
    axes = _tree.bound_axes(axis_name)
    tracked = _tree.tracked_axes(axes)

    def vary(x: jax.Array) -> jax.Array:
        constant = tracked - _tree.varying_axes(x)
        return _tree.vary(x, [axis for axis in axes if axis in constant])

    return jax.tree.map(vary, tree)


def fill(part: Any, whole: Any | None) -> Any:
    """Parameters with places that `optax.masked` emptied, filled again.

    Raises:
      ValueError: if there are such places, and nothing to fill them with.
    """
    if whole is None:
        if not any(map(_is_masked, jax.tree.leaves(part, is_leaf=_is_masked))):
            return part
        raise ValueError(
            "The optimizer is shown part of the parameters only (optax.masked or "
            "optax.partition), but the model needs all: pass them as "
            "`gauss_newton(..., params=params)` or `hessian(..., params=params)`."
        )
    return jax.tree.map(
        lambda x, other: other if _is_masked(x) else x, part, whole, is_leaf=_is_masked
    )


def _tangent(index: int, params: Any, direction: Any) -> Any:
    """A direction in the dtypes of the parameters, or an error that says which."""
    if jax.tree.structure(direction) != jax.tree.structure(params):
        raise ValueError(
            f"Direction {index} does not match the parameters: its tree is "
            f"{jax.tree.structure(direction)}, expected {jax.tree.structure(params)}."
        )

    def cast(path: Any, x: Any, d: Any) -> jax.Array:
        if jnp.shape(x) != jnp.shape(d):
            raise ValueError(
                f"Direction {index} does not match the parameters: leaf "
                f"'{jax.tree_util.keystr(path)}' has shape {jnp.shape(d)}, expected "
                f"{jnp.shape(x)}."
            )
        return jnp.asarray(d).astype(jnp.result_type(x))

    return jax.tree_util.tree_map_with_path(cast, params, direction)


def _check_outputs(outputs: Any) -> None:
    """Raises unless there are outputs, and all are floating-point numbers."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(outputs)
    if not leaves:
        raise ValueError(f"outputs_fn returned nothing. Call {_GAUSS_NEWTON}.")
    for path, leaf in leaves:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise TypeError(
                f"outputs_fn returned '{jax.tree_util.keystr(path)}' of dtype "
                f"{jnp.result_type(leaf)}: expected what the loss is computed from "
                "(logits, not classes) as floating-point numbers. Whatever else it "
                "returns goes into a second place, with has_aux=True. Call "
                f"{_GAUSS_NEWTON}."
            )


def check_loss(
    value: jax.typing.ArrayLike, name: str, call: str = _GAUSS_NEWTON
) -> jax.Array:
    """The loss as an array, or an error that says what it should be."""
    value = jnp.asarray(value)
    real = jnp.issubdtype(value.dtype, jnp.floating)
    if value.ndim or not real:
        raise ValueError(
            f"{name} returned shape {value.shape} and dtype {value.dtype}: expected "
            f"the mean loss over the batch, a real scalar. Call {call}."
        )
    return value


def _inner(a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The real inner products Σ Re(a_i b_j) of two stacks of arrays."""
    a, b = _tree.lift(a), _tree.lift(b)
    axes = tuple(range(1, a.ndim))
    if a.ndim <= 3 and not _tree.split_explicitly(a, b):
        # XLA's CPU compiler has a library for it; a loop it would compile for each
        # shape. (Convolutions' kernels it would first lay out anew.) Of full precision,
        # for which no accelerator rounds the factors first.
        products = jax.lax.dot_general(
            a, b, ((axes, axes), ((), ())), precision=jax.lax.Precision.HIGHEST
        )
        return jnp.real(products).astype(dtype)
    # Explicit axes do not say how to multiply along them.
    a, b = a[:, None], b[None, :]
    if jnp.iscomplexobj(a):
        products = jnp.real(a) * jnp.real(b) - jnp.imag(a) * jnp.imag(b)
    else:
        products = a * b
    return jnp.sum(products, axis=tuple(range(2, products.ndim))).astype(dtype)


def _shards(leaf: jax.Array, axis_name: _tree.AxisName | None) -> int:
    """Over how many devices a parameter is split, as its type has it."""
    if axis_name is None:
        return 1
    axes = _tree.bound_axes(axis_name)
    split = _tree.tracked_axes(axes) & _tree.varying_axes(leaf)
    return math.prod(jax.lax.axis_size(axis) for axis in split)

"""Minimization of smooth functions without noise."""

import dataclasses
import difflib
import functools
import inspect
import numbers
import operator
import types
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nlcg_optax import _check, _tree
from nlcg_optax.directions import beta as beta_rules
from nlcg_optax.minimization.box import make as make_box
from nlcg_optax.minimization.implicit import solution
from nlcg_optax.minimization.loop import Options, heard
from nlcg_optax.minimization.result import IterationInfo, MinimizeResult

# What stands in the place of an argument of scipy.optimize.minimize.
_INSTEAD = {
    "args": "pass them one by one behind params: minimize(fun, params, a, b)",
    "constraints": "express params by variables that are free, or add a penalty",
    "disp": "progress=True prints a line after each iteration",
    "fprime": "leave it out: JAX differentiates fun, written in jax.numpy",
    "hess": "leave it out: curvature is learned from the gradients",
    "hessp": "leave it out: curvature is learned from the gradients",
    "jac": "leave it out: JAX differentiates fun, written in jax.numpy",
    "maxiter": "it is called max_iter",
    "method": "preconditioner, beta_rule and line_search choose it; the default is "
    "limited-memory BFGS, and preconditioner=None nonlinear conjugate gradient",
    "options": "its entries are arguments themselves: max_iter, gtol, ftol, "
    "memory_size, progress",
    "tol": "there are two: gtol, of the gradient, and ftol, of the value's decrease",
    "x0": "it is the second argument, params",
}


def minimize(
    fun: Callable[..., Any],
    params: optax.Params,
    *args: Any,
    max_iter: int = 3_000,
    gtol: jax.typing.ArrayLike | None = None,
    ftol: float = 0.0,
    bounds: Any | None = None,
    has_aux: bool = False,
    beta_rule: str | beta_rules.BetaFunction | None = "auto",
    preconditioner: str | optax.GradientTransformation | None = "lbfgs",
    line_search: str | optax.GradientTransformation = "hager_zhang",
    memory_size: int = 10,
    restart_every: int | None = None,
    callback: Callable[[Any], Any] | None = None,
    progress: bool = False,
    **unknown: Any,
) -> MinimizeResult:
    r"""Minimizes a smooth function by preconditioned nonlinear conjugate gradient.

    .. math::
        d_t = -M_t^{-1} g_t + \beta_t d_{t-1}, \qquad x_{t+1} = x_t + \alpha_t d_t,

    with α from a line search. It stops where

    .. math::
        \lVert g \rVert_\infty \le \mathrm{gtol} \cdot
            \max(1, \lVert g_0 \rVert_\infty)
        \quad\text{and}\quad
        -\tfrac{1}{2} \alpha\, g^\top d \le 0.1\, \mathrm{gtol} \cdot
            \max(\lvert f \rvert, 0.01\, \mathrm{gtol} \cdot (f_0 - f)),

    the second being the decrease that the next step promises if it is as long as the
    last one: from a start far away, where the gradient is huge, much may be left to
    gain though the first holds. A starting point need only meet that, and the message
    says so: an objective in small units needs a smaller `gtol`. Where no lower point is
    found, or neither the value nor the gradient has fallen for 10 iterations, the
    direction is started afresh from the gradient, once; if that does not help either
    the search stops and says so. Nothing raises inside: points where the value or the
    gradient is not finite are backed off from.

    The default preconditioner is limited-memory BFGS. Its newest pair makes the
    direction satisfy Perry's condition :math:`d_t^\top y_{t-1} = -g_t^\top s_{t-1}`, so
    that with an exact search it is conjugate already; Dai & Kou's β in that metric is
    identically 0, and ``beta_rule="auto"`` then leaves the second term out.
    With ``preconditioner=None`` this is nonlinear conjugate gradient in the narrow
    sense, with seven vectors of state instead of 26.

    The parameters, the value and what `has_aux` returns are differentiable, forwards
    and backwards, with respect to `args` and to whatever `fun` closes over, by the
    implicit function theorem: the Hessian at the solution, which must be positive
    definite, is solved with by linear conjugate gradient. Their derivative with respect
    to the starting point is 0.

    Args:
      fun: the objective, called as ``fun(params, *args)``; returns a real scalar, or,
        with `has_aux`, a scalar and any tree of arrays. Outside `jit` the compiled
        solver is kept for the function object and the options: a new ``lambda`` in each
        call compiles each time. Pass what varies through `args`.
      params: where to start, any tree of real or complex floating-point arrays. The
        result is sharded like them. A list of numbers is one array of them, as for
        scipy.
      *args: further arguments of the objective: trees of arrays.
      max_iter: iterations at most.
      gtol: tolerance of the gradient; None for 1e-8 in float64 and 1e-5 in float32.
      ftol: stops too where an iteration lowers the value by no more than this times
        the larger of the value's size and 1; 0 for never.
      bounds: what each variable may be, as for scipy: of one vector a pair
        ``(lower, upper)`` for each element, with None for no bound, or a
        ``scipy.optimize.Bounds``; of any other tree a pair of numbers or of trees like
        it. Every point that is evaluated is within them: the direction is that of
        limited-memory BFGS for the variables that no bound holds, and the search goes
        along its projection. The gradient in the stopping rule is that of these
        variables. What is at a bound moves with it in derivatives.
      has_aux: whether the objective returns something beside the value. It is evaluated
        once more, at the solution, for it.
      beta_rule: see :func:`~nlcg_optax.scale_by_conjugate_direction`; β is not clipped.
        None for β = 0. ``"auto"`` is None over ``"lbfgs"`` and ``"hager_zhang"``
        otherwise.
      preconditioner: ``"lbfgs"``, ``"diagonal_bfgs"``, any gradient transformation, or
        None.
      line_search: ``"hager_zhang"``
        (:func:`~nlcg_optax.scale_by_hager_zhang_linesearch`) or any transformation
        that takes a descent direction, such as
        ``optax.scale_by_zoom_linesearch(20)``. One that keeps no value or gradient
        costs a further evaluation in each iteration.
      memory_size: pairs of vectors that ``"lbfgs"`` keeps.
      restart_every: β = 0 every so many iterations; None for never. Nothing to do where
        β is 0 in all of them.
      callback: called on the host after each iteration with an
        :class:`IterationInfo`, or, if its parameter is named ``xk`` as scipy's, with
        the parameters; under `vmap` once for each problem still running. The search
        stops where it returns True or raises StopIteration.
      progress: prints a line after each iteration.
      **unknown: refused; for the arguments of ``scipy.optimize.minimize`` the error
        says what stands in their place.

    Returns:
      A :class:`MinimizeResult`; its `message` says why it stopped. Evaluations by other
      line searches than ours are counted as they report them.

    Raises:
      TypeError: for parameters that are not floating-point numbers, an unknown
        argument, or an objective that does not return what it should.
      ValueError: for an unknown name, an argument out of range, or bounds that do not
        fit the parameters.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nlcg_optax
    >>> def rosenbrock(x, a):
    ...     return jnp.sum((a - x[:-1]) ** 2 + 100.0 * (x[1:] - x[:-1] ** 2) ** 2)
    >>> result = nlcg_optax.minimize(rosenbrock, jnp.zeros(2), 2.0)
    >>> print(result.params.round(2), result.message)
    [2. 4.] converged: the gradient is small enough (gtol)

    The solution is (a, a²), so its derivative with respect to a is (1, 2a):

    >>> def solution(a):
    ...     return nlcg_optax.minimize(rosenbrock, jnp.zeros(2), a).params
    >>> print(jax.jacobian(solution)(2.0).round(2))
    [1. 4.]

    Within bounds:

    >>> within = [(-1.0, 1.5), (None, 3.0)]
    >>> result = nlcg_optax.minimize(rosenbrock, jnp.zeros(2), 2.0, bounds=within)
    >>> print(result.params.round(2))
    [1.5  2.25]
    """
    for name in unknown:
        instead = _INSTEAD.get(name)
        if instead is None:
            known = list(inspect.signature(minimize).parameters)[3:-1]
            near = difflib.get_close_matches(name, known, n=1) or known
            instead = f"did you mean {', '.join(near)}?"
        raise TypeError(f"minimize takes no argument {name!r}: {instead}")
    _check.number("max_iter", max_iter, minimum=0, integer=True)
    _check.number("ftol", ftol, minimum=0)
    _check.number("memory_size", memory_size, minimum=1, integer=True)
    if gtol is not None:
        _check.number("gtol", gtol, minimum=0)
    if restart_every is not None:
        _check.number("restart_every", restart_every, minimum=1, integer=True)
    if not isinstance(preconditioner, optax.GradientTransformation | None):
        known = ("lbfgs", "diagonal_bfgs")
        otherwise = ", a gradient transformation, or None"
        _check.one_of("preconditioner", preconditioner, known, otherwise)
    if beta_rule == "auto":
        beta_rule = None if preconditioner == "lbfgs" else "hager_zhang"
    elif beta_rule is not None:
        beta_rules.resolve(beta_rule)
    if not isinstance(line_search, optax.GradientTransformation):
        known, otherwise = ("hager_zhang",), " or a gradient transformation"
        _check.one_of("line_search", line_search, known, otherwise)
    if bounds is not None and (
        preconditioner != "lbfgs" or beta_rule or line_search != "hager_zhang"
    ):
        raise ValueError(
            "bounds are kept by limited-memory BFGS and a search of their own: leave "
            "preconditioner, beta_rule and line_search out."
        )
    options = Options(
        max_iter=int(max_iter),
        ftol=float(ftol),
        has_aux=has_aux,
        beta_rule=beta_rule,
        preconditioner=preconditioner,
        line_search=line_search,
        memory_size=memory_size,
        restart_every=restart_every,
        callback=_told(callback),
        progress=progress,
    )
    if isinstance(params, list) and all(
        isinstance(x, numbers.Real) and not isinstance(x, bool) for x in params
    ):
        params = jnp.asarray(params, float)
    _warn_of_less_precision(params)
    params = jax.tree.map(jnp.asarray, params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} has dtype {leaf.dtype}: expected "
                "real or complex floating-point numbers. Start from 1.0 rather than 1, "
                "and pass what is not to be optimized through `args`."
            )
    dtype = _tree.scalar_dtype(params)
    if gtol is None:
        gtol = 1e-5 if dtype == jnp.float32 else 1e-8
    try:
        hash(fun)
    except TypeError:  # a dataclass with `__call__`, say
        # A bound method is equal to another of the same object alone.
        fun = types.MethodType(operator.call, fun)
    box = None if bounds is None else make_box(bounds, params)
    with heard(options.callback):
        found = _minimize(fun, options, params, args, jnp.asarray(gtol, dtype), box)
        return found if options.callback is None else jax.block_until_ready(found)


@dataclasses.dataclass(frozen=True)
class _OfParams:
    """Scipy's form of a callback; equal to another of the same function."""

    function: Callable[[Any], Any]

    def __call__(self, info: IterationInfo) -> Any:
        return self.function(info.params)


def _told(
    callback: Callable[[Any], Any] | None,
) -> Callable[[IterationInfo], Any] | None:
    """The callback, which may ask for the parameters alone by its parameter's name."""
    if callback is None:
        return None
    try:
        names = list(inspect.signature(callback).parameters)
    except (TypeError, ValueError):  # some of those that are built in have none
        names = []
    return _OfParams(callback) if names == ["xk"] else callback


def _warn_of_less_precision(params: Any) -> None:
    """Warns where NumPy's float64 becomes float32."""
    wide = (np.float64, np.complex128)
    if jax.dtypes.canonicalize_dtype(np.float64) == np.float64 or not any(
        isinstance(x, np.ndarray | np.generic) and x.dtype in wide
        for x in jax.tree.leaves(params)
    ):
        return
    warnings.warn(
        "The start is in float64, and JAX computes in float32: the solution has six "
        "digits at most, and gtol is 1e-5. For float64 call "
        '`jax.config.update("jax_enable_x64", True)` before anything else; for float32 '
        "pass a start of that dtype.",
        UserWarning,
        stacklevel=3,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _minimize(fun, options, params, args, gtol, box):
    @functools.wraps(fun)
    def checked(*given):
        # Before JAX sees it, whose messages about what is no array are not clear.
        out = fun(*given)
        _check_output(out, options.has_aux)
        return out

    fun, closed_over = jax.closure_convert(checked, params, *args)
    return solution(fun, options, params, (*args, *closed_over), gtol, box)


def _check_output(out: Any, has_aux: bool) -> None:
    """Raises unless an objective may return this."""
    pair = isinstance(out, tuple) and len(out) == 2
    if has_aux and not pair:
        raise TypeError(
            f"has_aux=True: the objective is to return (value, aux), and returns "
            f"{_described(out)}."
        )
    if has_aux:
        out, aux = out
        for path, leaf in jax.tree_util.tree_leaves_with_path(aux):
            try:
                jax.typeof(leaf)
            except TypeError:
                where = jax.tree_util.keystr(path)
                raise TypeError(
                    f"The objective returns {leaf!r} in aux{where}: expected arrays "
                    "or numbers, since the solver is compiled. Leave it out."
                ) from None
    elif pair:
        raise TypeError(
            f"The objective returns {_described(out)}: a second output beside the "
            "value, which has_aux=True allows and returns as `result.aux`."
        )
    scalar = hasattr(out, "dtype") and out.ndim == 0  # pyright: ignore
    if not scalar or jnp.iscomplexobj(out):
        raise TypeError(
            f"The objective returns {_described(out)}: expected a real scalar, such as "
            "the sum or the mean of its elements."
        )


def _described(out: Any) -> str:
    if hasattr(out, "dtype"):
        return f"an array of shape {jnp.shape(out)} and dtype {out.dtype}"
    if out is None or jax.tree_util.all_leaves([out]):
        return f"{out!r}, which is no array"
    return f"a {type(out).__name__} of {len(jax.tree.leaves(out))} arrays"

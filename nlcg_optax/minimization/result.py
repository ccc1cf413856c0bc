"""What a minimization returns, and what it tells on the way."""

from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

_MESSAGES = (
    "still running",
    "converged: the gradient is small enough (gtol)",
    "converged: the value decreases by too little (ftol)",
    "stopped: max_iter iterations are used up",
    "stopped: no lower point is found along steepest descent",
    "stopped: the value or the gradient is not finite at the starting point",
    "stopped: along steepest descent most points tried gave a value or a gradient that "
    "is not finite, and none a lower value",
    "stopped: the callback asked for it",
    "stopped: the objective seems to have no lower bound; its value falls ever "
    "further, and its gradient does not shrink",
    "converged: the gradient is small enough (gtol) at the start already; if that is "
    "no minimum, the objective's units are small: multiply it, or give a smaller gtol",
)
# By which a result's status is named.
RUNNING, GTOL, FTOL, MAX_ITER, STUCK = range(5)
BAD_START, NONFINITE, CALLBACK, UNBOUNDED, AT_START = range(5, len(_MESSAGES))


# What has no place in a result of ours, for those who come from scipy.
_INSTEAD = {
    "jac": "its largest element is `grad_norm`; jax.grad(fun)(result.params) is all",
    "hess": "jax.hessian(fun)(result.params) is the Hessian there",
    "hess_inv": "jnp.linalg.inv(jax.hessian(fun)(result.params)) is the inverse; "
    "nlcg_optax.fit_covariance(residuals, result.params) is a fit's covariance",
    "nhev": "no Hessian is evaluated",
    "maxcv": "there are no constraints",
}


class MinimizeResult(NamedTuple):
    """Where :func:`minimize` stopped and why.

    Under `vmap` every field has a leading axis. Scipy's names ``x``, ``fun``, ``nit``,
    ``nfev`` and ``njev`` read the fields that they mean.

    Attributes:
      params: the parameters reached.
      value: the objective there.
      grad_norm: the largest modulus of the gradient's elements there, without those
        that a bound holds.
      iterations: directions searched along, int32.
      value_evaluations: how often the objective was evaluated, int32.
      grad_evaluations: how often its gradient was, always at such a point, int32.
      restarts: how often the direction and its preconditioner were started afresh,
        int32.
      status: why it stopped, int32; :attr:`message` says it in words.
      aux: what the objective returns beside the value, with ``has_aux``; else None.
    """

    params: Any
    value: jax.Array
    grad_norm: jax.Array
    iterations: jax.Array
    value_evaluations: jax.Array
    grad_evaluations: jax.Array
    restarts: jax.Array
    status: jax.Array
    aux: Any = None

    @property
    def message(self) -> Any:
        """The status in words; a list of them for a batch."""

        def words(status: Any) -> Any:
            if isinstance(status, list):
                return [words(one) for one in status]
            return _MESSAGES[status]

        return words(np.asarray(self.status).tolist())

    @property
    def success(self) -> jax.Array:
        """Whether a tolerance was met."""
        return (self.status == GTOL) | (self.status == FTOL) | (self.status == AT_START)

    @property
    def x(self) -> Any:
        """`params`, by scipy's name."""
        return self.params

    @property
    def fun(self) -> jax.Array:
        """`value`, by scipy's name."""
        return self.value

    @property
    def nit(self) -> jax.Array:
        """`iterations`, by scipy's name."""
        return self.iterations

    @property
    def nfev(self) -> jax.Array:
        """`value_evaluations`, by scipy's name."""
        return self.value_evaluations

    @property
    def njev(self) -> jax.Array:
        """`grad_evaluations`, by scipy's name."""
        return self.grad_evaluations

    def __getattr__(self, name: str) -> Any:
        told = _INSTEAD.get(name, f"it has {', '.join(self._fields)}")
        raise AttributeError(f"MinimizeResult has no {name!r}: {told}.")

    def __repr__(self) -> str:
        """Why it stopped, where, and after how much work, in a few lines."""
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tuple(self))):
            fields = (f"{k}={v!r}" for k, v in zip(self._fields, self, strict=True))
            return f"MinimizeResult({', '.join(fields)})"
        shapes = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", self.params)
        if jnp.ndim(self.status):
            found, counts = np.unique(np.asarray(self.status), return_counts=True)
            head = [f"MinimizeResult of {self.status.size} problems"]
            head += [
                f"  {count:6d} {_MESSAGES[status]}"
                for status, count in zip(found, counts, strict=True)
            ]
        else:
            head = [self.message]
        lines = [
            *head,
            f"  value {_range(self.value, '.8g')}, largest element of the gradient "
            f"{_range(self.grad_norm, '.3g')}",
            f"  {_range(self.iterations)} iterations, "
            f"{_range(self.value_evaluations)} evaluations of the objective, "
            f"{_range(self.grad_evaluations)} of its gradient, "
            f"{_range(self.restarts)} restarts",
            f"  params: {shapes}",
        ]
        return "\n".join(lines)


def _range(x: jax.Array, form: str = "") -> str:
    """A number, or the least and the greatest of a batch."""
    least, greatest = np.min(x), np.max(x)
    return f"{least:{form}}" + (f" to {greatest:{form}}" if jnp.ndim(x) else "")


class IterationInfo(NamedTuple):
    """What a callback of :func:`minimize` is told after each iteration.

    Attributes:
      iteration: iterations so far.
      params: the parameters.
      value: the objective.
      grad_norm: the largest modulus of the gradient's elements.
      value_evaluations: evaluations of the objective so far.

    Of scipy's ``intermediate_result`` it has ``x`` and ``fun``.
    """

    iteration: Any
    params: Any
    value: Any
    grad_norm: Any
    value_evaluations: Any

    @property
    def x(self) -> Any:
        """`params`, by scipy's name."""
        return self.params

    @property
    def fun(self) -> Any:
        """`value`, by scipy's name."""
        return self.value

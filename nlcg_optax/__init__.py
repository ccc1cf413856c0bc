"""Stochastic preconditioned nonlinear conjugate gradient (NLCG) for Optax."""

from nlcg_optax import beta, matrices
from nlcg_optax._alias import nlcg, nlcg_auto, nlcg_paper
from nlcg_optax._diagnostics import diagnostics
from nlcg_optax._parallel import pmean_value_and_grad
from nlcg_optax.curvature.advice import explain
from nlcg_optax.curvature.checkup import check
from nlcg_optax.curvature.objective import value_grad_and_curvature
from nlcg_optax.curvature.products import Curvature, gauss_newton, hessian
from nlcg_optax.curvature.state import QuadraticModelState
from nlcg_optax.curvature.transform import (
    scale_by_quadratic_model,
)
from nlcg_optax.directions.conjugate import (
    ConjugateDirectionState,
    scale_by_conjugate_direction,
)
from nlcg_optax.matrices.describe import describe
from nlcg_optax.matrices.matrix import Matrix
from nlcg_optax.minimization.covariance import fit_covariance
from nlcg_optax.minimization.minimize import minimize
from nlcg_optax.minimization.result import IterationInfo, MinimizeResult
from nlcg_optax.preconditioners.diagonal_bfgs import (
    DiagonalBfgsState,
    scale_by_diagonal_bfgs,
)
from nlcg_optax.preconditioners.limited_memory_bfgs import (
    LimitedMemoryBfgsState,
    scale_by_limited_memory_bfgs,
)
from nlcg_optax.preconditioners.orthogonalization import (
    OrthogonalizationState,
    scale_by_orthogonalization,
)
from nlcg_optax.preconditioners.soap import SoapState, scale_by_soap
from nlcg_optax.step_sizes.hager_zhang import (
    HagerZhangLinesearchInfo,
    HagerZhangLinesearchState,
    scale_by_hager_zhang_linesearch,
)
from nlcg_optax.step_sizes.lars import scale_by_lars
from nlcg_optax.step_sizes.loss_feedback import (
    LossFeedbackState,
    scale_by_loss_feedback,
)
from nlcg_optax.step_sizes.noise_balance import (
    NoiseBalanceState,
    eval_params,
    scale_by_noise_balance,
)

__version__ = "0.1.0"

__all__ = [
    "ConjugateDirectionState",
    "Curvature",
    "DiagonalBfgsState",
    "HagerZhangLinesearchInfo",
    "HagerZhangLinesearchState",
    "IterationInfo",
    "LimitedMemoryBfgsState",
    "LossFeedbackState",
    "Matrix",
    "MinimizeResult",
    "NoiseBalanceState",
    "OrthogonalizationState",
    "QuadraticModelState",
    "SoapState",
    "beta",
    "check",
    "describe",
    "diagnostics",
    "eval_params",
    "explain",
    "fit_covariance",
    "gauss_newton",
    "hessian",
    "matrices",
    "minimize",
    "nlcg",
    "nlcg_auto",
    "nlcg_paper",
    "pmean_value_and_grad",
    "scale_by_conjugate_direction",
    "scale_by_diagonal_bfgs",
    "scale_by_hager_zhang_linesearch",
    "scale_by_lars",
    "scale_by_limited_memory_bfgs",
    "scale_by_loss_feedback",
    "scale_by_noise_balance",
    "scale_by_orthogonalization",
    "scale_by_quadratic_model",
    "scale_by_soap",
    "value_grad_and_curvature",
]

"""Stochastic preconditioned nonlinear conjugate gradient (NLCG) for Optax."""

from nlcg_optax import beta
from nlcg_optax._alias import DisplacementState, nlcg, nlcg_paper
from nlcg_optax._curvature import Curvature, gauss_newton, hessian
from nlcg_optax._diagnostics import diagnostics
from nlcg_optax._direction import (
    ConjugateDirectionState,
    scale_by_conjugate_direction,
)
from nlcg_optax._linesearch import (
    HagerZhangLinesearchInfo,
    HagerZhangLinesearchState,
    scale_by_hager_zhang_linesearch,
)
from nlcg_optax._minimize import IterationInfo, MinimizeResult, minimize
from nlcg_optax._orthogonalization import (
    OrthogonalizationState,
    scale_by_orthogonalization,
)
from nlcg_optax._parallel import pmean_value_and_grad
from nlcg_optax._preconditioner import (
    DiagonalBfgsState,
    Displacement,
    LimitedMemoryBfgsState,
    scale_by_diagonal_bfgs,
    scale_by_limited_memory_bfgs,
)
from nlcg_optax._step_size import (
    LossFeedbackState,
    scale_by_lars,
    scale_by_loss_feedback,
)

__version__ = "0.1.0"

__all__ = [
    "ConjugateDirectionState",
    "Curvature",
    "DiagonalBfgsState",
    "Displacement",
    "DisplacementState",
    "HagerZhangLinesearchInfo",
    "HagerZhangLinesearchState",
    "IterationInfo",
    "LimitedMemoryBfgsState",
    "LossFeedbackState",
    "MinimizeResult",
    "OrthogonalizationState",
    "beta",
    "diagnostics",
    "gauss_newton",
    "hessian",
    "minimize",
    "nlcg",
    "nlcg_paper",
    "pmean_value_and_grad",
    "scale_by_conjugate_direction",
    "scale_by_diagonal_bfgs",
    "scale_by_hager_zhang_linesearch",
    "scale_by_lars",
    "scale_by_limited_memory_bfgs",
    "scale_by_loss_feedback",
    "scale_by_orthogonalization",
]

"""Solvers of A x = b for many right-hand sides at once. They see a linear operator, never a model or data."""

from torch_influence.solvers._base import Progress, norms, rounding
from torch_influence.solvers._block_cg import block_cg
from torch_influence.solvers._cg import cg
from torch_influence.solvers._direct import Factor, direct
from torch_influence.solvers._dual import DualFactor
from torch_influence.solvers._lanczos import RitzValues, lanczos
from torch_influence.solvers._lissa import lissa
from torch_influence.solvers._minibatches import AutoScale
from torch_influence.solvers._minres import minres
from torch_influence.solvers._preconditioners import Jacobi, Kept, Nystrom, Preconditioner, is_recipe
from torch_influence.solvers._report import (
    ConvergenceWarning,
    DivergenceWarning,
    NegativeCurvatureWarning,
    OnFailure,
    SolveError,
    SolveReport,
    check_on_failure,
    fail,
)

__all__ = [
    "AutoScale",
    "ConvergenceWarning",
    "DivergenceWarning",
    "DualFactor",
    "Factor",
    "Jacobi",
    "Kept",
    "NegativeCurvatureWarning",
    "Nystrom",
    "OnFailure",
    "Preconditioner",
    "Progress",
    "RitzValues",
    "SolveError",
    "SolveReport",
    "block_cg",
    "cg",
    "check_on_failure",
    "direct",
    "fail",
    "is_recipe",
    "lanczos",
    "lissa",
    "minres",
    "norms",
    "rounding",
]

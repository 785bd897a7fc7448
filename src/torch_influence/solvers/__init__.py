"""Solvers of A x = b for many right-hand sides at once. They see a linear operator, never a model or data."""

from torch_influence.failures import (
    ConvergenceWarning,
    DivergenceWarning,
    NegativeCurvatureWarning,
    OnFailure,
    SolveError,
    check_on_failure,
    fail,
)
from torch_influence.solvers._auto import Auto, named
from torch_influence.solvers._base import Progress, check_budget, norms, rounding
from torch_influence.solvers._block import Follow
from torch_influence.solvers._block_cg import BlockCG, block_cg
from torch_influence.solvers._cg import CG, cg
from torch_influence.solvers._closed_form import ClosedForm
from torch_influence.solvers._direct import Direct, Factor, direct, refuse_if_too_large
from torch_influence.solvers._dual import DualDirect, DualFactor
from torch_influence.solvers._lanczos import RitzValues, lanczos
from torch_influence.solvers._lissa import LiSSA, lissa
from torch_influence.solvers._minibatches import AutoScale
from torch_influence.solvers._minres import Minres, minres
from torch_influence.solvers._preconditioners import Jacobi, Nystrom, Preconditioner, is_recipe
from torch_influence.solvers._report import SolveReport
from torch_influence.solvers._solver import Cost, Memo, Solved, Solver, own_or_ours, solved

__all__ = [
    "CG",
    "Auto",
    "AutoScale",
    "BlockCG",
    "ClosedForm",
    "ConvergenceWarning",
    "Cost",
    "Direct",
    "DivergenceWarning",
    "DualDirect",
    "DualFactor",
    "Factor",
    "Follow",
    "Jacobi",
    "LiSSA",
    "Memo",
    "Minres",
    "NegativeCurvatureWarning",
    "Nystrom",
    "OnFailure",
    "Preconditioner",
    "Progress",
    "RitzValues",
    "SolveError",
    "SolveReport",
    "Solved",
    "Solver",
    "block_cg",
    "cg",
    "check_budget",
    "check_on_failure",
    "direct",
    "fail",
    "is_recipe",
    "lanczos",
    "lissa",
    "minres",
    "named",
    "norms",
    "own_or_ours",
    "refuse_if_too_large",
    "rounding",
    "solved",
]

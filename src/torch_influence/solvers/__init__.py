"""Solvers of A x = b for many right-hand sides at once. They see a linear operator, never a model or data."""

from torch_influence.solvers._base import (
    ConvergenceWarning,
    DivergenceWarning,
    NegativeCurvatureWarning,
    SolveReport,
)
from torch_influence.solvers._block_cg import block_cg
from torch_influence.solvers._cg import cg
from torch_influence.solvers._direct import Factor
from torch_influence.solvers._dual import DualFactor
from torch_influence.solvers._lissa import lissa

__all__ = [
    "ConvergenceWarning",
    "DivergenceWarning",
    "DualFactor",
    "Factor",
    "NegativeCurvatureWarning",
    "SolveReport",
    "block_cg",
    "cg",
    "lissa",
]

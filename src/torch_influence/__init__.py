"""Influence functions for PyTorch: which training examples caused this prediction?"""

# ruff: noqa: I001  (in the order in which data flow: objective, kernels, solvers, and the modules that join them)
from importlib.metadata import version as _version

from torch_influence.objective import BaseObjective
from torch_influence.ops import backend_info, self_test
from torch_influence.gradients import NondeterminismWarning
from torch_influence.curvature import CurvatureWarning
from torch_influence.solvers import (
    ConvergenceWarning,
    DivergenceWarning,
    NegativeCurvatureWarning,
    SolveError,
    SolveReport,
)
from torch_influence.diagnostics import Damping, Spectrum
from torch_influence.verification import Check, Refits, Verification
from torch_influence.scores import Ranking, TopInfluences
from torch_influence.estimates import Estimate
from torch_influence.base import BaseInfluenceModule
from torch_influence.modules import AutogradInfluenceModule, CGInfluenceModule, LiSSAInfluenceModule
from torch_influence.auto import InfluenceModule
from torch_influence import plot

__version__ = _version("torch-influence")

__all__ = [
    "AutogradInfluenceModule",
    "BaseInfluenceModule",
    "BaseObjective",
    "CGInfluenceModule",
    "Check",
    "ConvergenceWarning",
    "CurvatureWarning",
    "Damping",
    "DivergenceWarning",
    "Estimate",
    "InfluenceModule",
    "LiSSAInfluenceModule",
    "NegativeCurvatureWarning",
    "NondeterminismWarning",
    "Ranking",
    "Refits",
    "SolveError",
    "SolveReport",
    "Spectrum",
    "TopInfluences",
    "Verification",
    "backend_info",
    "plot",
    "self_test",
]

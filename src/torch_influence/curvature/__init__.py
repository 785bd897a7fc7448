"""Curvatures of the training objective as linear operators."""

from torch_influence.curvature._curvature import Curvature
from torch_influence.curvature._double_backward import DoubleBackward
from torch_influence.curvature._doubts import CurvatureWarning
from torch_influence.curvature._gauss_newton import GaussNewton
from torch_influence.curvature._head_capture import linear_head
from torch_influence.curvature._hessian import Hessian
from torch_influence.curvature._kinds import Kind, check_kind, fastest, made
from torch_influence.curvature._linear_head import LinearHead
from torch_influence.curvature._rounded import Rounded

__all__ = [
    "Curvature",
    "CurvatureWarning",
    "DoubleBackward",
    "GaussNewton",
    "Hessian",
    "Kind",
    "LinearHead",
    "Rounded",
    "check_kind",
    "fastest",
    "linear_head",
    "made",
]

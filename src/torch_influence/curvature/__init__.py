"""Second derivatives of the training objective as linear operators."""

from torch_influence.curvature._base import Curvature
from torch_influence.curvature._doubts import CurvatureWarning, doubts, second_derivative
from torch_influence.curvature._dual import DualCost, dual, dual_cost
from torch_influence.curvature._gauss_newton import GaussNewton
from torch_influence.curvature._hessian import Hessian
from torch_influence.curvature._linear_head import LinearHead, linear_head
from torch_influence.curvature._plain import plain_product

__all__ = [
    "Curvature",
    "CurvatureWarning",
    "DualCost",
    "GaussNewton",
    "Hessian",
    "LinearHead",
    "doubts",
    "dual",
    "dual_cost",
    "linear_head",
    "plain_product",
    "second_derivative",
]

"""Second derivatives of the training objective as linear operators."""

from torch_influence.curvature._base import Curvature
from torch_influence.curvature._gauss_newton import GaussNewton
from torch_influence.curvature._hessian import Hessian
from torch_influence.curvature._linear_head import LinearHead, linear_head

__all__ = ["Curvature", "GaussNewton", "Hessian", "LinearHead", "linear_head"]

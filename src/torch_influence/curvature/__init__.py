"""Second derivatives of the training objective as linear operators."""

from torch_influence.curvature._base import Curvature
from torch_influence.curvature._gauss_newton import GaussNewton
from torch_influence.curvature._hessian import Hessian

__all__ = ["Curvature", "GaussNewton", "Hessian"]

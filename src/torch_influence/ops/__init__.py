"""The hot loops as native ops, each with a plain-torch reference that defines it and stands in for it."""

from torch_influence.ops._cg_step import CGScalars, cg_step
from torch_influence.ops._grad_dot import grad_dot
from torch_influence.ops._linear_curvature_product import linear_curvature_product
from torch_influence.ops._lissa_step import lissa_step
from torch_influence.ops._native import BackendInfo, backend_info
from torch_influence.ops._self_test import SelfTest, self_test
from torch_influence.ops._softmax_curvature import softmax_curvature

OPS = ("cg_step", "grad_dot", "linear_curvature_product", "lissa_step", "softmax_curvature")

__all__ = [
    "OPS",
    "BackendInfo",
    "CGScalars",
    "SelfTest",
    "backend_info",
    "cg_step",
    "grad_dot",
    "linear_curvature_product",
    "lissa_step",
    "self_test",
    "softmax_curvature",
]

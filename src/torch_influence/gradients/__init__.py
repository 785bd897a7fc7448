"""Mean gradients, and gradients of single examples as products with vectors."""

from torch_influence.gradients._examples import ExampleGradients
from torch_influence.gradients._mean import (
    NOT_A_MEAN,
    Graph,
    NondeterminismWarning,
    PullBack,
    differentiate,
    grouping,
    loss_gradient,
    mean_gradient,
    nodes_behind,
    pulled,
    randomness,
    regularizer_gradient,
    saved_bytes,
    undisturbed,
)
from torch_influence.gradients._outer_products import OuterProducts

__all__ = [
    "NOT_A_MEAN",
    "ExampleGradients",
    "Graph",
    "NondeterminismWarning",
    "OuterProducts",
    "PullBack",
    "differentiate",
    "grouping",
    "loss_gradient",
    "mean_gradient",
    "nodes_behind",
    "pulled",
    "randomness",
    "regularizer_gradient",
    "saved_bytes",
    "undisturbed",
]

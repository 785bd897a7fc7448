"""The objective as a pure function of the parameters, and what goes into layers and comes back."""

from torch_influence.evaluation._capture import Calls, cut, linear_layer, shifted
from torch_influence.evaluation._evaluation import Evaluation

__all__ = ["Calls", "Evaluation", "cut", "linear_layer", "shifted"]

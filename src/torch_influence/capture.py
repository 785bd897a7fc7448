"""Hooks on layers while the objective runs: what goes into a layer, and the rest as a function of what comes out."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from torch_influence.evaluation import Evaluation


@dataclasses.dataclass
class Calls:
    """A layer's calls, in order.

    Attributes:
        inputs: their first arguments, detached.
        outputs: leaves that took the place of their outputs, and require grad.
    """

    inputs: list[Tensor] = dataclasses.field(default_factory=list)
    outputs: list[Tensor] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def cut(layer: nn.Module) -> Iterator[Calls]:
    """Cuts the graph behind a layer: everything that follows is a function of leaves, with the values that there were.

    A model that uses the layer's parameters without calling it, as a compiled or scripted one, makes no calls.
    """
    calls = Calls()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = args[0] if args else kwargs.get("input")
        if not isinstance(given, Tensor) or not isinstance(output, Tensor):
            return output
        leaf = output.detach().requires_grad_()
        calls.inputs.append(given.detach())
        calls.outputs.append(leaf)
        return leaf.clone()  # what follows may edit it in place, which no leaf allows

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def linear_layer(evaluation: Evaluation) -> nn.Linear | None:
    """The linear layer whose parameters, or whose weight alone, are just those that are differentiated."""
    chosen = [id(p) for p in evaluation.space.current()]
    for layer in evaluation.model.modules():
        if isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward:
            both = [id(p) for p in (layer.weight, layer.bias) if p is not None]
            if chosen in (both, both[:1]):
                return layer
    return None

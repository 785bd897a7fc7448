"""Hooks on layers while the objective runs: they record the inputs and outputs of layers, and may replace outputs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from torch_influence.evaluation._evaluation import Evaluation


@dataclasses.dataclass
class Calls:
    """A layer's calls, in order.

    Attributes:
        inputs: their first arguments; detached by ``cut``.
        outputs: their results; with ``cut`` the leaves that replaced them, which require grad.
    """

    inputs: list[Tensor] = dataclasses.field(default_factory=list)
    outputs: list[Tensor] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def cut(layer: nn.Module) -> Iterator[Calls]:
    """Cuts the graph at a layer's outputs: leaves with the same values replace them, and what follows depends on these.

    A model that uses the layer's parameters without calling it, as a scripted one does, makes no calls.
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


@contextlib.contextmanager
def shifted(layers: Sequence[nn.Module], shifts: Sequence[Sequence[Tensor] | None]) -> Iterator[list[Calls]]:
    """Adds a shift to the output of each call of each layer, so that the loss can be differentiated by the shifts.

    None in place of a layer's shifts adds nothing. More calls than shifts are an error.
    """
    calls = [Calls() for _ in layers]
    handles = []

    def hook(i: int) -> Any:
        def shift(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            its, by = calls[i], shifts[i]
            its.inputs.append(args[0] if args else kwargs["input"])
            its.outputs.append(output)
            return output if by is None else output + by[len(its.outputs) - 1]

        return shift

    try:
        for i, layer in enumerate(layers):
            handles.append(layer.register_forward_hook(hook(i), with_kwargs=True))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def linear_layer(evaluation: Evaluation) -> nn.Linear | None:
    """Finds the linear layer whose parameters, or whose weight alone, are exactly the selected ones; else None.

    Subclasses with a ``forward`` of their own do not count: the layer computes x Wᵀ + b and nothing else.
    """
    chosen = [id(p) for p in evaluation.space.current()]
    for layer in evaluation.model.modules():
        if isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward:
            both = [id(p) for p in (layer.weight, layer.bias) if p is not None]
            if chosen in (both, both[:1]):
                return layer
    return None

"""Per-example gradients times vectors, without the gradients, from what goes into linear layers and comes back.

The gradient of a linear layer's weight is Σₜ gₜ aₜᵀ, of inputs aₜ and gradients gₜ of its outputs. Its products with
many vectors need neither it nor a backward pass for each of them (``ops.grad_dot``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_influence.capture import is_linear, shifted
from torch_influence.evaluation import Evaluation
from torch_influence.ops import grad_dot

BatchOf = Callable[[Sequence[Tensor]], Any]


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A linear layer and where its parameters stand in a row: the weight, and the bias right after it."""

    module: nn.Module
    parameters: tuple[int, ...]
    columns: slice
    bias: bool


class Contraction:
    """Gradients of losses of batches of one, times vectors.

    Args:
        loss: of leaves and a batch.
        evaluation: of the model.

    Attributes:
        layers: linear layers whose weight, at least, is differentiated and has one name in the model.
        example_bytes: what an example's inputs and output gradients, and gradients that are formed, take.
    """

    def __init__(self, loss: Callable[[Sequence[Tensor], Any], Tensor], evaluation: Evaluation) -> None:
        self._loss = loss
        self._space = evaluation.space
        self._leaves = tuple(p.detach() for p in evaluation.space.current())
        self.layers = _layers(evaluation)
        self.example_bytes = 0

    @property
    def rest(self) -> int:
        """Scalars of a row whose gradients are formed, since no layer accounts for them."""
        return self._space.size - sum(layer.columns.stop - layer.columns.start for layer in self.layers)

    def look(self, batch: Any) -> None:
        """Leaves out the layers that a batch does not pass exactly once: their gradients are formed."""
        with torch.no_grad(), shifted([layer.module for layer in self.layers], [None] * len(self.layers)) as calls:
            self._loss(self._leaves, batch)
        once = [len(call.inputs) == 1 for call in calls]
        self._shapes = [call.outputs[0] for call, right in zip(calls, once, strict=True) if right]
        self.layers = [layer for layer, right in zip(self.layers, once, strict=True) if right]
        inputs = [call.inputs[0] for call, right in zip(calls, once, strict=True) if right]
        self.example_bytes = sum(t.nbytes for t in [*inputs, *self._shapes]) + 4 * self.rest

    def dots(self, batch_of: BatchOf, tensors: Sequence[Tensor], vectors: Tensor) -> Tensor:
        """gᵢ·vⱼ as [m, k], for batches of one made by ``batch_of`` of m tensors each, stacked, and vectors [k, d].

        ``look`` comes first.
        """
        space, layers = self._space, self.layers
        covered = {i for layer in layers for i in layer.parameters}
        rest = [i for i in range(len(self._leaves)) if i not in covered]
        modules = [layer.module for layer in layers]

        def loss(shifts: Sequence[Tensor], others: Sequence[Tensor], parts: Sequence[Tensor]) -> Any:
            leaves = list(self._leaves)
            for i, leaf in zip(rest, others, strict=True):
                leaves[i] = leaf
            with shifted(modules, shifts) as calls:
                value = self._loss(leaves, batch_of(parts))
            return value, [call.inputs[0] for call in calls]

        shifts = [torch.zeros_like(shape) for shape in self._shapes]
        gradient = torch.func.grad(loss, argnums=(0, 1), has_aux=True)
        (slopes, others), inputs = torch.vmap(gradient, in_dims=(None, None, 0))(
            shifts, [self._leaves[i] for i in rest], list(tensors)
        )
        m = len(tensors[0])
        dots = vectors.new_zeros(m, len(vectors))
        for layer, a, g in zip(layers, inputs, slopes, strict=True):
            a, g = (t.detach().reshape(m, -1, t.shape[-1]) for t in (a, g))
            grad_dot(a, g, vectors[:, layer.columns], layer.bias, dots)
        pieces = space.split(vectors)
        for i, g in zip(rest, others, strict=True):
            dots += g.detach().reshape(m, -1).to(vectors.dtype) @ pieces[i].reshape(len(vectors), -1).mT
        return dots


def _layers(evaluation: Evaluation) -> list[_Layer]:
    space, model = evaluation.space, evaluation.model
    places = {id(p): i for i, p in enumerate(space.current())}
    names: dict[int, int] = {}
    for _, p in model.named_parameters(remove_duplicate=False):
        names[id(p)] = names.get(id(p), 0) + 1
    starts = [sum(space.sizes[:i]) for i in range(len(space.sizes) + 1)]
    layers = []
    for module in model.modules():
        if not is_linear(module):
            continue
        weight, bias = places.get(id(module.weight)), places.get(id(module.bias))
        if weight is None or names[id(module.weight)] > 1 or (bias is not None and names[id(module.bias)] > 1):
            continue
        has_bias = bias is not None
        if has_bias and bias != weight + 1:
            continue
        columns = slice(starts[weight], starts[weight + 1 + has_bias])
        layers.append(_Layer(module, (weight, bias) if bias is not None else (weight,), columns, has_bias))
    return layers

"""Gradients of examples in the parameters of one linear layer: outer products, which are kept once they are known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from torch_influence.agreement import agree
from torch_influence.ops import grad_dot


class OuterProducts:
    """The gradients sᵢ ⊗ x̃ᵢ of all examples, for a linear layer z = W x + b that each of them passes once.

    x̃ᵢ = (xᵢ, 1) is what goes into the layer, which a curvature has captured, and sᵢ the slope of the loss of example i
    alone at what comes out. Slopes are those of gradients that were computed, and verified, in another way.

    Memory: n c numbers beside x.

    Args:
        x: the layer's inputs [n, f], of all examples in order.
        c: how many outputs the layer has.
        bias: whether the layer's bias is among the parameters.
        room: bytes that the slopes may take.

    Attributes:
        nbytes: of the slopes.
        why_not: why no slopes are kept; empty while they are.
    """

    def __init__(self, x: Tensor, c: int, bias: bool, room: float) -> None:
        self._x, self._bias = x, bias
        self._slopes: Tensor | None = None
        self._known = torch.zeros(len(x), dtype=torch.bool, device="cpu")
        self._shape = len(x), c
        nbytes = len(x) * c * x.element_size()
        self.why_not = "" if nbytes <= room else "the slopes at the outputs have no room; see cache="
        self.nbytes = 0 if self.why_not else nbytes

    def has(self, indices: Sequence[int]) -> bool:
        """Tells whether the gradients of these examples are known."""
        return not self.why_not and bool(self._known[_places(indices, self._known)].all())

    def keep(self, indices: Sequence[int], x: Tensor, slopes: Tensor) -> None:
        """Keeps the slopes [m, c] of these examples, whose inputs as batches of one are x [m, f]."""
        if self.why_not:
            return
        places = _places(indices, self._x)
        if not (torch.equal(x, self._x[places]) or agree(x, self._x[places], x.dtype)):
            self.why_not = "the layer's inputs of an example alone are not those in its batch"
            self._slopes = None
            return
        if self._slopes is None:
            self._slopes = self._x.new_empty(self._shape)
        self._slopes[places] = slopes
        self._known[_places(indices, self._known)] = True

    def dots(self, indices: Sequence[int], vectors: Tensor) -> Tensor:
        """Computes gᵢ·vⱼ [m, k] of known examples with vectors [k, d]."""
        return grad_dot(*self._of(indices), vectors, self._bias)

    def rows(self, indices: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Computes gᵢ [m, d] of known examples."""
        return sums_of_outer_products([self._of(indices)], self._bias, dtype)

    def _of(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs [m, 1, f] and slopes [m, 1, c] of known examples."""
        assert self._slopes is not None
        places = _places(indices, self._x)
        return self._x[places].unsqueeze(1), self._slopes[places].unsqueeze(1)


def sums_of_outer_products(calls: Iterable[tuple[Tensor, Tensor]], bias: bool, dtype: torch.dtype) -> Tensor:
    """Computes the gradients [m, d] of a linear layer's parameters from inputs and output gradients, [m, ..., ·]."""
    rows = []
    for a, g in calls:
        a, g = (t.reshape(len(t), -1, t.shape[-1]).to(dtype) for t in (a, g))
        weights = (g.mT @ a).flatten(1)
        rows.append(torch.cat([weights, g.sum(1)], dim=1) if bias else weights)
    return sum(rows[1:], rows[0])


def _places(indices: Sequence[int], of: Tensor) -> slice | Tensor:
    """Where these indices are, as a slice if they follow one another: that copies nothing."""
    first, m = indices[0], len(indices)
    if indices[-1] == first + m - 1 and list(indices) == list(range(first, first + m)):
        return slice(first, first + m)
    return torch.tensor(indices, device="cpu").to(of.device)

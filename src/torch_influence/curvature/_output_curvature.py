"""Bᵢ, the curvature of a mean loss at each example's outputs, in one of three forms: softmax, blocks, graphs."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_influence.curvature._double_backward import Linearized
from torch_influence.ops import linear_curvature_product, softmax_curvature


class OutputCurvature(abc.ABC):
    """The curvatures Bᵢ [c, c] at the outputs of n examples, with the mean's 1/n.

    Attributes:
        form: what there is, in words.
        nbytes: of all that is kept.
        explicit: whether single entries are known.
    """

    form: str
    nbytes: int
    explicit = True

    @abc.abstractmethod
    def product(self, x: Tensor, rows: Tensor, bias: bool) -> Tensor:
        """Σᵢ (Bᵢ ⊗ x̃ᵢx̃ᵢᵀ) times rows [k, d], for inputs x [n, f] of the layer."""

    @abc.abstractmethod
    def apply(self, t: Tensor, first: int) -> Tensor:
        """Bᵢ tᵢ for tangents t [k, b, c] of examples from ``first`` on; where single entries are known."""

    @abc.abstractmethod
    def entry(self, a: int, b: int, first: int, last: int) -> Tensor:
        """Element (a, b) of every B of examples first .. last - 1; where single entries are known."""

    @abc.abstractmethod
    def of(self, which: slice | Tensor, n: int, size: int) -> OutputCurvature:
        """Returns the curvatures for the mean over ``size`` examples, of n."""

    @abc.abstractmethod
    def joined(self, others: Sequence[OutputCurvature]) -> OutputCurvature:
        """These examples, and then those of others of the same form."""


class Softmax(OutputCurvature):
    """Bᵢ = wᵢ (diag(pᵢ) − pᵢ pᵢᵀ), by the probabilities pᵢ [n, c] and weights wᵢ [n]."""

    form = "the probabilities of softmax"

    def __init__(self, probabilities: Tensor, weights: Tensor) -> None:
        self.probabilities, self.weights = probabilities, weights
        self.nbytes = probabilities.nbytes + weights.nbytes

    def product(self, x: Tensor, rows: Tensor, bias: bool) -> Tensor:
        return linear_curvature_product(x, rows, self.probabilities, self.weights, bias)

    def apply(self, t: Tensor, first: int) -> Tensor:
        which = slice(first, first + t.shape[1])
        return softmax_curvature(self.probabilities[which], t, self.weights[which])

    def entry(self, a: int, b: int, first: int, last: int) -> Tensor:
        p, w = self.probabilities[first:last], self.weights[first:last]
        return w * (p[:, a] * (1 - p[:, a]) if a == b else -p[:, a] * p[:, b])

    def of(self, which: slice | Tensor, n: int, size: int) -> Softmax:
        return Softmax(rows_of(self.probabilities, which), rows_of(self.weights, which) * (n / size))

    def joined(self, others: Sequence[OutputCurvature]) -> Softmax:
        parts = [self, *(other for other in others if isinstance(other, Softmax))]
        return Softmax(torch.cat([part.probabilities for part in parts]), torch.cat([part.weights for part in parts]))


class Blocks(OutputCurvature):
    """Bᵢ as they are, [n, c, c]."""

    form = "a block per example"

    def __init__(self, blocks: Tensor) -> None:
        self.blocks = blocks
        self.nbytes = blocks.nbytes

    def product(self, x: Tensor, rows: Tensor, bias: bool) -> Tensor:
        return linear_curvature_product(x, rows, self.blocks, None, bias)

    def apply(self, t: Tensor, first: int) -> Tensor:
        return torch.einsum("nab,knb->kna", self.blocks[first : first + t.shape[1]], t)

    def entry(self, a: int, b: int, first: int, last: int) -> Tensor:
        return self.blocks[first:last, a, b]

    def of(self, which: slice | Tensor, n: int, size: int) -> Blocks:
        return Blocks(rows_of(self.blocks, which) * (n / size))

    def joined(self, others: Sequence[OutputCurvature]) -> Blocks:
        return Blocks(torch.cat([self.blocks, *(other.blocks for other in others if isinstance(other, Blocks))]))


class Graphs(OutputCurvature):
    """Bᵢ by graphs from the outputs to the loss, of batches of examples in order, each with its number of examples."""

    form, explicit = "graphs", False

    def __init__(self, graphs: Sequence[tuple[Linearized, int]]) -> None:
        self.graphs = graphs
        self.nbytes = sum(graph.nbytes for graph, _ in graphs)

    def product(self, x: Tensor, rows: Tensor, bias: bool) -> Tensor:
        c = rows.shape[1] // (x.shape[1] + bias)
        columns = rows[:, : c * x.shape[1]].reshape(len(rows), c, x.shape[1])
        product, sums = torch.zeros_like(columns), rows.new_zeros(len(rows), c)
        for (graph, size), some in zip(self.graphs, x.split([size for _, size in self.graphs]), strict=True):
            some = some.to(rows.dtype)
            t = some @ columns.mT + (rows[:, None, c * x.shape[1] :] if bias else 0)
            s = graph.product([t])[0].to(rows.dtype).mul_(size / len(x))
            product += s.mT @ some
            sums += s.sum(dim=1)
        return torch.cat([product.flatten(1), sums], dim=1) if bias else product.flatten(1)

    def apply(self, t: Tensor, first: int) -> Tensor:
        raise NotImplementedError("graphs are of batches; see ``explicit``")

    def entry(self, a: int, b: int, first: int, last: int) -> Tensor:
        raise NotImplementedError("graphs know no single entries; see ``explicit``")

    def of(self, which: slice | Tensor, n: int, size: int) -> Graphs:
        """The graph of the batch that ``which``, a slice, begins."""
        first = which.start if isinstance(which, slice) else int(which[0])
        return Graphs([self.graphs[first // self.graphs[0][1]]])

    def joined(self, others: Sequence[OutputCurvature]) -> Graphs:
        parts = [self, *(other for other in others if isinstance(other, Graphs))]
        return Graphs([graph for part in parts for graph in part.graphs])


def rows_of(t: Tensor, which: slice | Tensor) -> Tensor:
    """Some rows of a tensor; those of a slice without a copy."""
    return t[which] if isinstance(which, slice) else t.index_select(0, which)

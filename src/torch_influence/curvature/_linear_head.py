"""The curvature of a loss in the parameters of one linear layer, in closed form."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torch_influence.batches import Batches
from torch_influence.curvature._curvature import Curvature
from torch_influence.curvature._double_backward import DoubleBackward
from torch_influence.curvature._doubts import SecondDerivative, doubts
from torch_influence.curvature._dual import check_products, cost_of, gram_matrix, refuse_beyond, ridge_and, root
from torch_influence.curvature._output_curvature import OutputCurvature, rows_of
from torch_influence.gradients import OuterProducts
from torch_influence.linop import Dual, DualCost, LinearOperator
from torch_influence.plan import NotPossible

_TILE_BYTES = 64 * 2**20  # scratch of the dense matrix's assembly
_INDICES_AT_ONCE = 2**16  # of drawn examples that are copied to the device together: 512 KiB


class LinearHead(Curvature):
    """Σᵢ Bᵢ ⊗ x̃ᵢx̃ᵢᵀ + ∇²reg, for one linear layer z = W x + b that every example passes once.

    x̃ᵢ = (xᵢ, 1) are the layer's inputs and Bᵢ [c, c] the curvature of the mean training loss at example i's outputs zᵢ,
    exact or Gauss-Newton, by differentiating whatever follows the layer. As z is linear in the layer's parameters this
    is all there is of the curvature, so products need neither the model nor a graph.

    Cost: a product is one pass over x. Memory: the inputs, and n c² numbers for the blocks, or n c for softmax.

    Attributes:
        x: the layer's inputs [n, f].
        at_outputs: the curvatures Bᵢ.
        bias: whether the layer's bias is among the parameters.
        examples: the gradients of single examples, as far as they are known.
        kept_bytes: of the inputs, the curvatures, and the examples' gradients.
    """

    title = "linear head"

    def __init__(self, plain: DoubleBackward, x: Tensor, at_outputs: OutputCurvature, c: int) -> None:
        super().__init__(plain.evaluation, plain.batches, plain.device, plain.budget, plain.told)
        self.plain = plain
        self.x = x
        self.at_outputs = at_outputs
        self.c = c
        self.bias = plain.size > c * x.shape[1]
        self.kept_bytes = x.nbytes + at_outputs.nbytes
        self.examples = OuterProducts(x, c, self.bias, plain.budget - self.kept_bytes)
        self.kept_bytes += self.examples.nbytes

    @property
    def operations(self) -> float:
        """Additions and multiplications of a product with one row."""
        n, f = self.x.shape
        return 4.0 * n * self.c * (f + self.c)

    @property
    def operations_of_dense(self) -> float:
        """Counts the additions and multiplications of ``dense``."""
        if not self.at_outputs.explicit:
            return super().operations_of_dense
        n, f = self.x.shape
        return float(n) * (f + 1) ** 2 * self.c * (self.c + 1) / 2  # by halves

    @property
    def operations_of_minibatch(self) -> float:
        """Counts the additions and multiplications of a minibatch's product with one row."""
        return self.operations * min(self.batches.batch_size or 1, self.batches.n) / self.batches.n

    @property
    def least(self) -> float | None:
        """That of the plain curvature."""
        return self.plain.least

    def describe(self) -> str:
        """The path, in words."""
        return f"linear head in closed form, by {self.at_outputs.form}"

    def product(self, rows: Tensor) -> Tensor:
        self.plain.batches.pass_by()
        return self._regularized(self.at_outputs.product(self.x, rows, self.bias), rows)

    def of(self, which: slice | Tensor, size: int, rows: Tensor) -> Tensor:
        """The product with the curvature of the mean over some examples."""
        some = self.at_outputs.of(which, len(self.x), size)
        return self._regularized(some.product(rows_of(self.x, which), rows, self.bias), rows)

    def diagonal(self) -> Tensor | None:
        """Σᵢ (Bᵢ)ₐₐ x̃ᵢⱼ² for the weight of output a and input j, and the regulariser's."""
        extra = self.plain.regularizer
        if not (self.at_outputs.explicit and (extra is None or extra.diagonal)):
            return None
        self.plain.batches.pass_by()
        n, f = self.x.shape
        weights = torch.zeros(self.c, f, dtype=self.dtype, device=self.device)
        biases = torch.zeros(self.c, dtype=self.dtype, device=self.device)
        at_once = max(1, _TILE_BYTES // (8 * (f + self.c)))
        for first in range(0, n, at_once):
            squares = self.x[first : first + at_once].to(self.dtype).square()
            entries = torch.stack([self.at_outputs.entry(a, a, first, first + at_once) for a in range(self.c)])
            weights.addmm_(entries.to(self.dtype), squares)
            biases += entries.sum(dim=1)
        whole = torch.cat([weights.flatten(), biases])[None, : self.size]
        return self._regularized(whole, torch.ones_like(whole))[0]

    def dense(self) -> Tensor:
        """Assembles the matrix from Gram matrices X̃ᵀ diag(B_ab) X̃, one for each pair of outputs a <= b."""
        if not self.at_outputs.explicit:
            return super().dense()
        self.plain.batches.pass_by()
        n, f = self.x.shape
        matrix = torch.zeros(self.size, self.size, dtype=self.dtype, device=self.device)
        at_once = max(1, _TILE_BYTES // (8 * (f + 1)))
        gram = torch.empty(f + self.bias, f + self.bias, dtype=self.dtype, device=self.device)
        for first in range(0, n, at_once):
            x = self.x[first : first + at_once].to(self.dtype)
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1) if self.bias else x
            weighted = torch.empty_like(x)
            for a in range(self.c):
                for b in range(a, self.c):
                    torch.mul(x, self.at_outputs.entry(a, b, first, first + at_once)[:, None], out=weighted)
                    gram_matrix(x, weighted, gram)
                    self._add(matrix, a, b, gram)
        for first in range(0, self.size, 256):
            rows = matrix[first : first + 256]
            unit = torch.zeros_like(rows)
            unit.diagonal(first).fill_(1)
            self._regularized(rows, unit)
        return matrix

    def sampled(self, steps: int, generator: torch.Generator | None) -> Iterator[LinearOperator]:
        """``steps`` estimates, by the minibatches that the plain curvature would draw.

        Many minibatches are drawn ahead, and their indices copied to the device at once. From a generator of the user's
        each is drawn when its step comes, as the plain curvature does: others may draw from it between two steps.
        """
        if not self.at_outputs.explicit or self.plain.why_not_grouped:
            yield from self.plain.sampled(steps, generator)
            return
        batches = self.plain.batches
        draws = batches.draw(steps, generator=generator)
        at_once = 1 if generator is not None else max(1, _INDICES_AT_ONCE // (batches.batch_size or 1))
        while some := list(itertools.islice(draws, at_once)):
            indices = torch.tensor(list(itertools.chain(*some)), device="cpu").to(self.device, non_blocking=True)
            for which in indices.split([len(drawn) for drawn in some]):
                yield _OfExamples(self, which)

    def dual(self, shift: float, room: float) -> Dual:
        """GᵀG + rI with rows of G Bᵢᵀ ⊗ x̃ᵢᵀ; costs a product."""
        refuse_beyond(self.dual_cost(shift), room)
        n, c = len(self.x), self.c
        with self.evaluation.session(), self.batches.quietly():
            rows = [torch.stack([self.at_outputs.entry(a, b, 0, n) for b in range(c)], dim=1) for a in range(c)]
            found = _DualOfHead(self, root(torch.stack(rows, dim=1), self.evaluation.space.pass_dtype))
            check_products(found, self)
        return found

    def dual_cost(self, shift: float) -> DualCost:
        """Costs nothing to know."""
        if not self.at_outputs.explicit:
            raise NotPossible("the curvature at the outputs has no room as a block per example; see cache=")
        ridge_and(shift, self.plain.ridge)
        (n, f), c = self.x.shape, self.c
        m = n * c
        return cost_of(self, m, c, n * n, float(n) * n * f + 2.0 * m * m * c, 4.0 * m * f)

    def narrowed(self, dtype: torch.dtype) -> LinearOperator:
        if not self.at_outputs.explicit:
            raise NotPossible("the curvature at the outputs is known by graphs only")
        return _Narrow(self, dtype)

    def doubts(self, room: float) -> list[Warning]:
        return doubts(self.plain, self, room)

    def losses_hold(self) -> bool | None:
        return self.plain.losses_hold()

    def from_definition(self, row: Tensor, batches: Batches) -> tuple[Tensor, float]:
        return self.plain.from_definition(row, batches)

    def second_derivative(self, batch: Any) -> SecondDerivative:
        return self.plain.second_derivative(batch)

    def _regularized(self, product: Tensor, rows: Tensor) -> Tensor:
        extra = self.plain.regularizer
        return product if extra is None else extra(product, rows)

    def _add(self, matrix: Tensor, a: int, b: int, gram: Tensor) -> None:
        """A gram matrix, symmetric, stands for the outputs (a, b) and (b, a); biases come after all weights."""
        f, c = self.x.shape[1], self.c
        for i, j in {(a, b), (b, a)}:
            matrix[i * f : (i + 1) * f, j * f : (j + 1) * f] += gram[:f, :f]
            if self.bias:
                matrix[i * f : (i + 1) * f, c * f + j] += gram[:f, f]
                matrix[c * f + i, j * f : (j + 1) * f] += gram[f, :f]
                matrix[c * f + i, c * f + j] += gram[f, f]


class _OfExamples(LinearOperator):
    """The curvature of the mean over some examples, one of them possibly several times."""

    def __init__(self, head: LinearHead, indices: Tensor) -> None:
        self._head, self._indices = head, indices
        self.size, self.dtype, self.device = head.size, head.dtype, head.device

    def product(self, rows: Tensor) -> Tensor:
        return self._head.of(self._indices, len(self._indices), rows)


class _Narrow(LinearOperator):
    """The curvature of a head by products of matrices in a narrower dtype; what is between and the sums keep theirs."""

    def __init__(self, head: LinearHead, dtype: torch.dtype) -> None:
        self._head, self._x = head, head.x.to(dtype)
        self.size, self.dtype, self.device = head.size, head.dtype, head.device

    def product(self, rows: Tensor) -> Tensor:
        head, k, (n, f), c = self._head, len(rows), self._x.shape, self._head.c
        head.plain.batches.pass_by()
        columns = rows[:, : c * f].reshape(k * c, f).to(self._x.dtype)
        product, sums = rows.new_zeros(k * c, f), rows.new_zeros(k, c)
        at_once = max(1, _TILE_BYTES // (16 * max(k * c, 1)))
        for first in range(0, n, at_once):
            x = self._x[first : first + at_once]
            t = (x @ columns.mT).to(rows.dtype).view(len(x), k, c).transpose(0, 1)
            if head.bias:
                t = t + rows[:, None, c * f :]
            s = head.at_outputs.apply(t, first)
            product += s.to(x.dtype).transpose(0, 1).reshape(len(x), k * c).mT @ x
            sums += s.sum(dim=1)
        whole = torch.cat([product.view(k, c * f), sums], dim=1) if head.bias else product.view(k, c * f)
        return head._regularized(whole, rows)


class _DualOfHead(Dual):
    """Rows of G are Bᵢᵀ ⊗ x̃ᵢᵀ, so that G Gᵀ has the blocks (x̃ᵢ·x̃ⱼ) BᵢᵀBⱼ.

    Cost: the kernel n² f + m² c multiplications; a row pushed or pulled n c f.
    """

    def __init__(self, head: LinearHead, root: Tensor) -> None:
        self.head, self.root = head, root
        self.multiple = head.plain.ridge or 0.0
        self.rank = root.shape[0] * root.shape[2]
        self.size, self.dtype, self.device = head.size, head.dtype, head.device

    def product(self, rows: Tensor) -> Tensor:
        return self.head.product(rows)

    def push(self, rows: Tensor) -> Tensor:
        x, k, c = self.head.x.to(self.dtype), len(rows), self.head.c
        weights, biases = rows.split([c * x.shape[1], self.size - c * x.shape[1]], dim=1)
        outputs = (weights.reshape(k * c, x.shape[1]) @ x.mT).view(k, c, len(x))
        if self.head.bias:
            outputs += biases[:, :, None]
        return torch.einsum("kcn,ncr->knr", outputs, self.root).reshape(k, self.rank)

    def pull(self, rows: Tensor) -> Tensor:
        x, (n, c, r), k = self.head.x.to(self.dtype), self.root.shape, len(rows)
        outputs = torch.einsum("knr,ncr->kcn", rows.reshape(k, n, r), self.root)
        weights = (outputs.reshape(k * c, n) @ x).view(k, c * x.shape[1])
        return torch.cat([weights, outputs.sum(dim=2)], dim=1) if self.head.bias else weights

    def assemble(self) -> Tensor:
        x, (n, c, r) = self.head.x.to(self.dtype), self.root.shape
        gram = x.new_empty(n, n)
        gram_matrix(x.mT, x.mT, gram)
        if self.head.bias:
            gram += 1
        columns = self.root.mT.reshape(n * r, c)
        kernel = columns @ columns.mT
        kernel.view(n, r, n, r).mul_(gram[:, None, :, None])
        return kernel

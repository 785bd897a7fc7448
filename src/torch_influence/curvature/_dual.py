"""Curvatures JᵀHJ + rI of fewer outputs than parameters as GᵀG + rI, G = BᵀJ and BBᵀ = H."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from torch_influence.curvature._base import Curvature
from torch_influence.curvature._gauss_newton import GaussNewton, rows_and_columns
from torch_influence.curvature._linear_head import LinearHead, _gram
from torch_influence.linop import Dual, probe_rows
from torch_influence.plan import agree


@dataclasses.dataclass(frozen=True)
class DualCost:
    """What a dual solve takes, known before anything is computed.

    Attributes:
        rank: m, the outputs of all examples; fewer where the curvature at the outputs is singular.
        nbytes: memory at the most: three [m, m] matrices, G where it is kept, and what they are made of.
        operations: additions and multiplications for the kernel and its factor, once.
        operations_per_row: those for a right-hand side, with one round of refinement.
    """

    rank: int
    nbytes: int
    operations: float
    operations_per_row: float


def dual_cost(curvature: Curvature | LinearHead, damp: float) -> DualCost | str:
    """What solves by the dual system take, or why there can be none, as far as is seen without computing it.

    Args:
        curvature: undamped.
        damp: what it will be damped with.

    Cost: linear heads, nothing; others, the outputs of one batch, and once a product with it.
    """
    if isinstance(curvature, LinearHead):
        if curvature.at_outputs.graphs:
            return "the curvature at the outputs has no room as a block per example; see cache="
        plain, (n, f), c = curvature.plain, curvature.x.shape, curvature.c
        m = n * c
        scratch, once, per_row = n * n, float(n) * n * f + 2.0 * m * m * c, 4.0 * m * f
    elif isinstance(curvature, GaussNewton):
        plain = curvature
        with plain.evaluation.session(), plain.batches.quietly():
            plain.prepare()
            examples = range(min(plain.batches.batch_size or 1, plain.batches.n))
            batch = plain.evaluation.batch_for("train_loss", plain.batches.peek(examples))
            b, c = rows_and_columns(plain.outputs(plain.leaves, batch))
            m = -(-b * plain.batches.n // len(examples)) * c
            # Each row of G is a sweep back through a batch; a product with one row is about three through all of them.
            sweep = plain.operations / 3 * (len(examples) if plain.why_not_grouped else 1) / plain.batches.n
        scratch, once, per_row = m * plain.size, m * sweep + float(m) * m * plain.size, 4.0 * m * plain.size
    else:
        return "a Hessian that is not that of a linear head has no dual; that of gnh=True has"
    if plain.ridge is None:
        return "the regulariser's Hessian is no multiple of the identity"
    if not plain.ridge + damp > 0:
        return f"damping plus regulariser, {plain.ridge + damp:g}, is not positive; a larger damp makes it so"
    return DualCost(
        rank=m,
        nbytes=(3 * m * m + scratch) * (torch.finfo(plain.dtype).bits // 8) + 3 * 8 * m * c,
        operations=m**3 / 3 + once + 10.0 * m * c * c,
        operations_per_row=2 * (per_row + 2.0 * m * m + curvature.operations),
    )


def dual(curvature: Curvature | LinearHead, *, damp: float, room: float) -> Dual | str:
    """The curvature as GᵀG + rI, or why it is none.

    H has a block for each row of a batch's outputs (for each example, mostly). Eigenvalues of blocks that are rounding
    are taken for zero. A product with a random row is compared with the plain one: a loss that joins examples differs.

    Args:
        curvature: undamped. What is returned is good for as long as it is.
        damp: what it will be damped with first; the kernel serves any damping with which the sum stays positive.
        room: bytes for all that ``DualCost.nbytes`` counts.

    Cost: linear heads, a product. Others: the curvature at the outputs, a pass with c rows; G, one row of d at a time
    pulled back through its example, or its batch where batches can't be regrouped; a product. The kernel is made when
    first needed.
    """
    cost = dual_cost(curvature, damp)
    if isinstance(cost, str):
        return cost
    if cost.nbytes > room:
        return (
            f"{cost.rank:,} outputs of all examples would take about {cost.nbytes:,} bytes; {int(room):,} may be used"
        )
    plain = curvature.plain if isinstance(curvature, LinearHead) else curvature
    with plain.evaluation.session(), plain.batches.quietly():
        found = _of_head(curvature) if isinstance(curvature, LinearHead) else _of_batches(curvature)
        if isinstance(found, str):
            return found
        row = probe_rows(1, plain.size, dtype=plain.dtype, device=plain.device)
        product = found.pull(found.push(row)).add_(row, alpha=found.multiple)
        if not agree(product, curvature.product(row), plain.evaluation.space.pass_dtype):
            return "a product with it differs from the plain one: the loss may join the outputs of different examples"
    return found


def _of_head(head: LinearHead) -> Dual | str:
    n, c = len(head.x), head.c
    rows = [torch.stack([head.at_outputs.entry(a, b, 0, n) for b in range(c)], dim=1) for a in range(c)]
    root = _root(torch.stack(rows, dim=1), head.plain.evaluation.space.pass_dtype)
    return root if isinstance(root, str) else _OfHead(head, root)


def _of_batches(plain: Curvature) -> Dual | str:
    assert isinstance(plain, GaussNewton)  # else dual_cost has said why not
    blocks = _blocks_of_batches(plain)
    root = blocks if isinstance(blocks, str) else _root(torch.cat(blocks), plain.evaluation.space.pass_dtype)
    matrix = root if isinstance(root, str) else _rows(plain, root)
    return matrix if isinstance(matrix, str) else _OfRows(plain, matrix)


class _OfHead(Dual):
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
        _gram(x.mT, x.mT, gram)
        if self.head.bias:
            gram += 1
        columns = self.root.mT.reshape(n * r, c)
        kernel = columns @ columns.mT
        kernel.view(n, r, n, r).mul_(gram[:, None, :, None])
        return kernel


class _OfRows(Dual):
    """With G in memory."""

    def __init__(self, plain: GaussNewton, matrix: Tensor) -> None:
        self.plain, self.matrix = plain, matrix
        self.multiple = plain.ridge or 0.0
        self.rank = len(matrix)
        self.size, self.dtype, self.device = plain.size, plain.dtype, plain.device

    def product(self, rows: Tensor) -> Tensor:
        return self.plain.product(rows)

    def push(self, rows: Tensor) -> Tensor:
        return rows @ self.matrix.mT

    def pull(self, rows: Tensor) -> Tensor:
        return rows @ self.matrix

    def assemble(self) -> Tensor:
        columns = self.matrix.mT
        kernel = self.matrix.new_empty(self.rank, self.rank)
        _gram(columns, columns, kernel)
        return kernel


def _rows(plain: GaussNewton, root: Tensor) -> Tensor | str:
    """G = BᵀJ [N r, d].

    A row is pulled back through all of a batch, though it is of one example: so batches of one, where it was seen that
    they mean the same.
    """
    count, c, r = root.shape
    matrix = torch.empty(count * r, plain.size, dtype=plain.dtype, device=plain.device)
    first = 0
    for batch, _ in plain.batches.read(None, plain.batch_size if plain.why_not_grouped else 1):
        outputs = plain.outputs(plain.leaves, plain.evaluation.batch_for("train_loss", batch))
        b, columns = rows_and_columns(outputs)
        if columns != c or first + b > count:
            return "the outputs of one example differ in shape from those of many"
        cotangents = root.new_zeros(b, r, b, c)
        each = torch.arange(b, device=root.device)
        cotangents[each, :, each] = root[first : first + b].mT
        pulled = plain.pulled(plain.leaves, outputs, cotangents.reshape(b * r, *outputs.shape))
        matrix[first * r : (first + b) * r] = pulled
        first += b
    return matrix if first == count else "the outputs of one example differ in number from those of many"


# -- the curvature at the outputs -------------------------------------------------------------------------------------


def _blocks_of_batches(plain: GaussNewton) -> list[Tensor] | str:
    """Of every batch [rows, c, c], with its share in the mean."""
    blocks: list[Tensor] = []
    for batch, size in plain.batches.read(None, plain.batch_size):
        blocks.append(plain.output_blocks(plain.leaves, batch).mul_(size / plain.batches.n))
        if blocks[-1].shape[1:] != blocks[0].shape[1:]:
            return "the outputs of different batches differ in shape"
    return blocks


def _root(blocks: Tensor, dtype: torch.dtype) -> Tensor | str:
    """B [N, c, r] with B Bᵀ = H [N, c, c], r the largest rank of a block; ``dtype`` of the passes that H comes from."""
    if not blocks.isfinite().all():
        return "the curvature at the outputs is not finite"
    values, vectors = torch.linalg.eigh(blocks.double().add(blocks.double().mT).mul_(0.5))
    largest, smallest, eps = float(values.max()), float(values.min()), torch.finfo(dtype).eps
    # Rounding in a block may be larger than its eigenvalues where it stems from numbers that cancel.
    if smallest < -(eps**0.5) * largest:
        return (
            f"the curvature at the outputs has negative eigenvalues: {smallest:.3g}, where the largest is {largest:.3g}"
        )
    kept = (values > blocks.shape[2] * eps * largest).any(dim=0)
    return (vectors[:, :, kept] * values[:, kept].clamp(min=0).sqrt()[:, None]).to(blocks.dtype)

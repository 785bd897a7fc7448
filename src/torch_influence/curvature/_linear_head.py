"""The curvature of a loss in the parameters of one linear layer, in closed form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from torch_influence.capture import Calls, cut, linear_layer
from torch_influence.curvature._base import Curvature, Linearized
from torch_influence.gradients import loss_gradient
from torch_influence.linop import LinearOperator, probe_rows
from torch_influence.ops import linear_curvature_product, softmax_curvature
from torch_influence.plan import agree

_TILE_BYTES = 64 * 2**20  # scratch of the dense matrix's assembly
_COLUMNS_OF_GRAM = 512  # from here on halving a Gram matrix saves more time than smaller products lose


@dataclasses.dataclass(frozen=True)
class OutputCurvature:
    """Bᵢ, the curvature of a mean loss at each example's outputs, in one of three forms.

    Attributes:
        probabilities: pᵢ [n, c] where Bᵢ = wᵢ (diag(pᵢ) − pᵢ pᵢᵀ).
        weights: wᵢ [n], with the mean's 1/n.
        blocks: Bᵢ [n, c, c].
        graphs: of batches of examples, in order, and how many examples they have.
    """

    probabilities: Tensor | None = None
    weights: Tensor | None = None
    blocks: Tensor | None = None
    graphs: Sequence[tuple[Linearized, int]] = ()

    @property
    def nbytes(self) -> int:
        """Of all that is kept."""
        tensors = [t for t in (self.probabilities, self.weights, self.blocks) if t is not None]
        return sum(t.nbytes for t in tensors) + sum(graph.nbytes for graph, _ in self.graphs)

    @property
    def form(self) -> str:
        """What there is, in words."""
        if self.probabilities is not None:
            return "the probabilities of softmax"
        return "graphs" if self.blocks is None else "a block per example"

    def product(self, x: Tensor, rows: Tensor, bias: bool) -> Tensor:
        """Σᵢ (Bᵢ ⊗ x̃ᵢx̃ᵢᵀ) times rows [k, d], for inputs x [n, f] of the layer."""
        if not self.graphs:
            values = self.blocks if self.probabilities is None else self.probabilities
            assert values is not None  # one of the three
            return linear_curvature_product(x, rows, values, self.weights, bias)
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

    def entry(self, a: int, b: int, first: int, last: int) -> Tensor:
        """Element (a, b) of every B of examples first .. last - 1."""
        if self.blocks is not None:
            return self.blocks[first:last, a, b]
        assert self.probabilities is not None
        assert self.weights is not None
        p, w = self.probabilities[first:last], self.weights[first:last]
        return w * (p[:, a] * (1 - p[:, a]) if a == b else -p[:, a] * p[:, b])

    def of(self, which: slice | Tensor, n: int, size: int) -> OutputCurvature:
        """The same for the mean over ``size`` examples, of n; those of one batch where there are graphs."""
        if self.graphs:
            assert isinstance(which, slice)
            return OutputCurvature(graphs=[self.graphs[which.start // self.graphs[0][1]]])
        if self.blocks is not None:
            return OutputCurvature(blocks=_rows(self.blocks, which) * (n / size))
        assert self.probabilities is not None
        assert self.weights is not None
        return OutputCurvature(_rows(self.probabilities, which), _rows(self.weights, which) * (n / size))


class LinearHead(LinearOperator):
    """Σᵢ Bᵢ ⊗ x̃ᵢx̃ᵢᵀ + ∇²reg, for one linear layer z = W x + b that every example passes once.

    x̃ᵢ = (xᵢ, 1) are the layer's inputs and Bᵢ [c, c] the curvature of the mean training loss at example i's outputs zᵢ,
    exact or Gauss-Newton, by differentiating whatever follows the layer. As z is linear in the layer's parameters this
    is all there is of the curvature, so products need neither the model nor a graph.

    Cost: a product is one pass over x. Memory: the inputs, and n c² numbers for the blocks, or n c for softmax.

    Attributes:
        x: the layer's inputs [n, f].
        at_outputs: the curvatures Bᵢ.
        bias: whether the layer's bias is among the parameters.
        kept_bytes: of the inputs and the curvatures.
    """

    def __init__(self, plain: Curvature, x: Tensor, at_outputs: OutputCurvature, c: int) -> None:
        self.plain = plain
        self.x = x
        self.at_outputs = at_outputs
        self.c = c
        self.bias = plain.size > c * x.shape[1]
        self.size, self.dtype, self.device = plain.size, plain.dtype, plain.device
        self.kept_bytes = x.nbytes + at_outputs.nbytes

    @property
    def operations(self) -> float:
        """Additions and multiplications of a product with one row."""
        n, f = self.x.shape
        return 4.0 * n * self.c * (f + self.c)

    @property
    def operations_of_dense(self) -> float:
        """Those of ``dense``."""
        if self.at_outputs.graphs:
            return self.operations * self.size
        n, f = self.x.shape
        return float(n) * (f + 1) ** 2 * self.c * (self.c + 1) / 2  # by halves

    def describe(self) -> str:
        """The path, in words."""
        return f"linear head in closed form, by {self.at_outputs.form}"

    def product(self, rows: Tensor) -> Tensor:
        self.plain.batches.pass_by()
        return self._regularized(self.at_outputs.product(self.x, rows, self.bias), rows)

    def of(self, which: slice | Tensor, size: int, rows: Tensor) -> Tensor:
        """The product with the curvature of the mean over some examples."""
        some = self.at_outputs.of(which, len(self.x), size)
        return self._regularized(some.product(_rows(self.x, which), rows, self.bias), rows)

    def diagonal(self) -> Tensor | None:
        """Σᵢ (Bᵢ)ₐₐ x̃ᵢⱼ² for the weight of output a and input j, and the regulariser's."""
        extra = self.plain.regularizer
        if self.at_outputs.graphs or not (extra is None or extra.diagonal):
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
        """From Gram matrices X̃ᵀ diag(B_ab) X̃, one for each pair of outputs a <= b."""
        if self.at_outputs.graphs:
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
                    _gram(x, weighted, gram)
                    self._add(matrix, a, b, gram)
        for first in range(0, self.size, 256):
            rows = matrix[first : first + 256]
            unit = torch.zeros_like(rows)
            unit.diagonal(first).fill_(1)
            self._regularized(rows, unit)
        return matrix

    def sampled(self, steps: int, generator: torch.Generator | None) -> Iterator[LinearOperator]:
        """``steps`` estimates, by the minibatches that the plain curvature would draw."""
        if self.at_outputs.graphs or self.plain.why_not_grouped:
            yield from self.plain.sampled(steps, generator)
            return
        for indices in self.plain.batches.draw(steps, generator=generator):
            yield _OfExamples(self, torch.tensor(indices, device=self.device))

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


def _gram(x: Tensor, weighted: Tensor, out: Tensor) -> None:
    """Xᵀ diag(w) X, of x and its rows times w, exactly symmetric: what is below the diagonal mirrors what is above."""
    f = x.shape[1]
    if f <= _COLUMNS_OF_GRAM:
        torch.mm(x.mT, weighted, out=out)
        out.add_(out.mT.clone()).mul_(0.5)
        return
    one, other = slice(f // 2), slice(f // 2, f)
    _gram(x[:, one], weighted[:, one], out[one, one])
    _gram(x[:, other], weighted[:, other], out[other, other])
    torch.mm(x[:, one].mT, weighted[:, other], out=out[one, other])
    out[other, one] = out[one, other].mT


def _rows(t: Tensor, which: slice | Tensor) -> Tensor:
    return t[which] if isinstance(which, slice) else t.index_select(0, which)


class _OfExamples(LinearOperator):
    """The curvature of the mean over some examples, one of them possibly several times."""

    def __init__(self, head: LinearHead, indices: Tensor) -> None:
        self._head, self._indices = head, indices
        self.size, self.dtype, self.device = head.size, head.dtype, head.device

    def product(self, rows: Tensor) -> Tensor:
        return self._head.of(self._indices, len(self._indices), rows)


# ---- capturing ------------------------------------------------------------------------------------------------------


class _NotAHeadError(Exception):
    """Why the curvature has no closed form."""


def linear_head(plain: Curvature, streamed: bool = True) -> LinearHead | str:
    """The closed form of a curvature, or why there is none.

    Every batch's gradient from what was captured is compared with the plain one, and products with the curvature of the
    first and the last batch with plain ones: a model that uses the layer's parameters in another way, or a loss that
    joins examples, differs.

    Data that are too large to be kept are read once more; the layer's inputs often take far less. With ``streamed``
    False that is not done.

    Cost: two evaluations of the data, and a backward pass from the loss to the layer for each of its outputs.
    """
    layer = linear_layer(plain.evaluation)
    if layer is None:
        return "the parameters are not those of one linear layer"
    if not plain.budget:
        return "nothing may be kept: cache=False"
    needed = plain.batches.n * layer.in_features * torch.finfo(plain.dtype).bits // 8
    if needed > plain.budget:
        return (
            f"the layer's inputs would take about {needed:,} bytes, and the budget is {int(plain.budget):,}; see cache="
        )
    with plain.evaluation.session(), plain.batches.quietly():
        plain.prepare()
        watched, generation = plain.batches.watched(), plain.batches.generation
        if not watched or (plain.batches.why_not_kept and not streamed):
            return f"the data are not kept: {plain.batches.why_not_kept}"
        captures = [_softmax, _blocks]
        while captures:
            try:
                head = _Capture(plain, layer).head(captures[0])
            except _NotAHeadError as why:
                reason = str(why)
                del captures[0]
                continue
            plain.batches.refresh()
            if plain.batches.generation != generation:
                return "the data changed while they were being read"
            if plain.concluded():
                return head
    return reason


class _Capture:
    """One pass over the data with the graph cut behind the layer."""

    def __init__(self, plain: Curvature, layer: torch.nn.Linear) -> None:
        self.plain, self.layer = plain, layer
        self.space, self.leaves = plain.evaluation.space, plain.leaves

    def head(self, output_curvature: Callable[[Linearized, Tensor, float, float], OutputCurvature]) -> LinearHead:
        plain = self.plain
        inputs: Tensor | None = None
        curvatures: list[OutputCurvature] = []
        n, done, kept = plain.batches.n, 0, 0
        shared = not plain.batches.why_not_kept
        for batch, size in plain.batches.read(None, plain.batch_size):
            calls, linearized = self._cut(batch, size)
            plain.saw(batch, size, linearized.loss, done)
            if not linearized.roots:
                raise _NotAHeadError("the loss of a batch depends on the parameters by the regulariser alone")
            (x,), (z,) = calls.inputs, calls.outputs
            self._compare_gradients(batch, x, linearized.gradient()[0])
            room = plain.budget / n - x.nbytes / size  # an example's, the same in each batch
            curvatures.append(output_curvature(linearized, z.detach(), size / n, room))
            kept += x.nbytes + curvatures[-1].nbytes
            if kept > plain.budget or (curvatures[-1].graphs and not shared):  # graphs hold on to their batches
                raise _NotAHeadError(f"its closed form takes more than the budget, {int(plain.budget):,}; see cache=")
            if inputs is None:
                inputs = x if size == n and shared else x.new_empty(n, x.shape[1])
            if inputs is not x:
                inputs[done : done + size] = x
            done += size
        assert inputs is not None  # there is at least one example
        head = LinearHead(plain, inputs, _joined(curvatures), z.shape[1])
        self._compare_products(head)
        return head

    def _cut(self, batch: object, size: int) -> tuple[Calls, Linearized]:
        with cut(self.layer) as calls:

            def outputs() -> list[Tensor]:
                if len(calls.outputs) != 1:
                    raise _NotAHeadError(f"a batch passes the linear layer {len(calls.outputs)} times, not once")
                (x,), (z,) = calls.inputs, calls.outputs
                if x.layout is not torch.strided or x.is_nested:
                    raise _NotAHeadError("the linear layer takes sparse or nested tensors")
                if x.dim() != 2 or z.dim() != 2 or len(z) != size:
                    raise _NotAHeadError(
                        f"the linear layer takes {list(x.shape)} for {size} examples, not a row for each"
                    )
                if torch.promote_types(x.dtype, torch.float32) != self.plain.dtype:
                    raise _NotAHeadError(f"the linear layer takes {x.dtype}, and its parameters are {self.plain.dtype}")
                return calls.outputs

            return calls, self.plain.linearize(batch, self.leaves, at=outputs)

    def _compare_gradients(self, batch: object, x: Tensor, g: Tensor) -> None:
        x, g = x.to(self.plain.dtype), g.to(self.plain.dtype)
        captured = torch.cat([(g.mT @ x).flatten(), g.sum(dim=0)])[: self.plain.size]
        plain = loss_gradient(self.plain.loss, self.space, self.leaves, batch)
        if not agree(captured[None], plain[None], self.space.pass_dtype):
            raise _NotAHeadError("the gradient through the linear layer's output is not all of the gradient")

    def _compare_products(self, head: LinearHead) -> None:
        plain, n, graphs = self.plain, self.plain.batches.n, head.at_outputs.graphs
        step = graphs[0][1] if graphs else plain.batches.batch_size or 1
        rows = probe_rows(2, plain.size, dtype=plain.dtype, device=plain.device)
        for first in {0, (n - 1) // step * step}:
            examples = range(first, min(first + step, n))
            expected = plain.batch_product(plain.batches.peek(examples), rows, self.leaves)
            actual = head.of(slice(examples.start, examples.stop), len(examples), rows)
            if not agree(actual, expected, self.space.pass_dtype):
                raise _NotAHeadError("products with the closed form differ from the plain ones")


def _softmax(linearized: Linearized, z: Tensor, share: float, room: float) -> OutputCurvature:
    """The curvature w (diag(p) − p pᵀ), p = softmax(z), if random tangents confirm it for every example."""
    if z.shape[1] == 1:
        raise _NotAHeadError("one output has no softmax")
    wide = torch.promote_types(z.dtype, torch.float32)
    p = z.to(wide).softmax(dim=-1)
    tangents = probe_rows(2, *z.shape, dtype=z.dtype, device=z.device)
    actual = linearized.product([tangents])[0].to(wide)
    softmax = softmax_curvature(p, tangents.to(wide))
    # The weights are the same for all, or each example's own; from one tangent, and tested with the other.
    dots, norms = (actual[0] * softmax[0]).double().sum(dim=-1), softmax[0].double().square().sum(dim=-1)
    for weights in ((dots.sum() / norms.sum()).expand(len(z)), dots / norms.clamp(min=torch.finfo(wide).tiny)):
        weights = weights.to(wide)
        expected = softmax * weights[:, None]
        # Nearly softmax is not softmax: what may differ is rounding, of sums over c outputs in three steps a side.
        fast, plain = (t.transpose(0, 1).flatten(1) for t in (expected, actual))
        if agree(fast, plain, z.dtype, operations=8 * (z.shape[1] + 8)):
            return OutputCurvature(p, weights * share)
    raise _NotAHeadError("the loss is not softmax cross-entropy of the outputs")


def _blocks(linearized: Linearized, z: Tensor, share: float, room: float) -> OutputCurvature:
    """Column j of every example's block at once, from the tangent that is 1 at output j of all examples."""
    (b, c), wide = z.shape, torch.promote_types(z.dtype, torch.float32)
    if c * c * torch.finfo(wide).bits // 8 > room:
        return OutputCurvature(graphs=[(linearized, b)])
    # And a random tangent, which tells entries outside of the blocks: a loss that joins examples, in this batch alone.
    random = probe_rows(1, z.numel(), dtype=z.dtype, device=z.device).view(1, b, c)
    tangents = torch.cat([torch.eye(c, dtype=z.dtype, device=z.device)[:, None].expand(c, b, c), random])
    products = linearized.product([tangents])[0]
    columns = products[:c]
    if not agree(torch.einsum("jbi,bj->bi", columns, random[0]), products[c], z.dtype):
        raise _NotAHeadError("products with the closed form differ: the loss joins the outputs of different examples")
    return OutputCurvature(blocks=columns.permute(1, 2, 0).to(wide).contiguous().mul_(share))


def _joined(parts: Sequence[OutputCurvature]) -> OutputCurvature:
    if parts[0].graphs:
        return OutputCurvature(graphs=[graph for part in parts for graph in part.graphs])
    if len(parts) == 1:
        return parts[0]
    if parts[0].blocks is not None:
        return OutputCurvature(blocks=torch.cat([part.blocks for part in parts if part.blocks is not None]))
    return OutputCurvature(
        torch.cat([part.probabilities for part in parts if part.probabilities is not None]),
        torch.cat([part.weights for part in parts if part.weights is not None]),
    )

"""Captures what a LinearHead is made of, in one pass over the data, and compares it with the plain curvature."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torch_influence.agreement import agree
from torch_influence.curvature._double_backward import DoubleBackward, Linearized
from torch_influence.curvature._linear_head import LinearHead
from torch_influence.curvature._output_curvature import Blocks, Graphs, OutputCurvature, Softmax
from torch_influence.evaluation import Calls, cut, linear_layer
from torch_influence.gradients import loss_gradient
from torch_influence.linop import probe_rows
from torch_influence.ops import softmax_curvature
from torch_influence.plan import NotPossible

_FEW = 4  # tangents


def linear_head(plain: DoubleBackward, streamed: bool = True) -> LinearHead:
    """The closed form of a curvature of one linear layer's parameters.

    Every batch's gradient from what was captured is compared with the plain one, and products with the curvature of the
    first and the last batch with plain ones: a model that uses the layer's parameters in another way, or a loss that
    joins examples, differs.

    Data that are too large to be kept are read once more; the layer's inputs often take far less. With ``streamed``
    False that is not done.

    Cost: two evaluations of the data, and a backward pass from the loss to the layer for each of its outputs.

    Raises:
        NotPossible: with the reason.
    """
    layer = linear_layer(plain.evaluation)
    if layer is None:
        raise NotPossible("the parameters are not those of one linear layer")
    if not plain.budget:
        raise NotPossible("nothing may be kept: cache=False")
    needed = plain.batches.n * layer.in_features * torch.finfo(plain.dtype).bits // 8
    if needed > plain.budget:
        raise NotPossible(
            f"the layer's inputs would take about {needed:,} bytes, and the budget is {int(plain.budget):,}; see cache="
        )
    with plain.evaluation.session(), plain.batches.quietly():
        plain.prepare()
        watched, generation = plain.batches.watched(), plain.batches.generation
        if not watched or (plain.batches.why_not_kept and not streamed):
            raise NotPossible(f"the data are not kept: {plain.batches.why_not_kept}")
        captures = [_softmax, _blocks]
        while captures:
            try:
                head = _Capture(plain, layer).head(captures[0])
            except NotPossible as why:
                reason = str(why)
                del captures[0]
                continue
            plain.batches.refresh()
            if plain.batches.generation != generation:
                raise NotPossible("the data changed while they were being read")
            if plain.concluded():
                return head
    raise NotPossible(reason)


class _Capture:
    """One pass over the data with the graph cut behind the layer."""

    def __init__(self, plain: DoubleBackward, layer: torch.nn.Linear) -> None:
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
                raise NotPossible("the loss of a batch depends on the parameters by the regulariser alone")
            (x,), (z,) = calls.inputs, calls.outputs
            self._compare_gradients(batch, x, linearized.gradient()[0])
            room = plain.budget / n - x.nbytes / size  # an example's, the same in each batch
            curvatures.append(output_curvature(linearized, z.detach(), size / n, room))
            kept += x.nbytes + curvatures[-1].nbytes
            if kept > plain.budget or (not curvatures[-1].explicit and not shared):  # graphs hold on to their batches
                raise NotPossible(f"its closed form takes more than the budget, {int(plain.budget):,}; see cache=")
            if inputs is None:
                inputs = x if size == n and shared else x.new_empty(n, x.shape[1])
            if inputs is not x:
                inputs[done : done + size] = x
            done += size
        assert inputs is not None  # there is at least one example
        first, *others = curvatures
        head = LinearHead(plain, inputs, first.joined(others) if others else first, z.shape[1])
        self._compare_products(head)
        return head

    def _cut(self, batch: object, size: int) -> tuple[Calls, Linearized]:
        with cut(self.layer) as calls:

            def outputs() -> list[Tensor]:
                if len(calls.outputs) != 1:
                    raise NotPossible(f"a batch passes the linear layer {len(calls.outputs)} times, not once")
                (x,), (z,) = calls.inputs, calls.outputs
                if x.layout is not torch.strided or x.is_nested:
                    raise NotPossible("the linear layer takes sparse or nested tensors")
                if x.dim() != 2 or z.dim() != 2 or len(z) != size:
                    raise NotPossible(f"the linear layer takes {list(x.shape)} for {size} examples, not a row for each")
                if torch.promote_types(x.dtype, torch.float32) != self.plain.dtype:
                    raise NotPossible(f"the linear layer takes {x.dtype}, and its parameters are {self.plain.dtype}")
                return calls.outputs

            return calls, self.plain.linearize(batch, self.leaves, at=outputs)

    def _compare_gradients(self, batch: object, x: Tensor, g: Tensor) -> None:
        x, g = x.to(self.plain.dtype), g.to(self.plain.dtype)
        captured = torch.cat([(g.mT @ x).flatten(), g.sum(dim=0)])[: self.plain.size]
        plain = loss_gradient(self.plain.loss, self.space, self.leaves, batch)
        if not agree(captured[None], plain[None], self.space.pass_dtype):
            raise NotPossible("the gradient through the linear layer's output is not all of the gradient")

    def _compare_products(self, head: LinearHead) -> None:
        plain, n, at = self.plain, self.plain.batches.n, head.at_outputs
        step = at.graphs[0][1] if isinstance(at, Graphs) else plain.batches.batch_size or 1
        rows = probe_rows(2, plain.size, dtype=plain.dtype, device=plain.device)
        for first in {0, (n - 1) // step * step}:
            examples = range(first, min(first + step, n))
            batch = plain.batches.peek(examples)
            expected = torch.cat([plain.batch_product(batch, row[None], self.leaves) for row in rows])
            actual = head.of(slice(examples.start, examples.stop), len(examples), rows)
            if not agree(actual, expected, self.space.pass_dtype):
                raise NotPossible("products with the closed form differ from the plain ones")


def _softmax(linearized: Linearized, z: Tensor, share: float, room: float) -> OutputCurvature:
    """The curvature w (diag(p) − p pᵀ), p = softmax(z), if random tangents confirm it for every example."""
    if z.shape[1] == 1:
        raise NotPossible("one output has no softmax")
    wide = torch.promote_types(z.dtype, torch.float32)
    p = z.to(wide).softmax(dim=-1)
    tangents = probe_rows(2, *z.shape, dtype=z.dtype, device=z.device)
    actual = _products(linearized, tangents).to(wide)
    softmax = softmax_curvature(p, tangents.to(wide))
    # The weights are the same for all, or each example's own; from one tangent, and tested with the other.
    dots, norms = (actual[0] * softmax[0]).double().sum(dim=-1), softmax[0].double().square().sum(dim=-1)
    for weights in ((dots.sum() / norms.sum()).expand(len(z)), dots / norms.clamp(min=torch.finfo(wide).tiny)):
        weights = weights.to(wide)
        expected = softmax * weights[:, None]
        # Nearly softmax is not softmax: what may differ is rounding, of sums over c outputs in three steps a side.
        fast, plain = (t.transpose(0, 1).flatten(1) for t in (expected, actual))
        if agree(fast, plain, z.dtype, operations=8 * (z.shape[1] + 8)):
            return Softmax(p, weights * share)
    raise NotPossible("the loss is not softmax cross-entropy of the outputs")


def _products(linearized: Linearized, tangents: Tensor) -> Tensor:
    """Multiplies tangents at the outputs [k, b, c]; few of them one by one, which takes no comparison beforehand."""
    some = tangents.split(1 if len(tangents) <= _FEW else len(tangents))
    return torch.cat([linearized.product([t])[0] for t in some])


def _blocks(linearized: Linearized, z: Tensor, share: float, room: float) -> OutputCurvature:
    """Column j of every example's block at once, from the tangent that is 1 at output j of all examples."""
    (b, c), wide = z.shape, torch.promote_types(z.dtype, torch.float32)
    if c * c * torch.finfo(wide).bits // 8 > room:
        return Graphs([(linearized, b)])
    # And a random tangent, which tells entries outside of the blocks: a loss that joins examples, in this batch alone.
    random = probe_rows(1, z.numel(), dtype=z.dtype, device=z.device).view(1, b, c)
    tangents = torch.cat([torch.eye(c, dtype=z.dtype, device=z.device)[:, None].expand(c, b, c), random])
    products = _products(linearized, tangents)
    columns = products[:c]
    if not agree(torch.einsum("jbi,bj->bi", columns, random[0]), products[c], z.dtype):
        raise NotPossible("products with the closed form differ: the loss joins the outputs of different examples")
    return Blocks(columns.permute(1, 2, 0).to(wide).contiguous().mul_(share))

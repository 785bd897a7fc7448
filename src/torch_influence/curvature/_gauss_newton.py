"""The generalised Gauss-Newton matrix (Schraudolph 2002, eq. 6), not the empirical Fisher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_influence.agreement import agree
from torch_influence.curvature._double_backward import DoubleBackward, Linearized
from torch_influence.curvature._dual import check_products, cost_of, gram_matrix, refuse_beyond, ridge_and, root
from torch_influence.curvature._linear_map import LinearMap
from torch_influence.curvature._plain import Tangents
from torch_influence.gradients import Graph, differentiate, pulled
from torch_influence.linop import Dual, DualCost, probe_rows
from torch_influence.plan import NotPossible


class GaussNewton(DoubleBackward):
    """Jᵀ H_out J + ∇² reg: J the Jacobian of ``train_outputs``, H_out the Hessian of the loss at the outputs.

    J v comes from differentiating u ↦ Jᵀu (only reverse mode is used: forward mode lacks some operators, and is wrong
    for others). It equals the Hessian where the outputs are linear in the parameters.
    """

    title, gauss_newton = "Gauss-Newton", True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._compared: set[int] = set()  # structures of graphs for which rules have been seen to give the same
        self._condensed: dict[int, bool] = {}  # structures, and whether matrices in place of first layers do

    def linearize(self, batch: Any, leaves: Tangents, at: Callable[[], Tangents] | None = None) -> Linearized:
        if at is None and not self.why_no_rules:
            try:
                return self._by_rules(batch, leaves)
            except NotPossible as why:
                self.by_rules, self.why_no_rules = False, str(why)
        return self._by_double_backward(batch, leaves, at)

    def _by_rules(self, given: Any, leaves: Tangents) -> Linearized:
        """Differentiates by rules of the layers; graphs of each structure are compared with the plain way once."""
        batch = self.evaluation.batch_for("train_loss", given)
        outputs = self._with_graph(self._outputs(leaves, batch))
        structure = Graph("rules", [outputs], leaves).structure
        besides = (self._kept_anyway(given), leaves)
        jacobian = _Jacobian(LinearMap(outputs, leaves), besides, self._condensed, structure)
        at_outputs, loss, slope = self._slope(leaves, outputs, batch)
        outputs = outputs.detach()
        curved, slopes = Graph("loss", slope, [at_outputs]), slope[0].detach()
        examples = len(outputs) if outputs.dim() else 1

        def pushed(tangents: Tangents) -> Tensor:
            return jacobian.push([t.to(leaf.dtype) for t, leaf in zip(tangents, leaves, strict=True)])

        def pulled(jv: Tensor) -> Tangents:
            (hjv,) = self._pull_back(curved, [jv])
            return jacobian.pull(hjv, mine=True)

        def product_and_slopes(tangents: Tangents) -> tuple[Tangents, Tensor]:
            jv = pushed(tangents)
            dots = (jv * slopes).reshape(len(jv), examples, -1).sum(-1).mT
            return pulled(jv), dots

        found = Linearized(
            loss,
            lambda tangents: pulled(pushed(tangents)),
            lambda: [row.squeeze(0) for row in jacobian.pull(slopes[None])],
            roots=slope,
            besides=besides,
            kept=lambda: jacobian.by_rules.kept(),
            row_bytes=jacobian.by_rules.row_bytes,
            product_and_slopes=product_and_slopes,
        )
        if structure not in self._compared:
            self._compare(found, self._by_double_backward(given, leaves))
            self._compared.add(structure)
        self.by_rules, jacobian.waits = True, False
        return found

    def _compare(self, fast: Linearized, plain: Linearized) -> None:
        space = self.evaluation.space
        rows = probe_rows(2, space.size, dtype=self.dtype, device=self.device)
        expected = torch.cat([space.flatten(plain.product(space.split(row[None]))) for row in rows])
        try:
            both = space.flatten(fast.product(space.split(rows)))
            one = space.flatten(fast.product(space.split(rows[:1])))
        except Exception as error:  # the plain one has shown that the model is not to blame
            raise NotPossible(f"a product by them failed: {error}") from error
        if not (agree(both, expected, space.pass_dtype) and agree(one, expected[:1], space.pass_dtype)):
            raise NotPossible("a product by them differs from the plain one")

    def _by_double_backward(self, given: Any, leaves: Tangents, at: Callable[[], Tangents] | None = None) -> Linearized:
        batch = self.evaluation.batch_for("train_loss", given)
        outputs = self.outputs(leaves, batch)
        inputs = leaves if at is None else at()
        u = torch.zeros_like(outputs, requires_grad=True)
        jt_u = pulled([outputs], inputs, [u], create_graph=True)
        at_outputs, loss, slope = self._slope(leaves, outputs, batch)

        where = "" if at is None else " at the outputs"
        jacobian = Graph("jacobian" + where, jt_u, [u])
        curved = Graph("loss" + where, slope, [at_outputs])
        transposed = Graph("transposed jacobian" + where, [outputs], inputs)

        def product(tangents: Tangents) -> Tangents:
            (jv,) = self._pull_back(jacobian, tangents)
            (hjv,) = self._pull_back(curved, [jv])
            return self._pull_back(transposed, [hjv])

        def gradient() -> Tangents:
            rows = self._pull_back(transposed, [slope[0].detach()[None]])
            return [row.squeeze(0) for row in rows]

        return Linearized(loss, product, gradient, roots=[outputs, *jt_u, *slope], besides=self._kept_anyway(given))

    def loss(self, leaves: Tangents, batch: Any) -> Tensor:
        batch = self.evaluation.batch_for("train_loss", batch)
        return self.evaluation.train_loss_on_outputs(leaves, self._outputs(leaves, batch), batch)

    def outputs(self, leaves: Tangents, batch: Any) -> Tensor:
        """Computes the outputs, whose Jacobian is J, with their graph; takes a batch from ``Evaluation.batch_for``."""
        with self.convolutions(fixed=True):
            return self._with_graph(self._outputs(leaves, batch))

    def _with_graph(self, outputs: Tensor) -> Tensor:
        if not outputs.requires_grad:
            raise ValueError("train_outputs: expected outputs that depend on the selected parameters, got no graph")
        return outputs

    def output_blocks(self, leaves: Tangents, batch: Any) -> Tensor:
        """Computes the blocks [b, c, c] of H_out, one for each row of the outputs, if all other entries are zero."""
        batch = self.evaluation.batch_for("train_loss", batch)
        outputs = self.outputs(leaves, batch).detach()
        at_outputs, _, slope = self._slope(leaves, outputs, batch)
        b, c = rows_and_columns(outputs)
        # The tangent that is 1 at output j of all rows gives column j of every block at once.
        unit = torch.eye(c, dtype=outputs.dtype, device=self.device)[:, None].expand(c, b, c)
        graph = Graph("loss", slope, [at_outputs])
        (columns,) = self._pull_back(graph, [unit.reshape(c, *outputs.shape)])
        return columns.reshape(c, b, c).permute(1, 2, 0).to(self.dtype)

    def pulled(self, leaves: Tangents, outputs: Tensor, rows: Tensor) -> Tensor:
        """Computes Jᵀu [k, d] for rows u [k, *shape of the outputs]."""
        return self.evaluation.space.flatten(self._pull_back(Graph("transposed jacobian", [outputs], leaves), [rows]))

    def dual(self, shift: float, room: float) -> Dual:
        """GᵀG + rI, G in memory: the curvature at the outputs, a pass with c rows; G, a row at a time; a product."""
        refuse_beyond(self.dual_cost(shift), room)
        with self.evaluation.session(), self.batches.quietly():
            blocks = torch.cat(_blocks_of_batches(self))
            found = _DualOfRows(self, _rows(self, root(blocks, self.evaluation.space.pass_dtype)))
            check_products(found, self)
        return found

    def dual_cost(self, shift: float) -> DualCost:
        """Takes the outputs of one batch, and once a product with it."""
        with self.evaluation.session(), self.batches.quietly():
            self.prepare()
            examples = range(min(self.batches.batch_size or 1, self.batches.n))
            batch = self.evaluation.batch_for("train_loss", self.batches.peek(examples))
            b, c = rows_and_columns(self.outputs(self.leaves, batch))
            m = -(-b * self.batches.n // len(examples)) * c
            # Each row of G is a sweep back through a batch; a product with one row is about three through all of them.
            sweep = self.operations / 3 * (len(examples) if self.why_not_grouped else 1) / self.batches.n
        ridge_and(shift, self.ridge)
        return cost_of(self, m, c, m * self.size, m * sweep + float(m) * m * self.size, 4.0 * m * self.size)

    def _slope(self, leaves: Tangents, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Returns a copy of the outputs, their loss, and the gradient of the loss by the copy, with its graph."""
        at_outputs = outputs.detach().requires_grad_()
        loss = self.evaluation.train_loss_on_outputs(leaves, at_outputs, batch)
        return at_outputs, loss.detach(), differentiate(loss, [at_outputs], create_graph=True)

    def _outputs(self, leaves: Tangents, batch: Any) -> Tensor:
        outputs = self.evaluation.train_outputs(leaves, batch)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"train_outputs: expected a tensor with gnh=True, got {type(outputs).__name__}; "
                "return the tensor that the loss is a function of, for example output.logits"
            )
        if not outputs.is_floating_point():
            raise TypeError(
                f"train_outputs: expected real floating-point numbers with gnh=True, got {outputs.dtype}; "
                "torch.view_as_real makes them of complex ones"
            )
        return outputs


def rows_and_columns(outputs: Tensor) -> tuple[int, int]:
    """Returns the shape of a batch's outputs as a matrix: mostly (examples, outputs of one example)."""
    return outputs.reshape(len(outputs) if outputs.dim() else 1, -1).shape  # type: ignore[return-value]


class _Jacobian:
    """J of a batch by rules, in which a matrix takes the place of a first layer once so many rows came that it pays.

    Args:
        by_rules: J as it is at first.
        besides: tensors that are kept in memory anyway.
        hold: the structures of graphs of which it was seen whether such matrices give the same.
        structure: of this graph.

    Attributes:
        waits: whether rows are not to be counted yet.
    """

    def __init__(self, by_rules: LinearMap, besides: Any, hold: dict[int, bool], structure: int) -> None:
        self.by_rules, self._besides, self._hold, self._structure = by_rules, besides, hold, structure
        self._tried, self._rows = False, 0
        self.waits = True

    def push(self, tangents: Tangents) -> Tensor:
        k, c = len(tangents[0]), self.by_rules.columns
        # The matrix takes about as long as half of c products. The second time a batch comes, it will come again.
        if not (self._tried or self.waits) and (k > c or (self._rows and self._rows + k > c / 8)):
            self._tried = True
            self._condense(tangents)
        self._rows += 0 if self.waits else k
        return self.by_rules.push(tangents)

    def pull(self, cotangents: Tensor, mine: bool = False) -> Tangents:
        return self.by_rules.pull(cotangents, mine)

    def _condense(self, tangents: Tangents) -> None:
        if not self._hold.get(self._structure, True):
            return
        condensed = self.by_rules.condensed(self._besides)
        if condensed is None:
            return
        if self._structure not in self._hold:
            self._hold[self._structure] = self._same(condensed, [t[:1] for t in tangents])
        if self._hold[self._structure]:
            self.by_rules = condensed

    def _same(self, condensed: LinearMap, tangents: Tangents) -> bool:
        """Compares J v and JᵀJ v for one row."""
        jv = self.by_rules.push(tangents)
        both = [(condensed.push(tangents), jv)]
        both += zip(condensed.pull(jv), self.by_rules.pull(jv), strict=True)
        return all(agree(a.reshape(1, -1), b.reshape(1, -1), jv.dtype) for a, b in both)


class _DualOfRows(Dual):
    """A dual whose G is held in memory."""

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
        gram_matrix(columns, columns, kernel)
        return kernel


def _rows(plain: GaussNewton, root: Tensor) -> Tensor:
    """G = BᵀJ [N r, d].

    A row is pulled back through all of a batch, though it is of one example: so batches of one, where it was seen that
    they mean the same.

    Raises:
        NotPossible: outputs of one example differ from those of many.
    """
    count, c, r = root.shape
    matrix = torch.empty(count * r, plain.size, dtype=plain.dtype, device=plain.device)
    first = 0
    for batch, _ in plain.batches.read(None, plain.batch_size if plain.why_not_grouped else 1):
        outputs = plain.outputs(plain.leaves, plain.evaluation.batch_for("train_loss", batch))
        b, columns = rows_and_columns(outputs)
        if columns != c or first + b > count:
            raise NotPossible("the outputs of one example differ in shape from those of many")
        cotangents = root.new_zeros(b, r, b, c)
        each = torch.arange(b, device=root.device)
        cotangents[each, :, each] = root[first : first + b].mT
        pulled = plain.pulled(plain.leaves, outputs, cotangents.reshape(b * r, *outputs.shape))
        matrix[first * r : (first + b) * r] = pulled
        first += b
    if first != count:
        raise NotPossible("the outputs of one example differ in number from those of many")
    return matrix


def _blocks_of_batches(plain: GaussNewton) -> list[Tensor]:
    """Returns the blocks [rows, c, c] of every batch, with its share in the mean."""
    blocks: list[Tensor] = []
    for batch, size in plain.batches.read(None, plain.batch_size):
        blocks.append(plain.output_blocks(plain.leaves, batch).mul_(size / plain.batches.n))
        if blocks[-1].shape[1:] != blocks[0].shape[1:]:
            raise NotPossible("the outputs of different batches differ in shape")
    return blocks

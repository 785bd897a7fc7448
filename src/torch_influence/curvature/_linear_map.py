"""LinearMap: the Jacobian of a graph's output by rules of its operators, many rows at a time, there and back."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from torch_influence.batches import parts
from torch_influence.curvature._plain import Tangents
from torch_influence.curvature._rules import Rule, Site
from torch_influence.curvature._rules_of_layers import RULES
from torch_influence.gradients import saved_bytes
from torch_influence.plan import NotPossible


@dataclasses.dataclass(frozen=True)
class _Step:
    """An operator on the way from the leaves to the output: numbers of the values that it takes and makes."""

    rule: Rule
    inputs: Sequence[int | None]
    outputs: Sequence[int]


class LinearMap:
    """J and Jᵀ of outputs by leaves, from what autograd's graph has saved; the graph itself is not kept.

    Attributes:
        row_bytes: of the tangents of one row, all that are made on the way.

    Raises:
        NotPossible: there is no rule for an operator, or dtypes are mixed.
    """

    def __init__(self, outputs: Tensor, leaves: Sequence[Tensor]) -> None:
        if outputs.grad_fn is None:
            raise NotPossible("the outputs are parameters")
        if outputs.dtype not in (torch.float32, torch.float64):
            raise NotPossible(f"the outputs are {outputs.dtype}")
        self._leaves = [(leaf.shape, leaf.dtype, leaf.device) for leaf in leaves]
        self._shape, self._dtype = outputs.shape, outputs.dtype
        numbers: dict[tuple[Node, int], int] = {}
        shapes = [leaf.shape for leaf in leaves]
        where = {id(leaf): i for i, leaf in enumerate(leaves)}
        self._steps: list[_Step] = []
        made = 0
        for node in _in_order(outputs.grad_fn):
            if node.name() == "torch::autograd::AccumulateGrad":
                variable = getattr(node, "variable")  # noqa: B009 -- the type Node does not know it
                if id(variable) in where:
                    numbers[node, 0] = where[id(variable)]
                    if variable.dtype != outputs.dtype:
                        raise NotPossible(f"a parameter is {variable.dtype}, and the outputs are {outputs.dtype}")
                continue
            inputs = [None if of is None else numbers.get((of, index)) for of, index in node.next_functions]
            if all(i is None for i in inputs):
                continue
            try:
                site = Site(node, [None if i is None else shapes[i] for i in inputs])
                if site.name not in RULES:
                    raise site.refused("")
                if site.dtype != outputs.dtype:
                    raise site.refused(f"of {site.dtype}")
                rule = RULES[site.name](site)
            except (RuntimeError, AttributeError) as error:  # saved tensors that were edited since, or are elsewhere
                raise NotPossible(f"{node.name()} could not be read: {error}") from error
            results = range(len(shapes), len(shapes) + len(site.shapes))
            for i, shape in enumerate(site.shapes):
                numbers[node, i] = len(shapes)
                shapes.append(shape)
            self._steps.append(_Step(rule, inputs, results))
            if rule.pushed == "new":
                made += site.shape.numel()
        root = numbers.get((outputs.grad_fn, outputs.output_nr))
        if root is None:
            raise NotPossible("the outputs do not depend on the parameters by their graph")
        self._root, self._count = root, len(shapes)
        self.row_bytes = made * outputs.element_size()
        self._dense: tuple[Sequence[int], Tensor] | None = None  # leaves, and the Jacobian by them [numbers out, in]
        self._uses = self._counted()
        self._versions = [(t, t._version) for t in self.kept() if isinstance(t, Tensor)]

    @property
    def columns(self) -> int:
        """Counts the outputs of an example, where the first dimension is that of examples."""
        return self._shape.numel() // max(self._shape[0], 1) if self._shape else 1

    def kept(self) -> list[Any]:
        """Lists the tensors that are kept, among other things."""
        return [part for step in self._steps for part in parts(vars(step.rule))] + parts(self._dense)

    def push(self, tangents: Tangents) -> Tensor:
        """Computes J v [k, *shape of the outputs] for tangents v, one [k, *shape] per leaf."""
        k = len(tangents[0])
        if any(t._version != version for t, version in self._versions):
            raise RuntimeError(
                "a tensor that is needed for derivatives has been modified by an inplace operation since"
            )
        if k == 0:
            return tangents[0].new_zeros(0, *self._shape, dtype=self._dtype)
        values: list[Tensor | None] = [*tangents, *[None] * (self._count - len(tangents))]
        mine, left = [False] * self._count, self._uses.copy()
        for step in self._steps:
            given = [None if i is None else values[i] for i in step.inputs]
            may = [i is not None and mine[i] and self._uses[i] == 1 for i in step.inputs]
            found = step.rule.push(given, may)
            own = step.rule.pushed == "new" or (
                step.rule.pushed == "view" and all(m for m, t in zip(may, given, strict=True) if t is not None)
            )
            for i in step.inputs:
                if i is not None:
                    left[i] -= 1
                    if not left[i]:
                        values[i] = None
            del given
            for made, value in zip(step.outputs, found if step.rule.several else [found], strict=False):
                values[made], mine[made] = value, own
        root = values[self._root]
        assert root is not None
        if self._dense is None:
            return root
        numbers, matrix = self._dense
        row = torch.cat([tangents[i].reshape(k, -1) for i in numbers], dim=1)
        return root + (row @ matrix.mT).view(k, *self._shape)

    def pull(self, cotangents: Tensor, mine: bool = False) -> list[Tensor]:
        """Computes Jᵀ u, one [k, *shape] per leaf, for u [k, *shape of the outputs], overwritten if it is ``mine``."""
        k = len(cotangents)
        dense = {}
        if k and self._dense is not None:
            numbers, matrix = self._dense
            row = cotangents.reshape(k, -1) @ matrix
            sizes = [self._leaves[i][0].numel() for i in numbers]
            dense = dict(zip(numbers, row.split(sizes, dim=1), strict=True))
        values = self._pulled(cotangents, mine) if k else [None] * self._count
        pulled = []
        for i, (shape, dtype, device) in enumerate(self._leaves):
            value = dense.get(i, values[i])
            if value is None:
                value = torch.zeros(k, *shape, dtype=dtype, device=device)
            pulled.append(value.reshape(k, *shape))
        return pulled

    def _pulled(self, cotangents: Tensor, mine: bool, until: int = 0) -> list[Tensor | None]:
        """Pulls back through the steps from the last to number ``until``, and lists what has come to every value."""
        values: list[Tensor | None] = [None] * self._count
        own = [False] * self._count
        values[self._root], own[self._root] = cotangents, mine
        for step in reversed(self._steps[until:]):
            given: Any = [values[made] for made in step.outputs]
            if all(c is None for c in given):
                continue
            may = all(own[made] for made in step.outputs if values[made] is not None)
            found = step.rule.pull(given if step.rule.several else given[0], may)
            for made in step.outputs:
                values[made] = None
            del given
            used = sum(i is not None for i in step.inputs)
            writable = step.rule.pulled == "new" or (step.rule.pulled == "view" and may and used == 1)
            for i, value in zip(step.inputs, found, strict=False):
                if i is None or value is None:
                    continue
                before = values[i]
                if before is None:
                    values[i], own[i] = value, writable
                elif own[i]:
                    before.add_(value)
                else:
                    values[i], own[i] = before + value, True
        return values

    # -- first layers -------------------------------------------------------------------------------------------------

    def condensed(self, besides: Any) -> LinearMap | None:
        """Returns the same map with the Jacobian by a first layer's parameters as a matrix.

        It takes as many pull-backs as an example has outputs; and then a product passes through fewer layers. None
        where there is no layer for which the matrix takes less memory than what is not needed any more.

        ``besides``: tensors that are kept in memory anyway.
        """
        n = self._shape[0] if self._shape else 0
        if not n or self._dense is not None:
            return None
        for at, step in enumerate(self._steps):
            leaves = [i for i in step.inputs if i is not None]
            if any(i >= len(self._leaves) or self._uses[i] > 1 for i in leaves) or not step.rule.gives_each(n):
                continue
            rest = self._without(at, leaves)
            size = self._shape.numel() * sum(self._leaves[i][0].numel() for i in leaves) * self._dtype.itemsize
            if rest is None or size > saved_bytes((), besides, self.kept()) - saved_bytes((), besides, rest.kept()):
                continue
            c, columns, each = self.columns, [], step.rule.each()
            for column in range(c):
                u = torch.zeros(1, n, c, dtype=self._dtype, device=self._leaves[0][2])
                u[..., column] = 1
                cotangent = self._pulled(u.view(1, *self._shape), True, at + 1)[step.outputs[0]]
                if cotangent is None:
                    return None
                columns.append(each(cotangent))
            rest._dense = leaves, torch.stack(columns, dim=1).flatten(0, 1)
            return rest
        return None

    def _without(self, at: int, leaves: Sequence[int]) -> LinearMap | None:
        """Leaves out a step, and those that nothing but constants comes to then."""
        rest = copy.copy(self)
        live = set(range(len(self._leaves))) - set(leaves)
        rest._steps = []
        for i, step in enumerate(self._steps):
            inputs = [j if j in live else None for j in step.inputs]
            if i == at or all(j is None for j in inputs):
                continue
            rule = step.rule if inputs == list(step.inputs) else step.rule.without([j is None for j in inputs])
            rest._steps.append(dataclasses.replace(step, rule=rule, inputs=inputs))
            live.update(step.outputs)
        rest._uses = rest._counted()
        rest._versions = [(t, t._version) for t in rest.kept() if isinstance(t, Tensor)]
        return rest if self._root in live else None

    def _counted(self) -> list[int]:
        """Counts how many steps take each value."""
        uses = [0] * self._count
        for step in self._steps:
            for number in step.inputs:
                if number is not None:
                    uses[number] += 1
        return uses


def _in_order(root: Node) -> list[Node]:
    """Lists the nodes behind one, each after those that it takes values from."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((of, False) for of, _ in reversed(node.next_functions) if of is not None)
    return order

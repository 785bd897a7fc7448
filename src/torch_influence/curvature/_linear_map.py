"""LinearMap: the Jacobian of a graph's output by rules of its operators, many rows at a time, there and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from torch_influence.curvature._plain import Tangents
from torch_influence.curvature._rules import Rule, Site
from torch_influence.curvature._rules_of_layers import RULES
from torch_influence.plan import NotPossible


@dataclasses.dataclass(frozen=True)
class _Step:
    """An operator on the way from the leaves to the output: numbers of the values that it takes and makes."""

    rule: Rule
    inputs: Sequence[int | None]
    outputs: Sequence[int]
    one: bool  # whether it has a single output


class LinearMap:
    """J and Jᵀ of outputs by leaves, from what autograd's graph has saved; the graph itself is not kept.

    Attributes:
        rules: of the operators, in the order of evaluation.
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
                variable: Any = node.variable
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
            self._steps.append(_Step(rule, inputs, results, len(site.shapes) == 1 or site.name in _ONE_OUTPUT))
            if rule.pushed == "new":
                made += site.shape.numel()
        root = numbers.get((outputs.grad_fn, outputs.output_nr))
        if root is None:
            raise NotPossible("the outputs do not depend on the parameters by their graph")
        self._root, self._count = root, len(shapes)
        self.row_bytes = made * outputs.element_size()
        self._uses = [0] * self._count  # how many steps take a value
        for step in self._steps:
            for number in step.inputs:
                if number is not None:
                    self._uses[number] += 1

    @property
    def rules(self) -> list[Rule]:
        return [step.rule for step in self._steps]

    def push(self, tangents: Tangents) -> Tensor:
        """Computes J v [k, *shape of the outputs] for tangents v, one [k, *shape] per leaf."""
        k = len(tangents[0])
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
            for number, value in zip(step.outputs, [found] if step.one else found, strict=False):
                values[number], mine[number] = value, own
        root = values[self._root]
        assert root is not None
        return root

    def pull(self, cotangents: Tensor, mine: bool = False) -> list[Tensor]:
        """Computes Jᵀ u, one [k, *shape] per leaf, for u [k, *shape of the outputs], overwritten if it is ``mine``."""
        k = len(cotangents)
        values: list[Tensor | None] = [None] * self._count
        own = [False] * self._count
        if k:
            values[self._root], own[self._root] = cotangents, mine
        for step in reversed(self._steps):
            given: Any = [values[i] for i in step.outputs]
            if all(c is None for c in given):
                continue
            may = all(own[i] for i in step.outputs if values[i] is not None)
            found = step.rule.pull(given[0] if step.one else given, may)
            for i in step.outputs:
                values[i] = None
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
        pulled = []
        for i, (shape, dtype, device) in enumerate(self._leaves):
            value = values[i]
            pulled.append(torch.zeros(k, *shape, dtype=dtype, device=device) if value is None else value)
        return pulled


_ONE_OUTPUT = {"NativeGroupNormBackward0", "NativeLayerNormBackward0", "NativeBatchNormBackward0"}


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

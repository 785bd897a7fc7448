"""Gradients of single examples: as rows, or as products with given vectors.

They are defined as gradients of batches of one. Where ``torch.func.vmap`` gives the same, it does many such batches at
a time. Each way to do so is compared with the plain loop on the first examples. In every group of examples it is also
compared with one plain backward pass: that of the sum of their losses with signs ±1, whose gradient is the sum of
theirs with these signs. Where a way fails or differs the loop runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, Function

from torch_influence.agreement import agree
from torch_influence.batches import Batches, alike, put_together, stands_alone, take_apart, versions
from torch_influence.evaluation import Evaluation, linear_layer
from torch_influence.gradients._contraction import Contraction, Pairs
from torch_influence.gradients._mean import LossOfBatch, differentiate, loss_gradient, nodes_behind, pulled
from torch_influence.gradients._outer_products import OuterProducts, sums_of_outer_products
from torch_influence.switches import quiet_vmap

_EXAMPLES_AT_ONCE = 256  # examples in one vmapped pass
_MANY_EXAMPLES = 2048  # examples in one vmapped pass that forms no gradients
_BYTES_OF_ROWS = 256 * 2**20  # per-example gradients held at once
_BYTES_OF_A_PASS = 8 * 2**20  # inputs and output gradients in one pass: more fall out of cache
_ROWS_OF_A_PRODUCT = 64  # examples in one pass at least: vectors are read once for all of them
_ONE_BY_ONE = "examples one at a time"
_KEPT = "inputs of the linear layer, captured, and slopes at its outputs, kept"
_ROUNDINGS = 32  # roundings in the product of a gradient with a vector
_FEW_DIRECTIONS = 8  # up to here a second backward per direction is cheaper than forming per-example rows


class Tie:
    """A check that results of many examples at once add up to what one plain backward pass gives for all of them.

    Args:
        dtype: the dtype in which the passes ran.

    Attributes:
        holds: whether all comparisons so far agreed.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._eps = torch.finfo(dtype).eps
        self.holds = True

    def __call__(self, fast: Tensor, signs: Tensor, total: Tensor, size: Tensor | float = 0.0) -> None:
        """Compares Σ uᵢ fastᵢ, for rows fast [m, c] and signs u [m], with the total [c].

        They may differ by √ε times the norm of ``fast``, about the size of a sum of its rows with random signs, and by
        the rounding of products of this ``size``, of which the total is made.
        """
        fast, total = fast.detach(), total.detach()
        apart = (signs.to(fast.dtype) @ fast - total).norm()
        self.holds &= bool(apart <= self._eps**0.5 * fast.norm() + _ROUNDINGS * self._eps * size)


Way: TypeAlias = Callable[["_Group", Tie], Tensor]


class ExampleGradients:
    """Gradients gᵢ = ∇loss(batch of example i alone) of chosen examples: as rows, or as products with given vectors.

    Args:
        loss: of leaves and a batch.
        evaluation, batches: of the model, and the examples.
        describe: what a progress bar says.
        data_loss: the loss without what depends on no example; None: all of it.
        constant: the gradient of the difference [d].
        kept: what is known of the gradients without the constant; they are read off it, and what is found is put there.

    Attributes:
        path: the way in which the last products, or rows, were computed.
        why_not: why ways that come before it were given up, by way.
    """

    def __init__(
        self,
        loss: LossOfBatch,
        evaluation: Evaluation,
        batches: Batches,
        describe: str,
        data_loss: LossOfBatch | None = None,
        constant: Tensor | None = None,
        kept: OuterProducts | None = None,
    ) -> None:
        self._loss = loss
        self._evaluation = evaluation
        self._space = evaluation.space
        self._batches = batches
        self._describe = describe
        self._data_loss = data_loss or loss
        self._constant = constant
        self._kept = kept
        row_bytes = self._space.size * torch.finfo(self._space.dtype).bits // 8
        self._rows_at_once = max(1, min(_EXAMPLES_AT_ONCE, _BYTES_OF_ROWS // row_bytes))
        self.path = ""
        self.why_not: dict[str, str] = {}

    @property
    def why_plain(self) -> str:
        """The reason why examples are taken one at a time; empty while many are taken at once."""
        return list(self.why_not.values())[-1] if self.path == _ONE_BY_ONE and self.why_not else ""

    def rows(self, indices: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
        """Yields (positions in ``indices``, rows [b, d]) in bounded chunks. Memory: one chunk of rows."""
        leaves = self._evaluation.leaves()

        def one(batch: Any) -> Tensor:
            return loss_gradient(self._loss, self._space, leaves, batch)

        def known(some: Sequence[int], kept: OuterProducts) -> Tensor:
            return self._with_constant(kept.rows(some, self._space.dtype))

        ways: dict[str, Way] = {"rows of gradients": self._rows_of}
        if linear_layer(self._evaluation) is not None:
            ways = {"outer products at the linear layer": self._outer(), **ways}
        return _merged(self._values(indices, self._rows_at_once, ways, one, known), self._rows_at_once)

    def dots(
        self, indices: Sequence[int], vectors: Tensor, summed: Tensor | None = None
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Yields (positions in ``indices``, gᵢ·vectors[j] as [b, k]) for vectors [k, d].

        It takes the first of these ways that is possible and agrees with examples one at a time:
        - from what is kept;
        - from ``summed``, these dots [n, k] of all examples, of the loss without what depends on no example;
        - from the inputs and output gradients of layers (contraction.py), where they account for most parameters or the
          vectors are many;
        - for few vectors by differentiating twice: with dummy weights u, G(u) = ∇ Σᵢ uᵢ lossᵢ is linear in u, and
          ∂(G·v)/∂u holds all gᵢ·v. Not for 16-bit passes, whose dots would be 16-bit;
        - from rows of gradients.
        """
        ways: dict[str, Way] = {}
        constant = None if self._constant is None else vectors @ self._constant
        if summed is not None:
            ways["sums along the solve"] = self._picked(indices, vectors, summed, constant)
        few = len(vectors) <= _FEW_DIRECTIONS and self._space.pass_dtype == self._space.dtype
        contraction = Contraction(self._data_loss, self._evaluation)
        most = self._space.size // 2 if few else self._space.size  # a second backward costs more than forming these
        if contraction.layers and contraction.rest <= most:
            ways["inputs and output gradients of layers"] = self._contracted(contraction, vectors, most, constant)
        if few:
            ways["directional derivatives"] = self._directional(vectors)
        else:
            ways["rows of gradients"] = lambda group, tie: torch.cat(
                [self._rows_of(part, tie) @ vectors.mT for part in group.parts(self._rows_at_once)]
            )
        leaves = self._evaluation.leaves()

        def one(batch: Any) -> Tensor:
            return vectors @ loss_gradient(self._loss, self._space, leaves, batch)

        def known(some: Sequence[int], kept: OuterProducts) -> Tensor:
            return _plus(kept.dots(some, vectors), constant)

        # Without rows to form, many examples take little memory, and vectors are read once for all of them.
        many = bool(contraction.layers) and not contraction.rest
        return self._values(indices, _MANY_EXAMPLES if many else _EXAMPLES_AT_ONCE, ways, one, known)

    def _with_constant(self, rows: Tensor) -> Tensor:
        return rows if self._constant is None else rows.add_(self._constant)

    def _outer(self) -> Way:
        """Forms rows from what goes into the one linear layer whose parameters they are of, and what comes back."""
        contraction = Contraction(self._data_loss, self._evaluation)

        def many(group: _Group, tie: Tie) -> Tensor:
            contraction.look(group.single(0))
            if not contraction.layers:
                raise ValueError("examples do not pass the linear layer")
            pairs = contraction.pairs(group.batch, group.tensors)
            group.pairs = [pairs]
            rows = sums_of_outer_products(pairs.layers[0], contraction.layers[0].bias is not None, self._space.dtype)
            total = torch.zeros_like(rows[0])
            tie(rows, self._signed(group, total, data=True), total)
            return self._with_constant(rows)

        return many

    def _rows_of(self, group: _Group, tie: Tie) -> Tensor:
        gradient = torch.func.grad(lambda params, tensors: self._loss(params, group.batch(tensors)))
        leaves = tuple(leaf.detach() for leaf in self._evaluation.leaves())
        rows = self._space.flatten(torch.vmap(gradient, in_dims=(None, 0))(leaves, group.tensors)).detach()
        total = torch.zeros_like(rows[0])
        tie(rows, self._signed(group, total), total)
        return rows

    def _signed(self, group: _Group, total: Tensor, data: bool = False) -> Tensor:
        """Draws signs u [m]; adds ∇ Σ uᵢ lossᵢ (of the ``data`` loss, if asked), by a plain backward, to ``total``."""
        loss, leaves = self._data_loss if data else self._loss, self._evaluation.leaves()
        losses = torch.vmap(lambda tensors: loss(leaves, group.batch(tensors)))(group.tensors)
        signs = _signs(losses)
        total += self._space.flatten(differentiate(losses @ signs, leaves)).detach()
        return signs

    def _contracted(self, contraction: Contraction, vectors: Tensor, most: int, constant: Tensor | None) -> Way:
        def passed(part: _Group, found: list[Pairs]) -> Pairs:
            pairs = contraction.pairs(part.batch, part.tensors)
            if self._kept is not None:
                found.append(pairs)
            return pairs

        def many(group: _Group, tie: Tie) -> Tensor:
            contraction.look(group.single(0))
            if contraction.rest > most:
                raise ValueError("examples do not pass the layers, so most gradients would have to be formed")
            each = max(contraction.example_bytes, 1)
            parts = group.parts(max(1, min(_BYTES_OF_ROWS // each, max(_BYTES_OF_A_PASS // each, _ROWS_OF_A_PRODUCT))))
            dots = torch.cat([contraction.dots(passed(part, group.pairs), vectors) for part in parts])
            gradient = torch.zeros_like(vectors[0])
            signs = torch.cat([self._signed(part, gradient, data=True) for part in parts])
            tie(dots, signs, vectors @ gradient, gradient.norm() * vectors.norm(dim=1).max())
            return _plus(dots, constant)

        return many

    def _picked(self, indices: Sequence[int], vectors: Tensor, summed: Tensor, constant: Tensor | None) -> Way:
        def picked(group: _Group, tie: Tie) -> Tensor:
            dots = summed[[indices[position] for position in group.positions]]
            gradient = torch.zeros_like(vectors[0])
            signs = self._signed(group, gradient, data=True)
            tie(dots, signs, vectors @ gradient, gradient.norm() * vectors.norm(dim=1).max())
            return _plus(dots, constant)

        return picked

    def _directional(self, vectors: Tensor) -> Way:
        leaves, pieces = self._evaluation.leaves(), self._space.split(vectors)

        def some(group: _Group, tie: Tie) -> Tensor:
            losses = torch.vmap(lambda tensors: self._loss(leaves, group.batch(tensors)))(group.tensors)
            u = _signs(losses).requires_grad_()
            grads = pulled([losses], leaves, [u], create_graph=True)
            live = [i for i, g in enumerate(grads) if g.requires_grad]
            columns = [
                pulled([grads[i] for i in live], [u], [pieces[i][j] for i in live])[0] for j in range(len(vectors))
            ]
            dots, gradient = torch.stack(columns, dim=-1), self._space.flatten(grads).detach()
            tie(dots, u.detach(), vectors @ gradient, gradient.norm() * vectors.norm(dim=1).max())
            return dots

        return lambda group, tie: torch.cat([some(part, tie) for part in group.parts(_EXAMPLES_AT_ONCE)])

    def _groups(self, indices: Sequence[int], at_once: int) -> Iterator[_Group]:
        """Yields groups of batches of one; they are cut from larger batches where these are just their examples."""
        batches, total = self._batches, len(indices)
        at_once -= total % at_once == 1 and at_once > 2  # or the last example would be alone, and taken alone
        if batches.stacked(total) is None:
            yield from _collected(batches.bar(batches.read(indices, 1), self._describe, total), at_once)
            return
        parts = batches.bar(batches.read(indices, at_once), self._describe, -(-total // at_once))
        for number, (batch, size) in enumerate(parts):
            template, tensors = take_apart(batch, leading=1)
            ones = [t.unsqueeze(1) for t in tensors]
            yield _Group(list(range(number * at_once, number * at_once + size)), template, ones)

    def _values(
        self,
        indices: Sequence[int],
        at_once: int,
        ways: dict[str, Way],
        one: Callable[[Any], Tensor],
        known: Callable[[Sequence[int], OuterProducts], Tensor],
    ) -> Iterator[tuple[list[int], Tensor]]:
        if self._kept is None or not indices or not self._kept.has(indices):
            yield from self._chunks(indices, at_once, ways, one)
            return
        self.path, self.why_not = _KEPT, {}
        self._batches.pass_by()
        for first in range(0, len(indices), at_once):
            some = indices[first : first + at_once]
            yield list(range(first, first + len(some))), known(some, self._kept)

    def _chunks(
        self,
        indices: Sequence[int],
        at_once: int,
        ways: dict[str, Way],
        one: Callable[[Any], Tensor],
    ) -> Iterator[tuple[list[int], Tensor]]:
        verified: dict[str, list[Any]] = {way: [] for way in ways}
        self.path, self.why_not = "", {}
        for group in self._groups(indices, at_once):
            before = versions(group.tensors)
            fast = None if len(group.positions) == 1 else self._first_way(group, ways, verified, one)
            if versions(group.tensors) != before:
                yield from self._anew([indices[p] for p in group.positions], group.positions, at_once, ways, one)
                continue
            if fast is not None:
                if self._kept is not None:
                    self._keep(indices, group)
                yield group.positions, fast
                continue
            self.path = _ONE_BY_ONE
            for j, position in enumerate(group.positions):
                yield [position], one(group.single(j))[None]

    def _keep(self, indices: Sequence[int], group: _Group) -> None:
        """Keeps what was found of a group's examples, if it was found at one linear layer that each passes once."""
        found = [layer for pairs in group.pairs for layer in pairs.layers]
        if self._kept is None or not found or len(found) != len(group.pairs) or any(len(calls) != 1 for calls in found):
            return
        x, slopes = (torch.cat([calls[0][side] for calls in found]) for side in (0, 1))
        if x.dim() == slopes.dim() == 3 and x.shape[1] == slopes.shape[1] == 1:
            self._kept.keep([indices[p] for p in group.positions], x.squeeze(1), slopes.squeeze(1))

    def _anew(
        self,
        indices: list[int],
        positions: list[int],
        at_once: int,
        ways: dict[str, Way],
        one: Callable[[Any], Tensor],
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Reads examples that the objective has edited in place again, and gives it copies of them from now on."""
        if not all(self._evaluation.edits.values()):  # only seen here: inside vmap an edit can't be seen
            self._evaluation.distrust()
        with self._batches.quietly():
            chunks = list(self._chunks(indices, at_once, ways, one))
        for some, values in chunks:
            yield [positions[i] for i in some], values

    def _first_way(
        self,
        group: _Group,
        ways: dict[str, Way],
        verified: dict[str, list[Any]],
        one: Callable[[Any], Tensor],
    ) -> Tensor | None:
        """Computes a group at once, in the first way that works; a way that is new is compared with single examples.

        It is new for each template: another shape or constant may take another path through the model. Whether examples
        of one template take different paths is seen by ``tie``, in every group.
        """
        for way, many in ways.items():
            if way in self.why_not:
                continue
            try:
                fast, holds = self._tied(group, many, one)
            except Exception as error:  # what vmap can't do; a mistake of the user shows again in the plain loop
                self.why_not[way] = f"many examples at once failed: {error}"
                continue
            if not holds:
                self.why_not[way] = "many examples at once differ from a backward pass of the sum of their losses"
                continue
            if not any(alike(group.template, known) for known in verified[way]):
                if self._batches_by_own_rules(group.single(0)):
                    self.why_not[way] = "an autograd.Function has a vmap of its own, whose derivatives nothing checks"
                    continue
                probe = sorted({0, len(group.positions) // 2, len(group.positions) - 1})
                plain = torch.stack([one(group.single(j)) for j in probe])
                if not agree(fast[probe], plain, self._space.pass_dtype):
                    self.why_not[way] = "many examples at once differ from one at a time"
                    continue
                verified[way].append(group.template)
            self.path = way
            return fast
        return None

    def _batches_by_own_rules(self, batch: Any) -> bool:
        """Tells whether a Function on the way to this batch's loss says itself what many at once are.

        What is computed for many at once, and the backward pass that checks it, would share its mistakes.
        """
        nodes = nodes_behind([self._loss(self._evaluation.leaves(), batch)])
        kinds: list[Any] = [type(node) for node in nodes if isinstance(node, BackwardCFunction)]
        functions = [kind._forward_cls for kind in kinds]
        return any(f.vmap is not Function.vmap and not f.generate_vmap_rule for f in functions)

    def _tied(self, group: _Group, many: Way, one: Callable[[Any], Tensor]) -> tuple[Tensor, bool]:
        """Returns what a way computes for a group, and whether that agrees with a plain backward pass.

        One example that is not finite would hide all others in the sum: such examples are taken one at a time.
        """
        tie = Tie(self._space.pass_dtype)
        with quiet_vmap():
            fast = many(group, tie)
            if tie.holds or bool((finite := fast.isfinite().all(dim=1)).all()):
                return fast, tie.holds
            tie = Tie(self._space.pass_dtype)
            for j in (~finite).nonzero().flatten().tolist():
                fast[j] = one(group.single(j))
            group.pairs = []
            if finite.any():
                fast[finite] = many(group.of(finite.nonzero().flatten().tolist()), tie)
        return fast, tie.holds


def _plus(dots: Tensor, constant: Tensor | None) -> Tensor:
    """Adds what depends on no example, [k]."""
    return dots if constant is None else dots.add_(constant)


class _Group:
    """Batches of one that differ only in the values of their tensors, which are stacked along a new leading axis.

    Attributes:
        pairs: what went into layers and came back, of parts of the group in order, where somebody wants to know.
    """

    def __init__(self, positions: list[int], template: Any, tensors: list[Tensor]) -> None:
        self.positions = positions
        self.template = template
        self.tensors = tensors
        self.pairs: list[Pairs] = []

    def batch(self, tensors: Sequence[Tensor]) -> Any:
        """Builds the batch of one with these tensors in it."""
        return put_together(self.template, tensors)

    def single(self, j: int) -> Any:
        return self.batch([t[j] for t in self.tensors])

    def of(self, some: list[int]) -> _Group:
        """Returns the group of some of its examples, given by their places in it."""
        return _Group([self.positions[j] for j in some], self.template, [t[some] for t in self.tensors])

    def parts(self, size: int) -> list[_Group]:
        """Splits the group into groups of at most ``size`` examples."""
        if len(self.positions) <= size:
            return [self]
        starts = range(0, len(self.positions), size)
        return [
            _Group(self.positions[i : i + size], self.template, [t[i : i + size] for t in self.tensors]) for i in starts
        ]


def _signs(losses: Tensor) -> Tensor:
    """Draws ±1 for each of these losses, the same each time."""
    generator = torch.Generator("cpu").manual_seed(len(losses))
    return torch.randint(2, losses.shape, generator=generator, device="cpu").mul_(2).sub_(1).to(losses)


def _merged(chunks: Iterable[tuple[list[int], Tensor]], at_once: int) -> Iterator[tuple[list[int], Tensor]]:
    """Joins chunks of rows into larger ones of up to ``at_once``: a solve gets many even if they come one by one."""
    positions: list[int] = []
    rows: list[Tensor] = []
    for more, chunk in chunks:
        if positions and len(positions) + len(more) > at_once:
            yield positions, torch.cat(rows)
            positions, rows = [], []
        positions, rows = [*positions, *more], [*rows, chunk]
    if positions:
        yield positions, torch.cat(rows)


def _collected(batches: Iterable[tuple[Any, int]], at_once: int) -> Iterator[_Group]:
    """Groups batches of one that can be stacked; it holds at most ``at_once`` of them at a time."""
    kinds: list[tuple[Any, list[int], list[list[Tensor]]]] = []

    def groups() -> Iterator[_Group]:
        for template, positions, parts in kinds:
            yield _Group(positions, template, [torch.stack(column) for column in zip(*parts, strict=True)])
        kinds.clear()

    for position, (batch, _) in enumerate(batches):
        if position % at_once == 0:
            yield from groups()
        template, tensors = take_apart(batch)
        candidates = kinds[-1:] if stands_alone(template) else kinds
        kind = next((k for k in candidates if alike(template, k[0])), None)
        if kind is None:
            kinds.append(kind := (template, [], []))
        kind[1].append(position)
        kind[2].append(tensors)
    yield from groups()

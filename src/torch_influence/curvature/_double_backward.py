"""DoubleBackward: the loop over the data of Hessian and Gauss-Newton; differentiated once, multiplied many times."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools

# Sizes of a compute batch's graph, and of its copies for the rows that are multiplied at once: enough to keep two cores
# busy, and about what their last cache holds. A convolutional net takes up to twice as long per example beyond that.
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_influence.agreement import agree
from torch_influence.batches import Batches, weighted_mean
from torch_influence.curvature._convolutions import Convolutions, channels_last, convolves
from torch_influence.curvature._curvature import Curvature
from torch_influence.curvature._doubts import SecondDerivative, doubts, second_derivative
from torch_influence.curvature._plain import Tangents, plain_product
from torch_influence.evaluation import Evaluation
from torch_influence.gradients import NOT_A_MEAN, Graph, PullBack, differentiate, grouping, saved_bytes, undisturbed
from torch_influence.linop import LinearOperator, probe_rows
from torch_influence.losses import Means
from torch_influence.plan import Step
from torch_influence.turns import Once

# Sizes of a compute batch's graph, and of its copies for the rows that are multiplied at once: enough to keep two cores
# busy, and about what their last cache holds. A convolutional net takes up to twice as long per example beyond that.
_BYTES_OF_GRAPH = 16 * 2**20
_BYTES_OF_ROWS = 16 * 2**20
_ROUNDINGS = 32  # by which two evaluations of the same loss may differ where the device adds in any order


@dataclasses.dataclass(frozen=True)
class Linearized:
    """The curvature of a batch's loss, differentiated and ready to multiply any number of times.

    Attributes:
        loss: the loss of the batch, as it was differentiated.
        product: tangents, one [k, *shape] per tensor that was differentiated by, to products of the same shapes.
        gradient: computes that of the loss, with respect to the same tensors.
        roots: tensors from which the graphs of ``product`` are reached.
        besides: tensors that are kept in memory anyway.
        kept: lists the tensors that are kept for ``product`` beside the graphs.
        row_bytes: memory that one row takes on its way through ``product``; None: as much as is kept.
        product_and_slopes: computes the product, and slope · J v [b, k] for each of the b outputs, the slope being the
            gradient of the batch's loss at the outputs: the share of an example in ∇loss · v, where an output is an
            example; None where that is not known.
    """

    loss: Tensor
    product: Callable[[Tangents], Tangents]
    gradient: Callable[[], Tangents]
    roots: Sequence[Tensor]
    besides: Any = ()
    kept: Callable[[], Sequence[Any]] = tuple
    row_bytes: int | None = None
    product_and_slopes: Callable[[Tangents], tuple[Tangents, Tensor]] | None = None

    @functools.cached_property
    def nbytes(self) -> int:
        """Counts the bytes that are kept in memory."""
        return saved_bytes(self.roots, self.besides, self.kept())

    @property
    def bytes_at_work(self) -> int:
        """Counts the bytes that a product with one row passes through beside those that are kept, or the kept ones."""
        return max(self.nbytes if self.row_bytes is None else self.row_bytes, 1)


@dataclasses.dataclass(frozen=True)
class Regularizer:
    """The Hessian ∇²reg of the regulariser, as a function that adds it to products.

    Attributes:
        add: takes sums and rows [k, d], adds ∇²reg times the rows to the sums and returns them.
        factor: r where ∇²reg = r·I.
        diagonal: whether it is a diagonal matrix.
    """

    add: Callable[[Tensor, Tensor], Tensor]
    factor: float | None = None
    diagonal: bool = False

    def __call__(self, sums: Tensor, rows: Tensor) -> Tensor:
        return self.add(sums, rows)


class DoubleBackward(Curvature):
    """Mean over the training data of a batch's curvature, without damping: product(V)[j] = (1/n) Σ_b |b| C_b V[j].

    A subclass says how a batch is differentiated. Batches may be larger than the loader's, where a comparison shows
    that this changes nothing. Graphs are kept from product to product while they fit ``budget``; the other batches are
    differentiated again each time.

    Cost: the first product is a pass over the data, later ones are backward passes through what is kept. Memory: up to
    ``budget``, one batch's graph beyond it, and for rows a batch's graph once more.

    Args:
        evaluation, batches, device: of the training data.
        budget: bytes of graphs to keep.
        told: whether the user has been warned already that the loss is no mean over the batch.

    Attributes:
        means: checks the loss of every batch that is differentiated, in the first pass over the data.
        batch_size: of the passes over the data, None for the loader's own; known after ``prepare``.
        why_not_grouped: why it is the loader's own; empty if it is not.
        graph_bytes: what the graphs of all batches would take, about; known after ``prepare``.
        kept_bytes: size of the graphs that are kept.
        kept_examples: number of examples whose graphs are kept.
        by_rules: whether products are made by rules of the layers, in all batches so far.
        why_plain_convolutions: why convolutions are torch's own, in a model that has any.
        why_no_rules: why its layers are differentiated twice by autograd; empty where rules do it, or are not tried.
        why_no_head: why it is not that of a linear head in closed form; empty where that was not looked at.
    """

    gauss_newton: bool = False
    regularized_loss: bool = False  # whether ``loss`` has the regulariser in it

    def __init__(
        self,
        evaluation: Evaluation,
        batches: Batches,
        device: torch.device,
        budget: float = 0,
        told: bool = False,
    ) -> None:
        super().__init__(evaluation, batches, device, budget, told)
        self.kept_bytes = 0
        self.kept_examples = 0
        self.batch_size: int | None = None
        self.why_not_grouped = "not looked at yet"
        self.graph_bytes = 0
        self.why_plain_convolutions = ""
        self.why_no_head = ""
        self.why_no_rules = ""
        self.by_rules = False
        self._lean = False
        self._prepared = False
        self._kept: list[tuple[Linearized, int]] = []
        self._pull_back = PullBack(evaluation)
        self._losses: Tensor | None = None  # of each batch, in order, as it was differentiated
        self._noted = 0  # how many examples these are of
        self.means = Means("train_loss" if self.regularized_loss else "data_loss", evaluation, batches, told)

    # -- for modules and verify() -------------------------------------------------------------------------------------

    def doubts(self, room: float) -> list[Warning]:
        return doubts(self, self, room)

    def from_definition(self, row: Tensor, batches: Batches) -> tuple[Tensor, float]:
        return plain_product(self.evaluation, batches, row, self.gauss_newton)

    def second_derivative(self, batch: Any) -> SecondDerivative:
        return second_derivative(self.evaluation, batch, self.gauss_newton)

    # -- a batch ------------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def linearize(self, batch: Any, leaves: Tangents, at: Callable[[], Tangents] | None = None) -> Linearized:
        """Differentiates the loss of one batch with respect to the leaves.

        With ``at``, with respect to the tensors that ``at`` returns once the loss has been evaluated.
        """

    @abc.abstractmethod
    def loss(self, leaves: Tangents, batch: Any) -> Tensor:
        """Computes what ``linearize`` differentiates; leaves the regulariser out where that is known separately."""

    def batch_product(self, batch: Any, rows: Tensor, leaves: Tangents, drawn: int = 0) -> Tensor:
        """Multiplies rows [k, d] by the curvature of the loss of one batch, regulariser included.

        ``drawn``: the number of its examples, if they were drawn at random and their losses should be checked.
        """
        linearized = self.linearize(batch, leaves)
        if drawn:
            self.means.add(batch, drawn, linearized.loss)
        product = self._multiply(linearized, rows)
        extra = self.regularizer if leaves is self.leaves else self._regularizer_at(leaves)
        return product if extra is None else extra(product, rows)

    # -- the data -----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Decides how examples are batched, once. Opens no session and draws no random number."""
        if self._prepared:
            return
        loader = self.batches.batch_size
        if self.budget:
            self.batches.stacked()
        first = self.batches.peek(range(min(loader or 1, self.batches.n)))
        linearized = self.linearize(first, self.leaves)
        if linearized.roots:
            self.graph_bytes = linearized.nbytes * self.batches.n // min(loader or 1, self.batches.n)
            wanted = _BYTES_OF_GRAPH // linearized.bytes_at_work * (loader or 1)
            try:
                self.batch_size, self.why_not_grouped = grouping(self.loss, self.evaluation, self.batches, wanted)
            except ValueError as error:  # the loss of some batch has no graph: a pass can do without, or says so again
                self.why_not_grouped = str(error)
        else:
            self.why_not_grouped = "the loss depends on the parameters by its regulariser alone"
        self._prepared = True  # now, and not when an exception has ended it

    @Once
    def leaves(self) -> tuple[Tensor, ...]:
        """The parameters as leaves, with respect to which all kept graphs are differentiated."""
        plain = self.evaluation.leaves()
        if not convolves(self.evaluation.model):
            return plain
        lean = channels_last(plain, self.evaluation.model, self.evaluation.space.current())
        first = self.batches.peek(range(min(self.batches.batch_size or 1, self.batches.n)))
        row = probe_rows(1, self.size, dtype=self.dtype, device=self.device)
        expected = self._multiply(self.linearize(first, plain), row)
        self._lean = True
        try:
            if agree(self._multiply(self.linearize(first, lean), row), expected, self.evaluation.space.pass_dtype):
                return lean
            self.why_plain_convolutions = "a product with them differs from torch's own"
        except Exception as error:  # such as a view that only another memory format allows, or a vmap in the model
            self.why_plain_convolutions = f"a product with them failed: {error}"
        self._lean = False
        return plain

    def convolutions(self, fixed: bool) -> contextlib.AbstractContextManager[Any]:
        """Returns a context for passes that ``linearize`` differentiates: lean convolutions, if they give the same."""
        return Convolutions(fixed) if self._lean else contextlib.nullcontext()

    @Once
    def regularizer(self) -> Regularizer | None:
        """The Hessian of the regulariser, where ``loss`` leaves that out, to add to products; None where it is zero."""
        return self._regularizer_at(self.leaves)

    @Once
    def operations(self) -> float:
        """The additions and multiplications of a product with one row, counted in matrix products and convolutions."""
        from torch_influence.curvature._operations import operations_of

        size = min(self.batches.batch_size or 1, self.batches.n)
        linearized = self.linearize(self.batches.peek(range(size)), self.leaves)
        row = torch.ones(1, self.size, dtype=self.dtype, device=self.device)
        return operations_of(lambda: self._multiply(linearized, row)) * self.batches.n / size

    @property
    def operations_of_minibatch(self) -> float:
        """Counts the additions and multiplications of a minibatch's product with one row."""
        return self.operations * min(self.batches.batch_size or 1, self.batches.n) / self.batches.n

    @property
    def ridge(self) -> float | None:
        """Returns r where r·I is added to the mean of the batches; None where something else is."""
        return 0.0 if self.regularizer is None else self.regularizer.factor

    @property
    def least(self) -> float | None:
        """The regulariser's r·I for Gauss-Newton, which is positive semi-definite for losses convex in the outputs."""
        return self.ridge if self.gauss_newton else None

    def describe(self) -> str:
        """Describes the path in words; ``prepare`` must have been called before."""
        size = self.batch_size or self.batches.batch_size or 1
        kept = "graphs kept while they fit" if self.budget and not self.batches.why_not_kept else "graphs made anew"
        way = "rules of its layers" if self.by_rules else "double backward"
        lean = ", convolutions by what is asked for alone" if self._lean and not self.by_rules else ""
        return f"{self.title} by {way}, {size} examples at a time, {kept}{lean}"

    def step(self) -> Step:
        """The curvature's line of ``explain()``, after it has been seen how examples are batched."""
        self.prepare()
        why_not = [
            ("a linear head in closed form", self.why_no_head),
            ("rules of its layers", self.why_no_rules),
            ("convolutions by what is asked for alone", self.why_plain_convolutions),
            ("in larger batches", self.why_not_grouped),
        ]
        nbytes = int(min(self.graph_bytes, self.budget))
        return Step("curvature", self.describe(), nbytes, [pair for pair in why_not if pair[1]])

    def product(self, rows: Tensor) -> Tensor:
        with self.evaluation.session():
            return self._mean_product(rows)

    def product_and_dots(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Beside the product ∇ℓᵢ·v [n, k], of all examples in order, where J v of each is known on the way."""
        dots: list[Tensor] = []
        with self.evaluation.session():
            product = self._mean_product(rows, dots=dots)
        whole = torch.cat(dots) if dots else rows.new_empty(0, len(rows))
        return product, whole if len(whole) == self.batches.n else None

    def dense(self) -> Tensor:
        eye = torch.eye(self.size, dtype=self.dtype, device=self.device)
        with self.evaluation.session():
            matrix = self._mean_product(eye, describe="curvature")
        del eye
        return matrix.add_(matrix.mT.clone()).mul_(0.5)

    def sampled(self, steps: int, generator: torch.Generator | None) -> Iterator[LinearOperator]:
        """Yields ``steps`` minibatch estimates, drawn with replacement at the loader's batch size."""
        if steps * (self.batches.batch_size or 1) >= self.batches.n:
            self.means.read_all()
        for batch, size in self.batches.sample(steps, generator=generator):
            yield _OfBatch(self, batch, size)
        self.means.conclude_draws()

    def narrowed(self, dtype: torch.dtype) -> LinearOperator:
        """Differentiates anew, under autocast; both share the budget, and the regulariser stays as it is."""
        self.product(probe_rows(1, self.size, dtype=self.dtype, device=self.device))  # to see how data are batched
        budget, self.budget = self.budget, max(self.kept_bytes, self.budget / 2)
        twin = type(self)(self.evaluation.narrowed(dtype), self.batches, self.device, budget - self.budget, told=True)
        twin.batch_size, twin.why_not_grouped = self.batch_size, self.why_not_grouped
        twin.graph_bytes, twin._prepared = self.graph_bytes, True
        vars(twin)["regularizer"] = self.regularizer
        return twin

    def _mean_product(self, rows: Tensor, describe: str | None = None, dots: list[Tensor] | None = None) -> Tensor:
        self.prepare()
        while True:
            if dots is not None:
                dots.clear()
            terms = (
                (self._multiply(linearized, rows, size, dots), size) for linearized, size in self._linearized(describe)
            )
            product = weighted_mean(terms)
            if self.concluded():
                return product if self.regularizer is None else self.regularizer(product, rows)

    def saw(self, batch: Any, size: int, loss: Tensor, start: int) -> None:
        """Takes note of the loss of a batch, whose examples are ``size`` from ``start`` on, in a pass over the data."""
        self.means.add(batch, size, loss, range(start, start + size))
        if start != self._noted:  # of a pass that is not the first
            return
        step = self.batch_size or self.batches.batch_size or 1
        if self._losses is None:
            self._losses = torch.empty(-(-self.batches.n // step), dtype=torch.float64, device=self.device)
        self._losses[start // step] = loss.detach()
        self._noted += size

    def losses_hold(self) -> bool | None:
        """Tells whether the losses of all batches are still what they were when they were differentiated.

        None where not all of them were, or the question ends with an error. Costs one forward pass over the data; the
        random states are left as they were.
        """
        before = self._losses
        if before is None or self._noted != self.batches.n:
            return None
        try:
            with torch.no_grad(), undisturbed(self.batches, self.device), self.convolutions(fixed=False):
                read = self.batches.read(None, self.batch_size)
                now = torch.stack([self.loss(self.leaves, batch).double() for batch, _ in read])
        except Exception:  # an edit that breaks the loss, or the data, say so themselves
            return None
        close = _ROUNDINGS * torch.finfo(self.evaluation.space.pass_dtype).eps * torch.maximum(now.abs(), before.abs())
        same = (now == before) | (now.isnan() & before.isnan())
        return bool((same | (now.isfinite() & before.isfinite() & ((now - before).abs() <= close))).all())

    def concluded(self) -> bool:
        """Tells, after a pass over the data, whether its result can be used; if not, the pass must be made again.

        It is not if batches were larger than the loader's, and their losses not the means of their examples': then the
        loader's own batch size is used from now on.
        """
        if self.means.conclude() or self.batch_size is None:
            return True
        self.batch_size, self.why_not_grouped = None, NOT_A_MEAN
        self._losses, self._noted = None, 0
        self._kept, self.kept_bytes, self.kept_examples = [], 0, 0
        return False

    def _linearized(self, describe: str | None) -> Iterator[tuple[Linearized, int]]:
        """Yields all batches, differentiated: first the kept ones, then the others, which are kept while they fit."""
        yield from self._kept
        keep = self.budget > 0 and not self.batches.why_not_kept
        rest = range(self.kept_examples, self.batches.n)
        if not len(rest):
            self.batches.pass_by()
            return
        batches: Iterable[tuple[Any, int]] = self.batches.read(rest if self._kept else None, self.batch_size)
        if describe is not None:
            step = self.batch_size or self.batches.batch_size or 1
            batches = self.batches.bar(batches, describe, -(-len(rest) // step))
        start = rest.start
        for batch, size in batches:
            copies = self.evaluation.edits.get("train_loss")
            linearized = self.linearize(batch, self.leaves)
            if self.evaluation.edits.get("train_loss") != copies:  # an edit of data that earlier graphs may share
                self._kept, self.kept_bytes, self.kept_examples, keep = [], 0, 0, False
            self.saw(batch, size, linearized.loss, start)
            start += size
            keep = keep and not self.batches.why_not_kept
            if keep:
                keep = self.kept_bytes + linearized.nbytes <= self.budget
                if keep:
                    self._kept.append((linearized, size))
                    self.kept_bytes += linearized.nbytes
                    self.kept_examples += size
            yield linearized, size

    def _multiply(
        self, linearized: Linearized, rows: Tensor, size: int = 0, dots: list[Tensor] | None = None
    ) -> Tensor:
        """Multiplies rows by one batch's curvature; adds ∇ℓᵢ·v [size, k] of its examples to ``dots``, if known."""
        space, both = self.evaluation.space, linearized.product_and_slopes
        at_once = max(1, _BYTES_OF_ROWS // linearized.bytes_at_work)
        some = [rows] if len(rows) == 1 else rows.split(at_once)
        if dots is None or both is None:
            products = [linearized.product(space.split(few)) for few in some]
        else:
            pairs = [both(space.split(few)) for few in some]
            products, each = [pair[0] for pair in pairs], torch.cat([pair[1] for pair in pairs], dim=1)
            if len(each) == size:
                dots.append(each.to(rows.dtype).mul_(size))
        flat = [space.flatten(product) for product in products]
        return flat[0] if len(flat) == 1 else torch.cat(flat)

    def _kept_anyway(self, batch: Any) -> Any:
        """Lists what graphs may share with the data and the model."""
        return batch, tuple(self.evaluation.model.parameters())

    def _regularizer_at(self, leaves: Tangents) -> Regularizer | None:
        if self.regularized_loss:
            return None
        value = self.evaluation.train_regularization(leaves)
        if not isinstance(value, Tensor) or not value.requires_grad:
            return None
        gradient = differentiate(value, leaves, create_graph=True)
        if not any(g.requires_grad for g in gradient):  # linear
            return None
        space = self.evaluation.space

        graph = Graph("regularizer", gradient, leaves)

        def product(rows: Tensor) -> Tensor:
            return space.flatten(self._pull_back(graph, space.split(rows)))

        # Weight decay and the like are diagonal: the product with a row of ones is then the whole diagonal.
        row = probe_rows(1, self.size, dtype=self.dtype, device=self.device)
        diagonal = product(torch.ones_like(row))
        if not agree(diagonal * row, product(row), space.pass_dtype):
            return Regularizer(lambda sums, rows: sums.add_(product(rows)))
        if bool((diagonal == diagonal[0, 0]).all()):
            factor = float(diagonal[0, 0])
            return Regularizer(lambda sums, rows: sums.add_(rows, alpha=factor), factor, diagonal=True)
        return Regularizer(lambda sums, rows: sums.addcmul_(rows, diagonal), diagonal=True)


class _OfBatch(LinearOperator):
    """The curvature of one batch, as an operator."""

    def __init__(self, whole: DoubleBackward, batch: Any, examples: int) -> None:
        self._whole, self._batch, self._examples = whole, batch, examples
        self.size, self.dtype, self.device = whole.size, whole.dtype, whole.device

    def product(self, rows: Tensor) -> Tensor:
        with self._whole.evaluation.session():
            return self._whole.batch_product(self._batch, rows, self._whole.leaves, drawn=self._examples)

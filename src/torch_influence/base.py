"""BaseInfluenceModule: from a model, an objective and two loaders to influence scores."""

from __future__ import annotations

import abc
import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import data

from torch_influence.arguments import check_device, check_places
from torch_influence.batches import Batches
from torch_influence.caller import level_of_the_user
from torch_influence.checks import CheckMethods
from torch_influence.curvature import Curvature, GaussNewton, Hessian, LinearHead, doubts, linear_head
from torch_influence.examples import ExampleGradients
from torch_influence.gradients import mean_gradient, regularizer_gradient
from torch_influence.influences import InfluenceMethods
from torch_influence.legacy import LegacyHelpers
from torch_influence.linop import probe_rows
from torch_influence.losses import Means
from torch_influence.objective import BaseObjective
from torch_influence.parameters import Selection
from torch_influence.parts import Parts
from torch_influence.plan import Plan, Step
from torch_influence.reporting import ReportMethods
from torch_influence.resident import Cache, budget, free_memory
from torch_influence.solvers import OnFailure, SolveError, SolveReport, check_on_failure, fail

__all__ = ["BaseInfluenceModule", "BaseObjective"]


class BaseInfluenceModule(InfluenceMethods, CheckMethods, ReportMethods, LegacyHelpers, Parts, abc.ABC):
    """Influence of training examples on the test loss; a subclass says how to multiply by the inverse curvature.

    With n training examples, training objective L(θ) = (1/n) Σᵢ ℓᵢ(θ) + reg(θ) and curvature A = ∇²L(θ) + damp·I,

        s_q = A⁻¹ ∇f_q(θ)                            ``stest``: f_q is the test loss, or its mean over some queries
        score[i, q] = (1/n) ∇(ℓᵢ + reg)(θ) · s_q     ``influences``, ``influence_matrix``

    is, to first order, by how much f_q **changes when example i is removed** and the model is trained again. Positive:
    removing i raises the test loss, i is helpful. Negative: i is harmful. Units: those of the test loss.

    The model is moved to ``device`` once, here; nothing else of it changes: not its Parameter objects, gradients,
    buffers, train or eval mode, and not when an exception ends a computation. Losses are evaluated in eval mode.
    Threads with one module, or with modules over one model, take turns; ``last_report`` is that of the last call.

    Args:
        model: the trained model.
        objective: the losses.
        train_loader: the training data. Read in data-set order in batches of the loader's size, through its
            collate_fn; shuffle, sampler (with a warning, if it selects) and drop_last are ignored.
        test_loader: the test data, likewise; None if only stests of your own are used.
        device: where to compute.
        params: restricts the differentiated parameters: a name, a glob (``"head.*"``), a Parameter, a list of these,
            or a predicate ``f(name, parameter)``. None: all with requires_grad. The rest is held fixed.
        progress: shows tqdm bars.
        cache: whether the data of each loader are kept on the device when they have been read once: True, whatever it
            takes; False, never; a number, up to so many bytes; ``"auto"``, up to a quarter of the memory that is free
            on the device then. It changes no result. Data that differ from one reading to the next (random
            augmentation) are kept only with True, which freezes one draw, with a warning. A data set that changes is
            read again: its length, its attributes, its tensors and three of its examples are looked at in each call.
            After other edits (an example in a NumPy array or a file) call ``clear_cache()``.
        on_failure: what to do when a solve fails: "warn" (ConvergenceWarning, DivergenceWarning,
            NegativeCurvatureWarning), "raise" (a SolveError, which has the solution and the report), or "ignore".

    Attributes:
        last_report: how the solves of the last public call that solved went, a SolveReport; None before that, and
            after a call that was interrupted in its first solve.

    A subclass implements ``inverse_hvp``. It gets one vector [d] at a time, or rows [k, d] if it sets the class
    attribute ``batched = True``. ``hvp``, ``batches`` and ``flat_parameters`` are there to build it from.

    Examples:
        >>> class Identity(BaseInfluenceModule):      # A = I: gradient products, "TracIn" at the last checkpoint
        ...     batched = True
        ...     def inverse_hvp(self, vec):
        ...         return vec
    """

    batched: ClassVar[bool] = False
    samples: ClassVar[bool] = False  # inverse_hvp reads a sample of the data, and they need not be read in whole
    either_side: ClassVar[bool] = False  # inverse_hvp is the product with one symmetric matrix, to its tolerance
    gnh: bool = False

    def __init__(
        self,
        model: nn.Module,
        objective: BaseObjective,
        train_loader: data.DataLoader[Any],
        test_loader: data.DataLoader[Any] | None,
        device: torch.device | str,
        *,
        params: Selection = None,
        progress: bool = False,
        cache: Cache = "auto",
        on_failure: OnFailure = "warn",
    ) -> None:
        check_on_failure(on_failure)
        self.on_failure = on_failure
        check_places(
            model=model, objective=objective, train_loader=train_loader, test_loader=test_loader, device=device
        )
        self.device = check_device(device)
        self.progress = progress
        self._reports: list[SolveReport] = []
        self._call_of_reports = 0
        self._operator: Curvature | LinearHead | None = None
        self._why_no_head = ""
        self._take(model, objective, train_loader, test_loader, params, cache)

    @abc.abstractmethod
    def inverse_hvp(self, vec: Tensor) -> Tensor:
        """A⁻¹ v for a vector [d], and for rows [k, d] where the class sets ``batched = True``.

        Args:
            vec: v, [d] or [k, d], in the order of ``params_names``.

        Returns:
            A⁻¹ v, of the same shape.
        """

    # -- gradients and curvature --------------------------------------------------------------------------------------

    def train_loss_grad(self, train_idxs: Sequence[int]) -> Tensor:
        """Gradient of the mean training loss, regulariser included, over these training examples: [d].

            ∇ (1/m) Σᵢ ℓᵢ(θ) + ∇reg(θ)                  i over the m examples, in batches of the loader's size

        Args:
            train_idxs: distinct indices into the training data, at least one.

        Returns:
            [d], on the module's device.

        Raises:
            ValueError: no index, or one twice.
            IndexError: one out of range.
            TypeError: indices that are not integers.

        Cost:
            one pass over these examples.

        Examples:
            >>> gradient = module.train_loss_grad([0, 1, 2])
        """
        return self._mean_gradient("train_loss", self._train, self._train.indices(train_idxs, "train_idxs"))

    def test_loss_grad(self, test_idxs: Sequence[int]) -> Tensor:
        """Gradient of the mean test loss over these test examples: [d].

        Args:
            test_idxs: distinct indices into the test data, at least one.

        Returns:
            [d], on the module's device.

        Raises:
            ValueError, IndexError, TypeError: as ``train_loss_grad``; TypeError where there are no test data.

        Cost:
            one pass over these examples.

        Examples:
            >>> gradient = module.test_loss_grad([0])
        """
        return self._mean_gradient("test_loss", self._test, self._test.indices(test_idxs, "test_idxs"))

    def hvp(self, vecs: Tensor) -> Tensor:
        """Curvature of the training objective times v, without damping: [d] -> [d], or rows [k, d] -> [k, d].

        H v = (1/n) Σᵢ ∇²ℓᵢ(θ) v + ∇²reg(θ) v, or Gauss-Newton in place of ∇²ℓ when the module has ``gnh=True``.

        Args:
            vecs: v, [d] or [k, d].

        Returns:
            H v, of the same shape, in the parameters' dtype on the module's device.

        Raises:
            TypeError: not a tensor.
            ValueError: another shape.

        Cost:
            one pass over the training data, however many rows.

        Source:
            Pearlmutter (1994), by reverse over reverse differentiation; Gauss-Newton: Schraudolph (2002), eq. 6.

        Examples:
            >>> products = module.hvp(torch.ones(2, module.flat_parameters().numel()))
        """
        rows = self._as_rows(vecs, "vecs")
        with self._evaluation.session():
            return self._curvature().product(rows).reshape(vecs.shape)

    def flat_parameters(self) -> Tensor:
        """The selected parameters as one vector [d], detached, in the order of ``params_names``.

        Returns:
            [d], a copy.

        Examples:
            >>> d = module.flat_parameters().numel()
        """
        with self._evaluation.alone():
            return self._space.flatten([p.detach() for p in self._space.current()])

    def batches(
        self,
        *,
        train: bool = True,
        batch_size: int | None = None,
        idxs: Sequence[int] | None = None,
        sample: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[tuple[Any, int]]:
        """Yields (batch on the device, number of its examples), in data-set order.

        Args:
            train: training data, else test data.
            batch_size: the loader's own by default.
            idxs: only these examples, in this order.
            sample: so many batches of examples drawn with replacement, instead of one pass in order.
            generator: where these are drawn from; torch's default generator if None.

        Returns:
            An iterator over pairs (batch, size).

        Raises:
            ValueError, IndexError, TypeError: ``idxs`` as in ``train_loss_grad``.

        Cost:
            a pass over the examples named.

        Examples:
            >>> total = sum(size for batch, size in module.batches(train=True, batch_size=10))
        """
        batches = self._train if train else self._test
        with self._evaluation.alone():
            if not self._evaluation.is_open and not self._watch.is_frozen:
                batches.refresh()
            indices = None if idxs is None else batches.indices(idxs, "idxs")
            if sample is None:
                passing = batches.read(indices, batch_size)
            else:
                passing = batches.sample(sample, indices=indices, batch_size=batch_size, generator=generator)
        return passing if self._evaluation.is_open else self._one_by_one(passing)

    def explain(self, queries: int = 1) -> Plan:
        """How influences of so many queries will be computed, why not faster, and what memory that takes.

        Nothing is solved or scored; but the data are read and what the curvature is made of is captured and verified,
        as the first solve would do, and a few examples are scored with random vectors to see which way works.

        Args:
            queries: right-hand sides at once.

        Returns:
            A ``Plan``: ``print`` it, or look at its ``steps``.

        Raises:
            ValueError: queries is less than 1.
            TypeError: queries is no integer.

        Cost:
            up to a pass over the training data, which the first solve saves.

        Examples:
            >>> print(module.explain(queries=100))
            >>> module.explain()["curvature"].path
        """
        if not isinstance(queries, int):
            raise TypeError(f"queries: expected a number of them, got {queries!r} of {type(queries).__name__}")
        if queries < 1:
            raise ValueError(f"queries: expected at least 1, got {queries}")
        with self._evaluation.session():
            operator = self._curvature()
            not_head = [("a linear head in closed form", self._why_no_head)] if self._why_no_head else []
            nbytes = operator.kept_bytes
            if isinstance(operator, Curvature):
                operator.prepare()
                nbytes = int(min(operator.graph_bytes, operator.budget))
                if operator.why_plain_convolutions:
                    not_head.append(("convolutions by what is asked for alone", operator.why_plain_convolutions))
                if operator.why_not_grouped:
                    not_head.append(("in larger batches", operator.why_not_grouped))
            examples = self._examples()
            few = probe_rows(queries, self._space.size, dtype=self._space.dtype, device=self.device)
            for _ in examples.dots(sorted({0, self._train.n // 2, self._train.n - 1}), few):
                pass
            solver = self._solver(queries)
        kept = self._train
        form = "kept on the device" if not kept.why_not_kept else "read again for each pass"
        return Plan(
            (
                Step("data", form, kept.kept_bytes, [("kept", kept.why_not_kept)] if kept.why_not_kept else ()),
                Step("curvature", operator.describe(), nbytes, not_head),
                solver,
                Step(
                    "scores",
                    examples.path,
                    self._train.n * queries * self._row_bytes // self._space.size,
                    [*examples.why_not.items()],
                ),
            )
        )

    def clear_cache(self) -> None:
        """Drops what is kept: the next call reads the data again. For edits that are not noticed, see cache.

        And of what losses depend on, those outside of the objective's and the model's attributes that touch none of the
        four training examples that each call looks at.

        Examples:
            >>> module.clear_cache()
        """
        with self._evaluation.alone():
            for batches in self._opened():
                batches.clear()
            self._watch.drop()
            self._forget()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """A block in which calls don't look for changes: for many short ones, of a loop or a service.

        Whatever was changed before the block is seen when it begins. Inside nothing is looked at: neither parameters
        and buffers, nor what the losses depend on, nor the data. So change none of it there: results would be of the
        old, of the new or of both, and what is kept of them would be used afterwards. What is set on the module
        (``module.objective = ...``, ``module.damp = ...``) and ``clear_cache()`` count at once, here too. When the
        block ends everything is looked at again. Blocks may be nested; one thread's block holds for all threads.

        Yields:
            Nothing.

        Raises:
            ValueError, TypeError: what any call says of a model or of data that can't be used.

        Cost:
            one look for changes when the block begins: a checksum of the parameters, and up to eight forward and
            backward passes over one example. Each call in the block saves as much.

        Examples:
            >>> s = module.stest([0])
            >>> with module.frozen():
            ...     scores = [module.influences([i], None, stest=s) for i in range(10)]
        """
        holder = object()
        try:
            with self._evaluation.session():
                self._watch.freeze(holder)
            yield
        finally:
            self._watch.thaw(holder)

    # -- solves; the scores made of them are in influences.py ---------------------------------------------------------

    def stest(self, test_idxs: Sequence[int]) -> Tensor:
        """The vector s = A⁻¹ ∇f(θ), f the mean test loss over these test examples: [d].

        Args:
            test_idxs: distinct indices into the test data, at least one.

        Returns:
            [d], on the module's device; ``influences(train_idxs, None, stest=s)`` takes it.

        Raises:
            ValueError, IndexError, TypeError: as ``test_loss_grad``.
            SolveError: with ``on_failure="raise"``, a solve that fails.

        Cost:
            one pass over these examples, and one solve.

        Source:
            Koh and Liang (2017), section 3, s_test.

        Examples:
            >>> s = module.stest([0])
            >>> scores = module.influences([0, 1, 2], None, stest=s)
        """
        with self._evaluation.session():
            return self._checked_inverse(self.test_loss_grad(test_idxs))

    def stests(self, test_idxs: Sequence[int] | None = None) -> Tensor:
        """One s_q = A⁻¹ ∇f_q(θ) per test example, solved together where the solver can: [k, d].

        Args:
            test_idxs: distinct indices into the test data (default: all).

        Returns:
            [k, d], on the module's device, in the order given.

        Raises:
            ValueError, IndexError, TypeError: as ``test_loss_grad``, but no index is allowed.
            SolveError: with ``on_failure="raise"``, a solve that fails.

        Cost:
            one pass over these examples, and one solve of k right-hand sides, all in memory; ``influence_matrix`` takes
            as many at once as fit.

        Examples:
            >>> rows = module.stests([0, 1])
        """
        indices = self._test.indices(test_idxs, "test_idxs")
        with self._evaluation.session():
            if not indices:
                return self._no_rows()
            if self._overridden("stest"):
                return torch.stack([self.stest([i]) for i in indices])
            if self._overridden("test_loss_grad"):
                return self._inverse_rows(torch.stack([self.test_loss_grad([i]) for i in indices]))
            self._check_mean("test_loss", self._test)
            examples = ExampleGradients(self._evaluation.test_loss, self._evaluation, self._test, "test gradients")
            gradients = self._no_rows(len(indices))
            for positions, rows in examples.rows(indices):
                gradients[positions] = rows
            return self._inverse_rows(gradients)

    @property
    def last_report(self) -> SolveReport | None:
        """How the solves of the last public call that solved went: a SolveReport, or None."""
        return SolveReport.joined(self._reports) if self._reports else None

    @last_report.setter
    def last_report(self, report: SolveReport | None) -> None:
        self._reports = [] if report is None else [report]

    # -- for the modules of this package ------------------------------------------------------------------------------

    def _curvature(self) -> Curvature | LinearHead:
        """The undamped curvature; what it keeps is good for as long as nothing has changed. Inside a session."""
        self._check_mean("train_loss", self._train)
        if self._operator is None:
            allowed = budget(self._cache, self.device) - self._train.kept_bytes
            told = bool(self._means_checked["train_loss"])
            plain = (GaussNewton if self.gnh else Hessian)(self._evaluation, self._train, self.device, allowed, told)
            head = linear_head(plain, streamed=not self.samples)
            self._operator, self._why_no_head = (plain, head) if isinstance(head, str) else (head, "")
            if found := doubts(plain, self._operator, free_memory(self.device) / 4):
                fail(found, self.on_failure)
        return self._operator

    def _solved(self, solve: Callable[..., tuple[Tensor, SolveReport]], *args: Any, **options: Any) -> Tensor:
        """The solution, after its report has been put beside those of the same public call. Inside a session."""
        if self._call_of_reports != self._calls:
            self._reports, self._call_of_reports = [], self._calls
        if self._reports:
            self._reports[-1] = self._reports[-1].condensed()
        try:
            x, report = solve(*args, **options)
        except SolveError as error:
            if error.report is not None:
                self._reports.append(error.report)
            raise
        self._reports.append(report)
        return x

    def _solver(self, queries: int) -> Step:
        """How so many right-hand sides are solved for. Inside a session."""
        return Step("solver", f"inverse_hvp of {type(self).__name__}", self._row_bytes * queries)

    @property
    def _row_bytes(self) -> int:
        return self._space.size * torch.finfo(self._space.dtype).bits // 8

    def _as_rows(self, vecs: Tensor | None, argument: str, vectors_only: bool = False) -> Tensor:
        d = self._space.size
        if not isinstance(vecs, Tensor):
            raise TypeError(f"{argument}: expected a tensor, got {type(vecs).__name__}")
        if vecs.dim() not in ((1,) if vectors_only else (1, 2)) or vecs.shape[-1] != d:
            shapes = f"[{d}]" if vectors_only else f"[{d}] or [k, {d}]"
            raise ValueError(f"{argument}: expected shape {shapes}, got {list(vecs.shape)}")
        return vecs.detach().to(self.device, self._space.dtype).reshape(-1, d)

    def _bar(self, iterable: Iterable[Any], describe: str, total: int | None) -> Iterable[Any]:
        if not self.progress:
            return iterable
        from tqdm.auto import tqdm  # imported when wanted: it probes for a notebook

        return tqdm(iterable, desc=describe, total=total, leave=False, disable=None)  # None: only on a terminal

    def _warn_if_train_loss_is_overridden(self) -> None:
        if self.gnh and self._evaluation.overrides_train_loss:
            warnings.warn(
                "objective.train_loss is overridden, but with gnh=True the curvature is built from train_outputs, "
                "train_loss_on_outputs and train_regularization; scores still use train_loss",
                UserWarning,
                stacklevel=level_of_the_user(),
            )

    # -- private ------------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Drops the curvature, and in subclasses what they have made of it."""
        super()._forget()
        self._operator = None

    def _losses_hold(self) -> bool | None:
        """Whether all training losses are those that the curvature was made of; None where that is not known."""
        operator = self._operator
        plain = operator.plain if isinstance(operator, LinearHead) else operator
        return None if plain is None else plain.losses_hold()

    def _mean_gradient(self, loss: str, batches: Batches, indices: list[int]) -> Tensor:
        if not indices:
            raise ValueError(
                f"{loss}_grad: expected at least one index, got none; the mean over no examples is undefined"
            )
        with self._evaluation.session():
            self._check_mean(loss, batches)
            means = Means(loss, self._evaluation, batches)
            look = None if self._means_checked[loss] else means.add
            gradient = mean_gradient(getattr(self._evaluation, loss), self._evaluation, batches, indices, look)
            means.conclude()
            return gradient

    def _one_by_one(self, passing: Iterator[tuple[Any, int]]) -> Iterator[tuple[Any, int]]:
        """Yields the same batches; reads each while no other thread uses what is kept of the data."""
        while True:
            with self._evaluation.alone():
                found = next(passing, None)
            if found is None:
                return
            yield found

    def _examples(self) -> ExampleGradients:
        evaluation = self._evaluation
        if evaluation.overrides_train_loss:  # its parts are not known
            return ExampleGradients(evaluation.train_loss, evaluation, self._train, "scores")
        constant = regularizer_gradient(evaluation)
        return ExampleGradients(
            evaluation.train_loss, evaluation, self._train, "scores", evaluation.data_loss, constant
        )

    def _inverse_rows(self, rows: Tensor) -> Tensor:
        if self.batched:
            return self._checked_inverse(rows)
        return torch.stack([self._checked_inverse(row) for row in rows])

    def _checked_inverse(self, vec: Tensor) -> Tensor:
        """Calls inverse_hvp, which may be a user's, for [d] or [k, d], and checks what it returns."""
        x = self.inverse_hvp(vec)
        if not isinstance(x, Tensor):
            raise TypeError(f"inverse_hvp: expected it to return a tensor, got {type(x).__name__}")
        if x.shape != vec.shape:
            raise ValueError(f"inverse_hvp: expected it to return shape {list(vec.shape)}, got {list(x.shape)}")
        return x

    def _no_rows(self, k: int = 0) -> Tensor:
        return torch.empty(k, self._space.size, dtype=self._space.dtype, device=self.device)

    def _overridden(self, method: str) -> bool:
        return getattr(type(self), method) is not getattr(BaseInfluenceModule, method)

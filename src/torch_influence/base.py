"""BaseInfluenceModule: from a model, an objective and two loaders to influence scores."""

from __future__ import annotations

import abc
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.utils import data

from torch_influence import memory, verification
from torch_influence.arguments import check_device, check_places
from torch_influence.diagnostics import Damping, Spectrum, ends_of, suggest_damping
from torch_influence.failures import OnFailure, SolveError, check_on_failure
from torch_influence.legacy import LegacyHelpers
from torch_influence.linop import probe_rows
from torch_influence.memory import Cache
from torch_influence.objective import BaseObjective
from torch_influence.parameters import Selection
from torch_influence.plan import Plan, Step
from torch_influence.problem import Problem
from torch_influence.scores import (
    Ranking,
    Tile,
    TopInfluences,
    check_top_k,
    from_stests,
    from_training_rows,
    top,
    whole,
)
from torch_influence.solvers import SolveReport
from torch_influence.verification import Verification

__all__ = ["BaseInfluenceModule", "BaseObjective"]

_VECTORS_OF_A_SOLVE = 8  # conjugate gradients keep 5 for each right-hand side; and what goes in and comes out

_Result = TypeVar("_Result")


def _of_the_problem(name: str, doc: str) -> Any:
    """A property that is one of the module's Problem; what a subclass sets before ``super().__init__`` waits for it."""

    def read(self: BaseInfluenceModule) -> Any:
        return getattr(self._problem, name)

    def write(self: BaseInfluenceModule, value: Any) -> None:
        if "_problem" in vars(self):
            setattr(self._problem, name, value)
        else:
            vars(self).setdefault("_early", {})[name] = value

    return property(read, write, doc=doc)


class BaseInfluenceModule(LegacyHelpers, abc.ABC):
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

    batched: bool = False
    samples: bool = False  # inverse_hvp reads a sample of the data, and they need not be read in whole
    either_side: bool = False  # inverse_hvp is the product with one symmetric matrix, to its tolerance

    _settings: ClassVar[dict[str, Any]] = {}  # what subclasses set in their bodies of what belongs to the problem

    objective = _of_the_problem("objective", "The losses.")
    train_loader = _of_the_problem("train_loader", "The loader of the training data.")
    test_loader = _of_the_problem("test_loader", "The loader of the test data, or None.")
    damp = _of_the_problem("damp", "λ, which is added once to the curvature; 0 where nothing else was set.")
    curvature = _of_the_problem("kind", 'Which curvature: "hessian", "gauss-newton" or a subclass of Curvature.')
    gnh = _of_the_problem("gnh", "Whether the curvature is Gauss-Newton's; an older spelling of ``curvature``.")
    progress = _of_the_problem("progress", "Whether tqdm bars are shown.")
    on_failure = _of_the_problem("on_failure", '"warn", "raise" or "ignore": what to do when a solve fails.')

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
        check_places(
            model=model, objective=objective, train_loader=train_loader, test_loader=test_loader, device=device
        )
        self.device = check_device(device)
        self._calls = 0  # of public methods
        self._reports: list[SolveReport] = []
        self._call_of_reports = 0
        self._problem = Problem(
            model,
            objective,
            train_loader,
            test_loader,
            self.device,
            params=params,
            cache=cache,
            progress=progress,
            on_failure=on_failure,
            to_device=self._transfer_to_device,
        )
        for name, value in (self._settings | vars(self).pop("_early", {})).items():
            setattr(self._problem, name, value)

    def __init_subclass__(cls, **options: Any) -> None:
        """Lets a subclass set the damping, say, in its body: ``damp = 0.1``."""
        super().__init_subclass__(**options)
        for name in ("damp", "gnh", "curvature", "progress", "on_failure"):
            if name in vars(cls) and not isinstance(vars(cls)[name], property):
                cls._settings = cls._settings | {"kind" if name == "curvature" else name: vars(cls)[name]}
                delattr(cls, name)

    @property
    def model(self) -> nn.Module:
        """The user's model."""
        return self._problem.model if self._stand_in is None else self._stand_in

    @model.setter
    def model(self, model: nn.Module) -> None:
        self._problem.model = model

    @property
    def params_names(self) -> tuple[str, ...]:
        """Names of the selected parameters, in the order of rows."""
        return self._problem.space.names

    @property
    def params_shape(self) -> tuple[torch.Size, ...]:
        """Their shapes."""
        return self._problem.space.shapes

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
        return self._problem.mean_gradient("train_loss", self._problem.train.indices(train_idxs, "train_idxs"))

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
        return self._problem.mean_gradient("test_loss", self._problem.test.indices(test_idxs, "test_idxs"))

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
        rows = self._problem.as_rows(vecs, "vecs")
        with self._session():
            return self._problem.curvature(not self.samples).product(rows).reshape(vecs.shape)

    def flat_parameters(self) -> Tensor:
        """The selected parameters as one vector [d], detached, in the order of ``params_names``.

        Returns:
            [d], a copy.

        Examples:
            >>> d = module.flat_parameters().numel()
        """
        problem = self._problem
        with problem.evaluation.alone():
            return problem.space.flatten([p.detach() for p in problem.space.current()])

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
        problem = self._problem
        batches = problem.train if train else problem.test
        with problem.evaluation.alone():
            if not problem.is_open and not problem.watch.is_frozen:
                batches.refresh()
            indices = None if idxs is None else batches.indices(idxs, "idxs")
            if sample is None:
                passing = batches.read(indices, batch_size)
            else:
                passing = batches.sample(sample, indices=indices, batch_size=batch_size, generator=generator)
        return passing if problem.is_open else self._one_by_one(passing)

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
        problem = self._problem
        with self._session():
            multiplied = self._curvature_step()
            examples, n = problem.train_gradients(of_all=True), problem.train.n
            few = probe_rows(queries, problem.space.size, dtype=problem.space.dtype, device=self.device)
            for _ in examples.dots(sorted({0, n // 2, n - 1}), few):
                pass
            solved = self._solve_step(queries)
            nbytes = n * queries * problem.row_bytes // problem.space.size
            scored = Step("scores", examples.path, nbytes, [*examples.why_not.items()])
            return Plan((problem.train.step(), multiplied, solved, scored))

    def clear_cache(self) -> None:
        """Drops what is kept: the next call reads the data again. For edits that are not noticed, see cache.

        And of what losses depend on, those outside of the objective's and the model's attributes that touch none of the
        four training examples that each call looks at.

        Examples:
            >>> module.clear_cache()
        """
        with self._problem.evaluation.alone():
            self._problem.clear()
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
        with self._problem.frozen():
            yield

    # -- solves and scores --------------------------------------------------------------------------------------------

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
        with self._session():
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
        problem = self._problem
        indices = problem.test.indices(test_idxs, "test_idxs")
        with self._session():
            if not indices:
                return problem.no_rows()
            if self._overridden("stest"):
                return torch.stack([self.stest([i]) for i in indices])
            if self._overridden("test_loss_grad"):
                return self._inverse_rows(torch.stack([self.test_loss_grad([i]) for i in indices]))
            gradients = problem.no_rows(len(indices))
            for positions, rows in problem.test_gradients().rows(indices):
                gradients[positions] = rows
            return self._inverse_rows(gradients)

    def influences(
        self, train_idxs: Sequence[int], test_idxs: Sequence[int] | None, stest: Tensor | None = None
    ) -> Tensor:
        """Scores of training examples with respect to the mean test loss over a set of test examples.

        score[i] = (1/n) ∇(ℓᵢ + reg)(θ) · s: the predicted change of the mean test loss when example i is removed and
        the model trained again. Positive: i is helpful. Per-example gradients are those of batches of one.

        Args:
            train_idxs: distinct indices of training examples.
            test_idxs: distinct indices of test examples; None if ``stest`` is given.
            stest: a result of ``stest`` to use again, [d].

        Returns:
            [len(train_idxs)] on the CPU, in the order given.

        Raises:
            ValueError: duplicates, wrong shapes, no queries.
            IndexError: an index out of range.
            TypeError: indices that are not integers.

        Cost:
            one solve, unless ``stest`` is given, and one pass over the training examples named.

        Source:
            Koh and Liang 2017, eq. 2, with the sign of removal and the factor 1/n.

        Examples:
            >>> scores = module.influences(train_idxs=range(5), test_idxs=[0])
        """
        problem = self._problem
        indices = problem.train.indices([] if train_idxs is None else train_idxs, "train_idxs")
        if train_idxs is None:
            raise ValueError("train_idxs: expected indices, got None; influence_matrix() takes None for all examples")
        if stest is None and test_idxs is None:
            raise ValueError("test_idxs: expected indices of test examples, got None without an stest")
        with self._session():
            s = self.stest(test_idxs) if stest is None and test_idxs is not None else stest
            tiles = self._tiles_of(indices, problem.as_rows(s, "stest", vectors_only=True))
            return whole(tiles, indices, 1, problem.space.dtype).squeeze(1)

    @overload
    def influence_matrix(
        self,
        train_idxs: Sequence[int] | None = None,
        test_idxs: Sequence[int] | None = None,
        *,
        top_k: None = None,
        score_rtol: float | None = None,
        max_products: int | None = None,
    ) -> Tensor: ...

    @overload
    def influence_matrix(
        self,
        train_idxs: Sequence[int] | None = None,
        test_idxs: Sequence[int] | None = None,
        *,
        top_k: int,
        score_rtol: float | None = None,
        max_products: int | None = None,
    ) -> TopInfluences: ...

    def influence_matrix(
        self,
        train_idxs: Sequence[int] | None = None,
        test_idxs: Sequence[int] | None = None,
        *,
        top_k: int | None = None,
        score_rtol: float | None = None,
        max_products: int | None = None,
    ) -> Tensor | TopInfluences:
        """score[i, q] for training examples i and test examples q (default: all): [n_train, n_query] on the CPU.

        Column q is ``influences(train_idxs, [test_idxs[q]])``; columns are solved together, as far as memory allows.
        With fewer training examples than queries the modules of this package but LiSSA solve for the training examples
        instead, A being symmetric.

        Args:
            train_idxs: distinct indices of training examples.
            test_idxs: distinct indices of test examples, each of them a query.
            top_k: keep only so many of each query's most helpful and of its most harmful training examples, while
                scores are computed. All, where there are fewer training examples: an example may be in both.
            score_rtol: a tolerance in units of the answer, beside the module's rtol: a query is done, too, when the
                estimated error of its scores is this share of their size. The estimate is that of |s - s*|_A / |s*|_A
                for its stest s (``SolveReport.error``), by which scores, as a vector, are off to within a factor of 2.
            max_products: products with the curvature at the most in each solve, verification among them: the best
                scores for so many passes over the data; ``last_report`` has their residuals and estimated errors, and
                a ConvergenceWarning says so where rtol is not reached.

        Returns:
            The matrix; with ``top_k`` two rankings, ``.helpful`` and ``.harmful``, each of them ``(values, indices)``
            like torch.topk's, [n_query, top_k] on the CPU. Helpful: largest score first. Harmful: most negative first.
            Indices are those of the training data. Of equal scores the smaller index comes first; NaN comes last.

        Raises:
            ValueError: duplicates; top_k less than 1; score_rtol or max_products with a solver that has no such thing.
            IndexError: an index out of range.
            TypeError: indices, or top_k, that are not integers.

        Warns:
            RuntimeWarning: scores that are not finite.
            ConvergenceWarning: a solve did not converge, within max_products or at all.

        Cost:
            a solve of min(n_train, n_query) right-hand sides, in tiles whose vectors take a quarter of the free memory
            at the most, and one pass over the other side for each tile. Where block conjugate gradients multiply by
            Gauss-Newton's matrix, J P is formed in each product, and scores are summed up on the way: the pass only
            verifies them. Memory: the matrix; with ``top_k`` a tile of it, of at most 2048 examples and the queries of
            a solve, and 24 top_k n_query bytes in float32.

        Examples:
            >>> top = module.influence_matrix(test_idxs=[0, 1], top_k=10)
            >>> values, indices = top.harmful  # both [2, 10]
        """
        problem = self._problem
        k = None if top_k is None else check_top_k(top_k)
        indices = problem.train.indices(train_idxs, "train_idxs")
        queries = problem.test.indices(test_idxs, "test_idxs")
        with self._session(), self._asked(score_rtol, max_products):
            tiles = self._tiles(indices, queries)
            if k is None:
                return whole(tiles, indices, len(queries), problem.space.dtype)
            return top(tiles, indices, len(queries), k, problem.space.dtype, self.device)

    def helpful(
        self, test_idxs: Sequence[int] | None = None, k: int = 10, train_idxs: Sequence[int] | None = None
    ) -> Ranking:
        """The k training examples that help each query most: removing them raises its test loss most.

        Row q has the largest score[i, q] = (1/n) ∇(ℓᵢ + reg)(θ) · A⁻¹∇f_q(θ), largest first. Where fewer than k
        examples are helpful, others follow: those of ``values`` that are not positive.

        Args:
            test_idxs: distinct indices of test examples, each of them a query, as in influence_matrix (default: all).
            k: how many; all, where there are fewer training examples.
            train_idxs: the training examples to choose from (default: all).

        Returns:
            ``(values, indices)``, each [n_query, k] on the CPU; indices are those of the training data.

        Raises:
            ValueError, IndexError, TypeError: as ``influence_matrix`` does with ``top_k=k``.

        Cost:
            that of ``influence_matrix`` with ``top_k=k``, which is this and ``harmful`` in one.

        Examples:
            >>> values, indices = module.helpful([0], k=5)  # both [1, 5]
        """
        return self.influence_matrix(train_idxs, test_idxs, top_k=k).helpful

    def harmful(
        self, test_idxs: Sequence[int] | None = None, k: int = 10, train_idxs: Sequence[int] | None = None
    ) -> Ranking:
        """The k training examples that harm each query most: removing them lowers its test loss most.

        Row q has the smallest score[i, q], most negative first. Where fewer than k examples are harmful, others follow:
        those of ``values`` that are not negative.

        Args:
            test_idxs: distinct indices of test examples, each of them a query (default: all).
            k: how many; all, where there are fewer training examples.
            train_idxs: the training examples to choose from (default: all).

        Returns:
            ``(values, indices)``, as ``helpful``.

        Raises:
            ValueError, IndexError, TypeError: as ``helpful``.

        Cost:
            that of ``helpful``; ``influence_matrix(..., top_k=k)`` is both for the price of one.

        Examples:
            >>> values, indices = module.harmful([0, 1], k=5)  # both [2, 5]
        """
        return self.influence_matrix(train_idxs, test_idxs, top_k=k).harmful

    def self_influences(self, train_idxs: Sequence[int] | None = None) -> Tensor:
        """(1/n) gᵢᵀA⁻¹gᵢ with gᵢ = ∇(ℓᵢ + reg)(θ), for training examples i (default: all): [n_train] on the CPU.

        By how much the model's loss on example i grows when i is removed: large for examples that the rest of the
        data does not explain, mislabelled ones first. Never negative where A is positive definite.

        Args:
            train_idxs: distinct indices of training examples.

        Returns:
            [n_train] on the CPU, in the order given.

        Raises:
            ValueError: duplicates.
            IndexError: an index out of range.
            TypeError: indices that are not integers.

        Cost:
            a right-hand side per example, and a pass over these examples.

        Source:
            Koh and Liang (2017), section 5.4, for mislabelled examples.

        Examples:
            >>> suspects = module.self_influences().argsort(descending=True)[:10]
        """
        problem = self._problem
        indices = problem.train.indices(train_idxs, "train_idxs")
        scores = torch.empty(len(indices), dtype=problem.space.dtype, device="cpu")
        with self._session():
            for positions, rows in problem.train_gradients().rows(indices) if indices else ():
                scores[positions] = (rows * self._inverse_rows(rows)).sum(dim=-1).to(scores)
        return scores.div_(problem.train.n)

    # -- what users ask about the numbers -----------------------------------------------------------------------------

    def spectrum(self, k: int = 3, *, rtol: float = 0.01, maxiter: int | None = None) -> Spectrum:
        """The k smallest and k largest eigenvalues of the curvature H, undamped, each with a bound of its error.

        H = ∇²L(θ), or Gauss-Newton with ``gnh=True``; the module's solver is of no matter. The result tells whether
        A = H + damp·I is positive definite and what its condition number is.

        Args:
            k: at either end.
            rtol: ends when each of these eigenvalues of A is known to within rtol times itself, or to rounding.
            maxiter: products with H at the most; by default 300, or as many vectors as a quarter of the free memory
                holds. With d up to that, all eigenvalues are computed.

        Returns:
            A ``Spectrum``: ``print`` it, or look at ``.smallest``, ``.largest``, ``.definite``, ``.condition``.

        Raises:
            ValueError: k or maxiter less than 1, rtol negative; a product that is not finite.

        Cost:
            up to ``maxiter`` passes over the training data, about as many as one solve by conjugate gradients takes,
            and memory for as many vectors.

        Source:
            Lanczos (1950), with full reorthogonalisation. Ritz values lie within the spectrum: it reaches at least as
            far as they do; see ``torch_influence.solvers.lanczos`` for what may be missed.

        Examples:
            >>> found = module.spectrum()
            >>> print(found)
            >>> found.definite
            True
        """
        with self._session():
            return ends_of(self._problem, self._problem.curvature(not self.samples), k, rtol, maxiter)

    def suggest_damping(self, found: Spectrum | None = None) -> Damping:
        """The least damping that makes the curvature safely positive definite, and solves keep half of their digits.

            damp >= -1.1 λ_min                                where λ_min < 0, less its error
            (λ_max + damp) / (λ_min + damp) <= 1 / √ε         ε of the parameters' dtype

        Nothing is set: ``module.damp = float(module.suggest_damping())`` does. Where the present damping is enough it
        is what is suggested. Damping is a bias: directions of curvature below damp count for less than half.

        Args:
            found: what ``spectrum`` has returned, if it was called; its ``damp`` is the present one.

        Returns:
            A ``Damping``: ``print`` it for the reasons with their numbers, ``float()`` it for the number.

        Cost:
            ``spectrum(1)``, unless ``found`` is given.

        Source:
            as argued in ``torch_influence.diagnostics.suggest_damping``.

        Examples:
            >>> print(module.suggest_damping())
        """
        return suggest_damping(self.spectrum(1) if found is None else found)

    def verify(
        self,
        test_idxs: Sequence[int] | None = None,
        *,
        train_idxs: Sequence[int] | None = None,
        fit: Callable[[list[int]], nn.Module] | None = None,
        queries: int = 3,
        refits: int = 12,
        checks: Sequence[verification.AsCheck] = (),
        print: bool = True,
    ) -> Verification:
        """Compares products, solutions, scores and, if wanted, refits with numbers made in another way, on your data.

        - *repeatable*: the loss of a batch, and the product of a vector, are the same twice.
        - *curvature*: H v is that of a plain double backward over data read anew; *symmetric*: u·Hv = v·Hu;
          *differences*: for up to 32 examples it is a central difference of gradients, (∇ℓ(θ + hv) - ∇ℓ(θ - hv)) / 2h,
          in float64 where the model runs in it, and where two steps h agree (they don't across kinks).
        - *mean*: the gradient of a batch is the mean of those of its examples one by one; of the batch, of all data,
          whose loss departs most from its examples'.
        - *gradients*, *scores*: as made from gradients of batches of one, (1/n) ∇(ℓᵢ + reg)·s_q.
        - *solver*: A⁻¹∇f_q, of ``inverse_hvp``, is that of a dense solve in float64 where d <= 2000, else |b - Ax| is
          as small as the solver says. What is allowed follows from the residual that the solver reports and the
          condition number, up to 10 %; for estimates from minibatches it is 50 %, far from exact and from nothing.
        - with ``fit``, examples are left out: the most helpful, the most harmful and others at random, a third each.
          *same refit*: two refits with all examples differ by at most 0.2 of the changes that are to be seen. *same
          model*: their test loss is that of the model, within 10 % or the largest change. *correlation*: of predicted
          and actual changes of the mean test loss, at least 0.9. *slope*: actual is predicted times 1/2 to 2.

        The model is not touched.

        Args:
            test_idxs: the queries; by default ``queries`` of them, spread evenly. All count for ``fit``, whose f is
                their mean; the other checks take up to ``queries``.
            train_idxs: training examples whose scores are looked at, and from which those to leave out are chosen
                (default: all; scores of five, spread evenly).
            fit: fit(train_idxs) returns another model, trained anew to convergence on these training examples alone, as
                the module's own was on all. It is moved to the module's device.
            queries: see test_idxs.
            refits: examples to leave out, at least 3; ``fit`` is called for two refits with all beside.
            checks: checks of your own, made after those of the package: functions of an ``Evidence`` that return a
                ``Check``, or None; see ``torch_influence.verification``.
            print: print each line as soon as it is known.

        Returns:
            A ``Verification``: ``.passed``, ``.checks``, ``.refits``, ``["solver"]``; ``print`` it.

        Raises:
            ValueError: queries less than 1, refits less than 3; ``fit`` returns the module's own model, or edits it.
            TypeError: ``fit`` is no function, or does not return a model; there are no test data.

        Cost:
            some passes over the training data, three solves, and where d <= 2000 the dense matrix, d³; beyond, a
            ``spectrum(1)``. With ``fit``: another solve, scores of all examples and refits + 2 trainings.

        Source:
            leave-one-out as in Koh and Liang (2017), section 4.1.

        Examples:
            >>> module.verify(print=False).passed
            True
            >>> report = module.verify(fit=train_my_model, refits=6)
        """
        return verification.verify(
            self, self._problem, test_idxs, train_idxs, fit, queries=queries, refits=refits, checks=checks, print=print
        )

    def report(
        self,
        path: str | os.PathLike[str],
        test_idxs: Sequence[int],
        *,
        k: int = 6,
        train_idxs: Sequence[int] | None = None,
        show: Callable[[Any], Any] | None = None,
        feature_names: Sequence[str] | None = None,
        self_influences: int = 0,
        title: str | None = None,
    ) -> Path:
        """Writes one HTML page on some queries: what helps them, what harms them, how that was computed, how well.

        For each query: its test loss, its k most helpful and k most harmful training examples with their scores, as
        ``helpful`` and ``harmful`` have them, and the distribution of all scores. Beside that the settings, the way
        taken (``explain()``), the residuals of the solves, the warnings, versions and date. The page holds all that it
        shows and asks for nothing from elsewhere; it needs no extra package. The file is written whole or not at all.

        Args:
            path: of the file; an older one is replaced.
            test_idxs: distinct indices of test examples, each of them a query; at least one.
            k: how many training examples on either side.
            train_idxs: the training examples to choose from (default: all).
            show: show(example) returns what to show of an example ``loader.dataset[i]``: an image [C, h, w], [h, w, C]
                or [h, w], a text, a row of numbers, or a pair of one of these and a label. By default the example
                itself, if it is of that kind: a pair, a mapping with a text or an array and a label. Numbers within
                0..1 and bytes are brightness; other images are spread from their least to their largest number.
            feature_names: of the numbers of a row.
            self_influences: list so many training examples of the largest self-influence, too.
            title: of the page.

        Returns:
            The path.

        Raises:
            ValueError: no query, duplicates; k less than 1; self_influences negative; feature_names that do not fit.
            IndexError: an index out of range.
            FileNotFoundError: the folder does not exist. Known, as are the others, before anything is computed.

        Warns:
            UserWarning: and whatever else ``influence_matrix`` warns of; the page lists it, too.

        Cost:
            that of ``explain()``, of ``influence_matrix`` with its memory, n_train n_query numbers, and, if asked for,
            of ``self_influences``. The page: some kB for an image of 100 x 100.

        Examples:
            >>> path = module.report("why.html", test_idxs=[3, 4])
            >>> path = module.report("why.html", [3, 4], show=lambda example: (example[0].reshape(2, 2), example[1]))
        """
        from torch_influence.pages import report  # when asked to write one

        return report(
            self,
            self._problem,
            path,
            test_idxs,
            k=k,
            train_idxs=train_idxs,
            show=show,
            feature_names=feature_names,
            self_influences=self_influences,
            title=title,
        )

    @property
    def last_report(self) -> SolveReport | None:
        """How the solves of the last public call that solved went: a SolveReport, or None."""
        return SolveReport.joined(self._reports) if self._reports else None

    @last_report.setter
    def last_report(self, report: SolveReport | None) -> None:
        self._reports = [] if report is None else [report]

    # -- private ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _session(self) -> Iterator[None]:
        """A session of the problem; the outermost one is a public call, before which what is out of date is dropped."""
        outermost = not self._problem.is_open
        with self._problem.session() as moved:
            self._calls += outermost
            if moved:
                self._forget()
            yield

    def _forget(self) -> None:
        """Drops what a subclass keeps of a curvature that is not the present one."""

    def __getstate__(self) -> dict[str, Any]:
        """Drops what is kept, so that modules can be copied and pickled."""
        self.clear_cache()
        return vars(self)

    def _curvature_step(self) -> Step:
        """The curvature's line of ``explain()``. Inside a session."""
        return self._problem.curvature(not self.samples).step()

    def _solve_step(self, queries: int) -> Step:
        """The solver's line of ``explain()``. Inside a session."""
        return Step("solver", f"inverse_hvp of {type(self).__name__}", self._problem.row_bytes * queries)

    def _solved(self, solve: Callable[..., tuple[Tensor, SolveReport | None]], *args: Any, **options: Any) -> Tensor:
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
        if report is not None:
            self._reports.append(report)
        return x

    def _reported(self, compute: Callable[[], _Result]) -> tuple[_Result, SolveReport | None]:
        """Computes something; returns it with the report of the solves that it took."""
        call, before, self._reports = self._call_of_reports, self._reports, []
        try:
            result = compute()
        finally:
            new = self._reports
            if self._call_of_reports == call:
                self._reports = [*before, *new]
        return result, SolveReport.joined(new) if new else None

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

    def _tiles(self, indices: list[int], queries: list[int]) -> Iterator[Tile]:
        """The scores, from whichever side has fewer right-hand sides."""
        problem = self._problem
        if self.either_side and len(indices) < len(queries) and not self._overridden("stests"):
            tests, solve = problem.test_gradients(), self._inverse_rows
            if indices:
                yield from from_training_rows(
                    problem.train_gradients(), indices, tests, queries, solve, problem.train.n
                )
            return
        # A solver keeps some vectors for each right-hand side.
        at_once = max(1, memory.free_memory(self.device) // 4 // (_VECTORS_OF_A_SOLVE * problem.row_bytes))
        for first in range(0, len(queries), at_once):
            stests, summed = self._stests_and_dots(queries[first : first + at_once])
            yield from self._tiles_of(indices, stests, first, summed)

    def _tiles_of(
        self, indices: list[int], stests: Tensor, first: int = 0, summed: Tensor | None = None
    ) -> Iterator[Tile]:
        if indices:
            examples = self._problem.train_gradients()
            yield from from_stests(examples, indices, stests, self._problem.train.n, first, summed)

    def _stests_and_dots(self, queries: list[int]) -> tuple[Tensor, Tensor | None]:
        """The stests, and ∇ℓᵢ·s_q [n_train, k] where the solve has made these on its way."""
        return self.stests(queries), None

    def _asked(self, score_rtol: float | None, max_products: int | None) -> contextlib.AbstractContextManager[None]:
        """A block in which solves end by these."""
        for name, value in (("score_rtol", score_rtol), ("max_products", max_products)):
            if value is not None:
                raise ValueError(f"{name}: expected a module with a solver that has it, got {type(self).__name__}")
        return contextlib.nullcontext()

    def _one_by_one(self, passing: Iterator[tuple[Any, int]]) -> Iterator[tuple[Any, int]]:
        """Yields the same batches; reads each while no other thread uses what is kept of the data."""
        while True:
            with self._problem.evaluation.alone():
                found = next(passing, None)
            if found is None:
                return
            yield found

    def _overridden(self, method: str) -> bool:
        return getattr(type(self), method) is not getattr(BaseInfluenceModule, method)

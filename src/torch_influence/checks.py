"""Answers what users ask about the numbers: the spectrum, the damping it needs, whether everything is right."""

from __future__ import annotations

import builtins
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from torch_influence import verification
from torch_influence.batches import Batches
from torch_influence.caller import level_of_the_user
from torch_influence.curvature import plain_product, second_derivative
from torch_influence.diagnostics import Damping, Spectrum, spectrum, suggest_damping
from torch_influence.evaluation import Evaluation
from torch_influence.gradients import NondeterminismWarning, loss_gradient, randomness
from torch_influence.linop import probe_rows
from torch_influence.losses import departs_most, not_a_mean, tell
from torch_influence.parameters import ParameterSpace
from torch_influence.resident import free_memory
from torch_influence.solvers import OnFailure, SolveError, SolveReport, fail, norms, rounding
from torch_influence.staleness import Watch, fingerprint
from torch_influence.verification import Check, Refits, Verification

if TYPE_CHECKING:
    from torch_influence.linop import LinearOperator
    from torch_influence.objective import BaseObjective

_STEPS = 300  # of the Lanczos process, where memory allows
_LARGEST_DENSE = 2000  # parameters up to which solutions are compared with a dense solve
_EXAMPLES = 5  # whose scores are compared
_EXAMPLES_OF_A_BATCH = 32  # of which differences of gradients are made


class CheckMethods:
    """Mixed into BaseInfluenceModule."""

    device: torch.device
    objective: BaseObjective
    train_loader: Any
    test_loader: Any
    damp: float
    gnh: bool
    on_failure: OnFailure
    samples: ClassVar[bool]
    _space: ParameterSpace
    _evaluation: Evaluation
    _train: Batches
    _reports: list[SolveReport]
    _means_checked: dict[str, str]
    _watch: Watch
    _randomness_checked: set[str]

    if TYPE_CHECKING:  # what BaseInfluenceModule has

        @property
        def _test(self) -> Batches: ...
        @property
        def _row_bytes(self) -> int: ...
        def hvp(self, vecs: Tensor) -> Tensor: ...  # noqa: D102
        def influences(self, train_idxs: Any, test_idxs: Any, stest: Tensor | None = None) -> Tensor: ...  # noqa: D102
        def influence_matrix(self, train_idxs: Any = None, test_idxs: Any = None) -> Tensor: ...  # noqa: D102
        def stests(self, test_idxs: Any = None) -> Tensor: ...  # noqa: D102
        def train_loss_grad(self, train_idxs: Sequence[int]) -> Tensor: ...  # noqa: D102
        def test_loss_grad(self, test_idxs: Sequence[int]) -> Tensor: ...  # noqa: D102
        def _bar(self, iterable: Iterable[Any], describe: str, total: int | None) -> Iterable[Any]: ...
        def _curvature(self) -> LinearOperator: ...
        def _inverse_rows(self, rows: Tensor) -> Tensor: ...
        def _transfer_to_device(self, batch: Any) -> Any: ...

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
        with self._evaluation.session():
            return self._ends(self._curvature(), k, rtol, maxiter)

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
        say = builtins.print if print else _silent
        if queries < 1 or refits < 3:
            raise ValueError(f"queries, refits: expected at least 1 and 3, got {queries} and {refits}")
        if fit is not None and (isinstance(fit, nn.Module) or not callable(fit)):
            raise TypeError(f"fit: expected a function that trains another model, got {type(fit).__name__}")
        chosen = self._test.indices(test_idxs, "test_idxs") if test_idxs is not None else _spread(self._test.n, queries)
        pool = self._train.indices(train_idxs, "train_idxs")
        if not chosen or not pool:
            raise ValueError("test_idxs, train_idxs: expected at least one index, or None, got none")
        checks: list[Check] = []
        with self._evaluation.session():
            few = [pool[i] for i in _spread(len(pool), max(_EXAMPLES, queries))]
            for check in self._checks(chosen[:queries], few):
                checks.append(check)
                say(check)
        found = None
        if fit is not None:
            found = self._refits(fit, chosen, pool, refits, say)
            for check in verification.refitted(found, self._space.pass_dtype):
                checks.append(check)
                say(check)
        result = Verification(checks, found)
        say(result.summary())
        return result

    # -- private ------------------------------------------------------------------------------------------------------

    def _ends(self, operator: LinearOperator, k: int, rtol: float, maxiter: int | None = None) -> Spectrum:
        if maxiter is None:
            maxiter = max(2 * k, min(_STEPS, free_memory(self.device) // 4 // self._row_bytes))
        dtype = self._space.pass_dtype
        return spectrum(operator, k, damp=self.damp, rtol=rtol, maxiter=maxiter, dtype=dtype, progress=self._bar)

    def _checks(self, queries: list[int], examples: list[int]) -> Iterator[Check]:
        operator = self._curvature()
        rows = probe_rows(2, self._space.size, dtype=self._space.dtype, device=self.device)
        dense = self._dense(operator)
        repeatable = self._repeatable(rows[1])
        yield repeatable
        yield from self._curvature_checks(rows, dense)

        b, g = self._ones("test", queries), self._ones("train", examples)
        ours = [self.test_loss_grad([q]) for q in queries] + [self.train_loss_grad([i]) for i in examples]
        plain = torch.cat([b, g])
        yield verification.check(
            "gradients",
            verification.deviation(torch.stack(ours), plain, plain.double().norm(dim=1)),
            verification.half_of_the_digits(self._space.pass_dtype),
            f"of {len(plain)} examples against a plain backward of each",
            "gradients are wrong, or of data that have changed since they were kept (clear_cache())",
        )
        yield self._mean_check()
        before = list(self._reports)
        try:
            s = self._inverse_rows(b)
        except (SolveError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            yield Check("solver", False, torch.inf, verification.WORST, f"inverse_hvp failed: {error}")
            return
        new = [report for report in self._reports if all(report is not old for old in before)]
        report = SolveReport.joined(new) if new else None
        if report is not None and len(report.residual) != len(b):
            report = None
        yield self._solver_check(operator, dense, b, s, report)
        solved = [(s, [self.influences(examples, None, stest=row) for row in s])]
        if repeatable.value == 0 and not self.samples:
            again = self._again(operator, b, s, report, queries)
            solved.append((again, list(self.influence_matrix(examples, queries).mT)))
        yield self._score_check(g, solved)

    def _repeatable(self, row: Tensor) -> Check:
        first, second = self.hvp(row), self.hvp(row)
        why = randomness("train_loss", self._evaluation, self._train)
        return verification.check(
            "repeatable",
            torch.inf if why else verification.deviation(second, first, first.double().norm()),
            rounding(self._space.pass_dtype),
            "the loss of a batch and the product of a vector, twice",
            why or "products of one vector differ: something in the model is random",
        )

    def _mean_check(self) -> Check:
        """Compares, for both losses, the batch that departs most from its examples with these, one by one."""
        leaves, dtype, worst, tested = self._evaluation.leaves(), self._space.pass_dtype, 0.0, 0
        for which in ("train", "test"):
            batches = self._anew(which)
            with batches.quietly():
                some = departs_most(f"{which}_loss", self._evaluation, batches)
            if not some:
                continue
            loss = getattr(self._evaluation, f"{which}_loss")
            together = loss_gradient(loss, self._space, leaves, batches.peek(some))
            ones = self._ones(which, some).double()
            worst = max(worst, verification.deviation(together, ones.mean(dim=0), ones.norm(dim=1).mean()))
            tested += len(some)
        return verification.check(
            "mean",
            worst,
            verification.half_of_the_digits(dtype),
            f"the gradient of the batch whose loss departs most from its {tested} examples' own against theirs",
            "the loss of a batch is not the mean of the losses of its examples (a sum? class weights? ignore_index?)",
        )

    def _curvature_checks(self, rows: Tensor, dense: Tensor | None) -> Iterator[Check]:
        """All ways to a product: one row, many, and the matrix."""
        dtype, train = self._space.pass_dtype, self._anew("train")
        both = self.hvp(rows)
        products = [self.hvp(rows[1]), both[1]] + ([] if dense is None else [dense @ rows[1]])
        with train.quietly():
            plain, size = plain_product(self._evaluation, train, rows[1], self.gnh)
        yield verification.check(
            "curvature",
            verification.deviation(torch.stack(products), plain, size),
            verification.half_of_the_digits(dtype),
            f"H v against a plain double backward, {'Gauss-Newton' if self.gnh else 'Hessian'}",
            "the curvature is wrong, or of data that have changed since they were kept (clear_cache())",
        )
        yield verification.symmetric(rows[0], both[0], rows[1], both[1], dtype)
        with train.quietly():
            some = range(train.n // 2, min(train.n // 2 + min(train.batch_size or 1, _EXAMPLES_OF_A_BATCH), train.n))
            second = second_derivative(self._evaluation, train.peek(some), self.gnh)
        yield verification.check(
            "differences",
            max(second.asymmetry / second.symmetric, second.deviation / second.precise),
            1.0,
            f"H v of {len(some)} examples: against central differences, and its symmetry, in units of rounding",
            f"autograd's second derivative is wrong: {second.wrong}",
        )

    def _solver_check(
        self, operator: LinearOperator, dense: Tensor | None, b: Tensor, s: Tensor, report: SolveReport | None
    ) -> Check:
        return verification.solutions(
            operator.damped(self.damp),
            b,
            s,
            report,
            dtype=self._space.pass_dtype,
            sampled=self.samples,
            dense=dense,
            ends=None if dense is not None else self._ends(operator, 1, rtol=0.1),
        )

    def _again(
        self, operator: LinearOperator, b: Tensor, s: Tensor, report: SolveReport | None, queries: list[int]
    ) -> Tensor:
        """The stests of another solve, if they are as near to A⁻¹ b as s is said to be; else s, which they should be.

        From gradients that are rounded in another way an iterative solver ends elsewhere within its tolerance.
        """
        again = self.stests(queries)
        claimed = verification.UNKNOWN if report is None else float(report.residual.nan_to_num(1.0).max())
        apart = norms(operator.damped(self.damp).product(again - s)) / norms(b)
        allowed = 2 * claimed + verification.half_of_the_digits(self._space.pass_dtype)
        return again if bool((apart <= allowed).all()) else s

    def _score_check(self, g: Tensor, solved: list[tuple[Tensor, list[Tensor]]]) -> Check:
        """Scores against gradients g [n, d] times stests [q, d]; a list of stests, and the scores by each of them."""
        worst = 0.0
        for s, scores in solved:
            weights = s.double() / self._train.n
            expected = (g.double() @ weights.mT).cpu()
            scale = (g.double().norm(dim=1)[:, None] * weights.norm(dim=1)).cpu()
            apart = (torch.stack(scores, dim=1).double().cpu() - expected).abs()
            worst = max(worst, float(torch.where(apart == 0, 0.0, apart / scale).nan_to_num(torch.inf).max()))
        return verification.check(
            "scores",
            worst,
            verification.half_of_the_digits(self._space.pass_dtype),
            f"of {len(g)} examples and {len(solved[0][0])} queries against (1/n) g·s, in units of |g||s|/n",
            "scores are not those of the gradients and solutions",
        )

    def _dense(self, operator: LinearOperator) -> Tensor | None:
        """The curvature as a matrix, where d is small."""
        d = self._space.size
        return operator.dense() if d <= _LARGEST_DENSE and 6 * 8 * d * d < free_memory(self.device) else None

    def _anew(self, which: str) -> Batches:
        """The data, read anew."""
        name = f"{which}_loader"
        return Batches(getattr(self, name), name, self._transfer_to_device, self._bar, cache=False)

    def _ones(self, which: str, indices: list[int]) -> Tensor:
        """Gradients of batches of one."""
        batches, leaves, loss = self._anew(which), self._evaluation.leaves(), getattr(self._evaluation, f"{which}_loss")
        return torch.stack([loss_gradient(loss, self._space, leaves, batches.peek([i])) for i in indices])

    def _refits(
        self,
        fit: Callable[[list[int]], nn.Module],
        queries: list[int],
        pool: list[int],
        count: int,
        say: Callable[[Any], None],
    ) -> Refits:
        """``fit`` runs outside of sessions, whose settings are not for training."""
        scores = self.influences(pool, queries).double()
        if len(scores) < 3:
            raise ValueError(f"train_idxs: expected at least 3 examples to choose from, got {len(scores)}")
        chosen = verification.to_leave_out(scores, count)
        everything = list(range(self._train.n))
        total = len(chosen) + 2
        base, again = (self._loss_of_refit(fit, everything, queries) for _ in range(2))
        say(f"refits 1 and 2 of {total}: all examples, mean test loss {base:.6g} and {again:.6g}")
        actual = []
        for number, position in enumerate(chosen, start=3):
            i = pool[position]
            change = self._loss_of_refit(fit, [j for j in everything if j != i], queries) - base
            say(
                f"refit {number} of {total}: without example {i}, predicted {float(scores[position]):+.4g}, "
                f"actual {change:+.4g}"
            )
            actual.append(change)
        return Refits(
            indices=tuple(pool[position] for position in chosen),
            predicted=scores[chosen],
            actual=torch.tensor(actual, dtype=torch.float64, device="cpu"),
            model_loss=self._mean_test_loss(self._evaluation, queries),
            base=base,
            again=again,
        )

    def _loss_of_refit(self, fit: Callable[[list[int]], nn.Module], indices: list[int], queries: list[int]) -> float:
        before = fingerprint(self._evaluation)
        model = fit(indices)
        if not isinstance(model, nn.Module):
            raise TypeError(f"fit: expected it to return a torch.nn.Module, got {type(model).__name__}")
        if model is self._evaluation.model or fingerprint(self._evaluation) != before:
            raise ValueError(
                "fit: expected a new model, got the module's own, or one that shares its parameters, which have been "
                "trained further; build a model in fit, or start from copy.deepcopy of one"
            )
        other = Evaluation(model.to(self.device), self.objective, ParameterSpace(model))
        return self._mean_test_loss(other, queries)

    def _mean_test_loss(self, evaluation: Evaluation, queries: list[int]) -> float:
        with evaluation.session(), self._test.quietly():
            leaves = evaluation.leaves()
            return float(self._test.mean(lambda batch: evaluation.test_loss(leaves, batch).detach().double(), queries))

    def _check_mean(self, loss: str, batches: Batches) -> None:
        """Warns once of a loss that is no mean over the batch, or random: nothing else would show it."""
        if loss not in self._means_checked:
            own = self._space.pass_dtype
            finding = not_a_mean(loss, self._evaluation, batches)
            self._means_checked[loss] = finding  # now, and not when an exception has ended it
            tell(finding)
            if (seen := self._space.pass_dtype) != own and seen in (torch.bfloat16, torch.float16):
                warnings.warn(
                    f"{loss}: it is computed in {seen} in part, and the parameters are {own}; torch.autocast is on "
                    "inside of the model or the objective, or something is cast: gradients and products are rounded to "
                    "it. Leave it out for influence",
                    UserWarning,
                    stacklevel=level_of_the_user(),
                )
        if loss not in self._randomness_checked:
            why = randomness(loss, self._evaluation, batches)
            self._randomness_checked.add(loss)
            if why:
                self._watch.told = True  # of what the looks for changes would say of it again
                fail([NondeterminismWarning(why)], self.on_failure)


def _spread(n: int, count: int) -> list[int]:
    """Up to so many of range(n), at equal distances, both ends among them."""
    return sorted({round(i * (n - 1) / max(count - 1, 1)) for i in range(count)})


def _silent(line: Any) -> None:
    pass

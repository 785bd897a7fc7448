"""The checks of verify(), one function each: add one, and a row to CHECKS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from torch_influence import memory
from torch_influence.curvature import Curvature
from torch_influence.diagnostics import ends_of
from torch_influence.failures import SolveError
from torch_influence.gradients import loss_gradient, randomness
from torch_influence.linop import probe_rows
from torch_influence.losses import departs_most
from torch_influence.plan import NotPossible
from torch_influence.problem import Problem
from torch_influence.solvers import SolveReport, norms, rounding
from torch_influence.turns import Once
from torch_influence.verification._comparisons import (
    UNKNOWN,
    WORST,
    deviation,
    half_of_the_digits,
    solutions,
    symmetric,
)
from torch_influence.verification._results import Check, check

if TYPE_CHECKING:
    from torch_influence.base import BaseInfluenceModule

_LARGEST_DENSE = 2000  # parameters up to which solutions are compared with a dense solve
_EXAMPLES_OF_A_BATCH = 32  # of which differences of gradients are made


class Evidence:
    """The things that checks look at, each computed when it is first asked for. Inside a session.

    Attributes:
        module: the module that is verified; its public methods are, as they may be overridden.
        problem: its model, objective and data.
        queries: indices of test examples.
        examples: indices of training examples.
    """

    def __init__(self, module: BaseInfluenceModule, problem: Problem, queries: list[int], examples: list[int]) -> None:
        self.module, self.problem, self.queries, self.examples = module, problem, queries, examples
        self.dtype = problem.space.pass_dtype

    @Once
    def curvature(self) -> Curvature:
        """The undamped curvature."""
        return self.problem.curvature(not self.module.samples)

    @Once
    def rows(self) -> Tensor:
        """Two random rows [2, d]."""
        space = self.problem.space
        return probe_rows(2, space.size, dtype=space.dtype, device=self.problem.device)

    @Once
    def products(self) -> Tensor:
        """The curvature times these rows, [2, d], by ``module.hvp``."""
        return self.module.hvp(self.rows)

    @Once
    def dense(self) -> Tensor | None:
        """The curvature as a matrix [d, d], where d is small."""
        d = self.problem.space.size
        fits = d <= _LARGEST_DENSE and 6 * 8 * d * d < memory.free_memory(self.problem.device)
        return self.curvature.dense() if fits else None

    @Once
    def again(self) -> str:
        """Says why the same is not the same twice; empty where it is."""
        return randomness("train_loss", self.problem.evaluation, self.problem.train)

    @Once
    def once_more(self) -> Tensor:
        """Products of one row, made twice more, [2, d]."""
        return torch.stack([self.module.hvp(self.rows[1]), self.module.hvp(self.rows[1])])

    @Once
    def test_gradients(self) -> Tensor:
        """Plain gradients of the queries, batches of one, [q, d]."""
        return self.gradients("test_loss", self.queries)

    @Once
    def train_gradients(self) -> Tensor:
        """Plain gradients of the examples, batches of one, [n, d]."""
        return self.gradients("train_loss", self.examples)

    def gradients(self, loss: str, indices: Sequence[int]) -> Tensor:
        """Plain gradients of batches of one, read anew."""
        evaluation, batches = self.problem.evaluation, self.problem.read_anew(loss)
        leaves, function = evaluation.leaves(), getattr(evaluation, loss)
        return torch.stack([loss_gradient(function, evaluation.space, leaves, batches.peek([i])) for i in indices])

    @Once
    def solved(self) -> tuple[Tensor, SolveReport | None]:
        """Solutions [q, d] for the queries' gradients, by ``inverse_hvp``, and their report.

        Raises:
            SolveError, LinAlgError: the solve failed.
        """
        x, report = self.module._reported(lambda: self.module._inverse_rows(self.test_gradients))
        return x, report if report is not None and len(report.residual) == len(x) else None


AsCheck: TypeAlias = Callable[[Evidence], Check | None]


def repeatable(evidence: Evidence) -> Check:
    """The loss of a batch, and the product of a vector, are the same twice."""
    first, second = evidence.once_more
    return check(
        "repeatable",
        torch.inf if evidence.again else deviation(second, first, first.double().norm()),
        rounding(evidence.dtype),
        "the loss of a batch and the product of a vector, twice",
        evidence.again or "products of one vector differ: something in the model is random",
    )


def curvature(evidence: Evidence) -> Check | None:
    """H v, of one row, of many and by the matrix, is that of the definition, over data read anew."""
    row, train = evidence.rows[1], evidence.problem.read_anew("train_loss")
    products = [evidence.once_more[0], evidence.products[1]]
    products += [] if evidence.dense is None else [evidence.dense @ row]
    try:
        with train.quietly():
            plain, size = evidence.curvature.from_definition(row, train)
    except NotPossible:
        return None
    return check(
        "curvature",
        deviation(torch.stack(products), plain, size),
        half_of_the_digits(evidence.dtype),
        f"H v against a plain double backward, {'Gauss-Newton' if evidence.problem.gnh else 'Hessian'}",
        "the curvature is wrong, or of data that have changed since they were kept (clear_cache())",
    )


def symmetry(evidence: Evidence) -> Check:
    """u·Hv = v·Hu."""
    (u, v), (Hu, Hv) = evidence.rows, evidence.products
    return symmetric(u, Hu, v, Hv, evidence.dtype)


def differences(evidence: Evidence) -> Check | None:
    """H v of some examples is symmetric, and a central difference of gradients."""
    train = evidence.problem.read_anew("train_loss")
    first = train.n // 2
    some = range(first, min(first + min(train.batch_size or 1, _EXAMPLES_OF_A_BATCH), train.n))
    try:
        with train.quietly():
            second = evidence.curvature.second_derivative(train.peek(some))
    except NotPossible:
        return None
    return check(
        "differences",
        max(second.asymmetry / second.symmetric, second.deviation / second.precise),
        1.0,
        f"H v of {len(some)} examples: against central differences, and its symmetry, in units of rounding",
        f"autograd's second derivative is wrong: {second.wrong}",
    )


def gradients(evidence: Evidence) -> Check:
    """Gradients of the module are those of a plain backward of each example."""
    module = evidence.module
    plain = torch.cat([evidence.test_gradients, evidence.train_gradients])
    ours = [module.test_loss_grad([q]) for q in evidence.queries]
    ours += [module.train_loss_grad([i]) for i in evidence.examples]
    return check(
        "gradients",
        deviation(torch.stack(ours), plain, plain.double().norm(dim=1)),
        half_of_the_digits(evidence.dtype),
        f"of {len(plain)} examples against a plain backward of each",
        "gradients are wrong, or of data that have changed since they were kept (clear_cache())",
    )


def mean(evidence: Evidence) -> Check:
    """The gradient of the batch that departs most is the mean of its examples', for both losses."""
    evaluation, worst, tested = evidence.problem.evaluation, 0.0, 0
    leaves = evaluation.leaves()
    for loss in ("train_loss", "test_loss"):
        batches = evidence.problem.read_anew(loss)
        with batches.quietly():
            some = departs_most(loss, evaluation, batches)
        if not some:
            continue
        together = loss_gradient(getattr(evaluation, loss), evaluation.space, leaves, batches.peek(some))
        ones = evidence.gradients(loss, some).double()
        worst = max(worst, deviation(together, ones.mean(dim=0), ones.norm(dim=1).mean()))
        tested += len(some)
    return check(
        "mean",
        worst,
        half_of_the_digits(evidence.dtype),
        f"the gradient of the batch whose loss departs most from its {tested} examples' own against theirs",
        "the loss of a batch is not the mean of the losses of its examples (a sum? class weights? ignore_index?)",
    )


def solver(evidence: Evidence) -> Check:
    """Solutions are those of a dense solve, or leave as small a residual as the solver says."""
    try:
        x, report = evidence.solved
    except (SolveError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        return Check("solver", False, torch.inf, WORST, f"inverse_hvp failed: {error}")
    problem, dense = evidence.problem, evidence.dense
    return solutions(
        evidence.curvature.damped(problem.damp),
        evidence.test_gradients,
        x,
        report,
        dtype=evidence.dtype,
        sampled=evidence.module.samples,
        dense=dense,
        ends=None if dense is not None else ends_of(problem, evidence.curvature, 1, 0.1),
    )


def scores(evidence: Evidence) -> Check | None:
    """Scores are (1/n) ∇(ℓᵢ + reg)·s_q: of solutions that are given, and of those that a call makes itself."""
    try:
        s, _ = evidence.solved
    except (SolveError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]  # the check before says so
        return None
    module, g, n = evidence.module, evidence.train_gradients, evidence.problem.train.n
    solved = [(s, [module.influences(evidence.examples, None, stest=row) for row in s])]
    if not evidence.again and torch.equal(*evidence.once_more) and not module.samples:
        matrix = module.influence_matrix(evidence.examples, evidence.queries)
        solved.append((_again(evidence), list(matrix.mT)))
    worst = 0.0
    for stests, columns in solved:
        weights = stests.double() / n
        expected = (g.double() @ weights.mT).cpu()
        scale = (g.double().norm(dim=1)[:, None] * weights.norm(dim=1)).cpu()
        apart = (torch.stack(columns, dim=1).double().cpu() - expected).abs()
        worst = max(worst, float(torch.where(apart == 0, 0.0, apart / scale).nan_to_num(torch.inf).max()))
    return check(
        "scores",
        worst,
        half_of_the_digits(evidence.dtype),
        f"of {len(g)} examples and {len(s)} queries against (1/n) g·s, in units of |g||s|/n",
        "scores are not those of the gradients and solutions",
    )


def _again(evidence: Evidence) -> Tensor:
    """The stests of another solve, if they are as near to A⁻¹ b as s is said to be; else s, which they should be.

    From gradients that are rounded in another way an iterative solver ends elsewhere within its tolerance.
    """
    s, report = evidence.solved
    again = evidence.module.stests(evidence.queries)
    claimed = UNKNOWN if report is None else float(report.residual.nan_to_num(1.0).max())
    A, b = evidence.curvature.damped(evidence.problem.damp), evidence.test_gradients
    apart = norms(A.product(again - s)) / norms(b)
    allowed = 2 * claimed + half_of_the_digits(evidence.dtype)
    return again if bool((apart <= allowed).all()) else s


CHECKS: tuple[AsCheck, ...] = (repeatable, curvature, symmetry, differences, gradients, mean, solver, scores)

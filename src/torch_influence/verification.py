"""Checks of products, solutions and scores against numbers that were computed in another way, and their results."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from torch_influence.diagnostics import Spectrum
from torch_influence.linop import Damped
from torch_influence.solvers import SolveReport, norms, rounding

__all__ = ["Check", "Refits", "Verification"]

WORST = 0.1  # relative error of a solution beyond which it is wrong, however loose the tolerance was
SAMPLED = 0.5  # relative error allowed of an estimate from minibatches; x = 0 has an error of 1
UNKNOWN = 0.01  # relative residual that a solver is assumed to reach if it reports none
CORRELATION = 0.9  # correlation of predicted and actual changes, at least
FACTOR = 2.0  # factor between predicted and actual changes, at most
NOISE = 0.2  # difference of two equal refits, in units of the changes, at most
OTHER_MODEL = 0.1  # relative difference of the mean test loss that makes a refit another model


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison; passed where value <= allowed.

    Attributes:
        name: what was compared.
        passed: whether it held.
        value: how far apart the two sides were.
        allowed: how far they may be.
        text: what the two sides were, and where it failed what that means.
    """

    name: str
    passed: bool
    value: float
    allowed: float
    text: str

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "FAILED"
        return f"{verdict:<7} {self.name:<13} {self.value:>8.2g} <= {self.allowed:<8.2g} {self.text}"


@dataclasses.dataclass(frozen=True)
class Refits:
    """Changes of the mean test loss by leaving one example out: predicted and, after a refit, actual.

    Attributes:
        indices: of the training examples left out.
        predicted, actual: [m], float64.
        model_loss: the mean test loss of the module's own model.
        base: of a refit with all examples, from which the actual changes are counted.
        again: of another such refit.
    """

    indices: tuple[int, ...]
    predicted: Tensor
    actual: Tensor
    model_loss: float
    base: float
    again: float

    @property
    def correlation(self) -> float:
        """Pearson's correlation of predicted and actual changes."""
        return _correlation(self.predicted, self.actual)

    @property
    def rank_correlation(self) -> float:
        """Spearman's rank correlation of predicted and actual changes."""
        return _correlation(_ranks(self.predicted), _ranks(self.actual))

    @property
    def slope(self) -> float:
        """The slope of actual on predicted changes, through the origin: 1 where the size is right."""
        return float((self.predicted * self.actual).sum() / self.predicted.square().sum())

    def __str__(self) -> str:
        lines = [f"{'left out':>9} {'predicted':>12} {'actual':>12}"]
        for i, predicted, actual in zip(self.indices, self.predicted.tolist(), self.actual.tolist(), strict=True):
            lines.append(f"{i:>9} {predicted:>+12.4g} {actual:>+12.4g}")
        lines.append(
            f"correlation {self.correlation:.4f}, of ranks {self.rank_correlation:.4f}, slope {self.slope:.3f}; mean "
            f"test loss {self.model_loss:.6g} of the model, {self.base:.6g} and {self.again:.6g} of refits with all"
        )
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Verification:
    """What ``verify`` has found; ``print`` it.

    Attributes:
        checks: in the order in which they were made.
        refits: the pairs of predicted and actual changes; None without ``fit``.
    """

    checks: list[Check]
    refits: Refits | None = None

    @property
    def passed(self) -> bool:
        """Whether every check has passed."""
        return all(check.passed for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def __str__(self) -> str:
        lines = [str(check) for check in self.checks]
        if self.refits is not None:
            lines.append(str(self.refits))
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """Says in one line how many checks passed, and which failed."""
        failed = [check.name for check in self.checks if not check.passed]
        verdict = f"FAILED: {', '.join(failed)}" if failed else "passed"
        return f"{verdict} ({len(self.checks) - len(failed)} of {len(self.checks)} checks)"


def check(name: str, value: float, allowed: float, text: str, otherwise: str = "") -> Check:
    """Makes the check value <= allowed; NaN fails. ``otherwise`` is added to the text of a check that fails."""
    passed = value <= allowed
    return Check(name, passed, value, allowed, text if passed or not otherwise else f"{text}: {otherwise}")


def half_of_the_digits(dtype: torch.dtype) -> float:
    """Returns √ε: rounding in another order stays well below it, a product that means something else does not."""
    return torch.finfo(dtype).eps ** 0.5


def deviation(actual: Tensor, expected: Tensor, scale: Tensor | float) -> float:
    """Computes the largest |actual - expected| of rows, in units of ``scale``; 0 where both are the same."""
    apart = (actual.double() - expected.double()).norm(dim=-1)
    return float(torch.where(apart == 0, 0.0, apart / scale).max())


def symmetric(u: Tensor, Hu: Tensor, v: Tensor, Hv: Tensor, dtype: torch.dtype) -> Check:
    """Checks u·Hv = v·Hu for random rows u, v of entries of size 1, whose product with an unrelated w is about |w|."""
    apart = float(((u.double() * Hv.double()).sum() - (v.double() * Hu.double()).sum()).abs())
    size = float(Hu.double().norm() + Hv.double().norm())
    # The rounding of a product is relative to |H||v| = |H| √d, while |Hv| may be as small as |H|.
    allowed = half_of_the_digits(dtype) + torch.finfo(dtype).eps * len(u) ** 0.5
    return check(
        "symmetric",
        apart / size if apart else 0.0,
        allowed,
        "u·Hv against v·Hu",
        "the curvature is no symmetric matrix: solvers that take it for one go wrong",
    )


def solutions(
    A: Damped,
    B: Tensor,
    X: Tensor,
    report: SolveReport | None,
    *,
    dtype: torch.dtype,
    sampled: bool,
    dense: Tensor | None = None,
    ends: Spectrum | None = None,
) -> Check:
    """Checks solutions X of A x = b for rows b [k, d] against a dense solve in float64, else by their residuals.

    A residual r means an error of |x - x*| <= |r| / min|λ|. It allows the residual that the solver reports, and the
    rounding of A x, u (|A||x| + |b|); up to ``WORST`` of |x*|.

    Args:
        A: the damped curvature.
        B: [k, d].
        X: [k, d].
        report: the solver's, of these rows; None if it made none.
        dtype: in which products are computed.
        sampled: whether the solutions are estimates from minibatches.
        dense: the undamped curvature, [d, d], if that is not too large.
        ends: the ends of its spectrum, otherwise.
    """
    method = "inverse_hvp" if report is None else report.method
    size = _norms(B)
    if sampled or report is None or not report.residual.isfinite().all():
        claimed = torch.full_like(size, UNKNOWN)
        method += "" if sampled else f", taken to reach a residual of {UNKNOWN:.0%}, as it reports none,"
    else:
        claimed = report.residual
    if report is not None and (failed := int((~(report.converged | report.precision_limit)).sum())):
        method += f" (not converged for {failed} of {len(size)})"
    if dense is not None:
        error, allowed, text = _against_dense(A, dense, B, X, claimed * size, rounding(dtype))
        text = f"{len(B)} solutions by {method} against a dense solve in float64; {text}"
    else:
        assert ends is not None  # one of the two
        error, allowed, text = _by_residuals(A, ends, B, X, claimed, rounding(dtype))
        text = f"|b - Ax| / |b| of {len(B)} solutions by {method}; {text}"
    allowed = torch.full_like(size, SAMPLED) if sampled else allowed.nan_to_num(WORST).clamp(max=WORST)
    worst = int((error / allowed).nan_to_num(torch.inf).argmax())
    cure = "raise depth, repeat" if sampled else "tighten the solver's tolerance"
    wrong = f"the solutions are wrong; {cure}, or raise damp (suggest_damping() says to what)"
    return check("solver", float(error[worst]), float(allowed[worst]), text, wrong)


def _against_dense(
    A: Damped, dense: Tensor, B: Tensor, X: Tensor, residuals: Tensor, noise: float
) -> tuple[Tensor, Tensor, str]:
    """Computes |x - x*| / |x*| by a dense solve, the errors that are allowed, and a text on the condition."""
    matrix = dense.double()
    matrix = matrix + A.shift * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    values = torch.linalg.eigvalsh(matrix).abs()
    least, most = float(values.min()), float(values.max())
    expected, singular = torch.linalg.solve_ex(matrix, B.double().mT)
    if bool(singular) or least == 0:
        return torch.full_like(residuals, torch.inf), residuals, "which is singular"
    length = _norms(expected.mT)
    allowed = (residuals + noise * (most * length + _norms(B))) / least / length
    return _relative(_norms(X.double() - expected.mT), length), allowed, f"condition {most / least:.2g}"


def _by_residuals(
    A: Damped, ends: Spectrum, B: Tensor, X: Tensor, claimed: Tensor, noise: float
) -> tuple[Tensor, Tensor, str]:
    """Computes |b - Ax| / |b|, the residuals that are allowed, and a text on what they mean for x."""
    size, length, residual = _norms(B), _norms(X), _norms(B - A.product(X))
    most = max(abs(float(ends.smallest[0]) + A.shift), abs(float(ends.largest[-1]) + A.shift))
    allowed = claimed + noise * (most * length / size + 1)
    if ends.definite:
        least = float(ends.smallest[0] - ends.smallest_errors[0]) + A.shift
        text = f"so that |x - x*| / |x| <= {float(_relative(residual, length).max()) / least:.2g}"
    else:
        text = "what that means for x is not known, since A is not seen to be positive definite"
    return _relative(residual, size), allowed, text


def _norms(rows: Tensor) -> Tensor:
    return norms(rows.double()).cpu()


def _relative(error: Tensor, size: Tensor) -> Tensor:
    return torch.where(size > 0, error / size, error)


# ---- refits ---------------------------------------------------------------------------------------------------------


def to_leave_out(scores: Tensor, count: int) -> list[int]:
    """Picks the positions of the most helpful, the most harmful, and some other examples at random: a third each."""
    order = scores.argsort(descending=True, stable=True).tolist()
    if len(order) <= count:
        return sorted(order)
    third = max(1, count // 3)
    inside = order[third:-third]
    generator = torch.Generator().manual_seed(0)
    others = torch.randperm(len(inside), generator=generator, device="cpu")[: count - 2 * third].tolist()
    return [*order[:third], *order[-third:], *(inside[i] for i in others)]


def refitted(refits: Refits, dtype: torch.dtype) -> list[Check]:
    """Checks whether refits can be compared with the model, and whether they show what was predicted.

    Args:
        refits: with at least three examples.
        dtype: the dtype in which the losses were computed.
    """
    base, changes = refits.base, refits.actual
    typical, largest = float(changes.square().mean().sqrt()), float(changes.abs().max())
    noise = max(abs(refits.again - base), torch.finfo(dtype).eps * abs(base))
    shift = abs(base - refits.model_loss)
    scale = max(abs(refits.model_loss), largest / OTHER_MODEL)
    slope = refits.slope
    return [
        check(
            "same refit",
            noise / typical if typical else math.inf,
            NOISE,
            "difference of two refits with all examples, in units of the changes to be seen",
            "fit does not find the same minimum twice (seed it, train to convergence), or does not heed train_idxs; "
            "the checks that follow say little",
        ),
        check(
            "same model",
            shift / scale if scale else 0.0,
            OTHER_MODEL,
            "mean test loss of a refit with all examples against the model's, relative",
            "fit makes another model than the module's, so that its changes are another model's",
        ),
        check(
            "correlation",
            1 - refits.correlation,
            1 - CORRELATION,
            f"1 - Pearson's, of predicted and actual changes of {len(changes)} examples",
            "leaving examples out does not do what the scores say",
        ),
        check(
            "slope",
            max(slope, 1 / slope) if slope > 0 else math.inf,
            FACTOR,
            f"factor between them: actual = {slope:.3g} x predicted",
            "the scores are of another size than the changes; damping makes scores small, an objective that is not "
            "what the model was trained with any size",
        ),
    ]


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.norm() * b.norm()))


def _ranks(values: Tensor) -> Tensor:
    """Ranks values; equal values share the mean of their ranks."""
    below = values[:, None] > values
    return below.sum(dim=1) + 0.5 * (values[:, None] == values).sum(dim=1).double()

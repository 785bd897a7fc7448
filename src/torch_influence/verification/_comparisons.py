"""Products, solutions and refits against numbers that were made in another way."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_influence.diagnostics import Spectrum
from torch_influence.linop import Damped
from torch_influence.solvers import SolveReport, norms, rounding
from torch_influence.verification._results import Check, Refits, check

WORST = 0.1  # relative error of a solution beyond which it is wrong, however loose the tolerance was
SAMPLED = 0.5  # relative error allowed of an estimate from minibatches; x = 0 has an error of 1
UNKNOWN = 0.01  # relative residual that a solver is assumed to reach if it reports none
CORRELATION = 0.9  # correlation of predicted and actual changes, at least
FACTOR = 2.0  # factor between predicted and actual changes, at most
NOISE = 0.2  # difference of two equal refits, in units of the changes, at most
OTHER_MODEL = 0.1  # relative difference of the mean test loss that makes a refit another model


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

"""LiSSA: the Neumann series of the inverse, one minibatch per term (Agarwal, Bullins and Hazan 2017, section 3)."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from torch_influence.failures import (
    ConvergenceWarning,
    DivergenceWarning,
    NegativeCurvatureWarning,
    OnFailure,
    check_on_failure,
    fail,
)
from torch_influence.linop import LinearOperator, as_tensor, base_and_shift
from torch_influence.plan import Step
from torch_influence.solvers._base import Progress, brought_back, in_range, out_of_range
from torch_influence.solvers._minibatches import (
    SAMPLED,
    AutoScale,
    SampledEnds,
    sample_of,
    sampled_ends,
    system_of_minibatches,
)
from torch_influence.solvers._report import SolveReport
from torch_influence.solvers._series import Series
from torch_influence.solvers._solver import Cost, Memo, Solver, row_bytes

# The share by which an estimate may still change over the second half of its steps. On problems of benchmarks/ (d to
# 7850, depths of 0.02 to 60 scale/damp) a change of 30 % went with 30 to 40 % of the solution still missing, one of
# 15 % with 5 %; runs of enough depth, with noise of any size, showed 0 to 5 %.
_STILL_CHANGING = 0.3
# No series whose terms shrink changes by more than half. Negative eigenvalues make them grow: by (eˣ - eˣᐟ²) / (eˣ - 1)
# in depth = x scale/|λ| steps, 0.62 for x = 1.
_GROWING = 0.6
_MOSTLY_NOISE = 0.5  # the largest standard error, relative to the estimate, where no rtol was asked for
_STARTS = 10  # of a series with scale="auto", each with at least twice the scale


def lissa(
    A: Any,
    B: Any,
    *,
    repeat: int = 1,
    depth: int,
    scale: float | Literal["auto"] | AutoScale = "auto",
    rtol: float | None = None,
    generator: torch.Generator | None = None,
    callback: Callable[[int, int, Tensor], None] | None = None,
    after_repeat: Callable[[int, Tensor], None] | None = None,
    on_failure: OnFailure = "warn",
    progress: Progress | None = None,
) -> tuple[Tensor, SolveReport]:
    """Estimates A⁻¹ b for each row b of ``B`` [k, d]; all rows see the same minibatches.

        h₀ = b,   h_t = b + h_{t-1} - A_t h_{t-1} / scale,   A⁻¹ b ≈ mean over repeats of h_depth / scale

    A_t is the damped curvature of minibatch t. The mean's fixed point is A⁻¹b exactly (damping included once). It is
    approached at the rate 1 - λ/scale in an eigenvector of A with eigenvalue λ: scale/damp steps leave a third.

    No step expands if ``scale`` exceeds half the largest eigenvalue of every A_t, which is not to be known beforehand.
    That of A itself is far too small a guide where few examples weigh heavily. ``scale="auto"`` takes the largest
    eigenvalue of 16 sampled minibatches. About repeat·depth/16 later ones exceed it, but a step expands only if one
    does by more than a factor of 2: in light-tailed data none, in heavy-tailed data rare ones, which the other steps
    may make up for. That is no guarantee. So divergence is watched for: |h_t| <= (t + 1)|b| if no step expands, and a
    row that exceeds 10 times that is stopped. A scale that was found is then raised, to that of the minibatch at fault
    or at least to twice itself, and all starts over, up to 10 times; a scale that was given is not.

    Args:
        A: symmetric, and a mean of minibatches: an operator that can be sampled (of the protocol ``Sampled``), or such
            an operator ``.damped(...)``; or a list of minibatches, drawn from uniformly with replacement, each of them
            anything that ``linop.aslinearoperator`` takes. Any single one of these is its own only minibatch: the
            Neumann series, in which repeats are of no use.
        B: [k, d] or [d], on A's device.
        repeat: independent runs that are averaged.
        depth: steps of each run. There is no default: it is what the result's bias and the cost depend on.
        scale: what the curvature is divided by: a number, or "auto", or an ``AutoScale`` that keeps what it finds.
        rtol: stop after the repeat, the second or a later one, when the standard errors of all rows are within it.
        generator: where minibatches are drawn from; torch's default generator if None.
        callback: called as callback(run, step, h) after each step, with a copy of h: [d] for one row, else [k, d].
        after_repeat: called as after_repeat(run, x) with the estimate [k, d] of each run alone. Where all starts over
            with a larger scale, run is 0 again, in both.
        on_failure: "warn", "raise" (a ``SolveError``, which has the solution and the report) or "ignore".
        progress: wraps the steps in a progress bar.

    Returns:
        The estimates, of B's shape, and the report. A row that diverged, or met a number that is not finite, is NaN,
        and so are its residual and standard error; others go on, and are judged by themselves. In the report

        - ``standard_error`` is that of the mean over repeats, |spread of the repeats| / √repeat / |mean|; None for a
          single repeat. It says nothing of the bias that too small a depth leaves.
        - ``residual`` is an estimate of |b - A x̄| / |b| for x̄ the mean of the second half of the steps, which costs
          nothing: h_t - h_{t-1} = b - A_t h_{t-1} / scale, whose mean over these steps is (h_D - h_{D/2}) / (D/2). It
          tells of bias: the residual of x itself is mostly noise. Its own noise is in it, so that it tends to be too
          large. The error in x may be larger by the condition number.
        - ``converged``: neither failed nor far too little depth nor too large a standard error.
        - ``negative_curvature``: the estimate grows as none does without it, and minibatches have some.
        - ``products``: of minibatches, those that ``scale`` took included.

    Raises:
        TypeError, ValueError: an argument that makes no sense.
        SolveError: with ``on_failure="raise"``, in place of the warnings.

    Warns:
        DivergenceWarning: steps expand, with the scale or the damping that cures it.
        ConvergenceWarning: NaN or an overflow; a depth that is far too small: over the second half of the steps the
            estimate changed by 30 % or more, beyond noise; standard errors that exceed ``rtol``, or half the estimate.
        NegativeCurvatureWarning: it changed by more than 60 %, and minibatches have negative eigenvalues.

    Cost:
        repeat x depth products with one minibatch, up to 160 more to find the scale, and up to 540 to explain a
        failure; memory 6 k d beside B, whatever the depth, for the scale about 40 d, to explain a failure 70 d. On a
        GPU the host waits only for the step before the last: divergence is noticed there one step late.

    Source:
        Agarwal, Bullins and Hazan (2017), section 3; Koh and Liang (2017), section 3.

    Examples:
        >>> minibatches = [torch.diag(torch.tensor([1.0, 2.0])), torch.diag(torch.tensor([3.0, 2.0]))]
        >>> x, report = lissa(minibatches, torch.ones(2), repeat=400, depth=30, generator=torch.Generator())
        >>> [round(value, 1) for value in x.tolist()]
        [0.5, 0.5]
        >>> report.method
        'LiSSA, scale 3 (auto)'
    """
    start = time.perf_counter()
    check_on_failure(on_failure)
    source, shift, rows = system_of_minibatches(A, B)
    rows, unit = in_range(rows)
    if unit is not None:
        callback, after_repeat = _in_users_units(callback, unit), _in_users_units(after_repeat, unit)
    auto = AutoScale() if scale == "auto" else scale if isinstance(scale, AutoScale) else None
    given = math.nan if auto is not None else _checked_scale(scale)
    _check_counts(repeat, depth, rtol)
    looked_at = 0 if auto is None else auto.products
    finite = auto is None or auto.find(source, progress)
    products = 0
    for starts_left in reversed(range(_STARTS)):
        taken = given if auto is None else auto.scale(shift) or 1.0
        series = Series(rows, int(depth), taken, shift, auto if starts_left else None)
        if not finite:
            series.lose_all()
        while not series.over and series.runs < repeat and not (rtol is not None and series.within(rtol)):
            run = series.runs
            h = series.run(source, int(repeat), generator, callback, progress)
            if after_repeat is not None and series.runs > run:
                after_repeat(run, h / taken)
            del h  # before the next run makes its own
        products += series.products
        if not series.again:
            break
    method = f"LiSSA, scale {taken:.3g} (auto)" if auto is not None and finite else "LiSSA"
    products += 0 if auto is None else auto.products - looked_at
    change, ended = series.still_changing(), ~series.failed
    growing = ended & (change > _GROWING)
    spectrum = None
    if growing.any() or (series.failed & ~series.norm.isnan()).any():
        spectrum = sampled_ends(itertools.chain(sample_of(source), series.recent), explain=True)
        products += spectrum.products
    indefinite = growing if spectrum is not None and spectrum.smallest + shift < 0 else torch.zeros_like(growing)
    noisy = ended & ((series.noise() > (_MOSTLY_NOISE if rtol is None else rtol)) | growing & ~indefinite)
    changing = ended & (change > _STILL_CHANGING) & ~growing
    report = SolveReport(
        method=method,
        iterations=torch.where(series.failed, series.iterations, series.products),
        residual=series.residual(),
        converged=ended & ~(changing | indefinite | noisy),
        precision_limit=torch.zeros_like(changing),
        negative_curvature=indefinite,
        products=products,
        seconds=time.perf_counter() - start,
        rtol=math.nan if rtol is None else rtol,
        standard_error=series.standard_error() if repeat > 1 else None,
    )
    found = _failures(series, method, spectrum) + _shortcomings(series, report, changing, noisy, spectrum)
    x = series.solution()
    if unit is not None and (lost := brought_back(x, unit)).any():
        found.append(out_of_range(method, x, lost))
        report = report.without(lost)
    fail(found, on_failure, x, report)
    return x.reshape(as_tensor(B).shape), report


def _in_users_units(callback: Callable[..., None] | None, unit: Tensor) -> Callable[..., None] | None:
    """Wraps a callback whose last argument is in ``unit`` [k, 1], so that the user gets it without a unit."""
    if callback is None:
        return None
    return lambda *where: callback(*where[:-1], where[-1] * (unit if where[-1].dim() == 2 else unit[0]))


def _checked_scale(scale: Any) -> float:
    if isinstance(scale, str) or not scale > 0:
        raise ValueError(f'scale: expected a number > 0 or "auto", got {scale}')
    return float(scale)


def _check_counts(repeat: Any, depth: Any, rtol: float | None) -> None:
    for name, value in (("repeat", repeat), ("depth", depth)):
        if value is None or isinstance(value, str) or not value >= 1 or value % 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {value}")
    if rtol is not None and not rtol >= 0:
        raise ValueError(f"rtol: expected a tolerance >= 0 or None, got {rtol}")
    if rtol is not None and repeat < 2:
        raise ValueError(f"repeat: expected at least 2 with rtol, which is compared with their spread, got {repeat}")


def _failures(series: Series, method: str, spectrum: SampledEnds | None) -> list[Warning]:
    """Returns warnings that say why rows are NaN."""
    found: list[Warning] = []
    grown = series.failed & ~series.norm.isnan()
    k = len(grown)
    if spectrum is not None and series.where is not None and grown.any():
        run, step = series.where
        at = f"for {int(grown.sum())} of {k} right-hand sides, in step {step + 1} of repeat {run + 1}"
        rest = "The solution is NaN there"
        why = _why_steps_expand(spectrum, series.scale, series.shift)
        if why or series.norm[grown].isfinite().any():
            why = why or f"scale={series.scale:g} is too small for a minibatch, or its curvature negative; raise scale"
            found.append(DivergenceWarning(f"{method} diverged {at}: {why}. {rest}"))
        else:
            found.append(
                ConvergenceWarning(
                    f"{method} failed {at}: a number exceeded the range of {series.rows.dtype}, though steps don't "
                    f"expand. {rest}. Scale the loss down, or use float64"
                )
            )
    undefined = int(series.failed.sum() - grown.sum())
    if undefined:
        found.append(
            ConvergenceWarning(
                f"{method} failed for {undefined} of {k} right-hand sides: the right-hand side or a product with a "
                "minibatch's curvature is not a number (NaN or infinity in data or parameters, or an overflow inside "
                f"a product in {series.rows.dtype}). The solution is NaN there. Look for NaN in the data"
            )
        )
    return found


def _why_steps_expand(spectrum: SampledEnds, scale: float, shift: float) -> str:
    """Says why steps expand, by the eigenvalues of some minibatches, with the cure; empty if these don't show it."""
    smallest, largest = spectrum.smallest + shift, spectrum.largest + shift
    if not spectrum.known:
        return ""
    if largest > 2 * scale:
        return (
            f"scale={scale:g} is below half the largest eigenvalue of a minibatch's curvature, {largest:.3g} among "
            f"{SAMPLED} sampled; raise scale, to {spectrum.scale(shift):.3g}"
        )
    if smallest < 0:
        return _negative_eigenvalues(spectrum, shift)
    return ""


def _negative_eigenvalues(spectrum: SampledEnds, shift: float) -> str:
    return (
        f"the curvature of minibatches has negative eigenvalues, {spectrum.smallest + shift:.3g} among {SAMPLED} "
        f"sampled; damping larger by {-1.1 * (spectrum.below + shift):.3g} makes up for them, gnh=True has none for "
        "convex losses"
    )


def _shortcomings(
    series: Series, report: SolveReport, changing: Tensor, noisy: Tensor, spectrum: SampledEnds | None
) -> list[Warning]:
    """Returns warnings for rows that have not failed: negative curvature, too little depth, too few repeats."""
    found: list[Warning] = []
    k, growing = len(changing), report.negative_curvature
    if spectrum is not None and growing.any():
        found.append(
            NegativeCurvatureWarning(
                f"{report.method} grew for {int(growing.sum())} of {k} right-hand sides: over the second half of the "
                f"steps the estimate changed by {float(series.still_changing()[growing].max()):.0%}, where a positive "
                f"definite curvature allows 50%, and more depth would make it worse: "
                f"{_negative_eigenvalues(spectrum, series.shift)}"
            )
        )
    if changing.any():
        enough = ""
        if series.shift > 0:  # then exp(-3) of the slowest mode is left
            enough = (
                f" (3 scale/damp = {3 * series.scale / series.shift:.0f} are always enough without negative curvature)"
            )
        found.append(
            ConvergenceWarning(
                f"{report.method} did not converge for {int(changing.sum())} of {k} right-hand sides: "
                f"depth={series.depth} is too small, the estimate still changed by "
                f"{float(series.still_changing()[changing].max()):.0%} over the second half of the steps (residual "
                f"about {float(report.residual[changing].max()):.1e}); raise depth{enough}, raise damp, or lower scale"
            )
        )
    if noisy.any():
        worst = float(series.noise()[noisy].max())
        wanted = 0.1 if report.rtol != report.rtol else report.rtol
        asked = "" if report.rtol != report.rtol else f" where rtol={report.rtol:.3g} was asked for"
        needed = f", to about {math.ceil(series.runs * (worst / wanted) ** 2)} for {wanted:.3g}" if wanted else ""
        found.append(
            ConvergenceWarning(
                f"{report.method} did not converge for {int(noisy.sum())} of {k} right-hand sides: after {series.runs} "
                f"repeats the estimate has a standard error of {'' if series.runs > 1 else 'about '}{worst:.1e} of its "
                f"size{asked}; raise repeat{needed}, scale or the batch size"
            )
        )
    return found


@dataclasses.dataclass(kw_only=True, eq=False)
class LiSSA(Solver):
    """Estimates by LiSSA, a Neumann series with one minibatch a term; see ``lissa``.

    Args:
        depth, repeat, scale, rtol, generator, callback, after_repeat: those of ``lissa``. What "auto" finds for the
            scale is kept for later solves with the same curvature, whatever its damping.

    Cost:
        repeat x depth minibatch products, however many rows, and up to 160 once for the scale; memory 6 k d.

    Examples:
        >>> from torch_influence.linop import Dense
        >>> x, report = LiSSA(depth=40).solve(Dense(torch.diag(torch.tensor([1.0, 2.0]))), torch.ones(1, 2))
        >>> [round(entry, 4) for entry in x[0].tolist()]
        [1.0, 0.5]
    """

    depth: int
    repeat: int = 1
    scale: float | Literal["auto"] = "auto"
    rtol: float | None = None
    generator: torch.Generator | None = None
    callback: Callable[[int, int, Tensor], None] | None = None
    after_repeat: Callable[[int, Tensor], None] | None = None
    _auto_scale: Memo[AutoScale] = dataclasses.field(default_factory=Memo, init=False, repr=False)

    symmetric, sampled = False, True

    def solve(self, operator: LinearOperator, rows: Tensor, **how: Any) -> tuple[Tensor, SolveReport]:
        """An estimate of A⁻¹ b for each row b of [k, d], and the report; rows share the minibatches."""
        base = base_and_shift(operator)[0]
        scale = self._auto_scale.of(base, AutoScale) if self.scale == "auto" else self.scale
        return lissa(operator, rows, **self.options(scale=scale), **how)

    def cost(self, operator: LinearOperator, k: int) -> Cost:
        """All steps of all repeats, without the scale's."""
        steps = self.repeat * self.depth
        work = steps * k * (operator.operations_of_minibatch + 4.0 * operator.size)
        return Cost(work, 6 * k * row_bytes(operator), f"{steps} minibatch products")

    def describe(self, operator: LinearOperator, k: int) -> Step:
        """The solver's line of ``explain()``, with the scale."""
        base, shift = base_and_shift(operator)
        scale = f"scale {self.scale}"
        if self.scale == "auto":
            auto = self._auto_scale.get(base)
            found = None if auto is None else auto.scale(shift)
            scale = "scale still to be found" if found is None else f"scale {found:.3g} (auto)"
        path = f"LiSSA, {self.repeat} x {self.depth} minibatches, {scale}"
        return Step("solver", path, self.cost(operator, k).nbytes)

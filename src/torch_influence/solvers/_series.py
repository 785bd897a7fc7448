"""The runs of LiSSA: its steps, the checks that they don't diverge, and measures of the estimate's quality."""

from __future__ import annotations

import collections
from collections.abc import Callable

import torch
from torch import Tensor

from torch_influence.linop import LinearOperator, Sampled
from torch_influence.ops import lissa_step
from torch_influence.solvers._base import Progress, norms
from torch_influence.solvers._minibatches import AutoScale

_GROWTH = 10  # allowed beyond (t + 1)|b|: one or two minibatches may expand, and the others make up for it
_SEGMENTS = 4  # of the second half of a run, whose changes are compared


class Series:
    """The runs of the recursion, for all rows at once, and running sums over them.

    Args:
        rows: b, [k, d].
        depth, scale, shift: of ``lissa``; the shift is the minibatches' common damping.
        auto: asked for a larger scale when a row has grown.

    Attributes:
        failed: [k], rows that are not finite, or larger than steps that don't expand can make them; they become NaN.
        norm: [k], |h| of these rows when that was noticed; NaN also for a right-hand side that is not finite.
        where: (run, step) of the first of them; None if there is none.
        recent: the last minibatches.
        again: ``auto`` has a larger scale to start over with.
        over: there is nothing left to do: all rows but those with b = 0 have failed, or ``again``.
        runs, products: so far.
    """

    def __init__(self, rows: Tensor, depth: int, scale: float, shift: float, auto: AutoScale | None) -> None:
        k = len(rows)
        self.rows, self.depth, self.scale, self.shift, self.auto = rows, depth, scale, shift, auto
        self.size = norms(rows).cpu()
        self._bound = (_GROWTH * self.size).square()
        self.failed = ~self.size.isfinite()
        self.norm = torch.zeros_like(self.size).masked_fill(self.failed, torch.nan)
        self.where: tuple[int, int] | None = None
        self.iterations = torch.zeros(k, dtype=torch.int64, device="cpu")
        self.recent: collections.deque[LinearOperator] = collections.deque(maxlen=2)  # a GPU answers a step late
        self.again = False
        self.over = bool(self.failed.any()) and not self.at_work.any()
        self.runs = self.products = 0

        half = max(1, depth // 2)
        self.segments = min(_SEGMENTS, half)
        self.length = half // self.segments
        self.total = torch.zeros_like(rows)
        self.spread = torch.zeros(k, dtype=torch.float64, device=rows.device)  # Σ |x - mean|² over runs
        self.change = torch.zeros_like(rows)  # Σ over runs of h's change over all segments
        self.changes = torch.zeros_like(self.spread)  # Σ over runs and segments of its square
        self._late: tuple[int, Tensor, torch.cuda.Event] | None = None

    @property
    def at_work(self) -> Tensor:
        """The rows, as a mask [k], that have not failed and whose right-hand side is not zero."""
        return (self.size > 0) & ~self.failed

    def lose_all(self) -> None:
        """Marks all rows as failed, since the curvature is not finite."""
        self.failed[:], self.norm[:], self.over = True, torch.nan, True

    def run(
        self,
        source: Sampled,
        repeat: int,
        generator: torch.Generator | None,
        callback: Callable[[int, int, Tensor], None] | None,
        progress: Progress | None,
    ) -> Tensor:
        """Makes one more run and returns its h, [k, d]."""
        number = self.runs
        h = self.rows.clone()
        if self.failed.any():
            h[self.failed.to(h.device)] = torch.nan
        mark = self._begin_segments(h) if self.segments * self.length == self.depth else None
        minibatches = source.sampled(self.depth, generator)
        steps = minibatches if progress is None else progress(minibatches, f"LiSSA {number + 1}/{repeat}", self.depth)
        for step, minibatch in enumerate(steps):
            self.recent.append(minibatch)
            squares = lissa_step(h, self.rows, minibatch.product(h).detach(), self.shift, self.scale)
            self.products += 1
            if callback is not None:
                callback(number, step, h[0].clone() if len(h) == 1 else h.clone())
            self._judge(h, self._known(step, squares))
            if self.over:
                return h
            left = self.depth - step - 1
            if left == self.segments * self.length:
                mark = self._begin_segments(h)
            elif mark is not None and left % self.length == 0:
                self.changes += norms(mark.sub_(h)).square()
                mark.copy_(h)
        mark = None  # before _add takes as much
        self._judge(h, self._last_known())
        if not self.over:
            self._add(h)
        return h

    def _begin_segments(self, h: Tensor) -> Tensor:
        self.change.sub_(h)
        return h.clone()

    def _add(self, h: Tensor) -> None:
        self.change.add_(h)
        if self.runs:  # Welford's recurrence: the difference of two sums of squares would lose the digits
            deviation = norms(self.total.sub(h, alpha=self.runs / self.scale)) / self.runs
            self.spread += deviation.square() * (self.runs / (self.runs + 1))
        self.total.add_(h, alpha=1.0 / self.scale)
        self.runs += 1

    # -- the watch ----------------------------------------------------------------------------------------------------

    def _known(self, step: int, squares: Tensor) -> tuple[int, Tensor] | None:
        """Returns the last step whose |h|² the host can have without waiting for the device, and these |h|², [k]."""
        if not squares.is_cuda:
            return step, squares
        before = self._late
        event = torch.cuda.Event()
        answer = squares.to("cpu", non_blocking=True)
        event.record(torch.cuda.current_stream(squares.device))
        self._late = (step, answer, event)
        if before is None:
            return None
        before[2].synchronize()
        return before[0], before[1]

    def _last_known(self) -> tuple[int, Tensor] | None:
        """Waits for the |h|² of the last step, and returns them, if they are not known yet."""
        if self._late is None:
            return None
        step, answer, event = self._late
        self._late = None
        event.synchronize()
        return step, answer

    def _judge(self, h: Tensor, known: tuple[int, Tensor] | None) -> None:
        """Marks rows that have failed: if no step expands, |h_t| <= |b| + |h_{t-1}|, and so |h_t| <= (t + 1)|b|."""
        if known is None:
            return
        step, squares = known
        within = squares <= self._bound * (step + 2) ** 2
        if bool(within.all()):
            return
        new = ~within & ~self.failed
        if not new.any():
            return
        self.failed |= new
        self.norm[new] = squares[new].sqrt()
        self.iterations[new] = self.products
        self.where = self.where or (self.runs, step)
        h[new.to(h.device)] = torch.nan
        if self.auto is not None and self.norm[new].isfinite().any():
            self.again = self.auto.raised(self.recent, self.scale, self.shift)
            self.auto = None  # asked once
        self.over = self.again or not self.at_work.any()

    # -- the estimate -------------------------------------------------------------------------------------------------

    def solution(self) -> Tensor:
        """Computes the mean over runs, [k, d]; NaN in rows that have failed."""
        mean = self.total / max(1, self.runs)
        if self.failed.any():
            mean[self.failed.to(mean.device)] = torch.nan
        return mean

    def standard_error(self) -> Tensor:
        """Computes that of the mean over runs, √(Σ |x - mean|² / (runs - 1) / runs) / |mean|, [k]; NaN for one run."""
        error = (self.spread / (self.runs - 1) / self.runs).sqrt() if self.runs > 1 else self.spread * torch.nan
        relative = torch.where(error == 0, 0.0, error * self.runs / norms(self.total)).cpu()
        return torch.where(self.failed, torch.nan, relative)

    def noise(self) -> Tensor:
        """Returns the standard error, [k]; for a single run it estimates one.

        Two h of one run that are far apart differ by √2 times their standard deviation, and by a part that is not noise
        and is at most half their size.
        """
        if self.runs > 1:
            return self.standard_error()
        drift = torch.minimum(self._drift(), 0.5 * self.scale * norms(self.total))
        noise = norms(self.change).square() - drift.square()
        return self._relative((noise / 2).clamp(min=0).sqrt())

    def within(self, rtol: float) -> bool:
        """Tells whether the standard errors of all rows at work are within ``rtol``."""
        return self.runs > 1 and bool((self.failed | (self.standard_error() <= rtol)).all())

    def residual(self) -> Tensor:
        """Estimates |b - A x̄| / |b|, [k], of x̄, the mean over the segments' steps and over runs, noise included."""
        steps = max(1, self.runs) * self.segments * self.length
        absolute = norms(self.change).cpu() / steps
        relative = torch.where(self.size > 0, absolute / self.size, absolute)
        return torch.where(self.failed, torch.nan, relative)

    def still_changing(self) -> Tensor:
        """Computes by what share the estimate changes over the second half of the steps, without noise: [k].

        Without negative curvature it is a half at most, namely where the steps have come nowhere near the solution:
        then h_t is (t + 1) b.
        """
        half = (self.depth + 1) / (2 * self.segments * self.length)  # in as few segments as fit
        return half * self._relative(self._drift())

    def _drift(self) -> Tensor:
        """Estimates |Σ δ| without noise, [k], for the m changes δ of h over single segments, of all runs.

        |Σ δ|² - Σ |δ|² is the sum of products of two different δ. Noise does not change its mean, except that a run
        that noise has driven away comes back, which lowers it.
        """
        m = max(1, self.runs) * self.segments
        square = norms(self.change).square()
        if m > 1:
            square = (square - self.changes) * (m / (m - 1))
        return square.clamp(min=0).sqrt()

    def _relative(self, change: Tensor) -> Tensor:
        """Divides a sum over runs, |Σ Δh|, by the norm of the sum of their estimates."""
        return torch.where(change == 0, 0.0, change / (self.scale * norms(self.total))).cpu()

"""Many right-hand sides at once, each by a recurrence of its own: who is at work, who is done, who starts again."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from torch_influence.linop import LinearOperator
from torch_influence.solvers._base import LOOKS_EVERY, Progress, norms, reachable, smallest_residual
from torch_influence.solvers._report import SolveReport


class RowScalars(Protocol):
    """The scalars that every method has of each row at work, each float64 [k]; a method adds its own."""

    @property
    def active(self) -> Tensor:
        """The flag 1 where the row is at work; 0 where it is done or has broken down."""
        ...

    @property
    def tolerance(self) -> Tensor:
        """The residual norm, by the recurrence, at which the row is done."""
        ...

    @property
    def iterations(self) -> Tensor:
        """The number of steps taken."""
        ...


S = TypeVar("S", bound=RowScalars)


class StepLog(abc.ABC, Generic[S]):
    """A log of the scalars of every step; they stay on the device until they are read, so that no iteration waits."""

    def __init__(self, k: int, dtype: torch.dtype, names: Callable[..., S], preconditioned: bool) -> None:
        self.k, self.dtype, self.names, self.preconditioned = k, dtype, names, preconditioned
        self.steps: list[tuple[Tensor, Tensor]] = []
        self.starts: list[tuple[int, Tensor, Tensor]] = []

    def __len__(self) -> int:
        return len(self.steps)

    def start(self, which: Tensor, value: Tensor) -> None:
        """Logs rows that (re)start before the next step, with a number of the method's for each."""
        self.starts.append((len(self.steps), which, value))

    def step(self, which: Tensor, scalars: Tensor) -> None:
        """Logs the scalars [n, len(which)] after a step of these rows."""
        self.steps.append((which, scalars.clone()))

    def unpack(self) -> tuple[Tensor, S]:
        """Returns which rows took each step, [m, k], and their scalars after it, [m, k] each."""
        every = torch.zeros(len(self.steps), len(self.steps[0][1]), self.k, dtype=torch.float64, device="cpu")
        for entry, (which, scalars) in zip(every, self.steps, strict=True):
            entry[:, which.cpu()] = scalars.cpu()
        values = self.names(*every.unbind(1))
        first = torch.zeros(1, self.k, dtype=torch.float64, device="cpu")
        before = torch.cat([first, values.iterations.cummax(dim=0).values])[:-1]
        return values.iterations > before, values

    def begins(self) -> Tensor:
        """Tells before which steps rows have (re)started, [m + 1, k]."""
        m = len(self.steps)
        begins = torch.zeros(m + 1, self.k, dtype=torch.bool, device="cpu")
        for at, which, _ in self.starts:
            begins[min(at, m), which.cpu()] = True
        return begins

    def history(self, first: Tensor, size: Tensor) -> Tensor:
        """Returns the history for the report: the residual norms at first and after each step, relative to ``size``."""
        first, size = first.cpu(), size.cpu()
        found = first[None]
        if self.steps:
            stepped, values = self.unpack()
            found = torch.cat([found, torch.where(stepped, self.residuals(values), torch.nan)])
        return torch.where(size > 0, found / size, found)

    @abc.abstractmethod
    def residuals(self, values: S) -> Tensor:
        """Picks, or computes, the recurrence's residual norms from the scalars."""

    @abc.abstractmethod
    def extremes(self) -> tuple[float, float]:
        """Returns the smallest and the largest eigenvalue that the rows have seen."""


class RowIteration(abc.ABC, Generic[S]):
    """A method that solves A x = b for each row by a recurrence of its own, with one product for all rows at work.

    It keeps x and the report's entries for all rows; ``vectors`` and scalars [n, k], which ``row`` has by name, only
    for rows at work. A row leaves as soon as it is done: it is then judged by b - Ax, computed from its definition. If
    rounding has misled the recurrence the row starts again from there, until that no longer helps.
    """

    vectors: tuple[str, ...]  # names of the attributes [k, d] that exist for rows at work
    unit: Tensor | None = None  # the rows' units, [k, 1], if they have been divided by these
    budget: int | None = None  # products that may be made

    def __init__(
        self, operator: LinearOperator, b: Tensor, x: Tensor | None, tolerance: Tensor, log: StepLog[S], scalars: Tensor
    ) -> None:
        self.operator, self.b, self.log = operator, b, log
        self.products = self.steps = 0
        self.guessed = x is not None
        self.all_x = torch.zeros_like(b, memory_format=torch.contiguous_format) if x is None else x
        self.residual = self.first = norms(b)
        self.best = torch.full_like(self.residual, torch.inf)  # smallest true residual at a restart
        self.converged, self.limited = (torch.zeros_like(self.residual).bool() for _ in range(2))
        self.all_scalars = scalars
        self.row = log.names(*scalars)
        self.tolerance = tolerance
        self.aim = self.row.tolerance.copy_(tolerance).clone()  # of the recurrence
        self.at_work = torch.arange(len(b), device=b.device)
        self.x, self.scalars = self.all_x, self.all_scalars
        self.late: tuple[Tensor, torch.cuda.Event] | None = None

    @abc.abstractmethod
    def begin(self, which: Tensor, r: Tensor) -> None:
        """(Re)starts the recurrence in some of the rows at work (``which`` is a mask), with their true residuals r."""

    @abc.abstractmethod
    def step(self) -> None:
        """Does one iteration of all rows at work; turns ``row.active`` off where a row is done or has broken down."""

    @abc.abstractmethod
    def done(self) -> Tensor:
        """Tells which rows at work are done according to the recurrence, by the same comparison as in the step."""

    @abc.abstractmethod
    def largest(self, row: S) -> Tensor:
        """Returns a lower bound of |A| from each row."""

    @abc.abstractmethod
    def broken(self, row: S) -> Tensor:
        """Tells which rows have met a product, or a right-hand side, that is not finite."""

    def judged(self, which: Tensor, r: Tensor) -> None:
        """Is called after rows at work (``which`` is a mask) have been judged by their true residuals r."""

    def given_up(self, which: Tensor, r: Tensor) -> None:
        """Is called with the rows (by number) that ran out of iterations or broke down, and their true residuals r."""

    def resume(self) -> bool:
        """Is called when no row is left at work; returns whether some rows begin again."""
        return False

    def start(self) -> None:
        """Takes the rows off that the first guess solves, and begins with the others."""
        r = self.true_residual(self.at_work) if self.guessed else self.b
        self.first = norms(r)
        self.converged = self.within(self.first, self.at_work)
        self.residual = torch.where(self.converged, self.first, self.residual)
        going = ~self.converged
        if going.any():
            self.begin(going, r[going])
        self.keep(going)

    def run(
        self,
        limit: int,
        progress: Progress | None,
        describe: str,
        callback: Callable[[np.ndarray], object] | None = None,
    ) -> None:
        """Runs up to ``limit`` iterations; ``callback`` gets each unfinished row's iterate after each."""
        steps: Iterable[int] = range(limit)
        if progress is not None:
            steps = progress(steps, describe, None)  # no total: it stops long before the limit
        for _ in steps:
            if (not len(self.at_work) and not self.resume()) or self.spent:
                break
            self.step()
            if callback is not None:
                for row in self.stepped():
                    callback(row.cpu().numpy())
            if self.some_stopped(wait=callback is not None) and not self.spent:
                self.settle()
        if len(self.at_work) and not self.spent and self.some_stopped(wait=True):
            self.settle()
        self.give_up()

    @property
    def spent(self) -> bool:
        """Whether only the product may be made that judges the rows left."""
        return self.budget is not None and self.products >= self.budget - 1

    def product(self, rows: Tensor) -> Tensor:
        self.products += 1
        return self.operator.product(rows).detach()

    def true_residual(self, which: Tensor) -> Tensor:
        self.products += 1
        return self.b[which] - self.operator.exact.product(self.all_x[which]).detach()

    def stepped(self) -> Tensor:
        """Returns the iterates after the last step, without the rows that broke down in it."""
        which = (self.row.active != 0) | self.done()
        return self.x[which] if self.unit is None else self.x[which] * self.unit[self.at_work[which]]

    def record(self, history: bool) -> None:
        """Logs a step and adjusts the tolerances to rounding; a method calls it after each step."""
        self.steps += 1
        if self.steps % LOOKS_EVERY == 0:  # below the rounding of b - Ax the recurrence means nothing: rows are judged
            size = torch.linalg.vector_norm(self.b[self.at_work], dim=1)
            floor = smallest_residual(self.largest(self.row), self.x, size)
            self.row.tolerance.copy_(torch.maximum(self.aim[self.at_work], floor))
        if history or len(self.log) <= self.b.shape[1]:  # d steps exhaust the space: there is no more to be seen
            self.log.step(self.at_work, self.scalars)

    def some_stopped(self, wait: bool) -> bool:
        """Tells whether some row at work is done or has broken down.

        To know that, the host must wait for the device. A GPU would be idle meanwhile, so without ``wait`` it answers
        for the step before, which has ended, while the device is busy with the last one.
        """
        if wait or not self.x.is_cuda:
            return not bool(self.row.active.all())
        before = self.late
        event = torch.cuda.Event()
        answer = self.row.active.all().to("cpu", non_blocking=True)
        event.record(torch.cuda.current_stream(self.x.device))
        self.late = (answer, event)
        if before is None:
            return False
        before[1].synchronize()
        return not bool(before[0])

    def settle(self) -> None:
        """Takes the rows off that have stopped.

        Rows that are done are judged by their true residual: those that only seemed to be done start again from there,
        unless that has ceased to help. (To replace the residual and keep the direction, earlier and by the criterion of
        van der Vorst and Ye, takes 2 % less to 15 % more products near the limit of float32 and float64.) Rows that
        broke down are judged at the end.
        """
        self.late = None
        self.write_back()
        check = (self.row.active == 0) & self.done()
        if check.any():
            which = self.at_work[check]
            r = self.true_residual(which)
            norm = norms(r)
            done = self.within(norm, which)
            self.residual[which], self.converged[which] = norm, done
            self.limited[which] = ~done & ~(norm < 0.5 * self.best[which])
            self.judged(check, r)
            self.best[which] = norm
            goes_on = ~(done | self.limited[which])
            if goes_on.any():
                again = check.clone()
                again[check] = goes_on
                self.aim[which[goes_on]] *= 0.5  # otherwise the digits that rounding has taken would be missing again
                self.row.tolerance[again] = self.aim[which[goes_on]]
                self.begin(again, r[goes_on])
        self.keep(self.row.active != 0)

    def within(self, norm: Tensor, which: Tensor) -> Tensor:
        return norm.isfinite() & (norm <= self.tolerance[which])  # an infinite b has an infinite tolerance

    def write_back(self) -> None:
        if self.x is not self.all_x:
            self.all_x[self.at_work] = self.x
            self.all_scalars[:, self.at_work] = self.scalars

    def keep(self, which: Tensor) -> None:
        """Keeps these rows (a mask) at work, by number: each use of a mask would make the host wait."""
        mask, which = which, which.nonzero().flatten()
        if len(which) == len(mask):
            return
        self.at_work = self.at_work[which]
        self.x, self.scalars = self.x[which], self.scalars[:, which]
        for name in self.vectors:
            setattr(self, name, getattr(self, name)[which])
        self.row = self.log.names(*self.scalars)

    def take(self, which: Tensor) -> None:
        """Puts only these rows (by number) to work; the method must then begin them."""
        self.write_back()
        self.at_work = which
        self.x, self.scalars = self.all_x[which], self.all_scalars[:, which]
        for name in self.vectors:
            setattr(self, name, torch.empty_like(self.x))
        self.row = self.log.names(*self.scalars)

    def give_up(self) -> None:
        """Computes true residuals of rows that ran out of iterations or broke down; NaN if a product was not finite."""
        self.write_back()
        unknown = ~self.converged & self.broken(self.log.names(*self.all_scalars))
        self.residual[unknown] = torch.nan
        which = (~(self.converged | self.limited | unknown)).nonzero().flatten()
        if len(which):
            r = self.true_residual(which)
            self.residual[which] = norms(r)
            self.converged[which] = self.within(self.residual[which], which)
            self.given_up(which, r)

    def report(self, seconds: float, method: str, negative_curvature: Tensor, history: bool) -> SolveReport:
        size = norms(self.b)
        row = self.log.names(*self.all_scalars)
        limit = reachable(self.largest(row), self.all_x, size)
        return SolveReport(
            method=method,
            iterations=row.iterations.long(),
            residual=torch.where(size > 0, self.residual / size, self.residual),
            converged=self.converged,
            precision_limit=~self.converged & self.residual.isfinite() & (self.residual <= limit),
            negative_curvature=negative_curvature,
            products=self.products,
            seconds=seconds,
            history=self.log.history(self.first, size) if history else None,
            krylov=self.log,
        )

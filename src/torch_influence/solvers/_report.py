"""SolveReport: what every solver tells of its work."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

_ROWS_SHOWN = 8


class Extremes(Protocol):
    """An object that can compute eigenvalue estimates when they are asked for."""

    def extremes(self) -> tuple[float, float]:
        """Returns the smallest and the largest."""
        ...


@dataclasses.dataclass(frozen=True, repr=False)
class SolveReport:
    """How a solve went, one entry per right-hand side; ``print`` it.

    Tensors are on the CPU.

    Attributes:
        method: the solver's name.
        iterations: [k], int64.
        residual: [k], float64, |b - Ax| / |b| computed from its definition at the end (|b - Ax| where b = 0), or a
            bound of it, as ``verification`` says; LiSSA's is an estimate. NaN where it is not known, and where x is
            beyond the range of its dtype.
        converged: [k], bool, residual within the tolerance.
        precision_limit: [k], bool, stopped above the tolerance because the arithmetic reaches no further.
        negative_curvature: [k], bool, p'Ap < 0 (MINRES: a Ritz value < 0) was met on the way, beyond rounding.
        products: multiplications by the curvature, each for all rows still at work.
        seconds: wall time.
        rtol: the relative tolerance that was asked for; NaN if none was.
        history: [steps + 1, k], float64, the recurrence's relative residuals, NaN where a row was not at work; None
            unless asked for.
        standard_error: [k], float64, of an estimate's mean over repeats, relative to the mean; None for exact solvers.
        error: [k], float64, an estimate of |x - x*|_A / |x*|_A by conjugate gradients, x* the solution (of a first
            guess x₀: relative to |x* - x₀|_A); NaN where it is not known. By Cauchy and Schwarz scores of a training
            example with gradient g are off by at most (1/n) |g|_A⁻¹ |x - x*|_A: those of a query, as a vector, by about
            this share of their size (0.5 to 1.5 of it in the problems of benchmarks/).
        verification: what the residuals rest on, if not on a product with each row.
        krylov: what ``eigenvalues`` are computed from when first asked for.
    """

    method: str
    iterations: Tensor
    residual: Tensor
    converged: Tensor
    precision_limit: Tensor
    negative_curvature: Tensor
    products: int
    seconds: float
    rtol: float = float("nan")
    history: Tensor | None = None
    standard_error: Tensor | None = None
    error: Tensor | None = None
    verification: str = ""
    krylov: Extremes | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                object.__setattr__(self, field.name, value.detach().cpu())

    @functools.cached_property
    def eigenvalues(self) -> tuple[float, float]:
        """Estimates of A's smallest and largest eigenvalue, from what the iteration has seen; NaN if it saw none.

        They are Ritz values: A has an eigenvalue at or below the first, and one at or above the second. With a
        preconditioner M they are those of M A.
        """
        return (float("nan"), float("nan")) if self.krylov is None else self.krylov.extremes()

    def __str__(self) -> str:
        lines = [self.summary(), *self._table()]
        if self.verification:
            lines.append(f"residuals verified by {self.verification}")
        smallest, largest = self.eigenvalues
        if smallest == smallest:
            lines.append(f"eigenvalues seen: {smallest:.3g} to {largest:.3g}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<SolveReport: {self.summary()}>"

    def plot(self, ax: Any = None) -> Any:
        """Draws how the solve went: residuals by iteration if ``history`` was asked for, else each row's last one.

        Args:
            ax: matplotlib axes to draw into; new ones by default.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed: ``pip install 'torch-influence[plot]'``.
        """
        from torch_influence import plot  # when asked to draw

        return plot.solves(self, ax=ax)

    def without(self, lost: Tensor) -> SolveReport:
        """Returns the same report with some solutions [k], which were lost after the iterations, marked as failed."""
        return dataclasses.replace(
            self, converged=self.converged & ~lost, residual=self.residual.masked_fill(lost, torch.nan)
        )

    def condensed(self) -> SolveReport:
        """Returns the same report with eigenvalues already computed, so that it holds no vectors or logs."""
        return self if self.krylov is None else dataclasses.replace(self, krylov=Seen([], self.eigenvalues))

    @classmethod
    def joined(cls, reports: Sequence[SolveReport]) -> SolveReport:
        """Joins the reports of right-hand sides that were solved in parts into one."""
        if len(reports) == 1:
            return reports[0]

        def cat(name: str) -> Tensor | None:
            parts = [getattr(report, name) for report in reports]
            return torch.cat(parts) if all(part is not None for part in parts) else None

        histories = [report.history for report in reports if report.history is not None]
        longest = max((len(history) for history in histories), default=0)
        padded = [
            torch.nn.functional.pad(history, (0, 0, 0, longest - len(history)), value=float("nan"))
            for history in histories
        ]
        rows = {name: cat(name) for name in ("iterations", "residual", "converged", "precision_limit")}
        return cls(
            **rows,  # type: ignore[arg-type]  # these are never None
            negative_curvature=torch.cat([report.negative_curvature for report in reports]),
            method=" and ".join(dict.fromkeys(report.method for report in reports)),
            products=sum(report.products for report in reports),
            seconds=sum(report.seconds for report in reports),
            rtol=max(report.rtol for report in reports),
            history=torch.cat(padded, dim=1) if len(padded) == len(reports) else None,
            standard_error=cat("standard_error"),
            error=cat("error"),
            verification="; ".join(dict.fromkeys(report.verification for report in reports if report.verification)),
            krylov=Seen([report.krylov for report in reports if report.krylov is not None]),
        )

    def summary(self) -> str:
        """Says in one line how the solve went."""
        k = len(self.iterations)
        if k == 0:
            return f"{self.method}: no right-hand sides"
        parts = [f"{self.method}: {int(self.converged.sum())} of {k} converged"]
        if self.precision_limit.any():
            parts.append(f"{int(self.precision_limit.sum())} at the limit of the arithmetic")
        if self.products:
            low, high = int(self.iterations.min()), int(self.iterations.max())
            parts.append(f"{low if low == high else f'{low} to {high}'} iterations, {self.products} products")
        known = self.residual[~self.residual.isnan()]
        if len(known):
            parts.append(f"largest relative residual {float(known.max()):.1e}")
        if self.error is not None and (near := self.error[~self.error.isnan()]).numel():
            parts.append(f"estimated error up to {float(near.max()):.1e}")
        if self.negative_curvature.any():
            parts.append(f"negative curvature met in {int(self.negative_curvature.sum())}")
        return ", ".join([*parts, f"{self.seconds:.2f} s"])

    def _table(self) -> list[str]:
        """Lists the rows as lines of a table; only the worst ones where there are too many to show."""
        k = len(self.iterations)
        if k == 0:
            return []
        order = list(range(k))
        if k > _ROWS_SHOWN:
            badness = torch.where(self.residual.isnan(), torch.inf, self.residual)
            order = (badness + self.converged.logical_not() * 1e3).argsort(descending=True, stable=True).tolist()
        heads = ["row", "iterations", "residual"] + (["std. error"] if self.standard_error is not None else [])
        lines = ["  ".join(f"{head:>10}" for head in heads) + "  state"]
        for row in order[:_ROWS_SHOWN]:
            cells = [f"{row:>10}", f"{int(self.iterations[row]):>10}", f"{float(self.residual[row]):>10.1e}"]
            if self.standard_error is not None:
                cells.append(f"{float(self.standard_error[row]):>10.1e}")
            lines.append("  ".join([*cells, self._state(row)]))
        if k > _ROWS_SHOWN:
            lines.append(f"{'':>10}  these are the worst of {k}")
        return lines

    def _state(self, row: int) -> str:
        if self.converged[row]:
            state = "converged"
        elif self.residual[row].isnan():
            state = "NOT KNOWN"
        else:
            state = "limit of the arithmetic" if self.precision_limit[row] else "NOT CONVERGED"
        return state + (", negative curvature" if self.negative_curvature[row] else "")


@dataclasses.dataclass(frozen=True)
class Seen:
    """The eigenvalues that several parts of a solve have seen."""

    parts: Sequence[Extremes]
    besides: tuple[float, float] = (float("nan"), float("nan"))

    def extremes(self) -> tuple[float, float]:
        """Returns the smallest and the largest of them all."""
        seen = [self.besides, *(part.extremes() for part in self.parts)]
        known = [pair for pair in seen if pair[0] == pair[0]] or [self.besides]
        return min(pair[0] for pair in known), max(pair[1] for pair in known)

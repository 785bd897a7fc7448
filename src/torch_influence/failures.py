"""Failures aloud: the warnings of this package, the error in their place, and the choice between them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from torch import Tensor

from torch_influence.caller import level_of_the_user

OnFailure: TypeAlias = Literal["warn", "raise", "ignore"]


class ConvergenceWarning(UserWarning):
    """A solver did not reach the tolerance it was asked for, or an estimate is too rough; the text says what helps."""


class DivergenceWarning(ConvergenceWarning):
    """An iteration grew without bound: what is lost is NaN. The text names the scale or the damping that cures it."""


class NegativeCurvatureWarning(UserWarning):
    """The matrix is not positive definite: scores are not those of a minimum. The text names the damping it takes."""


class SolveError(RuntimeError):
    """A solve failed, and ``on_failure="raise"`` was asked for. Nothing is lost: it carries what was computed.

    Attributes:
        solution: [k, d], as it would have been returned; None where there is none.
        report: the SolveReport.
        warnings: the warnings that would have been given.
    """

    def __init__(self, found: Sequence[Warning], solution: Tensor | None, report: Any) -> None:
        super().__init__("; ".join(str(warning) for warning in found))
        self.warnings, self.solution, self.report = list(found), solution, report

    def __reduce__(self) -> Any:
        return type(self), (self.warnings, self.solution, self.report)


def check_on_failure(on_failure: str) -> None:
    """Refuses what is none of the three."""
    if on_failure not in ("warn", "raise", "ignore"):
        raise ValueError(f'on_failure: expected "warn", "raise" or "ignore", got {on_failure!r}')


def fail(found: Sequence[Warning], on_failure: OnFailure, solution: Tensor | None = None, report: Any = None) -> None:
    """Warns of what was found, pointing at the line outside this package that asked for it; or raises it."""
    if not found or on_failure == "ignore":
        return
    if on_failure == "raise":
        raise SolveError(found, solution, report)
    for warning in found:
        warnings.warn(warning, stacklevel=level_of_the_user())

"""The results of verify(): checks, refits, and what they come to."""

from __future__ import annotations

import dataclasses

from torch import Tensor


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
        """Pearson's, of predicted and actual changes."""
        return _correlation(self.predicted, self.actual)

    @property
    def rank_correlation(self) -> float:
        """Spearman's."""
        return _correlation(_ranks(self.predicted), _ranks(self.actual))

    @property
    def slope(self) -> float:
        """Gives the slope of actual on predicted changes, through the origin: 1 where the size is right."""
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
    """Holds what ``verify`` has found; ``print`` it.

    Attributes:
        checks: in the order in which they were made.
        refits: the pairs of predicted and actual changes; None without ``fit``.
    """

    checks: list[Check]
    refits: Refits | None = None

    @property
    def passed(self) -> bool:
        """Whether every check has."""
        return all(check.passed for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def __str__(self) -> str:
        lines = [str(check) for check in self.checks]
        if self.refits is not None:
            lines.append(str(self.refits))
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """Says it in one line."""
        failed = [check.name for check in self.checks if not check.passed]
        verdict = f"FAILED: {', '.join(failed)}" if failed else "passed"
        return f"{verdict} ({len(self.checks) - len(failed)} of {len(self.checks)} checks)"


def check(name: str, value: float, allowed: float, text: str, otherwise: str = "") -> Check:
    """Compares a value with what is allowed; NaN fails. ``otherwise`` is added to the text where it does."""
    passed = value <= allowed
    return Check(name, passed, value, allowed, text if passed or not otherwise else f"{text}: {otherwise}")


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.norm() * b.norm()))


def _ranks(values: Tensor) -> Tensor:
    """Equal values share the mean of their ranks."""
    below = values[:, None] > values
    return below.sum(dim=1) + 0.5 * (values[:, None] == values).sum(dim=1).double()

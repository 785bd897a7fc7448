"""The minibatches that LiSSA draws, and the scale that they need."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from torch_influence.linop import Damped, LinearOperator, Sampled, aslinearoperator
from torch_influence.solvers._base import Progress, right_hand_sides, rounding
from torch_influence.solvers._lanczos import lanczos

SAMPLED = 16  # minibatches whose extreme eigenvalues are looked at
_STEPS, _DIGITS = 10, 0.1  # of Lanczos on each: their largest eigenvalue is wanted to a tenth
_STEPS_TO_EXPLAIN, _DIGITS_TO_EXPLAIN = 30, 0.02


def system_of_minibatches(A: Any, B: Any) -> tuple[Sampled, float, Tensor]:
    """Returns the source of minibatches, the damping that they share, and the right-hand sides as rows [k, d]."""
    rows = right_hand_sides(B)
    if isinstance(A, list | tuple):
        if not A:
            raise ValueError("A: expected at least one minibatch to draw from, got an empty list")
        return _Drawn([aslinearoperator(minibatch, rows) for minibatch in A]), 0.0, rows
    operator = aslinearoperator(A, rows)
    shift = 0.0
    while isinstance(operator, Damped):
        shift += operator.shift
        operator = operator.base
    return (operator if isinstance(operator, Sampled) else _Itself(operator)), shift, rows


class _Drawn:
    """Minibatches to draw from, uniformly with replacement."""

    def __init__(self, minibatches: list[LinearOperator]) -> None:
        self._minibatches = minibatches

    def sampled(self, steps: int, generator: torch.Generator | None) -> Iterator[LinearOperator]:
        device = "cpu" if generator is None else generator.device
        for i in torch.randint(len(self._minibatches), (steps,), generator=generator, device=device).tolist():
            yield self._minibatches[i]


class _Itself:
    """An operator that is its own and only minibatch."""

    def __init__(self, operator: LinearOperator) -> None:
        self._operator = operator

    def sampled(self, steps: int, generator: torch.Generator | None) -> Iterator[LinearOperator]:
        for _ in range(steps):
            yield self._operator


@dataclasses.dataclass(frozen=True)
class SampledEnds:
    """The extreme eigenvalues of some minibatches, undamped.

    Attributes:
        smallest: a Ritz value: some minibatch has an eigenvalue at or below it.
        below: a lower bound of the smallest eigenvalues, by Lanczos' own error.
        largest: the largest eigenvalue, with that error added.
        products: how many products this took.
    """

    smallest: float
    below: float
    largest: float
    products: int

    @property
    def known(self) -> bool:
        """False if a product was not finite."""
        return math.isfinite(self.largest)

    def scale(self, shift: float) -> float:
        """Returns the norm of the damped minibatches: twice the smallest scale with which no step expands."""
        return max(abs(self.smallest + shift), abs(self.largest + shift)) or 1.0

    def joined(self, other: SampledEnds) -> SampledEnds:
        """Returns the extreme eigenvalues of both sets of minibatches together."""
        return SampledEnds(
            min(self.smallest, other.smallest),
            min(self.below, other.below),
            max(self.largest, other.largest),
            self.products + other.products,
        )


def sampled_ends(minibatches: Iterable[LinearOperator], *, explain: bool = False) -> SampledEnds:
    """Estimates the extreme eigenvalues of minibatches; more exactly if they must ``explain`` what went wrong.

    The largest is a Ritz value plus the bound of its error (Zhou and Li 2011, Bounding the spectrum of large Hermitian
    matrices): in so few steps it may still be too small, namely if the start is nearly orthogonal to its vector.
    """
    found = SampledEnds(math.inf, math.inf, -math.inf, 0)
    steps, digits = (_STEPS_TO_EXPLAIN, _DIGITS_TO_EXPLAIN) if explain else (_STEPS, _DIGITS)
    for number, minibatch in enumerate(minibatches):
        start = torch.Generator().manual_seed(number)
        try:
            ritz = lanczos(minibatch, rtol=digits, maxiter=steps, generator=start)
        except ValueError:  # it is not finite
            return SampledEnds(math.nan, math.nan, math.nan, found.products + 1)
        values, errors = ritz.values.tolist(), ritz.errors.tolist()
        low, high = values[0], values[-1]
        if low > -rounding(minibatch.dtype) * max(abs(low), abs(high)):  # it is not negative beyond rounding
            low = max(low, 0.0)
        below = low - errors[0] if low < 0 else low
        found = found.joined(SampledEnds(low, below, high + errors[-1], ritz.products))
    return found


class AutoScale:
    """The scale that a curvature's minibatches need; it is found in the first solve and kept for the next ones.

    Attributes:
        spectrum: the eigenvalues of the minibatches looked at; None before the first.
        products: how many products that took.
    """

    def __init__(self) -> None:
        self.spectrum: SampledEnds | None = None
        self.products = 0

    def find(self, source: Sampled, progress: Progress | None = None) -> bool:
        """Finds the eigenvalues of a sample of minibatches, once; returns False if a product is not finite.

        A generator of its own draws the sample, so that the runs draw the same minibatches as with a given scale.
        """
        if self.spectrum is None:
            sample = sample_of(source)
            found = sampled_ends(sample if progress is None else progress(sample, "LiSSA's scale", SAMPLED))
            self.products += found.products
            if not found.known:
                return False
            self.spectrum = found
        return True

    def scale(self, shift: float) -> float | None:
        """Returns the scale for minibatches damped by ``shift``; None if it is not known yet."""
        return None if self.spectrum is None else self.spectrum.scale(shift)

    def raised(self, minibatches: Iterable[LinearOperator], scale: float, shift: float) -> bool:
        """Raises the scale after divergence in one of these minibatches; returns whether there is a larger one to try.

        It is the scale that they need, and at least twice the last; none helps if negative eigenvalues are the cause.
        """
        found = sampled_ends(minibatches)
        self.products += found.products
        if self.spectrum is None or not found.known:
            return False
        seen = self.spectrum.joined(found)
        if seen.largest + shift <= 2 * scale:
            if seen.smallest + shift < 0:
                return False
            seen = dataclasses.replace(seen, largest=2 * scale - shift)
        self.spectrum = seen
        return True


def sample_of(source: Sampled) -> Iterator[LinearOperator]:
    """Yields the minibatches whose eigenvalues are found: the same ones each time."""
    return source.sampled(SAMPLED, torch.Generator().manual_seed(0))

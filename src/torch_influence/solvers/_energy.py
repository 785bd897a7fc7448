"""The error of conjugate gradients in the norm of A, |x - x*|_A, from the numbers that they make anyway."""

from __future__ import annotations

import torch
from torch import Tensor


class EnergyError:
    """An estimate of |x - x*|_A for rows of an iteration, relative to |x*|_A.

    A step of length α along p makes |x - x*|_A² smaller by α p·r, whatever the rounding (Hestenes and Stiefel 1952,
    Strakoš and Tichý 2002). What the last steps have taken away, E, is what the error was before them less what is
    left. With what is left falling as |r|² does, from |r₀|² to ρ |r₀|² in these steps, it is

        |x - x*|_A² ≈ E ρ / (1 - ρ)

    The steps are as many as make ρ <= 1/4. Where a lower bound λ > 0 of A's eigenvalues is known, |r|² / λ takes its
    place, which is never too small: damped curvature has most of its eigenvalues near the damping, so that it is less
    than twice too large in most solves.

    Args:
        squares: |r|² [k] at the start, float64.
        least: λ, or 0 where none is known.

    Attributes:
        gained: |x|_A² - |x₀|_A² of a zero start, [k].
        left: the estimate of |x - x*|_A², [k]; infinite while nothing is known.
    """

    def __init__(self, squares: Tensor, least: float = 0.0) -> None:
        self.least = least
        self.gained = torch.zeros_like(squares)
        self.left = torch.full_like(squares, torch.inf)
        self._at = squares.clone()
        self._then = torch.zeros_like(squares)

    def step(self, gain: Tensor, squares: Tensor, at_work: Tensor) -> None:
        """Takes a step's gains, and the |r|² after it, of the rows that ``at_work`` [k] marks."""
        self.gained = torch.where(at_work, self.gained + gain, self.gained)
        ratio = squares / self._at
        fresh = at_work & (ratio <= 0.25)
        if self.least > 0:
            self.left = torch.where(at_work, squares / self.least, self.left)
        else:
            self.left = torch.where(fresh, (self.gained - self._then) * ratio / (1 - ratio), self.left)
        self._at, self._then = torch.where(fresh, squares, self._at), torch.where(fresh, self.gained, self._then)

    def restart(self, which: Tensor, squares: Tensor) -> None:
        """Begins anew in rows whose residuals have been computed from their definition."""
        self._at[which], self._then[which] = squares, self.gained[which]

    @property
    def relative(self) -> Tensor:
        """|x - x*|_A / |x*|_A, [k]; NaN while nothing is known."""
        known = self.left.isfinite() & (self.gained + self.left > 0)
        return torch.where(known, (self.left / (self.gained + self.left)).sqrt(), torch.nan)

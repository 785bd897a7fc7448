"""Random combinations of rows: a check of many residuals for the price of a few products, and how often it misses."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_influence.solvers._base import norms

MISSED = 1e-6  # how often a difference may be missed
_LEAST, _SHARE = 8, 16  # combinations: at least, and one for so many rows


def number_of_combinations(k: int) -> int:
    """How many combinations check k rows."""
    return min(k, max(_LEAST, k // _SHARE))


def missed(combinations: int, factor: float) -> float:
    """The probability, at the most, that Gaussian combinations make a difference ``factor`` times too small.

    For δⱼ the difference in row j and s combinations with weights ω, the mean of |Σⱼ ωⱼδⱼ|² over the combinations
    estimates Σⱼ|δⱼ|², by a weighted sum of χ² variables. Its lower tail is the largest where all δⱼ are parallel, one
    wrong row among others: P(χ²ₛ <= s / factor²), which is 8 % for one combination and a factor of 10, 1 % for two and
    1e-7 for eight (Székely and Bakirov 2003).
    """
    half = torch.tensor([combinations / 2, combinations / (2 * factor**2)], dtype=torch.float64, device="cpu")
    return float(torch.special.gammainc(half[0], half[1]))


def safety(combinations: int) -> float:
    """The factor by which a difference is overestimated, so that it is too small with a probability of ``MISSED``."""
    low, high = 1.0, 1e9
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if missed(combinations, middle) > MISSED else (low, middle)
    return high


class Combinations:
    """Compares residuals b - Ax with what a recurrence says of them, in a few random combinations of the rows.

    The combinations are the same in each run. Where there are no more rows than combinations, these are the rows
    themselves, and nothing is missed.

    Args:
        k: how many rows there are.
        d: their length.
        dtype, device: theirs.
        combinations: s; ``number_of_combinations(k)`` by default.
        seed: of the weights.

    Attributes:
        weights: [s, k], float64, on the host.
        expected: [s, d], the combinations of the residuals that the recurrence has told so far.
    """

    def __init__(
        self,
        k: int,
        d: int,
        dtype: torch.dtype,
        device: torch.device | str,
        combinations: int | None = None,
        seed: int = 0,
    ) -> None:
        s = number_of_combinations(k) if combinations is None else combinations
        self.exact = s >= k
        if self.exact:
            self.weights = torch.eye(k, dtype=torch.float64, device="cpu")
        else:
            generator = torch.Generator("cpu").manual_seed(seed)
            self.weights = torch.randn(s, k, generator=generator, dtype=torch.float64, device="cpu")
        self.factor = 1.0 if self.exact else safety(s)
        self.expected = torch.zeros(len(self.weights), d, dtype=dtype, device=device)

    def __len__(self) -> int:
        return len(self.weights)

    def start(self) -> None:
        """Forgets what the recurrence has told."""
        self.expected.zero_()

    def tell(self, which: Tensor, unit: Tensor, coefficients: Tensor, rows: Tensor) -> None:
        """Takes note of residuals coefficients @ rows of these rows, in units of theirs, [len(which)]."""
        small = (self.weights[:, which] / unit) @ coefficients
        self.expected.addmm_(small.to(rows), rows)

    def of(self, which: Tensor, unit: Tensor, rows: Tensor) -> Tensor:
        """Combines rows [len(which), d], in units of theirs: [s, d]."""
        return (self.weights[:, which] / unit).to(rows) @ rows

    def apart(self, residuals: Tensor, expected: Tensor | None = None) -> float:
        """A bound of Σⱼ |δⱼ|², its root, for combinations of true residuals [s, d]; wrong once in 1 / ``MISSED``.

        Where the combinations are the rows themselves it is that of each of them.
        """
        squares = norms(residuals - (self.expected if expected is None else expected)).square()
        return float(squares.max() if self.exact else squares.mean()) ** 0.5 * self.factor

    def __str__(self) -> str:
        if self.exact:
            return "each row by itself"
        return f"{len(self)} random combinations, which miss a difference with a probability of {MISSED:g}"

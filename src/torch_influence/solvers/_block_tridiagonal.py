"""The matrix that block conjugate gradients make block by block, and what it shows of the spectrum."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_influence.linop import Multiplied
from torch_influence.solvers._lanczos import lanczos

_LARGEST_EIGH = 500


class BlockTridiagonal:
    """The matrix T = Q A Qᵀ for all bases Q that a run has had: what the block has seen of A's spectrum.

    With P_j = Q_j + L_jᵀ P_{j-1} and conjugate directions, D_j = P_j A P_jᵀ: Q_j A Q_jᵀ = D_j + L_jᵀ D_{j-1} L_j and
    Q_j A Q_{j-1}ᵀ = -L_jᵀ D_{j-1}. That is T = U D Uᵀ with a unit lower triangular U, so D's signs are those of T.
    """

    def __init__(self) -> None:
        self.runs: list[list[tuple[Tensor, Tensor | None]]] = []
        self.quotients = torch.empty(0, dtype=torch.float64, device="cpu")  # of directions that led nowhere
        self._factor: Tensor | None = None
        self._open = True

    def start(self) -> None:
        self.runs.append([])
        self._factor, self._open = None, True

    def turn(self, factor: Tensor) -> None:
        self._factor = factor if self.runs[-1] else None

    def step(self, curvature: Tensor, sound: bool) -> None:
        """Adds a step's block, unless rounding may have changed the directions' curvature in this step or before."""
        self._open &= sound
        if self._open:
            self.runs[-1].append((curvature, self._factor))

    def extremes(self) -> tuple[float, float]:
        values = torch.cat([self.quotients, *(self._values(run) for run in self.runs if run)])
        return (float(values.min()), float(values.max())) if len(values) else (float("nan"), float("nan"))

    def _values(self, run: list[tuple[Tensor, Tensor | None]]) -> Tensor:
        starts = [0]
        for curvature, _ in run:
            starts.append(starts[-1] + len(curvature))
        if starts[-1] > _LARGEST_EIGH:  # only its ends, at a fraction of the cost
            whole = Multiplied(
                lambda rows: self._times(run, starts, rows), torch.empty(starts[-1], dtype=torch.float64, device="cpu")
            )
            return lanczos(whole).values
        return torch.linalg.eigvalsh(self._times(run, starts, torch.eye(starts[-1], dtype=torch.float64, device="cpu")))

    @staticmethod
    def _times(run: list[tuple[Tensor, Tensor | None]], starts: list[int], rows: Tensor) -> Tensor:
        product = torch.zeros_like(rows)
        for j, (curvature, factor) in enumerate(run):
            here = slice(starts[j], starts[j + 1])
            product[:, here] += rows[:, here] @ curvature
            if factor is not None:
                before, between = slice(starts[j - 1], starts[j]), run[j - 1][0] @ factor  # D L
                product[:, here] += rows[:, here] @ (factor.mT @ between) - rows[:, before] @ between
                product[:, before] -= rows[:, here] @ between.mT
        return product

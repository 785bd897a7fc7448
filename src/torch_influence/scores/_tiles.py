"""Scores of training examples and queries, score[i, q] = (1/n) ∇(ℓᵢ + reg)(θ) · s_q, computed tile by tile."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_influence.caller import level_of_the_user
from torch_influence.gradients import ExampleGradients


class Tile(NamedTuple):
    """The scores [b, k] of b training examples and k queries.

    Attributes:
        examples, queries: their positions among those asked for.
        scores: on the device.
    """

    examples: Sequence[int]
    queries: Sequence[int]
    scores: Tensor

    def where(self) -> tuple[Tensor, Tensor]:
        """Returns the index that places its scores in the matrix [n, q] of all scores on the CPU."""
        return torch.tensor(self.examples, device="cpu")[:, None], torch.tensor(self.queries, device="cpu")


def from_stests(
    examples: ExampleGradients,
    indices: Sequence[int],
    stests: Tensor,
    n: int,
    first: int = 0,
    summed: Tensor | None = None,
) -> Iterator[Tile]:
    """Yields scores for the stests [k, d] of the queries from ``first`` on, in one pass over the training examples.

    ``summed``: what ``ExampleGradients.dots`` takes.
    """
    queries = range(first, first + len(stests))
    for positions, dots in examples.dots(indices, stests, summed):
        yield Tile(positions, queries, dots.to(stests.dtype).div_(n))


def from_training_rows(
    examples: ExampleGradients,
    indices: Sequence[int],
    tests: ExampleGradients,
    queries: Sequence[int],
    solve: Callable[[Tensor], Tensor],
    n: int,
) -> Iterator[Tile]:
    """Yields the same scores as (1/n) (A⁻¹gᵢ)·∇f_q, for symmetric A; one pass over the queries per chunk of rows."""
    for positions, rows in examples.rows(indices):
        solved = solve(rows)
        for some, dots in tests.dots(queries, solved):
            yield Tile(positions, some, dots.to(rows.dtype).mT.div_(n))


def whole(tiles: Iterable[Tile], indices: Sequence[int], queries: int, dtype: torch.dtype) -> Tensor:
    """Collects all scores into a matrix [len(indices), queries] on the CPU."""
    scores = torch.empty(len(indices), queries, dtype=dtype, device="cpu")
    for tile in checked(tiles, indices):
        scores[tile.where()] = tile.scores.cpu()
    return scores


def checked(tiles: Iterable[Tile], indices: Sequence[int]) -> Iterator[Tile]:
    """Yields the same tiles, and warns after the last one if scores of training examples were not finite."""
    bad = torch.zeros(len(indices), dtype=torch.bool, device="cpu")
    for tile in tiles:
        bad[torch.tensor(tile.examples, device="cpu")] |= ~tile.scores.isfinite().all(dim=1).cpu()
        yield tile
    if bad.any():
        rows = bad.nonzero().flatten().tolist()
        warnings.warn(
            f"{len(rows)} of {len(indices)} training examples have scores that are not finite, the first of them "
            f"example {indices[rows[0]]}: its loss or gradient, or the solve, is NaN or infinite there",
            RuntimeWarning,
            stacklevel=level_of_the_user(),
        )

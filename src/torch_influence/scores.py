"""Training examples x queries: score[i, q] = (1/n) ∇(ℓᵢ + reg)(θ) · s_q."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_influence.examples import ExampleGradients


def score_matrix(examples: ExampleGradients, indices: Sequence[int], stests: Tensor, n: int) -> Tensor:
    """Scores [len(indices), k] on the CPU for stests [k, d]; one pass over the examples, memory one chunk of them."""
    scores = torch.empty(len(indices), len(stests), dtype=stests.dtype)
    if len(indices) and len(stests):
        for positions, dots in examples.dots(indices, stests):
            scores[positions] = dots.to(scores)
    return _finite(scores.div_(n), indices)


def _finite(scores: Tensor, indices: Sequence[int]) -> Tensor:
    bad = ~scores.isfinite()
    if bad.any():
        rows = bad.reshape(len(indices), -1).any(dim=-1).nonzero().flatten().tolist()
        warnings.warn(
            f"{len(rows)} of {len(indices)} training examples have scores that are not finite, the first of them "
            f"example {indices[rows[0]]}: its loss or gradient, or the solve, is NaN or infinite there",
            RuntimeWarning,
            stacklevel=4,
        )
    return scores

"""Which path a computation takes: fast paths are compared with the plain one before they are used."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Step:
    """One part of a computation.

    Attributes:
        part: what it is: "data", "curvature", "solver", "scores".
        path: the way it is computed.
        nbytes: of memory that it keeps or needs.
        why_not: faster ways that are not taken, and why.
    """

    part: str
    path: str
    nbytes: int
    why_not: Sequence[tuple[str, str]] = ()

    def summary(self) -> str:
        """The way and its memory."""
        return f"{self.path}; {_size(self.nbytes)}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a module computes; ``str()`` says it in words, ``plan["curvature"]`` is the step of that name."""

    steps: tuple[Step, ...]

    def __getitem__(self, part: str) -> Step:
        return next(step for step in self.steps if step.part == part)

    def __str__(self) -> str:
        lines = []
        for step in self.steps:
            lines.append(f"{step.part + ':':<11}{step.summary()}")
            lines += [f"{'':<13}not {way}: {reason}" for way, reason in step.why_not]
        return "\n".join(lines)


def _size(nbytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= scale / 10:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes / 1e3:.1f} kB"


def agree(fast: Tensor, plain: Tensor, dtype: torch.dtype, operations: int | None = None) -> bool:
    """Whether two computations of the same rows [k, d] differ by rounding only.

    Row by row in the 2-norm, relative to the largest row, within sqrt(eps) of the dtype that the passes run in:
    rounding in another order stays well below it, another meaning (padding, a cross-example loss, class weights)
    does not. With ``operations``, so many roundings of the dtype instead, where that is less. A wrong "no" costs time,
    never an answer.
    """
    if fast.shape != plain.shape:
        return False
    if not plain.numel():
        return True
    largest = torch.maximum(fast.abs().max(), plain.abs().max())
    unit = torch.where(largest > 0, largest, 1.0)  # or squares may under- or overflow
    fast, plain = fast / unit, plain / unit
    scale, eps = plain.norm(dim=-1).max(), torch.finfo(dtype).eps
    allowed = eps**0.5 if operations is None else min(operations * eps, eps**0.5)
    return bool(((fast - plain).norm(dim=-1) <= allowed * scale).all())

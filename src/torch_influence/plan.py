"""Plan: which way each part of a computation takes, why not a faster one, and what memory that needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


class NotPossible(Exception):  # noqa: N818 -- no error: another way is taken
    """A way of computing that is not open here; the text says why, in words for ``explain()``."""


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

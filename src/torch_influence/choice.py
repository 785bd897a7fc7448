"""Which solver costs least, from counts of operations and bytes: numbers only, nothing is measured or computed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

# Per digit of the tolerance, in the problems of benchmarks/: what damped curvature takes. It can't be known before.
_ITERATIONS_PER_DIGIT = 15
# A block of k rows takes about k^-0.4 of that: 14, 10 and 7 products for 16, 64 and 256 rows where one row takes 30.
_BLOCK_EXPONENT = 0.4
_BLOCK_VECTOR_WORK = 12  # operations per k² d in an iteration of a block
# Weighting, mirroring and the narrow parts of Cholesky run at about half the rate of products with many rows.
_SLOWNESS_OF_DENSE = 2
# These solve what no other does, at a price that would be paid for nothing elsewhere; which it is isn't known before.
_WHEN_NAMED = frozenset({"minres"})


@dataclasses.dataclass(frozen=True)
class Problem:
    """What the choice depends on.

    Attributes:
        d, k: parameters and right-hand sides.
        rtol: relative tolerance.
        product: operations of a product with one row.
        dense: operations of forming the matrix.
        factored: whether a factor of the matrix is there already.
        dual: of the dual system operations once and for each row, and bytes; None if there is no such system.
        element: bytes of a number.
        free: bytes that the solve may take.
    """

    d: int
    k: int
    rtol: float
    product: float
    dense: float
    factored: bool
    dual: tuple[float, float, int] | None
    element: int
    free: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a solver would take.

    Attributes:
        solver: its name, as the argument ``solver`` has it.
        operations: additions and multiplications, about, at the rate of products with the curvature.
        nbytes: of memory.
        note: what the estimate rests on.
    """

    solver: str
    operations: float
    nbytes: int
    note: str


def costs(problem: Problem) -> list[Cost]:
    """Of every solver: the cheapest that fits the memory comes first, those that don't fit then, "minres" last."""
    d, k = problem.d, problem.k
    digits = -math.log10(min(max(problem.rtol, 1e-16), 0.1))
    single = min(_ITERATIONS_PER_DIGIT * digits, float(d)) + 1
    block = max(single * k**-_BLOCK_EXPONENT, 2.0) + 1
    vector = problem.element * d
    found = [
        Cost(
            "direct",
            (0.0 if problem.factored else _SLOWNESS_OF_DENSE * (problem.dense + d**3 / 3)) + 4.0 * d**2 * k,
            3 * vector * d,
            "factored before" if problem.factored else "matrix and Cholesky factor",
        ),
        Cost("cg", single * k * (problem.product + 12 * d), 5 * k * vector, f"{single:.0f} products, a guess"),
        Cost("minres", single * k * (problem.product + 18 * d), 6 * k * vector, f"{single:.0f} products, a guess"),
        Cost(
            "block",
            block * k * (problem.product + _BLOCK_VECTOR_WORK * k * d),
            7 * k * vector,
            f"{block:.0f} products, a guess",
        ),
    ]
    if problem.dual is not None:
        once, per_row, nbytes = problem.dual
        found.append(Cost("dual", _SLOWNESS_OF_DENSE * once + per_row * k, nbytes, "kernel and Cholesky factor"))
    return sorted(found, key=lambda cost: (cost.solver in _WHEN_NAMED, cost.nbytes > problem.free, cost.operations))


def reasons(ranked: Sequence[Cost], free: float, chosen: str) -> list[tuple[str, str]]:
    """Why the others are not taken."""
    taken = next(cost for cost in ranked if cost.solver == chosen)
    found = []
    for cost in ranked:
        if cost.solver in {chosen, *_WHEN_NAMED}:
            continue
        ratio = cost.operations / taken.operations
        why = f"{ratio:,.{1 if ratio < 10 else 0}f}x the operations ({cost.note})"
        if cost.nbytes > free:
            why = f"needs {cost.nbytes / 1e9:.2g} GB, and {free / 1e9:.2g} GB may be used"
        found.append((cost.solver, why))
    return found

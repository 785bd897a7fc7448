"""The vector work of one iteration of conjugate gradients on many right-hand sides."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from torch_influence.ops import _arguments
from torch_influence.ops._native import checks_itself, native_op, runs_natively


class CGScalars(NamedTuple):
    """The scalars of `cg_step` for every row: the rows of its argument `scalars`, each float64 [k].

    ``CGScalars(*scalars)`` gives them as views by name.

    Attributes:
        active: 1 where the row is at work, else 0. The step turns it off where a row is done or has broken down.
        tolerance: The row is done as soon as ‖r‖ ≤ tolerance. Never written.
        rho: r'z, or r'r without preconditioner, of the residual that p came from; 0 marks a start: the next p is z.
        alpha: The step's length, in the precision of the rows' arithmetic; 0 where the row broke down.
        curvature: p'Ap of the last step.
        residual: ‖r‖² after the last step.
        negative: 1 once p'Ap ≤ 0 was met.
        largest: The largest ‖Ap‖² / ‖p‖² met.
        iterations: Steps taken.
    """

    active: Tensor
    tolerance: Tensor
    rho: Tensor
    alpha: Tensor
    curvature: Tensor
    residual: Tensor
    negative: Tensor
    largest: Tensor
    iterations: Tensor


def cg_step(
    x: Tensor,
    r: Tensor,
    p: Tensor,
    scalars: Tensor,
    q: Tensor | None = None,
    z: Tensor | None = None,
    preconditioned: bool = False,
) -> None:
    r"""Takes every active row through an iteration of conjugate gradients, given q = A p.

        α = ρ / p'q,   x ← x + αp,   r ← r - αq,   β = r'r / ρ,   ρ ← r'r,   p ← r + βp

    A row that is now within its tolerance is done: its p and ρ are left as they are, and later calls don't change it
    any more. A row breaks down where α, or some entry of q, isn't finite: it is left as it is from then on.

    With a preconditioner M an iteration takes two calls, the first of which knows z = M r of the residual at hand:

        cg_step(x, r, p, scalars, z=z, preconditioned=True)      ρ ← r'z, β = ρ / ρ before, p ← z + βp
        cg_step(x, r, p, scalars, q=q, preconditioned=True)      α = ρ / p'q, x ← x + αp, r ← r - αq

    Args:
        x: The iterates [k, d], float32, float64, float16 or bfloat16; changed in place, as are r, p and scalars.
        r: The residuals b - A x, like x.
        p: The directions, like x. x, r, p and scalars must not overlap.
        scalars: What is known of each row besides, float64 [9, k], as `CGScalars` names it.
        q: A p, like x. It may be p itself.
        z: M r, like x. It may be r itself.
        preconditioned: Whether r'z is another number than r'r.

    Raises:
        TypeError: For a wrong type or dtype, naming the argument.
        ValueError: For a wrong shape or device, for both or none of q and z, or a tensor that requires grad, naming the
            argument.

    Cost:
        Without preconditioner 7 reads and 3 writes per element in three passes, less where a row fits into the cache;
        two passes for each call with one. No host synchronisation; can be captured in a CUDA graph.

    Source:
        Hestenes and Stiefel (1952), section 3. Dot products are summed in float64 whatever the rows' dtype.
    """
    if not checks_itself("cg_step", x, r, p, scalars, q, z):
        _check(x, r, p, scalars, q, z, preconditioned)
        if not runs_natively("cg_step", x):
            return reference(x, r, p, scalars, q, z, preconditioned)
    try:
        _native(x, r, p, scalars, q, z, preconditioned)
    except Exception:
        _check(x, r, p, scalars, q, z, preconditioned)  # says what is wrong in the caller's words
        raise
    increment_version((x, r, p, scalars))  # the op's schema alone doesn't


def _check(
    x: Tensor, r: Tensor, p: Tensor, scalars: Tensor, q: Tensor | None, z: Tensor | None, preconditioned: bool
) -> None:
    _arguments.check_rows("cg_step", "x", x)
    _arguments.check_like("cg_step", "r", r, "x", x)
    _arguments.check_like("cg_step", "p", p, "x", x)
    for name, written in (("x", x), ("r", r), ("p", p)):
        _arguments.check_written("cg_step", name, written)
    _check_scalars(scalars, x)
    if (q is None) == (z is None):
        raise ValueError(f"cg_step: q, z: expected one of them, got {'none' if q is None else 'both'}")
    if q is not None:
        _arguments.check_like("cg_step", "q", q, "x", x)
    if z is not None:
        _arguments.check_like("cg_step", "z", z, "x", x)
        if not preconditioned:
            raise ValueError("cg_step: z: expected None without a preconditioner, got a tensor")


def _check_scalars(scalars: Tensor, x: Tensor) -> None:
    _arguments.check_rows("cg_step", "scalars", scalars)
    _arguments.check_written("cg_step", "scalars", scalars)
    expected = (len(CGScalars._fields), x.shape[0])
    if scalars.dtype != torch.float64:
        raise TypeError(f"cg_step: scalars: expected dtype torch.float64, got {scalars.dtype}")
    if scalars.shape != expected:
        raise ValueError(f"cg_step: scalars: expected shape {expected}, got {tuple(scalars.shape)}")
    if scalars.device != x.device:
        raise ValueError(f"cg_step: scalars: expected device {x.device}, as x has, got {scalars.device}")


def reference(
    x: Tensor,
    r: Tensor,
    p: Tensor,
    scalars: Tensor,
    q: Tensor | None = None,
    z: Tensor | None = None,
    preconditioned: bool = False,
) -> None:
    """Specifies the op in plain torch: 16-bit rows are computed in float32, and stored before they are used again."""
    row = CGScalars(*scalars)
    if z is not None:
        at_work = row.active != 0
        _turn(p, at_work, z, row.rho, _dot(r, z))
    elif q is not None:
        at_work = row.active != 0
        curvature, squares = _dot(p, q), _dot(q, q)
        alpha = (row.rho / curvature).to(_wide(x.dtype)).double()
        stepping = at_work & alpha.isfinite() & squares.isfinite()

        _set(row.alpha, at_work, torch.where(stepping, alpha, 0.0))
        _set(row.curvature, at_work, curvature)
        _set(row.negative, at_work & (curvature <= 0), torch.ones_like(curvature))
        ratio = squares / _dot(p, p)
        _set(row.largest, stepping & (ratio > row.largest), ratio)
        row.iterations.add_(stepping)

        _move(x, stepping, alpha, p)
        _move(r, stepping, -alpha, q)
        residual = _dot(r, r)
        _set(row.residual, stepping, residual)
        goes_on = stepping & ~(residual.isfinite() & (residual <= row.tolerance.square()))
        row.active.copy_(goes_on)
        if not preconditioned:
            _turn(p, goes_on, r, row.rho, residual)


def _turn(p: Tensor, which: Tensor, z: Tensor, rho: Tensor, new_rho: Tensor) -> None:
    """Replaces p by z + βp in some rows, and sets their new ρ."""
    wide = _wide(p.dtype)
    start = rho == 0
    beta = torch.where(start, 0.0, new_rho / rho).to(wide)[:, None]
    turned = torch.where(beta == 0, z.to(wide), z.to(wide) + beta * p.to(wide))
    p.copy_(torch.where(which[:, None], turned.to(p.dtype), p))
    _set(rho, which, new_rho)


def _move(rows: Tensor, which: Tensor, length: Tensor, along: Tensor) -> None:
    """Adds length·along to some of the rows."""
    wide = _wide(rows.dtype)
    moved = rows.to(wide) + length.to(wide)[:, None] * along.to(wide)
    rows.copy_(torch.where(which[:, None], moved.to(rows.dtype), rows))


def _set(scalar: Tensor, which: Tensor, value: Tensor) -> None:
    scalar.copy_(torch.where(which, value, scalar))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).sum(dim=-1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def fake(
    x: Tensor,
    r: Tensor,
    p: Tensor,
    scalars: Tensor,
    q: Tensor | None = None,
    z: Tensor | None = None,
    preconditioned: bool = False,
) -> None:
    """Returns nothing, as the op does: it writes to its arguments."""


_native = native_op("cg_step", fake)


def example(generator: torch.Generator) -> dict[str, Any]:
    """Draws arguments for the self-test, in float32: a third step of rows at work, one of which is done."""
    x, r, p, q = torch.randn(4, 5, 40_007, generator=generator, device=generator.device)
    q += 2 * p  # as with a positive definite matrix
    scalars = CGScalars(*torch.zeros(len(CGScalars._fields), 5, dtype=torch.float64, device=x.device))
    scalars.active.copy_(torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0], device=x.device))
    scalars.tolerance.fill_(1e-3)
    scalars.rho.copy_(r.double().square().sum(dim=-1))
    scalars.iterations.fill_(2.0)
    return {"x": x, "r": r, "p": p, "scalars": torch.stack(scalars), "q": q}

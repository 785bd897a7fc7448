"""One step of LiSSA's recursion on many right-hand sides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from torch_influence.ops import _arguments
from torch_influence.ops._native import checks_itself, native_op, runs_natively


def lissa_step(h: Tensor, v: Tensor, hvp: Tensor, damp: float, scale: float) -> Tensor:
    r"""Replaces every row of h by v + h - (hvp + damp·h) / scale and returns the rows' squared norms.

    With hvp = H h the fixed point is h = scale · (H + damp·I)⁻¹ v.

    Args:
        h: The iterates [k, d], float32, float64, float16 or bfloat16; changed in place.
        v: The right-hand sides, like h. It may be h itself, but must not overlap it otherwise.
        hvp: Curvature times h without damping, like h. The same holds for it.
        damp: Damping, in units of the curvature.
        scale: What the damped curvature is divided by; not zero.

    Returns:
        ‖h‖² of each new row as stored, float64 [k] on h's device: inf or nan where a row is no longer finite.

    Raises:
        TypeError: For a wrong type or dtype, naming the argument.
        ValueError: For a wrong shape, device or value, or a tensor that requires grad, naming the argument.

    Cost:
        One pass: three reads and one write per element. No host synchronisation; can be captured in a CUDA graph.

    Source:
        Agarwal, Bullins and Hazan (2017), the recursion of section 3, with damping inside the scaled curvature.
    """
    numbers = isinstance(damp, (int, float)) and isinstance(scale, (int, float))
    if not (numbers and checks_itself("lissa_step", h, v, hvp)):
        _check(h, v, hvp, damp, scale)
        if not runs_natively("lissa_step", h):
            return reference(h, v, hvp, damp, scale)
    try:
        norms = _native(h, v, hvp, damp, scale)
    except Exception:
        _check(h, v, hvp, damp, scale)  # says what is wrong in the caller's words
        raise
    increment_version(h)  # the op's schema alone doesn't
    return norms


def _check(h: Tensor, v: Tensor, hvp: Tensor, damp: float, scale: float) -> None:
    _arguments.check_rows("lissa_step", "h", h)
    _arguments.check_written("lissa_step", "h", h)
    _arguments.check_like("lissa_step", "v", v, "h", h)
    _arguments.check_like("lissa_step", "hvp", hvp, "h", h)
    _arguments.check_number("lissa_step", "damp", damp)
    _arguments.check_number("lissa_step", "scale", scale, nonzero=True)


def reference(h: Tensor, v: Tensor, hvp: Tensor, damp: float, scale: float) -> Tensor:
    """Specifies the op in plain torch: 16-bit rows are computed in float32, norms of the stored rows in float64."""
    wide = torch.promote_types(h.dtype, torch.float32)
    new = h.to(wide)
    step = torch.add(hvp.to(wide), new, alpha=damp).div_(scale)
    new.add_(v.to(wide)).sub_(step)
    if new is not h:
        h.copy_(new)
    return h.to(torch.float64, copy=True).square_().sum(1)


def fake(h: Tensor, v: Tensor, hvp: Tensor, damp: float, scale: float) -> Tensor:
    """Returns a tensor with the shape, dtype and device of the result."""
    return h.new_empty(h.shape[0], dtype=torch.float64)


_native = native_op("lissa_step", fake)


def example(generator: torch.Generator) -> dict[str, Any]:
    """Draws arguments for the self-test, in float32."""
    h, v, hvp = torch.randn(3, 5, 40_007, generator=generator, device=generator.device)
    return {"h": h, "v": v, "hvp": hvp, "damp": 0.1, "scale": 7.0}

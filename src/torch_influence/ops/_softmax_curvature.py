"""The curvature of softmax cross-entropy with respect to the logits, times many tangents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from torch_influence.ops import _arguments
from torch_influence.ops._native import checks_itself, native_op, runs_natively


def softmax_curvature(p: Tensor, t: Tensor, weights: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    r"""Multiplies tangents of the logits by the Hessian of softmax cross-entropy, w · (diag(p) − p pᵀ) t.

    Computed as w · p · (t − Σⱼ pⱼ tⱼ), for each of n examples and k tangents. The Hessian is the same for every label,
    and is the output curvature of the Gauss-Newton matrix.

    Args:
        p: Probabilities [n, c], float32, float64, float16 or bfloat16. A row need not sum to one.
        t: Tangents [k, n, c], dtype and device of p.
        weights: Factors w of the examples [n], 1/n for a mean say; float64 if t is, float32 otherwise. None: ones.
        out: Like t, where the products go. It may be t itself, which saves memory and a third of the traffic, but must
            not overlap t otherwise, nor p. None: a new tensor.

    Returns:
        The products [k, n, c]: out, if it was given.

    Raises:
        TypeError: For a wrong type or dtype, naming the argument.
        ValueError: For a wrong shape or device, or a tensor that requires grad, naming the argument.

    Cost:
        One pass: t is read and out is written once; p is read once for all k tangents as far as caches reach. 16-bit
        tensors are computed in float32. No host synchronisation; can be captured in a CUDA graph.

    Source:
        Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient descent, table 1.
    """
    if not checks_itself("softmax_curvature", p, t, weights, out):
        _check(p, t, weights, out)
        if not runs_natively("softmax_curvature", t):
            return reference(p, t, weights, out)
    try:
        if out is None:
            out = torch.empty_like(t)
        _native(p, t, weights, out)
    except Exception:
        _check(p, t, weights, out)  # says what is wrong in the caller's words
        raise
    increment_version(out)  # the op's schema alone doesn't
    return out


def reference(p: Tensor, t: Tensor, weights: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Specifies the op in plain torch: 16-bit tensors are computed in float32."""
    wide = torch.promote_types(t.dtype, torch.float32)
    p_wide, t_wide = p.to(wide), t.to(wide)
    product = (t_wide - (p_wide * t_wide).sum(-1, keepdim=True)).mul_(p_wide)
    if weights is not None:
        product.mul_(weights[:, None])
    return product.to(t.dtype) if out is None else out.copy_(product)


def _check(p: Tensor, t: Tensor, weights: Tensor | None, out: Tensor | None) -> None:
    _arguments.check_rows("softmax_curvature", "p", p)
    _check_one("t", t, p.dtype, 1, p.shape, p)
    if weights is not None:
        _check_one("weights", weights, torch.promote_types(p.dtype, torch.float32), 0, p.shape[:1], p)
    if out is not None:
        if out is not t:
            _arguments.check_like("softmax_curvature", "out", out, "t", t)
        _arguments.check_written("softmax_curvature", "out", out)


def _check_one(name: str, tensor: Tensor, dtype: torch.dtype, leading: int, sizes: torch.Size, p: Tensor) -> None:
    """Checks that a tensor is on p's device, with this dtype, these sizes after `leading` others, and no graph."""
    op = "softmax_curvature"
    _arguments.check_beside(op, name, tensor, dtype, "p", p)
    if tensor.dim() != leading + len(sizes) or tensor.shape[leading:] != sizes:
        expected = f"(k, {', '.join(map(str, sizes))})" if leading else tuple(sizes)
        raise ValueError(f"{op}: {name}: expected shape {expected} to go with p, got {tuple(tensor.shape)}")


def fake(p: Tensor, t: Tensor, weights: Tensor | None, out: Tensor) -> None:
    """Returns nothing, as the op does: it writes to out."""


_native = native_op("softmax_curvature", fake)


def example(generator: torch.Generator) -> dict[str, Any]:
    """Draws arguments for the self-test, in float32."""
    p = torch.randn(37, 301, generator=generator, device=generator.device).softmax(dim=-1)
    return {"p": p, "t": torch.randn(3, 37, 301, generator=generator, device=generator.device)}

"""Dot products of a linear layer's per-example gradients with many vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from torch_influence.ops import _arguments
from torch_influence.ops._native import checks_itself, native_op, runs_natively


def grad_dot(a: Tensor, g: Tensor, v: Tensor, bias: bool = False, out: Tensor | None = None) -> Tensor:
    r"""Computes the dot products ⟨Gᵢ, vⱼ⟩ of n examples' gradients with k vectors, for a linear layer y = W x + b.

    The gradient of example i with respect to W is Gᵢ = Σₜ gᵢₜ aᵢₜᵀ, with respect to b Σₜ gᵢₜ; neither is kept:

        out[i, j] += Σₜ gᵢₜᵀ (Vⱼ aᵢₜ + bⱼ)

    Args:
        a: The layer's inputs [n, s, f] at s positions of a sequence (1 without one), float32, float64, float16 or
            bfloat16.
        g: Gradients of each example's own loss with respect to the layer's outputs [n, s, o], like a.
        v: The vectors [k, o·f], each Vⱼ row by row as W is flattened, or [k, o·f + o] with bⱼ after it; float64 if a
            is, float32 otherwise. Rows may be parts of the rows of a larger matrix.
        bias: Whether the layer has a bias, and v the bⱼ.
        out: What the dot products are added to, [n, k] with dtype and device of v, so that those of several layers can
            be summed. None: zeros.

    Returns:
        out, or the new tensor.

    Raises:
        TypeError: For a wrong type or dtype, naming the argument.
        ValueError: For a wrong shape or device, or a tensor that requires grad, naming the argument.

    Cost:
        Per example about 2skof operations where Vⱼ aᵢₜ comes first, 2(s + k)of where Gᵢ does: the cheaper order is
        taken, memory traffic counted. Arithmetic and sums in the dtype of v. Below 64 MiB of memory at any n, s and k
        (a tensor whose columns aren't adjacent is copied whole besides). No host synchronisation; can be captured in a
        CUDA graph. BLAS may round differently with another number of threads.

    Source:
        Goodfellow (2015), Efficient per-example gradient computations, for the layer's outer products.
    """
    if not (checks_itself("grad_dot", a, g, v, out) and type(bias) is bool):
        _check(a, g, v, bias, out)
        if not runs_natively("grad_dot", a):
            return reference(a, g, v, bias, out)
    try:
        if out is None:
            out = v.new_zeros(a.shape[0], v.shape[0])
        _native(a, g, v, bias, out)
    except Exception:
        _check(a, g, v, bias, out)  # says what is wrong in the caller's words
        raise
    increment_version(out)  # the op's schema alone doesn't
    return out


def reference(a: Tensor, g: Tensor, v: Tensor, bias: bool = False, out: Tensor | None = None) -> Tensor:
    """Specifies the op in plain torch: forms gradients as rows, of a few examples at a time.

    Memory: twice 2²² elements, or twice one example's gradient, since the bias is appended to a copy.
    """
    if out is None:
        out = v.new_zeros(a.shape[0], v.shape[0])
    examples = max(2**22 // max(v.shape[1], 1), 1)
    for a_tile, g_tile, out_tile in zip(a.split(examples), g.split(examples), out.split(examples), strict=True):
        a_wide, g_wide = a_tile.to(v.dtype), g_tile.to(v.dtype)
        gradients = torch.einsum("nso,nsf->nof", g_wide, a_wide).flatten(1)
        if bias:
            gradients = torch.cat([gradients, g_wide.sum(1)], dim=1)
        out_tile.addmm_(gradients, v.mT)
    return out


def _check(a: Tensor, g: Tensor, v: Tensor, bias: bool, out: Tensor | None) -> None:
    _arguments.check_floating("grad_dot", "a", a)
    if a.dim() != 3:
        raise ValueError(f"grad_dot: a: expected shape (n, s, f), got {tuple(a.shape)}")
    n, s, f = a.shape
    _arguments.check_beside("grad_dot", "g", g, a.dtype, "a", a)
    if g.dim() != 3 or g.shape[:2] != (n, s):
        raise ValueError(f"grad_dot: g: expected shape ({n}, {s}, o) to go with a, got {tuple(g.shape)}")
    if not isinstance(bias, bool):
        raise TypeError(f"grad_dot: bias: expected a bool, got {type(bias).__name__}")
    o, wide = g.shape[2], torch.promote_types(a.dtype, torch.float32)
    columns = o * f + (o if bias else 0)
    _arguments.check_beside("grad_dot", "v", v, wide, "a", a)
    if v.dim() != 2 or v.shape[1] != columns:
        terms = f"{o}·{f} + {o}" if bias else f"{o}·{f}"
        raise ValueError(
            f"grad_dot: v: expected shape (k, {columns}), {terms} columns {'with' if bias else 'without'} bias, "
            f"got {tuple(v.shape)}"
        )
    if out is not None:
        _arguments.check_beside("grad_dot", "out", out, wide, "a", a)
        if out.shape != (n, v.shape[0]):
            raise ValueError(f"grad_dot: out: expected shape ({n}, {v.shape[0]}), got {tuple(out.shape)}")
        _arguments.check_written("grad_dot", "out", out)


def fake(a: Tensor, g: Tensor, v: Tensor, bias: bool, out: Tensor) -> None:
    """Returns nothing, as the op does: it writes to out."""


_native = native_op("grad_dot", fake)

WIDE = ("v",)  # arguments that stay in the dtype of the arithmetic when the others are 16-bit


def example(generator: torch.Generator) -> dict[str, Any]:
    """Draws arguments for the self-test, in float32."""
    a = torch.randn(37, 5, 83, generator=generator, device=generator.device)
    g = torch.randn(37, 5, 29, generator=generator, device=generator.device)
    v = torch.randn(11, 29 * 83 + 29, generator=generator, device=generator.device)
    return {"a": a, "g": g, "v": v, "bias": True}

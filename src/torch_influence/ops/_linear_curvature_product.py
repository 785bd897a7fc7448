"""The curvature of a loss with respect to the parameters of a linear layer, times many vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from torch_influence.ops import _arguments, _softmax_curvature
from torch_influence.ops._native import checks_itself, native_op, runs_natively

_OP = "linear_curvature_product"
_TILE = 2**22  # elements of the reference's scratch
WIDE = ("v", "curvature", "weights", "out")  # of the dtype that the arithmetic is done in


def linear_curvature_product(
    x: Tensor,
    v: Tensor,
    curvature: Tensor,
    weights: Tensor | None = None,
    bias: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    r"""Multiplies vectors of a linear layer's parameters by the Hessian of a loss of its outputs.

    For outputs zᵢ = W xᵢ + b of n examples and the Hessian Bᵢ of the loss at zᵢ, a vector v = (V, v_b) goes to

        Σᵢ sᵢ xᵢᵀ and Σᵢ sᵢ,    sᵢ = Bᵢ (V xᵢ + v_b)

    With softmax cross-entropy Bᵢ = wᵢ (diag(pᵢ) − pᵢ pᵢᵀ), and only pᵢ is needed. The sum has no factor 1/n: put it
    into the weights or blocks.

    Args:
        x: Inputs of the layer [n, f], float32, float64, float16 or bfloat16.
        v: Vectors [k, c·f], or [k, c·f + c] with ``bias``: the weight row by row, then the bias. float64 if x is,
            float32 otherwise, as everything below.
        curvature: Probabilities [n, c], or the Hessians themselves [n, c, c].
        weights: Factors w of the examples [n], with probabilities only. None: ones.
        bias: Whether the layer has a bias among the parameters.
        out: Like v, where the products go; it must not overlap any of the others. None: a new tensor.

    Returns:
        The products, like v: out, if it was given.

    Raises:
        TypeError: For a wrong type or dtype, naming the argument.
        ValueError: For a wrong shape or device, or a tensor that requires grad, naming the argument.

    Cost:
        4 n f k c multiplications and additions. On the CPU x is read from memory once while k·c is small (up to 48),
        otherwise and on CUDA a tile at a time by BLAS. Memory beside the result: up to 64 MiB for tiles and sums, and
        twice v; none of it grows with n. No host synchronisation; can be captured in a CUDA graph.

    Source:
        Pearlmutter (1994) and Schraudolph (2002, eq. 6) for a network that is one linear layer: there the two agree.
    """
    if not checks_itself(_OP, x, v, curvature, weights, out):
        _check(x, v, curvature, weights, bias, out)
        if not runs_natively(_OP, x):
            return reference(x, v, curvature, weights, bias, out)
    try:
        if out is None:
            out = torch.empty_like(v)
        _native(x, v, curvature, weights, bias, out)
    except Exception:
        _check(x, v, curvature, weights, bias, out)  # says what is wrong in the caller's words
        raise
    increment_version(out)  # the op's schema alone doesn't
    return out


def reference(
    x: Tensor,
    v: Tensor,
    curvature: Tensor,
    weights: Tensor | None = None,
    bias: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Specifies the op in plain torch, in v's dtype; tiles of examples keep its memory bounded."""
    (n, f), k, c = x.shape, len(v), curvature.shape[1]
    columns = v[:, : c * f].reshape(k * c, f)
    product, bias_sums = torch.zeros_like(columns), v.new_zeros(k, c)
    at_once = max(1, _TILE // max(k * c + f, 1))
    for first in range(0, n, at_once):
        rows = slice(first, first + at_once)
        x_rows = x[rows].to(v.dtype)
        t = (x_rows @ columns.mT).reshape(len(x_rows), k, c).transpose(0, 1)
        if bias:
            t = t + v[:, None, c * f :]
        if curvature.dim() == 2:
            s = _softmax_curvature.reference(curvature[rows], t, None if weights is None else weights[rows])
        else:
            s = torch.einsum("nab,knb->kna", curvature[rows], t)
        product += s.transpose(0, 1).reshape(len(x_rows), k * c).mT @ x_rows
        bias_sums += s.sum(1)
    product = product.reshape(k, c * f)
    whole = torch.cat([product, bias_sums], dim=1) if bias else product
    return whole if out is None else out.copy_(whole)


def _check(x: Tensor, v: Tensor, curvature: Tensor, weights: Tensor | None, bias: bool, out: Tensor | None) -> None:
    _arguments.check_rows(_OP, "x", x)
    _arguments.check_rows(_OP, "v", v)
    wide = torch.promote_types(x.dtype, torch.float32)
    n, f = x.shape
    _arguments.check_beside(_OP, "v", v, wide, "x", x)
    _arguments.check_beside(_OP, "curvature", curvature, wide, "x", x)
    shape = tuple(curvature.shape)
    if len(shape) not in (2, 3) or shape[0] != n or (len(shape) == 3 and shape[1] != shape[2]):
        raise ValueError(f"{_OP}: curvature: expected shape ({n}, c) or ({n}, c, c) to go with x, got {shape}")
    c = shape[1]
    d = c * f + (c if bias else 0)
    if v.shape[1] != d:
        what = f"{c} x {f} weights{f' and {c} biases' if bias else ''}"
        raise ValueError(f"{_OP}: v: expected shape (k, {d}) for {what}, got {tuple(v.shape)}")
    if weights is not None:
        if len(shape) == 3:
            raise ValueError(f"{_OP}: weights: expected None with blocks [n, c, c], got a tensor; multiply the blocks")
        _arguments.check_beside(_OP, "weights", weights, wide, "x", x)
        if weights.shape != (n,):
            raise ValueError(f"{_OP}: weights: expected shape ({n},) to go with x, got {tuple(weights.shape)}")
    if out is not None:
        _arguments.check_like(_OP, "out", out, "v", v)
        _arguments.check_written(_OP, "out", out)


def fake(x: Tensor, v: Tensor, curvature: Tensor, weights: Tensor | None, bias: bool, out: Tensor) -> None:
    """Returns nothing, as the op does: it writes to out."""


_native = native_op(_OP, fake)


def example(generator: torch.Generator) -> dict[str, Any]:
    """Draws arguments for the self-test, in float32."""
    curvature = torch.randn(500, 3, generator=generator, device=generator.device).softmax(dim=-1)
    return {
        "x": torch.randn(500, 41, generator=generator, device=generator.device),
        "v": torch.randn(2, 3 * 42, generator=generator, device=generator.device),
        "curvature": curvature,
        "bias": True,
    }

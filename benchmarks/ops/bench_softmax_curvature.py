"""softmax_curvature, in place and into a new tensor."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import harness

from torch_influence.ops import softmax_curvature
from torch_influence.ops._softmax_curvature import reference

SIZES = [(k, n, c) for n, c in [(4096, 10), (4096, 1000), (128, 32000)] for k in (1, 16)] + [(1, 100, 10), (1, 1, 10)]


def best_in_place(p: Tensor, t: Tensor, work: Tensor) -> Tensor:
    """Whole tensors at a time: of mul and sum, vecdot, bmm and einsum the first is the fastest on small rows."""
    mean = torch.mul(p, t, out=work).sum(-1, keepdim=True)
    return t.sub_(mean).mul_(p)


def best_in_place_small(p: Tensor, t: Tensor, work: Tensor) -> Tensor:
    """The same with the fewest arguments to be read from Python, into memory that torch takes from its own."""
    return t.sub_((p * t).sum(-1, True)).mul_(p)


def best_in_place_einsum(p: Tensor, t: Tensor, work: Tensor) -> Tensor:
    """And the last one on long rows of many tangents."""
    return t.sub_(torch.einsum("nc,knc->kn", p, t)[..., None]).mul_(p)


def in_place_tiled(p: Tensor, t: Tensor, work: Tensor, elements: int = 2**16) -> Tensor:
    """Tile by tile from Python, so that a tile is still in the cache in its second and third pass."""
    rows = max(1, elements // p.shape[1])
    for t_k in t:
        for p_tile, tile in zip(p.split(rows), t_k.split(rows), strict=True):
            best_in_place(p_tile, tile, work[0, : len(p_tile)])
    return t


def softmax_backward(p: Tensor, t: Tensor, work: Tensor) -> Tensor:
    """The kernel in which torch does the same for the backward pass of softmax: private, and for one p per tangent."""
    for t_k in t if len(t) > 1 else [t.view(p.shape)]:
        torch.ops.aten._softmax_backward_data.out(t_k, p, -1, p.dtype, grad_input=t_k)
    return t


def textbook(p: Tensor, t: Tensor, work: Tensor) -> Tensor:
    """The product as it is written down."""
    return p * t - p * (p * t).sum(-1, keepdim=True)


VARIANTS = {
    "native, in place": lambda p, t, work: softmax_curvature(p, t, out=t),
    "native, new tensor": lambda p, t, work: softmax_curvature(p, t),
    "reference, in place": lambda p, t, work: reference(p, t, out=t),
    "best in-place torch": best_in_place,
    "best in-place torch, small": best_in_place_small,
    "best in-place torch, einsum": best_in_place_einsum,
    "in-place torch in tiles": in_place_tiled,
    "torch's softmax backward": softmax_backward,
    "textbook": textbook,
}


def benchmark(device: str, seconds: float) -> Iterator[harness.Measured]:
    """Float32 at each of SIZES: k tangents of n examples with c classes; four flops an element."""
    for k, n, c in SIZES:
        p = torch.softmax(torch.randn(n, c, device=device), -1)
        start = torch.randn(k, n, c, device=device)
        exact = reference(p.double(), start.double())
        t, work = start.clone(), torch.empty_like(start)
        calls, errors = {}, {}
        for name, variant in VARIANTS.items():
            errors[name] = harness.relative_error(variant(p, t.copy_(start), work), exact)
            calls[name] = partial(variant, p, t, work)
        del start, exact
        # In place again and again, tangents shrink to subnormal numbers, which are slow; zeros stay zeros.
        t.zero_()
        title, traffic = f"{k} x {n:,} x {c:,}", 4 * c * n * (2 * k + 1)
        yield harness.compare(title, calls, errors, traffic, 4 * k * n * c, device, seconds)


if __name__ == "__main__":
    harness.main("softmax_curvature", benchmark)

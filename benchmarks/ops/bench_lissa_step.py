"""lissa_step: the whole step including the rows' norms."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import harness

from torch_influence.ops import lissa_step
from torch_influence.ops._lissa_step import reference

DAMP, SCALE = 0.01, 10.0
SIZES = [(1, 20_000_000), (8, 1_000_000), (1, 1000), (4, 100), (1, 10)]


def best_in_place(h: Tensor, v: Tensor, hvp: Tensor) -> Tensor:
    """Three passes over whole tensors, 7 reads or writes per element: the fewest that torch's own operations allow.

    Folding damping into h's factor saves a pass, and loses a damping below float32's roundoff of the scale.
    """
    torch.add(v, h, alpha=1 - DAMP / SCALE, out=h)
    h.sub_(hvp, alpha=1 / SCALE)
    return torch.linalg.vector_norm(h, dim=1).square_()


def best_in_place_dot(h: Tensor, v: Tensor, hvp: Tensor) -> Tensor:
    """The same with BLAS dot products for the norms."""
    torch.add(v, h, alpha=1 - DAMP / SCALE, out=h)
    h.sub_(hvp, alpha=1 / SCALE)
    return torch.stack([torch.dot(row, row) for row in h])


def best_in_place_small(h: Tensor, v: Tensor, hvp: Tensor) -> Tensor:
    """The same with the fewest calls."""
    torch.add(v, h, alpha=1 - DAMP / SCALE, out=h)
    h.sub_(hvp, alpha=1 / SCALE)
    if h.shape[0] > 1:
        return torch.linalg.vecdot(h, h)
    row = h.view(-1)
    return torch.dot(row, row)


def in_place_tiled(h: Tensor, v: Tensor, hvp: Tensor, columns: int = 2**19) -> Tensor:
    """The same, tile by tile from Python, so that a tile is still in the cache in its second and third pass."""
    norms = torch.zeros(h.shape[0], device=h.device)
    for tile in zip(h.split(columns, 1), v.split(columns, 1), hvp.split(columns, 1), strict=True):
        norms += best_in_place_dot(*tile)
    return norms


def textbook(h: Tensor, v: Tensor, hvp: Tensor) -> Tensor:
    """The recursion as it is written down."""
    h.copy_(v + h - (hvp + DAMP * h) / SCALE)
    return h.square().sum(1)


VARIANTS = {
    "native": lambda h, v, hvp: lissa_step(h, v, hvp, DAMP, SCALE),
    "reference": lambda h, v, hvp: reference(h, v, hvp, DAMP, SCALE),
    "best in-place torch": best_in_place,
    "best in-place torch, dot": best_in_place_dot,
    "best in-place torch, small": best_in_place_small,
    "in-place torch in tiles": in_place_tiled,
    "textbook": textbook,
}


def benchmark(device: str, seconds: float) -> Iterator[harness.Measured]:
    """Float32 at each of SIZES: three rows read, one written; five flops an element, and two of the norms."""
    for k, d in SIZES:
        start, v, hvp = torch.randn(3, k, d, device=device).unbind()
        exact = v.double() + start.double() - (hvp.double() + DAMP * start.double()) / SCALE
        calls, errors = {}, {}
        for name, variant in VARIANTS.items():
            h = start.clone()
            variant(h, v, hvp)
            errors[name] = harness.relative_error(h, exact)
            # On and on with the same h: it tends to a fixed point, far from overflow and from subnormal numbers.
            calls[name] = partial(variant, h, v, hvp)
        yield harness.compare(f"{k} x {d:,}", calls, errors, 16 * k * d, 7 * k * d, device, seconds)


if __name__ == "__main__":
    harness.main("lissa_step", benchmark)

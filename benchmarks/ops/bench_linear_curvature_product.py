"""linear_curvature_product with softmax's curvature and a bias: the Hessian of softmax regression times k vectors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import harness

from torch_influence.ops import linear_curvature_product
from torch_influence.ops._linear_curvature_product import reference

SIZES = [
    (50000, 784, 10, 1),
    (5000, 784, 10, 1),
    (5000, 784, 10, 4),
    (5000, 784, 10, 64),
    (1000, 100, 10, 1),
    (10, 10, 3, 1),
    (10, 10, 10, 10),
]  # n f c k


def best_in_place(x: Tensor, v: Tensor, p: Tensor, out: Tensor, work: Tensor) -> None:
    """Two products of matrices with the curvature in place between them: n k c intermediates, x read twice."""
    k, c, f = len(v), p.shape[1], x.shape[1]
    columns = v[:, : c * f].reshape(k * c, f)
    t = torch.addmm(v[:, c * f :].reshape(-1), x, columns.mT, out=work[: len(x)])
    by_class, p = t.view(len(x), k, c), p[:, None]
    by_class.sub_((by_class * p).sum(-1, keepdim=True)).mul_(p)
    out[:, : c * f] = torch.mm(t.mT, x).view(k, c * f)
    out[:, c * f :] = t.sum(0).view(k, c)


def small(x: Tensor, v: Tensor, p: Tensor, out: Tensor, work: Tensor) -> Tensor:
    """The same with the fewest calls."""
    k, c, f = len(v), p.shape[1], x.shape[1]
    if k == 1:
        row = v.view(-1)
        t = torch.addmm(row[c * f :], x, row[: c * f].view(c, f).mT)
        t.sub_((t * p).sum(-1, True)).mul_(p)
        return torch.cat([torch.mm(t.mT, x).view(-1), t.sum(0)])
    t = torch.addmm(v[:, c * f :].reshape(-1), x, v[:, : c * f].reshape(k * c, f).mT)
    by_class, p = t.view(len(x), k, c), p[:, None]
    by_class.sub_((by_class * p).sum(-1, True)).mul_(p)
    return torch.cat([torch.mm(t.mT, x).view(k, c * f), t.sum(0).view(k, c)], 1)


def in_place_tiled(x: Tensor, v: Tensor, p: Tensor, out: Tensor, work: Tensor, rows: int = 1024) -> None:
    """The same, tile by tile from Python, so that a tile of x is still in the cache in the second product."""
    k, c, f = len(v), p.shape[1], x.shape[1]
    columns, bias = v[:, : c * f].reshape(k * c, f), v[:, c * f :].reshape(-1)
    product, sums = torch.zeros_like(columns), torch.zeros_like(bias)
    for x_tile, p_tile in zip(x.split(rows), p[:, None].split(rows), strict=True):
        t = torch.addmm(bias, x_tile, columns.mT, out=work[: len(x_tile)])
        by_class = t.view(len(x_tile), k, c)
        by_class.sub_((by_class * p_tile).sum(-1, keepdim=True)).mul_(p_tile)
        product.addmm_(t.mT, x_tile)
        sums.add_(t.sum(0))
    out[:, : c * f] = product.view(k, c * f)
    out[:, c * f :] = sums.view(k, c)


def textbook(x: Tensor, v: Tensor, p: Tensor, out: Tensor, work: Tensor) -> None:
    """The sums as they are written down."""
    k, c, f = len(v), p.shape[1], x.shape[1]
    t = torch.einsum("nf,kcf->knc", x, v[:, : c * f].view(k, c, f)) + v[:, None, c * f :]
    s = p * t - p * (p * t).sum(-1, keepdim=True)
    out[:, : c * f] = torch.einsum("knc,nf->kcf", s, x).reshape(k, c * f)
    out[:, c * f :] = s.sum(1)


VARIANTS = {
    "native": lambda x, v, p, out, work: linear_curvature_product(x, v, p, None, True, out),
    "reference": lambda x, v, p, out, work: reference(x, v, p, None, True, out),
    "best in-place torch": best_in_place,
    "small torch": small,
    "in-place torch in tiles": in_place_tiled,
    "textbook": textbook,
}


def benchmark(device: str, seconds: float) -> Iterator[harness.Measured]:
    """Float32 at each of SIZES."""
    for n, f, c, k in SIZES:
        x, v = torch.randn(n, f, device=device), torch.randn(k, c * f + c, device=device)
        p = torch.randn(n, c, device=device).softmax(-1)
        exact = reference(x.double(), v.double(), p.double(), None, True)
        out, work = torch.empty_like(v), torch.empty(n, k * c, device=device)
        calls, errors = {}, {}
        for name, variant in VARIANTS.items():
            result = variant(x, v, p, out, work)
            errors[name] = harness.relative_error(out if result is None else result, exact)
            calls[name] = partial(variant, x, v, p, out, work)
        del exact
        title, traffic = f"{n:,} x {f}, {c} classes, k = {k}", 4 * (x.numel() + p.numel() + 2 * v.numel())
        flops = (
            4 * n * k * c * (f + 1) + 4 * n * k * c
        )  # two products of matrices, and softmax's curvature between them
        yield harness.compare(title, calls, errors, traffic, flops, device, seconds)


if __name__ == "__main__":
    harness.main("linear_curvature_product", benchmark)

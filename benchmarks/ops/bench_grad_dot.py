"""grad_dot, against compositions of torch calls and against the matrix products alone that its cheaper order needs.

Memory that an earlier call has freed isn't counted as extra unless MALLOC_MMAP_THRESHOLD_=65536 is set, at which all is
slower; tests/ops/test_grad_dot.py measures it so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import harness

from torch_influence.ops import grad_dot
from torch_influence.ops._grad_dot import reference

# n, s, f, o, k. Sequences of 32 with 500 examples: with 5000 a call takes a second and more.
SIZES = [
    (5000, 1, 784, 128, 64),
    (500, 32, 784, 128, 64),
    (5000, 1, 784, 10, 1),
    (5000, 1, 784, 10, 500),
    (100, 1, 100, 10, 1),
    (1, 1, 100, 10, 1),
    (1, 1, 100, 10, 10),
    (10, 1, 10, 3, 1),
    (10, 4, 10, 3, 10),
]


def vectors_first(a: Tensor, g: Tensor, v: Tensor, out: Tensor, columns: int = 2048, rows: int = 512) -> Tensor:
    """Products of a with some vectors at a time, in tiles small enough for the cache, then with g by bmm."""
    (s, f), o = a.shape[1:], g.shape[2]
    examples, some = max(rows // s, 1), max(columns // o, 1)
    work = a.new_empty(examples * s, some * o)
    for vectors, out_columns in zip(v.split(some), out.split(some, 1), strict=True):
        matrix = vectors.reshape(-1, f).mT
        for a_tile, g_tile, out_tile in zip(
            a.split(examples), g.split(examples), out_columns.split(examples), strict=True
        ):
            u = work.flatten()[: len(a_tile) * s * matrix.shape[1]].view(-1, matrix.shape[1])
            u = torch.mm(a_tile.flatten(0, 1), matrix, out=u).view(len(a_tile), s, -1, o)
            dots = torch.bmm(u[:, 0], g_tile.mT).squeeze(2) if s == 1 else torch.einsum("nsko,nso->nk", u, g_tile)
            out_tile.copy_(dots)
    return out


def gradients_first(a: Tensor, g: Tensor, v: Tensor, out: Tensor, elements: int = 2**22) -> Tensor:
    """Gradients of 128 examples with respect to some outputs at a time, then their products with the vectors."""
    (n, s, f), o = a.shape, g.shape[2]
    examples = min(128, n)
    some = min(max(elements // (examples * f), 1), o)
    work = a.new_empty(examples * some * f)
    for a_tile, g_tile, out_tile in zip(a.split(examples), g.split(examples), out.split(examples), strict=True):
        out_tile.zero_()
        for first in range(0, o, some):
            g_some = g_tile[:, :, first : first + some].mT
            gradients = work[: len(a_tile) * g_some.shape[1] * f].view(len(a_tile), -1, f)
            (torch.mul if s == 1 else torch.bmm)(g_some, a_tile, out=gradients)
            out_tile.addmm_(gradients.flatten(1), v[:, first * f : first * f + gradients[0].numel()].mT)
    return out


def small_vectors_first(a: Tensor, g: Tensor, v: Tensor, out: Tensor) -> Tensor:
    """The fewest calls where all products of a with vectors may be in memory at once."""
    (n, s, f), o, k = a.shape, g.shape[2], v.shape[0]
    if n * s * k == 1:
        return torch.dot(torch.mv(v.view(o, f), a.view(f)), g.view(o))
    u = torch.mm(a.view(n * s, f), v.view(k * o, f).mT)
    if k == 1:
        return u.view(n, s * o).mul_(g.view(n, s * o)).sum(1, True)
    if s == 1:
        return u.view(n, k, o).mul_(g).sum(2)
    return torch.einsum("nsko,nso->nk", u.view(n, s, k, o), g)


def small_gradients_first(a: Tensor, g: Tensor, v: Tensor, out: Tensor) -> Tensor:
    """The fewest calls where all gradients may be in memory at once."""
    gradients = g.mT * a if a.shape[1] == 1 else torch.bmm(g.mT, a)
    return torch.mm(gradients.view(len(a), -1), v.mT)


def textbook(a: Tensor, g: Tensor, v: Tensor, out: Tensor, elements: int = 2**26) -> Tensor:
    """All gradients as rows, or those of as many examples as make 256 MiB, and one product."""
    examples = max(elements // v.shape[1], 1)
    return torch.cat(
        [
            torch.einsum("nso,nsf->nof", *tile).flatten(1) @ v.mT
            for tile in zip(g.split(examples), a.split(examples), strict=True)
        ]
    )


def cheaper_order(n: int, s: int, f: int, o: int, k: int) -> int:
    """Flops of the cheaper order: inputs with vectors first, or inputs with output gradients first."""
    return min(2 * n * s * f * o * k, 2 * n * (s + k) * f * o)


def pure_products(n: int, s: int, f: int, o: int, k: int, device: str) -> dict[str, harness.Call]:
    """One torch.mm with the operations of the cheaper order, by its sizes."""
    operations = cheaper_order(n, s, f, o, k)
    if 2 * n * s * f * o * k == operations:
        rows, inner, columns = n * s, f, k * o
    else:
        rows, inner = 2048, 1024
        columns = max(round(operations / (2 * rows * inner)), 1)
    left, right = torch.randn(rows, inner, device=device), torch.randn(inner, columns, device=device)
    product = torch.empty(rows, columns, device=device)
    return {f"mm {rows} x {inner} x {columns}": partial(torch.mm, left, right, out=product)}


VARIANTS = {
    "native": lambda a, g, v, out: grad_dot(a, g, v),
    "reference": lambda a, g, v, out: reference(a, g, v),
    "torch in tiles, v first": vectors_first,
    "torch in tiles, g first": gradients_first,
    "textbook": textbook,
}

SMALL = {"small torch, v first": small_vectors_first, "small torch, g first": small_gradients_first}


def benchmark(device: str, seconds: float) -> Iterator[harness.Measured]:
    """Float32 at each of SIZES."""
    for n, s, f, o, k in SIZES:
        a, g = torch.randn(n, s, f, device=device), torch.randn(n, s, o, device=device)
        v, out = torch.randn(k, o * f, device=device), torch.empty(n, k, device=device)
        exact = reference(a.double(), g.double(), v.double())
        calls, errors = {}, {}
        small = SMALL if n * max(k * s * o, f * o) <= 2**20 else {}
        for name, variant in (VARIANTS | small).items():
            errors[name] = harness.relative_error(variant(a, g, v, out).view(n, k), exact)
            calls[name] = partial(variant, a, g, v, out)
        flops = cheaper_order(n, s, f, o, k)
        traffic = 4 * (a.numel() + g.numel() + v.numel() + out.numel())
        title = f"n = {n:,}, s = {s}, {f} to {o}, k = {k}"
        products = pure_products(n, s, f, o, k, device)
        yield harness.compare(title, calls, errors, traffic, flops, device, seconds, yardsticks=products)


if __name__ == "__main__":
    harness.main("grad_dot", benchmark)

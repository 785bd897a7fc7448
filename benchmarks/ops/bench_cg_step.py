"""cg_step: an iteration's vector work, given the product with the matrix."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import harness

from torch_influence.ops import CGScalars, cg_step
from torch_influence.ops._cg_step import reference

SIZES = [(1, 20_000_000), (8, 1_000_000), (1, 100_000), (64, 1000), (1, 1000), (1, 10)]


def dots(a: Tensor, b: Tensor) -> Tensor:
    """BLAS dot products row by row: here faster than any of torch's own row-wise reductions."""
    return torch.stack([torch.dot(u, v) for u, v in zip(a, b, strict=True)])


def best_in_place(x: Tensor, r: Tensor, p: Tensor, rho: Tensor, q: Tensor) -> None:
    """Five operations on whole tensors, 12 reads or writes per element; scalars stay in tensors, so nothing waits."""
    alpha = (rho / dots(p, q)).unsqueeze(1)
    x.addcmul_(alpha, p)
    r.addcmul_(alpha, q, value=-1)
    residual = dots(r, r)
    torch.addcmul(r, (residual / rho).unsqueeze(1), p, out=p)
    rho.copy_(residual)


def best_in_place_rows(x: Tensor, r: Tensor, p: Tensor, rho: Tensor, q: Tensor) -> None:
    """The same row by row, so that short rows stay in the cache, and with numbers for scalars, which waits for them."""
    for i, (x_row, r_row, p_row, q_row) in enumerate(zip(x, r, p, q, strict=True)):
        before = rho[i].item()
        alpha = before / torch.dot(p_row, q_row).item()
        x_row.add_(p_row, alpha=alpha)
        r_row.sub_(q_row, alpha=alpha)
        residual = torch.dot(r_row, r_row).item()
        torch.add(r_row, p_row, alpha=residual / before, out=p_row)
        rho[i] = residual


def best_in_place_one_row(x: Tensor, r: Tensor, p: Tensor, rho: list[float], q: Tensor) -> None:
    """The same for a single row, whose rho is never in a tensor: the fewest calls."""
    alpha = rho[0] / torch.dot(p.view(-1), q.view(-1)).item()
    x.add_(p, alpha=alpha)
    r.sub_(q, alpha=alpha)
    row = r.view(-1)
    residual = torch.dot(row, row).item()
    torch.add(r, p, alpha=residual / rho[0], out=p)
    rho[0] = residual


def in_place_tiled(x: Tensor, r: Tensor, p: Tensor, rho: Tensor, q: Tensor, columns: int = 2**18) -> None:
    """The same with r and p, while they are in the cache, tile by tile from Python: 10 reads or writes per element."""
    for i, rows in enumerate(zip(x, r, p, q, strict=True)):
        x_tiles, r_tiles, p_tiles, q_tiles = (row.split(columns) for row in rows)
        before = rho[i].item()
        alpha = before / torch.dot(rows[2], rows[3]).item()
        residual = 0.0
        for r_tile, q_tile in zip(r_tiles, q_tiles, strict=True):
            r_tile.sub_(q_tile, alpha=alpha)
            residual += torch.dot(r_tile, r_tile).item()
        for x_tile, r_tile, p_tile in zip(x_tiles, r_tiles, p_tiles, strict=True):
            x_tile.add_(p_tile, alpha=alpha)
            torch.add(r_tile, p_tile, alpha=residual / before, out=p_tile)
        rho[i] = residual


def best_in_place_float64(x: Tensor, r: Tensor, p: Tensor, rho: Tensor, q: Tensor) -> None:
    """best_in_place_rows with sums in float64, as cg_step's: float32's are wrong by 1e-4 in rows of millions."""
    tile = torch.empty(min(q.shape[1], 2**19), device=q.device)  # the fastest of 2**14 to 2**21

    def dot(a: Tensor, b: Tensor) -> float:
        total = 0.0
        for a_tile, b_tile in zip(a.split(len(tile)), b.split(len(tile)), strict=True):
            total += torch.mul(a_tile, b_tile, out=tile[: len(a_tile)]).sum(dtype=torch.float64).item()
        return total

    for i, (x_row, r_row, p_row, q_row) in enumerate(zip(x, r, p, q, strict=True)):
        before = rho[i].item()
        alpha = before / dot(p_row, q_row)
        x_row.add_(p_row, alpha=alpha)
        r_row.sub_(q_row, alpha=alpha)
        residual = dot(r_row, r_row)
        torch.add(r_row, p_row, alpha=residual / before, out=p_row)
        rho[i] = residual


def textbook(x: Tensor, r: Tensor, p: Tensor, rho: Tensor, q: Tensor) -> None:
    """The iteration as it is written down."""
    alpha = (rho / (p * q).sum(1))[:, None]
    x.copy_(x + alpha * p)
    r.copy_(r - alpha * q)
    residual = (r * r).sum(1)
    p.copy_(r + (residual / rho)[:, None] * p)
    rho.copy_(residual)


def with_scalars(implementation, x: Tensor, r: Tensor, p: Tensor, scalars: Tensor, q: Tensor) -> None:
    implementation(x, r, p, scalars, q)


VARIANTS = {
    "native": partial(with_scalars, cg_step),
    "reference": partial(with_scalars, reference),
    "best in-place torch": best_in_place,
    "best in-place torch, rows": best_in_place_rows,
    "best in-place torch, one row": best_in_place_one_row,
    "in-place torch in tiles": in_place_tiled,
    "best in-place, float64 sums": best_in_place_float64,
    "textbook": textbook,
}


def benchmark(device: str, seconds: float) -> Iterator[harness.Measured]:
    """Float32 at each of SIZES: four rows read, three written; five operations of two flops an element."""
    for k, d in SIZES:
        x, r, q = torch.randn(3, k, d, device=device).unbind()
        p = 1e3 * q  # steps so small that the same call can be made thousands of times
        rho = r.square().sum(1)
        exact = [t.double() for t in (x, r, p, rho)]
        textbook(*exact, q.double())
        calls, errors = {}, {}
        for name, variant in VARIANTS.items():
            if variant is best_in_place_one_row and k > 1:
                continue
            state = [t.clone() for t in (x, r, p)]
            if isinstance(variant, partial):
                scalars = torch.zeros(9, k, dtype=torch.float64, device=device)
                row = CGScalars(*scalars)
                row.active.fill_(1)
                row.rho.copy_(rho)
                state.append(scalars)
            else:
                state.append(rho.tolist() if variant is best_in_place_one_row else rho.clone())
            variant(*state, q)
            errors[name] = max(harness.relative_error(t, e) for t, e in zip(state[:3], exact[:3], strict=True))
            calls[name] = partial(variant, *state, q)
        yield harness.compare(f"{k} x {d:,}", calls, errors, 28 * k * d, 10 * k * d, device, seconds)


if __name__ == "__main__":
    harness.main("cg_step", benchmark)

"""Operators that torch can't differentiate twice, or changes weights in, rebuilt from operators without that fault.

torch has no second derivative of ``embedding_bag``; that of ``_weight_norm``, which both kinds of weight_norm call,
leaves out the norm's own derivative (its Hessians aren't symmetric); an embedding with ``max_norm`` rescales its weight
in place, in eval mode too, and one with ``sparse`` has gradients of a layout that can't be flattened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode


class Composed(TorchFunctionMode):
    """A mode that computes these operators from others with the same values and first derivatives."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _COMPOSED.get(func, func)(*args, **(kwargs or {}))


def wanted(modules: Iterable[nn.Module]) -> bool:
    """Tells whether a module uses one of these operators: the mode costs time at every call of torch."""
    return any(
        isinstance(m, nn.EmbeddingBag)
        or (isinstance(m, nn.Embedding) and (m.max_norm is not None or m.sparse))
        or type(m).__name__ == "_WeightNorm"  # torch.nn.utils.parametrizations.weight_norm
        or any(isinstance(hook, WeightNorm) for hook in m._forward_pre_hooks.values())
        for m in modules
    )


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    rows = functional.embedding(input, weight, padding_idx, scale_grad_by_freq=scale_grad_by_freq)
    if max_norm is None:
        return rows
    at = rows.detach()
    norms = torch.linalg.vector_norm(at, norm_type, dim=-1, keepdim=True)
    return rows + at * torch.where(norms > max_norm, max_norm / (norms + 1e-7) - 1, 0.0)  # 1e-7 as in embedding_renorm_


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    at = torch.arange(input.numel(), device=input.device)
    if offsets is None:
        count, bag = len(input), at // input.shape[-1]
    else:
        starts = offsets[:-1] if include_last_offset else offsets
        count, bag = len(starts), torch.searchsorted(starts.contiguous(), at, right=True) - 1
    flat = input.reshape(-1)
    rows = _embedding(flat, weight, None, max_norm, norm_type, scale_grad_by_freq)
    keep = torch.ones_like(flat) if padding_idx is None else (flat != padding_idx % len(weight)).to(flat.dtype)

    def per_bag(values: Tensor) -> Tensor:
        return values.new_zeros(count, *values.shape[1:]).index_add(0, bag, values)

    if mode == "max":
        return per_bag(rows * _first_largest(rows.detach(), keep, bag, at, count))
    weights = keep if per_sample_weights is None else keep * per_sample_weights.reshape(-1)
    total = per_bag(rows * weights.to(rows.dtype).unsqueeze(-1))
    return total if mode == "sum" else total / per_bag(keep).clamp(min=1).unsqueeze(-1)


def _first_largest(rows: Tensor, keep: Tensor, bag: Tensor, at: Tensor, count: int) -> Tensor:
    """Marks with 1 each entry that is the first of the largest ones in its bag and column; the others are 0."""
    target = bag.unsqueeze(-1).expand_as(rows)
    scores = rows.masked_fill(keep.unsqueeze(-1) == 0, -torch.inf)
    largest = torch.full_like(rows[:1], -torch.inf).expand(count, -1).scatter_reduce(0, target, scores, "amax")
    position = at.unsqueeze(-1).expand_as(rows)
    candidates = position.masked_fill((scores != largest[bag]) | (keep.unsqueeze(-1) == 0), len(at))
    first = torch.full_like(candidates[:1], len(at)).expand(count, -1).scatter_reduce(0, target, candidates, "amin")
    return (candidates == first[bag]).logical_and(candidates < len(at)).to(rows.dtype)


_COMPOSED: dict[Callable[..., Any], Callable[..., Tensor]] = {
    torch._weight_norm: _weight_norm,
    functional.embedding: _embedding,
    functional.embedding_bag: _embedding_bag,
}

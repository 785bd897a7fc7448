"""The training examples that help each query most, and those that harm it most, found while scores are computed."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_influence.scores._tiles import Tile, checked

_RANKED_AT_ONCE = 2**20  # scores; each takes some 40 bytes meanwhile
_NOWHERE = torch.iinfo(torch.int64).max  # the index of a free place: larger than all others


class Ranking(NamedTuple):
    """What ``torch.topk`` returns: the first k training examples of each query, in order.

    Attributes:
        values: scores [q, k].
        indices: which examples of the training data have them, int64 [q, k].
    """

    values: Tensor
    indices: Tensor


class TopInfluences(NamedTuple):
    """The ends of each query's ranking of the training examples.

    Attributes:
        helpful: the largest scores, largest first: removing these examples raises the test loss most.
        harmful: the smallest scores, most negative first: removing these lowers it most.
    """

    helpful: Ranking
    harmful: Ranking


def top(
    tiles: Iterable[Tile], indices: Sequence[int], queries: int, k: int, dtype: torch.dtype, device: torch.device
) -> TopInfluences:
    """Finds the k largest and the k smallest scores of each query, and the ``indices`` of their training examples.

    NaN comes after all other scores on either side; of equal scores the smaller index comes first.
    """
    k = min(k, len(indices))
    helpful, harmful = (_Smallest(queries, k, dtype, device) for _ in range(2))
    names = torch.tensor(indices, dtype=torch.int64, device=device)
    for tile in checked(tiles, indices):
        some = names[torch.tensor(tile.examples, device=device)]
        step = max(1, _RANKED_AT_ONCE // len(some))
        for at in range(0, len(tile.queries), step):
            rows = torch.tensor(tile.queries[at : at + step], device=device)
            scores = tile.scores[:, at : at + step].mT
            harmful.add(rows, scores, some)
            helpful.add(rows, -scores, some)
    values, which = helpful.sorted()
    return TopInfluences(Ranking(-values, which), Ranking(*harmful.sorted()))


class _Smallest:
    """The k smallest values so far in each of q rows, and their indices: ordered by value, NaN last, then by index."""

    def __init__(self, q: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
        self._k = k
        self._values = torch.full((q, k), torch.nan, dtype=dtype, device=device)
        self._indices = torch.full((q, k), _NOWHERE, device=device)

    def add(self, rows: Tensor, values: Tensor, indices: Tensor) -> None:
        """Adds values [r, b] to these r rows; the b indices are new to them."""
        worst = self._values[rows].amax(dim=1, keepdim=True)  # NaN if there is one
        columns = (~(values > worst)).any(dim=0).nonzero().flatten()  # soon these are few
        if not len(columns):
            return
        values = torch.cat([self._values[rows], values[:, columns]], dim=1)
        indices = torch.cat([self._indices[rows], indices[columns].expand(len(rows), -1)], dim=1)
        # topk takes NaN for the largest number, but leaves open which of equal ones it chooses.
        last = values.topk(self._k, largest=False).values[:, -1:]
        before = (values < last) | (last.isnan() & ~values.isnan())
        equal = (values == last) | (last.isnan() & values.isnan())
        order = torch.where(before, -1, torch.where(equal, indices, _NOWHERE))
        chosen = order.topk(self._k, largest=False, sorted=False).indices
        self._values[rows], self._indices[rows] = values.gather(1, chosen), indices.gather(1, chosen)

    def sorted(self) -> tuple[Tensor, Tensor]:
        """Returns the values and indices [q, k], in order, on the CPU."""
        indices, order = self._indices.cpu().sort(dim=1)
        values, order = self._values.cpu().gather(1, order).sort(dim=1, stable=True)
        return values, indices.gather(1, order)


def check_top_k(top_k: object) -> int:
    """Checks that ``top_k`` is an integer, at least 1, and returns it."""
    try:
        k = operator.index(top_k)  # type: ignore[arg-type]
    except TypeError:
        k = None
    if k is None or isinstance(top_k, bool):
        raise TypeError(f"top_k: expected an integer, got {top_k!r} of {type(top_k).__name__}")
    if k < 1:
        raise ValueError(f"top_k: expected at least 1, got {k}; None for the whole matrix")
    return k

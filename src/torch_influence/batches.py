"""Loader -> batches on a device, and the only weighted mean over data.

Data are read in data-set order, in the loader's own batch size and through its own collate_fn; sampler, shuffle and
drop_last of the loader are for training and ignored here.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import data

Progress: TypeAlias = Callable[[Iterable[Any], str, int | None], Iterable[Any]]


class Batches:
    """The data of one loader.

    Args:
        loader: a DataLoader over a map-style data set.
        name: what to call it in errors, ``"train_loader"`` or ``"test_loader"``.
        transfer: moves a batch to the device.
        progress: wraps an iterable of known length in a progress bar; kept as ``bar``.

    Attributes:
        n: number of examples.
        batch_size: examples per batch; None where the loader doesn't batch (``batch_size=None``): then each item of
            the data set is one example, and passes through collate_fn alone.
    """

    def __init__(self, loader: Any, name: str, transfer: Callable[[Any], Any], progress: Progress) -> None:
        dataset = getattr(loader, "dataset", None)
        if dataset is None:
            raise TypeError(f"{name}: expected a torch.utils.data.DataLoader, got {type(loader).__name__}")
        if isinstance(dataset, data.IterableDataset) or not (
            hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        ):
            raise TypeError(
                f"{name}: expected a data set with __len__ and __getitem__, got {type(dataset).__name__}; influence is "
                "per example, so examples need an index: list(dataset) makes an iterable data set one of that kind"
            )
        self.n = len(dataset)
        if self.n == 0:
            raise ValueError(f"{name}: expected at least one example, got an empty data set")
        self.batch_size = _batch_size(loader)
        self._loader = loader
        self._transfer = transfer
        self.bar = progress

    def indices(self, wanted: Any, argument: str) -> list[int]:
        """Example indices as a list of ints, checked; None means all."""
        return list(range(self.n)) if wanted is None else check_indices(wanted, self.n, argument)

    def read(self, indices: Sequence[int] | None = None, batch_size: int | None = None) -> Iterator[tuple[Any, int]]:
        """Yields (batch on the device, its number of examples) over these examples, in this order."""
        order = range(self.n) if indices is None else indices
        return self._read(order, len(order), batch_size)

    def sample(
        self,
        steps: int,
        *,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[tuple[Any, int]]:
        """Yields ``steps`` batches whose examples are drawn uniformly with replacement.

        Without a generator the draws come from torch's default one in the way DataLoader and RandomSampler take them:
        one int64 for the loader, one for the sampler's seed.
        """
        pool = range(self.n) if indices is None else indices
        count = steps * (batch_size or self.batch_size or 1)
        drawn = data.RandomSampler(pool, replacement=True, num_samples=count, generator=generator)
        order: Iterable[int] = drawn if indices is None else _Through(drawn, indices)
        return self._read(order, count, batch_size, generator)

    def _read(
        self, order: Iterable[int], count: int, batch_size: int | None, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Any, int]]:
        loader = self._loader
        size = self.batch_size if batch_size is None or self.batch_size is None else batch_size
        fresh: data.DataLoader[Any] = data.DataLoader(
            loader.dataset,
            batch_size=size,
            sampler=order,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            prefetch_factor=loader.prefetch_factor,
            timeout=loader.timeout,
            generator=generator,
        )
        for start, batch in zip(range(0, count, size or 1), fresh, strict=True):
            yield self._transfer(batch), min(size or 1, count - start)

    def peek(self, indices: Sequence[int]) -> Any:
        """One batch of these examples, read here and now without touching torch's random state."""
        dataset, collate = self._loader.dataset, self._loader.collate_fn
        with torch.random.fork_rng(devices=()):
            items = [dataset[i] for i in indices]
            return self._transfer(collate(items) if self.batch_size is not None else collate(items[0]))

    def mean(
        self, term: Callable[[Any], Tensor], indices: Sequence[int] | None = None, describe: str | None = None
    ) -> Tensor:
        """Σ size·term(batch) / Σ size over the batches of these examples: right for a ragged last batch too."""
        count = self.n if indices is None else len(indices)
        batches: Iterable[tuple[Any, int]] = self.read(indices)
        if describe is not None:
            batches = self.bar(batches, describe, -(-count // (self.batch_size or 1)))
        total: Tensor | None = None
        for batch, size in batches:
            value = term(batch)
            total = value * size if total is None else total.add_(value, alpha=size)
        assert total is not None  # callers pass at least one example
        return total.div_(count)


class _Through:
    """A sampler over positions, as indices of a subset."""

    def __init__(self, positions: Iterable[int], indices: Sequence[int]) -> None:
        self._positions, self._indices = positions, indices

    def __iter__(self) -> Iterator[int]:
        return (self._indices[p] for p in self._positions)


def _batch_size(loader: Any) -> int | None:
    """A custom batch sampler without a batch_size is asked for its first batch, torch's random state left alone."""
    if loader.batch_size is not None or loader.batch_sampler is None:
        return loader.batch_size
    declared = getattr(loader.batch_sampler, "batch_size", None)
    if isinstance(declared, int):
        return declared
    with torch.random.fork_rng(devices=()):
        return len(next(iter(loader.batch_sampler)))


def check_indices(wanted: Any, n: int, argument: str) -> list[int]:
    """A list, range, array or tensor of distinct integers in [0, n), as a list of ints."""
    if isinstance(wanted, Tensor) or hasattr(wanted, "tolist"):
        wanted = wanted.tolist()
    if not isinstance(wanted, Iterable) or isinstance(wanted, str | bytes | Mapping):
        hint = f"; write [{wanted}]" if isinstance(wanted, int) else ""
        raise ValueError(f"{argument}: expected a 1-D sequence of indices, got {wanted!r}{hint}")
    indices = []
    for item in wanted:
        if isinstance(item, bool):
            raise TypeError(f"{argument}: expected integer indices, got a boolean mask; use mask.nonzero().flatten()")
        if isinstance(item, list | tuple | range):
            raise ValueError(f"{argument}: expected a 1-D sequence of indices, got a nested one")
        try:
            indices.append(operator.index(item))
        except TypeError:
            raise TypeError(f"{argument}: expected integer indices, got {item!r} of {type(item).__name__}") from None
    if len(set(indices)) != len(indices):
        twice = next(i for position, i in enumerate(indices) if i in indices[:position])
        raise ValueError(f"{argument}: expected distinct indices, got {twice} more than once")
    for i in indices:
        if not 0 <= i < n:
            raise IndexError(f"{argument}: expected indices in [0, {n}), got {i}")
    return indices


def to_device(batch: Any, device: torch.device) -> Any:
    """Moves every tensor inside a batch of any make; what holds no tensor passes unchanged.

    Things with a ``to(device)`` of their own (BatchEncoding, PackedSequence) move themselves; inside mappings, lists,
    tuples, named tuples, dataclasses and SimpleNamespace every item is moved.
    """
    return map_leaves(lambda leaf: leaf.to(device) if _moves(leaf) else leaf, batch, is_leaf=_moves)


def _moves(item: Any) -> bool:
    return callable(getattr(item, "to", None)) and not isinstance(item, type)


def map_leaves(function: Callable[[Any], Any], batch: Any, is_leaf: Callable[[Any], bool] = lambda item: False) -> Any:
    """The batch rebuilt with ``function`` applied to everything in it that is not a container."""
    if is_leaf(batch):
        return function(batch)
    if isinstance(batch, Mapping):
        mapped = {key: map_leaves(function, value, is_leaf) for key, value in batch.items()}
        if type(batch) is dict or not hasattr(batch, "__setitem__"):
            return mapped
        twin: Any = copy.copy(batch)  # keeps the type and what else it carries: UserDict, OrderedDict, defaultdict
        for key, value in mapped.items():
            twin[key] = value
        return twin
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_leaves(function, item, is_leaf) for item in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map_leaves(function, item, is_leaf) for item in batch)
    if isinstance(batch, types.SimpleNamespace) or (dataclasses.is_dataclass(batch) and not isinstance(batch, type)):
        twin = copy.copy(batch)
        names = vars(batch) if isinstance(batch, types.SimpleNamespace) else [f.name for f in dataclasses.fields(batch)]
        for name in list(names):
            object.__setattr__(twin, name, map_leaves(function, getattr(batch, name), is_leaf))  # frozen ones too
        return twin
    return function(batch)

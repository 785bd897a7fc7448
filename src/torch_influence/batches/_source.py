"""The user's loader as a source of batches: read in data-set order, watched for randomness and for changes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import data
from torch.utils.data._utils.collate import default_collate_fn_map

from torch_influence.batches._containers import alike, copy_of, is_dense, same, take_apart, versions
from torch_influence.batches._draws import States, generators, quiet, states
from torch_influence.batches._loaders import check_loader, warn_of_iteration, warn_of_selection

_LONG = 16  # items of an example; a longer list is taken for a sequence of items of one kind
_FEW = 1000  # a container of up to this many items is searched for tensors; of a longer one only the items are compared


class Source:
    """The user's DataLoader over a map-style data set, read in the order of the data set.

    Args:
        loader: the user's. Its sampler, shuffle and drop_last are ignored.
        name: what to call it in errors, ``"train_loader"`` or ``"test_loader"``.
        transfer: moves a batch to the device.

    Attributes:
        batch_size: the loader's own; None where it does not batch.
    """

    def __init__(self, loader: Any, name: str, transfer: Callable[[Any], Any]) -> None:
        check_loader(loader, name)
        self.name = name
        self.dataset = loader.dataset
        self.collate: Callable[[Any], Any] = loader.collate_fn
        self._loader = loader
        self.n  # noqa: B018 - raises for an empty data set
        self.batch_size = _batch_size(loader)
        # An item that is not batched may be the data set's own tensors, and no objective may edit these.
        self.transfer = transfer if self.batch_size is not None else lambda batch: copy_of(transfer(batch))
        warn_of_iteration(loader, name)
        warn_of_selection(loader, name)

    @property
    def n(self) -> int:
        """The number of examples at the moment: at least one."""
        n = len(self.dataset)
        if n == 0:
            raise ValueError(f"{self.name}: expected at least one example, got an empty data set")
        return n

    def through_loader(
        self,
        order: Iterable[int],
        batch_size: int | None,
        generator: torch.Generator | None = None,
        collate: Callable[[Any], Any] | None = None,
    ) -> Iterator[Any]:
        """Iterates over batches of these examples, by a loader with the user's settings; it does not transfer them."""
        loader = self._loader
        passing: data.DataLoader[Any] = data.DataLoader(
            self.dataset,
            batch_size=batch_size,
            sampler=order,
            collate_fn=collate or self.collate,
            num_workers=loader.num_workers,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            prefetch_factor=loader.prefetch_factor,
            timeout=loader.timeout,
            generator=generator,
        )
        with device_of(generator):  # a seed is drawn here
            return iter(passing)

    def read(self, indices: Iterable[int]) -> Any:
        """Reads one batch of these examples in this process, and moves it to the device."""
        wanted = list(indices)
        if self.batch_size is None:
            return self.transfer(self.collate(self.dataset[wanted[0]]))
        many = getattr(self.dataset, "__getitems__", None)  # what a DataLoader asks for first
        return self.transfer(self.collate(many(wanted) if many else [self.dataset[i] for i in wanted]))

    @property
    def gathers(self) -> bool:
        """True where the data set puts batches together itself, so that one example may depend on the others."""
        dataset = self.dataset
        while type(dataset) is data.Subset:
            dataset = dataset.dataset
        return hasattr(dataset, "__getitems__")

    def probe(self) -> list[Any]:
        """Reads the first, the middle and the last example, in one batch where the loader batches."""
        some = sorted({0, self.n // 2, self.n - 1})
        return [self.read([i]) for i in some] if self.batch_size is None else [self.read(some)]


def device_of(generator: torch.Generator | None) -> torch.device:
    """Returns the device that draws numbers: without a generator the CPU, whatever torch's default device is."""
    return torch.device("cpu") if generator is None else generator.device


def _batch_size(loader: Any) -> int | None:
    """Finds the loader's batch size; measures the first batch of a batch sampler without one, random states kept."""
    if loader.batch_size is not None or loader.batch_sampler is None:
        return loader.batch_size
    declared = getattr(loader.batch_sampler, "batch_size", None)
    if isinstance(declared, int):
        return declared
    with quiet():
        return len(next(iter(loader.batch_sampler)))


class Found(NamedTuple):
    """The findings about a batch from when it was made.

    Attributes:
        kinds: of the examples in it, and the position of the first of each kind.
        together: whether the batch is just its examples put together, as far as that was checked.
        drew: whether random numbers were drawn for it.
    """

    kinds: dict[Any, int]
    together: bool
    drew: bool


class Watched:
    """A collate_fn that also tells which kinds of examples it got, how it joined them, and whether numbers were drawn.

    Examples of one kind have tensors of the same shapes and lists and texts of the same lengths. The result of torch's
    own collate_fn depends on nothing else for plain types, so it is enough to compare one example of each kind with
    what is stacked. Any other collate_fn may depend on the content: each example is collated alone, too, and compared
    with its row of the batch.

    Args:
        collate: the user's.
        stack: whether the batches are to be stacked.
    """

    def __init__(self, collate: Callable[[Any], Any], stack: bool) -> None:
        self._collate = collate
        self._stack = stack
        self._own: list[Any] | None = None
        self._before: States | None = None

    def __call__(self, items: Any) -> tuple[Any, Found]:
        """Returns the batch, and the findings."""
        batch = self._collate(items)
        drew = self._drew_in_a_worker()
        kinds: dict[Any, int] = {}
        for position, item in enumerate(items if isinstance(items, list) else []):
            kinds.setdefault(_kind(item), position)
        together = True
        if self._stack and not (_is_torchs_own(self._collate) and all(map(_is_plain, kinds))):
            with quiet():
                together = _is_together(batch, items, self._collate)
        return batch, Found(kinds, together, drew)

    def _drew_in_a_worker(self) -> bool:
        """Tells whether a worker process has drawn since the batch before; in this process the caller checks that."""
        worker = data.get_worker_info()
        if worker is None:
            return False
        if self._own is None:
            self._own = generators(worker.dataset, self._collate)
        before, self._before = self._before, states(self._own)
        return before is not None and before != self._before


def _is_together(batch: Any, items: list[Any], collate: Callable[[Any], Any]) -> bool:
    template, rows = take_apart(batch, leading=1)
    if not isinstance(items, list) or not rows or not all(t.dim() and len(t) == len(items) for t in rows):
        return False
    for position, item in enumerate(items):
        try:
            alone, ones = take_apart(collate([item]), leading=1)
        except Exception:  # a collate_fn that wants more than one example
            return False
        if not alike(alone, template) or not same(ones, [t[position : position + 1] for t in rows]):
            return False
    return True


class _Strange(str):
    """The kind of a type that torch's collate_fn does not know, but that the user may have registered with it."""

    __slots__ = ()


def _kind(item: Any) -> Any:
    kind = type(item)
    if kind is np.ndarray or (kind is Tensor and is_dense(item)):
        return item.shape, item.dtype
    if kind is tuple and len(item) <= _LONG:  # first of the containers, since most examples are one
        return (len(item), *map(_kind, item))
    if isinstance(item, str | bytes):
        return len(item)
    if isinstance(item, Mapping):
        return tuple((str(key), _kind(value)) for key, value in item.items())
    if isinstance(item, list | tuple):
        return (len(item), *map(_kind, item[:_LONG]))
    name = type(item).__name__
    return name if isinstance(item, bool | int | float | complex | np.bool_ | np.number | None) else _Strange(name)


def _is_torchs_own(collate: Any) -> bool:
    """Tells whether it is ``default_collate``, and nothing has been registered with that."""
    module = data.default_collate.__module__
    return collate is data.default_collate and all(
        getattr(function, "__module__", None) == module for function in default_collate_fn_map.values()
    )


def _is_plain(kind: Any) -> bool:
    return not isinstance(kind, _Strange) and (not isinstance(kind, tuple) or all(map(_is_plain, kind)))


def holdings(dataset: Any) -> dict[str, tuple[Any, ...]]:
    """Lists what a data set holds, by attribute, without reading it: tensors with address and version, items of lists.

    It holds the objects, not their ids: when an object is gone, another may get its id.
    """
    found: dict[str, tuple[Any, ...]] = {}

    def look(path: str, item: Any, depth: int) -> None:
        found[path] = tuple(_content(item))
        for position, part in enumerate(item if isinstance(item, list | tuple) and len(item) <= _FEW else ()):
            if isinstance(part, data.Dataset) and depth:  # those that a data set is put together from
                look(f"{path}[{position}]", part, depth - 1)
        if depth and (path == "" or isinstance(item, data.Dataset)) and hasattr(item, "__dict__"):
            for name, value in vars(item).items():
                look(f"{path}.{name}", value, depth - 1)

    look("", dataset, 6)
    return found


def _content(item: Any, depth: int = 3) -> Iterator[Any]:
    yield item
    if isinstance(item, Tensor):
        yield item.data_ptr() if item.layout is torch.strided else 0
        yield from versions([item])
    elif isinstance(item, list | tuple | dict):
        parts = list(item.values()) if isinstance(item, dict) else item
        if depth and len(parts) <= _FEW:
            for part in parts:
                yield from _content(part, depth - 1)
        else:
            yield from parts


def unchanged(before: tuple[Any, ...], after: tuple[Any, ...] | None) -> bool:
    """Tells whether two entries of ``holdings`` are the same objects, or equal plain values."""
    if after is None or len(before) != len(after):
        return False
    return all(map(operator.is_, before, after)) or all(
        a is b or (type(a) is type(b) and isinstance(a, int | float | str) and a == b)
        for a, b in zip(before, after, strict=True)
    )

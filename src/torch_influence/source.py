"""The user's loader as a source of batches: read in data-set order, watched for randomness and for changes."""

from __future__ import annotations

import contextlib
import itertools
import operator
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import data

from torch_influence.caller import level_of_the_user
from torch_influence.turns import RANDOM_STATES, alone_with

_FEW = 1000  # a container of up to so many items is searched for tensors; of a longer one only the items are compared


class Source:
    """A DataLoader over a map-style data set, whose order is the data set's.

    Args:
        loader: the user's. Its sampler, shuffle and drop_last are ignored.
        name: what to call it in errors, ``"train_loader"`` or ``"test_loader"``.
        transfer: moves a batch to the device.

    Attributes:
        batch_size: the loader's own; None where it does not batch.
    """

    def __init__(self, loader: Any, name: str, transfer: Callable[[Any], Any]) -> None:
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
        self.name = name
        self.transfer = transfer
        self.dataset = dataset
        self.collate: Callable[[Any], Any] = loader.collate_fn
        self._loader = loader
        self.n  # noqa: B018 - raises for an empty data set
        self.batch_size = _batch_size(loader)
        self._warn_of_a_selection(getattr(loader.batch_sampler, "sampler", loader.sampler))

    @property
    def n(self) -> int:
        """Number of examples at the moment: at least one."""
        n = len(self.dataset)
        if n == 0:
            raise ValueError(f"{self.name}: expected at least one example, got an empty data set")
        return n

    def _warn_of_a_selection(self, sampler: Any) -> None:
        """An order is of no matter to influence, a selection is: it was trained on something else than the data set."""
        kind = type(sampler)
        selects = kind in (data.SubsetRandomSampler, data.WeightedRandomSampler)
        if not selects and (kind.__module__.startswith("torch.") or not hasattr(sampler, "__len__")):
            return  # all of the data set, or this process's share of it
        if selects or len(sampler) != self.n:
            warnings.warn(
                f"{self.name}: its {kind.__name__} is ignored, all {self.n} examples of the data set count, once each. "
                "If the model was trained on some of them, give it torch.utils.data.Subset(dataset, indices); weights "
                "of examples belong into the loss",
                UserWarning,
                stacklevel=level_of_the_user(),
            )

    def through_loader(
        self,
        order: Iterable[int],
        batch_size: int | None,
        generator: torch.Generator | None = None,
        collate: Callable[[Any], Any] | None = None,
    ) -> data.DataLoader[Any]:
        """A loader of these examples with the settings of the user's; its batches are not transferred yet."""
        loader = self._loader
        return data.DataLoader(
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

    def read(self, indices: Iterable[int]) -> Any:
        """One batch of these examples, here and now, on the device."""
        wanted = list(indices)
        if self.batch_size is None:
            return self.transfer(self.collate(self.dataset[wanted[0]]))
        many = getattr(self.dataset, "__getitems__", None)  # what a DataLoader asks for first
        return self.transfer(self.collate(many(wanted) if many else [self.dataset[i] for i in wanted]))

    def probe(self) -> list[Any]:
        """The first, the middle and the last example, in one batch where the loader batches."""
        some = sorted({0, self.n // 2, self.n - 1})
        return [self.read([i]) for i in some] if self.batch_size is None else [self.read(some)]


def _batch_size(loader: Any) -> int | None:
    """A custom batch sampler without a batch_size is asked for its first batch, random states left alone."""
    if loader.batch_size is not None or loader.batch_sampler is None:
        return loader.batch_size
    declared = getattr(loader.batch_sampler, "batch_size", None)
    if isinstance(declared, int):
        return declared
    with quiet():
        return len(next(iter(loader.batch_sampler)))


@contextlib.contextmanager
def quiet(seed: int | None = None) -> Iterator[Callable[[], bool]]:
    """Puts the default random states of torch (CPU), NumPy and Python back; starts them at a seed if one is given.

    They are the process's, so threads take turns. Yields a function that says whether any random number has been drawn
    from them so far.
    """
    with alone_with(RANDOM_STATES):
        before = _random_states()
        try:
            if seed is not None:
                torch.default_generator.manual_seed(seed)
                np.random.seed(seed)  # noqa: NPY002 - the generator that augmentations draw from
                random.seed(seed)
            start = before if seed is None else _random_states()
            yield lambda: not _same_states(start, _random_states())
        finally:
            torch.set_rng_state(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
            random.setstate(before[2])


def drawn_in_turn(items: Iterable[Any]) -> Iterator[Any]:
    """The same items; what a loader or a sampler draws when it starts, it draws while no other thread is ``quiet``.

    Or that one would take the draw for its own, and undo it.
    """
    with alone_with(RANDOM_STATES):
        rest = iter(items)
        first = list(itertools.islice(rest, 1))
    yield from first
    yield from rest


def _random_states() -> tuple[Tensor, Any, Any]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002


def _same_states(one: tuple[Tensor, Any, Any], other: tuple[Tensor, Any, Any]) -> bool:
    numbers = (np.array_equal(a, b) for a, b in zip(one[1], other[1], strict=True))
    return torch.equal(one[0], other[0]) and all(numbers) and one[2] == other[2]


def holdings(dataset: Any) -> dict[str, tuple[Any, ...]]:
    """What a data set holds, without reading it, by attribute: tensors with address and version, items of lists.

    Objects are held here, not their ids, which would be given to other objects when they die.
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
        yield -1 if item.is_inference() else item._version
    elif isinstance(item, list | tuple | dict):
        parts = list(item.values()) if isinstance(item, dict) else item
        if depth and len(parts) <= _FEW:
            for part in parts:
                yield from _content(part, depth - 1)
        else:
            yield from parts


def unchanged(before: tuple[Any, ...], after: tuple[Any, ...] | None) -> bool:
    """Whether two entries of ``holdings`` are the same objects, or equal plain values."""
    if after is None or len(before) != len(after):
        return False
    return all(map(operator.is_, before, after)) or all(
        a is b or (type(a) is type(b) and isinstance(a, int | float | str) and a == b)
        for a, b in zip(before, after, strict=True)
    )

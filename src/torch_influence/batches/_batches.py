"""Loader -> batches on a device, and the only weighted mean over data.

Data are read in data-set order, in the loader's own batch size and through its own collate_fn; sampler, shuffle and
drop_last of the loader are for training and ignored here. While they fit a budget they are read once and kept.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import data

from torch_influence.batches._containers import map_parts
from torch_influence.batches._draws import drawn_in_turn, quiet
from torch_influence.batches._resident import Resident
from torch_influence.batches._source import Source, device_of
from torch_influence.batches._stores import KeptBatches, Stacked, is_range
from torch_influence.memory import Cache
from torch_influence.plan import Step
from torch_influence.turns import RANDOM_STATES, alone_with

_DRAWN_AT_ONCE = 32  # as by torch's RandomSampler: drawing more in advance would change what others draw from it

Progress: TypeAlias = Callable[[Iterable[Any], str, int | None], Iterable[Any]]


class Batches:
    """The data of one loader.

    Once as many examples have been read as the data set has, the data are kept on the device, if they fit the budget.
    Where a batch is just its examples put together, they are kept as one tensor per tensor of a batch, which serves any
    examples. To verify this, each example is compared with itself read alone (not where torch's own collate_fn made the
    batch of tensors and numbers), and some are read in another order. Otherwise the loader's own batches are kept, and
    serve whole passes in its own batch size. What is served equals what the loader gives, and so does the random state
    afterwards: every pass, from memory or not, takes one int64 from torch's default generator, as one of a DataLoader
    does, so that seeded results don't depend on ``cache``. Loading and probing draw no number.

    Nothing is kept where reading the data set draws random numbers (unless ``cache=True``), where batches hold objects
    of unknown size, or where batches are edited in place.

    Args:
        loader: a DataLoader over a map-style data set.
        name: what to call it in errors, ``"train_loader"`` or ``"test_loader"``.
        transfer: moves a batch to the device.
        progress: wraps an iterable of known length in a progress bar; kept as ``bar``.
        cache: keep data? True: however large they are. False: never. A number: up to this many bytes. ``"auto"``: up to
            a quarter of the memory that is free on the device when data are first kept.

    Attributes:
        batch_size: examples per batch; None where the loader doesn't batch (``batch_size=None``): then each item of
            the data set is one example, and passes through collate_fn alone.
    """

    def __init__(
        self,
        loader: Any,
        name: str,
        transfer: Callable[[Any], Any],
        progress: Progress,
        cache: Cache = "auto",
    ) -> None:
        self._source = Source(loader, name, transfer)
        self._resident = Resident(self._source, cache)
        self.batch_size = self._source.batch_size
        self.bar = progress

    @property
    def n(self) -> int:
        """The number of examples."""
        return self._source.n

    def indices(self, wanted: Any, argument: str) -> list[int]:
        """Checks example indices and returns them as a list of ints; None means all."""
        return list(range(self.n)) if wanted is None else check_indices(wanted, self.n, argument)

    def read(self, indices: Sequence[int] | None = None, batch_size: int | None = None) -> Iterator[tuple[Any, int]]:
        """Yields (batch on the device, its number of examples) over these examples, in this order.

        A batch may be a view of data that are kept: read it, but do not write to it.
        """
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
        one int64 for the loader, one for the sampler's seed. Data that are kept change nothing of that.
        """
        pool = range(self.n) if indices is None else indices
        count = steps * (batch_size or self.batch_size or 1)
        drawn = _drawn(data.RandomSampler(pool, replacement=True, num_samples=count, generator=generator))
        order: Iterable[int] = drawn if indices is None else _Through(drawn, indices)
        return self._read(order, count, batch_size, generator)

    def draw(self, steps: int, *, generator: torch.Generator | None = None) -> Iterator[list[int]]:
        """Yields the indices of the examples in each batch that ``sample`` would give, by the same draws."""
        step = self.batch_size or 1
        drawn = data.RandomSampler(range(self.n), replacement=True, num_samples=steps * step, generator=generator)
        return _chunks(_drawn(drawn), steps * step, step, generator)

    def _read(
        self, order: Iterable[int], count: int, batch_size: int | None, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Any, int]]:
        size = self.batch_size if batch_size is None or self.batch_size is None else batch_size
        step = size or 1
        # The number of the first batch, if these are the loader's own batches up to the last: kept batches serve them.
        first = None
        if isinstance(order, Sequence) and is_range(order) and size == self.batch_size:
            first = order[0] // step if order[0] % step == 0 and order[-1] == self.n - 1 else None
        resident = self._resident
        kept = resident.now()
        if kept is None and resident.worth(count):
            if first == 0 and resident.may_keep():
                yield from resident.filling()
                return
            kept = resident.load(stack_only=max(step, self.batch_size or 1) > 1)
        resident.count(count)
        if isinstance(kept, Stacked) or (
            isinstance(kept, KeptBatches) and (first is not None or kept.batch_size == step == 1)
        ):
            yield from _serve(kept, order, count, step, first, generator)
            return
        passing = drawn_in_turn(self._source.through_loader(order, size, generator))
        for start, batch in zip(range(0, count, step), passing, strict=True):
            yield self._source.transfer(batch), min(step, count - start)

    def peek(self, indices: Sequence[int]) -> Any:
        """Reads one batch of these examples in this process, and leaves the default random states as they were."""
        kept = self._resident.now()
        if isinstance(kept, Stacked):
            return kept.batch(indices)
        with quiet():
            return self._source.read(indices)

    def draws(self, indices: Sequence[int]) -> bool:
        """Tells whether reading these examples draws random numbers, so that they differ from read to read."""
        if isinstance(self._resident.now(), Stacked):
            return False
        with quiet() as drawn:
            self._source.read(indices)
            return drawn()

    def mean(
        self, term: Callable[[Any], Tensor], indices: Sequence[int] | None = None, describe: str | None = None
    ) -> Tensor:
        """Computes Σ size·term(batch) / Σ size over the batches of these examples; the last one may be smaller."""
        count = self.n if indices is None else len(indices)
        batches: Iterable[tuple[Any, int]] = self.read(indices)
        if describe is not None:
            batches = self.bar(batches, describe, -(-count // (self.batch_size or 1)))
        return weighted_mean((term(batch), size) for batch, size in batches)

    def pass_by(self) -> None:
        """Draws the one int64 that a pass draws, in place of a pass that is not needed since its results are kept."""
        _take_seed(None)

    def quietly(self, seed: int | None = None) -> contextlib.AbstractContextManager[Callable[[], bool]]:
        """Returns a context that puts the default random states back; inside, it tells whether any number was drawn.

        The states start at a seed if one is given.
        """
        return quiet(seed)

    # -- what is kept -------------------------------------------------------------------------------------------------

    def stacked(self, reading: int | None = None) -> Stacked | None:
        """Returns all examples as one tensor [n, ...] per tensor of a batch, or None if that is not possible.

        They are loaded if they are not kept yet; with ``reading``, the number of examples about to be read, only if
        that makes it worth while. Returns the same object until the data change. Draws no random number.
        """
        kept = self._resident.now()
        if kept is None and (reading is None or self._resident.worth(reading)):
            kept = self._resident.load(stack_only=True)
        return kept if isinstance(kept, Stacked) else None

    def watched(self) -> bool:
        """Tells whether results made of the data are valid until ``generation`` changes; loads the data, if they fit.

        They do where the data are kept, and where these are too large for that but the same on each reading. Draws no
        random number.
        """
        if self._resident.now() is None and not self._resident.watched:
            self._resident.load(stack_only=False)
        return self._resident.watched

    @property
    def why_not_kept(self) -> str:
        """The reason why nothing is kept at the moment; empty when something is."""
        return self._resident.why_not

    @property
    def kept_bytes(self) -> int:
        """Counts the bytes of the data that are kept."""
        return self._resident.nbytes

    @property
    def generation(self) -> int:
        """A number that changes whenever ``watched`` data change: what was made of them is then no longer valid."""
        return self._resident.generation

    def step(self) -> Step:
        """The data's line of ``explain()``."""
        why = self.why_not_kept
        form = "read again for each pass" if why else "kept on the device"
        return Step("data", form, self.kept_bytes, [("kept", why)] if why else ())

    def refresh(self) -> None:
        """Drops what is kept, and what is known, if the data set has changed since.

        It notices: another length; an attribute of the data set, or of the data set that it is a subset of, that is
        another object now; a list or dict among them with other items; a tensor among them edited in place; any
        change of the first, the middle and the last example. It does not notice edits of other examples in NumPy
        arrays, in files or in objects deeper inside: ``clear`` is for these.

        Cost: one batch of three examples; nothing while the data are not ``watched``.
        """
        self._resident.refresh()

    def clear(self) -> None:
        """Drops what is kept and what is known about the data: the next pass reads them again."""
        self._resident.clear()


def weighted_mean(terms: Iterable[tuple[Tensor, int]]) -> Tensor:
    """Computes Σ size·term / Σ size over (term, size) pairs, at least one."""
    total: Tensor | None = None
    count = 0
    for value, size in terms:
        total = value * size if total is None else total.add_(value, alpha=size)
        count += size
    assert total is not None  # callers pass at least one example
    return total.div_(count)


def _serve(
    kept: Stacked | KeptBatches,
    order: Iterable[int],
    count: int,
    step: int,
    first: int | None,
    generator: torch.Generator | None,
) -> Iterator[tuple[Any, int]]:
    """Yields from memory what a loader would give, with the same draws in the same order."""
    for number, some in enumerate(_chunks(order, count, step, generator), start=first or 0):
        if isinstance(kept, Stacked):
            # Drawn examples may come again, so a copy is served: an edit of one batch must not show in the next.
            batch = kept.batch(some if isinstance(order, Sequence) else torch.tensor(some, device="cpu"))
        else:
            batch = kept.batch(some[0], copy=True) if first is None else kept.batch(number)
        yield batch, len(some)


def _chunks(order: Iterable[int], count: int, step: int, generator: torch.Generator | None) -> Iterator[Any]:
    """Yields the examples of each batch that a loader would give, with the same draws in the same order."""
    _take_seed(generator)
    if isinstance(order, range):
        yield from (order[start : start + step] for start in range(0, count, step))
        return
    with alone_with(RANDOM_STATES):  # the first draw may be that of a seed, from the default generator
        left = iter(order)
        some = list(itertools.islice(left, step))
    for _ in range(0, count, step):
        yield some
        some = list(itertools.islice(left, step))  # a loader looks for one more batch; a sampler may draw then


def _take_seed(generator: torch.Generator | None) -> None:
    """Draws the seed that a DataLoader draws for its workers."""
    with alone_with(RANDOM_STATES):
        torch.empty((), dtype=torch.int64, device=device_of(generator)).random_(generator=generator)


def _drawn(sampler: data.RandomSampler) -> Iterator[int]:
    """Draws from the sampler on its generator's device: by itself it draws on torch's default device."""
    if torch.get_default_device().type == device_of(sampler.generator).type:
        return iter(sampler)
    return _drawn_elsewhere(sampler)


def _drawn_elsewhere(sampler: data.RandomSampler) -> Iterator[int]:
    """Draws while the generator's device is the default, a few at a time, so that callers don't see that default."""
    drawing, more = iter(sampler), True
    while more:
        with device_of(sampler.generator):
            some = list(itertools.islice(drawing, _DRAWN_AT_ONCE))
        yield from some
        more = len(some) == _DRAWN_AT_ONCE


class _Through:
    """A sampler that turns positions into the indices of a subset."""

    def __init__(self, positions: Iterable[int], indices: Sequence[int]) -> None:
        self._positions, self._indices = positions, indices

    def __iter__(self) -> Iterator[int]:
        return (self._indices[p] for p in self._positions)


def check_indices(wanted: Any, n: int, argument: str) -> list[int]:
    """Checks a list, range, array or tensor of distinct integers in [0, n), and returns it as a list of ints."""
    if isinstance(wanted, Tensor) or hasattr(wanted, "tolist"):
        wanted = wanted.tolist()
    if not isinstance(wanted, Iterable) or isinstance(wanted, str | bytes | Mapping | data.DataLoader):
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
            what = "one" if isinstance(item, Tensor) else repr(item)
            raise TypeError(f"{argument}: expected integer indices, got {what} of {type(item).__name__}") from None
    if len(set(indices)) != len(indices):
        twice = next(i for i, count in Counter(indices).items() if count > 1)
        raise ValueError(f"{argument}: expected distinct indices, got {twice} more than once")
    for i in indices:
        if not 0 <= i < n:
            raise IndexError(f"{argument}: expected indices in [0, {n}), got {i}")
    return indices


def to_device(batch: Any, device: torch.device) -> Any:
    """Moves every tensor inside a batch, whatever its containers; what holds no tensor passes unchanged.

    Objects with a ``to(device)`` of their own (BatchEncoding, PackedSequence) move themselves; inside mappings, lists,
    tuples, named tuples, dataclasses and SimpleNamespace every item is moved.
    """
    return map_parts(lambda leaf: leaf.to(device) if _moves(leaf) else leaf, batch, is_part=_moves)


def _moves(item: Any) -> bool:
    return callable(getattr(item, "to", None)) and not isinstance(item, type)

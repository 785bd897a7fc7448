"""The two forms in which a data set is kept on the device, and the class that builds them from a loader's batches."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_influence.batches._containers import alike, held, map_parts, parts, put_together, take_apart, versions

_KNOWN = (Tensor, str, bytes, int, float, complex, type(None))  # parts whose size is known and whose edits are seen


class Stacked:
    """All examples of a data set, one tensor [n, ...] per tensor of a batch; any examples make a batch.

    Attributes:
        n: number of examples.
        template: a batch with slots for the tensors.
        tensors: in the order of the slots. Not to be written to.
        nbytes: of the tensors.
    """

    def __init__(self, template: Any, tensors: Sequence[Tensor]) -> None:
        self.template = template
        self.tensors = list(tensors)
        self.n = len(self.tensors[0])
        self.nbytes = sum(t.nbytes for t in self.tensors)
        self._versions = versions(self.tensors)

    def rows(self, indices: Sequence[int] | Tensor) -> list[Tensor]:
        """Returns these examples of each tensor: a view where the indices are a range, else a copy."""
        if not isinstance(indices, Tensor):
            if is_range(indices):
                return [t.narrow(0, indices[0], len(indices)) for t in self.tensors]
            indices = torch.tensor(indices, dtype=torch.int64, device="cpu")
        where: dict[torch.device, Tensor] = {}
        for t in self.tensors:
            if t.device not in where:
                where[t.device] = indices.to(t.device, non_blocking=True)
        return [t.index_select(0, where[t.device]) for t in self.tensors]

    def batch(self, indices: Sequence[int] | Tensor) -> Any:
        """Returns the batch of these examples, at least one, in this order."""
        return put_together(self.template, self.rows(indices))

    def intact(self) -> bool:
        """Tells whether nobody has edited the tensors in place."""
        return versions(self.tensors) == self._versions


class KeptBatches:
    """The loader's own batches, in order.

    Attributes:
        batch_size: examples per batch but the last.
        nbytes: of what is kept.
    """

    def __init__(self, batches: Sequence[Any], batch_size: int, nbytes: int) -> None:
        self._batches = list(batches)
        self.batch_size = batch_size
        self.nbytes = nbytes
        self._versions = self._now()

    def batch(self, number: int, copy: bool = False) -> Any:
        """Returns a batch in new containers; its tensors are the kept ones, so that edits are noticed, or copies."""
        return _again(self._batches[number], copy)

    def intact(self) -> bool:
        """Tells whether nobody has edited the tensors in place."""
        return self._now() == self._versions

    def _now(self) -> list[list[int]]:
        return [versions(parts(batch)) for batch in self._batches]


class Keeping:
    """The collection of a loader's batches, one by one as they are read, into one of the two forms.

    Args:
        n: how many examples there will be.
        stack: try to keep them as Stacked.
        budget: bytes that may be kept on a device.

    Attributes:
        why_not: why nothing will be kept; empty while it may be.
        too_large: whether size is the only reason.
    """

    def __init__(self, n: int, stack: bool, budget: Callable[[torch.device], float]) -> None:
        self._n = n
        self._stack = stack
        self._budget = budget
        self._allowed = math.inf
        self._ends: list[int] = []
        self._template: Any = None
        self._buffers: list[Tensor] = []
        self._batches: list[Any] = []
        self._nbytes = 0
        self._used: tuple[list[Any], list[int]] = ([], [])
        self.why_not = ""
        self.too_large = False

    def add(self, batch: Any, size: int) -> None:
        """Adds the next batch, of ``size`` examples, by copying it or sharing its memory; never edits it."""
        found = parts(batch)
        self._used = found, versions(found)
        if self.why_not:
            return
        tensors = [leaf for leaf in found if isinstance(leaf, Tensor)]
        if (why := cannot_keep(found)) != "":
            return self.give_up(why)
        nbytes = sum(_nbytes(leaf) for leaf in found)
        if not self._ends:
            device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
            self._allowed = self._budget(device)
            if not self._fits(-(-nbytes * self._n // size)):
                return None
        if self._stack and not self._copy(batch, size):
            self.stop_stacking()
        if not self._stack:
            if not self._fits(self._nbytes + nbytes):
                return None
            self._nbytes += nbytes
            self._batches.append(_again(batch))
        self._ends.append((self._ends[-1] if self._ends else 0) + size)

    def look_again(self) -> None:
        """Checks, after the batch last added was used, that nobody has edited it in place; gives up keeping if so."""
        found, before = self._used
        if versions(found) != before:
            self.give_up("the model or the objective edits its batches in place")

    def finish(self, verified: Callable[[Stacked], bool]) -> Stacked | KeptBatches | None:
        """Returns what is kept after the last batch: Stacked only if ``verified``, None if keeping was given up."""
        if self._stack and not self.why_not:
            stacked = Stacked(self._template, self._buffers)
            if verified(stacked):
                return stacked
            self.stop_stacking()
        return None if self.why_not else KeptBatches(self._batches, self._ends[0], self._nbytes)

    def give_up(self, why: str) -> None:
        """Gives up keeping for this reason, and frees what was kept so far."""
        self.why_not = self.why_not or why
        self._template, self._buffers, self._batches = None, [], []

    def _fits(self, nbytes: int) -> bool:
        if nbytes > self._allowed:
            self.too_large = True
            self.give_up(f"it would take about {nbytes:,} bytes, and the budget is {int(self._allowed):,}; see cache=")
        return not self.why_not

    def _copy(self, batch: Any, size: int) -> bool:
        template, parts = take_apart(batch, leading=1)
        if not parts or not all(_stacks(t, size) for t in parts):
            return False
        if not self._ends:
            try:
                self._buffers = [t.new_empty((self._n, *t.shape[1:])) for t in parts]
            except (RuntimeError, MemoryError):  # there is less memory than the budget says
                return False
            self._template = template
            self._nbytes = sum(t.nbytes for t in self._buffers)
        elif not alike(template, self._template):
            return False
        start = self._ends[-1] if self._ends else 0
        for buffer, part in zip(self._buffers, parts, strict=True):
            buffer[start : start + size].copy_(part)
        return True

    def stop_stacking(self) -> None:
        """Goes on with batches in place of a stack: those so far become views of what was stacked."""
        if not self._stack:
            return
        starts = [0, *self._ends[:-1]]
        self._batches = [
            put_together(self._template, [t[start:end] for t in self._buffers])
            for start, end in zip(starts, self._ends, strict=False)
        ]
        self._stack, self._template, self._buffers = False, None, []


def cannot_keep(found: Sequence[Any]) -> str:
    """Says why these parts of a batch can't be kept; empty if they can."""
    strange = [leaf for leaf in found if not isinstance(leaf, _KNOWN)]
    if strange:
        return f"batches hold objects of {type(strange[0]).__name__}, whose size and changes are not known"
    if any(leaf.requires_grad for leaf in found if isinstance(leaf, Tensor)):
        return "the tensors of a batch require grad"
    return ""


def _stacks(t: Tensor, size: int) -> bool:
    plain = type(t) is Tensor and t.layout is torch.strided and t.is_contiguous()
    return plain and t.dim() > 0 and len(t) == size


def _again(batch: Any, copy: bool = False) -> Any:
    """Returns the same batch in new containers; its tensors are new objects that share memory and version counter."""

    def renew(leaf: Any) -> Any:
        if copy and isinstance(leaf, Tensor):
            return leaf.clone()
        return leaf.detach() if type(leaf) is Tensor else leaf

    return map_parts(renew, batch)


def _nbytes(leaf: Any) -> int:
    return sum(t.nbytes for t in held(leaf)) if isinstance(leaf, Tensor) else sys.getsizeof(leaf)


def is_range(indices: Sequence[int]) -> bool:
    """Tells whether these are one or more consecutive ascending integers."""
    if isinstance(indices, range):
        return len(indices) > 0 and indices.step == 1
    if not len(indices) or indices[-1] - indices[0] != len(indices) - 1:
        return False
    return all(index == indices[0] + position for position, index in enumerate(indices))

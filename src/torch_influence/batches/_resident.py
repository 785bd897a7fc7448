"""A data set kept on the device: loaded when it is worth while, while it fits a budget and is the same on each read."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from torch_influence.batches._containers import alike, parts, same, take_apart
from torch_influence.batches._draws import drawn_in_turn, generators, quiet, states
from torch_influence.batches._source import Source, Watched, holdings, unchanged
from torch_influence.batches._stores import Keeping, KeptBatches, Stacked, cannot_keep
from torch_influence.caller import level_of_the_user
from torch_influence.memory import Cache, budget, check_cache

_KINDS = 16  # kinds of examples (lengths, shapes) that a stacked data set may have; one of each is compared
_OTHER = "the data set gives other data each time it is read"
_DRAWS = "the data set draws random numbers when it is read"
_REREADS = 16  # reads of data that draw random numbers: a random flip shows no difference in 1 of 2^16 cases


@dataclasses.dataclass
class _Outlook:
    """The findings of reading a few examples of the data.

    Attributes:
        n: the number of examples at that time.
        probe: Source.probe() at that time.
        stack: batches look like their examples put together.
        frozen: reads differ, but one of them is kept because of cache=True.
        refused: why nothing is to be kept.
    """

    n: int = 0
    probe: list[Any] = dataclasses.field(default_factory=list)
    stack: bool = False
    frozen: bool = False
    refused: str = ""


class Resident:
    """The data of a source on the device, kept while they fit and do not change.

    Args:
        source: where the data come from.
        cache: True, False, "auto" or bytes: see ``Batches``.

    Attributes:
        why_not: why nothing is kept at the moment; empty when something is.
        watched: whether the data are kept, or are only too large to be kept: they are the same on each reading, and
            ``refresh`` notices when they change.
        generation: grows whenever what is kept is dropped, or ``watched`` data change: what was made of them is then no
            longer valid.
    """

    def __init__(self, source: Source, cache: Cache) -> None:
        check_cache(cache)
        self._source = source
        self._cache = cache
        self._warned = False
        self._busy = False
        self.generation = 0
        self.clear()

    def clear(self) -> None:
        """Drops what is kept, and what is known about the data."""
        self.generation += 1
        self._kept: Stacked | KeptBatches | None = None
        self._outlook: _Outlook | None = None
        self._held: dict[str, tuple[Any, ...]] = {}
        self.watched = False
        self._asked = 0
        self.why_not = "cache=False" if self._cache is False else "the data have not been read in whole yet"

    @property
    def nbytes(self) -> int:
        """Counts the bytes of the tensors that are kept."""
        return 0 if self._kept is None else self._kept.nbytes

    def now(self) -> Stacked | KeptBatches | None:
        """Returns what is kept, if nobody has edited it."""
        if self._kept is not None and not self._kept.intact():
            self._refuse("the model or the objective edits its batches in place")
        return self._kept

    def worth(self, count: int) -> bool:
        """Tells whether, with ``count`` more, as many examples are read as there are: then loading all pays off."""
        return self._asked + count >= self._source.n

    def count(self, examples: int) -> None:
        """Counts examples that are being read, for ``worth``."""
        self._asked += examples

    def load(self, stack_only: bool) -> Stacked | KeptBatches | None:
        """Reads and keeps the data, if possible (and, with ``stack_only``, if they stack). Draws no random number."""
        if self.may_keep() and self._outlook is not None and (self._outlook.stack or not stack_only):
            with quiet():
                for _ in self.filling(or_stop=True):
                    pass
        return self._kept

    def refresh(self) -> None:
        """Drops what is kept if the data have changed."""
        if self.watched and not self._busy and self._changed():
            self.clear()

    def may_keep(self) -> bool:
        """Tells whether the next pass should be a ``filling`` one. Reads a few examples, the first time."""
        if self._busy or self._cache is False:
            return False
        if self._outlook is None:
            try:
                self._outlook, differs = self._look()
            except Exception as error:  # it is raised again, in its place, when the data are used
                self.why_not = f"reading the first, the middle and the last example failed: {error}"
                return False
            if differs and not self._warned:
                self._warned = True
                self._warn_of_randomness()
            if self._outlook.refused:
                self._refuse(self._outlook.refused)
        return not self._outlook.refused

    def filling(self, or_stop: bool = False) -> Iterator[tuple[Any, int]]:
        """Yields all data in the loader's own batches, and keeps them; with ``or_stop``, ends when it can't keep them.

        Takes one int64 from torch's default generator, like any pass. If it ends early, nothing is kept.
        """
        source, outlook = self._source, self._outlook
        assert outlook is not None  # may_keep() comes first
        n, step = source.n, source.batch_size or 1
        keeping = Keeping(n, outlook.stack, lambda device: budget(self._cache, device))
        watched = Watched(source.collate, outlook.stack and not outlook.frozen)
        own = generators(source.dataset, source.collate)
        kinds: dict[Any, int] = {}
        before = holdings(source.dataset)
        self._busy, self._outlook = True, None  # set again when all went well
        try:
            passing = drawn_in_turn(source.through_loader(range(n), source.batch_size, collate=watched))
            standing = states(own)
            drew = False
            for start in range(0, n, step):
                size = min(step, n - start)
                with torch.inference_mode(False):
                    collated, found = next(passing)
                    drew = drew or found.drew
                    batch = source.transfer(collated)
                    if not found.together:
                        keeping.stop_stacking()
                    keeping.add(batch, size)
                if len(kinds) <= _KINDS:
                    kinds = {kind: start + at for kind, at in found.kinds.items()} | kinds
                yield batch, size
                keeping.look_again()
                if or_stop and keeping.why_not:
                    break
            with torch.inference_mode(False), quiet():
                # The user of the batches, or another thread, may have drawn them: the data are read again alone to see.
                watching = not keeping.why_not or keeping.too_large
                if watching and not outlook.frozen and (drew or standing != states(own)):
                    self._look_for_draws(own, outlook, keeping)
                self._finish(keeping, outlook, kinds, before)
        finally:
            self._busy = False

    # -- private ------------------------------------------------------------------------------------------------------

    def _refuse(self, why: str) -> None:
        self.clear()
        self.why_not = why
        self._outlook = _Outlook(refused=why)

    def _look(self) -> tuple[_Outlook, bool]:
        """Reads three examples twice, from different random states; returns the findings, and whether they differ."""
        source = self._source
        drew = differs = False
        reads: list[list[Any]] = []
        own = generators(source.dataset, source.collate)
        for seed in range(_REREADS):
            with torch.inference_mode(False), quiet(seed):
                standing = states(own)
                reads[1:] = [source.probe()]
                drew = drew or standing != states(own)
            if (why := cannot_keep(parts(reads[0]))) != "":
                return _Outlook(refused=why), False
            differs = not same(reads[0], reads[-1])
            if differs or (seed > 0 and not drew):
                break
        outlook = _Outlook(source.n, reads[0], frozen=(drew or differs) and self._cache is True)
        if (drew or differs) and not outlook.frozen:
            outlook.refused = _OTHER if differs else _DRAWS
        elif source.batch_size is not None:
            with torch.inference_mode(False), quiet():
                outlook.stack = self._looks_stackable(outlook)
        return outlook, differs

    def _look_for_draws(self, own: list[Any], outlook: _Outlook, keeping: Keeping) -> None:
        """Gives up keeping, or freezes what is kept, if reading any batch draws random numbers. Reads all data once."""
        n, step = outlook.n, self._source.batch_size or 1
        for start in range(0, n, step):
            examples, standing = range(start, min(start + step, n)), states(own)
            self._source.read(examples)
            if standing != states(own):
                return self._draws(examples, outlook, keeping)

    def _draws(self, examples: range, outlook: _Outlook, keeping: Keeping) -> None:
        """Notes that reading these examples draws random numbers, though reading the first few did not."""
        reads: list[Any] = []
        for seed in range(_REREADS):
            with quiet(seed):
                reads.append(self._source.read(examples))
        differs = not all(same(reads[0], read) for read in reads[1:])
        if self._cache is True:
            outlook.frozen = True
        else:
            keeping.too_large, keeping.why_not = False, ""  # the draws are the more important reason
            keeping.give_up(_OTHER if differs else _DRAWS)
        if differs and not self._warned:
            self._warned = True
            self._warn_of_randomness()

    def _looks_stackable(self, outlook: _Outlook) -> bool:
        """Tells whether a batch of two is two batches of one, put together."""
        try:
            batches = [self._source.read(indices) for indices in ([0], [outlook.n - 1], [outlook.n - 1, 0])]
        except Exception:  # a collate_fn that wants more than one example, or just one
            return False
        apart = [take_apart(batch, leading=1) for batch in batches]
        if not apart[0][1] or not all(alike(template, apart[0][0]) for template, _ in apart[1:]):
            return False
        (_, first), (_, last), (_, both) = apart
        for a, b, two in zip(first, last, both, strict=True):
            if not (a.dim() and len(a) == len(b) == 1 and len(two) == 2):
                return False
            if not outlook.frozen and not same([b[0], a[0]], [two[0], two[1]]):
                return False
        return True

    def _finish(
        self, keeping: Keeping, outlook: _Outlook, kinds: dict[Any, int], before: dict[str, tuple[Any, ...]]
    ) -> None:
        source, n = self._source, outlook.n

        def verified(stacked: Stacked) -> bool:
            if len(kinds) > _KINDS or (outlook.frozen and len(kinds) > 1):
                return False
            if outlook.frozen:
                return True
            if source.gathers and not all(
                same(source.transfer(one), stacked.batch([i]))
                for i, one in enumerate(source.through_loader(range(n), 1))
            ):
                return False
            alone = sorted({0, n // 2, n - 1, *kinds.values()})
            groups = [[i] for i in alone] + ([[n - 1, 0]] if n > 1 else [])
            return all(same(source.read(group), stacked.batch(group)) for group in groups)

        kept = keeping.finish(verified)
        if keeping.why_not and not keeping.too_large:
            return self._refuse(keeping.why_not)
        after = holdings(source.dataset)
        read_again = source.probe()
        unmoved = len(source.dataset) == n and (outlook.frozen or same(outlook.probe, read_again))
        # What changes when the same examples are read again (counters, buffers) is not data.
        self._held = _constant(after, holdings(source.dataset))
        if not unmoved or len(_constant(self._held, before)) < len(self._held):
            self.clear()
            self.why_not = "the data changed while they were being read"
            return None
        outlook.refused = self.why_not = keeping.why_not
        self._kept, self._outlook, self.watched = kept, outlook, True
        return None

    def _changed(self) -> bool:
        outlook = self._outlook
        if outlook is None or len(self._source.dataset) != outlook.n:
            return True
        if len(_constant(self._held, holdings(self._source.dataset))) < len(self._held):
            return True
        try:
            with quiet():
                return not (outlook.frozen or same(outlook.probe, self._source.probe()))
        except Exception:  # it is raised again when the data are used
            return True

    def _warn_of_randomness(self) -> None:
        name = self._source.name
        draws = "cache=True keeps one draw and uses it for everything" if self._cache is True else "none is kept"
        warnings.warn(
            f"{name}: the data set gives other data each time it is read (random augmentation?), so scores are those "
            f"of random draws of it, and {draws}; give {name} a data set without random transforms, as for evaluation",
            UserWarning,
            stacklevel=level_of_the_user(),
        )


def _constant(before: dict[str, tuple[Any, ...]], after: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """Returns the holdings that are the same after as before."""
    return {path: held for path, held in before.items() if path in after and unchanged(held, after[path])}

"""Checks of the user's loader, and warnings of what it does to the data that reading in data-set order leaves out."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from torch.utils import data

from torch_influence.batches._draws import quiet
from torch_influence.caller import level_of_the_user

_NEEDED = (
    *("dataset", "collate_fn", "batch_size", "batch_sampler", "sampler", "num_workers"),
    *("worker_init_fn", "multiprocessing_context", "prefetch_factor", "timeout"),
)
_ORDERING = (data.SequentialSampler, data.RandomSampler, data.BatchSampler)
_ITERATES = ("__iter__", "_get_iterator")  # the methods by which a subclass of DataLoader can iterate in its own way


def check_loader(loader: Any, name: str) -> None:
    """Checks that this is a DataLoader over a map-style data set, or has the same attributes.

    Args:
        loader: the user's.
        name: what to call it in errors.

    Raises:
        TypeError: it is something else.
    """
    kind = type(loader).__name__
    if not isinstance(loader, data.DataLoader) and not all(hasattr(loader, part) for part in _NEEDED):
        if hasattr(loader, "__getitem__") and hasattr(loader, "__len__"):
            hint = "write DataLoader(it, batch_size=...)"
        elif hasattr(loader, "dataset"):
            hint = (
                "data are read from a loader's data set and through its collate_fn, so give the DataLoader that this "
                "one wraps, and put what it does to batches into the data set or into collate_fn"
            )
        else:
            hint = "influence is per example, so examples need an index: a data set with __len__ and __getitem__"
        raise TypeError(f"{name}: expected a torch.utils.data.DataLoader, got {kind}; {hint}")
    dataset = loader.dataset
    if isinstance(dataset, data.IterableDataset) or not (
        hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    ):
        raise TypeError(
            f"{name}: expected a data set with __len__ and __getitem__, got {type(dataset).__name__}; influence is "
            "per example, so examples need an index: list(dataset) makes an iterable data set one of that kind"
        )


def warn_of_iteration(loader: Any, name: str) -> None:
    """Warns of a loader that iterates in a way of its own, since it isn't iterated."""
    own = [part for part in _ITERATES if getattr(type(loader), part, None) is not getattr(data.DataLoader, part)]
    if own:
        warnings.warn(
            f"{name}: {type(loader).__name__} has an {own[0]} of its own, which is not used: data are read from its "
            "data set, example by example, and through its collate_fn. If it changes what it yields (normalises, "
            "augments, drops), do that in the data set or in collate_fn; moving batches to a device is of no matter",
            UserWarning,
            stacklevel=level_of_the_user(),
        )


def warn_of_selection(loader: Any, name: str) -> None:
    """Warns of a sampler, or a batch sampler, that selects: the model was trained on something else than the data set.

    Influence does not depend on an order, nor on a last batch that is dropped. From a sampler that is not torch's own,
    one pass is drawn, from a copy, to see what it selects; one that can't be copied is judged by its length.
    """
    n, batches = len(loader.dataset), loader.batch_sampler
    of_its_own = batches is not None and type(batches) is not data.BatchSampler
    sampler = getattr(batches, "sampler", loader.sampler)
    if of_its_own and type(sampler) is not data.WeightedRandomSampler:
        sampler = batches
    kind = type(sampler)
    if isinstance(sampler, data.DistributedSampler) or kind in _ORDERING:
        selects = False  # only this process's share of all examples, or an order
    else:
        selects = kind is data.WeightedRandomSampler or _draws_unevenly(sampler, loader.dataset, sampler is batches)
    if selects:
        warnings.warn(
            f"{name}: its {kind.__name__} is ignored, all {n} examples of the data set count, once each. "
            "If the model was trained on some of them, give it torch.utils.data.Subset(dataset, indices); weights "
            "of examples belong into the loss",
            UserWarning,
            stacklevel=level_of_the_user(),
        )


def _draws_unevenly(sampler: Any, dataset: Any, batched: bool) -> bool:
    """Tells whether a pass takes an example twice, or leaves out as many examples as a batch has, or more."""
    n, largest = len(dataset), 1
    drawn: list[int] = []
    held = [item for item in getattr(sampler, "__dict__", {}).values() if isinstance(item, data.Dataset)]
    try:
        with quiet():
            for some in copy.deepcopy(sampler, {id(item): item for item in [dataset, *held]}):
                drawn += map(int, some if batched else [some])
                largest = max(largest, len(some) if batched else 1)
                if len(drawn) > n:
                    return True
    except Exception:  # whatever a copy may raise, or a sampler of what is no index
        return not batched and hasattr(sampler, "__len__") and len(sampler) != n
    return len(set(drawn)) < len(drawn) or n - len(drawn) >= largest

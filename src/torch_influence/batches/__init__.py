"""Batches: the data of a loader on a device, kept while they fit, and the only weighted mean over data."""

from torch_influence.batches._batches import Batches, to_device, weighted_mean
from torch_influence.batches._containers import (
    alike,
    copy_of,
    held,
    is_dense,
    map_parts,
    parts,
    put_together,
    same,
    stands_alone,
    take_apart,
    versions,
)

__all__ = [
    "Batches",
    "alike",
    "copy_of",
    "held",
    "is_dense",
    "map_parts",
    "parts",
    "put_together",
    "same",
    "stands_alone",
    "take_apart",
    "to_device",
    "versions",
    "weighted_mean",
]

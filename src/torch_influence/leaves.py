"""Batches of any make, taken apart into tensors and a template, and put together again."""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor


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


def leaves(batch: Any) -> list[Any]:
    """Everything in a batch that is not a container, in order."""
    found: list[Any] = []

    def note(leaf: Any) -> Any:
        found.append(leaf)
        return leaf

    map_leaves(note, batch)
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two batches hold the same leaves: dtype, shape, device and every value; NaN is the same as NaN."""
    ours, theirs = leaves(one), leaves(other)
    return len(ours) == len(theirs) and all(map(_same_leaf, ours, theirs))


def _same_leaf(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor) and (a.shape, a.dtype, a.device, a.layout) != (b.shape, b.dtype, b.device, b.layout):
        return False
    try:
        if isinstance(a, Tensor):
            return bool(((a == b) | ((a != a) & (b != b))).all())
        return bool(a == b or (a != a and b != b))
    except (ValueError, TypeError, RuntimeError):  # what can't be compared is not known to be the same
        return False


class Slot:
    """The place of a tensor in a template; equal for tensors alike in dtype, device and shape but for leading axes."""

    def __init__(self, tensor: Tensor, leading: int) -> None:
        self._kind = (tensor.shape[leading:], tensor.dtype, tensor.device)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slot) and self._kind == other._kind

    def __hash__(self) -> int:
        return hash(self._kind)


def take_apart(batch: Any, leading: int = 0) -> tuple[Any, list[Tensor]]:
    """The template of a batch, with a slot for each tensor, and the tensors; slots disregard ``leading`` axes.

    A container that looks into what it is made of (PackedSequence) is its own template, without tensors.
    """
    tensors: list[Tensor] = []

    def take(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        tensors.append(leaf)
        return Slot(leaf, leading)

    try:
        return map_leaves(take, batch), tensors
    except Exception:  # whatever such a container raises
        return batch, []


def put_together(template: Any, tensors: Sequence[Tensor]) -> Any:
    """The batch of this template with these tensors in its slots."""
    supply = iter(tensors)
    return map_leaves(lambda leaf: next(supply) if isinstance(leaf, Slot) else leaf, template)


def alike(template: Any, other: Any) -> bool:
    """Whether two templates have the same structure, slots and constants."""
    try:
        return type(template) is type(other) and bool(template == other)
    except (ValueError, RuntimeError):  # an array among the constants compares element by element
        return False

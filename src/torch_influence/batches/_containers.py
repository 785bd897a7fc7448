"""Batches in any containers, taken apart into tensors and a template, and put together again."""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def map_parts(function: Callable[[Any], Any], batch: Any, is_part: Callable[[Any], bool] = lambda item: False) -> Any:
    """Rebuilds a batch with ``function`` applied to everything in it that is not a container."""
    if is_part(batch):
        return function(batch)
    if isinstance(batch, Mapping):
        mapped = {key: map_parts(function, value, is_part) for key, value in batch.items()}
        if type(batch) is dict or not hasattr(batch, "__setitem__"):
            return mapped
        twin: Any = copy.copy(batch)  # keeps the type and what else it carries: UserDict, OrderedDict, defaultdict
        for key, value in mapped.items():
            twin[key] = value
        return twin
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_parts(function, item, is_part) for item in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map_parts(function, item, is_part) for item in batch)
    if isinstance(batch, types.SimpleNamespace) or (dataclasses.is_dataclass(batch) and not isinstance(batch, type)):
        twin = copy.copy(batch)
        names = vars(batch) if isinstance(batch, types.SimpleNamespace) else [f.name for f in dataclasses.fields(batch)]
        for name in list(names):
            object.__setattr__(twin, name, map_parts(function, getattr(batch, name), is_part))  # frozen ones too
        return twin
    return function(batch)


def parts(batch: Any) -> list[Any]:
    """Lists everything in a batch that is not a container, in order."""
    found: list[Any] = []

    def note(leaf: Any) -> Any:
        found.append(leaf)
        return leaf

    map_parts(note, batch)
    return found


def copy_of(batch: Any) -> Any:
    """Copies a batch with every tensor and array in it; an object that occurs twice is copied once."""
    copies: dict[int, Any] = {}

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor | np.ndarray):
            return leaf
        if id(leaf) not in copies:
            copies[id(leaf)] = leaf.clone() if isinstance(leaf, Tensor) else leaf.copy()
        return copies[id(leaf)]

    return map_parts(copied, batch)


def versions(items: Sequence[Any]) -> list[int]:
    """Counts how often each tensor among these items has been edited in place."""
    return [-1 if t.is_inference() else t._version for t in items if isinstance(t, Tensor)]


def same(one: Any, other: Any) -> bool:
    """Tells whether two batches hold the same parts: dtype, shape, device and every value; NaN equals NaN here."""
    ours, theirs = parts(one), parts(other)
    return len(ours) == len(theirs) and all(map(_same_leaf, ours, theirs))


def _same_leaf(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    try:
        if isinstance(a, Tensor):
            return _same_tensor(a, b)
        if isinstance(a, np.ndarray):
            return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
        return bool(a == b or (a != a and b != b))
    except (ValueError, TypeError, RuntimeError):  # what can't be compared is not known to be the same
        return False


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.device, a.layout, a.is_nested) != (b.dtype, b.device, b.layout, b.is_nested):
        return False
    if a.is_nested:  # its shape holds a number that differs even between tensors of the same lengths
        return len(a.unbind()) == len(b.unbind()) and all(map(_same_tensor, a.unbind(), b.unbind()))
    if a.shape != b.shape:
        return False
    if is_dense(a):
        return bool(((a == b) | ((a != a) & (b != b))).all())
    one, other = ([*held(t.coalesce() if t.layout is torch.sparse_coo else t)] for t in (a, b))
    return len(one) == len(other) > 0 and all(map(_same_tensor, one, other))


def is_dense(tensor: Tensor) -> bool:
    """Tells whether a tensor is neither sparse nor nested: an array with strides, whose rows can be cut and stacked."""
    return tensor.layout is torch.strided and not tensor.is_nested


def held(tensor: Tensor) -> list[Tensor]:
    """Lists the dense tensors that a tensor of any layout is made of: itself, or its values and their indices."""
    if tensor.is_nested:
        ends = [tensor.offsets()] if tensor.layout is torch.jagged else []  # type: ignore[attr-defined]
        return [tensor.values(), *ends]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]  # those without an underscore want a coalesced one
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor] if tensor.layout is torch.strided else []  # a layout that a library has added shows none


class Alone:
    """A sparse or nested tensor in a template: it is not stacked, and equals nothing but the same object."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Alone) and self.tensor is other.tensor

    def __hash__(self) -> int:
        return id(self.tensor)


class Slot:
    """The place of a tensor in a template; equal for the same dtype, device and shape without the leading axes."""

    def __init__(self, tensor: Tensor, leading: int) -> None:
        self._kind = (tensor.shape[leading:], tensor.dtype, tensor.device)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slot) and self._kind == other._kind

    def __hash__(self) -> int:
        return hash(self._kind)


def take_apart(batch: Any, leading: int = 0) -> tuple[Any, list[Tensor]]:
    """Splits a batch into a template, with a slot for each dense tensor, and the tensors; slots ignore leading axes.

    A container that checks its own contents (PackedSequence) can't hold slots: it is its own template, without tensors.
    """
    tensors: list[Tensor] = []

    def take(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if not is_dense(leaf):
            return Alone(leaf)
        tensors.append(leaf)
        return Slot(leaf, leading)

    try:
        return map_parts(take, batch), tensors
    except Exception:  # whatever such a container raises
        return batch, []


def put_together(template: Any, tensors: Sequence[Tensor]) -> Any:
    """Builds the batch of this template with these tensors in its slots."""
    supply = iter(tensors)

    def put(leaf: Any) -> Any:
        if isinstance(leaf, Slot):
            return next(supply)
        return leaf.tensor if isinstance(leaf, Alone) else leaf

    return map_parts(put, template)


def stands_alone(template: Any) -> bool:
    """Tells whether a template has tensors in it, so that no other batch is known to have the same template."""
    return any(isinstance(leaf, Tensor | Alone) for leaf in parts(template))


def alike(template: Any, other: Any) -> bool:
    """Tells whether two templates have the same structure, slots and constants."""
    try:
        return type(template) is type(other) and bool(template == other)
    except (ValueError, RuntimeError):  # an array among the constants compares element by element
        return False

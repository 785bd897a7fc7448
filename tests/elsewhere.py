"""A device that this machine doesn't have, with real numbers: it finds mixed devices, and counts the host's waits.

It shows where the host would have to wait for a GPU; it can't show how long, nor what CUDA's own kernels wait for.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from torch_influence.batches import _stores

aten = torch.ops.aten
# The host reads a number, or needs one to know the size of a result; LAPACK's errors are read as well.
_READS = {
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._linalg_eigh,
    aten._linalg_check_errors,
    aten._unique2,
}
_INDEXING = {aten.index, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
_COPIES = {aten._to_copy, aten.copy_}


class _There(Tensor):
    """A tensor that says that it is on the device ``meta``, and is_cuda, of which ``here`` has the numbers."""

    is_cuda = True  # type: ignore[assignment]
    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> _There:
        made = Tensor._make_wrapper_subclass(
            cls, here.shape, here.stride(), here.storage_offset(), dtype=here.dtype, device="meta"
        )
        made.here = here
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(_copied(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_copied(index), value)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a tensor of another device, outside of its mode")


class Elsewhere(TorchDispatchMode):
    """While it is on, ``meta`` is a device like a GPU: tensors made there have numbers, and don't mix with the CPU's.

    Attributes:
        waits: how often the host waited for the device, by what it did: a number or a size was read, or a copy made,
            in either direction, that doesn't say non_blocking.
        late: how often it waited for an event that was recorded earlier, while the device had more to do.
        copies: how many tensors were copied from the host to the device, waited for or not.
    """

    device = torch.device("meta")

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.late = self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        packet = func.overloadpacket
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [t for t in tensors if isinstance(t, _There)]
        if any(t.is_meta and not isinstance(t, _There) for t in tensors):
            raise RuntimeError(f"{func}: a tensor without numbers")
        mixed = there and any(t.dim() and not isinstance(t, _There) for t in tensors)
        wanted = kwargs.get("device")
        on_device = bool(there) if wanted is None else torch.device(wanted).type == "meta"
        if wanted is not None:
            kwargs["device"] = torch.device("cpu")

        if packet in _COPIES:
            crosses = mixed or (packet is aten._to_copy and on_device != bool(there))
            if crosses:
                blocking = not (kwargs.get("non_blocking") or (packet is aten.copy_ and len(args) > 2 and args[2]))
                self.waits[func.name()] += blocking
                self.copies += on_device and isinstance(args[0], _There) == (packet is aten.copy_)
        elif packet in _INDEXING:
            self._look_at(args, func.name())
        elif mixed:
            raise RuntimeError(f"{func}: expected all tensors on one device, got some on the CPU and some elsewhere")
        elif there and packet in _READS:
            self.waits[func.name()] += 1

        known = {id(t.here): t for t in there}
        result = func(*tree_map(_here, args), **tree_map(_here, kwargs))
        if not on_device:
            return result
        return tree_map(lambda t: known.get(id(t), _There(t)) if isinstance(t, Tensor) else t, result)

    def _look_at(self, args: Any, name: str) -> None:
        """Counts what indexing waits for: a mask's number of entries, and indices that come from the host."""
        if not isinstance(args[0], _There):
            if any(isinstance(t, _There) for t in tree_leaves(args[1:])):
                raise RuntimeError(f"{name}: indices or values elsewhere for a tensor on the CPU")
            return
        # A number is written by masked_fill_, which needs no count.
        fills = len(args) > 2 and args[2].numel() == 1
        for index in args[1]:
            if index is None:
                continue
            if not isinstance(index, _There):
                self.waits[f"{name} by the host's indices"] += 1
                self.copies += 1
            elif index.dtype in (torch.bool, torch.uint8) and not fills:
                self.waits[f"{name} by a mask"] += 1
        if len(args) > 2 and not isinstance(args[2], _There) and args[2].dim():
            raise RuntimeError(f"{name}: values on the CPU for a tensor elsewhere")


def _copied(index: Any) -> Any:
    """Copies a list of indices there, as for a GPU."""
    if isinstance(index, tuple):
        return tuple(_copied(part) for part in index)
    return torch.tensor(index, device=Elsewhere.device) if isinstance(index, list) else index


def _here(t: Any) -> Any:
    return t.here if isinstance(t, _There) else t


def numbers(t: Tensor) -> Tensor:
    """The tensor's numbers, on the CPU, uncounted."""
    return t.here if isinstance(t, _There) else t


def moved(model: nn.Module) -> nn.Module:
    """Moves a model's parameters and buffers there, in place: ``nn.Module.to`` can't swap such tensors."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(p.detach().to(Elsewhere.device), p.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(Elsewhere.device)
    return model


@contextlib.contextmanager
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[Elsewhere]:
    """Switches the device on: with events and a stream in place of CUDA's, and modules that take ``meta``."""
    mode = Elsewhere()

    class Event:
        def record(self, stream: Any) -> None:
            pass

        def synchronize(self) -> None:
            mode.late += 1

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        """Makes it on the host and copies it, as for a GPU; for ``meta`` it would make nothing."""
        if device is None or torch.device(device) != Elsewhere.device:
            return made(data, device=device, **options)
        return made(data, device="cpu", **options).to(device)

    stacks = _stores._stacks
    monkeypatch.setattr(_stores, "_stacks", lambda t, size: stacks(numbers(t), size))  # it takes no subclasses
    autocast, made = torch.is_autocast_enabled, torch.tensor
    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "meta" and autocast(kind))
    monkeypatch.setattr("torch_influence.base.check_device", torch.device)
    monkeypatch.setattr("torch_influence.problem.check_model", lambda model: None)
    with mode:
        yield mode

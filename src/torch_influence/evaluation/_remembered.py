"""Notes, before a computation, what it may change on the user's networks and what they hold; puts it back afterwards.

``functional_call`` puts parameters and buffers back. It does not put back the rest: train and eval modes, with the
weights that a layer may change with its mode (LoRA merges in eval mode); tensors and numbers kept as plain attributes
(the flat weights of an LSTM, activations and counts that a forward leaves behind); what containers and objects among
them hold. If nobody put these back, some would hold a graph of this package.
"""

from __future__ import annotations

import collections
import dataclasses
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_DEPTH = 5  # from a module's attribute to a tensor in a list in a dict in an object of it
_ROOM = 10_000  # containers and objects that are searched, not counting those that are attributes themselves
_LONGEST = 2000  # items of a container that is searched for others; of a longer one only the items are put back
_LARGEST = 2**20  # bytes of a tensor or array whose values are put back

_PLAIN = (int, float, complex, str, bytes, type(None))
_TORCHS_OWN = frozenset(vars(nn.Module()))  # every module has these attributes: hooks, children, parameters, buffers
_REGISTERED = ("_parameters", "_buffers")
_STRUCTURE = (*_REGISTERED, "_modules", "_non_persistent_buffers_set")


class Remembered:
    """The state of networks, and of what else they hold, at the time when it is made.

    Args:
        networks: everything of them is put back.
        objective: if it is none of the networks, only graphs that it has gained are taken from it; its numbers stay.
    """

    def __init__(self, networks: Sequence[nn.Module], objective: object) -> None:
        self._networks = networks
        self._modules = list({id(m): m for network in networks for m in network.modules()}.values())
        self._modes = [(m, m.training) for m in self._modules]
        self._switching = [m for m in self._modules if _works_at_a_switch(m)]
        self._objective = objective
        self._noted = _Noted(self._modules, self._switching, objective)
        self._weights: list[_Weight] = []
        self._stand_ins: dict[str, tuple[Tensor, Tensor]] = {}  # attributes of the objective, and copies

    def to_eval_mode(self) -> None:
        """Calls ``eval()`` on each network that has a module in train mode, as users do."""
        if not any(mode for _, mode in self._modes):
            return
        inside = [t for m in self._switching for t in (*m.parameters(), *m.buffers())]
        self._weights = [_Weight(t) for t in {id(t): t for t in inside}.values() if _is_plain(t)]
        for weight in self._weights:
            weight.keep()
        for network in self._networks:
            if any(m.training for m in network.modules()):
                network.eval()
        for weight in self._weights:
            weight.keep_if_changed()

    def without_inference_tensors(self) -> None:
        """Puts copies in the place of tensors made under inference_mode, which autograd refuses."""
        copies: dict[int, Tensor] = {}

        def renew(place: Any, names: Iterable[Any]) -> None:
            for name in names:
                if isinstance(t := place[name], Tensor) and t.is_inference():
                    place[name] = copies.setdefault(id(t), _normal(t))

        for m in [m for network in self._networks for m in network.modules()]:
            for held in (vars(m), *vars(m).values()):
                if isinstance(held, dict):
                    renew(held, list(held))
                elif type(held) is list:
                    renew(held, range(len(held)))
        before = dict(vars(self._objective))
        renew(vars(self._objective), before)
        now = vars(self._objective)
        self._stand_ins = {name: (t, now[name]) for name, t in before.items() if now[name] is not t}

    def put_back(self) -> None:
        """Puts everything back, also where a layer's own train() raises."""
        for name, (original, copy) in self._stand_ins.items():
            if vars(self._objective).get(name) is copy:
                vars(self._objective)[name] = original
        try:
            if self._switching:
                self._switch_back()
        finally:
            for m, mode in self._modes:
                m.training = mode
            self._noted.put_back()
            for weight in self._weights:
                weight.put_back()

    def _switch_back(self) -> None:
        """Calls ``train(mode)`` where a mode has changed, from the outermost module to the innermost, as users do."""
        if all(m.training == mode for m, mode in self._modes):
            return
        for weight in self._weights:
            weight.keep()
        for m, mode in self._modes:
            if m.training != mode:
                m.train(mode)


def _works_at_a_switch(m: nn.Module) -> bool:
    """Tells whether a module has a train() or eval() of its own, which may do more than set a flag."""
    return any(getattr(type(m), name) is not getattr(nn.Module, name) or name in vars(m) for name in ("train", "eval"))


def _normal(t: Tensor) -> Tensor:
    copy = t.detach().clone()
    return nn.Parameter(copy, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else copy


def _is_plain(t: Tensor) -> bool:
    """Tells whether a tensor's memory can be compared and copied as it is."""
    own = type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided
    return own and not (t.is_quantized or t.is_nested or t.is_inference() or t.is_meta)


class _Weight:
    """The state of a parameter or buffer: memory, exact values, version, grad and requires_grad.

    Values are copied only while something may change them.
    """

    def __init__(self, t: Tensor) -> None:
        self._t = t
        self._memory = t.data
        self._version, self._grad, self._requires_grad = t._version, t.grad if t.is_leaf else None, t.requires_grad
        self._copy: Tensor | None = None

    def keep(self) -> None:
        """Copies the values, if there is no copy yet."""
        if self._copy is None:
            self._copy = self._memory.clone()

    def keep_if_changed(self) -> None:
        """Drops the copy if the values have not changed."""
        if self._copy is not None and _same_bits(self._memory, self._copy):
            self._copy = None

    def put_back(self) -> None:
        t, memory = self._t, self._memory
        if self._copy is not None and not _same_bits(memory, self._copy):
            memory.copy_(self._copy)
        if (t.data_ptr(), t.shape, t.stride()) != (memory.data_ptr(), memory.shape, memory.stride()):
            t.data = memory
        _set_version(t, self._version)
        if t.is_leaf and not (t.requires_grad == self._requires_grad and t.grad is self._grad):
            t.requires_grad_(self._requires_grad)
            t.grad = self._grad


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))


def _set_version(t: Tensor, version: int) -> None:
    """Sets a tensor's version back: its values are those of that version again, so graphs need not see a change."""
    if t._version != version:
        torch._C._autograd._unsafe_set_version_counter((t,), (version,))


# -- plain attributes -------------------------------------------------------------------------------------------------


class _Noted:
    """The attributes of modules, and the contents of containers and objects among them, some levels deep.

    Attributes of modules are always put back, and so are the contents of containers, namespaces and dataclasses in
    them. Other objects (a cache of keys and values; but also a logger, with a queue that another thread empties) are
    put back, with all that they hold, only if they have gained tensors. An objective that is no module only loses the
    graphs that it has gained.
    """

    def __init__(self, modules: Sequence[nn.Module], switching: Sequence[nn.Module], objective: object) -> None:
        self._objective = objective
        self._attributes = [(m, _attributes(m)) for m in modules]
        inside = [m for one in switching for m in one.modules()]
        self._classes = [(m, type(m)) for m in inside]
        self._contents: list[_Content] = []
        self._objects: list[list[_Content]] = []
        self._graphs: list[_Content] = []
        self._values: list[_Values] = []
        self._seen: set[int] = {id(m) for m in modules}
        for names, some in ((_REGISTERED, modules), (_STRUCTURE, inside)):
            for held in (vars(m).get(name) for m in some for name in names):
                if type(held) in (dict, set) and id(held) not in self._seen:
                    self._seen.add(id(held))
                    self._contents.append(_Content(held))
        self._look([(value, self._contents) for _, kept in self._attributes for value in kept.values()])
        if not isinstance(objective, nn.Module):
            self._seen.discard(id(objective))
            self._look([(objective, self._graphs)])

    def put_back(self) -> None:
        for m, of in self._classes:
            if type(m) is not of:
                m.__class__ = of
        for m, kept in self._attributes:
            now = _attributes(m)
            if m is self._objective:
                kept = kept | {name: value for name, value in now.items() if isinstance(value, _PLAIN)}
            _put_into(vars(m), now, kept)
        for content in self._contents:
            content.put_back()
        for contents in self._objects:
            if any(content.gained(_any) for content in contents):
                for content in contents:
                    content.put_back()
        for content in self._graphs:
            content.let_go(_has_a_graph)
        for values in self._values:
            values.put_back()

    def _look(self, values: Iterable[tuple[Any, list[_Content]]]) -> None:
        """Searches level by level, so that the room is used first for what is nearest to the modules."""
        room = _ROOM
        for depth in range(_DEPTH):
            deeper: list[tuple[Any, list[_Content]]] = []
            for value, into in values:
                if _is_simple(value) or id(value) in self._seen:
                    continue
                self._seen.add(id(value))
                if isinstance(value, Tensor | np.ndarray):
                    if into is self._contents and _Values.possible(value):
                        self._values.append(_Values(value))
                    continue
                held = _held(value)
                if held is None or (depth and room <= 0):
                    continue
                room -= bool(depth)
                if (
                    into is self._contents
                    and not isinstance(value, _CONTAINERS)
                    and not dataclasses.is_dataclass(value)
                ):
                    into = []
                    self._objects.append(into)
                if not isinstance(value, tuple | frozenset):
                    into.append(_Content(value))
                if len(held) <= _LONGEST:
                    deeper += [(item, into) for item in _items(held)]
            values = deeper


_CONTAINERS = (list, tuple, dict, set, frozenset, collections.deque, SimpleNamespace)
_Held = dict[Any, Any] | list[Any]


def _attributes(m: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(m).items() if name not in _TORCHS_OWN}


def _held(value: Any) -> _Held | None:
    """Returns what a container or an object holds, by name where it has names; None for anything else."""
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, list | tuple | set | frozenset | collections.deque):
        return list(value)
    if isinstance(value, Tensor | nn.Module | type | ModuleType | FunctionType | MethodType):
        return None
    return dict(vars(value)) if hasattr(value, "__dict__") else None


def _items(held: _Held) -> Iterator[Any]:
    return iter(held.values() if isinstance(held, dict) else held)


def _is_simple(value: Any) -> bool:
    """Tells whether there is nothing to search in a value; also true where looking into it may fail."""
    return type(value) in weakref.ProxyTypes or isinstance(value, _PLAIN)


def _any(t: Tensor) -> bool:
    return True


def _has_a_graph(t: Tensor) -> bool:
    return t.grad_fn is not None


def _holds(value: Any, kind: Callable[[Tensor], bool]) -> bool:
    """Tells whether a tensor of this kind is in a value, within the limits of the search."""
    seen: set[int] = set()
    level = [value]
    for _ in range(_DEPTH):
        deeper: list[Any] = []
        for item in level:
            if _is_simple(item) or id(item) in seen:
                continue
            if isinstance(item, Tensor) and kind(item):
                return True
            seen.add(id(item))
            held = _held(item)
            if held is not None and len(held) <= _LONGEST and len(seen) <= _ROOM:
                deeper += _items(held)
        level = deeper
    return False


def _same_items(one: _Held, other: _Held) -> bool:
    """Tells whether both hold the very same objects, in the same order, under the same names."""
    return (
        len(one) == len(other)
        and all(map(operator.is_, _items(one), _items(other)))
        and (not isinstance(one, dict) or all(map(operator.is_, one, other)))
    )


class _Content:
    """The contents of a container or an object, as they were."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self._before: Any = _held(value)

    def put_back(self) -> None:
        self._put(self._before)

    def gained(self, kind: Callable[[Tensor], bool]) -> bool:
        """Tells whether it has gained tensors of this kind."""
        return bool(self._gains(kind))

    def let_go(self, kind: Callable[[Tensor], bool]) -> None:
        """Removes new items that hold tensors of this kind, and puts back what they replaced; keeps the rest."""
        gains, now = self._gains(kind), _held(self._value)
        if not gains:
            return
        if isinstance(now, dict):
            before = {name: item for name, item in self._before.items() if id(now.get(name)) in gains}
            self._put({name: item for name, item in now.items() if id(item) not in gains} | before)
        else:
            self._put([item for item in now or [] if id(item) not in gains])

    def _gains(self, kind: Callable[[Tensor], bool]) -> set[int]:
        known = set(map(id, _items(self._before)))
        return {id(item) for item in _items(_held(self._value) or []) if id(item) not in known and _holds(item, kind)}

    def _put(self, before: Any) -> None:
        value, now = self._value, _held(self._value)
        if now is None or _same_items(now, before):
            return
        if isinstance(now, dict):
            _put_into(value if isinstance(value, dict) else vars(value), now, before)
        elif isinstance(value, list):
            value[:] = before
        else:  # a deque or a set
            value.clear()
            value.extend(before) if isinstance(value, collections.deque) else value.update(before)


def _put_into(place: dict[Any, Any], now: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Replaces the items ``now`` in a dict by those ``before``, in their order, since orders are compared, too."""
    if _same_items(now, before):
        return
    kind = collections.OrderedDict if isinstance(place, collections.OrderedDict) else dict
    others = {name: value for name, value in place.items() if name not in now}
    kind.clear(place)  # not a method of the user's, which may do more
    for name, value in (others | before).items():
        kind.__setitem__(place, name, value)


class _Values:
    """The values of a small tensor or array that is a plain attribute: a module may count in it."""

    def __init__(self, value: Tensor | np.ndarray) -> None:
        self._value = value
        self._version = value._version if isinstance(value, Tensor) else 0
        self._before: Any = value.detach().clone() if isinstance(value, Tensor) else value.copy()

    @staticmethod
    def possible(value: Tensor | np.ndarray) -> bool:
        if isinstance(value, np.ndarray):
            return value.nbytes <= _LARGEST and not value.dtype.hasobject
        own = type(value) is Tensor and _is_plain(value) and value.grad_fn is None and not value._is_view()
        return own and value.nbytes <= _LARGEST

    def put_back(self) -> None:
        value, before = self._value, self._before
        if isinstance(value, np.ndarray):
            if value.tobytes() != before.tobytes():
                value[...] = before
        elif value._version != self._version:
            if value.grad_fn is not None:
                value.detach_()
            with torch.no_grad():
                value.copy_(before)
            _set_version(value, self._version)

"""Random numbers: whether reading data draws some, from the default generators or from one of the data set's own."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from torch_influence.turns import RANDOM_STATES, alone_with

_ROOM = 2000  # objects that are looked into for generators
_FEW = 1000  # a longer container holds data
_CODE = ("__getitem__", "__getitems__", "__call__", "forward")  # what is called when data are read

States: TypeAlias = tuple[Any, ...]


@contextlib.contextmanager
def quiet(seed: int | None = None) -> Iterator[Callable[[], bool]]:
    """Puts the default random states of torch (CPU), NumPy and Python back; starts them at a seed if one is given.

    The whole process shares them, so threads take turns. Yields a function that tells whether any random number has
    been drawn from them so far.
    """
    with alone_with(RANDOM_STATES):
        before = start = _default()
        try:
            if seed is not None:
                torch.default_generator.manual_seed(seed)
                np.random.seed(seed)  # noqa: NPY002 - the generator that augmentations draw from
                random.seed(seed)
                start = _default()
            yield lambda: tuple(map(_plain, start)) != states()
        finally:
            torch.set_rng_state(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
            random.setstate(before[2])


def drawn_in_turn(items: Iterable[Any]) -> Iterator[Any]:
    """Yields the same items; what a loader or sampler draws at its start, it draws while no other thread is ``quiet``.

    Otherwise that thread would take the draw for its own, and undo it.
    """
    with alone_with(RANDOM_STATES):
        rest = iter(items)
        first = list(itertools.islice(rest, 1))
    yield from first
    yield from rest


def states(own: list[Any] | None = None) -> States:
    """Returns the states of the default generators and of the data set's ``own``: equal as long as none has drawn."""
    return tuple(_plain(state) for state in (*_default(), *map(_state, own or ())))


def _default() -> tuple[Tensor, Any, Any]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002


def generators(*roots: Any) -> list[Any]:
    """Finds the random generators that objects hold or their code names: in attributes, containers, closures, globals.

    Looks into at most a few thousand objects; generators of other libraries, or inside compiled code, are not found.
    """
    found: dict[int, Any] = {}
    seen: dict[int, Any] = {}
    waiting = collections.deque(roots)
    while waiting and len(seen) < _ROOM:  # what is near first
        item = waiting.popleft()
        if id(item) in seen or isinstance(item, str | bytes | int | float | Tensor | np.ndarray | type | ModuleType):
            continue
        seen[id(item)] = item
        if isinstance(item, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
            if not isinstance(item, random.SystemRandom):  # it has no state
                found[id(item)] = item
            continue
        waiting.extend(_inside(item))
    return list(found.values())


def _inside(item: Any) -> list[Any]:
    if isinstance(item, dict):
        return list(item.values()) if len(item) <= _FEW else []
    if isinstance(item, list | tuple | set | frozenset):
        return list(item) if len(item) <= _FEW else []
    if isinstance(item, MethodType):
        return [item.__self__, item.__func__]
    if isinstance(item, functools.partial):
        return [item.func, item.args, item.keywords]
    if isinstance(item, FunctionType):
        named = [item.__globals__[name] for name in item.__code__.co_names if name in item.__globals__]
        cells = [cell.cell_contents for cell in item.__closure__ or () if _filled(cell)]
        return [*named, *cells, item.__defaults__, item.__kwdefaults__]
    code = [getattr(type(item), name, None) for name in _CODE]
    return [
        *(function for function in code if isinstance(function, FunctionType)),
        *getattr(item, "__dict__", {}).values(),
    ]


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # its variable has not been assigned yet
        return False


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator | np.random.RandomState):
        return generator.get_state()
    return generator.getstate() if isinstance(generator, random.Random) else generator.bit_generator.state


def _plain(state: Any) -> Any:
    """Turns a state into bytes and tuples, which can be compared with == as a whole."""
    if isinstance(state, Tensor | np.ndarray):
        return (state.numpy() if isinstance(state, Tensor) else state).tobytes()
    if isinstance(state, dict):
        return tuple((key, _plain(value)) for key, value in state.items())
    return tuple(map(_plain, state)) if isinstance(state, tuple) and len(state) < 10 else state

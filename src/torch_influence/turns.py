"""One thread at a time: what a thread changes for a while, others wait for."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

RANDOM_STATES = object()  # the default random states of torch, NumPy and Python
WARNINGS = object()  # how warnings are shown

_Value = TypeVar("_Value")

_changed = threading.Condition()
_held: dict[int, int] = {}  # ids of things, and of the threads that have them
_waiting: dict[int, set[int]] = {}  # ids of threads, in the order in which they came, and what they lack


@contextlib.contextmanager
def alone_with(*things: object) -> Iterator[None]:
    """Nobody else has any of these things while the block runs; what this thread has already, it has once more.

    All of them are taken at once, and who came first is served first, so that threads wait and no two of them for one
    another. Only a thread that has something and asks for more could: it gets an error where it would wait forever.
    """
    me = threading.get_ident()
    mine: set[int] = set()
    try:
        with _changed:
            lacking = {id(thing) for thing in things if _held.get(id(thing)) != me}
            _waiting[me] = lacking
            try:
                _changed.wait_for(lambda: _my_turn(me))
                mine |= lacking
                _held.update(dict.fromkeys(lacking, me))
            finally:
                del _waiting[me]
                _changed.notify_all()
        yield
    finally:
        with _changed:
            for thing in mine:
                _held.pop(thing, None)
            _changed.notify_all()


class Once(Generic[_Value]):
    """``functools.cached_property`` without its lock, which Python before 3.12 shares among all objects of a class.

    A thread that waits for its turn while it computes would keep that from another, which it may be waiting for.
    """

    def __init__(self, compute: Callable[[Any], _Value]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __get__(self, owner: Any, of: type) -> _Value:
        if owner is None:
            return self  # type: ignore[return-value]
        value = vars(owner)[self._compute.__name__] = self._compute(owner)
        return value


def _my_turn(me: int) -> bool:
    """Whether nobody has what this thread lacks, and nobody who came earlier waits for it."""
    lacking = _waiting[me]
    if not _held.keys().isdisjoint(lacking):
        _refuse_to_wait_forever(me)
        return False
    if me in _held.values():  # others may wait for what it has
        return True
    earlier = [others for thread, others in _waiting.items() if thread != me]
    return all(lacking.isdisjoint(others) for others in earlier[: list(_waiting).index(me)])


def _refuse_to_wait_forever(me: int) -> None:
    """Follows who waits for whom."""
    found: set[int] = set()
    threads = [me]
    while threads:
        lacking = _waiting.get(threads.pop(), set())
        owners = {_held[thing] for thing in lacking if thing in _held} - found
        found |= owners
        threads += owners
    if me in found:
        raise RuntimeError(
            "two threads wait for one another: each computes with a model, and asks meanwhile for one that the other "
            "computes with; let one thread use both models, or begin with the outer call that uses both"
        )


def _in_a_child() -> None:
    """A process made by fork has one thread, and nothing that the others had is in use there."""
    global _changed
    _changed = threading.Condition()
    _waiting.clear()
    for thing in [thing for thing, thread in _held.items() if thread != threading.get_ident()]:
        del _held[thing]


if hasattr(os, "register_at_fork"):  # not where there is no fork
    os.register_at_fork(after_in_child=_in_a_child)

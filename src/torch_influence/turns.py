"""One thread at a time: while a thread changes something shared, the others wait."""

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
_waiting: dict[int, set[int]] = {}  # ids of threads, in the order in which they came, and the ids that they wait for


@contextlib.contextmanager
def alone_with(*things: object) -> Iterator[None]:
    """Keeps other threads from using any of these things while the block runs; a thread may nest such blocks.

    A thread takes all of them at once, first come first served, so no two threads wait for one another. That could only
    happen to a thread that holds something and asks for more: it gets an error where it would wait forever.
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

    With that lock two threads could wait for each other: one holds it and waits for its turn, which the other has.
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
    """Tells whether nobody has what this thread waits for, and nobody who came earlier waits for it."""
    lacking = _waiting[me]
    if not _held.keys().isdisjoint(lacking):
        _refuse_to_wait_forever(me)
        return False
    if me in _held.values():  # otherwise those who wait for what it has would block it
        return True
    earlier = [others for thread, others in _waiting.items() if thread != me]
    return all(lacking.isdisjoint(others) for others in earlier[: list(_waiting).index(me)])


def _refuse_to_wait_forever(me: int) -> None:
    """Raises an error if threads that wait for one another form a circle with this one."""
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
    """Frees, in a process made by fork, what other threads had: they do not exist there."""
    global _changed
    _changed = threading.Condition()
    _waiting.clear()
    for thing in [thing for thing, thread in _held.items() if thread != threading.get_ident()]:
        del _held[thing]


if hasattr(os, "register_at_fork"):  # not where there is no fork
    os.register_at_fork(after_in_child=_in_a_child)

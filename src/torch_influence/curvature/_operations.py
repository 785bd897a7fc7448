"""Counts operations; imported when somebody asks how many there are: torch's counter takes a new process a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker


def operations_of(compute: Callable[[], Any]) -> int:
    """Counts the additions and multiplications of a computation in matrix products and convolutions."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()  # torch's own hooks into every module, those of other threads too
    with counter:
        compute()
    return counter.get_total_flops()


class _NoModules(ModuleTracker):
    """A module tracker that tracks no modules: operations are counted for the whole only."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *args: Any) -> None:
        pass

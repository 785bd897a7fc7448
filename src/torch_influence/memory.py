"""Memory: how much is free on a device, and how much of it may be used to keep data and graphs."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch

Cache: TypeAlias = bool | int | str


def check_cache(cache: Any) -> None:
    """Checks that ``cache`` is True, False, "auto" or a number of bytes."""
    if isinstance(cache, int):
        if cache < 0:
            raise ValueError(f"cache: expected a number of bytes >= 0, got {cache}; cache=False keeps nothing")
    elif not isinstance(cache, str):
        hint = f"; write {int(cache)}" if isinstance(cache, float) and cache.is_integer() else ""
        raise TypeError(
            f"cache: expected True, False, 'auto' or a number of bytes (int), got {cache!r} of "
            f"{type(cache).__name__}{hint}"
        )
    elif cache != "auto":
        raise ValueError(f"cache: expected True, False, 'auto' or a number of bytes (int), got {cache!r}")


def budget(cache: Cache, device: torch.device) -> float:
    """Returns the bytes that may be kept on this device: for "auto" a quarter of what is free on it now."""
    if isinstance(cache, bool):
        return math.inf if cache else 0
    return cache if isinstance(cache, int) else free_memory(device) // 4


def free_memory(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes that are free on this device; for others than CUDA of the machine's memory, or of a container's share.

    ``root`` is where the system's files are: /proc/meminfo, /proc/self/cgroup and /sys/fs/cgroup.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return max(0, min([_free_in_machine(root), *_free_in_groups(root)]))


def _free_in_machine(root: Path) -> int:
    available = _number_after("MemAvailable:", root / "proc/meminfo")
    if available is not None:
        return available * 1024
    try:  # no Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, OSError, ValueError):  # nor anything like it
        return 4 * 2**30


def _free_in_groups(root: Path) -> Iterator[int]:
    """Yields the bytes left by the limits of this process's control groups (version 1 or 2) and those around them.

    Cached files that have not been used lately count as free: the system drops them when memory is needed.
    """
    for line in _lines(root / "proc/self/cgroup"):
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / kinds
        here = top / path.strip("/")
        names = (
            ("limit_in_bytes", "usage_in_bytes", "total_inactive_file")
            if kinds
            else ("max", "current", "inactive_file")
        )
        for group in (here, *here.parents):
            limit, used = (_number(group / f"memory.{name}") for name in names[:2])
            if limit is not None and used is not None:
                yield limit - used + (_number_after(names[2], group / "memory.stat") or 0)
            if group == top:
                break


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """Reads the number in a file; None if there is none, or "max"."""
    text = "".join(_lines(path))
    return int(text) if text.isdecimal() else None


def _number_after(word: str, path: Path) -> int | None:
    return next((int(line.split()[1]) for line in _lines(path) if line.split()[:1] == [word]), None)

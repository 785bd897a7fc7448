"""Where a warning points: at the line outside this package that asked for what it is about."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

_PACKAGE = str(Path(__file__).parent)


def level_of_the_user() -> int:
    """Returns the ``stacklevel`` for a warning of the calling function, so that it points at the user's line."""
    level, frame = 1, sys._getframe(1)
    while frame.f_code.co_filename.startswith((_PACKAGE, contextlib.__file__)) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    return level

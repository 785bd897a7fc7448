"""The curvatures that are chosen by name, and the fastest form of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch_influence.curvature._curvature import Curvature
from torch_influence.curvature._double_backward import DoubleBackward
from torch_influence.curvature._gauss_newton import GaussNewton
from torch_influence.curvature._head_capture import linear_head
from torch_influence.curvature._hessian import Hessian
from torch_influence.plan import NotPossible

Kind: TypeAlias = str | Callable[..., Curvature]

KINDS: dict[str, Callable[..., Curvature]] = {"hessian": Hessian, "gauss-newton": GaussNewton}


def check_kind(curvature: Any) -> Kind:
    """A name, or a class that makes one; refuses anything else."""
    if isinstance(curvature, str) and curvature in KINDS:
        return curvature
    if isinstance(curvature, str):
        known = ", ".join(map(repr, KINDS))
        raise ValueError(f"curvature: expected {known} or a subclass of Curvature, got {curvature!r}")
    if not callable(curvature):
        raise TypeError(
            f"curvature: expected a name or a subclass of Curvature, got {curvature!r} of {type(curvature).__name__}"
        )
    return curvature


def made(kind: Kind, *args: Any) -> Curvature:
    """The curvature of this kind, of the arguments that ``Curvature`` takes."""
    return (KINDS[kind] if isinstance(kind, str) else kind)(*args)


def fastest(curvature: Curvature, streamed: bool) -> Curvature:
    """Returns the curvature in closed form, where a comparison shows that it is the same; else itself.

    ``streamed``: data that are too large to be kept may be read once more for it.
    """
    if not isinstance(curvature, DoubleBackward):
        return curvature
    try:
        return linear_head(curvature, streamed)
    except NotPossible as why:
        curvature.why_no_head = str(why)
        return curvature

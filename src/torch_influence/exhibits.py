"""The parts that pictures and pages show of examples and scores, before anything is drawn: image, words, row, bins."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

_CHANNELS = (1, 3, 4)
_LABELS = ("label", "labels", "target", "targets", "y")


@dataclasses.dataclass(frozen=True)
class Image:
    """An image: uint8, [h, w] gray, [h, w, 3] or [h, w, 4]."""

    pixels: npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class Words:
    """A text, or what Python prints for any other object."""

    text: str


@dataclasses.dataclass(frozen=True)
class Row:
    """Numbers, each with the name of its feature."""

    names: Sequence[str]
    values: Sequence[str]


Exhibit: TypeAlias = Image | Words | Row


def exhibit(thing: Any, feature_names: Sequence[str] | None = None) -> Exhibit:
    """Chooses what is shown of an example: an image, a row of numbers or words.

    Args:
        thing: an image [C, h, w], [h, w, C] or [h, w] (a tensor, an array, or what NumPy makes an array of); a text; a
            row of numbers [d], or a mapping of names to numbers. For anything else, what Python prints.
        feature_names: of the numbers of a row; x0, x1, ... by default.

    Raises:
        ValueError: a row whose length is not the number of names.
    """
    if isinstance(thing, str):
        return Words(thing)
    if isinstance(thing, Mapping) and thing and all(_is_number(value) for value in thing.values()):
        return Row([str(name) for name in thing], [_number(value) for value in thing.values()])
    array = _array(thing)
    if array is not None and array.ndim == 1 and array.size:
        names = [f"x{i}" for i in range(len(array))] if feature_names is None else list(feature_names)
        if len(names) != len(array):
            raise ValueError(f"feature_names: expected {len(array)}, as many as numbers in a row, got {len(names)}")
        return Row(names, [_number(value) for value in array.tolist()])
    if array is not None and (pixels := _pixels(array)) is not None:
        return Image(pixels)
    if array is not None and array.ndim > 0:
        return Words(f"{type(thing).__name__} of shape {list(array.shape)}")
    return Words(_number(array.item()) if array is not None else str(thing))


def split(example: Any) -> tuple[Any, str]:
    """Splits an example of a data set into what is to be shown and its label, "" if it has none.

    From a tuple or list it takes the first item, and as label the last if that is one number or text; from a mapping
    its text, else its first array, and what is called label, target or y. Anything else is shown as it is.
    """
    if isinstance(example, Mapping) and not all(_is_number(value) for value in example.values()):
        label = next((label_of(example[name]) for name in _LABELS if name in example), "")
        rest = {name: value for name, value in example.items() if name not in _LABELS}
        found = [value for value in rest.values() if isinstance(value, str)]
        found = found or [value for value in rest.values() if _has_axes(value)]
        return (found[0] if found else rest), label
    if isinstance(example, tuple | list) and len(example) > 1 and not all(_is_number(item) for item in example):
        return example[0], label_of(example[-1])
    if isinstance(example, tuple | list) and len(example) == 1:
        return example[0], ""
    return example, ""


def label_of(value: Any) -> str:
    """Writes a label, one number or one text; "" for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) == 1:
        value = value.reshape(-1)[0]
    return _number(value) if _is_number(value) else ""


@dataclasses.dataclass(frozen=True)
class Bins:
    """A histogram of scores. No bin has scores of both signs; scores that are exactly zero are in none.

    Attributes:
        edges: ascending, zero among them; bin b is from edges[b] to edges[b + 1].
        counts: how many scores each bin has.
        helpful, harmful, zero: how many scores are positive, negative, and exactly zero.
        lost: how many are not finite.
    """

    edges: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]
    helpful: int
    harmful: int
    zero: int
    lost: int


def binned(scores: Any, bins: int) -> Bins:
    """Counts scores [n] in about ``bins`` bins of one width, with an edge at zero."""
    if bins < 1:
        raise ValueError(f"bins: expected at least 1, got {bins}")
    values = numbers(scores)
    if values.ndim != 1:
        raise ValueError(f"scores: expected those of one query, [n], got shape {list(values.shape)}")
    finite = values[np.isfinite(values)]
    helpful, harmful = finite[finite > 0], finite[finite < 0]
    high, low = helpful.max(initial=0.0), -harmful.min(initial=0.0)
    width = (high / bins + low / bins) or 1.0
    # Counted away from zero: multiplying by the width again could otherwise put a score on the other side of it.
    sides = [
        np.bincount(np.minimum((np.abs(side) / width).astype(np.int64), count - 1), minlength=count)
        for side, count in ((harmful, int(np.ceil(low / width))), (helpful, int(np.ceil(high / width))))
    ]
    return Bins(
        edges=width * np.arange(-len(sides[0]), len(sides[1]) + 1, dtype=np.float64),
        counts=np.concatenate([sides[0][::-1], sides[1]]),
        helpful=len(helpful),
        harmful=len(harmful),
        zero=int((finite == 0).sum()),
        lost=len(values) - len(finite),
    )


def numbers(values: Any) -> npt.NDArray[np.float64]:
    """Converts a tensor, or anything that NumPy takes, to a float64 array."""
    if isinstance(values, Tensor):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def shortened(row: Row, most: int) -> Row:
    """Cuts a row to ``most`` entries; the last one then says how many features are left out."""
    if len(row.names) <= most:
        return row
    return Row([*row.names[: most - 1], "…"], [*row.values[: most - 1], f"{len(row.names) - most + 1} more"])


def _array(thing: Any) -> npt.NDArray[Any] | None:
    """Converts to an array of numbers; None where that is not possible."""
    if isinstance(thing, Tensor):
        thing = thing.detach()
        thing = (thing.double() if thing.is_floating_point() else thing).cpu().numpy()
    elif isinstance(thing, list | tuple):
        if not thing or not all(_is_number(item) for item in thing):
            return None
    elif not (hasattr(thing, "__array__") or hasattr(thing, "__array_interface__") or _is_number(thing)):
        return None
    array = np.asarray(thing)
    return array if array.dtype.kind in "biuf" else None


def _pixels(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8] | None:
    """Converts an array to pixels [h, w] or [h, w, 3 or 4] in 0..255; None where it has not the shape of an image.

    Bytes stay as they are, and floating point numbers within 0..1 are multiplied by 255; other numbers, such as those
    of images that have been standardised, are scaled so that the smallest becomes 0 and the largest 255.
    """
    if array.ndim == 3 and array.shape[0] in _CHANNELS:
        array = np.moveaxis(array, 0, -1)
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in _CHANNELS)):
        return None
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.dtype == np.uint8:
        return array
    known = np.isfinite(array) if array.dtype.kind == "f" else np.ones(array.shape, dtype=bool)
    values = np.where(known, array, 0).astype(np.float64)
    low, high = values.min(initial=np.inf, where=known), values.max(initial=-np.inf, where=known)
    if (array.dtype.kind in "fb" and low >= 0 and high <= 1) or not known.any():
        low, high = 0.0, 1.0
    scaled = (values - low) / (high - low) if high > low else np.full(values.shape, 0.5)
    return np.rint(255 * scaled.clip(0, 1)).astype(np.uint8)


def _has_axes(value: Any) -> bool:
    array = _array(value)
    return array is not None and array.ndim > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) or (isinstance(value, Tensor) and value.dim() == 0)


def _number(value: Any) -> str:
    value = value.item() if isinstance(value, Tensor | np.number) else value
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""ParameterSpace: which parameters are differentiated, in what order, and how they become one row of length d."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
from torch import Tensor, nn

Selection: TypeAlias = str | Iterable[str | nn.Parameter] | Callable[[str, nn.Parameter], bool] | None


class ParameterSpace:
    """The trainable parameters of a model and the selected subset of them that is differentiated.

    Tied weights count once, under the first of their names. Rows are in the order of ``model.named_parameters()``.

    Attributes:
        trainable: names of all parameters with ``requires_grad``, the ones a regulariser sees.
        names: names of the selected ones.
        shapes: their shapes.
        size: d, the number of selected scalars.
        dtype: dtype of rows: the parameters' common dtype, float32 for float16 and bfloat16.
        pass_dtype: the least precise dtype in which forward and backward passes run: that of some trainable parameter,
            or one that a loss was seen to be computed in, see ``saw``.
    """

    def __init__(self, model: nn.Module, select: Selection = None) -> None:
        self._model = model
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError(
                "model: expected at least one parameter with requires_grad=True, got none; "
                "call requires_grad_(True) on the parameters whose influence you want"
            )
        self.trainable = tuple(trainable)
        self.names = tuple(trainable) if select is None else _select(model, trainable, select)
        chosen = [trainable[name] for name in self.names]
        for name, p in zip(self.names, chosen, strict=True):
            if not p.is_floating_point():
                raise TypeError(f"model: expected real floating-point parameters, got {name} with dtype {p.dtype}")
        self.shapes = tuple(p.shape for p in chosen)
        self.sizes = tuple(p.numel() for p in chosen)
        self.size = sum(self.sizes)
        if not self.size:
            raise ValueError(
                f"{'model' if select is None else 'params'}: expected at least one number to differentiate by, got "
                f"only parameters of size 0: {', '.join(self.names)}"
            )
        common = functools.reduce(torch.promote_types, (p.dtype for p in chosen))
        self.dtype = torch.float32 if common in (torch.float16, torch.bfloat16) else common
        self.pass_dtype = _least_precise([p.dtype for p in trainable.values()])

    def current(self, names: Sequence[str] | None = None) -> tuple[nn.Parameter, ...]:
        """The model's own Parameter objects of these names (default: the selected ones), as they are now."""
        here = dict(self._model.named_parameters())
        return tuple(here[name] for name in (self.names if names is None else names))

    def saw(self, dtype: torch.dtype) -> None:
        """Takes note of a dtype that a loss is computed in, for the tolerances of all comparisons that follow."""
        self.pass_dtype = _least_precise([self.pass_dtype, dtype])

    def widened(self) -> ParameterSpace:
        """The same parameters as rows of float64."""
        twin = copy.copy(self)
        twin.dtype = twin.pass_dtype = torch.float64
        return twin

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors shaped like the parameters -> one row [d]; tensors with a leading axis of k -> rows [k, d]."""
        lead = tensors[0].shape[: tensors[0].dim() - len(self.shapes[0])]
        flat = [t.reshape(*lead, size).to(self.dtype) for t, size in zip(tensors, self.sizes, strict=True)]
        return torch.cat(flat, dim=-1)

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Row [d] -> tensors shaped like the parameters; rows [k, d] -> the same with a leading axis of k."""
        pieces, lead = rows.split(self.sizes, dim=-1), rows.shape[:-1]
        return tuple(piece.reshape(lead + shape) for piece, shape in zip(pieces, self.shapes, strict=True))


def _least_precise(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _select(model: nn.Module, trainable: dict[str, nn.Parameter], select: Selection) -> tuple[str, ...]:
    """Names of the trainable parameters that ``params=`` asks for."""
    if callable(select):
        chosen = {name for name, p in trainable.items() if select(name, p)}
        if not chosen:
            raise ValueError("params: the predicate chose none of the trainable parameters; it gets (name, parameter)")
    else:
        wanted = [select] if isinstance(select, str | nn.Parameter) else list(select or ())
        if not wanted:
            raise ValueError("params: expected at least one name, glob or Parameter, got an empty selection")
        first_name = {id(p): name for name, p in model.named_parameters()}
        every_name = dict(model.named_parameters(remove_duplicate=False))
        chosen = set()
        for item in wanted:
            if isinstance(item, str):
                hits = [p for name, p in every_name.items() if name == item or fnmatchcase(name, item)]
            elif isinstance(item, Tensor):
                hits = [p for p in every_name.values() if p is item]
            else:
                raise TypeError(f"params: expected names, globs or Parameters, got {type(item).__name__}")
            names = {first_name[id(p)] for p in hits} & trainable.keys()
            if not names:
                what = repr(item) if isinstance(item, str) else f"a tensor of shape {tuple(item.shape)}"
                why = "which has requires_grad=False" if hits else "which is no parameter of the model"
                raise ValueError(f"params: got {what}, {why}; choose among {', '.join(trainable)}")
            chosen |= names
    return tuple(name for name in trainable if name in chosen)

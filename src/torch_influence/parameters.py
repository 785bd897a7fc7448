"""ParameterSpace: which parameters are differentiated, in what order, and how they become one row of length d."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

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
            some = next(model.parameters(), None) is not None
            raise ValueError(
                "model: expected at least one parameter with requires_grad=True, got none; "
                + (
                    "call requires_grad_(True) on the parameters whose influence you want"
                    if some
                    else "it has no parameters at all: if it is quantised or exported, give the one that it was made of"
                )
            )
        for name, p in trainable.items():
            if not p.is_floating_point():
                raise TypeError(f"model: expected real floating-point parameters, got {name} with dtype {p.dtype}")
        self.trainable = tuple(trainable)
        self.names = tuple(trainable) if select is None else _select(model, trainable, select)
        chosen = [trainable[name] for name in self.names]
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
        """Returns the model's own Parameter objects of these names (default: the selected ones), as they are now."""
        here = dict(self._model.named_parameters())
        return tuple(here[name] for name in (self.names if names is None else names))

    def saw(self, dtype: torch.dtype) -> None:
        """Notes a dtype in which a loss is computed: the tolerances of all later comparisons follow from it."""
        self.pass_dtype = _least_precise([self.pass_dtype, dtype])

    def widened(self) -> ParameterSpace:
        """Returns the same space with rows of float64."""
        twin = copy.copy(self)
        twin.dtype = twin.pass_dtype = torch.float64
        return twin

    def narrowed(self, dtype: torch.dtype) -> ParameterSpace:
        """Returns the same space, for passes that round to this dtype; rows keep theirs."""
        twin = copy.copy(self)
        twin.saw(dtype)
        return twin

    def smallest(self, most: int) -> ParameterSpace:
        """Selects the smallest of the parameters, up to ``most`` scalars in total; at least one parameter."""
        order = sorted(range(len(self.sizes)), key=lambda i: self.sizes[i])
        fit = [i for k, i in enumerate(order) if k == 0 or sum(self.sizes[j] for j in order[: k + 1]) <= most]
        twin, some = copy.copy(self), sorted(fit)
        twin.names = tuple(self.names[i] for i in some)
        twin.shapes = tuple(self.shapes[i] for i in some)
        twin.sizes = tuple(self.sizes[i] for i in some)
        twin.size = sum(twin.sizes)
        return twin

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """Turns tensors shaped like the parameters into one row [d]; tensors with k in front into rows [k, d]."""
        lead = tensors[0].shape[: tensors[0].dim() - len(self.shapes[0])]
        flat = [t.reshape(*lead, size).to(self.dtype) for t, size in zip(tensors, self.sizes, strict=True)]
        return torch.cat(flat, dim=-1)

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Turns a row [d] into tensors shaped like the parameters; rows [k, d] into tensors with k in front."""
        pieces, lead = rows.split(self.sizes, dim=-1), rows.shape[:-1]
        return tuple(piece.reshape(lead + shape) for piece, shape in zip(pieces, self.shapes, strict=True))


def _least_precise(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _select(model: nn.Module, trainable: dict[str, nn.Parameter], select: Selection) -> tuple[str, ...]:
    """Lists the names of the trainable parameters that ``params=`` asks for."""
    if callable(select) and not isinstance(select, nn.Module | type):
        chosen = {name for name, p in trainable.items() if _chooses(select, name, p)}
        if not chosen:
            raise ValueError("params: the predicate chose none of the trainable parameters; it gets (name, parameter)")
        return tuple(name for name in trainable if name in chosen)
    if isinstance(select, str | Tensor | nn.Module | Mapping) or not isinstance(select, Iterable):
        wanted: list[Any] = [select]
    else:
        wanted = list(select)
    if not wanted:
        raise ValueError(
            "params: expected at least one name, glob or Parameter, got an empty selection, or an iterator at its end"
        )
    first_name = {id(p): name for name, p in model.named_parameters()}
    every_name = dict(model.named_parameters(remove_duplicate=False))
    chosen = set()
    for item in wanted:
        if isinstance(item, str):
            hits = [p for name, p in every_name.items() if name == item or fnmatchcase(name, item)]
        elif isinstance(item, Tensor):
            hits = [p for p in every_name.values() if p is item]
        else:
            raise TypeError(f"params: expected names, globs or Parameters, got {_no_parameter(model, item)}")
        names = {first_name[id(p)] for p in hits} & trainable.keys()
        if not names:
            what = repr(item) if isinstance(item, str) else f"a tensor of shape {tuple(item.shape)}"
            why = "which has requires_grad=False" if hits else "which is no parameter of the model"
            if not hits and isinstance(item, str) and item and item in dict(model.named_modules()):
                why = f"which is a module, and no parameter; write '{item}.*'"
            raise ValueError(f"params: got {what}, {why}; choose among {', '.join(trainable)}")
        chosen |= names
    return tuple(name for name in trainable if name in chosen)


def _chooses(predicate: Callable[[str, nn.Parameter], Any], name: str, p: nn.Parameter) -> bool:
    try:
        inspect.signature(predicate).bind(name, p)
    except ValueError:  # it may not be written in Python
        pass
    except TypeError:
        raise TypeError("params: expected a predicate f(name, parameter), got one of other arguments") from None
    answer = predicate(name, p)
    if isinstance(answer, Tensor) and answer.numel() != 1:
        raise TypeError(f"params: expected a predicate that tells True or False, got a tensor for {name}")
    return bool(answer)


def _no_parameter(model: nn.Module, item: Any) -> str:
    """Says what was given in place of a name or a Parameter, and what to do."""
    kind = type(item).__name__
    if isinstance(item, nn.Module):
        names = [name for name, m in model.named_modules() if m is item]
        if names == [""]:
            return f"{kind}, the model itself; leave params out for all parameters"
        glob = f"'{names[0]}.*'" if names else "a glob of its name, as 'head.*'"
        return f"{kind}; write {glob}, or list(module.parameters())"
    if isinstance(item, Mapping):
        return f"{kind}; write list(...) for its keys, or list(....values())"
    if isinstance(item, tuple):
        return f"{kind}; of pairs (name, parameter) give either"
    return f"{kind} {item}" if isinstance(item, int | float) else kind

"""Rules: the derivative of one operator, read off its node in autograd's graph; of elementwise ops, moves and sums.

A rule is the linear map from tangents of an operator's inputs to that of its output, for many rows at once, and its
transpose. All tensors have the rows' dimension k in front; how they lie in memory is each rule's own choice.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node

from torch_influence.plan import NotPossible

Memory: TypeAlias = Literal["new", "view", "shared"]
Move: TypeAlias = Callable[[Tensor], Tensor]

_BEYOND = 1 << 63  # nodes show negative dimensions as unsigned numbers of 64 bits


class Site:
    """Where a rule applies: a node, and which of its inputs matter.

    Attributes:
        shape: of the operator's (first) output.
        inputs: shapes of its inputs; None for those that do not depend on the parameters.
    """

    def __init__(self, node: Node, inputs: Sequence[torch.Size | None]) -> None:
        self._node, self.inputs = node, inputs
        self.name: str = node.name()
        metadata: Any = node._input_metadata
        self.shapes = [torch.Size(one.shape) for one in metadata]
        self.shape = self.shapes[0]
        self.dtype: torch.dtype = metadata[0].dtype

    def saved(self, name: str) -> Any:
        """Returns what the node keeps under a name, tensors without their graph."""
        value = getattr(self._node, f"_saved_{name}")
        return value.detach() if isinstance(value, Tensor) else value

    def tensor(self, name: str) -> Tensor:
        value = self.saved(name)
        if not isinstance(value, Tensor):
            raise self.refused(f"without its {name}")
        return value

    def numbers(self, name: str) -> list[int]:
        """Lists integers, or a single one, negative ones too."""
        value = self.saved(name)
        some = [value] if isinstance(value, int) else value
        return [i - 2 * _BEYOND if i >= _BEYOND else i for i in some]

    def dims(self, name: str, of: int) -> list[int]:
        """Lists dimensions, as they are with the rows in front of ``of`` others."""
        return [d % of + 1 for d in self.numbers(name)]

    def pulled(self, cotangent: Tensor) -> list[Tensor | None]:
        """Asks the node itself to pull back one cotangent of its output."""
        call: Any = self._node
        with torch.no_grad():
            found = call(cotangent)
        return [None if g is None else g.detach() for g in (found if isinstance(found, tuple) else (found,))]

    @property
    def device(self) -> torch.device:
        metadata: Any = self._node._input_metadata
        device: torch.device = metadata[0].device
        return device

    def refused(self, why: str) -> NotPossible:
        return NotPossible(f"there is no rule for {self.name} {why}".rstrip())


class Rule:
    """The derivative of an operator.

    Attributes:
        pushed, pulled: whether results are "new" memory, a "view" of what is given, which may be written to if that
            may, or "shared": not to be written to.
        several: whether the outputs are a list; otherwise only the first of them may be used.
    """

    pushed: Memory = "new"
    pulled: Memory = "new"
    several = False

    def push(self, tangents: Sequence[Tensor | None], mine: Sequence[bool]) -> Any:
        """Maps tangents of the inputs, None for zero, to that of the output, a list where there are several.

        ``mine``: which of them may be overwritten. At least one is not None.
        """
        raise NotImplementedError

    def pull(self, cotangent: Any, mine: bool) -> Sequence[Tensor | None]:
        """Maps a cotangent of the output, or a list, to those of the inputs: the transpose of ``push``."""
        raise NotImplementedError

    def without(self, constant: Sequence[bool]) -> Rule:
        """Returns the rule where some inputs have become constants; what it pulls back to those is not used."""
        return self

    def gives_each(self, n: int) -> bool:
        """Tells whether ``each`` is known, for n examples."""
        return False

    def each(self) -> Callable[[Tensor], Tensor]:
        """Makes a function that pulls a row [1, n, ...] back to a first layer's parameters, for each example [n, p]."""
        raise NotImplementedError


class Weighted(Rule):
    """The sum of inputs, each times a factor: all elementwise operators, and broadcasting.

    Args:
        factors: per input that matters: a tensor that broadcasts with the output, or a number.
        as_if: a shape for each input, in which it broadcasts; None for its own.
    """

    pushed, pulled = "view", "view"

    def __init__(
        self,
        site: Site,
        factors: Sequence[Tensor | float | None],
        as_if: Sequence[Sequence[int] | None] | None = None,
    ) -> None:
        self.shape, self.inputs = site.shape, list(site.inputs)
        given = zip(factors, self.inputs, strict=False)
        self.factors = [1.0 if factor is None or shape is None else factor for factor, shape in given]
        self.views = [
            tuple(shape or () if view is None else view)
            for view, shape in zip(as_if or [None] * len(self.inputs), self.inputs, strict=True)
        ]

    def push(self, tangents: Sequence[Tensor | None], mine: Sequence[bool]) -> Tensor:
        total: Tensor | None = None
        own = False
        for tangent, its_own, factor, view in zip(tangents, mine, self.factors, self.views, strict=True):
            if tangent is None:
                continue
            k = len(tangent)
            term = tangent.reshape(k, *[1] * (len(self.shape) - len(view)), *view)
            if term.shape[1:] != self.shape:
                term, its_own = term.expand(k, *self.shape), False
            if not _is_one(factor):
                term, its_own = (term.mul_(factor) if its_own else term * factor), True
            if total is None:
                total, own = term, its_own
            elif own:
                total.add_(term)
            elif its_own:
                total, own = term.add_(total), True
            else:
                total, own = total + term, True
        assert total is not None
        # An expanded one is not to be written to, and "view" says that it may be.
        return total if own or not any(mine) else total.clone()

    def pull(self, cotangent: Tensor, mine: bool) -> Sequence[Tensor | None]:
        pulled: list[Tensor | None] = []
        alone = sum(shape is not None for shape in self.inputs) == 1
        for factor, shape, view in zip(self.factors, self.inputs, self.views, strict=True):
            if shape is None:
                pulled.append(None)
                continue
            term = cotangent
            if not _is_one(factor):
                term = cotangent.mul_(factor) if mine and alone else cotangent * factor
            pulled.append(summed_to(term, view).reshape(len(cotangent), *shape))
        return pulled

    def without(self, constant: Sequence[bool]) -> Rule:
        rule = copy.copy(self)
        rule.inputs = [None if c else shape for c, shape in zip(constant, self.inputs, strict=True)]
        rule.factors = [1.0 if c else factor for c, factor in zip(constant, self.factors, strict=True)]
        return rule


def _is_one(factor: Tensor | float) -> bool:
    return not isinstance(factor, Tensor) and factor == 1.0


def summed_to(t: Tensor, shape: Sequence[int]) -> Tensor:
    """Sums over what broadcasting a shape repeated; t has the rows in front."""
    extra = t.dim() - 1 - len(shape)
    dims = [*range(1, extra + 1)]
    dims += [i + extra + 1 for i, n in enumerate(shape) if n == 1 and t.shape[i + extra + 1] != 1]
    return (t.sum(dims, keepdim=True) if dims else t).reshape(len(t), *shape)


class Moved(Rule):
    """A linear map of one input by two functions: the way there and its transpose.

    ``kept``: tensors that the functions hold.
    """

    def __init__(self, there: Move, back: Move, pushed: Memory, pulled: Memory, kept: Any = ()) -> None:
        self.there, self.back, self.pushed, self.pulled, self.kept = there, back, pushed, pulled, kept

    def push(self, tangents: Sequence[Tensor | None], mine: Sequence[bool]) -> Tensor:
        (tangent,) = [t for t in tangents if t is not None]
        return self.there(tangent)

    def pull(self, cotangent: Tensor, mine: bool) -> Sequence[Tensor | None]:
        return [self.back(cotangent)]


# -- elementwise ------------------------------------------------------------------------------------------------------


def elementwise(site: Site) -> Rule:
    """Takes the derivatives from the node: what it makes of a cotangent of ones."""
    if any(shape is not None and shape != site.shape for shape in site.inputs):
        raise site.refused("with broadcasting")
    return Weighted(site, site.pulled(torch.ones((), dtype=site.dtype, device=site.device).expand(site.shape)))


def added(site: Site) -> Rule:
    return Weighted(site, [1.0, _real(site, "alpha")])


def subtracted(site: Site) -> Rule:
    return Weighted(site, [1.0, -_real(site, "alpha")])


def subtracted_from_number(site: Site) -> Rule:
    return Weighted(site, [-_real(site, "alpha")])


def multiplied(site: Site) -> Rule:
    by_first = site.tensor("other") if site.inputs[0] is not None else None
    return Weighted(site, [by_first, site.tensor("self") if site.inputs[1] is not None else None])


def divided(site: Site) -> Rule:
    other = site.tensor("other").to(site.dtype)  # it may be an integer
    by_second = -site.tensor("self") / other.square() if site.inputs[1] is not None else None
    return Weighted(site, [other.reciprocal(), by_second])


def multiplied_by_number(site: Site) -> Rule:
    return Weighted(site, [_real(site, "other")])


def divided_by_number(site: Site) -> Rule:
    return Weighted(site, [1.0 / _real(site, "other")])


def chosen(site: Site) -> Rule:
    condition = site.tensor("condition").to(site.dtype)
    return Weighted(site, [condition, 1 - condition])


def unchanged(site: Site) -> Rule:
    return Weighted(site, [1.0, *[None] * (len(site.inputs) - 1)])


def _real(site: Site, name: str) -> float:
    value = site.saved(name)
    if isinstance(value, complex):
        raise site.refused("of complex numbers")
    return float(value)


# -- moves ------------------------------------------------------------------------------------------------------------


def viewed(site: Site) -> Rule:
    shape, inner = site.shape, _input(site)
    return Moved(lambda t: t.reshape(len(t), *shape), lambda c: c.reshape(len(c), *inner), "view", "view")


def strided_again(site: Site) -> Rule:
    """Strides anew, as adaptive pooling to 1 x 1 does its result with channels last: the numbers are the same."""
    shape = site.shape
    if site.inputs[0] != shape or shape[2:].numel() != 1 or list(site.saved("stride")[:2]) != [shape[1], 1]:
        raise site.refused("of this kind")
    return unchanged(site)


def transposed(site: Site) -> Rule:
    return unchanged(site) if len(site.shape) < 2 else Moved(lambda t: t.mT, lambda c: c.mT, "view", "view")


def swapped(site: Site) -> Rule:
    (a,), (b,) = (site.dims(name, len(site.shape)) for name in ("dim0", "dim1"))
    return Moved(lambda t: t.transpose(a, b), lambda c: c.transpose(a, b), "view", "view")


def permuted(site: Site) -> Rule:
    order = [0, *site.dims("dims", len(site.shape))]
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return Moved(lambda t: t.permute(order), lambda c: c.permute(inverse), "view", "view")


def expanded(site: Site) -> Rule:
    shape, inner = site.shape, _input(site)

    def there(t: Tensor) -> Tensor:
        return t.reshape(len(t), *[1] * (len(shape) - len(inner)), *inner).expand(len(t), *shape)

    return Moved(there, lambda c: summed_to(c, inner), "shared", "view")


def repeated(site: Site) -> Rule:
    repeats, inner = site.saved("repeats"), _input(site)
    extra = len(repeats) - len(inner)
    pairs = [n for i, r in enumerate(repeats) for n in (r, 1 if i < extra else inner[i - extra])]

    def there(t: Tensor) -> Tensor:
        return t.reshape(len(t), *[1] * extra, *inner).repeat(1, *repeats)

    def back(c: Tensor) -> Tensor:
        split = c.reshape(len(c), *pairs)
        return split.sum([2 * i + 1 for i in range(len(repeats))]).reshape(len(c), *inner) if repeats else c

    return Moved(there, back, "new", "shared")


def sliced(site: Site) -> Rule:
    inner = _input(site)
    (dim,) = site.dims("dim", len(inner))
    some = slice(*(site.numbers(name)[0] for name in ("start", "end", "step")))
    where: Any = (*[slice(None)] * dim, some)
    return Moved(lambda t: t[where], lambda c: _put(c, inner, where), "view", "new")


def selected(site: Site) -> Rule:
    inner = _input(site)
    (dim,) = site.dims("dim", len(inner))
    where: Any = (*[slice(None)] * dim, *site.numbers("index"))
    return Moved(lambda t: t[where], lambda c: _put(c, inner, where), "view", "new")


def _put(c: Tensor, shape: torch.Size, where: Any) -> Tensor:
    whole = c.new_zeros(len(c), *shape)
    whole[where] = c
    return whole


def indexed(site: Site) -> Rule:
    inner, indices = _input(site), list(site.saved("indices"))
    used = [i for i, index in enumerate(indices) if index is not None]
    if used != [*range(used[0], used[-1] + 1)]:
        raise site.refused("with indices that are apart")
    where = [None, *(None if index is None else index.detach() for index in indices)]

    def back(c: Tensor) -> Tensor:
        return torch.ops.aten.index_put_(c.new_zeros(len(c), *inner), where, c, True)

    return Moved(lambda t: torch.ops.aten.index(t, where), back, "new", "new", where[1:])


def index_selected(site: Site) -> Rule:
    inner, index = _input(site), site.tensor("index")
    (dim,) = site.dims("dim", len(inner))
    return Moved(
        lambda t: t.index_select(dim, index),
        lambda c: c.new_zeros(len(c), *inner).index_add_(dim, index, c),
        "new",
        "new",
        index,
    )


def gathered(site: Site) -> Rule:
    return gather(_input(site), site.dims("dim", len(site.shape))[0], site.tensor("index"))


def gather(inner: torch.Size, dim: int, index: Tensor) -> Rule:
    """Takes elements along a dimension, by an index for each; adds them up on the way back."""
    return Moved(
        lambda t: t.gather(dim, index.expand(len(t), *index.shape)),
        lambda c: c.new_zeros(len(c), *inner).scatter_add_(dim, index.expand(len(c), *index.shape), c),
        "new",
        "new",
        index,
    )


def padded(site: Site) -> Rule:
    pad = site.numbers("pad")
    back = [-p for p in pad]
    pad_nd = torch.ops.aten.constant_pad_nd
    return Moved(lambda t: pad_nd(t, pad, 0.0), lambda c: pad_nd(c, back, 0.0), "new", "new")


class Joined(Rule):
    """Inputs one after the other along a dimension.

    ``starts``: where each begins; None for constants.
    """

    pulled = "shared"

    def __init__(self, site: Site, dim: int, starts: Sequence[int | None]) -> None:
        self.dim, self.starts, self.inputs, self.shape = dim, starts, site.inputs, site.shape

    def _parts(self, whole: Tensor) -> list[Tensor | None]:
        parts: list[Tensor | None] = []
        for start, shape in zip(self.starts, self.inputs, strict=True):
            if start is None or shape is None:
                parts.append(None)
            elif len(shape) < len(self.shape):  # stacked
                parts.append(whole.select(self.dim, start))
            else:
                parts.append(whole.narrow(self.dim, start, shape[self.dim - 1]))
        return parts

    def push(self, tangents: Sequence[Tensor | None], mine: Sequence[bool]) -> Tensor:
        some = next(t for t in tangents if t is not None)
        whole = some.new_zeros(len(some), *self.shape)
        for part, t in zip(self._parts(whole), tangents, strict=True):
            if part is not None and t is not None:
                part.copy_(t)
        return whole

    def pull(self, cotangent: Tensor, mine: bool) -> Sequence[Tensor | None]:
        return self._parts(cotangent)


def concatenated(site: Site) -> Rule:
    (dim,) = site.dims("dim", len(site.shape))
    # The node knows where its inputs begin: it is asked to pull back positions.
    positions = torch.arange(site.shape[dim - 1], dtype=site.dtype, device=site.device)
    parts = site.pulled(positions.view(-1, *[1] * (len(site.shape) - dim)).expand(site.shape))
    starts = [None if part is None or not part.numel() else int(part.flatten()[0]) for part in parts]
    return Joined(site, dim, starts)


def stacked(site: Site) -> Rule:
    (dim,) = site.dims("dim", len(site.shape))
    return Joined(site, dim, range(len(site.inputs)))


class Split(Rule):
    """Pieces of an input along a dimension: several outputs."""

    pushed, several = "shared", True

    def __init__(self, site: Site, dim: int, sizes: Sequence[int]) -> None:
        self.dim, self.sizes, self.shapes, self.inner = dim, sizes, site.shapes, _input(site)

    def push(self, tangents: Sequence[Tensor | None], mine: Sequence[bool]) -> Sequence[Tensor]:
        (t,) = tangents
        assert t is not None
        parts = t.split(list(self.sizes), self.dim)
        return [part.reshape(len(t), *shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def pull(self, cotangent: Sequence[Tensor | None], mine: bool) -> Sequence[Tensor | None]:
        some = next(c for c in cotangent if c is not None)
        parts = []
        for c, size in zip(cotangent, self.sizes, strict=True):
            shape = [len(some), *self.inner]
            shape[self.dim] = size
            parts.append(some.new_zeros(shape) if c is None else c.reshape(shape))
        return [torch.cat(parts, self.dim)]


def split(site: Site) -> Rule:
    (dim,) = site.dims("dim", len(site.shape))
    return Split(site, dim, [shape[dim - 1] for shape in site.shapes])


def unbound(site: Site) -> Rule:
    (dim,) = site.dims("dim", len(site.shape) + 1)
    return Split(site, dim, [1] * len(site.shapes))


# -- sums -------------------------------------------------------------------------------------------------------------


def total(site: Site) -> Rule:
    return _summed(site, all_of=True, mean=False)


def summed(site: Site) -> Rule:
    return _summed(site, all_of=False, mean=False)


def total_mean(site: Site) -> Rule:
    return _summed(site, all_of=True, mean=True)


def averaged(site: Site) -> Rule:
    return _summed(site, all_of=False, mean=True)


def _summed(site: Site, all_of: bool, mean: bool) -> Rule:
    inner = _input(site)
    dims = [] if all_of else site.dims("dim", len(inner))
    dims = dims or [*range(1, len(inner) + 1)]
    kept = [1 if i + 1 in dims else n for i, n in enumerate(inner)]
    count = math.prod(inner[d - 1] for d in dims) if inner else 1
    shape = site.shape

    def there(t: Tensor) -> Tensor:
        found = t.sum(dims) if inner else t
        return (found / count if mean else found).reshape(len(t), *shape)

    def back(c: Tensor) -> Tensor:
        return (c / count if mean else c).reshape(len(c), *kept).expand(len(c), *inner)

    return Moved(there, back, "shared", "shared")


def log_sum_exp(site: Site) -> Rule:
    inner, shape = _input(site), site.shape
    dims = site.dims("dim", len(inner))
    kept = [1 if i + 1 in dims else n for i, n in enumerate(inner)]
    p = (site.tensor("self") - site.tensor("result").reshape(kept)).exp()
    return Moved(
        lambda t: (t * p).sum(dims).reshape(len(t), *shape), lambda c: c.reshape(len(c), *kept) * p, "new", "new", p
    )


def softmax(site: Site) -> Rule:
    p, (dim,) = site.tensor("result"), site.dims("dim", len(site.shape))

    def there(t: Tensor) -> Tensor:
        weighted = t * p
        return weighted.sub_(p * weighted.sum(dim, keepdim=True))

    return Moved(there, there, "new", "new", p)


def log_softmax(site: Site) -> Rule:
    p, (dim,) = site.tensor("result").exp(), site.dims("dim", len(site.shape))
    return Moved(
        lambda t: t - (t * p).sum(dim, keepdim=True), lambda c: c - p * c.sum(dim, keepdim=True), "new", "new", p
    )


def _input(site: Site) -> torch.Size:
    shape = site.inputs[0]
    if shape is None or any(other is not None for other in site.inputs[1:]):
        raise site.refused("by this input")
    return shape

"""Rules of layers: matrix products, convolutions, pooling, norms, embeddings; and the table of all rules."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_influence.curvature import _rules
from torch_influence.curvature._rules import Moved, Rule, Site, Weighted, summed_to

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
_convolution_backward = torch.ops.aten.convolution_backward


def fold(t: Tensor, inner: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Makes rows and all but the last ``inner`` dimensions one, in the order of memory; and returns the way back."""
    k, outer = len(t), t.shape[1 : t.dim() - inner]
    if outer and t.stride(0) < t.stride(1):
        flat = t.movedim(0, len(outer)).reshape(-1, *t.shape[t.dim() - inner :])
        return flat, lambda out: out.reshape(*outer, k, *out.shape[1:]).movedim(len(outer), 0)
    return t.reshape(-1, *t.shape[t.dim() - inner :]), lambda out: out.reshape(k, *outer, *out.shape[1:])


# -- matrix products --------------------------------------------------------------------------------------------------


class Product(Rule):
    """beta · bias + alpha · x @ w for matrices x [n, f] and w [f, h].

    The tangents of k rows are [n, k, h] in memory: x @ vw is one product with [f, k h], its transpose one with
    [k h, n], and neither x nor a tangent is copied.
    """

    def __init__(self, site: Site, names: tuple[str, str], biased: bool) -> None:
        *bias, by_x, by_w = site.inputs
        self.bias = bias[0] if bias else None
        self.biased = biased
        self.alpha, self.beta = (float(site.saved(name)) if biased else 1.0 for name in ("alpha", "beta"))
        self.x = site.tensor(names[0]) if by_w is not None else None
        self.w = site.tensor(names[1]) if by_x is not None else None
        self.shape = site.shape

    def push(self, tangents: Sequence[Tensor | None], mine: Sequence[bool]) -> Tensor:
        *bias, vx, vw = tangents
        vb = bias[0] if bias else None
        n, h = self.shape
        k = len(next(t for t in tangents if t is not None))
        rows = None  # of the bias [k h], where it is one for all examples
        if vb is not None and self.bias == (h,):
            rows, vb = vb.reshape(k * h), None
        product: Tensor | None = None  # [n, k h]
        if vw is not None:
            assert self.x is not None
            wide = vw.mT.reshape(k * h, -1).mT
            if rows is None:
                product = self.x @ wide
                product = product.mul_(self.alpha) if self.alpha != 1.0 else product
            else:
                product = torch.addmm(rows, self.x, wide, beta=self.beta, alpha=self.alpha)
        elif rows is not None:
            product = (rows * self.beta).repeat(n, 1)
        if vb is not None:
            vb = (vb * self.beta).reshape(k, *[1] * (3 - vb.dim()), *vb.shape[1:]).transpose(0, 1)
            if product is None:
                product = vb.expand(n, k, h).clone(memory_format=torch.contiguous_format).view(n, k * h)
            else:
                product.view(n, k, h).add_(vb)
        if vx is not None:
            assert self.w is not None
            flat = vx.transpose(0, 1).reshape(n * k, -1)
            if product is None:
                product = flat @ self.w
                product = product.mul_(self.alpha) if self.alpha != 1.0 else product
            else:
                # With out=, since counters of operations do not know the operator in place.
                torch.addmm(product.view(n * k, h), flat, self.w, alpha=self.alpha, out=product.view(n * k, h))
        assert product is not None
        return product.view(n, k, h).transpose(0, 1)

    def pull(self, cotangent: Tensor, mine: bool) -> Sequence[Tensor | None]:
        k, (n, h) = len(cotangent), self.shape
        wide = cotangent.transpose(0, 1).reshape(n, k * h)
        to_x = to_w = None
        if self.w is not None:
            flat = wide.view(n * k, h) @ self.w.mT
            to_x = (flat if self.alpha == 1.0 else flat.mul_(self.alpha)).view(n, k, -1).transpose(0, 1)
        if self.x is not None:
            to_w = (wide.mT @ self.x).view(k, h, -1)
            to_w = (to_w if self.alpha == 1.0 else to_w.mul_(self.alpha)).mT
        if not self.biased:
            return [to_x, to_w]
        if self.bias is None:
            return [None, to_x, to_w]
        to_b = wide.sum(0).view(k, h) if self.bias == (h,) else summed_to(cotangent, self.bias).clone()
        return [to_b if self.beta == 1.0 else to_b * self.beta, to_x, to_w]

    def without(self, constant: Sequence[bool]) -> Rule:
        rule = copy.copy(self)
        *bias, of_x, of_w = constant
        rule.bias = None if bias and bias[0] else self.bias
        rule.w, rule.x = None if of_x else self.w, None if of_w else self.x
        return rule


def addmm(site: Site) -> Rule:
    return Product(site, ("mat1", "mat2"), biased=True)


def mm(site: Site) -> Rule:
    return Product(site, ("self", "mat2"), biased=False)


class BatchedProduct(Rule):
    """a @ b for matrices a [m, n, f] and b [m, f, h]."""

    def __init__(self, site: Site) -> None:
        self.a = site.tensor("self") if site.inputs[1] is not None else None
        self.b = site.tensor("mat2") if site.inputs[0] is not None else None

    def push(self, tangents: Sequence[Tensor | None], mine: Sequence[bool]) -> Tensor:
        va, vb = tangents
        total: Tensor | None = None
        if va is not None:
            assert self.b is not None
            total = _many_times_one(va, self.b)
        if vb is not None:
            assert self.a is not None
            more = _many_times_one(vb.mT, self.a.mT).mT
            total = more if total is None else total.add_(more)
        assert total is not None
        return total

    def pull(self, cotangent: Tensor, mine: bool) -> Sequence[Tensor | None]:
        to_a = None if self.b is None else _many_times_one(cotangent, self.b.mT)
        to_b = None if self.a is None else _many_times_one(cotangent.mT, self.a).mT
        return [to_a, to_b]

    def without(self, constant: Sequence[bool]) -> Rule:
        rule = copy.copy(self)
        rule.b, rule.a = None if constant[0] else self.b, None if constant[1] else self.a
        return rule


def _many_times_one(many: Tensor, one: Tensor) -> Tensor:
    """Multiplies k batches of matrices [k, m, n, f] by one [m, f, h], of which no copy is made."""
    k, m, n, f = many.shape
    return torch.bmm(many.transpose(0, 1).reshape(m, k * n, f), one).view(m, k, n, -1).transpose(0, 1)


# -- convolutions -----------------------------------------------------------------------------------------------------


class Convolution(Rule):
    """A convolution of x [n, i, ...] with w [o, i, ...]: of each derivative, what is needed."""

    def __init__(self, site: Site) -> None:
        by_x, by_w, by_b = site.inputs
        self.x, self.w = site.tensor("input"), site.tensor("weight")
        self.of_x, self.of_w, self.of_b = by_x is not None, by_w is not None, by_b is not None
        names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
        self.options: list[Any] = [list(v) if isinstance(v, tuple) else v for v in map(site.saved, names)]
        self.transposed, self.groups = bool(self.options[3]), int(self.options[5])
        self.shape = site.shape
        self.format = format_of(self.x, self.w)
        if not self.of_w:  # only its sizes matter
            self.x = self.x.new_empty(()).expand(self.x.shape)

    def push(self, tangents: Sequence[Tensor | None], mine: Sequence[bool]) -> Tensor:
        vx, vw, vb = tangents
        total: Tensor | None = None
        if vx is not None:
            flat, unfold = fold(vx, self.x.dim() - 1)
            bias = vb[0] if vb is not None and len(vb) == 1 else None
            total = unfold(torch.convolution(flat, self.w, bias, *self.options))
            vb = None if bias is not None else vb
        if vw is not None:
            bias = vb[0] if vb is not None and len(vb) == 1 else None
            more = self._by_weight(vw, bias)
            vb = None if bias is not None else vb
            total = more if total is None else total.add_(more)
        if vb is not None:
            vb = vb.reshape(len(vb), 1, -1, *[1] * (self.x.dim() - 2))
            total = vb.expand(len(vb), *self.shape).clone() if total is None else total.add_(vb)
        assert total is not None
        return total

    def _by_weight(self, vw: Tensor, bias: Tensor | None) -> Tensor:
        k, o = len(vw), vw.shape[1]
        if k == 1 or self.transposed:
            each = [torch.convolution(self.x, v.clone(memory_format=self.format), bias, *self.options) for v in vw]
            return each[0][None] if k == 1 else torch.stack(each)
        g, n = self.groups, len(self.x)
        wide = vw.reshape(k, g, o // g, *vw.shape[2:]).transpose(0, 1).reshape(k * o, *vw.shape[2:])
        found = torch.convolution(self.x, wide.clone(memory_format=self.format), None, *self.options)
        places = found.shape[2:]
        return found.view(n, g, k, o // g, *places).movedim(2, 0).reshape(k, n, o, *places)

    def pull(self, cotangent: Tensor, mine: bool) -> Sequence[Tensor | None]:
        k, dims = len(cotangent), self.x.dim()
        to_x = to_w = to_b = None
        if self.of_x:
            flat, unfold = fold(cotangent, dims - 1)
            sizes = _empty(flat, [len(flat), *self.x.shape[1:]], self.format)
            to_x = unfold(_convolution_backward(flat, sizes, self.w, None, *self.options, (True, False, False))[0])
        if self.of_w:
            to_w = self._to_weight(cotangent)
        if self.of_b:
            to_b = cotangent.sum([1, *range(3, dims + 1)])
        assert k == len(cotangent)
        return [to_x, to_w, to_b]

    def _to_weight(self, c: Tensor) -> Tensor:
        k, n, o = c.shape[:3]
        only_w = (False, True, False)
        if k == 1 or self.transposed:
            each = [_convolution_backward(one, self.x, self.w, None, *self.options, only_w)[1] for one in c]
            return each[0][None] if k == 1 else torch.stack(each)
        g, places = self.groups, c.shape[3:]
        wide = c.reshape(k, n, g, o // g, *places).movedim(0, 2).reshape(n, k * o, *places)
        like = self.w.new_empty(()).expand(k * o, *self.w.shape[1:])
        found = _convolution_backward(wide, self.x, like, None, *self.options, only_w)[1]
        return found.reshape(g, k, o // g, *found.shape[1:]).transpose(0, 1).reshape(k, o, *found.shape[1:])

    def without(self, constant: Sequence[bool]) -> Rule:
        rule = copy.copy(self)
        of_x, of_w, of_b = constant
        rule.of_x, rule.of_w, rule.of_b = self.of_x and not of_x, self.of_w and not of_w, self.of_b and not of_b
        return rule

    def gives_each(self, n: int) -> bool:
        plain = not self.transposed and self.groups == 1 and self.x.dim() == 4
        return plain and not self.of_x and self.shape[0] == n

    def each(self) -> Callable[[Tensor], Tensor]:
        n, o = self.shape[:2]
        stride, padding, dilation = self.options[:3]
        patches = F.unfold(self.x, self.w.shape[2:], dilation, padding, stride).mT if self.of_w else None

        def pull(cotangent: Tensor) -> Tensor:
            g, parts = cotangent.reshape(n, o, -1), []
            if patches is not None:
                parts.append((g @ patches).reshape(n, -1))
            if self.of_b:
                parts.append(g.sum(-1))
            return torch.cat(parts, dim=1)

        return pull


def format_of(*tensors: Tensor) -> torch.memory_format:
    """Returns the memory format of images: with channels last where one of them has it."""
    last = _FORMATS.get(tensors[0].dim())
    # By strides, since a tensor with one channel is contiguous in both formats.
    if last is None or not any(t.stride(1) == 1 and t.shape[2:].numel() > 1 for t in tensors):
        return torch.contiguous_format
    return last


def _empty(like: Tensor, sizes: Sequence[int], memory: torch.memory_format) -> Tensor:
    return torch.empty(sizes, dtype=like.dtype, device=like.device, memory_format=memory)


# -- pooling ----------------------------------------------------------------------------------------------------------


def _of_images(site: Site, inner: int, there: Any, back: Any) -> Rule:
    """Applies functions of [*, channels, *places] to all rows; ``back`` takes an empty tensor of the input's sizes."""
    x = site.tensor("self")
    sizes, memory = x.shape[x.dim() - inner :], format_of(x)

    def push(t: Tensor) -> Tensor:
        flat, unfold = fold(t, inner)
        return unfold(there(flat))

    def pull(c: Tensor) -> Tensor:
        flat, unfold = fold(c, inner)
        flat = flat.contiguous(memory_format=memory)  # it is smaller than the result
        return unfold(back(flat, _empty(flat, [len(flat), *sizes], memory)))

    return Moved(push, pull, "new", "new")


def average_pool(site: Site, dims: int) -> Rule:
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    options = [list(v) if isinstance(v, tuple) else v for v in map(site.saved, names)]
    forward = getattr(torch.ops.aten, f"avg_pool{dims}d")
    backward = getattr(torch.ops.aten, f"avg_pool{dims}d_backward")
    return _of_images(site, dims + 1, lambda t: forward(t, *options), lambda c, like: backward(c, like, *options))


def average_pool_2d(site: Site) -> Rule:
    return average_pool(site, 2)


def average_pool_3d(site: Site) -> Rule:
    return average_pool(site, 3)


def adaptive_average_pool(site: Site) -> Rule:
    size = list(site.shape[-2:])
    aten = torch.ops.aten
    return _of_images(
        site,
        3,
        lambda t: aten._adaptive_avg_pool2d(t, size),
        lambda c, like: aten._adaptive_avg_pool2d_backward(c, like),
    )


def max_pool(site: Site) -> Rule:
    index, of = site.tensor("result1").flatten(-2), site.inputs[0]
    assert of is not None
    shape, flat = site.shape, torch.Size([*of[:-2], of[-2] * of[-1]])
    along = _rules.gather(flat, len(flat), index)

    def there(t: Tensor) -> Tensor:
        found: Tensor = along.push([t.flatten(-2)], [False])
        return found.reshape(len(t), *shape)

    def back(c: Tensor) -> Tensor:
        (found,) = along.pull(c.flatten(-2), False)
        assert found is not None
        return found.reshape(len(c), *of)

    return Moved(there, back, "new", "new", index)


# -- norms ------------------------------------------------------------------------------------------------------------


def batch_norm(site: Site) -> Rule:
    """Scales and moves each channel, by running statistics."""
    mean, var, w = (site.saved(name) for name in ("running_mean", "running_var", "weight"))
    if site.saved("training") or mean is None or var is None:
        raise site.refused("with statistics of the batch")
    channel = [-1, *[1] * (len(site.shape) - 2)]
    scale = (var + site.saved("eps")).rsqrt()
    normed = None
    if site.inputs[1] is not None:
        normed = (site.tensor("input") - mean.view(channel)) * scale.view(channel)
    factor = (scale if w is None else scale * w).to(site.dtype).view(channel)
    return Weighted(site, [factor, normed, 1.0], [None, factor.shape, factor.shape])


class Normed(Rule):
    """Norms over groups of an example's features: y = w x̂ + b, with x̂ of mean 0 and mean square 1 in each group.

    Args:
        normed, scale: x̂ [groups, size], and 1/σ of each group [groups, 1].
        weight: w, which broadcasts with the output; None for ones.
        views: shapes in which w and b broadcast with it.
    """

    def __init__(self, site: Site, normed: Tensor, scale: Tensor, weight: Tensor | None, view: Sequence[int]) -> None:
        self.of_x, self.of_w, self.of_b = (shape is not None for shape in site.inputs)
        self.shape, self.view, self.inputs = site.shape, view, site.inputs
        self.normed, self.scale = normed, scale
        self.weight = None if weight is None else weight.view(view)

    def _project(self, t: Tensor) -> Tensor:
        """Multiplies by ∂x̂/∂x, which is symmetric."""
        grouped = t.reshape(len(t), *self.normed.shape)
        along = (grouped * self.normed).mean(-1, keepdim=True)
        moved = grouped - grouped.mean(-1, keepdim=True)
        return moved.addcmul_(self.normed, along, value=-1).mul_(self.scale).reshape(len(t), *self.shape)

    def push(self, tangents: Sequence[Tensor | None], mine: Sequence[bool]) -> Tensor:
        vx, vw, vb = tangents
        k = len(next(t for t in tangents if t is not None))
        total: Tensor | None = None
        if vx is not None:
            total = self._project(vx)
            total = total if self.weight is None else total.mul_(self.weight)
        if vw is not None:
            more = vw.reshape(k, *self.view) * self.normed.view(self.shape)
            total = more if total is None else total.add_(more)
        if vb is not None:
            vb = vb.reshape(k, *self.view)
            total = vb.expand(k, *self.shape).clone() if total is None else total.add_(vb)
        assert total is not None
        return total

    def pull(self, cotangent: Tensor, mine: bool) -> Sequence[Tensor | None]:
        to_x = to_w = to_b = None
        k = len(cotangent)
        if self.of_w:
            to_w = summed_to(cotangent * self.normed.view(self.shape), self.view).reshape(k, *(self.inputs[1] or ()))
        if self.of_b:
            to_b = summed_to(cotangent, self.view).reshape(k, *(self.inputs[2] or ())).clone()
        if self.of_x:
            to_x = self._project(cotangent if self.weight is None else cotangent * self.weight)
        return [to_x, to_w, to_b]


def layer_norm(site: Site) -> Rule:
    x, mean, scale = (site.tensor(name) for name in ("input", "result1", "result2"))
    size = math.prod(site.saved("normalized_shape"))
    view = [*[1] * (len(site.shape) - len(site.saved("normalized_shape"))), *site.saved("normalized_shape")]
    mean, scale = mean.reshape(-1, 1), scale.reshape(-1, 1)
    return Normed(site, (x.reshape(-1, size) - mean) * scale, scale, site.saved("weight"), view)


def group_norm(site: Site) -> Rule:
    x, mean, scale = (site.tensor(name) for name in ("input", "result1", "result2"))
    mean, scale = mean.reshape(-1, 1), scale.reshape(-1, 1)
    view = [1, site.saved("C"), *[1] * (len(site.shape) - 2)]
    return Normed(site, (x.reshape(len(mean), -1) - mean) * scale, scale, site.saved("weight"), view)


# -- tables -----------------------------------------------------------------------------------------------------------


def embedding(site: Site) -> Rule:
    index, of, padding = site.tensor("indices"), site.inputs[0], site.numbers("padding_idx")[0]
    if site.saved("sparse") or site.saved("scale_grad_by_freq"):
        raise site.refused("with sparse or scaled gradients")
    assert of is not None
    flat, shape = index.reshape(-1), site.shape
    real = (flat != padding)[:, None] if padding >= 0 else None

    def there(t: Tensor) -> Tensor:
        rows = t.index_select(1, flat)
        return (rows if real is None else rows * real).reshape(len(t), *shape)

    def back(c: Tensor) -> Tensor:
        rows = c.reshape(len(c), len(flat), of[1])
        return c.new_zeros(len(c), *of).index_add_(1, flat, rows if real is None else rows * real)

    return Moved(there, back, "new", "new", [flat, real])


_ELEMENTWISE = """
    Abs Addcmul Celu ClampMax ClampMin Cos Elu Erf Exp Expm1 Gelu Hardshrink Hardsigmoid Hardswish Hardtanh
    LeakyRelu Lerp Log Log1P LogSigmoid MaskedFill Maximum Minimum Mish Neg Pow Reciprocal Relu Rsqrt Sigmoid Silu
    Sin Softplus Softshrink Sqrt Tanh Threshold
"""
RULES: dict[str, Callable[[Site], Rule]] = {
    **{f"{name}Backward0": _rules.elementwise for name in _ELEMENTWISE.split()},
    "PowBackward1": _rules.elementwise,
    "ClampBackward1": _rules.elementwise,
    "AddBackward0": _rules.added,
    "AddBackward1": _rules.unchanged,
    "SubBackward0": _rules.subtracted,
    "SubBackward1": _rules.unchanged,
    "RsubBackward1": _rules.subtracted_from_number,
    "MulBackward0": _rules.multiplied,
    "MulBackward1": _rules.multiplied_by_number,
    "DivBackward0": _rules.divided,
    "DivBackward1": _rules.divided_by_number,
    "WhereBackward0": _rules.chosen,
    "CloneBackward0": _rules.unchanged,
    "AliasBackward0": _rules.unchanged,
    "ViewBackward0": _rules.viewed,
    "UnsafeViewBackward0": _rules.viewed,
    "ReshapeAliasBackward0": _rules.viewed,
    "UnsqueezeBackward0": _rules.viewed,
    "SqueezeBackward0": _rules.viewed,
    "SqueezeBackward1": _rules.viewed,
    "SqueezeBackward2": _rules.viewed,
    "TBackward0": _rules.transposed,
    "TransposeBackward0": _rules.swapped,
    "TransposeBackward1": _rules.swapped,
    "PermuteBackward0": _rules.permuted,
    "ExpandBackward0": _rules.expanded,
    "RepeatBackward0": _rules.repeated,
    "SliceBackward0": _rules.sliced,
    "SelectBackward0": _rules.selected,
    "IndexBackward0": _rules.indexed,
    "IndexSelectBackward0": _rules.index_selected,
    "GatherBackward0": _rules.gathered,
    "ConstantPadNdBackward0": _rules.padded,
    "CatBackward0": _rules.concatenated,
    "StackBackward0": _rules.stacked,
    "SplitBackward0": _rules.split,
    "SplitWithSizesBackward0": _rules.split,
    "UnsafeSplitBackward0": _rules.split,
    "UnbindBackward0": _rules.unbound,
    "SumBackward0": _rules.total,
    "SumBackward1": _rules.summed,
    "MeanBackward0": _rules.total_mean,
    "MeanBackward1": _rules.averaged,
    "LogsumexpBackward0": _rules.log_sum_exp,
    "SoftmaxBackward0": _rules.softmax,
    "SafeSoftmaxBackward0": _rules.softmax,
    "LogSoftmaxBackward0": _rules.log_softmax,
    "AddmmBackward0": addmm,
    "MmBackward0": mm,
    "BmmBackward0": BatchedProduct,
    "ConvolutionBackward0": Convolution,
    "AsStridedBackward1": _rules.strided_again,
    "AvgPool2DBackward0": average_pool_2d,
    "AvgPool3DBackward0": average_pool_3d,
    "AdaptiveAvgPool2DBackward0": adaptive_average_pool,
    "MaxPool2DWithIndicesBackward0": max_pool,
    "AdaptiveMaxPool2DBackward0": max_pool,
    "NativeBatchNormBackward0": batch_norm,
    "NativeLayerNormBackward0": layer_norm,
    "NativeGroupNormBackward0": group_norm,
    "EmbeddingBackward0": embedding,
}

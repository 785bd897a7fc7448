"""Convolutions for curvature: a double backward that computes only what is used, and a faster memory format.

torch's double backward of a convolution always computes the derivatives by the input, the weight and the incoming
gradient: a Gauss-Newton product needs one of the three, the Hessian of a first layer two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}  # and how many dimensions they have
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


class Convolutions(TorchFunctionMode):
    """A mode in which convolutions have the same values and derivatives, and their graphs do less.

    Args:
        fixed: the backward pass will be differentiated by incoming gradients alone; it is linear in them.
    """

    def __init__(self, fixed: bool) -> None:
        super().__init__()
        self._fixed = fixed

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        dimensions = _CONVOLUTIONS.get(func)
        if dimensions is None:
            return func(*args, **(kwargs or {}))
        return _convolve(func, dimensions, self._fixed, *args, **(kwargs or {}))


def convolves(model: nn.Module) -> bool:
    """Tells whether the model has convolutional layers: the mode costs time at every call of torch."""
    return any(isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d) for m in model.modules())


def channels_last(leaves: Sequence[Tensor], model: nn.Module, current: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns the leaves, with weights of convolutions in a memory format that outputs and later layers take over.

    On the CPU, this makes pooling and gradients of weights several times faster.
    """
    # Cloned: contiguous() and to() leave the strides of weights with one input channel, which fit either order.
    weights = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)}
    return tuple(
        leaf.detach().clone(memory_format=_FORMATS[leaf.dim()]).requires_grad_()
        if id(p) in weights and leaf.device.type == "cpu" and leaf.dim() in _FORMATS
        else leaf
        for leaf, p in zip(leaves, current, strict=True)
    )


def _convolve(
    func: Callable[..., Tensor],
    dimensions: int,
    fixed: bool,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    if isinstance(padding, str) or input.dim() != dimensions + 2 or torch.is_autocast_enabled(input.device.type):
        return func(input, weight, bias, stride, padding, dilation, groups)
    each = [_per_dimension(option, dimensions) for option in (stride, padding, dilation)]
    options = (*each, False, [0] * dimensions, groups)
    output: Tensor = _Convolution.apply(input, weight, bias, options, fixed)
    return output


def _per_dimension(option: Any, dimensions: int) -> list[int]:
    values = [option] if isinstance(option, int) else list(option)
    return values * dimensions if len(values) == 1 else values


class _Convolution(torch.autograd.Function):
    """The convolution x * w + b; the options are those of ``torch.convolution`` after the tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, options: Any, fixed: bool) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.options, ctx.fixed = options, fixed
        ctx.bias = None if b is None else list(b.shape)
        return torch.convolution(x, w, b, *options)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        wanted = tuple(ctx.needs_input_grad[:3])
        if not torch.is_grad_enabled():
            return (*_pull_back(g, x, w, ctx.bias, ctx.options, wanted), None, None)
        if ctx.fixed:
            x, w = x.detach(), w.detach()
        return (*_PullBack.apply(g, x, w, ctx.bias, ctx.options, wanted), None, None)


class _PullBack(torch.autograd.Function):
    """The gradients of a convolution by x, w and b: linear in g, and in x and w."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, bias: Any, options: Any, wanted: Any) -> Any:
        fixed = not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        ctx.save_for_backward(None if fixed else g, x, w)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return _pull_back(g, x, w, bias, options, wanted)

    @staticmethod
    def backward(ctx: Any, vx: Tensor | None, vw: Tensor | None, vb: Tensor | None) -> Any:
        g, x, w = ctx.saved_tensors
        _, by_x, by_w = ctx.needs_input_grad[:3]
        to_g = to_x = to_w = None
        if vx is not None:
            to_g = torch.convolution(vx, w, None, *ctx.options)
            to_w = _pull_back(g, vx, w, None, ctx.options, (False, True, False))[1] if by_w else None
        if vw is not None:
            vw = _ordered(vw, w)
            more = torch.convolution(x, vw, vb, *ctx.options)
            to_g = more if to_g is None else to_g.add_(more)
            to_x = _pull_back(g, x, vw, None, ctx.options, (True, False, False))[0] if by_x else None
        elif vb is not None:  # only the bias is differentiated by
            more = torch.convolution(x, torch.zeros_like(w), vb, *ctx.options)
            to_g = more if to_g is None else to_g.add_(more)
        return to_g, to_x, to_w, None, None, None


def _pull_back(g: Tensor, x: Tensor, w: Tensor, bias: Any, options: Any, wanted: tuple[bool, ...]) -> Any:
    by_x, by_w, by_b = wanted
    to_x, to_w, _ = torch.ops.aten.convolution_backward(g, x, w, bias, *options, (by_x, by_w, False))
    # Three times as fast as the same operator with the bias, on the CPU.
    return to_x, to_w, g.sum([0, *range(2, g.dim())]) if by_b else None


def _ordered(weight: Tensor, like: Tensor) -> Tensor:
    """Copies a weight into the memory format of another, by operators that vmap has."""
    if like.dim() not in _FORMATS or like.stride(1) != 1:
        return weight
    return weight.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)

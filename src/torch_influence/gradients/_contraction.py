"""Per-example gradients times vectors, from what goes into layers and comes back: no gradient is formed whole.

The gradient of a layer's parameters is a function of its inputs and of the gradients of its outputs. For a linear
layer it is Σₜ gₜ aₜᵀ, whose products with many vectors need neither it nor a backward pass for each of them
(``ops.grad_dot``). A convolution is a linear layer of patches, an embedding one of one-hot inputs; the gradients of
what scales and shifts normalised features are as short as these. Elsewhere gradients are formed, layer by layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torch_influence.evaluation import Evaluation, shifted
from torch_influence.gradients._mean import differentiate
from torch_influence.ops import grad_dot

BatchOf = Callable[[Sequence[Tensor]], Any]

_TILE = 2**22  # elements of what is formed at once: patches, gradients of some output channels, rows of embeddings
_COPIED = 32  # multiplications that take as long as copying an element of a patch does (measured: 20 to 60)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer whose kind is known, and where its parameters stand in a row.

    Attributes:
        module: the layer.
        add_dots: adds the products of a call's gradients with vectors.
        weight, bias: columns of a row; None: not differentiated, or its gradient is formed.
    """

    module: Any
    add_dots: Callable[[Layer, Tensor, Tensor, Tensor, Tensor], None]
    weight: slice | None
    bias: slice | None


class Pairs(NamedTuple):
    """Holds what went into layers and what came back.

    Attributes:
        m: of so many batches of one.
        layers: for each layer, the inputs [m, ...] and output gradients [m, ...] of each of its calls.
        rest: the gradients [m, size] of parameters that no layer accounts for.
    """

    m: int
    layers: Sequence[Sequence[tuple[Tensor, Tensor]]]
    rest: Sequence[Tensor]


class Contraction:
    """The products of per-example gradients with vectors, for batches of one.

    A parameter is accounted for if all layers that own it are of a known kind and called: its gradient is the sum over
    all their calls. The gradients of the others are formed. The caller must verify that no parameter is used without a
    call of its layer.

    Args:
        loss: of leaves and a batch.
        evaluation: of the model.

    Attributes:
        layers: those of known kinds that account for parameters.
        example_bytes: size of an example's inputs, output gradients and formed gradients.
    """

    def __init__(self, loss: Callable[[Sequence[Tensor], Any], Tensor], evaluation: Evaluation) -> None:
        self._loss = loss
        self._evaluation = evaluation
        self._space = evaluation.space
        self._known = {m: kind for m in evaluation.model.modules() if (kind := _kind(m)) is not None}
        pictures = {id(m.weight) for m in self._known if isinstance(m, nn.Conv2d)}
        self._leaves = tuple(
            _channels_last(p.detach()) if id(p) in pictures else p.detach() for p in evaluation.space.current()
        )
        self._of_pictures = any(id(p) in pictures for p in evaluation.space.current())
        self.example_bytes = 0
        self._account_for(self._known.keys())

    @property
    def rest(self) -> int:
        """The number of entries of a row whose gradients are formed, since no layer accounts for them."""
        return sum(self._space.sizes[i] for i in self._rest)

    def look(self, batch: Any) -> None:
        """Notes which layers a batch passes through; the gradients of the other layers' parameters will be formed."""
        modules = list(self._known)
        with torch.no_grad(), shifted(modules, [None] * len(modules)) as calls:
            self._loss(self._leaves, batch)
        by_module = dict(zip(modules, calls, strict=True))
        self._account_for({module for module, its in by_module.items() if its.outputs})
        used = [by_module[layer.module] for layer in self.layers]
        self._shapes = [its.outputs for its in used]
        self.example_bytes = sum(t.nbytes for its in used for t in [*its.inputs, *its.outputs]) + 4 * self.rest

    def pairs(self, batch_of: BatchOf, tensors: Sequence[Tensor]) -> Pairs:
        """Passes m batches of one through the layers and back; they are made by ``batch_of`` from stacked tensors.

        ``look`` must have been called before.
        """
        m, modules = len(tensors[0]), [layer.module for layer in self.layers]
        shifts = [[torch.zeros_like(shape) for shape in shapes] for shapes in self._shapes]

        def loss(shifts: Sequence[Sequence[Tensor]], others: Sequence[Tensor], parts: Sequence[Tensor]) -> Any:
            leaves = list(self._leaves)
            for i, leaf in zip(self._rest, others, strict=True):
                leaves[i] = leaf
            with shifted(modules, shifts) as calls:
                value = self._loss(leaves, batch_of(parts))
            return value, [its.inputs for its in calls]

        if self._rest or self._of_pictures:  # vmap alone can't ask whether a tensor is in channels_last
            gradient = torch.func.grad(loss, argnums=(0, 1), has_aux=True)
            rest = [self._leaves[i] for i in self._rest]
            (slopes, others), inputs = torch.vmap(gradient, in_dims=(None, None, 0))(shifts, rest, list(tensors))
        else:  # a plain backward: for torch.func.grad a new process imports torch's compiler, in most of a second
            shifts = [[shift.expand(m, *shift.shape).requires_grad_() for shift in its] for its in shifts]
            losses, inputs = torch.vmap(loss, in_dims=(0, None, 0))(shifts, [], list(tensors))
            found = iter(differentiate(losses.sum(), [shift for its in shifts for shift in its]))
            slopes, others = [[next(found) for _ in its] for its in shifts], ()
        of_layers = [
            [(a.detach(), g.detach()) for a, g in zip(*its, strict=True)] for its in zip(inputs, slopes, strict=True)
        ]
        return Pairs(m, of_layers, [g.detach().flatten(1) for g in others])

    def dots(self, pairs: Pairs, vectors: Tensor) -> Tensor:
        """Computes gᵢ·vⱼ [m, k] with vectors [k, d]."""
        dots = vectors.new_zeros(pairs.m, len(vectors))
        for layer, its in zip(self.layers, pairs.layers, strict=True):
            for a, g in its:
                layer.add_dots(layer, a, g, vectors, dots)
        for i, g in zip(self._rest, pairs.rest, strict=True):
            _add(dots, g, vectors, self._columns(i))
        return dots

    def _account_for(self, modules: Any) -> None:
        """Finds ``layers``, among these modules, and ``_rest``, the places of all other parameters."""
        mine = {m: kind for m, kind in self._known.items() if m in modules}
        owners: dict[int, list[nn.Module]] = {}
        for module in self._evaluation.model.modules():
            for p in module._parameters.values():
                owners.setdefault(id(p), []).append(module)
        current = self._space.current()
        self._rest = [i for i, p in enumerate(current) if not all(m in mine for m in owners[id(p)])]
        columns = {id(p): self._columns(i) for i, p in enumerate(current) if i not in self._rest}
        found = [
            Layer(m, kind, *(columns.get(id(m._parameters.get(name))) for name in ("weight", "bias")))
            for m, kind in mine.items()
        ]
        self.layers = [layer for layer in found if layer.weight is not None or layer.bias is not None]

    def _columns(self, i: int) -> slice:
        start = sum(self._space.sizes[:i])
        return slice(start, start + self._space.sizes[i])


def _channels_last(weight: Tensor) -> Tensor:
    """Copies a weight into channels_last on the CPU: outputs take it over, and convolutions and pooling are faster."""
    # Not contiguous(): that leaves the strides of a weight with one input channel, and outputs follow the strides.
    return weight.clone(memory_format=torch.channels_last) if weight.device.type == "cpu" else weight


def _add(dots: Tensor, gradients: Tensor, vectors: Tensor, columns: slice | None) -> None:
    """Adds the products of gradients [m, size] with these columns of the vectors."""
    if columns is not None:
        dots.addmm_(gradients.to(vectors.dtype), vectors[:, columns].mT)


# -- kinds of layers: inputs a [m, ...] and output gradients g [m, ...] of a call for each of m examples ---------------


def _linear(layer: Layer, a: Tensor, g: Tensor, vectors: Tensor, dots: Tensor) -> None:
    a, g = (t.reshape(len(t), -1, t.shape[-1]) for t in (a, g))
    weight, bias = layer.weight, layer.bias
    if weight is not None and bias is not None and bias.start == weight.stop:
        grad_dot(a, g, vectors[:, weight.start : bias.stop], True, dots)
        return
    if weight is not None:
        grad_dot(a, g, vectors[:, weight], False, dots)
    _add(dots, g.sum(1, dtype=vectors.dtype), vectors, bias)


def _conv(layer: Layer, a: Tensor, g: Tensor, vectors: Tensor, dots: Tensor) -> None:
    """Adds ⟨g, conv(a, Sⱼ)⟩ for few vectors; for many, forms gradients from patches, some output channels at a time.

    Per example, with o output channels of a group, f weights for each and L positions, k·o·f·L multiplications against
    (L + k)·o·f and f·L elements copied.
    """
    module, m, k = layer.module, len(a), len(vectors)
    axes, groups = len(module.kernel_size), module.groups
    a, g = (t.reshape(m, -1, *t.shape[-axes - 1 :]).to(vectors.dtype) for t in (a, g))  # [m, p, channels, ...]
    if layer.bias is not None:
        _add(dots, g.flatten(3).sum((1, 3)), vectors, layer.bias)
    if layer.weight is None:
        return
    o, f, positions = module.out_channels // groups, module.weight[0].numel(), g[0, :, 0].numel()
    if k * o <= o + k * o / positions + _COPIED:
        convolution = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
        x = _padded(module, a.flatten(0, 1))
        for j, s in enumerate(vectors[:, layer.weight].unflatten(1, module.weight.shape)):
            s = _channels_last(s) if axes == 2 else s
            y = convolution(x, s, None, module.stride, 0, module.dilation, groups).mul_(g.flatten(0, 1))
            dots[:, j] += y.flatten(2).sum((1, 2)).reshape(m, -1).sum(1)
        return
    g = g.flatten(3).unflatten(2, (groups, o)).permute(0, 2, 3, 1, 4).flatten(3)  # [m, groups, o, positions]
    pieces = vectors[:, layer.weight].unflatten(1, (groups, o, f))
    at_once, channels = max(1, _TILE // (groups * f * positions)), max(1, _TILE // (m * groups * f))
    for start in range(0, o, channels):
        some = slice(start, start + channels)
        gradients = [
            g_tile[:, :, some] @ _patches(module, a_tile).mT
            for a_tile, g_tile in zip(a.split(at_once), g.split(at_once), strict=True)
        ]
        dots.addmm_(torch.cat(gradients).flatten(1), pieces[:, :, some].flatten(1).mT)


def _padded(module: Any, x: Tensor) -> Tensor:
    pads = module._reversed_padding_repeated_twice  # also of padding="same"
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, pads, mode) if any(pads) else x


def _patches(module: Any, a: Tensor) -> Tensor:
    """Gathers the inputs that each group's weights are multiplied by: [m, p, channels, ...] -> [m, groups, f, p·L].

    It is a copy of a view: several times faster on the CPU than ``F.unfold``, and for any number of dimensions.
    """
    axes = len(module.kernel_size)
    x = _padded(module, a.flatten(0, 1))
    for axis, (size, step, gap) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
        x = x.unfold(2 + axis, gap * (size - 1) + 1, step)[..., ::gap]
    x = x.unflatten(0, a.shape[:2]).unflatten(2, (module.groups, -1))  # [m, p, groups, c, positions, places]
    positions, places = range(4, 4 + axes), range(4 + axes, 4 + 2 * axes)
    return x.permute(0, 2, 3, *places, 1, *positions).flatten(3 + axes).flatten(2, 2 + axes)


def _embedding(layer: Layer, a: Tensor, g: Tensor, vectors: Tensor, dots: Tensor) -> None:
    """Adds Σₜ gₜ·Sⱼ[tokenₜ], products with rows of the vectors, a tile of tokens at a time."""
    if layer.weight is None:
        return
    module, m, k = layer.module, len(a), len(vectors)
    tokens, g = a.reshape(-1), g.reshape(-1, g.shape[-1]).to(vectors.dtype)
    if module.padding_idx is not None:
        g = g * (tokens != module.padding_idx).unsqueeze(1)
    rows = vectors[:, layer.weight].unflatten(1, module.weight.shape)
    at_once = max(1, _TILE // (k * g.shape[1]))
    by_token = [
        torch.einsum("ktf,tf->tk", rows[:, some], g_tile)
        for some, g_tile in zip(tokens.split(at_once), g.split(at_once), strict=True)
    ]
    dots += torch.cat(by_token).unflatten(0, (m, -1)).sum(1)


def _features(layer: Layer, a: Tensor, g: Tensor, vectors: Tensor, dots: Tensor) -> None:
    """Adds the products for weights and biases of the last axes, for inputs that are normalised over these axes."""
    module, m, size = layer.module, len(a), layer.module.weight.numel()
    if isinstance(module, nn.LayerNorm):
        normal = F.layer_norm(a, module.normalized_shape, None, None, module.eps)
    else:
        normal = F.rms_norm(a, module.normalized_shape, None, module.eps)
    g = g.to(vectors.dtype)
    _add(dots, (g * normal).reshape(m, -1, size).sum(1), vectors, layer.weight)
    _add(dots, g.reshape(m, -1, size).sum(1), vectors, layer.bias)


def _channels(layer: Layer, a: Tensor, g: Tensor, vectors: Tensor, dots: Tensor) -> None:
    """Adds the products for weights and biases of channels, normalised over groups of them or by running statistics."""
    module, m, size = layer.module, len(a), layer.module.weight.numel()
    x = a.flatten(0, 1)
    if isinstance(module, nn.GroupNorm):
        normal = F.group_norm(x, module.num_groups, None, None, module.eps)
    else:
        normal = F.batch_norm(x, module.running_mean, module.running_var, None, None, False, 0.0, module.eps)
    g = g.to(vectors.dtype)
    _add(dots, (g * normal.view_as(g)).reshape(m, g.shape[1], size, -1).sum((1, 3)), vectors, layer.weight)
    _add(dots, g.reshape(m, g.shape[1], size, -1).sum((1, 3)), vectors, layer.bias)


_KINDS: dict[type[nn.Module], Callable[[Layer, Tensor, Tensor, Tensor, Tensor], None]] = {
    nn.Linear: _linear,
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.Conv3d: _conv,
    nn.Embedding: _embedding,
    nn.LayerNorm: _features,
    nn.RMSNorm: _features,
    nn.GroupNorm: _channels,
    _BatchNorm: _channels,
}


def _kind(module: nn.Module) -> Callable[[Layer, Tensor, Tensor, Tensor, Tensor], None] | None:
    """Returns the function that adds a layer's products; None unless its class, and its ``forward``, are known ones."""
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
        return None
    if isinstance(module, _BatchNorm) and module.running_mean is None:
        return None  # it normalises by the batch
    for kind, add_dots in _KINDS.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return add_dots
    return None

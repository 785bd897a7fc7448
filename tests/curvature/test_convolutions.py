"""Convolutions whose double backward computes what is asked for alone: the same curvature, in every kind of layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracles import Supervised, assert_close, dense_gauss_newton, dense_hessian, loader_batches
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from torch_influence import CGInfluenceModule
from torch_influence.curvature import Curvature

pytestmark = pytest.mark.filterwarnings("error")

N, BATCH = 7, 3  # the last batch has 1
SWEEPS = 4  # forward, backward, and the two of the second derivative


class Pooled(nn.Module):
    """Two layers, the first of which has inputs that need no gradient, then means over places and a sum of features."""

    def __init__(self, first: nn.Module, second: nn.Module, dimensions: int) -> None:
        super().__init__()
        self.first, self.second, self.dimensions = first, second, dimensions

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).mean(dim=[*range(-self.dimensions, 0)])


class Viewed(Pooled):
    """Has a view that only contiguous outputs allow."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.second(hidden.view(len(x), -1).view_as(hidden)).mean(dim=(-2, -1))


class Mapped(Pooled):
    """Takes examples one by one through vmap, which torch's own operators allow and a custom one may not."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda one: super(Mapped, self).forward(one[None])[0])(x)


def conv1(**options: object) -> Pooled:
    return Pooled(nn.Conv1d(2, 4, 3, **options), nn.Conv1d(4, 3, 2), 1)


def conv2(kind: type[Pooled] = Pooled, **options: object) -> Pooled:
    return kind(nn.Conv2d(2, 4, 3, **options), nn.Conv2d(4, 3, (1, 2), groups=1), 2)


def conv3(**options: object) -> Pooled:
    return Pooled(nn.Conv3d(2, 4, 2, **options), nn.Conv3d(4, 3, 1), 3)


def grouped() -> Pooled:
    return Pooled(nn.Conv2d(2, 4, 3, groups=2, padding=(1, 0)), nn.Conv2d(4, 3, 2, stride=2, bias=False), 2)


def twice() -> nn.Module:
    layer = nn.Conv2d(2, 2, 3, padding=1)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Flatten(), nn.Linear(72, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "conv1d": (conv1, ""),
    "conv1d, dilated, padded": (lambda: conv1(dilation=2, padding=2), ""),
    "conv2d": (conv2, ""),
    "conv2d, strided, without bias": (lambda: conv2(stride=2, padding=1, bias=False), ""),
    "conv2d, same padding": (lambda: conv2(padding="same"), ""),
    "conv2d, circular": (lambda: conv2(padding=1, padding_mode="circular"), ""),
    "conv2d, in groups": (grouped, ""),
    "conv2d, used twice": (twice, ""),
    "conv3d": (conv3, ""),
    "a view of contiguous outputs": (lambda: conv2(Viewed), "a product with them failed: view size is not compatible"),
    "vmap": (lambda: conv2(Mapped), "a product with them failed"),
}


def data(dimensions: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(N, 2, *[6] * dimensions, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(3, (N,), generator=generator))


@pytest.mark.parametrize("gnh", [False, True], ids=["hessian", "gauss-newton"])
@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_the_dense_matrix(name: str, gnh: bool) -> None:
    build, why_plain = MODELS[name]
    torch.manual_seed(0)
    model, objective = build().double(), Supervised(F.cross_entropy, l2=0.1)
    loader = DataLoader(data({"1": 1, "3": 3}.get(name[4:5], 2)), batch_size=BATCH)
    oracle = dense_gauss_newton if gnh else dense_hessian
    matrix = oracle(model, objective, loader_batches(loader))
    module = CGInfluenceModule(model, objective, loader, None, "cpu", 0.0, gnh=gnh)
    for rows in (torch.randn(1, len(matrix)).double(), torch.eye(len(matrix)).double()):
        size = float((rows.abs() @ matrix.abs()).max())
        assert_close(module.hvp(rows), rows @ matrix, operations=SWEEPS * N * len(matrix), scale=size)
    curvature = module._problem._curvature[1]
    assert isinstance(curvature, Curvature)
    assert curvature.why_plain_convolutions.startswith(why_plain)
    assert bool(curvature.why_plain_convolutions) == bool(why_plain)
    assert curvature.by_rules == gnh
    assert ("convolutions by what is asked for alone" in curvature.describe()) == (not why_plain and not gnh)
    assert why_plain in str(module.explain())
    assert not curvature._pull_back.why_plain


def test_weights_of_convolutions_are_selected_or_not() -> None:
    torch.manual_seed(0)
    model, objective = conv2().double(), Supervised(F.cross_entropy)
    loader = DataLoader(data(2), batch_size=BATCH)
    whole = dense_gauss_newton(model, objective, loader_batches(loader))
    for selected in (["first.bias"], ["second.weight"], ["first.weight", "second.bias"]):
        module = CGInfluenceModule(model, objective, loader, None, "cpu", 0.0, gnh=True, params=selected)
        names = [n for n, p in model.named_parameters() for _ in range(p.numel())]
        chosen = torch.tensor([n in selected for n in names])
        part = whole[chosen][:, chosen]
        rows = torch.eye(len(part)).double()
        assert_close(module.hvp(rows), part, operations=SWEEPS * N * len(whole))


def test_the_model_keeps_its_format() -> None:
    model, loader = conv2().double(), DataLoader(data(2), batch_size=BATCH)
    weight, strides = model.first.weight, model.first.weight.stride()
    CGInfluenceModule(model, Supervised(F.cross_entropy), loader, None, "cpu", 0.1).hvp(
        torch.ones(sum(p.numel() for p in model.parameters())).double()
    )
    assert model.first.weight is weight
    assert weight.stride() == strides

"""A fast way is compared with the plain one wherever it is used, not where it was used first: data sorted by kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import (
    IdentityModule,
    Supervised,
    assert_close,
    dense_gauss_newton,
    dense_hessian,
    example_gradients,
    loader_batches,
    query_gradients,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from torch_influence import CGInfluenceModule, InfluenceModule
from torch_influence.gradients._examples import ExampleGradients

FIRST, LATER = 270, 50  # examples of either kind: the first group, of 256, has but one of them
INPUTS, CLASSES = 4, 3


class Kinds(nn.Module):
    """Two kinds of examples, told apart by their first input, which take different ways through the model."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(INPUTS))  # no layer accounts for it
        self.first, self.last = nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = self.scale * x
        usual = self.last(self.first(z).tanh())
        return torch.where(x[:, :1] > 0, self.other(z, usual), usual)

    def other(self, z: Tensor, usual: Tensor) -> Tensor:
        raise NotImplementedError


class Functional(Kinds):
    """Uses the parameters of layers without calling these."""

    def other(self, z: Tensor, usual: Tensor) -> Tensor:
        return F.linear(z.sigmoid(), self.last.weight) + F.linear(z, self.first.weight)[:, :CLASSES]


class Once(torch.autograd.Function):
    """Its backward has no derivative: products that are made by differentiating twice miss what comes through it."""

    @staticmethod
    def forward(a: Tensor) -> Tensor:
        return a.tanh()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return (g * (1 - y * y)).detach()

    @staticmethod
    def vmap(info: Any, in_dims: Any, a: Tensor) -> tuple[Tensor, int]:
        return Once.apply(a), in_dims[0]


class OnceLater(Kinds):
    def other(self, z: Tensor, usual: Tensor) -> Tensor:
        return Once.apply(self.first(z))[:, :CLASSES]


def sorted_by_kind() -> DataLoader:
    x, y = torch.randn(FIRST + LATER, INPUTS, dtype=torch.float64), torch.randint(CLASSES, (FIRST + LATER,))
    x[:, 0] = torch.where(torch.arange(len(x)) < FIRST, -x[:, 0].abs(), x[:, 0].abs())
    return DataLoader(TensorDataset(x, y), 40)


def assert_right(actual: Tensor, expected: Tensor) -> None:
    assert_close(actual, expected, operations=100.0 * (FIRST + LATER))


@pytest.mark.parametrize("model", [Functional, OnceLater])
@pytest.mark.parametrize("k", [2, 12])  # few vectors by differentiating twice, many by rows
@pytest.mark.parametrize("cache", ["auto", False])
def test_scores_of_examples_of_a_later_kind(model: type[Kinds], k: int, cache: Any) -> None:
    net, data, objective = model().double(), sorted_by_kind(), Supervised(F.cross_entropy, 0.1)
    module = IdentityModule(net, objective, data, data, "cpu", cache=cache)
    queries = [*range(k // 2), *range(FIRST + 1, FIRST + 1 + k // 2)]
    expected = example_gradients(net, objective, data) @ query_gradients(net, objective, data, queries).mT
    assert_right(module.influence_matrix(None, queries) * len(data.dataset), expected)


@pytest.mark.parametrize("model", [Functional, OnceLater])
def test_rows_of_gradients_of_a_later_kind(model: type[Kinds]) -> None:
    net, data, objective = model().double(), sorted_by_kind(), Supervised(F.cross_entropy, 0.1)
    module = IdentityModule(net, objective, data, data, "cpu")
    expected = example_gradients(net, objective, data).square().sum(1)
    assert_right(module.self_influences() * len(data.dataset), expected)


@pytest.mark.parametrize("k", [2, 12])
def test_an_example_that_is_not_finite_does_not_hold_up_the_others(k: int) -> None:
    data, net = sorted_by_kind(), nn.Sequential(nn.Linear(INPUTS, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    objective = Supervised(F.cross_entropy, 0.1)
    module = IdentityModule(net, objective, data, data, "cpu")
    data.dataset.tensors[0][100] = torch.nan
    examples = module._problem.train_gradients()
    vectors, rest = torch.randn(k, module._problem.space.size, dtype=torch.float64), torch.arange(FIRST + LATER) != 100
    with module._problem.evaluation.session():
        dots = torch.cat([dots for _, dots in examples.dots(range(FIRST + LATER), vectors)])
    assert not examples.why_not
    assert dots[100].isnan().all()
    assert_right(dots[rest], example_gradients(net, objective, data, rest.nonzero().flatten().tolist()) @ vectors.mT)


def test_the_way_is_given_up_where_it_differs_and_no_sooner() -> None:
    data = sorted_by_kind()
    module = IdentityModule(Functional().double(), Supervised(F.cross_entropy), data, data, "cpu")
    examples = ExampleGradients(
        module._problem.evaluation.train_loss, module._problem.evaluation, module._problem.train, "scores"
    )
    vectors = torch.randn(2, module._problem.space.size, dtype=torch.float64)
    with module._problem.evaluation.session():
        list(examples.dots(range(256), vectors))
        assert not examples.why_not
        list(examples.dots(range(FIRST + LATER), vectors))
    assert "differ from a backward pass" in examples.why_not["inputs and output gradients of layers"]
    assert examples.path == "directional derivatives"


def test_a_tie_costs_a_forward_and_a_backward_pass() -> None:
    data, net = sorted_by_kind(), nn.Sequential(nn.Linear(INPUTS, 5), nn.Linear(5, CLASSES)).double()
    module = IdentityModule(net, Supervised(F.cross_entropy), data, data, "cpu")
    evaluation, examples = module._problem.evaluation, module._problem.train_gradients()
    with evaluation.session():
        module._problem.train.stacked()
        (group,) = examples._groups(range(256), 256)
        with FlopCounterMode(display=False) as plain:
            leaves = evaluation.leaves()
            torch.autograd.grad(evaluation.train_loss(leaves, module._problem.train.peek(range(256))), leaves)
        with FlopCounterMode(display=False) as tie:
            examples._signed(group, torch.zeros(module._problem.space.size, dtype=torch.float64))
    assert tie.get_total_flops() == plain.get_total_flops() > 0


# -- products with curvatures -----------------------------------------------------------------------------------------


class Scaled(torch.autograd.Function):
    """The identity; a wrong rule says what it is for many at once."""

    @staticmethod
    def forward(a: Tensor) -> Tensor:
        return a.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return Scaled.apply(g)

    @staticmethod
    def vmap(info: Any, in_dims: Any, a: Tensor) -> tuple[Tensor, int]:
        return 2 * a, in_dims[0]


class WrongLater(nn.Module):
    """Batches of a later kind pass an operator that is wrong for many rows at once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(INPUTS, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.last(Scaled.apply(h) if bool(x[-1, 0] > 0) else h)


@pytest.mark.parametrize("gnh", [False, True])
def test_products_of_many_rows_in_batches_of_a_later_kind(gnh: bool) -> None:
    net, data, objective = WrongLater().double(), sorted_by_kind(), Supervised(F.cross_entropy, 0.1)
    # Without a cache the batches are the loader's own, and the first of them are of the usual kind.
    module = CGInfluenceModule(net, objective, data, data, "cpu", 1.0, gnh=gnh, cache=False)
    rows = torch.randn(3, module._problem.space.size, dtype=torch.float64)
    dense = (dense_gauss_newton if gnh else dense_hessian)(net, objective, loader_batches(data))
    assert_right(module.hvp(rows), rows @ dense)
    assert {True, False} <= set(module._problem.curvature()._pull_back._batched.values())  # either way was taken


class Joined(Supervised):
    """Joins the outputs of the examples in some batch."""

    def train_loss_on_outputs(self, outputs: Any, batch: Any) -> Tensor:
        loss = super().train_loss_on_outputs(outputs, batch)
        return loss + outputs.sum() ** 2 if bool((batch[0][:, 0] > 0).any()) and len(outputs) > 1 else loss


@pytest.mark.filterwarnings("ignore:train_loss. expected the mean loss over the batch, got something else")
def test_a_linear_head_whose_loss_joins_the_examples_of_some_batch() -> None:
    data = sorted_by_kind()
    x = data.dataset.tensors[0]
    x[:, 0] = -x[:, 0].abs()
    x[100, 0] = 1.0  # in the third batch of eight: neither the first nor the last
    data.dataset.tensors = (x, torch.randn(len(x), CLASSES, dtype=torch.float64))
    net, objective = nn.Linear(INPUTS, CLASSES).double(), Joined(F.mse_loss, 0.1)
    module = InfluenceModule(net, objective, data, data, "cpu", 1.0)
    rows = torch.randn(2, module._problem.space.size, dtype=torch.float64)
    assert_right(module.hvp(rows), rows @ dense_hessian(net, objective, loader_batches(data)))
    assert "joins the outputs" in module._problem.curvature().why_no_head

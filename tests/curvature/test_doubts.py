"""What is wrong with a curvature is said before it is used: second derivatives, what is missing, no curvature."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from oracles import Supervised, half_squared_error
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from torch_influence import CurvatureWarning, InfluenceModule, LiSSAInfluenceModule, SolveError
from torch_influence.curvature import Hessian

N, BATCH, INPUTS, CLASSES = 36, 9, 5, 3


class OnceTanh(torch.autograd.Function):
    """Can be differentiated once; says so."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        y = a.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


class NumpySoftplus(torch.autograd.Function):
    """A backward in NumPy, whose derivative nobody knows."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return torch.from_numpy(np.logaddexp(0.0, a.detach().numpy()))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        return g * torch.from_numpy(1 / (1 + np.exp(-a.detach().numpy())))


class KeptOnContext(torch.autograd.Function):
    """Its backward is differentiable, but what it computes from has no graph: the second derivative lacks a part."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.a = a.detach()
        return a.sigmoid()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.a.sigmoid() * (1 - ctx.a.sigmoid())


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def net(act: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, 6), Applied(act), nn.Linear(6, CLASSES)).to(dtype)


def loader(dtype: torch.dtype = torch.float64) -> DataLoader:
    x, y = torch.randn(N, INPUTS, dtype=dtype), torch.randint(CLASSES, (N,))
    x[0, 0], x[BATCH, 0] = 1.0, -1.0
    return DataLoader(TensorDataset(x, y), BATCH)


def module(model: nn.Module, loss: Any = F.cross_entropy, l2: float = 0.1, **options: Any) -> Any:
    data = loader(next(model.parameters()).dtype)
    kind = options.pop("kind", InfluenceModule)
    return kind(model, Supervised(loss, l2), data, data, "cpu", damp=1.0, **options)


def doubts(it: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        it.influences([0], [0])
    texts = [(w.category, str(w.message)) for w in record]
    return [text for category, text in texts if issubclass(category, CurvatureWarning) or "no gradient" in text]


# -- second derivatives -----------------------------------------------------------------------------------------------

WRONG = [OnceTanh, NumpySoftplus, KeptOnContext]


@pytest.mark.parametrize("gnh", [False, True])
@pytest.mark.parametrize("act", WRONG, ids=["once", "numpy", "kept"])
def test_an_operator_without_a_right_second_derivative_is_named_and_fails_verify(act: Any, gnh: bool) -> None:
    it = module(net(act.apply), gnh=gnh)
    if gnh and act is not OnceTanh:  # Gauss-Newton takes the model's first derivatives alone: they are right
        assert not doubts(it)
        assert it.verify(print=False)["differences"].passed
        return
    (found,) = doubts(it)
    assert "second derivative of the training loss is wrong" in found
    assert not it.verify(print=False)["differences"].passed


def test_a_wrong_second_derivative_of_the_loss_itself_is_found_with_a_linear_model() -> None:
    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return KeptOnContext.apply(outputs).square().sum(1).mean()

    assert doubts(module(nn.Linear(INPUTS, CLASSES).double(), loss))


def test_it_is_said_with_lissa_and_raised_on_request() -> None:
    it = module(net(OnceTanh.apply), kind=LiSSAInfluenceModule, repeat=1, depth=100, scale=5.0)
    with pytest.warns(CurvatureWarning, match="second derivative"):
        it.influences([0], [0])
    with pytest.raises(SolveError, match="second derivative"):
        module(net(OnceTanh.apply), on_failure="raise").influences([0], [0])


class InSingle(torch.autograd.Function):
    """A kernel that takes float32 alone, and can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        if a.dtype != torch.float32:
            raise TypeError("float32 only")
        ctx.a = a.detach()
        return a.sigmoid()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.a.sigmoid() * (1 - ctx.a.sigmoid())


def test_a_model_that_runs_in_float32_alone_is_looked_at_in_float32() -> None:
    assert doubts(module(net(InSingle.apply, torch.float32)))


def relu_net(dtype: torch.dtype) -> nn.Module:
    wide = [nn.Linear(INPUTS, 400), nn.ReLU(), nn.Linear(400, 400), nn.LeakyReLU(), nn.Linear(400, CLASSES)]
    return nn.Sequential(*wide).to(dtype)


class SingleOnly(nn.Module):
    """Refuses float64."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return self.model(x)


@pytest.mark.parametrize("gnh", [False, True])
@pytest.mark.parametrize(
    "model",
    [
        lambda: net(torch.tanh),
        lambda: net(torch.tanh, torch.float32),
        lambda: net(F.gelu, torch.bfloat16),
        lambda: relu_net(torch.float64),
        lambda: relu_net(torch.float32),
        lambda: SingleOnly(relu_net(torch.float32)),
        lambda: SingleOnly(net(F.softplus, torch.float32)),
        lambda: nn.Linear(INPUTS, CLASSES),
    ],
    ids=["double", "single", "bfloat16", "relu", "relu single", "relu single only", "single only", "linear"],
)
def test_right_derivatives_and_kinks_are_no_doubt(model: Callable[[], nn.Module], gnh: bool) -> None:
    it = module(model(), gnh=gnh, solver="cg", maxiter=3, on_failure="warn")
    assert not doubts(it)


# -- what is missing --------------------------------------------------------------------------------------------------


class TaskWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(INPUTS, CLASSES)
        self.logvar = nn.Parameter(torch.full((CLASSES,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def by_task(model: TaskWeights) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        square = (outputs - F.one_hot(y, CLASSES)).square()
        return (torch.exp(-model.logvar) * square + model.logvar).sum(1).mean()

    return loss


def test_parameters_that_the_loss_has_beside_the_outputs_are_named_for_gauss_newton() -> None:
    model = TaskWeights().double()
    (found,) = doubts(module(model, by_task(model), gnh=True))
    assert "logvar" in found
    assert "body" not in found
    assert not doubts(module(model, by_task(model), gnh=True, params="body.*"))
    assert not doubts(module(model, by_task(model)))  # the Hessian has all of them


def test_a_temperature_in_the_loss_is_named_too() -> None:
    model = TaskWeights().double()
    (found,) = doubts(module(model, lambda o, y: F.cross_entropy(o * model.logvar.exp(), y), gnh=True))
    assert "logvar" in found


class Merging(nn.Linear):
    """A low-rank adapter that is merged into the weight in eval mode."""

    def __init__(self) -> None:
        super().__init__(INPUTS, 6)
        self.up, self.down = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, INPUTS))
        self.merged: Tensor | None = None

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        self.merged = None if mode else (self.weight + self.up @ self.down).detach()
        return self

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + self.up @ self.down if self.merged is None else self.merged
        return F.linear(x, weight, self.bias)


class Reentrant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(INPUTS, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that no input requires grad
            h = checkpoint(lambda t: self.first(t).tanh(), x, use_reentrant=True)
        return self.last(h)


class Unused(nn.Module):
    """Has a layer for some of the examples alone, and one for none."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.pooler = (nn.Linear(INPUTS, CLASSES) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.other(x) if bool(x[0, 0] > 0.0) else self.one(x)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (lambda: nn.Sequential(Merging(), nn.Tanh(), nn.Linear(6, CLASSES)), ["0.weight", "0.up", "0.down"]),
        (Reentrant, ["first.weight", "first.bias"]),
        (Unused, ["pooler.weight", "pooler.bias"]),
    ],
    ids=["merged", "reentrant", "unused"],
)
def test_parameters_that_no_gradient_reaches_are_named(model: Callable[[], nn.Module], named: list[str]) -> None:
    found = [text for text in doubts(module(model().double(), on_failure="ignore")) if "no gradient" in text]
    assert len(found) == 1
    assert f"params: {', '.join(named)} get" in found[0]


def test_a_loss_of_another_model_than_the_one_given_is_no_loss_of_its_parameters() -> None:
    other = nn.Linear(INPUTS, CLASSES).double()

    class Stale(Supervised):
        def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
            return other(batch[0]).detach()

    data = loader()
    it = InfluenceModule(nn.Linear(INPUTS, CLASSES).double(), Stale(F.cross_entropy, 0.1), data, data, "cpu", 1.0)
    assert any("params: weight, bias get no gradient" in text for text in doubts(it))


# -- no curvature -----------------------------------------------------------------------------------------------------


def hinge(outputs: Tensor, y: Tensor) -> Tensor:
    right = outputs.gather(1, y[:, None])
    return (1.0 + outputs - right).clamp(min=0.0).sum(1).mean()


def absolute(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs - F.one_hot(y, CLASSES)).abs().sum(1).mean()


def quantile(outputs: Tensor, y: Tensor) -> Tensor:
    apart = F.one_hot(y, CLASSES) - outputs
    return torch.maximum(0.9 * apart, -0.1 * apart).sum(1).mean()


FLAT = [absolute, hinge, quantile]


@pytest.mark.parametrize("loss", FLAT)
def test_a_loss_without_curvature_is_said_to_have_none(loss: Any) -> None:
    linear = nn.Linear(INPUTS, CLASSES).double()
    for l2 in (0.0, 0.1):
        (found,) = doubts(module(linear, loss, l2))
        assert "no curvature" in found
    (found,) = doubts(module(net(torch.tanh), loss, gnh=True))
    assert "no curvature" in found


def test_a_little_curvature_is_enough() -> None:
    def huber(outputs: Tensor, y: Tensor) -> Tensor:
        """Quadratic for the third class alone, of which there is one example."""
        apart = (outputs - F.one_hot(y, CLASSES)).square() * (y == 2)[:, None]
        return absolute(outputs, y) + apart.sum(1).mean()

    it = module(nn.Linear(INPUTS, CLASSES).double(), huber)
    labels = it.train_loader.dataset.tensors[1]
    labels.remainder_(2)
    labels[N // 2 + 1] = 2
    assert not doubts(it)
    assert not doubts(module(nn.Linear(INPUTS, CLASSES).double(), lambda o, y: half_squared_error(o, F.one_hot(y, 3))))


# -- cost -------------------------------------------------------------------------------------------------------------


def test_looks_take_a_few_passes_over_as_many_examples_whatever_the_data() -> None:
    spent = {}
    for n in (200, 400):
        counts: list[int] = []
        model = net(torch.tanh)
        handle = model.register_forward_hook(lambda *args, c=counts: c.append(len(args[1][0])))
        x, y = torch.randn(n, INPUTS, dtype=torch.float64), torch.randint(CLASSES, (n,))
        data = DataLoader(TensorDataset(x, y), 50)
        it = InfluenceModule(model, Supervised(F.cross_entropy), data, data, "cpu", 1.0)
        plain = Hessian(it._problem.evaluation, it._problem.train, it.device)
        assert not plain.doubts(1e9)
        handle.remove()
        spent[n] = counts
    assert spent[200] == spent[400] == [32] * len(spent[200])
    assert len(spent[200]) == 1 + 1 + 2 + 4  # what is missing; where it is differentiated; products; differences

"""Curvature of linear heads in closed form, and of batches put together: right where taken, not taken where wrong."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from oracles import Loss, Supervised, assert_close, dense_gauss_newton, dense_hessian, loader_batches, trainable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, TensorDataset

from torch_influence import AutogradInfluenceModule, CGInfluenceModule
from torch_influence.curvature import Hessian, LinearHead, linear_head

pytestmark = pytest.mark.filterwarnings("error")

N, BATCH = 17, 5  # the last batch has 2
SWEEPS = 4  # forward, backward, and the two of the second derivative
SOFTMAX, BLOCKS, GRAPHS = "the probabilities of softmax", "a block per example", "graphs"

Regularizer = Callable[[Tensor], Any]


class Regularized(Supervised):
    """Supervised, with any regulariser."""

    def __init__(self, loss: Loss, regularizer: Regularizer) -> None:
        super().__init__(loss)
        self.regularizer = regularizer

    def train_regularization(self, params: Tensor) -> Any:
        return self.regularizer(params)


def ridge(params: Tensor) -> Tensor:
    return 0.01 * params.square().sum()


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and a loss.

    Attributes:
        form: of the curvature at the outputs, if it is a linear head; else part of why it is not.
        grouped: part of why batches are the loader's own; empty: they are not.
        params: those that are differentiated.
        inherent: relative error of torch's own derivatives.
    """

    build: Callable[[], nn.Module]
    loss: Loss
    targets: Callable[[int], Tensor]
    form: str
    grouped: str = ""
    params: Any = None
    regularizer: Regularizer = ridge
    inputs: Callable[[int], Tensor] = lambda n: torch.randn(n, 4)
    batch: int = BATCH
    collate: Callable[[Any], Any] | None = None
    inherent: float = 0.0

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The same float32 numbers in either dtype."""
        torch.manual_seed(3)
        return self.build().to(dtype)

    def loader(self, dtype: torch.dtype = torch.float64) -> DataLoader:
        torch.manual_seed(5)
        tensors = [self.inputs(N), self.targets(N)]
        tensors = [t.to(dtype) if t.is_floating_point() else t for t in tensors]
        return DataLoader(TensorDataset(*tensors), batch_size=self.batch, collate_fn=self.collate)

    @property
    def objective(self) -> Regularized:
        return Regularized(self.loss, self.regularizer)

    def arguments(self, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        return self.model(dtype), self.objective, self.loader(dtype), self.loader(dtype), "cpu"

    def module(self, dtype: torch.dtype = torch.float64, gnh: bool = False, **options: Any) -> CGInfluenceModule:
        return CGInfluenceModule(*self.arguments(dtype), 0.0, gnh, params=self.params, **options)

    def reference(self, gnh: bool = False) -> Tensor:
        """Dense, in float64, of the selected parameters."""
        model, loader = self.model(), self.loader()
        matrix = (dense_gauss_newton if gnh else dense_hessian)(model, self.objective, loader_batches(loader))
        chosen = set(self.module().params_names)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        mask = torch.cat([torch.full((p.numel(),), n in chosen) for n, p in zip(names, trainable(model), strict=True)])
        return matrix[mask][:, mask]


# -- models, losses and targets ---------------------------------------------------------------------------------------


class WithHead(nn.Module):
    """A trunk before the head and something behind it."""

    def __init__(self, frozen: bool = True, behind: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 5), nn.Tanh()).requires_grad_(not frozen)
        self.head = nn.Linear(5, 3)
        self.behind = behind or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.head(input=self.trunk(x)))


def linear(outputs: int = 3, bias: bool = True, behind: Iterable[nn.Module] = ()) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(4, outputs, bias), *behind)


def classes(n: int) -> Tensor:
    return torch.randint(3, (n,))


def sorted_classes(n: int) -> Tensor:
    return classes(n).sort().values


def some_ignored(n: int) -> Tensor:
    return torch.where(torch.arange(n) % 4 == 1, -100, classes(n))


def soft_labels(n: int) -> Tensor:
    return torch.randn(n, 3).softmax(-1)


def bits(n: int) -> Tensor:
    return torch.randint(2, (n, 1)).float()


def flat_bits(n: int) -> Tensor:
    return bits(n)[:, 0]


def real(n: int) -> Tensor:
    return torch.randn(n, 3)


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, weight=torch.tensor([0.2, 1.0, 3.0], dtype=outputs.dtype))


def quartic(outputs: Tensor, targets: Tensor) -> Tensor:
    """Its Hessian joins the outputs of an example."""
    return (outputs - targets).square().sum(1).square().mean()


HEADS = {
    "softmax": Case(linear(), F.cross_entropy, classes, SOFTMAX),
    "label smoothing": Case(linear(), functools.partial(F.cross_entropy, label_smoothing=0.1), classes, SOFTMAX),
    "soft labels": Case(linear(), F.cross_entropy, soft_labels, SOFTMAX),
    "log-softmax in the model": Case(linear(behind=[nn.LogSoftmax(-1)]), F.nll_loss, classes, SOFTMAX),
    "ignore_index": Case(linear(), F.cross_entropy, some_ignored, SOFTMAX, grouped="not the mean"),
    "class weights": Case(linear(), weighted, classes, SOFTMAX, grouped="not the mean"),
    "class weights, data sorted": Case(linear(), weighted, sorted_classes, SOFTMAX, grouped="not the mean"),
    "logistic": Case(linear(1), F.binary_cross_entropy_with_logits, bits, BLOCKS),
    # torch adds 1e-12 to p(1 - p) in the second derivative; p(1 - p) > 0.01 here
    "Dogfish": Case(
        linear(1, behind=[nn.Flatten(0), nn.Sigmoid()]), F.binary_cross_entropy, flat_bits, BLOCKS, inherent=1e-10
    ),
    "squared error": Case(linear(), F.mse_loss, real, BLOCKS),
    "a loss that joins the outputs": Case(linear(), quartic, real, BLOCKS),
    "in-place behind the head": Case(linear(behind=[nn.ELU(inplace=True)]), F.mse_loss, real, BLOCKS),
    "in-place behind the head, softmax": Case(linear(behind=[nn.ELU(inplace=True)]), F.cross_entropy, classes, BLOCKS),
    "frozen trunk": Case(WithHead, F.cross_entropy, classes, SOFTMAX),
    "trunk not selected": Case(lambda: WithHead(False), F.cross_entropy, classes, SOFTMAX, params="head.*"),
    "layers behind": Case(
        lambda: WithHead(True, nn.Sequential(nn.Tanh(), nn.Linear(3, 3))),
        F.cross_entropy,
        classes,
        BLOCKS,
        params="head.*",
    ),
    "no bias": Case(linear(bias=False), F.cross_entropy, classes, SOFTMAX),
    "the weight alone": Case(linear(), F.cross_entropy, classes, SOFTMAX, params="0.weight"),
    "the weight alone, blocks": Case(linear(), F.mse_loss, real, BLOCKS, params="0.weight"),
    "one batch": Case(linear(), F.cross_entropy, classes, SOFTMAX, batch=N + 3),
    "batches of one": Case(linear(), F.cross_entropy, classes, SOFTMAX, batch=1),
    "regulariser that is not diagonal": Case(linear(), F.mse_loss, real, BLOCKS, regularizer=lambda p: p.sum() ** 2),
    "regulariser with another factor for each": Case(
        linear(), F.mse_loss, real, BLOCKS, regularizer=lambda p: (p.square() * torch.arange(15.0).to(p)).sum()
    ),
    "regulariser that is a number": Case(linear(), F.mse_loss, real, BLOCKS, regularizer=lambda p: 0.5),
    "regulariser that is linear": Case(linear(), F.mse_loss, real, BLOCKS, regularizer=lambda p: 3.0 * p.sum()),
}
heads = pytest.mark.parametrize("name", HEADS)
kinds = pytest.mark.parametrize("gnh", [False, True], ids=["hessian", "gauss-newton"])


def assert_products(actual: Tensor, rows: Tensor, matrix: Tensor, inherent: float = 0.0) -> None:
    """Of rows and a symmetric matrix; to be so close, each product is summed in any order."""
    rows, size = rows.double(), float((rows.double().abs() @ matrix.abs()).max())
    assert_close(actual, rows @ matrix, operations=SWEEPS * N * len(matrix), scale=size, inherent=inherent)


@heads
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_heads_are_taken_and_right(name: str, gnh: bool, dtype: torch.dtype) -> None:
    case = HEADS[name]
    module, matrix = case.module(dtype, gnh), case.reference(gnh)
    rows = torch.randn(4, len(matrix)).to(dtype)
    for some in (rows, rows[1:2]):
        assert_products(module.hvp(some), some, matrix, case.inherent)
    head = module._operator
    assert type(head) is LinearHead
    assert head.at_outputs.form == case.form
    assert case.grouped in head.plain.why_not_grouped
    assert bool(case.grouped) == bool(head.plain.why_not_grouped) or case.batch > N


@heads
def test_dense_matrix_of_heads(name: str) -> None:
    case = HEADS[name]
    module, matrix = AutogradInfluenceModule(*case.arguments(), 1.0, params=case.params), case.reference()
    assert type(module._operator) is LinearHead
    assert_close(module.hess, matrix, operations=SWEEPS * N * len(matrix), inherent=case.inherent)
    assert torch.equal(module.hess, module.hess.mT)


@pytest.mark.parametrize("name", ["softmax", "Dogfish", "squared error"])
def test_half_precision_heads(name: str) -> None:
    case = HEADS[name]
    dtype = torch.bfloat16
    module = case.module(dtype)
    rows = torch.eye(module._space.size)
    model, loader = case.model(dtype).double(), case.loader(dtype)
    batches = (([t.double() if t.is_floating_point() else t for t in batch], b) for batch, b in loader_batches(loader))
    matrix = dense_hessian(model, case.objective, batches)
    actual = module.hvp(rows)
    assert actual.dtype == torch.float32
    # Sums over examples are in float32; the model, the loss and its two derivatives run in bfloat16, a chain of
    # below 64 operations per number.
    assert_close(actual.to(dtype), matrix, operations=64)



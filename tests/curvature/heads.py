"""Models and losses of one linear layer, and what their curvature is made of."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from oracles import Loss, Supervised, dense_gauss_newton, dense_hessian, loader_batches, trainable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, TensorDataset

from torch_influence import CGInfluenceModule

N, BATCH = 17, 5  # the last batch has 2
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
    kind: type[Regularized] = Regularized

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
        return self.kind(self.loss, self.regularizer)

    def arguments(self, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
        return self.model(dtype), self.objective, self.loader(dtype), self.loader(dtype), "cpu"

    def module(self, dtype: torch.dtype = torch.float64, gnh: bool = False, **options: Any) -> CGInfluenceModule:
        return CGInfluenceModule(*self.arguments(dtype), 0.0, gnh, params=self.params, **options)

    @functools.cache  # noqa: B019 - cases live as long as this module
    def dense(self, gnh: bool) -> Tensor:
        oracle = dense_gauss_newton if gnh else dense_hessian
        return oracle(self.model(), self.objective, loader_batches(self.loader()))

    def reference(self, gnh: bool = False) -> Tensor:
        """Dense, in float64, of the selected parameters; leaves the random state as `arguments` does."""
        matrix, model = self.dense(gnh), self.model()
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


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    """Each example against the others of its batch."""
    return F.cross_entropy(outputs @ outputs.mT, torch.arange(len(outputs)))


def centred_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs - outputs.mean(0), targets)


def labelled_only(outputs: Tensor, targets: Tensor) -> Tensor:
    """No graph for a batch without labels."""
    some = targets >= 0
    return F.cross_entropy(outputs[some], targets[some]) if bool(some.any()) else outputs.new_zeros(())


def first_batch_without_labels(n: int) -> Tensor:
    return torch.where(torch.arange(n) // BATCH == 1, -1, classes(n))


def sorted_by_sign(outputs: Tensor, targets: Tensor) -> Tensor:
    """Control flow by data: one formula or another for all of a batch."""
    return quartic(outputs, targets) if float(targets.sum()) > 0 else F.mse_loss(outputs, targets)


class Cube(torch.autograd.Function):
    """Without a rule for vmap."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return 3 * z**2 * grad


class Uses(nn.Module):
    """One linear layer, used in some way."""

    def __init__(self, use: Callable[[nn.Linear, Tensor], Tensor], square: bool = False) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4 if square else 3)
        self.register_buffer("start", self.head.weight.detach().clone())
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.head, x)


def uses(use: Callable[[nn.Linear, Tensor], Tensor], square: bool = False) -> Callable[[], nn.Module]:
    return lambda: Uses(use, square)


class Anchored(Uses):
    """A penalty that has no gradient where the weight is, and a curvature."""

    def __init__(self) -> None:
        super().__init__(lambda head, x: head(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + (self.head.weight - self.start).square().sum()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 4)
        self.decoder = nn.Linear(4, 3)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.embedding(tokens).mean(1))


class WithUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Parameter(torch.tensor(2.0))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


class Doubled(Regularized):
    """A training loss of its own."""

    def train_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
        return 2.0 * self.loss(model(batch[0]), batch[1]) + self.train_regularization(params)


def padded(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Sequences of two lengths, padded with ones, which count."""
    x = [x[:2] if x[0, 0] > 0 else x for x, _ in items]
    return pad_sequence(x, batch_first=True, padding_value=1.0), torch.stack([y for _, y in items])


def sequences(n: int) -> Tensor:
    return torch.randn(n, 3, 4)


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))


def quartic_of_three(outputs: Tensor, targets: Tensor) -> Tensor:
    return quartic(outputs[:, :3], targets)


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
    "in-place before the head": Case(
        uses(lambda head, x: head(x.clone().mul_(2.0).relu_())), F.cross_entropy, classes, SOFTMAX
    ),
    "custom autograd function": Case(uses(lambda head, x: Cube.apply(head(x))), F.mse_loss, real, BLOCKS),
    "control flow by data": Case(linear(), sorted_by_sign, real, BLOCKS, grouped="not the mean"),
    "padding": Case(
        uses(lambda head, x: head(x.sum(1))),
        F.cross_entropy,
        classes,
        SOFTMAX,
        grouped="can't be regrouped",
        inputs=sequences,
        collate=padded,
    ),
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
NO_HEADS = {
    "used twice": Case(uses(lambda head, x: head(head(x).tanh()), True), quartic_of_three, real, "2 times"),
    "never called": Case(
        uses(lambda head, x: F.linear(x, head.weight, head.bias)), F.cross_entropy, classes, "0 times, not once"
    ),
    "weight used besides": Case(
        uses(lambda head, x: head(x) + F.linear(x.square(), head.weight)), F.cross_entropy, classes, "not all of"
    ),
    "weight used besides, without a gradient": Case(Anchored, F.mse_loss, real, "closed form differ"),
    "cross-example": Case(linear(), contrastive, real, "closed form differ", grouped="not the mean"),
    "statistic of the batch": Case(linear(), centred_error, real, "closed form differ", grouped="not the mean"),
    "sequences": Case(
        uses(lambda head, x: head(x).sum(1)), F.cross_entropy, classes, "not a row for each", inputs=sequences
    ),
    "overridden train_loss": Case(linear(), F.cross_entropy, classes, "not all of", kind=Doubled),
    "tied weights": Case(Tied, F.cross_entropy, classes, "not all of", inputs=lambda n: torch.randint(3, (n, 2))),
    "unused parameter": Case(WithUnused, F.cross_entropy, classes, "not those of one linear layer"),
    "the bias alone": Case(linear(), F.cross_entropy, classes, "not those of one linear layer", params="0.bias"),
    "the regulariser alone": Case(
        linear(),
        lambda outputs, targets: outputs.detach().mean(),
        real,
        "regulariser alone",
        grouped="regulariser alone",
    ),
    "a batch without labels": Case(
        linear(), labelled_only, first_batch_without_labels, "regulariser alone", grouped="without a graph"
    ),
    "two layers": Case(two_layers, F.cross_entropy, classes, "not those of one linear layer"),
    "two layers, class weights, data sorted": Case(
        two_layers, weighted, sorted_classes, "not those of one linear layer", grouped="not the mean"
    ),
    "two layers, cross-example": Case(
        two_layers, contrastive, classes, "not those of one linear layer", grouped="not the mean"
    ),
    "two layers, padding": Case(
        uses(lambda head, x: head(x.sum(1)).tanh(), False),
        F.cross_entropy,
        classes,
        "not those of one linear layer",
        grouped="can't be regrouped",
        params="head.bias",
        inputs=sequences,
        collate=padded,
    ),
}

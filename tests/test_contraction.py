"""Scores from the inputs and output gradients of linear layers, against gradients of batches of one in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import Classification, loader, module
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torch_influence import AutogradInfluenceModule, BaseObjective, CGInfluenceModule, LiSSAInfluenceModule
from torch_influence.scores import score_matrix

LAYERS, DIRECTIONS, ROWS, ONES = (
    "inputs and output gradients of layers",
    "directional derivatives",
    "rows of gradients",
    "examples one at a time",
)


def deep(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*layers).double()


class Twice(nn.Module):
    """One layer used twice, and one used once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(torch.tanh(self.first(x)))))


class Functional(nn.Module):
    """A layer's weight used without calling the layer, besides calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.tanh(F.linear(x, self.layer.weight))


class Sequences(nn.Module):
    """Positions of a sequence pass the layers one by one; a bias is left out, another one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(2, 5, bias=False), nn.Linear(5, 3)
        self.last.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.inner(x.view(len(x), 2, 2)))).mean(dim=1)


class Tied(nn.Module):
    """Two layers share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


class ClassWeighted(Classification):
    """In a batch of one the weights cancel."""

    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1], weight=torch.tensor([0.2, 1.0, 3.0]).to(outputs))


class Overridden(Classification):
    """The regulariser can't be told apart."""

    def train_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1]) + 0.1 * params.square().sum()


class Cubed(Classification):
    """A regulariser with a gradient that isn't a multiple of the parameters."""

    def train_regularization(self, params: Tensor) -> Tensor:
        return (params**3).sum()


MODELS: dict[str, tuple[Callable[[], nn.Module], BaseObjective, str, str]] = {
    # model, objective, and the ways for 2 and for 20 vectors
    "two layers": (lambda: deep(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), Classification(), LAYERS, LAYERS),
    "class weights": (lambda: deep(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), ClassWeighted(), LAYERS, LAYERS),
    "cubed": (lambda: deep(nn.Linear(4, 3)), Cubed(), LAYERS, LAYERS),
    "overridden": (lambda: deep(nn.Linear(4, 3)), Overridden(), DIRECTIONS, ROWS),
    "layer norm too": (
        lambda: deep(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)),
        Classification(),
        DIRECTIONS,
        LAYERS,
    ),
    "layer used twice": (Twice, Classification(), DIRECTIONS, LAYERS),
    "weight used besides": (Functional, Classification(), DIRECTIONS, ROWS),
    "sequences": (Sequences, Classification(), LAYERS, LAYERS),
    "tied": (Tied, Classification(), DIRECTIONS, LAYERS),
    "no linear layer": (
        lambda: deep(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 4), nn.Flatten()),
        Classification(),
        DIRECTIONS,
        ROWS,
    ),
}


def alone(it: CGInfluenceModule, vectors: Tensor) -> Tensor:
    """(1/n) gᵢ·v by a backward pass for each batch of one."""
    rows = []
    dataset = it.train_loader.dataset
    for i in range(len(dataset)):
        batch = it.train_loader.collate_fn([dataset[i]])
        parameters = [p for p in it.model.parameters() if p.requires_grad]
        flat = torch.cat([p.reshape(-1) for p in parameters])
        loss = it.objective.train_loss(it.model, flat, batch)
        rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(rows) @ vectors.mT / len(dataset)


def scores_of(it: CGInfluenceModule, vectors: Tensor) -> tuple[Tensor, str]:
    with it._evaluation.session():
        examples = it._examples()
        scores = score_matrix(examples, range(it._train.n), vectors, it._train.n)
    return scores, examples.path


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("k", [2, 20])
@pytest.mark.parametrize("name", MODELS)
def test_scores(name: str, k: int, cache: bool) -> None:
    """Both sides sum fewer than 10³ terms in float64, whose magnitudes are below 10²."""
    build, objective, few, many = MODELS[name]
    it = module(model=build().double(), objective=objective, cache=cache)
    vectors = torch.randn(k, it.flat_parameters().numel(), dtype=torch.float64)
    scores, path = scores_of(it, vectors)
    assert path == (few if k == 2 else many)
    expected = alone(it, vectors)
    assert ((scores - expected).abs() <= 1e3 * 1e2 * torch.finfo(torch.float64).eps).all()
    assert expected.abs().max() > 1e-3


def test_a_group_of_many_examples_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for inputs and output gradients is bounded: so many examples at a time as fit."""
    build, objective, _, _ = MODELS["two layers"]
    it = module(model=build(), objective=objective)
    vectors = torch.randn(20, it.flat_parameters().numel(), dtype=torch.float64)
    whole, _ = scores_of(it, vectors)
    monkeypatch.setattr("torch_influence.examples._BYTES_OF_ROWS", 1000)  # 5 examples
    parts, path = scores_of(it, vectors)
    assert path == LAYERS
    assert ((whole - parts).abs() <= 1e-13).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_are_scored_in_float32(dtype: torch.dtype) -> None:
    """Inputs and output gradients are 16-bit, their products are not: as far from float64 as the passes' rounding."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    exact = module(model=nn.Sequential(*model).double())
    vectors = torch.randn(20, exact.flat_parameters().numel(), dtype=torch.float64)
    expected, _ = scores_of(exact, vectors)
    it = module(model=model.to(dtype), train_loader=loader(dtype=dtype), test_loader=loader(n=7, dtype=dtype))
    scores, path = scores_of(it, vectors.float())
    assert path == LAYERS
    assert scores.dtype == torch.float32
    rounding = torch.finfo(dtype).eps * vectors.norm(dim=1)  # of passes of some ten operations on numbers below 3
    assert ((scores - expected).abs() <= 30 * rounding / 23).all()


def test_explain_names_the_ways_and_their_memory() -> None:
    it = module(model=nn.Linear(4, 3).double())
    plan = it.explain(queries=20)
    assert "linear head in closed form, by the probabilities of softmax" in plan["curvature"].path
    assert plan["curvature"].nbytes == 23 * (4 + 3 + 1) * 8  # inputs, probabilities, weights
    assert plan["data"].nbytes == 23 * (4 + 1) * 8
    assert plan["scores"].path == LAYERS
    assert plan["scores"].nbytes == 23 * 20 * 8
    assert it.last_report is None, "nothing is solved"
    assert str(plan).startswith("data:      kept on the device")

    layered = module(cache=False).explain()
    assert "double backward" in layered["curvature"].path
    reasons = dict(layered["curvature"].why_not)
    assert "not those of one linear layer" in reasons["a linear head in closed form"]
    assert dict(layered["data"].why_not) == {"kept": "cache=False"}
    with pytest.raises(ValueError, match="queries: expected at least 1, got 0"):
        it.explain(0)


def test_explain_of_every_solver() -> None:
    assert "conjugate gradients" in str(module(CGInfluenceModule).explain())
    assert "LiSSA, 1 x 3 minibatches" in str(module(LiSSAInfluenceModule).explain())
    direct = module(AutogradInfluenceModule).explain(5)["solver"]
    assert "Cholesky" in direct.path
    assert direct.nbytes == 3 * 43 * 43 * 8


def test_a_dense_matrix_that_does_not_fit_is_refused() -> None:
    model = nn.Linear(100_000, 100)  # three matrices of 10^14 elements
    data = DataLoader(TensorDataset(torch.zeros(2, 100_000), torch.zeros(2, dtype=torch.int64)), batch_size=2)
    with pytest.raises(MemoryError, match=r"three 10,000,100 x 10,000,100 matrices, .* GB are free on cpu: choose"):
        AutogradInfluenceModule(model, Classification(), data, data, "cpu", damp=1.0)


@pytest.mark.parametrize("kind", [CGInfluenceModule, AutogradInfluenceModule])
def test_the_matrix_is_the_same_from_either_side_and_in_tiles(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """7 queries: with 2 training examples it is solved for these; with 23 for the queries, in tiles of 2 if need be."""
    it = module(kind)
    solved: list[int] = []
    plain = it.inverse_hvp
    monkeypatch.setattr(it, "inverse_hvp", lambda rows: solved.append(len(rows)) or plain(rows))
    whole = it.influence_matrix()
    few = it.influence_matrix(train_idxs=[3, 11])
    assert solved == [7, 2]
    monkeypatch.setattr("torch_influence.base.free_memory", lambda device: 2 * 4 * 8 * 8 * 43)
    tiled = it.influence_matrix()
    assert solved == [7, 2, 2, 2, 2, 1]
    # Solved to 1e-12, at a condition of about 10.
    assert ((few - whole[[3, 11]]).abs() <= 1e-10 * whole.abs().max()).all()
    assert ((tiled - whole).abs() <= 1e-10 * whole.abs().max()).all()
    assert whole.abs().max() > 1e-4


class NearlySoftmax(Classification):
    """Cross-entropy and a little of a z-loss: its curvature is off softmax's by some 1e-4."""

    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1]) + 1e-4 * outputs.logsumexp(dim=-1).square().mean()


def test_nearly_softmax_is_not_taken_for_softmax_in_float32() -> None:
    torch.manual_seed(1)
    model = nn.Linear(4, 3)
    data = {"train_loader": loader(dtype=torch.float32), "test_loader": loader(n=7, dtype=torch.float32)}
    assert "softmax" in module(model=model, **data).explain()["curvature"].path
    assert "a block per example" in module(model=model, objective=NearlySoftmax(), **data).explain()["curvature"].path

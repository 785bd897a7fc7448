"""Scores from the inputs and output gradients of layers, against gradients of batches of one in float64."""

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
from torch_influence.gradients import _contraction as contraction
from torch_influence.scores._tiles import from_stests, whole

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


class Tokens(nn.Module):
    """Two calls of an embedding with a padding token, positions that are the same for all, and a tied output."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(3, 5, padding_idx=1, **options), nn.Embedding(4, 5)
        self.norm, self.out = nn.RMSNorm(5), nn.Linear(5, 3)
        self.out.weight = self.tokens.weight
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x > 0).long() + (x > 0.5).long()
        h = self.tokens(tokens) + 0.5 * self.tokens(tokens.flip(1)).tanh() + self.places(torch.arange(4))
        return self.out(self.norm(h).tanh().mean(dim=1))


class Twin(nn.Module):
    """A layer of no known kind."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT


class TiedToAnotherKind(nn.Module):
    """A weight shared with a layer of no known kind is not accounted for; the rest, most of all, is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 9), nn.Linear(9, 3)
        self.twin = Twin(self.first.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.inner(self.twin(torch.tanh(self.first(x))))))


class OnlyBiases(nn.Module):
    """Weights are frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv1d(1, 4, 2), nn.LayerNorm(3), nn.Linear(12, 3)
        for layer in (self.conv, self.norm, self.last):
            layer.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.conv(x.unsqueeze(1)))).flatten(1))


class Frames(nn.Module):
    """Several images of an example pass a convolution as one batch, in two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(1, 8, (1, 2), padding=1), nn.GroupNorm(2, 8), nn.Linear(8, 3)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.view(-1, 1, 1, 2)
        h = self.norm(torch.tanh(self.conv(frames) + self.conv(frames.flip(3)))).flatten(2).square().mean(2)
        return self.last(h.view(len(x), 2, 8).sum(dim=1))


class Scaled(nn.Conv1d):
    """A convolution with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight * self.weight.square().mean().sqrt(), self.bias)


class Images(nn.Module):
    """An input of any size made of four features."""

    def __init__(self, *size: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.register_buffer("mix", torch.randn(4, *size, generator=generator).flatten(1))
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.mix).unflatten(1, self.size)


def convolutional(conv: nn.Module, axes: int) -> nn.Module:
    """A convolution of an image of 7, 7 x 6 or 7 x 6 x 5 points, and a small head that tells its positions apart."""
    channels, size = conv.in_channels, (7, 6, 5)[:axes]
    body = deep(Images(channels, *size), conv, nn.Tanh(), nn.Flatten())
    with torch.no_grad():
        width = body(torch.zeros(1, 4, dtype=torch.float64)).shape[1]
    fixed = Images(1)  # a read-out without parameters
    fixed.mix = torch.randn(width, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) / width**0.5
    fixed.size = (3,)
    return nn.Sequential(body, fixed)


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "1d": (lambda: nn.Conv1d(2, 8, 3), 1),
    "1d unpadded, by name": (lambda: nn.Conv1d(2, 8, 3, padding="valid", stride=2), 1),
    "1d same, even": (lambda: nn.Conv1d(2, 8, 4, padding="same", dilation=1), 1),
    "2d": (lambda: nn.Conv2d(2, 8, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), 2),
    "2d without bias": (lambda: nn.Conv2d(3, 8, 3, bias=False), 2),
    "2d same, dilated, circular": (
        lambda: nn.Conv2d(2, 8, (2, 3), padding="same", dilation=2, padding_mode="circular"),
        2,
    ),
    "2d reflect": (lambda: nn.Conv2d(1, 8, 3, padding=2, padding_mode="reflect", stride=3), 2),
    "2d groups": (lambda: nn.Conv2d(4, 16, 3, groups=2, padding=1, stride=2), 2),
    "2d depthwise": (lambda: nn.Conv2d(3, 12, 2, groups=3, dilation=2), 2),
    "3d": (lambda: nn.Conv3d(2, 8, (3, 1, 2), stride=(1, 2, 1), padding=(0, 1, 1), dilation=(2, 1, 1)), 3),
    "3d groups, replicate": (lambda: nn.Conv3d(2, 16, 2, groups=2, padding=1, padding_mode="replicate"), 3),
}


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


TRANSPOSED = (nn.Unflatten(1, (1, 4)), nn.ConvTranspose1d(1, 1, 2, padding=1), nn.Flatten())

MODELS: dict[str, tuple[Callable[[], nn.Module], BaseObjective, str, str]] = {
    # model, objective, and the ways for 2 and for 20 vectors
    "two layers": (lambda: deep(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), Classification(), LAYERS, LAYERS),
    "class weights": (lambda: deep(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), ClassWeighted(), LAYERS, LAYERS),
    "cubed": (lambda: deep(nn.Linear(4, 3)), Cubed(), LAYERS, LAYERS),
    "overridden": (lambda: deep(nn.Linear(4, 3)), Overridden(), DIRECTIONS, ROWS),
    "layer norm too": (
        lambda: deep(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)),
        Classification(),
        LAYERS,
        LAYERS,
    ),
    "layer used twice": (Twice, Classification(), LAYERS, LAYERS),
    "weight used besides": (Functional, Classification(), DIRECTIONS, ROWS),
    "sequences": (Sequences, Classification(), LAYERS, LAYERS),
    "tied": (Tied, Classification(), LAYERS, LAYERS),
    "tokens": (Tokens, Classification(), LAYERS, LAYERS),
    "tied to another kind": (TiedToAnotherKind, Classification(), LAYERS, LAYERS),
    "only a bias": (OnlyBiases, Classification(), LAYERS, LAYERS),
    "frames": (Frames, Classification(), LAYERS, LAYERS),
    "scaled convolution": (lambda: convolutional(Scaled(1, 8, 2), 1), Classification(), DIRECTIONS, ROWS),
    # Its gradient depends on what else is in a batch, so that nothing adds up.
    "counted tokens": (lambda: Tokens(scale_grad_by_freq=True), Classification(), ONES, ONES),
    "transposed": (lambda: deep(*TRANSPOSED), Classification(), DIRECTIONS, ROWS),
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
    with it._problem.evaluation.session():
        examples, n = it._problem.train_gradients(), it._problem.train.n
        scores = whole(from_stests(examples, range(n), vectors, n), range(n), len(vectors), vectors.dtype)
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


@pytest.mark.parametrize("tile", [2**22, 100])
@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, few: bool, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways for vectors of a convolution, by patches also of some examples and channels at a time.

    Both sides sum fewer than 10⁴ terms in float64, whose magnitudes are below 10².
    """
    build, axes = CONVOLUTIONS[name]
    it = module(model=convolutional(build(), axes), objective=Classification())
    vectors = torch.randn(3, it.flat_parameters().numel(), dtype=torch.float64)
    patches: list[int] = []
    plain = contraction._patches
    monkeypatch.setattr(contraction, "_patches", lambda m, a: patches.append(len(a)) or plain(m, a))
    monkeypatch.setattr(contraction, "_COPIED", 1e9 if few else -1e9)
    monkeypatch.setattr(contraction, "_TILE", tile)
    scores, path = scores_of(it, vectors)
    assert path == LAYERS
    assert bool(patches) != few
    assert few or (max(patches) == 23) == (tile > 100)
    expected = alone(it, vectors)
    assert ((scores - expected).abs() <= 1e4 * 1e2 * torch.finfo(torch.float64).eps).all()
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(6), nn.GroupNorm(3, 6), nn.GroupNorm(1, 6), nn.LayerNorm((6, 4))])
def test_norms_between_convolutions(norm: nn.Module) -> None:
    """Running statistics and affine parameters are random. Sums and magnitudes as of test_scores."""
    torch.manual_seed(1)
    for p in (*norm.parameters(), *(b for b in norm.buffers() if b.is_floating_point())):
        nn.init.uniform_(p, 0.5, 2.0)
    layers = (nn.Conv1d(1, 6, 2, padding="same"), norm, nn.Tanh(), nn.Conv1d(6, 3, 4), nn.Flatten())
    it = module(model=deep(nn.Unflatten(1, (1, 4)), *layers).eval(), objective=Classification())
    vectors = torch.randn(20, it.flat_parameters().numel(), dtype=torch.float64)
    scores, path = scores_of(it, vectors)
    assert path == LAYERS
    expected = alone(it, vectors)
    assert ((scores - expected).abs() <= 1e3 * 1e2 * torch.finfo(torch.float64).eps).all()


def test_a_group_of_many_examples_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for inputs and output gradients is bounded: so many examples at a time as fit."""
    build, objective, _, _ = MODELS["two layers"]
    it = module(model=build(), objective=objective)
    vectors = torch.randn(20, it.flat_parameters().numel(), dtype=torch.float64)
    whole, _ = scores_of(it, vectors)
    monkeypatch.setattr("torch_influence.gradients._examples._BYTES_OF_ROWS", 1000)  # 5 examples
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
    assert plan["curvature"].nbytes == 23 * (4 + 3 + 1 + 3) * 8  # inputs, probabilities, weights, slopes
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
    monkeypatch.setattr("torch_influence.memory.free_memory", lambda device: 2 * 4 * 8 * 8 * 43)
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

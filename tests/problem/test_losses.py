"""A loss that is no mean over the batch is noticed wherever in the data it stands; one that is a mean never is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import Supervised, assert_close, dense_hessian, loader_batches
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from torch_influence import AutogradInfluenceModule, CGInfluenceModule, InfluenceModule, LiSSAInfluenceModule
from torch_influence.evaluation import Evaluation
from torch_influence.losses import Means, in_one_batch, precision
from torch_influence.parameters import ParameterSpace

N, BATCH = 120, 10
NO_MEAN = "expected the mean loss over the batch, got something else"
MODULES: dict[str, tuple[type, dict[str, Any]]] = {
    "auto": (InfluenceModule, {}),
    "gauss-newton": (InfluenceModule, {"gnh": True, "solver": "cg"}),
    "block": (InfluenceModule, {"solver": "block"}),
    "direct": (AutogradInfluenceModule, {}),
    "cg, not cached": (CGInfluenceModule, {"cache": False}),
    "lissa": (LiSSAInfluenceModule, {"repeat": 1, "depth": 40, "scale": 20.0, "on_failure": "ignore"}),
}


def net(layers: int, inputs: int = 5, classes: int = 3) -> nn.Module:
    if layers == 1:
        return nn.Linear(inputs, classes).double()
    return nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, classes)).double()


def data(n: int = N) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 5, dtype=torch.float64), torch.randint(2, (n,))


class Trained(Supervised):
    """Another loss for the test data than for the training data."""

    def test_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])


def weighted(outputs: Tensor, y: Tensor) -> Tensor:
    """What F.cross_entropy makes of class weights: class 2 weighs 30 times as much."""
    return F.cross_entropy(outputs, y, weight=torch.tensor([1.0, 1.0, 30.0], dtype=outputs.dtype))


def built(kind: str, model: nn.Module, objective: Any, loader: Any, test: Any = None) -> Any:
    cls, options = MODULES[kind]
    return cls(model, objective, loader, test or loader, "cpu", damp=1.0, **options)


def said(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in record if "expected the mean loss" in str(warning.message)]


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("place", [3, N // 2 + 3, N - 2])
def test_one_example_of_a_rare_class_is_noticed_wherever_it_stands(kind: str, layers: int, place: int) -> None:
    x, y = data()
    y[place] = 2
    loader = DataLoader(TensorDataset(x, y), BATCH)
    assert (
        place
        not in in_one_batch(InfluenceModule(net(1), Trained(weighted), loader, None, "cpu", 1.0)._problem.train)[0]
    )
    found = said(lambda: built(kind, net(layers), Trained(weighted), loader).influences([0, 1], [0]))
    assert len(found) == 1
    assert found[0].startswith(f"train_loss: {NO_MEAN}")


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", MODULES)
def test_a_mean_is_never_said_to_be_none(kind: str, layers: int) -> None:
    x, y = data(N + 3)  # a ragged last batch
    for dtype in (torch.float32, torch.float64):
        loader = DataLoader(TensorDataset(x.to(dtype), y), BATCH)
        objective = Trained(F.cross_entropy, 0.1)
        model = net(layers).to(dtype)
        assert not said(lambda m=model, o=objective, d=loader: built(kind, m, o, d).influence_matrix(None, [0, 1]))


def test_rounding_of_tiny_losses_is_no_finding() -> None:
    """A network that has learned all examples by heart: their losses are a few units of rounding each."""
    x, y = data()
    x = torch.cat([x, 14.0 * F.one_hot(y, 3)], dim=1).float()
    model = nn.Linear(8, 3)
    model.weight.data = torch.cat([0.3 * torch.randn(3, 5), torch.eye(3)], dim=1)
    assert F.cross_entropy(model(x), y) < 1e-5
    loader = DataLoader(TensorDataset(x, y), BATCH)
    assert not said(lambda: InfluenceModule(model, Supervised(F.cross_entropy), loader, loader, "cpu", 1.0).stests([0]))


def test_labels_that_are_ignored_are_noticed_though_alone_they_make_nan() -> None:
    x, y = data()
    y[N // 2 + 4] = -100
    loader = DataLoader(TensorDataset(x, y), BATCH)
    test = DataLoader(TensorDataset(x[:4], y[:4]), 2)
    found = said(lambda: built("auto", net(1), Supervised(F.cross_entropy), loader, test).influences([0], [0]))
    assert len(found) == 1
    assert "nan for the mean of their losses one by one" in found[0]


def test_a_nan_among_the_first_eight_does_not_end_the_look() -> None:
    x, y = data()
    some = in_one_batch(
        InfluenceModule(
            net(1), Trained(weighted), DataLoader(TensorDataset(x, y), BATCH), None, "cpu", 1.0
        )._problem.train
    )[0]
    x[some[0]] = torch.nan
    y[some[3]] = 2
    loader = DataLoader(TensorDataset(x, y), BATCH)
    module = InfluenceModule(net(1), Trained(weighted), loader, loader, "cpu", 1.0, on_failure="ignore")
    assert said(lambda: module.train_loss_grad([1]))


class Texts(Dataset):
    """Texts of one length, but for a few short ones; ``ragged`` ones are not padded."""

    def __init__(self, ragged: bool, short: list[int]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(1, 7, (60, 6), generator=generator)
        self.length = [2 if i in short else 6 for i in range(60)]
        self.ragged = ragged

    def __len__(self) -> int:
        return 60

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        tokens = self.tokens[i].clone()
        labels = tokens.roll(-1)
        labels[self.length[i] :] = -100
        size = self.length[i] if self.ragged else 6
        return tokens[:size], labels[:size]


def padded(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    tokens, labels = zip(*rows, strict=True)
    pad = nn.utils.rnn.pad_sequence
    return pad(list(tokens), batch_first=True), pad(list(labels), batch_first=True, padding_value=-100)


class Language(nn.Module):
    def __init__(self, recurrent: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.middle = nn.GRU(4, 4, batch_first=True) if recurrent else nn.Linear(4, 4)
        self.head = nn.Linear(4, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.middle(self.embedding(tokens))
        return self.head(h[0] if isinstance(h, tuple) else h.tanh())


def per_token(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.mT, labels)


@pytest.mark.parametrize("recurrent", [False, True], ids=["linear", "recurrent"])
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
def test_a_mean_over_tokens_is_noticed_where_few_texts_are_short(ragged: bool, recurrent: bool) -> None:
    model = Language(recurrent).double()
    for short in ([], [33]):
        loader = DataLoader(Texts(ragged, short), 6, collate_fn=padded)
        module = InfluenceModule(
            model, Supervised(per_token, 0.1), loader, loader, "cpu", 1.0, solver="cg", maxiter=2, on_failure="ignore"
        )
        found = said(lambda m=module: m.influences([0], [0]))
        assert len(found) == len(short)


class WholeLoss(Trained):
    """Overrides train_loss."""

    def train_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
        return self.loss(model(batch[0]), batch[1]) + 0.005 * params.square().sum()


def test_an_overridden_train_loss_is_looked_at_as_well() -> None:
    x, y = data()
    loader = DataLoader(TensorDataset(x, y), BATCH)
    assert not said(lambda: built("auto", net(1), WholeLoss(F.cross_entropy), loader).influences([0], [0]))
    y[N // 2 + 3] = 2
    assert said(lambda: built("auto", net(1), WholeLoss(weighted), loader).influences([0], [0]))


def test_the_queries_of_a_set_are_looked_at() -> None:
    x, y = data()
    y[N // 2 + 3] = 2
    loader, test = DataLoader(TensorDataset(x, y % 2), BATCH), DataLoader(TensorDataset(x, y), BATCH)
    module = built("auto", net(1), Supervised(lambda o, t: weighted(o, t), 0.1), loader, test)
    assert not said(lambda: module.influences([0], [1, 2]))
    found = said(lambda: module.influences([0], range(N // 2, N // 2 + 5)))
    assert [text.split(":")[0] for text in found] == ["test_loss"]


def test_random_data_are_compared_as_they_were_read() -> None:
    class Noisy(Dataset):
        def __len__(self) -> int:
            return N

        def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
            return x[i] + 0.1 * torch.randn(5, dtype=torch.float64), y[i]

    x, y = data()
    for rare in (0, 1):
        y[N // 2 + 3] = 2 * rare
        module = built("gauss-newton", net(2), Trained(weighted), DataLoader(Noisy(), BATCH), None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = torch.ones(1, module._problem.space.size, dtype=torch.float64)
        assert len(said(lambda m=module, r=row: m.hvp(r))) == rare


@pytest.mark.parametrize("layers", [1, 2])
def test_larger_batches_are_given_up_where_one_of_the_loaders_is_no_mean(layers: int) -> None:
    """Regrouping is tested with some batches of the data; the curvature is that of the loader's own all the same."""
    n = 40 * BATCH
    x, y = data(n)
    y[4 * BATCH + 3 : 4 * BATCH + 6] = 2  # in a batch that is none of the 32 which are compared
    loader, model, objective = DataLoader(TensorDataset(x, y), BATCH), net(layers), Trained(weighted, 0.1)
    module = CGInfluenceModule(model, objective, loader, loader, "cpu", 1.0)
    assert not set(range(4 * BATCH, 5 * BATCH)) & set(in_one_batch(module._problem.train)[0])
    rows = torch.randn(3, module._problem.space.size, dtype=torch.float64)
    with pytest.warns(UserWarning, match=NO_MEAN):
        products = module.hvp(rows)
    expected = rows @ dense_hessian(model, objective, loader_batches(loader))
    assert_close(products, expected, operations=n * module._problem.space.size)


def test_verify_looks_at_the_batch_that_departs_most() -> None:
    x, y = data()
    y[N // 2 + 3] = 2
    loader = DataLoader(TensorDataset(x, y), BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = built("auto", net(2), Trained(weighted, 0.1), loader).verify(print=False)
    assert not found["mean"].passed


# -- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [torch.float32, torch.bfloat16])
def test_the_least_precise_dtype_on_the_way_is_seen(inside: torch.dtype) -> None:
    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs.to(inside), y).double()

    x, y = data()
    leaf = x.requires_grad_()
    assert precision(F.cross_entropy(leaf, y)) is torch.float64
    assert precision(loss(leaf, y)) is inside
    loader = DataLoader(TensorDataset(x.detach(), y), BATCH)
    module = InfluenceModule(net(2), Supervised(loss, 0.1), loader, loader, "cpu", 1.0, solver="direct")
    assert not said(module.influence_matrix)
    assert module._problem.space.pass_dtype is inside
    assert module.verify(print=False)["mean"].passed


# -- cost -------------------------------------------------------------------------------------------------------------


def test_a_look_is_one_forward_pass_and_no_pass_is_looked_at_twice() -> None:
    x, y = data()
    loader, model, objective = DataLoader(TensorDataset(x, y), BATCH), net(2), Supervised(F.cross_entropy)
    module = InfluenceModule(model, objective, loader, None, "cpu", 1.0)
    evaluation = Evaluation(model, objective, ParameterSpace(model))
    with FlopCounterMode(display=False) as forward:
        model(x)
    means = Means("data_loss", evaluation, module._problem.train)
    for again in (False, True):
        with FlopCounterMode(display=False) as looks:
            for start in range(0, N, BATCH):
                some = range(start, start + BATCH)
                batch = x[some.start : some.stop], y[some.start : some.stop]
                means.add(batch, BATCH, evaluation.data_loss(evaluation.leaves(), batch).detach(), some)
            assert means.conclude()
        together = forward.get_total_flops()
        assert looks.get_total_flops() == together + (0 if again else together)

"""Errors of torch that say nothing of influence: what they mean is said, and anything else passes as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import Classification, loader, module, network
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torch_influence import BaseInfluenceModule, InfluenceModule
from torch_influence.torch_errors import explained, meaning


class Aligned(Classification):
    """CTC: torch has no derivative of its backward."""

    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        steps = outputs.log_softmax(-1).expand(4, *outputs.shape)
        sizes = torch.full((2, len(outputs)), 1) * torch.tensor([[4], [1]])
        return F.ctc_loss(steps, batch[1][:, None], *sizes, blank=2, reduction="none").mean()

    def test_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
        return self.train_loss_on_outputs(model(batch[0]), batch)


class Margins(Classification):
    """As torch has no derivative of the backward of this one."""

    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.multi_margin_loss(outputs, batch[1])


class Prototypes(nn.Module):
    """Logits are distances: torch raises another class of error for these, in other words."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.prototypes = network(), nn.Parameter(torch.eye(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(self.layers(x), self.prototypes)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.layers[2], self.layers[:2](x), use_reentrant=True)


class Remembers(nn.Module):
    """An RNN that goes on where the last batch has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.RNN(4, 5, batch_first=True), nn.Linear(5, 3)
        self.hidden = torch.zeros(1, 1, 5, dtype=torch.float64)

    def forward(self, x: Tensor) -> Any:
        out, hidden = self.rnn(x[:, None], self.hidden.expand(-1, len(x), -1).contiguous())
        self.hidden = hidden.mean(dim=1, keepdim=True)
        return self.head(out[:, 0])


def normalised() -> nn.Module:
    norm = nn.BatchNorm1d(5, track_running_stats=False)
    return nn.Sequential(nn.Linear(4, 5), norm, nn.Tanh(), nn.Linear(5, 3)).double()


RIDDLES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "ctc": (lambda: module(objective=Aligned()), RuntimeError, "torch's ctc_loss. It can be differentiated once only"),
    "ctc, gnh": (
        lambda: module(objective=Aligned(), gnh=True),
        RuntimeError,
        "torch's ctc_loss. It .* no second deriv",
    ),
    "margins": (lambda: module(objective=Margins()), RuntimeError, "torch's multi_margin_loss. It .* no second deriv"),
    "a layer": (lambda: module(model=Prototypes()), NotImplementedError, "torch's cdist. It .* no second derivative"),
    "checkpoints": (lambda: module(model=Checkpointed()), RuntimeError, "reentrant checkpointing.*use_reentrant=False"),
    "state": (lambda: module(model=Remembers().double()), RuntimeError, "keeps tensors from one call to the *next"),
    "batch norm": (
        lambda: module(model=normalised()),
        ValueError,
        "a batch of one example is too small .*running_stats",
    ),
}


@pytest.mark.parametrize("name", RIDDLES)
@pytest.mark.filterwarnings("ignore")
def test_what_torch_means_is_said(name: str) -> None:
    make, kind, words = RIDDLES[name]
    with pytest.raises(kind, match=words) as caught:
        make().influence_matrix([0, 1], [0])
    assert type(caught.value) is kind
    assert str(caught.value.__cause__) != str(caught.value)


def test_products_of_gradients_need_no_second_derivative() -> None:
    """As the words have it."""

    class Products(BaseInfluenceModule):
        batched = True

        def inverse_hvp(self, vec: Tensor) -> Tensor:
            return vec

    scores = module(Products, objective=Aligned()).influence_matrix([0, 1], [0, 1])
    assert scores.isfinite().all()
    assert (scores != 0).all()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Double backwards is not supported for CuDNN RNNs due to limitations", "CuDNN RNNs. It .*cudnn.flags"),
        ("trying to differentiate twice a function that was marked with @once_differentiable", "autograd.Function"),
        ("torch.compile with aot_autograd does not currently support double backward", "torch.compile. It can be"),
    ],
)
def test_errors_of_other_machines(text: str, words: str) -> None:
    with pytest.raises(NotImplementedError, match=words), explained():
        raise NotImplementedError(text)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2"), KeyError("backward"), torch.OutOfMemoryError("2 GB")])
def test_other_errors_pass_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, explained():
        raise error
    assert caught.value is error
    assert meaning("derivative for aten::bincount is not implemented") == ""  # a first one


# -- batch norm --------------------------------------------------------------------------------------------------------


def test_a_layer_that_normalises_by_the_batch_is_named() -> None:
    with pytest.warns(UserWarning, match="model: BatchNorm1d '1' normalises by the batch.*track_running_stats"):
        module(model=normalised())


def test_other_layers_that_normalise_are_no_mistake(recwarn: pytest.WarningsRecorder) -> None:
    for norm in (nn.BatchNorm1d(5), nn.InstanceNorm1d(5), nn.GroupNorm(1, 5)):
        model = nn.Sequential(nn.Linear(4, 5), norm.eval(), nn.Linear(5, 3)).double()
        module(model=model)
    assert not recwarn.list


# -- autocast ----------------------------------------------------------------------------------------------------------


def single(**changes: Any) -> Any:
    kind = torch.float32
    data = {"train_loader": loader(dtype=kind), "test_loader": loader(n=7, batch_size=3, dtype=kind, seed=3)}
    return module(InfluenceModule, **({"model": network(kind), "damp": 1.0} | data | changes))


def test_autocast_around_a_call_is_ignored_and_said_to_be(recwarn: pytest.WarningsRecorder) -> None:
    expected = module(InfluenceModule, damp=1.0, rtol=1e-12).influence_matrix()
    assert not recwarn.list
    it = single()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.warns(UserWarning, match="autocast is on around this call, and is ignored: .*bfloat16") as caught:
            scores = it.influence_matrix()
        assert torch.is_autocast_enabled("cpu")
    assert caught[0].filename == __file__
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:train_loss. expected the mean", "ignore:conjugate gradients did not converge")
def test_autocast_inside_of_the_model_is_named(recwarn: pytest.WarningsRecorder) -> None:
    class Rounds(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.layers = network(dtype)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.layers(x)

    with pytest.warns(UserWarning, match="it is computed in torch.bfloat16 in part, and the parameters are .*autocast"):
        single(model=Rounds(torch.float32)).influences([0], [0])
    recwarn.clear()
    half = {"train_loader": loader(dtype=torch.bfloat16), "test_loader": loader(dtype=torch.bfloat16)}
    single(model=Rounds(torch.bfloat16), **half).influences([0], [0])  # as precise as it was
    assert not [w for w in recwarn.list if "autocast" in str(w.message)]

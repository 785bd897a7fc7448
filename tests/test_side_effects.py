"""The user's model, its parameters, mode and flags are the same before and after, whatever happens in between."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import SOLVER_OPTIONS, Classification, loader, module, network
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from torch_influence import AutogradInfluenceModule, CGInfluenceModule

ALL_MODULES = list(SOLVER_OPTIONS)


class Counting(nn.Module):
    """Counts its calls in a buffer, in place, and keeps its last activation as a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        self.kept.append(x)
        return x * (1 + 0 * self.calls)


def awkward() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), Counting(), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3))
    model.double().train()
    model[1].eval()  # a mode of its own
    model[0].weight.grad = torch.ones_like(model[0].weight)
    return model


class Snapshot:
    """Everything of a model that a user could notice."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.buffers = dict(model.named_buffers(remove_duplicate=False))
        self.values = {name: t.detach().clone() for name, t in (self.parameters | self.buffers).items()}
        self.versions = {name: t._version for name, t in (self.parameters | self.buffers).items()}
        self.grads = {name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in self.parameters.items()}
        self.requires_grad = {name: p.requires_grad for name, p in self.parameters.items()}
        self.modes = [m.training for m in model.modules()]
        self.attributes = [set(vars(m)) for m in model.modules()]
        self.flags = flags()

    def check(self) -> None:
        now = dict(self.model.named_parameters(remove_duplicate=False))
        now |= dict(self.model.named_buffers(remove_duplicate=False))
        assert list(now) == list(self.parameters | self.buffers)
        for name, t in (self.parameters | self.buffers).items():
            assert now[name] is t
            assert torch.equal(t, self.values[name])
            assert t._version == self.versions[name]
        for name, (grad, value) in self.grads.items():
            assert self.parameters[name].grad is grad
            assert grad is None or torch.equal(grad, value)
        assert {name: p.requires_grad for name, p in self.parameters.items()} == self.requires_grad
        assert [m.training for m in self.model.modules()] == self.modes
        assert [set(vars(m)) for m in self.model.modules()] == self.attributes
        assert not any(m.kept for m in self.model.modules() if isinstance(m, Counting))
        assert flags() == self.flags


def tf32() -> dict[str, str]:
    backends = torch.backends
    places = {"all": backends, "cudnn": backends.cudnn, "conv": backends.cudnn.conv, "rnn": backends.cudnn.rnn}
    return {name: place.fp32_precision for name, place in (places | {"matmul": backends.cuda.matmul}).items()}


def flags() -> dict[str, Any]:
    cuda = torch.backends.cuda
    return {
        "flash": cuda.flash_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
        "cudnn": torch.backends.cudnn.enabled,
        "mkldnn": torch.backends.mkldnn.enabled,
        "mha": torch.backends.mha.get_fastpath_enabled(),
        "tf32": tf32(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
    }


CALLS: dict[str, Callable[[Any], Any]] = {
    "train_loss_grad": lambda it: it.train_loss_grad([0, 1]),
    "test_loss_grad": lambda it: it.test_loss_grad([0, 1]),
    "hvp": lambda it: it.hvp(it.flat_parameters()),
    "stests": lambda it: it.stests(),
    "influences": lambda it: it.influences([0, 1], [0]),
    "influence_matrix": lambda it: it.influence_matrix(),
    "self_influences": lambda it: it.self_influences(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("kind", ALL_MODULES)
def test_success_leaves_no_trace(kind: type, call: Callable[[Any], Any]) -> None:
    model = awkward()
    before = Snapshot(model)
    call(module(kind, model=model))
    before.check()


class FailsAt(Classification):
    """Raises in the n-th evaluation of the chosen method."""

    def __init__(self, method: str, countdown: int, error: BaseException) -> None:
        self.method, self.countdown, self.error = method, countdown, error

    def tick(self, method: str) -> None:
        if method == self.method:
            self.countdown -= 1
            if self.countdown == 0:
                raise self.error

    def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
        outputs = model(batch[0])
        self.tick("train_outputs")
        return outputs

    def test_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
        loss = super().test_loss(model, params, batch)
        self.tick("test_loss")
        return loss


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize(("method", "countdown"), [("train_outputs", 1), ("train_outputs", 9), ("test_loss", 1)])
@pytest.mark.parametrize("gnh", [False, True])
def test_an_exception_in_the_objective_leaves_no_trace(
    gnh: bool, method: str, countdown: int, error: BaseException
) -> None:
    model = awkward()
    before = Snapshot(model)
    it = module(CGInfluenceModule, model=model, gnh=gnh, objective=FailsAt(method, countdown, error))
    with pytest.raises(type(error)):
        it.influence_matrix()
    before.check()
    it.objective.countdown = -1
    it.influence_matrix()  # and the module still works
    before.check()


def test_an_optimizer_made_before_still_trains_the_model() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    module(model=model).influences([0], [0])
    module(AutogradInfluenceModule, model=model).influences([0], [0])
    x, y = loader().dataset.tensors
    before = [p.detach().clone() for p in model.parameters()]
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_scores_follow_the_parameters() -> None:
    model = network()
    it = module(model=model)
    first = it.influence_matrix()
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    assert not torch.allclose(it.influence_matrix(), first)
    torch.testing.assert_close(it.influence_matrix(), module(model=model).influence_matrix())
    model.load_state_dict(state)
    torch.testing.assert_close(it.influence_matrix(), first)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_inside_no_grad(context: Callable[[], Any]) -> None:
    it = module()
    expected = it.influence_matrix()
    with context():
        torch.testing.assert_close(it.influence_matrix(), expected)
        torch.testing.assert_close(it.hvp(it.flat_parameters()), it.hvp(it.flat_parameters()))


def test_flags_chosen_by_the_user_are_put_back() -> None:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.backends.mkldnn.flags(enabled=False):
        before = flags()
        assert not before["math"]
        module(model=Recurrent("lstm"), train_loader=sequences(), test_loader=sequences()).influences([0], [0])
        assert flags() == before


class AsksForPrecision(Classification):
    """Takes note of how cuDNN would compute, in each evaluation."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
        self.seen.append((tf32()["conv"], tf32()["rnn"]))
        return super().train_outputs(model, batch)


@pytest.fixture
def tf32_as_by_default() -> Iterator[None]:
    yield
    torch.backends.fp32_precision = "none"
    torch.backends.cudnn.fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.fp32_precision = "none"


def settings_of_tf32(setting: str) -> None:
    if setting == "cudnn off":
        torch.backends.cudnn.allow_tf32 = False
    elif setting == "matmul":
        torch.backends.cuda.matmul.allow_tf32 = True
    elif setting == "matmul, newer":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    elif setting == "high":
        torch.set_float32_matmul_precision("high")
    elif setting == "everywhere":
        torch.backends.fp32_precision = "tf32"
    elif setting == "cudnn, newer":
        torch.backends.cudnn.fp32_precision = "tf32"
    elif setting == "conv ieee":
        torch.backends.cudnn.conv.fp32_precision = "ieee"


@pytest.mark.parametrize(
    ("setting", "inside"),
    [
        ("default", ("none", "none")),
        ("cudnn off", ("none", "none")),
        ("matmul", ("tf32", "tf32")),
        ("matmul, newer", ("tf32", "tf32")),
        ("high", ("tf32", "tf32")),
        ("everywhere", ("tf32", "tf32")),
        ("cudnn, newer", ("tf32", "tf32")),
        ("conv ieee", ("ieee", "tf32")),
    ],
)
@pytest.mark.usefixtures("tf32_as_by_default")
def test_convolutions_take_tf32_only_where_the_user_asks_for_it(setting: str, inside: tuple[str, str]) -> None:
    settings_of_tf32(setting)
    before, objective = tf32(), AsksForPrecision()
    module(objective=objective, gnh=True).influence_matrix()
    assert set(objective.seen) == {inside}
    assert tf32() == before


class UsesFlags(Classification):
    """Its forward sets cuDNN's flags, which reads the older of the two switches for TF32."""

    def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            return super().train_outputs(model, batch)


def test_a_forward_that_sets_flags_of_cudnn_still_works() -> None:
    torch.testing.assert_close(module(objective=UsesFlags()).influence_matrix(), module().influence_matrix())


class Recurrent(nn.Module):
    """Layers that keep tensors outside of parameters and buffers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body: nn.Module
        if kind == "lstm":
            self.body = nn.LSTM(4, 5, batch_first=True)
        else:
            self.body = nn.utils.weight_norm(nn.Linear(4, 5)) if kind == "old weight_norm" else nn.Linear(4, 5)
            if kind == "weight_norm":
                nn.utils.parametrizations.weight_norm(self.body)
        self.head = nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        return self.head((hidden[0] if isinstance(hidden, tuple) else hidden).mean(dim=1))


def sequences() -> DataLoader:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(9, 3, 4, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, torch.arange(9) % 3), batch_size=4)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["lstm", "old weight_norm", "weight_norm"])
def test_no_graph_of_ours_stays_in_the_model(kind: str) -> None:
    model = Recurrent(kind)
    before = Snapshot(model)
    expected = model(sequences().dataset.tensors[0]).detach()
    it = module(model=model, train_loader=sequences(), test_loader=sequences())
    it.influence_matrix()
    before.check()
    # Old weight_norm can't be copied after any forward, ours or not.
    copied = copy.deepcopy(it.model) if kind != "old weight_norm" else model
    torch.save(model.state_dict(), io.BytesIO())
    torch.testing.assert_close(copied(sequences().dataset.tensors[0]), expected)


@pytest.fixture(autouse=True)
def _global_state() -> Iterator[None]:
    before = flags()
    yield
    assert flags() == before


def test_compiled_models_are_evaluated_eagerly_and_compiled_afterwards() -> None:
    """Code that aot_eager, as inductor, has compiled can't be differentiated twice."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    compiled = torch.compile(model, backend="aot_eager")
    data = DataLoader(TensorDataset(torch.randn(8, 4).double(), torch.arange(8) % 3), batch_size=3)
    scores = [
        CGInfluenceModule(one, Classification(), data, data, "cpu", 1.0, gnh=True).influence_matrix()
        for one in (model, compiled)
    ]
    assert torch.equal(*scores)
    before = torch._dynamo.utils.counters["stats"]["calls_captured"]
    compiled(torch.zeros(2, 4).double())
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > before

"""The user's model, its parameters, mode and flags are the same before and after, whatever happens in between."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import gc
import io
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import SOLVER_OPTIONS, Classification, loader, module, network
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from torch_influence import AutogradInfluenceModule, CGInfluenceModule, InfluenceModule
from torch_influence.staleness import fingerprint, settings

ALL_MODULES = list(SOLVER_OPTIONS)


@functools.cache
def plain_scores() -> Tensor:
    return module().influence_matrix()


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
        "products": (torch.backends.mkldnn.matmul.fp32_precision, torch.get_float32_matmul_precision()),
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
    torch.set_float32_matmul_precision("highest")
    torch.backends.mkldnn.matmul.fp32_precision = "none"
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
    torch.testing.assert_close(module(objective=UsesFlags()).influence_matrix(), plain_scores())


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


# -- what a forward leaves behind -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Outputs:
    last: Any = None
    all: list[Any] = dataclasses.field(default_factory=list)


class KeyValueCache:
    """As a decoder has it: a count that is wrong without the tensors that it counts."""

    def __init__(self) -> None:
        self.count, self.layers = 0, [Outputs()]

    def update(self, h: Any) -> None:
        self.count += 1
        self.layers[0].last = h
        self.layers.append(Outputs(h))


def in_place(total: Tensor, h: Tensor) -> None:
    total += 1 if torch._C._functorch.is_batchedtensor(h) else h.sum()


KEPT: dict[str, tuple[Callable[[], Any], Callable[[Any, Any], Any]]] = {
    "number": (lambda: 0, lambda kept, h: kept + 1),
    "none": (lambda: None, lambda kept, h: h),
    "tuple": (lambda: (0, []), lambda kept, h: (h, kept[1].append(h) or kept[1])),
    "dict": (lambda: {"n": 0}, lambda kept, h: kept.update(n=kept["n"] + 1, h=h)),
    "dict of lists": (lambda: collections.defaultdict(list, old=[1]), lambda kept, h: kept["old"].append(h)),
    "order": (lambda: collections.OrderedDict(a=1, b=2), lambda kept, h: kept.move_to_end("a")),
    "deque": (lambda: collections.deque([1], maxlen=4), lambda kept, h: kept.append(h)),
    "set": (lambda: {1}, lambda kept, h: kept.add(h)),
    "long list": (lambda: list(range(5000)), lambda kept, h: kept.append(h)),
    "namespace": (lambda: types.SimpleNamespace(n=0), lambda kept, h: vars(kept).update(n=kept.n + 1, h=h)),
    "dataclass": (lambda: Outputs(), lambda kept, h: (setattr(kept, "last", h), kept.all.append(h), None)[-1]),
    "cache": (KeyValueCache, lambda kept, h: kept.update(h)),
    "tensor": (lambda: torch.zeros((), dtype=torch.float64), in_place),
    "array": (lambda: np.zeros(2), lambda kept, h: kept.__iadd__(1)[:0].tolist() or None),
    "nothing": (lambda: None, lambda kept, h: None),
}


class Keeps(nn.Module):
    """Edits what it keeps in each forward, and adds an attribute."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        make, self.edit = KEPT[kind]
        self.kept = make()
        self.net = network()
        self.seen = lambda h: None

    def forward(self, x: Tensor) -> Tensor:
        h = self.net[1](self.net[0](x))
        self.seen(h)
        after = self.edit(self.kept, h)
        self.kept = self.kept if after is None else after
        self.new = h
        return self.net[2](h)


def portrait(value: Any) -> Any:
    """Who is there, and what they hold; the values of tensors and arrays, too."""
    if isinstance(value, Tensor):
        return id(value), value.grad_fn, value._version, value.tolist()
    if isinstance(value, np.ndarray):
        return id(value), value.tolist()
    if isinstance(value, dict):
        return id(value), [(key, portrait(item)) for key, item in value.items()]
    if isinstance(value, list | tuple | set | collections.deque):
        return id(value), [portrait(item) for item in value]
    if isinstance(value, Outputs | KeyValueCache | types.SimpleNamespace):
        return id(value), portrait(dict(vars(value)))[1]
    return id(value)


def test_a_layer_with_two_names_keeps_its_parameters() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.again, self.head = self.layer, nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.again(self.layer(x).tanh()))

    model = Twice().double()
    before = Snapshot(model)
    module(InfluenceModule, model=model, damp=1.0).influences([0, 1], [0])
    before.check()
    assert isinstance(model.layer.weight, nn.Parameter)


@pytest.mark.parametrize("kind", KEPT)
def test_what_a_forward_leaves_behind_is_as_before(kind: str) -> None:
    model, seen = Keeps(kind), []
    model.seen = lambda h: seen.append(weakref.ref(h))
    before, names = portrait(model.kept), list(vars(model))
    it = module(model=model)
    scores = it.influence_matrix()
    assert portrait(model.kept) == before
    assert list(vars(model)) == names
    before_the_second = settings(it._problem.evaluation)
    torch.testing.assert_close(it.influence_matrix(), scores)
    assert settings(it._problem.evaluation) == before_the_second  # what is kept of the curvature is not thrown away
    torch.testing.assert_close(scores, plain_scores())
    del it
    gc.collect()
    assert seen
    assert not any(h() is not None for h in seen)


class Logs(Classification):
    """Counts, and keeps all outputs."""

    def __init__(self) -> None:
        self.count, self.notes, self.outputs, self.last = 0, [], {}, None

    def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
        outputs = super().train_outputs(model, batch)
        self.count += 1
        self.notes.append("called")
        self.last = self.outputs[self.count] = outputs
        return outputs


def test_an_objective_keeps_its_counts_and_no_graph_of_ours() -> None:
    objective = Logs()
    torch.testing.assert_close(module(objective=objective).influence_matrix(), plain_scores())
    assert objective.count == len(objective.notes) > 0
    assert objective.last is None
    assert not any(outputs.requires_grad for outputs in objective.outputs.values())


def test_what_has_no_tensors_in_it_is_others_business() -> None:
    """As the queue of a logger, which another thread empties meanwhile."""
    model = Keeps("nothing")
    log = types.new_class("Log")()
    log.lines = ["before"]
    model.log, model.seen = log, lambda h: log.lines.append("forward")
    module(model=model).influences([0], [0])
    assert log.lines[:2] == ["before", "forward"]


# -- layers that do more than to note their mode ----------------------------------------------------------------------


class Lora(nn.Linear):
    """Merges B A into its weight in eval mode."""

    def __init__(self, merge: Callable[[Lora, Tensor], None]) -> None:
        super().__init__(4, 5)
        self.A, self.B = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(5, 2))
        self.merge, self.merged, self.switched = merge, False, 0
        self.weight.requires_grad_(False)

    def train(self, mode: bool = True) -> Lora:
        super().train(mode)
        self.switched += 1
        if self.merged is mode:
            self.merge(self, (self.B @ self.A).detach() * (-1 if mode else 1))
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.merged else y + x @ self.A.T @ self.B.T


def by_data(layer: Lora, change: Tensor) -> None:
    layer.weight.data += change


def in_new_memory(layer: Lora, change: Tensor) -> None:
    layer.weight.data = layer.weight.data + change


def under_no_grad(layer: Lora, change: Tensor) -> None:
    with torch.no_grad():
        layer.weight.add_(change)


def by_another_parameter(layer: Lora, change: Tensor) -> None:
    layer.weight = nn.Parameter(layer.weight.data + change, requires_grad=False)


class Memoised(nn.Linear):
    """Keeps a scaled weight while it is in eval mode."""

    def train(self, mode: bool = True) -> Memoised:
        super().train(mode)
        if mode:
            vars(self).pop("scaled", None)
        else:
            self.scaled = self.weight.detach() * 2
        return self

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 2 if self.training else self.scaled, self.bias)


class Folded(nn.Module):
    """Two branches, and from the first eval mode on one layer made of them: there is no way back."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = (nn.Linear(4, 5).requires_grad_(False) for _ in range(2))

    def train(self, mode: bool = True) -> Folded:
        super().train(mode)
        if not mode and hasattr(self, "one"):
            self.folded = copy.deepcopy(self.one)
            self.folded.weight.data += self.other.weight.data
            self.folded.bias.data += self.other.bias.data
            del self.one, self.other
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.folded(x) if hasattr(self, "folded") else self.one(x) + self.other(x)


class KeepsStatistics(nn.Sequential):
    """Its normalisation stays in eval mode."""

    def train(self, mode: bool = True) -> KeepsStatistics:
        super().train(mode)
        self[1].eval()
        return self


SWITCHING: dict[str, Callable[[], nn.Module]] = {
    "LoRA by .data": lambda: Lora(by_data),
    "LoRA in new memory": lambda: Lora(in_new_memory),
    "LoRA under no_grad": lambda: Lora(under_no_grad),
    "LoRA by another parameter": lambda: Lora(by_another_parameter),
    "memoised": lambda: Memoised(4, 5),
    "frozen statistics": lambda: KeepsStatistics(nn.Linear(4, 5), nn.BatchNorm1d(5)),
}


def switching(kind: str) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(SWITCHING[kind](), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)).double().train()
    model[2].eval()  # a mode of its own
    for p in model[0].parameters():
        p.data[0] = -0.0  # which W + B A - B A is not, nor do numbers tell
    return model


def bits(model: nn.Module) -> list[Any]:
    return [(t.data_ptr(), t.detach().reshape(-1).view(torch.uint8).tolist()) for t in model.state_dict().values()]


def attributes(model: nn.Module) -> list[Any]:
    return [[(name, id(value)) for name, value in vars(m).items()] for m in model.modules()]


@pytest.mark.parametrize("kind", SWITCHING)
def test_a_layer_that_works_at_a_switch_of_mode_is_as_before(kind: str) -> None:
    model, objective = switching(kind), Classification()
    before, exactly, all_attributes = Snapshot(model), bits(model), attributes(model)
    evaluations: list[int] = []
    objective.train_outputs = lambda m, batch: (evaluations.append(1), m(batch[0]))[1]  # type: ignore[method-assign]
    it = module(InfluenceModule, model=model, objective=objective, damp=1.0, solver="direct")
    counts = []
    for _ in range(2):
        evaluations.clear()
        scores = it.influence_matrix()
        counts.append(len(evaluations))
        before.check()
        assert (bits(model), attributes(model)) == (exactly, all_attributes)
    assert counts[1] < counts[0]  # the matrix is not made again
    in_eval_mode = copy.deepcopy(model).eval()
    torch.testing.assert_close(
        scores, module(InfluenceModule, model=in_eval_mode, damp=1.0, solver="direct").influence_matrix()
    )
    it = module(AutogradInfluenceModule, model=model)  # and here, with no warning that parameters have changed
    torch.testing.assert_close(it.stests(), it.stests())


def test_a_model_in_eval_mode_is_not_switched() -> None:
    model = switching("LoRA by .data").eval()
    before = model[0].switched
    module(model=model).influences([0], [0])
    assert model[0].switched == before


@pytest.mark.parametrize("fails_at", [False, True])
def test_an_error_in_train_leaves_the_model_whole(fails_at: bool) -> None:
    def merge(layer: Lora, change: Tensor) -> None:
        by_data(layer, change)
        if (layer.merged is False) is not fails_at:
            raise RuntimeError("no room for it")

    model = switching("LoRA by .data")
    model[0].merge = merge
    before, exactly, all_attributes = Snapshot(model), bits(model), attributes(model)
    with pytest.raises(RuntimeError, match="no room for it"):
        module(model=model).influences([0], [0])
    before.check()
    assert (bits(model), attributes(model)) == (exactly, all_attributes)


def test_a_structure_that_is_lost_in_eval_mode_is_put_back() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(Folded(), nn.Tanh(), nn.Linear(5, 3)).double()
    before, modules = Snapshot(model), list(model.modules())
    scores = module(model=model).influence_matrix()
    before.check()
    assert list(model.modules()) == modules
    torch.testing.assert_close(scores, module(model=copy.deepcopy(model).eval()).influence_matrix())
    model[0].requires_grad_(True)
    it = module(model=model)
    with pytest.raises(ValueError, match=r"eval mode, too, got none named 0\.one\.bias.*call model\.eval\(\)"):
        it.influences([0], [0])
    assert list(model.modules()) == modules


# -- tensors of other kinds -------------------------------------------------------------------------------------------


def quantized() -> Tensor:
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)


STRANGE: dict[str, Callable[[], Tensor]] = {
    "coo": lambda: torch.eye(4).to_sparse(),
    "uncoalesced": lambda: torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0]),
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "csc": lambda: torch.eye(4).to_sparse_csc(),
    "bsr": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "complex": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    "empty": lambda: torch.empty(0, 5),
    "8 bits": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "quantized": quantized,
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "inference": lambda: torch.inference_mode()(torch.ones)(3),
    "sparse inference": lambda: torch.inference_mode()(torch.eye(3).to_sparse)(),
}


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize("kind", STRANGE)
def test_a_buffer_of_any_kind(kind: str) -> None:
    model = network()
    model.register_buffer("strange", STRANGE[kind]())
    it, before = module(model=model), model.strange
    scores = it.influence_matrix()
    assert model.strange is before
    torch.testing.assert_close(scores, plain_scores())
    assert fingerprint(it._problem.evaluation) == fingerprint(it._problem.evaluation)


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_scores_follow_a_sparse_buffer(layout: str) -> None:
    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer(
                "mix", getattr(torch.eye(3).double(), {"coo": "to_sparse", "csr": "to_sparse_csr"}[layout])()
            )
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            return torch.sparse.mm(self.mix, self.net(x).T).T

    model = Mixes()
    it = module(InfluenceModule, model=model, damp=1.0, solver="direct")
    torch.testing.assert_close(it.influence_matrix(), plain_scores(), rtol=1e-6, atol=1e-12)
    (model.mix if layout == "csr" else model.mix.coalesce()).values().data.mul_(2)
    fresh = module(InfluenceModule, model=model, damp=1.0, solver="direct")
    torch.testing.assert_close(it.influence_matrix(), fresh.influence_matrix())


def test_a_buffer_that_cannot_be_watched_is_named() -> None:
    model = network()
    model.register_buffer("packed", torch.ones(3).to_mkldnn())
    with pytest.raises(TypeError, match=r"got buffer 'packed' with layout torch._mkldnn.*to_dense"):
        module(model=model).influences([0], [0])


class Scaled(nn.Module):
    """Takes part in autograd with a parameter, frozen ones, a buffer and attributes; all loaded in inference mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.frozen = network(), nn.Linear(3, 3).double().requires_grad_(False)
        self.register_buffer("buffer", torch.rand(3).double())
        self.scales, self.scale = [torch.rand(3).double()], torch.rand(3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.net(x) * self.buffer * self.scales[0]) * self.scale


class Weighs(Classification):
    def __init__(self, teacher: nn.Module) -> None:
        self.teacher, self.weight = teacher, torch.ones(3).double()

    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        target = self.teacher(batch[0]).detach() * self.weight
        return (outputs - target).square().mul(self.weight).sum(dim=1).mean()


def test_tensors_made_under_inference_mode_take_part() -> None:
    expected, scores = [], []
    for context, found in ((torch.no_grad, expected), (torch.inference_mode, scores)):
        torch.manual_seed(1)
        with context():
            model, objective = Scaled(), Weighs(network())
        before, held = Snapshot(model) if context is torch.no_grad else None, attributes(model)
        own = [id(value) for value in vars(objective).values()] + [id(p) for p in model.parameters()]
        for gnh in (False, True):
            it = module(InfluenceModule, model=model, objective=objective, damp=1.0, solver="direct", gnh=gnh)
            found += [it.influence_matrix(), it.flat_parameters()]
        assert attributes(model) == held
        assert own == [id(value) for value in vars(objective).values()] + [id(p) for p in model.parameters()]
        assert before is None or before.check() is None
    torch.testing.assert_close(scores, expected)

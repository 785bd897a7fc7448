"""What was computed before a change is not used after it, wherever the change was; and is used where there was none."""

from __future__ import annotations

import copy
import functools
import pickle
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import Classification, loader, module, network
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torch_influence import AutogradInfluenceModule, InfluenceModule, LiSSAInfluenceModule
from torch_influence.evaluation import Evaluation
from torch_influence.staleness import settings

SCALE = 0.05
PROBED = 4  # examples


def new(objective: Any = None, model: nn.Module | None = None, **changes: Any) -> Any:
    made = {"objective": objective or Classification(), "model": model or network(), "damp": 1.0, "solver": "direct"}
    return module(InfluenceModule, **(made | changes))


class Calls:
    """Counts the examples that pass a model."""

    def __init__(self, model: nn.Module) -> None:
        self.examples = 0
        model.register_forward_pre_hook(self.count)

    def count(self, model: nn.Module, inputs: Any) -> None:
        self.examples += len(inputs[0])

    def of(self, act: Callable[[], Any]) -> int:
        before = self.examples
        act()
        return self.examples - before


# -- each kind of change ----------------------------------------------------------------------------------------------


class GlobalDecay(Classification):
    def train_regularization(self, params: Tensor) -> Tensor:
        return 0.5 * SCALE * params.square().sum()


class OfAClass(Classification):
    smoothing = 0.0

    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1], label_smoothing=self.smoothing)


class By(Classification):
    """Its loss is a function that the user hands over."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        self.loss = loss

    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        return self.loss(outputs, batch[1])


class Slotted(Classification):
    """The walk over attributes sees neither what is in a slot nor what is behind a property."""

    __slots__ = ("decay",)

    def __init__(self) -> None:
        self.decay = 0.05

    def train_regularization(self, params: Tensor) -> Tensor:
        return 0.5 * self.decay * params.square().sum()


class Configured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.config = types.SimpleNamespace(temperature=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) / self.config.temperature


class Distilled(Classification):
    """Learns from a teacher that nobody knows of."""

    def __init__(self) -> None:
        self.teacher = network()

    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, self.teacher(batch[0]).softmax(-1))


class Rows(nn.Module):
    """Each example has parameters of its own, so that no other's loss feels a change of them."""

    def __init__(self, n: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows = nn.Embedding(n, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x)


class Unregularised(Classification):
    def train_regularization(self, params: Tensor) -> float:
        return 0.0


class OwnTotal(Classification):
    def train_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1]) + 0.5 * SCALE * params.square().sum()


def closure() -> tuple[Callable[..., Tensor], Callable[[float], None]]:
    smoothing = 0.0

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs, y, label_smoothing=smoothing)

    def change(to: float) -> None:
        nonlocal smoothing
        smoothing = to

    return loss, change


def of_a_global(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, nn.Module, Callable[[], None]]:
    return GlobalDecay(), network(), lambda: monkeypatch.setitem(globals(), "SCALE", 0.5)


def of_a_global_in_train_loss(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, nn.Module, Callable[[], None]]:
    return OwnTotal(), network(), lambda: monkeypatch.setitem(globals(), "SCALE", 0.5)


def of_a_class(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, nn.Module, Callable[[], None]]:
    return OfAClass(), network(), lambda: monkeypatch.setattr(OfAClass, "smoothing", 0.5)


def of_a_closure(_: Any) -> tuple[Any, nn.Module, Callable[[], None]]:
    loss, change = closure()
    return By(loss), network(), lambda: change(0.5)


def of_a_partial(_: Any) -> tuple[Any, nn.Module, Callable[[], None]]:
    loss = functools.partial(F.cross_entropy, label_smoothing=0.0)
    return By(loss), network(), lambda: loss.keywords.update(label_smoothing=0.5)


def of_a_slot(_: Any) -> tuple[Any, nn.Module, Callable[[], None]]:
    objective = Slotted()
    return objective, network(), lambda: setattr(objective, "decay", 0.5)


def of_the_config(_: Any) -> tuple[Any, nn.Module, Callable[[], None]]:
    model = Configured()
    return Classification(), model, lambda: setattr(model.config, "temperature", 3.0)


def of_a_hook(_: Any) -> tuple[Any, nn.Module, Callable[[], None]]:
    model = network()
    return Classification(), model, lambda: model[0].register_forward_hook(lambda m, x, y: 2 * y) and None


def of_a_hook_on_gradients(_: Any) -> tuple[Any, nn.Module, Callable[[], None]]:
    """Losses are as they were."""
    model = network()
    freeze = lambda m, x, y: y.detach() + 0.3 * (y - y.detach())  # noqa: E731
    return Classification(), model, lambda: model[0].register_forward_hook(freeze) and None


def of_a_teacher(_: Any) -> tuple[Any, nn.Module, Callable[[], None]]:
    objective = Distilled()
    return objective, network(), lambda: objective.teacher[2].weight.data.mul_(-2)


def of_a_method(_: Any) -> tuple[Any, nn.Module, Callable[[], None]]:
    model = network()
    forward = model.forward
    return Classification(), model, lambda: setattr(model, "forward", lambda x: 2 * forward(x))


CHANGES = [
    of_a_global,
    of_a_global_in_train_loss,
    of_a_class,
    of_a_closure,
    of_a_partial,
    of_a_slot,
    of_the_config,
    of_a_hook,
    of_a_hook_on_gradients,
    of_a_teacher,
    of_a_method,
]


@pytest.mark.parametrize("kind", CHANGES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("cache", ["auto", False])
def test_scores_after_a_change_are_those_of_a_new_module(
    kind: Callable[[Any], Any], cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, model, change = kind(monkeypatch)
    it = new(objective, model, cache=cache)
    before = it.influence_matrix()
    change()
    fresh = new(objective, model, cache=cache).influence_matrix()
    torch.testing.assert_close(it.influence_matrix(), fresh)
    assert not torch.allclose(before, fresh, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:LiSSA")
def test_what_lissa_has_found_is_found_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"damp": 1.0, "repeat": 1, "depth": 3, "scale": "auto", "on_failure": "ignore"}
    objective = GlobalDecay()
    it = module(LiSSAInfluenceModule, objective=objective, **options)
    it.stest([0])
    monkeypatch.setitem(globals(), "SCALE", 50.0)
    fresh = module(LiSSAInfluenceModule, objective=objective, **options)
    torch.manual_seed(0)
    expected = fresh.stest([0])
    torch.manual_seed(0)
    torch.testing.assert_close(it.stest([0]), expected)


def test_a_factored_hessian_is_said_to_be_old(monkeypatch: pytest.MonkeyPatch, recwarn: Any) -> None:
    it = module(AutogradInfluenceModule, objective=GlobalDecay())
    v = torch.ones(43, dtype=torch.float64)
    it.inverse_hvp(v)
    it.clear_cache()  # which is no change
    it.inverse_hvp(v)
    copy.deepcopy(it).inverse_hvp(v)
    it.inverse_hvp(v)  # what is known was dropped when it was copied
    assert not recwarn.list
    monkeypatch.setitem(globals(), "SCALE", 0.5)
    with pytest.warns(UserWarning, match="have changed since it was built"):
        it.inverse_hvp(v)


def test_a_change_and_back_again_are_two_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    it = new(GlobalDecay())
    before = it.influence_matrix()
    for scale in (0.5, 0.05):
        monkeypatch.setitem(globals(), "SCALE", scale)
        now = it.influence_matrix()
    assert torch.equal(now, before)


def test_slow_changes_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is less than rounding; what is compared with is as it was when the version began."""
    it = new(GlobalDecay())
    it.influence_matrix()
    for step in range(1, 101):
        monkeypatch.setitem(globals(), "SCALE", 0.05 * (1 + 2e-15 * step))
        it.influences([0], [0])
    assert it._problem.watch.changes >= 1


# -- attributes -------------------------------------------------------------------------------------------------------


class Weighted(Classification):
    """Class weights that are divided by nothing."""

    def __init__(self, weight: Any, tensor: Callable[[Any], Tensor] = lambda w: w) -> None:
        self.weight, self.tensor = weight, tensor
        self.name = "first"

    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        each = F.cross_entropy(outputs, batch[1], reduction="none")
        return (each * self.tensor(self.weight)[batch[1]]).mean()


def rare(n: int = 23, example: int = 9) -> DataLoader:
    """One example of a class of its own, which no probe has."""
    x, y = loader(n).dataset.tensors
    y = y % 2
    y[example] = 2
    return DataLoader(TensorDataset(x, y), batch_size=5)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", ["tensor", "array", "list", "replaced"])
def test_a_weight_of_a_class_that_the_probe_lacks(kind: str, layers: int) -> None:
    weight = torch.ones(3, dtype=torch.float64)
    model = network() if layers == 2 else nn.Linear(4, 3).double()
    objective = {
        "tensor": lambda: Weighted(weight),
        "array": lambda: Weighted(np.ones(3), torch.from_numpy),
        "list": lambda: Weighted([1.0, 1.0, 1.0], lambda w: torch.tensor(w, dtype=torch.float64)),
        "replaced": lambda: Weighted(weight),
    }[kind]()
    it = new(objective, model, train_loader=rare())
    before = it.influence_matrix()
    if kind == "replaced":
        objective.weight = torch.tensor([1.0, 1.0, 20.0], dtype=torch.float64)
    else:
        objective.weight[2] = 20.0
    fresh = new(objective, model, train_loader=rare()).influence_matrix()
    torch.testing.assert_close(it.influence_matrix(), fresh)
    assert not torch.allclose(before, fresh, rtol=1e-3)


@pytest.mark.parametrize("layers", [1, 2])
def test_an_attribute_that_changes_nothing_costs_a_forward_pass(layers: int) -> None:
    model = network() if layers == 2 else nn.Linear(4, 3).double()
    objective = Weighted(torch.ones(3, dtype=torch.float64))
    it, calls = new(objective, model), Calls(model)
    s = it.stest([0])
    call = functools.partial(it.influences, [0], None, stest=s)
    call()
    usual, version = calls.of(call), it._problem.watch.version
    objective.name = "second"
    assert calls.of(call) == usual + 23
    assert calls.of(call) == usual
    assert it._problem.watch.version == version


class Busy(Classification):
    """Counts, logs and remembers while it computes."""

    def __init__(self) -> None:
        self.calls, self.log, self.last = 0, [], {"loss": None}
        self.mean = torch.zeros((), dtype=torch.float64)
        self.weight = torch.ones(3, dtype=torch.float64)

    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        each = F.cross_entropy(outputs, batch[1], reduction="none")
        loss = (each * self.weight[batch[1]]).mean()
        self.calls += 1
        self.made_later = self.calls
        self.log.append(self.calls)
        self.last["loss"] = self.calls / 2
        self.last[str(self.calls)] = self.calls
        self.mean.add_(1)
        return loss


def test_counters_and_logs_throw_nothing_away() -> None:
    model, objective = network(), Busy()
    it, calls = new(objective, model, train_loader=rare()), Calls(model)
    it.stest([0])
    factor, usual = it._solver._factor._made, calls.of(lambda: it.stest([1]))
    assert usual < 23  # no pass over the data
    for _ in range(3):
        objective.train_loss_on_outputs(torch.zeros(1, 3).double(), (None, torch.tensor([0])))  # the user's own use
        assert calls.of(lambda: it.stest([2])) == usual
    assert it._solver._factor._made is factor
    objective.weight[2] = 9.0  # no counter, though beside some
    torch.testing.assert_close(it.stest([1]), new(objective, model, train_loader=rare()).stest([1]))


def test_an_attribute_that_is_new_is_looked_at() -> None:
    model, objective = network(), Weighted(torch.ones(3, dtype=torch.float64))
    it, calls = new(objective, model), Calls(model)
    it.stest([0])
    usual = calls.of(lambda: it.stest([0]))
    for holder in (objective, model, model[0]):
        holder.note = "new"
        assert calls.of(lambda: it.stest([0])) == usual + 23
        assert calls.of(lambda: it.stest([0])) == usual


def test_a_hint_survives_an_interrupted_call() -> None:
    objective = Weighted(torch.ones(3, dtype=torch.float64))
    model = network()
    it = new(objective, model, train_loader=rare())
    it.influence_matrix()
    objective.weight[2] = 20.0
    operator = it._problem._curvature[1]
    operator.losses_hold = interrupt
    with pytest.raises(KeyboardInterrupt):
        it.influence_matrix()
    del operator.losses_hold
    fresh = new(objective, model, train_loader=rare()).influence_matrix()
    torch.testing.assert_close(it.influence_matrix(), fresh)


def interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


# -- noise ------------------------------------------------------------------------------------------------------------


class Noisy(Classification):
    """With draws of its own generator in the gradient, or in the loss; from the default one if there is none."""

    def __init__(self, where: str, generator: torch.Generator | None = None) -> None:
        self.where, self.generator = where, generator

    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        noise = 0.01 * torch.rand((), generator=self.generator, dtype=torch.float64)
        loss = super().train_loss_on_outputs(outputs, batch)
        return loss * (1 + noise) if self.where == "loss" else loss + noise * (outputs - outputs.detach()).sum()


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("own", [False, True])
def test_noise_is_said_once_and_throws_nothing_away(where: str, own: bool) -> None:
    objective = Noisy(where, torch.Generator().manual_seed(0) if own else None)
    it = new(objective, on_failure="warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        it.stest([0])
        factor = it._solver._factor._made
        for _ in range(20):
            it.stest([0])
    texts = [str(w.message) for w in caught]
    assert it._solver._factor._made is factor
    said = sum("another time" in text or "are others each time" in text for text in texts)
    # Draws from the default generator are the same in each probe: nothing to say but what is said of losses anyway.
    assert said == (1 if own or where == "loss" else 0)


def test_a_change_larger_than_the_noise_is_seen() -> None:
    objective = Noisy("gradient", torch.Generator().manual_seed(0))
    it = new(objective)
    it.stest([0])
    with pytest.warns(UserWarning, match="others each time"):
        it.stest([0])
    it.stest([0])
    version = it._problem.watch.version
    type(objective).l2 = 5.0
    try:
        it.stest([0])
    finally:
        del type(objective).l2
    assert it._problem.watch.version > version


# -- a block without looks --------------------------------------------------------------------------------------------


def test_a_frozen_block_looks_at_nothing() -> None:
    model = network()
    it, calls = new(model=model), Calls(model)
    s = it.stest([0])
    it.influences([0], None, stest=s)
    usual = calls.of(lambda: it.influences([0], None, stest=s))
    with it.frozen():
        with it.frozen():
            assert calls.of(lambda: it.influences([0], None, stest=s)) == usual - PROBED
        assert calls.of(lambda: it.influences([0], None, stest=s)) == usual - PROBED
        before = it.stest([1])
        with torch.no_grad():
            model[0].weight.mul_(1.5)
        factor = it._solver._factor._made
        it.stest([1])
        assert it._solver._factor._made is factor  # of what was there when the block began
    after = it.stest([1])
    torch.testing.assert_close(after, new(model=model).stest([1]))
    assert not torch.allclose(after, before, rtol=1e-3)


def test_changes_before_a_frozen_block_are_seen_and_those_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    it = new(GlobalDecay())
    it.influence_matrix()
    monkeypatch.setitem(globals(), "SCALE", 0.5)
    with it.frozen():
        torch.testing.assert_close(it.influence_matrix(), new(GlobalDecay()).influence_matrix())
    monkeypatch.setitem(globals(), "SCALE", 5.0)
    torch.testing.assert_close(it.influence_matrix(), new(GlobalDecay()).influence_matrix())


def test_what_is_set_counts_in_a_frozen_block() -> None:
    it = new()
    it.influence_matrix()
    with it.frozen():
        it.objective = OfAClass()
        it.objective.smoothing = 0.5
        it.train_loader = rare()
        it.damp = 2.0
        expected = new(it.objective, train_loader=rare(), damp=2.0).influence_matrix()
        torch.testing.assert_close(it.influence_matrix(), expected)
        it.clear_cache()
        torch.testing.assert_close(it.influence_matrix(), expected)


def test_a_frozen_block_that_an_error_ends() -> None:
    it = new()
    with pytest.raises(KeyboardInterrupt), it.frozen():
        interrupt()
    assert not it._problem.watch.is_frozen
    it.model.register_buffer("other", torch.ones(1).to_mkldnn())  # so that the look at the beginning fails
    with pytest.raises(TypeError, match="layout"), it.frozen():
        pass
    assert not it._problem.watch.is_frozen


def test_a_copy_made_in_a_frozen_block_is_not_frozen() -> None:
    it = new()
    with it.frozen():
        twin = copy.deepcopy(it)
        other = pickle.loads(pickle.dumps(it))
        assert it._problem.watch.is_frozen
    assert not twin._problem.watch.is_frozen
    assert not other._problem.watch.is_frozen
    torch.testing.assert_close(twin.influence_matrix(), it.influence_matrix())


# -- what a look costs, and leaves as it was --------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["auto", False])
def test_a_look_is_four_examples(cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    it, calls = new(model=model, cache=cache), Calls(model)
    it.influence_matrix()
    reads = []
    monkeypatch.setattr(it._problem.train, "peek", lambda some: reads.append(some))
    assert calls.of(lambda: it.hvp(torch.ones(43, dtype=torch.float64))) >= PROBED
    with it.frozen():
        frozen = calls.of(lambda: it.train_loss_grad([0]))
    assert calls.of(lambda: it.train_loss_grad([0])) == frozen + PROBED
    assert not reads  # the examples were read once


def test_few_examples_are_all_looked_at() -> None:
    for n in (1, 2, 3):
        it = new(train_loader=loader(n, batch_size=2))
        it.stest([0])
        assert len(it._problem.watch._base.probe._some[0][1]) == n


class Dropped(Classification):
    """Draws in each loss, from every default generator."""

    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        drawn = float(torch.rand(())) + np.random.rand()  # noqa: NPY002
        return super().train_loss_on_outputs(outputs, batch) * (1 + 0 * drawn)


def test_a_look_leaves_random_states_as_they_were() -> None:
    it = new(Dropped())
    it.stest([0])
    with it._problem.evaluation.session():
        before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        for _ in range(2):
            it._problem.watch.open(it._problem.evaluation)
            it._problem._look()
            it._problem.watch.drop()
        assert torch.equal(before[0], torch.get_rng_state())
        assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002


def test_an_interrupted_look_leaves_nothing_that_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    each_loss, stops = Evaluation.each_loss, []

    def stopping(*args: Any) -> None:
        each_loss(*args)
        if len(stops) < 2:
            stops.append(1)
            raise KeyboardInterrupt

    it = new(GlobalDecay())
    it.influence_matrix()
    monkeypatch.setitem(globals(), "SCALE", 0.5)
    monkeypatch.setattr(Evaluation, "each_loss", stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            it.influence_matrix()
    torch.testing.assert_close(it.influence_matrix(), new(GlobalDecay()).influence_matrix())


@pytest.mark.parametrize("point", range(1, 5))
def test_a_look_that_ends_where_the_version_moves(point: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the n-th evaluation of the probe: between the old values, the two more, and the new ones."""
    each_loss, calls = Evaluation.each_loss, []
    it = new(GlobalDecay())
    it.influence_matrix()
    monkeypatch.setitem(globals(), "SCALE", 0.5)

    def stopping(*args: Any) -> None:
        calls.append(1)
        if len(calls) == point:
            raise KeyboardInterrupt
        each_loss(*args)

    monkeypatch.setattr(Evaluation, "each_loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        it.influence_matrix()
    torch.testing.assert_close(it.influence_matrix(), new(GlobalDecay()).influence_matrix())


# -- examples of all sorts --------------------------------------------------------------------------------------------


def test_examples_that_make_no_batch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def collate(rows: list[Any]) -> Any:
        if len(rows) < 2:
            raise ValueError("a pair at least")
        return torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])

    pairs = DataLoader(loader(20).dataset, batch_size=5, collate_fn=collate)
    it = new(GlobalDecay(), train_loader=pairs)
    versions = []
    for scale in (0.05, 0.05, 0.5):
        monkeypatch.setitem(globals(), "SCALE", scale)
        with it._problem.session():
            versions.append(it._problem.watch.version)
    assert len(it._problem.watch._base.probe._some[0][1]) == 1
    assert versions[0] == versions[1] < versions[2]


class Infinite(Classification):
    """An example whose loss is no number, and one whose loss can't be computed alone."""

    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        loss = super().train_loss_on_outputs(outputs, batch)
        if len(batch[1]) == 1 and bool((batch[0] == batch[0].max()).any()):
            self.seen = True
        first = loader().dataset.tensors[0][0]
        return loss * float("nan") if len(batch[0]) == 1 and torch.equal(batch[0][0], first) else loss


@pytest.mark.filterwarnings("ignore")
def test_losses_that_are_no_numbers_are_the_same_each_time() -> None:
    it = new(Infinite())
    v = torch.ones(43, dtype=torch.float64)
    it.hvp(v)
    version = it._problem.watch.version
    it.hvp(v)
    assert it._problem.watch.version == version


class Edits(Classification):
    def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0].sub_(0.5))


def test_a_loss_that_edits_its_batches_gets_the_same_each_time() -> None:
    it = new(Edits(), cache=False)
    it.stest([0])
    version = it._problem.watch.version
    it.stest([0])
    assert it._problem.watch.version == version


def test_the_examples_are_those_of_the_data_as_they_are() -> None:
    data = loader()
    it = new(train_loader=data)
    it.influence_matrix()
    before = it._problem.watch._base.probe
    data.dataset.tensors[0].mul_(2)
    it.influence_matrix()
    assert it._problem.watch._base.probe is not before
    torch.testing.assert_close(it.influence_matrix(), new(train_loader=data).influence_matrix())


def test_copies_have_no_examples() -> None:
    it = new()
    it.influence_matrix()
    twin = copy.deepcopy(it)
    assert twin._problem.watch._base is None
    assert it._problem.watch._base is None
    torch.testing.assert_close(twin.influence_matrix(), it.influence_matrix())


def test_the_walk_sees_itself_in_the_objective() -> None:
    objective = Classification()
    objective.me = [objective]
    it = new(objective)
    assert settings(it._problem.evaluation) == settings(it._problem.evaluation)


def test_a_look_is_in_no_report() -> None:
    it = module(InfluenceModule, damp=1.0, solver="cg", rtol=1e-10)
    it.stest([0])
    products = it.last_report.products
    it.influences([0], None, stest=torch.ones(43, dtype=torch.float64))
    assert it.last_report.products == products


@pytest.mark.parametrize("edit", ["in place", "data"])
def test_parameters_of_examples_that_are_not_looked_at(edit: str) -> None:
    """The few examples' losses don't feel it: the tensors' versions do, and their checksums."""
    n, unseen = 23, 5
    assert unseen not in {i * (n - 1) // (PROBED - 1) for i in range(PROBED)}
    data = DataLoader(TensorDataset(torch.arange(n), torch.arange(n) % 3), batch_size=5)
    it = new(Unregularised(), Rows(n), train_loader=data, test_loader=data)
    before = it.influences([unseen], [unseen])
    weight = it.model.rows.weight
    if edit == "data":
        weight.data[unseen] *= 3.0
    else:
        with torch.no_grad():
            weight[unseen] *= 3.0
    after = it.influences([unseen], [unseen])
    fresh = new(Unregularised(), copy.deepcopy(it.model), train_loader=data, test_loader=data)
    torch.testing.assert_close(after, fresh.influences([unseen], [unseen]))
    assert float((after - before).abs().max()) > 0.1 * float(before.abs().max())

"""What is set or copied after a module was used: it counts from then on, as in a new module."""

from __future__ import annotations

import copy
import math
import pickle
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from problems import Classification, loader, module, network
from torch import Tensor, nn

from torch_influence import AutogradInfluenceModule, CGInfluenceModule, InfluenceModule, LiSSAInfluenceModule

SOLVERS = ["direct", "cg", "block", "dual"]


def other_network() -> nn.Module:
    model = network()
    with torch.no_grad():
        model[2].weight.mul_(1.5)
    return model


class Stronger(Classification):
    l2 = 0.5


OTHERS: dict[str, Callable[[], Any]] = {
    "model": other_network,
    "objective": Stronger,
    "train_loader": lambda: loader(n=17, seed=9),
    "test_loader": lambda: loader(n=4, batch_size=2, seed=11),
    "damp": lambda: 2.5,
    "gnh": lambda: False,
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("solver", SOLVERS[:3])
def test_what_is_set_counts_from_then_on(solver: str, name: str) -> None:
    def new(**changes: Any) -> Any:
        return module(InfluenceModule, **({"damp": 0.3, "gnh": True, "solver": solver} | changes))

    it = new()
    before = it.influence_matrix()
    setattr(it, name, OTHERS[name]())
    after = it.influence_matrix()
    assert torch.equal(after, new(**{name: OTHERS[name]()}).influence_matrix())
    assert after.shape != before.shape or not torch.allclose(after, before, rtol=1e-3)


@pytest.mark.parametrize("name", ["model", "objective", "train_loader"])
def test_a_factored_hessian_is_said_to_be_old_when_something_else_is_set(name: str) -> None:
    it = module(AutogradInfluenceModule)
    setattr(it, name, OTHERS[name]())
    with pytest.warns(UserWarning, match="have changed since it was built"):
        it.inverse_hvp(torch.ones(43, dtype=torch.float64))


def test_a_factored_hessian_is_good_for_other_test_data(recwarn: pytest.WarningsRecorder) -> None:
    it = module(AutogradInfluenceModule)
    it.influence_matrix()
    it.test_loader = OTHERS["test_loader"]()
    again = module(AutogradInfluenceModule, test_loader=OTHERS["test_loader"]())
    assert torch.equal(it.influence_matrix(), again.influence_matrix())
    assert not recwarn.list


def test_what_is_set_is_checked() -> None:
    it = module(InfluenceModule, damp=1.0)
    with pytest.raises(ValueError, match=r"solver: expected one of 'auto', .*, got 'foo'"):
        it.solver = "foo"
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
        it.model = "model"
    with pytest.raises(TypeError, match=r"train_loader: expected a torch.utils.data.DataLoader, got list"):
        it.train_loader = []
    it.influence_matrix()  # and is as it was


# -- settings of the objective -----------------------------------------------------------------------------------------


class Nested(Classification):
    """Its weight decay is kept somewhere below."""

    def __init__(self, holder: Any, read: Callable[[Any], Any]) -> None:
        self.holder, self.read = holder, read

    def train_regularization(self, params: Tensor) -> Tensor:
        return 0.5 * self.read(self.holder) * params.square().sum()


def put(container: Any, key: Any, value: Any) -> None:
    container[key] = value


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(0.05, dtype=torch.float64))


HOLDERS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "namespace": (lambda: types.SimpleNamespace(l2=0.05), lambda h: h.l2, lambda h: setattr(h, "l2", 0.5)),
    "list": (lambda: [0.05], lambda h: h[0], lambda h: put(h, 0, 0.5)),
    "dict of dicts": (lambda: {"a": {"l2": 0.05}}, lambda h: h["a"]["l2"], lambda h: put(h["a"], "l2", 0.5)),
    "array": (lambda: np.array([0.05]), lambda h: float(h[0]), lambda h: put(h, 0, 0.5)),
    "tensor in a list": (lambda: [torch.tensor(0.05)], lambda h: h[0].double(), lambda h: h[0].mul_(10)),
    "buffer of a module": (Scale, lambda h: h.value, lambda h: h.value.mul_(10)),
    "module in a list": (lambda: [Scale()], lambda h: h[0].value, lambda h: h[0].value.mul_(10)),
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_settings_of_an_objective_are_seen_where_they_are_kept(kind: str) -> None:
    make, read, change = HOLDERS[kind]
    it = module(InfluenceModule, objective=Nested(make(), read), damp=0.3, gnh=True, solver="direct")
    before = it.influence_matrix()
    change(it.objective.holder)
    after = it.influence_matrix()
    again = module(InfluenceModule, objective=it.objective, damp=0.3, gnh=True, solver="direct")
    assert torch.equal(after, again.influence_matrix())
    assert not torch.allclose(after, before, rtol=1e-3)


def test_an_objective_that_refers_to_itself_and_to_the_model() -> None:
    objective = Classification()
    objective.me, objective.of = [objective], {"model": network()}
    it = module(InfluenceModule, objective=objective, damp=0.3)
    assert torch.equal(it.influence_matrix(), it.influence_matrix())


class WithBackbone(Classification):
    """Features come from a network that the model is not told of."""

    def __init__(self) -> None:
        self.backbone = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).double()

    def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return model(self.backbone(batch[0]))

    def test_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
        return self.train_loss_on_outputs(self.train_outputs(model, batch), batch)


class IsModule(nn.Module, WithBackbone):
    """An objective that is a module itself, as criteria are."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        WithBackbone.__init__(self)


@pytest.mark.parametrize("kind", [WithBackbone, IsModule])
def test_a_network_of_the_objective_is_evaluated_and_left_as_the_model_is(
    kind: type, recwarn: pytest.WarningsRecorder
) -> None:
    objective = kind()
    before = copy.deepcopy(objective.backbone.state_dict())
    scores = module(objective=objective).influence_matrix()
    assert all(torch.equal(before[name], value) for name, value in objective.backbone.state_dict().items())
    assert all(m.training for m in objective.backbone.modules())
    objective.backbone.eval()
    assert torch.equal(module(objective=objective).influence_matrix(), scores)
    assert not recwarn.list


# -- damping -----------------------------------------------------------------------------------------------------------

DAMPINGS = {
    "int": 2,
    "NumPy": np.float32(2),
    "array": np.array(2.0),
    "tensor": torch.tensor(2.0),
    "one element": torch.tensor([2.0]),
}
NO_DAMPINGS = [None, "auto", "0.1", [0.1], torch.full((43,), 0.3), nn.Linear(1, 1)]


@pytest.mark.parametrize("kind", [AutogradInfluenceModule, CGInfluenceModule, LiSSAInfluenceModule, InfluenceModule])
def test_damp_is_a_number(kind: type) -> None:
    for given in DAMPINGS.values():
        assert module(kind, **with_damp(kind, given)).damp == 2.0
    for given in NO_DAMPINGS:
        with pytest.raises(TypeError, match=r"(?s)damp: expected a number, got .*suggest_damping\(\)"):
            module(kind, **with_damp(kind, given))
    for given in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"damp: expected a finite number, got (nan|inf)"):
            module(kind, **with_damp(kind, given))


def with_damp(kind: type, damp: Any) -> dict[str, Any]:
    options = {LiSSAInfluenceModule: {"repeat": 1, "depth": 3, "scale": 20.0}}
    return {"damp": damp, **options.get(kind, {})}


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_tensor_that_was_given_as_damp_may_be_edited(solver: str) -> None:
    damp = torch.tensor(0.3)
    it = module(InfluenceModule, damp=damp, gnh=True, solver=solver)
    before = it.influence_matrix()
    damp.mul_(3)
    assert torch.equal(it.influence_matrix(), before)
    assert it.damp == pytest.approx(0.3)


def test_what_is_suggested_can_be_set() -> None:
    it = module(InfluenceModule, damp=0.0)
    it.damp = it.suggest_damping()
    assert it.damp == float(it.suggest_damping()) > 0
    assert it.spectrum().definite


# -- copies ------------------------------------------------------------------------------------------------------------

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda it: pickle.loads(pickle.dumps(it)),
}
KINDS = {kind.__name__: (kind, {}) for kind in (AutogradInfluenceModule, CGInfluenceModule, LiSSAInfluenceModule)}
KINDS |= {
    f"auto {name} {solver}": (InfluenceModule, {"damp": 0.3, "gnh": True, "solver": solver, **changes})
    for solver in SOLVERS
    for name, changes in {"network": {}, "linear": {"model": nn.Linear(4, 3).double()}}.items()
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_module_that_was_used_can_be_copied(kind: str, how: str) -> None:
    it = module(KINDS[kind][0], **KINDS[kind][1])
    torch.manual_seed(1)
    scores = it.influence_matrix()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = COPIES[how](it)
        torch.manual_seed(1)
        assert torch.equal(other.influence_matrix(), scores)
        torch.manual_seed(1)
        assert torch.equal(it.influence_matrix(), scores)  # the first works on
    other.model.load_state_dict(
        other_network().state_dict() if len(other.params_names) > 2 else other.model.state_dict()
    )
    torch.manual_seed(1)
    assert torch.equal(it.influence_matrix(), scores)  # and shares nothing with the copy


def test_a_copy_of_an_old_hessian_is_old() -> None:
    it = module(AutogradInfluenceModule)
    with torch.no_grad():
        it.model[0].bias.add_(1)
    with pytest.warns(UserWarning, match="have changed since it was built"):
        copy.deepcopy(it).inverse_hvp(torch.ones(43, dtype=torch.float64))

"""Ctrl-C in any long call leaves the model, the module and its report usable."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import Classification, module, network
from torch import Tensor, nn

from torch_influence import (
    AutogradInfluenceModule,
    CGInfluenceModule,
    InfluenceModule,
    LiSSAInfluenceModule,
    SolveReport,
)


class Interrupted(Classification):
    """Ctrl-C comes while the outputs of the model are computed for the n-th time from now."""

    left = float("inf")

    def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
        self.count_down()
        return super().train_outputs(model, batch)

    def test_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
        self.count_down()
        return super().test_loss(model, params, batch)

    def count_down(self) -> None:
        self.left -= 1
        if self.left < 0:
            self.left = float("inf")
            raise KeyboardInterrupt


KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "Autograd": (AutogradInfluenceModule, {}),
    "CG": (CGInfluenceModule, {"rtol": 1e-8}),
    "LiSSA": (LiSSAInfluenceModule, {"depth": 20}),
    "auto": (InfluenceModule, {"damp": 1.0}),
    "block": (InfluenceModule, {"damp": 1.0, "solver": "block"}),
    "direct": (InfluenceModule, {"damp": 1.0, "solver": "direct"}),
    "dual": (InfluenceModule, {"damp": 1.0, "solver": "dual", "gnh": True}),
}
CALLS: dict[str, Callable[[Any], Any]] = {
    "influences": lambda it: it.influences(range(23), [0, 1]),
    "influence_matrix": lambda it: it.influence_matrix(),
    "top_k": lambda it: it.influence_matrix(top_k=2).helpful.values,
    "self_influences": lambda it: it.self_influences(),
    "stests": lambda it: it.stests(),
    "hvp": lambda it: it.hvp(torch.ones(43, dtype=torch.float64)),
    "train_loss_grad": lambda it: it.train_loss_grad(range(23)),
    "explain": lambda it: str(it.explain(3)),
    "spectrum": lambda it: it.spectrum().smallest,
    "verify": lambda it: str(it.verify(print=False)),
}


def outcome(it: Any, call: str) -> Any:
    torch.manual_seed(5)  # LiSSA draws
    return CALLS[call](it)


def alike(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def most(kind: str, call: str) -> int:
    """How many evaluations there are at least, less one."""
    return 4 if kind == "Autograd" else 19 if call == "train_loss_grad" else 25


# Each call at one moment: the moments go round from kind to kind, so that every call is interrupted early and late.
MOMENTS = [
    (kind, call, min((1, 9, 25)[(i + j) % 3], most(kind, call)))
    for i, kind in enumerate(KINDS)
    for j, call in enumerate(CALLS)
    if not (kind == "Autograd" and call in ("hvp", "spectrum"))  # which have the matrix
]


@pytest.mark.filterwarnings("ignore::torch_influence.ConvergenceWarning")
@pytest.mark.parametrize(("kind", "call", "after"), MOMENTS)
def test_what_is_interrupted_can_be_asked_again(kind: str, call: str, after: int) -> None:
    of, options = KINDS[kind]
    objective, model = Interrupted(), network().train()
    it = module(of, model=model, objective=objective, **options)
    before = copy.deepcopy(model.state_dict())
    parameters, grads = list(model.parameters()), torch.is_grad_enabled()

    objective.left = after
    with pytest.raises(KeyboardInterrupt):
        outcome(it, call)
    assert it.last_report is None or isinstance(it.last_report, SolveReport)
    str(it.last_report)

    assert all(mine is theirs for mine, theirs in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in parameters)
    assert model.training
    assert torch.is_grad_enabled() == grads
    fresh = module(of, objective=Interrupted(), **options)
    assert alike(outcome(it, call), outcome(fresh, call))


@pytest.mark.parametrize("kind", ["CG", "auto", "block", "LiSSA"])
def test_an_interrupted_solve_leaves_no_report_of_another(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report of the solve before would be taken for this one's."""
    of, options = KINDS[kind]
    it = module(of, **(options | ({"solver": "cg"} if kind == "auto" else {})), cache=False, on_failure="ignore")
    it.stests()
    assert it.last_report is not None

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(it._problem, "bar", interrupt)  # at the first step of the solver
        with pytest.raises(KeyboardInterrupt):
            it.inverse_hvp(torch.ones(43, dtype=torch.float64))
    assert it.last_report is None
    it.stests([0, 1])
    assert len(it.last_report.iterations) == 2


def test_an_interrupted_construction_leaves_the_model_alone() -> None:
    objective, model = Interrupted(), network().train()
    objective.left = 2
    with pytest.raises(KeyboardInterrupt):
        module(AutogradInfluenceModule, model=model, objective=objective)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert module(AutogradInfluenceModule, model=model, objective=objective).influences([0], [0]).isfinite().all()


def test_a_real_signal() -> None:
    """The operating system's own Ctrl-C, in the middle of a solve that would go on."""
    steps: list[Any] = []

    def callback(x: Any) -> None:
        steps.append(x)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    it = module(CGInfluenceModule, rtol=1e-14, callback=callback)
    ones = torch.ones(43, dtype=torch.float64)
    before = it.influences([0, 1], None, ones)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            it.stests()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert len(steps) == 3
    assert it.last_report is None
    it.cg_kwargs = {"rtol": 1e-8}
    assert it.stests().isfinite().all()
    assert it.last_report.converged.all()
    assert torch.equal(it.influences([0, 1], None, ones), before)

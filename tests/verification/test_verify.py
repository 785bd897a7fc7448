"""verify(): it passes on good modules, and fails for the right reason where something was broken on purpose."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from oracles import (
    IdentityModule,
    Supervised,
    assert_close,
    dense_gauss_newton,
    dense_hessian,
    example_gradients,
    loader_batches,
    logistic_loss,
    query_gradients,
    refit_logistic,
    tolerance,
)
from problems import SOLVER_OPTIONS, Classification, loader, module, network
from scipy import stats
from test_diagnostics import AlwaysDropout
from test_side_effects import FailsAt, Snapshot, awkward
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from torch_influence import (
    AutogradInfluenceModule,
    CGInfluenceModule,
    InfluenceModule,
    LiSSAInfluenceModule,
    NondeterminismWarning,
    Refits,
    Verification,
)
from torch_influence.curvature import Hessian
from torch_influence.solvers import cg

ENOUGH = {"repeat": 6, "depth": 30, "scale": 5.0}  # of LiSSA for the small network
BASE = ["repeatable", "curvature", "symmetric", "differences", "gradients", "mean", "solver", "scores"]
REFIT = ["same refit", "same model", "correlation", "slope"]


def good(kind: type, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "model": network(dtype),
        "train_loader": loader(dtype=dtype),
        "test_loader": loader(n=7, batch_size=3, seed=3, dtype=dtype),
        "damp": 1.0,
    }
    if issubclass(kind, LiSSAInfluenceModule):
        arguments |= ENOUGH
    if issubclass(kind, CGInfluenceModule):
        arguments |= {"rtol": 1e-5}
    return module(kind, **(arguments | changes))


def failed(found: Verification) -> list[str]:
    return [check.name for check in found.checks if not check.passed]


# ---- what is right passes -------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    **{kind.__name__: (kind, {}) for kind in SOLVER_OPTIONS},
    "CG, Gauss-Newton": (CGInfluenceModule, {"gnh": True}),
    "LiSSA, Gauss-Newton": (LiSSAInfluenceModule, {"gnh": True}),
    "auto": (InfluenceModule, {}),
    "block": (InfluenceModule, {"solver": "block"}),
    "dual": (InfluenceModule, {"solver": "dual", "gnh": True, "train_loader": loader(n=9)}),
    "linear model": (InfluenceModule, {"model": nn.Linear(4, 3).double(), "damp": 0.0}),
}
kinds = pytest.mark.parametrize(("kind", "changes"), KINDS.values(), ids=KINDS)


@pytest.mark.filterwarnings("error")
@kinds
def test_good_modules_pass(kind: type, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    it = good(kind, **changes)
    before = Snapshot(it.model)
    found = it.verify()
    before.check()
    assert failed(found) == []
    assert found.passed
    assert [check.name for check in found.checks] == BASE
    assert found.refits is None
    assert capsys.readouterr().out == str(found) + "\n"
    assert "against a dense solve in float64" in found["solver"].text


@kinds
def test_good_modules_pass_by_residuals_where_there_are_many_parameters(
    kind: type, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch_influence.verification._checks._LARGEST_DENSE", 10)
    found = good(kind, **changes).verify(print=False)
    assert failed(found) == []
    assert "|b - Ax| / |b|" in found["solver"].text
    assert "so that |x - x*| / |x| <=" in found["solver"].text


@pytest.mark.parametrize("kind", [*SOLVER_OPTIONS, InfluenceModule])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_good_modules_pass_in_less_precision(kind: type, dtype: torch.dtype) -> None:
    it = good(kind, dtype, **{"rtol": 1e-2} if kind is CGInfluenceModule and dtype == torch.bfloat16 else {})
    assert failed(it.verify(print=False)) == []


def test_a_model_of_more_parameters_than_are_solved_densely() -> None:
    torch.manual_seed(1)
    x, y = torch.randn(60, 699), torch.randint(3, (60,))
    data = DataLoader(TensorDataset(x, y), 16)
    found = good(CGInfluenceModule, model=nn.Linear(699, 3), train_loader=data, test_loader=data).verify(print=False)
    assert failed(found) == []
    assert "|b - Ax| / |b|" in found["solver"].text


def test_awkward_models_pass_and_are_left_alone() -> None:
    model = awkward()
    before = Snapshot(model)
    assert failed(good(CGInfluenceModule, model=model).verify(print=False)) == []
    before.check()


class Alone(nn.Module):
    """A learned scale, which has no dimension, and a parameter without entries; a layer's come after these."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.empty(0))
        self.scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale.exp() * x[:, :3]


class Before(Alone):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.linear(x))


class After(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 3), Alone())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("model", [Before, After, Alone])
@pytest.mark.parametrize("gnh", [False, True])
@pytest.mark.parametrize("solver", ["auto", "block"])
def test_parameters_without_dimension_or_entries(model: type[nn.Module], gnh: bool, solver: str) -> None:
    torch.manual_seed(1)
    net = model().double()
    it = good(InfluenceModule, model=net, damp=5.0, gnh=gnh, solver=solver, rtol=1e-12)
    matrix = (dense_gauss_newton if gnh else dense_hessian)(net, it.objective, list(loader_batches(it.train_loader)))
    inverse = torch.linalg.inv(matrix + 5.0 * torch.eye(len(matrix), dtype=torch.float64))
    g = example_gradients(net, it.objective, it.train_loader)
    f = query_gradients(net, it.objective, it.test_loader)
    # Solves to 1e-12 of a gradient, of a matrix with eigenvalues of 5 to some tens.
    to_rtol = 1e-12 / tolerance(torch.float64)
    assert_close(it.influence_matrix(), g @ inverse @ f.mT / len(g), operations=to_rtol + len(g) * len(matrix) ** 2)
    assert failed(it.verify(print=False)) == []


def test_queries_and_examples_are_those_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    it = good(CGInfluenceModule)
    found = it.verify([6, 1], train_idxs=[3, 4], queries=1)
    assert "3 examples" in found["gradients"].text  # one query, two training examples
    assert "2 examples and 1 queries" in found["scores"].text
    assert len(it.verify(queries=100, print=False).checks) == len(BASE)
    assert capsys.readouterr().out.count("\n") == len(BASE) + 1


# ---- what is broken fails -------------------------------------------------------------------------------------------


class WrongSolution(CGInfluenceModule):
    factor = 1.001

    def inverse_hvp(self, vec: Tensor) -> Tensor:
        return super().inverse_hvp(vec) * self.factor


class WrongEstimate(LiSSAInfluenceModule):
    def inverse_hvp(self, vec: Tensor) -> Tensor:
        return -super().inverse_hvp(vec)


class DampedTwice(CGInfluenceModule):
    def inverse_hvp(self, vec: Tensor) -> Tensor:
        return cg(self._problem.curvature().damped(2 * self.damp), vec)[0]


class OneByOne(CGInfluenceModule):
    batched = False
    factor = 1.0

    def inverse_hvp(self, vec: Tensor) -> Tensor:
        assert vec.dim() == 1
        return super().inverse_hvp(vec) * self.factor


class OneByOneWrong(OneByOne):
    factor = 1.001


class ScaledHessian(Hessian):
    def product(self, rows: Tensor) -> Tensor:
        return 1.01 * super().product(rows)

    def dense(self) -> Tensor:
        return 1.01 * super().dense()


class ScaledCurvature(CGInfluenceModule):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options, curvature=ScaledHessian)


class SkewCurvature(CGInfluenceModule):
    def hvp(self, vecs: Tensor) -> Tensor:
        return super().hvp(vecs) + 0.1 * vecs.roll(1, dims=-1) - 0.05 * vecs.roll(-1, dims=-1)


class NoisyCurvature(CGInfluenceModule):
    def hvp(self, vecs: Tensor) -> Tensor:
        return super().hvp(vecs) + 1e-12 * torch.randn_like(vecs)


class FlippedScores(CGInfluenceModule):
    def influences(self, *args: Any, **kwargs: Any) -> Tensor:
        return -super().influences(*args, **kwargs)


class FlippedMatrix(CGInfluenceModule):
    def influence_matrix(self, *args: Any, **kwargs: Any) -> Any:
        return -super().influence_matrix(*args, **kwargs)


class WrongTestGradient(CGInfluenceModule):
    def test_loss_grad(self, test_idxs: Any) -> Tensor:
        return 2 * super().test_loss_grad(test_idxs)


class WrongTrainGradient(CGInfluenceModule):
    def train_loss_grad(self, train_idxs: Any) -> Tensor:
        return super().train_loss_grad(train_idxs) + 1e-3


BROKEN: dict[type, list[str]] = {
    WrongSolution: ["solver"],
    WrongEstimate: ["solver"],
    DampedTwice: ["solver"],
    OneByOneWrong: ["solver"],
    ScaledCurvature: ["curvature"],
    SkewCurvature: ["curvature", "symmetric"],
    NoisyCurvature: ["repeatable"],
    FlippedScores: ["scores"],
    FlippedMatrix: ["scores"],
    WrongTestGradient: ["gradients", "scores"],
    WrongTrainGradient: ["gradients"],
}


@pytest.mark.parametrize(("kind", "expected"), BROKEN.items(), ids=lambda it: getattr(it, "__name__", None))
def test_what_is_broken_on_purpose_fails(kind: type, expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = good(kind).verify()
    assert failed(found) == expected
    assert not found.passed
    out = capsys.readouterr().out.splitlines()
    for check, line in zip(found.checks, out, strict=False):
        assert line.startswith("ok  " if check.passed else "FAILED  ")
        assert f" {check.name} " in line
    assert out[-1] == f"FAILED: {', '.join(expected)} ({8 - len(expected)} of 8 checks)"


@pytest.mark.parametrize("kind", [WrongEstimate, DampedTwice, OneByOneWrong])
def test_wrong_solutions_fail_by_residuals_too(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_influence.verification._checks._LARGEST_DENSE", 10)
    assert failed(good(kind).verify(print=False)) == ["solver"]


def test_another_meaning_of_inverse_hvp_fails() -> None:
    """Products of gradients are no influence by this curvature."""
    found = module(IdentityModule).verify(print=False)
    assert failed(found) == ["solver"]
    assert "taken to reach a residual of 1%" in found["solver"].text


def test_one_vector_at_a_time_passes() -> None:
    assert failed(good(OneByOne).verify(print=False)) == []


def test_too_few_steps_of_lissa_fail() -> None:
    found = good(LiSSAInfluenceModule, depth=1).verify(print=False)
    assert failed(found) == ["solver"]
    assert "raise depth, repeat" in found["solver"].text


def test_a_solver_that_stops_early_fails() -> None:
    it = good(CGInfluenceModule, damp=0.36, maxiter=2, on_failure="ignore")  # barely definite
    found = it.verify(print=False)
    assert failed(found) == ["solver"]
    assert "not converged for 3 of 3" in found["solver"].text


def test_a_singular_matrix_fails() -> None:
    class Flat(Classification):
        l2 = 0.0

    it = good(CGInfluenceModule, model=nn.Linear(4, 3).double(), objective=Flat(), damp=0.0, on_failure="ignore")
    found = it.verify(print=False)  # all classes' weights may be shifted
    assert failed(found) == ["solver"]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (CGInfluenceModule, {"damp": 0.0}),
        (InfluenceModule, {"damp": 0.0, "solver": "direct"}),
        (LiSSAInfluenceModule, {"scale": 0.01, "depth": 1000}),
    ],
)
def test_solves_that_raise_fail(kind: type, changes: dict[str, Any]) -> None:
    found = good(kind, on_failure="raise", **changes).verify(print=False)
    assert failed(found) == ["solver"]
    assert "inverse_hvp failed: " in found["solver"].text


def test_a_random_forward_fails() -> None:
    with warnings.catch_warnings(record=True) as caught:  # solves of what is no matrix fail in many ways
        warnings.simplefilter("always")
        found = good(CGInfluenceModule, model=AlwaysDropout()).verify(print=False)
    assert NondeterminismWarning in {one.category for one in caught}
    assert {"repeatable", "curvature", "gradients"} <= set(failed(found))
    assert "training=self.training" in found["repeatable"].text


class Editable(Dataset):
    """Reads an array that nobody notices to be edited."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self._x, self._y = generator.normal(size=(23, 4)), generator.integers(3, size=23)

    def __len__(self) -> int:
        return 23

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self._x[i].copy()), int(self._y[i])


def test_data_that_are_no_longer_what_was_kept_are_found() -> None:
    data = Editable()
    it = good(CGInfluenceModule, train_loader=DataLoader(data, 5))
    it.influence_matrix()
    data._x[7] *= 2.0
    found = it.verify(print=False)
    assert "curvature" in failed(found)
    assert "clear_cache()" in found["curvature"].text
    it.clear_cache()
    assert failed(it.verify(print=False)) == []


# ---- refits ---------------------------------------------------------------------------------------------------------

N, FEATURES, L2 = 200, 4, 0.05


@functools.cache
def logistic_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(N + 5, FEATURES, generator=generator, dtype=torch.float64)
    p = (x @ torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)).sigmoid()
    y = (torch.rand(N + 5, generator=generator, dtype=torch.float64) < p).double()
    return x[:N], y[:N], x[N:], y[N:]


def fit(train_idxs: list[int], l2: float = L2) -> nn.Module:
    x, y, _, _ = logistic_data()
    model = nn.Linear(FEATURES, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(refit_logistic(x[train_idxs], y[train_idxs], l2))
    return model


def logistic(kind: type = AutogradInfluenceModule, **changes: Any) -> Any:
    x, y, query_x, query_y = logistic_data()
    arguments: dict[str, Any] = {
        "model": fit(list(range(N))),
        "objective": Supervised(logistic_loss, L2),
        "train_loader": DataLoader(TensorDataset(x, y[:, None]), 64),
        "test_loader": DataLoader(TensorDataset(query_x, query_y[:, None]), 2),
        "damp": 0.0,
    }
    return module(kind, **(arguments | changes))


REFITTED = {
    "direct": (AutogradInfluenceModule, {}),
    "cg": (CGInfluenceModule, {"rtol": 1e-8}),
    "gauss-newton": (CGInfluenceModule, {"rtol": 1e-8, "gnh": True}),
    "lissa": (LiSSAInfluenceModule, {"repeat": 8, "depth": 300, "scale": 2.0}),
    "auto": (InfluenceModule, {}),
}


@pytest.mark.parametrize(("kind", "changes"), REFITTED.values(), ids=REFITTED)
def test_refits_show_what_was_predicted(
    kind: type, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    it = logistic(kind, **changes)
    model = Snapshot(it.model)
    queries = [4, 0, 2]
    calls: list[list[int]] = []

    def noted(train_idxs: list[int]) -> nn.Module:
        calls.append(train_idxs)
        return fit(train_idxs)

    found = it.verify(queries, fit=noted, refits=9)
    model.check()
    assert failed(found) == []
    assert [check.name for check in found.checks] == BASE + REFIT
    refits = found.refits
    assert refits is not None
    assert len(refits.indices) == len(set(refits.indices)) == 9
    assert calls == [list(range(N))] * 2 + [[i for i in range(N) if i != left] for left in refits.indices]

    _, _, query_x, query_y = logistic_data()

    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        return float(logistic_loss(model(query_x[queries]), query_y[queries, None]))

    base = loss(fit(calls[0]))
    assert refits.base == refits.again == pytest.approx(base, rel=1e-14)
    assert refits.model_loss == pytest.approx(base, rel=1e-14)
    # Differences of losses: their rounding is that of the losses.
    expected = torch.tensor([loss(fit(call)) for call in calls[2:]], dtype=torch.float64) - base
    assert refits.actual.tolist() == pytest.approx(expected.tolist(), abs=1e-14)
    if kind is not LiSSAInfluenceModule:
        scores = it.influences(range(N), queries)
        assert refits.predicted.tolist() == pytest.approx(scores[list(refits.indices)].tolist(), rel=1e-8)
        order = scores.argsort(descending=True).tolist()
        assert list(refits.indices[:6]) == order[:3] + order[-3:]
        assert refits.slope == pytest.approx(1.0, abs=0.1)
        assert refits.correlation > 0.99
    assert refits.correlation == pytest.approx(stats.pearsonr(refits.predicted, refits.actual).statistic)
    assert refits.rank_correlation == pytest.approx(stats.spearmanr(refits.predicted, refits.actual).statistic)

    out = capsys.readouterr().out
    assert f"refit 3 of 11: without example {refits.indices[0]}, predicted +" in out
    assert out.rstrip().endswith("passed (12 of 12 checks)")
    assert f"slope {refits.slope:.3f}" in str(found)


class FlippedInfluences(AutogradInfluenceModule):
    def influences(self, train_idxs: Any, test_idxs: Any, stest: Any = None) -> Tensor:
        return super().influences(train_idxs, test_idxs, stest) * (1 if test_idxs is None else -1)


class TenTimes(FlippedInfluences):
    def influences(self, train_idxs: Any, test_idxs: Any, stest: Any = None) -> Tensor:
        return super().influences(train_idxs, test_idxs, stest) * (1 if test_idxs is None else -10)


def test_scores_of_the_wrong_sign_or_size_fail() -> None:
    assert failed(logistic(FlippedInfluences).verify(fit=fit, print=False)) == ["correlation", "slope"]
    assert failed(logistic(TenTimes).verify(fit=fit, print=False)) == ["slope"]


def test_too_much_damping_shows_in_the_slope() -> None:
    found = logistic(damp=3.0).verify(fit=fit, print=False)
    assert "slope" in failed(found)
    assert found.refits is not None
    assert found.refits.slope > 2


def test_a_fit_of_another_model_is_told_from_wrong_scores() -> None:
    found = logistic().verify(fit=functools.partial(fit, l2=5.0), print=False)
    assert "same model" in failed(found)
    assert "same refit" not in failed(found)
    assert failed(found)[0] == "same model"


def noisy(train_idxs: list[int]) -> nn.Module:
    model = fit(train_idxs)
    with torch.no_grad():
        model.weight.add_(0.02 * torch.randn_like(model.weight))
    return model


def test_a_fit_that_is_not_repeatable_is_told_from_wrong_scores() -> None:
    assert "same refit" in failed(logistic().verify(fit=noisy, print=False))


def test_a_fit_that_leaves_nothing_out_is_told_from_wrong_scores() -> None:
    found = logistic().verify(fit=lambda train_idxs: fit(list(range(N))), print=False)
    assert failed(found) == ["same refit", "correlation", "slope"]
    assert "does not heed train_idxs" in found["same refit"].text


def in_place(it: Any) -> Callable[[list[int]], nn.Module]:
    def fit_in_place(train_idxs: list[int]) -> nn.Module:
        with torch.no_grad():
            it.model.weight.mul_(1.1)
        return copy.deepcopy(it.model)

    return fit_in_place


def test_a_fit_that_returns_or_edits_the_modules_own_model_is_refused() -> None:
    it = logistic()
    with pytest.raises(ValueError, match="fit: expected a new model, got the module's own"):
        it.verify(fit=lambda train_idxs: it.model, print=False)
    with pytest.raises(ValueError, match="or one that shares its parameters"):
        it.verify(fit=in_place(it), print=False)
    with pytest.raises(TypeError, match=r"fit: expected it to return a torch\.nn\.Module, got Tensor"):
        it.verify(fit=lambda train_idxs: torch.zeros(3), print=False)


def test_fit_runs_in_the_users_own_surroundings() -> None:
    """Not in eval mode, and with gradients as they were."""
    it = logistic()
    it.model.train()
    seen = []

    def looks(train_idxs: list[int]) -> nn.Module:
        seen.append((it.model.training, torch.is_grad_enabled(), it._problem.evaluation.is_open))
        return fit(train_idxs).eval()

    with torch.no_grad():
        assert it.verify(fit=looks, refits=3, print=False).passed
    assert set(seen) == {(True, False, False)}


@pytest.mark.parametrize("countdown", [3, 10, 20, 40])
@pytest.mark.parametrize("method", ["train_outputs", "test_loss"])
def test_an_interrupt_during_the_checks_leaves_everything_intact(method: str, countdown: int) -> None:
    model = awkward()
    before = Snapshot(model)
    objective = FailsAt(method, countdown, KeyboardInterrupt())
    it = good(CGInfluenceModule, model=model, objective=objective)
    with pytest.raises(KeyboardInterrupt):
        [it.verify(print=False) for _ in range(40)]  # a test loss is evaluated a few times in each
    before.check()
    assert not it._problem.evaluation.is_open
    objective.countdown = 10**6
    assert failed(it.verify(print=False)) == []


@pytest.mark.parametrize("at", [0, 1, 4])
def test_an_interrupt_leaves_everything_intact(at: int) -> None:
    it = logistic(model=fit(list(range(N))).train())
    before = Snapshot(it.model)
    calls = iter(range(100))

    def interrupted(train_idxs: list[int]) -> nn.Module:
        if next(calls) == at:
            raise KeyboardInterrupt
        return fit(train_idxs)

    with pytest.raises(KeyboardInterrupt):
        it.verify(fit=interrupted, print=False)
    before.check()
    assert not it._problem.evaluation.is_open
    assert it.verify(fit=fit, print=False).passed


def test_examples_to_leave_out_can_be_chosen() -> None:
    found = logistic().verify(train_idxs=[5, 9, 60, 3], fit=fit, print=False)
    assert found.refits is not None
    assert set(found.refits.indices) == {5, 9, 60, 3}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"queries": 0}, "queries, refits: expected at least 1 and 3, got 0 and 12"),
        ({"refits": 2}, "queries, refits: expected at least 1 and 3, got 3 and 2"),
        ({"test_idxs": []}, "expected at least one index"),
        ({"train_idxs": []}, "expected at least one index"),
        ({"train_idxs": [1, 2], "fit": fit}, "train_idxs: expected at least 3 examples to choose from, got 2"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        logistic().verify(**options, print=False)


def test_no_test_data() -> None:
    with pytest.raises(TypeError, match="test_loader"):
        logistic(test_loader=None).verify(print=False)


def test_correlations_of_ranks_share_ties() -> None:
    a, b = torch.tensor([1.0, 2.0, 2.0, 5.0]).double(), torch.tensor([0.0, 3.0, 1.0, 1.0]).double()
    found = Refits((0, 1, 2, 3), a, b, model_loss=1.0, base=1.0, again=1.0)
    assert found.rank_correlation == pytest.approx(stats.spearmanr(a, b).statistic)

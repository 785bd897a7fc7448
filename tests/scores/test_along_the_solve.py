"""Scores summed up along a solve, tolerances in units of scores, and budgets: against dense float64 influence."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from oracles import (
    Supervised,
    assert_close,
    dense_gauss_newton,
    example_gradients,
    loader_batches,
    query_gradients,
    with_spectrum,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from torch_influence import (
    AutogradInfluenceModule,
    BaseInfluenceModule,
    InfluenceModule,
    LiSSAInfluenceModule,
)
from torch_influence.linop import Damped, Dense
from torch_influence.solvers import CG, Auto, BlockCG, ConvergenceWarning

N, QUERIES, DAMP = 41, 12, 0.05
ALONG = "sums along the solve"


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def data(n: int, seed: int, dtype: torch.dtype = torch.float64) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64).to(dtype)
    return TensorDataset(x, torch.randint(3, (n,), generator=generator))


def problem(kind: Any = InfluenceModule, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    loaders = DataLoader(data(N, 0, dtype), 8), DataLoader(data(QUERIES, 1, dtype), 5)
    options = (
        {"damp": DAMP, "gnh": True, "rtol": 1e-9} | ({"solver": "block"} if kind is InfluenceModule else {}) | options
    )
    return kind(network(dtype), Supervised(F.cross_entropy, 0.02), *loaders, "cpu", **options)


def exact() -> Tensor:
    model, objective = network(), Supervised(F.cross_entropy, 0.02)
    train, test = DataLoader(data(N, 0), 8), DataLoader(data(QUERIES, 1), 5)
    A = dense_gauss_newton(model, objective, loader_batches(train))
    A += DAMP * torch.eye(len(A), dtype=torch.float64)
    solved = torch.linalg.solve(A, query_gradients(model, objective, test).mT)
    return example_gradients(model, objective, train) @ solved / N


class Uses:
    """Notes the ways in which scores were computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from torch_influence.gradients import ExampleGradients

        self.ways: list[str] = []
        self.why_not: dict[str, str] = {}
        plain = ExampleGradients.dots

        def dots(examples: Any, *args: Any) -> Any:
            yield from plain(examples, *args)
            self.ways.append(examples.path)
            self.why_not |= examples.why_not

        monkeypatch.setattr(ExampleGradients, "dots", dots)


@pytest.mark.parametrize("some", [None, [3, 40, 0, 17, *range(20, 34)]], ids=["all", "some"])
@pytest.mark.parametrize("solver", ["block", "auto"])
def test_scores_summed_up_along_the_solve_are_those_of_the_solutions(
    solver: str, some: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    uses = Uses(monkeypatch)
    it = problem(
        solver=BlockCG(rtol=1e-9) if solver == "block" else solver, **({} if solver == "auto" else {"rtol": 1e-5})
    )
    if solver == "auto":
        it._by_name["auto"].candidates = {"block": BlockCG(rtol=1e-9)}
    scores = it.influence_matrix(some)
    assert uses.ways == [ALONG]
    expected = exact() if some is None else exact()[some]
    assert_close(scores, expected, operations=1e-9 / torch.finfo(torch.float64).eps, condition=100.0)


def test_in_float32_they_are_those_of_the_solutions_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    uses = Uses(monkeypatch)
    it = problem(dtype=torch.float32, rtol=1e-3)
    scores, stests = it.influence_matrix(), it.stests()
    plain = torch.stack([it.influences(range(N), None, stest=s) for s in stests], dim=1)
    assert uses.ways[0] == ALONG
    assert_close(scores, plain, operations=200, condition=10.0)


def test_the_way_stands_in_the_plan_of_no_other_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A given stest, a solve from the side of the training examples, and top_k in tiles."""
    uses = Uses(monkeypatch)
    it = problem()
    top = it.influence_matrix(top_k=4)
    assert uses.ways == [ALONG]
    assert torch.equal(top.helpful.indices, exact().topk(4, dim=0).indices.mT)
    few = it.influence_matrix([2, 5])
    assert ALONG not in uses.ways[1:]
    assert_close(few, exact()[[2, 5]], operations=1e-9 / torch.finfo(torch.float64).eps, condition=100.0)


def test_a_loss_that_is_no_mean_of_its_examples_is_scored_from_batches_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Centred(Supervised):
        def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
            return super().train_loss_on_outputs(outputs - outputs.mean(0, keepdim=True) * 0.1, batch)

    uses = Uses(monkeypatch)
    it = problem()
    it.objective = Centred(F.cross_entropy, 0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores, stests = it.influence_matrix(), it.stests()
    assert ALONG not in uses.ways
    gradients = example_gradients(network(), Centred(F.cross_entropy, 0.02), DataLoader(data(N, 0), 8))
    assert_close(scores, gradients @ stests.mT / N, operations=1e4)


def test_wrong_sums_are_refused_and_the_scores_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """One example's products are off by a thousandth of their size, which is not the first, middle or last."""
    plain = Damped.product_and_dots

    def wrong(self: Any, rows: Tensor) -> Any:
        product, dots = plain(self, rows)
        assert dots is not None
        dots[7] *= 1.001
        return product, dots

    uses = Uses(monkeypatch)
    monkeypatch.setattr(Damped, "product_and_dots", wrong)
    scores = problem().influence_matrix()
    assert ALONG in uses.why_not
    assert ALONG not in uses.ways
    assert_close(scores, exact(), operations=1e-9 / torch.finfo(torch.float64).eps, condition=100.0)


def test_it_sums_only_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    uses = Uses(monkeypatch)
    monkeypatch.setattr("torch_influence.solving._SHARE_OF_SUMS", 2**60)
    problem().influence_matrix()
    assert ALONG not in uses.ways


@pytest.mark.parametrize("solver", ["cg", "direct"])
def test_solvers_that_make_no_sums_are_scored_as_ever(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uses = Uses(monkeypatch)
    scores = problem(solver=solver).influence_matrix()
    assert ALONG not in uses.ways
    assert_close(scores, exact(), operations=1e-9 / torch.finfo(torch.float64).eps, condition=100.0)


# -- tolerances in units of the answer, and budgets -------------------------------------------------------------------


def relative_errors(scores: Tensor) -> Tensor:
    """Of each query's scores, as a vector."""
    return (scores - exact()).norm(dim=0) / exact().norm(dim=0)


@pytest.mark.parametrize("solver", ["block", "cg", "auto"])
@pytest.mark.parametrize("wanted", [0.1, 1e-2, 1e-4])
def test_scores_to_a_tolerance_of_their_own(wanted: float, solver: str) -> None:
    it = problem(solver=solver)
    if solver == "auto":
        del it._by_name["auto"].candidates["direct"], it._by_name["auto"].candidates["dual"]
    scores = it.influence_matrix(score_rtol=wanted)
    report = it.last_report
    assert report.converged.all()
    assert (report.error <= wanted).all()
    assert (relative_errors(scores) <= 2 * wanted).all()
    it.influence_matrix()
    assert report.products < it.last_report.products  # the module's own rtol holds again


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_a_budget_of_products_is_kept_and_told(budget: int) -> None:
    it = problem(rtol=1e-13)
    with pytest.warns(ConvergenceWarning, match=f"ended at max_products={budget}"):
        scores = it.influence_matrix(max_products=budget)
    report = it.last_report
    assert report.products == budget
    assert not report.converged.any()
    errors = relative_errors(scores)
    assert (errors <= 2 * report.error).all()
    if budget > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert errors.max() < relative_errors(it.influence_matrix(max_products=1)).max()


def test_auto_spends_a_budget_on_a_block() -> None:
    it = problem(solver="auto", rtol=1e-13)
    for name in ("direct", "dual"):
        del it._by_name["auto"].candidates[name]
    with pytest.warns(ConvergenceWarning, match="ended at max_products=2"):
        scores = it.influence_matrix(max_products=2)
    assert it.last_report.method == "block conjugate gradients"
    with pytest.warns(ConvergenceWarning, match="ended at max_products=2"):
        single = problem(solver="cg", rtol=1e-13).influence_matrix(max_products=2)
    assert relative_errors(scores).max() < relative_errors(single).max()


def test_a_solver_that_is_exact_needs_neither() -> None:
    scores = problem(solver="direct").influence_matrix(score_rtol=1e-2, max_products=1)
    assert_close(scores, exact(), operations=1e5)
    loaders = DataLoader(data(N, 0), 8), DataLoader(data(QUERIES, 1), 5)
    dense = AutogradInfluenceModule(network(), Supervised(F.cross_entropy, 0.02), *loaders, "cpu", damp=1.0)
    assert torch.equal(dense.influence_matrix(score_rtol=1e-2), dense.influence_matrix())


class Identity(BaseInfluenceModule):
    batched = True

    def inverse_hvp(self, vec: Tensor) -> Tensor:
        return vec


class Ours:
    def solve(self, operator: Any, rows: Tensor) -> Tensor:
        return rows


@pytest.mark.parametrize("option", [{"score_rtol": 1e-2}, {"max_products": 3}], ids=str)
@pytest.mark.parametrize(
    ("kind", "options", "who"),
    [
        (InfluenceModule, {"solver": "minres"}, "MINRES"),
        (InfluenceModule, {"solver": "dual"}, "dual system"),
        (InfluenceModule, {"solver": Ours()}, "Ours"),
        (LiSSAInfluenceModule, {"rtol": None, "repeat": 1, "depth": 2}, "LiSSA"),
        (Identity, {"rtol": None, "damp": None, "gnh": None}, "Identity"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_can_not_end_by_them_is_refused_by_name(kind: Any, options: Any, who: str, option: dict[str, Any]) -> None:
    given = {"damp": DAMP, "gnh": True, "rtol": 1e-5} | options
    if isinstance(given.get("solver"), Ours):
        given.pop("rtol")
    loaders = DataLoader(data(N, 0), 8), DataLoader(data(QUERIES, 1), 5)
    given = {name: value for name, value in given.items() if value is not None}
    it = kind(network(), Supervised(F.cross_entropy, 0.02), *loaders, "cpu", **given)
    (name,) = option
    with pytest.raises(ValueError, match=f"^{name}.*{who}"):
        it.influence_matrix(**option)


@pytest.mark.parametrize(
    ("option", "error"),
    [({"score_rtol": -1.0}, ValueError), ({"max_products": 0}, ValueError), ({"max_products": 1.5}, TypeError)],
    ids=str,
)
def test_values_that_make_no_sense(option: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        problem().influence_matrix(**option)


def test_an_exception_leaves_no_tolerance_behind() -> None:
    it = problem()
    with pytest.raises(ValueError, match="max_products"):
        it.influence_matrix(max_products=0)
    plain = it.influence_matrix()
    assert_close(plain, exact(), operations=1e-9 / torch.finfo(torch.float64).eps, condition=100.0)


# -- a preconditioner of auto's own -----------------------------------------------------------------------------------


def wide(**options: Any) -> InfluenceModule:
    """More parameters than outputs of all examples, little damping: single queries take many products."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(60, 20), nn.Tanh(), nn.Linear(20, 4)).double()
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(200, 60, dtype=torch.float64, generator=generator) * torch.logspace(1, -1, 60).double()
    y = torch.randint(4, (200,), generator=generator)
    loaders = DataLoader(TensorDataset(x, y), 50), DataLoader(TensorDataset(x[:30], y[:30]), 10)
    it = InfluenceModule(model, Supervised(F.cross_entropy, 0.0), *loaders, "cpu", 3e-3, True, rtol=1e-6, **options)
    for name in ("direct", "dual"):
        del it._by_name["auto"].candidates[name]
    return it


def test_many_solves_of_one_query_are_preconditioned_when_that_is_paid_back() -> None:
    it = wide()
    products, words = [], []
    for query in range(12):
        words.append(str(it.explain(1)["solver"]))
        it.stest([query])
        products.append(it.last_report.products)
    assert "0 solves have multiplied 0 rows so far, and it costs 50" in words[0]
    helped = [i for i, text in enumerate(words) if "preconditioned by Nystrom(rank=50" in text]
    assert helped == list(range(2, 12))  # one solve says nothing of whether more will come
    assert all("costs 50 rows, and 2 solves have multiplied" in text for text in words[2:])
    before, after = products[:2], products[2:]
    assert sum(before) >= 50
    assert max(after[1:]) <= 0.75 * min(before)
    assert_close(it.stest([20]), wide(solver="cg").stest([20]), operations=1e-6 / 2.3e-16, condition=1e3)


def test_it_is_given_up_where_it_does_not_help() -> None:
    """A spectrum without gaps: of 500 eigenvalues fifty are no help."""
    torch.manual_seed(7)
    matrix = with_spectrum(torch.linspace(1e-3, 1.0, 500, dtype=torch.float64))
    operator, auto = Dense(matrix), Auto(candidates={"cg": CG(rtol=1e-4)})
    taken = [auto.solve(operator, torch.randn(1, 500, dtype=torch.float64))[1] for _ in range(5)]
    made = [report.products - int(report.iterations) for report in taken]
    assert made == [1, 1, 2, 1, 1]  # the products that judge; the third solve has made M, the later ones do without
    assert "with it a solve takes" in str(auto.describe(operator, 1))
    assert "Nystrom" not in auto.describe(operator, 1).path


def test_a_budget_and_narrow_products_are_refused_together() -> None:
    it = problem(dtype=torch.float32, rtol=1e-2, product_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="max_products, product_dtype: "):
        it.influence_matrix(max_products=2)

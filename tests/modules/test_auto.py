"""InfluenceModule: every solver gives the dense float64 scores, and auto takes the one that the counts favour."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from oracles import Supervised, assert_close, dense_gauss_newton, dense_hessian, loader_batches
from test_kept_curvature import network, tensors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from torch_influence import CGInfluenceModule, InfluenceModule, NegativeCurvatureWarning
from torch_influence.linop import Dual, DualCost, LinearOperator
from torch_influence.solvers import Auto, named

pytestmark = pytest.mark.filterwarnings("error")

SOLVERS = ["direct", "cg", "block"]
DAMP = 0.5


def module(solver: str = "auto", layers: int = 1, gnh: bool = False, **options: Any) -> InfluenceModule:
    model, objective = network(layers), Supervised(F.cross_entropy, 0.05)
    return InfluenceModule(model, objective, tensors(), tensors(7), "cpu", DAMP, gnh, solver, **options)


@pytest.mark.parametrize("solver", [*SOLVERS, "dual", "auto"])
@pytest.mark.parametrize("layers", [1, 2], ids=["head", "network"])
@pytest.mark.parametrize("gnh", [False, True], ids=["hessian", "gauss-newton"])
@pytest.mark.parametrize("k", [1, 5])
def test_every_solver_inverts_the_dense_matrix(solver: str, layers: int, gnh: bool, k: int) -> None:
    it = module(solver, layers, gnh, rtol=1e-12)
    if solver == "dual" and layers == 2 and not gnh:
        with pytest.raises(ValueError, match='solver="dual": a Hessian that is not that of a linear head has no dual'):
            it.stest([0])
        return
    oracle = dense_gauss_newton if gnh else dense_hessian
    matrix = oracle(network(layers), Supervised(F.cross_entropy, 0.05), loader_batches(tensors()))
    matrix = matrix + DAMP * torch.eye(len(matrix))
    rows = torch.randn(k, len(matrix), dtype=torch.float64)
    expected = torch.linalg.solve(matrix, rows.mT).mT
    eigenvalues = torch.linalg.eigvalsh(matrix)
    assert eigenvalues[0] > 0
    # Solved to 1e-12 of |b|, as far as the condition lets that be seen in x.
    condition = float(eigenvalues[-1] / eigenvalues[0])
    assert_close(
        it.inverse_hvp(rows), expected, operations=17 * len(matrix), condition=condition, inherent=2e-12 * condition
    )
    assert it.last_report is not None
    assert it.last_report.converged.all()


def test_scores_are_those_of_the_named_module() -> None:
    named = CGInfluenceModule(
        network(2), Supervised(F.cross_entropy, 0.05), tensors(), tensors(7), "cpu", DAMP, rtol=1e-12
    )
    scores = named.influence_matrix()
    for solver in SOLVERS:
        other = module(solver, 2, rtol=1e-12).influence_matrix()
        assert (other - scores).norm() <= 1e-10 * scores.norm()  # solved to 1e-12, at a condition of about 10
    assert scores.abs().max() > 1e-5


class Known(LinearOperator):
    """A matrix of which nothing is known but what it costs."""

    def __init__(self, d: int, product: float, dense: float, dual: DualCost | None) -> None:
        self.size, self.dtype, self.device = d, torch.float32, torch.device("cpu")
        self._costs = product, dense, dual

    @property
    def operations(self) -> float:
        return self._costs[0]

    @property
    def operations_of_dense(self) -> float:
        return self._costs[1]

    def product(self, rows: Tensor) -> Tensor:
        raise AssertionError("costs are estimated without products")

    def dual_cost(self, shift: float) -> DualCost:
        return super().dual_cost(shift) if self._costs[2] is None else self._costs[2]

    def dual(self, shift: float, room: float) -> Dual:
        return None  # type: ignore[return-value]  # it is not looked into


def ranked(
    monkeypatch: pytest.MonkeyPatch, *, k: int = 1, d: int = 1000, free: float = 1e9, **changes: Any
) -> tuple[Auto, Known]:
    monkeypatch.setattr("torch_influence.memory.free_memory", lambda device: 2 * free)
    operator = Known(d, **({"product": 1e6, "dense": 1e9, "dual": None} | changes))
    return Auto(rtol=1e-3), operator


@pytest.mark.parametrize(
    ("changes", "best"),
    [
        ({}, "cg"),
        ({"k": 100}, "block"),
        ({"k": 1000}, "direct"),  # as many rows as parameters
        ({"d": 10, "dense": 1e4}, "direct"),
        ({"dual": DualCost(10, 1000, 1e6, 1e4)}, "dual"),
        ({"dual": DualCost(10, 2 * 10**9, 1e6, 1e4)}, "cg"),  # it does not fit
        ({"k": 100, "free": 2.4e6}, "cg"),  # neither three matrices nor seven vectors for each row fit
        ({"k": 100, "free": 1e6}, "block"),  # nothing fits: the one that asks for least operations
    ],
)
def test_the_cheapest_that_fits_comes_first(
    changes: dict[str, Any], best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto, operator = ranked(monkeypatch, **changes)
    assert auto.chosen(operator, changes.get("k", 1)) == best


def test_reasons_name_operations_or_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    auto, operator = ranked(monkeypatch, free=5e6)
    step = auto.describe(operator, 100)
    assert step.path.startswith("block conjugate gradients")
    why_not = dict(step.why_not)
    assert "x the operations" in why_not["cg"]
    assert why_not["direct"] == "needs 0.012 GB, and 0.005 GB may be used"


def test_auto_keeps_a_factor_until_something_changes() -> None:
    it = module("direct")
    it.stest([0])
    factor = it._solver._factor._made
    it.stest([1])
    assert it._solver._factor._made is factor
    auto = module()
    auto.solver = "direct"
    auto.stest([0])
    auto.solver = "auto"
    assert "factored before" in auto.explain()["solver"].path
    auto.damp = 1.0
    assert "factored before" not in auto.explain()["solver"].path
    # Solved to 1e-12 at a condition of about 10: 1e5 roundings.
    assert_close(auto.stest([0]), CGInfluenceModule(*arguments(), 1.0, rtol=1e-12).stest([0]), operations=1e5)
    with torch.no_grad():
        auto.model.head.weight += 1.0
    assert "factored before" not in auto.explain()["solver"].path


def arguments() -> tuple[Any, ...]:
    return network(1), Supervised(F.cross_entropy, 0.05), tensors(), tensors(7), "cpu"


def test_operations_are_those_of_the_layers() -> None:
    """A Gauss-Newton product with weights of 4 x 4 and 4 x 3: J of either, Jᵀ of either, and twice what links them."""
    it = module(layers=2, gnh=True)
    with it._problem.evaluation.session():
        operations = it._problem.curvature().operations
    assert operations == 2 * 17 * 2 * (16 + 12 + 12)


def test_what_is_made_of_a_curvature_goes_with_it() -> None:
    for solver, gnh in (("direct", False), ("dual", True)):
        it = module(solver, gnh=gnh)
        it.stest([0])
        curvature = weakref.ref(it._problem._curvature[1])
        it.clear_cache()
        gc.collect()
        assert curvature() is None


@pytest.mark.parametrize("solver", [*SOLVERS, "dual"])
def test_explain_of_a_solver_that_was_asked_for(solver: str) -> None:
    for k in (1, 3):
        assert module(solver).explain(k)["solver"].path.startswith(named()[solver].title)


def test_explain_names_the_solver_and_the_others() -> None:
    step = module(layers=2).explain(3)["solver"]
    assert "operations" in step.path
    assert [name for name, _ in step.why_not][-1] == "dual"
    assert len(step.why_not) == 3
    assert not module("cg").explain(3)["solver"].why_not


def test_an_unknown_solver_is_named() -> None:
    with pytest.raises(
        ValueError, match="solver: expected one of 'auto', 'direct', 'dual', 'cg', 'block', 'minres', got 'lu'"
    ):
        module("lu")


def test_a_matrix_that_does_not_fit_is_refused_only_when_asked_for() -> None:
    model = nn.Linear(10_000, 100)
    data = DataLoader(TensorDataset(torch.zeros(2, 10_000), torch.zeros(2, dtype=torch.int64)), batch_size=2)
    with pytest.raises(MemoryError, match='InfluenceModule with solver="direct" needs three'):
        InfluenceModule(model, Supervised(F.cross_entropy), data, data, "cpu", 1.0, solver="direct")
    it = InfluenceModule(model, Supervised(F.cross_entropy), data, data, "cpu", 1.0)
    assert "needs" in dict(it.explain()["solver"].why_not)["direct"]


def test_an_indefinite_matrix_is_told() -> None:
    it = InfluenceModule(
        network(2), Supervised(F.cross_entropy, 0.0), tensors(), tensors(7), "cpu", 1e-6, solver="direct"
    )
    with pytest.warns(NegativeCurvatureWarning, match="smallest eigenvalue"):
        it.stest([0])


def test_auto_takes_a_dual_system_and_lets_go_of_it() -> None:
    """9 x 3 outputs and some hundred parameters; then a regulariser that no dual system has."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    data = DataLoader(TensorDataset(torch.randn(9, 40).double(), torch.arange(9) % 3), batch_size=4)
    objective = Supervised(F.cross_entropy, 0.05)
    it = InfluenceModule(model, objective, data, data, "cpu", DAMP, True, rtol=1e-10)
    assert it.explain(9)["solver"].path.startswith("dual system")
    scores = it.influence_matrix()
    assert it.last_report is not None
    assert it.last_report.method == "dual Cholesky"
    plain = InfluenceModule(model, objective, data, data, "cpu", DAMP, True, "cg", rtol=1e-10).influence_matrix()
    assert (scores - plain).norm() <= 1e-8 * plain.norm()  # solved to 1e-10, at a condition below 100
    assert "kernel" in it.explain()["solver"].path

    # Every example twice, and damping below the rounding of the small matrix, which is singular.
    x, y = data.dataset.tensors
    twice, flat = DataLoader(TensorDataset(torch.cat([x, x]), torch.cat([y, y]))), Supervised(F.cross_entropy, 0.0)
    it = InfluenceModule(model, flat, twice, data, "cpu", 1e-20, True, maxiter=5)
    it.stests()
    assert it.last_report is not None
    assert "conjugate gradients" in it.last_report.method
    assert "less than the rounding" in dict(it.explain(7)["solver"].why_not)["dual"]
    with pytest.raises(torch.linalg.LinAlgError, match="less than the rounding"):
        InfluenceModule(model, flat, twice, data, "cpu", 1e-20, True, "dual").stests()

    it.damp = DAMP  # another damping, another answer
    assert it.explain(9)["solver"].path.startswith("dual system")
    asked = InfluenceModule(model, flat, data, data, "cpu", 0.0, True, "dual")
    with pytest.raises(ValueError, match="damping plus regulariser, 0, is not positive"):
        asked.stests()
    asked.damp = DAMP
    expected = InfluenceModule(model, flat, data, data, "cpu", DAMP, True, "cg", rtol=1e-10).stests()
    assert (asked.stests() - expected).norm() <= 1e-8 * expected.norm()

    class Quartic(Supervised):
        def train_regularization(self, params: torch.Tensor) -> torch.Tensor:
            return params.pow(4).sum()

    other = InfluenceModule(model, Quartic(F.cross_entropy), data, data, "cpu", DAMP, True)
    assert "no multiple of the identity" in dict(other.explain(9)["solver"].why_not)["dual"]
    with pytest.raises(ValueError, match='solver="dual": the regulariser'):
        InfluenceModule(model, Quartic(F.cross_entropy), data, data, "cpu", DAMP, True, "dual").stest([0])

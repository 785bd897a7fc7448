"""A solver, a curvature and a check of one's own, each in one place outside of the package, in use like its own."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from problems import module, network
from torch import Tensor

from torch_influence import CGInfluenceModule, ConvergenceWarning, InfluenceModule, LiSSAInfluenceModule, SolveError
from torch_influence.curvature import Curvature
from torch_influence.linop import Dense, LinearOperator, Multiplied
from torch_influence.plan import Step
from torch_influence.solvers import (
    CG,
    Auto,
    BlockCG,
    ClosedForm,
    Cost,
    Direct,
    DualDirect,
    LiSSA,
    Minres,
    Nystrom,
    Solver,
)
from torch_influence.verification import Check, Evidence, check

DAMP = 0.7
OBJECTS = {
    "direct": Direct(),
    "dual": DualDirect(rtol=1e-12),
    "cg": CG(rtol=1e-12),
    "cg with M": CG(rtol=1e-12, M=Nystrom(5)),
    "block": BlockCG(rtol=1e-12),
    "minres": Minres(rtol=1e-12),
    "auto": Auto(rtol=1e-12),
}


def built(solver: Any = "auto", **options: Any) -> InfluenceModule:
    return module(InfluenceModule, damp=DAMP, solver=solver, **options)


@pytest.fixture(scope="module")
def exact() -> Tensor:
    return built("direct", curvature="gauss-newton").influence_matrix()


# -- a toy solver -----------------------------------------------------------------------------------------------------


class Inverse:
    """Somebody's object: one method."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor, self.solves = factor, 0

    def solve(self, operator: LinearOperator, rows: Tensor) -> Tensor:
        self.solves += 1
        return self.factor * torch.linalg.solve(operator.dense(), rows.mT).mT


class Described(Inverse):
    exact = symmetric = True

    def cost(self, operator: LinearOperator, k: int) -> Cost:
        return Cost(float(operator.size) ** 3, 17, "LU each time")

    def describe(self, operator: LinearOperator, k: int) -> Step:
        return Step("solver", f"by hand, {k} rows", 17)


class Subclass(Solver):
    title, exact = "a subclass's way", True

    def solve(self, operator: LinearOperator, rows: Tensor, **how: Any) -> Any:
        return Inverse().solve(operator, rows), None

    def cost(self, operator: LinearOperator, k: int) -> Cost:
        return Cost(123.0, 45, "a guess")


@pytest.mark.parametrize("solver", [Inverse(), Described(), Subclass()], ids=lambda solver: type(solver).__name__)
def test_a_toy_solver_gives_the_scores_and_is_explained(solver: Any, exact: Tensor) -> None:
    it = built(solver, curvature="gauss-newton")
    assert torch.allclose(it.influence_matrix(), exact, rtol=1e-9, atol=1e-14)
    assert it.last_report is not None
    assert float(it.last_report.residual.max()) < 1e-12  # measured, since it reports nothing
    assert it.solver is solver
    paths = {
        "Inverse": "Inverse",
        "Described": "by hand, 3 rows",
        "Subclass": "a subclass's way; about 1.2e+02 operations (a guess)",
    }
    assert it.explain(3)["solver"].path == paths[type(solver).__name__]
    assert it.verify(print=False).passed


def test_a_toy_solver_is_asked_from_the_side_that_it_allows() -> None:
    for solver, solves in ((Inverse(), 3), (Described(), 1)):
        it = built(solver)
        assert it.either_side == (solves == 1)
        it.influence_matrix([0], [0, 1, 2])
        assert it.last_report is not None
        assert len(it.last_report.residual) == solves


def test_a_toy_solver_may_take_one_row_at_a_time() -> None:
    class OneByOne(Inverse):
        batched = False

        def solve(self, operator: LinearOperator, rows: Tensor) -> Tensor:
            assert len(rows) == 1
            return super().solve(operator, rows)

    it = built(OneByOne())
    assert torch.allclose(it.stests([0, 1, 2]), built(Inverse()).stests([0, 1, 2]), rtol=1e-9, atol=1e-14)
    assert it.solver.solves == 3


def test_a_toy_solver_that_is_wrong_is_told() -> None:
    with pytest.warns(ConvergenceWarning, match="Inverse did not converge for 2 of 2 right-hand sides"):
        built(Inverse(-1.0)).stests([0, 1])
    with pytest.raises(SolveError):
        built(Inverse(-1.0), on_failure="raise").stests([0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built(Inverse(-1.0), on_failure="ignore").stests([0])
    assert not built(Inverse(1.5)).verify(print=False)["solver"].passed


@pytest.mark.parametrize(
    ("solver", "error", "text"),
    [
        (Inverse, TypeError, "give an instance, not the class"),
        (3, TypeError, r"expected a name, or an object with solve\(operator, rows\), got 3 of int"),
        ("lu", ValueError, "expected one of 'auto', 'direct', 'dual', 'cg', 'block', 'minres', got 'lu'"),
    ],
)
def test_what_is_no_solver_is_refused(solver: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        built(solver)


def test_a_solver_that_returns_something_else_is_refused() -> None:
    class Short:
        def solve(self, operator: LinearOperator, rows: Tensor) -> Tensor:
            return rows[:, 1:]

    with pytest.raises(ValueError, match=r"Short.solve: expected it to return rows \[1, \d+\]"):
        built(Short()).stest([0])


# -- solvers of the package as objects --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_give_what_names_give(name: str, exact: Tensor) -> None:
    it = built(OBJECTS[name], curvature="gauss-newton")
    assert torch.allclose(it.influence_matrix(), exact, rtol=1e-7, atol=1e-12)  # solved to 1e-12, condition below 1e3
    assert it.explain(2)["solver"].path
    if name in ("direct", "dual", "cg", "block", "minres", "auto"):
        named = built(name, curvature="gauss-newton", rtol=1e-12)
        assert torch.equal(named.influence_matrix(), it.influence_matrix())


def test_lissa_as_an_object_is_the_named_module() -> None:
    options = {"repeat": 2, "depth": 40, "scale": 20.0}
    scores = []
    for kind, more in (
        (LiSSAInfluenceModule, options),
        (InfluenceModule, {"solver": LiSSA(**options)}),
    ):
        generator = torch.Generator().manual_seed(3)
        if kind is InfluenceModule:
            more["solver"].generator = generator
        else:
            more = more | {"generator": generator}
        scores.append(module(kind, damp=DAMP, on_failure="ignore", **more).influence_matrix())
    assert torch.equal(*scores)


@pytest.mark.parametrize("name", ["rtol", "atol", "maxiter", "M"])
def test_options_beside_an_object_are_refused(name: str) -> None:
    value = {"rtol": 1e-3, "atol": 1e-3, "maxiter": 3, "M": Nystrom(2)}[name]
    with pytest.raises(ValueError, match=f"solver, {name}: {name} is for a solver by name; give it to CG"):
        built(CG(), **{name: value})


def test_one_object_serves_two_problems() -> None:
    solver, other = Direct(), network()
    with torch.no_grad():
        other[0].weight.mul_(1.3)
    modules = [built(solver), built(solver, model=other)]
    expected = [built("direct").influence_matrix(), built("direct", model=other).influence_matrix()]
    for _ in range(2):
        for it, scores in zip(modules, expected, strict=True):
            assert torch.equal(it.influence_matrix(), scores)


def test_modules_with_objects_can_be_copied_and_pickled(exact: Tensor) -> None:
    it = built(CG(rtol=1e-12, M=Nystrom(5)), curvature="gauss-newton")
    it.stest([0])
    for twin in (copy.deepcopy(it), pickle.loads(pickle.dumps(it))):
        assert torch.allclose(twin.influence_matrix(), exact, rtol=1e-7, atol=1e-12)


# -- a toy curvature --------------------------------------------------------------------------------------------------


class Ridge(Curvature):
    """c I, which knows its inverse."""

    title, c = "three times the identity", 3.0

    def product(self, rows: Tensor) -> Tensor:
        return self.c * rows

    def describe(self) -> str:
        return self.title

    def inverse(self, shift: float) -> LinearOperator:
        return Multiplied(lambda rows: rows / (self.c + shift), torch.ones(1, self.size, dtype=self.dtype))


@pytest.mark.parametrize("solver", ["auto", "cg", ClosedForm(), Inverse()], ids=["auto", "cg", "closed form", "own"])
def test_a_toy_curvature_is_solved_with_and_explained(solver: Any) -> None:
    it = built(solver, curvature=Ridge)
    assert it.curvature is Ridge
    expected = it.test_loss_grad([2]) / (3.0 + DAMP)
    assert torch.allclose(it.stest([2]), expected, rtol=1e-10)
    assert it.explain()["curvature"].path == "three times the identity"
    if solver == "auto":
        assert it.explain()["solver"].path.startswith("the operator's own inverse")
    done = {found.name for found in it.verify(print=False).checks}
    assert "solver" in done
    assert not {"curvature", "differences"} & done  # it has no other definition, and is no second derivative


@pytest.mark.parametrize("kind", [CGInfluenceModule, LiSSAInfluenceModule])
def test_named_modules_take_curvatures_too(kind: Any) -> None:
    options = {"repeat": 1, "depth": 60, "scale": 5.0} if kind is LiSSAInfluenceModule else {}
    it = module(kind, damp=DAMP, curvature=Ridge, **options)
    assert torch.allclose(it.stest([2]), it.test_loss_grad([2]) / (3.0 + DAMP), rtol=1e-6)


def test_curvature_and_its_older_spelling() -> None:
    it = built(curvature="gauss-newton")
    assert it.gnh
    it.gnh = False
    assert it.curvature == "hessian"
    assert built(gnh=True).curvature == "gauss-newton"
    with pytest.raises(ValueError, match="curvature, gnh: gnh=True means curvature='gauss-newton', got 'hessian'"):
        built(curvature="hessian", gnh=True)
    with pytest.raises(ValueError, match="curvature: expected 'hessian', 'gauss-newton' or a subclass"):
        built(curvature="fisher")
    with pytest.raises(TypeError, match="curvature: expected a name or a subclass of Curvature, got 3 of int"):
        built(curvature=3)


def test_a_closed_form_that_is_not_there_is_told() -> None:
    with pytest.raises(ValueError, match="its inverse is not known in closed form"):
        built(ClosedForm()).stest([0])
    with pytest.raises(ValueError, match="its inverse is not known in closed form"):
        ClosedForm().solve(Dense(torch.eye(2)), torch.ones(1, 2))


# -- a toy check ------------------------------------------------------------------------------------------------------


def small_damping(evidence: Evidence) -> Check:
    return check("damping", evidence.problem.damp, 0.5, "the damping itself", "too much of it")


def test_a_toy_check_is_made_with_the_others() -> None:
    found = built().verify(checks=[small_damping], print=False)
    assert [one.name for one in found.checks][-1] == "damping"
    assert not found["damping"].passed
    assert not found.passed
    it = built()
    it.damp = 0.3
    assert it.verify(checks=[small_damping, lambda evidence: None], print=False).passed

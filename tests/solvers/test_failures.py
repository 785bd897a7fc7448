"""How a solve fails: for each failure and solver the warning or error, its text, and that value and report agree."""

from __future__ import annotations

import dataclasses
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import problems
import pytest
import torch
from oracles import tolerance, with_spectrum
from problems import Classification, loader, module, network
from torch import Tensor, nn

from torch_influence import (
    AutogradInfluenceModule,
    CGInfluenceModule,
    InfluenceModule,
    LiSSAInfluenceModule,
    NondeterminismWarning,
)
from torch_influence.agreement import agree
from torch_influence.linop import Dense
from torch_influence.solvers import (
    ConvergenceWarning,
    DivergenceWarning,
    NegativeCurvatureWarning,
    SolveError,
    SolveReport,
    block_cg,
    cg,
    direct,
    lissa,
    minres,
)

D, K = 40, 3
NAN, INF = float("nan"), float("inf")
SINGULAR = torch.linalg.LinAlgError  # type: ignore[attr-defined]


def spectrum(*negative: float, smallest: float = 0.1) -> Tensor:
    positive = torch.logspace(0, torch.tensor(smallest).log10().item(), D - len(negative), dtype=torch.float64)
    torch.manual_seed(0)
    return with_spectrum(torch.cat([positive, torch.tensor(negative, dtype=torch.float64)]))


def right_hand_sides(change: Callable[[Tensor], Any] = lambda rows: None) -> Tensor:
    torch.manual_seed(1)
    rows = torch.randn(K, D, dtype=torch.float64)
    change(rows)
    return rows


def zero(rows: Tensor) -> None:
    rows[1] = 0.0


def nan(rows: Tensor) -> None:
    rows[1, 3] = NAN


def spoiled(matrix: Tensor, value: float) -> Tensor:
    matrix[4, 4] = value
    return matrix


@dataclasses.dataclass
class Case:
    """A system, and what each solver says of it: the type of a warning or error and its text, or that it says nothing.

    ``solved`` are the rows that have an answer within the tolerance, ``unknown`` those that are NaN.
    """

    name: str
    matrix: Tensor
    rows: Tensor
    solver: Callable[..., Any]
    says: list[tuple[type, str]]
    solved: list[int]
    unknown: list[int] = dataclasses.field(default_factory=list)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: torch.dtype = torch.float64


SADDLE = r"met negative curvature in \d of 3.*smallest eigenvalue is -0\.(5|499) or less.*larger by at least 0\.5(5|49)"
NOT_FINITE = r"failed for {} of 3 right-hand sides: the right-hand side or a product .* not finite .*NaN or infinity"
NAMES = {cg: "conjugate gradients", block_cg: "block conjugate gradients", minres: "MINRES", direct: "Cholesky"}
EVERY = [0, 1, 2]


def cases() -> list[Case]:
    table = []
    for solver, name in NAMES.items():
        iterates = solver is not direct

        def case(what: str, *details: Any, solver: Any = solver, name: str = name, **more: Any) -> None:
            table.append(Case(f"{what}, {name}", *details[:2], solver, *details[2:], **more))

        fine = right_hand_sides()
        case("nothing wrong", spectrum(), fine, [], EVERY)
        case("zero right-hand side", spectrum(), right_hand_sides(zero), [], EVERY)
        case(
            "NaN in a right-hand side",
            spectrum(),
            right_hand_sides(nan),
            [(ConvergenceWarning, NOT_FINITE.format(1))],
            [0, 2],
            unknown=[1],
        )
        for value in (NAN, INF):
            what = [(ConvergenceWarning, NOT_FINITE.format(3))]
            if not iterates:
                what = [(ValueError, "entries that are not finite: a second derivative of the training loss is NaN")]
            case(f"{value} in the matrix", spoiled(spectrum(), value), fine, what, [], unknown=EVERY)
        saddle = [(NegativeCurvatureWarning, SADDLE)]
        if not iterates:
            saddle = [(NegativeCurvatureWarning, "not positive definite: smallest eigenvalue -0.5.*larger by 0.55")]
        case("indefinite", spectrum(-0.5), fine, saddle, EVERY)
        if iterates:
            few = r"did not converge for 3 of 3 .* residual \d.* where rtol=1e-05 was asked for, after 5 iter.*maxiter"
            case("maxiter reached", spectrum(), fine, [(ConvergenceWarning, few)], [], options={"maxiter": 5})
            once = r"did not converge for 3 of 3 right-hand sides: relative residual .* after 5 iterations; raise damp"
            both = [*saddle, (ConvergenceWarning, once)]
            if solver is cg:  # the block hands over before it has five
                case("indefinite, few iterations", spectrum(-0.5), fine, both, [], options={"maxiter": 5})
        hard = [
            (
                ConvergenceWarning,
                r"not converge for 3 of 3 .* torch\.float32 reaches no further: raise damp, .*precision",
            )
        ]
        long = {"maxiter": 100 * D} if iterates else {}
        smallest = 1e-5 if solver is minres else 1e-6  # beyond, MINRES takes the matrix for singular, and says that
        case("ill-conditioned", spectrum(smallest=smallest), fine, hard, [], dtype=torch.float32, options=long)
        if solver is not minres:  # it squares products in float32
            case("huge in float32", 1e25 * spectrum(), 1e25 * fine, [], EVERY, dtype=torch.float32)
        if iterates:
            over = [(ConvergenceWarning, NOT_FINITE.format(3) + r".* an overflow of torch\.float32")]
            ones = 1e38 * (torch.ones(D, D) + torch.eye(D)).double()
            case("float32 overflow", ones, fine.abs(), over, [], unknown=EVERY, dtype=torch.float32)
            large = [(ConvergenceWarning, r"for 3 of 3 .* beyond the range of torch\.float32: NaN where .* too large")]
            case("huge solution", 1e-25 * spectrum(), 1e25 * fine, large, [], unknown=EVERY, dtype=torch.float32)
    return table


def said_by(act: Callable[[], Any]) -> tuple[Any, list[Warning | Exception]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = act()
        except Exception as error:
            return None, [error]
    callers = {__file__, problems.__file__}  # the latter builds modules
    assert all(warning.filename in callers for warning in caught), "a warning points elsewhere than at the caller"
    return result, [warning.message for warning in caught]  # type: ignore[misc]


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_what_is_said_and_that_value_and_report_agree(case: Case) -> None:
    matrix, rows = case.matrix.to(case.dtype), case.rows.to(case.dtype)
    result, said = said_by(lambda: case.solver(matrix, rows, **case.options))
    assert [type(one) for one in said] == [kind for kind, _ in case.says], said
    for one, (_, words) in zip(said, case.says, strict=True):
        assert re.search(words, str(one)), str(one)
    if result is None:
        return
    x, report = result
    assert report.converged.nonzero().flatten().tolist() == case.solved
    assert x.isnan().all(dim=1).nonzero().flatten().tolist() == case.unknown
    assert x.isnan().any(dim=1).nonzero().flatten().tolist() == case.unknown
    assert report.residual.isnan().nonzero().flatten().tolist() == case.unknown

    size = rows.double().norm(dim=1)
    left = (rows.double() - x.double() @ matrix.double()).norm(dim=1)
    residual = torch.where(size > 0, left / size, left)
    known = [row for row in range(K) if row not in case.unknown]
    rounded = matrix.double().norm() * x.double().norm(dim=1) / size.clamp(min=1)  # |A||x|, in units of |b|
    allowed = tolerance(case.dtype, operations=D) * (1 + rounded)
    assert ((report.residual - residual).abs() <= allowed)[known].all()


@pytest.mark.parametrize("case", [case for case in cases() if case.says], ids=lambda case: case.name)
def test_raise_loses_nothing_and_ignore_is_silent(case: Case) -> None:
    matrix, rows = case.matrix.to(case.dtype), case.rows.to(case.dtype)
    if issubclass(case.says[0][0], ValueError):
        return  # it is one whatever was asked for
    warned, _ = said_by(lambda: case.solver(matrix, rows, **case.options))
    ignored, said = said_by(lambda: case.solver(matrix, rows, on_failure="ignore", **case.options))
    assert not said
    torch.testing.assert_close(ignored[0], warned[0], rtol=0, atol=0, equal_nan=True)
    if case.solver is minres and case.says[0][0] is NegativeCurvatureWarning:
        with pytest.warns(NegativeCurvatureWarning):  # it takes such matrices: no failure
            case.solver(matrix, rows, on_failure="raise", **case.options)
        return
    with pytest.raises(SolveError, match=case.says[0][1]) as caught:
        case.solver(matrix, rows, on_failure="raise", **case.options)
    assert [type(one) for one in caught.value.warnings] == [kind for kind, _ in case.says]
    if case.solver is direct and case.says[0][0] is NegativeCurvatureWarning:
        return  # told of before there is a solution
    assert caught.value.solution is not None
    torch.testing.assert_close(caught.value.solution, warned[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(caught.value.report.converged, warned[1].converged)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert torch.equal(again.report.iterations, warned[1].iterations)


def test_the_damping_that_is_named_cures() -> None:
    matrix, rows = spectrum(-0.5, -0.2), right_hand_sides()
    for solver in (cg, block_cg):
        with pytest.warns(NegativeCurvatureWarning) as caught:
            solver(matrix, rows)
        damp = float(re.search(r"larger by at least ([0-9.e+-]+)", str(caught[0].message)).group(1))  # type: ignore[union-attr]
        x, said = said_by(lambda solver=solver, damp=damp: solver(Dense(matrix).damped(damp), rows))
        assert not said
        assert x[1].converged.all()


def test_a_singular_matrix_is_an_error_of_direct() -> None:
    with pytest.raises(SINGULAR, match=r"singular .*add damping"):
        direct(torch.zeros(D, D, dtype=torch.float64), right_hand_sides())


# -- modules: the same, of data and models ----------------------------------------------------------------------------


class Concave(Classification):
    l2 = -10.0


class Huge(Classification):
    """Products with the curvature beyond what float32 holds."""

    def train_loss_on_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        return 3e38 * super().train_loss_on_outputs(outputs, batch)

    def test_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
        return 3e38 * super().test_loss(model, params, batch)


def with_nan() -> dict[str, Any]:
    train = loader()
    train.dataset.tensors[0][4] = NAN
    return {"train_loader": train}


class AlwaysDropout(nn.Sequential):
    """Dropout that eval mode does not turn off."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, training=True)


def random_forward() -> dict[str, Any]:
    return {"model": AlwaysDropout(*network())}


def in_float32() -> dict[str, Any]:
    return {
        "model": network(torch.float32),
        "objective": Huge(),
        "train_loader": loader(dtype=torch.float32),
        "test_loader": loader(n=7, batch_size=3, seed=3, dtype=torch.float32),
    }


MODULES: list[tuple[str, Any, Callable[[], dict[str, Any]], type, str]] = [
    ("indefinite", CGInfluenceModule, lambda: {"objective": Concave()}, NegativeCurvatureWarning, "smallest eigenvalue is -9"),
    ("indefinite", AutogradInfluenceModule, lambda: {"objective": Concave()}, NegativeCurvatureWarning, "smallest eigenvalue -9"),
    ("indefinite", InfluenceModule, lambda: {"objective": Concave(), "damp": 1.0, "solver": "block"}, NegativeCurvatureWarning, "smallest eigenvalue is -9"),
    ("maxiter reached", CGInfluenceModule, lambda: {"maxiter": 2}, ConvergenceWarning, "rtol=1e-12 .* after 2 iterations; raise maxiter"),
    ("NaN in the data", CGInfluenceModule, with_nan, ConvergenceWarning, "failed for 7 of 7 .*Look for NaN in the data"),
    ("NaN in the data", AutogradInfluenceModule, with_nan, ValueError, "not finite: a second derivative"),
    ("NaN in the data", InfluenceModule, lambda: with_nan() | {"damp": 1.0, "solver": "block"}, ConvergenceWarning, "Look for NaN in the data"),
    ("nondeterministic forward", CGInfluenceModule, random_forward, NondeterminismWarning, "loss of the same batch is .* and random numbers are drawn"),
    ("nondeterministic forward", InfluenceModule, lambda: random_forward() | {"damp": 1.0, "solver": "direct"}, NondeterminismWarning, "random numbers are drawn"),
    ("nondeterministic forward", LiSSAInfluenceModule, random_forward, NondeterminismWarning, "random numbers are drawn"),
    ("too small scale", LiSSAInfluenceModule, lambda: {"scale": 1e-3, "depth": 50}, DivergenceWarning, "LiSSA diverged .*scale"),
    ("indefinite", LiSSAInfluenceModule, lambda: {"objective": Concave(), "scale": 20.0, "depth": 200}, DivergenceWarning, "negative eigenvalue"),
    ("too small depth", LiSSAInfluenceModule, lambda: {"scale": 1000.0, "depth": 20}, ConvergenceWarning, "depth"),
    ("NaN in the data", LiSSAInfluenceModule, lambda: with_nan() | {"depth": 50}, ConvergenceWarning, "NaN"),
    ("float32 overflow", LiSSAInfluenceModule, lambda: in_float32() | {"scale": "auto"}, ConvergenceWarning, "torch.float32"),
    ("float32 overflow", CGInfluenceModule, in_float32, ConvergenceWarning, "overflow of torch.float32"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "changes", "category", "words"), MODULES)
def test_modules_say_it_and_keep_the_report(
    name: str, kind: Any, changes: Callable[[], dict[str, Any]], category: type, words: str
) -> None:
    def act(**more: Any) -> Any:
        it = module(kind, **({"on_failure": "warn"} | changes() | more))
        return it, it.stests()

    result, said = said_by(act)
    assert any(isinstance(one, category) and re.search(words, str(one)) for one in said), said
    if not issubclass(category, Warning):
        return
    it, s = result
    assert isinstance(it.last_report, SolveReport)
    assert len(it.last_report.converged) == len(s)
    assert s[it.last_report.converged].isfinite().all()
    if kind is not LiSSAInfluenceModule or not issubclass(category, RuntimeWarning):
        assert torch.equal(s.isnan().all(dim=1), it.last_report.residual.isnan())

    _, said = said_by(lambda: act(on_failure="ignore"))
    assert not said
    with pytest.raises(SolveError, match=words) as caught:
        act(on_failure="raise")
    if kind is CGInfluenceModule and category is not NondeterminismWarning:  # that is told of once
        it.on_failure = "raise"
        with pytest.raises(SolveError) as caught:
            it.stests()
        assert it.last_report is caught.value.report


def test_scores_of_a_failed_solve_are_not_finite_and_say_so() -> None:
    it = module(CGInfluenceModule, **with_nan())
    with pytest.warns(ConvergenceWarning), pytest.warns(RuntimeWarning, match="not finite"):
        scores = it.influence_matrix()
    assert scores.isnan().all()


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match='on_failure: expected "warn", "raise" or "ignore", got \'error\''):
        module(LiSSAInfluenceModule, on_failure="error")
    with pytest.raises(ValueError, match="on_failure"):
        cg(spectrum(), right_hand_sides(), on_failure="error")  # type: ignore[arg-type]


# -- the ends of a dtype's range --------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [cg, block_cg, minres, lissa], ids=lambda solver: solver.__name__)
@pytest.mark.parametrize("end", ["too large", "too small"])
def test_a_solution_beyond_the_range_says_so(solver: Any, end: str) -> None:
    """One that fits, with the same digits, if its right-hand side were of another size."""
    options = {"depth": 300} if solver is lissa else {}
    largest, fine = torch.finfo(torch.float64).max, right_hand_sides()
    factor, by = (1e-3, 1e-2 * largest) if end == "too large" else (1e3, torch.finfo(torch.float64).tiny)
    matrix = factor * spectrum(smallest=0.5)
    rows = fine.clone()
    rows[1] *= by / rows[1].abs().max()
    expected, _ = solver(matrix, fine, **options)
    with pytest.warns(ConvergenceWarning, match=r"1 of 3 .* beyond the range of torch\.float64.* too small .* digits"):
        x, report = solver(matrix, rows, **options)
    assert report.converged.tolist() == [True, False, True]
    assert report.residual.isnan().tolist() == [False, True, False]
    assert x[1].isnan().all() if end == "too large" else (x[1].abs() < torch.finfo(torch.float64).tiny).all()
    assert torch.equal(x[[0, 2]], expected[[0, 2]]) or solver is block_cg  # where a row's answer depends on the others
    with pytest.raises(SolveError, match="beyond the range") as caught:
        solver(matrix, rows, on_failure="raise", **options)
    torch.testing.assert_close(caught.value.solution, x, rtol=0, atol=0, equal_nan=True)
    assert not caught.value.report.converged[1]


@pytest.mark.parametrize("solver", [cg, block_cg, minres], ids=lambda solver: solver.__name__)
def test_tolerance_guess_and_callback_are_in_the_users_units(solver: Any) -> None:
    """Also where the solver takes other ones: beyond 2^256 in float64."""
    matrix, rows = spectrum(), right_hand_sides()
    large = 2.0**600
    seen: list[Tensor] = []
    options: dict[str, Any] = {"callback": lambda x: seen.append(torch.from_numpy(x).clone())} if solver is cg else {}
    guess = torch.linalg.solve(matrix, rows, left=False)
    guess[0] = 0.0
    for size in (1.0, large):
        x, report = solver(matrix, rows * size, x0=guess * size, atol=1e-3 * size, rtol=0.0, **options)
        assert report.iterations[1:].tolist() == [0, 0]
        assert report.iterations[0] > 0
        assert 1e-9 < float((rows[0] - x[0] / size @ matrix).norm()) <= 1e-3
        _, report = solver(matrix, rows * size, atol=1e3 * size)
        assert report.iterations.tolist() == [0, 0, 0]
    half = len(seen) // 2
    assert (len(seen) > 0) == (solver is cg)
    for small, other in zip(seen[:half], seen[half:], strict=True):
        assert torch.equal(small * large, other)


def test_lissas_callbacks_are_in_the_users_units() -> None:
    matrix, rows = spectrum(), right_hand_sides()
    seen: list[Tensor] = []

    def see(*where: Any) -> None:
        seen.append(where[-1].clone())

    for chosen in (rows, rows[0]):
        seen.clear()
        for size in (1.0, 2.0**-600):
            lissa(matrix, chosen * size, depth=3, scale=1.0, callback=see, after_repeat=see, on_failure="ignore")
        assert len(seen) == 2 * (3 + 1)
        for plain, small in zip(seen[:4], seen[4:], strict=True):
            assert torch.equal(plain * 2.0**-600, small)


def test_two_computations_of_tiny_gradients_are_told_apart() -> None:
    """Squares of 1e-30 are 0 in float32, and so would be what they differ by."""
    rows = 1e-30 * torch.randn(3, 7)
    assert agree(rows, rows * (1 + 1e-7), torch.float32)
    assert not agree(rows, 1.1 * rows, torch.float32)
    assert not agree(rows, torch.zeros_like(rows), torch.float32)
    assert not agree(torch.zeros_like(rows), rows, torch.float32)
    assert agree(torch.zeros_like(rows), torch.zeros_like(rows), torch.float32)

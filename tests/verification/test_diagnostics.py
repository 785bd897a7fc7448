"""The spectrum of a module's curvature against eigvalsh, and the damping that is made of it; random losses."""

from __future__ import annotations

import doctest
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import dense_gauss_newton, dense_hessian, loader_batches, tolerance, with_spectrum
from problems import SOLVER_OPTIONS, Classification, loader, module, network
from test_side_effects import Snapshot, awkward
from torch import Tensor, nn

import torch_influence
from torch_influence import (
    CGInfluenceModule,
    InfluenceModule,
    NegativeCurvatureWarning,
    NondeterminismWarning,
    diagnostics,
)
from torch_influence.diagnostics import Spectrum, spectrum, suggest_damping
from torch_influence.linop import Dense, Multiplied
from torch_influence.solvers import cg

MODULES = [*SOLVER_OPTIONS, InfluenceModule]
PARAMETERS = 43  # of the small network

kinds = pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)


def of_module(kind: type, **changes: Any) -> Any:
    return module(kind, **({"damp": 1.0} | changes))


# ---- the spectrum ---------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("gnh", [False, True], ids=["hessian", "gauss-newton"])
@pytest.mark.parametrize("maxiter", [None, PARAMETERS - 1], ids=["all", "lanczos"])
def test_spectrum_of_every_module(kind: type, gnh: bool, maxiter: int | None) -> None:
    it = of_module(kind)
    it.gnh = gnh
    batches = loader_batches(it.train_loader)
    matrix = (dense_gauss_newton if gnh else dense_hessian)(it.model, it.objective, batches)
    expected = torch.linalg.eigvalsh(matrix)
    found = it.spectrum(2, rtol=1e-6, maxiter=maxiter)
    allowed = tolerance(torch.float64, operations=23 * PARAMETERS) * float(expected.abs().max())
    apart = torch.cat([found.smallest - expected[:2], found.largest - expected[-2:]]).abs()
    errors = torch.cat([found.smallest_errors, found.largest_errors])
    if maxiter is None or not gnh:  # the ridge is an eigenvalue of Gauss-Newton many times, and found once
        assert (apart <= errors + allowed).all()
    assert apart[0] <= errors[0] + allowed
    assert apart[-1] <= errors[-1] + allowed
    assert (errors <= 1e-4 * float(expected.abs().max())).all()
    assert found.complete == (maxiter is None)
    assert (found.size, found.damp, found.converged) == (PARAMETERS, 1.0, True)
    assert found.products == PARAMETERS if maxiter is None else found.products <= PARAMETERS + 3
    assert found.definite is True
    assert found.condition == pytest.approx(float((expected[-1] + 1) / (expected[0] + 1)), rel=1e-4)


def test_multiple_eigenvalues_are_seen_where_all_are_computed() -> None:
    found = spectrum(Dense(torch.diag(torch.tensor([2.0, 2.0, 2.0, 5.0, 7.0, 7.0]))), k=2)
    assert found.smallest.tolist() == [2.0, 2.0]
    assert found.largest.tolist() == [7.0, 7.0]


@pytest.mark.parametrize("d", [1, 2, 4])
def test_spectrum_of_a_tiny_matrix(d: int) -> None:
    values = torch.arange(d, dtype=torch.float64) + 1
    found = spectrum(Dense(torch.diag(values)), k=3)
    assert found.smallest.tolist() == values[:3].tolist()
    assert found.largest.tolist() == values[-3:].tolist()
    assert found.condition == pytest.approx(d)


D = 320  # more than the products that are made by default


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "values",
    [torch.linspace(-0.3, 2.0, D), torch.logspace(0, -3, D), torch.cat([torch.zeros(D // 2), torch.rand(D // 2)])],
    ids=["indefinite", "definite", "singular"],
)
def test_lanczos_spectrum_is_within_its_errors(values: Tensor, dtype: torch.dtype) -> None:
    matrix = with_spectrum(values).to(dtype)
    expected = torch.linalg.eigvalsh(matrix.double())
    found = spectrum(Dense(matrix), damp=0.01)
    assert not found.complete
    size = float(expected.abs().max())
    for values_, errors in ((found.smallest, found.smallest_errors), (found.largest, found.largest_errors)):
        nearest = (values_[:, None] - expected).abs().min(dim=1).values
        assert (nearest <= errors).all()
        assert (errors >= torch.finfo(dtype).eps * size).all()  # rounding of the products is in it
    assert abs(found.smallest[0] - expected[0]) <= found.smallest_errors[0]
    assert abs(found.largest[-1] - expected[-1]) <= found.largest_errors[-1]
    assert found.definite is (float(expected[0]) + 0.01 > 0)


def test_errors_come_from_residuals_and_not_from_the_recurrence() -> None:
    """Products of noise: the recurrence believes that it has an invariant space."""
    matrix = with_spectrum(torch.linspace(0.5, 2.0, D))
    noisy = Multiplied(lambda rows: rows @ matrix + 1e-3 * torch.randn_like(rows), matrix[0])
    found = spectrum(noisy, k=1, rtol=1e-3)
    noise = 1e-3 * D**0.5  # its norm; a quarter of that is far outside of what chance makes of 320 numbers
    assert found.smallest_errors[0] > 0.25 * noise
    assert found.largest_errors[0] > 0.25 * noise


def test_a_process_that_was_ended_early_says_so() -> None:
    matrix = with_spectrum(torch.logspace(0, -6, D))
    found = spectrum(Dense(matrix), maxiter=20)
    assert not found.converged
    assert found.products == 20 + 6
    assert found.definite is None
    assert found.condition == torch.inf
    assert "maxiter ended the process" in str(found)
    assert "singular as far as can be told" in str(found)


def test_products_in_less_precision_than_the_operators_widen_the_errors() -> None:
    matrix = torch.diag(torch.linspace(1.0, 2.0, 5))
    assert spectrum(Dense(matrix), dtype=torch.bfloat16).smallest_errors[0] == 32 * torch.finfo(torch.bfloat16).eps * 2
    half = of_module(CGInfluenceModule, model=network(torch.bfloat16), train_loader=loader(dtype=torch.bfloat16))
    assert half.spectrum().dtype == torch.bfloat16


def found_of(smallest: float, largest: float, damp: float = 0.0, error: float = 1e-6, **changes: Any) -> Spectrum:
    values = torch.tensor([smallest, largest], dtype=torch.float64)
    options = {"dtype": torch.float32, "products": 2, "complete": True, "converged": True} | changes
    errors = torch.full((1,), error, dtype=torch.float64)
    return Spectrum(values[:1], values[1:], errors, errors, size=2, damp=damp, **options)


def test_what_a_spectrum_says() -> None:
    definite, saddle, open_ = found_of(0.1, 10.0), found_of(-0.5, 10.0, damp=0.1), found_of(1e-7, 10.0)
    assert (definite.definite, saddle.definite, open_.definite) == (True, False, None)
    assert definite.condition == pytest.approx(100.0)
    assert saddle.condition == open_.condition == torch.inf
    assert "positive definite: smallest eigenvalue 0.1, condition 100" in str(definite)
    assert "Of the 7 digits of float32 a solve may lose 2" in str(definite)
    assert "not positive definite: smallest eigenvalue -0.4" in str(saddle)
    assert "damping larger by at least 0.44 makes it definite" in str(saddle)
    assert "singular as far as can be told: smallest eigenvalue 1e-07 ± 1e-06" in str(open_)
    assert "-0.5 ± 1e-06" in str(saddle)
    assert "d = 2: all eigenvalues; 2 products in float32" in str(saddle)
    assert repr(saddle) == "<Spectrum: -0.5 to 10, damp = 0.1>"


def test_the_iterations_that_a_spectrum_promises_are_enough() -> None:
    matrix = with_spectrum(torch.logspace(0, -2, 400))
    found = spectrum(Dense(matrix), maxiter=400)
    promised = int(str(found).split("gradients need ")[1].split()[0])
    _, report = cg(matrix, torch.randn(5, 400, dtype=torch.float64), rtol=1e-5)
    assert report.iterations.max() <= promised < 400


def test_plot() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    ax = of_module(CGInfluenceModule).spectrum().plot()
    assert ax.get_xlabel() == "eigenvalue of the undamped curvature"
    assert of_module(CGInfluenceModule).spectrum().plot(ax) is ax


@pytest.mark.parametrize("options", [{"k": 0}, {"maxiter": 0}, {"rtol": -1.0}])
def test_wrong_arguments_of_spectrum(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        of_module(CGInfluenceModule).spectrum(**options)


def test_a_curvature_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match="not finite"):
        spectrum(Dense(torch.full((3, 3), torch.nan)))


@kinds
def test_diagnostics_leave_model_and_randomness_alone(kind: type) -> None:
    model = awkward()
    it = of_module(kind, model=model)
    before = Snapshot(model)
    it.hvp(it.flat_parameters())
    state = torch.get_rng_state()
    it.spectrum()
    torch.set_rng_state(state)
    it.suggest_damping()
    before.check()


# ---- damping --------------------------------------------------------------------------------------------------------


class Unregularized(Classification):
    l2 = 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_damping_of_an_indefinite_hessian_lets_conjugate_gradients_converge(dtype: torch.dtype) -> None:
    arguments = {"train_loader": loader(dtype=dtype), "test_loader": loader(n=7, batch_size=3, seed=3, dtype=dtype)}
    it = of_module(CGInfluenceModule, model=network(dtype), damp=0.0, rtol=1e-5, **arguments)
    with pytest.warns(NegativeCurvatureWarning):
        it.stests()
    suggested = it.suggest_damping()
    smallest = float(torch.linalg.eigvalsh(it._problem.curvature().dense().double())[0])
    assert smallest < 0
    assert 1.1 * -smallest <= suggested.damp <= 1.5 * -smallest
    assert suggested.damp == float(suggested) == suggested.least
    it.damp = float(suggested)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        it.stests()
    assert it.last_report.converged.all()
    assert it.spectrum().condition == pytest.approx(suggested.condition, rel=1e-3)
    again = it.suggest_damping()
    assert again.damp == suggested.damp
    assert f"the present damp = {suggested.damp:g} is enough" in str(again)


def test_damping_of_a_singular_matrix_keeps_half_of_the_digits() -> None:
    values = torch.cat([torch.zeros(10), torch.logspace(-6, 0, 30)])
    matrix = with_spectrum(values).float()
    rows = torch.randn(4, 40)
    suggested = suggest_damping(spectrum(Dense(matrix)))
    limit = torch.finfo(torch.float32).eps ** -0.5
    assert 0.9 * limit <= suggested.condition <= limit  # two digits are shown, rounded up
    assert suggested.damp == pytest.approx(1 / limit, rel=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x, report = cg(Dense(matrix).damped(suggested.damp), rows)
    assert (report.converged | report.precision_limit).all()
    exact = torch.linalg.solve(matrix.double() + suggested.damp * torch.eye(40), rows.double().mT).mT
    error = (x.double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert (error <= suggested.condition * report.residual + torch.finfo(torch.float32).eps ** 0.5).all()


def test_a_good_matrix_needs_no_damping() -> None:
    good = Dense(with_spectrum(torch.linspace(0.5, 2.0, 10)))
    none, present = suggest_damping(spectrum(good)), suggest_damping(spectrum(good, damp=0.3))
    assert none.damp == none.least == 0.0
    assert "none is needed" in str(none)
    assert (present.damp, present.least) == (0.3, 0.0)
    assert "the present damp = 0.3 is enough" in str(present)
    assert "curvature below 0.3 count for less than half" in str(present)


def test_damping_from_numbers() -> None:
    saddle, flat, ill = found_of(-0.5, 10.0), found_of(0.0, 0.0, error=0.0), found_of(0.0, 100.0)
    assert suggest_damping(saddle).damp == 0.56  # 1.1 (0.5 + 1e-6), two digits, rounded up
    assert suggest_damping(flat).damp == 1.0
    assert "any damping will do" in str(suggest_damping(flat))
    assert suggest_damping(ill).damp == pytest.approx(100 * torch.finfo(torch.float32).eps ** 0.5, rel=0.03)
    double = found_of(0.0, 100.0, error=1e-12, dtype=torch.float64)
    assert suggest_damping(double).damp == pytest.approx(100 * torch.finfo(torch.float64).eps ** 0.5, rel=0.07)


def test_an_eigenvalue_that_is_not_known_well_is_taken_at_its_worst() -> None:
    unsure = found_of(0.1, 10.0, error=0.5, converged=False)
    assert suggest_damping(unsure).damp == pytest.approx(1.1 * 0.4, rel=0.05)
    assert "with a larger maxiter less might be enough" in str(suggest_damping(unsure))


def test_a_spectrum_may_be_given() -> None:
    it = of_module(CGInfluenceModule, damp=0.0)
    assert it.suggest_damping(it.spectrum(3)).damp == it.suggest_damping().damp > 0


def test_example_of_the_docstring() -> None:
    assert doctest.testmod(diagnostics).failed == 0
    assert doctest.testmod(diagnostics).attempted >= 3


# ---- losses that are random -----------------------------------------------------------------------------------------


class AlwaysDropout(nn.Module):
    """Dropout that eval mode does not turn off."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last, self.p = nn.Linear(4, 5).double(), nn.Linear(5, 3).double(), p

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(self.first(x).tanh(), self.p, training=True))


class RarelyRandom(AlwaysDropout):
    """Noise in one call of four."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh() * (1 + (torch.rand(()) < 0.25)))


class DrawsInVain(AlwaysDropout):
    """Draws random numbers, and makes nothing of them."""

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(3)
        return self.last(self.first(x).tanh())


class Stateful(AlwaysDropout):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.last(self.first(x).tanh()) * self.calls


class NoisyTestLoss(Classification):
    def test_loss(self, model: nn.Module, params: Tensor, batch: Any) -> Tensor:
        return super().test_loss(model, params, batch) * torch.rand(())


class EditsItsBatch(Classification):
    def train_outputs(self, model: nn.Module, batch: Any) -> Tensor:
        batch[0].mul_(2.0)
        return model(batch[0])


@kinds
@pytest.mark.parametrize("cache", ["auto", False])
def test_a_random_forward_is_told(kind: type, cache: Any) -> None:
    with pytest.warns(NondeterminismWarning, match=r"^train_loss: .* random numbers are drawn") as record:
        of_module(kind, model=AlwaysDropout(), cache=cache, on_failure="warn").influences([0, 1], [0])
    told = [warning for warning in record if warning.category is NondeterminismWarning]
    assert sorted(str(warning.message).split(":")[0] for warning in told) == ["test_loss", "train_loss"]
    assert all(Path(warning.filename).is_relative_to(Path(__file__).parents[1]) for warning in told)  # not the package
    assert "F.dropout(x, p, training=self.training)" in str(told[0].message)


@pytest.mark.parametrize("model", [RarelyRandom(), Stateful()], ids=lambda model: type(model).__name__)
def test_other_ways_not_to_be_a_function(model: nn.Module) -> None:
    with pytest.warns(NondeterminismWarning, match="train_loss: the loss of the same batch is"):
        of_module(CGInfluenceModule, model=model).hvp(torch.ones(PARAMETERS).double())


GRADIENTS = {
    "test_loss_grad": lambda it: it.test_loss_grad([0]),
    "stests": lambda it: it.stests([0]),
    "influences of an stest": lambda it: it.influences([0], None, it.flat_parameters()),
    "self_influences": lambda it: it.self_influences([0]),
}


@pytest.mark.parametrize("call", GRADIENTS.values(), ids=GRADIENTS)
def test_gradients_alone_are_told_of(call: Any) -> None:
    class Identity(torch_influence.BaseInfluenceModule):
        batched = True

        def inverse_hvp(self, vec: Tensor) -> Tensor:
            return vec

    with pytest.warns(NondeterminismWarning):
        call(module(Identity, model=AlwaysDropout()))


def test_a_random_test_loss_is_told_apart() -> None:
    with pytest.warns(NondeterminismWarning) as record:
        of_module(CGInfluenceModule, objective=NoisyTestLoss()).influences([0], [0])
    assert [str(warning.message)[:10] for warning in record] == ["test_loss:"]


@pytest.mark.filterwarnings("error")
@kinds
@pytest.mark.parametrize(
    "changes",
    [{}, {"model": awkward()}, {"model": DrawsInVain()}, {"objective": EditsItsBatch()}],
    ids=["plain", "with buffers and dropout", "draws in vain", "edits its batch"],
)
def test_functions_are_not_complained_of(kind: type, changes: dict[str, Any]) -> None:
    of_module(kind, **{"rtol": 1e-5} if kind is CGInfluenceModule else {}, **changes).influences([0], [0])


def test_a_loss_that_is_not_a_number_is_not_random() -> None:
    model = network()
    model[0].weight.data.fill_(torch.nan)
    it = of_module(CGInfluenceModule, model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NondeterminismWarning)
        it.test_loss_grad([0])


def test_the_probe_leaves_random_states_alone() -> None:
    it = of_module(CGInfluenceModule, model=AlwaysDropout())
    state = torch.get_rng_state()
    with it._problem.evaluation.session(), pytest.warns(NondeterminismWarning):
        it._problem.check_loss("train_loss")
    assert torch.equal(torch.get_rng_state(), state)


def test_it_is_looked_at_again_when_the_model_has_changed() -> None:
    model = DrawsInVain()
    it = of_module(CGInfluenceModule, model=model)
    it.hvp(it.flat_parameters())
    it._problem.evaluation.model.forward = AlwaysDropout.forward.__get__(model)  # type: ignore[method-assign]
    with pytest.warns(NondeterminismWarning):
        it.hvp(it.flat_parameters())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_dropout_on_the_device_is_told_and_its_state_left_alone() -> None:
    it = of_module(CGInfluenceModule, model=AlwaysDropout(), device="cuda")
    state = torch.cuda.get_rng_state()
    with it._problem.evaluation.session(), pytest.warns(NondeterminismWarning, match="random numbers are drawn"):
        it._problem.check_loss("train_loss")
    assert torch.equal(torch.cuda.get_rng_state(), state)

"""The conversions of docs/meaning.md: each row's factor and damping, evaluated, against the formula of its library.

Formulas are written out here as the libraries define them, with their sign, reduction and damping; the libraries are
not needed. Factors and dampings are read from the page, so that the page and this test can't part.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from oracles import ClosedForm, IdentityModule, Supervised, assert_close, half_squared_error, logistic_loss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from torch_influence import AutogradInfluenceModule, BaseInfluenceModule

pytestmark = pytest.mark.filterwarnings("error")

PAGE = (Path(__file__).parents[2] / "docs" / "meaning.md").read_text()
N, QUERIES, INPUTS = 24, 5, 3
L2, DAMP = 0.05, 0.1
LOSSES = {"linear": half_squared_error, "logistic": logistic_loss, "softmax": F.cross_entropy}
OUTPUTS = {"linear": 1, "logistic": 1, "softmax": 3}


# -- the page ---------------------------------------------------------------------------------------------------------


def table(second: str) -> dict[str, list[str]]:
    """The rows of the page's table whose second column has this name: cells by the row's first cell."""
    lines = iter(PAGE.splitlines())
    head = next(line for line in lines if line.startswith(f"| number | {second} |"))
    assert next(lines).count("---") == len(cells(head))
    rows: dict[str, list[str]] = {}
    for line in lines:
        if not line.startswith("|"):
            break
        name, *rest = cells(line)
        assert name not in rows
        assert len(rest) == len(cells(head)) - 1
        rows[name] = rest
    return rows


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip()[1:-1].split("|")]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A row of the table of factors. Factor and damping are expressions of n and of their arguments."""

    factor: str
    damp: str | None
    regularizer: str

    @classmethod
    def of(cls, row: list[str]) -> Conversion:
        factor, damp, regularizer, _ = row
        code = re.compile(r"`([^`]+)`")
        expression = code.fullmatch(factor)
        assert expression is not None
        damping = code.fullmatch(damp)
        assert damping is not None or damp == "A = I"
        assert regularizer in ("in both", "left out")
        return cls(expression[1], None if damping is None else damping[1], regularizer)

    @staticmethod
    def value(expression: str, arguments: Mapping[str, float]) -> float:
        return float(eval(expression, {"__builtins__": {}}, {"n": N} | dict(arguments)))


CONVERSIONS = {name: Conversion.of(row) for name, row in table("factor").items()}


# -- a problem at its minimum -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Problem:
    """A generalised linear model at the minimum of its objective, with reg = ½ L2 |θ|²; all in formulas, float64."""

    form: ClosedForm
    query_features: Tensor
    query_targets: Tensor

    @functools.cached_property
    def eye(self) -> Tensor:
        return torch.eye(self.form.theta.numel(), dtype=torch.float64)

    @functools.cached_property
    def losses(self) -> Tensor:
        """∇ℓᵢ, without the regulariser, [n, d]."""
        return self.form.query_gradients(self.form.features, self.form.targets)

    @functools.cached_property
    def objectives(self) -> Tensor:
        """∇(ℓᵢ + reg), [n, d]."""
        return self.form.train_gradients()

    @functools.cached_property
    def queries(self) -> Tensor:
        """∇f_q, [q, d]."""
        return self.form.query_gradients(self.query_features, self.query_targets)

    def hessian(self, which: slice = slice(None)) -> Tensor:
        """Of the mean loss of these examples, without the regulariser."""
        part = dataclasses.replace(
            self.form, features=self.form.features[which], targets=self.form.targets[which], l2=0.0
        )
        return part.hessian()

    def ours(self, damp: float | None, l2: float) -> Tensor:
        """``influence_matrix`` of a module of ours, with A = I where there is no damping."""
        linear = nn.Linear(INPUTS, OUTPUTS[self.form.kind]).double()
        linear.weight.data.copy_(self.form.weights[:, :-1])
        linear.bias.data.copy_(self.form.weights[:, -1])
        objective = Supervised(LOSSES[self.form.kind], l2)
        train = DataLoader(TensorDataset(self.form.features[:, :-1], self.form.targets), batch_size=7)
        test = DataLoader(TensorDataset(self.query_features[:, :-1], self.query_targets), batch_size=3)
        module: BaseInfluenceModule
        if damp is None:
            module = IdentityModule(linear, objective, train, test, "cpu")
        else:
            module = AutogradInfluenceModule(linear, objective, train, test, "cpu", damp)
        return module.influence_matrix()


@functools.cache
def problem(kind: str) -> Problem:
    torch.manual_seed(3)
    c = OUTPUTS[kind]

    def sample(m: int) -> tuple[Tensor, Tensor]:
        features = torch.cat([torch.randn(m, INPUTS), torch.ones(m, 1)], dim=1).double()
        if kind == "softmax":
            return features, torch.randint(c, (m,))
        return features, (torch.randn(m, c) if kind == "linear" else torch.randint(2, (m, c))).double()

    features, targets = sample(N)
    form = ClosedForm(kind, features, targets, torch.zeros(c, INPUTS + 1, dtype=torch.float64), L2)
    for _ in range(12):  # Newton's method, quadratic from here: to rounding
        step = torch.linalg.solve(form.hessian(), form.train_gradients().mean(dim=0))
        back = torch.empty_like(step)
        back[form._order()] = step
        form = dataclasses.replace(form, weights=form.weights - back.reshape(c, -1))
    assert form.train_gradients().mean(dim=0).norm() <= 1e-14
    return Problem(form, *sample(QUERIES))


# -- their formulas: scores [n, q], whatever their axes ---------------------------------------------------------------


def neumann(p: Problem, hessian: Tensor, dampen: float, scale: float) -> Tensor:
    """h ← v + (1 - dampen) h - H h / scale to rounding, then h / scale, for v = ∇f_q; [q, d]."""
    h = p.queries
    slowest = dampen + float(torch.linalg.eigvalsh(hessian)[0]) / scale
    for _ in range(math.ceil(math.log(torch.finfo(torch.float64).eps) / math.log1p(-slowest))):
        h = p.queries + (1 - dampen) * h - h @ hessian / scale
    return h / scale


def koh_liang(p: Problem, lam: float) -> Tensor:
    hessian = p.hessian() + L2 * p.eye + lam * p.eye
    return -(p.objectives @ torch.linalg.solve(hessian, p.queries.mT))


def koh_liang_code(p: Problem, damping: float) -> Tensor:
    hessian = p.hessian() + L2 * p.eye + damping * p.eye
    return p.objectives @ torch.linalg.solve(hessian, p.queries.mT) / N


def koh_liang_lissa(p: Problem, damping: float, scale: float) -> Tensor:
    return p.objectives @ neumann(p, p.hessian() + L2 * p.eye, damping, scale).mT / N


def captum(p: Problem, hessian_reg: float, projection_dim: int | None = None) -> Tensor:
    values, vectors = torch.linalg.eigh(N * p.hessian() + hessian_reg * p.eye)
    kept = slice(None) if projection_dim is None else slice(-projection_dim, None)
    root = vectors[:, kept] / values[kept].sqrt()
    return (p.losses @ root) @ (p.queries @ root).mT


def tracin(p: Problem, lr: float) -> Tensor:
    return lr * p.losses @ p.queries.mT


def kronfluence(
    p: Problem,
    damping_factor: float,
    b_train: int = 1,
    b_query: int = 1,
    b_factor: int = 1,
    labels: Tensor | None = None,
) -> Tensor:
    """EK-FAC of one layer; a mean over b examples divides its gradients by b. Outputs' gradients of sampled labels."""
    c = p.form.weights.shape[0]
    signs = torch.randn(N, c, dtype=torch.float64).sign()  # ½ (f - y)² with labels f ± 1: the Gaussian's variance
    a, g = p.form.features, (signs if labels is None else labels) / b_factor
    of_inputs = torch.linalg.eigh(a.mT @ a / N).eigenvectors
    of_outputs = torch.linalg.eigh(g.mT @ g / N).eigenvectors
    eigenvalues = torch.einsum("no,ni->oi", (g @ of_outputs).square(), (a @ of_inputs).square()) / N
    basis = torch.kron(of_outputs, of_inputs)[p.form._order()]  # in the order of the parameters: weights, then biases
    inverse = basis / (eigenvalues.flatten() + damping_factor) @ basis.mT
    return p.losses / b_train @ inverse @ (p.queries / b_query).mT


def pydvl(p: Problem, regularization: float) -> Tensor:
    return p.losses @ torch.linalg.solve(p.hessian() + regularization * p.eye, p.queries.mT)


def pydvl_lissa(p: Problem, regularization: float, dampen: float, scale: float) -> Tensor:
    return p.losses @ neumann(p, p.hessian() + regularization * p.eye, dampen, scale).mT


def dattri(p: Problem, regularization: float, batches: int = 1) -> Tensor:
    size = N // batches
    parts = [p.hessian(slice(i, i + size)) + L2 * p.eye for i in range(0, N, size)]
    return p.objectives @ sum(torch.linalg.solve(part + regularization * p.eye, p.queries.mT) for part in parts)


def dattri_summed(p: Problem, regularization: float) -> Tensor:
    return p.losses @ torch.linalg.solve(N * p.hessian() + regularization * p.eye, p.queries.mT)


def dattri_lissa(p: Problem, damping: float, scaling: float) -> Tensor:
    return p.objectives @ neumann(p, p.hessian() + L2 * p.eye, damping, scaling).mT


# Which formula, with which arguments. Those of a row whose regulariser is left out make up for it in the damping.
SCALE = 20.0  # above the largest eigenvalue of the Hessian
ALL = L2 + DAMP
EXACT: dict[str, tuple[Callable[..., Tensor], dict[str, float]]] = {
    "Koh and Liang 2017, I_up,loss": (koh_liang, {"lam": DAMP}),
    "Koh and Liang's code, conjugate gradients": (koh_liang_code, {"damping": DAMP}),
    "Koh and Liang's code, LiSSA": (koh_liang_lissa, {"damping": DAMP / SCALE, "scale": SCALE}),
    "torch-influence 0.1.0, all modules": (lambda p, damp: koh_liang_code(p, damp), {"damp": DAMP}),
    "captum `NaiveInfluenceFunction`": (captum, {"hessian_reg": N * ALL}),
    "captum `TracInCP`, one checkpoint": (tracin, {"lr": 0.3}),
    "kronfluence, losses summed": (kronfluence, {"damping_factor": ALL}),
    "kronfluence, losses averaged": (
        kronfluence,
        {"damping_factor": ALL / 8**2, "b_train": 12, "b_query": 5, "b_factor": 8},
    ),
    "pyDVL `DirectInfluence`, `CgInfluence`; `InfluenceMode.Up`": (pydvl, {"regularization": ALL}),
    "pyDVL `LissaInfluence`; `InfluenceMode.Up`": (
        pydvl_lissa,
        {"regularization": L2, "dampen": DAMP / SCALE, "scale": SCALE},
    ),
    "dattri `IFAttributorExplicit`, `IFAttributorCG`; mean loss, one batch": (dattri, {"regularization": DAMP}),
    "dattri `IFAttributorExplicit`, `IFAttributorCG`; summed loss, one batch": (
        dattri_summed,
        {"regularization": N * ALL},
    ),
    "dattri `IFAttributorLiSSA`; mean loss, one batch": (dattri_lissa, {"damping": DAMP / SCALE, "scaling": SCALE}),
}


def cases() -> list[tuple[str, str]]:
    """EK-FAC is exact for the linear problem alone."""
    return [(name, kind) for name in CONVERSIONS for kind in LOSSES if kind == "linear" or "kronfluence" not in name]


def check(p: Problem, converted: Tensor, ours: Tensor, inherent: float = 0.0) -> None:
    """Both are solves with a matrix of one condition, whose entries are sums over the examples."""
    condition = float(torch.linalg.cond(p.hessian() + ALL * p.eye))
    assert_close(converted, ours, operations=N * len(p.eye), condition=condition, inherent=inherent)


def test_every_row_of_the_page_has_a_formula() -> None:
    assert CONVERSIONS.keys() == EXACT.keys()


@pytest.mark.parametrize(("name", "kind"), cases())
def test_ours_is_the_factor_times_theirs(name: str, kind: str) -> None:
    p, conversion, (formula, arguments) = problem(kind), CONVERSIONS[name], EXACT[name]
    converted = conversion.value(conversion.factor, arguments) * formula(p, **arguments)
    damp = None if conversion.damp is None else conversion.value(conversion.damp, arguments)
    if conversion.regularizer == "in both":
        assert damp == pytest.approx(DAMP)
        check(p, converted, p.ours(damp, L2))
    else:
        assert damp is None or damp == pytest.approx(ALL)
        check(p, converted, p.ours(damp, l2=0.0))


@pytest.mark.parametrize(("name", "kind"), [case for case in cases() if CONVERSIONS[case[0]].regularizer == "left out"])
def test_what_lacks_the_regularizer_is_made_good_by_its_mean(name: str, kind: str) -> None:
    p, conversion, (formula, arguments) = problem(kind), CONVERSIONS[name], EXACT[name]
    converted = conversion.value(conversion.factor, arguments) * formula(p, **arguments)
    centred = converted - converted.mean(dim=0)
    damp = None if conversion.damp is None else conversion.value(conversion.damp, arguments) - L2
    ours = p.ours(damp, L2)
    slope = p.objectives.mean(dim=0)  # what is left of the gradient at the minimum, and what that makes of the mean
    inverse = p.eye if damp is None else torch.linalg.inv(p.hessian() + ALL * p.eye)
    left = float((slope @ inverse @ p.queries.mT).abs().max()) / N / float(ours.abs().max())
    check(p, centred, ours, inherent=left)
    assert (converted - ours).abs().max() > 1e-3 * ours.abs().max()  # it is needed


# -- what no factor converts ------------------------------------------------------------------------------------------


def kronfluence_softmax(p: Problem) -> Tensor:
    labels = F.one_hot(p.form.targets, OUTPUTS["softmax"]) if p.form.kind == "softmax" else None
    assert labels is not None
    probabilities = (p.form.features @ p.form.weights.mT).softmax(dim=-1)
    sampled = F.one_hot(probabilities.multinomial(1).squeeze(1), OUTPUTS["softmax"])
    return kronfluence(p, ALL, labels=probabilities - sampled)


def pydvl_ragged(p: Problem) -> Tensor:
    batches = [p.hessian(slice(i, i + 7)) for i in range(0, N, 7)]  # of 7, 7, 7 and 3
    return p.losses @ torch.linalg.solve(sum(batches) / len(batches) + ALL * p.eye, p.queries.mT)


def pydvl_gauss_newton(p: Problem, batches: int = 4) -> Tensor:
    fisher = p.losses.mT @ p.losses / (len(p.eye) * (batches - 1))
    return p.losses @ torch.linalg.solve(fisher + ALL * p.eye, p.queries.mT)


def harmonic(p: Problem) -> Tensor:
    inverses = torch.linalg.inv(p.losses[:, :, None] * p.losses[:, None, :] + ALL * p.eye)
    return p.losses @ inverses.mean(dim=0) @ p.queries.mT


def tracin_at_two(p: Problem) -> Tensor:
    earlier = dataclasses.replace(p, form=dataclasses.replace(p.form, weights=torch.zeros_like(p.form.weights)))
    return tracin(p, lr=0.1) + tracin(earlier, lr=0.3)


INEXACT: dict[str, Callable[[Problem], Tensor]] = {
    "captum, truncated spectrum": lambda p: captum(p, N * ALL, projection_dim=4),
    "captum `TracInCP`, several checkpoints": tracin_at_two,
    "kronfluence, EK-FAC of several outputs or layers": kronfluence_softmax,
    "pyDVL `CgInfluence`, last batch smaller": pydvl_ragged,
    "pyDVL, `SecondOrderMode.GAUSS_NEWTON`": pydvl_gauss_newton,
    "pyDVL `InverseHarmonicMeanInfluence`": harmonic,
    "dattri, several batches": lambda p: dattri(p, DAMP, batches=4),
}


def test_every_row_without_a_factor_has_a_formula() -> None:
    assert table("why").keys() == INEXACT.keys()


@pytest.mark.parametrize("name", INEXACT)
def test_no_factor_converts(name: str) -> None:
    """The best factor, by least squares, leaves more than a hundredth; so does that of a score with A = I."""
    p = problem("softmax")
    theirs = INEXACT[name](p)
    with_l2 = "dattri" in name
    for ours in (p.ours(DAMP, L2) if with_l2 else p.ours(ALL, l2=0.0), p.ours(None, l2=0.0)):
        factor = float((theirs * ours).sum() / theirs.square().sum())
        assert (factor * theirs - ours).norm() > 0.01 * ours.norm()

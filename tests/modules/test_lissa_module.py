"""LiSSAInfluenceModule: its scale, its interruptions, and the standard errors of its scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import Supervised, assert_close, dense_hessian, half_squared_error
from problems import Classification, loader, module, network
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torch_influence import (
    AutogradInfluenceModule,
    ConvergenceWarning,
    DivergenceWarning,
    Estimate,
    InfluenceModule,
    LiSSAInfluenceModule,
)

pytestmark = pytest.mark.filterwarnings("error")

D = 43  # parameters of the small network
REPEAT, DEPTH = 3, 15
N, QUERIES = 23, 7


def lissa_module(**changes: Any) -> LiSSAInfluenceModule:
    return module(
        LiSSAInfluenceModule, **({"repeat": REPEAT, "depth": DEPTH, "scale": "auto", "on_failure": "warn"} | changes)
    )


# -- the scale --------------------------------------------------------------------------------------------------------


def test_auto_is_the_default_and_equals_the_number_that_it_finds() -> None:
    arguments = network(), Classification(), loader(), loader(n=QUERIES), "cpu"
    it = LiSSAInfluenceModule(*arguments, 1.0, REPEAT, DEPTH)
    assert it.scale == "auto"
    v = torch.linspace(-1, 1, D, dtype=torch.float64)
    assert "scale still to be found" in it.explain()["solver"].path
    torch.manual_seed(1)
    found = it.inverse_hvp(v)
    report = it.last_report
    assert report is not None
    scale = it._lissa._auto_scale._made.scale(1.0)
    assert scale is not None
    assert report.method == f"LiSSA, scale {scale:.3g} (auto)"
    assert f"scale {scale:.3g} (auto)" in it.explain()["solver"].path
    given = LiSSAInfluenceModule(*arguments, 1.0, REPEAT, DEPTH, scale)
    torch.manual_seed(1)
    assert torch.equal(given.inverse_hvp(v), found)
    assert f"scale {scale}" in given.explain()["solver"].path
    assert given.last_report is not None
    assert report.products == given.last_report.products + it._lissa._auto_scale._made.products


def test_the_scale_bounds_the_minibatches_it_was_found_from() -> None:
    it = lissa_module(damp=0.25, on_failure="ignore")
    it.inverse_hvp(torch.ones(D, dtype=torch.float64))
    batches = list(it.batches(sample=16, generator=torch.Generator().manual_seed(0)))
    largest = max(
        float(torch.linalg.eigvalsh(dense_hessian(it.model, it.objective, [batch]))[-1]) + 0.25 for batch in batches
    )
    scale = it._lissa._auto_scale._made.scale(0.25)
    assert scale is not None
    assert largest / 1.1 <= scale <= 1.1 * largest  # to within a tenth, as asked of Lanczos


def step(it: LiSSAInfluenceModule) -> None:
    with torch.no_grad():
        for p in it.model.parameters():
            p.mul_(3.0)


CHANGES: dict[str, Callable[[Any], None]] = {
    "parameters": step,
    "gnh": lambda it: setattr(it, "gnh", True),
    "clear_cache()": lambda it: it.clear_cache(),
    "data": lambda it: it.train_loader.dataset.tensors[0].mul_(2.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_scale_is_kept_until_the_curvature_changes(change: str) -> None:
    it = lissa_module(on_failure="ignore")
    v = torch.ones(D, dtype=torch.float64)
    it.inverse_hvp(v)
    kept, found = it._lissa._auto_scale._made, it._lissa._auto_scale._made.scale(1.0)
    spent = kept.products
    assert it.last_report is not None
    assert it.last_report.products == REPEAT * DEPTH + spent
    it.inverse_hvp(v)
    assert it.last_report.products == REPEAT * DEPTH
    it.damp = 2.5  # is added to the eigenvalues
    it.inverse_hvp(v)
    assert it._lissa._auto_scale._made is kept
    assert kept.products == spent
    assert found is not None
    assert abs(it._lissa._auto_scale._made.scale(2.5) - (found + 1.5)) <= 1e-12  # type: ignore[operator]  # two additions of a few
    CHANGES[change](it)
    it.inverse_hvp(v)
    assert it._lissa._auto_scale._made is not kept
    fresh = lissa_module(model=it.model, train_loader=it.train_loader, gnh=it.gnh, damp=2.5, on_failure="ignore")
    fresh.inverse_hvp(v)
    assert it._lissa._auto_scale._made.scale(2.5) == fresh._lissa._auto_scale._made.scale(2.5)
    assert (it._lissa._auto_scale._made.scale(2.5) == found + 1.5) == (change == "clear_cache()")


def test_auto_on_heavy_tailed_data_where_the_largest_eigenvalue_of_all_diverges() -> None:
    """Examples of one large feature each: a minibatch of one has ten times the curvature of all data."""
    n, d, damp = 400, 12, 0.1
    x = 0.1 * torch.randn(n, d, dtype=torch.float64)
    x[torch.arange(n), torch.randint(d, (n,))] = 8.0
    data = DataLoader(TensorDataset(x, x @ torch.randn(d, 1, dtype=torch.float64)), batch_size=1)
    model = nn.Linear(d, 1, bias=False).double()
    arguments = model, Supervised(half_squared_error), data, data, "cpu"
    exact = AutogradInfluenceModule(*arguments, damp)
    largest = float(torch.linalg.eigvalsh(exact.hess)[-1]) + damp
    it = LiSSAInfluenceModule(*arguments, damp, 8, 3000, generator=torch.Generator().manual_seed(0))
    queries = [0, 1, 2]
    scores, error = it.influence_matrix(range(50), queries, standard_error=True)
    assert it.last_report is not None
    assert it.last_report.converged.all()
    expected = exact.influence_matrix(range(50), queries)
    # (1 - damp/scale)^depth of the slowest mode is left at most.
    scale = it._lissa._auto_scale._made.scale(damp)
    assert scale is not None
    assert scale > 5 * largest
    bias = (1 - damp / scale) ** 3000 * float(exact.stests(queries).norm(dim=1).max())
    bias *= float(x.norm(dim=1).max()) * 100 / n
    assert ((scores - expected).abs() <= 6 * error + bias).all()
    it.scale = largest
    with pytest.warns(DivergenceWarning, match="raise scale, to"):
        assert it.stest([0]).isnan().all()


# -- failures ---------------------------------------------------------------------------------------------------------


def test_nan_in_the_data_is_named_and_not_called_divergence() -> None:
    for scale in (20.0, "auto"):
        train = loader()
        train.dataset.tensors[0][4] = float("nan")
        it = lissa_module(train_loader=train, scale=scale)
        with pytest.warns(ConvergenceWarning, match="NaN or infinity in data or parameters") as caught:
            x = it.inverse_hvp(torch.ones(D, dtype=torch.float64))
        assert not any(isinstance(warning.message, DivergenceWarning) for warning in caught)
        assert x.isnan().all()


def test_a_warning_points_at_the_line_that_asked() -> None:
    it = lissa_module(scale=1e-3)
    with pytest.warns(DivergenceWarning) as caught, pytest.warns(RuntimeWarning, match="not finite") as scored:
        it.influences([0, 1], [0], standard_error=True)
    assert {warning.filename for warning in [*caught, *scored]} == {__file__}


@pytest.mark.parametrize("scale", [20.0, "auto"])
@pytest.mark.parametrize("at", [(0, 0), (0, 7), (1, 3)])
def test_an_interrupted_solve_leaves_a_usable_module(scale: Any, at: tuple[int, int]) -> None:
    interrupted = [False]

    def interrupt(run: int, number: int, h: Tensor) -> None:
        if (run, number) == at and not interrupted[0]:
            interrupted[0] = True
            raise KeyboardInterrupt

    options: dict[str, Any] = {"scale": scale, "on_failure": "ignore"}
    it = lissa_module(debug_callback=interrupt, **options)
    before = {name: p.clone() for name, p in it.model.named_parameters()}
    training = it.model.training
    with pytest.raises(KeyboardInterrupt):
        it.influences(range(N), [0], standard_error=True)
    assert it.model.training == training
    assert all(torch.equal(p, before[name]) for name, p in it.model.named_parameters())
    fresh = lissa_module(**options)
    results = []
    for each in (it, fresh):
        torch.manual_seed(3)
        results.append(each.influences(range(N), [0], standard_error=True))
    assert torch.equal(results[0].scores, results[1].scores)
    assert torch.equal(results[0].standard_error, results[1].standard_error)


# -- standard errors of scores ----------------------------------------------------------------------------------------


def scored_by_repeat(it: LiSSAInfluenceModule, queries: list[int]) -> Tensor:
    """The scores [repeat, n, q] by what the callback sees at the end of each repeat."""
    ends: list[Tensor] = []
    it.debug_callback = lambda run, number, h: ends.append(h) if number == it.depth - 1 else None
    it.stests(queries)
    it.debug_callback = None
    stests = torch.stack(ends).reshape(it.repeat, len(queries), D) / it.scale
    return torch.stack([torch.stack([it.influences(range(N), None, s) for s in of_run], dim=1) for of_run in stests])


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("own_generator", [True, False])
def test_standard_errors_are_those_of_the_scores_of_each_repeat(cache: bool, own_generator: bool) -> None:
    def fresh() -> LiSSAInfluenceModule:
        generator = torch.Generator().manual_seed(2) if own_generator else None
        torch.manual_seed(1)
        return lissa_module(scale=12.0, generator=generator, cache=cache, on_failure="ignore")

    queries = [2, 0, 5]
    of_repeats = scored_by_repeat(fresh(), queries)
    plain = fresh()
    expected = plain.influence_matrix(None, queries)
    after = torch.get_rng_state()
    it = fresh()
    estimate = it.influence_matrix(None, queries, standard_error=True)
    assert isinstance(estimate, Estimate)
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(estimate.scores, expected)
    size = float(of_repeats.abs().max())
    assert_close(estimate.scores, of_repeats.mean(0), operations=D * DEPTH, scale=size)
    assert_close(estimate.standard_error, of_repeats.std(0) / REPEAT**0.5, operations=D * DEPTH, scale=size)
    assert (estimate.standard_error > 0).all()


def test_standard_errors_of_a_set_of_queries() -> None:
    results = []
    for standard_error in (False, True):
        it = lissa_module(on_failure="ignore")
        torch.manual_seed(1)
        results.append(it.influences([5, 0, 9], [1, 2], standard_error=standard_error))
    scores, error = results[1]
    assert torch.equal(scores, results[0])
    assert error.shape == (3,)
    torch.manual_seed(1)
    single = lissa_module(on_failure="ignore").influence_matrix([5, 0, 9], [1], standard_error=True)
    torch.manual_seed(1)
    one = lissa_module(on_failure="ignore").influences([5, 0, 9], [1], standard_error=True)
    assert single.standard_error.shape == (3, 1)
    assert_close(single.standard_error.squeeze(1), one.standard_error, operations=D * DEPTH * REPEAT)


def test_queries_in_tiles_and_repeats_that_rtol_spares(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = 8 * D * 8  # bytes of a right-hand side's solve
    monkeypatch.setattr("torch_influence.memory.free_memory", lambda device: 4 * 3 * vectors)  # three at once
    results = []
    for standard_error in (False, True):
        it = lissa_module(repeat=30, rtol=0.2, on_failure="ignore")
        torch.manual_seed(1)
        results.append(it.influence_matrix(None, None, standard_error=standard_error))
        assert it.last_report is not None
        assert len(it.last_report.iterations) == QUERIES
        assert it.last_report.iterations.max() < 30 * DEPTH
        assert len(set(it.last_report.iterations.tolist())) <= 3
    assert torch.equal(results[1].scores, results[0])
    assert results[1].standard_error.shape == (N, QUERIES)
    assert (results[1].standard_error > 0).all()


def test_standard_errors_are_nan_where_rows_diverged() -> None:
    it = lissa_module(scale=1e-3, on_failure="ignore")
    with pytest.warns(RuntimeWarning, match="not finite"):
        scores, error = it.influences([0, 1], [0], standard_error=True)
    assert scores.isnan().all()
    assert error.isnan().all()


def test_no_queries_and_no_examples() -> None:
    scores, error = lissa_module().influence_matrix([0, 1], [], standard_error=True)
    assert scores.shape == error.shape == (2, 0)
    scores, error = lissa_module().influence_matrix([], [0, 1], standard_error=True)
    assert scores.shape == error.shape == (0, 2)


class SolvesItself(LiSSAInfluenceModule):
    def inverse_hvp(self, vec: Tensor) -> Tensor:
        return vec


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda it: it.influences([0], None, torch.ones(D), standard_error=True),
            ValueError,
            "standard_error: .* stest",
        ),
        (lambda it: it.influence_matrix([0], [0], top_k=1, standard_error=True), ValueError, "no top_k with it"),
        (lambda it: it.influences([0], None, standard_error=True), ValueError, "test_idxs: expected indices"),
        (
            lambda it: it.influences(None, [0], standard_error=True),
            ValueError,
            "train_idxs: expected indices, got None",
        ),
    ],
)
def test_standard_errors_that_make_no_sense(call: Any, error: type[Exception], message: str) -> None:
    it = lissa_module()
    with pytest.raises(error, match=message):
        call(it)
    assert it._spreads is None


def test_standard_errors_need_repeats_of_this_solver() -> None:
    with pytest.raises(ValueError, match="expected a module with repeat of at least 2, got repeat=1"):
        lissa_module(repeat=1).influences([0], [0], standard_error=True)
    with pytest.raises(TypeError, match="SolvesItself overrides how stests are solved for"):
        module(SolvesItself, damp=1.0, repeat=2, depth=5).influences([0], [0], standard_error=True)
    with pytest.raises(TypeError, match="standard_error"):
        module(InfluenceModule, damp=1.0).influences([0], [0], standard_error=True)


def test_rtol_needs_repeats() -> None:
    with pytest.raises(ValueError, match="repeat: expected at least 2 with rtol"):
        lissa_module(repeat=1, rtol=0.1).stest([0])

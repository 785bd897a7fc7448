"""The ends of the rankings, streamed, against a plain sort of the whole matrix."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import dense_hessian, example_gradients, query_gradients
from problems import Classification, loader, module, network
from torch import Tensor
from torch.utils.data import DataLoader

from torch_influence import AutogradInfluenceModule, CGInfluenceModule, ConvergenceWarning, Ranking
from torch_influence.scores._ranking import top
from torch_influence.scores._tiles import Tile

NAN, INF = float("nan"), float("inf")


def best(column: Tensor, indices: list[int], k: int, sign: int) -> list[tuple[float, int]]:
    """Python's sort: by value, largest first for sign 1; then by index; NaN after all."""
    pairs = [(float(v), i) for v, i in zip(column, indices, strict=True)]
    return sorted(pairs, key=lambda p: (math.isnan(p[0]), 0.0 if math.isnan(p[0]) else -sign * p[0], p[1]))[:k]


def assert_ranks(actual: Ranking, matrix: Tensor, indices: list[int], k: int, sign: int) -> None:
    """Exactly: these are the very numbers, only chosen."""
    expected = [best(column, indices, k, sign) for column in matrix.mT]
    assert actual.indices.tolist() == [[i for _, i in row] for row in expected]
    assert actual.indices.dtype == torch.int64
    values = torch.tensor([[v for v, _ in row] for row in expected], dtype=matrix.dtype).reshape(len(expected), -1)
    assert torch.equal(actual.values.nan_to_num(nan=77.0), values.nan_to_num(nan=77.0))


# -- choosing ---------------------------------------------------------------------------------------------------------


def tied(n: int, q: int) -> Tensor:
    return torch.randint(-2, 3, (n, q), dtype=torch.float64)


MATRICES: dict[str, Callable[[int, int], Tensor]] = {
    "plain": lambda n, q: torch.randn(n, q, dtype=torch.float64),
    "ties": tied,
    "all the same": lambda n, q: torch.zeros(n, q, dtype=torch.float64),
    "rising": lambda n, q: torch.arange(n * q, dtype=torch.float64).reshape(n, q),
    "negative": lambda n, q: -torch.rand(n, q, dtype=torch.float64) - 1,
    "NaN and infinite": lambda n, q: torch.tensor([NAN, NAN, INF, -INF, 1.0, 1.0])[torch.randint(6, (n, q))].double(),
    "hardly a number": lambda n, q: torch.where(torch.rand(n, q) < 0.9, NAN, tied(n, q)),
}


@pytest.mark.filterwarnings("ignore:.*scores that are not finite:RuntimeWarning")
@pytest.mark.parametrize("at_once", [2**20, 20])
@pytest.mark.parametrize("k", [1, 3, 37, 50])
@pytest.mark.parametrize("name", MATRICES)
def test_any_tiles_in_any_order(name: str, k: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples are named in no order, tiles are of chance sizes and places, as where batches differ in their shapes."""
    monkeypatch.setattr("torch_influence.scores._ranking._RANKED_AT_ONCE", at_once)
    n, q = 37, 6
    matrix = MATRICES[name](n, q)
    indices = (3 * torch.randperm(n) + 1).tolist()
    tiles = [
        Tile(rows.tolist(), columns.tolist(), matrix[rows][:, columns])
        for columns in torch.randperm(q).split(4)
        for rows in torch.randperm(n).split(8)
    ]
    result = top(iter(tiles), indices, q, k, torch.float64, torch.device("cpu"))
    assert_ranks(result.helpful, matrix, indices, k, 1)
    assert_ranks(result.harmful, matrix, indices, k, -1)


# -- scoring ----------------------------------------------------------------------------------------------------------


def dense_matrix(train: DataLoader, test: DataLoader) -> Tensor:
    """score[i, q] by dense linear algebra, damp 1."""
    model, objective = network(), Classification()
    hessian = dense_hessian(model, objective, [(train.collate_fn(list(train.dataset)), len(train.dataset))])
    gradients = example_gradients(model, objective, train)
    solved = torch.linalg.solve(hessian + torch.eye(len(hessian)), query_gradients(model, objective, test).mT)
    return gradients @ solved / len(train.dataset)


@pytest.mark.parametrize("kind", [CGInfluenceModule, AutogradInfluenceModule])
@pytest.mark.parametrize(
    ("train_idxs", "test_idxs"),
    [(None, None), ([20, 3, 11, 4, 17, 9, 0, 22], [5, 1]), ([11, 3], None)],
    ids=["all", "some, in this order", "solved for the training examples"],
)
def test_against_dense_float64(kind: Any, train_idxs: Any, test_idxs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks agree exactly, since no two scores are as near as 1e-9 of the largest, and CG is asked for 1e-12."""
    train, test = loader(), loader(n=7, batch_size=3, seed=3)
    rows, columns = train_idxs or list(range(23)), test_idxs or list(range(7))
    exact = dense_matrix(train, test)[rows][:, columns]
    apart = exact.sort(dim=0).values.diff(dim=0).min() / exact.abs().max()
    assert apart > 1e-9
    it = module(kind, train_loader=train, test_loader=test)
    whole = it.influence_matrix(train_idxs, test_idxs, top_k=5)
    # Two right-hand sides at once, five examples in a tile.
    monkeypatch.setattr("torch_influence.memory.free_memory", lambda device: 2 * 4 * 8 * 8 * 43)
    monkeypatch.setattr("torch_influence.gradients._examples._EXAMPLES_AT_ONCE", 5)
    monkeypatch.setattr("torch_influence.gradients._examples._MANY_EXAMPLES", 5)
    tiled = it.influence_matrix(train_idxs, test_idxs, top_k=5)
    for result in (whole, tiled):
        for ranking, sign in ((result.helpful, 1), (result.harmful, -1)):
            expected = [best(column, rows, 5, sign) for column in exact.mT]
            assert ranking.indices.tolist() == [[i for _, i in row] for row in expected]
            values = torch.tensor([[v for v, _ in row] for row in expected], dtype=torch.float64)
            assert ((ranking.values - values).abs() <= 1e-10 * exact.abs().max()).all()


def test_helpful_and_harmful_are_the_two_ends() -> None:
    it = module()
    matrix = it.influence_matrix()
    assert (matrix > 0).any(dim=0).all()
    assert (matrix < 0).any(dim=0).all()
    for ranking, sign in ((it.helpful([4, 0], k=3), 1), (it.harmful([4, 0], 3), -1)):
        assert (sign * ranking.values > 0).all()
        assert ranking.indices.tolist() == [
            [i for _, i in best(matrix[:, q], list(range(23)), 3, sign)] for q in (4, 0)
        ]
    assert it.helpful().indices.shape == (7, 10)
    assert it.harmful([0], train_idxs=[5, 9]).indices.tolist() in ([[5, 9]], [[9, 5]])


@pytest.mark.parametrize("train_idxs", [None, [4, 11]], ids=["solved for queries", "solved for training examples"])
def test_scores_that_are_not_finite_come_last_and_with_the_warning(train_idxs: Any) -> None:
    train = loader()
    train.dataset.tensors[0][4] = NAN
    it = module(AutogradInfluenceModule)
    it._problem.train = module(train_loader=train)._problem.train  # the solve is that of good data
    named = train_idxs or range(23)
    message = f"^1 of {len(named)} training examples have scores that are not finite.*example 4:"
    # Solved for training examples, the right-hand side of example 4 is not finite: that is told of, too.
    expected = [RuntimeWarning] if train_idxs is None else [ConvergenceWarning, RuntimeWarning]
    found: list[Any] = []
    for top_k in (None, 23):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.append(it.influence_matrix(train_idxs, top_k=top_k))
        assert [w.category for w in caught] == expected
        assert {w.filename for w in caught} == {__file__}
        assert re.search(message, str(caught[-1].message))
    matrix, result = found
    assert matrix.isnan().any(dim=1).sum() == 1
    for ranking, sign in ((result.helpful, 1), (result.harmful, -1)):
        assert ranking.indices.shape == (7, len(named))
        assert ranking.values.isnan().sum() == 7
        assert_ranks(ranking, matrix, list(named), 23, sign)
        assert (ranking.indices[:, -1] == 4).all()


def test_nothing_to_rank() -> None:
    it = module()
    assert it.influence_matrix([], [0, 1], top_k=3).helpful.indices.shape == (2, 0)
    assert it.influence_matrix([0, 1, 2], [], top_k=3).harmful.values.shape == (0, 3)


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (0, ValueError, "top_k: expected at least 1, got 0; None for the whole matrix"),
        (True, TypeError, "top_k: expected an integer, got True of bool"),
        (2.0, TypeError, "top_k: expected an integer, got 2.0 of float"),
    ],
)
def test_what_is_no_number_of_examples(k: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        module().influence_matrix(top_k=k)


def test_an_example_named_twice_is_refused_as_everywhere() -> None:
    with pytest.raises(ValueError, match="train_idxs: expected distinct indices, got 3 more than once"):
        module().helpful([0], train_idxs=[3, 1, 3])

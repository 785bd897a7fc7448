"""How much memory computations take at once: bounded, whatever the depth, the queries and the examples."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import Supervised
from test_kept_curvature import BATCH, both, network, tensors
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from torch_influence import CGInfluenceModule, LiSSAInfluenceModule, backend_info
from torch_influence.solvers import lissa

pytestmark = pytest.mark.filterwarnings("error")

TILE = 8  # queries solved for at once, and examples scored at once


def peak(function: Callable[[], Any]) -> int:
    """Bytes of tensors at once, beyond those before, while it runs."""
    gc.collect()
    gc.freeze()  # what is there, torch's modules among it: the next time is shorter
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@both
@pytest.mark.parametrize("cache", [True, False])
def test_memory_of_lissa_does_not_grow_with_depth(layers: int, cache: bool) -> None:
    objective = Supervised(F.cross_entropy, 0.05)
    it = LiSSAInfluenceModule(network(layers), objective, tensors(), tensors(7), "cpu", 0.5, 1, 1, 40.0, cache=cache)
    it.on_failure = "ignore"  # so few steps as these
    rows = torch.randn(64, it._problem.space.size, dtype=torch.float64)
    it.inverse_hvp(rows)  # what is kept is kept now
    peaks = []
    for it.depth in (4, 40):
        peaks.append(peak(lambda: it.inverse_hvp(rows)))
    # Indices of the draws are 64-bit; anything that a step left behind would be there 36 times.
    assert peaks[1] <= peaks[0] + 36 * (BATCH + 1) * 8
    assert peaks[0] > rows.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("repeat", [1, 3])
def test_lissa_keeps_six_vectors_for_each_right_hand_side(dtype: torch.dtype, repeat: int) -> None:
    """And its step's reference, where there are no native ops, three more."""
    diagonal, rows = torch.linspace(0.1, 1.0, 5000).to(dtype), torch.randn(64, 5000).to(dtype)
    most = peak(lambda: lissa(lambda rows: rows * diagonal, rows, repeat=repeat, depth=40, scale=1.0))
    assert most <= (6.1 if backend_info().ops else 9.1) * rows.nbytes  # what is not a vector takes less than a tenth


def repeated(n: int) -> DataLoader:
    """The same examples in every tile, so that each is solved and scored in the same way."""
    return DataLoader(
        TensorDataset(*(torch.cat([t] * (n // TILE)) for t in tensors(TILE).dataset.tensors)), batch_size=BATCH
    )


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The peak of influence_matrix in tiles so small that there are many, beyond the matrix itself."""

    def extra(layers: int, n: int, queries: int, cache: Any, train_idxs: Any = None) -> int:
        data = repeated(n), repeated(queries)
        # Few iterations: they take what many take.
        it = CGInfluenceModule(
            network(layers), Supervised(F.cross_entropy, 0.05), *data, "cpu", 1.0, rtol=0.3, cache=cache
        )
        vectors = 8 * it._problem.space.size * it.flat_parameters().element_size()  # of a right-hand side
        monkeypatch.setattr("torch_influence.memory.free_memory", lambda device: 4 * TILE * vectors)
        matrix: list[torch.Tensor] = []
        most = peak(lambda: matrix.append(it.influence_matrix(train_idxs)))
        solved = [len(report.converged) for report in it._reports]
        assert solved == ([TILE] * (queries // TILE) if train_idxs is None else [len(train_idxs)])
        assert matrix[0].shape == (n if train_idxs is None else len(train_idxs), queries)
        return most - matrix[0].nbytes - it._problem.train.kept_bytes - it._problem.test.kept_bytes

    for name in ("_EXAMPLES_AT_ONCE", "_MANY_EXAMPLES"):
        monkeypatch.setattr(f"torch_influence.gradients._examples.{name}", TILE)
    return extra


@pytest.mark.parametrize(("layers", "cache"), [(1, True), (2, False)])
def test_memory_does_not_grow_with_the_queries_beyond_a_tile(layers: int, cache: bool, scored: Any) -> None:
    """But for a report: 19 bytes for each, in 5 tensors of a tile, which take multiples of 64 bytes."""
    reports = 4 * 5 * 64 + 19 * 4 * TILE
    assert scored(layers, 6 * TILE, 6 * TILE, cache) <= scored(layers, 6 * TILE, 2 * TILE, cache) + reports


@both
@pytest.mark.parametrize("cache", [True, False])
def test_nor_where_it_is_solved_for_the_training_examples(layers: int, cache: bool, scored: Any) -> None:
    few = range(TILE)
    assert scored(layers, 48, 20 * TILE, cache, few) <= scored(layers, 48, 4 * TILE, cache, few)


@pytest.mark.parametrize(("layers", "cache"), [(1, False), (2, 2000)])
def test_memory_does_not_grow_with_the_examples_beyond_the_budget(layers: int, cache: Any, scored: Any) -> None:
    """Data take 40 bytes an example: more than the budget in either case. A flag per example tells of NaN.

    And a loss of each batch is kept, to compare with after an edit of an attribute.
    """
    losses = 8 * (16 * TILE // BATCH + 1)
    assert scored(layers, 20 * TILE, TILE, cache) <= scored(layers, 4 * TILE, TILE, cache) + 16 * TILE + losses

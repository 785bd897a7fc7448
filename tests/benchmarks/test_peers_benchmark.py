"""The comparison with other packages: its exact scores and its lines, those of whichever peers are installed too."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import assert_close, dense_gauss_newton, dense_hessian, example_gradients, loader_batches, query_gradients
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import adapters
import peers
from adapters import DEFAULT, GAUSS_NEWTON, HESSIAN, PEERS, Entry, our_entries
from workloads import WORKLOADS, Workload

# captum's damping is a float32 whatever the model is; gpytorch's conjugate gradients stall at a residual of about 1e-6.
RTOL, GPYTORCH_RTOL = 1e-7, 1e-5
CENTRED = ("pyDVL", "captum")
CONVERGING = [
    pytest.param(name, entry, id=f"{name} {entry.peer} {entry.method} {entry.curvature}")
    for name in peers.TINY
    for entry in [*our_entries(name), *PEERS]
    if entry.exact
]


def installed(entry: Entry) -> bool:
    return importlib.util.find_spec(entry.module.split(".")[0]) is not None


@functools.cache
def trained(name: str, dtype: torch.dtype, queries: int) -> Workload:
    return dataclasses.replace(WORKLOADS[name](**peers.TINY[name] | {"queries": queries}, dtype=dtype), rtol=RTOL)


def tiny(name: str, dtype: torch.dtype = torch.float64, queries: int = 3) -> Workload:
    return copy.deepcopy(trained(name, dtype, queries))


def oracle(work: Workload, curvature: str) -> tuple[Tensor, dict[str, float]]:
    """Scores by definition, and what the rounding of a solve may change, in units of |g| |s| / n."""
    dense = dense_gauss_newton if curvature == GAUSS_NEWTON else dense_hessian
    matrix = dense(work.model, work.objective, loader_batches(work.train_loader()))
    matrix = matrix + work.damp * torch.eye(len(matrix), dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(matrix)
    assert eigenvalues[0] > 0
    condition = float(eigenvalues[-1] / eigenvalues[0])
    stests = torch.linalg.solve(matrix, query_gradients(work.model, work.objective, work.test_loader()).mT)
    rows = example_gradients(work.model, work.objective, work.train_loader())
    scale = float(rows.norm(dim=1).max() * stests.norm(dim=0).max()) / len(rows)
    return rows @ stests / len(rows), {
        "operations": rows.numel(),
        "condition": condition,
        "scale": scale,
    }


@pytest.mark.parametrize("curvature", [HESSIAN, GAUSS_NEWTON])
@pytest.mark.parametrize("name", list(peers.TINY))
def test_exact_scores_are_those_of_the_definition(name: str, curvature: str) -> None:
    work = tiny(name)
    expected, allowed = oracle(work, curvature)
    assert_close(peers.exact_scores(work, curvature), expected, **allowed)


@pytest.mark.parametrize(("name", "entry"), CONVERGING)
def test_what_is_said_to_be_exact_is(name: str, entry: Entry) -> None:
    if not installed(entry):
        pytest.skip(f"{entry.module} is not installed")
    by_gpytorch = "CGInverse" in entry.method
    work = dataclasses.replace(tiny(name), rtol=GPYTORCH_RTOL if by_gpytorch else RTOL)
    expected, allowed = oracle(work, entry.curvature)
    queries = min(entry.queries or 3, 3)
    # Where the regulariser is left out, what stands for it is right at the minimum: the mean of the scores is zero.
    centring = float(expected.mean(dim=0).abs().max()) / allowed["scale"] if entry.peer in CENTRED else 0.0
    # gpytorch's stop by the mean over the queries.
    inherent = allowed["condition"] * work.rtol * (queries if by_gpytorch else 1) + centring
    assert_close(entry.scores(work, queries), expected[:, :queries], **allowed | {"inherent": inherent})


def test_centring_is_needed_and_enough() -> None:
    work = tiny("B")
    exact = peers.exact_scores(work, HESSIAN)
    shifted = exact + torch.arange(1.0, 4.0)
    assert_close(adapters.convert(2 * shifted, 0.5), exact - exact.mean(dim=0), operations=len(exact), scale=4.0)


# -- lines -----------------------------------------------------------------------------------------------------------


def crash(work: Workload, queries: int) -> Tensor:
    os._exit(3)


def endless(work: Workload, queries: int) -> Tensor:
    if queries > 1:  # not on the tiny problem
        time.sleep(600)
    raise AssertionError


def not_a_number(work: Workload, queries: int) -> Tensor:
    return torch.full((len(work.train), queries), float("nan"))


def raises(work: Workload, queries: int) -> Tensor:
    raise RuntimeError("a | first line\na second one")


@functools.cache
def exact() -> dict[str, Tensor]:
    work = tiny("B", torch.float32)
    return {curvature: peers.exact_scores(work, curvature) for curvature in (HESSIAN, GAUSS_NEWTON)}


def line(entry: Entry, limit: float = 30.0) -> dict[str, Any]:
    works = tiny("B", torch.float32), tiny("B", torch.float32, queries=1)
    return peers.measure(entry, *works, exact(), limit)


FAILING = Entry("a peer", "json", "a method", DEFAULT, "nothing", raises)


@pytest.mark.parametrize(
    ("entry", "failure"),
    [
        (FAILING, "RuntimeError: a | first line"),
        (dataclasses.replace(FAILING, module="json.no_such_module"), "ModuleNotFoundError: No module named 'json.no_"),
        (dataclasses.replace(FAILING, module="no_such_package.part"), peers.NOT_INSTALLED),
        (dataclasses.replace(FAILING, scores=not_a_number), "210 of 210 scores are not finite"),
        (dataclasses.replace(FAILING, scores=crash), "its process died with exit code 3"),
        (dataclasses.replace(FAILING, scores=endless), "gave up after 0.1 s"),
    ],
)
def test_a_peer_that_fails_has_a_line_that_says_so(entry: Entry, failure: str) -> None:
    row = line(entry, limit=0.1 if entry.scores is endless else 30.0)
    assert row["failure"].startswith(failure)
    assert row["seconds"] is row["error"] is row["spearman"] is None
    assert failure.replace("|", "\\|") in " | ".join(peers.cells(row, row))


def test_every_peer_that_is_not_installed_has_its_line() -> None:
    for entry in PEERS:
        if not installed(entry):
            assert line(entry)["failure"] == peers.NOT_INSTALLED


def test_the_table_shows_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        peers, "PEERS", [FAILING, *(e for e in PEERS if e.peer == "curvlinops-for-pytorch" and e.exact)][:2]
    )
    monkeypatch.setattr(peers, "our_entries", lambda name: our_entries(name)[:1])
    sizes = {"B": peers.TINY["B"] | {"queries": 3}}
    record = {"provenance": peers.harness.provenance(), **peers.run(["B"], sizes, 30.0)}
    record = json.loads(json.dumps(record))
    ours, failing, *theirs = record["rows"]
    assert failing["failure"] == "RuntimeError: a | first line"
    for row in [ours, *(row for row in theirs if row["failure"] != peers.NOT_INSTALLED)]:
        assert row["failure"] is None
        assert row["error"] <= 0.1  # a gross error only: accuracy is the subject of the tests above
        assert row["spearman"] >= 0.99
        assert row["seconds"] > 0
    lines = peers.report(record).splitlines()
    table = [text for text in lines if text.startswith("| B")]
    assert len(table) == len(record["rows"])
    assert {text.replace("\\|", "").count("|") for text in table} == {len(peers.HEADER) + 1}
    assert set(record["peers"]) == set(peers.NAMES)
    assert record["problems"][0]["parameters"] == tiny("B").parameters


def test_a_problem_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peers.main(["--problems", "B,E"])
    assert "expected some of B,C, got E" in capsys.readouterr().err

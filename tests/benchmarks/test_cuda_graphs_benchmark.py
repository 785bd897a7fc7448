"""The iterations that the benchmark of CUDA graphs captures solve what the package solves; the capture needs a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import tolerance
from test_baseline import tiny

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import cases
import cuda_graphs
import workloads

DEPTH, RTOL = 50, 1e-10
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def module_of(work: workloads.Workload, method: str, device: str) -> Any:
    if method == "CG":
        module = cases.by_cg(work, device)
        module.cg_kwargs["rtol"] = RTOL
        return module
    scale = cases.sampled_scale(work, device)
    return cases.by_lissa(work, {"repeat": 1, "depth": DEPTH, "scale": scale}, device)


def both(work: workloads.Workload, method: str, device: str, graph: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The solution by the iteration and the package's, of the same draws."""
    module = module_of(work, method, device)
    vector = module.test_loss_grad([0])
    torch.manual_seed(3)
    expected = module.inverse_hvp(vector)
    with module._problem.evaluation.session():
        torch.manual_seed(3)
        iteration = cuda_graphs.ITERATIONS[method](module, work, vector)
        advance = cuda_graphs.captured(iteration, 5) if graph else cuda_graphs.repeated(iteration, 5)
        cuda_graphs.solve(iteration, advance, 5)  # and again from the start, in the same tensors
        return cuda_graphs.solve(iteration, advance, 5), expected


def allowed(work: workloads.Workload, method: str) -> float:
    """LiSSA's steps contract, and each rounds as a product does; by CG both have |b - Ax| <= rtol |b|."""
    if method == "LiSSA":
        return tolerance(torch.float64, operations=DEPTH * workloads.BATCH_SIZE * work.parameters)
    identity = torch.eye(work.parameters, dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(cases.by_cg(work).hvp(identity)) + work.damp
    return 2 * RTOL * float(eigenvalues[-1] / eigenvalues[0])


@pytest.mark.parametrize("method", list(cuda_graphs.ITERATIONS))
@pytest.mark.parametrize("name", ["B", "C"])
@pytest.mark.parametrize("device", DEVICES)
def test_the_iteration_solves_what_the_package_solves(device: str, name: str, method: str) -> None:
    work = tiny(name)
    actual, expected = both(work, method, device, graph=False)
    assert float(expected.norm()) > 0
    assert float((actual - expected).norm() / expected.norm()) <= allowed(work, method)


@pytest.mark.cuda
@pytest.mark.parametrize("method", list(cuda_graphs.ITERATIONS))
def test_a_graph_of_a_linear_head_replays_the_iteration(method: str) -> None:
    work = tiny("B")
    with torch.cuda.stream(torch.cuda.Stream()):
        replayed, expected = both(work, method, "cuda", graph=True)
    assert float((replayed - expected).norm() / expected.norm()) <= allowed(work, method)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cuda_graphs.main(["--json", str(tmp_path / "graphs.json")])
    assert capsys.readouterr().out.strip() == (
        "CUDA graphs: nothing measured, this needs a CUDA device, and torch finds none"
    )
    record = json.loads((tmp_path / "graphs.json").read_text())
    assert record["rows"] == []
    assert "CUDA device" in record["needs"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("method", list(cuda_graphs.ITERATIONS))
@pytest.mark.parametrize("name", ["linear head", "MLP"])
def test_without_a_gpu_all_but_the_capture_runs(monkeypatch: pytest.MonkeyPatch, name: str, method: str) -> None:
    work = tiny("B" if name == "linear head" else "C", torch.float32)
    for maker in ("softmax_regression", "perceptron"):
        monkeypatch.setattr(cuda_graphs, maker, lambda **_: work)
    monkeypatch.setattr(cuda_graphs, "DEPTH", DEPTH)
    rows = cuda_graphs.measure(name, method, "cpu")
    eager, graphs = rows[:2], rows[2:]
    assert [row["variant"] for row in eager] == ["the package", "the same iteration, eager"]
    assert eager[1]["error"] <= 2 * work.rtol  # either way of the tolerance; LiSSA's roundings are less
    assert all(row["failed"] and row["median"] is None for row in graphs)
    assert len(graphs) == len(cuda_graphs.STEPS)
    record = {"needs": "", "gpu": "none", "provenance": cuda_graphs.harness.provenance()}
    text = cuda_graphs.report(record | {"rows": rows})
    assert text.count("failed: ") == len(graphs)


def test_a_failed_capture_is_a_line_of_the_table() -> None:
    line = {"problem": "MLP", "parameters": 7, "method": "LiSSA"}
    fast = line | {"variant": "graph of 1 iteration", "median": 0.01, "speedup": 6.0, "error": 1e-7, "failed": None}
    failed = line | {"variant": "graph of 10 iterations", "median": None, "speedup": None, "error": None}
    failed["failed"] = "operation not permitted when stream is capturing"
    record = {"needs": "", "gpu": "some GPU", "provenance": cuda_graphs.harness.provenance()}
    text = cuda_graphs.report(record | {"rows": [fast, failed]})
    assert "graph of 10 iterations | failed: operation not permitted when stream is capturing" in text
    assert "reached, 6.0x" in text
    assert "missed" in cuda_graphs.report(record | {"rows": [failed]})

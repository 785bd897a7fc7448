"""The end-to-end benchmark's baseline gives the right numbers, and its own functions run."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import (
    assert_close,
    dense_gauss_newton,
    dense_hessian,
    example_gradients,
    loader_batches,
    query_gradients,
    tolerance,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import cases
import end_to_end
import workloads
from baseline import Baseline

from torch_influence.ops import OPS

# 70 examples are a batch of 64 and a ragged one of 6.
TINY: dict[str, dict[str, Any]] = {
    "A": {"n": 70, "queries": 3, "features": 6},
    "B": {"n": 70, "queries": 3, "features": 5, "classes": 3},
    "C": {"n": 70, "queries": 3, "features": 4, "hidden": 3, "classes": 3},
    "D": {"n": 70, "queries": 3, "side": 20, "channels": (2, 2), "classes": 3},
    "R": {"n": 70, "queries": 3, "side": 5, "widths": (2,), "blocks": 1, "classes": 3},
    "T": {"n": 70, "queries": 3, "vocabulary": 3, "width": 2, "heads": 1, "layers": 1, "length": 2},
    "H": {"n": 70, "queries": 3, "features": 5, "classes": 3},
}
RTOL = 1e-12


def tiny(name: str, dtype: torch.dtype = torch.float64) -> workloads.Workload:
    return (workloads.WORKLOADS | workloads.LARGE)[name](**TINY[name], dtype=dtype)


def baseline_of(work: workloads.Workload, gnh: bool, damp: float | None = None) -> Baseline:
    loaders = work.train_loader(), work.test_loader()
    return Baseline(work.model, work.objective, *loaders, work.damp if damp is None else damp, gnh)


def amplification(work: workloads.Workload) -> float:
    """Of A's rounding: cross-entropy of a probability p divides by p and 1 - p, whose relative error is u over them."""
    if work.name != "A":
        return 1.0
    with torch.no_grad():
        p = work.model(torch.cat([work.train.tensors[0], work.test.tensors[0]]))
    return float(1 / torch.minimum(p, 1 - p).min())


@pytest.mark.parametrize("gnh", [False, True], ids=["hessian", "gauss-newton"])
@pytest.mark.parametrize("name", list(TINY))
def test_baseline_equals_a_dense_solve(name: str, gnh: bool) -> None:
    work = tiny(name)
    loader = work.train_loader()
    n, d = len(work.train), work.parameters
    dense = (dense_gauss_newton if gnh else dense_hessian)(work.model, work.objective, loader_batches(loader))
    eigenvalues = torch.linalg.eigvalsh(dense)
    damp = max(0.1, 0.1 - 2 * float(eigenvalues[0]))  # positive definite also where the network's Hessian isn't
    matrix = dense + damp * torch.eye(d, dtype=torch.float64)
    condition = float((eigenvalues[-1] + damp) / (eigenvalues[0] + damp))
    gradient = query_gradients(work.model, work.objective, work.test_loader(), [1])[0]
    exact = torch.linalg.solve(matrix, gradient)

    baseline = baseline_of(work, gnh, damp)
    rounding = amplification(work)
    assert_close(baseline.test_gradient([1]), gradient, operations=d * rounding)
    stest = baseline.solve_cg(baseline.test_gradient([1]), rtol=RTOL)
    # |A⁻¹r| <= condition · rtol · |x|; the largest entry is at least |x|/√d.
    assert_close(stest, exact, operations=n * d * rounding, condition=condition, inherent=condition * RTOL * d**0.5)

    rows = example_gradients(work.model, work.objective, loader)
    scale = float((rows.norm(dim=1).max() * exact.norm()) / n)
    scores = baseline.scores(exact)
    assert_close(scores, rows @ exact / n, operations=d * d * rounding, scale=scale)
    assert torch.equal(baseline.scores(exact, [69, 2]), scores[[69, 2]])
    assert baseline.products == baseline.iterations > 0


@pytest.mark.parametrize("name", list(TINY))
def test_baseline_and_package_agree_by_cg(name: str) -> None:
    work = tiny(name)
    module = cases.by_cg(work)
    module.cg_kwargs = {"rtol": RTOL}
    baseline = baseline_of(work, work.gnh)
    product = module.hvp(torch.eye(work.parameters, dtype=torch.float64))
    eigenvalues = torch.linalg.eigvalsh(product) + work.damp
    condition = float(eigenvalues[-1] / eigenvalues[0])
    assert condition > 0
    stest = baseline.solve_cg(baseline.test_gradient([0]), rtol=RTOL)
    d = work.parameters
    rounding = amplification(work)
    allowed = {"operations": len(work.train) * d * rounding, "condition": condition}
    allowed["inherent"] = 2 * condition * RTOL * d**0.5
    assert_close(module.stest([0]), stest, **allowed)
    scores = module.influences(range(len(work.train)), None, stest=stest)
    largest = float(example_gradients(work.model, work.objective, work.train_loader()).norm(dim=1).max())
    scale = largest * float(stest.norm()) / len(scores)
    assert_close(scores, baseline.scores(stest), operations=d * d * rounding, scale=scale)


@pytest.mark.parametrize("gnh", [False, True], ids=["hessian", "gauss-newton"])
def test_baseline_and_package_agree_by_lissa_with_the_same_draws(gnh: bool) -> None:
    work = tiny("B")
    repeat, depth, scale = 2, 20, cases.lissa_scale(work)
    module = cases.by_lissa(work, {"repeat": repeat, "depth": depth, "scale": scale})
    module.gnh = gnh
    baseline = baseline_of(work, gnh)
    gradient = baseline.test_gradient([0])
    torch.manual_seed(5)
    expected = baseline.solve_lissa(gradient, repeat, depth, scale)
    torch.manual_seed(5)
    actual = module.inverse_hvp(gradient)
    # Each step maps errors by a contraction, and adds a product's rounding.
    assert_close(actual, expected, operations=depth * workloads.BATCH_SIZE * work.parameters)
    torch.manual_seed(6)
    assert not torch.equal(module.inverse_hvp(gradient), actual)
    assert baseline.products == repeat * depth


def test_lissa_scale_bounds_every_minibatch() -> None:
    work = tiny("B")
    x, y = work.train.tensors
    largest = 0.0
    for norm in x.square().sum(1).argsort(descending=True)[:3].tolist():  # a batch of copies of the largest examples
        batch = (x[[norm] * 2], y[[norm] * 2])
        matrix = dense_gauss_newton(work.model, work.objective, [(batch, 2)])
        largest = max(largest, float(torch.linalg.eigvalsh(matrix)[-1]) + work.damp)
    assert cases.lissa_scale(work) > 0.5 * largest  # LiSSA's own condition: scale above half the largest


def test_memory_that_was_freed_before_counts() -> None:
    needed = 48_000_000
    small = [torch.ones(20_000)]
    for _ in range(6):  # freed blocks below living ones stay in the heap
        big = [torch.ones(4_000_000) for _ in range(4)]
        small.append(torch.ones(20_000))
        del big
    extra = end_to_end.harness.extra_memory(lambda: [torch.ones(needed // 12) for _ in range(3)], "cpu")
    assert extra is None or 0.9 * needed <= extra <= 1.5 * needed


def test_the_conv_net_has_the_parameters_it_says() -> None:
    assert workloads.conv_net(n=4, queries=1).parameters == 14_538


@pytest.mark.parametrize(("name", "parameters"), [("R", 11_173_962), ("T", 18_398_208)])
def test_the_large_nets_have_the_parameters_they_say(
    name: str, parameters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.nn.Module] = []
    monkeypatch.setattr(workloads, "trained", lambda name, title, model, *_, **__: made.append(model))  # untrained
    workloads.LARGE[name](n=1, queries=1)
    assert sum(p.numel() for p in made[0].parameters()) == parameters
    assert f"{parameters:,} parameters" in workloads.LARGE[name].__doc__


@pytest.mark.parametrize("name", ["A", "B", "T"])  # the others differ in size and layers alone
def test_the_benchmark_runs_and_its_table_shows_its_record(name: str) -> None:
    work = tiny(name, torch.float32)
    rows = [end_to_end.measure(case, seconds=0.0) for case in cases.cases(work, quick=True)]
    record = json.loads(json.dumps({"provenance": end_to_end.harness.provenance(), "quick": True, "rows": rows}))
    for row in record["rows"]:
        if row["case"].startswith("LiSSA"):  # other draws than the baseline's would differ by percents
            assert row["error"] <= tolerance(torch.float32, operations=row["products"] * workloads.BATCH_SIZE)
        assert row["error"] <= 1e-2  # a gross error only: accuracy is the subject of the tests above
        total = row["baseline"]["solve"] + row["baseline"]["scores"]
        assert row["baseline"]["total"] == pytest.approx(total)
        assert (row["warm"] is None) == (row["queries"] > 1)
        assert (row["baseline"]["extrapolated_from_queries"] is None) == (row["queries"] == 1)
    lines = end_to_end.report(record).splitlines()
    table = [line for line in lines if line.startswith("| " + name)]
    assert len(table) == len(rows) == {"A": 1, "B": 4, "T": 2}[name]
    assert {line.count("|") for line in table} == {len(end_to_end.HEADER) + 1}


@pytest.mark.parametrize("name", list(workloads.LARGE))
def test_a_sample_tells_of_the_whole(name: str) -> None:
    """What the baseline is asked for at full size agrees with all of it."""
    for whole in cases.cases(tiny(name, torch.float32), quick=True):
        row = end_to_end.measure(dataclasses.replace(whole, sample=7), seconds=0.0)
        solved = whole.tolerance is None  # LiSSA, with the same draws; else the same stest is scored
        operations = row["products"] * workloads.BATCH_SIZE if solved else row["parameters"] ** 2
        assert row["error"] <= tolerance(torch.float32, operations=operations)
        assert row["baseline"]["products"] == (row["products"] if solved else 1)
        assert row["baseline"]["extrapolated_from_examples"] == 7
        assert (row["residual"] is None) == solved
        if not solved:  # what conjugate gradients were asked for, and as much again for rounding
            assert row["residual"] <= 2 * whole.tolerance


def test_native_ops_are_off_inside_and_on_again_after_an_exception() -> None:
    row = torch.ones(1, 1)
    before = end_to_end._native.runs_natively("lissa_step", row)

    def interrupted() -> None:
        with end_to_end.native_ops_off():
            assert not any(end_to_end._native.runs_natively(op, row) for op in OPS)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert end_to_end._native.runs_natively("lissa_step", row) == before


def test_the_committed_record_still_makes_a_table() -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "results"
    record = json.loads(next(folder.rglob("end_to_end.json")).read_text())
    table = [line for line in end_to_end.report(record).splitlines() if line.startswith("| ")]
    assert len(table) == len(record["rows"]) + 2


def test_lines_that_fail_or_come_too_late_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measured(case: cases.Case, seconds: float) -> None:
        if case.workload.name == "D":
            raise RuntimeError("out of memory\nand more")
        clock[0] += 100.0

    clock = [0.0]
    monkeypatch.setattr(end_to_end, "measure", measured)
    monkeypatch.setattr(end_to_end.time, "perf_counter", lambda: clock[0])
    for name in TINY:
        monkeypatch.setitem(cases.QUICK, name, TINY[name])
    record = end_to_end.run(end_to_end.Request(["D", "B", "C", "A"], "cpu", True, 150.0))
    assert record["failed"] == [{"problem": "D", "case": "Gauss-Newton CG, one query", "error": "out of memory"}]
    assert record["not_run"] == ["B LiSSA, 3 queries", "B direct, 3 queries", "C", "A"]
    text = end_to_end.report({"provenance": end_to_end.harness.provenance(), "quick": True, **record, "rows": []})
    assert "Failed: D Gauss-Newton CG, one query: out of memory" in text
    assert text.count("Not run, out of time: ") == 4


def test_a_problem_or_a_device_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        end_to_end.main(["--problems", "A,E"])
    assert "expected some of A,B,C,D,R,T,H, got E" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            end_to_end.main(["--device", "cuda"])
        assert "--device: expected cpu where torch finds no CUDA device, got cuda" in capsys.readouterr().err

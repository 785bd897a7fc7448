"""The benchmarks of many queries run, and their tables show what they measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from test_baseline import tiny

from torch_influence import InfluenceModule

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import all_queries
import choice
import price
import report
import scaling


@pytest.mark.parametrize("name", list(all_queries.WORKLOADS))
def test_lines_run_and_the_table_shows_them(name: str) -> None:
    work = tiny(name, torch.float32)
    about = {"problem": name, "title": work.title, "parameters": work.parameters, "tolerance": work.rtol}
    rows = [about | row for row in all_queries.lines_of(work, quick=True)]
    record = json.loads(json.dumps({"provenance": all_queries.harness.provenance(), "quick": True, "rows": rows}))
    for row in record["rows"]:
        assert row["error"] <= 1e-2  # a gross error only: accuracy is tested elsewhere
        for side in (row["ours"], row["other"]):
            assert side["residual"] is None or side["residual"] <= work.rtol
            assert side["total"] == pytest.approx(side["construct"] + side["solve"] + side["scores"])
    table = [line for line in all_queries.report(record).splitlines() if line.startswith("| " + name)]
    assert len(table) == len(rows) == {"A": 1, "B": 1, "C": 2, "D": 2}[name]
    assert {line.count("|") for line in table} == {len(all_queries.HEADER) + 1}


def test_the_price_of_exact_scores_is_measured_and_shown() -> None:
    works = {name: tiny(name, torch.float32) for name in "BC"}
    rates, rows = price.measured(works)
    assert all(rate > 0 for rate in rates.values())
    record = json.loads(
        json.dumps(
            {
                "provenance": price.harness.provenance(),
                "quick": True,
                "rates": rates,
                "rows": rows,
                "titles": {name: work.title for name, work in works.items()},
            }
        )
    )
    by_case = {(row["problem"], row["queries"], row["case"]): row for row in record["rows"]}
    many = len(works["C"].test)
    assert by_case["C", many, "rtol 1e-3"]["error"] <= 1e-2
    assert by_case["C", many, "rtol 1e-3"]["rank"] >= 0.999
    budgets = [by_case["C", many, f"max_products {count}"] for count in (1, 2, 3, 4)]
    assert all(row["products"] <= count for count, row in enumerate(budgets, 1))
    assert budgets[-1]["error"] < budgets[0]["error"]
    text = price.report(record)
    assert sum(line.startswith("| ") for line in text.splitlines()) == len(rows) + 2
    assert len(report.price(record).rows) == len(rows)


def test_targets_know_their_side() -> None:
    assert all_queries.target("faster", 3.0, 2.5)["met"]
    assert not all_queries.target("faster", 2.0, 2.5)["met"]
    assert all_queries.target("error", 1e-4, 1e-3, at_least=False)["met"]
    assert not all_queries.target("error", 1e-2, 1e-3, at_least=False)["met"]


@pytest.mark.parametrize("k", [1, 100])
def test_the_choice_is_read_from_explain(k: int) -> None:
    work = tiny("C", torch.float32)
    row = choice.measure(work, k)
    module = all_queries.build(work)
    assert isinstance(module, InfluenceModule)
    with module._problem.evaluation.session():
        operator = module._problem.curvature().damped(module.damp)
        assert row["chosen"] == module._solver.chosen(operator, k)
    assert row["ratio"] == row["seconds"][row["chosen"]] / row["seconds"][row["best"]] >= 1


def test_slopes_are_those_of_powers() -> None:
    points = [{"n": n, "seconds": {"cg": 0.1 if n < 300 else 1e-6 * n**1.5}} for n in (100, 200, 400, 800, 1600)]
    assert scaling.slope(points, "n", "cg") == pytest.approx(1.5)

"""The benchmark of new processes runs, and its tables show what it measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import fresh_process
import report


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("fresh") / "fresh_process.json"
    fresh_process.main(
        ["--quick", "--problems", "A", "--rounds", "1", "--other", str(fresh_process.SRC), "--json", str(path)]
    )
    return json.loads(path.read_text())


def test_what_is_measured(record: dict) -> None:
    assert [row["package"] for row in record["rows"]] == ["this one", "the other"]
    for row in record["rows"]:
        assert row["beyond"] == pytest.approx(row["import"] + row["first"] - row["again"])
        assert row["whole"] > row["torch"] + row["import"] + row["first"] + row["again"]
        assert 0 <= row["import, collecting garbage"] < row["import"]
        assert row["apart"] <= 1e-3  # of the same package: rounding in another order, by what a solve to 1e-5 leaves
        assert not row["compiler"]


def test_the_tables(record: dict) -> None:
    lines = [line for line in fresh_process.report(record).splitlines() if line.startswith("| A ")]
    assert len(lines) == 2
    assert {line.count("|") for line in lines} == {len(fresh_process.HEADER) + 1}
    table = report.fresh_process(record)
    assert [len(row) for row in table.rows] == [len(table.header)] * 2
    assert table.rows[0][-1] == "not imported"

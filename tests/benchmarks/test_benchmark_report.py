"""What the benchmarks say follows from what they measured, and README says it, too."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import harness
import report

ROOT = Path(__file__).parents[2]
RESULTS = "benchmarks/results/cpu"


def measured(size: str = "large") -> harness.Measured:
    """Three ways of adding, and a yardstick."""
    a, b = torch.ones(2, 1000).unbind()
    out = torch.empty_like(a)
    calls = {"native": partial(torch.add, a, b, out=out), "torch, new": lambda: a + b, "torch": lambda: a.add(b)}
    errors = dict.fromkeys(calls, 1e-8)
    return harness.compare(size, calls, errors, 12_000, 1000, "cpu", 0.01, {"mul": partial(torch.mul, a, b, out=out)})


def records() -> dict[str, report.Record]:
    """As the benchmarks write them, of an op at two sizes."""
    sizes = [asdict(measured(title)) for title in ("small", "large")]
    for size, factor in zip(sizes, (1.0, 100.0), strict=True):
        for row, seconds in zip(size["rows"], (2e-3, 5e-3, 4e-3, 1e-3, 1e-3), strict=True):
            row["median"] = factor * seconds
    op = {"op": "add", "device": "cpu", "provenance": harness.provenance(), "sizes": sizes}
    return json.loads(json.dumps({"bench_add": op}))


def test_readme_shows_what_the_results_say():
    section = report.readme_section(report.read(ROOT / RESULTS), RESULTS)
    readme = (ROOT / "README.md").read_text()
    assert report.replaced(readme, section, RESULTS) == readme, (
        f"run `python benchmarks/report.py {RESULTS} --readme README.md`"
    )


def test_fractions_are_of_the_least_time_that_the_rates_allow():
    size = measured()
    least = max(size.bytes / size.bytes_per_second, size.flops / size.flops_per_second)
    assert [row.kind for row in size.rows] == ["native", "torch", "torch", "yardstick", "yardstick"]
    for row in size.rows[:-1]:
        assert row.fraction * row.median == pytest.approx(least)
    assert size.rows[-1].variant == harness.COPY
    assert size.rows[-1].fraction is None, "it computes nothing"
    assert size.bytes / size.rows[-1].median == pytest.approx(size.bytes_per_second)


def test_an_op_is_compared_with_the_fastest_in_torch_at_its_largest_size():
    table = report.native_ops(report.ops(records()))
    ((name, size, seconds, _, faster, over_all),) = table.rows
    assert (name, size, seconds, faster) == ("add", "large", "200 ms", "2.0x"), "4 ms over 2 ms, not 5 nor 1"
    assert over_all == "2.0x to 2.0x"


def test_of_each_package_the_fastest_exact_way_is_shown_with_its_defaults_and_failures():
    def line(
        peer: str, method: str, error: float | None, setting: str = "same damping", seconds: float = 1.0
    ) -> report.Record:
        failure = None if error else "gave up after 10 s"
        names = {"problem": "B", "peer": peer, "method": method, "setting": setting, "queries": 5}
        return names | {"failure": failure, "error": error, "spearman": error and 1.0 - error, "seconds": seconds}

    lines = [
        line("one", "quick and wrong", 0.5, seconds=0.1),
        line("one", "quick", 0.008, seconds=2.0),
        line("one", "slow", 0.001, seconds=3.0),
        line("one", "unasked", 0.9, "defaults"),
        line("two", "slow", None),
        line("three", "near", 0.2),
        line("three", "far", 0.3, seconds=0.1),
    ]
    table = report.peers({"rows": lines, "problems": [{"problem": "B", "title": "b"}]})
    assert [list(row) for row in table.rows] == [
        ["B", "one", "quick", "5", "2 s", "8e-03", "0.992", "0.9", "-"],
        ["B", "two", "-", "-", "-", "-", "-", "-", "1 of 1"],
        ["B", "three", "near", "5", "1 s", "2e-01", "0.800", "-", "-"],
    ]


def test_tables_and_pictures_are_written(tmp_path: Path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    for name, record in records().items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    (tmp_path / "end_to_end.json").write_text((ROOT / RESULTS / "end_to_end.json").read_text())
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path)])
    report.main()
    printed = capsys.readouterr().out
    assert "Native ops" in printed
    assert max(len(line) for line in printed.splitlines()[:-1]) <= 120, "a terminal's width"
    for picture in ("roofline.png", "speedups.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert "| torch, new |" in (tmp_path / "ops.md").read_text()
    assert (tmp_path / "summary.md").read_text().startswith("# Summary")


def test_a_folder_without_results_is_an_error(tmp_path: Path):
    with pytest.raises(SystemExit, match="expected results of benchmarks"):
        report.read(tmp_path)


def test_a_readme_without_marks_is_an_error():
    with pytest.raises(SystemExit, match="expected the marks"):
        report.replaced("nothing here", "section", "folder")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5e-5, "25 µs"), (0.0123, "12.3 ms"), (4.96, "4.96 s"), (150.0, "2.5 min"), (7200.0, "2 h")],
)
def test_durations(seconds: float, text: str):
    assert report.duration(seconds) == text

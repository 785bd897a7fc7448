"""What `make gpu` runs, on a machine without a GPU: stages, their outcomes and the exit status."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"


def run(out: Path, stages: str, **settings: str) -> tuple[int, dict[str, str]]:
    """The exit status, and each stage's line of the table."""
    settings = {"PYTHON": sys.executable, "DEVICE": "cpu", "QUICK": "1", **settings}
    done = subprocess.run(
        [SCRIPT], env=os.environ | settings | {"OUT": str(out), "STAGES": stages}, capture_output=True, text=True
    )
    table = (out / "stages.txt").read_text().splitlines() if (out / "stages.txt").exists() else [done.stderr]
    assert all(line in done.stdout + done.stderr for line in table)
    return done.returncode, {line.split()[0]: " ".join(line.split()[1:]) for line in table[1:]} or {"": table[0]}


def test_what_is_not_there_is_said_and_no_failure(tmp_path: Path) -> None:
    status, lines = run(tmp_path / "a folder", "graphs sanitizer")
    assert status == 0
    assert list(lines) == ["graphs", "sanitizer"]
    assert lines["graphs"].startswith("ok")
    assert lines["graphs"].endswith("needs a GPU, nothing measured")
    assert lines["sanitizer"].startswith("not there")
    assert "nothing measured" in (tmp_path / "a folder" / "graphs.log").read_text()


def test_a_failure_or_a_timeout_stops_no_later_stage_and_shows_in_the_status(tmp_path: Path) -> None:
    status, lines = run(tmp_path, "graphs sanitizer", PYTHON="false")
    assert status == 1
    assert lines["graphs"].startswith("failed")
    assert lines["sanitizer"].startswith("not there")
    status, lines = run(tmp_path / "late", "tests sanitizer", LIMIT="0.2")
    assert status == 1
    assert lines["tests"].startswith("timed out")
    assert lines["sanitizer"].startswith("not there")


@pytest.mark.parametrize("stages", ["bild", "build tets"])
def test_an_unknown_stage_is_refused_before_anything_runs(tmp_path: Path, stages: str) -> None:
    status, lines = run(tmp_path, stages)
    assert status == 2
    assert (
        f"expected some of build tests ops end_to_end large graphs sanitizer report, got {stages.split()[-1]}"
        in (lines[""])
    )
    assert not list(tmp_path.iterdir())

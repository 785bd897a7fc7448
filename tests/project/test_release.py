"""What must agree between the files that a release is made of."""

from __future__ import annotations

import re
from pathlib import Path

import check_wheel
import cuda_stand_ins
import pytest

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
VERSION = re.search(r'^version = "(.*)"$', PYPROJECT, re.MULTILINE)[1]


def test_the_citation_is_of_this_version():
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("tool", ["ruff", "clang-format"])
def test_a_commit_is_checked_by_the_version_that_make_lint_runs(tool):
    (pin,) = re.findall(rf'"({tool}==[\d.]+)"', PYPROJECT)
    in_hooks = re.findall(rf'"({tool}==[\d.]+)"', (ROOT / ".pre-commit-config.yaml").read_text())
    assert set(in_hooks) == {pin}


def test_the_quick_tests_exist():
    for path in check_wheel.QUICK_TESTS:
        assert (ROOT / path).exists()


@pytest.mark.parametrize(
    ("last_line", "expected"),
    [
        ("1201 passed, 44 skipped in 61.02s (0:01:01)", {"passed": 1201, "skipped": 44, "failed": 0, "error": 0}),
        ("2 failed, 7 passed, 1 error in 0.10s", {"passed": 7, "skipped": 0, "failed": 2, "error": 1}),
        ("no tests ran in 0.01s", {"passed": 0, "skipped": 0, "failed": 0, "error": 0}),
    ],
)
def test_counts_of_a_test_run(last_line, expected):
    assert check_wheel.counts(f"...\nFAILED tests/test_x.py - 3 passed\n{last_line}\n") == expected


def test_the_table_goes_between_the_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{check_wheel.BEGIN}\nold\n{check_wheel.END}\nafter\n")
    row = {"torch": "2.10.0", "wheel": "one.whl", "problem": "ImportError"}
    check_wheel.write(page, [row])
    text = page.read_text()
    assert text.startswith(f"before\n{check_wheel.BEGIN}\n")
    assert text.endswith(f"{check_wheel.END}\nafter\n")
    assert "| 2.10.0 | | | not installed, or not imported | | | |" in text
    assert "old" not in text


def test_of_cuda_only_the_runtime_is_required_where_there_are_stand_ins():
    metadata = """
Requires-Dist: torch>=2.10
Requires-Dist: sympy>=1.13.3
Requires-Dist: cuda-bindings==12.9.4; platform_system == "Linux"
Requires-Dist: nvidia-cuda-runtime-cu12==12.8.90; platform_system == "Linux"
Requires-Dist: nvidia-cublas-cu12==12.8.4.1; platform_system == "Linux"
Requires-Dist: cuda-toolkit[cublas,cudart,cufft]==13.0.2; platform_system == "Linux"
Requires-Dist: triton==3.6.0; platform_system == "Linux"
Requires-Dist: optree>=0.13.0; extra == "optree"
"""
    assert cuda_stand_ins.requirements_without_cuda(metadata) == [
        "sympy>=1.13.3",
        'nvidia-cuda-runtime-cu12==12.8.90; platform_system == "Linux"',
        'cuda-toolkit[cudart,cupti]==13.0.2; platform_system == "Linux"',
    ]

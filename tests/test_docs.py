"""The pages in docs/ are true: their Python runs, in order, and prints what they say it prints."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import importlib.util
import io
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"```python\n(?P<code>.*?)```(?:\n\n```text\n(?P<output>.*?)```)?", re.DOTALL)
OPTIONAL = {"curvlinops"}  # blocks that import these are left out where they are not installed


def can_run(code: str) -> bool:
    return all(importlib.util.find_spec(name) for name in OPTIONAL if f"import {name}" in code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs_in_order(page: Path) -> None:
    text = page.read_text()
    blocks = [match for match in BLOCK.finditer(text) if can_run(match["code"])]
    assert blocks
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        line = text[: block.start()].count("\n") + 1
        source = "\n" * line + block["code"]  # so that a traceback names the line of the page
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()) as printed:
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)  # torch's own
            exec(compile(source, str(page), "exec"), namespace)
        assert printed.getvalue() == (block["output"] or "")


@pytest.mark.parametrize(
    "module",
    [*(f"solvers._{name}" for name in ("cg", "direct", "lissa", "minres", "preconditioners")), "linop", "diagnostics"],
)
def test_the_examples_of_docstrings_run(module: str) -> None:
    names = {"torch": importlib.import_module("torch")}
    found = doctest.testmod(importlib.import_module(f"torch_influence.{module}"), extraglobs=names)
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists()
    for target in re.findall(r"`(tests/[\w/]+\.py)`", text):
        assert (DOCS.parent / target).exists()

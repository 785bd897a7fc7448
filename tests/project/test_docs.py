"""The pages in docs/ and the docstrings are true: their Python runs, in order, and prints what they say it prints."""

from __future__ import annotations

import contextlib
import copy
import doctest
import importlib
import importlib.util
import io
import pkgutil
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import problems
import pytest
import torch
from torch import nn

import torch_influence
from torch_influence import CGInfluenceModule, LiSSAInfluenceModule

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
BLOCK = re.compile(r"```python\n(?P<code>.*?)```(?:\n\n```text\n(?P<output>.*?)```)?", re.DOTALL)
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text())]
OPTIONAL = {"curvlinops"}  # blocks that import these are left out where they are not installed
GENERATED = {"performance.md"}  # written by docs/hook.py when the site is built
NOT_IMPORTED = {"torch_influence.__main__", "torch_influence._C", "torch_influence._no_native"}
NOT_IMPORTED |= {"torch_influence.libtorch_influence"}  # the ops: no module of Python's


def name_of(page: Path) -> str:
    return str(page.relative_to(DOCS))


def can_run(code: str) -> bool:
    return all(importlib.util.find_spec(name) for name in OPTIONAL if f"import {name}" in code)


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)  # torch's own
        yield


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_the_code_of_a_page_runs_in_order(page: Path) -> None:
    text = page.read_text()
    blocks = [match for match in BLOCK.finditer(text) if can_run(match["code"])]
    assert blocks
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        line = text[: block.start()].count("\n") + 1
        source = "\n" * line + block["code"]  # so that a traceback names the line of the page
        with without_warnings(), contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(source, str(page), "exec"), namespace)
        assert printed.getvalue() == (block["output"] or "")


# -- docstrings --------------------------------------------------------------------------------------------------------


def modules() -> Iterator[ModuleType]:
    for found in pkgutil.walk_packages(torch_influence.__path__, "torch_influence."):
        if found.name not in NOT_IMPORTED:
            yield importlib.import_module(found.name)


def examples() -> list[doctest.DocTest]:
    """Of all modules, classes, functions and methods of the package; those that are imported count once."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [test for module in modules() for test in finder.find(module, module.__name__) if test.examples]
    return sorted(found, key=lambda test: test.name)


class Shown(doctest.OutputChecker):
    """An example that shows no output may print what it likes."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


def train_my_model(train_idxs: list[int]) -> nn.Module:
    """A softmax regression, at the minimum of its objective over these examples."""
    objective, data = problems.Classification(), problems.loader().dataset
    x, y = (tensor[train_idxs] for tensor in data.tensors)
    torch.manual_seed(1)
    model = nn.Linear(4, 3).double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        flat = torch.cat([p.reshape(-1) for p in model.parameters()])
        loss = objective.train_loss(model, flat, (x, y))
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    return train_my_model(list(range(23)))


def at_hand(test: doctest.DocTest, trained: nn.Module) -> dict[str, Any]:
    """What an example may take for granted."""
    model = copy.deepcopy(trained)
    if test.name.startswith("torch_influence.estimates"):
        kind, options = LiSSAInfluenceModule, {"repeat": 2, "depth": 20, "on_failure": "ignore"}
    else:
        kind, options = CGInfluenceModule, {}
    return {
        "torch": torch,
        "torch_influence": torch_influence,
        **{name: getattr(torch_influence, name) for name in torch_influence.__all__},
        "model": model,
        "objective": problems.Classification(),
        "train_loader": problems.loader(),
        "test_loader": problems.loader(n=7, batch_size=3, seed=3),
        "train_my_model": train_my_model,
        "module": problems.module(kind, model=model, damp=0.1, **options),
    }


@pytest.mark.parametrize("test", examples(), ids=lambda test: test.name.removeprefix("torch_influence."))
def test_the_example_of_a_docstring_runs(
    test: doctest.DocTest, trained: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where one writes a file
    test.globs = test.globs | at_hand(test, trained)
    said: list[str] = []
    with without_warnings():
        outcome = doctest.DocTestRunner(checker=Shown(), verbose=False).run(test, out=said.append)
    assert outcome.attempted > 0
    assert outcome.failed == 0, "".join(said)


# -- quotes -----------------------------------------------------------------------------------------------------------


def test_texts_of_warnings_that_the_table_quotes_are_in_the_code() -> None:
    code = "\n".join(path.read_text() for path in (DOCS.parent / "src").rglob("*.py"))
    code = re.sub(r'"\n\s*f?"', "", code)  # literals that follow each other
    rows = re.findall(r'^\| \w+(?:Warning|Error)[^|"]*"([^"|]+)"', (DOCS / "choosing.md").read_text(), re.MULTILINE)
    assert len(rows) >= 10
    for quoted in rows:
        assert all(part in code for part in quoted.split(" ... ")), quoted


# -- links -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert target in GENERATED or (page.parent / target).exists(), target
    for target in re.findall(r"`((?:tests|benchmarks|src|csrc)/[\w/]+\.\w+)`", text):
        assert (DOCS.parent / target).exists(), target

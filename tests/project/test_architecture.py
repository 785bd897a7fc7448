"""Who may import whom: the data flow of the package, kept true."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "torch_influence"

# A file or folder imports only what is listed before it; those of one line do not import one another.
ORDER = [
    ["caller", "turns", "torch_errors", "objective", "parameters", "memory", "agreement", "plan", "products"],
    ["failures", "switches", "arguments", "linop", "ops", "exhibits"],
    ["batches"],
    ["evaluation"],
    ["gradients"],
    ["losses", "staleness"],
    ["curvature", "solvers"],
    ["scores"],
    ["problem"],
    ["diagnostics"],
    ["verification", "legacy"],
    ["pages"],
    ["base"],
    ["solving"],
    ["estimates"],
    ["modules", "auto"],
    ["plot"],
    ["__init__"],
    ["demo", "__main__"],
]
# What is listed before, and is none of its business all the same.
NOT = {"problem": {"solvers", "scores"}, "verification": {"scores"}, "legacy": {"solvers", "scores", "problem"}}
NOT |= {"scores": {"curvature", "solvers"}, "solvers": {"batches", "evaluation", "gradients", "losses"}}
# Imported when one asks for a picture or a page, in the method that makes it.
WHEN_ASKED = {"plot", "pages", "demo"}
MOST_LINES = 400  # of code, docstrings aside


def part(path: Path) -> str:
    relative = path.relative_to(SOURCE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(tree: ast.AST) -> Iterator[str]:
    """What of the package is imported when a file is, not when a function of it runs, nor for annotations alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.If):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imports(node)


def imported(path: Path, tree: ast.AST) -> set[str]:
    parts = {name.split(".")[1] for name in imports(tree) if name.startswith("torch_influence.")}
    return parts & {name for line in ORDER for name in line} - {part(path)}


def files() -> list[tuple[Path, ast.Module]]:
    return [(path, ast.parse(path.read_text())) for path in sorted(SOURCE.rglob("*.py"))]


def test_imports_follow_the_data_flow() -> None:
    floor = {name: height for height, line in enumerate(ORDER) for name in line}
    wrong = []
    for path, tree in files():
        own = part(path)
        assert own in floor, f"{own}: a new part of the package; say in ORDER where it stands"
        later = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        inside = {name for node in later for name in imported(path, ast.Module(node.body, []))} - WHEN_ASKED
        for other in imported(path, tree) | inside:
            if floor[other] >= floor[own] or other in NOT.get(own, ()):
                wrong.append(f"{path.relative_to(SOURCE)} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_every_part_in_the_order_exists() -> None:
    assert {part(path) for path, _ in files()} == {name for line in ORDER for name in line}


def test_folders_have_one_door() -> None:
    """From outside, and in tests' own reach, a folder is its ``__init__``: its files begin with an underscore."""
    wrong = []
    for path, tree in files():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("torch_influence."):
                continue
            parts = (node.module or "").split(".")[1:]
            if len(parts) > 1 and parts[0] != part(path) and parts[1].startswith("_"):
                wrong.append(f"{path.relative_to(SOURCE)} reaches into {node.module}")
    assert not wrong, "\n".join(wrong)


def code_lines(path: Path, tree: ast.Module) -> int:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            skipped |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(path.read_text().splitlines(), start=1)
    return sum(1 for number, line in lines if number not in skipped and line.strip() and line.strip()[0] != "#")


def test_no_file_is_long_and_none_declares_what_it_does_not_have() -> None:
    long = {path.name: lines for path, tree in files() if (lines := code_lines(path, tree)) > MOST_LINES}
    assert not long
    stubs = []
    for path, tree in files():
        for node in ast.walk(tree):
            inside = node.body if isinstance(node, ast.ClassDef) else []
            for block in (it for it in inside if isinstance(it, ast.If) and ast.unparse(it.test) == "TYPE_CHECKING"):
                stubs.append(f"{path.relative_to(SOURCE)}:{block.lineno}")
    assert not stubs, "a class that declares another's methods"


def test_modules_have_few_bases() -> None:
    from torch_influence import BaseInfluenceModule

    assert len(BaseInfluenceModule.__bases__) <= 2

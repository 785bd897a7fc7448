"""Who may import whom: the data flow of the package, kept true."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "torch_influence"

# Left: a file or folder. Right: what of the package it may import.
MAY_IMPORT = {
    "caller": set(),
    "turns": set(),
    "torch_errors": set(),
    "parameters": set(),
    "leaves": set(),
    "draws": {"turns"},
    "loaders": {"caller", "draws"},
    "source": {"draws", "leaves", "loaders"},
    "kept": {"leaves"},
    "resident": {"caller", "draws", "leaves", "source", "kept"},
    "batches": {"draws", "leaves", "source", "kept", "resident", "turns"},
    "linop": set(),
    "ops": {"_C", "_no_native"},  # the compiled part, and the note that stands in for it
    "plan": set(),
    "choice": set(),
    "objective": set(),
    "arguments": {"caller", "objective"},
    "composed": set(),
    "convolutions": set(),
    "switches": {"caller"},
    "remembered": set(),
    "evaluation": {
        "caller",
        "objective",
        "parameters",
        "composed",
        "leaves",
        "remembered",
        "switches",
        "torch_errors",
        "turns",
    },
    "gradients": {"parameters", "batches", "leaves", "evaluation", "plan", "switches"},
    "losses": {"batches", "caller", "evaluation", "gradients", "leaves", "switches"},
    "capture": {"evaluation"},
    "contraction": {"capture", "evaluation", "ops"},
    "curvature": {
        "caller",
        "linop",
        "losses",
        "parameters",
        "batches",
        "evaluation",
        "capture",
        "plan",
        "ops",
        "gradients",
        "convolutions",
        "turns",
    },
    "exhibits": set(),
    # Its functions draw what solvers, diagnostics and checks have found; these import it when they are asked to plot().
    "plot": {"exhibits", "ranking", "solvers", "diagnostics", "verification"},
    "page": {"exhibits"},
    "solvers": {"caller", "linop", "ops", "plot"},
    "examples": {"batches", "contraction", "evaluation", "gradients", "leaves", "plan", "switches"},
    "scores": {"caller", "examples", "batches", "plan", "ops"},
    "ranking": {"scores"},
    "influences": {"batches", "evaluation", "examples", "parameters", "ranking", "resident", "scores"},
    "diagnostics": {"linop", "solvers", "plot"},
    "verification": {"linop", "solvers", "diagnostics"},
    "checks": {
        "batches",
        "caller",
        "curvature",
        "diagnostics",
        "evaluation",
        "gradients",
        "linop",
        "losses",
        "objective",
        "parameters",
        "resident",
        "solvers",
        "switches",
        "verification",
    },
    "reporting": {
        "batches",
        "evaluation",
        "exhibits",
        "page",
        "parameters",
        "plan",
        "ranking",
        "scores",
        "solvers",
        "turns",
    },
    "estimates": {"influences", "ranking"},
    "parts": {"arguments", "batches", "evaluation", "objective", "parameters", "resident", "turns"},
    "legacy": {"objective", "parameters", "batches", "evaluation", "curvature"},
}
JOINS = {"base", "modules", "auto", "demo", "__init__", "__main__"}  # these may import everything above them


def part(path: Path) -> str:
    relative = path.relative_to(SOURCE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_parts(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("torch_influence.")}
    return found


def test_every_part_of_the_package_is_in_the_table_and_there() -> None:
    """What it may import is to be said for each."""
    assert {part(path) for path in SOURCE.rglob("*.py")} == MAY_IMPORT.keys() | JOINS


def test_imports_follow_the_data_flow() -> None:
    paths = {path: part(path) for path in sorted(SOURCE.rglob("*.py"))}
    refused = {
        str(path.relative_to(SOURCE)): sorted(imported_parts(path) - {own} - MAY_IMPORT[own])
        for path, own in paths.items()
        if own not in JOINS
    }
    assert {path: parts for path, parts in refused.items() if parts} == {}

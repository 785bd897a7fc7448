"""What is public is documented: which sections a docstring has follows from what it is of.

- a function, and a method where it is first defined: Args with every parameter, Returns unless it returns nothing,
  Cost, an example;
- a class that users construct: Args with every parameter of the constructor, an example;
- a class of results: Attributes with every field;
- an error, a warning, a protocol, a property: a sentence;
- what is not public: plain sentences with a verb, never fragments whose subject is the function's name.

Formulas, Raises, Warns and Source are where there is something to say. That they are true is for reviews, and that
examples run for test_docs.py. Sections name parameters in groups ("rtol, atol: ..."), which is enough.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch_influence
from torch_influence import BaseInfluenceModule, BaseObjective, solvers
from torch_influence.modules import AutogradInfluenceModule, CGInfluenceModule, LiSSAInfluenceModule

SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Warns", "Cost", "Source", "Examples")
MODULES = [BaseInfluenceModule, AutogradInfluenceModule, CGInfluenceModule, torch_influence.InfluenceModule]
MODULES += [LiSSAInfluenceModule]

# What the modules of this package share with its solvers: exported, but not what users call.
PLUMBING = {
    "AutoScale",
    "Memo",
    "named",
    "own_or_ours",
    "solved",
    "refuse_if_too_large",
    "check_on_failure",
    "fail",
    "is_recipe",
    "norms",
    "rounding",
}
OBJECTIVE = {name for name in vars(BaseObjective) if not name.startswith("_")}
# Of these the user writes the body, or they do next to nothing.
WITHOUT_COST = {"backend_info", "clear_cache", "flat_parameters", "inverse_hvp", "solve", "inverse"} | OBJECTIVE
WITHOUT_EXAMPLE = {"inverse_hvp", "solve", "inverse"} | OBJECTIVE  # their classes have one

# The first words of docstrings without a verb.
FRAGMENT = r"(Of|What|Those|So many|At)\b"


def sections(documented: Any) -> dict[str, str]:
    """The text of each section of a docstring, by its heading."""
    text = inspect.cleandoc(documented.__doc__ or "")
    parts = re.split(rf"^({'|'.join(SECTIONS)}):", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def named(section: str) -> set[str]:
    """What a section explains: the words before the colons of its entries, without asterisks."""
    entries = re.findall(r"^    (\S[^:\n]*):", section, flags=re.MULTILINE)
    return {name.strip(" *`") for entry in entries for name in entry.split(",")}


def parameters(function: Callable[..., Any]) -> set[str]:
    return {name for name in inspect.signature(function).parameters if name not in ("self", "cls")}


def is_class(it: Any) -> bool:
    return inspect.isclass(it) and not hasattr(it, "__origin__")  # an alias is none, whatever Python 3.10 says


def is_result(kind: type) -> bool:
    return dataclasses.is_dataclass(kind) or hasattr(kind, "_fields")


def fields(kind: type) -> set[str]:
    if dataclasses.is_dataclass(kind):
        return {field.name for field in dataclasses.fields(kind)}
    return set(kind._fields)  # type: ignore[attr-defined]


def public() -> dict[str, Any]:
    """Classes and functions that are exported, by their names."""
    names = {name: getattr(torch_influence, name) for name in torch_influence.__all__}
    names |= {name: getattr(solvers, name) for name in solvers.__all__}
    return {name: it for name, it in sorted(names.items()) if is_class(it) or inspect.isfunction(it)}


def methods() -> dict[str, Any]:
    """Public methods of objectives, modules and factors, each where it is defined."""
    found = {}
    for kind in [*MODULES, BaseObjective, solvers.Factor, solvers.DualFactor]:
        for base in kind.__mro__:
            if not base.__module__.startswith("torch_influence"):
                continue
            for name, it in vars(base).items():
                if not name.startswith("_") and (inspect.isfunction(it) or isinstance(it, property)):
                    found[f"{base.__name__}.{name}"] = it
    return found


# Dataclasses, but users construct them.
RECIPES = {"Jacobi", "Nystrom", "CG", "BlockCG", "Minres", "LiSSA", "DualDirect", "Direct", "ClosedForm", "Auto"}
FUNCTIONS = {name: it for name, it in public().items() if inspect.isfunction(it) and name not in PLUMBING}
RESULTS = {name: it for name, it in public().items() if is_class(it) and is_result(it) and name not in RECIPES}
CONSTRUCTED = {
    name: it
    for name, it in public().items()
    if name in RECIPES or it in MODULES or it in (solvers.Factor, solvers.DualFactor)
}
METHODS = {name: it for name, it in methods().items() if inspect.isfunction(it)}
# A method that a mixin or a base class has already explained says only what is different.
FIRST = {
    name: it
    for name, it in METHODS.items()
    if not name.startswith(("CGI", "Autograd", "LiSSA", "InfluenceModule.", "EstimatingModule.inverse_hvp"))
}


def offenders(documented: dict[str, Any], wrong: Callable[[str, Any], Iterator[str]]) -> dict[str, list[str]]:
    """What is wrong, by the names of those of which something is."""
    return {name: found for name, it in documented.items() if (found := list(wrong(name, it)))}


def test_everything_public_is_explained_in_a_sentence() -> None:
    def wrong(name: str, it: Any) -> Iterator[str]:
        own = it.__doc__ if not inspect.isclass(it) else vars(it).get("__doc__")
        first = (own or "").strip().partition("\n")[0]
        if not first.endswith((".", ":", "]", ")")):
            yield "the first line is no whole sentence"
        if first.startswith(f"{name}("):
            yield "the first line is the one that dataclasses make"

    assert offenders(public() | methods(), wrong) == {}


def test_functions_explain_parameters_results_and_cost() -> None:
    def wrong(name: str, function: Callable[..., Any]) -> Iterator[str]:
        short, found = name.rpartition(".")[2], sections(function)
        if named(found.get("Args", "")) != parameters(function):
            yield f"Args of {named(found.get('Args', ''))}, not of {parameters(function)}"
        returns = inspect.signature(function).return_annotation not in ("None", None)
        if returns and not {"Returns", "Yields"} & found.keys():
            yield "neither Returns nor Yields"
        if short not in WITHOUT_COST and "Cost" not in found:
            yield "no Cost"
        if short not in WITHOUT_EXAMPLE and ">>>" not in found.get("Examples", ""):
            yield "no example"

    assert offenders(FUNCTIONS | FIRST, wrong) == {}


def test_classes_explain_the_parameters_of_their_constructors() -> None:
    def wrong(name: str, kind: type) -> Iterator[str]:
        found = sections(kind)
        if named(found.get("Args", "")) != parameters(kind):
            yield f"Args of {named(found.get('Args', ''))}, not of {parameters(kind)}"
        if ">>>" not in found.get("Examples", ""):
            yield "no example"

    assert offenders(CONSTRUCTED, wrong) == {}


def test_results_explain_their_fields() -> None:
    def wrong(name: str, kind: type) -> Iterator[str]:
        explained = named(sections(kind).get("Attributes", ""))
        if not explained >= fields(kind):
            yield f"nothing of {fields(kind) - explained}"
        if unknown := {it for it in explained if not hasattr(kind, it) and it not in fields(kind)}:
            yield f"{unknown} of which there is none"

    assert offenders(RESULTS, wrong) == {}


def test_the_page_on_choosing_has_cures_for_every_warning() -> None:
    page = (Path(__file__).parents[2] / "docs" / "choosing.md").read_text()
    found = {name for name, it in public().items() if inspect.isclass(it) and issubclass(it, Warning)}
    assert "NondeterminismWarning" in found
    assert all(f"| {name}" in page for name in found), "a row of its table begins with it"


def private_docstrings(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """Yields (line, name, docstring) of each function, method and class in a module that users don't call."""
    exported = public().keys() - PLUMBING
    documented = methods().keys()

    def walk(node: ast.AST, outer: tuple[str, ...]) -> Iterator[tuple[int, str, str]]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.ClassDef):
                yield from walk(child, outer)
                continue
            names = (*outer, child.name)
            name = ".".join(names)
            shown = names[0] in exported and not any(part.startswith("_") for part in names[1:])
            if (text := ast.get_docstring(child)) and not shown and name not in documented:
                yield child.lineno, name, text
            yield from walk(child, names)

    return walk(tree, ())


def test_private_docstrings_are_no_fragments() -> None:
    package = Path(torch_influence.__file__).parent
    found = [
        f"{path.relative_to(package)}:{line} {name}: {text.splitlines()[0]}"
        for path in sorted(package.rglob("*.py"))
        for line, name, text in private_docstrings(ast.parse(path.read_text()))
        if re.match(FRAGMENT, text)
    ]
    assert not found, "begin them with a verb, as in 'Returns ...' or 'Tells whether ...':\n" + "\n".join(found)


def test_the_rules_see_something() -> None:
    assert {"cg", "lissa", "self_test"} <= FUNCTIONS.keys()
    assert {"SolveReport", "Ranking", "RitzValues"} <= RESULTS.keys()
    assert {"Nystrom", "InfluenceModule", "Factor"} <= CONSTRUCTED.keys()
    assert {"BaseInfluenceModule.influences", "BaseInfluenceModule.verify", "Factor.solve"} <= FIRST.keys()
    assert re.match(FRAGMENT, "What is kept.")
    assert not re.match(FRAGMENT, "Offers what is kept.")

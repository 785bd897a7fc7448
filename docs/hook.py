"""What the site takes from elsewhere in the repository: the page on performance, and links to files beside docs/."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
PICTURES = {"speedups.png": "Speed-ups", "roofline.png": "Native ops", "scaling.png": "Scaling"}

INTRODUCTION = """# Performance

Written from the results of record in `benchmarks/results/cpu` when this site is built. `make bench` measures on your
machine; `benchmarks/` has every size, variant and problem, and its README says what each file asks.

Every ratio is against a baseline that is named, on the same machine in the same run, taken in turns, with the error
of the scores beside it.
"""

WHY = """
## Where the time goes, and why it is less

- Data are read once and kept while they fit (`cache=`).
- A network is differentiated once; its graph is multiplied for every iteration and every query.
- A linear model, or the last layer of a network (`params="head.*"`), has its curvature in closed form.
- Queries that are solved together share a Krylov space: ask for `influence_matrix(test_idxs=...)`, not one by one.
- Few examples with many parameters are solved by the small matrix of their outputs.
- Scores come from the inputs and output gradients of layers, without per-example gradients.

`print(module.explain(queries=100))` says which of these your model takes, why not the others, and what memory it needs.
"""


def page() -> str:
    """The page on performance, in Markdown."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import report
    finally:
        sys.path.pop(0)
    pictures = [f"![{title}](pictures/{name})\n" for name, title in PICTURES.items() if (RESULTS / name).exists()]
    return "\n".join([INTRODUCTION, *pictures, report.summary(report.read(RESULTS)), WHY])


def on_files(files: Files, config: Any) -> Files:
    """Adds the page and its pictures."""
    files.append(File.generated(config, "performance.md", content=page()))
    for name in PICTURES:
        if (RESULTS / name).exists():
            files.append(File.generated(config, f"pictures/{name}", abs_src_path=str(RESULTS / name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A list right below a paragraph is one, as in a repository's own view; Python-Markdown wants an empty line."""
    return re.sub(r"(?m)^(?!(?:[-*|>]|\d+\.) |\s|$)(.+)\n(?=(?:- |1\. ))", r"\1\n\n", markdown)

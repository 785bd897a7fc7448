"""The same questions put to this package and to pyDVL, captum, kronfluence, dattri and curvlinops, where installed.

    python benchmarks/peers.py [--problems B,C] [--limit SECONDS] [--json PATH] [--markdown PATH]

`make bench-peers` installs them beside the development environment, in build/peers, and runs this. By hand,
pip install 'torch-influence[peers]' is the simplest way, in an environment of its own: kronfluence and curvlinops'
backpack want torchvision, which wants a torch of its own, and pyDVL wants numpy below 2. To keep the torch that is
there, install the five with --no-deps and then what they import: see PEERS in the Makefile.

Scores are compared, after conversion (docs/meaning.md), with those of a dense float64 solve on the same trained model:
with the damped Hessian or the damped Gauss-Newton matrix, whichever a method means to use. Every line runs in a process
of its own, forked from one that has imported torch and computed nothing: its peak of memory is its own, and it can be
stopped, run out of memory or crash without harm to the others. The method runs on a tiny problem first, so that what is
imported and loaded once counts neither as time nor as memory.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib
import importlib.util
import io
import logging
import multiprocessing
import statistics
import sys
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import scipy.stats
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
import harness
from adapters import GAUSS_NEWTON, HESSIAN, PEERS, Entry, module, our_entries
from end_to_end import with_memory
from workloads import WORKLOADS, Workload

SIZES: dict[str, dict[str, int]] = {
    "B": {"n": 2000, "queries": 50, "features": 200},
    "C": {"n": 2000, "queries": 10, "features": 100, "hidden": 16},
}
TINY: dict[str, dict[str, int]] = {
    "B": {"n": 70, "queries": 1, "features": 5, "classes": 3},
    "C": {"n": 70, "queries": 1, "features": 4, "hidden": 3, "classes": 3},
}
NAMES = ("pyDVL", "captum", "kronfluence", "dattri", "curvlinops-for-pytorch")
NOT_INSTALLED = "not installed: pip install 'torch-influence[peers]'"
SHORT = 2.0  # seconds: a shorter call is repeated, three times at the most
PREPARATION = 60.0  # seconds at the most for imports and the tiny problem

# -- exact scores ----------------------------------------------------------------------------------------------------


def exact_scores(work: Workload, curvature: str) -> Tensor:
    """Scores [n, q] of the same model and data in float64 by a dense matrix and its Cholesky factor."""
    train, test = (TensorDataset(data.tensors[0].double(), *data.tensors[1:]) for data in (work.train, work.test))
    exact = dataclasses.replace(work, model=copy.deepcopy(work.model).double(), train=train, test=test)
    return module(exact, len(test), "direct", curvature)


def rank_correlation(scores: Tensor, exact: Tensor) -> float:
    """Spearman's of the training examples, mean over the queries."""
    columns = zip(scores.mT, exact.mT, strict=True)
    return statistics.mean(float(scipy.stats.spearmanr(a.double(), b).statistic) for a, b in columns)


# -- one line, in its own process ------------------------------------------------------------------------------------


class Count(logging.Handler):
    """Counts warnings, logged or raised, and shows none."""

    seen = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.seen += 1


def answer(connection: Connection, entry: Entry, work: Workload, tiny: Workload, threads: int) -> None:
    """Sends None when all is prepared, then a dict: seconds, memory, warnings and scores, or the error."""
    count = Count(logging.WARNING)
    logging.getLogger().addHandler(count)
    logging.captureWarnings(True)
    warnings.simplefilter("always")
    torch.set_num_threads(threads)
    queries = min(len(work.test), entry.queries or len(work.test))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            importlib.import_module(entry.module)
            with contextlib.suppress(Exception):  # what fails there fails again here, or is a matter of the size
                entry.scores(copy.deepcopy(tiny), len(tiny.test))
            connection.send(None)
            count.seen = 0

            def clocked() -> tuple[Tensor, float]:
                start = time.perf_counter()
                scores = entry.scores(copy.deepcopy(work), queries)
                return scores, time.perf_counter() - start

            (scores, first), extra = with_memory(clocked)
            seen, seconds = count.seen, [first]
            while len(seconds) < 3 and sum(seconds) + first < SHORT:
                seconds.append(clocked()[1])
        except Exception as error:
            text = str(error).strip() or "(no message)"
            connection.send({"error": f"{type(error).__name__}: {text.splitlines()[0]}", "warnings": count.seen})
            return
    connection.send({"seconds": seconds, "extra_bytes": extra, "warnings": seen, "scores": scores.numpy()})


def ask(entry: Entry, work: Workload, tiny: Workload, limit: float) -> dict[str, Any]:
    """What ``answer`` sends, or an error: not installed, too slow, dead."""
    if importlib.util.find_spec(entry.module.split(".")[0]) is None:
        return {"error": NOT_INSTALLED}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch_influence", "scipy.stats", "scipy.sparse.linalg"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(theirs, entry, work, tiny, torch.get_num_threads()))
    process.start()
    theirs.close()
    try:
        if not ours.poll(PREPARATION):
            return {"error": f"gave up after {PREPARATION:g} s of imports and the tiny problem"}
        prepared = ours.recv()
        if prepared is not None:
            return prepared
        return ours.recv() if ours.poll(limit) else {"error": f"gave up after {limit:g} s"}
    except EOFError:
        process.join()
        return {"error": f"its process died with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()
        ours.close()


def measure(entry: Entry, work: Workload, tiny: Workload, exact: dict[str, Tensor], limit: float) -> dict[str, Any]:
    """A line's record."""
    found = ask(entry, work, tiny, limit)
    queries = min(len(work.test), entry.queries or len(work.test))
    record: dict[str, Any] = {
        "problem": work.name,
        "peer": entry.peer,
        "method": entry.method,
        "setting": entry.setting,
        "computes": entry.computes,
        "compared_with": entry.curvature,
        "exact": entry.exact,
        "queries": queries,
        "failure": found.get("error"),
        "warnings": found.get("warnings"),
        "seconds": None,
        "runs": 0,
        "extra_bytes": None,
        "error": None,
        "spearman": None,
    }
    if record["failure"]:
        return record
    scores, target = torch.from_numpy(found["scores"]), exact[entry.curvature][:, :queries]
    if scores.shape != target.shape:
        return record | {"failure": f"scores {tuple(scores.shape)}, expected {tuple(target.shape)}"}
    if not scores.isfinite().all():
        return record | {"failure": f"{int((~scores.isfinite()).sum())} of {scores.numel()} scores are not finite"}
    return record | {
        "seconds": statistics.median(found["seconds"]),
        "runs": len(found["seconds"]),
        "extra_bytes": found["extra_bytes"],
        "error": harness.relative_error(scores, target),
        "spearman": rank_correlation(scores, target),
    }


# -- output ----------------------------------------------------------------------------------------------------------

HEADER = [
    "problem", "package", "method", "setting", "computes", "queries", "seconds", "of the first", "extra MB", "error",
    "rank correlation", "against", "warnings",
]  # fmt: skip


def cells(row: dict[str, Any], first: dict[str, Any]) -> list[str]:
    """A line of the table from its record, and from that of the problem's first line."""
    if row["failure"]:
        measured = [f"**{row['failure']}**".replace("|", "\\|"), "-", "-", "-", "-"]
    else:
        comparable = first["seconds"] and first["queries"] == row["queries"]
        measured = [
            f"{row['seconds']:.3g}",
            f"{row['seconds'] / first['seconds']:.3g}x" if comparable else "-",
            "?" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e6:.0f}",
            f"{row['error']:.1e}",
            f"{row['spearman']:.4f}",
        ]
    seen = "-" if row["warnings"] is None else str(row["warnings"])
    about = [row[name] for name in ("problem", "peer", "method", "setting", "computes")]
    return [*about, str(row["queries"]), *measured, row["compared_with"], seen]


def report(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    first: dict[str, dict[str, Any]] = {}
    for row in record["rows"]:
        first.setdefault(row["problem"], row)
    versions = ", ".join(f"{name} {number or 'not installed'}" for name, number in record["peers"].items())
    lines = [
        "# Side by side with other packages",
        "",
        f"{harness.where(record)}; {versions}",
        "",
        "From construction to the scores of all training examples for these queries; median of three runs where they",
        f"are short; given up after {record['limit']:g} s. Of the first: seconds over those of the problem's 1st line,",
        "where the queries are as many. Extra MB: the peak beyond what there was before. Error: relative 2-norm of the",
        "scores, converted as docs/meaning.md says, against a dense float64 solve with the curvature under *against*.",
        "Rank correlation: Spearman's of the training examples, mean over the queries. Defaults: all that the package",
        "lets one leave out is left out, the damping too, and the data come in batches of 64: the answer may be to",
        "another question. Warnings: of the first run.",
        "",
        *map(problem, record["problems"]),
        "",
        harness.markdown(HEADER, [cells(row, first[row["problem"]]) for row in record["rows"]]),
    ]
    return "\n".join(lines) + "\n"


def problem(it: dict[str, Any]) -> str:
    """What is known of a problem."""
    return (
        f"- {it['problem']}: {it['title']}, d = {it['parameters']:,}, damp {it['damp']:g}, l2 {it['l2']:g}, rtol "
        f"{it['rtol']:g}. Where the regulariser is left out of the gradients, scores are centred; that costs an error "
        f"of {it['centring_error']:.1e}, as the model is not quite at its minimum."
    )


def versions() -> dict[str, str | None]:
    """Of the packages that are compared with; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in NAMES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def run(problems: list[str], sizes: dict[str, dict[str, int]], limit: float) -> dict[str, Any]:
    """The record of all problems."""
    about, rows = [], []
    for name in problems:
        work, tiny = WORKLOADS[name](**sizes[name]), WORKLOADS[name](**TINY[name])
        exact = {curvature: exact_scores(work, curvature) for curvature in (HESSIAN, GAUSS_NEWTON)}
        it = exact[HESSIAN]
        about.append(
            {
                "problem": name,
                "title": work.title,
                "parameters": work.parameters,
                "damp": work.damp,
                "l2": work.objective.l2,
                "rtol": work.rtol,
                "centring_error": harness.relative_error(it - it.mean(dim=0), it),
            }
        )
        for entry in [*our_entries(name), *PEERS]:
            row = measure(entry, work, tiny, exact, limit)
            outcome = row["failure"] or f"{row['seconds']:.3g} s, error {row['error']:.1e}"
            print(f"{name} {entry.peer} {entry.method}, {entry.setting}: {outcome}", file=sys.stderr, flush=True)
            rows.append(row)
    return {"limit": limit, "peers": versions(), "problems": about, "rows": rows}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", default=",".join(SIZES), help="which of B,C (default: both)")
    parser.add_argument("--limit", type=float, default=10.0, help="seconds that a line may take (default: 10)")
    harness.output_options(parser)
    options = parser.parse_args(argv)
    problems = options.problems.split(",")
    if unknown := [name for name in problems if name not in SIZES]:
        parser.error(f"--problems: expected some of {','.join(SIZES)}, got {','.join(unknown)}")
    harness.publish(run(problems, SIZES, options.limit), report, options)


if __name__ == "__main__":
    main()

"""The time from a new process to the first scores, beyond what importing torch and the same call take.

    python benchmarks/fresh_process.py [--problems A,B,C] [--rounds N] [--other SRC] [--json PATH] [--markdown PATH]

Every round starts a process that imports torch alone, and for each problem one that imports torch, then this package,
loads a trained model and data, makes a module and asks it for the influence of all examples on one query; and once more
of another new module, warm. With --other the package in another folder (a checkout's src) is measured in turns.
Bytecode is written before, as it is where a package has been installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SRC = HERE.parent / "src"
COMPILER = "torch._dynamo", "torch.fx.experimental.symbolic_shapes"


# -- in the new process: nothing is imported above that the package needs ----------------------------------------------


@contextlib.contextmanager
def timed(found: dict[str, Any], name: str) -> Iterator[None]:
    """Notes the seconds of a block, and those of them that Python's garbage collector took."""
    import gc

    collecting: list[float] = []

    def note(phase: str, info: Any) -> None:
        collecting.append(time.perf_counter())

    gc.callbacks.append(note)
    start = time.perf_counter()
    yield
    found[name] = time.perf_counter() - start
    gc.callbacks.remove(note)
    found[f"{name}, collecting garbage"] = sum(collecting[1::2]) - sum(collecting[::2])


def child(problem: str, file: str) -> dict[str, Any]:
    """Seconds of the steps of a new process."""
    found: dict[str, Any] = {}
    with timed(found, "torch"):
        import torch
    if not problem:
        return found
    with timed(found, "import"):
        from torch_influence import CGInfluenceModule
    sys.path.insert(0, str(HERE))
    work = torch.load(file, weights_only=False)
    for name in ("first", "again"):
        with timed(found, name):
            loaders = work.train_loader(), work.test_loader()
            options = {"gnh": work.gnh, "rtol": work.rtol}
            module = CGInfluenceModule(work.model, work.objective, *loaders, "cpu", work.damp, **options)
            scores = module.influences(range(len(work.train)), [0])
        if name == "first":
            found["compiler"] = any(name in sys.modules for name in COMPILER)
    found["scores"] = scores.tolist()
    return found


# -- in this one -------------------------------------------------------------------------------------------------------


def run(source: Path, problem: str, file: str, bytecode: str) -> dict[str, Any]:
    """What a new process says, with the seconds that passed until it had ended."""
    environment = os.environ | {"PYTHONPATH": str(source), "PYTHONPYCACHEPREFIX": bytecode}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    start = time.perf_counter()
    command = [sys.executable, __file__, "--child", problem, file]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    whole = time.perf_counter() - start
    if answer.returncode:
        raise RuntimeError(f"{source}, problem {problem}: {answer.stderr}")
    return {"whole": whole} | json.loads(answer.stdout)


def measure(problems: dict[str, str], sources: dict[str, Path], rounds: int) -> Iterator[dict[str, Any]]:
    """Rows of medians; ``problems`` are files with trained models."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as bytecode:
        for number in range(rounds + 1):
            for name, file in {"": "", **problems}.items():
                for label, source in sources.items():
                    found = run(source, name, file, bytecode)
                    if number:  # the first one writes bytecode
                        runs.setdefault((name, label), []).append(found)
                    print(f"round {number} of {rounds}: {name or 'torch'}", file=sys.stderr, flush=True)
    for (name, label), its in runs.items():
        if name:
            row = {key: statistics.median(it[key] for it in its) for key in its[0] if key not in ("scores", "compiler")}
            row["beyond"] = statistics.median(it["import"] + it["first"] - it["again"] for it in its)
            row["process of torch alone"] = statistics.median(it["whole"] for it in runs["", label])
            first, here = its[0]["scores"], runs[name, next(iter(sources))][0]["scores"]
            apart = max(abs(a - b) for a, b in zip(first, here, strict=True)) / max(map(abs, here))
            yield {"problem": name, "package": label, "compiler": its[0]["compiler"], "apart": apart} | row


HEADER = [
    "problem", "package", "import torch", "import", "of it garbage", "first scores", "of it garbage", "again",
    "beyond torch and again", "torch's compiler", "process", "torch alone",
]  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    """A line of the table from its record."""
    times = ["torch", "import", "import, collecting garbage", "first", "first, collecting garbage", "again", "beyond"]
    return [
        row["problem"],
        row["package"],
        *(f"{row[name]:.3f} s" for name in times),
        "imported" if row["compiler"] else "not imported",
        f"{row['whole']:.2f} s",
        f"{row['process of torch alone']:.2f} s",
    ]


def report(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    import harness

    titles = {row["problem"]: row["title"] for row in record["rows"]}
    lines = [
        "# From a new process to the first scores",
        "",
        harness.where(record) + ("; **quick: smaller problems**" if record["quick"] else ""),
        "",
        f"Medians of {record['rounds']} processes, which took turns. First scores: of all examples for one query, by",
        "conjugate gradients, from construction on; again: the same of another new module in the same process. Beyond:",
        "import and first scores, less the same again. Garbage: what Python's collector took, which goes through all",
        "that importing torch has made whenever it is due. Torch's compiler: its `_dynamo` or its symbolic shapes. The",
        "last two: from start to end of a process, data loaded and the warm call made, and of one that imports torch.",
        "",
        *(f"- {name}: {title}" for name, title in titles.items()),
        "",
        harness.markdown(HEADER, [cells(row) for row in record["rows"]]),
    ]
    return "\n".join(lines) + "\n"


def trained(names: list[str], folder: Path, quick: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Files with trained problems, and their titles. Training imports torch's compiler, so it is done here."""
    import torch
    from workloads import WORKLOADS

    files, titles = {}, {}
    for name in names:
        work = WORKLOADS[name](**({"n": 200, "queries": 2, "features": 30} if quick else {}))
        torch.save(work, folder / name)
        files[name], titles[name] = str(folder / name), work.title
    return files, titles


def main(argv: list[str] | None = None) -> None:
    sys.path.insert(0, str(HERE))
    import harness

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", default="A,B,C", help="which of A, B, C (default: all)")
    parser.add_argument("--rounds", type=int, default=7, help="processes of each kind (default: 7)")
    parser.add_argument("--other", type=Path, help="a folder with another torch_influence, built")
    parser.add_argument("--quick", action="store_true", help="tiny problems")
    harness.output_options(parser)
    options = parser.parse_args(argv)
    sources = {"this one": SRC} | ({"the other": options.other.resolve()} if options.other else {})
    with tempfile.TemporaryDirectory() as folder:
        files, titles = trained(options.problems.split(","), Path(folder), options.quick)
        rows = [row | {"title": titles[row["problem"]]} for row in measure(files, sources, options.rounds)]
    harness.publish({"quick": options.quick, "rounds": options.rounds, "rows": rows}, report, options)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(*sys.argv[2:])))
    else:
        main()

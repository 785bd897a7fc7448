"""Changes the package in many small ways, one at a time, and expects the tests to notice each.

    make mutate                                                 # all of them: minutes
    .venv/bin/python tests/mutate.py -k "CG" --jobs 2           # those with CG in their names

Works on copies in a temporary folder; the working tree is never edited. A mutation that no test notices is a finding:
write the test that is missing, or replace the mutation if it changes nothing that anybody can see.
"""

from __future__ import annotations

import argparse
import compileall
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PACKAGE = "torch_influence"
SOURCE = ROOT / "src" / PACKAGE

_LONGEST = 120  # seconds for the tests of a mutation: one that makes something endless is caught by that


class Mutation(NamedTuple):
    """One change of the source, and the tests that should fail with it."""

    group: str
    name: str
    old: str
    new: str
    tests: tuple[str, ...]
    reference: bool


def mutations() -> list[Mutation]:
    """The list of mutations.txt, which says how it is written."""
    found, group = [], ""
    for block in (TESTS / "mutations.txt").read_text().strip().split("\n\n"):
        head, *lines = block.splitlines()
        if head.startswith("#"):
            group = head.removeprefix("## ")
            continue
        name, tests, *flags = (part.strip() for part in head.split("|"))
        old, new = ("\n".join(line[2:] for line in lines if line[0] == sign) for sign in "-+")
        found.append(Mutation(group, name, old, new, tuple(tests.split(" ; ")), "reference" in flags))
    return found


@functools.cache
def texts(folder: Path) -> dict[Path, str]:
    """What is in the Python files below a folder."""
    return {path.relative_to(folder): path.read_text() for path in folder.rglob("*.py")}


def place(mutation: Mutation) -> Path:
    """The one file that holds the snippet, relative to the source."""
    places = [path for path, text in texts(SOURCE).items() for _ in range(text.count(mutation.old))]
    if len(places) != 1:
        where = ", ".join(map(str, places)) or "nowhere"
        raise LookupError(f"{mutation.name!r}: expected its snippet once, found it in: {where}; it is\n{mutation.old}")
    return places[0]


def test_id(mutation: Mutation, test: str) -> str:
    """A test as pytest takes it, wherever its file lies below this folder."""
    name, _, function = test.partition("::")
    paths = [path for path in texts(TESTS) if path.name == name]
    if len(paths) != 1 or f"def {function.partition('[')[0]}(" not in texts(TESTS)[paths[0]]:
        raise LookupError(f"{mutation.name!r}: expected one file with the test {test}, found {len(paths)} of that name")
    return f"{(TESTS / paths[0]).relative_to(ROOT)}::{function}"


# -- runs -------------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A copy of the package, and the tests to run with it."""

    folder: Path
    tests: list[str]
    reference: bool


class _FirstFailure:
    """Notes the first test that fails; pytest calls it."""

    name = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid


def _run(run: Run) -> None:
    """Runs the tests and writes down how they went; ends in a process of its own."""
    with (run.folder / "log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(run.folder / "hypothesis")
    if run.reference:
        os.environ["TORCH_INFLUENCE_BACKEND"] = "reference"
    sys.dont_write_bytecode = True
    # The finder of an editable install would come before the path.
    sys.meta_path[:] = [finder for finder in sys.meta_path if PACKAGE not in getattr(finder, "__module__", "")]
    sys.path.insert(0, str(run.folder))

    def too_long(*_: object) -> None:
        raise TimeoutError(f"it takes more than {_LONGEST} s")

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(_LONGEST)
    first, start = _FirstFailure(), time.perf_counter()
    import pytest

    code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *run.tests], plugins=[first]))
    used = Path(sys.modules[PACKAGE].__file__ or "") if PACKAGE in sys.modules else None
    problem = ""
    if used != run.folder / PACKAGE / "__init__.py":
        problem = f"the tests ran with {used} and not with the copy"
    elif code not in (0, 1):
        problem = f"pytest ended with exit status {code}"
    answer = {"failed": first.name, "problem": problem, "seconds": time.perf_counter() - start}
    (run.folder / "answer").write_text(json.dumps(answer))


def outcomes(runs: Iterator[Run], jobs: int) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Runs them in processes forked from this one, which has imported what takes long; yields each as it ends."""
    fork = multiprocessing.get_context("fork")
    running: dict[Any, tuple[Any, Run]] = {}
    try:
        while True:
            for run in itertools.islice(runs, jobs - len(running)):
                process = fork.Process(target=_run, args=(run,))
                process.start()
                running[process.sentinel] = process, run
            if not running:
                return
            for sentinel in wait(list(running)):
                process, run = running.pop(sentinel)
                process.join()
                answer = run.folder / "answer"
                lost = {"failed": "", "problem": f"it died with exit status {process.exitcode}", "seconds": 0.0}
                yield run, json.loads(answer.read_text()) if answer.exists() else lost
    finally:
        for process, _ in running.values():
            process.terminate()
            process.join()


def copy_of_package(folder: Path) -> None:
    """Copies the source and links the native parts, wherever the installed package has them."""
    shutil.copytree(SOURCE, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    where = f"import importlib.util as u; print(u.find_spec('{PACKAGE}._C').origin)"
    found = subprocess.run([sys.executable, "-c", where], capture_output=True, text=True, cwd=folder, check=False)
    if found.returncode == 0:
        for path in Path(found.stdout.split()[-1]).parent.glob("*.so"):
            (folder / PACKAGE / path.name).symlink_to(path)
    else:
        (folder / PACKAGE / "_no_native.py").write_text('REASON = "it was not built"\n')
    compileall.compile_dir(folder / PACKAGE, quiet=1)


def mutated(mutation: Mutation, whole: Path, folder: Path) -> Run:
    """A copy of the package with the mutation in it."""
    shutil.copytree(whole / PACKAGE, folder / PACKAGE, symlinks=True)
    path = folder / PACKAGE / place(mutation)
    path.write_text(texts(SOURCE)[place(mutation)].replace(mutation.old, mutation.new))
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()
    return Run(folder, [test_id(mutation, test) for test in mutation.tests], mutation.reference)


def main() -> int:
    """Runs the mutations that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", metavar="NAME", default="", help="only mutations with this in their name or group")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    options = parser.parse_args()
    chosen = [m for m in mutations() if options.k in m.name or options.k in m.group]
    if not chosen:
        parser.error(f"-k: no mutation has {options.k!r} in its name")
    for mutation in chosen:
        place(mutation)
        for test in mutation.tests:
            test_id(mutation, test)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that it, too, leaves nothing behind
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    for module in ("torch", "pytest", "numpy", "scipy.sparse.linalg", "hypothesis"):
        importlib.import_module(module)

    start, lines, bad = time.perf_counter(), [], 0
    with tempfile.TemporaryDirectory(prefix="mutate-") as name:
        folder = Path(name)
        for number, reference in enumerate(sorted({m.reference for m in chosen})):
            whole = folder / f"whole-{number}"
            copy_of_package(whole)
            tests = {test_id(m, test): None for m in chosen if m.reference == reference for test in m.tests}
            for run, answer in outcomes(iter([Run(whole, list(tests), reference)]), 1):
                if answer["failed"] or answer["problem"]:
                    print((run.folder / "log").read_text()[-3000:])
                    print(f"without a mutation: {answer['problem'] or answer['failed'] + ' fails'}")
                    return 1
                print(f"{answer['seconds']:6.1f} s  {len(tests)} tests pass without a mutation", flush=True)
        by_folder = {folder / str(number): mutation for number, mutation in enumerate(chosen)}
        runs = (mutated(mutation, folder / "whole-0", where) for where, mutation in by_folder.items())
        for run, answer in outcomes(runs, options.jobs):
            mutation = by_folder[run.folder]
            caught = bool(answer["failed"]) and not answer["problem"]
            how = f"caught by {answer['failed'].split('/')[-1]}" if caught else answer["problem"] or "SURVIVED"
            if answer["problem"]:
                print((run.folder / "log").read_text()[-3000:])
            print(f"{answer['seconds']:6.1f} s  {mutation.name}: {how}", flush=True)
            lines.append((mutation, caught, answer["seconds"]))
            bad += not caught
            shutil.rmtree(run.folder)
    print(f"\n{'group':<44}{'mutations':>10}{'caught':>8}{'seconds':>9}")
    for group in dict.fromkeys(mutation.group for mutation in chosen):
        its = [line for line in lines if line[0].group == group]
        print(f"{group:<44}{len(its):>10}{sum(line[1] for line in its):>8}{sum(line[2] for line in its):>9.1f}")
    print(f"{'all':<44}{len(lines):>10}{len(lines) - bad:>8}{time.perf_counter() - start:>9.1f}")
    for mutation, caught, _ in lines:
        if not caught:
            print(f"not caught: {mutation.name}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

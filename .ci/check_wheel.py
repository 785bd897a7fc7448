"""Installs a wheel where there is no compiler, beside each torch that is named, and runs the quick tests there.

    python .ci/check_wheel.py dist                     # the wheels and the sdist in dist/
    python .ci/check_wheel.py dist --torch 2.10.0 2.13.0 --write docs/compatibility.md

Before that, the shared objects are audited (abi.py) and auditwheel says which platforms the wheel runs on. The tests
are those of the sdist, without its src/: what they import is what was installed. PyPI's torch comes with some 3 GB of
CUDA libraries, which nothing calls on a machine without a GPU: --stand-ins replaces them (cuda_stand_ins.py).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

import abi
import cuda_stand_ins
from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

QUICK_TESTS = [
    "tests/ops",
    "tests/modules/test_api.py",
    "tests/scores/test_closed_form.py",
    "tests/solvers/test_solvers.py",
]
TEST_REQUIREMENTS = ["pytest>=8", "pytest-xdist", "scipy"]
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc", "cmake", "ninja", "make")
BASIC_TOOLS = ("env", "sh", "uname", "ls", "cat", "rm", "mkdir")
BEGIN, END = "<!-- written by .ci/check_wheel.py -->", "<!-- end of what it wrote -->"
REPORT = """
import json, platform, torch, torch_influence
info = torch_influence.backend_info()
print(json.dumps(dict(python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda,
                      file=torch_influence.__file__, ops=info.ops, why=info.cpu, simd=info.simd_level)))
"""


class Environment:
    """A new virtual environment whose processes find its own programs, a few basic tools and no compiler."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder / "venv", with_pip=True)
        self.python = folder / "venv" / "bin" / "python"
        tools = folder / "tools"
        tools.mkdir()
        for tool in BASIC_TOOLS:
            found = shutil.which(tool)
            if found:
                (tools / tool).symlink_to(found)
        self.variables = {
            name: value
            for name, value in os.environ.items()
            if not re.match(r"(CC|CXX|CUDA\w*|PYTHON\w*|TORCH_\w+|VIRTUAL_ENV)$", name)
        }
        self.variables["PATH"] = f"{self.python.parent}:{tools}"
        self.refuse_compilers()

    def refuse_compilers(self) -> None:
        """Ends the run if anything on the path could compile: the test would prove nothing."""
        found = [path for name in COMPILERS if (path := shutil.which(name, path=self.variables["PATH"]))]
        if found:
            sys.exit(f"the environment has a compiler: {', '.join(found)}")

    def run(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs the environment's python."""
        return subprocess.run([self.python, *arguments], env=self.variables, text=True, check=False, **options)

    def pip(self, *arguments: str) -> None:
        """Installs binaries only; a RuntimeError says why not."""
        done = self.run("-m", "pip", "install", "-q", "--only-binary", ":all:", *arguments, capture_output=True)
        if done.returncode:
            raise RuntimeError(f"pip install {' '.join(arguments)}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")

    def install(self, wheel: Path, torch: str, options: list[str], stand_ins: Path | None) -> None:
        """Installs a wheel beside a torch, with stand-ins for its CUDA libraries if a folder for them is given."""
        if stand_ins is None:
            self.pip(f"torch=={torch}", *options)
            self.pip(str(wheel))
            return
        self.pip("--no-deps", f"torch=={torch}", str(wheel), *options)
        (packages,) = self.python.parents[1].glob("lib/python*/site-packages")
        for metadata in packages.glob("torch*-*.dist-info/METADATA"):
            self.pip(*cuda_stand_ins.requirements_without_cuda(metadata.read_text()))
        if cuda_stand_ins.build(packages / "torch" / "lib", stand_ins):
            self.variables["LD_LIBRARY_PATH"] = str(stand_ins)


def unpack_tests(sdist: Path, folder: Path) -> Path:
    """The sdist without its src/."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    shutil.rmtree(root / "src")
    return root


def counts(pytest_output: str) -> dict[str, int]:
    """The last line of pytest in numbers: passed, skipped, failed, errors."""
    found = re.findall(r"(\d+) (passed|skipped|failed|error)", pytest_output.strip().rpartition("\n")[2])
    return {"passed": 0, "skipped": 0, "failed": 0, "error": 0} | {name: int(number) for number, name in found}


def check(wheel: Path, sdist: Path, torch: str, pip_options: list[str], stand_ins: bool) -> dict[str, Any]:
    """One wheel with one torch: a row of the table, in which `problem` is empty if all is well."""
    native = not wheel.name.endswith("-none-any.whl")
    with tempfile.TemporaryDirectory(prefix="check-wheel-") as name:
        folder = Path(name)
        environment = Environment(folder)
        try:
            environment.install(wheel, torch, pip_options, folder / "stand-ins" if stand_ins else None)
            environment.pip(*TEST_REQUIREMENTS)
        except RuntimeError as error:
            return {"torch": torch, "wheel": wheel.name, "problem": str(error)}
        environment.refuse_compilers()
        said = environment.run("-c", REPORT, cwd=folder, capture_output=True)
        if said.returncode:
            return {"torch": torch, "wheel": wheel.name, "problem": said.stderr.strip()[-2000:]}
        row = json.loads(said.stdout.splitlines()[-1]) | {"wheel": wheel.name, "stand_ins": stand_ins}
        root = unpack_tests(sdist, folder / "tests")
        start = time.monotonic()
        done = environment.run(
            *("-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "-n", str(min(os.cpu_count() or 1, 8))),
            *QUICK_TESTS,
            cwd=root,
            capture_output=True,
        )
        row |= counts(done.stdout) | {"seconds": time.monotonic() - start}
        row["problem"] = ""
        if not row["file"].startswith(str(folder)):
            row["problem"] = f"the tests would import {row['file']}"
        elif native and not row["ops"]:
            row["problem"] = f"no native ops: {row['why']}"
        elif not native and (row["ops"] or "TORCH_INFLUENCE_NATIVE=OFF" not in row["why"]):
            row["problem"] = f"a pure-Python wheel that says: {row['ops'] or row['why']}"
        elif done.returncode or not row["passed"]:
            row["problem"] = done.stdout[-4000:] + done.stderr[-2000:]
        return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, with where and when."""
    libc = "".join(platform.libc_ver())
    wheels = ", ".join(sorted({row["wheel"] for row in rows}))
    lines = [
        f"{datetime.date.today()}, {platform.machine()}, {libc}, no GPU; {wheels}.",
        "",
        "| torch | CUDA of that torch | Python | native ops | passed | skipped | failed |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if "passed" not in row:
            lines.append(f"| {row['torch']} | | | not installed, or not imported | | | |")
            continue
        cuda = f"{row['cuda']}{', stand-ins' if row['stand_ins'] else ''}" if row["cuda"] else "none"
        native = f"{len(row['ops'])}, {row['simd']}" if row["ops"] else "none: pure Python"
        failed = row["failed"] + row["error"]
        lines.append(
            f"| {row['torch']} | {cuda} | {row['python']} | {native} | {row['passed']} | {row['skipped']} | {failed} |"
        )
    return "\n".join(lines)


def write(page: Path, rows: list[dict[str, Any]]) -> None:
    """Puts the table between the two marks of a page."""
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        sys.exit(f"{page} lacks the marks {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{after}")


def say_platform(wheel: Path) -> None:
    """What auditwheel finds: the platform tag that the wheel could bear."""
    if wheel.name.endswith("-none-any.whl"):
        return
    done = subprocess.run(
        [sys.executable, "-m", "auditwheel", "show", str(wheel)], capture_output=True, text=True, check=False
    )
    print(" ".join((done.stdout or done.stderr[-500:]).split()), flush=True)


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path, help="folder with one sdist and the wheels of one version")
    parser.add_argument("--torch", nargs="+", default=["2.13.0"], help="exact versions, one environment each")
    parser.add_argument("--pip", default="", help="options for installing torch: --pip='--index-url ... '")
    parser.add_argument(
        "--stand-ins", action="store_true", help="do without torch's CUDA libraries; needs a C compiler"
    )
    parser.add_argument("--write", type=Path, help="a page to put the table into")
    return parser.parse_args()


def main() -> int:
    """Audits, installs and tests; 1 if anything is wrong."""
    options = arguments()
    sdists = sorted(options.dist.glob("*.tar.gz"))
    if len(sdists) != 1:
        sys.exit(f"{options.dist}: expected one sdist, got {len(sdists)}; `make clean` removes those of other versions")
    here = set(sys_tags())
    wheels = [wheel for wheel in sorted(options.dist.glob("*.whl")) if parse_wheel_filename(wheel.name)[3] & here]
    if not wheels:
        sys.exit(f"no wheel in {options.dist} is for this Python on this machine")
    found = []
    for wheel in wheels:
        found += abi.audit(wheel)
        say_platform(wheel)
    rows = []
    for wheel in wheels:
        for torch in options.torch:
            row = check(wheel, sdists[0], torch, options.pip.split(), options.stand_ins)
            rows.append(row)
            print(table([row]).splitlines()[-1], f"{row.get('seconds', 0):.0f} s", flush=True)
            if row["problem"]:
                found.append(f"{wheel.name} with torch {torch}: {row['problem']}")
            if options.write:
                write(options.write, rows)
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

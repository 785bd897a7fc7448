"""The CUDA kernels as the compiler sees them: they fit into registers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
KERNELS = sorted(CSRC.glob("ops/*/*.cu"))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_no_kernel_spills_registers(source: Path, tmp_path: Path) -> None:
    command = ["nvcc", "-std=c++17", "-O3", "-arch=sm_90", "-Xptxas", "-v", "-cubin", "-I", str(CSRC), str(source)]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "kernels.cubin")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills, "nvcc says nothing of spills"
    assert all(pair == ("0", "0") for pair in spills), done.stderr

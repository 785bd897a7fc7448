"""The CUDA kernels as the compiler sees them: they fit into registers, and ask for enough of the memory at a time."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import kernels

CSRC = kernels.ROOT / "csrc"
SOURCES = kernels.sources(CSRC)

# Counted by hand in the sources: packs of 16 bytes, times the arrays that are read.
LOADED_AT_ONCE = {
    "step_kernel": 4 * 3 * 16,
    "dots_kernel": 4 * 2 * 16,
    "residual_kernel": 4 * 2 * 16,
    "iterate_kernel": 2 * 3 * 16,
    "add_kernel": 4 * 2 * 16,
    "sums_kernel": 4 * 3 * 16,  # with b
}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels_are_good_on_paper(source: Path) -> None:
    compiled = kernels.compiled(source, CSRC)
    assert compiled
    for kernel in compiled:
        assert set(kernel.registers) == set(kernel.loads) == set(kernels.PROCESSORS)
        if kernel.name in LOADED_AT_ONCE and kernel.arguments[:2] == ["float", "true"]:
            assert kernel.batch[90] == LOADED_AT_ONCE[kernel.name], kernel.title
    faults = [f"{k.title} <{', '.join(k.arguments)}> {f}" for k in compiled for f in k.faults() + k.store_faults()]
    assert faults == []


def test_the_page_is_up_to_date() -> None:
    page = kernels.PAGE.read_text()
    assert f"`{kernels.digest()}`" in page, "run: python benchmarks/kernels.py --write"


def test_grad_dot_spreads_a_long_sum_over_all_multiprocessors() -> None:
    groups, bits = kernels.grad_dot_groups(examples=1, positions=512, k=1, o=3072, wide=4)
    assert groups / (32 >> bits) / 8 >= kernels.PROCESSORS[90]

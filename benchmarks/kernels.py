"""What nvcc makes of the CUDA kernels, and what that means for their speed on paper. Nothing is timed.

    python benchmarks/kernels.py [--csrc PATH] [--before PATH] [--write]

prints the tables of docs/kernels.md; --write puts them there. --csrc names the sources of another checkout, --before
those to compare with (its table stays as it is without).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "kernels.md"
SIZES = {"double": 8, "float": 4, "Half": 2, "BFloat16": 2}
SHARED_KIB = {80: 164, 90: 228, 100: 228}  # of a multiprocessor
PROCESSORS = {80: 108, 90: 132, 100: 148}
COUNTS = {"1M": 1 << 20, "16M": 1 << 24, "256M": 1 << 28}
ENOUGH_KIB = 40  # in flight on a multiprocessor of an H100: 3.35 TB/s at a latency of 1.6 microseconds
# sm_90 from the PTX of compute_80: nvcc 13.0 makes the same for compute_90, but for the line that names the target.
TARGETS = ["-gencode", "arch=compute_80,code=[sm_80,sm_90]", "-gencode", "arch=compute_100,code=sm_100"]


@dataclasses.dataclass(frozen=True)
class About:
    """What a kernel's sources say and its code doesn't."""

    # Moved per element at k = 1, by the sizes of T and of Wide<T>: from the comment above the kernel.
    bytes: Callable[[int, int], int]
    written: int = 0  # rows
    small: str = ""  # the reason why it needn't keep the memory busy


ABOUT = {
    "add_kernel": About(lambda t, w: 3 * w, 1),
    "dots_kernel": About(lambda t, w: 2 * t),
    "residual_kernel": About(lambda t, w: 3 * t, 1),
    "residual_kernel, with x": About(lambda t, w: 6 * t, 2),
    "settle_kernel": About(lambda t, w: 8, small="reads 8 bytes for 16 KiB of a row"),
    "iterate_kernel": About(lambda t, w: 5 * t, 2),
    "rho_kernel": About(lambda t, w: 2 * t),
    "turn_kernel": About(lambda t, w: 3 * t, 1),
    "sums_kernel": About(lambda t, w: w + t),
    "parts_kernel": About(lambda t, w: w, small="reads one number for each group of sums_kernel"),
    "step_kernel": About(lambda t, w: 4 * t, 1),
    "norms_kernel": About(lambda t, w: 8, small="reads 8 bytes for 16 KiB of a row"),
    "short_rows_kernel": About(lambda t, w: 3 * t, 1),
    "rows_kernel": About(lambda t, w: 3 * t, 1),
}


@dataclasses.dataclass
class Kernel:
    """A kernel as compiled: registers and shared memory by architecture, the rest by the PTX they are made from."""

    name: str
    arguments: list[str]
    registers: dict[int, int] = dataclasses.field(default_factory=dict)
    shared: dict[int, int] = dataclasses.field(default_factory=dict)
    spills: dict[int, int] = dataclasses.field(default_factory=dict)
    threads: int = 0
    batch: dict[int, int] = dataclasses.field(default_factory=dict)  # bytes that a thread loads before it uses any
    loads: dict[int, list[int]] = dataclasses.field(default_factory=dict)  # bytes of each instruction
    stores: dict[int, list[int]] = dataclasses.field(default_factory=dict)

    @property
    def dtype(self) -> str:
        return self.arguments[0] if self.arguments else "double"

    @property
    def aligned(self) -> bool | None:
        """None where it moves single numbers. (Older sources had a number of elements in the place of `aligned`.)"""
        second = self.arguments[1] if len(self.arguments) > 1 else None
        return None if second is None else second in ("true", str(16 // SIZES[self.dtype]))

    @property
    def about(self) -> About:
        with_x = self.name == "residual_kernel" and self.arguments[2] == "true"
        return ABOUT[f"{self.name}, with x" if with_x else self.name]

    @property
    def title(self) -> str:
        if self.name == "residual_kernel":
            return self.name + (", with x" if self.arguments[2] == "true" else "")
        if self.name == "rows_kernel":
            group, kept, *_ = self.arguments[2:]
            return f"rows_kernel, {group} threads, {kept} kept" + (" and more" if self.arguments[4] == "true" else "")
        return self.name

    def blocks(self, arch: int) -> int:
        """Returns the blocks that a multiprocessor holds, by registers, threads and shared memory."""
        per_warp = -(-self.registers[arch] * 32 // 256) * 256
        warps = min(64, 65536 // per_warp // 4 * 4)  # a quarter of the multiprocessor has a quarter of the registers
        return min(32, warps * 32 // self.threads, SHARED_KIB[arch] * 1024 // (self.shared[arch] + 1024))

    def in_flight(self, arch: int) -> float:
        """Returns the KiB that a full multiprocessor asks the memory for before it uses any."""
        return self.batch[arch] * self.threads * self.blocks(arch) / 1024

    def faults(self) -> list[str]:
        """Says where the kernel spills, or keeps too little in flight without a reason."""
        found = [f"spills {spills} bytes on sm_{arch}" for arch, spills in self.spills.items() if spills]
        if self.aligned and self.in_flight(90) < ENOUGH_KIB:
            found.append(f"has {self.in_flight(90):.0f} KiB in flight on sm_90, not {ENOUGH_KIB}")
        if self.aligned is None and not self.about.small and self.in_flight(90) < ENOUGH_KIB:
            found.append("has little in flight, and ABOUT gives no reason")
        for arch in self.loads if self.aligned else ():
            if 16 not in self.loads[arch]:
                found.append(f"has no 16-byte load on sm_{arch}")
        return found

    def store_faults(self) -> list[str]:
        """Says where an aligned kernel stores its rows in less than 16 bytes.

        What is left of a row beyond its packs is stored element by element, once for each row written, and sums
        have 8 bytes, so no more may be narrower. softmax_curvature's rows end at a pack and have nothing left.
        """
        found = []
        for arch, stores in self.stores.items() if self.aligned and self.about.written else ():
            left = 0 if self.name.endswith("rows_kernel") else self.about.written
            narrow = [size for size in stores if size < 16 and (size != 8 or not left)]
            if 16 not in stores or len(narrow) > left:
                found.append(f"has {stores.count(16)} 16-byte stores and {len(narrow)} of less on sm_{arch}")
        return found


# ---- what nvcc says ----


def demangled(symbol: str) -> tuple[str, list[str]]:
    text = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    match = re.search(r"::(\w+)(?:<(.*?)>)?\(", text)
    assert match, text
    return match[1], [a.split("::")[-1] for a in (match[2] or "").split(", ") if a]


def accesses(body: str, operation: str) -> list[int]:
    """Returns the bytes that each of a kernel's instructions moves between a thread and the memory."""
    pattern = rf"\b{operation}\.global(?:\.(?:nc|wb|L\w+))*(?:\.v(\d))?\.[a-z]+(\d+)\s"
    return [int(number or 1) * int(bits) // 8 for number, bits in re.findall(pattern, body)]


def widest_batch(body: str) -> int:
    """Returns the most bytes that a thread loads from memory before it uses any of them.

    Follows the text of the PTX. A batch ends where an instruction other than a move reads a loaded register, at a
    store, a barrier, a shuffle, a jump back (a loop) or one that is always taken. What branches forward only skips what
    a row lacks.
    """
    registers, labels = re.compile(r"%[a-z]+\d+"), set()
    loaded: set[str] = set()
    total = widest = 0
    for line in body.splitlines():
        line = re.sub(r"^\{?\s*(?:@!?%p\d+\s+)?", "", line.strip())  # {...}: assembly of cuda_fp16.h
        if label := re.match(r"(\$\w+):", line):
            labels.add(label[1])
            continue
        operation, operands = [*line.split(maxsplit=1), "", ""][:2]
        if not operation or operation[0] in ".}(/":
            continue
        destination = re.match(r"\s*(\{[^}]*\}|[^,;]+)", operands)
        into = set(registers.findall(destination[1])) if destination and not operation.startswith("st.") else set()
        from_ = set(registers.findall(operands[destination.end() :] if into and destination else operands))
        jumps = operation.startswith("bra") and (operation == "bra.uni" or operands.strip(" ;") in labels)
        if operation.startswith("mov") and from_ & loaded:
            loaded |= into  # two names for what is loaded
        elif from_ & loaded or jumps or operation.startswith(("st.global", "bar.", "barrier.", "shfl.", "ret")):
            loaded, total = set(), 0
        if operation.startswith("ld.global"):
            loaded |= into
            total += accesses(line, "ld")[0]
            widest = max(widest, total)
    return widest


def compiled(source: Path, csrc: Path) -> list[Kernel]:
    """Compiles a source for all architectures and reads what ptxas prints and the PTX in between."""
    found: dict[str, Kernel] = {}
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", *TARGETS, "-Xptxas", "-v", "-fatbin", "-I", str(csrc), str(source)]
        command += ["--keep", "--keep-dir", folder, "-o", f"{folder}/kernels.fatbin"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        report = re.compile(
            r"entry function '(?P<symbol>\w+)' for 'sm_(?P<arch>\d+)'.*?"
            r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
            r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
            re.DOTALL,
        )
        for match in report.finditer(done.stderr):
            kernel = found.setdefault(match["symbol"], Kernel(*demangled(match["symbol"])))
            arch, shared = int(match["arch"]), re.search(r"(\d+) bytes smem", match["rest"])
            kernel.registers[arch] = int(match["registers"])
            kernel.spills[arch] = int(match["stores"]) + int(match["loads"])
            kernel.shared[arch] = int(shared[1]) if shared else 0
        for virtual, archs in {80: (80, 90), 100: (100,)}.items():
            text = (Path(folder) / f"{source.stem}.compute_{virtual}.ptx").read_text()
            for match in re.finditer(r"^(?:\.visible )?\.entry (\w+)\((.*?)^\}", text, re.DOTALL | re.MULTILINE):
                kernel, body = found[match[1]], match[2]
                threads = re.search(r"\.maxntid (\d+)", body)
                kernel.threads = int(threads[1]) if threads else 1024
                for arch in archs:
                    kernel.loads[arch], kernel.stores[arch] = accesses(body, "ld"), accesses(body, "st")
                    kernel.batch[arch] = widest_batch(body)
    dtypes = list(SIZES)
    return sorted(found.values(), key=lambda k: (k.title, dtypes.index(k.dtype), k.arguments))


def sources(csrc: Path) -> list[Path]:
    return sorted(csrc.rglob("*.cu"))


def all_compiled(csrc: Path) -> dict[str, list[Kernel]]:
    with ThreadPoolExecutor(2) as pool:
        return dict(
            zip((s.stem for s in sources(csrc)), pool.map(lambda s: compiled(s, csrc), sources(csrc)), strict=True)
        )


# ---- how many blocks a launch has: the formulas of the .cu files once more ----


def ratio(a: int, b: int) -> int:
    return -(-a // b)


def grad_dot_groups(examples: int, positions: int, k: int, o: int, wide: int) -> tuple[int, int]:
    """Mirrors split_of: returns the groups of lanes, and the bits of a group's size."""
    width, bits, at_once, enough = 16 // wide, 0, 4, 8192
    while bits < 5 and (2 * width) << bits <= o:
        bits += 1
    vectors = 1 if k < at_once else at_once
    vector_groups = ratio(k, vectors)
    wanted = ratio(enough, examples * vector_groups)
    of_group = ratio(ratio(positions, min(wanted, positions)), at_once // vectors) * (at_once // vectors)
    position_parts = ratio(positions, of_group)
    steps = ratio(o, width << bits)
    outputs = ratio(steps, min(ratio(wanted, position_parts), ratio(steps, 2))) * (width << bits)
    return examples * vector_groups * position_parts * ratio(o, outputs), bits


def grid(kernel: Kernel, count: int) -> int:
    """Returns the blocks for `count` elements at k = 1; grad_dot's have 512 positions of 1024 outputs to an example."""
    size = SIZES[kernel.dtype]
    width, columns = 16 // size, 4 * 256 * 16 // size
    if kernel.name == "sums_kernel":
        groups, bits = grad_dot_groups(ratio(count, 512 * 1024), 512, 1, 1024, max(size, 4))
        return ratio(ratio(groups, 32 >> bits), 8)
    if kernel.name == "short_rows_kernel":  # of 32 elements
        return ratio(count // 32, columns // 32 // width * width)
    if kernel.name == "rows_kernel":  # of the longest that are kept, or twice the longest of all
        group, kept = int(kernel.arguments[2]), int(kernel.arguments[3])
        longest = group * kept * width * (4 if kernel.arguments[4] == "true" else 1)
        return ratio(ratio(count, longest), 8 if group == 32 else 1)
    if kernel.name in ("add_kernel", "step_kernel"):
        return ratio(count, columns)
    return ratio(count, max(1, ratio(count, 1024 * columns)) * columns)  # cg_step's columns_of


# ---- the page ----


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_arch(values: dict[int, int] | Callable[[int], float]) -> str:
    """Returns a value for each architecture, or one where they agree."""
    texts = [f"{values[a] if isinstance(values, dict) else values(a):.0f}" for a in PROCESSORS]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def kinds(accesses: dict[int, list[int]], archs: tuple[int, ...] = (90, 100)) -> str:
    """Returns the number of instructions that move 16 bytes and that of others; sm_80 is as sm_90."""
    texts = [f"{accesses[a].count(16)} + {len(accesses[a]) - accesses[a].count(16)}" for a in archs]
    return texts[0] if len(set(texts)) == 1 else ", ".join(texts)


def line(op: str, k: Kernel) -> list[str]:
    size = SIZES[k.dtype]
    reason = k.about.small or ("" if k.in_flight(90) >= ENOUGH_KIB else "moves elements one by one")
    cells = [f"{op}: {k.title}", k.dtype if k.arguments else "", str(k.about.bytes(size, max(size, 4)))]
    cells += [by_arch(k.registers), by_arch(k.shared), by_arch(k.spills), by_arch(k.blocks)]
    cells += [by_arch(lambda a: 100 * k.blocks(a) * k.threads / 2048), by_arch(k.batch), by_arch(k.in_flight)]
    return [*cells, kinds(k.loads), kinds(k.stores), reason if k.in_flight(90) < ENOUGH_KIB else ""]


HEAD = ["Kernel", "T", "B/element", "Registers", "Shared, B", "Spills", "Blocks/SM", "Occupancy, %", "B/thread at once"]
HEAD += ["KiB in flight", "Loads", "Stores", f"Why less than {ENOUGH_KIB} KiB"]


def waves(op: str, k: Kernel) -> list[str]:
    cells = [
        " / ".join(f"{grid(k, n) / (k.blocks(arch) * PROCESSORS[arch]):.2g}" for n in COUNTS.values())
        for arch in PROCESSORS
    ]
    return [f"{op}: {k.title}", k.dtype, " / ".join(str(grid(k, n)) for n in COUNTS.values()), *cells]


def tables(by_op: dict[str, list[Kernel]]) -> dict[str, str]:
    """Returns what stands between each pair of markers of the page."""
    every = [(op, k) for op, kernels in by_op.items() for k in kernels]
    names = list(COUNTS)
    new = grad_dot_groups(1, 512, 1, 3072, 4)
    warps = ratio(new[0], 32 >> new[1])
    return {
        "aligned": table(HEAD, [line(op, k) for op, k in every if k.aligned is not False]),
        "unaligned": table(HEAD, [line(op, k) for op, k in every if k.aligned is False]),
        "waves": table(
            ["Kernel", "T", f"Blocks at {' / '.join(names)}", *(f"Waves on sm_{a}" for a in PROCESSORS)],
            [waves(op, k) for op, k in every if k.aligned],
        ),
        "grad_dot": table(
            ["", "Blocks", "Warps at work"],
            [["before", "1", "1"], ["now", str(ratio(warps, 8)), str(warps)]],
        ),
    }


def comparison(before: dict[str, list[Kernel]], now: dict[str, list[Kernel]]) -> str:
    """Returns the key numbers of the float kernels that move rows, on sm_90, of two states of the sources."""

    def lines(when: str, by_op: dict[str, list[Kernel]]) -> list[list[str]]:
        def use(k: Kernel) -> bool:
            return k.dtype == "float" and k.name in ABOUT and not k.about.small and k.aligned is not False

        return [
            [
                *(f"{op}: {k.title}", when, str(k.registers[90]), str(k.blocks(90)), str(k.batch[90])),
                *(f"{k.in_flight(90):.0f}", kinds(k.loads, (90,)), kinds(k.stores, (90,))),
            ]
            for op, kernels in by_op.items()
            for k in kernels
            if use(k)
        ]

    head = ["Kernel (float, sm_90)", "When", "Registers", "Blocks/SM", "B/thread at once"]
    head += ["KiB in flight", "Loads", "Stores"]
    rows = lines("before", before) + lines("now", now)
    return table(head, sorted(rows, key=lambda row: (row[0].split(",")[0], row[1], row[0])))


@functools.cache
def digest(csrc: Path = ROOT / "csrc") -> str:
    """Returns a hash of all that the tables depend on, but for nvcc."""
    files = sorted(f for suffix in ("*.cu", "*.cuh", "*.h") for f in csrc.rglob(suffix))
    return hashlib.sha256(b"".join(f.read_bytes() for f in [*files, Path(__file__)])).hexdigest()[:16]


def filled(page: str, sections: dict[str, str]) -> str:
    for name, text in sections.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        page, found = pattern.subn(lambda _, new=f"{begin}\n{text}\n\n{end}": new, page)
        assert found == 1, f"the page has no place for {name}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csrc", type=Path, default=ROOT / "csrc", help="sources to compile")
    parser.add_argument("--before", type=Path, help="sources to compare with")
    parser.add_argument("--write", action="store_true", help=f"write the tables into {PAGE.relative_to(ROOT)}")
    asked = parser.parse_args()
    by_op = all_compiled(asked.csrc)
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    made = f"Made by nvcc {version.split(' V')[-1].split()[0]} from sources whose hash is `{digest(asked.csrc)}`."
    sections = {"made": made, **tables(by_op)}
    if asked.before:
        sections["before"] = comparison(all_compiled(asked.before), by_op)
    if asked.write:
        PAGE.write_text(filled(PAGE.read_text(), sections))
    else:
        print("\n\n".join(f"{name}\n\n{text}" for name, text in sections.items()))
    for op, kernels in by_op.items():
        for kernel in kernels:
            for fault in kernel.faults() + kernel.store_faults():
                print(f"{op}: {kernel.title} <{', '.join(kernel.arguments)}> {fault}", file=sys.stderr)


if __name__ == "__main__":
    main()

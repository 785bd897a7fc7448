"""Changes the kernels in ways that are wrong on a GPU, one at a time, and expects the emulator to notice each.

    make emulate-mutate                                    # all of them, and the table of docs/emulator.md: minutes
    .venv/bin/python tests/cuda_on_cpu/mutate.py -k shuffle    # those with this in their names

Works on a copy of csrc in build/emulator. A change that nothing notices is a finding about the emulator or about the tests.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import run

PAGE = run.ROOT / "docs" / "emulator.md"
BEGIN, END = "<!-- mutations: begin -->", "<!-- mutations: end -->"
LAUNCH, CG = "common/launch.cuh", "ops/cg_step/cg_step.cu"
SOFTMAX, GRAD_DOT = "ops/softmax_curvature/softmax_curvature.cu", "ops/grad_dot/grad_dot.cu"
LISSA, ADD = "ops/lissa_step/lissa_step.cu", "common/add_rows.cu"
PLAIN, ADDRESS, THREAD = "ON", "ADDRESS", "THREAD"
NAMES = {PLAIN: "plain", ADDRESS: "address, undefined", THREAD: "thread"}


class Mutation(NamedTuple):
    """One change of the sources, what a GPU would make of it, and the tests and builds that should fail with it."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    builds: tuple[str, ...]
    turns_twice: bool = False  # whether it takes a grid that is cut down


def equal(op: str, *shapes: str, dtype: str = "float32") -> str:
    return f"test_native_equals_reference and {op}-{dtype} and ({' or '.join(f'-{shape}-cpu' for shape in shapes)})"


def layouts(op: str) -> str:
    return f"test_any_memory_layout and ({op}-float32 or {op}-float16)"


SYNC = "    __syncthreads();\n"
MUTATIONS = [
    Mutation("sums: no barrier before what warps left is read", LAUNCH, f"{SYNC}#pragma unroll\n    for (int i = 0; i < count; ++i) {{\n      value[i] = warp", "#pragma unroll\n    for (int i = 0; i < count; ++i) {\n      value[i] = warp", equal("cg_step", "usual", "odd"), (PLAIN, THREAD)),
    Mutation("sums: no barrier before it is written again", LAUNCH, "    __syncthreads();  // warp_sums may be written again\n", "", equal("cg_step", "usual", "odd", "many_short"), (PLAIN, THREAD), True),
    Mutation("sums: the first shuffle reaches 8 lanes, not 16", LAUNCH, "int offset = kWarp / 2; offset > 0; offset /= 2) {", "int offset = kWarp / 4; offset > 0; offset /= 2) {", equal("lissa_step", "usual"), (PLAIN,)),
    Mutation("sums: one warp too many", LAUNCH, "warp < group / kWarp; ++warp", "warp <= group / kWarp; ++warp", equal("lissa_step", "usual"), (PLAIN, ADDRESS)),
    Mutation("sums: the mask of half a warp", LAUNCH, "kAllLanes = 0xffffffffu", "kAllLanes = 0x0000ffffu", equal("softmax_curvature", "usual"), (PLAIN,)),
    Mutation("packs: 8 bytes are alignment enough", LAUNCH, "% (width * sizeof(T)) == 0 &&", "% 8 == 0 &&", layouts("lissa_step"), (ADDRESS,)),
    Mutation("packs: strides are not looked at", LAUNCH, " && (rows == 1 || stride % width == 0)", "", layouts("lissa_step"), (ADDRESS,)),
    Mutation("packs: beyond the end of a row is loaded", LAUNCH, "if (e < count) pack.element[e] = pointer[e];", "pack.element[e] = pointer[e];", equal("softmax_curvature", "odd_lanes"), (ADDRESS,)),
    Mutation("packs: beyond the end of a row is stored", LAUNCH, "if (e < count) pointer[e] = pack.element[e];", "pointer[e] = pack.element[e];", equal("softmax_curvature", "odd_lanes"), (PLAIN, ADDRESS)),
    Mutation("columns: the last pack is taken as whole", LAUNCH, "whole = columns.count / width * width", "whole = (columns.count + width - 1) / width * width", equal("lissa_step", "odd", "one_row"), (PLAIN, ADDRESS)),
    Mutation("columns: one beyond the row", LAUNCH, "left < columns.count", "left <= columns.count", equal("lissa_step", "odd"), (PLAIN, ADDRESS)),
    Mutation("a grid of more rows than there may be", LAUNCH, "grid_limits::most_blocks_y()", "int64_t(1) << 31", equal("cg_step", "rows_beyond_a_grid"), (PLAIN,)),
    Mutation("cg: a scalar that another block writes is read", CG, "cg_beta<Wide<T>>(residual, plan.rho_before)", "cg_beta<Wide<T>>(residual, cg_scalar(s, kRho, row))", equal("cg_step", "usual", "many"), (PLAIN, THREAD)),
    Mutation("cg: every block counts the iteration", CG, "if (blockIdx.x == 0 && threadIdx.x == 0) cg_record_dots", "if (threadIdx.x == 0) cg_record_dots", equal("cg_step", "many"), (PLAIN, THREAD)),
    Mutation("cg: a barrier that half of the block comes to", CG, "  group_sums<kThreads>(sums);", "  if (threadIdx.x < 128) group_sums<kThreads>(sums);", equal("cg_step", "usual"), (PLAIN,)),
    Mutation("cg: one part too many", CG, "i < blocks; i += kThreads", "i <= blocks; i += kThreads", equal("cg_step", "many", "long_move"), (PLAIN,)),
    Mutation("cg: a row that is done gets a direction", CG, "done ? p : cg_direction", "cg_direction", equal("cg_step", "usual"), (PLAIN,)),
    Mutation("cg: more scratch is used than there is", CG, "return k * (3 + 4 * blocks_of", "return k * (3 + 3 * blocks_of", equal("cg_step", "many"), (ADDRESS,)),
    Mutation("short rows: no barrier before the means", SOFTMAX, f"{SYNC}\n    // All threads take", "    // All threads take", equal("softmax_curvature", "usual"), (PLAIN, THREAD)),
    Mutation("short rows: no barrier after the means", SOFTMAX, f"products[row * c] = sum;\n    }}\n{SYNC}", "products[row * c] = sum;\n    }\n", equal("softmax_curvature", "usual"), (PLAIN, THREAD)),
    Mutation("short rows: no barrier before the next tangent", SOFTMAX, f"t_pack[i], size - first);\n    }}\n{SYNC}", "t_pack[i], size - first);\n    }\n", equal("softmax_curvature", "many_examples"), (PLAIN, THREAD), True),
    Mutation("short rows: lanes without a row skip the shuffle", SOFTMAX, "for (int offset = group / 2;", "if (row < rows) for (int offset = group / 2;", equal("softmax_curvature", "usual", "odd"), (PLAIN,)),
    Mutation("short rows: tiles begin within a pack", SOFTMAX, "kTile<T> / s.c / kWidest<T> * kWidest<T>", "kTile<T> / s.c", equal("softmax_curvature", "aligned_tiles"), (ADDRESS,)),
    Mutation("rows: a group without a row leaves its warp", SOFTMAX, "    const int64_t c = row < rows ? s.c : 0;\n", "    if (row >= rows) break;\n    const int64_t c = s.c;\n", equal("softmax_curvature", "lanes", "odd_lanes"), (PLAIN,)),
    Mutation("rows: one column beyond", SOFTMAX, "if (column < kept_columns) finish", "if (column <= kept_columns) finish", equal("softmax_curvature", "packs", "lanes"), (ADDRESS,)),
    Mutation("grad dot: lanes leave a warp one by one", GRAD_DOT, "first < split.groups; first +=", "first + (threadIdx.x % kWarp >> split.bits) < split.groups; first +=", equal("grad_dot", "usual", "odd"), (PLAIN,)),
    Mutation("grad dot: parts are written over each other", GRAD_DOT, "* split.parts + of_parts.remainder] = sum[i]", "* split.parts] = sum[i]", equal("grad_dot", "one_sequence"), (PLAIN, THREAD)),
    Mutation("grad dot: outputs of the next position", GRAD_DOT, "first_output + split.outputs < s.o ? first_output + split.outputs : s.o", "first_output + split.outputs", equal("grad_dot", "one_sequence"), (PLAIN,)),
    Mutation("lissa: one part too many", LISSA, "i < blocks; i += kThreads", "i <= blocks; i += kThreads", equal("lissa_step", "many"), (PLAIN, ADDRESS)),
    Mutation("lissa: rows beyond the grid are left out", LISSA, "row < p.k; row += gridDim.y", "row < p.k; row += p.k", equal("lissa_step", "many"), (PLAIN,), True),
    Mutation("sum of rows: rows without what lies between", ADD, "static_cast<W*>(s.to) + row * s.to_stride", "static_cast<W*>(s.to) + row * s.columns", equal("linear_curvature_product", "tiles_with_bias"), (PLAIN,)),
]  # fmt: skip


def changed_copy(folder: Path, mutation: Mutation) -> None:
    """Makes the folder a copy of csrc with this change; files that stay the same keep their times, for the build."""
    wanted = {path.relative_to(run.CSRC): path.read_text() for path in run.CSRC.rglob("*") if path.is_file()}
    text = wanted[Path(mutation.file)]
    if text.count(mutation.old) < 1:
        sys.exit(f"{mutation.name}: {mutation.file} has no {mutation.old!r} any more; renew the mutation")
    wanted[Path(mutation.file)] = text.replace(mutation.old, mutation.new)
    # Two element types are enough, and half as long to compile.
    element = Path("common/element.h")
    wanted[element] = re.sub(r"    case DType::(float64|bfloat16): return f.*\n", "", wanted[element])
    for path, content in wanted.items():
        if not (folder / path).exists() or (folder / path).read_text() != content:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(content)


def outcome(mutation: Mutation, kind: str, work: Path) -> str:
    """How a build noticed the change, in a few words; empty if it did not."""
    changed_copy(work / "csrc", mutation)
    library = run.build(kind, work / "csrc", work / kind.lower())
    cut = {"EMULATOR_GRID": "2,1"} if mutation.turns_twice else {}
    for seed in ("1", "2", "3"):  # some orders show nothing
        passed, _, said = run.run_tests(library, kind, mutation.tests, 1, "test_contract.py", EMULATOR_SEED=seed, **cut)
        if passed is None:
            sys.exit(f"{mutation.name}: no test is selected by {mutation.tests!r}")
        if not passed:
            return reason(said)
    return ""


def reason(said: str) -> str:
    """What of all that pytest, the emulator or a sanitizer said names the fault."""
    for pattern, words in (
        (r"ThreadSanitizer: data race", "data race"),
        (r"AddressSanitizer: ([\w-]+)", None),
        (r"runtime error: (load|store|reference|member|index)[^\n]*(misaligned|out of bounds)", None),
        (r"runtime error: ([^\n]{0,60})", None),
        (r"threads wait at different barriers|lanes of a warp meet in different shuffles|deadlock", None),
        (r"a (?:shuffle|barrier) at [^\n]*?(lacks the lane|after a thread has ended)", None),
        (r"a thread ends while others wait", None),
        (r"invalid configuration argument", None),
        (r"beyond the bound|assert torch.equal", "wrong numbers"),
    ):
        if found := re.search(pattern, said):
            return words or (found[2] if found.re.groups == 2 else found[1] if found.re.groups else found[0])
    sys.exit(f"the tests fail for a reason that has nothing to do with the change:\n{said[-4000:]}")


def markdown(found: list[tuple[Mutation, dict[str, str]]]) -> str:
    lines = ["| change | " + " | ".join(NAMES.values()) + " |", "|---|---|---|---|"]
    for mutation, outcomes in found:
        cells = [
            ("**missed**" if outcomes[kind] == "" else outcomes[kind]) if kind in outcomes else "" for kind in NAMES
        ]
        lines.append(f"| {mutation.name} | " + " | ".join(cells) + " |")
    caught = sum(any(outcomes.values()) for _, outcomes in found)
    lines += ["", f"{caught} of {len(found)} noticed. Empty: not tried, since that build is not the one to see it."]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", default="", help="only mutations with this in their names")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    options = parser.parse_args()
    work = run.ROOT / "build" / "emulator" / "mutants"
    chosen = [mutation for mutation in MUTATIONS if options.k in mutation.name]
    outcomes: dict[str, dict[str, str]] = {mutation.name: {} for mutation in chosen}
    for kind in NAMES:  # build by build, since a change of kind would compile everything again
        for mutation in chosen:
            if kind in mutation.builds:
                outcomes[mutation.name][kind] = outcome(mutation, kind, work)
                print(f"{NAMES[kind]:<20} {outcomes[mutation.name][kind] or 'MISSED':<45} {mutation.name}", flush=True)
    shutil.rmtree(work)
    found = [(mutation, outcomes[mutation.name]) for mutation in chosen]
    if options.write:
        page = PAGE.read_text()
        before, rest = page.split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{markdown(found)}\n{END}{rest.split(END)[1]}")
    missed = [f"{mutation.name} ({NAMES[kind]})" for mutation, of in found for kind, how in of.items() if not how]
    print(f"{len(found)} changes, {len(missed)} missed", *missed, sep="\n  ")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())

"""What a folder of results comes to: the summary that `make bench` ends with, pictures, and README's section on speed.

    python benchmarks/report.py FOLDER [--readme README.md]

Reads the JSON that the other benchmarks have written; runs nothing. Writes summary.md, ops.md, roofline.png and
speedups.png beside it. With --readme the text between README's two marks of the section is replaced.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import harness

Record = dict[str, Any]

BEGIN = "<!-- speed: written by benchmarks/report.py from {folder}; a test compares them -->"
END = "<!-- end of speed -->"

CLOSE = 0.01  # relative error, up to which another package's scores count as the exact ones
OLD = "0.1.0"  # what the baseline is called


@dataclass(frozen=True)
class Table:
    """A heading, what its columns need to be understood, and cells that are already text."""

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        return f"**{self.title}.** {self.note}\n\n{harness.markdown(self.header, self.rows)}\n"

    def text(self) -> str:
        """In aligned columns: the first ones of words to the left, those of numbers to the right."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        numbers = [any(row[i][:1].isdigit() for row in self.rows) and i > 0 for i in range(len(self.header))]

        def line(cells: Sequence[str]) -> str:
            padded = (
                cell.rjust(width) if number else cell.ljust(width)
                for cell, width, number in zip(cells, widths, numbers, strict=True)
            )
            return "  " + "  ".join(padded).rstrip()

        heading = textwrap.fill(f"{self.title}. {self.note}", 110)
        return "\n".join([heading, "", *(line(cells) for cells in lines)]) + "\n"


# -- reading ---------------------------------------------------------------------------------------------------------


def read(folder: Path) -> dict[str, Record]:
    """The records of a folder by their file names, the ops' first."""
    records = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if not any(name in records for name in ("end_to_end", *(n for n in records if n.startswith("bench_")))):
        raise SystemExit(f"{folder}: expected results of benchmarks (bench_*.json, end_to_end.json), found none")
    return records


def ops(records: dict[str, Record]) -> list[Record]:
    """The records of ops."""
    return [record for name, record in records.items() if name.startswith("bench_")]


def best(rows: list[Record], kind: str) -> Record:
    """The fastest of the native variants, or of those in torch."""
    return min((row for row in rows if row["kind"] == kind), key=lambda row: row["median"])


def against_torch(size: Record) -> float:
    """How many times faster the native op is than the fastest way found in torch."""
    return best(size["rows"], "torch")["median"] / best(size["rows"], "native")["median"]


# -- tables ----------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    if seconds < 1e-3:
        return f"{1e6 * seconds:.3g} µs"
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"


def times(ratio: float) -> str:
    """A ratio of times: 0.83x, 4.5x, 31x, 7160x."""
    return f"{ratio:.2f}x" if ratio < 1 else f"{ratio:.1f}x" if ratio < 10 else f"{ratio:.0f}x"


def tables(records: dict[str, Record]) -> Iterator[Table]:
    """Those that the records allow."""
    for name in ("end_to_end", "end_to_end_large"):
        if name in records:
            yield end_to_end(records[name])
    if "all_queries" in records:
        yield all_queries(records["all_queries"])
    if "price" in records:
        yield price(records["price"])
    if "fresh_process" in records:
        yield fresh_process(records["fresh_process"])
    if "peers" in records:
        yield peers(records["peers"])
    if found := ops(records):
        yield native_ops(found)
    if records.get("cuda_graphs", {}).get("rows"):
        yield cuda_graphs(records["cuda_graphs"])


def end_to_end(record: Record) -> Table:
    """Influence of all training examples, against the old algorithm."""
    rows = []
    for row in record["rows"]:
        old, first, again = row["baseline"]["total"], row["cold"]["total"], row["warm"] and row["warm"]["total"]
        off = row["native_off"]
        extrapolated = any(row["baseline"][f"extrapolated_from_{what}"] for what in ("queries", "examples"))
        rows.append(
            [
                row["problem"],
                row["case"],
                duration(old) + ("*" if extrapolated else ""),
                duration(first),
                times(old / first),
                duration(again) if again else "-",
                times(old / again) if again else "-",
                times(off["total"] / (again or first)) if off else "-",
                f"{row['error']:.0e}",
                f"{row['tolerance']:.0e}" if row["tolerance"] else "-",
            ]
        )
    titles = {row["problem"]: row["title"] for row in record["rows"]}
    problems = "; ".join(f"{name}: {title}" for name, title in titles.items())
    note = (
        f"{problems}. {OLD}: the algorithm of torch-influence 0.1.0, on the same machine in the same run. First: a new "
        "module; next: its next query; by ops: how much the native ops give, against the same without them. Error: "
        "of the scores, against the old ones; rtol: the tolerance that both were asked for. *: one query's time, "
        "times their number, or some examples' for all."
    )
    header = ["", "asked for", OLD, "first", "faster", "next", "faster", "by ops", "error", "rtol"]
    return Table("The influence of every training example on a query", note, header, rows)


def all_queries(record: Record) -> Table:
    """The whole matrix of scores, against one query at a time."""
    rows = []
    for row in record["rows"]:
        ours, other = row["ours"], row["other"]
        rows.append(
            [
                row["problem"],
                row["case"],
                OLD if other["name"] == "baseline" else other["name"],
                duration(other["total"]) + ("*" if other["extrapolated_from"] else ""),
                ours["name"],
                duration(ours["total"]),
                times(other["total"] / ours["total"]),
                f"{row['error']:.0e}",
            ]
        )
    header = ["", "asked for", "against", "its time", "way taken", "time", "faster", "error"]
    return Table("Many queries at once", "The same problems. *: extrapolated from fewer queries.", header, rows)


def price(record: Record) -> Table:
    """All queries at several tolerances and budgets, and what an approximation takes."""
    rows = [
        [
            row["problem"],
            str(row["queries"]),
            row["case"],
            duration(row["seconds"]),
            "-" if row["products"] is None else str(row["products"]),
            f"{row['error']:.0e}",
            f"{row['rank']:.4f}",
        ]
        for row in record["rows"]
    ]
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in record["rates"].items())
    note = (
        "From construction to all scores; products with the curvature; the worst error of some columns, and their rank "
        f"correlation, against float64. Float32 matrix products in this run, in GFLOP/s: {rates}."
    )
    header = ["", "queries", "asked for", "time", "products", "error", "rank correlation"]
    return Table("Exact scores at the price of an approximation", note, header, rows)


def fresh_process(record: Record) -> Table:
    """The first scores of a new process."""
    rows = []
    for row in record["rows"]:
        collecting = row["import, collecting garbage"] + row["first, collecting garbage"]
        steps = [duration(row[step]) for step in ("import", "first", "again", "beyond")]
        compiler = "imported" if row["compiler"] else "not imported"
        rows.append([row["problem"], row["package"], *steps, duration(collecting), compiler])
    note = (
        "Seconds after `import torch`. Beyond: import and first scores of all examples for one query, less the same of "
        "another module again. Garbage: of import and first scores, what Python's collector took, which goes through "
        "all that torch's import made. Torch's compiler: its symbolic shapes, or all of it."
    )
    header = ["", "package", "import", "first scores", "again", "beyond", "garbage", "torch's compiler"]
    return Table("A new process", note, header, rows)


def peers(record: Record) -> Table:
    """Of each package its fastest way to the exact scores, and how far its defaults are from them."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for row in record["rows"]:
        groups.setdefault((row["problem"], row["peer"]), []).append(row)
    rows = []
    for (name, peer), lines in groups.items():
        done = [line for line in lines if not line["failure"]]
        by_default = [f"{line['error']:.1g}" for line in done if line["setting"] == "defaults"]
        failed = f"{len(lines) - len(done)} of {len(lines)}" if len(done) < len(lines) else "-"
        close = [line for line in done if line["error"] <= CLOSE]
        if close:
            best = min(close, key=lambda line: line["seconds"] / line["queries"])
        else:
            best = min(done, key=lambda line: line["error"], default=None)
        found = ["-"] * 5
        if best:
            error, rank = f"{best['error']:.0e}", f"{best['spearman']:.3f}"
            found = [best["method"], str(best["queries"]), duration(best["seconds"]), error, rank]
        rows.append([name, peer, *found, ", ".join(by_default) or "-", failed])
    note = (
        "Scores converted to ours, then compared with a dense float64 solve: relative error and rank correlation. "
        f"Of each package the fastest line within {CLOSE:.0%}, or else the nearest one; what error its defaults leave, "
        "maybe answering another question; how many of its lines failed or took too long: all of them are in peers.md. "
        + "; ".join(f"{it['problem']}: {it['title']}" for it in record["problems"])
        + "."
    )
    header = ["", "package", "way", "queries", "time", "error", "rank", "by default", "failed"]
    return Table("Other packages", note, header, rows)


def native_ops(found: list[Record]) -> Table:
    """Each op at its largest size, and how it does at the others."""
    rows = []
    for record in found:
        ratios = [against_torch(size) for size in record["sizes"]]
        largest = max(record["sizes"], key=lambda size: best(size["rows"], "native")["median"])
        native = best(largest["rows"], "native")
        rows.append(
            [
                record["op"],
                largest["size"],
                duration(native["median"]),
                f"{native['fraction']:.0%}",
                times(against_torch(largest)),
                f"{times(min(ratios))} to {times(max(ratios))}",
            ]
        )
    note = (
        "Against the fastest way found in plain torch. Reached: of the speed that a copy of as many bytes and a "
        "product of matrices reach here; above 100 % where an op writes in place, and so reads less than a copy does."
    )
    header = ["op", "largest size", "time", "reached", "faster", "over all sizes"]
    return Table("Native ops", note, header, rows)


def cuda_graphs(record: Record) -> Table:
    """Whole iterations replayed from a graph, where they could be captured."""
    rows = [
        [
            f"{row['problem']}, {row['method']}",
            row["variant"],
            *(["-", row["failed"]] if row["failed"] else [duration(row["median"]), times(row["speedup"])]),
        ]
        for row in record["rows"]
    ]
    return Table("CUDA graphs", "Against the package's own loop.", ["model", "variant", "a solve", "faster"], rows)


# -- output ----------------------------------------------------------------------------------------------------------


def machine(records: dict[str, Record]) -> str:
    """Where and when the records come from; all commits and days, if they are of several."""
    found = [record["provenance"] for record in records.values()]
    hardware = {
        f"{it.get('gpu') or it['cpu']}, {it['threads']} threads, {it['memory_bytes'] / 2**30:.0f} GiB" for it in found
    }
    versions = {f"Python {it['python']}, torch {it['torch']}, torch-influence {it['torch_influence']}" for it in found}
    commits, days = ({it["commit"] for it in found}, {it["date"][:10] for it in found})
    parts = (hardware, versions, {f"commit {name}" for name in commits}, days)
    return "; ".join(" and ".join(sorted(part)) for part in parts)


def every_size(found: list[Record]) -> str:
    """All sizes and variants of the ops as Markdown."""
    header = ["variant", "median", "quartiles", "ratio", "reached", "error", "extra MB"]
    lines = ["# Native ops", ""]
    for record in found:
        lines += [f"## {record['op']}", "", harness.where(record), ""]
        for size in record["sizes"]:
            bandwidth, rate = size["bytes_per_second"] / 1e9, size["flops_per_second"] / 1e9
            rows = []
            for row in size["rows"]:
                low, high = (duration(t) for t in row["quartiles"])
                rows.append(
                    [
                        row["variant"],
                        duration(row["median"]),
                        f"{low} to {high}",
                        f"{row['ratio']:.2f}x",
                        "-" if row["fraction"] is None else f"{row['fraction']:.0%}",
                        "-" if row["error"] is None else f"{row['error']:.1e}",
                        "?" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e6:.1f}",
                    ]
                )
            must = f"{size['bytes'] / 1e6:.4g} MB at {bandwidth:.1f} GB/s, {size['flops'] / 1e6:.4g} Mflop"
            lines += [f"**{size['size']}**: {must} at {rate:.0f} Gflop/s", "", harness.markdown(header, rows), ""]
    return "\n".join(lines)


def summary(records: dict[str, Record]) -> str:
    """The tables as Markdown, with the machine."""
    return "\n".join([f"Measured on {machine(records)}.\n", *(table.markdown() for table in tables(records))])


def readme_section(records: dict[str, Record], folder: str | Path) -> str:
    """The summary with a picture, and where the rest is."""
    more = f"All sizes, variants and problems: [{folder}]({folder}).\n"
    return f"![Speed-ups]({folder}/speedups.png)\n\n{summary(records)}\n{more}"


def replaced(readme: str, section: str, folder: str) -> str:
    """README's text with another section on speed."""
    begin = BEGIN.format(folder=folder)
    before, mark, rest = readme.partition(BEGIN.partition("{")[0])
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise SystemExit(f"README: expected the marks {begin!r} and {END!r}")
    return f"{before}{begin}\n\n{section}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the results are")
    parser.add_argument("--readme", type=Path, help="file whose section on speed is replaced")
    options = parser.parse_args()
    records = read(options.folder)
    harness.write(options.folder / "summary.md", "# Summary\n\n" + summary(records))
    if found := ops(records):
        harness.write(options.folder / "ops.md", every_size(found))
    draw(records, options.folder)
    if options.readme:
        section = readme_section(records, options.folder)
        options.readme.write_text(replaced(options.readme.read_text(), section, str(options.folder)))
    print("\n".join(table.text() for table in tables(records)))
    print(textwrap.fill(f"Measured on {machine(records)}.", 110))
    print(f"Tables and pictures: {options.folder}")


def draw(records: dict[str, Record], folder: Path) -> None:
    """The pictures, where matplotlib is there."""
    try:
        import pictures
    except ImportError as error:
        print(f"no pictures: {error}; pip install 'torch-influence[plot]'", file=sys.stderr)
        return
    if found := ops(records):
        pictures.roofline(found, folder / "roofline.png")
    if "end_to_end" in records:
        pictures.speedups(records["end_to_end"], folder / "speedups.png")


if __name__ == "__main__":
    main()

"""The pictures of report.py: a roofline with the ops on it, and end-to-end speed-ups."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter

Record = dict[str, Any]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # told apart by the colour-blind, too
MARKERS = "osD^v"
IN_CACHE = 4e6  # bytes below which a copy stays in the cache of any machine of today


def roofline(records: list[Record], path: Path) -> None:
    """Flops a second over flops a byte: each op at each size, its native time and the fastest one in torch."""
    sizes = [size for record in records for size in record["sizes"]]
    beyond_cache = min(2e7, max(s["bytes"] for s in sizes))
    memory = statistics.median(s["bytes_per_second"] for s in sizes if s["bytes"] >= beyond_cache)
    cache = max(s["bytes_per_second"] for s in sizes)
    peak = statistics.median(s["flops_per_second"] for s in sizes)
    intensities = [s["flops"] / s["bytes"] for s in sizes]
    low, high = min(intensities) / 2, max(max(intensities) * 2, 4 * peak / memory)

    figure, panel = pyplot.subplots(figsize=(10, 6.5), layout="constrained")
    for bandwidth, style, name in ((memory, "-", "from memory"), (cache, ":", "from cache, at best")):
        corner = peak / bandwidth
        panel.plot(
            [low, corner, high], [low * bandwidth, peak, peak], "k" + style, lw=1.2,
            label=f"copy {name}: {bandwidth / 1e9:.0f} GB/s; GEMM {peak / 1e9:.0f} Gflop/s",
        )  # fmt: skip
    for record, colour, marker in zip(records, COLOURS, MARKERS, strict=False):
        panel.scatter([], [], s=60, marker=marker, color=colour, label=record["op"])
        beside: dict[float, int] = {}  # sizes of one intensity, drawn side by side
        for size in record["sizes"]:
            rates = {}
            for kind in ("native", "torch"):
                fastest = min(row["median"] for row in size["rows"] if row["kind"] == kind)
                rates[kind] = size["flops"] / fastest
            intensity = size["flops"] / size["bytes"]
            beside[round(intensity, 1)] = place = beside.get(round(intensity, 1), -1) + 1
            x = intensity * 1.07**place
            large = 60 if size["bytes"] > IN_CACHE else 18
            panel.plot([x, x], [rates["torch"], rates["native"]], "-", color=colour, lw=1, alpha=0.5)
            panel.scatter(x, rates["torch"], s=large, marker=marker, facecolors="white", edgecolors=colour, zorder=3)
            panel.scatter(x, rates["native"], s=large, marker=marker, color=colour, zorder=4)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlim(low, high)
    panel.set_xlabel("flops a byte, of what any implementation must do and move")
    panel.set_ylabel("flops a second")
    panel.grid(alpha=0.25)
    panel.legend(loc="lower right", fontsize=9)
    where = records[0]["provenance"]
    panel.set_title(
        f"Native ops (full) and the fastest way found in torch (empty), {name_of(records[0])}, torch {where['torch']}\n"
        "small marks: sizes that fit in a cache; of one op side by side",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def name_of(record: Record) -> str:
    """The hardware of a record."""
    where = record["provenance"]
    return where.get("gpu") if record.get("device") == "cuda" else f"{where['cpu']}, {where['threads']} threads"


def speedups(record: Record, path: Path) -> None:
    """How many times faster than the old algorithm, first and next query, on a logarithmic axis."""
    rows = record["rows"][::-1]
    figure, panel = pyplot.subplots(figsize=(10, 0.62 * len(rows) + 1.6), layout="constrained")
    for i, row in enumerate(rows):
        old = row["baseline"]["total"]
        bars = [("first query, or all", row["cold"], COLOURS[0], 0.2), ("next query", row["warm"], COLOURS[4], -0.2)]
        for name, side, colour, shift in bars:
            if side is None:
                continue
            ratio = old / side["total"]
            shift = shift if row["warm"] else 0.0
            panel.barh(i + shift, ratio, height=0.38, color=colour, label=name)
            panel.text(ratio * 1.05, i + shift, f"{ratio:.3g}x", va="center", fontsize=9)
    panel.set_yticks(range(len(rows)), [f"{row['problem']}  {row['case']}" for row in rows])
    panel.set_xscale("log")
    panel.set_xlim(1, 3 * max(row["baseline"]["total"] / row["cold"]["total"] for row in rows))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    panel.set_xlabel("times faster than the algorithm of torch-influence 0.1.0")
    panel.grid(axis="x", alpha=0.25)
    handles = dict(zip(*panel.get_legend_handles_labels()[::-1], strict=True))
    panel.legend(handles.values(), handles.keys(), loc="lower right")
    panel.set_title(f"Influence of all training examples, {name_of(record)}", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

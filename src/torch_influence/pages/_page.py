"""An analysis as one HTML page that asks for nothing: style, pictures and charts are inside it. No model, no data."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import html
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from torch_influence.exhibits import Bins, Exhibit, Image, Words, shortened

_WIDEST = 256  # pixels of an image, beyond which it is made smaller
_LETTERS, _FEATURES = 600, 14  # of a text and of a row that are shown

MEANING = (
    "A score predicts, to first order, by how much the query's test loss changes when that one training example is "
    "removed and the model is trained again: positive is helpful (the loss would rise), negative is harmful (it would "
    "fall), in units of the test loss."
)
LIMITS = (
    "It is exact in the limit of many examples for a convex problem at its minimum; damping makes scores smaller, and "
    "for deep networks or unfinished training they rank suspects rather than forecast losses, which "
    "module.verify(fit=...) tests with real refits."
)

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #57606a; --paper: #ffffff; --card: #f6f8fa; --line: #d0d7de;
  --helpful: #1f6fb5; --harmful: #b3520a; --zero: #6e7781; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --dim: #9aa5b1; --paper: #0d1117; --card: #161b22;
  --line: #30363d; --helpful: #6cb2f2; --harmful: #f0954a; --zero: #8b949e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .75rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { font-size: 1.05rem; margin: 1.25rem 0 .5rem; }
small, .dim, figcaption, th { color: var(--dim); font-weight: normal; }
a { color: var(--helpful); }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); }
th { width: 9rem; }
.row th { width: auto; } .row td { text-align: right; font-variant-numeric: tabular-nums; padding-right: 0; }
.row th, .row td { padding-block: .1rem; font-size: .85rem; }
pre { overflow-x: auto; background: var(--card); padding: .75rem; border-radius: 6px; font-size: .85rem; }
.top { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); gap: 1rem; }
.cards { display: grid; gap: .75rem; padding: 0; margin: 0; list-style: none;
  grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)); }
.images { grid-template-columns: repeat(auto-fill, minmax(min(8rem, 45%), 1fr)); }
figure { margin: 0; padding: .75rem; background: var(--card); border-radius: 6px; border-top: 4px solid var(--line);
  height: 100%; }
figure.helpful { border-color: var(--helpful); } figure.harmful { border-color: var(--harmful); }
figure img { display: block; width: 100%; max-width: 16rem; height: auto; image-rendering: pixelated;
  margin-bottom: .5rem; }
figure p { margin: 0 0 .5rem; white-space: pre-wrap; }
figcaption { font-size: .9rem; margin-top: .5rem; }
data { font-variant-numeric: tabular-nums; font-weight: 600; }
data.helpful { color: var(--helpful); } data.harmful { color: var(--harmful); }
svg { display: block; width: 100%; height: 9rem; border-bottom: 1px solid var(--dim); }
rect.helpful { fill: var(--helpful); } rect.harmful { fill: var(--harmful); } rect.zero { fill: var(--zero); }
.axis { position: relative; height: 1.5rem; font-size: .85rem; font-variant-numeric: tabular-nums; }
.axis span { position: absolute; } .axis span:last-child { right: 0; }
""".strip()


@dataclasses.dataclass(frozen=True)
class Entry:
    """A training example as the page shows it: its index, its score, its label ("" if none), and what it looks like."""

    index: int
    score: float
    label: str
    shown: Exhibit


@dataclasses.dataclass(frozen=True)
class Query:
    """A query: its index, loss, label ("" if none), what it looks like, and what the scores say of it."""

    index: int
    loss: float
    label: str
    shown: Exhibit
    helpful: Sequence[Entry]
    harmful: Sequence[Entry]
    bins: Bins


@dataclasses.dataclass(frozen=True)
class Page:
    """The content of a page.

    Attributes:
        title: its heading.
        asked: names and values of what was asked for, and of which model.
        plan: part, how it was computed, its memory, and faster ways with the reasons why they were not taken.
        solves: what was solved for, and the report of it.
        warnings: those that were given during the computation.
        queries: in order.
        self_influences: the training examples of the largest, largest first; None if not asked for.
        made: with which versions, when.
    """

    title: str
    asked: Sequence[tuple[str, str]]
    plan: Sequence[tuple[str, str, Sequence[str]]]
    solves: Sequence[tuple[str, str]]
    warnings: Sequence[str]
    queries: Sequence[Query]
    self_influences: Sequence[Entry] | None
    made: str

    def html(self) -> str:
        """Writes the whole page as HTML."""
        sections = [
            f"<h1>{_text(self.title)}</h1>",
            f"<p>{_text(MEANING)} {_text(LIMITS)}</p>",
            self._links(),
            *(_query(query) for query in self.queries),
            self._selves(),
            f"<section><h2>What was asked</h2>{_table(self.asked)}</section>",
            f"<section><h2>How it was computed</h2>{self._how()}</section>",
            f"<section><h2>Can these numbers be trusted?</h2>{self._trust()}</section>",
            f'<footer><p class="dim">{_text(self.made)}</p></footer>',
        ]
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            # Whatever a text of the user contains, the page loads nothing and runs nothing.
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            "style-src 'unsafe-inline'\">\n"
            f"<title>{_text(self.title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n"
            + "\n".join(section for section in sections if section)
            + "\n</body>\n</html>\n"
        )

    def _links(self) -> str:
        if len(self.queries) < 2:
            return ""
        links = (f'<a href="#q{query.index}">{_text(_name("query", query))}</a>' for query in self.queries)
        return f"<nav><p>{', '.join(links)}</p></nav>"

    def _selves(self) -> str:
        if self.self_influences is None:
            return ""
        return (
            "<section><h2>Largest self-influence</h2><p>By how much the model's loss on a training example would grow "
            "without it: large for examples that the rest of the data does not explain, mislabelled ones first.</p>"
            f"{_cards(self.self_influences)}</section>"
        )

    def _how(self) -> str:
        rows = [(part, path, *(f"not {way}" for way in not_taken)) for part, path, not_taken in self.plan]
        return _table(rows)

    def _trust(self) -> str:
        given = "".join(f"<li>{_text(warning)}</li>" for warning in self.warnings)
        said = f"<p>Warnings:</p><ul>{given}</ul>" if given else "<p>No warning was given.</p>"
        solves = (f"<h3>{_text(what)}</h3><pre>{_text(report)}</pre>" for what, report in self.solves)
        return said + "".join(solves)


def write(path: Path, text: str) -> None:
    """Writes the whole file, or leaves the old one if that fails."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Encodes pixels [h, w], [h, w, 3] or [h, w, 4] as a PNG file."""
    h, w = pixels.shape[:2]
    kind = {2: 0, 3: 2, 4: 6}[pixels.shape[2] if pixels.ndim == 3 else 2]
    unfiltered = np.zeros((h, 1), np.uint8)  # what each line begins with
    lines = np.concatenate([unfiltered, pixels.reshape(h, -1)], axis=1)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, kind, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(lines.tobytes(), 9))
        + chunk(b"IEND", b"")
    )


def _query(query: Query) -> str:
    sides = (
        f"<h3>{heading} <small>removing one would {change} this loss by about so much</small></h3>{_cards(entries)}"
        for heading, change, entries in (
            ("Most helpful", "raise", query.helpful),
            ("Most harmful", "lower", query.harmful),
        )
    )
    name = _name("query", query)
    return (
        f'<section id="q{query.index}"><h2>{_text(name[0].upper() + name[1:])}</h2><div class="top">'
        f"<figure>{_exhibit(query.shown, name)}<figcaption>test loss {query.loss:.4g}</figcaption></figure>"
        f"{_histogram(query.bins)}</div>{''.join(sides)}</section>"
    )


def _cards(entries: Sequence[Entry]) -> str:
    if not entries:
        return '<p class="dim">none</p>'
    kind = "cards images" if all(isinstance(entry.shown, Image) for entry in entries) else "cards"
    cards = (
        f'<li><figure class="{_sign(entry.score)}">{_exhibit(entry.shown, _name("training example", entry))}'
        f'<figcaption><data class="{_sign(entry.score)}" value="{entry.score!r}">{entry.score:+.4g}</data><br>'
        f"#{entry.index}{f' · label {_text(entry.label)}' if entry.label else ''}</figcaption></figure></li>"
        for entry in entries
    )
    return f'<ol class="{kind}">{"".join(cards)}</ol>'


def _exhibit(shown: Exhibit, name: str) -> str:
    if isinstance(shown, Image):
        step = -(-max(shown.pixels.shape[:2]) // _WIDEST)
        encoded = base64.b64encode(png(np.ascontiguousarray(shown.pixels[::step, ::step]))).decode()
        return f'<img alt="{_text(name)}" src="data:image/png;base64,{encoded}">'
    if isinstance(shown, Words):
        text = shown.text if len(shown.text) <= _LETTERS else shown.text[:_LETTERS] + " …"
        return f"<p>{_text(text)}</p>"
    row = shortened(shown, _FEATURES)
    return _table(list(zip(row.names, row.values, strict=True)), "row")


def _histogram(bins: Bins) -> str:
    """Draws bars that stretch with the page; the texts stand outside, since they must not be stretched."""
    low, high = float(bins.edges[0]), float(bins.edges[-1])
    span, tallest = high - low or 1.0, np.log1p(max(bins.counts.max(initial=0), bins.zero, 1))
    rects = []
    for edge, end, count in zip(bins.edges[:-1].tolist(), bins.edges[1:].tolist(), bins.counts.tolist(), strict=True):
        if count:
            x, width = 100 * (edge - low) / span, 100 * (end - edge) / span
            rects.append(_bar(x, width, count, tallest, _sign(edge + end), f"{edge:+.3g} to {end:+.3g}"))
    zero = -100 * low / span if high > low else 50.0
    if bins.zero:
        rects.append(_bar(zero - 0.4, 0.8, bins.zero, tallest, "zero", "exactly zero"))
    ends = [f"<span>{low:+.3g}</span>", f"<span>{high:+.3g}</span>"] if high > low else []
    middle = f'<span style="left: {zero:.1f}%; transform: translateX(-50%)">0</span>' if 25 < zero < 75 else ""
    parts = [f"{bins.helpful} helpful (+), {bins.harmful} harmful (-)"]
    parts += [f"{bins.zero} exactly zero"] if bins.zero else []
    parts += [f"{bins.lost} not finite, not drawn"] if bins.lost else []
    return (
        f'<figure class="histogram"><svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
        f'aria-label="distribution of scores">{"".join(rects)}</svg>'
        f'<div class="axis">{middle.join(ends)}</div><figcaption>Scores of the training examples: {", ".join(parts)}. '
        "Height: the logarithm of their number.</figcaption></figure>"
    )


def _bar(x: float, width: float, count: int, tallest: float, kind: str, range_: str) -> str:
    height = 100 * float(np.log1p(count) / tallest)
    return (
        f'<rect class="{kind}" x="{x:.3f}" y="{100 - height:.3f}" width="{width:.3f}" height="{height:.3f}" '
        f'data-count="{count}"><title>{range_}: {count}</title></rect>'
    )


def _table(rows: Sequence[Sequence[str]], kind: str = "facts") -> str:
    """Writes a table; the first text of each row is its heading, and those after the second stand below it."""
    lines = (
        f"<tr><th>{_text(name)}</th><td>{_text(value)}"
        f"{''.join(f'<br><small>{_text(part)}</small>' for part in more)}</td></tr>"
        for name, value, *more in rows
    )
    return f'<table class="{kind}">{"".join(lines)}</table>'


def _name(what: str, of: Query | Entry) -> str:
    return f"{what} {of.index}" + (f", label {of.label}" if of.label else "")


def _sign(score: float) -> str:
    return "helpful" if score > 0 else "harmful" if score < 0 else "zero"


def _text(text: str) -> str:
    return html.escape(text)

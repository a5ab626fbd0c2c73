"""One self-contained HTML page of a benchmark: table, Pareto plot, heatmaps. No script is loaded, no network needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from hf_kvcache.bench.record import Record

WIDTH, HEIGHT, MARGIN = 760, 420, 64
CELL, LARGEST = 14, 260
# a difference below this is not seen on a logarithmic axis
LEAST_KL = 1e-5
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-size: 13px }
th, td { padding: 3px 9px; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left } .wide { overflow-x: auto } small { color: #666 }
figure { display: inline-block; margin: 0 1.2rem 1.2rem 0; vertical-align: top } figcaption { font-size: 13px }
text { font: 12px system-ui, sans-serif; fill: #333 }
"""


def write_page(records: Sequence[Record], path: Path, title: str) -> None:
    """Writes the page.

    Args:
        records: at least one.
        path: of the file.
        title: in text; it is escaped.
    """
    body = [
        f"<h1>{escape(title)}</h1>",
        "<p>KL(full || compressed) in nats a token; 95% intervals over contexts; bytes are those of live storages, in "
        "the dtype of the model: a full cache in float32 is 0.5 times smaller than one in 16 bits.</p>",
        "<h2>Fidelity against bytes</h2>",
        pareto([record for record in records if record.figures]),
        "<h2>All figures</h2>",
        table(records),
        "<h2>Share of a context that every head keeps</h2>",
        *(heatmap(record) for record in records if any(record.heads)),
    ]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>{''.join(body)}</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")


def table(records: Sequence[Record]) -> str:
    """A row a record; the ends of an interval are beside its value."""
    names = list(dict.fromkeys(name for record in records for name in record.figures))
    shown = [name for name in names if not name.endswith((" low", " high"))]
    head = "".join(f"<th>{escape(name)}</th>" for name in ("setting", *shown))
    rows = "".join(
        f"<tr><td>{_named(record)}</td>{''.join(_cell(record, name) for name in shown)}</tr>" for record in records
    )
    return f'<div class="wide"><table id="figures"><tr>{head}</tr>{rows}</table></div>'


def _named(record: Record) -> str:
    return escape(record.setting) + (f" <small>{escape(record.error)}</small>" if record.error else "")


def _cell(record: Record, name: str) -> str:
    if name not in record.figures:
        return "<td></td>"
    low, high = (record.figures.get(f"{name} {end}") for end in ("low", "high"))
    interval = "" if low is None or high is None else f" <small>{low:.3g} to {high:.3g}</small>"
    return f"<td>{record.figures[name]:.4g}{interval}</td>"


def pareto(records: Sequence[Record]) -> str:
    """KL against times smaller, both logarithmic, as SVG; settings that none beats in both are joined."""
    if not records:
        return "<p>Every setting failed.</p>"
    points = [
        (record.figures["times_smaller_than_16_bit"], max(record.figures["kl"], LEAST_KL), record.setting)
        for record in records
    ]
    across, up = _axis([x for x, _, _ in points], WIDTH), _axis([y for _, y, _ in points], HEIGHT)
    best = [point for point in points if not any(x > point[0] and y < point[1] for x, y, _ in points)]

    def place(x: float, y: float) -> tuple[float, float]:
        return across(x), HEIGHT - up(y)

    line = " ".join(f"{left:.1f},{top:.1f}" for left, top in (place(x, y) for x, y, _ in sorted(best)))
    marks = "".join(
        f'<circle cx="{place(x, y)[0]:.1f}" cy="{place(x, y)[1]:.1f}" r="5" fill="{_colour(index, len(points))}">'
        f"<title>{escape(label)}: {x:.2f} times smaller, KL {y:.4g}</title></circle>"
        f'<text x="{place(x, y)[0] + 8:.1f}" y="{place(x, y)[1] - 6:.1f}">{escape(label)}</text>'
        for index, (x, y, label) in enumerate(points)
    )
    ticks = "".join(
        f'<text x="{across(x):.1f}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle">{x:g}</text>'
        for x in _ticks([x for x, _, _ in points], 2)
    ) + "".join(
        f'<text x="{MARGIN - 8}" y="{HEIGHT - up(y) + 4:.1f}" text-anchor="end">{y:g}</text>'
        for y in _ticks([y for _, y, _ in points], 10)
    )
    size = f'width="{WIDTH - 2 * MARGIN}" height="{HEIGHT - MARGIN - 8}"'
    frame = f'<rect x="{MARGIN}" y="8" {size} fill="none" stroke="#bbb"/>'
    middle = HEIGHT / 2
    names = (
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 18}" text-anchor="middle">times smaller than a 16-bit cache</text>'
        f'<text x="14" y="{middle}" transform="rotate(-90 14 {middle})" text-anchor="middle">KL, nats a token</text>'
    )
    return (
        f'<svg id="pareto" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">{frame}{ticks}{names}'
        f'<polyline points="{line}" fill="none" stroke="#999" stroke-dasharray="4 3"/>{marks}</svg>'
    )


def heatmap(record: Record) -> str:
    """Layers across, heads down; white holds nothing, dark holds everything."""
    heads = max(map(len, record.heads))
    cell = max(min(CELL, LARGEST * 3 // max(len(record.heads), 1)), 4)
    cells = "".join(
        f'<rect x="{layer * cell}" y="{head * cell}" width="{cell - 1}" height="{cell - 1}" fill="{_shade(share)}">'
        f"<title>layer {layer}, head {head}: {share:.0%}</title></rect>"
        for layer, shares in enumerate(record.heads)
        for head, share in enumerate(shares)
    )
    width, height = len(record.heads) * cell, heads * cell
    return (
        f'<figure class="heads"><svg viewBox="0 0 {width} {height}" width="{width}" height="{height}">{cells}</svg>'
        f"<figcaption>{escape(record.setting)}</figcaption></figure>"
    )


def _axis(values: Sequence[float], size: int):
    """From a value to its place on a logarithmic axis."""
    low, high = math.log(min(values)), math.log(max(values))
    low, high = (low - 0.1 * (high - low) - 0.05, high + 0.1 * (high - low) + 0.05)
    return lambda value: MARGIN + (math.log(value) - low) / (high - low) * (size - 2 * MARGIN)


def _ticks(values: Sequence[float], base: int) -> list[float]:
    """Powers of the base between the values, or the values' ends where there is none."""
    first, last = math.ceil(math.log(min(values), base)), math.floor(math.log(max(values), base))
    return [float(base) ** power for power in range(first, last + 1)] or sorted({min(values), max(values)})


def _colour(index: int, count: int) -> str:
    return f"hsl({360 * index // max(count, 1)} 65% 42%)"


def _shade(share: float) -> str:
    return f"hsl(210 60% {100 - 65 * min(max(share, 0.0), 1.0):.0f}%)"

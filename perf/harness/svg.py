# SPDX-License-Identifier: Apache-2.0
"""Plots as inline SVG, drawn with nothing but strings. A variant has the same colour in every plot."""

import html
import math
from dataclasses import dataclass

# Told apart also by people who do not see all colours; each has a lighter twin for dark pages.
COLOURS = {"vmferry": ("#0b63c5", "#6ab0ff"), "plain-wb": ("#b8560b", "#f0a062"), "zstd-wb": ("#7a3fb0", "#c79bf0"),
           "xbzrle-wb": ("#5d646c", "#a8b0b8"), "plain-bg": ("#8a6d00", "#d9bd4a"), "zstd-bg": ("#a3286a", "#ee86bb")}
STYLE = (".axis { stroke: var(--line); } .tick { fill: var(--soft); font-size: 11px; } .label { fill: var(--ink); "
         "font-size: 12px; } .dot { fill: var(--ink); }"
         + "".join(f" .f-{name} {{ fill: {light}; }} .s-{name} {{ stroke: {light}; fill: none; stroke-width: 1.8; }}"
                   for name, (light, _dark) in COLOURS.items())
         + " @media (prefers-color-scheme: dark) {"
         + "".join(f" .f-{name} {{ fill: {dark}; }} .s-{name} {{ stroke: {dark}; }}"
                   for name, (_light, dark) in COLOURS.items()) + " }")


@dataclass
class Bar:
    variant: str
    title: str
    value: float | None
    single: list  # values of the runs
    absent: str = ""  # why there is no value


@dataclass
class Line:
    variant: str
    title: str
    points: list  # (x, y)


def ticks(top: float, count: int = 5) -> list:
    """Round numbers from 0 to at least `top`."""
    if top <= 0:
        return [0, 1]
    step = 10 ** math.floor(math.log10(top / count))
    step = next(step * factor for factor in (1, 2, 5, 10) if step * factor * count >= top)
    return [index * step for index in range(math.ceil(top / step) + 1)]


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def bars(entries: list) -> str:
    """Horizontal bars from zero; the title of each stands above it."""
    width, row, left, right = 520, 40, 4, 60
    height = row * len(entries) + 6
    top = max([value for entry in entries for value in (entry.value or 0, *entry.single)], default=0) or 1
    scale = (width - left - right) / top
    parts = [f'<line class="axis" x1="{left}" y1="0" x2="{left}" y2="{height}"/>']
    for index, entry in enumerate(entries):
        y = index * row
        parts.append(_text(left + 4, y + 14, entry.title, "label"))
        if entry.value is None:
            parts.append(_text(left + 4, y + 31, entry.absent or "no value", "tick"))
            continue
        length = max(entry.value * scale, 1)
        parts.append(f'<rect class="f-{entry.variant}" x="{left}" y="{y + 20}" width="{length:.1f}" height="14"/>')
        parts += [f'<circle class="dot" cx="{left + value * scale:.1f}" cy="{y + 27}" r="2.5"/>' for value in entry.single]
        parts.append(_text(max(left + length, left + max(entry.single, default=0) * scale) + 7, y + 31,
                           _number(entry.value), "label"))
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


def lines(entries: list, unit: str, width: int = 1040, height: int = 260) -> str:
    """Lines over seconds since the start of the migration, which is a vertical line at 0."""
    left, right, above, below = 48, 10, 10 + 18 * len(entries), 34
    x_low = min(x for line in entries for x, _y in line.points)
    x_high = max(x for line in entries for x, _y in line.points)
    y_ticks = ticks(max(y for line in entries for _x, y in line.points))
    height += above

    def at_x(x):
        return left + (x - x_low) / max(x_high - x_low, 1e-9) * (width - left - right)

    def at_y(y):
        return height - below - y / y_ticks[-1] * (height - above - below)

    parts = []
    for y in y_ticks:
        parts.append(f'<line class="axis" x1="{left}" y1="{at_y(y):.1f}" x2="{width - right}" y2="{at_y(y):.1f}"/>')
        parts.append(_text(left - 6, at_y(y) + 4, _number(y), "tick", "end"))
    for x in ticks(x_high, 8):
        if x <= x_high:
            parts.append(_text(at_x(x), height - below + 16, f"{_number(x)} s", "tick", "middle"))
    if x_low <= 0:
        parts.append(f'<line class="axis" x1="{at_x(0):.1f}" y1="{above}" x2="{at_x(0):.1f}" y2="{height - below}"/>')
    for index, line in enumerate(entries):
        points = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline class="s-{line.variant}" points="{points}"/>')
        parts.append(f'<rect class="f-{line.variant}" x="{left}" y="{index * 18 + 2}" width="12" height="12"/>')
        parts.append(_text(left + 18, index * 18 + 12, line.title, "label"))
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'

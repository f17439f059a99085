"""Charts as inline SVG: coloured by the page's style sheet, read out by their labels, with figures on hovering."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean as mean

from markupsafe import Markup

from hybrid_rl.plain_text import visible
from hybrid_rl.plan import AdaptationPlan, treatment_label
from hybrid_rl.plan_grid import kind_of, kinds_of, layer_count, plotted, score_places

_WIDTH, _HEIGHT = 460, 210
_RIGHT, _TOP, _BOTTOM = 18, 8, 26
_WIDE, _ROW = 720, 24
"""Of a forest plot."""
_NAME = 30
"""Letters of a row's name."""
_LETTER = 7.4
"""Width of a tick's letter, at most."""
_BINARY = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
_DECIMAL = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
_POINTS = 160
"""Points of a line; of longer runs, means over neighbouring steps."""
_BARS = 60
COLOURS = 9
"""The style sheet's `.s0` to `.s8`."""


@dataclass(frozen=True)
class Series:
    """A metric over the steps at which it was measured."""

    name: str
    steps: tuple[float, ...]
    values: tuple[float, ...]

    def thinned(self, points: int = _POINTS, *, summed: bool = False) -> Series:
        """With means of neighbours in place of many points, or their sums."""
        width = math.ceil(len(self.steps) / points)
        if width <= 1:
            return self
        starts = range(0, len(self.steps), width)
        steps = tuple(mean(self.steps[i : i + width]) for i in starts)
        values = tuple((sum if summed else mean)(self.values[i : i + width]) for i in starts)
        return Series(self.name, steps, values)


@dataclass(frozen=True)
class Mark:
    """A figure and its interval, as a row of a forest plot."""

    name: str
    value: float
    low: float
    high: float
    told: str
    """The same in words."""
    filled: bool = True


def figure(value: float, unit: str = "") -> str:
    """A number as people read it."""
    if unit == "bytes":
        size, name = _of(value, _BINARY)
        return f"{value / size:.4g} {name}"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    if abs(value) >= 1e4:
        size, name = _of(value, _DECIMAL)
        return f"{value / size:.3g} {name}"
    return f"{value:.2g}"


def _of(value: float, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The largest unit that `value` is one of, else the smallest."""
    return next((unit for unit in units if abs(value) >= unit[0]), units[-1])


def tick_labels(ticks: Sequence[float], unit: str = "") -> list[str]:
    """Ticks in one unit, that of the largest, with as many decimals as tell them apart."""
    largest = max(map(abs, ticks))
    if unit != "bytes" and 0 < largest < 1e-3:
        return [f"{value:.3g}" for value in ticks]
    size, name = 1.0, ""
    if unit == "bytes":
        size, name = _of(largest, _BINARY)
    elif largest >= 1e4:
        size, name = _of(largest, _DECIMAL)
    step = min((b - a for a, b in pairwise(ticks)), default=largest) / size
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 0
    return [f"{value / size:.{decimals}f} {name}".rstrip() if value else "0" for value in ticks]


def lines(title: str, series: Sequence[Series], unit: str, *, along: str = "step") -> Markup:
    """A chart of some metrics over steps, or over what `along` names."""
    thin = [each.thinned() for each in series]
    values = [v for each in thin for v in each.values]
    steps = [s for each in thin for s in each.steps]
    low, high = min(values), max(values)
    if unit == "share" or (low >= 0 and low < 0.5 * high):
        low = min(low, 0.0)
    if high - low < 1e-12 * max(1.0, abs(high)) or high == low:
        low, high = (0.0, 2 * high) if high > 0 else (low - 1.0, high + 1.0)
    up = _Scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    left = _margin(up, unit)
    across = _Scale(min(steps), max(steps), left, _WIDTH - _RIGHT)
    drawn = [_axes(across, up, unit, left, steps=along == "step")]
    for i, each in enumerate(thin):
        points = " ".join(f"{across(s):.1f},{up(v):.1f}" for s, v in zip(each.steps, each.values, strict=True))
        drawn.append(Markup('<polyline class="line s{}" points="{}"/>').format(i % COLOURS, points))
        if len(each.steps) <= 40:
            for s, v in zip(each.steps, each.values, strict=True):
                dot = '<circle class="dot s{}" cx="{:.1f}" cy="{:.1f}" r="2.4"/>'
                drawn.append(Markup(dot).format(i % COLOURS, across(s), up(v)))
    drawn.append(_hovers(thin, across, unit, left, along))
    return _svg(_WIDTH, _HEIGHT, _summary(title, series, unit, along), drawn)


def forest(title: str, marks: Sequence[Mark], unit: str = "", *, zero: bool = False) -> Markup:
    """A row a mark: its name, a dot with its interval, and what is told of it. `zero`: around a line at zero."""
    low, high = min(m.low for m in marks), max(m.high for m in marks)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    room = 0.04 * (high - low) or 0.5 * abs(high) or 1.0
    names = [_cut(visible(m.name), _NAME) for m in marks]
    left = 16 + _LETTER * max(map(len, names))
    right = 14 + _LETTER * max(len(visible(m.told)) for m in marks)
    across = _Scale(low - room, high + room, left, _WIDE - right)
    bottom = _TOP + _ROW * len(marks)
    drawn, ticks = [], across.ticks(5)
    for value, label in zip(ticks, tick_labels(ticks), strict=True):
        rule = '<path class="{}" d="M{:.1f} {}V{}"/><text class="tick middle" x="{:.1f}" y="{}">{}</text>'
        kind = "zero" if zero and value == 0 else "rule"
        drawn.append(Markup(rule).format(kind, across(value), _TOP, bottom, across(value), bottom + 18, label))
    for i, (m, name) in enumerate(zip(marks, names, strict=True)):
        y = _TOP + _ROW * (i + 0.5)
        drawn.append(
            Markup(
                '<g><text class="name end" x="{:.1f}" y="{:.1f}">{}</text>'
                '<path class="whisker" d="M{:.1f} {:.1f}H{:.1f}"/><circle class="{}" cx="{:.1f}" cy="{:.1f}" r="4.5"/>'
                '<text class="tick" x="{:.1f}" y="{:.1f}">{}</text>'
                '<rect class="hover" x="0" y="{:.1f}" width="{}" height="{}"/><title>{}</title></g>'
            ).format(
                *(left - 8, y + 4, name, across(m.low), y, across(m.high)),
                *("dot s0" if m.filled else "open", across(m.value), y),
                *(_WIDE - right + 8, y + 4, visible(m.told), y - _ROW / 2, _WIDE, _ROW),
                visible(f"{m.name}: {m.told}"),
            )
        )
    label = f"{title}{f' in {unit}' if unit else ''}: " + "; ".join(f"{m.name} {m.told}" for m in marks)
    return _svg(_WIDE, bottom + _BOTTOM, visible(label), drawn)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def stack(title: str, series: Sequence[Series], unit: str, *, summed: bool = False) -> Markup:
    """A bar a step, or for several steps their mean or sum, of what adds up to a whole."""
    columns: dict[float, dict[str, float]] = {}
    thin = [each.thinned(_BARS, summed=summed) for each in series]
    for each in thin:
        for s, v in zip(each.steps, each.values, strict=True):
            columns.setdefault(s, {})[each.name] = max(0.0, v)
    tallest = max(sum(column.values()) for column in columns.values())
    up = _Scale(0.0, tallest or 1.0, _HEIGHT - _BOTTOM, _TOP)
    left = _margin(up, unit)
    width = (_WIDTH - left - _RIGHT) / len(columns)
    across = _Scale(min(columns), max(columns), left + width / 2, _WIDTH - _RIGHT - width / 2)
    drawn = [_axes(across, up, unit, left)]
    for s, column in sorted(columns.items()):
        at = 0.0
        for i, each in enumerate(series):
            value = column.get(each.name, 0.0)
            bar = '<rect class="bar s{}" x="{:.1f}" y="{:.2f}" width="{:.2f}" height="{:.2f}"/>'
            x, height = across(s) - 0.45 * width, up(at) - up(at + value)
            drawn.append(Markup(bar).format(i % COLOURS, x, up(at + value), max(0.6, 0.9 * width), height))
            at += value
    drawn.append(_hovers(thin, across, unit, left))
    return _svg(_WIDTH, _HEIGHT, _summary(title, series, unit), drawn)


def shares(parts: Mapping[str, float]) -> Markup:
    """One bar of what adds up to a whole."""
    total, at, drawn = sum(parts.values()) or 1.0, 0.0, []
    for i, (name, value) in enumerate(parts.items()):
        width = _WIDTH * value / total
        bar = '<rect class="bar s{}" x="{:.2f}" y="0" width="{:.2f}" height="22"><title>{} {:.1%}</title></rect>'
        drawn.append(Markup(bar).format(i % COLOURS, at, width, visible(name), value / total))
        at += width
    label = ", ".join(f"{name} {value / total:.0%}" for name, value in parts.items() if value >= 0.005 * total)
    return _svg(_WIDTH, 22, f"Shares of the time: {label}", drawn)


def heat_map(plan: AdaptationPlan) -> Markup:
    """Layers by kinds of matrix: the darker, the better the score ranks; where the weight is trained, outlined."""
    places = score_places(plan)
    shades = {m.name: 0.0 if m.score is None else places[m.score] for m in plotted(plan)}
    notes = {m.name: "no score" if m.score is None else f"score {m.score:.3g}" for m in plotted(plan)}
    outlined = sum(m.trains_weight for m in plotted(plan))
    label = f"Heat map of {len(shades)} matrices in {layer_count(plan)} layers; of {outlined} the weight is trained"
    return _grid(plan, shades, notes, label, marks=True)


def routing_map(plan: AdaptationPlan, expert: str, stepped: Mapping[str, float]) -> Markup:
    """Of MoLF: how often one expert of each module was stepped."""
    label = f"Heat map of how often {expert} was stepped, by layer and kind of matrix"
    notes = {name: f"{value:.0%} of updates" for name, value in stepped.items()}
    return _grid(plan, stepped, notes, label, marks=False)


def _grid(
    plan: AdaptationPlan, shades: Mapping[str, float], notes: Mapping[str, str], label: str, *, marks: bool
) -> Markup:
    """Cells by layer and kind; `shades`, from 0 to 1, and `notes` by module."""
    modules = [m for m in plotted(plan) if m.name in shades]
    there = {kind_of(m) for m in modules}
    kinds = [kind for kind in kinds_of(plan) if kind in there]
    layers, cell, left = layer_count(plan), 40, 30
    slant = 4.9 * min(40, max(map(len, kinds), default=0)) + 14  # room for the turned names
    tall = 26 if layers <= 16 else 16
    above = slant
    width, height = left + cell * (len(kinds) - 0.5) + slant, above + tall * layers + 6
    drawn = []
    for i, name in enumerate(kinds):
        turned = '<text class="tick" transform="translate({},{}) rotate(-45)">{}</text>'
        drawn.append(Markup(turned).format(left + cell * (i + 0.45), above - 6, visible(name, 40)))
    every = math.ceil(layers / 16)
    for layer in range(0, layers, every):
        text = '<text class="tick end" x="{}" y="{}">{}</text>'
        drawn.append(Markup(text).format(left - 6, above + tall * (layers - layer) - 5, layer))
    for m in modules:
        x, y = left + cell * kinds.index(kind_of(m)), above + tall * (layers - 1 - (m.layer or 0))
        told = f"{m.name}: {treatment_label(m)}, {notes[m.name]}, {m.params:,} parameters"
        drawn.append(
            Markup(
                '<g><rect class="cell" x="{}" y="{}" width="{}" height="{}"/>'
                '<rect class="shade" fill-opacity="{:.3f}" x="{}" y="{}" width="{}" height="{}"/>'
            ).format(x + 1, y + 1, cell - 2, tall - 2, shades[m.name], x + 1, y + 1, cell - 2, tall - 2)
        )
        if marks and m.trains_weight:
            outline = '<rect class="outline" x="{}" y="{}" width="{}" height="{}"/>'
            drawn.append(Markup(outline).format(x + 2, y + 2, cell - 4, tall - 4))
        if marks and m.treatment == "frozen":
            drawn.append(Markup('<text class="tick middle" x="{}" y="{}">×</text>').format(x + cell / 2, y + tall - 5))
        drawn.append(Markup("<title>{}</title></g>").format(visible(told)))
    return _svg(width, height, label, drawn, fixed=True)


class _Scale:
    """Data to the picture, linearly."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high = low, high
        self._start, self._factor = start, (end - start) / (high - low) if high > low else 0.0
        self._middle = (start + end) / 2

    def __call__(self, value: float) -> float:
        return self._start + (value - self.low) * self._factor if self._factor else self._middle

    def ticks(self, wanted: int, unit: str = "") -> list[float]:
        """Round numbers within; of bytes, in the unit of the largest."""
        if self.high <= self.low:
            return [self.low]
        rough = (self.high - self.low) / wanted
        one = _of(max(abs(self.low), abs(self.high)), _BINARY)[0] if unit == "bytes" else 1
        size = one * 10 ** math.floor(math.log10(rough / one))
        step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _margin(up: _Scale, unit: str) -> float:
    """Room on the left for the labels."""
    return 10 + _LETTER * max(4, *map(len, tick_labels(up.ticks(4, unit), unit)))


def _axes(across: _Scale, up: _Scale, unit: str, left: float, *, steps: bool = True) -> Markup:
    """`steps`: what lies below are whole numbers."""
    drawn, ticks = [], up.ticks(4, unit)
    for value, label in zip(ticks, tick_labels(ticks, unit), strict=True):
        y = up(value)
        drawn.append(Markup('<path class="rule" d="M{:.1f} {:.1f}H{}"/>').format(left, y, _WIDTH - _RIGHT))
        text = '<text class="tick end" x="{:.1f}" y="{:.1f}">{}</text>'
        drawn.append(Markup(text).format(left - 6, y + 4, label))
    below = across.ticks(6)
    named = [f"{value:.0f}" if value == round(value) else "" for value in below] if steps else tick_labels(below)
    for value, label in zip(below, named, strict=True):
        if label:
            text = '<text class="tick middle" x="{:.1f}" y="{}">{}</text>'
            drawn.append(Markup(text).format(across(value), _HEIGHT - 8, label))
    return Markup("").join(drawn)


def _hovers(series: Sequence[Series], across: _Scale, unit: str, left: float, along: str = "step") -> Markup:
    """Strips over the chart that tell the figures below them."""
    found: dict[float, list[str]] = {}
    for each in series:
        for s, v in zip(each.steps, each.values, strict=True):
            found.setdefault(s, []).append(f"{visible(each.name)}: {figure(v, unit)}")
    width = (_WIDTH - left - _RIGHT) / max(1, len(found))
    strip = '<rect class="hover" x="{:.1f}" y="{}" width="{:.1f}" height="{}"><title>{} {}\n{}</title></rect>'
    tall = _HEIGHT - _BOTTOM - _TOP
    at = "{:.0f}".format if along == "step" else figure
    return Markup("").join(
        Markup(strip).format(across(s) - width / 2, _TOP, width, tall, along, at(s), "\n".join(told))
        for s, told in found.items()
    )


def _summary(title: str, series: Sequence[Series], unit: str, along: str = "step") -> str:
    """The chart in words."""
    told = [
        f"{each.name} from {figure(each.values[0], unit)} to {figure(each.values[-1], unit)}, between "
        f"{figure(min(each.values), unit)} and {figure(max(each.values), unit)}"
        for each in series[:COLOURS]
    ]
    return visible(f"{title} by {along}: {'; '.join(told)}")


def _svg(width: float, height: float, label: str, drawn: Sequence[Markup], *, fixed: bool = False) -> Markup:
    """`fixed`: at its own size, in a box that scrolls; else as wide as there is room."""
    size = Markup(' width="{}" height="{}"').format(width, height) if fixed else Markup("")
    head = Markup('<svg viewBox="0 0 {} {}"{} role="img" aria-label="{}">').format(width, height, size, label)
    return head + Markup("").join(drawn) + Markup("</svg>")

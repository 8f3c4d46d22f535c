"""Statistical figures as inline SVG: means as dots, 95% intervals as whiskers or bands, names beside what they name.

No script, no reference to anything outside; text is text, escaped. Ink follows the page (currentColor); the colours of lines and the
accent are CSS variables with fallbacks, so that a figure works on a dark page, and by itself as a file. A figure is 360 units wide:
legible at the width of a phone, two abreast on a desk. What can be seen stands in <desc> as text too.

A value is a mapping with "mean" and, where known, "low", "high", "n", as `measures.figure` and `benchmarks.mean` give it. A mean that
is None or no finite number is said to be missing, and not drawn.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from numbers import Real
from typing import Any

Limits = tuple[float | None, float | None]

WIDTH, FONT = 360.0, 13.0
ROW, DENSE, GAP, TOP = 22.0, 18.0, 8.0, 6.0  # height of a row of dots, of one of many; space between groups, space above
MANY = 16  # rows
NAMES = 124.0  # width of a column of names, at most
AREA, LINE = 176.0, 15.0  # height of a line plot's area, at least; of a name beside it
BANDS = 4  # lines at most whose intervals are drawn
ACCENT = "var(--accent, #0b62b8)"
SERIES = ("#0072b2", "#b84a00", "#00875f", "#a64d8a", "#8a6d00", "#5a6b7b", "#4353b3", "#b0413e")
DASHES = ("", "7 3", "2 3")  # of the first eight lines, the second eight, ...
QUIET, BOLD, END = 'fill-opacity=".7"', 'font-weight="600"', 'text-anchor="end"'


@dataclass(frozen=True)
class Plot:
    """A figure of a report. `svg`: the markup of the functions here. It is not escaped: never let it come from a model."""

    title: str
    svg: str
    caption: str = ""


def interval_plot(
    rows: Mapping[str, Mapping[str, Any]], *,
    title: str, x_label: str = "", reference: str | float | None = None, limits: Limits = (None, None),
) -> str:  # fmt: skip
    """A row each: name, dot with whisker, mean. `rows`: name -> value.

    reference: the row at whose mean a line runs through all others, or where else one runs: 0 for differences. limits: what no value
    can lie beyond, say (0, 1) for shares; the axis ends there at the latest. It need not begin at 0: dots are read by place, not by
    length.
    """
    return grouped_plot({"": rows}, title=title, x_label=x_label, reference=reference, limits=limits)


def grouped_plot(
    groups: Mapping[str, Mapping[str, Mapping[str, Any]]], *,
    title: str, x_label: str = "", reference: str | float | None = None, limits: Limits = (None, None),
) -> str:  # fmt: skip
    """The same in groups on one axis, say by the requests' tags: {tag: {arm: value}}. Each group has its own reference line."""
    found = {group: {name: Value.of(v) for name, v in rows.items()} for group, rows in groups.items()}
    values = [v for rows in found.values() for v in rows.values()]
    if not values:
        return _svg(title, "nothing to show", ROW, _text(0, 15, "nothing to show", QUIET))
    names = min(NAMES, max(_width(name) for rows in found.values() for name in rows))
    fixed = _number(reference)
    axis = Axis.over([x for v in values for x in v.span] + ([] if fixed is None else [fixed]), limits)
    numbers = max(_width(axis.say(v, 1)) for v in values)
    axis = replace(axis, start=names + 16, end=WIDTH - numbers - 16)
    pitch = DENSE if len(values) > MANY else ROW
    marks: list[str] = []
    y = TOP
    for group, rows in found.items():
        if group:
            y += GAP if marks else 0
            marks.append(_text(0, y + 15, _cut(group, 0.92 * WIDTH), BOLD))
            y += ROW
        line = rows[reference].mean if isinstance(reference, str) and reference in rows and len(rows) > 1 else fixed
        if line is not None:
            marks.append(_path(f"M{_n(axis(line))} {_n(y)}v{_n(pitch * len(rows))}", 0.6, 'stroke-dasharray="3 3"'))
        for name, value in rows.items():
            middle = y + pitch / 2
            y += pitch
            marks.append(f"<g><title>{_escape(_told(name, value))}</title>")
            marks.append(_text(0, middle + 4.5, _cut(name, names), BOLD if name == reference else ""))
            marks += _dot(axis, value, middle)
            marks.append(_text(WIDTH, middle + 4.5, axis.say(value, 1), f"{END} {QUIET}") + "</g>")
    foot, height = _foot(axis, TOP, y, x_label)
    told = "; ".join(
        (f"{group}, " if group else "") + _told(name, v) for group, rows in found.items() for name, v in rows.items()
    )
    return _svg(title, told, height, foot + "".join(marks))


def line_plot(
    series: Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]], *,
    title: str, x_label: str = "", y_label: str = "", limits: Limits = (None, None),
) -> str:  # fmt: skip
    """Values over turns or steps: name -> (x, value) in order of x, each line with the band of its intervals and its name at its end.
    The bands of more than four lines would hide each other: they are told in the text only. Where a value is missing a line has a
    gap. limits: as in `interval_plot`, of the values."""
    found = {name: [(float(x), Value.of(v)) for x, v in points if math.isfinite(x)] for name, points in series.items()}
    shown = {name: [(x, v.mean) for x, v in points if v.mean is not None] for name, points in found.items()}
    if not any(shown.values()):
        return _svg(title, "nothing to show", ROW, _text(0, 15, "nothing to show", QUIET))
    ends = [name for name in shown if shown[name]]
    xs = [x for points in shown.values() for x, _ in points]
    top = TOP + (20 if y_label else 6)
    bottom = top + max(AREA, LINE * len(ends))
    spans = [v.span if len(ends) <= BANDS else v.span[:1] for points in found.values() for _, v in points]
    tall = Axis.over([x for span in spans for x in span], limits)
    tall = replace(tall, start=bottom, end=top)
    names = min(NAMES, max(map(_width, ends)))
    left = max(_width(tall.label(t)) for t in tall.ticks) + 8
    wide = Axis.over(xs, (min(xs), max(xs)) if max(xs) > min(xs) else (None, None), whole=all(x == int(x) for x in xs))
    wide = replace(wide, start=left + 8, end=WIDTH - names - 24)
    marks = [_text(0, 14, _cut(y_label, WIDTH), QUIET)] if y_label else []
    for tick in tall.ticks:
        marks.append(_path(f"M{_n(left)} {_n(tall(tick))}H{_n(wide.end + 6)}", 0.14))
        marks.append(_text(left - 8, tall(tick) + 4.5, tall.label(tick), f"{END} {QUIET}"))
    foot, height = _foot(replace(wide, grid=False), top, bottom, x_label)
    colours = {name: f"var(--series-{k % len(SERIES) + 1}, {SERIES[k % len(SERIES)]})" for k, name in enumerate(shown)}
    for name in ends if len(ends) <= BANDS else ():
        marks += (f'<path d="{d}" fill="{colours[name]}" fill-opacity=".13"/>' for d in _bands(found[name], wide, tall))
    heights = dict(zip(ends, _apart([tall(shown[name][-1][1]) for name in ends], top, bottom)))
    for k, name in enumerate(shown):
        if name not in heights:
            continue
        told = "; ".join(_told(f"{name} at {wide.label(x)}", v) for x, v in found[name])
        dash = f' stroke-dasharray="{DASHES[k // len(SERIES) % len(DASHES)]}"' if k >= len(SERIES) else ""
        x, y, label = wide(shown[name][-1][0]), tall(shown[name][-1][1]), heights[name]
        marks.append(f'<g stroke="{colours[name]}" fill="{colours[name]}"><title>{_escape(told)}</title>')
        marks += (f'<path d="{d}" fill="none" stroke-width="2"{dash}/>' for d in _lines(found[name], wide, tall))
        marks += (_circle(wide(x), tall(mean), 2.6) for x, mean in shown[name])
        if abs(label - y) > 3 or wide.end - x > 3:  # dotted: it leads to the name, and is no data
            lead = f"M{_n(x + 5)} {_n(y)}H{_n(wide.end + 5)}L{_n(wide.end + 15)} {_n(label)}"
            marks.append(f'<path d="{lead}" fill="none" stroke-opacity=".7" stroke-dasharray="1 3"/>')
        marks.append(_text(wide.end + 18, label + 4.5, _cut(name, names), 'stroke="none"') + "</g>")
    told = "; ".join(_told(f"{name} at {wide.label(x)}", v) for name, points in found.items() for x, v in points)
    return _svg(title, told, height, foot + "".join(marks))


def measure_plots(measures: Mapping[str, Mapping[str, Any]]) -> list[Plot]:
    """Figures of what `measures.arm_measures` says of each arm: drift, length and diversity, those of which there is anything."""
    over = "after each turn; turn 0 is the request itself. Mean with 95% interval over requests."
    recall, words, tokens, pictures = (
        {name: of[part][key] for name, of in measures.items() if of[part][key]}
        for part, key in (("drift", "recall_by_turn"), ("length", "words"), ("length", "tokens"), ("diversity", "pictures"))
    )
    lines = (
        ("The request's words in the prompt", recall, "share of its content words", (0.0, 1.0), " A synonym counts as lost."),
        ("Words in the prompt", words, "words", (0.0, None), ""),
        ("Tokens in the prompt", tokens, "tokens", (0.0, None), ""),
    )
    found = []
    for title, turns, unit, limits, more in lines:
        points = {name: [(row["turn"], row) for row in rows] for name, rows in turns.items()}
        if any(len(rows) > 1 for rows in points.values()):
            svg = line_plot(points, title=title, x_label="turns taken", y_label=unit, limits=limits)
            found.append(Plot(title, svg, f"{unit[0].upper()}{unit[1:]} {over}{more}"))
    if any(value["mean"] is not None for value in pictures.values()):
        title = "How much pictures of one request differ"
        by = sorted({of["diversity"]["by"] for of in measures.values()})
        svg = interval_plot(pictures, title=title, x_label=f"mean distance of {' or '.join(by)}", limits=(0.0, None))
        found.append(Plot(title, svg, "Over requests with several pictures; 0: all the same."))
    return found


# --- values and axes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Value:
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @classmethod
    def of(cls, value: Mapping[str, Any] | None) -> Value:
        mean, low, high = (_number((value or {}).get(key)) for key in ("mean", "low", "high"))
        if mean is None or low is None or high is None or low > high:
            low = high = None
        return cls(mean, low, high, (value or {}).get("n"))

    @property
    def span(self) -> list[float]:
        return [x for x in (self.mean, self.low, self.high) if x is not None]


def _number(x: Any) -> float | None:
    """As a float; None where it is no finite number, or one so large that differences overflow."""
    if not isinstance(x, Real) or not math.isfinite(number := float(x)) or abs(number) > 1e100:
        return None
    return number if abs(number) > 1e-100 else 0.0


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, drawn from `start` to `end`. digits: after the point; negative: significant ones, of large numbers."""

    low: float
    high: float
    ticks: tuple[float, ...]
    digits: int
    start: float = 0.0
    end: float = 1.0
    grid: bool = True

    @classmethod
    def over(cls, values: Sequence[float], limits: Limits = (None, None), whole: bool = False) -> Axis:
        """With three to six ticks at 1, 2 or 5 times a power of ten; whole: at whole numbers."""
        first, last = (min(values), max(values)) if values else (0.0, 1.0)
        low, high = first, last
        size = max(abs(low), abs(high))
        if high - low <= max(1e-6 * size, 1e-100):  # all the same
            pad = size / 10 if size > 1e-99 else 0.5
            low, high = low - pad, high + pad
        raw = (high - low) / 4
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.8)
        step = max(step, 1.0) if whole else step
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        if limits[0] is not None:
            low = min(max(low, limits[0]), first)
        if limits[1] is not None:
            high = max(min(high, limits[1]), last)
        count = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
        largest, last_digit = max(abs(low), abs(high)), math.floor(math.log10(step) + 1e-9)
        digits = max(0, -last_digit)
        if digits > 5 or largest >= 1e6:
            digits = last_digit - math.floor(math.log10(largest)) - 1
        return cls(low, high, tuple(k * step for k in count), digits)

    def __call__(self, x: float) -> float:
        return self.start + (x - self.low) / (self.high - self.low) * (self.end - self.start)

    def label(self, x: float, more: int = 0) -> str:
        text = f"{x:.{more - self.digits}g}" if self.digits < 0 else f"{x:.{self.digits + more}f}"
        return (text.removeprefix("-") if float(text) == 0 else text).replace("-", "\u2212")

    def say(self, value: Value, more: int) -> str:
        return "\u2013" if value.mean is None else self.label(value.mean, more)


# --- marks ----------------------------------------------------------------------------------------------------------------


def _dot(axis: Axis, value: Value, y: float) -> Iterator[str]:
    if value.mean is None:
        return
    if value.low is not None and value.high is not None:
        a, b, top = _n(axis(value.low)), _n(axis(value.high)), _n(y - 3.5)
        yield f'<path d="M{a} {_n(y)}H{b}M{a} {top}v7M{b} {top}v7" stroke="{ACCENT}" stroke-width="1.5" fill="none"/>'
    yield f'<g fill="{ACCENT}">{_circle(axis(value.mean), y, 4)}</g>'


def _foot(axis: Axis, top: float, bottom: float, title: str) -> tuple[str, float]:
    """The axis below an area with, if it has one, its grid, and where the figure ends."""
    marks = [_path(f"M{_n(axis.start - 6)} {_n(bottom + 2)}H{_n(axis.end + 6)}", 0.4)]
    labels = [axis.label(tick) for tick in axis.ticks]
    apart = abs(axis(axis.ticks[1]) - axis(axis.ticks[0])) if len(labels) > 1 else WIDTH
    every = math.ceil((max(map(_width, labels), default=0.0) + 6) / apart)  # label that there is room for
    for k, (tick, label) in enumerate(zip(axis.ticks, labels)):
        at = _n(axis(tick))
        marks.append(_path(f"M{at} {_n(bottom + 2)}v4", 0.4))
        if axis.grid:
            marks.append(_path(f"M{at} {_n(top)}V{_n(bottom + 2)}", 0.14))
        if k % every == 0:
            marks.append(_text(axis(tick), bottom + 20, label, f'text-anchor="middle" {QUIET}'))
    if title:
        title = _cut(title, WIDTH - 4)
        half = _width(title) / 2
        middle = min(max((axis.start + axis.end) / 2, half), WIDTH - half)
        marks.append(_text(middle, bottom + 39, title, f'text-anchor="middle" {QUIET}'))
    return "".join(marks), bottom + (46 if title else 26)


def _runs(points: Sequence[tuple[float, Value]], whole: bool) -> list[list[tuple[float, Value]]]:
    """Without the points that miss a mean (whole: or an interval), cut where one is missing."""
    runs: list[list[tuple[float, Value]]] = [[]]
    for x, v in points:
        if v.mean is None or (whole and v.low is None):
            runs.append([])
        else:
            runs[-1].append((x, v))
    return [run for run in runs if run]


def _lines(points: Sequence[tuple[float, Value]], wide: Axis, tall: Axis) -> list[str]:
    paths = [[f"{_n(wide(x))} {_n(tall(v.mean))}" for x, v in run if v.mean is not None] for run in _runs(points, False)]
    return ["M" + "L".join(path) for path in paths if len(path) > 1]


def _bands(points: Sequence[tuple[float, Value]], wide: Axis, tall: Axis) -> Iterator[str]:
    thin = (wide.high - wide.low) / 90
    for run in _runs(points, True):
        if len(run) == 1:  # a band without width would not show
            run = [(x + side, v) for x, v in run for side in (-thin, thin)]
        over = [f"{_n(wide(x))} {_n(tall(v.high))}" for x, v in run if v.high is not None]
        under = [f"{_n(wide(x))} {_n(tall(v.low))}" for x, v in reversed(run) if v.low is not None]
        yield "M" + "L".join(over + under) + "Z"


def _apart(heights: Sequence[float], top: float, bottom: float) -> list[float]:
    """The heights, moved as little as needed for names to stand clear of each other and inside."""
    order = sorted(range(len(heights)), key=lambda k: heights[k])
    placed = [heights[k] for k in order]
    for k in range(1, len(placed)):
        placed[k] = max(placed[k], placed[k - 1] + LINE)
    limit = bottom
    for k in reversed(range(len(placed))):
        placed[k] = min(placed[k], limit)
        limit = placed[k] - LINE
    back = dict(zip(order, placed))
    return [back[k] for k in range(len(heights))]


def _svg(title: str, told: str, height: float, body: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_n(WIDTH)} {_n(height)}" width="{_n(WIDTH)}" height="{_n(height)}" '
        f'role="img" aria-label="{_escape(title)}" font-family="system-ui, sans-serif" font-size="{_n(FONT)}" fill="currentColor" '
        f'direction="ltr"><title>{_escape(title)}</title><desc>{_escape(told)}</desc>{body}</svg>'
    )


def _text(x: float, y: float, text: str, how: str = "") -> str:
    return f'<text x="{_n(x)}" y="{_n(y)}"{" " if how else ""}{how}>{_escape(text)}</text>'


def _path(d: str, opacity: float, how: str = "") -> str:
    return f'<path d="{d}" stroke="currentColor" stroke-opacity="{_n(opacity)}" fill="none"{" " if how else ""}{how}/>'


def _circle(x: float, y: float, r: float) -> str:
    return f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(r)}" stroke="none"/>'


def _n(x: float) -> str:
    return f"{x:.2f}".rstrip("0").rstrip(".")


def _escape(text: str) -> str:
    """For XML too, which allows neither control characters nor halves of surrogate pairs."""
    return escape("".join(c if unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in " ".join(text.split())))


def _told(name: str, v: Value) -> str:
    if v.mean is None:
        return f"{name}: no value"
    interval = f" [{v.low:.4g}, {v.high:.4g}]" if v.low is not None and v.high is not None else ""
    return f"{name}: {v.mean:.4g}{interval}" + (f", n = {v.n}" if v.n is not None else "")


def _width(text: str) -> float:
    """About what a text takes in a sans-serif face; rather too much than too little."""
    return FONT * sum(map(_em, " ".join(text.split())))


def _em(c: str) -> float:
    if unicodedata.category(c)[0] == "M" or unicodedata.category(c) == "Cf":
        return 0.0
    if unicodedata.east_asian_width(c) in "WF":
        return 1.0
    return (
        0.35
        if c in "iljtfrI.,:;|!'()[] -"
        else 0.95
        if c in "mwMW@%"
        else 0.84
        if c == "\u2212"
        else 0.7
        if c.isupper()
        else 0.6
    )


def _cut(text: str, width: float) -> str:
    """Without its middle where it is too long: names often differ at their ends."""
    text = whole = " ".join(text.split())
    kept = min(len(whole), 100)  # more fit into no figure
    while kept and _width(text) > width:
        kept -= 1
        head = kept - kept * 2 // 5
        text = f"{whole[:head].rstrip()}\u2026{whole[len(whole) - (kept - head) :].lstrip()}"
    return text

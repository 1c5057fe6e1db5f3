"""The report's pictures, as inline SVG without scripts.

Lines, bars and dots are placed in per cent of the plot and text in pixels, so a chart fills any width without its
labels shrinking. Colours come from the page's style sheet through classes, so one picture serves light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

from bimos.evaluation import formatting

MAX_POINTS = 400
LOG_SPAN = 1e12  # of a logarithmic axis; what spans more has values that are as good as zero
SERIES = 7  # colours that the style sheet has for parts of a bar


def line_chart(points: Sequence[tuple[float, float]], x_unit: str, y_name: str) -> Markup:
    """`y` over `x`: means over short spans as a line, over the raw points as a faint one. At least two points."""
    points = sorted(points)
    xs, ys = [x for x, _ in points], [y for _, y in points]
    axis = Axis.of(ys)
    left, right = xs[0], xs[-1]
    width = right - left or 1.0
    raw = _thin(points, MAX_POINTS)
    body = [axis.grid(), _x_ticks(left, right, x_unit)]
    smooth = _thin(points, 60)
    if len(points) > 2 * len(smooth):
        body.append(_polyline(raw, left, width, axis, "raw"))
        body.append(_polyline([points[0], *smooth], left, width, axis, "curve"))
    else:
        body.append(_polyline(raw, left, width, axis, "curve"))
    label = f"{y_name} from {formatting.significant(ys[0])} to {formatting.significant(ys[-1])} over {formatting.count(right)} {x_unit}"
    return _plot(body, label)


def range_chart(rows: Sequence[tuple[str, float, float]], y_name: str) -> Markup:
    """One bar for every (name, first, last), drawn from the first value to the last, a dot on the last."""
    values = [value for _, first, last in rows for value in (first, last)]
    axis = Axis.of(values)
    step = 100.0 / max(len(rows), 12)  # a few bars stay slim
    body = [axis.grid()]
    every = max(1, math.ceil(len(rows) / 10))
    for index, (name, first, last) in enumerate(rows):
        center, top, end = (index + 0.5) * step, axis.percent(first), axis.percent(last)
        title = f"{name}: {formatting.significant(first)} to {formatting.significant(last)}"
        body.append(
            Markup('<g><title>{}</title><rect class="span" x="{:.2f}%" width="{:.2f}%" y="{:.2f}%" height="{:.2f}%" rx="2"/>').format(
                title, center - 0.28 * step, 0.56 * step, min(top, end), abs(end - top)
            )
            + Markup('<circle class="last" cx="{:.2f}%" cy="{:.2f}%" r="3"/></g>').format(center, end)
        )
        if index % every == 0:
            body.append(Markup('<text class="tick middle" x="{:.2f}%" y="100%" dy="18">{}</text>').format(center, name))
    falls = " to ".join(formatting.significant(value) for value in rows[0][1:])
    return _plot(body, f"{y_name} of {len(rows)} blocks, first and last; of the first block {falls}")


def bar(parts: Sequence[tuple[str, float]], whole: float, label: str, series: bool = True) -> Markup:
    """A horizontal bar whose full width is `whole`, cut into named parts, each in the next colour if they are a `series`."""
    drawn, start = [], 0.0
    for index, (name, value) in enumerate(parts):
        width = 100.0 * value / whole if whole else 0.0
        tone = f"part{index % SERIES}" if series else "plain"
        title = f"{name}: {formatting.size(value)}"
        drawn.append(
            Markup('<rect class="{}" x="{:.3f}%" width="{:.3f}%" height="100%"><title>{}</title></rect>').format(tone, start, width, title)
        )
        start += width
    return Markup('<svg class="bar" role="img" aria-label="{}">{}</svg>').format(label, Markup("").join(drawn))


class Axis:
    """A vertical axis from `low` to `high` in whole steps; logarithmic where the values span more than a factor of 20."""

    def __init__(self, ticks: list[float], log: bool) -> None:
        self.ticks = ticks
        self.low, self.high = ticks[0], ticks[-1]
        self.log = log

    @classmethod
    def of(cls, values: Sequence[float]) -> Axis:
        low, high = min(values), max(values)
        if 0 < 20 * low < high < LOG_SPAN * low:
            return cls(_log_ticks(low, high), True)
        if low > 0 and low < 0.5 * high:
            low = 0.0
        step = nice_step((high - low) or abs(high) or 1.0)
        first_step, last_step = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        return cls([index * step for index in range(first_step, max(last_step, first_step + 1) + 1)], False)

    def percent(self, value: float) -> float:
        """From the top of the plot."""
        if self.log:
            return 100.0 * math.log(self.high / value) / math.log(self.high / self.low)
        return 100.0 * (self.high - value) / (self.high - self.low)

    def grid(self) -> Markup:
        mark = Markup(
            '<line class="grid" x1="0" x2="100%" y1="{0:.2f}%" y2="{0:.2f}%"/><text class="tick end" x="-10" y="{0:.2f}%" dy="4">{1}</text>'
        )
        names = [f"{tick:,.10g}" if 1e-4 <= abs(tick) < 1e7 or not tick else f"{tick:.0e}" for tick in self.ticks]
        return Markup("").join(mark.format(self.percent(tick), name) for tick, name in zip(self.ticks, names, strict=True))


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around both, at most seven; up to two decades also their doubles and fives."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last - first > 2:
        step = math.ceil((last - first) / 6)
        return [10.0**power for power in range(first, last + step, step)]
    ticks = [multiple * 10.0**power for power in range(first, last + 1) for multiple in (1.0, 2.0, 5.0)]
    start = max(index for index, tick in enumerate(ticks) if tick <= low * (1 + 1e-9))
    end = min(index for index, tick in enumerate(ticks) if tick >= high * (1 - 1e-9))
    return ticks[start : end + 1]


def nice_step(span: float) -> float:
    """1, 2, 2.5 or 5 times a power of ten, three to six of which make up `span`."""
    power = 10.0 ** math.floor(math.log10(span / 4.0))
    return next(multiple * power for multiple in (1.0, 2.0, 2.5, 5.0, 10.0) if span / (multiple * power) <= 5.0)


def _x_ticks(left: float, right: float, unit: str) -> Markup:
    step = max(1.0, nice_step(right - left or 1.0))  # tokens and steps are whole
    mark = Markup('<text class="tick {}" x="{:.2f}%" y="100%" dy="18">{}</text>')
    ticks = []
    for index in range(math.ceil(left / step - 1e-9), math.floor(right / step + 1e-9) + 1):
        percent = 100.0 * (index * step - left) / (right - left or 1.0)
        if percent > 84.0:  # there stands the unit
            break
        ticks.append(mark.format("middle", percent, formatting.count(index * step)))
    ticks.append(mark.format("end", 100, f"{formatting.count(right)} {unit}"))
    return Markup("").join(ticks)


def _polyline(points: Sequence[tuple[float, float]], left: float, width: float, axis: Axis, kind: str) -> Markup:
    drawn = " ".join(f"{100 * (x - left) / width:.2f},{axis.percent(y):.2f}" for x, y in points)
    return Markup(
        '<svg width="100%" height="100%" viewBox="0 0 100 100" preserveAspectRatio="none">'
        '<polyline class="{}" points="{}" vector-effect="non-scaling-stroke"/></svg>'
    ).format(kind, drawn)


def _thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most so many points, each the mean of a span."""
    span = math.ceil(len(points) / most)
    groups = [points[start : start + span] for start in range(0, len(points), span)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _plot(body: list[Any], label: str) -> Markup:
    return Markup('<svg class="plot" role="img" aria-label="{}">{}</svg>').format(escape(label), Markup("").join(body))

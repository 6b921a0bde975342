"""Line charts as SVG that a page contains: no library, no script; colours are the style sheet's."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24  # margins, with the axes' labels
COLORS = 8  # that the style sheet has
MAX_POINTS = 300  # of a line; it has fewer pixels
LOG_RANGE = 20  # values whose largest is more than this times their smallest get a logarithmic axis
SMOOTHED = 40  # lines of so many points or more are noise around a trend, if they are `noisy`

Point = tuple[float, float]
Scale = Callable[[float], float]


class Series(NamedTuple):
    """A line of a chart."""

    label: str
    points: Sequence[Point]
    """In order of x."""
    bars: Sequence[Point] = ()
    """Lower and upper end of each point's interval; empty where there are none."""
    color: int = -1
    """Number of its colour; default: its place in the chart."""
    noisy: bool = False
    """Drawn faint, with its running mean."""


class Axis(NamedTuple):
    """Values from `low` to `high`, linear or logarithmic."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def of(cls, values: Sequence[float], linear: bool = False) -> Axis:
        """One that shows all the values, logarithmic where they differ much, unless it has to be `linear`."""
        low, high = min(values), max(values)
        if low > 0 and high / low > LOG_RANGE and not linear:
            return cls(low / 1.1, high * 1.1, True)
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(max(0.0, low - margin) if low >= 0 else low - margin, high + margin)

    def share(self, value: float) -> float:
        """Where a value is, from 0 to 1."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 5, smallest: float = 0.0) -> list[float]:
        """Round values on the axis, at least so far apart, unless it is logarithmic."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            factors = (1,) if len(decades) > 4 else (1, 3)
            marks = [factor * 10.0**decade for decade in decades for factor in factors]
            return [mark for mark in marks if self.low <= mark <= self.high]
        rough = max((self.high - self.low) / most, smallest)
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def line_chart(title: str, lines: Sequence[Series], x_name: str = "step", note: str = "", linear: bool = False) -> str:
    """A `<figure>`: the lines, which say their values where a pointer rests, and a legend; empty without points."""
    lines = [line._replace(color=i if line.color < 0 else line.color) for i, line in enumerate(lines) if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + [end for line in lines for bar in line.bars for end in bar]
    x_axis, y_axis = Axis(min(xs), max(xs)), Axis.of(ys, linear)
    if x_axis.low == x_axis.high:
        x_axis = Axis(x_axis.low - 1, x_axis.high + 1)

    def x_of(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * x_axis.share(value)

    def y_of(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * y_axis.share(value)

    thinned = [line if line.bars else line._replace(points=thin(line.points)) for line in lines]
    parts = [
        *_axes(x_axis, y_axis, x_of, y_of),
        *(_line(full, line, x_of, y_of) for full, line in zip(lines, thinned, strict=True)),
        *_hover(lines, x_name, x_of),
    ]
    named = [line for line in lines if line.label]
    legend = "".join(f'<span><i class="c{line.color % COLORS}"></i>{escape(line.label)}</span>' for line in named)
    hint = " <small>log scale</small>" * y_axis.log + (f" <small>{escape(note)}</small>" if note else "")
    return (
        f'<figure class="chart"><figcaption>{escape(title)}{hint}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        + (f'<div class="legend">{legend}</div>' if legend else "")
        + "</figure>"
    )


def thin(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """At most so many points: the lowest and the highest of each stretch, and the last."""
    if len(points) <= most:
        return list(points)
    size = -(-len(points) // ((most - 1) // 2))
    kept: set[Point] = {points[-1]}
    for start in range(0, len(points), size):
        part = points[start : start + size]
        kept |= {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
    return sorted(kept)


def running_mean(points: Sequence[Point]) -> list[Point]:
    """Means over a thirtieth of the line around each point, or less near its ends, as much on either side."""
    sums, half = [0.0, *itertools.accumulate(y for _, y in points)], max(2, len(points) // 60)
    result = []
    for i, (x, _) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)
        result.append((x, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)))
    return result


def short(value: float) -> str:
    """A number with at most three or four digits: `1.7k`, `0.0935`, `2e-05`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}" if value else "0"


def number(value: float) -> str:
    """A value of a metric, to four digits; whole numbers in full."""
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e12 else f"{value:.4g}"


def _axes(x_axis: Axis, y_axis: Axis, x_of: Scale, y_of: Scale) -> list[str]:
    parts = []
    for value in y_axis.ticks():
        y = y_of(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{short(value)}</text>')
    for value in x_axis.ticks(6, 1.0):
        x, anchor = x_of(value), "middle"
        if x > WIDTH - RIGHT - 12:
            x, anchor = float(WIDTH - 2), "end"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 7}" text-anchor="{anchor}">{short(value)}</text>')
    return parts


def _line(full: Series, line: Series, x_of: Scale, y_of: Scale) -> str:
    """The path of a line, with its error bars; `full` has all of its points, for the running mean."""
    color = f"c{line.color % COLORS}"

    def path(points: Sequence[Point], name: str) -> str:
        return f'<path class="{name} {color}" d="M{"L".join(f"{x_of(x):.1f} {y_of(y):.1f}" for x, y in points)}"/>'

    parts = []
    if line.bars:
        upper = [(x, high) for (x, _), (_, high) in zip(line.points, line.bars, strict=True)]
        lower = [(x, low) for (x, _), (low, _) in zip(line.points, line.bars, strict=True)]
        parts.append(path([*upper, *reversed(lower)], "band"))
        parts += [path([a, b], "bar") for a, b in zip(lower, upper, strict=True)]
    if line.noisy and len(full.points) >= SMOOTHED:
        parts += [path(line.points, "line faint"), path(thin(running_mean(full.points)), "line")]
    else:
        parts.append(path(line.points, "line"))
        if len(line.points) <= SMOOTHED:
            dots = (
                f'<circle class="dot {color}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="2.4"/>' for x, y in line.points
            )
            parts.append("".join(dots))
    return "".join(parts)


def _hover(lines: Sequence[Series], x_name: str, x_of: Scale) -> list[str]:
    """A strip for each x, as wide as there is room, that says the lines' values there."""
    xs = thin([(x, 0.0) for x in sorted({x for line in lines for x, _ in line.points})])
    centers = [x_of(x) for x, _ in xs]
    edges = [float(LEFT), *((a + b) / 2 for a, b in itertools.pairwise(centers)), float(WIDTH - RIGHT)]
    parts = []
    for i, (x, _) in enumerate(xs):
        texts = [f"{x_name} {number(x)}"]
        for line in lines:
            position = bisect.bisect_left(line.points, (x, -math.inf))
            if position < len(line.points) and line.points[position][0] == x:
                low, high = line.bars[position] if line.bars else (math.nan, math.nan)
                bar = f" [{number(low)}, {number(high)}]" if line.bars else ""
                texts.append(f"{line.label} {number(line.points[position][1])}{bar}".strip())
        parts.append(
            f'<rect class="hit" x="{edges[i]:.1f}" y="{TOP}" width="{max(0.5, edges[i + 1] - edges[i]):.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM}"><title>{escape(chr(10).join(texts))}</title></rect>'
        )
    return parts

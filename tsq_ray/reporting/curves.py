"""Saliency over time as inline SVG.

Widths are percentages and heights pixels, so that text keeps its size on a phone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10

import numpy as np
from markupsafe import Markup, escape

PANEL_PX = 44
HEAD_PX = 20
AXIS_PX = 34
MAX_POINTS = 24
"""Up to this many frames are drawn as points on the curve."""


@dataclass(frozen=True)
class Mark:
    """A chosen frame: its time in seconds and the module or baseline that chose it."""

    pts_s: float
    by: str


def time_text(seconds: float) -> str:
    """Format a time: 12.4 s below two minutes, then m:ss or h:mm:ss."""
    if abs(seconds) < 120:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    return (
        f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
        if minutes >= 60
        else f"{minutes}:{rest:02d}"
    )


def saliency_svg(
    pts_s: Sequence[float],
    duration_s: float,
    curves: Sequence[tuple[str, Sequence[float] | None]],
    chosen: Sequence[Mark],
    uniform_pts_s: Sequence[float],
) -> Markup:
    """Draw one panel per module, its saliency [T] against `pts_s` [T], above an axis in seconds.

    A module's own choices are dots on its curve; the uniform positions are ticks below the axis.
    Chosen frames without a curve (the baselines have none) are dots on the axis. Each panel runs
    from 0 to the module's own maximum.
    """
    axis = _Axis.over([*pts_s, *uniform_pts_s, *(mark.pts_s for mark in chosen)], duration_s)
    parts, top = list[str](), 0
    drawn = [
        (name, np.asarray(values, np.float64)) for name, values in curves if values is not None
    ]
    for name, values in drawn:
        parts += _panel(axis, top, name, pts_s, values, chosen)
        top += HEAD_PX + PANEL_PX
    on_axis = [mark for mark in chosen if mark.by not in {name for name, _ in drawn}]
    top += 10 if on_axis else 4
    parts += _axis(axis, top, on_axis, uniform_pts_s)
    what = "Saliency of each frame" if drawn else "Chosen frames"
    return Markup(
        f'<svg class="curve" role="img" aria-label="{what} over time, in seconds" width="100%" '
        f'height="{top + AXIS_PX}">{"".join(parts)}</svg>'
    )


@dataclass(frozen=True)
class _Axis:
    start: float
    end: float

    @classmethod
    def over(cls, times: Sequence[float], duration_s: float) -> _Axis:
        known = [float(time) for time in (*times, duration_s) if isfinite(time)]
        start, end = min([0.0, *known]), max([0.0, *known])
        return cls(start, end if end > start else start + 1.0)

    def at(self, time: float) -> float:
        """Return the position in percent of the width."""
        return 100 * (time - self.start) / (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return four to eight round times for the axis."""
        rough = (self.end - self.start) / 5
        step: float = 10 ** floor(log10(rough))
        if rough >= 12:  # minutes and hours need steps in base 60
            step = next(
                (s for s in (15, 20, 30, 60, 120, 300, 600, 900, 1800, 3600) if s >= rough),
                3600 * ceil(rough / 3600),
            )
        else:
            step *= next(factor for factor in (1, 2, 5, 10) if factor * step >= rough)
        first = ceil(self.start / step)
        return [i * step for i in range(first, floor(self.end / step + 1e-9) + 1)]


def _panel(
    axis: _Axis,
    top: int,
    name: str,
    pts_s: Sequence[float],
    values: np.ndarray,
    chosen: Sequence[Mark],
) -> list[str]:
    points = _points(pts_s, values)
    peak = max((value for _, value in points), default=0.0)
    low = min([0.0, *(value for _, value in points)])
    span = peak - low if peak > low else 1.0
    base = top + HEAD_PX

    def y(value: float) -> float:
        return PANEL_PX * (1 - (value - low) / span)

    css = escape(name)
    line = " ".join(f"{10 * axis.at(time):.2f},{y(value):.2f}" for time, value in points)
    first, last = (
        (10 * axis.at(points[0][0]), 10 * axis.at(points[-1][0])) if points else (0.0, 0.0)
    )
    parts = [
        f'<g class="module {css}"><text x="0" y="{top + 14}">{css} module</text>',
        f'<text x="100%" y="{top + 14}" text-anchor="end" class="quiet">highest {peak:.3g}</text>',
        f'<line class="base" x1="0" x2="100%" y1="{base + PANEL_PX}" y2="{base + PANEL_PX}"/>',
        *(_guide(axis, mark, base, own=mark.by == name) for mark in chosen),
        # only the curve is stretched to the width; text and dots would be distorted
        f'<svg x="0" y="{base}" width="100%" height="{PANEL_PX}" viewBox="0 0 1000 {PANEL_PX}" '
        'preserveAspectRatio="none" overflow="visible">',
        f'<polygon class="area" points="{first:.2f},{PANEL_PX} {line} {last:.2f},{PANEL_PX}"/>'
        if points
        else "",
        f'<polyline class="line" points="{line}"/></svg>',
    ]
    if len(points) <= MAX_POINTS:
        parts += [
            f'<circle class="point" cx="{axis.at(time):.2f}%" cy="{base + y(value):.1f}" r="2.2"/>'
            for time, value in points
        ]
    height = dict(points)
    for mark in chosen:
        if mark.by == name and height:
            nearest = min(height, key=lambda time: abs(time - mark.pts_s))
            parts.append(_dot(axis, mark, base + y(height[nearest])))
    return [*parts, "</g>"]


def _points(pts_s: Sequence[float], values: np.ndarray) -> list[tuple[float, float]]:
    """Return each source frame once, in time order; a short video repeats frames to fill T."""
    by_time: dict[float, float] = {}
    for time, value in zip(pts_s, values, strict=True):
        if isfinite(time) and isfinite(value):
            by_time.setdefault(float(time), float(value))
    return sorted(by_time.items())


def _guide(axis: _Axis, mark: Mark, base: int, own: bool) -> str:
    at = f"{axis.at(mark.pts_s):.2f}%"
    return (
        f'<line class="guide{" own" if own else ""}" x1="{at}" x2="{at}" '
        f'y1="{base}" y2="{base + PANEL_PX}"/>'
    )


def _dot(axis: _Axis, mark: Mark, y: float) -> str:
    title = escape(f"{time_text(mark.pts_s)}, chosen by {mark.by}")
    return (
        f'<circle class="chosen {escape(mark.by)}" cx="{axis.at(mark.pts_s):.2f}%" cy="{y:.1f}" '
        f'r="4.5"><title>{title}</title></circle>'
    )


def _axis(
    axis: _Axis, top: int, chosen: Sequence[Mark], uniform_pts_s: Sequence[float]
) -> list[str]:
    parts = ['<g class="axis">', f'<line class="base" x1="0" x2="100%" y1="{top}" y2="{top}"/>']
    for time in axis.ticks():
        at = axis.at(time)
        anchor = "start" if at < 4 else "end" if at > 94 else "middle"
        text = f"{time:g} s" if axis.end < 600 else time_text(time) if time else "0"
        parts.append(
            f'<line class="tick" x1="{at:.2f}%" x2="{at:.2f}%" y1="{top}" y2="{top + 14}"/>'
        )
        parts.append(f'<text x="{at:.2f}%" y="{top + 27}" text-anchor="{anchor}">{text}</text>')
    for time in uniform_pts_s:
        title = escape(f"{time_text(time)}, uniform")
        parts.append(
            f'<rect class="uniform" x="{axis.at(time):.2f}%" y="{top + 2}" width="5" height="8" '
            f'transform="translate(-2.5 0)"><title>{title}</title></rect>'
        )
    parts += [_dot(axis, mark, top) for mark in chosen]
    return [*parts, "</g>"]

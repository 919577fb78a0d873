"""The losses of a training by epoch as inline SVG; widths in percent, heights in pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite

from markupsafe import Markup, escape

HEIGHT_PX = 140
AXIS_PX = 30
PARTS = ("visual", "textual", "t2v", "v2t")
"""Parts of the loss as in `curves.csv`; their weighted sum has another scale and is not drawn."""


def losses_svg(curve: Sequence[Mapping[str, float]]) -> Markup:
    """Draw each part of the loss against the epoch.

    `curve` holds the losses of each epoch; the axis runs from 0 to the highest loss.
    """
    drawn = [
        name for name in PARTS if all(name in losses and isfinite(losses[name]) for losses in curve)
    ]
    highest = max((losses[name] for losses in curve for name in drawn), default=0.0) or 1.0
    step = 1000 / max(1, len(curve) - 1)
    lines = []
    for name in drawn:
        points = " ".join(
            f"{step * number:.2f},{HEIGHT_PX * (1 - losses[name] / highest):.2f}"
            for number, losses in enumerate(curve)
        )
        title = (
            f"{name}: {curve[0][name]:.3g} in the first epoch, {curve[-1][name]:.3g} in the last"
        )
        lines.append(
            f'<polyline class="line {name}" points="{points}"><title>{escape(title)}</title>'
            "</polyline>"
        )
    bottom = f'<line class="base" x1="0" x2="100%" y1="{HEIGHT_PX}" y2="{HEIGHT_PX}"/>'
    return Markup(
        '<svg class="curve losses" role="img" aria-label="Losses of each epoch" width="100%" '
        f'height="{HEIGHT_PX + AXIS_PX}">{bottom}'
        f'<svg width="100%" height="{HEIGHT_PX}" viewBox="0 0 1000 {HEIGHT_PX}" '
        'preserveAspectRatio="none" overflow="visible">'
        f'{"".join(lines)}</svg><text x="100%" y="12" text-anchor="end">highest {highest:.3g}'
        f"</text>{_epochs(len(curve))}</svg>"
    )


def _epochs(count: int) -> str:
    """Label the first and last epoch, and the quarters, at which the learning rate drops."""
    numbers = sorted({1, count, *(count * quarter // 4 for quarter in (1, 2, 3) if count >= 12)})
    texts = []
    for number in numbers:
        at = 100 * (number - 1) / max(1, count - 1)
        anchor = "start" if number == 1 else "end" if number == count else "middle"
        texts.append(
            f'<text x="{at:.2f}%" y="{HEIGHT_PX + 18}" text-anchor="{anchor}">'
            f"{'epoch ' if number == 1 else ''}{number}</text>"
        )
    return "".join(texts)

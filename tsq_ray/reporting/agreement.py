"""Agreement with the dense recogniser against cost, as `tsq label` measured it.

A sentence, a table, and an inline SVG whose widths are percentages and heights pixels, so that text
keeps its size on a phone. `found` is what a bundle's agreement.json holds: `videos` held out, the
`curve` of every choice measured, the agreement `asked` for and the `chosen` one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from tsq_ray.config import TSQ_MODES

HEIGHT_PX = 160
AXIS_PX = 34


def agreement_svg(found: Mapping[str, Any]) -> Markup:
    """Draw agreement against cost: a line for TSQNet, one for uniform frames, a dot for the choice.

    Agreement runs from the lowest measured to 100 %, cost from 0 to the highest measured, both
    linear.
    """
    axes = _Axes(found["curve"])
    lines = [
        _line(axes, name, [one for one in found["curve"] if of(one)])
        for name, of in (("visual", _by_tsqnet), ("", lambda one: one["mode"] == "uniform"))
    ]
    chosen, asked = found["chosen"], axes.y(found["asked"])
    dot = (
        '<circle class="chosen" '
        f'cx="{axes.x(chosen["cost"]):.2f}%" cy="{axes.y(chosen["top1"]):.1f}" r="4.5">'
        f"<title>{escape(_title(chosen))}</title></circle>"
    )
    wanted = f'<line class="guide own" x1="0" x2="100%" y1="{asked:.1f}" y2="{asked:.1f}"/>'
    bottom = f'<line class="base" x1="0" x2="100%" y1="{HEIGHT_PX}" y2="{HEIGHT_PX}"/>'
    return Markup(
        '<svg class="curve agreement" role="img" aria-label="Agreement with the recogniser on '
        f'every frame, by cost" width="100%" height="{HEIGHT_PX + AXIS_PX}">{bottom}{wanted}'
        f'<svg width="100%" height="{HEIGHT_PX}" viewBox="0 0 1000 {HEIGHT_PX}" '
        f'preserveAspectRatio="none" overflow="visible">{"".join(lines)}</svg>{dot}'
        f"{axes.texts()}</svg>"
    )


class _Axes:
    def __init__(self, curve: Sequence[Mapping[str, Any]]) -> None:
        self.most = max(one["cost"] for one in curve)
        self.least = min(1 - 1e-6, *(one["top1"] for one in curve))

    def x(self, cost: float) -> float:
        """Return the place of a cost in percent of the width."""
        return 100 * cost / self.most

    def y(self, share: float) -> float:
        """Return the place of an agreement in pixels from the top."""
        return HEIGHT_PX * (1 - max(0.0, share - self.least) / (1 - self.least))

    def texts(self) -> str:
        """Label the ends of both axes."""
        low = f'<text x="0" y="{HEIGHT_PX - 6}">{100 * self.least:.0f} % agree</text>'
        high = '<text x="0" y="12">100 % agree</text>'
        bottom = HEIGHT_PX + 18
        ends = (
            f'<text x="0" y="{bottom}">no cost</text><text x="100%" y="{bottom}" '
            f'text-anchor="end">{100 * self.most:.0f} % of the cost of every frame</text>'
        )
        return low + high + ends


def _by_tsqnet(one: Mapping[str, Any]) -> bool:
    return one["mode"] in TSQ_MODES and one["budget"] != "adaptive"


def _line(axes: _Axes, name: str, points: Sequence[Mapping[str, Any]]) -> str:
    places = " ".join(f"{10 * axes.x(one['cost']):.2f},{axes.y(one['top1']):.2f}" for one in points)
    shown = "TSQNet's frames" if name else "uniform frames"
    return f'<polyline class="line {name}" points="{places}"><title>{shown}</title></polyline>'


def _title(one: Mapping[str, Any]) -> str:
    return (
        f"{_frames(one)}, {one['mode']}: {100 * one['top1']:.0f} % agree at "
        f"{100 * one['cost']:.0f} % of the cost"
    )


def _frames(one: Mapping[str, Any]) -> str:
    """Return how many frames a choice takes."""
    if one["budget"] == "adaptive":
        return f"adaptive K, {one['frames']:.1f} on average"
    return f"K = {one['budget']}"


def verdict(found: Mapping[str, Any]) -> str:
    """Say in one sentence what was chosen, how well it agrees and what it saves."""
    chosen, asked = found["chosen"], f"{100 * found['asked']:g} %"
    held_out = f"{found['videos']} held-out videos"
    if chosen["mode"] == "maxconf":
        return (
            f"{_why_every_frame(found, asked, held_out)}, so it sees every frame and answers by "
            f"its {chosen['budget']} surest; ask for a lower --agreement"
        )
    figures = (
        f"agrees with what it says after seeing every frame on {100 * chosen['top1']:.0f} % of "
        f"{held_out} ({100 * chosen['low']:.0f} to {100 * chosen['high']:.0f} %) at "
        f"{100 * chosen['cost']:.0f} % of the cost"
    )
    short = f"{asked} are not reached; " if chosen["top1"] < found["asked"] else ""
    if chosen["mode"] == "uniform":
        return (
            f"{_frames(chosen)}, uniform: {short}a sampler does not pay here; what the recogniser "
            f"says of uniform frames {figures}"
        )
    return f"{_frames(chosen)}: {short}what the recogniser says of TSQNet's frames {figures}"


def _why_every_frame(found: Mapping[str, Any], asked: str, held_out: str) -> str:
    agreeing = [
        one for one in found["curve"] if one["mode"] != "maxconf" and one["top1"] >= found["asked"]
    ]
    if not agreeing:
        return f"no choice of fewer frames agrees with the recogniser on {asked} of {held_out}"
    best = min(agreeing, key=lambda one: one["cost"])
    return (
        f"a sampler does not pay here: {_frames(best)}, {best['mode']}, is the cheapest choice "
        f"that agrees with the recogniser on {asked} of {held_out}, at {100 * best['cost']:.0f} % "
        "of the cost of every frame"
    )


def agreement_rows(found: Mapping[str, Any], limit: int = 10) -> list[dict[str, Any]]:
    """Return the agreement of TSQNet and of uniform frames, side by side.

    A row for each K up to `limit`, for the adaptive budget, for every frame and for the choice,
    whatever its K: `name`, `sampler` and `uniform` if measured, and whether it is `chosen`.
    """
    chosen = found["chosen"]
    rows: dict[int | str, dict[str, Any]] = {}
    for one in found["curve"]:
        mode, budget = one["mode"], one["budget"]
        shown = mode == "maxconf" or budget in ("adaptive", chosen["budget"])
        if not shown and budget > limit:
            continue
        name = "every frame" if mode == "maxconf" else budget
        row = rows.setdefault(name, {"name": name, "chosen": False})
        row["sampler" if mode in TSQ_MODES else "uniform"] = one
        row["chosen"] |= (mode, budget) == (chosen["mode"], chosen["budget"])
    return sorted(rows.values(), key=lambda row: (isinstance(row["name"], str), row["name"]))

"""Agreement with the dense recogniser against cost, as `tsq label` measured it.

A sentence, a table, and an inline SVG whose widths are percentages and heights pixels, so that text
keeps its size on a phone. `record` holds the contents of a bundle's agreement.json: the number of
held-out `videos`, the `curve` of all measured choices, the requested agreement (`asked`), the
`chosen` choice and, if no sampler could be taught and none was held out, why (`untaught`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from tsq_ray.config import TSQ_MODES

UNTAUGHT = "no sampler can be taught"
HEIGHT_PX = 160
AXIS_PX = 34


def agreement_svg(record: Mapping[str, Any]) -> Markup:
    """Draw agreement against cost: a line for TSQNet, one for uniform frames, a dot for the choice.

    Agreement runs from the lowest measured to 100 %, cost from 0 to the highest measured, both
    linearly.
    """
    axes, curve = _Axes(record["curve"]), record["curve"]
    tsqnet = [choice for choice in curve if _is_tsqnet(choice)]
    uniform = [choice for choice in curve if choice["mode"] == "uniform"]
    lines = [_line(axes, "visual", tsqnet), _line(axes, "", uniform)]
    chosen, asked = record["chosen"], axes.y(record["asked"])
    dot = (
        '<circle class="chosen" '
        f'cx="{axes.x(chosen["cost"]):.2f}%" cy="{axes.y(chosen["top1"]):.1f}" r="4.5">'
        f"<title>{escape(_title(chosen))}</title></circle>"
    )
    guide = f'<line class="guide own" x1="0" x2="100%" y1="{asked:.1f}" y2="{asked:.1f}"/>'
    bottom = f'<line class="base" x1="0" x2="100%" y1="{HEIGHT_PX}" y2="{HEIGHT_PX}"/>'
    return Markup(
        '<svg class="curve agreement" role="img" aria-label="Agreement with the recogniser on '
        f'every frame, by cost" width="100%" height="{HEIGHT_PX + AXIS_PX}">{bottom}{guide}'
        f'<svg width="100%" height="{HEIGHT_PX}" viewBox="0 0 1000 {HEIGHT_PX}" '
        f'preserveAspectRatio="none" overflow="visible">{"".join(lines)}</svg>{dot}'
        f"{axes.texts()}</svg>"
    )


class _Axes:
    def __init__(self, curve: Sequence[Mapping[str, Any]]) -> None:
        self.max_cost = max(choice["cost"] for choice in curve)
        self.min_share = min(1 - 1e-6, *(choice["top1"] for choice in curve))

    def x(self, cost: float) -> float:
        """Return the position of a cost in percent of the width."""
        return 100 * cost / self.max_cost

    def y(self, share: float) -> float:
        """Return the position of an agreement in pixels from the top."""
        return HEIGHT_PX * (1 - max(0.0, share - self.min_share) / (1 - self.min_share))

    def texts(self) -> str:
        """Label the ends of both axes."""
        low = f'<text x="0" y="{HEIGHT_PX - 6}">{100 * self.min_share:.0f} % agree</text>'
        high = '<text x="0" y="12">100 % agree</text>'
        bottom = HEIGHT_PX + 18
        ends = (
            f'<text x="0" y="{bottom}">no cost</text><text x="100%" y="{bottom}" '
            f'text-anchor="end">{100 * self.max_cost:.0f} % of the cost of every frame</text>'
        )
        return low + high + ends


def _is_tsqnet(choice: Mapping[str, Any]) -> bool:
    return choice["mode"] in TSQ_MODES and choice["budget"] != "adaptive"


def _line(axes: _Axes, name: str, points: Sequence[Mapping[str, Any]]) -> str:
    places = " ".join(
        f"{10 * axes.x(point['cost']):.2f},{axes.y(point['top1']):.2f}" for point in points
    )
    title = "TSQNet's frames" if name else "uniform frames"
    return f'<polyline class="line {name}" points="{places}"><title>{title}</title></polyline>'


def _title(choice: Mapping[str, Any]) -> str:
    return (
        f"{_frames(choice)}, {choice['mode']}: {100 * choice['top1']:.0f} % agree at "
        f"{100 * choice['cost']:.0f} % of the cost"
    )


def _frames(choice: Mapping[str, Any]) -> str:
    """Describe how many frames a choice uses."""
    if choice["budget"] == "adaptive":
        return f"adaptive K, {choice['frames']:.1f} on average"
    return f"K = {choice['budget']}"


def verdict(record: Mapping[str, Any]) -> str:
    """Say in one sentence what was chosen, how well it agrees and what it saves."""
    chosen, asked = record["chosen"], f"{100 * record['asked']:g} %"
    held_out, untaught = measured_videos(record), record.get("untaught")
    if chosen["mode"] == "maxconf":
        no_sampler = f"{UNTAUGHT} ({untaught}); " if untaught else ""
        return (
            f"{no_sampler}{_why_every_frame(record, asked, held_out)}, so it sees every frame and "
            f"answers from the {chosen['budget']} of which it is surest; lower --agreement to show "
            "it fewer"
        )
    figures = (
        f"the recogniser gives the same label as from every frame on {100 * chosen['top1']:.0f} % "
        f"of {held_out} ({100 * chosen['low']:.0f} to {100 * chosen['high']:.0f} %) at "
        f"{100 * chosen['cost']:.0f} % of the cost"
    )
    missed = f"{asked} is not reached; " if chosen["top1"] < record["asked"] else ""
    if chosen["mode"] == "uniform":
        no_sampler = f"{UNTAUGHT} ({untaught})" if untaught else "a sampler does not pay here"
        return f"{_frames(chosen)}, uniform: {missed}{no_sampler}; from uniform frames, {figures}"
    return f"{_frames(chosen)}: {missed}from TSQNet's frames, {figures}"


def measured_videos(record: Mapping[str, Any]) -> str:
    """Say which videos the agreement was measured on."""
    count, kind = record["videos"], "sampled" if record.get("untaught") else "held-out"
    return f"{count} {kind} video{'s' if count != 1 else ''}"


def _why_every_frame(record: Mapping[str, Any], asked: str, held_out: str) -> str:
    agreeing = [
        choice
        for choice in record["curve"]
        if choice["mode"] != "maxconf" and choice["top1"] >= record["asked"]
    ]
    if not agreeing:
        return f"no choice of fewer frames agrees with the recogniser on {asked} of {held_out}"
    best = min(agreeing, key=lambda choice: choice["cost"])
    return (
        f"a sampler does not pay here: {_frames(best)}, {best['mode']}, is the cheapest choice "
        f"that agrees with the recogniser on {asked} of {held_out}, at {100 * best['cost']:.0f} % "
        "of the cost of every frame"
    )


def agreement_rows(record: Mapping[str, Any], limit: int = 10) -> list[dict[str, Any]]:
    """Return the agreement of TSQNet and of uniform frames, side by side.

    A row for each K up to `limit`, for the adaptive budget, for every frame and for the chosen K:
    `name`, `sampler` and `uniform` if measured, and whether it is `chosen`.
    """
    chosen = record["chosen"]
    rows: dict[int | str, dict[str, Any]] = {}
    for choice in record["curve"]:
        mode, budget = choice["mode"], choice["budget"]
        always_shown = mode == "maxconf" or budget in ("adaptive", chosen["budget"])
        if not always_shown and budget > limit:
            continue
        name = "every frame" if mode == "maxconf" else budget
        row = rows.setdefault(name, {"name": name, "chosen": False})
        row["sampler" if mode in TSQ_MODES else "uniform"] = choice
        row["chosen"] |= (mode, budget) == (chosen["mode"], chosen["budget"])
    return sorted(rows.values(), key=lambda row: (isinstance(row["name"], str), row["name"]))

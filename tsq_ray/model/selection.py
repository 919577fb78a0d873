"""From class-specific saliencies to the K chosen frames (paper, section 3.3 and appendix A).

Shapes: B videos, T frames (slots), C classes, K budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tsq_ray.config import Task, TSQMode
from tsq_ray.errors import ModelError
from tsq_ray.model.task import probabilities


@dataclass
class Selection:
    """The chosen frames of one video: distinct source frames, in time order."""

    slots: np.ndarray
    """int32 [<= K], slots 0..T-1, ascending."""
    selected_by: list[str]
    """For each slot "visual", "textual" or the name of a baseline."""


def saliency(attention: Tensor, logits: Tensor, task: Task, top_classes: int = 5) -> Tensor:
    """s_i = sum over the most probable classes of p_c A_c,i (equation 5): attention [B, C, T], logits [B, C] -> [B, T].

    Class-agnostic attention, [B, 1, T], is the saliency itself (section 4.4).
    p is softmax(z), or sigmoid(z) for the multi-label task, and is not renormalised over the `top_classes`; of classes with the
    same p the first ones are taken.
    """
    if attention.shape[1] == 1:
        return attention[:, 0]
    weights, classes = probabilities(logits, task).sort(dim=1, descending=True, stable=True)
    count = min(top_classes, logits.shape[1])
    rows = attention.gather(1, classes[:, :count, None].expand(-1, -1, attention.shape[2]))
    return (weights[:, :count, None] * rows).sum(dim=1)


def select_frames(
    saliency_visual: np.ndarray,
    saliency_textual: np.ndarray | None,
    frame_index: np.ndarray,
    budget: int,
    lambda_visual: float,
    mode: TSQMode = "both",
) -> Selection:
    """The top lambda_v K frames of the VQM joined with the top of the TQM (appendix A, "Saliency score fusion").

    A slot that repeats an earlier slot's source frame is no candidate; a video with fewer than K source frames gives all of them. Ties
    go by (score descending, slot ascending). lambda_v K is rounded half up. Frames that both modules choose count as the VQM's; they
    are made up in the VQM's order.

    Args:
        saliency_visual: [T].
        saliency_textual: [T], or None for a VQM-only network: mode "both" is then "visual".
        frame_index: int [T], each slot's frame in the source.
        budget: K.
        lambda_visual: share of the VQM, 0..1.
        mode: "visual" is lambda_v = 1, "textual" is lambda_v = 0.

    Raises:
        ModelError: mode "textual" of a network without a TQM.
    """
    if saliency_textual is None and mode == "textual":
        raise ModelError(
            "sampler.mode 'textual' needs a model with a textual module; this one has only the visual one: use 'visual'"
        )
    candidates = distinct_slots(frame_index)
    count = min(budget, len(candidates))
    order_visual = ranked(saliency_visual, candidates)
    if saliency_textual is None or mode == "visual":
        share, order_textual = count, order_visual
    else:
        share = 0 if mode == "textual" else _round_half_up(lambda_visual * count)
        order_textual = ranked(saliency_textual, candidates)
    chosen = {slot: "visual" for slot in order_visual[:share]}
    for slot in order_textual[: count - share]:
        chosen.setdefault(slot, "textual")
    for slot in order_visual:
        if len(chosen) == count:
            break
        chosen.setdefault(slot, "visual")
    return in_time_order(chosen)


def by_importance(choose: Callable[[int], np.ndarray], budget: int) -> np.ndarray:
    """The slots of choose(`budget`), those first that are chosen for the smallest budgets: int32 [<= K].

    `choose`: K -> slots; the choice for K need not be part of that for K + 1.
    """
    chosen = choose(budget).tolist()
    order: dict[int, None] = {}
    for smaller in range(1, budget):
        order |= dict.fromkeys(slot for slot in choose(smaller).tolist() if slot in chosen)
    return np.array(list(order | dict.fromkeys(chosen)), dtype=np.int32)


def frames_until_sure(probabilities: np.ndarray, margin: float) -> int | None:
    """How many of the frames, in the order given, it takes until one class leads the next one by `margin`; None where they do not suffice.

    A frame adds its probabilities, float [K, C], to the classes' sums: what counts is that several frames agree, since a single frame of
    something else is often answered with great confidence.
    """
    two = np.sort(np.cumsum(probabilities, axis=0), axis=1)[:, -2:]
    reached = np.flatnonzero(two[:, 1] - two[:, 0] >= margin)
    return int(reached[0]) + 1 if len(reached) else None


def distinct_slots(frame_index: np.ndarray) -> np.ndarray:
    """The first slot of each distinct source frame, ascending: int [T] -> int64 [n]."""
    return np.sort(np.unique(frame_index, return_index=True)[1])


def ranked(scores: np.ndarray, candidates: np.ndarray) -> list[int]:
    """The candidate slots by (score descending, slot ascending); scores [T], candidates ascending."""
    return [int(slot) for slot in candidates[np.argsort(-scores[candidates], kind="stable")]]


def in_time_order(chosen: dict[int, str]) -> Selection:
    """A Selection of {slot: selected by}, ascending."""
    slots = sorted(chosen)
    return Selection(np.array(slots, dtype=np.int32), [chosen[slot] for slot in slots])


def _round_half_up(value: float) -> int:
    return math.floor(round(value, 9) + 0.5)  # 0.58 * 25 is 14.499999999999998 in floating point

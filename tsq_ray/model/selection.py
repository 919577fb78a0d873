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
    """Per slot: "visual", "textual", "dpp" or the name of a baseline."""


def saliency(attention: Tensor, logits: Tensor, task: Task, top_classes: int = 5) -> Tensor:
    """Return s_i = sum of p_c A_c,i over the most probable classes (equation 5): [B, T].

    p is softmax(z), or sigmoid(z) for the multi-label task, and is not renormalised over the
    `top_classes`. Among classes with equal p, the first ones count.

    Args:
        attention: [B, C, T]. Class-agnostic attention, [B, 1, T], is returned as the saliency
            itself (section 4.4).
        logits: z, [B, C].
        task: single- or multi-label.
        top_classes: number of classes that count.
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
    """Join the top lambda_v K frames of the VQM with the top frames of the TQM.

    This is "Saliency score fusion" of appendix A. A slot that repeats an earlier slot's source
    frame is not a candidate. If a video has fewer than K source frames, all are chosen. Slots are
    ranked by (score descending, slot ascending). lambda_v K is rounded half up. Frames chosen by
    both modules count as the VQM's; the VQM's next frames then fill the remaining places.

    Args:
        saliency_visual: [T].
        saliency_textual: [T], or None for a VQM-only network; mode "both" then means "visual".
        frame_index: int [T], each slot's frame in the source.
        budget: K.
        lambda_visual: the VQM's share lambda_v, 0..1.
        mode: "visual" means lambda_v = 1, "textual" lambda_v = 0.

    Raises:
        ModelError: mode "textual", but the network has no TQM.
    """
    fraction = visual_fraction(saliency_textual is not None, lambda_visual, mode)
    candidates = distinct_slots(frame_index)
    count = min(budget, len(candidates))
    order_visual = order_textual = ranked(saliency_visual, candidates)
    share = _round_half_up(fraction * count)
    if saliency_textual is not None:
        order_textual = ranked(saliency_textual, candidates)
    chosen = {slot: "visual" for slot in order_visual[:share]}
    for slot in order_textual[: count - share]:
        chosen.setdefault(slot, "textual")
    for slot in order_visual:
        if len(chosen) == count:
            break
        chosen.setdefault(slot, "visual")
    return in_time_order(chosen)


def visual_fraction(has_textual: bool, lambda_visual: float, mode: TSQMode = "both") -> float:
    """Return the VQM's share of the choice: lambda_v, or 0 or 1 if a single module chooses.

    Raises ModelError: mode "textual", but the network has no TQM.
    """
    if not has_textual and mode == "textual":
        raise ModelError(
            "sampler.mode 'textual' needs a model with a textual module; "
            "this one has only the visual one: use 'visual'"
        )
    if not has_textual or mode == "visual":
        return 1.0
    return 0.0 if mode == "textual" else lambda_visual


def fused(visual: np.ndarray, textual: np.ndarray | None, fraction: float) -> np.ndarray:
    """Return one saliency per frame: `fraction` of the visual, the rest of the textual one."""
    return visual if textual is None else fraction * visual + (1 - fraction) * textual


def by_importance(choose: Callable[[int], np.ndarray], budget: int) -> np.ndarray:
    """Return the slots of choose(`budget`), ordered by the smallest budget that includes them.

    int32 [<= K]. `choose` maps K to slots; its choice for K need not be part of the one for K + 1.
    """
    chosen = choose(budget).tolist()
    order: dict[int, None] = {}
    for smaller in range(1, budget):
        order |= dict.fromkeys(slot for slot in choose(smaller).tolist() if slot in chosen)
    return np.array(list(order | dict.fromkeys(chosen)), dtype=np.int32)


def frames_until_sure(probabilities: np.ndarray, margin: float) -> int | None:
    """Return how many frames it takes, in the order given, until one class leads by `margin`.

    Return None if no class ever leads by that much. Each frame's row of `probabilities`, float
    [K, C], is added to the classes' sums, so that several frames have to agree: the recogniser is
    often very confident on a single frame that shows something else.
    """
    top_two = np.sort(np.cumsum(probabilities, axis=0), axis=1)[:, -2:]
    reached = np.flatnonzero(top_two[:, 1] - top_two[:, 0] >= margin)
    return int(reached[0]) + 1 if len(reached) else None


def distinct_slots(frame_index: np.ndarray) -> np.ndarray:
    """Return the first slot of each distinct source frame, ascending: int [T] -> int64 [n]."""
    return np.sort(np.unique(frame_index, return_index=True)[1])


def ranked(scores: np.ndarray, candidates: np.ndarray) -> list[int]:
    """Sort candidate slots by (score descending, slot ascending).

    `scores`: [T]. `candidates`: slots in ascending order.
    """
    return [int(slot) for slot in candidates[np.argsort(-scores[candidates], kind="stable")]]


def in_time_order(chosen: dict[int, str]) -> Selection:
    """Return {slot: selected by} as a Selection in time order."""
    slots = sorted(chosen)
    return Selection(np.array(slots, dtype=np.int32), [chosen[slot] for slot in slots])


def _round_half_up(value: float) -> int:
    return math.floor(round(value, 9) + 0.5)  # 0.58 * 25 is 14.499999999999998 in floating point

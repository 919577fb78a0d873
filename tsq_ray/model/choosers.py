"""Choosers, one per sampler, decide which frames the recogniser sees (paper, sections 3.3, 4.2).

Scoring and evaluation use the same classes. Scoring shows the recogniser the candidates step by
step; evaluation looks up their logits. Shapes: T slots, C classes, K budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tsq_ray.asking.answers import ANSWERED_SCORE
from tsq_ray.config import SamplerConfig, TSQMode
from tsq_ray.model import baselines
from tsq_ray.model.diversity import dpp
from tsq_ray.model.selection import (
    Selection,
    by_importance,
    distinct_slots,
    frames_until_sure,
    fused,
    in_time_order,
    ranked,
    select_frames,
    visual_fraction,
)


@dataclass(frozen=True)
class View:
    """What a chooser knows about a video before the recogniser sees it."""

    frame_index: np.ndarray
    """int [T], the source frame of each slot."""
    video_id: str = ""
    visual: np.ndarray | None = None
    """float [T], saliency of the visual query module."""
    textual: np.ndarray | None = None
    """float [T], saliency of the textual query module."""
    scores: np.ndarray | None = None
    """float [T], the scores that `Ranked` ranks by."""
    features: np.ndarray | None = None
    """float [T, D], the light encoder's features, for choosers that compare frames."""


@dataclass(frozen=True)
class Candidates:
    """Slots of distinct source frames, in the order in which the recogniser sees them."""

    slots: np.ndarray
    """int [n]."""
    selected_by: list[str]
    """Per slot: "visual", "textual", "dpp" or the name of a baseline."""
    first: int
    """How many candidates the recogniser sees in its first pass."""
    rounds: tuple[tuple[int, float], ...] = ()
    """For a recogniser behind a server, which gives one answer about all frames that it is shown:
    per round, the number of candidates shown and the lead of one class over the next that makes
    this round the last. Empty: all at once."""

    @classmethod
    def all_at_once(cls, selection: Selection) -> Candidates:
        """Return all frames of a selection, in time order, for a single pass."""
        return cls(selection.slots, selection.selected_by, len(selection.slots))

    def selection(self, places: np.ndarray) -> Selection:
        """Return the candidates at these places, in time order."""
        chosen = zip(self.slots[places].tolist(), places.tolist(), strict=True)
        return in_time_order({slot: self.selected_by[place] for slot, place in chosen})


class Chooser(Protocol):
    """Chooses at most K of the T frames of a video."""

    def candidates(self, view: View) -> Candidates:
        """Return the frames that the recogniser may see."""
        ...

    def enough(self, candidates: Candidates, probabilities: np.ndarray) -> np.ndarray | None:
        """Return the places of the chosen frames among the candidates: int [<= K].

        Return None if the recogniser has to see one more. `probabilities`, [m, C], are its answers
        for the first m candidates.
        """
        ...


class _Fixed:
    """Base of choosers that ignore the recogniser's answers and choose all candidates."""

    def enough(self, candidates: Candidates, probabilities: np.ndarray) -> np.ndarray | None:
        return np.arange(len(candidates.slots))


@dataclass(frozen=True)
class Uniform(_Fixed):
    """The uniform baseline."""

    budget: int

    def candidates(self, view: View) -> Candidates:
        return Candidates.all_at_once(baselines.uniform(view.frame_index, self.budget))


@dataclass(frozen=True)
class Random(_Fixed):
    """The random baseline; a video's frames depend only on (seed, video_id)."""

    budget: int
    seed: int

    def candidates(self, view: View) -> Candidates:
        chosen = baselines.random(view.frame_index, self.budget, self.seed, view.video_id)
        return Candidates.all_at_once(chosen)


@dataclass(frozen=True)
class Dense(_Fixed):
    """Every source frame among the T."""

    def candidates(self, view: View) -> Candidates:
        slots = distinct_slots(view.frame_index)
        return Candidates(slots, ["dense"] * len(slots), len(slots))


@dataclass(frozen=True)
class Ranked(_Fixed):
    """The K source frames with the highest scores; ties go to the earlier slot."""

    budget: int
    name: str

    def candidates(self, view: View) -> Candidates:
        assert view.scores is not None
        chosen = baselines.highest(view.scores, view.frame_index, self.budget, self.name)
        return Candidates.all_at_once(chosen)


@dataclass(frozen=True)
class Salient(_Fixed):
    """TSQNet's K most salient frames (section 3.3)."""

    budget: int
    lambda_visual: float
    mode: TSQMode = "both"

    def candidates(self, view: View) -> Candidates:
        return Candidates.all_at_once(self.select(view, self.budget))

    def select(self, view: View, budget: int) -> Selection:
        """Return the choice for another budget."""
        assert view.visual is not None
        index = view.frame_index
        return select_frames(
            view.visual, view.textual, index, budget, self.lambda_visual, self.mode
        )


@dataclass(frozen=True)
class Diverse(Salient):
    """K salient frames that differ from each other: `sampler.selection = "dpp"`.

    Their saliency is the mean of both modules', weighted by lambda_v and 1 - lambda_v.
    """

    def select(self, view: View, budget: int) -> Selection:
        assert view.visual is not None
        assert view.features is not None
        fraction = visual_fraction(view.textual is not None, self.lambda_visual, self.mode)
        slots = distinct_slots(view.frame_index)
        scores = fused(view.visual, view.textual, fraction)[slots]
        places = dpp(view.features[slots], scores, min(budget, len(slots)))
        return in_time_order({int(slot): "dpp" for slot in slots[places]})


@dataclass(frozen=True)
class UntilConfident:
    """TSQNet's frames in order of importance, until one class leads by `sampler.margin`."""

    salient: Salient
    margin: float

    def candidates(self, view: View) -> Candidates:
        chosen = self.salient.select(view, self.salient.budget)
        slots = by_importance(
            lambda budget: self.salient.select(view, budget).slots, self.salient.budget
        )
        module_of = dict(zip(chosen.slots.tolist(), chosen.selected_by, strict=True))
        # each frame adds at most 1 to the lead
        first = min(len(slots), math.ceil(self.margin))
        selected_by = [module_of[slot] for slot in slots.tolist()]
        return Candidates(slots, selected_by, first, tuple(self._rounds(len(slots))))

    def _rounds(self, count: int) -> Iterator[tuple[int, float]]:
        """Yield the rounds of `count` candidates, each with twice as many as the one before.

        An answer about n frames counts like n frames with that answer each. The first round has the
        fewest frames for which an answer without log-probabilities suffices.
        """
        shown = math.floor(self.margin / ANSWERED_SCORE) + 1
        while shown < count:
            yield shown, self.margin / shown
            shown *= 2
        yield count, 0.0

    def enough(self, candidates: Candidates, probabilities: np.ndarray) -> np.ndarray | None:
        count = frames_until_sure(probabilities, self.margin)
        if count is None and len(probabilities) < len(candidates.slots):
            return None
        return np.arange(count or len(candidates.slots))


@dataclass(frozen=True)
class MostConfident:
    """MaxConf: the K frames on which the recogniser is most confident, after seeing all of them."""

    budget: int

    def candidates(self, view: View) -> Candidates:
        slots = distinct_slots(view.frame_index)
        return Candidates(slots, ["maxconf"] * len(slots), len(slots))

    def enough(self, candidates: Candidates, probabilities: np.ndarray) -> np.ndarray | None:
        places = np.arange(len(candidates.slots))
        return np.sort(ranked(probabilities.max(axis=1), places)[: self.budget])


def chooser_for(config: SamplerConfig) -> Chooser:
    """Return the chooser that `sampler.*` describes."""
    budget = config.most_frames
    if config.mode == "uniform":
        return Uniform(budget)
    if config.mode == "random":
        return Random(budget, config.seed)
    if config.mode == "maxconf":
        return MostConfident(budget)
    if config.mode == "maxconf-l":
        return Ranked(budget, config.mode)
    return salient_for(config, config.mode, budget, adaptive=config.budget == "adaptive")


def salient_for(config: SamplerConfig, mode: TSQMode, budget: int, *, adaptive: bool) -> Chooser:
    """Return TSQNet's chooser with these settings, except for the modules and the budget."""
    chooser_class = Diverse if config.selection == "dpp" else Salient
    salient = chooser_class(budget, config.lambda_visual, mode)
    return UntilConfident(salient, config.margin) if adaptive else salient


def choose(chooser: Chooser, view: View, probabilities: np.ndarray) -> np.ndarray:
    """Return the chosen slots, int [<= K], ascending.

    `probabilities`: the recogniser's for every slot, [T, C].
    """
    candidates = chooser.candidates(view)
    seen = candidates.first
    while (places := chooser.enough(candidates, probabilities[candidates.slots[:seen]])) is None:
        seen += 1
    return np.sort(candidates.slots[places])

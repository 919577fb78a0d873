"""Measure a sampler of your own beside TSQNet: custom_sampler.py FEATURES BUNDLE [K].

FEATURES is a folder of `tsq extract --recognizer`: it holds the recogniser's answer for every
frame, so nothing is decoded. A sampler is a `Chooser` (tsq_ray/model/choosers.py). This one cuts
the video into K parts and takes the frame of each part at which the picture changes most.
"""

import sys
from dataclasses import dataclass

import numpy as np

from tsq_ray.bundle.weights import load_bundle
from tsq_ray.evaluation.measures import measure_sampler
from tsq_ray.evaluation.samplers import Sampler, change_scores
from tsq_ray.evaluation.trainings import saliencies
from tsq_ray.evaluation.videos import load_features
from tsq_ray.model.choosers import Candidates, Salient, Uniform, View
from tsq_ray.model.selection import distinct_slots


@dataclass(frozen=True)
class ChangePerPart:
    """The frame with the largest change in each of K parts."""

    budget: int

    def candidates(self, view: View) -> Candidates:
        """Return the chosen slots; the recogniser sees all of them at once."""
        parts = np.array_split(distinct_slots(view.frame_index), self.budget)
        chosen = [part[view.scores[part].argmax()] for part in parts if len(part)]
        return Candidates(np.array(chosen), ["change"] * len(chosen), len(chosen))

    def enough(self, candidates: Candidates, probabilities: np.ndarray) -> np.ndarray:
        """Keep all candidates, whatever the recogniser answers."""
        return np.arange(len(candidates.slots))


def main(features: str, model: str, budget: str = "4") -> None:
    """Print mAP and top-1 of uniform frames, of this sampler and of the bundle's TSQNet."""
    bundle = load_bundle(model)
    videos, task = load_features(features, bundle, None).measured, bundle.task
    arrays = {name: getattr(videos, name) for name in ("visual", "object_ids", "object_probs")}
    top = bundle.sampler_defaults.top_classes
    visual, textual = saliencies(bundle.sampler, arrays, bundle.vocabulary, task, top)
    weight = bundle.sampler_defaults.lambda_visual
    samplers = {
        "uniform": Sampler(videos, task, Uniform),
        "change per part": Sampler(videos, task, ChangePerPart, scores=change_scores(videos)),
        "TSQNet": Sampler(videos, task, lambda k: Salient(k, weight), visual, textual),
    }
    for name, sampler in samplers.items():
        found = measure_sampler(videos, sampler, int(budget), task, None)
        print(f"{name}: mAP {found.map:.3f}, top-1 {found.top1:.3f}, {found.frames:.1f} frames")


if __name__ == "__main__":
    main(*sys.argv[1:])

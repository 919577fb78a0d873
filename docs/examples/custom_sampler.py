"""Compare your own sampler with TSQNet: custom_sampler.py FEATURES BUNDLE [K].

FEATURES is a folder of `tsq extract --recognizer`: it holds the recogniser's answer for every
frame, so nothing is decoded. A sampler is a `tsq_ray.Chooser`. This one cuts the video into K parts
and takes the frame of each part at which the picture changes most.
"""

import sys
from dataclasses import dataclass

import numpy as np

import tsq_ray


@dataclass(frozen=True)
class ChangePerPart:
    """The frame that differs most from the one before it, in each of K parts."""

    budget: int

    def candidates(self, view: tsq_ray.View) -> tsq_ray.Candidates:
        """Return the chosen slots; the recogniser sees all of them at once."""
        slots = np.unique(view.frame_index, return_index=True)[1]  # a short video repeats frames
        frames = view.features[slots].astype(np.float32)
        frames /= np.linalg.norm(frames, axis=1, keepdims=True)
        change = np.r_[0.0, 1 - (frames[1:] * frames[:-1]).sum(axis=1)]
        parts = np.array_split(np.arange(len(slots)), self.budget)
        chosen = [slots[part[change[part].argmax()]] for part in parts if len(part)]
        return tsq_ray.Candidates(np.array(chosen), ["change"] * len(chosen), len(chosen))

    def enough(self, candidates: tsq_ray.Candidates, probabilities: np.ndarray) -> np.ndarray:
        """Keep all candidates, whatever the recogniser answers."""
        return np.arange(len(candidates.slots))


def main(features: str, model: str, budget: str = "4") -> None:
    """Print mAP and top-1 of uniform frames, the bundle's TSQNet and this sampler."""
    own = {"change per part": ChangePerPart}
    for name, row in tsq_ray.measure_samplers(features, model, own, int(budget)).items():
        print(f"{name}: mAP {row.map:.3f}, top-1 {row.top1:.3f}, {row.frames:.1f} frames")


if __name__ == "__main__":
    main(*sys.argv[1:])

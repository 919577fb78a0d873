"""The samplers that `tsq evaluate` compares, as data: how each is trained and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tsq_ray.config import TSQMode
from tsq_ray.evaluation.measures import Cost
from tsq_ray.evaluation.selectors import BY_SCORE


@dataclass(frozen=True)
class Method:
    """A sampler of the catalogue `METHODS`."""

    name: str
    what: str
    """Description in one line, for the table's notes."""
    cost: Cost | None
    """None: no computation achieves it (the oracle)."""
    train: Mapping[str, Any] | None = None
    """Overrides of `train.*`, if the evaluation trains the sampler's network."""
    mode: TSQMode = "both"
    """`sampler.mode` of a network."""
    adaptive: bool = False
    """Whether the recogniser stops as soon as it is sure, after at most K frames."""
    selector: str = ""
    """Key of `selectors.SELECTORS`; empty: frames are chosen as described in `what`."""
    score: str = ""
    """The selector's score: "maxconf-l", "maxconf" or "tsqnet"; empty: features alone."""

    @property
    def trained(self) -> bool:
        """Whether it has to be fitted before it is measured."""
        return self.train is not None or self.name == "scsampler"


_AGNOSTIC = {"modules": "visual", "attention": "class-agnostic", "classifier": "class-specific"}
_JOINT = {"modules": "both"}

METHODS = (
    Method("uniform", "slots floor((i + 0.5) T / K)", "uniform"),
    Method("random", "K frames at random", "uniform"),
    Method("dense", "the recogniser on all T frames, independent of K", "maxconf"),
    Method(
        "maxconf",
        "the K frames on which the recogniser is most confident, after seeing all T",
        "maxconf",
    ),
    Method(
        "maxconf-l",
        "the K frames on which the light encoder's frame head is most confident",
        "maxconf-l",
    ),
    Method(
        "stillness",
        "the K frames whose visual features differ least from their neighbours' (mean 1 - cosine)",
        "maxconf-l",
    ),
    Method(
        "motion",
        "the K frames whose visual features differ most from their neighbours'",
        "maxconf-l",
    ),
    Method(
        "attention",
        "class-agnostic attention: one query for all classes, whose attention is the saliency",
        "visual",
        _AGNOSTIC,
    ),
    Method(
        "scsampler",
        "after Korbar et al. 2019: a multilayer perceptron on the light encoder's features, fitted "
        "to rank frames like the recogniser's probability of the true class",
        "scsampler",
    ),
    Method(
        "vqm-only",
        "the visual query module, trained alone",
        "visual",
        {"modules": "visual"},
        "visual",
    ),
    Method(
        "vqm", "the visual module of the joint network (lambda_v = 1)", "visual", _JOINT, "visual"
    ),
    Method(
        "tqm",
        "the textual module of the joint network (lambda_v = 0)",
        "textual",
        _JOINT,
        "textual",
    ),
    Method("tsqnet", "both modules, trained with each seed", "both", _JOINT, "both"),
    Method(
        "adaptive",
        "tsqnet's frames one by one, at most K, until the recogniser's summed probabilities put "
        "one class sampler.margin frames ahead",
        "both",
        _JOINT,
        "both",
        adaptive=True,
    ),
    Method("bundle", "the network of --model, unchanged", "both"),
    Method("oracle", "an oracle restricted to the T frames", None),
)

_SCORES: dict[str, tuple[Cost, str]] = {
    "maxconf-l": ("maxconf-l", "confidence of the light encoder's frame head"),
    "maxconf": ("maxconf", "confidence of the recogniser, which sees all T frames"),
    "tsqnet": ("both", "lambda_v of the visual plus 1 - lambda_v of the textual saliency"),
}
"""The scores that a selector can use: cost and description."""


def score_notes() -> dict[str, str]:
    """Return a description of each score in the table `selectors`."""
    return {score: what for score, (_, what) in _SCORES.items()}


def _selecting(selector: str, score: str = "") -> Method:
    cost, what = _SCORES.get(score, ("maxconf-l", "features of the light encoder"))
    train = _JOINT if score == "tsqnet" else None
    name = f"{selector} by {score}" if score else selector
    return Method(name, what, cost, train, selector=selector, score=score)


SELECTING = (
    *(method for method in METHODS if method.name in ("uniform", *_SCORES)),
    _selecting("top-k", "tsqnet"),
    _selecting("k-center"),
    _selecting("maxinfo"),
    *(_selecting(selector, score) for score in _SCORES for selector in BY_SCORE),
)
"""The samplers of the table `selectors`; the rows maxconf-l and maxconf are top-k by that score."""

SAMPLE_SIZES = (25, 50, 100, 200, 320)
"""Numbers of training videos in the table `teacher`."""
_TAUGHT = {**_JOINT, "target": "teacher"}
TEACHING = (
    *(method for method in METHODS if method.name in ("uniform", *_SCORES)),
    Method("teacher", "tsqnet, taught by the recogniser instead of the labels", "both", _TAUGHT),
    *(
        Method(
            f"teacher, {count} videos",
            f"the same, on {count} of the training videos",
            "both",
            {**_TAUGHT, "max_videos": count},
        )
        for count in SAMPLE_SIZES
    ),
)
"""The samplers of the table `teacher`."""


def method_named(name: str) -> Method:
    """Return the sampler of `METHODS` with this name."""
    return next(method for method in METHODS if method.name == name)

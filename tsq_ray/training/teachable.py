"""Whether the features of a sample can teach a sampler, before any training."""

from __future__ import annotations

from collections import Counter

from tsq_ray import storage
from tsq_ray.config import TrainConfig
from tsq_ray.errors import RunError
from tsq_ray.runs.columns import read_part
from tsq_ray.runs.done import list_parts
from tsq_ray.training.features import DEFAULT_SPLIT, FeatureSource, open_training_set
from tsq_ray.training.teacher import Teacher, too_few


def why_untaught(
    features: str, classes: tuple[str, ...], settings: TrainConfig, held_out: str
) -> str | None:
    """Say why the recogniser cannot teach a sampler on these features; None if it can.

    Raises RunError if no video is usable. `classes` are the recogniser's; the sampler is measured
    on the split `held_out`.
    """
    usable = _usable(features)
    if not usable:
        raise RunError(
            f"{storage.redact(features)}: no video of the sample is ok, so nothing can be learned "
            "about the archive; the errors are in the column error_message"
        )
    learned, measured = usable[DEFAULT_SPLIT], usable[held_out]
    if not learned or not measured:
        return (
            f"{learned} usable videos to learn from and {measured} to measure it on, and each "
            "needs at least one"
        )
    teacher = Teacher(classes, settings.teacher_frames)
    source = FeatureSource.of(
        features, DEFAULT_SPLIT, settings.task, False, settings.max_videos, teacher
    )
    with open_training_set(source) as videos:
        return too_few(videos.targets, settings.teacher_min_videos, settings.task)


def _usable(features: str) -> Counter[str]:
    """Count the ok videos of each split."""
    counts: Counter[str] = Counter()
    for part in list_parts(storage.normalize(features)):
        rows = read_part(part.uri, ["split", "status"]).to_pylist()
        counts.update(row["split"] for row in rows if row["status"] == "ok")
    return counts

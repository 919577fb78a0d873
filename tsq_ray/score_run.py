"""A scoring run: its identity, its folder and its rows, for any sender of its videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import pyarrow as pa

from tsq_ray import quality, schema, storage
from tsq_ray.bundle.settings import (
    NO_RECOGNIZER,
    read_agreement,
    read_bundle_settings,
    read_curves,
    recognizer_of,
    server_of,
)
from tsq_ray.config import TSQ_MODES, Config
from tsq_ray.errors import ModelError
from tsq_ray.manifest import VideoRef
from tsq_ray.rows import Answer, Row, prediction_row
from tsq_ray.runs.bulk import BulkRun, Selection
from tsq_ray.runs.columns import read_part
from tsq_ray.runs.done import list_parts
from tsq_ray.runs.identity import Identity


@dataclass(frozen=True)
class ScoreRun:
    """A run of predictions over a manifest; enter it with `with scored.run`."""

    run: BulkRun
    schema: pa.Schema
    """Schema of the predictions."""
    labels: list[str]
    """The manifest's class names, which `labels` of its rows index."""
    about: Mapping[str, Any]
    """Keys of `_run.json` that describe the bundle."""

    @classmethod
    def of(
        cls,
        selection: Selection,
        model: str,
        out: str,
        config: Config,
        *,
        with_scores: bool = True,
        **options: Any,
    ) -> Self:
        """Prepare a run into the folder `out`.

        `options`: `started` and `take_over` of BulkRun. Raises ModelError if the bundle cannot
        score.
        """
        content, digest = read_bundle_settings(model)
        if (recognizer := recognizer_of(content)) is None:
            raise ModelError(f"{storage.redact(model)}: {NO_RECOGNIZER}")
        classes, labels = list(content["classes"]), selection.manifest.classes
        about = {
            "model": {"uri": storage.redact(model), "sha256": digest},
            "bundle_classes": classes,
            "task": content["task"],
            "with_scores": with_scores,
            "training_curve": read_curves(model),
        }
        if (agreement := read_agreement(model)) is not None:
            about["agreement"] = agreement
        arrow = schema.predictions_schema(
            config.decode.num_frames,
            len(classes),
            labels,
            with_scores,
            from_server=recognizer.kind == "openai",
        )
        identity = identity_of(content, digest, config, with_scores)
        run = BulkRun(out, "predictions", identity, selection, config, **options)
        return cls(run, arrow, labels, about)

    def close(self, seconds: Mapping[str, float]) -> dict[str, Any]:
        """Close the run, with the metrics over its labelled videos; return its `_run.json`.

        `seconds`: time by stage.
        """
        classes = self.about["bundle_classes"]
        return self.run.close(
            seconds, lambda: {**self.about, "metrics": measure_predictions(self.run.out, classes)}
        )


def prediction_of(ref: VideoRef, answer: Answer, labels: Sequence[str]) -> Row:
    """Return the prediction row of a video, with the names of its labels."""
    row = prediction_row(ref, answer)
    if ref.labels is not None:
        row["label_names"] = [labels[number] for number in ref.labels]
    return row


def identity_of(
    bundle: Mapping[str, Any], digest: str, config: Config, with_scores: bool
) -> Identity:
    """Return what decides whether two runs do the same work."""
    sampler = config.sampler.record()
    if config.sampler.mode != "random":
        sampler.pop("seed")
    if config.sampler.budget != "adaptive":  # keeps runs made before these settings valid
        sampler.pop("max_budget")
        sampler.pop("margin")
    if config.sampler.mode not in TSQ_MODES:
        sampler.pop("selection", None)
    # for the same reason the backend counts only if it differs from the bundle's own
    own = bundle["config"]["decode"].get("backend", config.decode.backend)
    backend = config.decode.backend
    decode = {"decode": {"backend": backend}} if backend != own else {}
    scores = "all" if with_scores else "top"
    server = server_of(bundle)
    moved = server is not None and server.config.url != config.recognizer.url
    recognizer = {"recognizer": {"url": config.recognizer.url}} if moved else {}
    return Identity.of(model_sha256=digest, sampler=sampler, scores=scores, **decode, **recognizer)


def measure_predictions(predictions_uri: str, classes: Sequence[str]) -> dict[str, Any]:
    """Return mAP (both conventions) and top-1 over the labelled videos that are ok.

    Label names that the bundle lacks are counted and left out.
    """
    readers = [partial(read_part, part.uri) for part in list_parts(predictions_uri)]
    return quality.measure_parts(readers, classes)

"""`tsq label`: an archive without labels, from its files to a scored archive with a report.

The recogniser labels a sample densely and teaches TSQNet; held-out videos of the sample show how
often K frames give the same answer; the archive is labelled with the smallest sufficient K.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from tsq_ray import log, storage
from tsq_ray.bundle.overrides import scoring_config
from tsq_ray.bundle.settings import (
    is_bundle,
    read_agreement,
    read_bundle_settings,
    read_classifier_settings,
    write_agreement,
)
from tsq_ray.bundle.weights import classifier_settings, load_bundle
from tsq_ray.config import SERVER_USE, Config, check_budget, check_top_objects, load_config
from tsq_ray.cost import Used
from tsq_ray.errors import ConfigError, ModelError
from tsq_ray.evaluation.agreement import Agreement, cheapest, measure_agreement
from tsq_ray.evaluation.videos import VAL_SPLIT, load_features
from tsq_ray.extraction import extract
from tsq_ray.manifest import Manifest, build_manifest, read_manifest, write_manifest
from tsq_ray.manifest.videos import VideoRows, keys_of
from tsq_ray.reporting import build_report
from tsq_ray.reporting.agreement import verdict
from tsq_ray.results import LabelSummary, RunSummary
from tsq_ray.runs.folder import check_folder, read_json, read_run, write_json
from tsq_ray.runs.identity import Identity
from tsq_ray.runtime.session import DEFAULT_SESSION, Session
from tsq_ray.score_run import identity_of
from tsq_ray.scoring import score
from tsq_ray.training import train
from tsq_ray.training.sampler.components import Embeddings

HELD_OUT = 0.4
"""Share of the sample held out of training; 200 of 500 videos make 93 % certain to 4 points."""
_IDENTITY_FILE = "label.json"
"""Records what the folder was begun with; written first."""


def label(
    sources: str | Sequence[str],
    recognizer: str,
    out: str,
    config: Config | None = None,
    *,
    sample: int = 500,
    agreement: float = 0.95,
    with_scores: bool = True,
    session: Session = DEFAULT_SESSION,
) -> LabelSummary:
    """Label an archive without labels, from what a recogniser sees in a few frames of each video.

    `out` then holds what the individual commands would have written: manifest.parquet,
    sample.parquet, features, bundle, predictions and report.html. Every step resumes; finished ones
    are kept. Raises UserError for wrong input, RunFailed if a step fails.

    Args:
        sources: folders, `s3://` prefixes or video files.
        recognizer: what `finetune` or `import_network` wrote.
        out: folder of the results.
        config: the settings; `load_config()` by default. `train.target` is "teacher" here, and the
            held-out videos choose `sampler.mode` and `sampler.budget`.
        sample: number of videos that the recogniser sees densely; two fifths of them are held out.
        agreement: minimum share of the held-out videos on which the chosen frames must give the
            dense recogniser's best class.
        with_scores: keep the scores of all classes.
        session: the cluster to use and the output to show.
    """
    started, config = time.time(), config or load_config()
    _check_numbers(sample, agreement)
    train_config = config.train.model_copy(update={"target": "teacher"})
    config = config.model_copy(update={"train": train_config})
    steps = _Steps(storage.normalize(out), recognizer, config, session)
    steps.check()
    steps.index(sources, sample)
    features = steps.teach()
    measured = steps.measure(agreement)
    _say(verdict(measured))
    predictions = steps.score(measured, with_scores)
    _say("report")
    report = build_report(steps.at("predictions"), steps.at("report.html"))
    return LabelSummary(
        out=storage.redact(steps.out),
        sample=len(read_manifest(steps.at("sample.parquet")).rows),
        held_out=measured["videos"],
        asked=agreement,
        curve=measured["curve"],
        chosen=measured["chosen"],
        verdict=verdict(measured),
        features=features,
        predictions=predictions,
        used=steps.used(),
        report=report.out,
        seconds=round(time.time() - started, 2),
    )


@dataclass(frozen=True)
class _Steps:
    """The commands that `label` calls in turn, each with its own output below `out`."""

    out: str
    recognizer: str
    config: Config
    session: Session

    def at(self, name: str) -> str:
        return storage.join(self.out, name)

    def check(self) -> None:
        """Raise UserError for what would otherwise fail only after the extraction."""
        config, what = self.config, f"--recognizer {storage.redact(self.recognizer)}"
        content, _ = read_classifier_settings(self.recognizer)
        recognizer = classifier_settings(self.recognizer)
        if recognizer.clip_frames > 1:
            raise ModelError(
                f"{what}: takes clips of {recognizer.clip_frames} frames, and a teacher must "
                "answer for single frames; use an image classifier or a dual encoder"
            )
        if (task := content["task"]) != config.train.task:
            raise ModelError(
                f"{what}: answers for task {task!r}, train.task is {config.train.task!r}; "
                f"add --set train.task={task}"
            )
        check_budget(config.sampler, config.decode.num_frames, task, recognizer)
        if config.train.modules == "both":
            check_top_objects(config.train.top_objects, config.encoders.num_objects)
            if not is_bundle(self.at("bundle")):
                Embeddings.make(config, content["classes"])

    def index(self, sources: str | Sequence[str], sample: int) -> None:
        """List the videos and draw the sample, unless it was drawn before."""
        self._enter(sources, sample)
        manifest, drawn = self.at("manifest.parquet"), self.at("sample.parquet")
        _say("index: list the videos")
        build_manifest(sources, manifest, labels="none", update=storage.exists(manifest))
        if not storage.exists(drawn):
            write_manifest(draw_sample(read_manifest(manifest), sample), drawn)

    def _enter(self, sources: str | Sequence[str], sample: int) -> None:
        """Begin or reopen the folder. Raises RunError if it was begun with other input."""
        places = [sources] if isinstance(sources, str) else sources
        identity = Identity.of(
            sources=sorted(storage.redact(storage.normalize(place)) for place in places),
            recognizer_sha256=read_classifier_settings(self.recognizer)[1],
            sample=sample,
        )
        begun = self.at(_IDENTITY_FILE)
        before = read_json(begun)
        if before is None:
            storage.check_writable(self.out)
            write_json(begun, identity.parts)
        else:
            identity.refuse_other(before, self.out, "holds another labelling")

    def teach(self) -> RunSummary:
        """Extract the sample with the recogniser and train the sampler on it.

        Returns the summary of the extraction.
        """
        options: dict[str, Any] = {"recognizer": self.recognizer, "session": self.session}
        _say("extract: the recogniser on every frame of the sample")
        done = extract(self.at("sample.parquet"), self.at("features"), self.config, **options)
        _say("train: the recogniser teaches the sampler")
        train(self.at("features"), self.at("bundle"), self.config, **options)
        return done

    def measure(self, minimum: float) -> dict[str, Any]:
        """Measure the held-out videos, unless that was done, and choose a budget."""
        model = self.at("bundle")
        measured = read_agreement(model)
        if measured is None:
            bundle = load_bundle(model)
            features = load_features(self.at("features"), bundle, VAL_SPLIT, labelled=False)
            settings = (self.config.sampler, self.config.train.teacher_frames)
            curve = measure_agreement(bundle, features.measured, *settings)
            measured = {
                "videos": len(features.measured),
                "curve": [asdict(point) for point in curve],
            }
        chosen = cheapest([Agreement(**point) for point in measured["curve"]], minimum)
        return measured | {"asked": minimum, "chosen": asdict(chosen)}

    def score(self, measured: Mapping[str, Any], with_scores: bool) -> RunSummary:
        """Store the curve and the choice in the bundle, and score every video as chosen.

        Raises RunError, and stores nothing, if `out` holds videos scored with another choice.
        """
        manifest, model, out = map(self.at, ("manifest.parquet", "bundle", "predictions"))
        config = self._scoring(measured["chosen"])
        identity = identity_of(*read_bundle_settings(model), config, with_scores)
        check_folder(out, "predictions", read_manifest(manifest), identity)
        write_agreement(model, measured)
        _say("score: every video")
        return score(manifest, model, out, config, with_scores=with_scores, session=self.session)

    def used(self) -> dict[str, Any] | None:
        """Return what the extraction and the scoring took together, from their `_run.json`."""
        runs = (read_run(self.at("features")), read_run(self.at("predictions")))
        used = Used.together(map(Used.of_run, runs))
        return None if used is None else asdict(used)

    def _scoring(self, chosen: Mapping[str, Any]) -> Config:
        """Return the bundle's settings with the choice and what this run may change."""
        kept = self.config.model_dump(mode="json", include={"resources", "output", "serve"})
        kept["sampler"] = {name: chosen[name] for name in ("mode", "budget")}
        kept["recognizer"] = self.config.recognizer.model_dump(
            mode="json", include=set(SERVER_USE), exclude_defaults=True
        )
        return scoring_config(self.at("bundle"), settings=kept)


def _say(line: str) -> None:
    log.say(f"label: {line}")


def _check_numbers(sample: int, agreement: float) -> None:
    if not 0 < agreement <= 1:
        raise ConfigError(f"--agreement {agreement:g}: expected a share, above 0 and at most 1")
    if sample < 10:
        raise ConfigError(
            f"--sample {sample}: expected at least 10 videos (4 are held out); 500 by default"
        )


def draw_sample(manifest: Manifest, count: int) -> Manifest:
    """Return a random sample of at most `count` videos, in the splits `train` and `val`.

    Takes the videos with the lowest ids: ids are hashes, so the sample is random but reproducible.
    """
    order = np.argsort(keys_of(manifest.rows.ids), kind="stable")[:count]
    table = manifest.rows.take(order).table
    held_out = round(len(table) * HELD_OUT)
    splits = ["train"] * (len(table) - held_out) + [VAL_SPLIT] * held_out
    place = table.column_names.index("split")
    table = table.set_column(place, table.schema.field("split"), pa.array(splits, pa.string()))
    return Manifest(VideoRows(table), manifest.classes, manifest.id, manifest.sources)

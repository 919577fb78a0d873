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
    BUNDLE_FILE,
    is_bundle,
    read_agreement,
    read_bundle_settings,
    read_classifier_settings,
    with_choice,
    write_agreement,
    write_settings,
)
from tsq_ray.bundle.weights import classifier_settings, load_bundle
from tsq_ray.config import SERVER_USE, Config, check_budget, check_top_objects, load_config
from tsq_ray.cost import Used
from tsq_ray.errors import ConfigError, ModelError
from tsq_ray.evaluation.agreement import Agreement, cheapest, measure_agreement
from tsq_ray.evaluation.videos import EVERY_SPLIT, VAL_SPLIT, load_features
from tsq_ray.extraction import extract
from tsq_ray.manifest import Manifest, build_manifest, read_manifest, write_manifest
from tsq_ray.manifest.videos import VideoRows, keys_of
from tsq_ray.reporting import build_report
from tsq_ray.reporting.agreement import UNTAUGHT, verdict
from tsq_ray.results import LabelSummary, RunSummary, TrainingSummary
from tsq_ray.runs.folder import check_folder, read_json, read_run, write_json
from tsq_ray.runs.identity import Identity
from tsq_ray.runtime import cluster
from tsq_ray.runtime.session import DEFAULT_SESSION, Session
from tsq_ray.score_run import identity_of
from tsq_ray.scoring import score
from tsq_ray.training import train
from tsq_ray.training.sampler.components import Embeddings
from tsq_ray.training.sampler.tsqnet import keep_untaught
from tsq_ray.training.teachable import why_untaught

HELD_OUT = 0.4
"""Share of the sample held out of training; 200 of 500 videos make 93 % certain to 4 points."""
_TO_TEACH = (
    "uniform frames or every frame are used; to teach one, use another --out with a larger "
    "--sample or a lower train.teacher_min_videos"
)
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
            held-out videos choose `sampler.mode` and `sampler.budget`. If the sample cannot teach a
            sampler, only uniform frames and every frame are measured, on all of its videos.
        sample: number of videos that the recogniser sees densely; two fifths of them are held out.
        agreement: minimum share of the held-out videos on which the chosen frames must give the
            dense recogniser's best class.
        with_scores: keep the scores of all classes.
        session: the cluster to use and the output to show.
    """
    started, config = time.time(), config or load_config()
    _check_numbers(sample, agreement)
    config = _label_config(config)
    steps = _Steps(storage.normalize(out), recognizer, config, session)
    steps.check()
    steps.check_cluster()
    steps.index(sources, sample)
    features, training = steps.teach()
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
        training=training,
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

    def check_cluster(self) -> None:
        """Raise if the cluster cannot be joined or a node of it cannot see `out`."""
        if self.session.joins_cluster:
            with cluster.connect(self.session, out=self.out):
                pass

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

    def teach(self) -> tuple[RunSummary, TrainingSummary | None]:
        """Extract the sample with the recogniser and train the sampler on it.

        Returns the summary of the extraction and, if the sample can teach, of the training.
        """
        options: dict[str, Any] = {"recognizer": self.recognizer, "session": self.session}
        _say("extract: the recogniser on every frame of the sample")
        done = extract(self.at("sample.parquet"), self.at("features"), self.config, **options)
        features, model = self.at("features"), self.at("bundle")
        if (why := self._why_untaught()) is None:
            _say("train: the recogniser teaches the sampler")
            return done, train(features, model, self.config, **options)
        _say(f"{UNTAUGHT} ({why}): {_TO_TEACH}")
        keep_untaught(features, model, self.config, self.recognizer, why)
        return done, None

    def _why_untaught(self) -> str | None:
        """Say why the sample cannot teach a sampler; None if it can. Kept in the bundle."""
        if is_bundle(self.at("bundle")):
            provenance = read_bundle_settings(self.at("bundle"))[0]["provenance"]
            return provenance.get("untaught")
        classes = tuple(read_classifier_settings(self.recognizer)[0]["classes"])
        return why_untaught(self.at("features"), classes, self.config.train, VAL_SPLIT)

    def measure(self, minimum: float) -> dict[str, Any]:
        """Measure the held-out videos, unless that was done, and choose a budget."""
        model = self.at("bundle")
        measured = read_agreement(model)
        if measured is None:
            bundle = load_bundle(model)
            split = VAL_SPLIT if bundle.is_taught else EVERY_SPLIT
            options = {"labelled": False, "with_training": False}
            features = load_features(self.at("features"), bundle, split, **options)
            settings = (self.config.sampler, self.config.train.teacher_frames)
            curve = measure_agreement(bundle, features.measured, *settings)
            measured = {
                "videos": len(features.measured),
                "curve": [asdict(point) for point in curve],
            }
            if not bundle.is_taught:
                measured["untaught"] = bundle.provenance["untaught"]
        chosen = cheapest([Agreement(**point) for point in measured["curve"]], minimum)
        return measured | {"asked": minimum, "chosen": asdict(chosen)}

    def score(self, measured: Mapping[str, Any], with_scores: bool) -> RunSummary:
        """Store the curve and the choice in the bundle, and score every video as chosen.

        Raises RunError, and stores nothing, if `out` holds videos scored with another choice.
        """
        manifest, model, out = map(self.at, ("manifest.parquet", "bundle", "predictions"))
        config = self._scoring(measured["chosen"])
        content, digest = with_choice(read_bundle_settings(model)[0], measured["chosen"])
        identity = identity_of(content, digest, config, with_scores)
        check_folder(out, "predictions", read_manifest(manifest), identity)
        write_agreement(model, measured)
        write_settings(model, BUNDLE_FILE, content)
        _say("score: every video")
        return score(manifest, model, out, config, with_scores=with_scores, session=self.session)

    def used(self) -> dict[str, Any] | None:
        """Return what the extraction, the training and the scoring took together."""
        runs = (read_run(self.at("features")), read_run(self.at("predictions")))
        trained = read_bundle_settings(self.at("bundle"))[0]["provenance"].get("summary", {})
        used = Used.together([*map(Used.of_run, runs), Used.of_hours(trained.get("used", {}))])
        return None if used is None else asdict(used)

    def _scoring(self, chosen: Mapping[str, Any]) -> Config:
        """Return the bundle's settings with the choice and what this run may change."""
        kept = self.config.model_dump(mode="json", include={"resources", "output", "serve"})
        kept["sampler"] = {name: chosen[name] for name in ("mode", "budget")}
        kept["recognizer"] = self.config.recognizer.model_dump(
            mode="json", include=set(SERVER_USE), exclude_defaults=True
        )
        return scoring_config(self.at("bundle"), settings=kept)


def _label_config(config: Config) -> Config:
    """Return the settings of every step: the recogniser teaches, and a K above T is lowered to T.

    K is chosen later.
    """
    sampler, num_frames = config.sampler, config.decode.num_frames
    if sampler.budget != "adaptive":
        budget = min(sampler.budget, num_frames)
        sampler = sampler.model_copy(update={"budget": budget})
    train_config = config.train.model_copy(update={"target": "teacher"})
    return config.model_copy(update={"train": train_config, "sampler": sampler})


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

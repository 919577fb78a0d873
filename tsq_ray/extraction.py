"""Bulk extraction of features, one row per video; feature_pipeline.py has the Ray Data pipeline."""

from __future__ import annotations

import time

from tsq_ray import storage
from tsq_ray.bundle.weights import classifier_settings
from tsq_ray.config import Config, load_config
from tsq_ray.feature_pipeline import Networks, extract_features
from tsq_ray.manifest import read_manifest
from tsq_ray.results import RunSummary
from tsq_ray.runs.bulk import Selection
from tsq_ray.runtime.session import DEFAULT_SESSION, Session


def extract(
    manifest_uri: str,
    out: str,
    config: Config | None = None,
    *,
    encoder: str | None = None,
    recognizer: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    retry_failed: str | None = None,
    take_over: bool = False,
    session: Session = DEFAULT_SESSION,
) -> RunSummary:
    """Extract the features of every video of a manifest into the run folder `out`.

    Resumes an earlier run. Raises UserError for wrong input, RunFailed if the run failed or does
    not add up.

    Args:
        manifest_uri: what `build_manifest` wrote.
        out: the run folder.
        config: the settings; `load_config()` by default.
        encoder: what `finetune` or `import_network` wrote; it replaces `encoders.visual`.
        recognizer: what `finetune` or `import_network` wrote; its logits for each frame are
            stored too.
        split: only the videos of this split.
        limit: at most this many videos, in the order of the manifest.
        retry_failed: also retry the videos that failed for this reason; "all" for any.
        take_over: take the folder from another run that is writing to it.
        session: the cluster to use and the output to show.
    """
    started = time.time()
    out = storage.normalize(out)
    manifest = read_manifest(manifest_uri)
    selection = Selection.of(manifest, split, limit, retry_failed)
    config, networks = choose_networks(config or load_config(), encoder, recognizer)
    loaded = networks.load()
    record = extract_features(
        out, selection, config, networks, loaded, session, started=started, take_over=take_over
    )
    return RunSummary.of(storage.redact(out), record)


def choose_networks(
    config: Config, encoder: str | None, recognizer: str | None
) -> tuple[Config, Networks]:
    """Return the settings and networks of an extraction.

    `encoder` and `recognizer` are outputs of `finetune`; an encoder replaces `encoders.visual`. A
    recogniser behind a server becomes `recognizer`, with that section's settings for its use.
    """
    if encoder is not None:
        config = config.with_visual_encoder(classifier_settings(encoder))
    model = classifier_settings(recognizer) if recognizer is not None else None
    if model is not None and model.kind == "openai":
        model = config.recognizer.used_for(model)
        config = config.model_copy(update={"recognizer": model})
    return config, Networks(config.encoders.visual, config.encoders.objects, model)

"""Ray Data: manifest -> feature Parquet, one row a video. How it is done is in feature_pipeline.py."""

from __future__ import annotations

import time
from typing import Any

from tsq_ray import runs, storage
from tsq_ray.config import Config
from tsq_ray.feature_pipeline import Networks, extract_features
from tsq_ray.manifest import read_manifest
from tsq_ray.runtime.session import DEFAULT_SESSION, Session
from tsq_ray.stages import classifier_settings


def extract(
    manifest_uri: str,
    out: str,
    config: Config,
    *,
    encoder: str | None = None,
    recognizer: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    retry_failed: str | None = None,
    take_over: bool = False,
    session: Session = DEFAULT_SESSION,
) -> dict[str, Any]:
    """Extract features of every video of a manifest into the run folder `out`; resumes an earlier run.

    `encoder` and `recognizer` are outputs of `finetune`. `take_over` takes the folder from another
    run that writes to it. Returns the content of `_run.json`. Raises UserError for wrong input, RunFailed if the run failed or
    does not add up.
    """
    started = time.time()
    out = storage.normalize(out)
    manifest = read_manifest(manifest_uri)
    selection = runs.Selection.of(manifest, split, limit, retry_failed)
    config, networks = choose_networks(config, encoder, recognizer)
    loaded = networks.load()
    return extract_features(
        out, selection, config, networks, loaded, session, started=started, take_over=take_over
    )


def choose_networks(
    config: Config, encoder: str | None, recognizer: str | None
) -> tuple[Config, Networks]:
    """The networks of an extraction, and its settings with them; `encoder` and `recognizer` are outputs of `finetune`."""
    if encoder is not None:
        config = config.model_copy(
            update={
                "encoders": config.encoders.model_copy(
                    update={"visual": classifier_settings(encoder)}
                )
            }
        )
    answers = classifier_settings(recognizer) if recognizer is not None else None
    return config, Networks(config.encoders.visual, config.encoders.objects, answers)

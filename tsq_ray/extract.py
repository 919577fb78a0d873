"""Ray Data: manifest -> feature Parquet, one row a video. The stages themselves are in feature_pipeline.py."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from tsq_ray import runs, storage
from tsq_ray.config import Config
from tsq_ray.feature_pipeline import FeaturePlan, LoadedNetworks, Networks, feature_stage
from tsq_ray.manifest import read_manifest
from tsq_ray.runtime import cluster, progress
from tsq_ray.runtime.bulk import Work, run_bulk
from tsq_ray.runtime.placement import layout
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
    address: str | None = None,
    wait_s: float = 0.0,
    show_progress: bool = True,
    debug: bool = False,
) -> dict[str, Any]:
    """Extract features of every video of a manifest into the run folder `out`; resumes an earlier run.

    `encoder` and `recognizer` are outputs of `finetune`. `take_over` takes the folder from another
    run that writes to it; `wait_s`: the longest wait for room on the cluster (0: no limit). Returns
    the content of `_run.json`. Raises UserError for wrong input, RunFailed if the run failed or
    does not add up.
    """
    started = time.time()
    out = storage.normalize(out)
    manifest = read_manifest(manifest_uri)
    selection = runs.Selection.of(manifest, split, limit, retry_failed)
    config, networks = choose_networks(config, encoder, recognizer)
    loaded = networks.load()
    identity = _identity(config, networks, loaded)
    options: dict[str, Any] = {"started": started, "take_over": take_over}
    with runs.BulkRun(out, "features", identity, selection, config, **options) as run:
        seconds: dict[str, float] = {}
        if run.todo:
            arrow = loaded.features_schema(config, manifest.classes)
            with cluster.connect(address, debug) as ray:
                placed = layout("extract", config, cluster.read_cluster(ray, config), len(run.todo))
                plan = FeaturePlan(config, networks, arrow, progress.start_counts(), placed)
                stage = partial(feature_stage, plan=plan, debug=debug)
                work = Work(plan.first_pool, placed["writer"], stage, arrow, plan.counts)
                seconds = run_bulk("extract", run, work, show=show_progress, wait_s=wait_s)
        return run.close(seconds, lambda: {"weights": loaded.hashes()})


def choose_networks(config: Config, encoder: str | None, recognizer: str | None) -> tuple[Config, Networks]:
    """The networks of an extraction, and its settings with them; `encoder` and `recognizer` are outputs of `finetune`."""
    if encoder is not None:
        config = config.model_copy(update={"encoders": config.encoders.model_copy(update={"visual": classifier_settings(encoder)})})
    answers = classifier_settings(recognizer) if recognizer is not None else None
    return config, Networks(config.encoders.visual, config.encoders.objects, answers)


def _identity(config: Config, networks: Networks, loaded: LoadedNetworks) -> runs.Identity:
    models = {"visual": networks.visual, "objects": networks.objects, "recognizer": networks.recognizer}
    # where weights lie does not matter, what they are does
    shown = {name: model.model_dump(mode="json", exclude={"weights"}) if model is not None else None for name, model in models.items()}
    decode = {"strategy", "backend", "num_frames", "max_pixels", "max_duration_s", "max_bytes"}
    return runs.Identity.of(
        decode=config.decode.model_dump(mode="json", include=decode),
        encoders={"visual": shown["visual"], "objects": shown["objects"], "num_objects": config.encoders.num_objects},
        recognizer=shown["recognizer"],
        weights=loaded.hashes(),
    )

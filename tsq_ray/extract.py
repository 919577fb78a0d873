"""Ray Data: manifest -> feature Parquet, one row a video. The stages themselves are in feature_pipeline.py."""

from __future__ import annotations

import time
from typing import Any

from tsq_ray import runs, storage
from tsq_ray.config import Config
from tsq_ray.feature_pipeline import FeaturePlan, LoadedNetworks, Networks, feature_stage
from tsq_ray.manifest import choose_split, read_manifest
from tsq_ray.runtime import cluster, parts, progress
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
    address: str | None = None,
    wait_s: float = 0.0,
    show_progress: bool = True,
    debug: bool = False,
) -> dict[str, Any]:
    """Features of every video of a manifest into the run folder `out`; goes on where an earlier run stopped.

    `encoder` and `recognizer` are outputs of `finetune`; `wait_s`: the longest wait for room on the cluster (0: no limit). Returns
    the content of `_run.json`. Raises UserError for wrong input, RunFailed where the run failed or does not add up.
    """
    started = time.time()
    out = storage.normalize(out)
    manifest = read_manifest(manifest_uri)
    wanted = choose_split(manifest, split)[:limit]
    retry = runs.retry_reasons(retry_failed)
    config, networks = choose_networks(config, encoder, recognizer)
    loaded = networks.load()
    features = loaded.features_schema(config, manifest.classes)
    todo = runs.enter(out, "features", _identity(config, networks, loaded), manifest, wanted, retry)
    seconds: dict[str, float] = {}
    if todo:
        runs.reopen(out)
        with cluster.connect(address, debug) as ray:
            placed = layout("extract", config, cluster.read_cluster(ray, config), len(todo))
            plan = FeaturePlan(config, networks, features, progress.start_counts(), placed)

            def work() -> tuple[int, dict[str, float]]:
                pools = (plan.first_pool, placed["writer"])
                return parts.publish(
                    todo, *pools, lambda data: feature_stage(data, plan, debug), out, features, config.output, config.resources.batch_size
                )

            try:
                _, seconds = progress.run_with_progress(work, plan.counts, len(todo), "extract", show_progress, wait_s=wait_s)
            except ray.exceptions.RayError as error:
                raise cluster.run_failed(error, "extract") from error
    return runs.close_run(out, "features", manifest, wanted, todo, split, config, started, seconds, lambda: {"weights": loaded.hashes()})


def choose_networks(config: Config, encoder: str | None, recognizer: str | None) -> tuple[Config, Networks]:
    """The networks of an extraction, and its settings with them; `encoder` and `recognizer` are outputs of `finetune`."""
    if encoder is not None:
        config = config.model_copy(update={"encoders": config.encoders.model_copy(update={"visual": classifier_settings(encoder)})})
    answers = classifier_settings(recognizer) if recognizer is not None else None
    return config, Networks(config.encoders.visual, config.encoders.objects, answers)


def _identity(config: Config, networks: Networks, loaded: LoadedNetworks) -> dict[str, Any]:
    models = {"visual": networks.visual, "objects": networks.objects, "recognizer": networks.recognizer}
    # where weights lie does not matter, what they are does
    shown = {name: model.model_dump(mode="json", exclude={"weights"}) if model is not None else None for name, model in models.items()}
    return {
        "decode": config.decode.model_dump(
            mode="json", include={"strategy", "backend", "num_frames", "max_pixels", "max_duration_s", "max_bytes"}
        ),
        "encoders": {"visual": shown["visual"], "objects": shown["objects"], "num_objects": config.encoders.num_objects},
        "recognizer": shown["recognizer"],
        "weights": loaded.hashes(),
    }

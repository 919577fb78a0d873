"""A linear head on a frozen backbone: extract the features, then fit the head to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow.compute as pc

from tsq_ray import log, storage
from tsq_ray.config import Config, ModelConfig
from tsq_ray.cost import Used
from tsq_ray.feature_pipeline import LoadedNetworks, Networks, extract_features
from tsq_ray.networks.encoder import FrameEncoder
from tsq_ray.runs.bulk import Selection
from tsq_ray.runs.columns import read_part
from tsq_ray.runs.done import list_parts
from tsq_ray.runs.lease import Lease
from tsq_ray.runtime import cluster
from tsq_ray.runtime.observer import Observer
from tsq_ray.runtime.placement import layout
from tsq_ray.runtime.session import Session
from tsq_ray.training.classifier.full import Tuned
from tsq_ray.training.features import FeatureSource
from tsq_ray.training.on_worker import features_on_worker


def fit_frozen(
    network: FrameEncoder,
    settings: ModelConfig,
    selection: Selection,
    work: str,
    config: Config,
    session: Session,
    lease: Lease,
    begin: Callable[[], None],
) -> Tuned:
    """Fit a head for `network` (built from `settings`) to the selected videos, all labelled.

    Their features are kept in the folder `work`, so that a stopped run can resume. `begin` is
    called before anything is written there. Raises what `extract_features` raises, and RunFailed if
    the lease is lost.
    """
    features = storage.join(work, "features")
    config, task = config.with_visual_encoder(settings), config.train.task
    networks, loaded = Networks(settings), LoadedNetworks(network, None, None)
    options: dict[str, Any] = {"stage": "finetune", "ticks": (lease.stop_if_lost,)}
    with cluster.connect(session, out=lease.folder) as ray:  # for both steps
        layout("finetune", config, cluster.read_cluster(ray, config), len(selection.wanted))
        begin()
        run = extract_features(features, selection, config, networks, loaded, session, **options)
        log.use_run(lease.holder.run)  # extract_features logged under its own run
        if not (count := run["counts"]["ok"]):
            return Tuned(network, _failed(features), {}, [], {})
        source = FeatureSource.of(features, selection.split, task, with_objects=False)
        with Observer(ray, lease.holder, "finetune", lease.stop_if_lost) as observer:
            where = (config, session, observer.observe)
            with features_on_worker(source, count, "finetune", *where) as data:
                network.head, accuracy = data.fit_head(config.finetune, task)
    happened = Counter(run.get("happened", {})) + Counter(observer.happened)
    figures = {"train_accuracy": accuracy}
    hours = _hours(run, observer.hours)
    return Tuned(network, _failed(features), figures, [], dict(happened), hours)


def _hours(run: Mapping[str, Any], head: Mapping[str, float]) -> dict[str, float]:
    """Return the node hours of the extraction, if this call did some of it, and of the head."""
    extraction = Used.of_run(run)
    spent = {} if extraction is None else {name: getattr(extraction, name) for name in head}
    return {name: round(hours + spent.get(name, 0.0), 6) for name, hours in head.items()}


def _failed(features: str) -> dict[str, str]:
    """Return the error type of each failed video, by video id."""
    errors: dict[str, str] = {}
    for part in list_parts(features):
        table = read_part(part.uri, ["video_id", "status", "error_type"])
        table = table.filter(pc.equal(table["status"], "failed"))
        errors |= dict(
            zip(table["video_id"].to_pylist(), table["error_type"].to_pylist(), strict=True)
        )
    return errors

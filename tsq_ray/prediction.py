"""Score one or a few videos in this process, without Ray."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tsq_ray import storage
from tsq_ray.bundle.overrides import scoring_config
from tsq_ray.bundle.weights import load_bundle
from tsq_ray.config import Config
from tsq_ray.decode import Outcome, VideoSource
from tsq_ray.errors import StorageError, VideoError
from tsq_ray.manifest import VideoRef, video_id
from tsq_ray.networks.encoder import best_device
from tsq_ray.results import Prediction, from_record
from tsq_ray.rows import Row, plain_row, prediction_row
from tsq_ray.stages import Decode, Sample, bundle_specs, recognizer_for


def predict(
    videos: str | Sequence[str], model: str, config: Config | None = None
) -> list[Prediction]:
    """Label one or a few videos (paths or URIs) in this process, without Ray, in their order.

    A video that cannot be used gets a failed prediction with the reason. `config` comes from
    `scoring_config`, with its defaults if omitted. Raises ModelError if the bundle cannot
    score, or if the server of its recogniser refuses the key.
    """
    videos = [videos] if isinstance(videos, str) else videos
    rows = predict_rows(videos, model, config or scoring_config(model))
    return [from_record(Prediction, row) for row in rows]


def predict_rows(videos: Sequence[str], model: str, config: Config) -> list[Row]:
    """Return the predictions as JSON values, as the endpoint does."""
    bundle = load_bundle(model)
    device = best_device() if config.resources.gpus else torch.device("cpu")
    sample = Sample(bundle, config.sampler, device, config.resources)
    recognize = recognizer_for(bundle, config, device)
    native_size = config.resources.resizes_on_device(device.type == "cuda")
    rows: list[Row] = []
    with Decode(config.decode, bundle_specs(bundle, config.sampler.mode, native_size)) as decode:
        for video in videos:
            ref, decoded = _decode(decode, video)
            (answer,) = recognize(sample([(ref.video_id, decoded)]))
            rows.append(plain_row(prediction_row(ref, answer)))
    return rows


def _decode(decode: Decode, video: str) -> tuple[VideoRef, Outcome]:
    """Decode a video, or return its failure.

    Never raises, so that one video cannot cost the others their answers.
    """
    # JSON and terminals need valid text in the row, but a file name may be any bytes
    uri = shown = video if storage.is_utf8(video) else storage.redact(video)
    failure: StorageError | VideoError
    try:
        uri = storage.normalize(shown)
        file = storage.stat(storage.normalize(video))
        ref = VideoRef(video_id(uri), uri, file.size_bytes, file.etag, file.modified)
        return ref, decode([VideoSource.of(ref)])[0]
    except StorageError as error:
        failure = error
    except Exception as error:  # noqa: BLE001  the boundary where a failure becomes a row
        what = f"{storage.redact(shown)}: unexpected {type(error).__name__}: {error}"
        failure = VideoError("internal", what)
    return VideoRef(video_id(video), uri, 0), failure

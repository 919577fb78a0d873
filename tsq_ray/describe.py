"""`tsq info`: describe a bundle, a manifest or a run folder."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, get_args

import pyarrow.compute as pc

from tsq_ray import manifest as manifests
from tsq_ray import storage
from tsq_ray.bundle.settings import (
    BUNDLE_FILE,
    CLASSIFIER_FILE,
    read_bundle_settings,
    read_classifier_settings,
    recognizer_of,
    server_of,
)
from tsq_ray.errors import ManifestError, RunError, StorageError
from tsq_ray.runs.folder import CONFIG_FILE, RUN_FILE, read_run


def describe(uri: str) -> dict[str, Any]:
    """Describe a bundle, classifier, manifest or run folder.

    Returns counts, classes, settings, provenance and, for a bundle, GFLOPs. Raises RunError if
    `uri` is none of these.
    """
    uri = storage.normalize(uri)
    if storage.is_folder(uri):
        known = {BUNDLE_FILE: _bundle, CLASSIFIER_FILE: _classifier, RUN_FILE: _run}
        known |= {CONFIG_FILE: _run, manifests.MANIFEST_FILE: _manifest}
        for name, describe_folder in known.items():
            if storage.exists(storage.join(uri, name)):
                return describe_folder(uri)
    try:
        return _manifest(uri)
    except (ManifestError, StorageError) as error:
        raise RunError(
            f"info {storage.redact(uri)}: not a bundle, manifest or run folder ({error})"
        ) from None


def _manifest(uri: str) -> dict[str, Any]:
    manifest = manifests.read_manifest(uri)
    table = manifest.rows.table
    by_class = {
        record["values"]: record["counts"]
        for record in pc.value_counts(pc.list_flatten(table["labels"])).to_pylist()
    }
    return {
        "kind": "manifest",
        "uri": storage.redact(uri),
        "videos": len(manifest.rows),
        "bytes": pc.sum(table["size_bytes"]).as_py() or 0,
        "labelled": len(manifest.rows) - table["labels"].null_count,
        "splits": {
            record["values"] or "(none)": record["counts"]
            for record in pc.value_counts(table["split"]).to_pylist()
        },
        "videos_by_class": {
            name: by_class.get(number, 0) for number, name in enumerate(manifest.classes)
        },
        "sources": list(manifest.sources),
        "sha256": manifest.sha256,
    }


def _run(uri: str) -> dict[str, Any]:
    run = read_run(uri)
    kept = (
        "kind",
        "status",
        "counts",
        "metrics",
        "manifest",
        "model",
        "identity",
        "versions",
        "git_revision",
        "started",
        "ended",
    )
    more = ("wall_seconds", "stage_seconds", "slowest_stage")
    size = sum(part["bytes"] for part in run["parts"])
    return (
        {"uri": storage.redact(uri)}
        | {key: run[key] for key in (*kept, *more) if run.get(key)}
        | {"parts": len(run["parts"]), "bytes": size}
    )


def _classifier(uri: str) -> dict[str, Any]:
    content, digest = read_classifier_settings(uri)
    kept = ("role", "task", "classes", "model", "backbone_sha256", "provenance")
    return (
        {"kind": "classifier (finetune)", "uri": storage.redact(uri)}
        | {key: content[key] for key in kept}
        | {"sha256": digest}
    )


def _bundle(uri: str) -> dict[str, Any]:
    content, digest = read_bundle_settings(uri)
    from tsq_ray.model import TSQShape

    described = {"kind": "bundle", "uri": storage.redact(uri)} | {
        key: content[key] for key in ("task", "classes", "config")
    }
    # TSQShape adds the defaults of settings that an older bundle does not have
    described["sampler_shape"] = asdict(TSQShape(**content["sampler_shape"]))
    described["gflops"] = bundle_gflops(content)
    if server_of(content) is not None:
        note = "the recogniser's are unknown, because it is behind a server, and count as 0"
        described["gflops_note"] = note
    return described | {"provenance": content["provenance"], "sha256": digest}


def bundle_gflops(content: dict[str, Any]) -> dict[str, Any]:
    """Return the GFLOPs (multiply-adds) per video for the bundle's T and K, by module.

    Counted twice: by the field's convention ("field"), and as this package runs them ("true").
    """
    from tsq_ray.config import EncodersConfig, SamplerConfig, SamplerMode
    from tsq_ray.model import TSQShape
    from tsq_ray.model.flops import Counting, cost_table

    config = content["config"]
    if (recognizer := recognizer_of(content)) is None:
        return {}
    encoders = EncodersConfig.model_validate(config["encoders"])
    shape = TSQShape(**content["sampler_shape"])
    sampler = SamplerConfig.model_validate(config["sampler"])
    mode: SamplerMode = sampler.mode
    if mode == "both" and shape.modules != "both":
        mode = "visual"
    gflops: dict[str, Any] = {}
    for counting in get_args(Counting):
        table = cost_table(
            mode,
            num_frames=config["decode"]["num_frames"],
            budget=sampler.most_frames,
            recognizer=recognizer,
            visual=encoders.visual,
            objects=encoders.objects,
            shape=shape,
            counting=counting,
        )
        modules = {row.module: round(row.gflops, 4) for row in table.rows}
        gflops[counting] = modules | {"total": round(table.gflops, 4)}
    return gflops

"""`tsq import`: make a pretrained network, unchanged, a classifier like those of finetune."""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from tsq_ray import provenance, storage
from tsq_ray.asking.questions import ServerModel
from tsq_ray.bundle.settings import CLASSIFIER_FILE, read_classifier_settings
from tsq_ray.bundle.weights import Classifier, save_classifier, save_server
from tsq_ray.config import VIDEO_CLASSIFIER, Config, ModelConfig, load_config
from tsq_ray.errors import ConfigError, ModelError
from tsq_ray.labels.classes import composed, read_classes
from tsq_ray.model.flops import network_multiply_adds
from tsq_ray.networks import transformers_models
from tsq_ray.networks.encoder import (
    NUM_OBJECTS,
    FrameEncoder,
    create_network,
    load_encoder,
    split_network,
)
from tsq_ray.networks.preprocessing import preprocessing_of
from tsq_ray.networks.weights import model_folder
from tsq_ray.results import ImportSummary, from_record
from tsq_ray.runs.identity import Identity

Role = Literal["encoder", "recognizer"]
TEMPLATE = "a photo of {}"
"""Default text of a class for a dual encoder."""
SERVER_SIZE = 512
"""Default shorter side, in pixels, of the frames sent to a server."""


def import_config(
    model: str, role: Role = "recognizer", path: str | Path | None = None, sets: Iterable[str] = ()
) -> Config:
    """Return the settings for `import_network`, with the preprocessing that `model` expects.

    `model`: a timm name, or the hub id, folder or URI of a transformers model; with
    `recognizer.kind=openai` the model's name on the server. The TOML file and `sets` may change the
    preprocessing and the weights, but not the model. Raises ConfigError or ModelError.
    """
    sets = list(sets)

    def resolved(own: dict[str, Any]) -> Config:
        base = {"recognizer": own} if role == "recognizer" else {"encoders": {"visual": own}}
        return load_config(path, sets, base)

    # the network's size is not known yet; no `resize_to` is too small for this one
    requested = _network(resolved({"size": 16, "model": model}), role)
    if requested.kind == "openai":
        own: dict[str, Any] = {"kind": "openai", "model": model, "size": SERVER_SIZE}
    else:
        own = _library_settings(model, requested.weights)
    config = resolved(own)
    chosen = _network(config, role)
    if (chosen.kind, chosen.model) != (own["kind"], own["model"]):
        name = "recognizer" if role == "recognizer" else "encoders.visual"
        raise ConfigError(
            f"the settings name {name}.model = {chosen.model!r} ({chosen.kind}), the command "
            f"names {model!r}; leave one of them out"
        )
    return config


def import_network(
    config: Config,
    out: str,
    role: Role = "recognizer",
    *,
    classes: str | None = None,
    templates: Sequence[str] = (),
) -> ImportSummary:
    """Write the network that the settings name as a classifier, without training it.

    A folder that already holds it is left unchanged. Raises UserError for wrong input.

    Args:
        config: from `import_config`.
        out: folder of the classifier.
        role: "recognizer" takes `recognizer`, "encoder" takes `encoders.visual`.
        classes: file of class names, one per line; needed by a dual encoder, and by a network whose
            classes have no known names.
        templates: texts of a class for a dual encoder, with {} for its name; "a photo of {}" by
            default.
    """
    settings, out = _network(config, role), storage.normalize(out)
    what = f"import {settings.model}"
    if settings.kind == "openai":
        return _import_server(config, out, classes, templates, what)
    if role == "encoder" and settings.clip_frames > 1:
        raise ModelError(f"{what}: takes clips; the sampler's encoder looks at single frames")
    names = read_classes(classes).names if classes else None
    with torch.inference_mode():
        encoder, names, more = _load(settings, names, templates, what)
        _check_restored(encoder, what)
    identity = Identity.of(
        role=role,
        model=settings.record(exclude={"weights"}),
        weights=encoder.state_hash(),
        classes=names,
        task=config.train.task,
    )
    if (done := _already_done(identity, out)) is not None:
        return done
    summary = ImportSummary(
        out=storage.redact(out),
        role=role,
        kind=settings.kind,
        model=settings.model,
        classes=len(names),
        first_classes=tuple(names[:5]),
        size=settings.size,
        parameters=sum(value.numel() for value in encoder.parameters()),
        gflops_per_frame=round(network_multiply_adds(settings, "true") / 1e9, 4),
    )
    record = {"identity": identity.parts, "summary": asdict(summary), "imported": more}
    save_classifier(
        Classifier(encoder, names, config.train.task, role, record | provenance.of_this_run()), out
    )
    return summary


def _import_server(
    config: Config, out: str, classes: str | None, templates: Sequence[str], what: str
) -> ImportSummary:
    """Write the classifier folder of a model behind a server, without contacting the server."""
    if classes is None:
        raise ModelError(f"{what}: a server is asked about classes; name them with --classes FILE")
    if templates:
        raise ConfigError(f"{what}: --template is for dual encoders; set recognizer.prompt instead")
    names = read_classes(classes).names
    model = ServerModel(config.recognizer, tuple(names), config.train.task)
    settings = model.config.record(exclude={"weights"})
    identity = Identity.of(role="recognizer", model=settings, classes=names, task=config.train.task)
    if (done := _already_done(identity, out)) is not None:
        return done
    summary = ImportSummary(
        out=storage.redact(out),
        role="recognizer",
        kind="openai",
        model=model.config.model,
        classes=len(names),
        first_classes=tuple(names[:5]),
        size=model.config.size,
        parameters=0,
        gflops_per_frame=0.0,
    )
    record = {"identity": identity.parts, "summary": asdict(summary), "imported": {}}
    save_server(model, out, record | provenance.of_this_run())
    return summary


def _already_done(identity: Identity, out: str) -> ImportSummary | None:
    """Return the summary of an identical earlier import into `out`; None if the folder holds none.

    Raises RunError if it holds another classifier, StorageError if it is not writable.
    """
    if storage.exists(storage.join(out, CLASSIFIER_FILE)):
        record = read_classifier_settings(out)[0]["provenance"]
        identity.refuse_other(record["identity"], out, "holds another classifier")
        return from_record(ImportSummary, record["summary"], already_done=True)
    storage.check_writable(out)
    return None


def _network(config: Config, role: Role) -> ModelConfig:
    if role not in ("encoder", "recognizer"):
        raise ConfigError(f"role {role!r}: allowed are encoder, recognizer")
    return config.recognizer if role == "recognizer" else config.encoders.visual


def _load(
    settings: ModelConfig, names: list[str] | None, templates: Sequence[str], what: str
) -> tuple[FrameEncoder, list[str], dict[str, Any]]:
    """Return the network with its head, the class names, and what else determined the head."""
    load = _load_timm if settings.kind == "timm" else _load_transformers
    encoder, classes, more = load(settings, names, templates, what)
    assert isinstance(encoder.head, nn.Linear)
    if len(classes) != encoder.head.out_features:
        raise ModelError(
            f"{what}: has {encoder.head.out_features} classes, --classes names {len(classes)}; "
            "name each of them, in its order, or train it for other classes with tsq finetune"
        )
    return encoder, classes, more


# ------------------------------------------------------------------------------------------- timm


def _timm_settings(name: str) -> dict[str, Any]:
    """Return the settings of a timm network, with the preprocessing of its weights."""
    import timm
    from PIL import Image

    with torch.device("meta"):
        network = create_network(ModelConfig(model=name), NUM_OBJECTS)
    data = timm.data.resolve_model_data_config(network)
    transform = timm.data.create_transform(**data, is_training=False)

    def apply(picture: np.ndarray) -> np.ndarray:
        return np.asarray(transform(Image.fromarray(picture)))

    preprocessing = preprocessing_of(apply, "timm", f"timm's {name}")
    return {"kind": "timm", "model": name, **preprocessing}


def _load_timm(
    settings: ModelConfig, names: list[str] | None, templates: Sequence[str], what: str
) -> tuple[FrameEncoder, list[str], dict[str, Any]]:
    _refuse_templates(templates, what)
    encoder = load_encoder(settings, with_head=True, num_classes=len(names or ()) or NUM_OBJECTS)
    if not isinstance(encoder.head, nn.Linear):
        raise ModelError(
            f"{what}: its classifier is a {type(encoder.head).__name__}, not one linear layer, and "
            "cannot be kept; choose another network, or train one with tsq finetune"
        )
    return encoder, names or _imagenet_names(settings.model, encoder.head.out_features, what), {}


def _imagenet_names(model: str, count: int, what: str) -> list[str]:
    """Return distinct names for the ImageNet classes of a timm network."""
    import timm

    with torch.device("meta"):
        network = timm.create_model(model, pretrained=False)
    subset = timm.data.infer_imagenet_subset(network)
    info = timm.data.ImageNetInfo(subset) if subset else None
    if info is None or info.num_classes() != count:
        raise ModelError(
            f"{what}: timm has no names for its {count} classes; name them with --classes FILE"
        )
    whole = [info.index_to_description(index, detailed=False) for index in range(count)]
    short = [name.split(",")[0].strip() for name in whole]
    ids = [info.index_to_label_name(index) for index in range(count)]
    return _distinct(
        [short, whole, [f"{name} ({id_})" for name, id_ in zip(short, ids, strict=True)]]
    )


def _distinct(choices: Sequence[Sequence[str]]) -> list[str]:
    """Return for each class the first of its names that is no name of another, or else its last.

    The last names must be distinct.
    """
    owners = defaultdict(set)
    for names in choices:
        for number, name in enumerate(names):
            owners[name].add(number)
    return [
        next((name for name in names if len(owners[name]) == 1), names[-1])
        for names in zip(*choices, strict=True)
    ]


# ----------------------------------------------------------------------------------- transformers


def _transformers_settings(model: str, weights: str) -> dict[str, Any]:
    """Return the settings of a transformers network, with the preprocessing of its processor."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    what = f"import {storage.redact(model)}"
    with tempfile.TemporaryDirectory() as scratch:
        place = _source_of(model, weights, scratch, what)
        try:
            config: Any = transformers.AutoConfig.from_pretrained(place)
            name = transformers_models.architecture_of(config, what)
            processor: Any = transformers.AutoImageProcessor.from_pretrained(place)
        except ModelError:
            raise
        except Exception as error:
            raise transformers_models.cannot_load(what, error) from error
    arguments = transformers_models.model_args_of(config, name)
    clip = int(arguments["num_frames"]) if VIDEO_CLASSIFIER in name else 0

    def apply(picture: np.ndarray) -> np.ndarray:
        made = processor([picture] * clip if clip else picture, return_tensors="np")
        return _first_picture(made, f"{what}: a {config.model_type} network")

    preprocessing = preprocessing_of(apply, "transformers", what)
    return {"kind": "transformers", "model": model, "model_args": arguments, **preprocessing}


def _first_picture(made: Mapping[str, Any], what: str) -> np.ndarray:
    """Return the first picture [3, H, W] that a processor made. Raises ModelError if none."""
    if "pixel_values" not in made:
        raise ModelError(
            f"{what} takes {', '.join(made)}, not pictures; choose one whose image processor makes "
            "pixel_values"
        )
    values = np.asarray(made["pixel_values"], np.float32)
    return values.reshape(-1, *values.shape[-3:])[0]


def _load_transformers(
    settings: ModelConfig, names: list[str] | None, templates: Sequence[str], what: str
) -> tuple[FrameEncoder, list[str], dict[str, Any]]:
    import transformers

    with tempfile.TemporaryDirectory() as scratch:
        place = _source_of(settings.model, settings.weights, scratch, what)
        network = transformers_models.load_transformers(settings, place, what)
        if network.is_tower:
            if names is None:
                raise ModelError(
                    f"{what}: a dual encoder recognises any classes; name yours with --classes FILE"
                )
            texts = list(templates) or [TEMPLATE]
            if (wrong := next((text for text in texts if "{}" not in text), None)) is not None:
                raise ConfigError(f"--template {wrong!r}: has no {{}} for the name of the class")
            encoder = split_network(settings, network, with_head=False)
            encoder.head = transformers_models.text_head(place, names, texts, what)
            return encoder, names, {"templates": texts}
        _refuse_templates(templates, what)
        labels = transformers.AutoConfig.from_pretrained(place).id2label
    encoder = split_network(settings, network, with_head=True)
    assert isinstance(encoder.head, nn.Linear)
    if names is None:
        given = [str(labels.get(number, "")) for number in range(encoder.head.out_features)]
        own = [composed(name.strip()) or str(number) for number, name in enumerate(given)]
        numbered = [f"{name} ({number})" for number, name in enumerate(own)]
        names = _distinct([own, numbered])
    return encoder, names, {}


def _source_of(model: str, weights: str, scratch: str, what: str) -> str:
    """Return where transformers loads `model` from: the settings' `weights`, or `model` itself."""
    if weights == "hub" and _is_model_folder(model):
        weights = model
    return model_folder(weights, model, scratch, what)


def _is_model_folder(model: str) -> bool:
    return storage.exists(storage.join(storage.normalize(model), "config.json"))


# ------------------------------------------------------------------------------------------- both


def _library_settings(model: str, weights: str) -> dict[str, Any]:
    """Return the settings of `model`; a timm network of this name takes precedence."""
    import timm

    name = model.removeprefix("timm/")
    if timm.is_model(name.partition(".")[0]) and not _is_model_folder(model):
        return _timm_settings(name)
    if _is_model_folder(model) or "/" in model:
        return _transformers_settings(model, weights)
    similar = timm.list_models(f"*{model.split('_')[0]}*")[:5]
    raise ModelError(
        f"import {model!r}: neither a timm network nor the hub id (OWNER/NAME) or the folder of a "
        "transformers model" + (f"; similar timm names: {', '.join(similar)}" if similar else "")
    )


def _refuse_templates(templates: Sequence[str], what: str) -> None:
    if templates:
        raise ConfigError(
            f"{what}: --template is for dual encoders; this network has its own classes"
        )


def _check_restored(encoder: FrameEncoder, what: str) -> None:
    """Raise ModelError unless settings and weights rebuild a network that computes the same."""
    config = encoder.config
    assert isinstance(encoder.head, nn.Linear)
    try:
        network = create_network(config, encoder.head.out_features)
        rebuilt = split_network(config, network, with_head=False)
        rebuilt.backbone.load_state_dict(encoder.backbone.state_dict())
        shape = (config.clip_frames, config.size, config.size, 3)
        pictures = (torch.arange(math.prod(shape)) % 251).reshape(shape).byte()
        actual, expected = (each.features(pictures) for each in (rebuilt, encoder))
        same = torch.allclose(actual, expected, rtol=1e-3, atol=1e-4)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{what}: cannot be rebuilt from its settings ({' '.join(str(error).split())[:160]})"
        ) from error
    if not same:
        raise ModelError(f"{what}: rebuilt from its settings, it computes something else")

"""Settings for scoring: the bundle's own, some of which may be overridden."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tsq_ray import storage
from tsq_ray.bundle.settings import check_mode, read_bundle_settings, recognizer_of
from tsq_ray.config import SERVER_USE, Config, check_budget, load_config
from tsq_ray.errors import ConfigError
from tsq_ray.runs.identity import Identity

SETTABLE = (
    "sampler.budget",
    "sampler.max_budget",
    "sampler.margin",
    "sampler.lambda_visual",
    "sampler.mode",
    "sampler.selection",
    "sampler.seed",
    "decode.backend",
    "decode.timeout_s",
    "decode.max_",
    "resources.",
    "output.",
    "serve.",
    "recognizer.url",
    *(f"recognizer.{name}" for name in SERVER_USE),
)
"""Settings that scoring may change, or the beginnings of their names."""
_NOT_READ = ("train.", "finetune.", "encoders.text.")
"""Settings that scoring does not read. All others are fixed by training."""


def settable_names() -> list[str]:
    """Return the names of the settings that scoring may change; "*" stands for any ending."""
    return [f"{name}*" if name.endswith((".", "_")) else name for name in SETTABLE]


def scoring_config(
    model: str,
    path: str | Path | None = None,
    sets: Iterable[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> Config:
    """Return the bundle's settings, overridden by nested `settings`, a TOML file and `sets`.

    Later sources win. Raises ConfigError if they change what the bundle was trained with, or if K
    is above T, ModelError if the bundle lacks what the sampler's mode needs.
    """
    content, _ = read_bundle_settings(model)
    own = {name: value for name, value in content["config"].items() if value is not None}
    base: dict[str, Any] = {**own}
    before = load_config(None, (), base).model_dump(mode="json")
    if settings:
        base = _merged(base, settings)
    config = load_config(path, sets, base)
    identity = Identity.of(**config.model_dump(mode="json"))
    changes = identity.differences(
        before, words=("in the bundle", "asked for"), free=_is_overridable
    )
    if changes:
        raise ConfigError(
            f"{storage.redact(model)}: scoring cannot change what the bundle was trained with "
            f"({changes}); it may set {', '.join(settable_names())}"
        )
    check_mode(content, config.sampler.mode)
    recognizer = config.recognizer if recognizer_of(content) is not None else None
    check_budget(config.sampler, config.decode.num_frames, str(content["task"]), recognizer)
    return config


def _is_overridable(key: str) -> bool:
    return key.startswith((*SETTABLE, *_NOT_READ)) or key.endswith(".weights")


def _merged(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overrides.items():
        merged[key] = (
            _merged(merged.get(key) or {}, value)
            if isinstance(value, Mapping) and key != "model_args"
            else value
        )
    return merged

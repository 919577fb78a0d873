"""Resolve settings from the defaults, a TOML file and `--set section.key=value`, in this order."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from tsq_ray.config.settings import Config
from tsq_ray.errors import ConfigError


def load_config(
    path: str | Path | None = None, sets: Iterable[str] = (), base: Mapping[str, Any] | None = None
) -> Config:
    """Resolve the settings; later sources override earlier ones.

    The sources are the defaults, `base`, the TOML file at `path` and `sets` ("section.key=value").
    A value in `sets` is parsed as TOML (`5`, `0.6`, `true`, `[1, 2]`, `{a = 1}`), or taken as a
    plain string if it is not TOML. Raises a one-line ConfigError for a missing file, bad TOML, an
    unknown key or a value that is not allowed.
    """
    tree: dict[str, Any] = Config().model_dump(mode="json")
    _merge(tree, base or {})
    if path is not None:
        _merge(tree, _read_toml(Path(path)))
    for item in sets:
        _apply_set(tree, item)
    return validate_config(tree)


def validate_config(tree: Mapping[str, Any]) -> Config:
    """Build a Config from plain nested dictionaries.

    Raises ConfigError with the first wrong key, the value given and what is allowed.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to {"section.key": value}; `model_args` stays nested."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and key != "model_args":
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the keys whose values differ between two flattened records.

    A record may predate a setting: if one side has the section but not the key, its value is the
    setting's default.
    """
    defaults = flatten(Config().model_dump(mode="json"))

    def value(record: Mapping[str, Any], key: str) -> Any:
        section = key.rpartition(".")[0]
        if (
            key in record
            or not section
            or not any(name.startswith(f"{section}.") for name in record)
        ):
            return record.get(key)
        parts = key.split(".")
        return next(
            (
                defaults[name]
                for name in (".".join(parts[start:]) for start in range(len(parts)))
                if name in defaults
            ),
            None,
        )

    return sorted(
        key for key in before.keys() | after.keys() if value(before, key) != value(after, key)
    )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"--config: no file {path}; name an existing TOML file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--config {path}: not readable as TOML: {error}") from None


def _merge(tree: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    for key, value in overrides.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict) and key != "model_args":
            _merge(tree[key], value)
        else:
            tree[key] = value


def _apply_set(tree: dict[str, Any], item: str) -> None:
    name, equals, text = item.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(
            f"--set {item!r}: expected section.key=value, for example --set decode.num_frames=50"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    node = tree
    for key in keys[:-1]:
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {item!r}: {key} is a value, not a section")
        node = child
    node[keys[-1]] = value


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    # for a union of types pydantic reports each alternative, with its name at the end of `loc`
    name = ".".join(
        str(part) for part in first["loc"] if not str(part).startswith(("constrained-", "literal["))
    )
    if first["type"] == "extra_forbidden":
        section: Any = Config
        for part in first["loc"][:-1]:
            # an item of a tuple of sections
            section = (
                get_args(section)[0]
                if isinstance(part, int)
                else section.model_fields[part].annotation
            )
        return f"unknown setting {name}; allowed: {', '.join(section.model_fields)}"
    others = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "value_error":  # from a validator of a whole section
        return f"settings {name}: {first['msg'].removeprefix('Value error, ')}{others}"
    return (
        f"setting {name} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}{others}"
    )

"""docs/configuration.md, from tsq_ray/config/."""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from generator.markdown import NOTE, table
from tsq_ray.bundle.overrides import settable_names
from tsq_ray.config import Config, Section

CONFIG_INTRO = """\
A setting starts at its default; the TOML file of `--config FILE.toml` overrides it, then each
`--set section.key=value`, the last one winning:

```toml
[decode]
num_frames = 50
[sampler]
budget = 5
```
```bash
tsq extract runs/manifest.parquet --out runs/features --config my.toml --set decode.timeout_s=30
```
A value of `--set` is read as TOML: `5`, `0.6`, `true`, `[0.5, 0.5, 0.5]`, `{pad_type = "same"}`;
anything that is not TOML is a string. An unknown setting or a value that is not allowed is refused
before anything starts (exit code 2), as is K > T by `tsq train` and `tsq score`. The resolved
settings are in `_run.json` of every output. Newer settings are left out at their default, so that
an earlier version can read the file.

Features carry `decode.*` and `encoders.*` to `tsq train`, and the bundle carries them to
`tsq score`: you need not repeat them there, and other values are refused. Scoring may set
{settable}.
"""


def configuration() -> str:
    """Return docs/configuration.md."""
    settable = ", ".join(f"`{name}`" for name in settable_names())
    intro = CONFIG_INTRO.replace("{settable}", settable)
    parts = [NOTE.format("tsq_ray/config/"), "# Configuration", intro]
    for name, field in Config.model_fields.items():
        kind, value = field.annotation, getattr(Config(), name)
        assert isinstance(kind, type)
        assert isinstance(value, Section)
        parts += [
            f"## {name}",
            f"{inspect.cleandoc(kind.__doc__ or '')}\n",
            settings_table(value, f"{name}."),
            "",
        ]
    return "\n".join(parts)


def settings_table(section: Section, prefix: str) -> str:
    """Return a table of every setting below a section, including nested ones."""
    return table(["setting", "default", "allowed", "what"], list(setting_rows(section, prefix)))


def setting_rows(section: Section, prefix: str) -> Iterator[list[str]]:
    """Yield [name, default, allowed, meaning] of each setting.

    A nested section has a row of its own, without a default.
    """
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        what = " ".join((field.description or "").split())
        if isinstance(value, Section):
            yield [f"**`{prefix}{name}`**", "", "", what]
            yield from setting_rows(value, f"{prefix}{name}.")
        else:
            yield [f"`{prefix}{name}`", f"`{toml_text(value)}`", allowed_text(field), what]


def toml_text(value: Any) -> str:
    """Return a default in TOML syntax."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml_text(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_text(inner) for inner in value) + "]"
    return json.dumps(value)


def allowed_text(field: FieldInfo) -> str:
    """Return the values that a setting may have."""
    kind = field.annotation
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [
        f"{sign} {getattr(item, name):g}"
        for item in field.metadata
        for name, sign in signs.items()
        if hasattr(item, name)
    ]
    return " ".join([kind_text(kind), ", ".join(bounds)]).strip()


def kind_text(kind: Any) -> str:
    """Describe a Python type in words."""
    words = {int: "whole number", float: "number", str: "text", bool: "true, false"}
    if kind in words:
        return words[kind]
    if get_origin(kind) is Annotated:
        return kind_text(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(map(kind_text, get_args(kind)))
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        return (
            f"list of {kind_text(inner[0])}"
            if Ellipsis in inner
            else f"{len(inner)} x {kind_text(inner[0])}"
        )
    if inspect.isclass(kind) and issubclass(kind, Section):
        return "{" + ", ".join(kind.model_fields) + "}"
    assert get_origin(kind) is dict, f"no words for {kind}"
    return "table"

"""docs/api.md, from tsq_ray/__init__.py."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import tsq_ray
from generator.markdown import NOTE, table
from tsq_ray.runtime.session import DEFAULT_SESSION

API_INTRO = """\
The commands are also functions; `serve`, `bench`, `token`, `jobs`, `info` and `--dry-run` exist
only on the command line:

```python
import tsq_ray

tsq_ray.build_manifest(["videos"], "manifest.parquet", labels="videos/labels.csv")
run = tsq_ray.extract("manifest.parquet", "features", tsq_ray.load_config("my.toml"))
print(run.counts.ok, run.counts.failed_by_type)
```

`import tsq_ray` is instant; torch and Ray are loaded by the functions that need them. Paths may be
`s3://` URIs, except that of a TOML file. Wrong input raises `UserError`, storage that cannot be
read or written `StorageError`, a failed run `RunFailed`: all are subclasses of `TsqError` in
`tsq_ray.errors`, and each has one line that says what to do. A video that cannot be used is a row,
not an error.
Complete programs: [examples](examples/). The [command line](cli.md) describes the arguments that
have the same name there.
"""


ORDER = [
    *("build_manifest", "extract", "finetune", "import_network", "train", "score", "label"),
    "predict",
    *("evaluate", "measure_samplers"),
    *("build_report", "export_predictions", "verify", "read_features", "read_predictions"),
    *("load_config", "import_config", "training_config", "scoring_config", "evaluation_config"),
]


def python_api() -> str:
    """Return docs/api.md."""
    objects = {name: getattr(tsq_ray, name) for name in tsq_ray.__all__}
    functions = [name for name, value in objects.items() if inspect.isfunction(value)]
    functions.sort(key=ORDER.index)
    results = [name for name, value in objects.items() if dataclasses.is_dataclass(value)]
    rest = [name for name in objects if name not in (*functions, *results)]
    assert rest == ["Chooser", "Config"], rest
    settings = (
        "## Config\nAll settings; fields as in [configuration](configuration.md), all frozen.\n"
    )
    return "\n".join(
        [
            NOTE.format("tsq_ray/__init__.py"),
            "# Python API",
            API_INTRO,
            *(function_text(name, objects[name]) for name in functions),
            settings,
            protocol_text("Chooser", objects["Chooser"]),
            *(dataclass_text(name, objects[name]) for name in results),
        ]
    )


def function_text(name: str, function: Callable[..., Any]) -> str:
    """Return the signature and the docstring of a function."""
    lines = [f"def {name}("]
    keyword_only = False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            lines.append("    *,")
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        kind = "" if parameter.annotation is parameter.empty else f": {parameter.annotation}"
        shown = f"{parameter.name}{kind}{default}"
        lines.append(f"    {shown.replace(repr(DEFAULT_SESSION), 'Session()')},")
    lines.append(f") -> {inspect.signature(function).return_annotation}")
    return f"## {name}\n```python\n" + "\n".join(lines) + f"\n```\n{docstring_text(function)}\n"


def protocol_text(name: str, kind: type) -> str:
    """Return the meaning of a protocol, and each of its methods."""
    methods = [value for key, value in vars(kind).items() if not key.startswith("_")]
    shown = ["#" + function_text(method.__name__, method) for method in methods]
    return f"## {name}\n{docstring_text(kind)}\n\n" + "\n".join(shown)


def docstring_text(documented: Any) -> str:
    """Return a docstring as Markdown; its argument lists become bullets."""
    lines = inspect.cleandoc(documented.__doc__ or "").splitlines()
    text, item = [], False
    for line in lines:
        if line in ("Args:", "Returns:", "Raises:"):
            text += [line.removesuffix(":") + ":"] + [""] * (line != "Returns:")
            item = line != "Returns:"
        elif item and line.startswith("    ") and not line.startswith("     "):
            name, _, what = line.strip().partition(": ")
            text.append(f"- `{name}`: {what}")
        elif item and line.startswith("     "):
            text.append("  " + line.strip())
        else:
            text.append(line.strip() if not item else line)
    return "\n".join(text).rstrip()


def dataclass_text(name: str, kind: type) -> str:
    """Return the meaning and the fields of a dataclass, with the docstrings below them."""
    bases = [base for base in reversed(kind.__mro__) if dataclasses.is_dataclass(base)]
    rows = [row for base in bases for row in field_rows(base)]
    return f"## {name}\n{docstring_text(kind)}\n{table(['field', 'type', 'what'], rows)}\n"


def field_rows(kind: type) -> Iterator[list[str]]:
    """Yield [name, type, meaning] of each field that a dataclass itself defines."""
    (node,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(node, ast.ClassDef)
    for place, line in enumerate(node.body):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            after = node.body[place + 1] if place + 1 < len(node.body) else None
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            what = " ".join(str(after.value.value).split()) if documented else ""
            yield [f"`{line.target.id}`", f"`{ast.unparse(line.annotation)}`", what]

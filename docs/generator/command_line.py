"""docs/cli.md, from tsq_ray/commands/."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo, OptionInfo

from generator.markdown import NOTE, table
from tsq_ray import cli

CLI_INTRO = """\
Exit codes: 0, every row is accounted for (failed videos are rows; `--max-failed FRACTION` makes too
many of them an error); 1, the run failed or does not add up; 2, the command line or its input is
wrong. An error is one line on stderr: what is wrong, the value given, what is allowed, what to do;
with `--debug` it comes after a traceback. Progress goes to stderr, the summary to stdout (`--json`:
as JSON).

Every path except that of a TOML file may be an `s3://` URI. Settings (`--config`, `--set`):
[configuration](configuration.md).
`python -m tsq_ray` is `tsq`; `tsq --version` prints the package's version.
"""


def command_line() -> str:
    """Return docs/cli.md."""
    commands = all_commands()
    listed = [
        f"- [`tsq {name}`](#tsq-{name.replace(' ', '-')}): {_help(command)}"
        for name, command in commands.items()
    ]
    return "\n".join(
        [
            NOTE.format("tsq_ray/commands/"),
            "# Command line",
            CLI_INTRO,
            *listed,
            "",
            *(command_text(name, command) for name, command in commands.items()),
        ]
    )


def all_commands() -> dict[str, Callable[..., Any]]:
    """Return every command by its name; a group's commands come after its name."""
    found = {
        str(command.name): command.callback
        for command in cli.app.registered_commands
        if command.callback is not None
    }
    for group in cli.app.registered_groups:
        assert group.typer_instance is not None
        for command in group.typer_instance.registered_commands:
            assert command.callback is not None
            found[f"{group.name} {command.name}"] = command.callback
    return found


def _help(command: Callable[..., Any]) -> str:
    return " ".join(inspect.cleandoc(command.__doc__ or "").split())


def command_text(title: str, command: Callable[..., Any]) -> str:
    """Return usage, meaning, arguments and options of one command."""
    hints = get_type_hints(command, include_extras=True)
    usage, rows = [f"tsq {title}"], []
    for name, parameter in inspect.signature(command).parameters.items():
        if hints[name] is typer.Context:
            continue
        assert get_origin(hints[name]) is Annotated, (
            f"{command.__name__}: {name} has no typer annotation"
        )
        kind, info = get_args(hints[name])[:2]
        required = parameter.default is inspect.Parameter.empty
        what = info.help or ""
        if isinstance(info, ArgumentInfo):
            signature = info.metavar or name.upper()
            usage.append(signature if required else f"[{signature}]")
        else:
            signature = option_text(info, kind)
            usage += [signature] if required else []
            what += _default_text(parameter.default)
        rows.append([f"`{signature}`", "required" if required else "", what])
    line = " ".join(usage) + (" [OPTIONS]" if len(rows) + 1 > len(usage) else "")
    options = table(["argument or option", "", "what"], rows)
    return f"## tsq {title}\n{_help(command)}\n```\n{line}\n```\n{options}\n"


def option_text(info: OptionInfo, kind: Any) -> str:
    """Return an option with its metavar: `--limit N`."""
    # typer stores the first name in `default` if the option is declared in Annotated
    declared = [
        text
        for text in (info.default, *(info.param_decls or ()))
        if isinstance(text, str) and text.startswith("-")
    ]
    names = " / ".join(part for text in declared for part in text.split("/"))
    if _plain(kind) is bool:
        return names
    choices = _plain(kind)
    if isinstance(choices, type) and issubclass(choices, Enum):
        return f"{names} {'|'.join(str(choice.value) for choice in choices)}"
    metavars = {int: "N", float: "NUMBER"}
    return f"{names} {info.metavar or metavars.get(choices, 'TEXT')}"


def _plain(kind: Any) -> Any:
    """Return X of `X | None`."""
    if get_origin(kind) in (Union, types.UnionType):
        return next(inner for inner in get_args(kind) if inner is not type(None))
    return kind


def _default_text(default: Any) -> str:
    if default is inspect.Parameter.empty or default is None or isinstance(default, bool):
        return ""
    return f" Default: `{default.value if isinstance(default, Enum) else default}`."

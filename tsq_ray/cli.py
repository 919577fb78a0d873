"""The `tsq` command line.

Each command parses its options, loads the settings, calls one function of the package and prints
its summary. The stages are imported inside the commands, so that `tsq --help` is instant.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from tsq_ray.commands import endpoint, jobs, labelling, pipeline, results
from tsq_ray.console import (
    bare_retry,
    guarded,
    prepare_output,
)
from tsq_ray.runtime.driver import sigterm_interrupts

app = typer.Typer(
    name="tsq",
    help="Label very large video archives cheaply: "
    "choose the salient frames, recognise only those.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def print_version(requested: bool) -> None:
    """Print the version and exit; the callback of `tsq --version`."""
    if requested:
        from tsq_ray import __version__

        print(f"tsq_ray {__version__}")  # noqa: T201
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=print_version,
            is_eager=True,
            help="Show the package version and exit.",
        ),
    ] = False,
) -> None:
    """Label very large video archives cheaply: choose the salient frames, recognise only those."""


for command in (
    pipeline.index,
    pipeline.extract,
    pipeline.finetune,
    pipeline.import_,
    pipeline.train,
    pipeline.score,
    labelling.label,
    results.predict,
    endpoint.serve,
    endpoint.bench,
    results.evaluate,
    results.report,
    results.export,
    results.verify,
    results.info,
):
    app.command(command.__name__.removesuffix("_"))(command)
app.add_typer(jobs.jobs, name="jobs")
app.add_typer(endpoint.token, name="token")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0 success, 1 the run failed, 2 wrong input."""
    prepare_output()
    # Arrow's default allocator keeps freed memory: 170 MiB in the driver at a million rows. Set
    # before Arrow is loaded; Ray's workers inherit the variable.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    arguments = bare_retry(list(sys.argv[1:] if argv is None else argv)) or ["--help"]
    debug = "--debug" in arguments
    with sigterm_interrupts():
        return guarded(lambda: app(args=arguments, prog_name="tsq", standalone_mode=False), debug)


if __name__ == "__main__":
    sys.exit(main())

"""Commands about the endpoint: serve, bench, token new."""

from __future__ import annotations

from typing import Annotated

import typer

from tsq_ray.console import show
from tsq_ray.log import LogFormat
from tsq_ray.options import Address, AsJson, ConfigFile, Debug, LogFormats, Model, Sets, WaitS
from tsq_ray.runtime.session import Session
from tsq_ray.summaries import bench_text

token = typer.Typer(help="Make tokens for the endpoint.", no_args_is_help=True)


@token.callback()
def tokens() -> None:
    """Make tokens for the endpoint."""


@token.command("new")
def new_token(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Client that will use the token.")],
    rate: Annotated[
        str | None, typer.Option("--rate", metavar="N/PERIOD", help="For example 60/minute.")
    ] = None,
    share: Annotated[
        float, typer.Option("--share", help="Share of the endpoint's capacity it may use, 0 to 1.")
    ] = 1.0,
    file: Annotated[
        str | None, typer.Option("--file", metavar="FILE.toml", help="File to append the entry to.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make a bearer token, and its entry for the file that serve.tokens_file names."""
    from tsq_ray.serving.requests.tokens import add_token
    from tsq_ray.serving.requests.tokens import new_token as make

    secret, entry = make(name, rate, share)
    if file is not None:
        add_token(file, name, entry)
    note = f"appended to {file}" if file is not None else f"append to serve.tokens_file:\n\n{entry}"
    show({"token": secret, "entry": entry}, as_json, f"{secret}\n\n{note}")


def serve(
    model: Model,
    host: Annotated[
        str, typer.Option("--host", help="Address to bind; a token is required beyond loopback.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8000,
    config: ConfigFile = None,
    sets: Sets = None,
    address: Address = None,
    wait_s: WaitS = 0.0,
    log_format: LogFormats = LogFormat.text,
    debug: Debug = False,
) -> None:
    """Serve the endpoint POST /v1/score.

    The bearer token comes from the environment variable TSQ_TOKEN or serve.tokens_file.
    """
    from tsq_ray.bundle.overrides import scoring_config
    from tsq_ray.serving.endpoint import run_endpoint

    settings = scoring_config(model, config, sets or ())
    run_endpoint(model, settings, host, port, Session(address, wait_s, debug=debug))


def bench(
    url: Annotated[str, typer.Argument(metavar="URL", help="The endpoint, http://HOST:PORT.")],
    videos: Annotated[list[str], typer.Argument(metavar="VIDEO...", help="Files to upload.")],
    clients: Annotated[
        str, typer.Option("--clients", metavar="N,...", help="Closed loop: clients at a time.")
    ] = "1,2,4,8",
    rates: Annotated[
        str | None,
        typer.Option("--rates", metavar="N,...", help="Open loop instead: requests per second."),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=1, help="Length of each measurement.")
    ] = 20.0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure an endpoint under load: answers per second, latencies, point of saturation.

    The bearer token comes from the environment variable TSQ_TOKEN.
    """
    from tsq_ray.serving.bench import measure_endpoint, numbers

    measured = measure_endpoint(
        url,
        videos,
        numbers("--clients", clients),
        numbers("--rates", rates) if rates is not None else None,
        seconds,
    )
    show(measured, as_json, bench_text(measured))

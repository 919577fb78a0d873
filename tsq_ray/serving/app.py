"""The Serve applications: the endpoint, and the graph of a bulk scoring run.

A Serve config file imports the endpoint as `tsq_ray.serving.app:build`, with args {model, settings,
anonymous}.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve

from tsq_ray import storage
from tsq_ray.bundle.overrides import scoring_config
from tsq_ray.config import Config, ServeConfig
from tsq_ray.errors import ConfigError, StorageError
from tsq_ray.runtime import cluster
from tsq_ray.runtime.nodes import Cluster, Layout
from tsq_ray.runtime.placement import layout
from tsq_ray.serving.access import TOKEN_VARIABLE, read_token
from tsq_ray.serving.batches import Batches
from tsq_ray.serving.deployments import bind_graph, deployment_options
from tsq_ray.serving.graph import STAGES, Ongoing
from tsq_ray.serving.ingress import Ingress
from tsq_ray.serving.loopback import bind_to_loopback
from tsq_ray.serving.requests.webhooks import signing_key

_REFUSALS_AHEAD = 10
"""Serve's own limit is this many times that of the ingress, so that the ingress itself refuses."""


@serve.deployment
class BulkEntry:
    """The root that Serve requires of an application; bulk scoring calls the stages directly."""

    def __init__(self, *stages: Any) -> None:
        bind_to_loopback()
        self.stages = stages

    async def __call__(self) -> None:
        """Do nothing: Serve requires a callable root, which no request reaches."""


def bulk_application(model: str, config: Config, placed: Layout, ongoing: Ongoing) -> Any:
    """Bind the stages without the ingress, with the layout's starting number of replicas."""
    pools = {
        name: replace(pool, minimum=pool.start, limit=pool.start)
        for name, pool in placed.pools.items()
    }
    stages = bind_graph(model, config, replace(placed, pools=pools), ongoing, bulk=True)
    options = deployment_options(pools["ingress"], 1, config, bulk=True)
    return BulkEntry.options(**options).bind(*stages)  # type: ignore[attr-defined]


def application(model: str, config: Config, placed: Layout, token: str | None) -> Any:
    """Bind the whole application; requests need no token if neither a token nor a file is set."""
    settings = _with_absolute_paths(config.serve)
    config = config.model_copy(update={"serve": settings})
    ongoing = {name: getattr(settings, name).max_ongoing_requests for name in STAGES}
    # so that stalled sources leave room for uploads
    ongoing["decoder"] += settings.max_fetches
    decoder, sampler, recognizer = bind_graph(model, config, placed, ongoing)
    max_ongoing = _REFUSALS_AHEAD * settings.max_queued_requests
    options = deployment_options(placed["ingress"], max_ongoing, config)
    batches = None
    if settings.batches_uri:
        signing_key()  # reports an invalid key before anything starts
        single = replace(placed["ingress"], minimum=1, start=1, limit=1)
        single_options = deployment_options(single, max_ongoing, config)
        keeper = Batches.options(**single_options)  # type: ignore[attr-defined]
        batches = keeper.bind(model, config, decoder, sampler, recognizer)
    ingress = Ingress.options(**options)  # type: ignore[attr-defined]
    return ingress.bind(model, config, decoder, sampler, recognizer, batches, token)


def _with_absolute_paths(settings: ServeConfig) -> ServeConfig:
    """Resolve relative paths against the deploying process's folder; a replica runs in another."""

    def absolute(place: str) -> str:
        return place if not place or "://" in place else storage.normalize(place)

    return settings.model_copy(
        update={
            "allowed_uri_prefixes": tuple(map(absolute, settings.allowed_uri_prefixes)),
            "batches_uri": absolute(settings.batches_uri),
            "tokens_file": absolute(settings.tokens_file),
        }
    )


class EndpointArgs(BaseModel):
    """The `args` of a Serve config file."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1, description="the bundle's URI")
    settings: dict[str, Any] | None = Field(default=None, description="nested, as in a TOML file")
    anonymous: bool = Field(default=False, description="true or false")


_FIELDS = EndpointArgs.model_fields


def build(args: Mapping[str, Any]) -> Any:
    """Build the application for a Serve config file.

    `args`: see EndpointArgs. Raises ConfigError if they are invalid, or if no token is set
    (environment variable TSQ_TOKEN, or `serve.tokens_file`) and `anonymous` is not true.
    """
    try:
        parsed = EndpointArgs.model_validate(dict(args))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        got = (
            ""
            if first["type"] == "missing"
            else f", got {storage.redact(repr(first['input']))[:100]}"
        )
        where = ".".join(map(str, first["loc"]))
        allowed = "; ".join(f"{name}: {field.description}" for name, field in _FIELDS.items())
        raise ConfigError(f"args.{where}: {first['msg']}{got}; allowed: {allowed}") from None
    model, token = parsed.model, read_token()
    try:
        config = scoring_config(model, settings=parsed.settings)
        if token is None and not config.serve.tokens_file and not parsed.anonymous:
            raise ConfigError(
                f"no token: set the environment variable {TOKEN_VARIABLE} or serve.tokens_file, "
                "or args.anonymous = true behind a gateway that checks requests"
            )
        nodes = cluster.read_cluster(ray, config) if ray.is_initialized() else Cluster(())
        return application(model, config, layout("serve", config, nodes, 1), token)
    except StorageError as error:
        raise ConfigError(str(error)) from error


__all__ = ["application", "build"]

"""Settings of the recogniser: a network, or a model behind an OpenAI-compatible server."""

from __future__ import annotations

from typing import ClassVar, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from tsq_ray.chat import PROMPT, check_prompt
from tsq_ray.config.method import ModelConfig

SERVER_USE = ("max_concurrent", "timeout_s", "patience_s", "price_in", "price_out")
"""Server settings that change no answer, so they may differ between runs."""


class RecognizerConfig(ModelConfig):
    """The recogniser: a network, or with `kind = "openai"` a model behind a server.

    All settings from `url` on are for `kind = "openai"`. The server's key is not a setting: it
    comes from the environment variable OPENAI_API_KEY.
    """

    NEWER: ClassVar[frozenset[str]] = ModelConfig.NEWER | {
        *SERVER_USE,
        *("url", "prompt", "caption", "logprobs"),
    }
    url: str = ""
    """Base URL of an OpenAI-compatible server, for example https://api.openai.com/v1 or
    http://localhost:8000/v1. `size` is then the shorter side of the frames sent, and `model_args`
    are more fields of the request, for example {temperature = 0}."""
    prompt: str = PROMPT
    """Question about a video: a template with {classes} and, optionally, {num_frames} and
    {seconds}."""
    caption: bool = False
    """Also ask for a description of the video, the column `caption`."""
    logprobs: bool = True
    """Ask for log-probabilities, from which the scores are computed. Without them the answered
    class gets 0.99. Set it to false for a server that rejects such requests."""
    max_concurrent: int = Field(default=8, ge=1)
    """Maximum number of requests in flight: per replica (`tsq score` has one), or over the workers
    with which an extraction starts, but at least one per worker."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Time limit of one request, in seconds."""
    patience_s: float = Field(default=300.0, gt=0)
    """How long a request is retried while the server is busy, failing or unreachable, in seconds;
    then the video is a failed row (unavailable)."""
    price_in: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Price of a million tokens sent, in any currency."""
    price_out: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Price of a million tokens received, in the same currency."""

    def used_for(self, model: RecognizerConfig) -> RecognizerConfig:
        """Return the settings of `model`, overridden by those of SERVER_USE that are set here."""
        fields = type(self).model_fields
        changed = {name: getattr(self, name) for name in SERVER_USE}
        changed = {name: value for name, value in changed.items() if value != fields[name].default}
        return model.model_copy(update=changed)

    def requests_per_worker(self, workers: int) -> int:
        """Return how many requests each of these workers of an extraction may have in flight."""
        return max(1, self.max_concurrent // workers)

    @model_validator(mode="after")
    def _check_server(self) -> Self:
        check_prompt(self.prompt)
        if "{classes}" not in self.prompt:
            raise ValueError(
                f"prompt {self.prompt[:80]!r} lacks {{classes}}, where the class names go; add it"
            )
        if self.kind != "openai":
            return self
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"url is {self.url!r}: kind 'openai' needs the base URL of a server, "
                "for example https://api.openai.com/v1"
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "url holds more than scheme, host and path; remove the rest, and put a key into "
                "the environment variable OPENAI_API_KEY"
            )
        return self

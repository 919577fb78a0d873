"""The question to a vision-language model: frames, seconds and classes as a chat request.

A pure function from JPEG frames to the body of an OpenAI-compatible `/v1/chat/completions` request.
The question is the same whether it is sent directly or in a batch. Needs no torch and no network.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from string import Formatter
from typing import Any

from tsq_ray.errors import ConfigError

ENDPOINT = "/v1/chat/completions"
LABEL, LABELS, CAPTION = "label", "labels", "caption"
"""Keys of the answer: one class, a list of classes (multi-label), an optional description."""
FIELDS = ("classes", "num_frames", "seconds")
PROMPT = (
    "These are {num_frames} frames of one video in time order, at {seconds} seconds. "
    "Which of these classes does the video show? {classes}"
)
"""The default prompt; a template may use any of `FIELDS`."""
MAX_STRICT_CLASSES, LONG_ENUM, MAX_LONG_ENUM_CHARS = 1000, 250, 15_000
"""OpenAI's limits for a strict schema: values; with over 250 values, their total characters."""


def check_prompt(prompt: str) -> str:
    """Return a prompt template unchanged. Raises ConfigError if it uses anything but `FIELDS`."""
    try:
        fields = {name for _, name, _, _ in Formatter().parse(prompt) if name is not None}
        unknown = sorted(fields - set(FIELDS))
    except ValueError as error:
        raise ConfigError(
            f"prompt {prompt[:80]!r}: {error}; write a literal brace as {{{{ or }}}}"
        ) from None
    if unknown:
        raise ConfigError(
            f"prompt {prompt[:80]!r}: unknown field {{{unknown[0]}}}; allowed: "
            f"{', '.join(f'{{{name}}}' for name in FIELDS)}; write a literal brace as {{{{ or }}}}"
        )
    try:
        prompt.format(classes="", num_frames=1, seconds="")
    except (AttributeError, LookupError, ValueError) as error:
        raise ConfigError(
            f"prompt {prompt[:80]!r}: {error}; write its fields without a format"
        ) from None
    return prompt


def request_body(
    model: str,
    prompt: str,
    classes: Sequence[str],
    frames_jpeg: Sequence[bytes | str],
    pts_s: Sequence[float],
    *,
    multi: bool = False,
    caption: bool = False,
) -> dict[str, Any]:
    """Return the request body that asks `model` for the class of a video.

    `frames_jpeg`: the frames as JPEG in time order, sent inside the request, or URLs that the
    server fetches; `pts_s`: their times in seconds. `prompt`: a template of `FIELDS`. The answer
    is a JSON object restricted to `classes` by `answer_schema`. Raises ConfigError for an invalid
    template.
    """
    assert len(frames_jpeg) == len(pts_s), (len(frames_jpeg), len(pts_s))
    seconds = [f"{time:.2f}" for time in pts_s]
    text = check_prompt(prompt).format(
        classes="; ".join(classes), num_frames=len(frames_jpeg), seconds=", ".join(seconds)
    )
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    for frame, time in zip(frames_jpeg, seconds, strict=True):
        content.append({"type": "text", "text": f"{time} s:"})
        content.append({"type": "image_url", "image_url": {"url": _image_url(frame)}})
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "video_labels",
                "strict": fits_strict_schema(classes),
                "schema": answer_schema(classes, multi=multi, caption=caption),
            },
        },
    }


def answer_schema(
    classes: Sequence[str], *, multi: bool = False, caption: bool = False
) -> dict[str, Any]:
    """Return the JSON schema of the answer: `label`, or `labels` if `multi`, and a `caption`."""
    label = {"type": "string", "enum": list(classes)}
    answer: dict[str, Any] = (
        {LABELS: {"type": "array", "items": label}} if multi else {LABEL: label}
    )
    if caption:
        answer[CAPTION] = {"type": "string"}
    return {
        "type": "object",
        "properties": answer,
        "required": list(answer),
        "additionalProperties": False,
    }


def fits_strict_schema(classes: Sequence[str]) -> bool:
    """Whether OpenAI accepts these classes as the values of a strict schema."""
    short = len(classes) <= LONG_ENUM or sum(map(len, classes)) <= MAX_LONG_ENUM_CHARS
    return len(classes) <= MAX_STRICT_CLASSES and short


def _image_url(frame: bytes | str) -> str:
    if isinstance(frame, str):
        return frame
    return "data:image/jpeg;base64," + base64.b64encode(frame).decode("ascii")

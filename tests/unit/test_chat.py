"""The question to a vision-language model."""

from __future__ import annotations

import base64
import json

import jsonschema
import pytest

from tsq_ray import chat
from tsq_ray.errors import ConfigError

CLASSES = ["fall", "long jump", 'a {"brace"}; ünï']
JPEG = b"\xff\xd8\xff\xe0 a frame"


def test_a_question_holds_the_prompt_the_frames_and_their_seconds() -> None:
    body = chat.request_body("a-model", chat.PROMPT, CLASSES, [JPEG, JPEG[::-1]], [0.5, 12.3456])
    assert json.loads(json.dumps(body)) == body
    assert body["model"] == "a-model"
    (message,) = body["messages"]
    assert message["role"] == "user"
    prompt, *rest = message["content"]
    for part in ("2 frames", "0.50, 12.35 seconds", *CLASSES):
        assert part in prompt["text"]
    assert [part["text"] for part in rest[::2]] == ["0.50 s:", "12.35 s:"]
    urls = [part["image_url"]["url"] for part in rest[1::2]]
    prefix = "data:image/jpeg;base64,"
    assert [base64.b64decode(url.removeprefix(prefix)) for url in urls] == [JPEG, JPEG[::-1]]


def test_a_frame_may_be_a_url_that_the_server_fetches() -> None:
    body = chat.request_body("m", "{classes}", CLASSES, ["https://host/0001.jpg"], [1.0])
    assert body["messages"][0]["content"][2]["image_url"] == {"url": "https://host/0001.jpg"}


@pytest.mark.parametrize(
    ("multi", "caption", "good", "bad"),
    [
        (False, False, {"label": "fall"}, {"label": "swim"}),
        (False, False, {"label": CLASSES[2]}, {"label": "fall", "caption": "He falls."}),
        (False, True, {"label": "fall", "caption": "He falls."}, {"label": "fall"}),
        (True, False, {"labels": ["fall", "long jump"]}, {"labels": ["fall", "swim"]}),
        (True, True, {"labels": [], "caption": ""}, {"labels": "fall", "caption": ""}),
    ],
)
def test_the_schema_binds_the_answer_to_the_classes(
    multi: bool, caption: bool, good: object, bad: object
) -> None:
    body = chat.request_body("m", "", CLASSES, [JPEG], [0.0], multi=multi, caption=caption)
    schema = body["response_format"]["json_schema"]["schema"]
    jsonschema.validate(good, schema)
    with pytest.raises(jsonschema.ValidationError, match=r"is not one of|unexpected|required|type"):
        jsonschema.validate(bad, schema)


@pytest.mark.parametrize(
    ("classes", "strict"),
    [
        (["x" * 100] * 250, True),
        (["x" * 100] * 251, False),
        (["x" * 15] * 1000, True),
        (["x"] * 1001, False),
    ],
)
def test_a_schema_is_strict_within_openais_limits(classes: list[str], strict: bool) -> None:
    body = chat.request_body("m", "", classes, [JPEG], [0.0])
    assert body["response_format"]["json_schema"]["strict"] is strict


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("Which? {class}", r"unknown field \{class\}; allowed: \{classes\}, \{num_frames\}"),
        ("Which? {0}", r"unknown field \{0\}"),
        ("Which? {classes.x}", r"unknown field \{classes.x\}"),
        ("Which? {classes", "expected '}' before end of string; write a literal brace as"),
        ("Which? }", "Single '}' encountered"),
        ("At {seconds:.1f} s: {classes}", "format code 'f'.*; write its fields without a format"),
        ("{classes!z}", "write its fields without a format"),
        ("{classes:{x}}", "write its fields without a format"),
    ],
)
def test_a_wrong_template_is_one_clear_line(prompt: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        chat.check_prompt(prompt)
    assert "\n" not in str(error.value)

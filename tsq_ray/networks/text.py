"""Text embeddings of class and object names: a language model or static word vectors.

transformers is imported on first use: most workers of a cluster load no model, and the import takes
seconds per process.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsq_ray import storage
from tsq_ray.config import TextConfig
from tsq_ray.errors import ModelError, StorageError
from tsq_ray.networks.weights import hash_state, model_folder

_BLOCK = 1 << 22
"""Bytes read at a time from a word vector file; longer than any line."""


class TextEncoder:
    """A BERT-family encoder that averages the last layer's tokens, without the special ones.

    The paper leaves the pooling open.
    """

    def __init__(self, config: TextConfig) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            what = f"encoders.text.weights {config.weights!r}"
            place = model_folder(config.weights, config.model, folder, what)
            try:
                self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(place)
                self.model: Any = transformers.AutoModel.from_pretrained(
                    place, dtype=torch.float32
                ).eval()
            except Exception as error:
                raise ModelError(
                    f"text model {config.model!r} with weights {config.weights!r}: "
                    f"cannot be loaded ({type(error).__name__}); check the name and the network "
                    "connection, or set encoders.text.weights to a folder or package:NAME"
                ) from error
        self.dim = int(self.model.config.hidden_size)

    @torch.inference_mode()
    def embed(self, names: Sequence[str], batch_size: int = 64) -> Tensor:
        """Embed names as float32 [len(names), dim]."""
        parts = []
        for start in range(0, len(names), batch_size):
            words = [name.replace("_", " ").strip() for name in names[start : start + batch_size]]
            tokens = self.tokenizer(
                words,
                padding=True,
                return_tensors="pt",
                return_special_tokens_mask=True,
                truncation=True,
            )
            keep = (tokens["attention_mask"] * (1 - tokens.pop("special_tokens_mask"))).float()
            # a name with only unknown characters still gets the mean of its attended tokens
            keep = torch.where(
                keep.sum(1, keepdim=True) > 0, keep, tokens["attention_mask"].float()
            )
            hidden = self.model(**tokens).last_hidden_state
            parts.append((hidden * keep[..., None]).sum(1) / keep.sum(1, keepdim=True))
        return torch.cat(parts) if parts else torch.zeros(0, self.dim)

    def state_hash(self) -> str:
        """Hash of the weights."""
        return hash_state(self.model.state_dict())


class WordVectors:
    """Static word vectors (paper, table 9).

    A name becomes the mean of the vectors of its words, or zero if it has no known word. The file
    is text with a word and its numbers per line: GloVe's format, or word2vec's with "count dims" as
    the first line. A name is lower-cased and split at non-letters. If the file lacks the lower-case
    word, one that differs only in case is used.
    """

    def __init__(self, config: TextConfig) -> None:
        self.uri, self.digest = storage.normalize(config.weights), ""
        self.what = f"encoders.text.weights {storage.redact(config.weights)!r}"
        try:
            self.dim = self._check_start()
        except StorageError as error:
            raise ModelError(f"{self.what}: {error}") from None

    def embed(self, names: Sequence[str]) -> Tensor:
        """Embed names as float32 [len(names), dim].

        Reads the file once and keeps only the vectors of these words.
        """
        words = [re.findall(r"[^\W\d_]+", name.lower()) for name in names]
        known = self._find({word for name in words for word in name})
        result = torch.zeros(len(names), self.dim)
        for row, name in enumerate(words):
            vectors = [known[word] for word in name if word in known]
            if vectors:
                result[row] = torch.from_numpy(np.mean(vectors, axis=0))
        return result

    def state_hash(self) -> str:
        """Return the sha256 of the file."""
        if not self.digest:
            self._find(set())
        return self.digest

    def _check_start(self) -> int:
        with storage.open_read(self.uri) as file, storage.storage_errors(self.uri, "read"):
            first, second = (file.readline(_BLOCK).split() for _ in range(2))
        header = len(first) == 2 and all(field.isdigit() for field in first)
        dim = int(first[1]) if header else len(first) - 1
        if dim < 1 or self._numbers(second if header else first, dim) is None:
            raise ModelError(
                f"{self.what}: its first lines are not a word and its numbers; "
                "give a text file in the format of GloVe or word2vec"
            )
        return dim

    def _find(self, words: set[str]) -> dict[str, np.ndarray]:
        exact: dict[str, np.ndarray] = {}
        cased: dict[str, np.ndarray] = {}
        for number, line in enumerate(self._lines(), 1):
            word = line.partition(b" ")[0].decode("utf-8", "replace")
            key = word.lower()
            vectors = exact if word == key else cased
            if key not in words or key in vectors:
                continue
            fields = line.split()
            if len(fields) > self.dim + 1 or (number == 1 and len(fields) == 2):
                continue  # a "word" with a space in it, or the first line of word2vec
            vector = self._numbers(fields, self.dim)
            if vector is None:
                raise ModelError(
                    f"{self.what}: line {number} is not a word and {self.dim} numbers; "
                    "the file is damaged"
                )
            vectors[key] = vector
        return cased | exact

    def _lines(self) -> Iterator[bytes]:
        digest, rest = hashlib.sha256(), b""
        with storage.open_read(self.uri) as file, storage.storage_errors(self.uri, "read"):
            while block := file.read(_BLOCK):
                digest.update(block)
                *lines, rest = (rest + block).split(b"\n")
                yield from lines
        self.digest = digest.hexdigest()
        yield rest

    @staticmethod
    def _numbers(fields: Sequence[bytes], dim: int) -> np.ndarray | None:
        try:
            vector = np.array([float(field) for field in fields[1:]], np.float32)
        except ValueError:
            return None
        return vector if len(vector) == dim and np.isfinite(vector).all() else None


def text_encoder(config: TextConfig) -> TextEncoder | WordVectors:
    """Load the encoder for names: static vectors if `weights` is a file, else a language model.

    Raises ModelError if it cannot be loaded.
    """
    if (
        config.weights != "hub"
        and not config.weights.startswith("package:")
        and not storage.is_folder(storage.normalize(config.weights))
    ):
        return WordVectors(config)
    return TextEncoder(config)

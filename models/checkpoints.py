"""A decoder in a folder: ``model.safetensors`` and ``model.json``.

    {"format": "sinklab model 1", "vocab_size": 1024, "attention": {"kind": "softmax", ...},
     "model": {"num_layers": 4, ...}, "weights_sha256": "..."}

Kinds are stored by the names the command line knows, never as import paths, so a class may move
without losing old checkpoints, and nothing is unpickled. Settings missing from an old file take
their defaults. The digest ties the two files together and finds damage.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.errors import UserError, require
from models.attention import ATTENTIONS, attention_name
from models.decoder import Decoder
from models.decoder_config import DecoderConfig

FORMAT = "sinklab model 1"
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "model.json"


def save_model(
    decoder: Decoder, folder: Path | str, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write ``decoder`` as ``folder``, which appears complete or not at all.

    weights: the decoder's, where it holds a part of each itself; None are its own.
    Tied embeddings are stored once. Raises ``UserError`` if ``folder`` holds anything already.
    """
    with new_folder(folder) as path:
        weights = decoder.state_dict() if weights is None else weights
        _write_weights(contiguous_cpu(weights), path / WEIGHTS_FILE)
        attention = asdict(decoder.attention_config)
        # Which kernel computes it is the choice of whoever loads it, on whatever machine.
        del attention["implementation"]
        description = {
            "format": FORMAT,
            "vocab_size": decoder.vocab_size,
            "attention": {"kind": attention_name(decoder.attention_config), **attention},
            "model": asdict(decoder.config),
            "weights_sha256": _digest(path / WEIGHTS_FILE),
        }
        (path / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n")


def load_model(folder: Path | str) -> Decoder:
    """The decoder that ``save_model`` wrote: on the CPU, in its dtype, drawing no random number.

    Raises ``UserError`` if a file is missing, damaged or not ours, if a kind or setting is unknown,
    or if the weights don't have the shapes that the settings give.
    """
    config_path, weights_path = Path(folder) / CONFIG_FILE, Path(folder) / WEIGHTS_FILE
    description = read_description(folder)
    attention = dict(description["attention"])
    kind = attention.pop("kind", None)
    allowed = f"must be one of {', '.join(sorted(ATTENTIONS))}"
    require(kind in ATTENTIONS, f"{config_path}: attention.kind", allowed, kind)
    try:
        # The weights come from the file, so none are made: the model is built without storage.
        with torch.device("meta"):
            decoder = Decoder(
                _typed(DecoderConfig, description["model"]),
                _typed(ATTENTIONS[kind].Config, attention),
                description["vocab_size"],
            )
    except (UserError, OmegaConfBaseException) as error:
        raise UserError(f"{config_path}: {str(error).splitlines()[0]}") from error

    weights = _read_weights(weights_path, description["weights_sha256"])
    _check_shapes(weights_path, weights, decoder.state_dict())
    decoder.load_state_dict(weights, assign=True)
    return decoder


def read_description(folder: Path | str) -> dict:
    """The content of a model folder's ``model.json``, without its weights.

    Raises ``UserError`` if it is missing, damaged or not ours.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        description = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
    types = {"format": str, "vocab_size": int, "attention": dict, "model": dict}
    for key, kind in {**types, "weights_sha256": str}.items():
        value = description.get(key) if isinstance(description, dict) else None
        if not isinstance(value, kind):
            raise UserError(f"{path} isn't a model of this project: it has no valid {key!r}")
    require(
        description["format"] == FORMAT,
        f"{path}: format",
        f"must be {FORMAT!r}",
        description["format"],
    )
    return description


@contextmanager
def new_folder(folder: Path | str) -> Iterator[Path]:
    """A temporary folder that becomes ``folder`` when the block ends, and goes away if it fails.

    Raises ``UserError`` if ``folder`` is a file or holds anything.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} must be a new or empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield temporary
        # mkdtemp makes folders that only their owner may read.
        temporary.chmod(0o755)
        temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary)
        raise


def contiguous_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them."""
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def check_plain(values: object, name: str = "") -> None:
    """Raise ``UserError`` for a string that OmegaConf would evaluate: ``${oc.env:HOME}``."""
    if isinstance(values, dict):
        for key, value in values.items():
            check_plain(value, f"{name}.{key}" if name else str(key))
    elif isinstance(values, list):
        for value in values:
            check_plain(value, name)
    elif isinstance(values, str):
        require("${" not in values, name, "must be a plain value", values)


def _typed(schema: type, values: dict):
    """An instance of the config dataclass ``schema``; unknown settings and wrong types raise."""
    check_plain(values)
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))


def _write_weights(weights: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(weights, path)
    except SafetensorError as error:
        # Its errors of the disk are the system's in words.
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error


def _read_weights(path: Path, digest: str) -> dict[str, Tensor]:
    try:
        if _digest(path) != digest:
            raise UserError(f"{path} is damaged: its SHA-256 isn't the one in {CONFIG_FILE}")
        # In memory of their own: a file's tensors lie unaligned, and products of such operands
        # differ in their last bits.
        return {name: weight.clone() for name, weight in load_file(path).items()}
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from error


def _check_shapes(path: Path, weights: dict[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name in sorted(weights.keys() | expected.keys()):
        got = tuple(weights[name].shape) if name in weights else "nothing"
        wanted = tuple(expected[name].shape) if name in expected else "absent"
        if got != wanted:
            raise UserError(f"{path} doesn't fit {CONFIG_FILE}: {name} must be {wanted}, got {got}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

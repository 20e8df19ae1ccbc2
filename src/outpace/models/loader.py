"""A model's shape and weights, from a Hugging Face directory or a GGUF file."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from outpace.device import CPU
from outpace.errors import ConfigError
from outpace.models.config import ModelConfig
from outpace.models.gguf_file import GGUFFile
from outpace.models.gguf_model import gguf_config, gguf_weights
from outpace.models.hf_config import parse_config, unsupported
from outpace.models.shard import WHOLE_MODEL, Shard
from outpace.models.stored import WHOLE, Part, StoredWeight

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_STORED_TYPES = ("F32", "F16", "BF16")
_SHOWN = 5  # names in an error message


def load_config(path: Path) -> ModelConfig:
    """Reads a model's shape.

    Args:
        path: A directory with config.json, or a GGUF file.

    Raises:
        UnsupportedModelError: The model asks for what the decoder does not compute.
        ConfigError: The configuration is missing, damaged or makes no sense.
    """
    if is_gguf(path):
        return gguf_config(GGUFFile(path))
    generation_file = path / "generation_config.json"
    generation = read_json(generation_file) if generation_file.exists() else {}
    return parse_config(read_json(path / "config.json"), generation)


def load_weights(
    path: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device = CPU,
    shard: Shard = WHOLE_MODEL,
) -> dict[str, torch.Tensor]:
    """Reads all weights, or of each what a rank has.

    Args:
        path: What `config` was loaded from.
        config: Says which weights there must be.
        dtype: Type of the result, whatever is stored.
        device: Where they go, one by one.
        shard: Which part of the model.

    Returns:
        Exactly the names and shapes of `config.weight_shapes()`; of a shard, its `parts`.

    Raises:
        ConfigError: A weight is missing, unexpected or of the wrong shape, or a file cannot be read.
    """
    stored = gguf_weights(GGUFFile(path), config) if is_gguf(path) else _safetensors_weights(path)
    stored = {name: weight for name, weight in stored.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and _HEAD in stored:
        _check_tied(path, stored)
        del stored[_HEAD]
    _check_weights(path, config.weight_shapes(), stored)
    parts = shard.parts(config)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tensors = pool.map(lambda name: stored[name].read(dtype, parts[name]).to(device), parts)
        return dict(zip(parts, tensors, strict=True))


def dummy_weights(
    config: ModelConfig, dtype: torch.dtype, device: torch.device = CPU
) -> dict[str, torch.Tensor]:
    """Random weights, always the same on one kind of device: a model of that shape without a checkpoint.

    Their sizes keep the residual stream in range, so that steps take what those of a trained model take.

    Args:
        config: Says which weights there must be.
        dtype: Of the result.
        device: Where they are made.
    """
    generator = torch.Generator(device).manual_seed(0)
    weights = {}
    for name, shape in config.weight_shapes().items():
        weight = torch.empty(shape, dtype=dtype, device=device)
        if "norm" in name:
            weights[name] = weight.fill_(1)
        else:
            std = 1.0 if name == _EMBEDDING else shape[-1] ** -0.5
            weights[name] = weight.normal_(0, std, generator=generator)
    return weights


def load_tensors(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device = CPU,
    integers: Collection[str] = (),
) -> dict[str, torch.Tensor]:
    """Reads the safetensors of a directory, which must be exactly those of the given names and shapes.

    Args:
        path: The directory.
        shapes: What there must be.
        dtype: Type of the result, whatever is stored.
        device: Where it goes.
        integers: Names of those that are stored, and returned, as int64 instead.

    Raises:
        ConfigError: A weight is missing, unexpected or of the wrong shape, or a file cannot be read.
    """
    stored = _safetensors_weights(path, integers)
    _check_weights(path, shapes, stored)
    types = {name: torch.int64 if name in integers else dtype for name in shapes}
    return {name: stored[name].read(types[name], WHOLE).to(device) for name in shapes}


def is_gguf(path: Path) -> bool:
    """Whether `path` is to be read as a GGUF file."""
    return path.suffix == ".gguf"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ConfigError: It cannot be read or is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


def _safetensors_weights(path: Path, integers: Collection[str] = ()) -> dict[str, StoredWeight]:
    weights: dict[str, StoredWeight] = {}
    for file in _safetensors_files(path):
        try:
            handle: Any = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"cannot read {file}: {error}") from error
        for name in handle.keys():  # noqa: SIM118 (not a mapping)
            part = handle.get_slice(name)
            if part.get_dtype() not in (("I64",) if name in integers else _STORED_TYPES):
                raise unsupported(f"{file}: {name} stored as {part.get_dtype()}")
            weights[name] = StoredWeight(tuple(part.get_shape()), partial(_read_safetensor, handle, name))
    return weights


def _read_safetensor(handle: Any, name: str, dtype: torch.dtype, part: Part) -> torch.Tensor:
    tensor: torch.Tensor = handle.get_slice(name)[part] if part else handle.get_tensor(name)
    return tensor.to(dtype)


def _safetensors_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map", {})
        return [path / name for name in sorted(set(weight_map.values()))]
    if (single := path / "model.safetensors").exists():
        return [single]
    raise ConfigError(
        f"{path} has neither model.safetensors nor model.safetensors.index.json; "
        "weights in other formats (.bin, .pth) must be saved as safetensors first"
    )


def _check_tied(path: Path, stored: dict[str, StoredWeight]) -> None:
    if _EMBEDDING not in stored:
        return  # reported as missing
    head, embedding = (stored[name].read(torch.float32, WHOLE) for name in (_HEAD, _EMBEDDING))
    if not torch.equal(head, embedding):
        raise ConfigError(
            f"{path}: config.json says tie_word_embeddings, but {_HEAD} and {_EMBEDDING} differ; "
            "set it to false if the output head is a weight of its own"
        )


def _check_weights(path: Path, expected: dict[str, tuple[int, ...]], stored: dict[str, StoredWeight]) -> None:
    problems = []
    if missing := expected.keys() - stored.keys():
        problems.append(f"missing {_some(missing)}")
    if unexpected := stored.keys() - expected.keys():
        problems.append(f"unexpected {_some(unexpected)}")
    wrong = [
        f"{name} {list(stored[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    if wrong:
        problems.append(f"wrongly shaped {_some(wrong)}")
    if problems:
        raise ConfigError(f"the weights in {path} do not fit its configuration: {'; '.join(problems)}")


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more

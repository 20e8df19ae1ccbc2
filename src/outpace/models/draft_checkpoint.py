"""Trained drafts on disk: a Hugging Face directory whose config.json says what it drafts for.

    config.json          speculators_config: algorithm, proposal_methods, verifier; the method's own settings
                         where it drafts some tokens only, draft_vocab_size
    model.safetensors    the trained weights, and no others but d2t, which tokens those are

The section is that of the `speculators` library; its algorithms do not include ours, which go by our names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from outpace.config import flag
from outpace.device import CPU
from outpace.errors import ConfigError
from outpace.models.config import ModelConfig
from outpace.models.draft_vocab import DraftVocab
from outpace.models.hub import resolve_draft
from outpace.models.loader import load_tensors, read_json

Shapes = dict[str, tuple[int, ...]]
_SECTION = "speculators_config"
_VOCAB_SIZE, _D2T = "draft_vocab_size", "d2t"
_SIZES = ("hidden_size", "vocab_size", "num_layers")  # of the target, which a draft must fit


@dataclass(frozen=True)
class DraftCheckpoint:
    """A trained draft.

    Attributes:
        settings: The method's own, as it wrote them.
        weights: By name, as the method named them.
        vocab: Which tokens it drafts.
    """

    settings: dict[str, Any]
    weights: dict[str, torch.Tensor]
    vocab: DraftVocab


def speculators_section(method: str, num_tokens: int, verifier: str, target: ModelConfig) -> dict[str, Any]:
    """What config.json says of a draft in the manner of `speculators`.

    Args:
        method: Its name in `spec/proposers`.
        num_tokens: Its greatest depth.
        verifier: The target as the user named it.
        target: The target's shape.
    """
    sizes = {name: getattr(target, name) for name in _SIZES}
    return {
        "speculators_model_type": method,
        _SECTION: {
            "algorithm": method,
            "proposal_methods": [{"proposal_type": method, "speculative_tokens": num_tokens}],
            "default_proposal_method": method,
            "verifier": {"name_or_path": verifier, "architectures": [target.architecture], **sizes},
        },
    }


def embedding_checksum(embedding: torch.Tensor) -> str:
    """Says which model's embedding it is, the same in float32 and in bfloat16.

    Args:
        embedding: [vocab, hidden].
    """
    low = embedding.detach().cpu().to(torch.bfloat16).contiguous()
    return hashlib.sha256(low.view(torch.int16).numpy().data).hexdigest()


def write_draft(
    directory: Path,
    section: dict[str, Any],
    settings: dict[str, Any],
    weights: dict[str, torch.Tensor],
    vocab: DraftVocab | None = None,
) -> None:
    """Writes a checkpoint.

    Args:
        directory: Where to; made if it is not there.
        section: Of `speculators_section`.
        settings: The method's own, as JSON has them.
        weights: What was trained.
        vocab: Which tokens it drafts; None where it is all.

    Raises:
        ConfigError: It cannot be written.
    """
    from safetensors.torch import save

    method = section["speculators_model_type"]
    if vocab is not None and vocab.d2t is not None:
        section, weights = section | {_VOCAB_SIZE: len(vocab)}, weights | {_D2T: vocab.d2t}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
        # not save_file, whose file only its owner may read
        (directory / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
        # Last, because a directory without it is not taken for a model.
        text = json.dumps(section | {method: settings}, indent=2)
        (directory / "config.json").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {directory}: {error}") from error


def read_draft(
    name: str | None,
    method: str,
    target: ModelConfig,
    shapes: Callable[[dict[str, Any], int], Shapes],
    dtype: torch.dtype,
    keys: Mapping[str, type],
    device: torch.device = CPU,
) -> DraftCheckpoint:
    """Reads the checkpoint of a method and makes sure that it fits the target.

    Args:
        name: Directory or hub id, as `--spec-model` gives it.
        method: Which it must be of.
        target: The target's shape.
        shapes: Name and shape of every weight, from the method's settings and the number of tokens it drafts.
        dtype: Of the weights that are returned.
        keys: Settings of the method that there must be, and what type JSON has of each.
        device: Where the weights go.

    Raises:
        ConfigError: There is none, it is of another method, or made for another target.
    """
    path, settings, size = _described(name, method, target, keys)
    expected = shapes(settings, size)
    if size == target.vocab_size:
        return DraftCheckpoint(settings, load_tensors(path, expected, dtype, device), DraftVocab(size))
    weights = load_tensors(path, expected | {_D2T: (size,)}, dtype, device, integers=(_D2T,))
    vocab = DraftVocab.from_d2t(weights.pop(_D2T), target.vocab_size)
    return DraftCheckpoint(settings, weights, vocab)


def read_trained(directory: Path, method: str, target: ModelConfig) -> DraftCheckpoint:
    """Reads a checkpoint to train it further: its weights are as they were written, whatever their shapes.

    Args:
        directory: Where `write_draft` wrote it.
        method: Which it must be of.
        target: The target's shape.

    Raises:
        ConfigError: There is none, it is of another method, or made for another target.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path, settings, size = _described(str(directory), method, target, {})
    try:
        weights = load_file(path / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read {path / 'model.safetensors'}: {error}") from error
    d2t = weights.pop(_D2T, None)
    if d2t is None:
        return DraftCheckpoint(settings, weights, DraftVocab(size))
    return DraftCheckpoint(settings, weights, DraftVocab.from_d2t(d2t, target.vocab_size))


def _described(
    name: str | None, method: str, target: ModelConfig, keys: Mapping[str, type]
) -> tuple[Path, dict[str, Any], int]:
    """Where a checkpoint is, its method's settings, and how many tokens it drafts; see `read_draft`."""
    if name is None:
        raise ConfigError(
            f"{method} needs its trained weights: name their directory with {flag('spec_model')}"
        )
    path = resolve_draft(name, method)
    config = read_json(path / "config.json")
    section = config.get(_SECTION)
    if not isinstance(section, dict) or not isinstance(section.get("verifier"), dict):
        raise ConfigError(
            f"{path} is no trained draft: its config.json has no {_SECTION}; "
            f"make one with outpace train {method}"
        )
    if section.get("algorithm") != method:
        raise ConfigError(f"{path} holds a draft of {section.get('algorithm')!r}, not of {method!r}")
    for size in _SIZES:
        made_for, has = section["verifier"].get(size), getattr(target, size)
        if made_for != has:
            raise ConfigError(
                f"{path} was trained for {section['verifier'].get('name_or_path')} with {size} {made_for}, "
                f"this target has {has}: train one for it with outpace train {method}"
            )
    settings = config.get(method)
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: config.json has no settings of {method}")
    for key, kind in keys.items():
        if key not in settings:
            raise ConfigError(f"{path}: config.json has no {key!r} of {method}")
        if type(settings[key]) is not kind:
            raise ConfigError(
                f"{path}: {key} of {method} in config.json must be {kind.__name__}, got {settings[key]!r}"
            )
    size = config.get(_VOCAB_SIZE, target.vocab_size)
    if type(size) is not int or not 0 < size <= target.vocab_size:
        raise ConfigError(
            f"{path}: {_VOCAB_SIZE} in config.json must be an integer in [1, {target.vocab_size}], the "
            f"target's vocabulary, got {size!r}"
        )
    return path, settings, size

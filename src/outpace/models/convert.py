"""Writes any supported model as a Hugging Face directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from outpace.errors import ConfigError
from outpace.models.config import ModelConfig, RopeConfig
from outpace.models.hf_config import ARCHITECTURES
from outpace.models.hub import resolve_model
from outpace.models.loader import load_config, load_weights
from outpace.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def convert(source: str | None, out: Path, dtype: str = "bfloat16") -> None:
    """Writes config, weights (safetensors, in shards if large) and tokenizer of a model.

    Args:
        source: What `resolve_model` takes; None is the default model.
        out: Directory to write, new or empty.
        dtype: `bfloat16`, `float16` or `float32`.

    Raises:
        ConfigError: `out` is not empty, or the model cannot be read or written so.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty directory")
    path = resolve_model(source)
    config = load_config(path)
    write_model(out, config, load_weights(path, config, _DTYPES[dtype]), load_tokenizer(path))


def write_model(
    out: Path, config: ModelConfig, weights: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Writes a Hugging Face directory.

    Args:
        out: Where to; made if it is not there.
        config: The model's shape.
        weights: As `config.weight_shapes()` names them, of one dtype.
        tokenizer: The model's.

    Raises:
        ConfigError: It cannot be written, or the model cannot be written so.
    """
    special = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids) or None}
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    content = hugging_face_config(config) | special | {"dtype": dtype}

    from huggingface_hub import save_torch_state_dict

    try:
        out.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(out)
        save_torch_state_dict(weights, out, metadata={"format": "pt"})
        _write_json(out / "generation_config.json", special)
        for file in out.glob("*.safetensors"):  # written for their owner alone
            file.chmod((out / "generation_config.json").stat().st_mode)
        # Last, because a directory without it is not taken for a model.
        _write_json(out / "config.json", content)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error}") from error


def hugging_face_config(config: ModelConfig) -> dict[str, Any]:
    """The content of config.json, in the keys that every version of transformers reads.

    Raises:
        ConfigError: The architecture has no setting for the model's biases.
    """
    return {
        "architectures": [config.architecture],
        "model_type": next(kind for kind, name in ARCHITECTURES.items() if name == config.architecture),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_scaling(config.rope),
        **_biases(config),
        **_sliding_window(config),
    }


def _rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind != "linear":
        scaling["original_max_position_embeddings"] = rope.original_max_position
    if rope.kind == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        scaling |= {"attention_factor": rope.attention_factor, "truncate": rope.truncate}
    return scaling


def _biases(config: ModelConfig) -> dict[str, bool]:
    biases = (config.qkv_bias, config.out_bias, config.mlp_bias)
    match config.architecture:
        case "LlamaForCausalLM" if config.qkv_bias == config.out_bias:
            return {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
        case "Qwen3ForCausalLM" if config.qkv_bias == config.out_bias and not config.mlp_bias:
            return {"attention_bias": config.qkv_bias}
        case "Qwen2ForCausalLM" if biases == (True, False, False):
            return {}
        case "MistralForCausalLM" if biases == (False, False, False):
            return {}
    raise ConfigError(
        f"a {config.architecture} directory cannot say that biases are (qkv, out, mlp) = {biases}"
    )


def _sliding_window(config: ModelConfig) -> dict[str, Any]:
    windows = config.sliding_windows
    if config.architecture == "LlamaForCausalLM":
        return {}
    if config.architecture == "MistralForCausalLM":
        return {"sliding_window": windows[0]}
    window = next((window for window in windows if window is not None), None)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in windows],
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

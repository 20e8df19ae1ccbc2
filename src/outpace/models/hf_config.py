"""From a Hugging Face `config.json` to a ModelConfig, by the rules of the transformers library."""

from __future__ import annotations

import math
from typing import Any

from outpace.errors import ConfigError, UnsupportedModelError
from outpace.models.config import ModelConfig, RopeConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ROPE_KINDS = ("default", "linear", "llama3", "yarn")
_NUM_KV_HEADS = {"MistralForCausalLM": 8, "Qwen2ForCausalLM": 32, "Qwen3ForCausalLM": 32}
_SLIDING, _FULL = "sliding_attention", "full_attention"


def unsupported(what: str) -> UnsupportedModelError:
    """The refusal of a model, with the list of what is supported."""
    return UnsupportedModelError(
        f"{what} is not supported; supported are {', '.join(ARCHITECTURES.values())} without quantization "
        f"(or as GGUF), activation silu, rope types {', '.join(ROPE_KINDS)} over the whole head"
    )


def parse_config(raw: dict[str, Any], generation: dict[str, Any]) -> ModelConfig:
    """Reads a model's shape.

    Args:
        raw: Content of config.json, with the keys of transformers 4 or 5.
        generation: Content of generation_config.json, or empty; its end tokens come before `raw`'s.

    Raises:
        UnsupportedModelError: The model asks for what the decoder does not compute.
        ConfigError: A value is missing or makes no sense.
    """
    architecture = _architecture(raw)
    if method := raw.get("quantization_config") or raw.get("compression_config"):
        raise unsupported(f"quantization method {method.get('quant_method', 'unknown')!r}")
    if (activation := raw.get("hidden_act") or "silu") not in ("silu", "swish"):
        raise unsupported(f"activation {activation!r}")
    hidden_size, num_heads = _size(raw, "hidden_size"), _size(raw, "num_attention_heads")
    num_layers = _size(raw, "num_hidden_layers")
    head_dim = raw.get("head_dim", 128 if architecture == "Qwen3ForCausalLM" else None)
    num_kv_heads = raw.get("num_key_value_heads", _NUM_KV_HEADS.get(architecture))
    max_position = _size(raw, "max_position_embeddings")
    may_have_bias = architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM")
    attention_bias = may_have_bias and bool(raw.get("attention_bias"))
    config = ModelConfig(
        architecture=architecture,
        vocab_size=_size(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_size(raw, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads or num_heads,
        head_dim=head_dim or hidden_size // num_heads,
        rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        max_position_embeddings=max_position,
        rope=_rope(raw, max_position),
        qkv_bias=architecture == "Qwen2ForCausalLM" or attention_bias,
        out_bias=attention_bias,
        mlp_bias=architecture == "LlamaForCausalLM" and bool(raw.get("mlp_bias")),
        qk_norm=architecture == "Qwen3ForCausalLM",
        tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
        sliding_windows=_sliding_windows(raw, architecture, num_layers),
        eos_token_ids=_eos_token_ids(raw, generation),
        bos_token_id=raw.get("bos_token_id"),
    )
    check_config(config)
    return config


def check_config(config: ModelConfig) -> None:
    """Refuses shapes that no decoder could have.

    Raises:
        ConfigError: Heads do not divide, or a head cannot be rotated.
    """
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(
            f"{config.num_heads} attention heads cannot share {config.num_kv_heads} key-value heads evenly"
        )
    if config.head_dim % 2:
        raise ConfigError(f"head_dim must be even for rotary embedding, got {config.head_dim}")


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """YaRN's default scale of cos and sin for a context stretched by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _architecture(raw: dict[str, Any]) -> str:
    named = raw.get("architectures") or [ARCHITECTURES.get(raw.get("model_type", ""), raw.get("model_type"))]
    if named[0] is None:
        raise ConfigError(
            "config.json names neither architectures nor a model_type: it is no language model's"
        )
    if named[0] not in ARCHITECTURES.values():
        raise unsupported(f"architecture {named[0]!r}")
    return str(named[0])


def _size(raw: dict[str, Any], key: str) -> int:
    value = raw.get(key)
    if type(value) is not int or value < 1:
        raise ConfigError(f"config.json: {key} must be a positive integer, got {value!r}")
    return value


def _number(settings: dict[str, Any], key: str, default: float | None = None) -> float:
    value = settings.get(key, default)
    if not isinstance(value, int | float) or value <= 0:
        raise ConfigError(f"config.json: {key} must be a positive number, got {value!r}")
    return float(value)


def _rope(raw: dict[str, Any], max_position: int) -> RopeConfig:
    rope: dict[str, Any] = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in rope.values()):
        raise unsupported("rope that differs between layers")
    if "mrope_section" in rope:
        raise unsupported("multimodal rope (mrope_section)")
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise unsupported(f"partial_rotary_factor {partial}")
    theta = _number(rope if "rope_theta" in rope else raw, "rope_theta", 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    original = raw.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    match kind:
        case "default":
            return RopeConfig(theta)
        case "linear":
            return RopeConfig(theta, "linear", _number(rope, "factor"))
        case "llama3":
            return RopeConfig(
                theta,
                "llama3",
                _number(rope, "factor"),
                original_max_position=original or max_position,
                low_freq_factor=_number(rope, "low_freq_factor"),
                high_freq_factor=_number(rope, "high_freq_factor"),
            )
        case "yarn":
            return _yarn(rope, theta, original or max_position, max_position)
    raise unsupported(f"rope type {kind!r}")


def _yarn(rope: dict[str, Any], theta: float, original: int, max_position: int) -> RopeConfig:
    factor = _number(rope, "factor") if rope.get("factor") is not None else max_position / original
    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        attention_factor = yarn_attention_factor(factor)
        if mscale and mscale_all_dim:
            attention_factor = yarn_attention_factor(factor, mscale)
            attention_factor /= yarn_attention_factor(factor, mscale_all_dim)
    return RopeConfig(
        theta,
        "yarn",
        factor,
        original_max_position=original,
        beta_fast=rope.get("beta_fast") or 32.0,
        beta_slow=rope.get("beta_slow") or 1.0,
        attention_factor=attention_factor,
        truncate=rope.get("truncate", True),
    )


def _sliding_windows(raw: dict[str, Any], architecture: str, num_layers: int) -> tuple[int | None, ...]:
    layer_types = raw.get("layer_types")
    if architecture in ("LlamaForCausalLM", "MistralForCausalLM"):
        if layer_types and len(set(layer_types)) > 1:
            raise unsupported(f"layer_types that differ between layers of {architecture}")
        window = raw.get("sliding_window", 4096) if architecture == "MistralForCausalLM" else None
        return (window,) * num_layers
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window", False) else None
    if layer_types is None:
        first = num_layers if window is None else raw.get("max_window_layers", 28)
        layer_types = [_SLIDING if layer >= first else _FULL for layer in range(num_layers)]
    if len(layer_types) != num_layers:
        raise ConfigError(f"config.json: {len(layer_types)} layer_types for {num_layers} layers")
    for layer_type in layer_types:
        if layer_type not in (_SLIDING, _FULL):
            raise unsupported(f"layer type {layer_type!r}")
        if layer_type == _SLIDING and window is None:
            raise ConfigError("config.json: layer_types has sliding_attention without use_sliding_window")
    return tuple(window if layer_type == _SLIDING else None for layer_type in layer_types)


def _eos_token_ids(raw: dict[str, Any], generation: dict[str, Any]) -> tuple[int, ...]:
    eos = generation.get("eos_token_id")
    if eos is None:
        eos = raw.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (eos,)

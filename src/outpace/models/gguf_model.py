"""From the metadata and tensors of a GGUF file to a ModelConfig and Hugging Face weights."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from outpace.errors import ConfigError, UnsupportedModelError
from outpace.models.config import ModelConfig, RopeConfig
from outpace.models.gguf_file import GGUFFile
from outpace.models.hf_config import ARCHITECTURES, check_config, unsupported, yarn_attention_factor
from outpace.models.stored import Part, StoredWeight

# llama.cpp calls Mistral `llama`.
_ARCHITECTURES = {name: ARCHITECTURES[name] for name in ("llama", "qwen2", "qwen3")}
_ROPE_FACTORS = "rope_freqs.weight"
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Keys that change the output unless they have this value (None: they never change it).
_NEUTRAL: dict[str, Any] = {
    "vocab_size": None,
    "tensor_data_layout": None,
    "rope.scaling.finetuned": None,
    "attention.causal": True,
    "attention.sliding_window": 0,
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}


def gguf_config(file: GGUFFile) -> ModelConfig:
    """Reads the model's shape from the metadata.

    Raises:
        UnsupportedModelError: The model asks for what the decoder does not compute.
        ConfigError: A value is missing or makes no sense.
    """
    name = file.metadata.get("general.architecture")
    if name not in _ARCHITECTURES:
        raise unsupported(f"GGUF architecture {name!r}")
    fields = _Fields(file, name)
    hidden_size, num_heads = fields.size("embedding_length"), fields.size("attention.head_count")
    head_dim = fields.size("attention.key_length", hidden_size // num_heads)
    if (value_dim := fields.size("attention.value_length", head_dim)) != head_dim:
        raise unsupported(f"a value head of {value_dim} beside a key head of {head_dim}")
    if (rotated := fields.size("rope.dimension_count", head_dim)) != head_dim:
        raise unsupported(f"rope over {rotated} of {head_dim} dimensions")
    max_position = fields.size("context_length")
    config = ModelConfig(
        architecture=_ARCHITECTURES[name],
        vocab_size=_tensor_shape(file, "token_embd.weight")[0],
        hidden_size=hidden_size,
        intermediate_size=fields.size("feed_forward_length"),
        num_layers=fields.size("block_count"),
        num_heads=num_heads,
        num_kv_heads=fields.size("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        max_position_embeddings=max_position,
        rope=_rope(file, fields, head_dim, max_position),
        qkv_bias=name == "qwen2" or "blk.0.attn_q.bias" in file.tensors,
        out_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        qk_norm=name == "qwen3",
        tie_word_embeddings="output.weight" not in file.tensors,
        sliding_windows=(None,) * fields.size("block_count"),
        eos_token_ids=_eos_token_ids(file),
        bos_token_id=file.metadata.get("tokenizer.ggml.bos_token_id"),
    )
    fields.refuse_unread()
    check_config(config)
    return config


def gguf_weights(file: GGUFFile, config: ModelConfig) -> dict[str, StoredWeight]:
    """Every weight in the file by its Hugging Face name, not read yet.

    A tensor without a Hugging Face name keeps its own.
    """
    weights = {}
    for name, info in file.tensors.items():
        if name == _ROPE_FACTORS:
            continue  # in the config already
        read = partial(file.read, name)
        if file.metadata["general.architecture"] == "llama" and (".attn_q." in name or ".attn_k." in name):
            read = partial(_read_unpermuted, file, name, config.head_dim)
        weights[_hugging_face_name(name)] = StoredWeight(info.shape, read)
    return weights


def _read_unpermuted(
    file: GGUFFile, name: str, head_dim: int, dtype: torch.dtype, part: Part
) -> torch.Tensor:
    """Undoes llama.cpp's order of a head's rows, which rotates neighbours where Hugging Face rotates halves.

    Row 2i + j of a stored head is row i + j * head_dim / 2 of ours. A part has whole heads.
    """
    stored = file.read(name, dtype, part)
    pairs = stored.reshape(-1, head_dim // 2, 2, *stored.shape[1:])
    return pairs.transpose(1, 2).reshape(stored.shape)


def _hugging_face_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{kind}"
    prefix, _, rest = stem.partition(".")
    layer, _, part = rest.partition(".")
    if prefix == "blk" and part in _LAYER_NAMES:
        return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"
    return name


class _Fields:
    """The architecture's metadata keys; remembers which were read, so that no other is ignored."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self._path = file.path
        prefix = architecture + "."
        self._values = {k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)}
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return self._values.get(key, default)

    def size(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if isinstance(value, list):
            raise unsupported(f"a {key} that differs between layers")
        if type(value) is not int or value < 1:
            raise ConfigError(f"{self._path}: {key} must be a positive integer, got {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if not isinstance(value, int | float) or value <= 0:
            raise ConfigError(f"{self._path}: {key} must be a positive number, got {value!r}")
        # float32 values such as 1e-5 were decimal numbers before they were stored
        return float(f"{value:.7g}")

    def refuse_unread(self) -> None:
        for key in self._values.keys() - self._read:
            if key not in _NEUTRAL or _NEUTRAL[key] not in (None, self._values[key]):
                raise unsupported(f"GGUF setting {key} = {self._values[key]!r}")


def _rope(file: GGUFFile, fields: _Fields, head_dim: int, max_position: int) -> RopeConfig:
    theta = fields.number("rope.freq_base", 10000.0)
    factor = fields.get("rope.scaling.factor") or fields.get("rope.scale_linear") or 1.0
    kind = fields.get("rope.scaling.type", "linear")
    if kind == "none" or (kind == "linear" and factor == 1.0):
        if _ROPE_FACTORS in file.tensors:
            return _llama3_rope(file, theta, head_dim)
        return RopeConfig(theta)
    if _ROPE_FACTORS in file.tensors:
        raise unsupported(f"{_ROPE_FACTORS} beside rope type {kind!r}")
    if kind == "linear":
        return RopeConfig(theta, "linear", factor)
    if kind == "yarn":
        return RopeConfig(
            theta,
            "yarn",
            factor,
            original_max_position=fields.size("rope.scaling.original_context_length", max_position),
            beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=yarn_attention_factor(factor),
        )
    raise unsupported(f"rope type {kind!r}")


def _llama3_rope(file: GGUFFile, theta: float, head_dim: int) -> RopeConfig:
    """Finds the parameters behind the stored frequency divisors of Llama 3.1 and later.

    The file keeps the divisors only; every published model has the low, high and original context of
    Llama 3.1 and differs in the factor, which is the largest divisor.
    """
    divisors = file.read(_ROPE_FACTORS, torch.float64)
    rope = RopeConfig(theta, "llama3", round(divisors.max().item(), 4), 8192, 1.0, 4.0)
    expected = torch.tensor([_llama3_divisor(rope, 2 * i / head_dim) for i in range(head_dim // 2)])
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected.double(), rtol=1e-4):
        raise UnsupportedModelError(
            f"{file.path}: {_ROPE_FACTORS} does not hold Llama 3.1's scaling (low 1, high 4, context 8192); "
            "use the model's Hugging Face directory, which names its parameters"
        )
    return rope


def _llama3_divisor(rope: RopeConfig, exponent: float) -> float:
    turns = rope.original_max_position / (2 * math.pi * rope.theta**exponent)
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = min(max(smooth, 0.0), 1.0)
    return float(1 / ((1 - smooth) / rope.factor + smooth))


def _tensor_shape(file: GGUFFile, name: str) -> tuple[int, ...]:
    if name not in file.tensors:
        raise ConfigError(f"{file.path} has no tensor {name}")
    return file.tensors[name].shape


def _eos_token_ids(file: GGUFFile) -> tuple[int, ...]:
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = (file.metadata.get(f"tokenizer.ggml.{key}") for key in keys)
    return tuple(dict.fromkeys(token for token in ids if token is not None))

"""Small random models of every supported architecture, with a tokenizer, for tests.

write_checkpoint(directory, "qwen3")       a Hugging Face directory
write_gguf(directory, directory / "a.gguf")  the same model as a GGUF file
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

VOCAB_SIZE = 320
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS_TOKEN_ID = 2  # <|im_end|>
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = "the quick brown fox jumps over the lazy dog and then the dog barks at the other fox in 1984 "

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": None,
}


@dataclass(frozen=True)
class Variant:
    """A transformers architecture and how its config differs from `_SIZES`."""

    architecture: str
    settings: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    "llama": Variant("Llama"),
    "llama-tied": Variant("Llama", {"tie_word_embeddings": True}),
    "llama-biases": Variant("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": Variant("Llama", {"head_dim": 32, "num_key_value_heads": 1}),
    "llama-linear": Variant("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama-llama3": Variant(
        "Llama",
        {
            "max_position_embeddings": 16384,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "llama-llama3-short": Variant(
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral": Variant("Mistral", {"sliding_window": None}),
    "mistral-sliding": Variant("Mistral", {"sliding_window": 7}),
    "qwen2": Variant("Qwen2"),
    "qwen2-sliding": Variant(
        "Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    ),
    "qwen2-yarn": Variant(
        "Qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "llama-yarn-mscale": Variant(
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
                "truncate": False,
            }
        },
    ),
    "qwen3": Variant("Qwen3", {"tie_word_embeddings": True}),
    "qwen3-biases": Variant("Qwen3", {"attention_bias": True, "head_dim": 32}),
}


def write_checkpoint(
    directory: Path, variant: str = "llama", *, seed: int = 0, max_shard_size: str = "5GB", **settings: Any
) -> Path:
    """Writes config, float32 weights and tokenizer of a random model.

    Args:
        directory: Where to; made if it is not there.
        variant: A key of `VARIANTS`.
        seed: Of the random weights.
        max_shard_size: A small one (`"100KB"`) gives sharded safetensors.
        **settings: Config values that replace the variant's.

    Returns:
        `directory`.
    """
    import transformers

    architecture = VARIANTS[variant].architecture
    config_class = getattr(transformers, f"{architecture}Config")
    config = config_class(**(_SIZES | VARIANTS[variant].settings | settings))
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    _randomise(model, seed)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    write_tokenizer(directory)
    return directory


def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that logits differ clearly and every bias and norm matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 2:
                weight.copy_(noise / weight.shape[1] ** 0.5)
            else:
                weight.copy_(0.2 * noise + (1.0 if "norm" in name else 0.0))


def write_tokenizer(directory: Path) -> None:
    """Writes a byte-level BPE of `VOCAB_SIZE` tokens with chat template; it encodes any text."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    assert tokenizer.get_vocab_size() <= VOCAB_SIZE
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def write_gguf(checkpoint: Path, path: Path, kind: str = "F32", **metadata: Any) -> Path:
    """Writes the model of a Hugging Face directory as llama.cpp's converter would.

    Args:
        checkpoint: What `write_checkpoint` wrote.
        path: File to write.
        kind: Storage type of matrices, a name of `gguf.GGMLQuantizationType`; vectors stay float32.
        **metadata: More settings of the architecture as `key=value`, dots written as double underscores.

    Returns:
        `path`.
    """
    from safetensors.torch import load_file

    config = json.loads((checkpoint / "config.json").read_text())
    architecture = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(path, architecture)
    _add_config(writer, config)
    for key, value in metadata.items():
        writer.add_key_value(
            f"{architecture}.{key.replace('__', '.')}", value, gguf.GGUFValueType.get_type(value)
        )
    _add_tokenizer(writer, json.loads((checkpoint / "tokenizer.json").read_text()))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config["num_hidden_layers"])
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        values = tensor.numpy()
        part = name.split(".")[-2]
        if architecture == "llama" and part in heads:
            values = _permute(values, heads[part])
        _add_tensor(writer, names.get_name(name, (".weight", ".bias")), values, kind)
    if config["rope_parameters"]["rope_type"] == "llama3":
        _add_tensor(writer, "rope_freqs.weight", _llama3_divisors(config), kind)
    finish(writer)
    return path


def finish(writer: gguf.GGUFWriter) -> None:
    """Writes all that was added to a GGUF file and closes it."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_config(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict[str, Any]) -> None:
    vocab = sorted(tokenizer["model"]["vocab"].items(), key=lambda entry: entry[1])
    kinds = [gguf.TokenType.CONTROL if t in SPECIAL_TOKENS else gguf.TokenType.NORMAL for t, _ in vocab]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(EOS_TOKEN_ID)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(EOS_TOKEN_ID)
    writer.add_chat_template(CHAT_TEMPLATE)


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: str) -> None:
    stored = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
    writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)


def _permute(values: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's order of rows within a head: the two halves interleaved."""
    halves = values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _llama3_divisors(config: dict[str, Any]) -> np.ndarray:
    """What transformers divides the frequencies by."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**config))
    exponents = torch.arange(0, config["head_dim"], 2) / config["head_dim"]
    plain = 1 / config["rope_parameters"]["rope_theta"] ** exponents
    divisors: np.ndarray = (plain / scaled).numpy().astype(np.float32)
    return divisors

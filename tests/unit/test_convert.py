"""Converted models are the same models, for us and for transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoints import VARIANTS, write_checkpoint, write_gguf
from outpace.errors import ConfigError
from outpace.models.config import ModelConfig
from outpace.models.convert import convert, hugging_face_config
from outpace.models.hf_config import parse_config
from outpace.models.loader import load_config, load_weights
from outpace.models.tokenizer import load_tokenizer


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_survives_a_conversion(tmp_path: Path, variant: str) -> None:
    source = write_checkpoint(tmp_path / "source", variant)
    convert(str(source), tmp_path / "out", "float32")
    config = load_config(source)
    assert load_config(tmp_path / "out") == config
    before = load_weights(source, config, torch.float32)
    after = load_weights(tmp_path / "out", config, torch.float32)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_whoever_may_read_the_configuration_may_read_the_weights(tmp_path: Path) -> None:
    convert(str(write_checkpoint(tmp_path / "source", "llama-llama3")), tmp_path / "out", "float32")
    modes = {(tmp_path / "out" / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1


@pytest.mark.parametrize("variant", ["llama-llama3", "qwen2-yarn", "qwen3"])
def test_transformers_computes_the_same_from_a_converted_gguf(tmp_path: Path, variant: str) -> None:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    source = write_checkpoint(tmp_path / "source", variant)
    path = write_gguf(source, tmp_path / "model.gguf")
    convert(str(path), tmp_path / "out", "float32")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source)(ids).logits
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(model(ids).logits, expected)
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == [2]
    text = "the fox <|im_end|> in 1984"
    ours = load_tokenizer(tmp_path / "out")
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")(text).input_ids == ours(text).input_ids
    assert ours(text).input_ids == load_tokenizer(source)(text).input_ids
    assert ours.chat_template == load_tokenizer(source).chat_template


def test_bfloat16_is_the_default_and_reads_back_identically(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "llama-tied")
    path = write_gguf(source, tmp_path / "model.gguf", "Q8_0")
    convert(str(path), tmp_path / "out")
    config = load_config(path)
    before = load_weights(path, config, torch.bfloat16)
    after = load_weights(tmp_path / "out", config, torch.bfloat16)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_directory_with_anything_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not an empty directory"):
        convert("anything", tmp_path)
    with pytest.raises(ConfigError, match="not an empty directory"):
        convert("anything", tmp_path / "notes.txt")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_an_unknown_dtype_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one of bfloat16, float16, float32, got 'int8'"):
        convert("anything", tmp_path / "out", "int8")


def test_biases_that_a_directory_cannot_express_are_refused() -> None:
    raw = {"architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}
    raw |= {"num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 8}
    config = parse_config(raw, {})
    fields = {name: getattr(config, name) for name in ModelConfig.__slots__}
    with pytest.raises(ConfigError, match=r"biases are .*\(True, False, False\)"):
        hugging_face_config(ModelConfig(**(fields | {"qkv_bias": True})))

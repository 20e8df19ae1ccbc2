"""Hugging Face directories: configs of every kind, and weights that fit them exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import VARIANTS, write_checkpoint
from outpace.errors import ConfigError, UnsupportedModelError
from outpace.models.config import ModelConfig, RopeConfig
from outpace.models.hf_config import parse_config
from outpace.models.loader import load_config, load_weights

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def parse(**changes: Any) -> ModelConfig:
    return parse_config(LLAMA | changes, {})


def rope(**settings: Any) -> RopeConfig:
    return parse(rope_scaling=settings).rope


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def editable(llama: Path, tmp_path: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((llama / name).read_bytes())
    return tmp_path


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_weights_of_every_variant_are_read_unchanged(tmp_path: Path, variant: str) -> None:
    write_checkpoint(tmp_path, variant)
    config = load_config(tmp_path)
    weights = load_weights(tmp_path, config, torch.float32)
    assert {name: tuple(w.shape) for name, w in weights.items()} == config.weight_shapes()
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(weights[name], stored[name]) for name in weights)


def test_sharded_weights_equal_those_of_one_file(llama: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama", max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    config = load_config(tmp_path)
    whole = load_weights(llama, config, torch.float32)
    sharded = load_weights(tmp_path, config, torch.float32)
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


def test_weights_are_converted_to_the_type_asked_for(llama: Path) -> None:
    weights = load_weights(llama, load_config(llama), torch.bfloat16)
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}


def test_the_parsed_config_agrees_with_transformers(llama: Path) -> None:
    config = load_config(llama)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.num_layers) == (4, 2, 16, 3)
    assert config.rope == RopeConfig(10000.0)
    assert config.eos_token_ids == (2,)
    assert config.bos_token_id == 1


def test_a_missing_weight_is_named(editable: Path) -> None:
    edit_weights(editable, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ConfigError, match=r"missing model\.layers\.1\.mlp\.up_proj\.weight"):
        load_weights(editable, load_config(editable), torch.float32)


def test_an_unexpected_weight_is_named(editable: Path) -> None:
    edit_weights(editable, lambda weights: weights.update({"model.extra": torch.zeros(1)}))
    with pytest.raises(ConfigError, match=r"unexpected model\.extra"):
        load_weights(editable, load_config(editable), torch.float32)


def test_a_wrongly_shaped_weight_is_named_with_both_shapes(editable: Path) -> None:
    edit_weights(editable, lambda weights: weights.update({"model.norm.weight": torch.zeros(32)}))
    with pytest.raises(ConfigError, match=r"model\.norm\.weight \[32\] instead of \[64\]"):
        load_weights(editable, load_config(editable), torch.float32)


def test_many_problems_are_counted_instead_of_listed(editable: Path) -> None:
    edit_weights(
        editable, lambda weights: [weights.pop(name) for name in list(weights) if "layers.0" in name]
    )
    with pytest.raises(ConfigError, match="and 4 more"):
        load_weights(editable, load_config(editable), torch.float32)


def test_old_rotary_buffers_are_dropped(editable: Path) -> None:
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    edit_weights(editable, lambda weights: weights.update(buffer))
    assert "lm_head.weight" in load_weights(editable, load_config(editable), torch.float32)


def tie(path: Path, head_is_embedding: bool) -> None:
    config = json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps(config))
    if head_is_embedding:
        edit_weights(path, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))


def test_a_redundant_head_of_a_tied_model_is_dropped(editable: Path) -> None:
    tie(editable, head_is_embedding=True)
    assert "lm_head.weight" not in load_weights(editable, load_config(editable), torch.float32)


def test_a_tied_model_whose_head_differs_is_refused(editable: Path) -> None:
    tie(editable, head_is_embedding=False)
    with pytest.raises(ConfigError, match="differ"):
        load_weights(editable, load_config(editable), torch.float32)


def test_pickled_weights_alone_are_refused_with_the_way_out(editable: Path) -> None:
    (editable / "model.safetensors").rename(editable / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="saved as safetensors first"):
        load_weights(editable, load_config(editable), torch.float32)


def test_weights_stored_in_other_types_are_refused_by_name(editable: Path) -> None:
    edit_weights(editable, lambda w: w.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}))
    with pytest.raises(UnsupportedModelError, match=r"model\.norm\.weight stored as I8"):
        load_weights(editable, load_config(editable), torch.float32)


def test_a_damaged_weight_file_is_one_clear_error(editable: Path) -> None:
    file = editable / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot read"):
        load_weights(editable, load_config(editable), torch.float32)


def test_a_config_that_is_not_json_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"architectures": None, "model_type": "gemma3"}, "gemma3"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_scaling": {"type": "default", "mrope_section": [1, 1, 2]}}, "mrope_section"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differs between layers"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
    ],
)
def test_what_is_not_supported_is_refused_by_name_with_what_is(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{named}.*supported are LlamaForCausalLM, Mistral"):
        parse(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": None},
        {"num_hidden_layers": "3"},
        {"num_key_value_heads": 3},
        {"head_dim": 15},
        {"rope_theta": 0},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": {"rope_type": "linear"}},
    ],
)
def test_values_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        parse(**changes)


def test_an_architecture_without_a_name_is_found_by_model_type() -> None:
    config = parse_config(
        {k: v for k, v in LLAMA.items() if k != "architectures"} | {"model_type": "llama"}, {}
    )
    assert config.architecture == "LlamaForCausalLM"


def test_a_configuration_that_names_no_architecture_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="names neither architectures nor a model_type"):
        parse_config({}, {})


def test_old_and_new_rope_keys_mean_the_same() -> None:
    old = parse(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    new = parse(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
    assert old.rope == new.rope == RopeConfig(5e5, "linear", 2.0)


def test_the_original_context_defaults_to_the_whole_one() -> None:
    settings = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert rope(**settings).original_max_position == 512
    assert rope(**settings, original_max_position_embeddings=64).original_max_position == 64


def test_yarn_attention_factors_follow_the_paper_or_mscale() -> None:
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 128}
    assert rope(**yarn, factor=4.0).attention_factor == pytest.approx(1.1386294)
    assert rope(**yarn).factor == 4.0  # from the lengths
    assert rope(**yarn, factor=4.0, attention_factor=1.0).attention_factor == 1.0
    mscale = rope(**yarn, factor=4.0, mscale=1.0, mscale_all_dim=0.5).attention_factor
    assert mscale == pytest.approx(1.1386294 / 1.0693147)


def test_end_tokens_come_from_the_generation_config_first() -> None:
    assert parse_config(LLAMA | {"eos_token_id": 2}, {"eos_token_id": [5, 6]}).eos_token_ids == (5, 6)
    assert parse_config(LLAMA | {"eos_token_id": 2}, {}).eos_token_ids == (2,)
    assert parse_config(LLAMA | {"eos_token_id": 0}, {"eos_token_id": None}).eos_token_ids == (0,)
    assert parse_config(LLAMA, {}).eos_token_ids == ()


def test_every_mistral_layer_slides_by_default() -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 2}
    assert parse(**mistral).sliding_windows == (4096,) * 3
    assert parse(**mistral, sliding_window=None).sliding_windows == (None,) * 3


def test_qwen_layers_slide_only_where_the_config_asks() -> None:
    qwen = {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2, "sliding_window": 8}
    assert parse(**qwen).sliding_windows == (None,) * 3
    assert parse(**qwen, use_sliding_window=True).sliding_windows == (None,) * 3  # from layer 28 on
    assert parse(**qwen, use_sliding_window=True, max_window_layers=2).sliding_windows == (None, None, 8)
    types = ["sliding_attention", "full_attention", "full_attention"]
    assert parse(**qwen, use_sliding_window=True, layer_types=types).sliding_windows == (8, None, None)
    with pytest.raises(ConfigError, match="without use_sliding_window"):
        parse(**qwen, layer_types=types)
    with pytest.raises(ConfigError, match="2 layer_types for 3 layers"):
        parse(**qwen, layer_types=types[1:])


def test_biases_follow_each_architecture() -> None:
    qwen2 = parse(architectures=["Qwen2ForCausalLM"], num_key_value_heads=2)
    assert (qwen2.qkv_bias, qwen2.out_bias, qwen2.mlp_bias, qwen2.qk_norm) == (True, False, False, False)
    llama = parse(attention_bias=True, mlp_bias=True)
    assert (llama.qkv_bias, llama.out_bias, llama.mlp_bias) == (True, True, True)
    qwen3 = parse(architectures=["Qwen3ForCausalLM"], num_key_value_heads=2, attention_bias=True)
    assert (qwen3.qkv_bias, qwen3.out_bias, qwen3.qk_norm, qwen3.head_dim) == (True, True, True, 128)

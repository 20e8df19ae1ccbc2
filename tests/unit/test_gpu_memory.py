"""What a GPU's memory is planned for, in numbers made up: the measuring of them needs a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from outpace.config import EngineConfig
from outpace.engine.engine import Engine, choose_num_gpu_blocks
from outpace.engine.gpu_memory import Use, draft_bytes, graph_bytes
from outpace.errors import ConfigError
from outpace.runtime.kv_cache import KVCache
from tiny import GREEDY, MODEL, answers, tiny_engine, write_model

BLOCK = KVCache.block_bytes(MODEL, torch.bfloat16)
USE = Use(total=1000 * BLOCK, used=200 * BLOCK, passes=50 * BLOCK, graphs=30 * BLOCK, drafts=20 * BLOCK)


def num_blocks(use: Use = USE, **settings: Any) -> int:
    return choose_num_gpu_blocks(EngineConfig(**settings), [MODEL], torch.bfloat16, use)


def test_the_cache_gets_what_weights_passes_and_graphs_leave_of_the_share() -> None:
    assert num_blocks() == 900 - 300 - 1  # and one is the null block
    assert num_blocks(gpu_memory_utilization=0.5) == 500 - 300 - 1
    assert num_blocks(gpu_memory_utilization=1.0) == 1000 - 300 - 1
    two = choose_num_gpu_blocks(EngineConfig(), [MODEL, MODEL], torch.bfloat16, USE)
    assert two == (900 - 300) // 2 - 1


def test_a_cache_of_a_given_size_may_take_all_that_is_left() -> None:
    assert num_blocks(kv_cache_memory_bytes=700 * BLOCK) == 699
    with pytest.raises(ConfigError, match=f"exceeds what weights and passes leave .* {700 * BLOCK} bytes"):
        num_blocks(kv_cache_memory_bytes=700 * BLOCK + 1)


def test_too_little_memory_for_one_sequence_is_an_error_that_says_what_to_change() -> None:
    with pytest.raises(
        ConfigError, match=r"raise --gpu-memory-utilization \(0.3\), or lower --max-model-len"
    ):
        num_blocks(gpu_memory_utilization=0.3)
    with pytest.raises(ConfigError, match="raise --kv-cache-memory-bytes"):
        num_blocks(kv_cache_memory_bytes=10 * BLOCK)
    assert num_blocks(gpu_memory_utilization=0.334, max_model_len=512) == 33
    assert USE.left(0.2) == 0


def test_graphs_pay_for_the_memory_of_passes_once_and_each_for_itself() -> None:
    assert graph_bytes(500, 20, 51) == 500 + 50 * 20
    assert graph_bytes(500, 20, 1) == 500
    assert graph_bytes(500, -20, 51) == 500  # other processes gave memory back meanwhile


def test_the_weights_of_a_draft_are_counted_before_they_are_loaded(tmp_path: Path) -> None:
    assert draft_bytes(EngineConfig(spec_method="none"), torch.bfloat16) == 0
    write_model(tmp_path)
    model = EngineConfig(spec_method="draft_model", spec_model=str(tmp_path))
    num_weights = sum(torch.Size(shape).numel() for shape in MODEL.weight_shapes().values())
    assert draft_bytes(model, torch.bfloat16) == 2 * num_weights
    heads = EngineConfig(spec_method="medusa", spec_model=str(tmp_path))
    assert draft_bytes(heads, torch.bfloat16) == (tmp_path / "model.safetensors").stat().st_size


def test_a_model_without_weights_is_served_with_random_ones(tmp_path: Path) -> None:
    write_model(tmp_path, vocab_size=1000)
    (tmp_path / "model.safetensors").unlink()
    config = EngineConfig(
        str(tmp_path), load_format="dummy", dtype="float32", kernels="reference", max_model_len=256
    )
    first = answers(Engine.from_config(config), GREEDY)
    assert [len(answer) for answer in first] == [GREEDY.max_tokens] * len(first)
    assert answers(Engine.from_config(config), GREEDY) == first
    with pytest.raises(ConfigError, match="has neither"):
        Engine.from_config(EngineConfig(str(tmp_path), dtype="float32", kernels="reference"))


def test_settings_for_a_gpu_are_refused_before_a_model_is_loaded_for_a_cpu(tmp_path: Path) -> None:
    write_model(tmp_path)
    config = EngineConfig(str(tmp_path), device="cpu", gpu_memory_utilization=0.8)
    with pytest.raises(ConfigError, match=r"--gpu-memory-utilization 0.8 is for a GPU.*--kv-cache-memory"):
        Engine.from_config(config)
    assert tiny_engine(enforce_eager=True).runner.buckets == ()

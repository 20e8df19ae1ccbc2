"""Parts of a model: together they are the whole, and what they compute adds up to it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from checkpoints import finish, write_checkpoint, write_gguf
from outpace.device import tensor_of
from outpace.errors import ConfigError
from outpace.kernels import Rows
from outpace.kernels.reference import ReferenceKernels
from outpace.models.decoder import Decoder
from outpace.models.gguf_file import GGUFFile
from outpace.models.loader import load_config, load_weights
from outpace.models.shard import Shard
from outpace.runtime.kv_cache import KVCache
from tiny import MODEL

TOKENS = torch.tensor([5, 100, 7, 7, 250, 31, 12, 90])


def hidden(decoder: Decoder) -> torch.Tensor:
    """States of `TOKENS` as one prompt."""
    number = len(TOKENS)
    rows = Rows(
        positions=tensor_of(list(range(number)), np.int32),
        slots=tensor_of(list(range(number)), np.int32),
        parents=tensor_of(list(range(-1, number - 1)), np.int32),
        row_starts=tensor_of([0, number], np.int32),
        context_lens=tensor_of([0], np.int32),
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
        branching=tensor_of([0], np.int32),
    )
    cache = KVCache(decoder.config, 1, torch.float32, enable_prefix_caching=False)
    return decoder.forward(TOKENS, rows, decoder.stack(cache.layers))


def totals(size: int) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """For threads what `Ranks.total` is for processes."""
    barrier = threading.Barrier(size, timeout=60)
    parts: list[torch.Tensor] = [torch.empty(0)] * size

    def of(rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def total(part: torch.Tensor) -> torch.Tensor:
            parts[rank] = part
            barrier.wait()
            result = torch.stack(parts).sum(0)
            barrier.wait()
            return result

        return total

    return [of(rank) for rank in range(size)]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("variant", ["llama-biases", "llama-wide-heads", "qwen2", "qwen3", "mistral-sliding"])
def test_ranks_together_compute_what_the_whole_model_computes(
    tmp_path: Path, variant: str, size: int
) -> None:
    write_checkpoint(tmp_path, variant)
    config = load_config(tmp_path)

    def states(shard: Shard, total: Callable[[torch.Tensor], torch.Tensor] | None) -> torch.Tensor:
        weights = load_weights(tmp_path, config, torch.float32, shard=shard)
        return hidden(Decoder(shard.config(config), weights, torch.float32, ReferenceKernels(), total))

    with ThreadPoolExecutor(size) as pool:
        shards = [Shard(rank, size) for rank in range(size)]
        every = list(pool.map(states, shards, totals(size)))
    whole = states(Shard(), None)
    for ranks in every:
        assert torch.equal(ranks, every[0])
        torch.testing.assert_close(ranks, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_parts_of_all_ranks_cover_every_weight(size: int) -> None:
    model = replace(MODEL, out_bias=True, mlp_bias=True, qkv_bias=True)
    for name, shape in model.weight_shapes().items():
        covered = torch.zeros(shape, dtype=torch.int64)
        for rank in range(size):
            parts = Shard(rank, size).parts(model)
            if name in parts:
                covered[parts[name]] += 1
        assert covered.min() >= 1, name
        if name.split(".")[-2] in ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"):
            assert covered.max() == 1, name


def test_the_shape_of_a_rank_is_that_of_its_weights(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama-tied")
    config = load_config(tmp_path)
    for rank in (0, 1):
        shard = Shard(rank, 2)
        weights = load_weights(tmp_path, config, torch.float32, shard=shard)
        expected = shard.config(config).weight_shapes()
        expected.pop("lm_head.weight", None)  # which no rank but the first would need
        assert {name: tuple(weight.shape) for name, weight in weights.items()} == expected


def test_only_the_first_rank_has_an_output_head(tmp_path: Path) -> None:
    for variant in ("llama", "llama-tied"):
        write_checkpoint(tmp_path / variant, variant)
        config = load_config(tmp_path / variant)
        first, second = (
            Decoder(
                shard.config(config),
                load_weights(tmp_path / variant, config, torch.float32, shard=shard),
                torch.float32,
                ReferenceKernels(),
            )
            for shard in (Shard(0, 2), Shard(1, 2))
        )
        assert first.logits(torch.zeros(1, config.hidden_size)).shape == (1, config.vocab_size)
        with pytest.raises(AssertionError, match="only the first rank"):
            second.logits(torch.zeros(1, config.hidden_size))


@pytest.mark.parametrize(("size", "heads", "kv_heads"), [(2, 4, 2), (4, 4, 2), (4, 8, 1), (3, 9, 3)])
def test_query_heads_come_with_their_key_and_value_heads(size: int, heads: int, kv_heads: int) -> None:
    model = replace(MODEL, num_heads=heads, num_kv_heads=kv_heads, intermediate_size=96)
    dim, group = model.head_dim, heads // kv_heads
    for rank in range(size):
        own = Shard(rank, size).config(model)
        parts = Shard(rank, size).parts(model)
        q, kv = (range(heads * dim)[parts[f"model.layers.0.self_attn.{x}_proj.weight"][0]] for x in "qk")
        for head in range(own.num_heads):
            its_own = kv.start // dim + head // (own.num_heads // own.num_kv_heads)
            assert its_own == (q.start // dim + head) // group


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
@pytest.mark.parametrize("variant", ["llama-biases", "qwen2"])
def test_a_part_of_a_gguf_is_that_part_of_the_whole(tmp_path: Path, variant: str, kind: str) -> None:
    write_checkpoint(tmp_path, variant, hidden_size=64, intermediate_size=128)
    path = write_gguf(tmp_path, tmp_path / "model.gguf", kind)
    config = load_config(path)
    whole = load_weights(path, config, torch.float32)
    for rank in (0, 1):
        shard = Shard(rank, 2)
        parts = shard.parts(config)
        weights = load_weights(path, config, torch.float32, shard=shard)
        assert weights.keys() == parts.keys()
        for name, part in parts.items():
            assert torch.equal(weights[name], whole[name][part]), name


def test_a_part_of_a_quantised_vector_is_read(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal(96, dtype=np.float32)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    q8 = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("vector", gguf.quants.quantize(values, q8), raw_dtype=q8)
    finish(writer)
    file = GGUFFile(tmp_path / "a.gguf")
    whole = file.read("vector", torch.float32)
    assert torch.equal(file.read("vector", torch.float32, (slice(5, 60),)), whole[5:60])


@pytest.mark.parametrize("size", [3, 8])
def test_a_number_of_ranks_that_does_not_divide_the_model_is_refused_with_those_that_do(size: int) -> None:
    with pytest.raises(
        ConfigError, match=f"--tensor-parallel-size {size} does not divide .*4 attention.* 1, 2, 4$"
    ):
        Shard(0, size).config(MODEL)

"""Our decoder computes what transformers computes, for every supported architecture and setting.

In float32 the two differ by rounding only: sums are taken in another order. On these models (three layers,
logits of about unit size) the largest difference measured is 6e-6 and the tolerance is 5e-5, while leaving
out any one setting (a bias, a rope scaling) or being off by one in a window moves a logit by more than 0.1.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoints import VARIANTS, VOCAB_SIZE, write_checkpoint, write_gguf
from outpace.config import BLOCK_SIZE
from outpace.errors import ConfigError
from outpace.kernels import Kernels, Rows, load_kernels
from outpace.models.decoder import Decoder
from outpace.models.loader import load_config, load_weights
from outpace.runtime.kv_cache import KVCache

TOLERANCE = 5e-5
LENGTH = 75
CHUNKS = (LENGTH,), (1, 40, 20, 1, 13)


@pytest.fixture(scope="module", params=["reference", "native"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    try:
        return load_kernels(request.param, torch.float32, head_dim=16, widths=(64, 96), num_threads=2)
    except ConfigError as error:
        pytest.skip(str(error))


def our_logits(
    path: Path, kernels: Kernels, token_ids: torch.Tensor, chunks: tuple[int, ...]
) -> torch.Tensor:
    """Logits of every token of one sequence, computed in passes of the given lengths."""
    config = load_config(path)
    decoder = Decoder(config, load_weights(path, config, torch.float32), torch.float32, kernels)
    num_blocks = -(-len(token_ids) // BLOCK_SIZE)
    table = torch.arange(num_blocks, dtype=torch.int32).flip(0)  # blocks lie in any order
    stack = decoder.stack(KVCache.of(decoder, num_blocks, enable_prefix_caching=False).layers)
    logits, done = [], 0
    for length in chunks:
        positions = torch.arange(done, done + length, dtype=torch.int32)
        rows = Rows(
            positions=positions,
            slots=table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE,
            parents=torch.arange(-1, length - 1, dtype=torch.int32),
            row_starts=torch.tensor([0, length], dtype=torch.int32),
            context_lens=torch.tensor([done], dtype=torch.int32),
            block_tables=table[None],
            branching=torch.zeros(1, dtype=torch.int32),
        )
        hidden = decoder.forward(token_ids[done : done + length], rows, stack)
        logits.append(decoder.logits(hidden))
        done += length
    return torch.cat(logits)


@pytest.fixture(scope="module")
def token_ids() -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (LENGTH,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def their_logits(path: Path, token_ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    logits: torch.Tensor = model(token_ids[None]).logits[0]
    return logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers_whole_and_in_chunks(
    tmp_path: Path, kernels: Kernels, token_ids: torch.Tensor, variant: str
) -> None:
    write_checkpoint(tmp_path, variant)
    expected = their_logits(tmp_path, token_ids)
    for chunks in CHUNKS:
        ours = our_logits(tmp_path, kernels, token_ids, chunks)
        torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("variant", ["llama-llama3", "qwen2-yarn"])
def test_logits_of_a_gguf_are_those_of_its_directory_in_transformers(
    tmp_path: Path, kernels: Kernels, token_ids: torch.Tensor, variant: str
) -> None:
    write_checkpoint(tmp_path, variant)
    path = write_gguf(tmp_path, tmp_path / "model.gguf")
    ours = our_logits(path, kernels, token_ids, (LENGTH,))
    torch.testing.assert_close(ours, their_logits(tmp_path, token_ids), atol=TOLERANCE, rtol=0)

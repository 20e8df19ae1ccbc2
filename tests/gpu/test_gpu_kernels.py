"""The Triton kernels compiled, on a GPU: the checks of `tests/unit/test_kernels.py`, larger, and graphs."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import kernel_checks as checks
from kernel_checks import DTYPES, GROUPED, TREE, chain, random_like
from outpace.kernels import Heads, Kernels, RopeTable, Rows, load_kernels, new_cache
from outpace.models.config import RopeConfig
from outpace.models.decoder import rope_table

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")

GPU = torch.device("cuda")
LLAMA = Heads(32, 8, 128)
HEADS = {"grouped": GROUPED, "plain": Heads(2, 2, 48), "multi-query": Heads(20, 1, 16), "llama": LLAMA}
MIXED = [
    *((0, chain(37)), (530, chain(1)), (21, chain(5)), (29, TREE), (0, TREE), (255, chain(3))),
    *((5200, chain(2)), (4090, TREE), (1000, chain(130)), (700, [-1, 0, 0, 0, 1, 1, 2, 2, 4, 8, 9])),
]


def kernels(dtype: torch.dtype, batch_invariant: bool = True) -> Kernels:
    return load_kernels(
        "triton",
        dtype,
        head_dim=128,
        widths=(4096,),
        num_threads=1,
        device=GPU,
        batch_invariant=batch_invariant,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 9, 300])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("normed", [False, True])
def test_attention_agrees_with_the_reference(
    dtype: torch.dtype, window: int | None, heads: Heads, normed: bool
) -> None:
    checks.attention_agrees(kernels(dtype), MIXED, heads, dtype, window, normed, GPU)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("heads", [GROUPED, LLAMA], ids=["grouped", "llama"])
def test_a_row_attends_to_the_same_bits_alone_in_a_batch_in_a_chunk_or_on_a_tree_path(
    dtype: torch.dtype, window: int | None, heads: Heads
) -> None:
    checks.rows_attend_to_the_same_bits(kernels(dtype), dtype, window, range(300), heads, GPU)


def crowd(seed: int) -> checks.Sequences:
    """Many sequences of all lengths, chains and trees."""
    rng = random.Random(seed)
    return [
        (
            rng.choice((0, 60, 255, 1000, 4095, 6000)) + rng.randrange(64),
            rng.choice((TREE, chain(1), chain(6))),
        )
        for _ in range(rng.choice((3, 40)))
    ]


@pytest.mark.parametrize("seed", range(4))
def test_a_sequence_in_a_crowd_gets_the_bits_that_it_gets_alone(seed: int) -> None:
    dtype, sequences = torch.bfloat16, crowd(seed)
    num_blocks = sum((context + len(path)) // 16 + 1 for context, path in sequences)
    caches = [x[0].normal_() for x in new_cache((1, num_blocks, 8), 128, dtype, GPU)]
    rows = checks.lay_out(sequences, num_blocks, device=GPU)
    qkv = random_like(len(rows.positions), 48 * 128, dtype=dtype, device=GPU)
    together = checks.attend(kernels(dtype), LLAMA, rows, qkv, (caches[0], caches[1]), None)
    for index in range(len(sequences)):
        begin, end = rows.row_starts[index : index + 2].tolist()
        own = Rows(
            positions=rows.positions[begin:end],
            slots=rows.slots[begin:end],
            parents=rows.parents[begin:end],
            row_starts=torch.tensor([0, end - begin], dtype=torch.int32, device=GPU),
            context_lens=rows.context_lens[index : index + 1],
            block_tables=rows.block_tables[index : index + 1],
            branching=rows.branching[index : index + 1],
        )
        alone = checks.attend(kernels(dtype), LLAMA, own, qkv[begin:end], (caches[0], caches[1]), None)
        assert torch.equal(together[begin:end], alone), f"sequence {index}: {sequences[index]}"


def test_a_recorded_pass_follows_what_its_tensors_hold() -> None:
    dtype, num_blocks = torch.bfloat16, 400
    rope = RopeTable(rope_table(RopeConfig(), 128, 8192).to(GPU))
    caches = [x[0].normal_() for x in new_cache((1, num_blocks, 8), 128, dtype, GPU)]
    shapes: list[checks.Sequences] = [
        [(530, chain(1)), (20, chain(7))],
        [(700, TREE), (31, chain(1))],
        [(5000, chain(6)), (0, chain(2))],
    ]
    layouts = [checks.lay_out(sequences, num_blocks, device=GPU) for sequences in shapes]
    tables = torch.zeros(2, num_blocks, dtype=torch.int32, device=GPU)
    fields: dict[str, Any] = {
        name: getattr(layouts[0], name).clone()
        for name in ("positions", "slots", "parents", "row_starts", "context_lens", "branching")
    }
    static = Rows(block_tables=tables, **fields)
    qkv = random_like(8, 48 * 128, dtype=dtype, device=GPU)
    backend = kernels(dtype)

    def run() -> torch.Tensor:
        attention = backend.attention(LLAMA, rope, 1e-5, static)
        return attention(qkv.clone(), caches[0], caches[1], None, None, None)

    def fill(rows: Rows) -> None:
        for name, tensor in fields.items():
            tensor.copy_(getattr(rows, name))
        tables[:, : rows.block_tables.shape[1]] = rows.block_tables

    fill(layouts[0])
    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for rows in layouts:
        fill(rows)
        graph.replay()
        expected = checks.attend(backend, LLAMA, rows, qkv, (caches[0], caches[1]), None)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_kernels_agree_with_the_reference(dtype: torch.dtype) -> None:
    checks.row_kernels_agree(kernels(dtype), dtype, 40, GPU)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(48, 64), (960, 576), (576, 1536), (1000, 2048), (4096, 14336)])
def test_a_linear_row_has_the_same_bits_in_any_batch_if_asked_to(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    counts = (1, 2, 3, 5, 8, 16, 17, 33, 63, 64, 65, 100, 128, 129)
    checks.linear_rows_have_the_same_bits(kernels(dtype), dtype, shape, counts, GPU)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("shape", [(1000, 576), (4096, 14336)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_linear_layer_agrees_with_the_exact_product(
    batch_invariant: bool, shape: tuple[int, int], has_bias: bool
) -> None:
    dtype = torch.bfloat16
    checks.linear_agrees_with_the_exact_product(kernels(dtype, batch_invariant), dtype, shape, has_bias, GPU)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(64, 1003), (4, 128256), (300, 49152)])
def test_noisy_argmax_agrees_with_the_reference(dtype: torch.dtype, rows: int, vocab: int) -> None:
    checks.noisy_argmax_agrees(kernels(dtype), dtype, rows, vocab, GPU)


@pytest.mark.parametrize(("rows", "vocab"), [(200, 777), (8, 128256)])
def test_filters_agree_with_the_reference(rows: int, vocab: int) -> None:
    checks.filters_agree(kernels(torch.float32), rows, vocab, GPU)

"""The native kernels against the plain-torch reference, and the promise both make about rows."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import pytest
import torch

from outpace.errors import ConfigError
from outpace.kernels import Heads, Kernels, RopeTable, Rows, load_kernels, native
from outpace.kernels.reference import ReferenceKernels
from outpace.models.config import RopeConfig
from outpace.models.decoder import rope_table

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
BLOCK = 16


def backend(name: Literal["native", "reference"], dtype: torch.dtype, num_threads: int = 2) -> Kernels:
    if name == "native" and native.find_compiler() is None:
        pytest.skip("no C++ compiler here")
    return load_kernels(name, dtype, head_dim=32, widths=(64,), num_threads=num_threads)


def native_kernels(dtype: torch.dtype) -> Kernels:
    return backend("native", dtype)


@pytest.fixture(autouse=True)
def _keep_torch_threads() -> Iterator[None]:
    usual = torch.get_num_threads()
    yield
    torch.set_num_threads(usual)


def random_like(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lay_out(sequences: list[tuple[int, list[int]]], num_blocks: int, seed: int = 0) -> Rows:
    """Rows of sequences given as (context length, parents of the step's rows), in shuffled cache blocks."""
    free = list(range(num_blocks))
    random.Random(seed).shuffle(free)
    positions, slots, parents, starts, tables, branching = [], [], [], [0], [], []
    for context, path in sequences:
        blocks = [free.pop() for _ in range((context + len(path) + BLOCK - 1) // BLOCK)]
        depth: list[int] = []
        for row, parent in enumerate(path):
            depth.append(0 if parent < 0 else depth[parent] + 1)
            logical = context + row
            slots.append(blocks[logical // BLOCK] * BLOCK + logical % BLOCK)
        positions += [context + d for d in depth]
        parents += path
        starts.append(starts[-1] + len(path))
        tables.append(blocks)
        branching.append(int(any(parent != row - 1 for row, parent in enumerate(path))))
    widest = max(map(len, tables))
    return Rows(
        positions=torch.tensor(positions, dtype=torch.int32),
        slots=torch.tensor(slots, dtype=torch.int32),
        parents=torch.tensor(parents, dtype=torch.int32),
        row_starts=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor([context for context, _ in sequences], dtype=torch.int32),
        block_tables=torch.tensor([t + [0] * (widest - len(t)) for t in tables], dtype=torch.int32),
        branching=torch.tensor(branching, dtype=torch.int32),
    )


def chain(length: int) -> list[int]:
    return list(range(-1, length - 1))


TREE = [-1, 0, 0, 1, 1, 2, 3]
HEADS = {"grouped": Heads(6, 2, 32), "plain": Heads(2, 2, 48), "multi-query": Heads(20, 1, 16)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 9, 300])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("normed", [False, True])
def test_native_attention_agrees_with_the_reference(
    dtype: torch.dtype, window: int | None, heads: Heads, normed: bool
) -> None:
    rows = lay_out(
        [(0, chain(37)), (530, chain(1)), (21, chain(5)), (29, TREE), (0, TREE), (255, chain(3))], 80
    )
    rope = RopeTable(rope_table(RopeConfig(), heads.head_dim, 1024))
    width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
    qkv = random_like(len(rows.positions), width, dtype=dtype)
    norm = random_like(heads.head_dim, dtype=dtype, seed=3) if normed else None
    k_cache = random_like(80, heads.num_kv_heads, heads.head_dim, BLOCK, dtype=dtype, seed=1)
    v_cache = random_like(80, heads.num_kv_heads, BLOCK, heads.head_dim, dtype=dtype, seed=2)
    results = []
    for kernels in (native_kernels(dtype), ReferenceKernels()):
        caches = (k_cache.clone(), v_cache.clone())
        out = kernels.attention(heads, rope, 1e-5, rows)(qkv.clone(), *caches, norm, norm, window)
        results.append((out.float(), caches[0].float(), caches[1].float()))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("name", ["native", "reference"])
def test_a_row_attends_to_the_same_bits_alone_in_a_batch_in_a_chunk_or_on_a_tree_path(
    dtype: torch.dtype, window: int | None, name: Literal["native", "reference"]
) -> None:
    kernels = backend(name, dtype)
    heads, total = HEADS["grouped"], 300
    rope = RopeTable(rope_table(RopeConfig(), heads.head_dim, 1024))
    width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
    tokens = random_like(total, width, dtype=dtype)
    noise = random_like(64, width, dtype=dtype, seed=9)

    def cache() -> tuple[torch.Tensor, torch.Tensor]:
        return (
            torch.zeros(96, heads.num_kv_heads, heads.head_dim, BLOCK, dtype=dtype),
            torch.zeros(96, heads.num_kv_heads, BLOCK, heads.head_dim, dtype=dtype),
        )

    def run(rows: Rows, qkv: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return kernels.attention(heads, rope, 1e-5, rows)(qkv.clone(), *caches, None, None, window)

    whole = run(lay_out([(0, chain(total))], 96), tokens, cache())
    caches = cache()
    alone = [run(lay_out([(p, [-1])], 96), tokens[p : p + 1], caches)[0] for p in range(total)]
    assert torch.equal(whole, torch.stack(alone))

    caches = cache()
    run(lay_out([(0, chain(250))], 96), tokens[:250], caches)
    beside = lay_out([(250, chain(50)), (0, chain(64))], 96)  # a chunk beside another sequence
    assert torch.equal(run(beside, torch.cat((tokens[250:], noise)), caches)[:50], whole[250:])

    # rows 0, 2, 4, 5, 6 are tokens that follow, 1 and 3 wrong guesses; in the first chunk and behind it
    parents = [-1, 0, 0, 1, 2, 4, 5]
    for start in (253, 290):
        caches = cache()
        run(lay_out([(0, chain(start))], 96), tokens[:start], caches)
        right = tokens[start : start + 5]
        qkv = torch.stack([right[0], noise[0], right[1], noise[1], right[2], right[3], right[4]])
        on_tree = run(lay_out([(start, parents)], 96), qkv, caches)
        assert torch.equal(on_tree[[0, 2, 4, 5, 6]], whole[start : start + 5])


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_row_kernels_agree_with_the_reference(dtype: torch.dtype) -> None:
    fast, slow = native_kernels(dtype), ReferenceKernels()
    x, delta = random_like(40, 576, dtype=dtype), random_like(40, 576, dtype=dtype, seed=1)
    weight = random_like(576, dtype=dtype, seed=2)
    close: Any = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(fast.rms_norm(x, weight, 1e-5), slow.rms_norm(x, weight, 1e-5), **close)
    residuals = (x.clone(), x.clone())
    sums = [k.add_rms_norm(delta, r, weight, 1e-5) for k, r in zip((fast, slow), residuals, strict=True)]
    torch.testing.assert_close(*sums, **close)
    assert torch.equal(*residuals)
    torch.testing.assert_close(fast.silu_mul(x * 8), slow.silu_mul(x * 8), **close)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(48, 64), (960, 576), (576, 1536), (1000, 2048)])
@pytest.mark.parametrize("name", ["native", "reference"])
def test_a_linear_row_has_the_same_bits_in_any_batch(
    name: Literal["native", "reference"], dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    linear = backend(name, dtype).linear(random_like(*shape, dtype=dtype))
    x = random_like(130, shape[1], dtype=dtype, seed=1)
    whole = linear(x)
    for rows in (1, 2, 3, 5, 8, 12, 13, 16, 17, 33, 64, 100, 129):
        assert torch.equal(linear(x[:rows].contiguous()), whole[:rows]), f"{rows} rows"
        last = x[130 - rows :].contiguous()
        assert torch.equal(linear(last), whole[130 - rows :]), f"the last {rows} rows"
    assert linear(x[:0]).shape == (0, shape[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(48, 64), (1000, 576), (576, 1536)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_native_linear_agrees_with_the_exact_product(
    dtype: torch.dtype, shape: tuple[int, int], has_bias: bool
) -> None:
    weight, x = random_like(*shape, dtype=dtype), random_like(29, shape[1], dtype=dtype, seed=1)
    bias = random_like(shape[0], dtype=dtype, seed=2) if has_bias else None
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    error = native_kernels(dtype).linear(weight, bias)(x).double() - exact
    sums = (x.double().abs() @ weight.double().abs().T) * shape[1] * torch.finfo(torch.float32).eps
    assert (error.abs() <= sums + exact.abs() * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(960, 576), (576, 1536), (3072, 576)])
@pytest.mark.parametrize("name", ["native", "reference"])
def test_a_linear_row_has_the_same_bits_with_any_number_of_threads(
    name: Literal["native", "reference"], dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight = random_like(*shape, dtype=dtype)
    batches = [random_like(rows, shape[1], dtype=dtype, seed=rows) for rows in (1, 2, 3, 8, 33, 130)]
    results = []
    for num_threads in (1, 2, 3):
        linear = backend(name, dtype, num_threads).linear(weight)
        results.append([linear(x) for x in batches])
    for alone, *others in zip(*results, strict=True):
        assert all(torch.equal(alone, other) for other in others)


def test_callers_in_several_threads_do_not_disturb_each_other() -> None:
    linears = [
        native_kernels(torch.float32).linear(random_like(96, 64, dtype=torch.float32, seed=s))
        for s in range(3)
    ]
    x = random_like(5, 64, dtype=torch.float32)
    expected = [linear(x) for linear in linears]

    def agrees(caller: int) -> bool:
        return all(torch.equal(linears[caller](x), expected[caller]) for _ in range(2000))

    with ThreadPoolExecutor(3) as callers:
        assert all(callers.map(agrees, range(3)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_noisy_argmax_agrees_with_the_reference(dtype: torch.dtype) -> None:
    logits = random_like(64, 1003, dtype=dtype) * 3
    logits[5, :] = 0.0  # all equal: greedy takes the first token
    logits[6, :] = -torch.inf
    logits[6, 1002] = 0.0
    seeds = torch.arange(64) * 7919 - 1000
    positions = torch.arange(64)
    for noisy in (torch.zeros(64, dtype=torch.bool), torch.ones(64, dtype=torch.bool)):
        fast = native_kernels(dtype).noisy_argmax(logits, seeds, positions, noisy)
        slow = ReferenceKernels().noisy_argmax(logits, seeds, positions, noisy)
        assert torch.equal(fast, slow)
        assert fast[6] == 1002
    assert (
        native_kernels(dtype).noisy_argmax(logits, seeds, positions, torch.zeros(64, dtype=torch.bool))[5]
        == 0
    )


def test_native_filters_agree_with_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 777, generator=generator) * 3
    logits[::7] = logits[::7].round()  # many ties
    top_k = torch.randint(0, 50, (200,), generator=generator)
    top_p = torch.rand(200, generator=generator).clamp(min=0.01)
    min_p = torch.rand(200, generator=generator) * 0.3
    top_k[::3], top_p[1::3], min_p[2::3] = 0, 1.0, 0.0
    fast, slow = logits.clone(), logits.clone()
    native_kernels(torch.float32).filter_logits_(fast, top_k, top_p, min_p)
    ReferenceKernels().filter_logits_(slow, top_k, top_p, min_p)
    assert torch.equal(fast, slow)
    assert (fast > -torch.inf).any(dim=1).all()


def test_without_a_compiler_auto_falls_back_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "find_compiler", lambda: None)
    kernels = load_kernels("auto", torch.float32, head_dim=32, widths=(64,), num_threads=2)
    assert kernels.name == "reference"
    assert "no C++ compiler" in caplog.text
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler"):
        load_kernels("native", torch.float32, head_dim=32, widths=(64,), num_threads=2)


def test_sizes_the_native_kernels_cannot_take_are_named() -> None:
    with pytest.raises(ConfigError, match=r"\[20\] are not multiples of 16"):
        load_kernels("native", torch.float32, head_dim=20, widths=(64,), num_threads=2)

"""Every backend of kernels against plain torch, and the promise all make about rows.

Triton's kernels run in its interpreter here, which is slow by the operation: they get fewer and smaller cases
of the same checks. `tests/gpu` runs them compiled.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import pytest
import torch

import kernel_checks as checks
from kernel_checks import DTYPES, GROUPED, TREE, chain, random_like
from outpace.errors import ConfigError
from outpace.kernels import (
    Heads,
    Kernels,
    Layer,
    LayerStack,
    Linear,
    RopeTable,
    Rows,
    cpu_library,
    load_kernels,
)
from outpace.models.config import RopeConfig
from outpace.models.decoder import rope_table
from outpace.sampling import SamplingParams
from tiny import Guesser, run, submit, tiny_engine, tokens

Name = Literal["native", "reference", "triton"]


def backend(name: Name, dtype: torch.dtype, num_threads: int = 2) -> Kernels:
    if name == "native" and cpu_library.find_compiler() is None:
        pytest.skip("no C++ compiler here")
    if name == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if name == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("triton compiles for the GPU here: tests/gpu")
    return load_kernels(
        name, dtype, head_dim=32, widths=(64,), num_threads=num_threads, batch_invariant=name == "triton"
    )


def native_kernels(dtype: torch.dtype) -> Kernels:
    return backend("native", dtype)


@pytest.fixture(autouse=True)
def _keep_torch_threads() -> Iterator[None]:
    usual = torch.get_num_threads()
    yield
    torch.set_num_threads(usual)


@pytest.fixture(autouse=True)
def _faster_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a check of every sum of whole numbers for overflow, which no GPU makes either."""
    if importlib.util.find_spec("triton") is not None:
        from triton.runtime import interpreter

        monkeypatch.setattr(
            interpreter.interpreter_builder,
            "options",
            interpreter.InterpreterOptions(sanitize_overflow=False),
        )


HEADS = {"grouped": GROUPED, "plain": Heads(2, 2, 48), "multi-query": Heads(20, 1, 16)}
MIXED = [(0, chain(37)), (530, chain(1)), (21, chain(5)), (29, TREE), (0, TREE), (255, chain(3))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 9, 300])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("normed", [False, True])
def test_native_attention_agrees_with_the_reference(
    dtype: torch.dtype, window: int | None, heads: Heads, normed: bool
) -> None:
    checks.attention_agrees(native_kernels(dtype), MIXED, heads, dtype, window, normed)


@pytest.mark.parametrize(
    ("sequences", "heads", "dtype", "window", "normed"),
    [
        ([(0, chain(25)), (70, chain(2)), (61, TREE)], HEADS["grouped"], torch.bfloat16, None, True),
        ([(0, TREE), (300, chain(5))], HEADS["plain"], torch.float32, 70, False),
        ([(60, [-1, 0, 0, 2, 3])], HEADS["multi-query"], torch.float32, None, False),
    ],
    ids=["a prompt, a chain and a tree", "a window", "heads that fill a tile"],
)
def test_triton_attention_agrees_with_the_reference(
    sequences: checks.Sequences, heads: Heads, dtype: torch.dtype, window: int | None, normed: bool
) -> None:
    checks.attention_agrees(backend("triton", dtype), sequences, heads, dtype, window, normed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("name", ["native", "reference"])
def test_a_row_attends_to_the_same_bits_alone_in_a_batch_in_a_chunk_or_on_a_tree_path(
    dtype: torch.dtype, window: int | None, name: Name
) -> None:
    num_random = 24 if name == "native" else 4
    checks.rows_attend_to_the_same_bits(
        backend(name, dtype), dtype, window, range(300), num_random=num_random
    )


@pytest.mark.parametrize(("dtype", "window"), [(torch.float32, None), (torch.bfloat16, 40)])
def test_in_triton_too_a_row_attends_to_the_same_bits_everywhere(
    dtype: torch.dtype, window: int | None
) -> None:
    checks.rows_attend_to_the_same_bits(
        backend("triton", dtype), dtype, window, (64, 256, 299), heads=Heads(2, 1, 16), num_random=2
    )


def test_how_triton_divides_the_work_does_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = backend("triton", torch.float32)
    from outpace.kernels.gpu import attention

    heads, dtype = Heads(2, 1, 16), torch.float32
    sequences = [(530, [-1, 0, 0, 2]), (250, chain(3)), (0, chain(2))]
    rows = checks.lay_out(sequences, 60)
    keys = random_like(60, 1, 16, 16, dtype=dtype, seed=1)
    values = random_like(60, 1, 16, 16, dtype=dtype, seed=2)
    qkv = random_like(9, 4 * 16, dtype=dtype)
    results = []
    # No tile is divided; all are; there is memory for the parts of the second only.
    for num_workers, num_bytes in ((1, 1 << 20), (100, 1 << 20), (100, 6 * 2 * 18 * 4)):
        monkeypatch.setattr(attention, "num_programs", lambda _, num=num_workers: num)
        monkeypatch.setattr(attention, "PARTIAL_BYTES", num_bytes)
        results.append(checks.attend(kernels, heads, rows, qkv, (keys.clone(), values.clone()), None))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_rows_of_padding_and_sequences_without_rows_change_nothing() -> None:
    kernels, dtype, heads = backend("triton", torch.float32), torch.float32, Heads(2, 1, 16)
    rows = checks.lay_out([(20, chain(2))], 8)

    def padded(tensor: torch.Tensor, *more: int) -> torch.Tensor:
        return torch.cat((tensor, torch.tensor(more, dtype=torch.int32)))

    bucket = Rows(
        positions=padded(rows.positions, 0, 0),
        slots=padded(rows.slots, -1, -1),
        parents=padded(rows.parents, -1, -1),
        row_starts=padded(rows.row_starts, 2, 2),
        context_lens=padded(rows.context_lens, 0, 0),
        block_tables=torch.cat((rows.block_tables, torch.zeros_like(rows.block_tables).repeat(2, 1))),
        branching=padded(rows.branching, 0, 0),
    )
    qkv = random_like(4, 4 * 16, dtype=dtype)
    caches = [tuple(torch.zeros(2, 8, 1, 16, 16).unbind()) for _ in range(2)]
    alone = checks.attend(kernels, heads, rows, qkv[:2], (caches[0][0], caches[0][1]), None)
    beside = checks.attend(kernels, heads, bucket, qkv, (caches[1][0], caches[1][1]), None)
    assert torch.equal(beside[:2], alone)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*caches, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "rows"), [("native", 40), ("triton", 5)])
def test_row_kernels_agree_with_the_reference(name: Name, rows: int, dtype: torch.dtype) -> None:
    checks.row_kernels_agree(backend(name, dtype), dtype, rows)


SHAPES = [(48, 64), (80, 48), (960, 576), (576, 1536), (1000, 2048)]
COUNTS = (1, 2, 3, 5, 8, 12, 13, 16, 17, 33, 64, 100, 129)
LINEARS: list[Any] = [
    *(
        (name, dtype, shape, COUNTS)
        for name in ("native", "reference")
        for dtype in DTYPES
        for shape in SHAPES
    ),
    *(("triton", dtype, (130, 1100), (1, 65)) for dtype in DTYPES),
]


@pytest.mark.parametrize(("name", "dtype", "shape", "counts"), LINEARS)
def test_a_linear_row_has_the_same_bits_in_any_batch(
    name: Name, dtype: torch.dtype, shape: tuple[int, int], counts: tuple[int, ...]
) -> None:
    checks.linear_rows_have_the_same_bits(backend(name, dtype), dtype, shape, counts)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_amx_too_a_linear_row_has_the_same_bits_in_any_batch(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not cpu_library.may_use_amx():
        pytest.skip("this machine has no AMX: the test above is this one")
    monkeypatch.setattr(cpu_library, "may_use_amx", lambda: False)
    kernels = backend("native", torch.bfloat16)
    checks.linear_rows_have_the_same_bits(kernels, torch.bfloat16, shape, COUNTS)
    checks.linear_agrees_with_the_exact_product(kernels, torch.bfloat16, shape, has_bias=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("native", (48, 64)),
        ("native", (80, 48)),
        ("native", (1000, 576)),
        ("native", (576, 1536)),
        ("triton", (130, 1100)),
    ],
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_linear_layer_agrees_with_the_exact_product(
    dtype: torch.dtype, name: Name, shape: tuple[int, int], has_bias: bool
) -> None:
    checks.linear_agrees_with_the_exact_product(backend(name, dtype), dtype, shape, has_bias)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("extras", "window"), [(False, None), (True, 9)])
@pytest.mark.parametrize(("inner", "sequences"), [(96, MIXED), (80, MIXED), (96, [(530, chain(1))])])
def test_native_layers_have_the_bits_of_their_operations_one_by_one(
    dtype: torch.dtype,
    extras: bool,
    window: int | None,
    inner: int,
    sequences: list[tuple[int, list[int]]],
) -> None:
    kernels, heads, width = native_kernels(dtype), HEADS["grouped"], 64
    rows = checks.lay_out(sequences, 60)
    num_rows = len(rows.positions)
    changed = torch.tensor([3, 40, 1] if num_rows > 40 else [0])

    def weight(*shape: int, seed: int) -> torch.Tensor:
        return random_like(*shape, dtype=dtype, seed=seed) / 8

    def linear(num_out: int, num_in: int, seed: int) -> Linear:
        plain = kernels.linear(
            weight(num_out, num_in, seed=seed), weight(num_out, seed=seed) if extras else None
        )
        if not extras:
            return plain
        down, up = (kernels.linear(weight(*shape, seed=7)) for shape in ((6, num_in), (num_out, 6)))
        return kernels.changed(plain, down, up, changed)

    norm = weight(heads.head_dim, seed=1) if extras else None
    layer = Layer(
        input_norm=weight(width, seed=2),
        qkv=linear((heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim, width, seed=3),
        q_norm=norm,
        k_norm=norm,
        out=linear(width, heads.num_heads * heads.head_dim, seed=4),
        post_norm=weight(width, seed=5),
        gate_up=linear(2 * inner, width, seed=6),
        down=linear(width, inner, seed=8),
        window=window,
    )
    rope = RopeTable(rope_table(RopeConfig(), heads.head_dim, 8192))
    results, group = [], kernels.cache_group
    for stack_of in (kernels.stack, partial(LayerStack, kernels)):
        cache = [
            (
                weight(60, heads.num_kv_heads, heads.head_dim // group, 16, group, seed=seed),
                weight(60, heads.num_kv_heads, 16 // group, heads.head_dim, group, seed=seed),
            )
            for seed in (9, 10, 13)
        ]
        residual = weight(num_rows, width, seed=11)
        attend = kernels.attention(heads, rope, 1e-5, rows)
        stack = stack_of([layer] * 3, cache, weight(width, seed=12), 1e-5)
        between = stack.run(attend, residual, end=1)
        results.append(
            (between, stack.run(attend, residual, 1), residual, *(of for pair in cache for of in pair))
        )
    assert all(torch.equal(at_once, one_by_one) for at_once, one_by_one in zip(*results, strict=True))
    assert results[0][0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["native", "reference"])
def test_a_low_rank_change_is_of_its_rows_only(name: Name, dtype: torch.dtype) -> None:
    kernels = backend(name, dtype)
    linear, down, up = (
        kernels.linear(random_like(*shape, dtype=dtype, seed=shape[0]))
        for shape in ((64, 32), (6, 32), (64, 6))
    )
    x, rows = random_like(7, 32, dtype=dtype), torch.tensor([5, 2])
    expected = linear(x)
    expected[rows] += up(down(x[rows]))
    assert torch.equal(kernels.changed(linear, down, up, rows)(x), expected)
    assert torch.equal(kernels.changed(linear, down, up, rows[:0])(x), linear(x))


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
@pytest.mark.parametrize(("name", "rows", "vocab"), [("native", 64, 1003), ("triton", 7, 5003)])
def test_noisy_argmax_agrees_with_the_reference(
    name: Name, rows: int, vocab: int, dtype: torch.dtype
) -> None:
    checks.noisy_argmax_agrees(backend(name, dtype), dtype, rows, vocab)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranked_tokens_are_those_chosen_one_after_the_other(dtype: torch.dtype) -> None:
    checks.noisy_topk_agrees(backend("native", dtype), dtype, 64, 1003)


@pytest.mark.parametrize("dtype", DTYPES)
def test_slots_of_a_cache_move(dtype: torch.dtype) -> None:
    checks.slots_move(backend("native", dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "rank", "tokens"), [(64, 48, 16), (90, 6, 5)])
def test_what_streams_need_beside_a_pass_is_what_torch_makes_of_it(
    hidden: int, rank: int, tokens: int, dtype: torch.dtype
) -> None:
    checks.stream_heads_agree(backend("native", dtype), dtype, hidden, rank, tokens)


@pytest.mark.parametrize(("name", "rows", "vocab"), [("native", 200, 777), ("triton", 12, 777)])
def test_filters_agree_with_the_reference(name: Name, rows: int, vocab: int) -> None:
    checks.filters_agree(backend(name, torch.float32), rows, vocab)


@pytest.mark.parametrize("drafts", [False, True])
def test_an_engine_on_triton_answers_as_one_on_plain_torch(drafts: bool) -> None:
    backend("triton", torch.float32)
    sampling = {
        "greedy": SamplingParams(temperature=0, max_tokens=6, ignore_eos=True),
        "sampled": SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, max_tokens=6, seed=3),
    }
    results: list[dict[str, list[int]]] = []
    for name in ("reference", "triton"):
        engine = tiny_engine(kernels=name, batch_invariant=True, spec_method="suffix" if drafts else "none")
        if results and drafts:  # what the reference has answered, with mistakes and branches
            engine.proposer = Guesser({f"{name}-0": known for name, known in results[0].items()})
        for request, params in sampling.items():
            submit(engine, request, [5, 6, 7, 5, 6, 7, 5, 6], params)
        results.append({key.removesuffix("-0"): tokens(outputs) for key, outputs in run(engine).items()})
    assert results[0] == results[1]
    assert not drafts or engine.metrics.drafts.num_accepted_tokens > 0


def test_without_a_gpu_triton_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="needs a GPU, and the device is cpu: leave it out"):
        load_kernels("triton", torch.float32, head_dim=32, widths=(64,), num_threads=2)


def test_kernels_of_a_cpu_are_refused_on_a_gpu() -> None:
    cuda = torch.device("cuda")
    with pytest.raises(ConfigError, match="--kernels native computes on a CPU, and the device is cuda"):
        load_kernels("native", torch.float32, head_dim=32, widths=(64,), num_threads=2, device=cuda)


def test_without_a_compiler_auto_falls_back_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu_library, "find_compiler", lambda: None)
    kernels = load_kernels("auto", torch.float32, head_dim=32, widths=(64,), num_threads=2)
    assert kernels.name == "reference"
    assert "no C++ compiler" in caplog.text
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler"):
        load_kernels("native", torch.float32, head_dim=32, widths=(64,), num_threads=2)


def test_sizes_the_native_kernels_cannot_take_are_named() -> None:
    with pytest.raises(ConfigError, match=r"\[20\] are not multiples of 16"):
        load_kernels("native", torch.float32, head_dim=20, widths=(64,), num_threads=2)

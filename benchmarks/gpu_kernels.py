"""Time of each GPU kernel against what the GPU's memory and arithmetic allow.

    python benchmarks/gpu_kernels.py

Sizes are those of a layer of Llama-3.1-8B in bfloat16. The limit of a case is the larger of the time to move
its bytes at --bandwidth and that to do its products at --tflops; the defaults are an H200's. Each case is
recorded as a CUDA graph of several calls on tensors that take turns, so that weights and caches come from
memory and not from the L2 cache. Nothing else may run on the GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from outpace.kernels import Heads, Kernels, Linear, RopeTable, Rows, load_kernels, new_cache
from outpace.models.config import RopeConfig
from outpace.models.decoder import rope_table

HEADS = Heads(32, 8, 128)
HIDDEN, INTERMEDIATE, VOCAB, BLOCK = 4096, 14336, 128256, 16
LINEARS = {
    "qkv": (6144, HIDDEN),
    "out": (HIDDEN, 4096),
    "gate_up": (2 * INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
    "head": (VOCAB, HIDDEN),
}
BF16 = torch.bfloat16
CALLS = 8  # in a graph
COLD_BYTES = 256 << 20  # that calls go through before one sees the same tensors: several times the L2 cache


@dataclass(frozen=True)
class Case:
    """One kernel at one size.

    Attributes:
        name: What it is.
        run: Calls it on the tensors of one turn.
        num_bytes: That it must move.
        flops: That it must do.
    """

    name: str
    run: Callable[[int], object]
    num_bytes: float
    flops: float = 0.0


def microseconds(run: Callable[[int], object], repeat: int) -> float:
    """Median time of a call, of several in a graph."""
    for turn in range(3):
        run(turn)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(CALLS):
            run(turn)
    times = []
    for _ in range(repeat):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / CALLS)
    return float(statistics.median(times))


def turns(*shape: int) -> list[torch.Tensor]:
    """Equal tensors that take turns."""
    num_bytes = BF16.itemsize
    for size in shape:
        num_bytes *= size
    count = max(1, min(CALLS, -(-COLD_BYTES // num_bytes)))
    return [torch.randn(shape, dtype=BF16, device="cuda").mul_(0.05) for _ in range(count)]


def call_linear(layers: list[Linear], x: torch.Tensor, turn: int) -> None:
    """The layer whose turn it is."""
    layers[turn % len(layers)](x)


def filter_copy(
    kernels: Kernels,
    logits: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    turn: int,
) -> None:
    """Filters logits that stay as they are."""
    kernels.filter_logits_(logits.clone(), top_k, top_p, min_p)


def linear_cases(kernels: Kernels, label: str, rows: int) -> list[Case]:
    """All linear layers at a number of rows."""
    cases = []
    for name, (outputs, inputs) in LINEARS.items():
        layers = [kernels.linear(weight) for weight in turns(outputs, inputs)]
        x = torch.randn(rows, inputs, dtype=BF16, device="cuda")
        num_bytes = 2.0 * (outputs * inputs + rows * (inputs + outputs))
        cases.append(
            Case(
                f"{name} {label}, {rows} rows",
                partial(call_linear, layers, x),
                num_bytes,
                2.0 * rows * outputs * inputs,
            )
        )
    return cases


def lay_out(num_sequences: int, parents: list[int], context: int) -> Rows:
    """Sequences alike, in blocks of a shuffled order."""
    num_rows, num_blocks = len(parents), -(-(context + len(parents)) // BLOCK)
    blocks = torch.randperm(num_sequences * num_blocks).view(num_sequences, num_blocks)
    depths: list[int] = []
    for parent in parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    logical = context + torch.arange(num_rows)
    slots = blocks[:, logical // BLOCK] * BLOCK + logical % BLOCK

    def int32(values: torch.Tensor) -> torch.Tensor:
        return values.flatten().to("cuda", torch.int32)

    branching = int(any(parent != row - 1 for row, parent in enumerate(parents)))
    return Rows(
        positions=int32((context + torch.tensor(depths)).repeat(num_sequences)),
        slots=int32(slots),
        parents=int32(torch.tensor(parents).repeat(num_sequences)),
        row_starts=int32(torch.arange(num_sequences + 1) * num_rows),
        context_lens=int32(torch.full((num_sequences,), context)),
        block_tables=blocks.to("cuda", torch.int32),
        branching=int32(torch.full((num_sequences,), branching)),
    )


def attention_case(kernels: Kernels, name: str, num_sequences: int, parents: list[int], context: int) -> Case:
    """One layer's attention, with norm, rotation and the writing of keys and values."""
    rows = lay_out(num_sequences, parents, context)
    rope = RopeTable(rope_table(RopeConfig(), HEADS.head_dim, context + len(parents) + 1).to("cuda"))
    num_blocks, num_rows = rows.block_tables.numel(), len(rows.positions)
    cache_bytes = 2 * num_blocks * BLOCK * HEADS.num_kv_heads * HEADS.head_dim * BF16.itemsize
    layers = max(1, min(CALLS, -(-COLD_BYTES // cache_bytes)))
    keys, values = new_cache(
        (layers, num_blocks, HEADS.num_kv_heads), HEADS.head_dim, BF16, rows.slots.device
    )
    keys.normal_()
    values.normal_()
    width = (HEADS.num_heads + 2 * HEADS.num_kv_heads) * HEADS.head_dim
    qkv = torch.randn(num_rows, width, dtype=BF16, device="cuda")
    attend = kernels.attention(HEADS, rope, 1e-5, rows)
    pairs = float((rows.positions + 1).sum())
    return Case(
        f"attention, {name}, context {context}",
        lambda turn: attend(qkv, keys[turn % layers], values[turn % layers], None, None, None),
        cache_bytes + 2.0 * num_rows * (width + HEADS.num_heads * HEADS.head_dim),
        4.0 * pairs * HEADS.num_heads * HEADS.head_dim,
    )


def attention_cases(kernels: Kernels) -> list[Case]:
    """Decoding, chains, trees and prompts."""
    tree = [-1, 0, 0, 0, 1, 1, 2, 3, 4, 4, 5, 6, 8, 9, 12, 14]
    cases = [
        attention_case(kernels, f"{sequences} x {rows} rows", sequences, list(range(-1, rows - 1)), context)
        for sequences, rows, context in itertools.product((1, 8, 64), (1, 8), (512, 4096))
    ]
    cases.append(attention_case(kernels, "1 x 1 rows", 1, [-1], 65536))
    cases += [attention_case(kernels, f"{n} x tree of 16", n, tree, 1024) for n in (1, 8, 32)]
    cases += [attention_case(kernels, "prompt of 2048", 1, list(range(-1, 2047)), c) for c in (0, 8192)]
    return cases


def row_cases(kernels: Kernels, rows: int) -> list[Case]:
    """Norm and activation."""
    x, residual = turns(rows, HIDDEN), torch.zeros(rows, HIDDEN, dtype=BF16, device="cuda")
    weight, gates = torch.ones(HIDDEN, dtype=BF16, device="cuda"), turns(rows, 2 * INTERMEDIATE)
    return [
        Case(
            f"add_rms_norm, {rows} rows",
            lambda turn: kernels.add_rms_norm(x[turn % len(x)], residual, weight, 1e-5),
            8.0 * rows * HIDDEN,
        ),
        Case(
            f"silu_mul, {rows} rows",
            lambda turn: kernels.silu_mul(gates[turn % len(gates)]),
            6.0 * rows * INTERMEDIATE,
        ),
    ]


def sampling_cases(kernels: Kernels, rows: int) -> list[Case]:
    """Choosing tokens; filters on logits that stay as they are, since -inf is cheaper."""
    logits = torch.randn(rows, VOCAB, device="cuda").mul_(3)
    numbers = torch.arange(rows, device="cuda")
    noisy = torch.ones(rows, dtype=torch.bool, device="cuda")
    limits = {
        "top_k 50": (torch.full_like(numbers, 50), 1.0, 0.0),
        "top_p 0.95": (torch.zeros_like(numbers), 0.95, 0.0),
    }
    cases = [
        Case(
            f"noisy_argmax, {rows} rows",
            lambda turn: kernels.noisy_argmax(logits, numbers, numbers, noisy),
            4.0 * rows * VOCAB,
        )
    ]
    for name, (top_k, top_p, min_p) in limits.items():
        shares = torch.full((rows,), top_p, device="cuda"), torch.full((rows,), min_p, device="cuda")
        cases.append(
            Case(
                f"filter_logits_ of a copy, {name}, {rows} rows",
                partial(filter_copy, kernels, logits, top_k, *shares),
                16.0 * rows * VOCAB,
            )
        )
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256, 2048])
    parser.add_argument("--bandwidth", type=float, default=4.8, help="of memory, in TB/s")
    parser.add_argument("--tflops", type=float, default=989.0, help="of bfloat16 products")
    parser.add_argument("--repeat", type=int, default=50)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here, and times of Triton's interpreter mean nothing")
    device = torch.device("cuda")
    cublas, invariant = (
        load_kernels(
            "triton",
            BF16,
            head_dim=HEADS.head_dim,
            widths=(HIDDEN, INTERMEDIATE),
            num_threads=1,
            device=device,
            batch_invariant=batch_invariant,
        )
        for batch_invariant in (False, True)
    )
    makers: list[Callable[[], list[Case]]] = [partial(attention_cases, cublas)]
    for rows in args.rows:
        makers.append(partial(linear_cases, cublas, "by cuBLAS", rows))
        makers.append(partial(linear_cases, invariant, "batch invariant", rows))
        makers.append(partial(row_cases, cublas, rows))
        if rows <= 256:
            makers.append(partial(sampling_cases, cublas, rows))
    results = []
    for make in makers:
        for case in make():
            taken = microseconds(case.run, args.repeat)
            limit = max(case.num_bytes / args.bandwidth / 1e6, case.flops / args.tflops / 1e6)
            results.append({"case": case.name, "us": round(taken, 2), "limit_us": round(limit, 2)})
            print(f"{case.name:48} {taken:9.1f} us, limit {limit:9.1f} us, {limit / taken:4.0%}", flush=True)
        torch.cuda.empty_cache()
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()

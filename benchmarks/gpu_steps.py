"""Median time of a decoding step on a GPU against what its bandwidth and arithmetic allow.

    python benchmarks/gpu_steps.py

A model of Llama-3.1-8B's shape with random weights, no checkpoint needed; --model names another one. The
limit of a step is the time to read the weights and the cached context once at --bandwidth, or to multiply at
--flops, whichever is longer. Beside it: what the profile predicts, from other steps. The defaults are from
an H200's data sheet. Nothing else may run on the GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

from outpace.config import BLOCK_SIZE, EngineConfig
from outpace.device import choose_device
from outpace.engine.engine import Engine
from outpace.engine.profile import load_or_measure
from outpace.errors import ConfigError
from outpace.models.config import ModelConfig
from outpace.models.hub import resolve_model
from outpace.runtime.kv_cache import KVCache
from outpace.sampling import SamplingParams

SHAPE = Path(__file__).parent / "llama-3.1-8b"


def limit_s(
    model: ModelConfig, itemsize: int, rows: int, context: int, cache_bytes: float, args: argparse.Namespace
) -> float:
    """Seconds that a step cannot go below.

    Args:
        model: Its shape.
        itemsize: Bytes of a weight.
        rows: Sequences that decode, a row each.
        context: Cached tokens of each.
        cache_bytes: Of the cache, per token.
        args: `bandwidth` in bytes and `flops` in operations per second.
    """
    shapes = model.weight_shapes()
    if not model.tie_word_embeddings:
        del shapes["model.embed_tokens.weight"]  # a row of it is read per token, no more
    weights = sum(map(math.prod, shapes.values()))
    read = weights * itemsize + rows * context * cache_bytes
    attention = 4 * model.num_layers * model.num_heads * model.head_dim * context
    return float(max(read / args.bandwidth, rows * (2 * weights + attention) / args.flops))


def step_times(engine: Engine, rows: int, args: argparse.Namespace) -> tuple[list[float], float]:
    """Seconds of steps in which so many sequences decode, and their mean context."""
    params = SamplingParams(temperature=args.temperature, max_tokens=args.steps + 8, ignore_eos=True, seed=0)
    for i in range(rows):
        prompt = [1000 + (i * 131 + j * 7) % 20000 for j in range(args.context)]  # no two share a beginning
        prompt = [token % engine.model.vocab_size for token in prompt]
        engine.add(engine.admission.requests(f"{rows}-{i}", prompt, params))
    times, contexts = [], []
    while engine.has_work:
        begin = time.perf_counter()
        outputs = engine.step()
        if len(outputs) == rows and not any(output.finish_reason for output in outputs):
            times.append(time.perf_counter() - begin)
            contexts.append(args.context + len(times))
    return times[4:], statistics.mean(contexts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="default: the shape of Llama-3.1-8B with random weights")
    parser.add_argument("--tokenizer", help="default: that of SmolLM2-135M-Instruct")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--context", type=int, default=256, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--bandwidth", type=float, default=4.8e12, help="bytes/s of the GPU's memory")
    parser.add_argument("--flops", type=float, default=989e12, help="bfloat16 operations/s without sparsity")
    args = parser.parse_args()
    try:
        choose_device(EngineConfig(device=args.device).device)
        config = EngineConfig(
            args.model or str(SHAPE),
            load_format="auto" if args.model else "dummy",
            tokenizer=args.tokenizer or (None if args.model else str(resolve_model(None))),
            device=args.device,
            enforce_eager=args.enforce_eager,
            max_model_len=args.context + args.steps + 16,
            max_num_seqs=max(args.rows),
            max_num_batched_tokens=max(512, *args.rows),
            enable_prefix_caching=False,
        )
        engine = Engine.from_config(config)
    except ConfigError as error:
        sys.exit(str(error))
    decoder = engine.runner.decoder
    cost = load_or_measure(config, engine.kv, engine.runner, engine.verifier)
    per_token = KVCache.block_bytes(engine.model, decoder.dtype) / BLOCK_SIZE
    result: dict[str, object] = {"model": engine.model_name, "device": str(decoder.device)}
    for rows in args.rows:
        times, context = step_times(engine, rows, args)
        low, median, high = statistics.quantiles(times, n=4)
        limit = limit_s(engine.model, decoder.dtype.itemsize, rows, int(context), per_token, args)
        pairs = rows * context
        predicted = float(cost.target_s(rows, rows, pairs, pairs)) + cost.host_s(rows)
        print(
            f"{rows:4} rows: {median * 1e3:7.2f} ms ({low * 1e3:.2f} to {high * 1e3:.2f}), limit "
            f"{limit * 1e3:.2f} ms: {limit / median:.0%} reached; forward and verify predicted "
            f"{predicted * 1e3:.2f} ms"
        )
        result[str(rows)] = {
            "median_ms": median * 1e3,
            "limit_ms": limit * 1e3,
            "reached": limit / median,
            "predicted_ms": predicted * 1e3,
            "tokens_per_s": rows / median,
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

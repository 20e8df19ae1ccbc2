"""Promise 1, as equality: the same bytes whatever the batch, the cache and the chunks.

    python benchmarks/lossless.py --dataset prompts.jsonl.gz --num-prompts 64 --max-tokens 128

Each prompt is answered alone, then under conditions that change everything but the request. Any difference
is a bug. Prints how many tokens were compared and how many preemptions happened; exits with 1 on a
difference.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from outpace.config import BLOCK_SIZE, EngineConfig
from outpace.engine.engine import Engine
from outpace.models.config import ModelConfig
from outpace.models.decoder import Decoder
from outpace.models.tokenizer import encode_chat
from outpace.policy.base import BatchView, SpeculationPolicy
from outpace.runtime.kv_cache import KVCache
from outpace.runtime.runner import ModelRunner
from outpace.sampling import SamplingParams, StructuredOutputsParams
from outpace.spec import proposer as proposers

Answers = list[tuple[int, ...]]
Case = tuple[list[int], SamplingParams]


@dataclass(frozen=True)
class Loaded:
    """A model in memory, from which engines with any settings are built."""

    engine: Engine
    decoder: Decoder

    @classmethod
    def default(cls, **settings: Any) -> Loaded:
        engine = Engine.from_config(EngineConfig(**settings))
        return cls(engine, engine.runner._decoder)

    @property
    def model(self) -> ModelConfig:
        return self.engine.model

    def build(self, num_blocks: int | None = None, **settings: Any) -> Engine:
        """An engine of its own with an empty cache, over the same weights."""
        config = replace(self.engine.config, **settings)
        blocks = num_blocks or self.engine.kv.blocks.num_blocks
        kv = KVCache(self.model, blocks, self.decoder.dtype, config.enable_prefix_caching)
        runner = ModelRunner(self.decoder, kv)
        return Engine(config, self.model, self.engine.tokenizer, kv, runner, self.engine.verifier)


def run(engine: Engine, cases: list[Case], arrivals: Callable[[int], int]) -> Answers:
    """Answers all cases, case i from step `arrivals(i)` on; gives their token ids and checks the cache."""
    answers: dict[str, list[int]] = {f"{i}-0": [] for i in range(len(cases))}
    waiting = sorted(range(len(cases)), key=arrivals)
    step = 0
    while waiting or engine.has_work:
        while waiting and (arrivals(waiting[0]) <= step or not engine.has_work):
            index = waiting.pop(0)
            engine.add(engine.admission.requests(str(index), *cases[index]))
        for output in engine.step():
            answers[output.request_id] += output.token_ids
        step += 1
    engine.kv.blocks.check()
    return [tuple(answers[f"{i}-0"]) for i in range(len(cases))]


def conditions(loaded: Loaded, cases: list[Case]) -> Iterator[tuple[str, Answers, Engine]]:
    """Each way to answer the cases, beginning with every one alone in an engine without a prefix cache."""
    alone = loaded.build(enable_prefix_caching=False)
    yield "alone", [answer for case in cases for answer in run(alone, [case], lambda i: 0)], alone

    together = loaded.build()
    yield "together, staggered", run(together, cases, lambda i: 3 * i), together
    yield "together, prefix cache hit", run(together, cases, lambda i: i // 4), together

    longest = max(len(prompt) + (params.max_tokens or 0) for prompt, params in cases)
    num_blocks = 5 * longest // (4 * BLOCK_SIZE) + 1  # holds the longest, hardly more
    small = loaded.build(num_blocks, enable_prefix_caching=False)
    yield "tiny cache", run(small, cases, lambda i: 0), small
    cached = loaded.build(num_blocks)
    yield "tiny cache with prefix caching", run(cached, cases, lambda i: 0), cached

    for rows in (17, 64, 333):
        chunked = loaded.build(max_num_batched_tokens=rows, max_num_seqs=min(rows, 16))
        yield f"chunks of {rows}", run(chunked, cases, lambda i: i), chunked

    for method in proposers.available():
        if method == "none":
            continue
        fixed = loaded.build(spec_method=method, spec_tokens=8)
        one_by_one = [answer for case in cases for answer in run(fixed, [case], lambda i: 0)]
        yield f"{method}, alone", one_by_one, fixed
        chaotic = loaded.build(num_blocks, spec_method=method, spec_tokens=8)
        chaotic.policy = Chaos()
        yield f"{method}, tiny cache, random limits", run(chaotic, cases, lambda i: i), chaotic


class Chaos(SpeculationPolicy):
    """A random limit for every sequence at every step."""

    def __init__(self) -> None:
        self._random = random.Random(0)

    def limits(self, view: BatchView) -> list[int]:
        return [self._random.randint(0, min(8, sequence.max_draft)) for sequence in view.sequences]


def chat_prompts(engine: Engine, path: Path, number: int) -> list[list[int]]:
    """The first turns of a file of prompts, evenly spread over it, as token ids of a chat."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["turns"][0] for line in file]
    chosen = texts[:: max(1, len(texts) // number)][:number]
    return [chat_ids(engine, text) for text in chosen]


def chat_ids(engine: Engine, text: str) -> list[int]:
    return encode_chat(engine.tokenizer, [{"role": "user", "content": text}])[-1536:]


def compare(loaded: Loaded, cases: list[Case]) -> dict[str, int]:
    """Runs every condition; returns tokens compared, differing answers, preemptions, and so on."""
    totals = {"tokens": 0, "different": 0, "preemptions": 0, "prefix_hits": 0, "accepted_drafts": 0}
    expected: Answers = []
    for name, answers, engine in conditions(loaded, cases):
        if not expected:
            expected = answers
            continue
        different = [i for i, (a, b) in enumerate(zip(answers, expected, strict=True)) if a != b]
        totals["tokens"] += sum(map(len, expected))
        totals["different"] += len(different)
        totals["preemptions"] += engine.scheduler.num_preemptions
        totals["prefix_hits"] = max(totals["prefix_hits"], engine.scheduler.num_prefix_hits)
        drafts = engine.metrics.drafts
        totals["accepted_drafts"] += drafts.num_accepted_tokens
        drafted = f", {drafts.num_accepted_tokens} of {drafts.num_draft_tokens} draft tokens accepted"
        print(
            f"{name}: {len(different)} of {len(cases)} differ, {engine.scheduler.num_preemptions} preemptions"
            f"{drafted if drafts.num_drafts else ''}",
            file=sys.stderr,
        )
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument(
        "--dataset", type=Path, nargs="+", required=True, help="JSON lines (.gz) with `turns`"
    )
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument("--structured-outputs", type=json.loads, help='As in a request: {"json": {...}}')
    args = parser.parse_args()
    structure = args.structured_outputs and StructuredOutputsParams(**args.structured_outputs)
    loaded = Loaded.default(model=args.model)
    share = args.num_prompts // len(args.dataset)
    prompts = [p for path in args.dataset for p in chat_prompts(loaded.engine, path, share)]
    summary: dict[str, object] = {"dtype": str(loaded.decoder.dtype), "prompts": len(prompts)}
    begin = time.perf_counter()
    different = 0
    for temperature in args.temperature:
        params = [
            SamplingParams(
                temperature=temperature, seed=i, max_tokens=args.max_tokens, structured_outputs=structure
            )
            for i in range(len(prompts))
        ]
        result = compare(loaded, list(zip(prompts, params, strict=True)))
        summary[f"temperature {temperature}"] = result
        different += result["different"]
    print(json.dumps({**summary, "seconds": round(time.perf_counter() - begin)}))
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()

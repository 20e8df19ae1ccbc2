"""Promise 1, as equality: the same bytes whatever the batch, the cache and the chunks.

    python benchmarks/lossless.py --dataset prompts.jsonl.gz --num-prompts 64 --max-tokens 128

Each prompt is answered alone, then under conditions that change everything but the request: `batch` for the
company it has, `drafts` for every draft method. Any difference is a bug. With --mixed the temperatures take
turns, and with them penalties, filters and a JSON schema. Prints how many tokens were compared and how many
preemptions happened; exits with 1 on a difference.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
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
from outpace.models.hub import resolve_model
from outpace.models.tokenizer import encode_chat
from outpace.policy.base import BatchView, SpeculationPolicy
from outpace.runtime.kv_cache import KVCache
from outpace.runtime.runner import build_runner
from outpace.sampling import SamplingParams, StructuredOutputsParams
from outpace.spec import proposer as proposers

Answers = list[tuple[int, ...]]
Case = tuple[list[int], SamplingParams]

SCHEMA = {
    "type": "object",
    "properties": {
        "answer": {"type": "string"},
        "keywords": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
        "certain": {"type": "boolean"},
    },
    "required": ["answer", "keywords", "certain"],
}
MIXTURE: list[dict[str, Any]] = [
    {},
    {"presence_penalty": 0.4, "frequency_penalty": 0.3},
    {"repetition_penalty": 1.2, "top_p": 0.9, "min_p": 0.02},
    {"structured_outputs": StructuredOutputsParams(json=SCHEMA)},
    {"top_k": 40, "logit_bias": {198: -2.0}, "min_tokens": 8},
]


@dataclass(frozen=True)
class Loaded:
    """A model in memory, from which engines with any settings are built."""

    engine: Engine
    decoder: Decoder
    draft_model: str

    @classmethod
    def default(cls, draft_model: str | None = None, **settings: Any) -> Loaded:
        engine = Engine.from_config(EngineConfig(**{"spec_method": "none"} | settings))
        return cls(engine, engine.runner.decoder, draft_model or str(resolve_model(engine.config.model)))

    @property
    def model(self) -> ModelConfig:
        return self.engine.model

    def build(self, num_blocks: int | None = None, **settings: Any) -> Engine:
        """An engine of its own with an empty cache, over the same weights."""
        config = replace(self.engine.config, **settings)
        blocks = num_blocks or self.engine.kv.blocks.num_blocks
        decoder = self.decoder
        kv = KVCache.of(decoder, blocks, config.enable_prefix_caching)
        runner = build_runner(config, decoder, kv)
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


def one_by_one(engine: Engine, cases: list[Case]) -> Answers:
    """Answers each case when the one before it has ended."""
    return [answer for case in cases for answer in run(engine, [case], lambda i: 0)]


def fewest_blocks(cases: list[Case]) -> int:
    """A cache that holds the longest case, hardly more."""
    longest = max(len(prompt) + (params.max_tokens or 0) for prompt, params in cases)
    return 5 * longest // (4 * BLOCK_SIZE) + 1


def batch_conditions(loaded: Loaded, cases: list[Case]) -> Iterator[tuple[str, Answers, Engine]]:
    """Without drafts: in company, from a cached prefix, preempted, in chunks."""
    together = loaded.build()
    yield "together, staggered", run(together, cases, lambda i: 3 * i), together
    yield "together, prefix cache hit", run(together, cases, lambda i: i // 4), together

    num_blocks = fewest_blocks(cases)
    small = loaded.build(num_blocks, enable_prefix_caching=False)
    yield "tiny cache", run(small, cases, lambda i: 0), small
    cached = loaded.build(num_blocks)
    yield "tiny cache with prefix caching", run(cached, cases, lambda i: 0), cached

    for rows in (17, 64, 333):
        chunked = loaded.build(max_num_batched_tokens=rows, max_num_seqs=min(rows, 16))
        yield f"chunks of {rows}", run(chunked, cases, lambda i: i), chunked


def draft_conditions(
    loaded: Loaded, cases: list[Case], methods: list[str]
) -> Iterator[tuple[str, Answers, Engine]]:
    """Each method alone, among 16, and under random limits where blocks are short."""
    for method in methods:
        drafting: dict[str, Any] = {"spec_method": method, "spec_tokens": 8, "spec_policy": "fixed"}
        if "draft_model" in method.split(","):  # the model itself, unless another was named
            drafting["spec_model"] = loaded.draft_model
        alone = loaded.build(**drafting)
        yield f"{method}, alone", one_by_one(alone, cases), alone
        among = loaded.build(max_num_seqs=16, **drafting)
        yield f"{method}, among 16", run(among, cases, lambda i: 0), among
        chaotic = loaded.build(fewest_blocks(cases), **drafting)
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


def mixed(prompts: list[list[int]], temperatures: list[float], max_tokens: int) -> list[Case]:
    """Each prompt with the next temperature and, every time these have come round, the next of MIXTURE."""
    return [
        (
            prompt,
            SamplingParams(
                temperature=temperatures[i % len(temperatures)],
                seed=i,
                max_tokens=max_tokens,
                **MIXTURE[i // len(temperatures) % len(MIXTURE)],
            ),
        )
        for i, prompt in enumerate(prompts)
    ]


def compare(loaded: Loaded, cases: list[Case], groups: list[str], methods: list[str]) -> dict[str, int]:
    """Runs the conditions; returns tokens compared, differing answers, preemptions, and so on."""
    totals = {"tokens": 0, "different": 0, "preemptions": 0, "prefix_hits": 0, "accepted_drafts": 0}
    expected = one_by_one(loaded.build(enable_prefix_caching=False), cases)
    of_group = {
        "batch": lambda: batch_conditions(loaded, cases),
        "drafts": lambda: draft_conditions(loaded, cases, methods),
    }
    for name, answers, engine in itertools.chain.from_iterable(of_group[group]() for group in groups):
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
            flush=True,
        )
    return totals


def main() -> None:
    known = [name for name in proposers.available() if name not in ("none", "synthetic")]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--spec-model", help="the draft model; the default is the model itself")
    parser.add_argument(
        "--dataset", type=Path, nargs="+", required=True, help="JSON lines (.gz) with `turns`"
    )
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument("--mixed", action="store_true", help="one run in which the parameters take turns")
    parser.add_argument("--conditions", nargs="+", choices=["batch", "drafts"], default=["batch", "drafts"])
    parser.add_argument("--methods", nargs="+", default=[*known, "suffix,prompt_lookup"])
    parser.add_argument("--num-threads", type=int)
    parser.add_argument("--max-num-seqs", type=int, default=64, help="at once; sets the size of the cache")
    args = parser.parse_args()
    loaded = Loaded.default(
        args.spec_model, model=args.model, num_threads=args.num_threads, max_num_seqs=args.max_num_seqs
    )
    share = args.num_prompts // len(args.dataset)
    prompts = [p for path in args.dataset for p in chat_prompts(loaded.engine, path, share)]
    runs = {
        f"temperature {temperature}": [
            (prompt, SamplingParams(temperature=temperature, seed=i, max_tokens=args.max_tokens))
            for i, prompt in enumerate(prompts)
        ]
        for temperature in args.temperature
    }
    if args.mixed:
        runs = {"mixed": mixed(prompts, args.temperature, args.max_tokens)}
    begin = time.perf_counter()
    results = {name: compare(loaded, cases, args.conditions, args.methods) for name, cases in runs.items()}
    summary = {"dtype": str(loaded.decoder.dtype), "prompts": len(prompts), **results}
    print(json.dumps({**summary, "seconds": round(time.perf_counter() - begin)}))
    sys.exit(1 if any(result["different"] for result in results.values()) else 0)


if __name__ == "__main__":
    main()

"""Streams: tree size x pruning, and the policy's own choice beside the best of them.

    python benchmarks/pruning.py shared/streams --data valid.jsonl.gz --model shared

Fixed trees of each size, with streams for each row whose chance of ending the accepted path is at least so
much (0: all rows, 1: the likeliest alone); then goodput, which chooses both by their price. Every engine
answers the same prompts in a closed loop, a group of prompts in turn with all others. Shown is the speed-up
over plain decoding in steps without prompts: tokens per second over tokens per second. Nothing else may run
on the machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from dataclasses import dataclass, field
from typing import Any

import lossless

from outpace.engine.engine import Engine
from outpace.models.tokenizer import encode_chat
from outpace.policy.base import StepRecord
from outpace.sampling import SamplingParams
from outpace.training.data import Report, read_conversations


@dataclass
class Counts:
    """Steps without prompts of an engine.

    Attributes:
        seconds: They took in all.
        tokens: They gave.
        sequences: Summed over them.
        stream_rows: Likewise, each as the share of the layers that it went through.
    """

    seconds: float = 0.0
    tokens: int = 0
    sequences: int = 0
    stream_rows: float = 0.0

    def add(self, record: StepRecord) -> None:
        if record.view.num_rows == len(record.view.sequences):
            self.seconds += record.seconds["total"]
            self.tokens += record.num_tokens
            self.sequences += len(record.view.sequences)
            self.stream_rows += record.num_stream_rows


@dataclass
class Measured:
    """An engine and what it did, by group of prompts."""

    engine: Engine
    groups: list[Counts] = field(default_factory=list)
    answers: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        learn = self.engine.policy.observe

        def observe(record: StepRecord) -> None:
            learn(record)
            self.groups[-1].add(record)

        self.engine.policy.observe = observe  # type: ignore[method-assign]

    def run(self, prompts: list[tuple[str, list[int]]], concurrency: int, max_tokens: int) -> None:
        """Answers prompts, so many at a time."""
        self.groups.append(Counts())
        waiting, num_running = iter(prompts), 0
        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        while True:
            for name, prompt in itertools.islice(waiting, concurrency - num_running):
                self.engine.add(self.engine.admission.requests(name, prompt, params))
                num_running += 1
            if not num_running:
                return
            for output in self.engine.step():
                self.answers.setdefault(output.request_id, []).extend(output.token_ids)
                num_running -= output.finish_reason is not None


def read_prompts(data: str, number: int, engine: Engine) -> list[tuple[str, list[int]]]:
    """Prompts up to their first answer."""
    rows = itertools.islice(read_conversations(data, Report()), number)
    return [
        (
            str(i),
            encode_chat(
                engine.tokenizer, list(itertools.takewhile(lambda m: m["role"] != "assistant", messages))
            ),
        )
        for i, (_, messages, _) in enumerate(rows)
    ]


def measure(loaded: lossless.Loaded, args: argparse.Namespace, concurrency: int) -> list[dict[str, Any]]:
    """All engines at one concurrency; a line of the table each."""
    streaming = {"spec_method": "streaming", "spec_model": args.draft, "max_num_seqs": concurrency}
    engines = {("off", 0, None): loaded.build(max_num_seqs=concurrency)}
    for size, least in itertools.product(args.sizes, args.min_probs):
        more = {"spec_policy": "fixed", "spec_tokens": size, "speculative_config": {"stream_min_prob": least}}
        engines["fixed", size, least] = loaded.build(**streaming, **more)
    engines["goodput", max(args.sizes), None] = loaded.build(**streaming, spec_tokens=max(args.sizes))
    prompts = read_prompts(args.data, args.warm_up + args.num_prompts, loaded.engine)
    measured = {name: Measured(engine) for name, engine in engines.items()}
    size = max(2 * concurrency, 8)
    groups = [prompts[i : i + size] for i in range(args.warm_up, len(prompts), size)]
    for group in [prompts[: args.warm_up], *groups]:
        for one in measured.values():
            one.run(group, concurrency, args.max_tokens)
    plain = measured["off", 0, None]
    if any(one.answers != plain.answers for one in measured.values()):
        sys.exit("answers differ from those of plain decoding: a bug")
    lines = []
    for (policy, nodes, least), one in measured.items():
        pairs = zip(one.groups[1:], plain.groups[1:], strict=True)
        ratios = [(a.tokens / a.seconds) / (b.tokens / b.seconds) for a, b in pairs]
        num_sequences = sum(g.sequences for g in one.groups[1:])
        lines.append(
            {
                "concurrency": concurrency,
                "policy": policy,
                "spec_tokens": nodes,
                "stream_min_prob": least,
                "speed_up": statistics.median(ratios),
                "tokens_per_step": sum(g.tokens for g in one.groups[1:]) / num_sequences,
                "stream_rows": sum(g.stream_rows for g in one.groups[1:]) / num_sequences,
            }
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("draft", help="streams, as outpace train wrote them")
    add("--data", required=True, help="conversations whose prompts are answered")
    add("--model", help="the target")
    add("--concurrency", type=int, nargs="+", default=[1, 16])
    add("--sizes", type=int, nargs="+", default=[1, 2, 3, 5, 8], help="nodes of a tree")
    add("--min-probs", type=float, nargs="+", default=[0.0, 0.05, 0.1, 0.2, 0.4, 1.0], help="least chances")
    add("--num-prompts", type=int, default=64)
    add("--warm-up", type=int, default=32, help="prompts before those that count")
    add("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    loaded = lossless.Loaded.default(model=args.model, max_num_seqs=max(args.concurrency))
    lines = []
    for concurrency in args.concurrency:
        found = measure(loaded, args, concurrency)
        lines += found
        print(f"\n{concurrency} at a time; speed-up (tokens per step, stream rows per sequence and step)\n")
        print("| nodes | " + " | ".join(f"streams from {least:g}" for least in args.min_probs) + " |")
        print("| --- " * (1 + len(args.min_probs)) + "|")
        cells = {(line["spec_tokens"], line["stream_min_prob"]): _cell(line) for line in found}
        for size in args.sizes:
            print(f"| {size} | " + " | ".join(cells[size, least] for least in args.min_probs) + " |")
        best = max((line for line in found if line["policy"] == "fixed"), key=lambda line: line["speed_up"])
        print(f"\nbest of these {_cell(best)}, goodput {_cell(found[-1])}", flush=True)
    print(json.dumps({"kind": "pruning", "lines": lines}))


def _cell(line: dict[str, Any]) -> str:
    return f"{line['speed_up']:.2f} ({line['tokens_per_step']:.2f}, {line['stream_rows']:.2f})"


if __name__ == "__main__":
    main()

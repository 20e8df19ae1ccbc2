"""What policies make of real drafts for real answers, with step times from a profile: no noise of a machine.

    outpace profile MODEL --output cost.json
    python benchmarks/replay.py cost.json --dataset cnndm.jsonl.gz humaneval.jsonl.gz --concurrency 1 8 32

The model answers each prompt once, greedily. Then every policy serves these answers in a closed loop: a real
draft method drafts from the tokens so far, a draft is accepted as far as it agrees with the answer, and a
step takes what the profile says. Prompts count as computed. So two policies differ by their choices alone,
and two draft methods by their drafts; `--no-confidence` hides from the policy how sure drafts are. Tokens per
second are over the steps in which all clients are busy. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lossless

from outpace.config import EngineConfig, SpeculativeConfig
from outpace.policy.base import (
    BatchView,
    PolicyContext,
    SequenceView,
    SpeculationPolicy,
    StepRecord,
    load_policy,
)
from outpace.policy.cost import CostModel, shape_of
from outpace.request import Request, Sequence
from outpace.sampling import SamplingParams
from outpace.spec.proposer import Proposer
from outpace.tree import DraftTree

HOST_S = 0.0006  # a step's other phases, as step logs of a served SmolLM2 have them
ASK_S, DRAFT_S = 2e-5, 1.5e-5  # making lookups, and for each sequence asked; likewise


@dataclass
class Running:
    """An answer on its way."""

    sequence: Sequence
    answer: tuple[int, ...]
    num_output: int

    @property
    def rest(self) -> tuple[int, ...]:
        return self.answer[self.num_output :]

    def view(self) -> SequenceView:
        return SequenceView(self.sequence.id, len(self.sequence.token_ids) - 1, len(self.rest) - 1)

    def accepted(self, tree: DraftTree) -> tuple[int, ...]:
        """The nodes on the way that the answer takes."""
        path: list[int] = []
        for node, (parent, token_id) in enumerate(zip(tree.parents, tree.token_ids, strict=True)):
            if parent == (path[-1] if path else -1) and token_id == self.rest[len(path)]:
                path.append(node)
        return tuple(path)

    def advance(self, path: tuple[int, ...]) -> int:
        """Appends the accepted tokens and one more."""
        tokens = self.rest[: len(path) + 1]
        self.sequence.token_ids += tokens
        self.sequence.num_computed = len(self.sequence.token_ids) - 1
        self.num_output += len(tokens)
        return len(tokens)


def start(number: int, prompt: list[int], answer: tuple[int, ...]) -> Running:
    request = Request(f"{number}-0", tuple(prompt), SamplingParams(), 0, len(answer))
    return Running(Sequence(request, [*prompt, answer[0]], len(prompt)), answer, 1)


def replay(
    policy: SpeculationPolicy,
    proposer: Proposer,
    cost: CostModel,
    cases: list[tuple[list[int], tuple[int, ...]]],
    concurrency: int,
    has_confidence: bool,
) -> dict[str, float]:
    """Serves all answers; tokens per second and what a step looked like."""
    waiting = deque(start(number, *case) for number, case in enumerate(cases))
    running: list[Running] = []
    seconds, num_tokens, num_rows, num_steps = 0.0, 0, 0, 0
    while True:
        while waiting and len(running) < concurrency:
            running.append(waiting.popleft())
        if len(running) < concurrency:
            break
        views = tuple(r.view() for r in running)
        context = sum(view.context_len for view in views)
        view = BatchView(views, len(views), context, 2**31, context, len(views))
        limits = policy.limits(view)
        trees = proposer.propose([r.sequence for r in running], limits)
        if not has_confidence:
            trees = [replace(tree, confidence=None) for tree in trees]
        kept = policy.trim(view, trees) or [len(tree) for tree in trees]
        trees = [tree.cut(min(k, v.max_draft)) for tree, k, v in zip(trees, kept, views, strict=True)]
        paths = tuple(r.accepted(tree) for r, tree in zip(running, trees, strict=True))
        rows = len(views) + sum(map(len, trees))
        record = StepRecord(view, tuple(limits), tuple(trees), paths, {}, rows, rows)
        shape = shape_of(record)
        target_s = float(cost.target_s(shape.rows, shape.samples, shape.context, shape.pairs))
        num_asked = len(limits) - limits.count(0)
        took = {
            "forward": target_s,
            "between": HOST_S,
            "propose": num_asked * DRAFT_S + ASK_S * (num_asked > 0),
        }
        took["total"] = sum(took.values())
        policy.observe(replace(record, seconds=took))
        seconds, num_rows, num_steps = seconds + took["total"], num_rows + rows, num_steps + 1
        num_tokens += sum(r.advance(path) for r, path in zip(running, paths, strict=True))
        for done in [r for r in running if not r.rest]:
            running.remove(done)
            policy.release(done.sequence.id)
            proposer.release(done.sequence.id)
    return {
        "tokens_per_s": round(num_tokens / seconds, 1),
        "tokens_per_sequence": round(num_tokens / num_steps / concurrency, 3),
        "rows": round(num_rows / num_steps, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("profile", type=Path, help="of outpace profile --output")
    parser.add_argument("--model")
    parser.add_argument("--dataset", type=Path, nargs="+", required=True)
    parser.add_argument("--num-prompts", type=int, default=64, help="in all")
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--method", default="prompt_lookup")
    parser.add_argument("--spec-tokens", type=int, default=12, help="where a policy does not say: NAME:K")
    parser.add_argument("--policies", nargs="+", default=["off", "fixed:1", "fixed:2", "fixed:3", "fixed:5",
                        "fixed:7", "smartspec:8", "goodput"])  # fmt: skip
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--no-confidence", action="store_true")
    args = parser.parse_args()
    loaded = lossless.Loaded.default(model=args.model, max_num_seqs=16)
    share = args.num_prompts // len(args.dataset)
    prompts = [p for path in args.dataset for p in lossless.chat_prompts(loaded.engine, path, share)]
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens, ignore_eos=True)
    answers = lossless.run(loaded.build(), [(prompt, params) for prompt in prompts], lambda i: 0)
    cases = list(zip(prompts, answers, strict=True))
    results: dict[str, dict[str, Any]] = {}
    for concurrency in args.concurrency:
        repeated = cases * -(-2 * concurrency // len(cases))
        for name in args.policies:
            policy, _, length = name.partition(":")
            config = SpeculativeConfig(
                method=args.method, num_speculative_tokens=int(length or args.spec_tokens)
            )
            proposer = loaded.build(spec_method=args.method, spec_policy="off").proposer
            made = load_policy(
                policy, PolicyContext(config, EngineConfig(), lambda: CostModel.load(args.profile))
            )
            found = replay(
                made, proposer, CostModel.load(args.profile), repeated, concurrency, not args.no_confidence
            )
            results[f"c={concurrency} {name}"] = found
            print(
                f"c={concurrency:<3} {name:12} " + "  ".join(f"{k} {v}" for k, v in found.items()), flush=True
            )
    print(json.dumps(results))


if __name__ == "__main__":
    main()

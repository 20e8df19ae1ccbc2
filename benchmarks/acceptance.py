"""How much of each draft method's drafts is accepted, by prompt set. Greedy, so any machine gives the same.

    python benchmarks/acceptance.py --dataset cnndm.jsonl.gz humaneval.jsonl.gz --num-prompts 32

And whether drafts know how good they are: of the nodes whose parent was accepted, how many were accepted too,
by the confidence that the method gave them.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import lossless

from outpace.policy.base import StepRecord
from outpace.policy.fixed import FixedPolicy
from outpace.sampling import SamplingParams
from outpace.spec import proposer as proposers

TENTHS = 10


class Watched(FixedPolicy):
    """A fixed length, and what became of its drafts.

    Attributes:
        reached: By tenth of confidence, nodes whose parent was accepted.
        accepted: Of these, those accepted themselves.
    """

    def __init__(self, num_tokens: int) -> None:
        super().__init__(num_tokens)
        self.reached, self.accepted = Counter[int](), Counter[int]()

    def observe(self, record: StepRecord) -> None:
        for draft, path in zip(record.drafts, record.paths, strict=True):
            if draft.confidence is None:
                continue
            for node, (parent, confidence) in enumerate(zip(draft.parents, draft.confidence, strict=True)):
                if parent < 0 or parent in path:
                    tenth = min(int(TENTHS * confidence), TENTHS - 1)
                    self.reached[tenth] += 1
                    self.accepted[tenth] += node in path


def measure(
    loaded: lossless.Loaded, prompts: list[list[int]], max_tokens: int, **drafting: Any
) -> dict[str, Any]:
    """Answers the prompts, eight at a time; the statistics of their drafts."""
    engine = loaded.build(spec_policy="fixed", max_num_seqs=8, **drafting)
    engine.policy = watched = Watched(drafting["spec_tokens"])
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    answers = lossless.run(engine, [(prompt, params) for prompt in prompts], lambda i: 0)
    drafts = engine.metrics.drafts
    num_tokens = sum(map(len, answers))
    num_steps = num_tokens - drafts.num_accepted_tokens  # of one sequence; each emits one token of the target
    return {
        "mean_acceptance_length": round(1 + drafts.num_accepted_tokens / max(drafts.num_drafts, 1), 2),
        "acceptance_rate": round(drafts.num_accepted_tokens / max(drafts.num_draft_tokens, 1), 3),
        "drafted_steps": round(drafts.num_drafts / num_steps, 3),
        "tokens_per_step": round(num_tokens / num_steps, 2),
        "tokens": num_tokens,
        "reached": watched.reached,
        "accepted": watched.accepted,
    }


def main() -> None:
    known = [name for name in proposers.available() if name not in ("none", "synthetic")]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--spec-model", help="the draft model; the default is the model itself")
    parser.add_argument(
        "--dataset", type=Path, nargs="+", required=True, help="JSON lines (.gz) with `turns`"
    )
    parser.add_argument("--num-prompts", type=int, default=32, help="of each dataset")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--methods", nargs="+", default=[*known, "suffix,prompt_lookup"])
    parser.add_argument("--spec-tokens", type=int, default=5)
    args = parser.parse_args()
    loaded = lossless.Loaded.default(args.spec_model, model=args.model)
    results: dict[str, dict[str, Any]] = {}
    print("| prompts | method | mean acceptance length | accepted | steps with a draft | tokens per step |")
    print("| --- | --- | --- | --- | --- | --- |")
    for path in args.dataset:
        prompts = lossless.chat_prompts(loaded.engine, path, args.num_prompts)
        for method in args.methods:
            drafting: dict[str, Any] = {"spec_method": method, "spec_tokens": args.spec_tokens}
            if method == "draft_model":
                drafting["spec_model"] = loaded.draft_model
            name = path.name.partition(".")[0]
            found = results[f"{name} {method}"] = measure(loaded, prompts, args.max_tokens, **drafting)
            print(
                f"| {name} | `{method}` | {found['mean_acceptance_length']} | {found['acceptance_rate']:.0%} "
                f"| {found['drafted_steps']:.0%} | {found['tokens_per_step']} |",
                flush=True,
            )
    print(
        "\n| method | "
        + " | ".join(f"{tenth / TENTHS} to {(tenth + 1) / TENTHS}" for tenth in range(TENTHS))
        + " |"
    )
    print("| --- " * (TENTHS + 1) + "|")
    for method in args.methods:
        of_method = [found for name, found in results.items() if name.endswith(f" {method}")]
        reached, accepted = Counter[int](), Counter[int]()
        for found in of_method:
            reached.update(found["reached"])
            accepted.update(found["accepted"])
        cells = (
            f"{accepted[i] / reached[i]:.0%} of {reached[i]}" if reached[i] else "" for i in range(TENTHS)
        )
        print(f"| `{method}` | " + " | ".join(cells) + " |")
    print(json.dumps({"spec_tokens": args.spec_tokens, "num_prompts": args.num_prompts, **results}))


if __name__ == "__main__":
    main()

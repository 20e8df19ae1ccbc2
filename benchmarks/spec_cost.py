"""What speculation costs where nothing is drafted: a step of several engines, in turn.

    python benchmarks/spec_cost.py

`bare` is the step without a proposer, a policy and their records, as if there were no speculation; `none` the
default; the others have a draft method whose limits are all 0. Nothing else may run on the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import lossless

from outpace.bench.workload import PROMPTS
from outpace.engine.engine import Engine
from outpace.request import Output
from outpace.sampling import SamplingParams
from outpace.tree import EMPTY_TREE


def bare_step(engine: Engine) -> list[Output]:
    """`Engine.step` with everything taken out that drafts need."""
    engine.metrics.start_step()
    plan = engine.scheduler.plan()
    engine.metrics.lap("plan")
    batch = engine.kv.place(plan.scheduled, [EMPTY_TREE] * len(plan.decoding))
    target = engine.runner.forward(batch)
    engine.metrics.lap("forward")
    verdict = engine.verifier.verify(batch, target)
    engine.kv.commit(batch, verdict)
    engine.metrics.lap("verify")
    outputs = engine.scheduler.advance(plan, verdict)
    engine.metrics.lap("advance")
    engine.metrics.finish_step(plan.decoding, outputs)
    return outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    loaded = lossless.Loaded.default(model=args.model, max_num_seqs=max(args.sequences))
    off: dict[str, Any] = {"spec_policy": "off", "spec_tokens": 5}
    result: dict[str, dict[str, float]] = {}
    for number in args.sequences:
        engines = {
            "bare": loaded.build(),
            "none": loaded.build(),
            "prompt_lookup": loaded.build(spec_method="prompt_lookup", **off),
            "suffix": loaded.build(spec_method="suffix", **off),
            "draft_model": loaded.build(spec_method="draft_model", spec_model=loaded.draft_model, **off),
        }
        params = SamplingParams(temperature=0, max_tokens=args.steps + 20, ignore_eos=True, seed=0)
        for engine in engines.values():
            for i in range(number):
                prompt = lossless.chat_ids(engine, PROMPTS[i % len(PROMPTS)])
                engine.add(engine.admission.requests(str(i), prompt, params))
            for _ in range(10):  # prompts
                engine.step()
        times: dict[str, list[float]] = {name: [] for name in engines}
        names = list(engines)
        for turn in range(args.steps):
            for place in range(len(names)):  # everyone follows everyone
                name = names[(turn + place) % len(names)]
                engine = engines[name]
                begin = time.perf_counter()
                _ = bare_step(engine) if name == "bare" else engine.step()
                times[name].append(time.perf_counter() - begin)
        medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
        ratios = {
            name: statistics.median(a / b for a, b in zip(times[name], times["bare"], strict=True))
            for name in names
        }
        print(
            f"{number:3} sequences: "
            + ", ".join(f"{name} {medians[name]:.2f} ms ({ratios[name] - 1:+.1%})" for name in names)
        )
        result[str(number)] = {name: round(ratio, 4) for name, ratio in ratios.items()}
    print(json.dumps({"ratio_to_bare": result}))


if __name__ == "__main__":
    main()

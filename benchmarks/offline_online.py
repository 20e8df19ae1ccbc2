"""Whether a draft is accepted as often when it is served as `outpace evaluate` says.

    python benchmarks/offline_online.py DIR --data held-out.jsonl.gz

The prompts are answered by evaluate's engine, then over HTTP by `outpace serve` with the same settings, as
many at a time; the server's counters are read from its /metrics before and after. Acceptance length and rate
must be within 2 % of each other; by depth they are shown. Greedy answers to the same prompts hardly differ,
so this holds on a busy machine, too, as long as the policy does not look at the clock: `fixed` by default.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from outpace.bench import client
from outpace.bench.report import provenance, read_drafts, speculation, summarise
from outpace.bench.servers import Server
from outpace.bench.workload import Closed, Query
from outpace.config import EngineConfig, flag
from outpace.training.evaluate import EvaluateConfig, engine_configs, evaluate, read_prompts

TOLERANCE = 0.02
NAMES = {"acceptance_length": "mean_acceptance_length", "acceptance_rate": "acceptance_rate"}
_SHARED = ("max_num_seqs", "max_num_batched_tokens", "num_threads")
_DRAFTING = ("spec_method", "spec_model", "spec_tokens", "spec_policy")


def serve_command(engine: EngineConfig) -> list[str]:
    """The words that serve an engine of these settings."""
    model = [] if engine.model is None else [engine.model]
    given = {name: getattr(engine, name) for name in (*_SHARED, *_DRAFTING)}
    flags = [word for name, value in given.items() if value is not None for word in (flag(name), str(value))]
    own = [sys.executable, "-m", "outpace", "serve", *model, "--port", "{port}"]
    return [*own, *flags, "--no-enable-prefix-caching"]


def served(config: EvaluateConfig, log_dir: Path) -> list[dict[str, Any]]:
    """What became of drafts over HTTP, at each concurrency."""
    _, engine, *_ = engine_configs(config)
    conversations, _ = read_prompts(config, [])
    queries = [Query(tuple(messages), config.max_tokens, seed) for seed, messages in enumerate(conversations)]
    server = Server("served", serve_command(engine), log_dir)
    server.start()
    try:
        endpoint = client.Endpoint(server.base_url, server.model, temperature=config.temperature)
        results = []
        for concurrency in config.concurrency:
            before = read_drafts(server.base_url)
            run = client.run(endpoint, queries, Closed(concurrency))
            found = speculation(before, read_drafts(server.base_url))
            failed = summarise(run, (), None)["errors"]
            if failed or found is None:
                sys.exit(f"not all was answered with drafts: {failed}\n{server.log_tail()}")
            results.append(found)
        return results
    finally:
        server.stop()


def compared(offline: dict[str, Any], online: dict[str, Any]) -> dict[str, Any]:
    """Both, and by what share the served numbers differ."""
    pairs = {name: (offline[name], online[of_server]) for name, of_server in NAMES.items()}
    return {
        "concurrency": offline["concurrency"],
        **{name: list(pair) for name, pair in pairs.items()},
        "acceptance_by_depth": [offline["acceptance_by_depth"], online["acceptance_per_position"]],
        "num_drafts": [offline["num_drafts"], online["drafts"]],
        "difference": {name: there / here - 1 for name, (here, there) in pairs.items()},
    }


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("draft", type=Path, help="what outpace train wrote")
    parser.add_argument("--data", required=True, help="JSON lines (.gz) with messages")
    parser.add_argument("--model")
    parser.add_argument("--num-prompts", type=int, default=80)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--spec-tokens", type=int)
    parser.add_argument("--spec-policy", default="fixed")
    parser.add_argument("--num-threads", type=int)
    args = parser.parse_args(words)
    config = EvaluateConfig(**vars(args) | {"concurrency": tuple(args.concurrency)})
    offline = evaluate(config)["results"]
    with tempfile.TemporaryDirectory() as log_dir:
        online = served(config, Path(log_dir))
    results = [compared(here, there) for here, there in zip(offline, online, strict=True)]
    print("| concurrency | | offline | served | difference |\n| --- | --- | --- | --- | --- |")
    for result in results:
        for name, difference in result["difference"].items():
            here, there = result[name]
            print(f"| {result['concurrency']} | {name} | {here:.4f} | {there:.4f} | {difference:+.2%} |")
        for depth, pair in enumerate(zip(*result["acceptance_by_depth"], strict=False), 1):
            here, there = pair
            print(f"| {result['concurrency']} | at depth {depth} | {here:.4f} | {there:.4f} | |")
    agrees = all(abs(x) <= TOLERANCE for result in results for x in result["difference"].values())
    print(json.dumps({"kind": "offline_online", **provenance(0), "results": results, "agrees": agrees}))
    sys.exit(not agrees)


if __name__ == "__main__":
    main()

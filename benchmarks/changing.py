r"""A served workload whose prompts change: drafts that are mostly right, then mostly wrong, then right again.

    python benchmarks/code_edits.py humaneval.jsonl.gz edits.jsonl
    python benchmarks/changing.py MODEL --spec-method prompt_lookup \
        --prompts edits.jsonl alpaca_eval.jsonl.gz edits.jsonl

A closed loop of `--clients` for each of the `--prompts` in turn, `--seconds` each, on one server per policy,
and all of it anew in each repetition. Printed are tokens per second of each phase, and how a policy fares
from the change on: tokens per second over those of the best other policy of the phase, by windows of `WINDOW`
steps that had all clients in them and no prompts. A policy is settled with the first window whose median over
the repetitions is within 5 % of the best other. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from outpace.bench import client, report, workload
from outpace.bench.plots import read_steps
from outpace.bench.servers import Server
from outpace.errors import OutpaceError

WINDOW, ENOUGH = 20, 0.95
SHOWN = 12  # windows of a phase that are printed

Run = Sequence[Mapping[str, Any]]  # the phases of a server's life


def serve(policy: str, args: argparse.Namespace, extra: Sequence[str], seed: int, folder: Path) -> Run:
    """All phases on a new server: throughput, and that of its windows."""
    name, _, length = policy.partition(":")
    log = folder / f"{name}{length}-{seed}.steps.jsonl"
    words = [sys.executable, "-m", "outpace", "serve", args.model, *extra, "--port", "{port}"]
    words += ["--spec-policy", name, "--step-log", str(log), *(("--spec-tokens", length) if length else ())]
    server = Server(log.stem, words, folder)
    server.start()
    try:
        endpoint = client.Endpoint(server.base_url, server.model)
        runs = [loop(endpoint, path, args, seed + 100 * phase) for phase, path in enumerate(args.prompts)]
    finally:
        server.stop()
    steps = read_steps(log)
    return [{"throughput": rate, "windows": windows(steps, began, args)} for began, rate in runs]


def loop(endpoint: client.Endpoint, path: Path, args: argparse.Namespace, seed: int) -> tuple[float, float]:
    """One phase: when it began, and its tokens per second."""
    conversations = workload.up_to(workload.read_dataset(path), args.max_prompt_chars)
    queries = workload.make_queries(conversations, [args.output_len] * len(conversations), seed)
    load = workload.Phased((workload.Phase(args.clients, args.seconds),))
    run = client.run(endpoint, queries, load, client.DEFAULT_TIMEOUT_S)
    if errors := [answer.error for answer in run.answers if answer.error]:
        raise OutpaceError(f"{len(errors)} requests failed: {errors[0]}")
    return run.began, report.phase_throughput(run, load)[0]["output_throughput"]


def windows(steps: Run, began: float, args: argparse.Namespace) -> list[float]:
    """Tokens per second of each `WINDOW` whole steps of a phase, in order."""
    whole = [
        step
        for step in steps
        if began <= step["time"] <= began + args.seconds
        and step["known_rows"] == step["sequences"] == args.clients
    ]
    parts = [whole[i : i + WINDOW] for i in range(0, len(whole) - WINDOW + 1, WINDOW)]
    return [sum(s["tokens"] for s in part) / sum(s["seconds"]["total"] for s in part) for part in parts]


def phase_of(runs: Mapping[str, Sequence[Run]], phase: int) -> dict[str, dict[str, Any]]:
    """Each policy in a phase: its throughput, the ratio to the best other, and when it was settled."""
    rates = {policy: [run[phase]["throughput"] for run in mine] for policy, mine in runs.items()}
    found = {}
    for policy, mine in runs.items():
        others = [other for other in runs if other != policy]
        best = max(others, key=lambda other: statistics.median(rates[other]))
        pairs = [
            (run[phase]["windows"], other[phase]["windows"])
            for run, other in zip(mine, runs[best], strict=True)
        ]
        number = min(min(len(a), len(b)) for a, b in pairs)
        ratios = [statistics.median(a[i] / b[i] for a, b in pairs) for i in range(number)]
        found[policy] = {
            "throughput": statistics.median(rates[policy]),
            "best_other": best,
            "ratio": statistics.median(a / b for a, b in zip(rates[policy], rates[best], strict=True)),
            "windows": ratios,
            "settled": next((i * WINDOW for i, ratio in enumerate(ratios) if ratio >= ENOUGH), None),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], epilog="what is not known here goes to outpace serve"
    )
    parser.add_argument("model")
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help="one dataset per phase")
    parser.add_argument("--policies", default="off,fixed:3,goodput")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=15.0, help="of a phase")
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--max-prompt-chars", type=int, default=2100)
    parser.add_argument("--repetitions", type=int, default=5)
    args, extra = parser.parse_known_args()
    for name in ("clients", "repetitions", "seconds"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} must be above 0, got {getattr(args, name)}")
    policies = args.policies.split(",")
    runs: dict[str, list[Run]] = {policy: [] for policy in policies}
    try:
        for path in args.prompts:
            workload.read_dataset(path)  # before a server starts
        with tempfile.TemporaryDirectory() as folder:
            for repetition in range(args.repetitions):
                for policy in reversed(policies) if repetition % 2 else policies:
                    runs[policy].append(serve(policy, args, extra, repetition, Path(folder)))
                    shown = ", ".join(f"{phase['throughput']:.0f}" for phase in runs[policy][-1])
                    print(f"repetition {repetition + 1}, {policy}: {shown} tokens/s", flush=True)
    except OutpaceError as error:
        sys.exit(str(error))
    phases = [phase_of(runs, phase) for phase in range(len(args.prompts))]
    for path, phase in zip(args.prompts, phases, strict=True):
        print(path.name)
        for policy, found in phase.items():
            late = "not seen" if found["settled"] is None else f"after {found['settled']} steps"
            first = " ".join(f"{ratio:.2f}" for ratio in found["windows"][:SHOWN])
            print(
                f"  {policy:10} {found['throughput']:6.0f} tokens/s, {found['ratio']:.2f} of "
                f"{found['best_other']} (within 5 % {late}; windows {first})"
            )
    print(json.dumps({"runs": runs, "phases": phases}))


if __name__ == "__main__":
    main()

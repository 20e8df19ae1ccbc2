"""What a sweep's closed loops give without their ends, from its step logs.

    outpace bench sweep ... --concurrency 8 --step-log --json eight.json
    python benchmarks/steady.py eight.json

In a run of a few answers per client the ends weigh. Answers of equal length keep plain decoding in step: all
end at once. Drafted ones end one by one, and the last steps hold few sequences. A server whose clients never
stop has no such steps, so only those count that had all clients in them, running or waiting. Of these, steps
with prompts have a time and answer tokens per prompt token, steps without have tokens per second; a request
of the run's mean lengths takes its prompt from the first, and what is left of its answer from the second.
Ratios are to the baseline in the same repetition, then medians; the geometric mean is over the loads. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from outpace.bench import report
from outpace.bench.plots import read_steps
from outpace.errors import ConfigError

Step = Mapping[str, Any]


def steady_throughput(steps: Sequence[Step], clients: int, run: Mapping[str, Any]) -> float | None:
    """Answer tokens per second of a closed loop that does not end; None if too little of it was seen.

    Args:
        steps: Of a run.
        clients: Sequences that are there at any time.
        run: Its summary.
    """
    full = [step for step in steps if step["scheduled"] + step["waiting"] >= clients]
    decoding = [step for step in full if step["known_rows"] == step["sequences"] == step["scheduled"]]
    others = [step for step in full if step["known_rows"] > step["sequences"]]
    if not decoding or not others:
        return None
    prompts, answers = run["prompt_tokens"], run["output_tokens"]
    share = prompts / sum(step["known_rows"] - step["sequences"] for step in others)
    left = answers - share * _tokens(others)
    return float(answers / (share * _seconds(others) + left * _seconds(decoding) / _tokens(decoding)))


def _seconds(steps: Sequence[Step]) -> float:
    return float(sum(step["seconds"]["total"] for step in steps))


def _tokens(steps: Sequence[Step]) -> int:
    return int(sum(step["tokens"] for step in steps))


def of_sweep(result: Mapping[str, Any]) -> dict[str, dict[str, dict[int, float]]]:
    """Steady throughput by load, configuration and repetition."""
    configurations = result["plan"]["configurations"]
    if without := [c["label"] for c in configurations if not c["step_log"]]:
        raise ConfigError(f"no step log of {', '.join(without)}: run the sweep with --step-log")
    logs = {c["label"]: read_steps(Path(c["step_log"])) for c in configurations}
    clients = {point["load"]: int(point["value"]) for point in result["points"]}
    found: dict[str, dict[str, dict[int, float]]] = {load: {label: {} for label in logs} for load in clients}
    for cell in result["cells"]:
        if "error" in cell:
            continue
        load, label, run = cell["load"], cell["configuration"], cell["summary"]
        begin, end = run["began"], run["began"] + run["duration_s"]
        steps = [step for step in logs[label] if begin <= step["time"] <= end]
        rate = steady_throughput(steps, clients[load], run)
        if rate is not None:
            found[load][label][cell["repetition"]] = rate
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="of outpace bench sweep --step-log")
    args = parser.parse_args()
    try:
        results = [report.read_json(path) for path in args.results]
        found = {load: rates for result in results for load, rates in of_sweep(result).items()}
    except ConfigError as error:
        parser.error(str(error))
    baseline = results[0]["plan"]["baseline"]
    labels = [label for label in next(iter(found.values())) if label != baseline]
    print(f"| load | {baseline}, tokens/s | " + " | ".join(labels) + " |")
    print("| --- " * (len(labels) + 2) + "|")
    ratios: dict[str, dict[str, float]] = {}
    for load, rates in found.items():
        base = rates[baseline]
        ratios[load] = {
            label: statistics.median(rate / base[n] for n, rate in rates[label].items() if n in base)
            for label in labels
            if rates.get(label, {}).keys() & base.keys()
        }
        shown = " | ".join(f"{ratios[load][x]:.2f}" if x in ratios[load] else "" for x in labels)
        print(f"| {load} | {statistics.median(base.values()):.0f} | {shown} |")
    means = {
        label: report.geometric_mean([at[label] for at in ratios.values()])
        for label in labels
        if all(label in at for at in ratios.values())
    }
    print(
        "| geometric mean | | " + " | ".join(f"{means[x]:.3f}" if x in means else "" for x in labels) + " |"
    )
    print(json.dumps({"ratios": ratios, "geometric_mean": means}))


if __name__ == "__main__":
    main()

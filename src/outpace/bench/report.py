"""From answers to numbers: percentiles, goodput, throughput over time, speculation, provenance."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from outpace import __version__
from outpace.bench import client
from outpace.bench.client import Answer, Run
from outpace.bench.workload import Phased
from outpace.errors import ConfigError

WINDOW_S = 1.0  # of throughput over time
PERCENTILES = (50, 90, 99)
LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")
_PACKAGES = ("torch", "numpy", "transformers")
_COUNTERS = ("outpace:spec_decode_num_", "vllm:spec_decode_num_")
_GOALS = {"ttft": "ttft_s", "tpot": "tpot_s", "e2el": "e2e_s"}


@dataclass(frozen=True)
class Goal:
    """A latency that an answer must not exceed to count as good."""

    name: str
    limit_ms: float

    def is_met(self, answer: Answer) -> bool:
        """Whether it is; an answer of one token has no TPOT and meets any."""
        seconds = getattr(answer, _GOALS[self.name])
        return seconds is None or seconds * 1e3 <= self.limit_ms


def parse_goals(texts: Iterable[str]) -> tuple[Goal, ...]:
    """Reads `ttft:500`, `tpot:50`, `e2el:5000`, in milliseconds.

    Raises:
        ConfigError: A name is unknown or given twice, or a limit is no number above 0.
    """
    goals: list[Goal] = []
    for text in texts:
        name, _, limit = text.partition(":")
        try:
            goal = Goal(name, float(limit))
        except ValueError:
            goal = Goal(name, math.nan)
        if name not in _GOALS or not 0 < goal.limit_ms < math.inf or name in [g.name for g in goals]:
            raise ConfigError(f"--goodput takes each of {', '.join(_GOALS)} once, as ttft:500; got {text!r}")
        goals.append(goal)
    return tuple(goals)


# --- Statistics -----------------------------------------------------------------------------------------


def distribution(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles (linear between ranks), or None of nothing."""
    if not values:
        return None
    ranks = np.percentile(values, PERCENTILES)
    named = {f"p{rank}": float(value) for rank, value in zip(PERCENTILES, ranks, strict=True)}
    return {"mean": float(np.mean(values)), **named}


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median, quartiles and range of repetitions, or None of nothing."""
    if not values:
        return None
    low, q1, median, q3, high = (float(x) for x in np.percentile(values, (0, 25, 50, 75, 100)))
    return {"median": median, "q1": q1, "q3": q3, "min": low, "max": high, "n": len(values)}


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers; of nothing it is 1."""
    return math.exp(math.fsum(map(math.log, values)) / max(1, len(values)))


def windows(run: Run, seconds: float = WINDOW_S) -> list[dict[str, float]]:
    """Throughput and requests under way in each window of a run.

    An answer's tokens are spread evenly over its chunks, since chunks do not say how many they hold.
    """
    number = max(1, math.ceil(run.duration_s / seconds))
    tokens, busy = [0.0] * number, [0.0] * number
    for answer in run.answers:
        for chunk in answer.chunks_s:
            index = min(int(chunk / seconds), number - 1)
            tokens[index] += answer.output_tokens / len(answer.chunks_s)
        for index in range(int(answer.sent_s / seconds), min(int(answer.end_s / seconds) + 1, number)):
            begin, end = max(answer.sent_s, index * seconds), min(answer.end_s, (index + 1) * seconds)
            busy[index] += end - begin
    return [
        {"start_s": i * seconds, "output_throughput": tokens[i] / seconds, "running": busy[i] / seconds}
        for i in range(number)
    ]


def phase_throughput(run: Run, load: Phased) -> list[dict[str, float]]:
    """Tokens per second in each phase, those of answers that began in an earlier one included."""
    result, begin = [], 0.0
    for phase in load.phases:
        end = begin + phase.seconds
        tokens = sum(
            a.output_tokens / len(a.chunks_s)
            for a in run.answers
            for chunk in a.chunks_s
            if begin <= chunk < end
        )
        result.append(
            {"concurrency": phase.concurrency, "start_s": begin, "seconds": phase.seconds,
             "output_throughput": tokens / phase.seconds}
        )  # fmt: skip
        begin = end
    return result


# --- Speculation ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drafts:
    """Counters of speculative decoding, as /metrics has them."""

    counts: Mapping[str, float]
    per_position: Mapping[int, float]


def read_drafts(base_url: str, api_key: str | None = None) -> Drafts | None:
    """The server's counters now, or None if it shows none."""
    try:
        return parse_drafts(client.get(base_url, "/metrics", api_key).decode(errors="replace"))
    except (ConfigError, ValueError):  # there need not be metrics, nor in this format
        return None


def parse_drafts(text: str) -> Drafts | None:
    """Finds `outpace:spec_decode_*` or vLLM's same counters in Prometheus' text format; sums over engines.

    Raises:
        ValueError: The text is not in this format.
    """
    counts: defaultdict[str, float] = defaultdict(float)
    per_position: defaultdict[int, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            prefix = next((p for p in _COUNTERS if sample.name.startswith(p)), None)
            if prefix is None or not sample.name.endswith("_total"):
                continue
            if "position" in sample.labels:
                per_position[int(sample.labels["position"])] += sample.value
            else:
                counts[sample.name.removeprefix(prefix).removesuffix("_total")] += sample.value
    return Drafts(counts, per_position) if "drafts" in counts else None


def speculation(before: Drafts | None, after: Drafts | None) -> dict[str, Any] | None:
    """What was drafted and accepted between two scrapes; None if the server does not say, or never drafted.

    The mean acceptance length counts the token that the target adds: 1 + accepted / drafts.
    """
    if before is None or after is None:
        return None
    drafts, drafted, accepted = (
        after.counts.get(name, 0) - before.counts.get(name, 0)
        for name in ("drafts", "draft_tokens", "accepted_tokens")
    )
    if drafts <= 0:
        return None
    positions = sorted(after.per_position)
    return {
        "drafts": int(drafts),
        "draft_tokens": int(drafted),
        "accepted_tokens": int(accepted),
        "acceptance_rate": accepted / drafted if drafted else 0.0,
        "mean_acceptance_length": 1 + accepted / drafts,
        "acceptance_per_position": [
            (after.per_position[i] - before.per_position.get(i, 0)) / drafts for i in positions
        ],
    }


# --- A run's summary ------------------------------------------------------------------------------------


def summarise(run: Run, goals: Sequence[Goal], drafts: dict[str, Any] | None) -> dict[str, Any]:
    """The numbers of a run. Latencies and tokens are of complete answers; the others count as failed."""
    good = [answer for answer in run.answers if answer.error is None]
    seconds = run.duration_s or math.inf
    output = sum(answer.output_tokens for answer in good)
    prompt = sum(answer.prompt_tokens or 0 for answer in good)
    errors = Counter(answer.error for answer in run.answers if answer.error is not None)
    has_prompt = all(answer.prompt_tokens is not None for answer in good)
    summary: dict[str, Any] = {
        "num_requests": len(run.answers),
        "num_completed": len(good),
        "num_failed": len(run.answers) - len(good),
        "errors": dict(errors.most_common()),
        "duration_s": run.duration_s,
        "began": run.began,
        "prompt_tokens": prompt if has_prompt else None,
        "output_tokens": output,
        "tokens_are": _counted_by(good),
        "request_throughput": len(good) / seconds,
        "output_throughput": output / seconds,
        "total_throughput": (prompt + output) / seconds if has_prompt else None,
        "ttft_ms": distribution([a.ttft_s * 1e3 for a in good]),
        "tpot_ms": distribution([a.tpot_s * 1e3 for a in good if a.tpot_s is not None]),
        "itl_ms": distribution([gap * 1e3 for a in good for gap in a.itl_s]),
        "e2e_ms": distribution([a.e2e_s * 1e3 for a in good]),
        "sent_late_ms": max((a.sent_s - a.due_s) * 1e3 for a in run.answers) if run.answers else 0.0,
        "client_cpu_share": run.client_cpu_s / seconds,
        "speculation": drafts,
    }
    if goals:
        num_met = sum(all(goal.is_met(answer) for goal in goals) for answer in good)
        summary["goodput"] = num_met / seconds
        summary["goodput_share"] = num_met / max(1, len(run.answers))
        summary["goals_ms"] = {goal.name: goal.limit_ms for goal in goals}
    return summary


def _counted_by(good: Sequence[Answer]) -> str:
    kinds = {answer.has_usage for answer in good}
    return {frozenset({True}): "the server's count", frozenset({False}): "chunks"}.get(
        frozenset(kinds), "partly the server's count, partly chunks" if kinds else "none"
    )


def print_summary(summary: Mapping[str, Any]) -> None:
    """The table of a run, on stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    latency = Table(title=None)
    latency.add_column("ms")
    names = ("mean", *(f"p{rank}" for rank in PERCENTILES))
    for name in names:
        latency.add_column(name, justify="right")
    for key in LATENCIES:
        values = summary[key]
        cells = [f"{values[name]:.1f}" for name in names] if values else ["-"] * len(names)
        latency.add_row(key.removesuffix("_ms").upper(), *cells)
    console.print(latency)
    for text in _lines(summary):
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _lines(summary: Mapping[str, Any]) -> Iterable[str]:
    yield (
        f"requests: {summary['num_completed']} complete, {summary['num_failed']} failed "
        f"in {summary['duration_s']:.1f} s; {summary['request_throughput']:.2f} requests/s"
    )
    total = summary["total_throughput"]
    rest = "" if total is None else f", {total:.1f} with the prompts'"
    yield f"tokens/s: {summary['output_throughput']:.1f}{rest} (counted by {summary['tokens_are']})"
    if "goodput" in summary:
        goals = ", ".join(f"{name} {limit:g} ms" for name, limit in summary["goals_ms"].items())
        share = summary["goodput_share"]
        yield f"goodput: {summary['goodput']:.2f} requests/s, {share:.1%} of all, met {goals}"
    if drafts := summary["speculation"]:
        yield (
            f"drafts: {drafts['drafts']}, {drafts['draft_tokens']} tokens, "
            f"{drafts['accepted_tokens']} accepted ({drafts['acceptance_rate']:.1%}); "
            f"mean acceptance length {drafts['mean_acceptance_length']:.2f}"
        )
        positions = " ".join(f"{rate:.2f}" for rate in drafts["acceptance_per_position"])
        yield f"accepted at position 1, 2, ... per draft: {positions}"
    for error, number in summary["errors"].items():
        yield f"FAILED {number} times: {error}"


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a result as a whole or not at all.

    Raises:
        ConfigError: The file cannot be written.
    """
    draft = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(result, indent=1), encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None


SWEEP_PARTS = ("plan", "repetitions", "points", "cells")


def read_json(path: Path) -> dict[str, Any]:
    """A result that was written.

    Raises:
        ConfigError: It cannot be read, is no JSON object, or is a sweep that lacks a part.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the result {path}: {error}") from None
    if not isinstance(result, dict):
        raise ConfigError(f"cannot read the result {path}: it is no JSON object")
    if result.get("kind") == "sweep" and (lacking := [part for part in SWEEP_PARTS if part not in result]):
        raise ConfigError(f"{path} is no whole result of outpace bench sweep: it lacks {', '.join(lacking)}")
    return result


# --- Where a result is from -----------------------------------------------------------------------------


def provenance(seed: int) -> dict[str, Any]:
    """Command, commit, versions, hardware, seed and date of a measurement."""
    versions = {"outpace": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": _command(),
        "commit": _commit(),
        "versions": versions,
        "hardware": _hardware(),
        "seed": seed,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _command() -> str:
    """The command line, without the secret in it."""
    words = ["outpace", *sys.argv[1:]]
    for i, word in enumerate(words):
        if word.startswith("--api-key="):
            words[i] = "--api-key=..."
        elif i and words[i - 1] == "--api-key":
            words[i] = "..."
    return shlex.join(words)


def _commit() -> str | None:
    """The commit of the sources, with a mark if they differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    return _output(command)


def _hardware() -> dict[str, Any]:
    try:
        model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        model = None
    return {
        "cpu": model[1].strip() if model else platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]),
        "system": platform.platform(),
    }


def _output(command: list[str]) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
